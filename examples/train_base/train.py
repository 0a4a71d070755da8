"""Train or fine-tune a causal language model on documents, with transformers' Trainer.

    python examples/train_base/train.py MODEL train.jsonl --out MODEL-law --validation valid.jsonl

Documents follow each other, each after the start token that a memory's documents have, and are cut
into blocks of equal length. A run that was stopped goes on from its last checkpoint.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from nearest import read_documents
from nearest.encode.identity import start_token


class Blocks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The tokens of documents, one after another, in blocks; a rest that fills none is left out."""

    def __init__(self, path: Path, tokenizer: Any, block: int) -> None:
        start = start_token(tokenizer)
        tokens: list[int] = []
        for text in _texts(path):
            tokens += [start, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        if len(tokens) < block:
            raise SystemExit(f"{path} has {len(tokens)} tokens, fewer than a block: lower --block")
        whole = len(tokens) // block * block
        self._blocks = torch.tensor(tokens[:whole]).view(-1, block)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._blocks[number], "labels": self._blocks[number]}


def _texts(path: Path) -> Iterator[str]:
    for document in read_documents([path]):
        yield document.text


def train(settings: argparse.Namespace) -> None:
    """Train, and leave model and tokenizer in the folder `out`."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    if settings.from_scratch:
        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(settings.model))
    else:
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    checkpoints = settings.out / "checkpoints"
    evaluated = {} if settings.validation is None else {"eval_strategy": "epoch"}
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        weight_decay=0.01,
        logging_steps=50,
        save_steps=500,
        save_total_limit=1,
        seed=settings.seed,
        report_to="none",
        disable_tqdm=True,
        **evaluated,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Blocks(settings.train, tokenizer, settings.block),
        eval_dataset=settings.validation and Blocks(settings.validation, tokenizer, settings.block),
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=any(checkpoints.glob("checkpoint-*")) or None)
    trainer.save_model(str(settings.out))
    tokenizer.save_pretrained(settings.out)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("train", type=Path, help="documents: .jsonl, .txt, a folder …")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--from-scratch", action="store_true", help="its configuration alone")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-steps", type=int, default=-1, help="in place of epochs")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--warmup", type=int, default=20, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
