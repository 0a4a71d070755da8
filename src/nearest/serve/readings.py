"""What requests may have read beside their texts, by the names of methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nearest.encode.layers import LanguageModel
from nearest.errors import SettingError
from nearest.memory import Memory
from nearest.models.in_context import PassageChooser
from nearest.remote.memory import RemoteMemory
from nearest.retrieval.settings import BASE, IN_CONTEXT, Settings
from nearest.retro.data.database import Decode
from nearest.retro.data.embedders import Embedder
from nearest.retro.data.live import MemoryNeighbours
from nearest.retro.data.stages import Method
from nearest.serve.beside import SearchedChunks, WithNeighbours, WithPassages

RETRO = "retro"
_MOST_NEIGHBOURS = 16
_MOST_CONTINUATIONS = 4
_MOST_BEFORE = 1 << 15  # tokens of passages


@dataclass(frozen=True)
class NeighbourSearch:
    """How a RETRO model's neighbours are found, where a request does not say otherwise.

    Attributes:
        embedder: that made the vectors of the memories' chunks; None for the method "bm25".
        decode: of the tokenizer that model and memories share.
        method: as of `MemoryNeighbours`.
        neighbours: of each chunk; `continuations`: chunks that follow each of them.
    """

    embedder: Embedder | None
    decode: Decode
    method: Method = "dense"
    neighbours: int = 2
    continuations: int = 1


def of_method(name: str) -> tuple[str, str]:
    """What a method has read beside a text ("", "retro" or "in-context"), and its other part."""
    for way in (RETRO, IN_CONTEXT):
        if name == way:
            return way, BASE
        if name.startswith(f"{way}+"):
            return way, name.removeprefix(f"{way}+")
    return "", name


class Readings:
    """Makes what requests have read beside their texts; several threads may use it.

    Attributes:
        search: how neighbours are found; None where the model reads none.
        keys_alone: whether the memories hold states of texts alone, not of texts with neighbours.
    """

    def __init__(
        self,
        model: LanguageModel,
        search: NeighbourSearch | None = None,
        *,
        keys_alone: bool = True,
    ) -> None:
        self.search = search
        self.keys_alone = keys_alone
        self._model = model

    @property
    def ways(self) -> tuple[str, ...]:
        """What methods may be named with: nothing, or what is read beside a text."""
        return ("",) if self.search is None else (RETRO, "")

    def neighbour_settings(self, given: Mapping[str, Any]) -> dict[str, int]:
        """Settings of neighbours: as given, else the server's (SettingError when out of range)."""
        assert self.search is not None
        most = {"neighbours": _MOST_NEIGHBOURS, "continuations": _MOST_CONTINUATIONS}
        chosen = {name: given.get(name, getattr(self.search, name)) for name in most}
        for name, value in chosen.items():
            if type(value) is not int or not int(name == "neighbours") <= value <= most[name]:
                raise SettingError(
                    f"{name} must be a whole number, at most {most[name]}, got {value!r}"
                )
        return chosen

    def neighbours(
        self, memories: Sequence[Memory], settings: Mapping[str, int], *, looked_up: bool = False
    ) -> WithNeighbours:
        """The neighbours of chunks, from the memories that have chunks.

        `looked_up` says that the memories are looked up for tokens, too.

        Raises:
            SettingError: none has, or they are of another size than the model's.
        """
        search = self.search
        assert search is not None
        by_words = search.method == "bm25"
        every = [
            SearchedChunks.of(memory, number, by_words=by_words)
            for number, memory in enumerate(memories)
            if not isinstance(memory, RemoteMemory)
        ]
        chunks = [one for one in every if one is not None]
        if not chunks:
            raise SettingError(
                "none of the memories has chunks among which neighbours can be found: run `nearest "
                "retro prepare` on one (for bm25, `nearest retro chunks`)"
            )
        found = MemoryNeighbours(
            [one.database for one in chunks],
            search.embedder,
            search.decode,
            neighbours=settings["neighbours"],
            continuation=settings["continuations"],
            method=search.method,
        )
        model: Any = self._model
        if found.chunk_size != model.retro_config.chunk_size:
            raise SettingError(
                f"the model reads chunks of {model.retro_config.chunk_size} tokens, and the "
                f"memories hold chunks of {found.chunk_size}: prepare one with --chunk-size "
                f"{model.retro_config.chunk_size}"
            )
        return WithNeighbours(model, chunks, found, self.keys_alone and looked_up)

    def passages(self, memories: Sequence[Memory], settings: Settings) -> WithPassages:
        """Passages of a memory (SettingError where they and a text do not fit the model)."""
        if settings.passages * settings.passage_tokens > _MOST_BEFORE:
            raise SettingError(
                f"{settings.passages} passages of {settings.passage_tokens} tokens are more than "
                f"the {_MOST_BEFORE:,} tokens that this server reads before a text"
            )
        return WithPassages(PassageChooser.of(memories, self._model, settings))
