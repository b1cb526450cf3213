#!/usr/bin/env bash
# Experiment 1.4.0, the baseline: original, 25.8 M parameters, 3 epochs, on one GPU, in the background.
#
#   bash run_file/experiment_1_4_0.sh                              builtin:python as data
#   DATA=corpus.jsonl CUDA_VISIBLE_DEVICES=1 bash run_file/experiment_1_4_0.sh --train.epochs=1
#   bash run_file/experiment_1_4_0.sh --dry-run                    check and say what would be done
#   SCALE=cpu bash run_file/experiment_1_4_0.sh                    1.2 M parameters, 300 steps, to the end, 5 minutes
#
# DATA     a store (minilm data build), a file or folder of texts, or builtin:...
# RUNS     where the run folder is made; an interrupted run goes on
# GPUS     number of GPUs (1);  GPU_GB, DISK_GB: what must be free before the start
# Flags: --dry-run, --foreground; all others are settings for train.py. Settings: run_file/experiment_1_4_0/SCALE.yaml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=run_file/experiment_start.sh
source run_file/experiment_start.sh
experiment_words "$@"
case $SCALE in
  cpu) : "${DATA:=builtin:python-docs}" "${DISK_GB:=1}" "${GPU_GB:=0}" "${VOCABULARY:=4096}" ;;
  full) : "${DATA:=builtin:python}" "${DISK_GB:=10}" "${GPU_GB:=16}" "${VOCABULARY:=6400}" ;;
esac
RUNS=${RUNS:-runs/experiment_1_4_0-$SCALE}
run=$RUNS/original
if [ "$SCALE" = cpu ]; then foreground=1; fi

experiment_install
experiment_checks "$RUNS" "$DATA"
if [ "$foreground" = 0 ] && [ "$dry_run" = 0 ]; then
  experiment_background "$RUNS" "$@"
  exit 0
fi

store=$DATA
if [ ! -f "$DATA/manifest.json" ]; then
  data=data/experiment_1_4_0/$SCALE-$(cksum <<<"$DATA" | cut -d ' ' -f 1)
  store=$data/store
  run_command minilm tokenizer train --source "$DATA" --vocab-size "$VOCABULARY" --out "$data/tokenizer"
  run_command minilm data build --source "$DATA" --tokenizer "$data/tokenizer" --out "$store"
fi
experiment_launch --config "run_file/experiment_1_4_0/$SCALE.yaml" --data.store="$store" --run.folder="$RUNS" \
  --run.name=original --resume "${settings[@]}"
experiment_evaluate "$run"
run_command minilm record "$run" --out "$RUNS/EXPERIMENT_1_4_0.md"
run_command minilm record --verify "$RUNS/EXPERIMENT_1_4_0.md"
