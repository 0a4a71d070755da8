"""The `nearest` extension of requests and answers as a JSON schema, for those who write clients.

Answers are made elsewhere (`provenance`); that they are as these types say is tested, not checked
at every token.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nearest.serve.schema import NearestOptions

VERSION = 1


class _Told(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Alternative(_Told):
    """A likely token; `token` is its own text, as `logprobs` writes it."""

    id: int
    token: str
    logprob: float


class NamedDocument(_Told):
    """A document of a memory; `url` is that of its metadata, else this server's own."""

    memory: str
    document: str
    title: str
    licence: str | None
    url: str


class Source(NamedDocument):
    """An entry that spoke for a token: the place in a document, and its share of the memory's say.

    `match_length` is the left context that it shares with the text, in tokens, 0 where the method
    does not measure it. `before`, `value` and `after` are the stored text around it.
    """

    position: int = Field(ge=0)
    weight: float = Field(ge=0, le=1.000001)
    kind: Literal["dense", "pointers", "suffix"]
    match_length: int = Field(ge=0)
    distance: float
    before: str
    value: str
    after: str


class Token(_Told):
    """A token of an answer, or with `echo` of the prompt.

    `memory_weight` is the share of its probability that the memories gave, `text_weight` the share
    that earlier places of the text itself gave, which are no sources; `passage_weight` the share
    that it would not have had without the passages that the model had read beside the text:
    `read` is their number in `reads`. The first of `base_alternatives` is what the model alone
    would have said.
    """

    id: int
    token: str
    text: str
    prompt: bool
    logprob: float | None
    base_logprob: float | None
    memory_weight: float = Field(ge=0, le=1)
    text_weight: float = Field(ge=0, le=1)
    passage_weight: float = Field(ge=0, le=1)
    read: int | None = Field(ge=0)
    alternatives: list[Alternative]
    base_alternatives: list[Alternative]
    sources: list[Source] = Field(max_length=5)


class Passage(NamedDocument):
    """A passage that the model read beside the text: RETRO's neighbour, or one before the text.

    `position` is that of its first token, `length` counts its tokens with those of `after`, which
    follows it in the document and was read, too. `distance` is a neighbour's to the query.
    """

    position: int = Field(ge=0)
    length: int = Field(ge=1)
    distance: float | None
    text: str
    after: str


class Read(_Told):
    """What the model read beside the text from some token on, and the text it was found for."""

    query: str
    passages: list[Passage]


class Share(NamedDocument):
    """What a document carried of the answer: its mean share of a token, and in how many tokens."""

    weight: float = Field(ge=0, le=1.000001)
    tokens: int = Field(ge=1)


class Span(NamedDocument):
    """A run of tokens that one document decided most; `start` and `end` count characters."""

    start: int
    end: int
    first_token: int
    tokens: int
    weight: float = Field(ge=0, le=1)


class Copy(NamedDocument):
    """A run of tokens that stands in a memory exactly so, from `position` of a document on."""

    start: int
    end: int
    first_token: int
    tokens: int
    position: int


class UsedMemory(_Told):
    """A memory that was looked up, in which version, and its weight."""

    name: str
    version: int
    weight: float = Field(ge=0, le=1.000001)


class Answer(_Told):
    """`nearest` of a choice, and of the last piece of a stream.

    Pieces of a stream hold the new ones of `tokens` and `reads`, whose numbers go on.
    """

    version: Literal[1]
    method: str
    settings: dict[str, bool | int | float | str]
    memories: list[UsedMemory]
    documents: list[Share]
    spans: list[Span]
    verbatim: list[Copy]
    tokens: list[Token]
    reads: list[Read]


class Piece(_Told):
    """`nearest` of the other pieces of a stream."""

    version: Literal[1]
    tokens: list[Token]
    reads: list[Read]


def schemas() -> dict[str, Any]:
    """JSON schemas of the extension: of requests, answers, and pieces of a stream."""
    kinds: dict[str, type[BaseModel]] = {
        "request": NearestOptions,
        "answer": Answer,
        "piece": Piece,
    }
    return {
        "version": VERSION,
        **{name: kind.model_json_schema() for name, kind in kinds.items()},
    }
