"""Turn a prompt into model inputs: plain text, or the messages of a chat."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, TextStreamer

from nearest.corpus.documents import Document
from nearest.corpus.tokens import tokenise_encoder_texts
from nearest.encode.identity import max_positions, reads_sources, start_token, token_rules
from nearest.errors import SettingError

Messages = Sequence[Mapping[str, str]]  # each with "role" and "content", as chat templates take
_SPACES = {"Ġ": " ", "▁": " "}  # how byte-level and SentencePiece tokenizers write a space


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as token ids.

    Attributes:
        inputs: what `generate` is given.
        text: what the continuation goes on from, the start token first: of an encoder–decoder the
            start token alone.
        spaces: taken off the prompt's end; the first new token is to begin with them.
        first: ids that the first new token is one of; None for any.
    """

    inputs: list[int]
    text: list[int]
    spaces: str = ""
    first: list[int] | None = None

    def check_length(self, model: PreTrainedModel, new: int | None) -> None:
        """Refuse no new tokens, or a prompt that leaves no room for them (SettingError)."""
        if new is not None and new < 1:
            raise SettingError(f"the number of new tokens must be at least 1, got {new}")
        positions = max_positions(model)
        if positions is not None and len(self.text) + (new or 0) > positions:
            raise SettingError(
                f"the prompt's {len(self.text)} tokens and {new} new ones exceed the model's "
                f"{positions} positions: shorten the prompt, or ask for fewer (--max-new-tokens)"
            )


class FirstToken(LogitsProcessor):
    """Allows some tokens alone as the first after the prompt, which its first call shows."""

    def __init__(self, allowed: list[int]) -> None:
        self._allowed = torch.tensor(allowed)
        self._prompt_length: int | None = None

    def __call__(
        self, input_ids: Int[Tensor, "rows length"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        """Give the other tokens -inf, at the first step."""
        if self._prompt_length is None:
            self._prompt_length = input_ids.shape[1]
        if input_ids.shape[1] != self._prompt_length:
            return scores
        banned = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
        banned[self._allowed.to(scores.device)] = False
        return scores.masked_fill(banned, -torch.inf)


class Streamer(TextStreamer):
    """Hands the continuation on, word by word, without the spaces that the prompt ended with."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None], spaces: str) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show, self._spaces = show, spaces

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by `generate` with text that no later token changes."""
        shown = text.removeprefix(self._spaces)
        self._spaces = ""
        if shown:
            self._show(shown)


def prompt_tokens(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str | Messages,
    *,
    special_tokens: bool = False,
    heal: bool = False,
) -> PromptTokens:
    """Token ids of a prompt.

    Args:
        model: decides whether the prompt is continued or read by an encoder.
        tokenizer: the model's.
        prompt: text, or messages for the tokenizer's chat template.
        special_tokens: read "<|endoftext|>" and its like, in a text or in what messages say, as
            tokens, not as plain text.
        heal: leave spaces at the end of a text to the first new token. Most vocabularies hold
            words with the space before them, and after a token for the space alone, which their
            training texts hardly have, models continue badly.

    Raises:
        SettingError: the prompt is neither text nor messages, no chat template is there, or it
            refuses the messages.
    """
    if not isinstance(prompt, str):
        return _chat_tokens(model, tokenizer, prompt, special_tokens=special_tokens)
    _check_text(prompt)
    if reads_sources(model):
        rules = token_rules(model, tokenizer)
        document = Document("", "", origin="the prompt", encoder_text=prompt)
        (read,) = tokenise_encoder_texts([document], tokenizer, rules)
        return PromptTokens(read.tolist(), [rules.start_token])
    text = prompt.rstrip(" ") if heal else prompt
    spaces = prompt[len(text) :]
    first = _beginning_with(tokenizer, spaces) if spaces else None
    if not first:  # nothing to heal, or no token begins so
        text, spaces, first = prompt, "", None
    ids = [
        start_token(tokenizer),
        *tokenizer(text, add_special_tokens=False, split_special_tokens=not special_tokens)[
            "input_ids"
        ],
    ]
    return PromptTokens(ids, ids, spaces, first)


def _chat_tokens(
    model: PreTrainedModel, tokenizer: Any, messages: Messages, *, special_tokens: bool
) -> PromptTokens:
    if reads_sources(model) or not getattr(tokenizer, "chat_template", None):
        raise SettingError(
            "this model has no chat template, so it was not trained to chat: give a prompt to "
            "continue (`nearest generate`), or a model that chats"
        )
    _check_messages(messages)
    try:
        rendered = tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=True,
            return_dict=True,
            sanitize_control_tokens=not special_tokens,
        )
    except Exception as error:  # of the template's language, or what the template itself raises
        reason = str(error).strip().partition("\n")[0]
        raise SettingError(
            f"the tokenizer's chat template cannot be used for these messages ({reason}): change "
            "them, or leave a system message out"
        ) from error
    ids = list(rendered["input_ids"])
    return PromptTokens(ids, ids)


def _check_messages(messages: Any) -> None:
    """Refuse what a chat template cannot write (SettingError)."""
    given = isinstance(messages, Sequence) and len(messages) > 0
    if not given or not all(
        isinstance(one, Mapping)
        and isinstance(one.get("role"), str)
        and isinstance(one.get("content"), str)
        for one in messages
    ):
        raise SettingError(
            "a prompt is text, or a list of messages, each with a 'role' and a 'content' that is "
            "text: give one of the two"
        )
    for one in messages:
        _check_text(one["content"])


def _check_text(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise SettingError(
            f"the prompt is not UTF-8 (at character {error.start:,}): encode it anew"
        ) from error


def _beginning_with(tokenizer: Any, spaces: str) -> list[int]:
    """Tokens whose text begins with these spaces and does not end there."""
    found = []
    for token, number in tokenizer.get_vocab().items():
        text = "".join(_SPACES.get(character, character) for character in token)
        if text.startswith(spaces) and text.strip(" "):
            found.append(number)
    return sorted(found)
