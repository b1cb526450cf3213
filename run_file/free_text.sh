#!/usr/bin/env bash
# The free-text experiment: does a store of sentences from other documents help a language model on new text?
#
#   bash run_file/free_text.sh                                  two CPU cores; an interrupted one goes on
#   ARMS="original knowledge" SEED=1 bash run_file/free_text.sh
#   SCALE=full SOURCES="wiki.jsonl.zst" bash run_file/free_text.sh
#
# Arms:
#   original             as many steps as the others, on the same rows
#   knowledge            reads entries from documents that it does not train on; retrieval learnt from a teacher's labels
#   original_flops       original, with as many more steps as the arithmetic of `knowledge` allows
#   knowledge_same       entries from the very documents that it trains on: a control of what must not be done
#
# Result: runs/free_text-$SCALE/scores-$SEED.md and .json (and scores_same-$SEED.* for the control)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SCALE=${SCALE:-cpu} SEED=${SEED:-0}
ARMS=${ARMS:-original knowledge original_flops knowledge_same}
case $SCALE in
  cpu)
    vocabulary=4096 side=128 entries=16384
    memory=(--model.key_dim=64 --model.router_dim=128 --model.memory_heads=4 --model.memory_head_dim=32)
    ;;
  full)
    # Name a large corpus: of Python's documentation the reference size would learn little.
    vocabulary=6400 side=1024 entries=1048576
    memory=()
    ;;
  *)
    echo "SCALE is $SCALE: choose cpu or full." >&2
    exit 2
    ;;
esac
for arm in $ARMS; do
  case $arm in original | knowledge | original_flops | knowledge_same) ;; *)
    echo "There is no arm $arm: see the first lines of run_file/free_text.sh." >&2
    exit 2
    ;;
  esac
done
if ! command -v minilm > /dev/null; then # not `import minilm`: any Python can import it from the checkout
  source run_file/install.sh
  install_minilm dashboard
fi
data=data/free_text/$SCALE
runs=runs/free_text-$SCALE

# prepare SUFFIX [words for prepare.py]: texts, tokens, entries and labels
prepare() {
  local suffix=$1 source built sum named=()
  shift
  for source in ${SOURCES:-}; do named+=(--source "$source"); done
  python run_file/free_text/prepare.py --out "$data/texts$suffix" --most-entries "$entries" "${named[@]}" "$@"
  # The tokenizer knows the text that is trained on, which is the same in both.
  minilm tokenizer train --source "$data/texts$suffix/train.jsonl" --vocab-size "$vocabulary" --out "$data/tokenizer$suffix"
  minilm knowledge build --source "$data/texts$suffix/sentences.jsonl" --tokenizer "$data/tokenizer$suffix" \
    --side "$side" --out "$data/knowledge$suffix"
  built=$(minilm data build --source "$data/texts$suffix/train.jsonl" --validation-source "$data/texts$suffix/held_out.jsonl" \
    --tokenizer "$data/tokenizer$suffix" --out "$data/store$suffix")
  echo "$built"
  # Labels take a while: those that are there already, with rows of these sentences, are kept.
  sum=$(sha256sum "$data/texts$suffix/sentences.jsonl" | cut -c1-12)
  if [[ "$built" != *"sha256 $sum"*validation/held_out* ]]; then
    minilm knowledge align --data "$data/store$suffix" --store "$data/knowledge$suffix"
  fi
}

# train NAME [settings for train.py]
train() {
  local name=$1
  shift
  python train.py --config "run_file/free_text/$SCALE.yaml" --run.folder="$runs" --run.name="$name-$SEED" --resume \
    --train.seed="$SEED" "$@"
}

prepare ""
if [[ " $ARMS " == *" knowledge_same "* ]]; then prepare _same --same-documents; fi
reads=(--model.name=knowledge "${memory[@]}")
compared=()
for arm in $ARMS; do
  echo "== $arm, seed $SEED"
  case $arm in
    original) train original ;;
    knowledge) train knowledge "${reads[@]}" --model.store="$data/knowledge" ;;
    original_flops)
      steps=$(python run_file/facts/equal_steps.py "run_file/free_text/$SCALE.yaml" "${reads[@]}" --model.store="$data/knowledge")
      train original_flops --train.steps="$steps"
      ;;
    knowledge_same)
      train knowledge_same "${reads[@]}" --model.store="$data/knowledge_same" --data.store="$data/store_same"
      ;;
  esac
  if [ "$arm" != knowledge_same ]; then compared+=(--checkpoint "$arm=$runs/$arm-$SEED"); fi
done
python run_file/free_text/score.py --data "$data/store" --documents "$data/texts/sources.jsonl" "${compared[@]}" \
  --out "$runs/scores-$SEED"
if [[ " $ARMS " == *" knowledge_same "* ]]; then
  python run_file/free_text/score.py --data "$data/store_same" --documents "$data/texts_same/sources.jsonl" \
    --checkpoint "original=$runs/original-$SEED" --checkpoint "knowledge_same=$runs/knowledge_same-$SEED" \
    --out "$runs/scores_same-$SEED"
fi
