"""RETRO beside the public code of the `norlund` lineage: generating, a training step, memory.

Needs the public code, `git clone https://github.com/TobiasNorlund/retro`, and einops. Both sides
have the same random weights (decoder 6 × 384, encoder 2 × 384, vocabulary 32,128), read the same
tokens and get the same two neighbours of 128 tokens for each chunk of 64; the difference of their
logits is reported. Generating is greedy, 256 tokens after 64; the public code has no cache, so its
side is the plain loop over its forward pass. A training step is forward, loss, backward of 4 × 512
tokens with dropout 0.1. Peak memory is that of a process of its own, above what it held before.

    python benchmarks/retro.py --code path/to/retro [--rounds 3] [--parts steps,generation,peaks]
"""

import importlib
import multiprocessing
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import arguments, interleaved, machine, medians, report, timed
from nearest.retro import RetroForCausalLM
from nearest.retro.convert import from_norlund

CHUNK, NEIGHBOURS, LENGTH, VOCABULARY = 64, 2, 128, 32_128
PROMPT, NEW = 64, 256
BATCH, COLUMNS = 4, 512


def their_model(code: Path) -> Any:
    """Theirs at random; two modules that no forward pass uses are left out."""
    generation = types.ModuleType("transformers.generation_utils")
    vars(generation)["GenerationMixin"] = object
    retrieval = types.ModuleType("retrieval")
    vars(retrieval).update(Retriever=object, DummyRetriever=object)
    sys.modules |= {generation.__name__: generation, retrieval.__name__: retrieval}
    sys.path.insert(0, str(code / "src"))
    public = importlib.import_module("modeling_retro")
    width = {"hidden_dim": 384, "ffn_dim": 1536, "num_heads": 6, "qkv_dim": 384}
    sizes = {f"{side}_{name}": size for side in ("enc", "dec") for name, size in width.items()}
    config = public.RetroConfig(
        num_embeddings=VOCABULARY,
        chunk_size=CHUNK,
        dropout_p=0.1,
        enc_num_layers=2,
        enc_ca_layers=[1],
        enc_sa_pos_bias_num_buckets=256,
        enc_ca_pos_bias_num_buckets=192,
        dec_num_layers=6,
        dec_cca_layers=[2, 5],
        dec_sa_pos_bias_num_buckets=1024,
        dec_cca_pos_bias_num_buckets=192,
        **sizes,
    )
    torch.manual_seed(0)
    return public.RetroModelLMHead(config).eval()


def our_model(theirs: Any) -> RetroForCausalLM:
    return from_norlund(theirs.state_dict(), chunk_size=CHUNK)


def neighbours(chunks: Tensor) -> Tensor:
    """The same for the same chunk on both sides; (n, m) → (n, neighbours, length)."""
    found = torch.arange(NEIGHBOURS * LENGTH) * 7 + chunks[:, :1] * 31 + chunks[:, -1:] * 13
    return (found % (VOCABULARY - 2) + 2).unflatten(1, (NEIGHBOURS, LENGTH))


def padded(chunks: list[Tensor], length: int) -> Tensor:
    """Neighbours for an input of so many tokens: none for a chunk that has not ended."""
    rest = -(-length // CHUNK) - len(chunks)
    return torch.stack([*chunks, *[torch.zeros(NEIGHBOURS, LENGTH, dtype=torch.int64)] * rest])[
        None
    ]


@torch.no_grad()
def generate_with_theirs(model: Any, prompt: Tensor) -> Tensor:
    """The plain loop: every token reads everything anew; neighbours are looked up once a chunk."""
    ids, found = prompt, []
    for _ in range(NEW):
        while len(found) < ids.shape[1] // CHUNK:
            begin = len(found) * CHUNK
            found.append(neighbours(ids[:, begin : begin + CHUNK])[0])
        logits = model(ids, padded(found, ids.shape[1])).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


def generate_with_ours(model: RetroForCausalLM, prompt: Tensor) -> Tensor:
    return model.generate(
        prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, neighbours=neighbours
    )


def batch() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (BATCH, COLUMNS), generator=random)
    found = neighbours(ids.reshape(-1, CHUNK)).unflatten(0, (BATCH, COLUMNS // CHUNK))
    return ids, found, ids.roll(-1, dims=1)


def step_of(model: Any) -> Callable[[], float]:
    """Forward, loss and backward; returns the loss. Theirs takes labels shifted already."""
    ids, found, labels = batch()
    if isinstance(model, RetroForCausalLM):
        model.config.shift_labels = False

    def step() -> float:
        model.train()
        model.zero_grad(set_to_none=True)
        loss = model(ids, neighbour_ids=found, labels=labels).loss
        loss.backward()
        return float(loss.detach())

    return step


def peak_megabytes(code: Path, side: str) -> float:
    """In a fresh process: the highest resident memory of two steps, above that before them."""
    theirs = their_model(code)
    step = step_of(theirs if side == "theirs" else our_model(theirs))
    if side == "ours":
        del theirs
    before = _megabytes("VmRSS")
    step()
    step()
    return _megabytes("VmHWM") - before


def _megabytes(field: str) -> float:
    """Resident now, or at most; resource.getrusage would count the process this one came from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def compare_steps(theirs: Any, ours: RetroForCausalLM, rounds: int) -> dict[str, Any]:
    """After one untimed step of each, which allocates what later ones use again."""
    steps = {"their_step": step_of(theirs), "our_step": step_of(ours)}
    losses = {name: step() for name, step in steps.items()}
    seconds = interleaved(
        rounds, **{name: lambda step=step: timed(step)[0] for name, step in steps.items()}
    )
    middle = medians(seconds)
    ratio = middle["our_step"] / middle["their_step"]
    return {"losses": losses, "step_seconds": seconds, "step_medians": middle, "step_ratio": ratio}


def compare_generation(theirs: Any, ours: RetroForCausalLM, rounds: int) -> dict[str, Any]:
    prompt = batch()[0][:1, :PROMPT]
    written: dict[str, Tensor] = {}

    def generating(side: str, generate: Callable[[], Tensor]) -> Callable[[], float]:
        def run() -> float:
            seconds, written[side] = timed(generate)
            return seconds

        return run

    theirs.eval()
    ours.eval()
    seconds = interleaved(
        rounds,
        their_generation=generating("theirs", lambda: generate_with_theirs(theirs, prompt)),
        our_generation=generating("ours", lambda: generate_with_ours(ours, prompt)),
    )
    middle = medians(seconds)
    return {
        "same_tokens": torch.equal(written["theirs"], written["ours"]),
        "generation_seconds": seconds,
        "generation_medians": middle,
        "generation_speedup": middle["their_generation"] / middle["our_generation"],
    }


def compare_peaks(code: Path) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {side: pool.apply(peak_megabytes, (code, side)) for side in ("theirs", "ours")}
    return {"step_peak_megabytes": peaks}


@torch.no_grad()
def difference_of_logits(theirs: Any, ours: RetroForCausalLM) -> float:
    ids, found, _ = batch()
    one, other = (model(ids[:1], neighbour_ids=found[:1]).logits for model in (ours, theirs))
    return float((one - other).abs().max())


def main() -> None:
    options = arguments(__doc__, code=Path("retro"), rounds=1, parts="steps,generation,peaks")
    parts = options.parts.split(",")
    theirs = their_model(options.code)
    ours = our_model(theirs)
    record: dict[str, Any] = {
        "benchmark": "retro",
        "weights": sum(weight.numel() for weight in ours.parameters()),
        "logits_differ_by": difference_of_logits(theirs, ours),
    }
    if "steps" in parts:
        record |= compare_steps(theirs, ours, options.rounds)
    if "generation" in parts:
        record |= compare_generation(theirs, ours, options.rounds)
    if "peaks" in parts:
        record |= compare_peaks(options.code)
    report(**record, **machine())


if __name__ == "__main__":
    main()
