"""A memory that holds what a corpus holds: `sync`, `add --if-exists`, typed conditions."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from conftest import make_tokenizer
from nearest import Document, Memory, read_documents
from nearest.errors import CorpusError, SettingError
from nearest.store import documents
from nearest.store.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore::nearest.corpus.report.CorpusWarning")
TOKENIZER = make_tokenizer()


def contents(memory: Memory) -> dict[str, str]:
    found = map(memory.document, range(memory.documents))
    return {document.id: document.text for document in found}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of text files and rows."""
    corpus = tmp_path / "corpus"
    (corpus / "sub").mkdir(parents=True)
    for name in ("fee.md", "other.md", "old.md", "sub/deep.txt"):
        (corpus / name).write_text(f"text of {name}")
    (corpus / "rows.jsonl").write_text('{"id": 1, "text": "one"}\n{"text": "no id"}\n')
    return corpus


def build(model: PreTrainedModel, folder: Path, **options: Any) -> Memory:
    return Memory.build(
        model, TOKENIZER, read_documents(folder), folder.parent / "m", keys="none", **options
    )


def test_sync_skips_replaces_removes_and_adds_in_one_snapshot(
    folder: Path, tiny_model: PreTrainedModel
) -> None:
    memory = build(tiny_model, folder)
    before = memory.manifest.version
    (folder / "fee.md").write_text("the fee is 99 dollars")
    (folder / "old.md").unlink()
    (folder / "new.md").write_text("new text")
    (folder / "rows.jsonl").write_text('{"id": 1, "text": "uno"}\n{"text": "no id"}\n')
    wanted = {"equal": 3, "replaced": 2, "removed": 1, "added": 1, "kept": 0}
    same, would = memory.sync(None, None, read_documents(folder), dry_run=True)
    assert would.to_dict() == wanted
    assert (same.refresh().manifest.version, contents(same)) == (before, contents(memory))
    synced, counts = memory.sync(tiny_model, TOKENIZER, read_documents(folder))
    assert counts.to_dict() == wanted
    assert synced.manifest.version == before + 1
    assert contents(synced) == {d.id: d.text for d in read_documents(folder)}
    assert verify(synced.path) == []
    again, nothing = synced.sync(tiny_model, TOKENIZER, read_documents(folder))
    assert nothing.to_dict() == dict.fromkeys(wanted, 0) | {"equal": 6}
    assert again.manifest.version == before + 1


def test_a_synced_memory_predicts_as_one_built_anew(
    folder: Path, tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    """Its tokens are those of the folder: what was removed is in no suffix array."""
    memory = build(tiny_model, folder)
    (folder / "fee.md").write_text("changed")
    (folder / "other.md").unlink()
    synced, _ = memory.sync(tiny_model, TOKENIZER, read_documents(folder))
    fresh = Memory.build(
        tiny_model, TOKENIZER, read_documents(folder), tmp_path / "fresh", keys="none"
    )
    assert (synced.entries, synced.tokens) == (fresh.entries, fresh.tokens)
    assert contents(synced.compact()) == contents(fresh)


def test_files_of_early_memories_are_told_by_their_paths(
    folder: Path, tiny_model: PreTrainedModel
) -> None:
    """Whose ids were made of path and hash, and changed with the text."""
    early = [
        Document("fee.md#0123456789abcdef", "text of fee.md", {"path": "fee.md"}),
        Document("old.md#0123456789abcdef", "before", {"path": "old.md"}),
        Document("gone.md#0123456789abcdef", "gone", {"path": "gone.md"}),
    ]
    path = folder.parent / "m"
    memory = Memory.build(tiny_model, TOKENIZER, early, path, keys="none")
    synced, counts = memory.sync(tiny_model, TOKENIZER, read_documents(folder))
    assert counts.to_dict() == {"equal": 1, "replaced": 1, "removed": 1, "added": 4, "kept": 0}
    assert sorted(contents(synced).values()) == sorted(d.text for d in read_documents(folder))


def test_what_was_removed_never_returns_through_a_folder_around_the_memory(
    folder: Path, tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    inside = folder / "docs.memory"
    memory = Memory.build(tiny_model, TOKENIZER, read_documents(folder), inside, keys="none")
    memory = memory.remove(["old.md"])
    (folder / "old.md").unlink()
    corpus = read_documents(folder)
    assert "text of old.md" not in [document.text for document in corpus]
    assert corpus.report.skipped["of our own"] == 1
    synced, counts = memory.sync(tiny_model, TOKENIZER, corpus)
    assert not counts.changed
    assert "old.md" not in contents(synced)
    for part in (inside, inside / "segments", next(inside.glob("segments/*/documents.jsonl.zst"))):
        with pytest.raises(CorpusError, match=r"docs\.memory.* and no corpus"):
            list(read_documents(part))


def test_documents_of_files_that_cannot_be_read_are_kept(
    folder: Path, tiny_model: PreTrainedModel
) -> None:
    """Such as those of a PDF where pypdf is not installed any more."""
    memory = build(tiny_model, folder)
    (folder / "other.md").write_bytes(b"binary\0")
    synced, counts = memory.sync(tiny_model, TOKENIZER, read_documents(folder))
    assert (counts.kept, counts.removed) == (1, 0)
    assert contents(synced)["other.md"] == "text of other.md"


_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("rows", ['{"id": "r1", "text": "one"}', '{"text": "two"}\n' * 2])
def test_rows_of_a_file_that_cannot_be_read_are_kept(rows: str, tmp_path: Path) -> None:
    """Such as one that Git LFS did not fetch: rows with their own ids, or numbered apart."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.md").write_text("a")
    (corpus / "b.md").write_text("b")
    (corpus / "rows.jsonl").write_text(rows)
    memory = Memory.build(None, TOKENIZER, corpus, tmp_path / "m", keys="none")
    (corpus / "rows.jsonl").write_text(_POINTER)
    (corpus / "b.md").unlink()
    kept = memory.documents - 2
    for given in (corpus, read_documents(corpus)):
        _, counts = memory.sync(None, TOKENIZER, given, dry_run=True)
        assert (counts.equal, counts.removed, counts.kept) == (1, 1, kept)
    _, counts = memory.sync(None, TOKENIZER, read_documents(corpus, exclude=["rows.jsonl"]))
    assert (counts.equal, counts.removed, counts.kept) == (1, 1 + kept, 0)


def test_a_page_that_cannot_be_read_keeps_no_rows(tmp_path: Path) -> None:
    """What is no row has its file's name as its id, so that rows are known not to be its own."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.md").write_text("a")
    (corpus / "rows.jsonl").write_text('{"id": 1, "text": "x"}\n{"id": 2, "text": "y"}\n')
    memory = Memory.build(None, TOKENIZER, corpus, tmp_path / "m", keys="none")
    (corpus / "a.md").write_bytes(b"binary\0")
    (corpus / "rows.jsonl").write_text('{"id": 1, "text": "x", "path": ["a.md"]}\n')
    _, counts = memory.sync(None, TOKENIZER, corpus, dry_run=True)
    assert (counts.replaced, counts.removed, counts.kept) == (1, 1, 1)


def test_documents_behind_a_link_that_leads_nowhere_are_kept(tmp_path: Path) -> None:
    """Such as into a share that is not mounted."""
    corpus, share = tmp_path / "corpus", tmp_path / "share"
    for folder in (corpus, share / "sub"):
        folder.mkdir(parents=True)
    (corpus / "a.md").write_text("a")
    (share / "sub" / "b.md").write_text("b")
    (share / "rows.jsonl").write_text('{"id": 1, "text": "x"}\n{"text": "y"}\n')
    (corpus / "law").symlink_to(share)
    memory = Memory.build(None, TOKENIZER, corpus, tmp_path / "m", keys="none")
    share.rename(tmp_path / "away")
    _, counts = memory.sync(None, TOKENIZER, corpus, dry_run=True)
    assert (counts.equal, counts.removed, counts.kept) == (1, 0, 3)


def test_a_folder_that_is_empty_now_takes_nothing_away_unasked(tmp_path: Path) -> None:
    """Such as a mount point without its drive, be it the corpus or below it."""
    corpus = tmp_path / "corpus"
    (corpus / "share" / "sub").mkdir(parents=True)
    (corpus / "never").mkdir()
    (corpus / "a.md").write_text("a")
    (corpus / "share" / "b.md").write_text("b")
    (corpus / "share" / "sub" / "c.md").write_text("c")
    (corpus / "share" / "rows.jsonl").write_text('{"text": "d"}\n')
    memory = Memory.build(None, TOKENIZER, corpus, tmp_path / "m", keys="none")
    (corpus / "share").rename(tmp_path / "away")
    (corpus / "share").mkdir()
    (corpus / "share" / ".hidden").touch()
    for dry_run in (True, False):
        with pytest.raises(
            CorpusError, match=r"folder share is empty, and 3 of the documents .*mount"
        ):
            memory.sync(None, TOKENIZER, corpus, dry_run=dry_run)
    assert memory.refresh() is memory
    _, counts = memory.sync(None, TOKENIZER, corpus, dry_run=True, allow_empty=True)
    assert (counts.equal, counts.removed) == (1, 3)
    assert memory.sync(None, TOKENIZER, corpus, allow_empty=True)[0].documents == 1
    (corpus / "a.md").unlink()
    (corpus / "share" / ".hidden").unlink()
    with pytest.raises(CorpusError, match="holds no file of a kind that is read"):
        memory.refresh().sync(None, TOKENIZER, corpus, allow_empty=True)


def test_rows_that_name_a_path_are_not_taken_for_files(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.md").write_text("a")
    (corpus / "code.jsonl").write_text('{"id": "x.py", "text": "x", "path": "x.py"}\n')
    memory = Memory.build(None, TOKENIZER, corpus, tmp_path / "m", keys="none")
    (corpus / "code.jsonl").write_text(_POINTER)
    _, counts = memory.sync(None, TOKENIZER, corpus, dry_run=True)
    assert (counts.removed, counts.kept) == (0, 1)


def test_metadata_are_compared_as_json_holds_them(tmp_path: Path) -> None:
    given = [Document("1", "text", {"tags": ("x",), "years": {2020: 1}, "b": 1, "a": True})]
    memory = Memory.build(None, TOKENIZER, given, tmp_path / "m", keys="none")
    assert memory.sync(None, TOKENIZER, given)[1].equal == 1
    other = [Document("1", "text", {"tags": ("x",), "years": {2020: 1}, "b": 1, "a": 1})]
    assert memory.sync(None, TOKENIZER, other, dry_run=True)[1].replaced == 1


def test_nothing_left_is_refused(folder: Path, tiny_model: PreTrainedModel) -> None:
    memory = build(tiny_model, folder)
    with pytest.raises(CorpusError, match="nothing would be left"):
        memory.sync(tiny_model, TOKENIZER, [])


@pytest.mark.parametrize("if_exists", ["error", "skip", "replace"])
def test_what_becomes_of_an_id_that_is_there(
    if_exists: Any, folder: Path, tiny_model: PreTrainedModel
) -> None:
    memory = build(tiny_model, folder)
    (folder / "fee.md").write_text("changed")
    (folder / "new.md").write_text("new")
    files = read_documents([folder / "fee.md", folder / "new.md"])
    if if_exists == "error":
        with pytest.raises(CorpusError, match=r"'fee\.md'.*--if-exists.*sync"):
            memory.add(tiny_model, TOKENIZER, files, if_exists=if_exists)
        return
    before = contents(memory)
    fee = {"skip": "text of fee.md", "replace": "changed"}[if_exists]
    memory = memory.add(tiny_model, TOKENIZER, files, if_exists=if_exists)
    assert contents(memory) == before | {"fee.md": fee, "new.md": "new"}
    again = memory.add(tiny_model, TOKENIZER, files, if_exists="skip")
    assert again.manifest.version == memory.manifest.version
    with pytest.raises(SettingError, match="if_exists 'maybe' is unknown"):
        memory.add(tiny_model, TOKENIZER, files, if_exists="maybe")


def test_conditions_compare_values_with_their_types(
    tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    metadata = [{"year": 2020}, {"year": "2020"}, {"year": 2020.5}, {"year": True}, {"year": None}]
    documents = [Document(str(n), "text", data) for n, data in enumerate([*metadata, {}])]
    for where, gone in [(2020, {"0"}), ("2020", {"0", "1"}), (True, {"3"}), (None, {"4"}),
                        ("true", {"3"}), (2020.5, {"2"})]:  # fmt: skip
        path = tmp_path / json.dumps(where)
        memory = Memory.build(tiny_model, TOKENIZER, documents, path, keys="none")
        left = contents(memory.remove(where={"year": where}))
        assert set("012345") - left.keys() == gone


def test_documents_in_any_order_are_read_a_few_times_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are compressed together, some hundreds in a frame."""
    monkeypatch.setattr(documents, "_FRAME_BYTES", 4096)
    texts = [Document(f"d{number:03d}", f"text {number} " * 5) for number in range(300)]
    memory = Memory.build(None, make_tokenizer(), texts, tmp_path / "m", keys="none")
    frames = len(memory.segments[0].documents._frames)
    assert frames > 3
    read: list[int] = []
    of_frame = documents.DocumentReader._read_frame

    def noted(reader: documents.DocumentReader, frame: int) -> list[bytes]:
        read.append(frame)
        return of_frame(reader, frame)

    monkeypatch.setattr(documents.DocumentReader, "_read_frame", noted)
    random.Random(0).shuffle(texts)
    texts[7] = Document(texts[7].id, "another text")
    assert Memory.open(memory.path).sync(None, make_tokenizer(), texts)[0].documents == 300
    assert len(read) <= 5 * frames
    read.clear()
    more = [*texts, Document("new", "a new text")]
    grown = Memory.open(memory.path).add(None, make_tokenizer(), more, if_exists="skip")
    assert grown.documents == 301
    assert len(read) <= 5 * frames


def test_names_of_new_files_are_durable_before_a_snapshot_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory.build(None, TOKENIZER, ["a text"], tmp_path / "m", keys="none")
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(fd: int) -> None:
        done.append(os.path.relpath(Path(f"/proc/self/fd/{fd}").readlink(), memory.path))
        fsync(fd)

    def replaced(path: Path, target: Path) -> Path:
        done.append(f"rename {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    memory.add(None, TOKENIZER, ["another text"])
    before = done[: done.index("rename manifest.json")]
    files = Path("segments/000002/documents.jsonl.zst")
    assert {str(files), *map(str, files.parents[:2])} <= set(before)
