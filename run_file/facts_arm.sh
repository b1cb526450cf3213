#!/usr/bin/env bash
# Train one arm of the facts experiment with one seed, and ask it.
#
#   bash run_file/facts_arm.sh ARM SEED [settings for train.py]
#
#   original             attention and feed-forward
#   original_flops       the same, with as many more steps as the arithmetic of `knowledge` allows
#   no_ffn               without feed-forward, as deep;  no_ffn_matched: as many parameters, deeper
#   pkm                  product-key values in one layer
#   knowledge            reads the database; retrieval learnt from labels and from the loss of the language model
#   knowledge_lm_only    the same without labels;  knowledge_oracle: the labelled entry is what is read
#   no_ffn_knowledge     no_ffn that reads the database
#   context              original, with the entry in the text before each fact, in training and in the questions
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
arm=${1:?"usage: bash run_file/facts_arm.sh ARM SEED, see its first lines"} seed=${2:?"usage: facts_arm.sh ARM SEED"}
shift 2
source run_file/facts_settings.sh

asked=() words=(--model.name="$arm")
# The norm that is clipped holds the retrieval losses' gradient: at 1 it would bite in three of four steps, without these
# losses in one of fifty. What came of either: experiment/FACTS.md.
unclipped=(--optim.clip_norm=10)
reads=(--model.store="$facts/knowledge/entries" --model.store_side="$side" --model.store_width="$width" "${memory[@]}")
case $arm in
  original) ;;
  pkm) words+=("${table[@]}") ;;
  original_flops)
    steps=$(python run_file/facts/equal_steps.py "run_file/facts/$SCALE.yaml" --model.name=knowledge "${reads[@]}")
    words=(--train.steps="$steps")
    ;;
  no_ffn) ;;
  no_ffn_matched) words+=(--model.num_layers="$deep") ;;
  knowledge | no_ffn_knowledge) words+=("${reads[@]}" "${unclipped[@]}") ;;
  knowledge_lm_only) words=(--model.name=knowledge "${reads[@]}" --model.retrieval_weight=0 --model.index_weight=0) ;;
  knowledge_oracle) words=(--model.name=knowledge "${reads[@]}" --model.retrieval=oracle "${unclipped[@]}") ;;
  context) words=(--data.store="$facts/store_context") asked+=(--context) ;;
  *)
    echo "There is no arm $arm: see the first lines of run_file/facts_arm.sh." >&2
    exit 2
    ;;
esac
case $arm in knowledge* | no_ffn_knowledge) asked+=(--knowledge "$facts/knowledge") ;; esac

run=$runs/$arm-$seed
if [ -f "$run/facts.json" ]; then
  echo "$run is there already."
  exit 0
fi
python train.py --config "run_file/facts/$SCALE.yaml" --run.folder="$runs" --run.name="$arm-$seed" --resume \
  --train.seed="$seed" "${words[@]}" "$@"
minilm facts score --checkpoint "$run" --facts "$facts/texts" --json "$run/facts.json" "${asked[@]}"
