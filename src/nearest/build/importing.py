"""A memory made of a datastore of earlier tools: its keys, its tokens, its clusters, its index."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Int

from nearest.build.build import keys_record, new_manifest
from nearest.build.keys import GivenKeys
from nearest.build.knn_store import Store, find_store, open_store
from nearest.build.pickled_members import labels_of, read_members
from nearest.corpus.documents import Document
from nearest.corpus.tokens import TokenisedDocument
from nearest.encode.encoder import Encoder
from nearest.encode.identity import reads_sources
from nearest.encode.layers import LanguageModel, find_key_layer
from nearest.errors import CorpusError, ModelError, SettingError
from nearest.index.building import check_spec
from nearest.index.choice import AUTO, EXACT, RECALL
from nearest.index.clusters import Clusters
from nearest.index.keys import key_format
from nearest.index.neighbours import checked_metric
from nearest.progress import Progress, no_progress
from nearest.store.change import new_folder
from nearest.store.manifest import ClustersRecord, SegmentRecord, write_manifest
from nearest.store.new_files import make_names_durable, segment_files
from nearest.store.new_segment import SegmentPlan, write_segment
from nearest.store.parts.clusters import write_arrays
from nearest.store.parts.corpus import valued_mask
from nearest.store.parts.index import IndexChoice, take_over_index
from nearest.store.segment import Segment


@dataclass(frozen=True)
class ImportOptions:
    """How a datastore is read; every default is what the command line uses.

    Attributes:
        entries: how many it holds, where its files do not tell.
        split: end a document at every EOS; else all is one document.
        trust: read its FAISS index. FAISS is not made to read hostile files.
        members: read its clusters.
        keys, key_layer, window, stride, index, metric, recall: as of a build; what read the text
            then is not written down in a datastore.
    """

    entries: int | None = None
    split: bool = False
    trust: bool = False
    members: bool = True
    keys: str = "fp16"
    key_layer: str = "last_ffn_input"
    window: int | None = None
    stride: int | None = None
    index: str = AUTO
    metric: str = "l2"
    recall: float = RECALL
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        key_format(self.keys)
        checked_metric(self.metric)
        if self.trust and self.split:
            raise SettingError(
                "the FAISS index counts the entries of one stream: leave out either --trust, for "
                "an index of our own, or --split"
            )
        if self.trust and self.index != AUTO:
            raise SettingError("either an index of our own (--index) or theirs (--trust): not both")


def import_store(
    given: Path, path: Path, model: LanguageModel, tokenizer: Any, options: ImportOptions
) -> None:
    """Make the memory `path` of a datastore that this model made.

    The value of entry i is token i+1: the values are the text, and documents' text is what the
    tokenizer makes of them.

    Raises:
        NearestError: datastore, model, settings or folder cannot be used; nothing is left behind.
    """
    if reads_sources(model):
        raise ModelError(
            f"{type(model).__name__} is an encoder–decoder, and a datastore does not hold the "
            "texts that its encoder read: build a memory of the documents"
        )
    files, layer = find_store(given), find_key_layer(model, options.key_layer)
    if options.trust and files.index is None:
        raise CorpusError(
            f"{files.keys.parent} holds no index (*.indexed, *.index): leave out --trust"
        )
    check_spec(options.index, layer.dim, None)
    encoder = Encoder.of(model, layer, options.window, options.stride)
    keys = keys_record(encoder, options.keys, options.metric, options.index)
    keys = msgspec.structs.replace(keys, dtype=None)  # a datastore does not tell
    # What the tokenizer makes of the values is the text, special tokens included.
    manifest = new_manifest(model, tokenizer, keys, special_tokens=True)
    record = manifest.model
    store = open_store(files, layer.dim, record.vocab_size, options.entries)
    ends = _document_ends(store, tokenizer.eos_token_id if options.split else None)
    labels = None
    if options.members and files.members is not None:
        members = read_members(files.members, len(store.values))
        labels = labels_of(members, len(store.values)), len(members.offsets) - 1
    choice = IndexChoice(EXACT if options.trust else options.index, options.recall)
    plan = SegmentPlan(
        segment_files(path, "000001"),
        "000001",
        manifest,
        choice,
        options.progress,
        GivenKeys(store.keys),
    )
    documents = _documents(store, ends, tokenizer, record.start_token, files.values)
    with new_folder(path):
        segment = write_segment(plan, documents)
        clusters = None
        if labels is not None:
            clusters = ClustersRecord("k-means", labels[1])
            segment = _with_clusters(plan, segment, *labels)
        if options.trust and files.index is not None:
            opened = Segment(path, manifest, segment)
            index = take_over_index(
                plan.files, files.index, opened.keys, opened.searched, options.recall
            )
            segment = segment.with_files({}, index=index)
            keys = msgspec.structs.replace(keys, index=index.spec)
        make_names_durable(path, segment.file_records())
        write_manifest(
            path,
            msgspec.structs.replace(manifest, keys=keys, segments=[segment], clusters=clusters),
        )


def _document_ends(store: Store, end_token: int | None) -> Int[np.ndarray, " documents"]:
    """The entry after each document's last."""
    count = len(store.values)
    if end_token is None:
        return np.array([count])
    ends = np.flatnonzero(np.asarray(store.values) == end_token) + 1
    return ends if len(ends) and ends[-1] == count else np.append(ends, count)


def _documents(
    store: Store, ends: Int[np.ndarray, " documents"], tokenizer: Any, start: int, origin: Path
) -> Iterator[TokenisedDocument]:
    """Each document: the start token, then the values of its entries."""
    first = 0
    for number, end in enumerate(ends.tolist()):
        values = np.asarray(store.values[first:end])
        text = tokenizer.decode(values, clean_up_tokenization_spaces=False)
        name = f"{origin.name.removesuffix('_vals.npy')}:{number + 1}"
        tokens = np.empty(len(values) + 1, np.int64)
        tokens[0], tokens[1:] = start, values
        yield TokenisedDocument(Document(name, text, {"entries": [first, end]}, name), tokens)
        first = end


def _with_clusters(
    plan: SegmentPlan, segment: SegmentRecord, labels: Int[np.ndarray, " m"], clusters: int
) -> SegmentRecord:
    opened = Segment(plan.files.root, plan.manifest, segment)
    of = np.full(segment.tokens, -1, np.int32)
    of[valued_mask(opened.offsets)] = labels
    found = Clusters.from_labels(of, clusters)
    return segment.with_files(write_arrays(plan.files, found), members=len(found.members))
