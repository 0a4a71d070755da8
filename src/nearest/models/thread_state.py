"""What an attached memory keeps for each thread."""

import threading
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from nearest.corpus.tokens import Tokens
from nearest.models.drafting import Experience
from nearest.models.generated import Generated, Prompt
from nearest.models.prefixes import Prefixes, Sequences, row_hashes
from nearest.retrieval.ensemble import Ensemble


class ThreadState(threading.local):
    """Per-thread state, so that concurrent forward passes do not see each other's states."""

    base_only = False
    generating = False
    generated: Generated | None = None  # by the last call of generate()
    drafting: Ensemble | None = None  # whose memories draft, while generating with drafts
    experience: Experience | None = None  # of drafts
    ensemble: Ensemble | None = None  # where this thread weighs the memories otherwise
    # Of each memory, while generating with a method that looks at the context.
    prefixes: list[Prefixes] | None = None
    prompt: Prompt | None = None
    first = 0
    ids: Tensor | None = None
    sequences: Sequences | None = None
    encoded: tuple[Tensor, Int[np.ndarray, " rows"]] | None = None  # what an encoder gave, hashed

    def read_by_encoder(self) -> list[Tokens] | None:
        """What an encoder read with each row of `ids`, where it was shown."""
        if self.prompt is None or self.ids is None:
            return None
        return self.prompt.sources(len(self.ids))

    def encoded_rows(self, outputs: Any) -> Int[np.ndarray, " rows"] | None:
        """Numbers that tell apart what an encoder gave to each row; hashed once a generate()."""
        if outputs is None:
            return None
        states = outputs[0]
        if self.encoded is None or self.encoded[0] is not states:
            self.encoded = states, row_hashes(states)
        return self.encoded[1]
