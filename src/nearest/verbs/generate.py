"""Continue a prompt with a memory attached, and name the documents that carried each token."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import LogitsProcessorList, PreTrainedModel

from nearest.encode.identity import input_device, reads_sources, start_token
from nearest.markup import shaded, table
from nearest.memory import Memory
from nearest.models.attach import attach
from nearest.models.generated import generation_option
from nearest.models.sources import Source, TokenSources
from nearest.models.writing import write_with_passages
from nearest.retrieval.ensemble import Memories, memories_of
from nearest.retrieval.settings import BASE, check_method, method_named
from nearest.store.tuned import SettingsFrom
from nearest.verbs.prompt import FirstToken, Messages, Streamer, prompt_tokens

_CONTEXT_TOKENS = 12
_SOURCES_A_TOKEN = 5
_CONTEXT = 16  # tokens that decide how the next one is spelled
_DOCUMENTS_SHOWN = 5  # in a notebook
_NEW_TOKENS = 20  # transformers' own default


@dataclass(frozen=True)
class GeneratedToken:
    """A token of the continuation, the share of its probability that the memory gave, and who gave.

    The sources are the strongest few; their weights are of the memory's share.
    """

    text: str
    memory_weight: float
    sources: list[Source]


@dataclass(frozen=True)
class DocumentShare:
    """How much of the continuation one document carried, and its strongest passage.

    `weight`: sum over tokens of the memory's weight times the document's share of it, divided by
    the number of tokens. The passage is the stored text around one entry, with the token it gave.
    """

    id: str
    metadata: Mapping[str, Any]
    weight: float
    before: str
    token: str
    after: str


@dataclass(frozen=True)
class Generation:
    """A prompt's continuation; tokens and documents only where sources were asked for.

    `prompt` is the last message of a chat. `continues`: whether the text goes on where the prompt
    ends. An answer in a chat does not, nor does what an encoder–decoder makes of its input.
    `settings_from`: as of a `Session`; None for the base model.
    """

    prompt: str
    text: str
    tokens: list[GeneratedToken]
    documents: list[DocumentShare]
    continues: bool = True
    settings_from: SettingsFrom | None = None

    def _repr_html_(self) -> str:
        """The text, each token shaded by the memory's weight, and its documents, for notebooks."""
        written = "".join(
            shaded(token.text, token.memory_weight, f"{token.memory_weight:.0%} from the memory")
            for token in self.tokens
        )
        text = f"<b>{escape(self.prompt)}</b>{'' if self.continues else '<br>'}"
        text += written or escape(self.text)
        if not self.documents:
            return f"<p>{text}</p>"
        rows = [
            (f"{one.weight:.1%}", one.id, f"…{one.before}[{one.token}]{one.after}…")
            for one in self.documents[:_DOCUMENTS_SHOWN]
        ]
        return f"<p>{text}</p>" + table(("share", "document", "strongest passage"), rows)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    memory: Memories,
    prompt: str | Messages,
    *,
    method: str = "knn",
    weights: Sequence[float] | None = None,
    sources: bool = True,
    force: bool = False,
    replay: int | str = 0,
    draft: bool = False,
    settings: Mapping[str, Any] | None = None,
    special_tokens: bool = False,
    heal: bool = False,
    stream: Callable[[str], None] | None = None,
    **generation: Any,
) -> Generation:
    """Continue `prompt` with `model.generate`, the memory attached.

    Args:
        model, tokenizer: those that built the memory.
        memory: what to look up; several are given as a list.
        prompt: text, which may be empty but for an encoder–decoder, whose encoder reads it; or
            messages with "role" and "content", for the tokenizer's chat template.
        method: "base", or one that uses the memory. With "in-context", or "in-context+knn" and so
            on, passages of the memory are put before the text, and chosen anew as it grows.
        weights: of several memories, as in `attach`.
        sources: name, for every token, what the memory gave it.
        force: accept another model than the one that built the memory.
        replay: positions of the prompt that are looked up before the last, or "full".
        draft: let memory and text draft several tokens for a pass, as in `attach`.
        settings: of the method; else as tuned.
        special_tokens, heal: how a text is read (`prompt.prompt_tokens`).
        stream: is given the continuation piece by piece, as it comes; not with beams.
        **generation: passed on to `model.generate` (max_new_tokens, num_beams, do_sample, …).

    Raises:
        NearestError: model, memory or settings cannot be used.
    """
    check_method(method)
    memories = memories_of(memory)
    continues = isinstance(prompt, str) and not reads_sources(model)
    read = prompt_tokens(model, tokenizer, prompt, special_tokens=special_tokens, heal=heal)
    read.check_length(model, generation.get("max_new_tokens"))
    with_passages = method != BASE and method_named(method).in_context
    healing: dict[str, Any] = {}  # with passages there are several calls, and it is for the first
    if read.first is not None:
        processors = [*(generation.get("logits_processor") or []), FirstToken(read.first)]
        healing["logits_processor"] = LogitsProcessorList(processors)
    if stream is not None and not with_passages:
        generation["streamer"] = Streamer(tokenizer, stream, read.spaces)
    text = read.text
    ids = torch.tensor([read.inputs], device=input_device(model))
    arguments: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **({} if reads_sources(model) else {"pad_token_id": start_token(tokenizer)}),
        **generation,
        **({} if with_passages else healing),
    }
    if generation_option(model, generation, "stop_strings"):
        arguments["tokenizer"] = tokenizer
    if method == BASE:
        output = model.generate(**arguments)  # type: ignore[operator]
        named: list[TokenSources] = []
        settings_from = None
    elif with_passages:
        new, named, settings_from = write_with_passages(
            model,
            memories,
            method,
            text,
            {n: v for n, v in arguments.items() if n not in ("input_ids", "attention_mask")},
            settings=dict(settings or {}),
            new_tokens=_most_new(model, arguments, len(text)),
            session={"tokenizer": tokenizer, "force": force, "draft": draft},
            weights=weights,
            first_arguments=healing,
            replay=len(text) if replay == "full" else int(replay),
            sources=sources,
            show=None if stream is None else _Growing(tokenizer, text[1:], read.spaces, stream),
        )
    else:
        with attach(
            model,
            memories,
            method,
            weights=weights,
            tokenizer=tokenizer,
            force=force,
            replay=replay,
            draft=draft,
            **(settings or {}),
        ) as session:
            output = model.generate(**arguments)  # type: ignore[operator]
            named = session.sources(0) if sources else []
            settings_from = session.settings_from
    if not with_passages:
        new = output[0, len(text) :].tolist()
    before = text[1:]
    pieces = decode_pieces(tokenizer, before, [token.token for token in named])
    pieces[:1] = [piece.removeprefix(read.spaces) for piece in pieces[:1]]
    return Generation(
        prompt if isinstance(prompt, str) else prompt[-1]["content"],
        _text_after(tokenizer, before, new).removeprefix(read.spaces),
        [
            GeneratedToken(text, token.memory_weight, token.sources[:_SOURCES_A_TOKEN])
            for text, token in zip(pieces, named, strict=True)
        ],
        _document_shares(tokenizer, memories, named),
        continues,
        settings_from,
    )


def _most_new(model: PreTrainedModel, arguments: Mapping[str, Any], length: int) -> int:
    """How many tokens may follow a text of so many."""
    new, whole = (generation_option(model, arguments, f"max_{n}") for n in ("new_tokens", "length"))
    return int(new or (_NEW_TOKENS if whole is None else whole - length))


class _Growing:
    """Hands on what text is new, when told all tokens that were written so far.

    A character of which tokens are missing waits for them.
    """

    def __init__(
        self, tokenizer: Any, before: list[int], spaces: str, stream: Callable[[str], None]
    ) -> None:
        self._tokenizer, self._stream = tokenizer, stream
        self._context, self._spaces = before[-_CONTEXT:], spaces
        self._read = 0  # tokens that are shown whole, the last of which are the context
        self._shown = 0  # characters of what follows them

    def __call__(self, written: list[int]) -> None:
        new = written[self._read :]
        text = _text_after(self._tokenizer, self._context, new)
        if self._spaces.startswith(text):
            return
        text = text.removeprefix(self._spaces)
        whole = text.rstrip("\ufffd")
        if len(whole) > self._shown:
            self._stream(whole[self._shown :])
            self._shown = len(whole)
        if whole == text:
            self._context, self._spaces = [*self._context, *new][-_CONTEXT:], ""
            self._read, self._shown = len(written), 0


def _text_after(tokenizer: Any, before: list[int], ids: list[int]) -> str:
    """What tokens add to the text before them; some tokenizers drop a first token's space."""
    whole = str(tokenizer.decode(before + ids, skip_special_tokens=True))
    return whole[len(str(tokenizer.decode(before, skip_special_tokens=True))) :]


def decode_pieces(tokenizer: Any, before: list[int], ids: list[int]) -> list[str]:
    """The text that each token adds to those before it, special tokens too.

    A character made of several tokens comes with the last of them.
    """
    stream, backend = DecodeStream(skip_special_tokens=False), tokenizer.backend_tokenizer
    for token in before:
        stream.step(backend, token)
    pieces = [stream.step(backend, token) for token in ids]
    unfinished = next((n for n, piece in enumerate(reversed(pieces)) if piece), len(pieces))
    if unfinished:  # a character that the text ends within
        pieces[-1] = tokenizer.decode(ids[-unfinished:])
    return [piece or "" for piece in pieces]


def _document_shares(
    tokenizer: Any, memories: Sequence[Memory], named: list[TokenSources]
) -> list[DocumentShare]:
    """Documents by what they carried, most first, each with its strongest entry's passage."""
    totals: dict[tuple[int, int], float] = {}  # by memory and document
    strongest: dict[tuple[int, int], tuple[float, int]] = {}  # weight and position
    for token in named:
        for source in token.sources:
            weight, place = token.memory_weight * source.weight / len(named), source.position
            which = source.memory, source.document
            totals[which] = totals.get(which, 0.0) + weight
            strongest[which] = max(strongest.get(which, (weight, place)), (weight, place))
    shares = []
    for which, weight in sorted(totals.items(), key=lambda item: -item[1]):
        memory, number = memories[which[0]], which[1]
        document, ids = memory.document(number), memory.document_tokens(number).tolist()
        value = strongest[which][1] + 1
        first, last = max(1, value - _CONTEXT_TOKENS), value + 1 + _CONTEXT_TOKENS
        at = value - first
        passage = decode_pieces(tokenizer, ids[max(1, first - 2) : first], ids[first:last])
        shares.append(
            DocumentShare(
                document.id,
                document.metadata,
                weight,
                "".join(passage[:at]),
                passage[at],
                "".join(passage[at + 1 :]),
            )
        )
    return shares
