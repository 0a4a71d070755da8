"""Generation at batch 1 with drafts of memory and text, without them, and by the base model alone.

The memory is made of law, and `--tuned` names one that was tuned for methods with a gate. Greedy,
in turns, on five kinds of text: law that is not in the memory (its own domain), Python's
documentation (other topics), WikiText-2 (another domain), random tokens, and questions as a chat
puts them. Two rivals draft for the attached model: transformers' prompt lookup (ten tokens from the
text itself) and, where its package can be imported, the frequency trees of SuffixDecoding
(arXiv:2411.04975; `suffix_decoding` of arctic-inference, with vLLM's limits), which have read the
memory's documents. Equal says how many texts are the same with drafts as without.

    python benchmarks/drafting.py
    PYTHONPATH=path/to/arctic-inference python benchmarks/drafting.py
    python benchmarks/drafting.py --model path/to/SmolLM2-135M-Instruct --methods suffix,hybrid
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from transformers.generation.candidate_generator import CandidateGenerator

from common import MODEL, arguments, first_documents, is_built, machine, report
from nearest import Memory, attach, read_documents
from nearest.encode.identity import start_token
from nearest.encode.loading import load_model_and_tokenizer

try:
    from arctic_inference.suffix_decoding import SuffixDecodingCache
except ImportError:
    SuffixDecodingCache = None

METHODS: dict[str, dict[str, Any]] = {"retomaton": {"min_knns": 1}, "hybrid": {"skip": 1.0}}
TREES = "frequency trees"
TREE_DEPTH = 24  # as in vLLM, for drafts and for what they are matched with
SIDES = ("base model", "attached", "prompt lookup", TREES, "with drafts")
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


def greedy(model: Any, tokenizer: Any, ids: torch.Tensor, tokens: int, **more: int) -> torch.Tensor:
    """A text that goes on by so many tokens, whatever they are."""
    text: torch.Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=start_token(tokenizer),
        **more,
    )
    return text


def asked(tokenizer: Any, start: int, question: str) -> torch.Tensor:
    """A question as the model's chat template puts it, or as plain text where it has none."""
    if tokenizer.chat_template is None:
        plain = f"Question: {question}\nAnswer:"
        return torch.tensor([[start, *tokenizer(plain)["input_ids"]]])
    messages = [{"role": "user", "content": question}]
    said = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return torch.tensor([tokenizer(said, add_special_tokens=False)["input_ids"]])


class FrequencyTrees(CandidateGenerator):
    """Drafts by SuffixDecoding for one text."""

    def __init__(self, trees: Any, prompt: list[int]) -> None:
        self.trees = trees
        self.known = len(prompt)
        trees.start_request("text", prompt)

    def get_candidates(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        ids = input_ids[0].tolist()
        self.trees.add_active_response("text", ids[self.known :])
        self.known = len(ids)
        drafted = self.trees.speculate(
            "text", ids, max_spec_tokens=TREE_DEPTH, max_spec_factor=1.0, min_token_prob=0.1
        ).token_ids
        return torch.tensor([ids + drafted]), None

    def update_candidate_strategy(self, *_: Any) -> None:
        pass


@contextmanager
def by_trees(model: Any, trees: Any) -> Iterator[None]:
    """Assisted decoding asks the trees for drafts; each text is forgotten with the next."""

    def made(input_ids: torch.Tensor, **_: Any) -> FrequencyTrees:
        forget(trees)
        return FrequencyTrees(trees, input_ids[0].tolist())

    model._get_candidate_generator = made
    try:
        yield
    finally:
        del model._get_candidate_generator
        forget(trees)


def forget(trees: Any) -> None:
    """End the text that is being written: it is no help for another side."""
    if "text" in trees.active_requests:
        trees.stop_request("text")
        trees.evict_cached_response("text")


def trees_of(memory: Memory) -> Any:
    """The trees of all documents of a memory."""
    trees = SuffixDecodingCache(TREE_DEPTH)
    for segment_number, segment in enumerate(memory.segments):
        for number in range(len(segment.offsets) - 1):
            one = (segment_number, number)
            trees.start_request(one, [])
            trees.add_active_response(one, segment.tokens_of(number).tolist())
            trees.stop_request(one)
    return trees


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
    sides = [side for side in SIDES if side != TREES or SuffixDecodingCache is not None]
    trees = trees_of(memory) if TREES in sides else None
    passes = [0]
    model.get_input_embeddings().register_forward_hook(
        lambda *_: passes.__setitem__(0, passes[0] + 1)
    )

    def written(ids: torch.Tensor, **lookup: int) -> tuple[list[int], float, int]:
        started, before = time.perf_counter(), passes[0]
        text = greedy(model, tokenizer, ids, options.new_tokens, **lookup)
        return text[0].tolist(), time.perf_counter() - started, passes[0] - before

    warm: set[tuple[str, str]] = set()  # methods and sides for which all is compiled
    for method in options.methods.split(","):
        for text in options.texts.split(","):
            found: dict[str, list[Any]] = {side: [] for side in sides}
            for ids in prompts(options, tokenizer, text):
                for side in sides:
                    here: Any = nullcontext()
                    if side != "base model":
                        drafts, settings = side == "with drafts", METHODS.get(method, {})
                        here = attach(model, memory, method, draft=drafts, **settings)
                    assisted = side in ("prompt lookup", TREES)
                    lookup = {"prompt_lookup_num_tokens": 10} if assisted else {}
                    drafter = by_trees(model, trees) if side == TREES else nullcontext()
                    with here, drafter:
                        if (method, side) not in warm:
                            written(ids, **lookup)
                            warm.add((method, side))
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
                tokens_a_pass={
                    side: options.new_tokens * len(rows) / sum(row[2] for row in rows)
                    for side, rows in found.items()
                },
                equal=sum(a[0] == b[0] for a, b in zip(plain, drafted, strict=True)),
                texts=len(drafted),
            )


if __name__ == "__main__":
    main()
