#!/usr/bin/env bash
# RETRO on a corpus of MassiveOpenText's form (JSON Lines with a "text" a document): from the files
# to perplexity with neighbours and without, and to where the gain sits. README.md says what comes out.
set -euo pipefail
: "${TRAIN:=massive-open-text/train}" # files or folders: .jsonl, .jsonl.zst
: "${VALID:=massive-open-text/valid}"
: "${TEST:=massive-open-text/test}"
: "${OUT:=massive-open-text-retro}"
: "${TOKENIZER:=t5-base}"
: "${EMBEDDER:=sentence-transformers/all-MiniLM-L6-v2}"
: "${STEPS:=100000}" "${EVERY:=20000}" "${BATCH:=2}" "${ACCUMULATE:=4}" "${MAX_LEN:=1024}"
: "${SIZES:=}" # as "--set decoder_layers=2"; nothing: the sizes of the released model
mkdir -p "$OUT"
found=(--neighbours 4)

# 1. Chunks of 64 tokens, their vectors, their index, and the neighbours of each.
nearest retro prepare "$TRAIN" --out "$OUT/train.retro" --tokenizer "$TOKENIZER" \
  --embedder "$EMBEDDER" "${found[@]}"
for split in valid test; do
  text=$VALID; [ "$split" = test ] && text=$TEST
  nearest retro neighbours "$OUT/train.retro" --queries "$text" --table "$OUT/$split.neighbours" \
    "${found[@]}"
done
nearest retro verify "$OUT/train.retro"

# 2. Training, as the public code's run: two neighbours with a chunk that goes on, 1024 tokens.
# shellcheck disable=SC2086  # SIZES are several words
nearest retro train "$OUT/train.retro" --out "$OUT/run" --preset norlund $SIZES \
  --max-len "$MAX_LEN" --first-only --neighbours 2 --continuations 1 --batch-size "$BATCH" \
  --accumulate "$ACCUMULATE" --max-steps "$STEPS" --validation "$OUT/valid.neighbours" \
  --validate-every "$EVERY" --save-every "$EVERY"

# 3. The table: with neighbours, without, without what follows them, and with wrong ones.
read=(--neighbours 2 --continuations 1 --window "$MAX_LEN")
nearest retro eval "$OUT/run" "$OUT/train.retro" --text "$OUT/test.neighbours" --as norlund \
  --readings on,off,no-continuation,shuffled "${read[@]}"

# 4. Where the gain sits: losses by what a text shares with its neighbours.
nearest retro analyse "$OUT/run" "$OUT/train.retro" --text "$OUT/test.neighbours" \
  --out "$OUT/overlap" "${read[@]}"
