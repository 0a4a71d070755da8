"""What workers are told that embed chunks, or find their neighbours: blocks nobody else makes."""

from pathlib import Path

import torch

from nearest.build.files import beside_others
from nearest.build.workers import Spec
from nearest.retro.data.database import ChunkDatabase, Part
from nearest.retro.data.embedders import embedder_named
from nearest.retro.data.opening import decoder, tokenizer_of
from nearest.retro.data.stages import TableOptions, make_table


class EmbedSpec(Spec, frozen=True, kw_only=True):
    """How chunks of the database in a folder are embedded.

    Attributes:
        embedder, prefix, device, batch_size: as in `embedder_named`.
        tokenizer: its name; None: the memory's own.
        dtype: as in `ChunkDatabase.embed`.
        part: which of how many.
    """

    embedder: str
    prefix: str = ""
    device: str = "auto"
    batch_size: int = 64
    tokenizer: str | None = None
    dtype: str = "float16"
    part: tuple[int, int] = (1, 1)

    def work(self, folder: Path, token: str) -> None:
        """Embed blocks of chunks, until all are there (NearestError as in `embed`)."""
        torch.set_num_threads(self.threads)
        database = ChunkDatabase.open(folder)
        options = {"prefix": self.prefix, "device": self.device}
        embedder = embedder_named(self.embedder, batch_size=self.batch_size, **options)
        decode = decoder(tokenizer_of(database, self.tokenizer))
        maker = beside_others(self.watch(token))
        database.embed(embedder, decode, dtype=self.dtype, part=Part(*self.part), maker=maker)


class NeighboursSpec(Spec, frozen=True, kw_only=True):
    """How the table in a folder is made.

    Attributes:
        databases: what is searched, by their folders.
        queries: whose chunks need neighbours; None: the first database's own.
        options: as in `make_table`.
        part: which of how many.
    """

    databases: list[str]
    queries: str | None
    options: TableOptions
    part: tuple[int, int] = (1, 1)

    def work(self, folder: Path, token: str) -> None:
        """Find neighbours of blocks of chunks, until all are there (NearestError as there)."""
        torch.set_num_threads(self.threads)
        maker = beside_others(self.watch(token))
        part = Part(*self.part)
        make_table(self.databases, self.queries, folder, self.options, part=part, maker=maker)
