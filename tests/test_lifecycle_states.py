"""Any run of additions, replacements and removals, beside a dictionary that is told the same."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from conftest import make_model, make_tokenizer
from folders import files, live_files
from nearest import Document, Memory
from nearest.build.cluster import KMeans, cluster_memory
from nearest.errors import CorpusError
from nearest.store.verify import verify

MODEL, TOKENIZER = make_model(), make_tokenizer()
TEXTS = st.text("abc ", min_size=2, max_size=12).filter(str.strip)  # blank ones are left out
NAMES = st.sampled_from([f"d{i}" for i in range(8)])
PAIRS = st.dictionaries(NAMES, TEXTS, min_size=1, max_size=3)


class Life(RuleBasedStateMachine):
    """A memory and what should be in it: {id: text}, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "m"
        self.expected: dict[str, str] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize(first=PAIRS, keys=st.sampled_from(["fp16", "int8", "none"]), clusters=st.booleans())
    def build(self, first: dict[str, str], keys: str, clusters: bool) -> None:
        self.memory = Memory.build(MODEL, TOKENIZER, self.documents(first), self.path, keys=keys)
        self.expected = dict(first)
        if clusters and keys != "none":
            cluster_memory(self.path, KMeans(2))
            self.memory = self.memory.refresh()

    @staticmethod
    def documents(texts: dict[str, str]) -> list[Document]:
        return [Document(i, text, {"length": len(text)}) for i, text in texts.items()]

    @rule(new=PAIRS)
    def add(self, new: dict[str, str]) -> None:
        if new.keys() & self.expected.keys():
            with pytest.raises(CorpusError, match="already"):
                self.memory.add(MODEL, TOKENIZER, self.documents(new))
        else:
            self.memory = self.memory.add(MODEL, TOKENIZER, self.documents(new))
            self.expected |= new

    @rule(new=PAIRS)
    def update(self, new: dict[str, str]) -> None:
        if new.keys() - self.expected.keys():
            with pytest.raises(CorpusError, match="is not in"):
                self.memory.update(MODEL, TOKENIZER, self.documents(new))
        else:
            self.memory = self.memory.update(MODEL, TOKENIZER, self.documents(new))
            for name in new:
                del self.expected[name]
            self.expected |= new

    @rule(names=st.sets(NAMES, min_size=1, max_size=3))
    def remove(self, names: set[str]) -> None:
        self.take(sorted(names), None, names)

    @rule(length=st.integers(2, 12))
    def remove_by_metadata(self, length: int) -> None:
        fits = {name for name, text in self.expected.items() if len(text) == length}
        self.take([], {"length": str(length)}, fits)

    def take(self, ids: list[str], where: dict[str, str] | None, names: set[str]) -> None:
        if not names or names - self.expected.keys():
            missing = "|".join(f"'{name}'" for name in sorted(names - self.expected.keys()))
            with pytest.raises(CorpusError, match=f"no document with .*({missing or 'length'})"):
                self.memory.remove(ids, where=where)
        elif not self.expected.keys() - names:
            with pytest.raises(CorpusError, match="nothing would be left"):
                self.memory.remove(ids, where=where)
        else:
            self.memory = self.memory.remove(ids, where=where)
            for name in names:
                del self.expected[name]

    @rule()
    def compact(self) -> None:
        self.memory = self.memory.compact()
        assert len(self.memory.segments) == 1

    @rule()
    def reopen(self) -> None:
        self.memory = Memory.open(self.path)

    @invariant()
    def holds_what_it_should(self) -> None:
        """Documents, and what every access path leads to, counted by hand."""
        if not self.expected:
            return
        memory = self.memory
        found = [memory.document(number) for number in range(memory.documents)]
        assert [(d.id, d.text) for d in found] == list(self.expected.items())
        entries = memory.valued_entries()
        places = [memory.place(entry) for entry in entries.tolist()]
        texts = list(self.expected.values())
        assert [(p.document, p.position) for p in places] == [
            (number, at) for number, text in enumerate(texts) for at in range(len(text.encode()))
        ]
        values = [TOKENIZER.decode([token]) for token in memory.values(entries).tolist()]
        assert "".join(values) == "".join(texts)
        context = np.array([0, *TOKENIZER.encode("abc a", add_special_tokens=False)])
        ends = np.arange(len(context))
        matched = memory.longest_matches(context, ends, 1000)
        for end in range(1, len(context)):
            row = matched.ids[end]
            last = TOKENIZER.decode([int(context[end])])
            assert (
                len(row[row >= 0])
                == len(set(row[row >= 0]))
                == sum(text[:-1].count(last) for text in texts)
            )
        if memory.manifest.keys is not None:
            query = memory.keys.rows(entries[:1])
            assert sorted(memory.search(query, 1000).ids[0].tolist()) == entries.tolist()
            distances = memory.key_distances(query, entries[None])[0]
            assert memory.search(query, 1).distances[0, 0] == distances.min()
        if memory.clusters is not None:
            assert set(memory.clusters.members.tolist()) == set(entries.tolist())

    @invariant()
    def is_sound(self) -> None:
        if self.expected:
            assert verify(self.path) == []
            assert files(self.path) == live_files(self.path)


@pytest.mark.slow
def test_a_memory_is_a_dictionary_of_documents() -> None:
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=12,
            stateful_step_count=8,
            deadline=None,
            phases=(Phase.reuse, Phase.generate),  # shrinking would take minutes
        ),
    )
