# %% [markdown]
# # Look into sources
# Every token that is written with a memory knows which entries carried it, and every token that is
# scored knows what the memory did to it.

# %%
import os
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from transformers import AutoModelForCausalLM, AutoTokenizer

import nearest
from nearest import Memory, attach, evaluate, plots
from nearest.demo.corpus import split_topics
from nearest.verbs.records import RecordTable

work = Path(os.environ.get("NEAREST_NOTEBOOKS") or tempfile.mkdtemp())
name = str(Path(nearest.__file__).parent / "demo/general-gpt2-7m")
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(name)
split = split_topics(topics)
memory = Memory.build(model, tokenizer, split.memory[-8:], work / "sources.memory", tune=False)
settings = {"lam": 0.4, "temperature": 8.0, "k": 256}

# %% [markdown]
# ## Token by token
# A bar a token: the part of its probability that the memory gave, by document.

# %%
ids = tokenizer.encode(tokenizer.bos_token + "The value of the", return_tensors="pt")
with attach(model, memory, **settings) as session:
    output = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    named = session.sources(0)
plots.sources(named, tokenizer)

# %%
token = max(named, key=lambda one: one.memory_weight)
token

# %% [markdown]
# An entry is a place: its document's text around it, with the token that it gave.

# %%
source = token.sources[0]
stored = memory.document_tokens(source.document)
value = source.position + 1
print(source.document_id, "…", tokenizer.decode(stored[max(1, value - 15) : value]), end="")
print(f"[{tokenizer.decode(stored[value : value + 1])}]")

# %% [markdown]
# ## Where the memory helps, and where it harms
# A row a token and method: what each predicted, λ, and the strongest entry.

# %%
records = RecordTable()
evaluate(model, memory, split.test[:3], "knn", tokenizer=tokenizer, records=records, **settings)
table = records.to_pandas()
table["gain"] = table["base_nll"] - table["nll"]
table.sort_values("gain").iloc[[0, 1, -2, -1]][["document", "position", "gain", "source"]]

# %% [markdown]
# Which documents of the memory carried what gained most:

# %%
table[table["gain"] > 1].groupby("source")["gain"].agg(["count", "sum"]).nlargest(5, "sum")
