"""Generation at batch 1 with drafts of memory and text, without them, and by the base model alone.

The memory is made of law, and `--tuned` names one that was tuned for methods with a gate. Greedy,
in turns, with transformers' prompt lookup (drafts of ten tokens from the text itself) on the
attached model as a rival: law that is not in the memory (its own domain), Python's documentation
(other topics), WikiText-2 (another domain), random tokens, and questions as a chat puts them.
Equal says how many texts are the same with drafts as without.

    python benchmarks/drafting.py
    python benchmarks/drafting.py --model path/to/SmolLM2-135M-Instruct --methods suffix,hybrid
"""

import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch

from common import MODEL, arguments, first_documents, is_built, machine, report
from nearest import Memory, attach, read_documents
from nearest.encode.identity import start_token
from nearest.encode.loading import load_model_and_tokenizer

METHODS: dict[str, dict[str, Any]] = {"retomaton": {"min_knns": 1}, "hybrid": {"skip": 1.0}}
SIDES = ("base model", "attached", "prompt lookup", "with drafts")
TEXTS = "law,python,wikitext2,random,chat"
QUESTIONS = (
    "What must a landlord tell a tenant before the rent is raised?",
    "Explain how a bill becomes a law, in a few sentences.",
    "Write a short letter to the mayor about a broken street light.",
    "List five things to check before renting a flat.",
    "How do I reverse a list in Python?",
    "Who may vote in an election of the council?",
    "Give me a recipe for pancakes.",
    "What is the difference between a fine and a tax?",
    "Summarise the story of the tortoise and the hare.",
    "Which documents does a company need to open a bank account?",
    "Tell me a joke about lawyers.",
    "How is the weather forecast made?",
)


def prompts(options: Any, tokenizer: Any, text: str) -> list[torch.Tensor]:
    """Token ids with which texts of a kind begin."""
    start, length = start_token(tokenizer), options.prompt
    if text == "random":
        drawn = np.random.default_rng(0).integers(5, len(tokenizer), (options.prompts, length))
        return [torch.tensor([[start, *row]]) for row in drawn.tolist()]
    if text == "chat":
        return [asked(tokenizer, start, question) for question in QUESTIONS[: options.prompts]]
    if text == "python":
        texts = [topics[name] for name in sorted(topics)]
    else:
        folder = {"law": "dclaw"}.get(text, text)
        texts = [one.text for one in read_documents([options.corpora / folder / "test.jsonl"])]
    rows = (tokenizer(one, verbose=False)["input_ids"] for one in texts)
    long = [row for row in rows if len(row) > length][: options.prompts]
    return [torch.tensor([[start, *row[:length]]]) for row in long]


def asked(tokenizer: Any, start: int, question: str) -> torch.Tensor:
    """A question as the model's chat template puts it, or as plain text where it has none."""
    if tokenizer.chat_template is None:
        plain = f"Question: {question}\nAnswer:"
        return torch.tensor([[start, *tokenizer(plain)["input_ids"]]])
    messages = [{"role": "user", "content": question}]
    said = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return torch.tensor([tokenizer(said, add_special_tokens=False)["input_ids"]])


def main() -> None:
    options = arguments(
        __doc__,
        model=str(MODEL),
        memory_tokens=400_000,
        prompts=12,
        prompt=48,
        new_tokens=128,
        methods="suffix,retomaton",
        texts=TEXTS,
        tuned="",
    )
    model, tokenizer = load_model_and_tokenizer(options.model, "float32", "cpu")
    path = options.work / f"drafting-{len(tokenizer)}-{options.memory_tokens}.memory"
    if options.tuned:
        path = Path(options.tuned)
    elif not is_built(path):
        law = options.corpora / "dclaw" / "train-2m.jsonl"
        Memory.build(model, tokenizer, first_documents(law, tokenizer, options.memory_tokens), path)
    memory = Memory.open(path)
    report(**machine(), entries=memory.entries)
    passes = [0]
    model.get_input_embeddings().register_forward_hook(
        lambda *_: passes.__setitem__(0, passes[0] + 1)
    )

    def written(ids: torch.Tensor, **lookup: int) -> tuple[list[int], float, int]:
        started, before = time.perf_counter(), passes[0]
        text = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.new_tokens,
            min_new_tokens=options.new_tokens,
            do_sample=False,
            pad_token_id=start_token(tokenizer),
            **lookup,
        )
        return text[0].tolist(), time.perf_counter() - started, passes[0] - before

    for method in options.methods.split(","):
        for text in options.texts.split(","):
            found: dict[str, list[Any]] = {side: [] for side in SIDES}
            for number, ids in enumerate(prompts(options, tokenizer, text)):
                for side in SIDES:
                    here: Any = nullcontext()
                    if side != "base model":
                        drafts, settings = side == "with drafts", METHODS.get(method, {})
                        here = attach(model, memory, method, draft=drafts, **settings)
                    lookup = {"prompt_lookup_num_tokens": 10} if side == "prompt lookup" else {}
                    with here:
                        if not number:
                            written(ids, **lookup)  # what is compiled once
                        found[side].append(written(ids, **lookup))
            rates = {
                side: statistics.median(options.new_tokens / seconds for _, seconds, _ in rows)
                for side, rows in found.items()
            }
            plain, drafted = found["attached"], found["with drafts"]
            report(
                method=method,
                text=text,
                tokens_a_second=rates,
                drafts_of_attached=rates["with drafts"] / rates["attached"],
                drafts_of_base=rates["with drafts"] / rates["base model"],
                prompt_lookup_of_attached=rates["prompt lookup"] / rates["attached"],
                tokens_a_pass=options.new_tokens * len(drafted) / sum(row[2] for row in drafted),
                equal=sum(a[0] == b[0] for a, b in zip(plain, drafted, strict=True)),
                texts=len(drafted),
            )


if __name__ == "__main__":
    main()
