#!/usr/bin/env bash
# Install what the tests need into .venv and run them all. Arguments go to pytest: bash run_file/test.sh -k alignment
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source run_file/install.sh
install_minilm dashboard,test,docs,package

ruff check .
ruff format --check .
mypy
# Two workers and one thread each: a model of a test is too small to profit from more.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
python -m pytest -n 2 --dist loadgroup "$@"
