"""Memories in object storage: `s3://`, `gs://`, `hf://` and whatever else fsspec reads.

A memory is fetched into a cache: every file once, whatever memories and snapshots have it, and kept
only if it is what the manifest says. It is uploaded with its manifest last, so that a reader sees
the old snapshot or the new one.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nearest.errors import FolderError, SettingError
from nearest.folder import disk_errors_explained, sha256_of, write_atomically
from nearest.progress import Progress, no_progress
from nearest.store.manifest import (
    FETCHED,
    MANIFEST,
    Manifest,
    check_file,
    check_place,
    decode_manifest,
    read_manifest,
)
from nearest.store.records import FileRecord

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)")
_AT_ONCE = 8  # files that are fetched at the same time
_BLOCK = 1 << 22


def address_of(path: str | Path) -> str | None:
    """The address that a path stands for, which has one slash where it went through `Path`.

    None for a folder, and for http, which is spoken to servers.
    """
    found = _ADDRESS.fullmatch(str(path))
    if found is None or found[1] in ("http", "https"):
        return None
    return f"{found[1]}://{found[2]}".rstrip("/")


def cache_folder() -> Path:
    """Where fetched memories are kept: NEAREST_CACHE, or nearest in the user's cache."""
    given = os.environ.get("NEAREST_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(base) / "nearest"


def fetched(
    address: str, cache: Path | None = None, progress: Progress = no_progress, **options: Any
) -> Path:
    """The folder of a memory in object storage, of which only what is not in the cache is read.

    Args:
        address: such as "s3://bucket/law.memory".
        cache: folder of the cache; `cache_folder()` if not given.
        progress: told of files.
        **options: of fsspec's file system, such as key, secret, endpoint_url.

    Raises:
        FolderError: there is no memory, it cannot be read, or a file is not what its manifest says.
    """
    system, root = _file_system(address, options)
    cache = cache or cache_folder()
    with _errors_of(address):
        data = _read_manifest(system, root)
    if data is None:
        raise FolderError(
            f"{address} is not a memory (it has no {MANIFEST}): upload one with `nearest upload`"
        )
    manifest = decode_manifest(Path(address), data)
    name = Path(root).name.removesuffix(".memory") or "memory"
    folder = cache / "memories" / manifest.checksum / f"{name}.memory"
    records = manifest.file_records()
    for record in records:
        check_place(folder, record)  # before anything is written where a stranger says
    if not (folder / MANIFEST).exists():
        with disk_errors_explained(cache):
            _fill(system, root, cache / "files", folder, records, address, progress)
            (folder / FETCHED).write_text(address + "\n", encoding="utf-8")
            write_atomically(folder / MANIFEST, data)
    return folder


def _fill(
    system: Any,
    root: str,
    blobs: Path,
    folder: Path,
    records: Sequence[FileRecord],
    address: str,
    progress: Progress,
) -> None:
    """The files of a memory into its folder, by way of all that were fetched."""
    blobs.mkdir(parents=True, exist_ok=True)
    done = 0

    def fetch(record: FileRecord) -> None:
        nonlocal done
        _fetch(system, f"{root}/{record.path}", blobs, record, address)
        _link(blobs / record.sha256, folder / record.path)
        done += 1
        progress("files", done, len(records))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(fetch, records))


def upload(folder: Path, address: str, progress: Progress = no_progress, **options: Any) -> str:
    """Write a memory to object storage, its manifest last; return its address.

    Files that an earlier snapshot there has are not sent again. Those that only it has stay, since
    somebody may be reading them.

    Args:
        folder: the memory.
        address: such as "s3://bucket/law.memory".
        progress: told of files.
        **options: of fsspec's file system.

    Raises:
        FolderError: it cannot be written, another memory is there, or documents that were removed
            are in the files still.
    """
    manifest = read_manifest(folder)
    if removed := sum(segment.removed for segment in manifest.segments):
        raise FolderError(
            f"{folder} has {removed} removed documents in its files still, which would be "
            "uploaded: erase them first (`nearest compact`)"
        )
    system, root = _file_system(address, options)
    with _errors_of(address):
        before = _read_manifest(system, root)
    there: dict[str, str] = {}
    if before is not None:
        standing: Manifest = decode_manifest(Path(address), before)
        there = {record.path: record.sha256 for record in standing.file_records()}
    records = manifest.file_records()
    for record in records:
        if there.get(record.path, record.sha256) != record.sha256:
            raise FolderError(
                f"{address} holds another memory, whose {record.path} readers may be using: give "
                "another address, or delete it first"
            )
    for done, record in enumerate(records):
        if record.path not in there:
            check_file(folder, record)
            if sha256_of(folder / record.path) != record.sha256:
                raise FolderError(
                    f"{folder / record.path} is damaged (its checksum differs from the manifest): "
                    "restore it from a copy, or rebuild; nothing was published"
                )
            with _errors_of(address):
                _put(system, folder / record.path, f"{root}/{record.path}", record)
        progress("files", done + 1, len(records))
    with _errors_of(address):
        system.pipe_file(f"{root}/{MANIFEST}", (folder / MANIFEST).read_bytes())
    return address


def _file_system(address: str, options: dict[str, Any]) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        system, root = url_to_fs(address, **options)
    except (ImportError, ValueError) as error:
        raise SettingError(
            f"{address} cannot be opened ({error}): s3:// needs the extra [s3], others "
            "the package that fsspec names for them"
        ) from error
    return system, str(root).rstrip("/")


def _read_manifest(system: Any, root: str) -> bytes | None:
    """The manifest's bytes as they are now; None where there is none."""
    system.invalidate_cache()
    try:
        data: bytes = system.cat_file(f"{root}/{MANIFEST}")
    except FileNotFoundError:
        return None
    return data


@contextmanager
def _errors_of(address: str) -> Iterator[None]:
    """Whatever a file system raises, as a FolderError that names the address."""
    try:
        yield
    except FolderError:
        raise
    except Exception as error:  # of HTTP, of a service, of the disk: each has its own kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FolderError(
            f"{address} cannot be read or written ({reason}): check the address and the access "
            "to it, then run again"
        ) from error


def _fetch(system: Any, path: str, blobs: Path, record: FileRecord, address: str) -> None:
    """A file into the cache, under its checksum, unless it is there."""
    target = blobs / record.sha256
    if target.exists() and target.stat().st_size == record.size:
        return
    handle, name = tempfile.mkstemp(dir=blobs, prefix=record.sha256[:16], suffix=".partial")
    partial = Path(name)
    try:
        digest = hashlib.sha256()
        with os.fdopen(handle, "wb") as file:
            for block in _blocks(system, path, address):
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != record.sha256:
            raise FolderError(
                f"{path} is not what the manifest says (its checksum differs): upload the memory "
                "again"
            )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _blocks(system: Any, path: str, address: str) -> Iterator[bytes]:
    """A file elsewhere, piece by piece."""
    with _errors_of(address):
        source = system.open(path, "rb")
    with source:
        while True:
            with _errors_of(address):
                block = source.read(_BLOCK)
            if not block:
                return
            yield block


def _link(blob: Path, path: Path) -> None:
    """The same file under another name, whoever else does that; readers refuse symbolic links."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.urandom(4).hex()}.partial")
    try:
        os.link(blob, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # which stays where both are one file already


def _put(system: Any, file: Path, path: str, record: FileRecord) -> None:
    system.makedirs(path.rpartition("/")[0], exist_ok=True)
    system.put_file(str(file), path)
    system.invalidate_cache()
    if (size := system.info(path)["size"]) != record.size:
        raise FolderError(f"{path} has {size:,} bytes after the upload, of {record.size:,}: again")
