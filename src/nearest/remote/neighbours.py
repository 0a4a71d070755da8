"""RETRO's neighbours from `nearest serve`, in place of `MemoryNeighbours`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from nearest.encode.fingerprint import tokenizer_fingerprint
from nearest.errors import FolderError, ModelError, SettingError
from nearest.remote.servers import Patience, Servers
from nearest.remote.wire import SNAPSHOT_HEADER, npy, unpacked
from nearest.retro.data.live import PassageSource


class RemoteNeighbours:
    """What `generate` takes as `neighbours`: (n, m) token ids → (n, neighbours, length).

    The server embeds and searches; it names the snapshot of its chunks in each answer, which must
    stay the same until `refresh`. −1 pads. The last answer's places are in `sources`.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        neighbours: int = 2,
        continuation: int = 1,
        tokenizer: Any = None,
        api_key: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        """Nothing is asked yet.

        Args:
            urls: of one or more servers of the same chunks (`nearest serve --chunks`).
            neighbours: of each chunk.
            continuation: chunks that follow each neighbour.
            tokenizer: the model's, which must be that of the chunks; None: not checked.
            api_key: of the servers.
            patience: how long to wait, and how often to try again.

        Raises:
            SettingError: a number is out of its range, or an address is none.
        """
        if neighbours < 1 or continuation < 0:
            raise SettingError(
                f"neighbours {neighbours} must be at least 1, continuation {continuation} 0"
            )
        self._servers = Servers(urls, api_key, patience)
        self.neighbours = neighbours
        self.continuation = continuation
        self.snapshot: str | None = None
        self._tokenizer = tokenizer
        self.sources: list[list[PassageSource]] = []

    @property
    def version(self) -> str | None:
        """The snapshot of the chunks; None before the first answer."""
        return self.snapshot

    def refresh(self) -> int | None:
        """Take what the servers hold now; returns the token that documents begin with, if any.

        Raises:
            RemoteError: no server answers.
            ModelError: the chunks were cut with another tokenizer.
        """
        told = self._servers.get("/search/chunks", {}).json()
        for reads_sources, theirs in told["tokenizers"]:
            if self._tokenizer is not None and theirs != tokenizer_fingerprint(
                self._tokenizer, reads_sources
            ):
                raise ModelError(
                    "the service's chunks were cut with another tokenizer than the model's: their "
                    "token ids mean other texts. Serve chunks that were cut with --tokenizer of "
                    "this model"
                )
        self.snapshot = told["version"]
        start: int | None = told["start"]
        return start

    def __call__(self, chunks: Int[Tensor, "n m"]) -> Int[Tensor, "n neighbours length"]:
        """Neighbours of chunks of token ids; negative ids are padding.

        Raises:
            RemoteError: no server answers.
            FolderError: the server's chunks are no longer the ones of before.
            SettingError: the chunks are of another size than the server's.
        """
        tokens = chunks.detach().cpu().numpy().astype(np.int64)
        options = {"k": self.neighbours, "continuation": self.continuation}
        answer = self._servers.post("/search/chunks/npy", options, npy(tokens))
        snapshot = answer.headers.get(SNAPSHOT_HEADER)
        if self.snapshot not in (None, snapshot):
            raise FolderError(
                f"the chunks of {answer.url.host} have changed meanwhile: begin the text anew (in "
                "Python: call refresh)"
            )
        self.snapshot = snapshot
        found = unpacked(answer.content)
        self.sources = [
            [
                PassageSource(int(chunk), str(name), int(position), float(distance))
                for chunk, name, position, distance in zip(*row, strict=True)
            ]
            for row in zip(
                *(found[name] for name in ("ids", "documents", "positions", "distances")),
                strict=True,
            )
        ]
        return torch.from_numpy(found["tokens"].copy()).to(chunks.device)
