"""The whole path in one short test: build, tune, evaluate, attach, sources, add, remove."""

from pathlib import Path

import torch

from conftest import make_documents, make_model, make_tokenizer
from nearest import Memory, attach, evaluate, tune


def test_the_whole_path(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    documents = make_documents(12, 12)
    memory = Memory.build(model, tokenizer, documents, tmp_path / "m.memory")
    tune(model, memory, make_documents(4, 12, seed=1), tokenizer=tokenizer)
    memory = Memory.open(memory.path)
    methods = ["base", "knn", "retomaton", "suffix"]
    test = make_documents(4, 12, seed=2)
    results = evaluate(model, memory, test, method=methods, tokenizer=tokenizer)
    base, *others = (result.nll for result in results)
    assert all(nll < base for nll in others)  # words of the corpus, which the model cannot know
    ids = torch.tensor([[0, *tokenizer("the court shall")["input_ids"]]])
    with attach(model, memory) as session:
        out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)
        sources = session.sources(0)
    assert [token.token for token in sources] == out[0, ids.shape[1] :].tolist()
    more = [document.__class__("new", document.text) for document in make_documents(1, 12, seed=5)]
    memory = memory.add(model, tokenizer, more).remove(["doc-0"])
    assert memory.documents == len(documents)
