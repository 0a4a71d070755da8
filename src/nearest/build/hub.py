"""Memories on the Hugging Face hub: only where the user asks for one by name."""

import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from nearest.errors import FolderError
from nearest.store.manifest import MANIFEST, Manifest, write_manifest
from nearest.store.snapshot import Snapshot

_CARD = "README.md"


def downloaded(repo_or_path: str | Path, **options: Any) -> Path:
    """The folder of a memory, which is downloaded into the hub's cache unless it is there.

    Raises:
        FolderError: there is no such folder and no such repository, or the hub cannot be reached.
    """
    path = Path(repo_or_path)
    if path.exists() or path.is_absolute() or str(repo_or_path).count("/") > 1:
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(repo_or_path), **options))
    except Exception as error:  # of the hub, of HTTP, of the disk: each raises its own kinds
        raise FolderError(
            f"{repo_or_path} is no folder here, and cannot be downloaded from the hub "
            f"({_reason(error)}): give a memory's folder, or owner/name of one on the hub"
        ) from error


def push(
    snapshot: Snapshot,
    repo: str,
    license_: str | None,
    base_model: str | None,
    private: bool | None,
    token: str | None,
    repo_type: str,
) -> str:
    """Upload the live files of a snapshot, its manifest and a card; see `Memory.push_to_hub`."""
    manifest, folder = snapshot.manifest, snapshot.path
    if removed := sum(segment.removed for segment in manifest.segments):
        raise FolderError(
            f"{folder} has {removed} removed documents in its files still, which would be "
            "uploaded: erase them first (`nearest compact`)"
        )
    name = base_model or manifest.model.name
    if Path(name).is_absolute():  # a path here means nothing elsewhere, and is nobody's business
        name = Path(name).name
    manifest = msgspec.structs.replace(
        manifest, model=msgspec.structs.replace(manifest.model, name=name)
    )
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        api = HfApi(token=token)
        made = api.create_repo(repo, private=private, repo_type=repo_type, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            write_manifest(Path(temporary), manifest)
            files = {record.path: folder / record.path for record in manifest.file_records()}
            files[MANIFEST] = Path(temporary) / MANIFEST
            operations = [
                CommitOperationAdd(path_in_repo=path, path_or_fileobj=os.fspath(file))
                for path, file in files.items()
            ]
            text = card(manifest, made.repo_id, license_)
            operations.append(CommitOperationAdd(path_in_repo=_CARD, path_or_fileobj=text.encode()))
            api.create_commit(
                made.repo_id,
                operations,
                commit_message=f"A memory of {name}",
                repo_type=repo_type,
            )
    except Exception as error:
        raise FolderError(
            f"{folder} cannot be uploaded to {repo} ({_reason(error)}): check the name, the token "
            "(`hf auth login`) and the connection"
        ) from error
    return str(made)


def card(manifest: Manifest, repo: str, license_: str | None) -> str:
    """The README of a memory on the hub: its model, corpus, figures and licence."""
    model, keys = manifest.model, manifest.keys
    header = ["library_name: nearest", "tags: [nearest, knn-lm, retrieval]"]
    if license_ is not None:
        header.append(f"license: {license_}")
    if "/" in model.name and not model.tokenizer_only:
        header.append(f"base_model: {model.name}")
    documents = sum(segment.documents for segment in manifest.segments)
    tokens = sum(segment.tokens for segment in manifest.segments)
    size = sum(record.size for record in manifest.file_records())
    rows = [
        ("tokenizer" if model.tokenizer_only else "model", f"`{model.name}`"),
        ("documents", f"{documents:,}"),
        ("tokens", f"{tokens:,}"),
        ("keys", "none" if keys is None else f"{keys.dim} dims of `{keys.module}`, {keys.format}"),
        ("size", f"{size / 1e6:,.1f} MB"),
        ("licence of the documents", license_ or "not stated"),
    ]
    settings = [
        f"- `{method}`: " + ", ".join(f"{name} {value}" for name, value in found.items())
        for method, found in manifest.settings.items()
    ]
    return "\n".join(
        [
            "---",
            *header,
            "---",
            "",
            f"# {repo.rpartition('/')[2]}",
            "",
            f"A memory for `{model.name}`: the model looks these documents up while it predicts.",
            "It holds their full text.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {what} | {value} |" for what, value in rows),
            "",
            *(["Tuned settings:", "", *settings, ""] if settings else []),
            "```python",
            "from nearest import Memory, attach",
            "",
            f'memory = Memory.from_pretrained("{repo}")',
            "with attach(model, memory, tokenizer=tokenizer) as session:",
            "    output = model.generate(**inputs)",
            "    session.sources(0)",
            "```",
            "",
        ]
    )


def _reason(error: BaseException) -> str:
    """The first line of what the client says, and of what made it say so."""
    said = str(error).strip().split("\n")[0] or type(error).__name__
    return said if error.__cause__ is None else f"{said}: {_reason(error.__cause__)}"
