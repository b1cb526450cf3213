# shellcheck shell=bash
# Sourced by the other scripts and by the Dockerfile: a virtual environment with minilm in it.
#
#   MINILM_PYTHON  interpreter to use (3.11 or 3.12); default: the first of python3.12, python3.11, python3 that fits
#   MINILM_VENV    where the environment lives; default: .venv in the checkout
#
# It is in two steps, so that an image keeps what seldom changes in a layer of its own:
#   install_dependencies EXTRAS   what pyproject.toml asks for; needs no source
#   install_minilm EXTRAS         the same, then minilm itself, editable

install_dependencies() { # $1: extras, for instance dashboard,test
  local extras=$1 venv=${MINILM_VENV:-.venv} stamp wanted python
  python=$(_find_python) || return 1
  if [ ! -x "$venv/bin/python" ]; then
    echo "== making the virtual environment $venv with $("$python" --version)"
    "$python" -m venv "$venv" || return 1
  fi
  # shellcheck disable=SC1091
  source "$venv/bin/activate"
  stamp="$venv/.dependencies-$extras"
  wanted="$(cat pyproject.toml run_file/install.sh | cksum)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "== installing what minilm needs (several minutes the first time)"
    # `|| return`: a caller with && or || turns `set -e` off in here, and a failed installation must not be stamped.
    python -m pip install --quiet --upgrade pip || return 1
    # torch first and by range: on its own, a newer release would be taken and then replaced.
    python -m pip install --progress-bar on 'torch>=2.11,<2.14' || return 1
    python -m pip install --progress-bar on -r <(_requirements "$extras") || return 1
    echo "$wanted" > "$stamp"
  fi
}

install_minilm() { # $1: extras
  local extras=$1 stamp wanted
  install_dependencies "$extras" || return 1
  stamp="${MINILM_VENV:-.venv}/.minilm-$extras"
  wanted="$(cat pyproject.toml run_file/install.sh | cksum) $(pwd)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "== installing minilm"
    # With the extras again, although all of it is there: pip compares what is installed with what is asked for.
    python -m pip install --quiet --editable ".[$extras]" || return 1
    echo "$wanted" > "$stamp"
  fi
}

_requirements() { # the dependencies of pyproject.toml, one a line, with those of the extras
  python - "$1" <<'END'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], sep="\n")
for extra in sys.argv[1].split(","):
    print(*extras[extra], sep="\n")
END
}

_find_python() {
  local candidate
  for candidate in ${MINILM_PYTHON:-python3.12 python3.11 python3 python}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return 0
    fi
  done
  echo "minilm needs Python 3.11 or 3.12 with the venv module (Debian: apt-get install python3-venv)." >&2
  echo "Name another interpreter with MINILM_PYTHON=/path/to/python3.11." >&2
  return 1
}
