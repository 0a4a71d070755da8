"""A conversation with a model that looks a memory up while it answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from nearest.errors import SettingError
from nearest.retrieval.ensemble import Memories, memories_of
from nearest.retrieval.settings import (
    BASE,
    check_method,
    method_named,
    resolve_settings,
    settings_of,
)
from nearest.verbs.generate import Generation, generate
from nearest.verbs.prompt import prompt_tokens

_NEW_TOKENS = 60


class Chat:
    """Messages so far, and what answers the next.

    Every answer is generated anew from all messages, by the tokenizer's chat template. Where they
    exceed the model's positions, the oldest exchanges are left out.

    Attributes:
        method: how the memory is used.
        remembers: whether it is used at all.
        last: the last answer, with its sources; None before the first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        memory: Memories,
        method: str = "knn",
        *,
        system: str | None = None,
        weights: Sequence[float] | None = None,
        settings: Mapping[str, Any] | None = None,
        force: bool = False,
        **generation: Any,
    ) -> None:
        check_method(method)
        self.method = method
        self.remembers = True
        self.last: Generation | None = None
        self._model, self._tokenizer, self._memory = model, tokenizer, memory
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._messages: list[dict[str, str]] = []
        self._weights, self._settings, self._force = weights, settings, force
        self._generation = {"max_new_tokens": _NEW_TOKENS, **generation}
        prompt_tokens(model, tokenizer, [*self._system, {"role": "user", "content": "?"}])

    @property
    def answer(self) -> str:
        """The text of the last answer."""
        return "" if self.last is None else self.last.text

    def say(self, text: str, stream: Callable[[str], None] | None = None) -> Generation:
        """Answer a message; `stream` is given the answer piece by piece.

        Raises:
            NearestError: the message is too long, or the memory cannot be used.
        """
        messages = self._fitting([*self._messages, {"role": "user", "content": text}])
        remembers = self.remembers and self.method != BASE
        answer = generate(
            self._model,
            self._tokenizer,
            self._memory,
            [*self._system, *messages],
            method=self.method if remembers else BASE,
            weights=self._weights,
            force=self._force,
            settings=self._settings,
            stream=stream,
            **self._generation,
        )
        self._messages = [*messages, {"role": "assistant", "content": answer.text}]
        self.last = answer
        return answer

    def use(self, method: str) -> None:
        """Answer by another method from now on (SettingError where it is unknown)."""
        check_method(method)
        self.method = method

    def begin_anew(self) -> None:
        """Begin a new conversation."""
        self._messages, self.last = [], None

    def _fitting(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """The last messages that leave room for an answer, and for passages before them."""
        new, beside = self._generation["max_new_tokens"], 0
        if self.remembers and self.method != BASE and method_named(self.method).in_context:
            memory = memories_of(self._memory)[0]
            given = settings_of(self.method, self._settings or {})
            beside = resolve_settings(self.method, memory, **given).passage_room
        while True:
            read = prompt_tokens(self._model, self._tokenizer, [*self._system, *messages])
            last = len(messages) < 3  # before which passages leave out what does not fit
            try:
                read.check_length(self._model, new if last else new + beside)
            except SettingError:
                if last:
                    raise
                messages = messages[2:]
            else:
                return messages
