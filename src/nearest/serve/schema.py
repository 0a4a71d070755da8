"""What clients may ask: OpenAI's fields that mean something here, and the `nearest` extension.

A field that this server does not implement is refused by name. Fields whose value asks for nothing
(`"presence_penalty": 0`) are accepted, since many clients send them with every request.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 32
MAX_STOPS = 16
MAX_PROMPTS = 256

# Values that ask for nothing, of fields that are not supported otherwise.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
}


def _whole(text: str) -> str:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("the text has half of a surrogate pair, which stands for no character")
    return text


Text = Annotated[str, AfterValidator(_whole)]


T = TypeVar("T")
Tokens = Annotated[list[int], Field(min_length=1)]
Prompts = Annotated[list[T], Field(min_length=1, max_length=MAX_PROMPTS)]


class Strict(BaseModel):
    """No unknown fields, no conversion between types, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _same(value: Any, other: Any) -> bool:
    """Equal, and not one a truth value and the other a number, which Python calls equal."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


class StreamOptions(Strict):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class MemoryWeight(Strict):
    """A memory to look up, and its weight; weights sum to at most 1, equal ones if not given."""

    name: Text
    weight: float | None = Field(None, ge=0, le=1)


class DocumentName(Strict):
    """A document of a memory."""

    memory: Text
    id: Text


class NearestOptions(Strict):
    """The `nearest` object of a request; every field has a default.

    Attributes:
        version: of this extension.
        method: "base" for the model alone, or a method of the memory, such as "knn" or "hybrid".
        settings: of the method, by the names of `nearest eval`; as tuned when not given.
        memories: which of the served memories to look up; all of them when not given.
        without: documents that the prediction must not use.
        replay: positions of the prompt that a method with state looks up before the last; "full"
            for all of them. `echo` looks up all.
        sources: give provenance for every token.
        alternatives: how many candidates of model and mixture to give for every token.
    """

    version: Literal[1] = 1
    method: str | None = None
    settings: dict[str, bool | int | float | str] = Field(default_factory=dict, max_length=32)
    memories: list[MemoryWeight] | None = Field(None, min_length=1, max_length=64)
    without: list[DocumentName] = Field(default_factory=list, max_length=1000)
    replay: Annotated[int, Field(ge=0)] | Literal["full"] = 0
    sources: bool = True
    alternatives: int = Field(5, ge=0, le=MAX_TOP_LOGPROBS)

    @field_validator("version", mode="before")
    @classmethod
    def _is_a_number(cls, version: Any) -> Any:
        if isinstance(version, bool):  # True == 1, which a literal accepts
            raise ValueError("give the number of a version")
        return version

    @model_validator(mode="after")
    def _alternatives_need_sources(self) -> "NearestOptions":
        if not self.sources and "alternatives" in self.model_fields_set:
            raise ValueError("alternatives are told with sources: true")
        return self


class Sampling(Strict):
    """What completions and chat have in common."""

    model: Text
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | list[Text] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    nearest: NearestOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            name: value
            for name, value in values.items()
            if name in cls.model_fields
            or not (value is None or any(_same(value, one) for one in _NEUTRAL.get(name, ())))
        }

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MAX_STOPS or any(not 1 <= len(one) <= 1000 for one in stops):
            raise ValueError(f"give at most {MAX_STOPS} stop strings of 1 to 1000 characters")
        return stop

    @model_validator(mode="after")
    def _options_need_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(Sampling):
    """`POST /v1/completions`; token ids go to the model as they are, text after a start token.

    Special tokens that a text names are plain text, unless `special_tokens`.
    """

    prompt: Text | Prompts[Text] | Tokens | Prompts[Tokens]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    special_tokens: bool = False

    @model_validator(mode="after")
    def _check(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1, unless echo is true")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or several, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(Strict):
    """A part of a message; images and sounds are not supported."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _as_answered(cls, values: Any) -> Any:
        """Accept an assistant's message as this server gave it."""
        if not isinstance(values, dict):
            return values
        sent = ("annotations", "nearest") if values.get("role") == "assistant" else ()
        return {
            name: value
            for name, value in values.items()
            if name not in sent and (name == "content" or value is not None)
        }

    @field_validator("content", mode="before")
    @classmethod
    def _of_text(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise ValueError(f"parts of the type {kind!r} are not supported: send text alone")
        return content

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("give max_completion_tokens or max_tokens, not both")
        return self


class TokenizeRequest(Strict):
    """`POST /tokenize`."""

    prompt: Text
    add_special_tokens: bool = True
    model: str | None = None


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    tokens: list[Annotated[int, Field(ge=0)]] = Field(max_length=1_000_000)
    model: str | None = None
