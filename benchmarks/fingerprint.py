"""What it takes to know a model by its function, and how near reloads of one model stay.

A Llama model of 135M random weights, in the shape of SmolLM2-135M (30 layers, 576 dims, 49,152
tokens, tied head), or the one named (a folder or a .gguf file). `hash` is that of its weights, at
first sight; `probe` the states and logits at the fixed probe text, and the noise that tells its
tolerance; `again` what every later attach in the same session costs.
Then the model is reloaded 20 times, in another dtype or with another number of threads each time,
and it is said how often a memory of the first would refuse it.

    python benchmarks/fingerprint.py [--model ""] [--reloads 20]
"""

import copy
import itertools
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import arguments, machine, report, timed
from nearest.encode.fingerprint import departure, probe_of, weights_hash
from nearest.encode.layers import find_key_layer
from nearest.encode.loading import load_model_and_tokenizer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main() -> None:
    options = arguments(__doc__, model="", reloads=20)
    model = load_model_and_tokenizer(options.model)[0] if options.model else random_model()
    weights = sum(weight.numel() for weight in model.parameters())
    report(**machine(), benchmark="fingerprint", weights=weights, threads=torch.get_num_threads())
    layer = find_key_layer(model, "last_ffn_input")
    hashing, digest = timed(lambda: weights_hash(model))
    probing, built = timed(lambda: probe_of(model, layer))
    again, same = timed(lambda: departure(model, layer, digest or "", layer.path, built))
    report(hash=hashing, probe=probing, again=again, refused=same)
    refused, slowest, threads = 0, 0.0, torch.get_num_threads()
    settings = itertools.cycle(itertools.product(DTYPES, (1, 2)))
    for _, (dtype, count) in zip(range(options.reloads), settings, strict=False):
        torch.set_num_threads(count)
        other: Any = copy.deepcopy(model).to(dtype)
        entry = find_key_layer(other, "last_ffn_input")
        spent, reason = timed(
            lambda other=other, entry=entry: departure(
                other, entry, digest or "", layer.path, built
            )
        )
        refused, slowest = refused + (reason is not None), max(slowest, spent)
        torch.set_num_threads(threads)
    report(reloads=options.reloads, refused=refused, slowest=slowest)


def random_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8_192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


if __name__ == "__main__":
    main()
