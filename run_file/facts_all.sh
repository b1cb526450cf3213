#!/usr/bin/env bash
# The facts experiment: every arm with three seeds, then the table and the plots. An interrupted one goes on.
#
#   bash run_file/facts_all.sh                       SCALE=full on a GPU
#   ARMS="original knowledge" SEEDS="0" bash run_file/facts_all.sh
#
# Result: runs/facts-$SCALE/table.md, tail.png, followed.png
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ARMS=${ARMS:-original original_flops no_ffn no_ffn_matched pkm knowledge_lm_only knowledge knowledge_oracle no_ffn_knowledge context}
SEEDS=${SEEDS:-0 1 2}
bash run_file/facts_prepare.sh
source run_file/facts_settings.sh
for seed in $SEEDS; do
  for arm in $ARMS; do
    echo "== $arm, seed $seed"
    bash run_file/facts_arm.sh "$arm" "$seed" "$@"
  done
done
minilm facts table --runs "$runs" --out "$runs"
