"""Commands that change how a memory's keys are searched, joined and stored."""

from typing import Annotated

import typer

from nearest import reports
from nearest.cli.app import err
from nearest.cli.memories import show_info
from nearest.cli.options import AsJson, MemoryPath, Nprobe, Recall, Spec, Workers, given
from nearest.errors import NearestError


def index(
    memory: MemoryPath,
    index: Spec = "auto",
    recall: Recall = 0.95,
    nprobe: Nprobe = None,
    *,
    sharing: Workers,
    as_json: AsJson = False,
) -> None:
    """Give a memory another index, in a new snapshot."""
    from nearest.build.index import rebuild_index
    from nearest.memory import Memory
    from nearest.store.parts.index import IndexChoice

    with reports.live_progress(err) as progress:
        choice = IndexChoice(index, recall, nprobe)
        rebuild_index(memory, choice, progress, sharing.workers, sharing.ray)
    show_info(Memory.open(memory), as_json)


def cluster(
    memory: MemoryPath,
    clusters: Annotated[int | None, typer.Option(help="Number of clusters (k-means).")] = None,
    sample: Annotated[
        int | None, typer.Option(help="Entries to find centroids with; 32 a cluster if not given.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Of k-means; 10 if not given.")] = None,
    greedy_merge: Annotated[
        bool, typer.Option("--greedy-merge", help="Join near entries of the same value instead.")
    ] = False,
    neighbours: Annotated[
        int | None, typer.Option(help="Of each entry, for greedy merge; 9 if not given.")
    ] = None,
    *,
    sharing: Workers,
    as_json: AsJson = False,
) -> None:
    """Cluster entries that share a state, for RetoMaton to follow, in a new snapshot."""
    from nearest.build.cluster import GreedyMerge, KMeans, cluster_memory
    from nearest.memory import Memory

    kmeans = given(clusters=clusters, sample=sample, iterations=iterations)
    merge = given(neighbours=neighbours)
    if greedy_merge == bool(kmeans) or (merge and not greedy_merge):
        raise NearestError(
            "give either --clusters (with --sample, --iterations) or --greedy-merge (with "
            "--neighbours)"
        )
    if not greedy_merge and clusters is None:
        raise NearestError("k-means needs a number of clusters: give --clusters")
    with reports.live_progress(err) as progress:
        how = GreedyMerge(**merge) if greedy_merge else KMeans(**kmeans)
        cluster_memory(memory, how, progress, sharing.workers, sharing.ray)
    show_info(Memory.open(memory), as_json)


def compress(
    memory: MemoryPath,
    keys: Annotated[
        str | None, typer.Option(help="int8, or pqM: M bytes a key (product quantisation).")
    ] = None,
    pca: Annotated[int | None, typer.Option(help="Dimensions to keep.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Join near entries of the same value into one.")
    ] = False,
    neighbours: Annotated[
        int | None, typer.Option(help="Of each entry, to merge; 9 if not given.")
    ] = None,
    index: Annotated[
        str | None, typer.Option(help="Another index; the kind it has if not given.")
    ] = None,
    recall: Annotated[
        float | None, typer.Option(help="Recall@1024 to tune the index to; as before if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a memory's keys smaller, in a new snapshot; tune it again afterwards."""
    from nearest.build.compress import Compression, compress_memory
    from nearest.memory import Memory

    how = Compression(keys, pca, merge, neighbours, index, recall)
    with reports.live_progress(err) as progress:
        compress_memory(memory, how, progress)
    show_info(Memory.open(memory), as_json)
