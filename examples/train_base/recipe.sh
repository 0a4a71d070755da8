#!/usr/bin/env bash
# A memory on a model that has read the corpus, beside one on a model that has not: RetoMaton's third
# table in small. Each variable can be set by the caller; README.md says what comes out.
set -euo pipefail
: "${MODEL:=src/nearest/demo/general-gpt2-7m}"
: "${CORPUS:?folder with train.jsonl, valid.jsonl and test.jsonl (examples/law_corpus.py makes one)}"
: "${OUT:=train-base}"
: "${DOCUMENTS:=1500}" # of the training text, in the memory and in training
: "${HELD_OUT:=150}"
: "${TRAINING:=--max-steps 300 --batch-size 8 --block 256}"
: "${PYTHON:=python}"
here=$(dirname "$0")
mkdir -p "$OUT"
head -n "$DOCUMENTS" "$CORPUS/train.jsonl" > "$OUT/train.jsonl"
for split in valid test; do
  head -n "$HELD_OUT" "$CORPUS/$split.jsonl" > "$OUT/$split.jsonl"
done

# 1. The model learns the corpus.
# shellcheck disable=SC2086  # TRAINING are several words
[ -e "$OUT/finetuned/config.json" ] || "$PYTHON" "$here/train.py" "$MODEL" "$OUT/train.jsonl" \
  --out "$OUT/finetuned" --validation "$OUT/valid.jsonl" $TRAINING

# 2. A memory of the same text for each of the two models, tuned on the validation text.
for name in base finetuned; do
  model=$MODEL; [ "$name" = finetuned ] && model=$OUT/finetuned
  memory=$OUT/$name.memory
  [ -e "$memory" ] || nearest build "$model" "$OUT/train.jsonl" --out "$memory" --no-tune
  nearest tune "$memory" --text "$OUT/valid.jsonl" \
    --method knn,knn+adaptret,retomaton,suffix,hybrid
  nearest eval "$memory" --text "$OUT/test.jsonl" --json \
    --method base,knn,knn+adaptret,retomaton,suffix,hybrid | tee "$OUT/$name.json"
done
