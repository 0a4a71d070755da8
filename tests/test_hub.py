"""Memories on the hub: a local stub of its HTTP API, and caches as its client lays them out."""

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from conftest import make_documents, make_model, make_tokenizer
from nearest import Document, Memory
from nearest.errors import FolderError, NearestError

# The hub's client uploads with an argument that its HTTP library is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "someone/law"
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Repositories in memory, and what the client asks for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, value: Any, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        body, path = self.body, self.path.split("?")[0]
        if path == "/api/repos/create":
            self.reply({"url": f"{self.server.url}/{REPO}", "name": REPO, "id": "1"})
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [f["path"] for f in json.loads(body)["files"]]
            modes = [
                {
                    "path": name,
                    "uploadMode": "lfs" if name.endswith(".npy") else "regular",
                    "shouldIgnore": False,
                }
                for name in files
            ]
            self.reply({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}},
                }
                for o in json.loads(body)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.blobs[value["oid"]]
            url = f"{self.server.url}/{REPO}/commit/{COMMIT}"
            self.reply({"success": True, "commitOid": COMMIT, "commitUrl": url})
        else:
            self.reply({"error": path}, 404)

    def do_PUT(self) -> None:
        self.server.blobs[self.path.removeprefix("/lfs/")] = self.body
        self.reply({})

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        files = self.server.files
        found = re.fullmatch(f"/{REPO}/resolve/[^/]+/(.*)", path)
        if found and found[1] in files:
            data = files[found[1]]
            self.reply(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)
        elif files and path.startswith(f"/api/models/{REPO}/tree/"):
            self.reply(
                [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in files.items()
                ]
            )
        elif files and path.startswith(f"/api/models/{REPO}"):
            names = [{"rfilename": name} for name in files]
            self.reply({"id": REPO, "sha": COMMIT, "siblings": names, "private": False, "tags": []})
        else:
            self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Memory:
    path = tmp_path_factory.mktemp("hub") / "law.memory"
    return Memory.build(make_model(), make_tokenizer(), make_documents(6, 20), path)


def in_cache(memory: Memory, cache: Path) -> Path:
    """A memory as the hub's client keeps it: links of a snapshot lead to blobs."""
    repo = cache / "models--someone--law"
    folder = repo / "snapshots" / COMMIT
    (repo / "blobs").mkdir(parents=True)
    for file in memory.path.rglob("*"):
        if file.is_file():
            name = hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, repo / "blobs" / name)
            link = folder / file.relative_to(memory.path)
            link.parent.mkdir(parents=True, exist_ok=True)
            up = "../" * (len(link.relative_to(repo).parts) - 1)
            link.symlink_to(f"{up}blobs/{name}")
    return folder


def same(one: Memory, other: Memory) -> bool:
    documents = [[m.document(i) for i in range(m.documents)] for m in (one, other)]
    return documents[0] == documents[1] and one.keys.rows(one.keyed_entries()).tobytes() == (
        other.keys.rows(other.keyed_entries()).tobytes()
    )


def test_a_memory_in_the_hubs_cache_opens_and_is_not_changed(built: Memory, tmp_path: Path) -> None:
    folder = in_cache(built, tmp_path)
    opened = Memory.from_pretrained(folder)
    assert same(opened, built)
    with pytest.raises(FolderError, match="copy the memory first"):
        opened.remove([built.document(0).id])


@pytest.mark.parametrize("layout", ["copied", "flat"])
def test_a_memory_of_links_opens_wherever_its_cache_is_moved(
    built: Memory, tmp_path: Path, layout: str
) -> None:
    in_cache(built, tmp_path)
    repo = tmp_path / "models--someone--law"
    if layout == "copied":  # the cache of one repository, under another name
        folder = Path(shutil.move(repo, tmp_path / "plain")) / "snapshots" / COMMIT
    else:  # a snapshot beside its blobs
        folder = repo / "snapshot"
        for file in (repo / "snapshots" / COMMIT).rglob("*"):
            if file.is_symlink():
                link = folder / file.relative_to(repo / "snapshots" / COMMIT)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.resolve())
    opened = Memory.open(folder)
    assert same(opened, built)
    with pytest.raises(FolderError, match="copy the memory first"):
        opened.remove([built.document(0).id])


def test_a_memory_beside_a_folder_of_blobs_is_changed_as_any(built: Memory, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built.path, tmp_path / "law.memory"))
    (tmp_path / "blobs").mkdir()
    assert Memory.open(copy).remove([built.document(0).id]).documents == built.documents - 1


@pytest.mark.parametrize("escape", ["outside", "folder", "beside"])
def test_links_that_leave_the_cache_are_refused(built: Memory, tmp_path: Path, escape: str) -> None:
    folder = in_cache(built, tmp_path)
    name = built.manifest.segments[0].files["tokens"].path
    link = folder / name
    if escape == "outside":
        other = tmp_path / "mine.npy"
    elif escape == "folder":  # a folder of the snapshot leads elsewhere
        shutil.copytree(folder / "segments", tmp_path / "segments", symlinks=True)
        shutil.rmtree(folder / "segments")
        (folder / "segments").symlink_to(tmp_path / "segments")
        other = None
    else:  # in another repository of the cache
        (tmp_path / "models--other--one/blobs").mkdir(parents=True)
        other = tmp_path / "models--other--one/blobs/x"
    if other is not None:
        shutil.copy(link, other)
        link.unlink()
        link.symlink_to(other)
    with pytest.raises(FolderError, match=r"link"):
        Memory.open(folder)


def test_a_memory_goes_to_the_hub_and_back(built: Memory, hub: Hub, tmp_path: Path) -> None:
    (built.path / "left-over.txt").write_text("not of the memory")
    address = built.push_to_hub(REPO, license="cc-by-4.0", base_model="org/base", token="hf_x")
    assert address.endswith(REPO)
    live = {record.path for record in built.manifest.file_records()}
    assert set(hub.files) == {"manifest.json", "README.md", *live}
    card = hub.files["README.md"].decode()
    assert "license: cc-by-4.0" in card
    assert "base_model: org/base" in card
    assert f"| documents | {built.documents} |" in card
    assert str(built.path.parent) not in card
    options = {"cache_dir": tmp_path, "endpoint": hub.url}
    back = Memory.from_pretrained(REPO, **options)
    assert same(back, built)
    assert back.manifest.model.name == "org/base"
    assert (back.path / "manifest.json").is_symlink()  # in the real layout of the cache


def test_what_is_not_there_is_said(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="no folder here, and cannot be downloaded"):
        Memory.from_pretrained(REPO, cache_dir=tmp_path, endpoint=hub.url)
    with pytest.raises(FolderError, match="does not exist"):
        Memory.from_pretrained(tmp_path / "none")


def test_removed_documents_are_not_uploaded(built: Memory, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built.path, tmp_path / "m"))
    memory = Memory.open(copy).remove([built.document(0).id])
    with pytest.raises(FolderError, match="nearest compact"):
        memory.push_to_hub(REPO)


def test_a_text_is_looked_up(built: Memory) -> None:
    """The nearest places of a stored prefix are that prefix's own, with the stored text around."""
    document: Document = built.document(2)
    text = document.text[:12]
    found = built.search_text(make_model(), make_tokenizer(), text, 3)
    assert [passage.distance for passage in found] == sorted(p.distance for p in found)
    nearest = found[0]
    assert nearest.document == document
    assert nearest.position == 12
    assert (nearest.before, nearest.next) == (text, document.text[12])
    assert nearest.after == document.text[13:37]
    assert document.id in str(nearest)


def test_the_public_names_are_one_list() -> None:
    import nearest

    assert set(nearest.__all__) <= set(dir(nearest))
    assert {"Memory", "attach", "Settings", "BuildOptions", "detach"} <= set(nearest.__all__)
    for name in nearest.__all__:
        assert getattr(nearest, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nearest.nothing  # type: ignore[attr-defined]
    assert issubclass(FolderError, NearestError)
