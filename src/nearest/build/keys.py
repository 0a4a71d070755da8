"""Where the keys of new text come from: a model, or a datastore of earlier tools."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from nearest.corpus.batches import WindowBatch
from nearest.encode.encoder import Encoder
from nearest.errors import ModelError
from nearest.index.keys import KeyFormat
from nearest.store.claims import Position
from nearest.store.journal import TaskLog
from nearest.store.new_segment import NewSegment
from nearest.store.parts.keys import KeyWriter, open_projection

_BLOCK = 16_384  # rows that are copied at once


@dataclass(frozen=True)
class EncodedKeys:
    """Keys that a model makes of every entry; rows of document ends stay zero and are not used."""

    encoder: Encoder

    def __call__(self, new: NewSegment, form: KeyFormat, file: KeyWriter) -> None:
        """Write the keys of a segment; batches that were written before are passed over."""
        keys, log = new.plan.manifest.keys, new.plan.log
        projection, done, total = open_projection(new.files.root, keys), 0, new.record.entries
        documents = (new.tokens[start:stop] for start, stop in pairwise(new.offsets))
        new.plan.progress("keys", 0, total)
        for number, batch in enumerate(self.encoder.batches(documents, new.sources), 1):
            before, done = done, done + len(batch.positions)
            if number <= new.batches_written:
                continue
            if log is not None:
                position = before, int(batch.documents.min()), int(batch.documents.max())
                if position == log.suspect:
                    self._one_by_one(new, log, position)
                log.at(position)
            made = self.encoder.encode(batch).numpy()
            rows = made if projection is None else projection.apply(made)
            _check_range(rows, batch, self.encoder.layer.name, form)
            entries = new.offsets[batch.documents] + batch.positions
            breaks = np.flatnonzero(np.diff(entries) != 1) + 1
            for start, stop in pairwise([0, *breaks, len(entries)]):
                file.write(int(entries[start]), rows[start:stop])
            new.plan.progress("keys", done, total)
            if log is not None and log.due:
                file.flush()
                log.note(number)

    def _one_by_one(self, new: NewSegment, log: TaskLog, position: Position) -> None:
        """Read documents alone that may have ended a process, noting which one comes next."""
        entries, first, last = position
        for number in range(first, last + 1):
            log.at((entries, number, number))
            text = new.tokens[new.offsets[number] : new.offsets[number + 1]]
            source = None if new.sources is None else [new.sources[number]]
            for batch in self.encoder.batches([text], source):
                self.encoder.encode(batch)


@dataclass(frozen=True)
class GivenKeys:
    """Keys of all entries, in order, that were made elsewhere."""

    rows: Float[np.ndarray, "entries dim"]

    def __call__(self, new: NewSegment, form: KeyFormat, file: KeyWriter) -> None:
        """Write the keys of a segment; the last position of each document has none."""
        taken = 0
        for start, stop in pairwise(new.offsets.tolist()):
            for first in range(start, stop - 1, _BLOCK):
                count = min(_BLOCK, stop - 1 - first)
                rows = np.asarray(self.rows[taken : taken + count], np.float32)
                if not bool(np.abs(rows).max() <= form.largest):  # so that NaN is refused, too
                    raise ModelError(
                        f"a key between entries {taken:,} and {taken + count:,} is not finite, or "
                        f"too large for {form.name} keys: make the datastore anew, or try "
                        "--keys int8"
                    )
                file.write(first, rows)
                taken += count
                new.plan.progress("keys", taken, new.record.entries)


def _check_range(
    rows: Float[np.ndarray, "n dim"], batch: WindowBatch, layer: str, form: KeyFormat
) -> None:
    """Refuse keys that the format cannot hold: NaN, infinite, or in float16 beyond ±65,504."""
    if bool(np.abs(rows).max() <= form.largest):  # False for NaN too
        return
    wrong = ~(np.abs(rows) <= form.largest)
    bad = int(np.flatnonzero(wrong.any(axis=1))[0])
    value = rows[bad][wrong[bad]][0]
    raise ModelError(
        f"the key {layer} is {value:g} at token {batch.positions[bad]} of document number "
        f"{batch.documents[bad] + 1}, which {form.name} keys cannot hold: check the model's "
        "weights, load it in float32, or try the other key layer (--key-layer)"
    )
