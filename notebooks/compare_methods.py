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
from nearest import Memory, evaluate, plots, read_text, sweep, tune
from nearest.demo.corpus import split_topics

work = Path(os.environ.get("NEAREST_NOTEBOOKS") or tempfile.mkdtemp())
name = str(Path(nearest.__file__).parent / "demo/general-gpt2-7m")
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(name)

# %% [markdown]
# Three parts of Python's language reference: to remember, to tune on, to score. Topics that repeat
# others are left out, so that nothing that is scored stands in the memory; so are long ones, which
# take long.

# %%
split = split_topics(topics)
remembered = [document for document in split.memory if len(document.text) < 12_000]
tuning = [document for document in split.tuning if len(document.text) < 3_000]
test = [document for document in split.test if len(document.text) < 1_500]
memory = Memory.build(model, tokenizer, remembered, work / "methods.memory", tune=False)
memory

# %% [markdown]
# ## Tune
# λ and the temperature are found on text that is not scored later; `hybrid` has a trained gate. The
# model reads that text once for all.

# %%
text = read_text(model, memory, tuning, tokenizer=tokenizer)
tuned = tune(model, memory, text, method="knn")
for method in ("retomaton", "suffix", "hybrid"):
    tune(model, memory, text, method=method)
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
