"""Memories in object storage: fsspec's memory, files, and an S3 server where there is one."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import httpx
import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import make_documents
from folders import Build, copied
from nearest import Memory
from nearest.errors import FolderError, SettingError
from nearest.store import objects
from nearest.store.objects import address_of, fetched, upload
from nearest.store.verify import verify
from serving import free_port

QUERIES = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def memory(build_memory: Build, tiny_model: PreTrainedModel) -> Memory:
    return build_memory(tiny_model, make_documents(8, 20), index="IVF4,SQ8")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEAREST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"memory://{tmp_path.name}/law.memory"


def test_what_is_an_address() -> None:
    assert address_of("s3://bucket/law.memory") == "s3://bucket/law.memory"
    assert address_of(Path("gs://bucket/a/b/")) == "gs://bucket/a/b"
    for path in ("law.memory", "/a/b", "http://127.0.0.1:8000/law", "C:\\law", "a:b"):
        assert address_of(path) is None


def test_a_memory_goes_there_and_comes_back(memory: Memory, address: str, tmp_path: Path) -> None:
    assert memory.upload(address) == address
    opened = Memory.open(address)
    assert opened.manifest == memory.manifest
    for one, other in zip(opened.search(QUERIES, 5), memory.search(QUERIES, 5), strict=True):
        np.testing.assert_array_equal(one, other)
    assert opened.document(3).text == memory.document(3).text
    assert verify(opened.path) == []
    with pytest.raises(FolderError, match="in a cache"):
        opened.remove(["doc-1"])
    files = tmp_path / "file.memory"
    memory.upload(f"file://{files}")
    assert verify(files) == []


def test_files_are_fetched_once(
    memory: Memory,
    address: str,
    tmp_path: Path,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = Memory.open(copied(memory.path, tmp_path))
    own.upload(address)
    system = type(fsspec.filesystem("memory"))
    read: list[str] = []
    sent: list[str] = []

    def noted(original: Callable[..., Any], paths: list[str], place: int) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            paths.append(str(args[place]).rpartition(".memory/")[2])
            return original(self, *args, **kwargs)

        return call

    monkeypatch.setattr(system, "open", noted(system.open, read, 0))
    monkeypatch.setattr(system, "put_file", noted(system.put_file, sent, 1))
    names = {record.path for record in own.manifest.file_records()}
    Memory.open(address)
    assert names <= set(read)
    read.clear()
    Memory.open(address)
    assert not names & set(read)
    grown = own.add(tiny_model, tiny_tokenizer, ["a new text"])
    grown.upload(address)
    known = {record.sha256 for record in own.manifest.file_records()}
    records = [one for one in grown.manifest.file_records() if one.path not in names]
    assert set(sent) == {record.path for record in records}
    read.clear()
    assert Memory.open(address).documents == grown.documents
    every = names | set(sent)
    assert {path for path in read if path in every} == {
        record.path for record in records if record.sha256 not in known
    }


def test_what_is_damaged_or_half_there_is_refused(
    memory: Memory, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = fsspec.filesystem("memory")
    with pytest.raises(FolderError, match="not a memory"):
        Memory.open(address)

    real = objects._put
    calls: list[str] = []

    def fails(*args: Any) -> None:
        calls.append(args[2])
        if len(calls) == 3:
            raise OSError("connection lost")
        real(*args)

    monkeypatch.setattr(objects, "_put", fails)
    with pytest.raises(FolderError, match="connection lost"):
        memory.upload(address)
    with pytest.raises(FolderError, match="not a memory"):  # nothing was published
        Memory.open(address)
    monkeypatch.setattr(objects, "_put", real)
    memory.upload(address)
    root = address.removeprefix("memory:/")
    path = f"{root}/{memory.manifest.segments[0].files['tokens'].path}"
    right = system.cat_file(path)
    for wrong in (right[:-1], right[:-1] + b"x", b""):
        system.pipe_file(path, wrong)
        with pytest.raises(FolderError, match="not what the manifest says"):
            Memory.open(address)
    system.pipe_file(path, right)
    Memory.open(address)
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_other_memories_and_removed_documents_are_not_sent(
    memory: Memory, address: str, tmp_path: Path, build_memory: Build, tiny_model: PreTrainedModel
) -> None:
    memory.upload(address)
    other = build_memory(tiny_model, make_documents(3, 9, seed=7))
    with pytest.raises(FolderError, match="another memory"):
        other.upload(address)
    smaller = Memory.open(copied(memory.path, tmp_path)).remove(["doc-2"])
    with pytest.raises(FolderError, match="removed documents"):
        smaller.upload(address)
    compacted = smaller.compact()
    compacted.upload(address)
    assert Memory.open(address).documents == 7
    file = compacted.path / compacted.manifest.segments[0].files["documents"].path
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(FolderError, match="checksum differs"):
        upload(compacted.path, f"{address}-2")


def test_what_cannot_be_opened_is_said() -> None:
    with pytest.raises(SettingError, match="cannot be opened"):
        fetched("nothing://there/is")
    with pytest.raises(TypeError, match="not of a folder"):
        Memory.open("folder", key="x")


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    """Options of a file system on an S3 server of this machine."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(url, trust_env=False)
                break
            except httpx.HTTPError:
                assert server.poll() is None, "the server did not start"
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield {"key": "one", "secret": "two", "endpoint_url": url}
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow  # the server takes seconds to start
def test_on_s3(memory: Memory, s3: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")  # where a proxy leads to other machines
    fsspec.filesystem("s3", **s3).mkdir("bucket")
    memory.upload("s3://bucket/a/law.memory", **s3)
    opened = Memory.open("s3://bucket/a/law.memory", **s3)
    for one, other in zip(opened.search(QUERIES, 5), memory.search(QUERIES, 5), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(FolderError, match="not a memory"):
        Memory.open("s3://bucket/none.memory", **s3)
    with pytest.raises(FolderError, match="cannot be read"):
        Memory.open(
            "s3://no-such-bucket/law.memory", **(s3 | {"endpoint_url": "http://127.0.0.1:9"})
        )


def test_two_fetch_the_same_memory_at_once(
    memory: Memory, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.upload(address)
    link, nested = os.link, [False]

    def between(*args: Any) -> None:
        if not nested[0]:
            nested[0] = True  # another process has the whole of it in the meantime
            fetched(address)
        link(*args)

    monkeypatch.setattr(objects, "_AT_ONCE", 1)
    monkeypatch.setattr(os, "link", between)
    folder = fetched(address)
    assert nested[0]
    assert verify(folder) == []
    assert not list(folder.rglob("*.partial"))


def test_a_full_cache_is_not_blamed_on_the_address(
    memory: Memory, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.upload(address)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(FolderError, match=rf"{tmp_path}/cache: the disk is full"):
            fetched(address)
    assert verify(fetched(address)) == []
