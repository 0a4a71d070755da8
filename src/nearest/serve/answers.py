"""Answers as OpenAI's clients read them, whole or in pieces."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nearest.serve.provenance import Provenance
from nearest.serve.vocabulary import Vocabulary
from nearest.serve.work import Told, finite


def new_id(prefix: str) -> str:
    """A name for an answer."""
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """Seconds since 1970, as answers tell them."""
    return int(time.time())


@dataclass
class Choice:
    """One continuation as it is told, and the provenance of its tokens where that is wanted."""

    index: int
    provenance: Provenance | None
    with_tokens: bool
    text: str = ""
    told: list[Told] = field(default_factory=list)
    tokens: list[dict[str, Any]] = field(default_factory=list)
    finished: str | None = None
    generated: int = 0

    def add(self, told: Sequence[Told]) -> list[dict[str, Any]]:
        """Add tokens; as the `nearest` extension tells them. Reads files: not for an event loop."""
        self.told += told
        self.text += "".join(one.text for one in told)
        if self.provenance is None:
            return []
        tokens = [self.provenance.token(one) for one in told]
        if not self.with_tokens:
            return []
        self.tokens += tokens
        return tokens

    def reads(self) -> list[dict[str, Any]]:
        """What was read beside the text and not told before."""
        return [] if self.provenance is None else self.provenance.reads()

    def summary(self) -> dict[str, Any] | None:
        """The `nearest` object at the end of an answer."""
        if self.provenance is None or not self.with_tokens:
            return None
        return self.provenance.summary()


def text_log_probs(
    told: Sequence[Told], vocabulary: Vocabulary, count: int, offset: int
) -> dict[str, Any]:
    """`logprobs` of a completion: parallel lists; `offset` is where the first token's text begins.

    The `count` likeliest stand by their text, with the larger probability where several have the
    same; the chosen token's text is added where it is not among them.
    """
    tokens, log_probs, offsets = [], [], []
    tops: list[dict[str, float] | None] = []
    for one in told:
        text = vocabulary.token_text(one.token)
        tokens.append(text)
        log_probs.append(finite(one.log_prob))
        offsets.append(offset)
        offset += len(one.text)
        if one.log_prob is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for token, log_prob in one.top[:count]:
            top.setdefault(vocabulary.token_text(token), finite(log_prob))
        top.setdefault(text, finite(one.log_prob))
        tops.append(top)
    return {
        "tokens": tokens,
        "token_logprobs": log_probs,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def chat_log_probs(told: Sequence[Told], vocabulary: Vocabulary, count: int) -> dict[str, Any]:
    """`logprobs` of a chat answer: an object a token."""

    def entry(token: int, log_prob: float | None) -> dict[str, Any]:
        return {
            "token": vocabulary.token_text(token),
            "logprob": finite(log_prob),
            "bytes": list(vocabulary.token_bytes(token)),
        }

    content = [
        {
            **entry(one.token, one.log_prob),
            "top_logprobs": [entry(token, log_prob) for token, log_prob in one.top[:count]],
        }
        for one in told
    ]
    return {"content": content, "refusal": None}


def usage(prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, int]:
    """Tokens read and generated, the end-of-text token included."""
    generated = sum(choice.generated for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
    }
