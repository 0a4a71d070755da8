# %% [markdown]
# # RETRO's neighbours
# RETRO reads a text in chunks of 64 tokens, and beside each chunk the neighbours of the one before.
# Here they are found by words (BM25); with an embedder, by vectors.

# %%
import json
import os
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

import nearest
from nearest.demo.corpus import split_topics
from nearest.retro import RetroDataset
from nearest.retro.data.filters import Filters
from nearest.retro.data.opening import chunk_sources, decoder, tokenizer_of
from nearest.retro.data.show import shown_chunks
from nearest.retro.data.stages import Databases, TableOptions, make_table

work = Path(os.environ.get("NEAREST_NOTEBOOKS") or tempfile.mkdtemp())
name = str(Path(nearest.__file__).parent / "demo/general-gpt2-7m")
split = split_topics(topics)
corpus = work / "reference.jsonl"
lines = [json.dumps({"id": one.id, "text": one.text}) for one in split.memory[:12]]
corpus.write_text("\n".join(lines) + "\n", encoding="utf-8")

# %% [markdown]
# ## Chunks
# A database is a memory without a language model: its documents, cut.

# %%
database = chunk_sources([corpus], work / "reference.retro", tokenizer=name, start=True)
database.chunks.documents, len(database.chunks), database.cut

# %% [markdown]
# ## Neighbours
# What shares 32 tokens in a row with its chunk is struck out: else a model learns to copy.

# %%
options = TableOptions(neighbours=4, method="bm25", filters=Filters(longest_run=32))
table = make_table(database, options=options)
table.record["counts"]

# %%
decode = decoder(tokenizer_of(database))
chunk = next(shown_chunks(0, database, Databases.open(database), table, options, decode))
print(chunk.text)
for neighbour in chunk.neighbours:
    print(f"\n{neighbour.document} at {neighbour.position}: {neighbour.text}")
    print(f"    → {neighbour.continuation}")

# %% [markdown]
# ## How near they are
# How many of a chunk's words stand in its best neighbour, against a chunk drawn by lot.

# %%
rng = np.random.default_rng(0)


def shared(first: np.ndarray, second: np.ndarray) -> float:
    """The part of the first chunk's distinct tokens that the second has too."""
    mine = set(first[first >= 0].tolist())
    return len(mine & set(second[second >= 0].tolist())) / max(len(mine), 1)


count = len(database.chunks)
best = table.first(1)[:, 0]
rows = database.chunks.rows(np.arange(count))
near = [shared(rows[i], rows[best[i]]) for i in range(count) if best[i] >= 0]
lot = [shared(rows[i], rows[rng.integers(count)]) for i in range(count)]
print(f"best neighbour {np.mean(near):.0%}, by lot {np.mean(lot):.0%}")

# %% [markdown]
# ## What a model reads
# Tokens, and for each chunk its neighbours with the chunk that follows each of them.

# %%
data = RetroDataset(database.chunks, database.chunks, table, neighbours=2, continuation=1)
item = data[0]
{name: np.asarray(value).shape for name, value in item.items()}
