"""Between text and tokens: prompts, conversations, single tokens' text, and text as it comes."""

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tokenizers.decoders import DecodeStream

from nearest.serve.errors import ApiError

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no whole character
_CONTEXT = 8  # tokens before a text that decide how its first token is written


class Vocabulary:
    """A tokenizer with the rules of a memory's texts; several threads may use it.

    Args:
        tokenizer: of the model.
        size: number of token ids that the model accepts.
        stop_tokens: that end a generation.
        chat_template: in place of the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: Any,
        size: int,
        stop_tokens: frozenset[int],
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.size = size
        self.stop_tokens = stop_tokens
        self.chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        self._special = frozenset(int(token) for token in tokenizer.all_special_ids)
        self._lock = threading.Lock()  # tokenisers change their own settings while they encode
        self._anchor = self.encode("a")[-1:]
        self.token_text = lru_cache(1 << 17)(self._token_text)
        self.token_bytes = lru_cache(1 << 17)(self._token_bytes)

    def encode(self, text: str, special: bool = False, *, named: bool = True) -> list[int]:
        """Token ids of a text, with the tokenizer's own special tokens if asked for.

        Special tokens that the text names are read as such, or as plain text where not `named`.
        """
        rule = {} if named else {"split_special_tokens": True}
        with self._lock:
            ids: list[int] = self.tokenizer(text, add_special_tokens=special, **rule)["input_ids"]
        return ids

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens, special ones left out unless asked for."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=not special))

    def prompt(self, text: str, start: int | None, *, special_tokens: bool = False) -> list[int]:
        """A text as the model reads it: after a start token, if there is one.

        Special tokens that it names are plain text, unless `special_tokens`.

        Raises:
            ApiError: neither is there.
        """
        read = self.encode(text, named=special_tokens)
        tokens = read if start is None else [start, *read]
        if not tokens:
            raise ApiError(
                400, "the prompt has no tokens: give some text to go on from", param="prompt"
            )
        return tokens

    def conversation(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """A conversation as the model's chat template writes it, ready for the next answer.

        Special tokens that messages mention are read as plain text.

        Raises:
            ApiError: there is no template, or it refuses the conversation.
        """
        if self.chat_template is None:
            raise ApiError(
                400,
                "the model has no chat template, so that a conversation has no fixed form: use "
                "/v1/completions, or start the server with --chat-template FILE",
                param="messages",
            )
        with self._lock:
            try:
                rendered = self.tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=self.chat_template,
                    add_generation_prompt=True,
                    return_dict=True,
                    sanitize_control_tokens=True,
                )
            except Exception as error:  # whatever a template raises, such as for a role it lacks
                raise ApiError(
                    400,
                    f"the model's chat template refuses these messages: {error}",
                    param="messages",
                ) from error
        return list(rendered["input_ids"])

    def check(self, tokens: Sequence[int], param: str) -> None:
        """Refuse ids that the model does not know (ApiError)."""
        wrong = next((token for token in tokens if not 0 <= token < self.size), None)
        if wrong is not None:
            raise ApiError(
                400,
                f"token id {wrong} is outside the model's vocabulary of {self.size:,}",
                param=param,
            )

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text that each token adds to those before it."""
        stream = TextStream(self, ())
        pieces = [stream.push(token) for token in tokens]
        return pieces if not (left := stream.flush()) else [*pieces[:-1], pieces[-1] + left]

    def is_special(self, token: int) -> bool:
        """Whether it stands for no text, such as BOS and EOS."""
        return token in self._special

    def _token_text(self, token: int) -> str:
        """A token's own text; parts of a character in hexadecimal, as OpenAI writes them."""
        text = self._alone(token)
        if REPLACEMENT in text:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._token_bytes(token))
        return text

    def _token_bytes(self, token: int) -> bytes:
        text = self._alone(token)
        if REPLACEMENT not in text:
            return text.encode()
        piece = str(self.tokenizer.convert_ids_to_tokens(token))
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        known = _byte_of_letter()
        if all(letter in known for letter in piece):
            return bytes(known[letter] for letter in piece)
        return text.encode()

    def _alone(self, token: int) -> str:
        before = self.decode(self._anchor, special=True)
        return self.decode([*self._anchor, token], special=True)[len(before) :]


@lru_cache(1)
def _byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for letters from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + n): byte for n, byte in enumerate(others)}


class TextStream:
    """The text of a sequence, token by token; characters made of several tokens come whole."""

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._backend = vocabulary.tokenizer.backend_tokenizer
        context = [t for t in before[-_CONTEXT:] if not vocabulary.is_special(t)]
        self._stream = DecodeStream(context, skip_special_tokens=True)
        self._open: list[int] = []  # tokens of a character that is not whole yet

    def push(self, token: int) -> str:
        """What a token adds; nothing while a character is not whole, and for special tokens."""
        if self._vocabulary.is_special(token):
            return self.flush()
        self._open.append(token)
        text = self._stream.step(self._backend, token)
        if text is None:
            return ""
        self._open.clear()
        return str(text)

    def flush(self) -> str:
        """What is left at the end: bytes that became no character."""
        left = self._vocabulary.decode(self._open) if self._open else ""
        self._open.clear()
        return left


class Stops:
    """Finds stop strings in a text that comes in pieces.

    Text that may be the beginning of a stop string is held back until it is known not to be.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._text = ""  # of which the last `longest − 1` characters may begin a stop string
        self._dropped = 0  # characters before `_text`
        self._final = 0
        self.found: int | None = None  # where the first stop string begins, in the whole text

    def push(self, piece: str) -> int:
        """Add a piece; up to where the whole text is final."""
        if not piece:
            return self._final
        self._text += piece
        end = self._dropped + len(self._text)
        if not self._stops:
            self._text, self._dropped, self._final = "", end, end
            return end
        begins = [at for stop in self._stops if (at := self._text.find(stop)) >= 0]
        if begins:
            self.found = self._dropped + min(begins)
            return self.found
        held = max(_overlap(self._text, stop) for stop in self._stops)
        keep = max(len(stop) for stop in self._stops)
        cut = max(0, len(self._text) - keep)
        self._text, self._dropped = self._text[cut:], self._dropped + cut
        self._final = end - held
        return self._final


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    at = max(0, len(text) - len(stop) + 1)
    while (at := text.find(stop[0], at)) >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at += 1
    return 0
