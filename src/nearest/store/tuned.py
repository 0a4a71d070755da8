"""Where a method's settings come from, and what has changed since they were found."""

from typing import Any, Literal

from nearest.store.manifest import Manifest

SettingsFrom = Literal["defaults", "self-tuned", "tuned", "given"]
Changed = Literal["keys", "documents"]
SELF_TUNED = "self_tuned"  # in stored settings: found on the memory's own text


def what_keys(manifest: Manifest) -> str:
    """A description of the keys, which changes when they are compressed."""
    keys = manifest.keys
    if keys is None:
        return "none"
    merged = any(segment.kept is not None for segment in manifest.segments)
    return f"{keys.format}, {keys.stored_dim} dims, {keys.metric}{', merged' if merged else ''}"


def found_on(manifest: Manifest) -> dict[str, Any]:
    """Stored with settings, so that a later change of keys or index can be detected."""
    index = "none" if manifest.keys is None else manifest.keys.index
    return {"tuned_keys": what_keys(manifest), "tuned_index": index}


def settings_from(manifest: Manifest, method: str) -> SettingsFrom:
    """Where the settings of a method come from that are not given for a call."""
    stored = manifest.settings.get(method)
    if not stored:
        return "defaults"
    return "self-tuned" if stored.get(SELF_TUNED) else "tuned"


def changed_since_tuning(manifest: Manifest, method: str) -> dict[Changed, str]:
    """What has changed since a method's settings were found, each as part of a sentence.

    "keys": keys or index are others (`nearest compress`, `nearest index`), so that distances mean
    something else. "documents": some came or went. Empty where nothing did, or nothing was tuned.
    """
    found_at = manifest.tuned_at.get(method)
    if found_at is None:
        return {}
    changed: dict[Changed, str] = {}
    now = found_on(manifest)
    then = {**now, **manifest.settings.get(method, {})}
    if then["tuned_keys"] != now["tuned_keys"]:
        changed["keys"] = f"keys changed from {then['tuned_keys']} to {now['tuned_keys']}"
    elif then["tuned_index"] != now["tuned_index"]:
        changed["keys"] = f"the index changed from {then['tuned_index']} to {now['tuned_index']}"
    elif found_at < manifest.keys_of:
        changed["keys"] = "keys or index were made anew"
    if found_at < manifest.documents_of:
        changed["documents"] = "documents were added or removed"
    return changed
