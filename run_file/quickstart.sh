#!/usr/bin/env bash
# From nothing to a trained language model: environment, corpus, tokenizer, training, evaluation, text.
#
#   bash run_file/quickstart.sh                       about 5 minutes on 2 CPU cores, after the installation
#   bash run_file/quickstart.sh --train.steps=50      further words are settings for train.py
#
# On a GPU the reference size (25.8 M parameters) is trained, on a CPU a model of 3 M. Run it again: what is there
# is used, an interrupted training goes on, and a finished one is only evaluated. QUICKSTART_RUN names another run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source run_file/install.sh
install_minilm dashboard

if [[ " $* " == *" --run.name"* ]]; then
  echo "Name the run with QUICKSTART_RUN=NAME bash run_file/quickstart.sh, so that all stages use it." >&2
  exit 2
fi
device=$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
run=${QUICKSTART_RUN:-quickstart}
data=data/quickstart
echo "== corpus and tokenizer ($device)"
# Documentation twice an epoch: it is a quarter of the text, and what the samples should look like.
corpus=(--source "builtin:python-docs,weight=2" --source builtin:python-source)
minilm tokenizer train "${corpus[@]}" --vocab-size 6400 --out "$data/tokenizer"
minilm data build "${corpus[@]}" --tokenizer "$data/tokenizer" --out "$data/store"

echo "== training"
python train.py --config "run_file/quickstart_$device.yaml" --run.name="$run" --resume "$@"

echo "== evaluation"
python eval.py --checkpoint "runs/$run" --samples 2 --json "runs/$run/evaluation.json"

echo "== text"
minilm generate --checkpoint "runs/$run" --prompt "Return the" --max-new-tokens 80 --temperature 0.7 --seed 1

cat <<END

Done.
  run folder   runs/$run
  curve        runs/$run/loss.png
  samples      runs/$run/samples.md
  evaluation   runs/$run/evaluation.json
  dashboard    swanlab watch runs/swanlog      (inside the environment: source .venv/bin/activate)
END
