# %% [markdown]
# # Build a memory and ask it
# Documents are the topics of Python's language reference; the model is a small general one that
# ships with the project and has not read them.

# %%
import os
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from transformers import AutoModelForCausalLM, AutoTokenizer

import nearest
from nearest import Document, Memory, attach
from nearest.verbs.generate import generate

work = Path(os.environ.get("NEAREST_NOTEBOOKS") or tempfile.mkdtemp())
name = str(Path(nearest.__file__).parent / "demo/general-gpt2-7m")
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(name)

# %% [markdown]
# A document has an id, a text and whatever else you want to see again beside an answer.

# %%
documents = [
    Document(topic, text, {"title": text.strip().split("\n", 1)[0]})
    for topic, text in sorted(topics.items())
    if len(text) < 2500
]
len(documents), documents[0].id, documents[0].metadata

# %% [markdown]
# Each position of the text is stored with the model's state as its key and the token that comes
# next as its value. Building ends with settings tuned on a sample of the documents.

# %%
memory = Memory.build(model, tokenizer, documents, work / "python.memory")
memory

# %% [markdown]
# ## What is near
# The state after a text, looked up: the places of the corpus where the model was in a like one.

# %%
for passage in memory.search_text(model, tokenizer, "The else clause is executed when", k=3):
    print(passage)

# %% [markdown]
# ## What it writes
# Each token is shaded by how much of its probability the memory gave; below are the documents.

# %%
prompt = "The return statement"
answer = generate(
    model, tokenizer, memory, prompt, settings={"temperature": 4.0}, max_new_tokens=30
)
answer

# %% [markdown]
# The same through `transformers`: while a memory is attached, `model.generate` predicts with it.

# %%
ids = tokenizer.encode(tokenizer.bos_token + prompt, return_tensors="pt")
with attach(model, memory, temperature=4.0) as session:
    output = model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)
    sources = session.sources(0)
print(tokenizer.decode(output[0, 1:]))
sources[0]

# %% [markdown]
# ## What is forgotten
# A removed document leads to nothing any more; `compact` erases its bytes.

# %%
smaller = memory.remove([documents[0].id])
smaller.documents, memory.documents
