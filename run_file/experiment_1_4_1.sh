#!/usr/bin/env bash
# Experiment 1.4.1: original, knowledge and no_ffn on the same data, with the same budget of steps; three records and
# one comparison with pictures.
#
#   SCALE=cpu bash run_file/experiment_1_4_1.sh        small, on a CPU to the end, about 10 minutes after the installation
#   bash run_file/experiment_1_4_1.sh                  the size of the baseline, on one GPU, in the background
#   DATA=STORE KNOWLEDGE=STORE bash run_file/experiment_1_4_1.sh --train.epochs=1
#   bash run_file/experiment_1_4_1.sh --dry-run
#
# DATA        a store of tokens; by default that of the made-up facts (run_file/facts_prepare.sh), some of which are
#             in a database and seldom or never in the text
# KNOWLEDGE   the knowledge store that `knowledge` reads (minilm knowledge build); SIDE, WIDTH: its grid and entries
# RUNS        where the run folders are made; what is finished is not trained again
# GPUS        number of GPUs (1);  GPU_GB, DISK_GB: what must be free before the start
# Flags: --dry-run, --foreground; all others are settings for train.py, the same for the three.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=run_file/experiment_start.sh
source run_file/experiment_start.sh
experiment_words "$@"
case $SCALE in
  cpu)
    : "${DISK_GB:=2}" "${GPU_GB:=0}" "${SIDE:=64}" "${WIDTH:=16}"
    memory=(--model.key_dim=64 --model.router_dim=128 --model.memory_heads=4 --model.memory_head_dim=16)
    ;;
  full)
    : "${DISK_GB:=20}" "${GPU_GB:=24}" "${SIDE:=256}" "${WIDTH:=16}"
    memory=()
    ;;
esac
RUNS=${RUNS:-runs/experiment_1_4_1-$SCALE}
own=0
if [ -n "${DATA:-}" ] || [ -n "${KNOWLEDGE:-}" ]; then
  own=1
  if [ ! -f "${DATA:-}/manifest.json" ] || [ ! -f "${KNOWLEDGE:-}/knowledge.json" ]; then
    echo "Give both: DATA=a store of tokens and KNOWLEDGE=a knowledge store; one of them is none." >&2
    exit 2
  fi
else
  DATA=data/facts/$SCALE/store KNOWLEDGE=data/facts/$SCALE/knowledge/entries
fi
if [ "$SCALE" = cpu ]; then foreground=1; fi

experiment_install
if [ "$own" = 1 ]; then experiment_checks "$RUNS" "$DATA" "$KNOWLEDGE"; else experiment_checks "$RUNS"; fi
if [ "$foreground" = 0 ] && [ "$dry_run" = 0 ]; then
  experiment_background "$RUNS" "$@"
  exit 0
fi

if [ "$own" = 0 ]; then
  export SCALE
  run_command bash run_file/facts_prepare.sh
fi
variants=(original knowledge no_ffn)
for variant in "${variants[@]}"; do
  words=(--model.name="$variant")
  if [ "$variant" = knowledge ]; then
    words+=(--model.store="$KNOWLEDGE" --model.store_side="$SIDE" --model.store_width="$WIDTH" "${memory[@]}")
  fi
  experiment_launch --config "run_file/experiment_1_4_1/$SCALE.yaml" --data.store="$DATA" --run.folder="$RUNS" \
    --run.name="$variant" --resume "${words[@]}" "${settings[@]}"
  if [ ! -f "$RUNS/$variant/eval.json" ]; then
    # The documents of the facts are short: 50 tokens in the mean.
    experiment_evaluate "$RUNS/$variant" --prompt-lengths 16 --continuation-tokens 16
  fi
done
base=$RUNS/original
run_command minilm record "$base" --out "$RUNS/EXPERIMENT_1_4_1_original.md"
run_command minilm record "$RUNS/knowledge" --baseline "$base" --other "$RUNS/no_ffn" --out "$RUNS/EXPERIMENT_1_4_1.md"
run_command minilm record "$RUNS/no_ffn" --baseline "$base" --out "$RUNS/EXPERIMENT_1_4_1_no_ffn.md"
run_command minilm compare "${variants[@]/#/$RUNS/}" --out "$RUNS/comparison"
run_command minilm record --verify "$RUNS"
