"""What transformers offers around a model: pipelines and trainers, with a memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments, pipeline

from conftest import make_documents, make_model, make_tokenizer
from nearest import Memory, MemoryCallback, attach, evaluate
from nearest.verbs.generate import generate


def test_a_pipeline_generates_with_the_memory(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    memory = Memory.build(model, tokenizer, make_documents(12, 30), tmp_path / "m")
    settings = {"lam": 0.9, "k": 4, "temperature": 30.0}
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    asked = "<bos>the court"  # as documents begin
    alone = write(asked, return_full_text=False, **options)[0]["generated_text"]
    with attach(model, memory, tokenizer=tokenizer, **settings):
        found = write(asked, return_full_text=False, **options)[0]["generated_text"]
    expected = generate(model, tokenizer, memory, "the court", settings=settings, **options).text
    assert found == expected != alone


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_trainer_measures_the_model_with_a_memory(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    rows = [{"input_ids": torch.arange(2, 20), "labels": torch.arange(2, 20)} for _ in range(4)]
    corpus, texts = make_documents(8, 20), make_documents(3, 20, seed=1)
    callback = MemoryCallback(corpus, texts, tokenizer, lam=0.5, k=8, temperature=30.0)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[callback])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_knn_ppl" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    assert logged[0]["eval_base_ppl"] != logged[1]["eval_base_ppl"]  # the model learns
    model.eval()
    memory = Memory.build(model, tokenizer, corpus, tmp_path / "m")
    base, knn = evaluate(
        model, memory, texts, ["base", "knn"], lam=0.5, k=8, temperature=30.0, tokenizer=tokenizer
    )
    assert logged[1]["eval_base_ppl"] == pytest.approx(base.ppl)
    assert logged[1]["eval_knn_ppl"] == pytest.approx(knn.ppl)
    assert trainer.evaluate()["eval_knn_ppl"] == pytest.approx(knn.ppl)
