"""What a reading of a corpus took, and what it left out."""

from dataclasses import dataclass, field
from typing import Any


class CorpusWarning(UserWarning):
    """A corpus was read, and not all of it was taken as it stands."""


@dataclass
class CorpusReport:
    """Counts of one reading, filled while documents stream through.

    Attributes:
        documents: number of documents taken.
        skipped: what was left out, by reason; a suffix such as ".py" is a reason too.
        examples: the first place of each reason.
        numbered_ids: ids made by the library that were repeated, and got a number.
        encodings: files whose encoding was detected, by encoding.
        replaced: files with bytes that were not text and became U+FFFD.
        changed: files that changed while they were read.
        encoder_field: the field that the encoder of an encoder–decoder reads.
        unread: files that are there and could not be read as documents, and links that lead
            nowhere.
        unread_rows: whether one of these may hold rows, whose own ids tell of no file.
        empty: folders in which there is nothing but what is hidden.
        unmatched: patterns of what is to be left out that nothing fits.
    """

    documents: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    numbered_ids: int = 0
    encodings: dict[str, int] = field(default_factory=dict)
    replaced: int = 0
    changed: int = 0
    encoder_field: str | None = None
    unread: set[str] = field(default_factory=set)
    unread_rows: bool = False
    empty: set[str] = field(default_factory=set)
    unmatched: set[str] = field(default_factory=set)

    def skip(self, reason: str, place: str) -> None:
        """Count something that is left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.examples.setdefault(reason, place)

    def detected(self, encoding: str) -> None:
        """Count a file whose encoding was detected."""
        self.encodings[encoding] = self.encodings.get(encoding, 0) + 1

    @property
    def notable(self) -> bool:
        """Whether anything was not taken as it stands."""
        return bool(
            self.skipped
            or self.numbered_ids
            or self.encodings
            or self.replaced
            or self.changed
            or self.unmatched
        )

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary for JSON, without what is zero or unset."""
        found: dict[str, Any] = {"documents": self.documents, "skipped": dict(self.skipped)}
        for name in ("numbered_ids", "encodings", "replaced", "changed", "encoder_field"):
            if value := getattr(self, name):
                found[name] = value
        if self.unmatched:
            found["unmatched"] = sorted(self.unmatched)
        return found

    def __str__(self) -> str:
        parts = [f"{_count(self.documents, 'document')} read"]
        if self.skipped:
            parts.append(f"skipped: {self.left_out}")
        if self.numbered_ids:
            parts.append(f"{_count(self.numbered_ids, 'repeated id')} numbered apart")
        for encoding, files in self.encodings.items():
            parts.append(f"{_count(files, 'file')} read as {encoding}")
        if self.replaced:
            parts.append(f"{_count(self.replaced, 'file')} with bytes replaced by U+FFFD")
        if self.changed:
            parts.append(f"{_count(self.changed, 'file')} changed while being read")
        for pattern in sorted(self.unmatched):
            parts.append(f"nothing is called {pattern!r} (--exclude)")
        if self.encoder_field is not None:
            parts.append(f"the encoder reads the field {self.encoder_field!r}")
        return "; ".join(parts)

    @property
    def left_out(self) -> str:
        """Every reason with its count and first place."""
        return ", ".join(
            f"{count:,} {reason} ({self.examples[reason]}{', …' if count > 1 else ''})"
            for reason, count in self.skipped.items()
        )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
