# minilm on a machine with NVIDIA GPUs. docs/docker.md says how it is used and what of it has been tried.
#
#   docker build --tag minilm .
#   docker run --rm --gpus all --shm-size 2g --volume "$PWD/runs:/opt/minilm/runs" minilm bash run_file/quickstart.sh
#
# The torch of the package index brings its own CUDA 13 libraries and needs a driver of 580 or newer, like this base.
ARG BASE=nvidia/cuda:13.0.2-runtime-ubuntu24.04
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# gcc and the headers of Python: torch.compile and DeepSpeed build small pieces of C when they are first used.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates gcc git libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The user who trains owns nothing of the program. Ubuntu's image has a user 1000 of its own: files that are shared
# with the host should belong to the first user of the host, so that number is taken over.
ARG USER_ID=1000
RUN if old=$(getent passwd "${USER_ID}"); then userdel --remove "${old%%:*}"; fi; \
    useradd --create-home --shell /bin/bash --uid "${USER_ID}" minilm

WORKDIR /opt/minilm
ENV MINILM_VENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1

# Dependencies are gigabytes and seldom change; the source is small and changes often. Two layers, this one first.
COPY pyproject.toml ./
COPY run_file/install.sh run_file/
RUN --mount=type=cache,target=/root/.cache/pip \
    . run_file/install.sh; install_dependencies dashboard

COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    . run_file/install.sh; install_minilm dashboard; \
    python -m compileall -q minilm; \
    install --directory --owner=minilm --group=minilm data runs stores tokenizers

ARG REVISION=unknown
LABEL org.opencontainers.image.title="minilm" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"

USER ${USER_ID}
VOLUME ["/opt/minilm/data", "/opt/minilm/runs"]

# A training has no port to ask. Whether it lives is in its metrics; the dashboard of compose.yaml has a check of its own.
HEALTHCHECK NONE
CMD ["bash", "run_file/quickstart.sh"]
