"""Where `generate` may get neighbours from: any callable on chunks of tokens, and some such."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from nearest.errors import CorpusError, SettingError
from nearest.retro.generation import Retrieve


class NeighbourCache:
    """Ask a callable only once for each chunk, and forget the chunks asked for longest ago.

    Where the callable tells the sources of its last answer, `sources` are those of the last one
    here, a list for each chunk; None where it does not.

    Args:
        retrieve: (chunks, m) token ids → (chunks, neighbours, length) token ids.
        size: chunks remembered.
        version: of what is searched; when it changes, everything is forgotten. By default the
            callable's own `version`, where it has one.
    """

    def __init__(
        self,
        retrieve: Retrieve,
        size: int = 4096,
        version: Callable[[], Any] | None = None,
    ) -> None:
        if size < 1:
            raise SettingError(f"size must be at least 1, got {size}")
        self.retrieve = retrieve
        self.size = size
        self.version = version or (lambda: getattr(retrieve, "version", 0))
        self.sources: list[Any] | None = None
        self._known: OrderedDict[tuple[int, ...], tuple[Tensor, Any]] = OrderedDict()
        self._version = self.version()

    def refresh(self) -> None:
        """Let the callable follow changes of what it searches, where it can; see its `refresh`."""
        refresh(self.retrieve)

    def __call__(self, chunks: Int[Tensor, "n m"]) -> Int[Tensor, "n neighbours length"]:
        """Neighbours of these chunks; only new chunks are asked for."""
        self._forget()
        keys = [tuple(chunk) for chunk in chunks.tolist()]
        found = {key: self._known[key] for key in keys if key in self._known}
        new = [i for i, key in enumerate(keys) if key not in found]
        if new:
            answers = self._ask(chunks[new])
            if self._forget() and found:  # this answer tells of another version than the others
                found, new = {}, list(range(len(keys)))
                answers = self._ask(chunks)
                self._forget()
            found.update(zip((keys[i] for i in new), answers, strict=True))
        for key in keys:
            self._known[key] = found[key]
            self._known.move_to_end(key)
        while len(self._known) > self.size:
            self._known.popitem(last=False)
        told = [found[key][1] for key in keys]
        self.sources = None if None in told else told
        return torch.stack([found[key][0] for key in keys])

    def _forget(self) -> bool:
        """Drop what another version gave; whether there is another one."""
        version = self.version()
        if version == self._version:
            return False
        self._known.clear()
        self._version = version
        return True

    def _ask(self, chunks: Int[Tensor, "n m"]) -> list[tuple[Tensor, Any]]:
        answers = self.retrieve(chunks)
        if len(answers) != len(chunks):
            raise SettingError(f"{len(chunks)} chunks got neighbours for {len(answers)}: one each")
        sources = getattr(self.retrieve, "sources", None) or [None] * len(chunks)
        return list(zip(answers, sources, strict=True))


class FixedNeighbours:
    """The same passages for every chunk: a context given by hand."""

    def __init__(self, passages: Sequence[str], tokenizer: Any, length: int) -> None:
        if not passages:
            raise SettingError("there are no passages: give one, or switch retrieval off")
        self.ids = torch.stack([encode(passage, tokenizer, length) for passage in passages])

    @classmethod
    def from_file(cls, path: Path | str, tokenizer: Any, length: int) -> "FixedNeighbours":
        """A passage a line; empty lines do not count (CorpusError where there are none)."""
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CorpusError(f"{path} cannot be read ({error}): give a UTF-8 text file") from error
        passages = [line for line in lines if line.strip()]
        if not passages:
            raise CorpusError(f"{path} holds no passage: write one a line")
        return cls(passages, tokenizer, length)

    def __call__(self, chunks: Int[Tensor, "n m"]) -> Int[Tensor, "n neighbours length"]:
        """The passages, for each chunk."""
        return self.ids.expand(len(chunks), -1, -1)


class AskedNeighbours:
    """A person is shown each chunk and types its neighbours."""

    def __init__(
        self, tokenizer: Any, count: int, length: int, ask: Callable[[str], str] = input
    ) -> None:
        if count < 1:
            raise SettingError(f"count must be at least 1 neighbour, got {count}")
        self.tokenizer = tokenizer
        self.count = count
        self.length = length
        self.ask = ask

    def __call__(self, chunks: Int[Tensor, "n m"]) -> Int[Tensor, "n neighbours length"]:
        """What was typed; an empty line is no neighbour."""
        answers = []
        for chunk in chunks:
            text = self.tokenizer.decode(chunk)
            for number in range(1, self.count + 1):
                typed = self.ask(f"{text}\nneighbour {number} of {self.count}: ")
                answers.append(encode(typed, self.tokenizer, self.length))
        return torch.stack(answers).unflatten(0, (len(chunks), self.count))


def refresh(retrieve: Retrieve | None) -> None:
    """Before another text: what searches a memory that others write looks at it anew."""
    follow = getattr(retrieve, "refresh", None)
    if follow is not None:
        follow()


def encode(text: str, tokenizer: Any, length: int) -> Int[Tensor, " length"]:
    """Token ids of a text without special tokens, cut or padded with −1 to a length."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:length]
    return torch.tensor(ids + [-1] * (length - len(ids)))
