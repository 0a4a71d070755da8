#!/usr/bin/env bash
# kNN-LM and RetoMaton on WikiText-103, from the files of the dataset to the table and the curve.
# Each variable can be set by the caller; README.md says what comes out.
set -euo pipefail
: "${MODEL:=neulab/gpt2-finetuned-wikitext103}" # or neulab/distilgpt2-finetuned-wikitext103
: "${RAW:=wikitext-103-raw-v1}"                 # folder with train*, validation* and test*
: "${OUT:=wikitext103}"
: "${WINDOW:=1024}" "${STRIDE:=512}"
: "${CLUSTERS:=500000}" "${SAMPLE:=20000000}"
: "${K:=1024}" "${LAM:=0.25}" "${TEMPERATURE:=1}"
: "${PYTHON:=python}"
here=$(dirname "$0")
mkdir -p "$OUT"

# 1. One document an article.
for split in train validation test; do
  "$PYTHON" "$here/articles.py" "$RAW/$split"* > "$OUT/$split.jsonl"
done

# 2. What it will take; then the memory, with the keys of the papers.
build=(nearest build "$MODEL" "$OUT/train.jsonl" --out "$OUT/train.memory" --keys fp16
  --key-layer last_ffn_input --window "$WINDOW" --stride "$STRIDE" --no-tune)
"${build[@]}" --plan
"${build[@]}"

# 3. Clusters, which RetoMaton follows.
nearest cluster "$OUT/train.memory" --clusters "$CLUSTERS" --sample "$SAMPLE"

# 4. The table, with the settings that were published.
nearest eval "$OUT/train.memory" --text "$OUT/validation.jsonl" --stream \
  --method base,knn,retomaton --k "$K" --lam "$LAM" --knn-temperature "$TEMPERATURE" --min-knns inf

# 5. The same with settings found on the validation text, on the test text.
nearest tune "$OUT/train.memory" --text "$OUT/validation.jsonl" --method knn,retomaton,suffix,hybrid
nearest eval "$OUT/train.memory" --text "$OUT/test.jsonl" --stream \
  --method base,knn,retomaton,suffix,hybrid

# 6. Perplexity over the fraction of saved searches, beside the published curve.
nearest sweep "$OUT/train.memory" --text "$OUT/test.jsonl" --out "$OUT/figure" \
  --methods knn,retomaton,suffix,hybrid --min-knns 1,2,5,20,100,inf --published wikitext-103
