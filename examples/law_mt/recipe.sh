#!/usr/bin/env bash
# Domain adaptation on Law-MT: a language model that has not read law, a memory that has, and a
# model that was fine-tuned on law with the memory on top. README.md says what comes out.
set -euo pipefail
: "${MODEL:=gpt2}"
: "${RAW:=multi_domain_data/law}" # folder with train.en, dev.en and test.en
: "${OUT:=law-mt}"
: "${CLUSTERS:=200000}"
: "${K:=1024}" "${TEMPERATURE:=1}"
: "${EPOCHS:=3}" "${BATCH:=8}" "${BLOCK:=512}"
: "${PYTHON:=python}"
here=$(dirname "$0")
mkdir -p "$OUT"

# 1. One document a sentence: contexts end with it, as with sample-break-mode eos.
for split in train dev test; do
  "$PYTHON" "$here/sentences.py" "$RAW/$split.en" > "$OUT/$split.jsonl"
done

# 2. The memory, and clusters for RetoMaton.
build=(nearest build "$MODEL" "$OUT/train.jsonl" --out "$OUT/law.memory" --keys fp16 --no-tune)
"${build[@]}" --plan
"${build[@]}"
nearest cluster "$OUT/law.memory" --clusters "$CLUSTERS"

# 3. The first table, with the settings that were published: λ is 0.9 out of the model's domain.
nearest eval "$OUT/law.memory" --text "$OUT/dev.jsonl" --score-eos --method base,knn,retomaton \
  --k "$K" --lam 0.9 --knn-temperature "$TEMPERATURE" --min-knns inf

# 4. The curve, with settings found on dev, on test.
nearest tune "$OUT/law.memory" --text "$OUT/dev.jsonl" \
  --method knn,knn+adaptret,retomaton,suffix,hybrid
nearest sweep "$OUT/law.memory" --text "$OUT/test.jsonl" --score-eos --out "$OUT/figure" \
  --methods knn,knn+adaptret,retomaton,suffix,hybrid --min-knns 1,2,5,20,100,inf --published law-mt

# 5. The third table: a model that has learnt law, and the memory on top, where λ is 0.25.
"$PYTHON" "$here/../train_base/train.py" "$MODEL" "$OUT/train.jsonl" --out "$OUT/finetuned" \
  --validation "$OUT/dev.jsonl" --epochs "$EPOCHS" --batch-size "$BATCH" --block "$BLOCK"
nearest build "$OUT/finetuned" "$OUT/train.jsonl" --out "$OUT/finetuned.memory" --keys fp16 --no-tune
nearest eval "$OUT/finetuned.memory" --text "$OUT/dev.jsonl" --score-eos \
  --method base,knn,retomaton --k "$K" --lam 0.25 --knn-temperature "$TEMPERATURE" --min-knns inf
