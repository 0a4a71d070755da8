# %% [markdown]
# # Compare methods
# Which method predicts best, how sure is that, and what does it cost?

# %%
import os
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from transformers import AutoModelForCausalLM, AutoTokenizer

import nearest
from nearest import Memory, evaluate, plots, sweep, tune
from nearest.demo.corpus import split_topics

work = Path(os.environ.get("NEAREST_NOTEBOOKS") or tempfile.mkdtemp())
name = str(Path(nearest.__file__).parent / "demo/general-gpt2-7m")
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(name)

# %% [markdown]
# Three parts of Python's language reference: to remember, to tune on, to score. Topics that repeat
# others are left out, so that nothing that is scored stands in the memory.

# %%
split = split_topics(topics)
remembered, tuning, test = split.memory[-8:], split.tuning[-6:], split.test[-8:]
memory = Memory.build(model, tokenizer, remembered, work / "methods.memory", tune=False)
memory

# %% [markdown]
# ## Tune
# λ and the temperature are found on text that is not scored later; `hybrid` has a trained gate.

# %%
tuned = tune(model, memory, tuning, method="knn", tokenizer=tokenizer)
for method in ("retomaton", "suffix", "hybrid"):
    tune(model, memory, tuning, method=method, tokenizer=tokenizer)
plots.tuning(tuned)

# %% [markdown]
# ## Evaluate
# The model reads the text once for all methods. Intervals are by bootstrap over documents; `delta`
# is the paired difference to the first method.

# %%
methods = ["base", "knn", "retomaton", "suffix", "hybrid"]
results = evaluate(model, memory, test, methods, tokenizer=tokenizer)
plots.methods(results)

# %%
for result in results:
    print(result)
results[-1]

# %% [markdown]
# ## Which documents gain

# %%
plots.documents(results[0], results[-1], [document.id for document in test])

# %% [markdown]
# ## What a search is worth
# RetoMaton and hybrid save searches; at which price in perplexity?

# %%
swept = sweep(
    model,
    memory,
    test[:3],
    ["knn", "retomaton"],
    tokenizer=tokenizer,
    min_knns=[1, 20, float("inf")],
)
plots.sweep(swept)
