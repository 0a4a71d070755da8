"""Text in, text out: what a model writes, chunk by chunk, with the neighbours that each had."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from nearest.encode.identity import max_positions
from nearest.errors import NearestError, SettingError
from nearest.retro.data.live import PassageSource
from nearest.retro.generation import Retrieve
from nearest.retro.neighbours import refresh
from nearest.retro.retrofit import RetrofitForCausalLM


@dataclass(frozen=True)
class ShownNeighbour:
    """A passage that acted on what follows a chunk; no source where it was given by hand."""

    text: str
    source: PassageSource | None


@dataclass(frozen=True)
class WrittenChunk:
    """A chunk of the prompt or of the answer, and its neighbours, those without tokens left out."""

    text: str
    neighbours: list[ShownNeighbour]


@dataclass(frozen=True)
class Written:
    """What a model wrote.

    Attributes:
        prompt, text: what was given, and what was written after it, special tokens left out.
        chunks: all that ended, of both.
    """

    prompt: str
    text: str
    chunks: list[WrittenChunk]

    def to_dict(self) -> dict[str, Any]:
        """The stable JSON keys."""
        return asdict(self)


class _Noting:
    """Passes chunks on, and remembers their neighbours and sources."""

    def __init__(self, retrieve: Retrieve, tell: Callable[[WrittenChunk], None], show: Any) -> None:
        self._retrieve = retrieve
        self._tell = tell
        self._show = show
        self.known: dict[tuple[int, ...], WrittenChunk] = {}

    def __call__(self, chunks: Int[Tensor, "n m"]) -> Int[Tensor, "n neighbours length"]:
        found = self._retrieve(chunks)
        sources = getattr(self._retrieve, "sources", None) or [[None] * found.shape[1]] * len(found)
        for chunk, ids, places in zip(chunks.tolist(), found, sources, strict=True):
            if tuple(chunk) not in self.known:
                self.known[tuple(chunk)] = shown = self._show(chunk, ids, places)
                self._tell(shown)
        return found


class _Kept(BaseStreamer):
    """The tokens so far, the prompt's first."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None: ...


def _check_length(model: PreTrainedModel, tokens: int, new: int) -> None:
    bounded = isinstance(model, RetrofitForCausalLM) or model.config.absolute_positions
    positions = max_positions(model)
    if bounded and positions is not None and tokens + new > positions:
        raise SettingError(
            f"the prompt's {tokens} tokens and {new} new ones exceed the model's {positions} "
            "positions: shorten the prompt, or ask for fewer (--max-new-tokens)"
        )


def write(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    neighbours: Retrieve | None = None,
    *,
    start: int | None = None,
    tell: Callable[[WrittenChunk], None] = lambda _: None,
    **options: Any,
) -> Written:
    """Go on from a prompt.

    Args:
        model: RETRO or RETROfit.
        tokenizer: its own.
        prompt: text.
        neighbours: as `generate` takes them; their `sources`, where they have such, are shown, and
            what they search is looked at anew, where they have a `refresh`.
        start: a token that every document begins with.
        tell: called with each chunk as its neighbours come, while the rest is still unwritten.
        **options: of transformers' `generate`.

    Raises:
        SettingError: the prompt has no token, or the model no room for it and the new tokens.
        NearestError: as `neighbours` raise it; its message holds what was written until then.
    """
    refresh(neighbours)
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    first = [] if start is None else [start]
    if not first + ids:
        raise SettingError("the prompt has no tokens: give some text to go on from")
    given = torch.tensor([first + ids], device=model.device)
    _check_length(model, given.shape[1], options.get("max_new_tokens") or 0)

    def text_of(tokens: list[int]) -> str:
        return str(tokenizer.decode([t for t in tokens if t >= 0], skip_special_tokens=True))

    def shown(chunk: list[int], found: Tensor, places: list[Any]) -> WrittenChunk:
        pairs = zip(found.tolist(), places, strict=True)
        listed = [
            ShownNeighbour(text_of(tokens), place) for tokens, place in pairs if max(tokens) >= 0
        ]
        return WrittenChunk(text_of(chunk), listed)

    noting = None if neighbours is None else _Noting(neighbours, tell, shown)
    kept = _Kept()
    beams = options.get("num_beams") or cast(Any, model).generation_config.num_beams or 1
    if beams == 1:  # transformers streams no beams
        options = {"streamer": kept, **options}
    mask = torch.ones_like(given)
    try:
        output = cast(Any, model).generate(given, attention_mask=mask, neighbours=noting, **options)
    except NearestError as error:
        if written := text_of(kept.tokens[given.shape[1] :]):
            raise type(error)(f"{error}. Written until then: {written}") from error
        raise
    output = output[0].tolist()
    m = cast(Any, model).retro_config.chunk_size
    known = {} if noting is None else noting.known
    ended = [tuple(output[i : i + m]) for i in range(0, len(output) - m + 1, m)]
    return Written(
        prompt,
        text_of(output[given.shape[1] :]),
        [known.get(chunk) or WrittenChunk(text_of(list(chunk)), []) for chunk in ended],
    )
