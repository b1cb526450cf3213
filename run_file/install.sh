# shellcheck shell=bash
# Sourced by the other scripts: a virtual environment in the checkout with minilm in it.
#
#   MINILM_PYTHON  interpreter to use (3.11 or 3.12); default: the first of python3.12, python3.11, python3 that fits
#   MINILM_VENV    where the environment lives; default: .venv in the checkout

install_minilm() { # $1: extras, for instance dashboard,test
  local extras=$1 venv=${MINILM_VENV:-.venv} stamp wanted python
  python=$(_find_python) || return 1
  if [ ! -x "$venv/bin/python" ]; then
    echo "== making the virtual environment $venv with $("$python" --version)"
    "$python" -m venv "$venv"
  fi
  # shellcheck disable=SC1091
  source "$venv/bin/activate"
  stamp="$venv/.minilm-$extras"
  wanted="$(cat pyproject.toml run_file/install.sh | cksum) $(pwd)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "== installing minilm and what it needs (several minutes the first time)"
    python -m pip install --quiet --upgrade pip
    # torch first and by range: on its own, a newer release would be taken and then replaced.
    python -m pip install --progress-bar on 'torch>=2.11,<2.14'
    python -m pip install --progress-bar on --editable ".[$extras]"
    echo "$wanted" > "$stamp"
  fi
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
