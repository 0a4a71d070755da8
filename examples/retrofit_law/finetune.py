"""What RETROfit is compared to: the same model, fine-tuned on the same passages in the same order.

    python examples/retrofit_law/finetune.py --model MODEL --work WORK --steps 1500 --layers all

WORK is the recipe's folder, once it is prepared. With --layers 1 only the last layer learns, which
has about as many weights as the recipe's new layers. The curve counts seconds of the processor, to
be compared to those of `nearest retro fit`. The model that is left in WORK/finetuned-LAYERS is an
ordinary one: `nearest eval`, `nearest build` and `table.py` read it.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nearest.retro.loss import next_token_loss, token_losses
from nearest.retro.opening import open_text
from nearest.retro.passages import Course, Passages, next_labels

WINDOW, BATCH, WARMUP = 512, 4, 0.05
SHORTEST = (
    65  # tokens of a passage: neighbours act after a chunk, and RETROfit reads no shorter ones
)
TOLD = 5  # lines of the curve, after the first


class OnlyTokens:
    """Batches without neighbours, padded on the right."""

    def __call__(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Tokens, their mask, and labels that are not scored where there is padding."""
        rows = [item["input_ids"] for item in items]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(rows, batch_first=True),
            "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": pad([i["labels"] for i in items], batch_first=True, padding_value=-100),
        }


def learning(model: PreTrainedModel, layers: str) -> list[torch.nn.Parameter]:
    """The weights that learn: all, or those of the last layers."""
    if layers != "all":
        model.requires_grad_(False)
        for block in model.transformer.h[-int(layers) :]:
            block.requires_grad_(True)
    return [weight for weight in model.parameters() if weight.requires_grad]


def mean_loss(model: PreTrainedModel, text: Passages) -> float:
    """Of a text's passages, in nats a token."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in DataLoader(text, BATCH, collate_fn=OnlyTokens()):
            labels = next_labels(batch.pop("labels"))
            total += float(token_losses(model(**batch).logits, labels).sum())
            count += int((labels != -100).sum())
    return total / count


def rate(part: float) -> float:
    """Share of the learning rate after so much of the run: a rise, then half a cosine."""
    return min(part / WARMUP, 0.5 * (1 + math.cos(math.pi * min(part, 1.0))))


def finetune(settings: argparse.Namespace) -> Path:
    """Learn for so many steps."""
    out: Path = settings.work / f"finetuned-{settings.layers}"
    passages, validation = (
        Passages(
            open_text([str(settings.work / "train.retro")], table, None).dataset(),
            WINDOW,
            least=SHORTEST,
        )
        for table in (None, str(settings.work / "valid.neighbours"))
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    weights = learning(model, settings.layers)
    optimizer = torch.optim.AdamW(weights, lr=settings.lr, weight_decay=0.01)
    course = DataLoader(Course(passages, 0, settings.steps * BATCH), BATCH, collate_fn=OnlyTokens())

    def tell(step: int) -> None:
        seconds, loss = time.process_time() - began, mean_loss(model, validation)
        print(json.dumps({"step": step, "seconds": round(seconds), "val_loss": loss}), flush=True)

    began, every = time.process_time(), max(settings.steps // TOLD, 1)
    tell(0)
    for step, batch in enumerate(course, start=1):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate(step / settings.steps)
        labels = next_labels(batch.pop("labels"))
        scored = (labels != -100).sum()
        next_token_loss(model(**batch).logits, labels, scored).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0:
            tell(step)
    model.eval().save_pretrained(out)
    AutoTokenizer.from_pretrained(settings.model).save_pretrained(out)
    return out


def main() -> None:
    """Fine-tune as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--layers", default="all", help="all, or how many of the last")
    parser.add_argument("--lr", type=float, default=1e-3)
    print(finetune(parser.parse_args()))


if __name__ == "__main__":
    main()
