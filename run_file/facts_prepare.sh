#!/usr/bin/env bash
# The corpus of made-up facts, its tokenizer, the stores of tokens, and the databases as knowledge stores.
#
#   bash run_file/facts_prepare.sh              SCALE=full for the size of a GPU; what is there is used
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source run_file/facts_settings.sh

minilm data facts --out "$facts/texts" "${corpus[@]}"
minilm tokenizer train --source "$facts/texts/corpus.jsonl" --vocab-size "$vocabulary" --out "$facts/tokenizer"
minilm data build --source "$facts/texts/corpus.jsonl" --validation-source "$facts/texts/validation.jsonl" \
  --entries-of "$facts/texts/entries.jsonl" --tokenizer "$facts/tokenizer" --out "$facts/store"
minilm data build --source "$facts/texts/corpus_context.jsonl" --validation-source "$facts/texts/validation_context.jsonl" \
  --tokenizer "$facts/tokenizer" --out "$facts/store_context"
minilm knowledge build --source "$facts/texts/entries.jsonl" --tokenizer "$facts/tokenizer" \
  --side "$side" --width "$width" --out "$facts/knowledge/entries"
# Changed entries keep their places: what a trained model finds is what it found before.
for change in edited:edits without_answer:removals; do
  if [ ! -d "$facts/knowledge/${change%:*}" ]; then
    minilm knowledge edit --store "$facts/knowledge/entries" --edits "$facts/texts/${change#*:}.jsonl" \
      --out "$facts/knowledge/${change%:*}" | tail -n 3
  fi
done
