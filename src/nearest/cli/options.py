"""Options that several commands have: each said once, those that go together in a group."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nearest.errors import NearestError, SettingError

if TYPE_CHECKING:
    from nearest.corpus.reading import Corpus

MemoryPath = Annotated[Path, typer.Argument(metavar="MEMORY", help="The memory's folder.")]
Where = Annotated[
    list[str] | None,
    typer.Option("--where", help="KEY=VALUE of metadata; all that are given must be so."),
]
CorpusPaths = Annotated[
    list[str],
    typer.Argument(
        metavar="CORPUS...",
        help="Files, folders, pipes (- for stdin), or hf://owner/name\\[/config][:split].",
    ),
]
TextPaths = Annotated[
    list[str],
    typer.Option(
        "--text",
        help="Text to score: files, folders, pipes, or hf://owner/name\\[/config][:split].",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]
Window = Annotated[
    int | None,
    typer.Option(
        help="Tokens per window.  \\[default: the memory's; for build the model's context, up to "
        "512]"
    ),
]
Stride = Annotated[
    int | None,
    typer.Option(
        help="Tokens scored per window.  \\[default: the memory's; for build half a window]"
    ),
]
BatchSize = Annotated[int | None, typer.Option(help="Windows per forward pass.")]
ModelName = Annotated[
    str | None, typer.Option("--model", help="The model, where it is not where it was at building.")
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        help="Compute dtype. auto: the checkpoint's; float32 on CPUs without fast bfloat16."
    ),
]
Device = Annotated[
    str, typer.Option(help="Compute device: cpu, cuda, cuda:1 …; auto: CUDA, if any.")
]
ScoreEos = Annotated[bool, typer.Option(help="Predict each document's end too.")]
Force = Annotated[
    bool, typer.Option(help="Skip the model fingerprint check. Neighbours may be meaningless.")
]
LeaveOneOut = Annotated[
    bool,
    typer.Option(help="Predict a document that the memory holds too without its own entries."),
]
Stream = Annotated[
    bool, typer.Option("--stream", help="Read all documents as one sequence, as older tools do.")
]
Spec = Annotated[str, typer.Option(help='"auto", "exact", or a FAISS index_factory string.')]
Nprobe = Annotated[
    int | None, typer.Option(help="Lists to probe; found by the recall target when not given.")
]
Recall = Annotated[
    float, typer.Option(help="Recall@1024 after re-ranking, to choose and tune the index by.")
]

Encoding = Annotated[
    Literal["strict", "replace"], typer.Option(help="What to do with bytes that are not text.")
]


@dataclass(frozen=True)
class FileOptions:
    """How files become documents."""

    text_field: Annotated[
        str, typer.Option(help='Field of rows with the text; "a.b" reaches into objects.')
    ] = "text"
    id_field: Annotated[str, typer.Option(help="Field of rows with the document's id.")] = "id"
    encoder_field: Annotated[
        str | None,
        typer.Option(
            help="Field that the encoder of an encoder–decoder reads, in rows without "
            "encoder_text.  \\[default: source]"
        ),
    ] = None
    suffix: Annotated[
        list[str] | None,
        typer.Option(
            help='Further suffix of files to read as plain text, as .py; "": files without one.'
        ),
    ] = None
    exclude: Annotated[
        list[str] | None,
        typer.Option(help='Pattern of files or folders to leave out, as "*.min.js"; repeatable.'),
    ] = None
    format: Annotated[
        Literal["text", "jsonl", "json", "csv", "tsv", "html"] | None,
        typer.Option(help="Read named files and pipes as this, whatever their suffix."),
    ] = None
    encoding: Annotated[
        str,
        typer.Option(help="Encoding of text files; auto: detect it in those that are not UTF-8."),
    ] = "utf-8"
    encoding_errors: Encoding = "strict"

    def corpus(self, paths: list[str]) -> "Corpus":
        """Open files, folders, pipes and datasets; raises as `read_documents`."""
        from nearest.corpus.reading import read_documents

        options = dict(vars(self))
        suffixes, exclude = options.pop("suffix") or (), options.pop("exclude") or ()
        return read_documents(paths, suffixes=suffixes, exclude=exclude, **options)


@dataclass(frozen=True)
class Keying:
    """What the keys of a new memory are, and how they are searched."""

    key_layer: Annotated[
        Literal["last_ffn_input", "last_hidden"], typer.Option(help="Which states keys are.")
    ] = "last_ffn_input"
    window: Window = None
    stride: Stride = None
    index: Spec = "auto"
    metric: Annotated[Literal["l2", "ip"], typer.Option(help="Squared L2, or inner product.")] = (
        "l2"
    )
    recall: Recall = 0.95


@dataclass(frozen=True)
class Workers:
    """Who does the work."""

    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that share the work, each with its share of threads."),
    ] = None
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="auto|ADDRESS",
            help="Start the workers on this Ray cluster (as many as it has room for, unless "
            "--workers says), each with the threads of this process; local: on a new one here.",
        ),
    ] = None


@dataclass(frozen=True)
class Sharing(Workers):
    """Who does the work of a build."""

    allow_mixed: Annotated[
        bool,
        typer.Option(
            "--allow-mixed",
            help="Accept keys of machines that round otherwise: not byte for byte one machine's.",
        ),
    ] = False


@dataclass(frozen=True)
class ModelChoice:
    """Which model a memory is used with; the one that built it where none is named."""

    model: ModelName = None
    dtype: Dtype = "auto"
    device: Device = "auto"


@dataclass(frozen=True)
class Opening(ModelChoice):
    """With which model a memory is opened, and where it is searched."""

    search_on: Annotated[
        Literal["cpu", "gpu"],
        typer.Option(help="Where to search; on a GPU all keys are scanned."),
    ] = "cpu"


@dataclass(frozen=True)
class Adding(ModelChoice):
    """How documents come into a memory that is there."""

    batch_size: BatchSize = None
    force: Force = False


@dataclass(frozen=True)
class Reading:
    """How text is cut and handed to the model."""

    window: Window = None
    stride: Stride = None
    batch_size: BatchSize = None
    force: Force = False


@dataclass(frozen=True)
class MoreMemories:
    """Memories that are looked up beside the first."""

    more: Annotated[
        list[Path] | None,
        typer.Option("--memory", metavar="MEMORY", help="Another memory to look up; repeatable."),
    ] = None
    weights: Annotated[
        str | None,
        typer.Option(help="Of all memories, with commas, summing to at most 1; else equal."),
    ] = None


@dataclass(frozen=True)
class PassageSettings:
    """Settings of passages before the text."""

    passages: Annotated[
        int | None, typer.Option(help="in-context: passages before the text, the best one last.")
    ] = None
    passage_tokens: Annotated[
        int | None, typer.Option(help="in-context: tokens of a passage, at most.")
    ] = None
    passage_stride: Annotated[
        int | None, typer.Option(help="in-context: text tokens between choices of passages.")
    ] = None
    query_tokens: Annotated[
        int | None, typer.Option(help="in-context: last tokens, by which passages are chosen.")
    ] = None


@dataclass(frozen=True)
class FixedSettings(PassageSettings):
    """Settings of a method that tuning does not find."""

    k: Annotated[int | None, typer.Option("--k", help="Number of neighbours.")] = None
    length_power: Annotated[
        float | None, typer.Option(help="Weigh entries by (1 + match length) to this power.")
    ] = None
    distances: Annotated[
        Literal["keys", "index"] | None,
        typer.Option(help="Distances of stored keys, or the index's."),
    ] = None
    encoder_texts: Annotated[
        int | None,
        typer.Option(
            "--encoder-texts",
            help="Search among so many documents with the most like encoder texts; 0: all.",
        ),
    ] = None
    min_knns: Annotated[
        float | None,
        typer.Option(help="Search when fewer pointers are left; inf: always, 0: never."),
    ] = None
    max_knns: Annotated[int | None, typer.Option(help="Pointers and cluster members, at most.")] = (
        None
    )
    dedup: Annotated[
        bool | None,
        typer.Option("--dedup/--no-dedup", help="Count no entry twice in one prediction."),
    ] = None
    suffix_k: Annotated[
        int | None, typer.Option("--suffix-k", help="Entries with the longest matches, at most.")
    ] = None
    skip: Annotated[
        float | None, typer.Option(help="Fraction of dense searches that the gate is to save.")
    ] = None
    guard: Annotated[
        bool | None,
        typer.Option("--guard/--no-guard", help="Weigh base and memory by how well each predicts."),
    ] = None


@dataclass(frozen=True)
class MethodSettings(FixedSettings):
    """Every setting of a method; as tuned where not given."""

    lam: Annotated[float | None, typer.Option("--lam", help="Weight of the memory, 0 to 1.")] = None
    knn_temperature: Annotated[
        float | None,
        typer.Option(help="Temperature of the softmax over the neighbours' distances."),
    ] = None

    def named(self) -> dict[str, Any]:
        """The settings under their names in Python."""
        settings = vars(self).copy()
        settings["temperature"] = settings.pop("knn_temperature")
        return settings


@dataclass(frozen=True)
class Answering:
    """How memories are used to write, and shown."""

    method: Annotated[
        str, typer.Option(help="base, knn, retomaton, suffix, hybrid, in-context, in-context+knn …")
    ] = "knn"
    show: Annotated[int, typer.Option(min=1, help="Documents named as sources, at most.")] = 5
    force: Force = False


@dataclass(frozen=True)
class Sampling:
    """How new tokens are chosen, named as transformers names it."""

    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 60
    num_beams: Annotated[int, typer.Option(min=1, help="Beams of beam search.")] = 1
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample; also by any of the next three. Else greedy.")
    ] = False
    temperature: Annotated[
        float | None, typer.Option(help="Divides the logits before sampling.")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens of this probability.")
    ] = None
    top_k: Annotated[int | None, typer.Option(help="Sample from so many likeliest tokens.")] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Divides the scores of tokens that came before; 1: none.")
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0

    def arguments(self) -> dict[str, Any]:
        """Arguments of `model.generate`.

        Raises:
            SettingError: a number is out of range.
        """
        chosen = given(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise SettingError(
                f"--temperature must be above 0, got {self.temperature:g}: leave it out for the "
                "likeliest token at every step"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SettingError(f"--top-p must be above 0 and at most 1, got {self.top_p:g}")
        if self.top_k is not None and self.top_k < 1:
            raise SettingError(f"--top-k must be at least 1, got {self.top_k}")
        penalty = given(repetition_penalty=self.repetition_penalty)
        if self.repetition_penalty is not None and not self.repetition_penalty > 0:
            raise SettingError(
                f"--repetition-penalty must be above 0, got {self.repetition_penalty:g}"
            )
        return {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": self.sample or bool(chosen),
            **chosen,
            **penalty,
        }


def conditions(where: list[str] | None) -> dict[str, str]:
    """What `Where` was given, by key (SettingError where a value is missing)."""
    found = {}
    for condition in where or []:
        key, equals, value = condition.partition("=")
        if not equals:
            raise SettingError(f"--where {condition!r} has no value: write KEY=VALUE")
        found[key] = value
    return found


def given(**options: Any) -> dict[str, Any]:
    """Those options that were given a value."""
    return {name: value for name, value in options.items() if value is not None}


def with_commas(text: str) -> list[str]:
    """The parts of a list that is written with commas."""
    return [part.strip() for part in text.split(",")] if text.strip() else []


def numbers(text: str | None, option: str, example: str) -> list[float] | None:
    """Numbers that are written with commas; None where nothing is given."""
    if text is None:
        return None
    try:
        return [float(part) for part in with_commas(text)]
    except ValueError as error:
        raise NearestError(
            f"--{option} {text!r} is no list of numbers: write them with commas, as in {example}"
        ) from error
