"""Documents with their neighbours, as loops, workers and transformers' Trainer read them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from nearest.errors import CorpusError
from nearest.retro import RetroForCausalLM
from nearest.retro.data.dataset import Collate, RetroDataset, read_subset
from nearest.retro.data.stages import TableOptions, make_table
from retro_data import M, database, documents
from retro_models import tiny_model

TEXTS = documents(20, longest=20)


def test_items_of_the_data_set(tmp_path: Path) -> None:
    own = database(tmp_path / "d", TEXTS)
    table = make_table(own, None, tmp_path / "t", TableOptions(neighbours=3))
    data = RetroDataset(own.chunks, own.chunks, table, neighbours=2, max_len=2 * M)
    assert len(data) == len(TEXTS)
    for number, text in enumerate(TEXTS):
        item = data[number]
        assert item["input_ids"].tolist() == text[: 2 * M]
        assert item["labels"].tolist() == text[: 2 * M]
        ids = np.asarray(own.chunks.of_document(number))[:2]
        expected = own.chunks.rows(table.ids[ids][:, :2], 1)
        np.testing.assert_array_equal(item["neighbour_ids"].numpy(), expected)
    whole = RetroDataset(own.chunks, own.chunks, table, subset=[4, 2])
    assert [len(item["input_ids"]) for item in whole] == [len(TEXTS[4]), len(TEXTS[2])]


@pytest.mark.parametrize("workers", [0, 2])
@torch.no_grad()
def test_batches_and_their_loss(workers: int, tmp_path: Path) -> None:
    """A padded batch has the loss of its documents one by one, and a seed's order is fixed."""
    own = database(tmp_path / "d", TEXTS)
    table = make_table(own, None, tmp_path / "t")
    data = RetroDataset(own.chunks, own.chunks, table)
    ordered = data.ordered(seed=3, steps=50)
    numbers = [ordered.number(step) for step in range(50)]
    assert sorted(numbers[:20]) == sorted(numbers[20:40]) == list(range(20))
    assert numbers[:20] != numbers[20:40]
    assert [data.ordered(3, 50).number(step) for step in (44, 7)] == [numbers[44], numbers[7]]
    loader = DataLoader(
        data.ordered(3, 6), batch_size=3, num_workers=workers, collate_fn=Collate(0, M)
    )
    model: RetroForCausalLM = tiny_model("norlund")
    batches = list(loader)
    for number, batch in enumerate(batches):
        total, count = 0.0, 0
        for step in range(3 * number, 3 * number + 3):
            item = data[numbers[step]]
            scored = len(item["labels"]) - 1
            if scored:
                alone = model(**{name: value[None] for name, value in item.items()}).loss
                total, count = total + float(alone) * scored, count + scored
        assert float(model(**batch).loss) == pytest.approx(total / count)
        scored = int((batch["labels"][:, 1:] != -100).sum())
        assert scored == count  # what transformers' Trainer counts


def test_subset_files(tmp_path: Path) -> None:
    path = tmp_path / "subset.txt"
    path.write_text("3\n0\n")
    assert read_subset(path, 4) == [3, 0]
    for text, named in (("3\n\n1\n", "line 2 is blank"), ("4\n", "line 1 is 4"), ("x\n", "'x'")):
        path.write_text(text)
        with pytest.raises(CorpusError, match=named):
            read_subset(path, 4)
    with pytest.raises(CorpusError, match="cannot be read"):
        read_subset(tmp_path / "none.txt", 4)


def undropped() -> RetroForCausalLM:
    kinds = ("attention_dropout", "residual_dropout", "feed_forward_dropout")
    return tiny_model("norlund", **dict.fromkeys(kinds, 0.0))


@pytest.mark.slow
def test_transformers_trainer_reads_it(tmp_path: Path) -> None:
    """What is trained is the loss of a plain loop over the same steps, from workers."""
    own = database(tmp_path / "d", TEXTS)
    data = RetroDataset(own.chunks, own.chunks, make_table(own))

    def arguments(workers: int) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            train_sampling_strategy="sequential",
            dataloader_num_workers=workers,
            remove_unused_columns=False,
            use_cpu=True,
            disable_tqdm=True,
        )

    def losses(workers: int) -> list[float]:
        trainer = Trainer(
            undropped(),
            arguments(workers),
            data_collator=Collate(0, M),
            train_dataset=data.ordered(5, 8),
        )
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    model = undropped().train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.0)
    expected = []
    for batch in DataLoader(data.ordered(5, 8), batch_size=2, collate_fn=Collate(0, M)):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    np.testing.assert_allclose(losses(0), expected, rtol=1e-3)
    np.testing.assert_allclose(losses(2), expected, rtol=1e-3)
