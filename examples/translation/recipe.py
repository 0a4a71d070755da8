"""kNN-MT on a domain that the model has not seen: from rules that write pairs to a table.

    python examples/translation/recipe.py --work WORK

A small encoder–decoder is trained to read figures out (task.py), a memory is built of pairs of
another domain, and methods are tuned, evaluated and compared by BLEU and chrF on sentences of both
domains. Every command of `nearest` is printed before it runs. A part that is done is not repeated.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from task import general, pairs, statutes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

PAD, EOS = 0, 1
BATCH = 32
TRAINED = 40_000  # different pairs of the general domain
METHODS = "base,knn,knn+buckets,knn+meta-k,knn+mixture,retomaton,suffix,hybrid"


def nearest(*words: str | Path | int) -> list[dict[str, Any]]:
    """Run a command; what it prints as JSON."""
    command = [*map(str, words), "--json"]
    print(f"\n$ nearest {shlex.join(command)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "nearest", *command], stdout=subprocess.PIPE, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def write_texts(settings: argparse.Namespace) -> None:
    """The pairs of both domains: sentences that are tuned or tested on stand in no other file."""
    held_out = settings.held_out
    wanted = {
        "memory": (statutes, settings.memory_pairs, 1),
        "valid": (statutes, held_out, 2),
        "test": (statutes, held_out, 3),
        "general-valid": (general, held_out, 5),
        "general-test": (general, held_out, 4),
    }
    seen: set[str] = set()
    for name, (domain, count, seed) in reversed(wanted.items()):
        rows = [row for row in pairs(domain, count * 2, seed) if row["source"] not in seen][:count]
        seen |= {row["source"] for row in rows}
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (settings.work / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def sources_of(path: Path) -> set[str]:
    """What stands in a file as a source."""
    return {json.loads(line)["source"] for line in path.read_text(encoding="utf-8").splitlines()}


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the general domain; every digit is a token, and EOS ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", padding_side="right"
    )


def train(settings: argparse.Namespace) -> None:
    """Train the model on the general domain; it is stored as a folder."""
    rows = pairs(general, TRAINED, 0)
    held_out = sources_of(settings.work / "general-test.jsonl")
    held_out |= sources_of(settings.work / "general-valid.jsonl")
    rows = [row for row in rows if row["source"] not in held_out]
    texts = [(row["source"], row["text"]) for row in rows]
    tokenizer = make_tokenizer([text for pair in texts[:5000] for text in pair])
    torch.manual_seed(0)
    dim = settings.dim
    sizes = {"d_model": dim, "d_kv": 32, "d_ff": 4 * dim, "num_heads": max(dim // 32, 1)}
    layers = {
        "num_layers": 2,
        "num_decoder_layers": 2,
        "dropout_rate": 0.0,
    }  # generate needs as many
    tokens = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=len(tokenizer), **sizes, **layers, **tokens)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(settings.steps):
        for group in optimizer.param_groups:  # warm-up, then linearly to nothing
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 100) * (1 - step / settings.steps)
        batch = [texts[int(i)] for i in torch.randint(len(texts), (BATCH,))]
        sources, targets = zip(*batch, strict=True)
        inputs = tokenizer(list(sources), padding=True, return_tensors="pt")
        labels = tokenizer(list(targets), padding=True, return_tensors="pt")["input_ids"]
        loss = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=labels.masked_fill(labels == PAD, -100),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step + 1 == settings.steps:
            print(f"step {step}  loss {loss.item():.4f}", flush=True)
    model.eval().save_pretrained(settings.work / "model")
    tokenizer.save_pretrained(settings.work / "model")


def remember(settings: argparse.Namespace) -> None:
    """A memory of the other domain's pairs."""
    work = settings.work
    nearest("build", work / "model", work / "memory.jsonl", "--out", work / "statutes.memory")


def tune(settings: argparse.Namespace) -> None:
    """Every method's settings on held-out pairs, in the memory."""
    valid = [settings.work / "valid.jsonl"]
    if settings.tune_on == "both":
        valid.append(settings.work / "general-valid.jsonl")
    texts = [word for path in valid for word in ("--text", path)]
    near = ("--encoder-texts", settings.encoder_texts) if settings.encoder_texts else ()
    methods = ",".join(name for name in settings.methods.split(",") if name != "base")
    nearest("tune", settings.work / "statutes.memory", *texts, "--method", methods, *near)


def compare(settings: argparse.Namespace) -> None:
    """Tune every method; BLEU, chrF and exact match on both domains, as a table."""
    tune(settings)
    for name in ("test", "general-test"):
        results = nearest(
            *(
                "eval",
                settings.work / "statutes.memory",
                "--generate",
                "--method",
                settings.methods,
            ),
            *("--text", settings.work / f"{name}.jsonl", "--max-new-tokens", settings.longest),
            *("--written", settings.work / f"{name}-{settings.name}-written.jsonl"),
        )
        (settings.work / f"{name}-{settings.name}.json").write_text(json.dumps(results, indent=1))
        print(f"\n{name}: {results[0]['documents']} sentences; change to base, paired 95 %")
        for line in results:
            cells = [f"{line['method']:>14}"]
            for metric in ("bleu", "chrf", "exact"):
                cell = f"  {metric} {line[metric]:6.2f}"
                if line[f"{metric}_delta_low"] is not None:
                    low, high = line[f"{metric}_delta_low"], line[f"{metric}_delta_high"]
                    cell += f" [{low:+.2f}, {high:+.2f}]"
                cells.append(f"{cell:<32}")
            print("".join(cells), f"{line['tok_s']:6.0f} tokens/s")


def main() -> None:
    """Run what is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500, help="of training, 32 pairs each")
    parser.add_argument("--dim", type=int, default=128, help="of the model's states")
    parser.add_argument("--memory-pairs", type=int, default=2000)
    parser.add_argument("--held-out", type=int, default=300, help="sentences to tune and test on")
    parser.add_argument("--tune-on", choices=["statutes", "both"], default="statutes")
    parser.add_argument("--encoder-texts", type=int, default=0, help="search among so many; 0: all")
    parser.add_argument("--methods", default=METHODS, help="with commas, the base model first")
    parser.add_argument("--longest", type=int, default=60, help="tokens of a text")
    settings = parser.parse_args()
    settings.name = f"tuned-on-{settings.tune_on}"
    if settings.encoder_texts:
        settings.name += f"-near-{settings.encoder_texts}"
    settings.work.mkdir(parents=True, exist_ok=True)
    parts = (
        (write_texts, "test.jsonl"),
        (train, "model"),
        (remember, "statutes.memory"),
        (compare, f"general-test-{settings.name}.json"),
    )
    for part, made in parts:
        if not (settings.work / made).exists():
            part(settings)


if __name__ == "__main__":
    main()
