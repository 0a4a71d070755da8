#!/usr/bin/env bash
# A datastore that knn-transformers has published, with its FAISS index and clusters, as a memory.
# STORE holds dstore_*_keys.npy and dstore_*_vals.npy, index_*.indexed and members_*.pkl.
set -euo pipefail
: "${MODEL:=neulab/gpt2-finetuned-wikitext103}"
: "${STORE:=checkpoints/gpt2}"
: "${OUT:=wikitext103}"
: "${K:=1024}" "${LAM:=0.25}" "${TEMPERATURE:=1}"
nearest import "$STORE" "$MODEL" --out "$OUT/published.memory" --trust
nearest eval "$OUT/published.memory" --text "$OUT/validation.jsonl" --stream \
  --method base,knn,retomaton --k "$K" --lam "$LAM" --knn-temperature "$TEMPERATURE" --min-knns inf
