"""`nearest demo`: build, tune, evaluate and generate offline, then tell it on one page.

Every step prints the command that does the same, so that a reader can repeat and change it.
"""

import math
import platform
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, cast

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel

from nearest import reports
from nearest.corpus.reading import read_documents
from nearest.demo.corpus import Split, split_topics, write_jsonl
from nearest.demo.passage import score_passage, typical_document
from nearest.demo.report import Compared, Story, Writing, render
from nearest.encode.fingerprint import model_fingerprint
from nearest.encode.loading import load_model_and_tokenizer
from nearest.errors import FolderError, require
from nearest.folder import disk_errors_explained, write_atomically
from nearest.memory import Memory
from nearest.store.manifest import MANIFEST, read_manifest
from nearest.verbs.evaluate import evaluate
from nearest.verbs.generate import generate
from nearest.verbs.results import Result
from nearest.verbs.settings_search import Tuned
from nearest.verbs.tune import tune

MODEL = Path(__file__).with_name("general-gpt2-7m")
PROMPTS = ('The "global" statement', "Strings are immutable sequences of")
# The tuned temperature predicts best; but writing greedily with it, a model this small turns in
# circles. At a low one the nearest entries decide, and the memory is quoted.
TEMPERATURE = 1.0
NEW_TOKENS = 60
YOUR_TURN = (
    ("nearest", "build", "openai-community/gpt2", "my-documents/", "--out", "my.memory"),
    ("nearest", "eval", "my.memory", "--text", "test.txt", "--method", "base,hybrid"),
    ("nearest", "generate", "my.memory", "--prompt", "…", "--method", "hybrid", "--sources"),
)


def run_demo(out_path: Path, out: Console, err: Console, model_path: Path = MODEL) -> None:
    """Run the demo; leaves the corpus, a memory and report.html in `out_path`.

    Args:
        out_path: folder to write; a memory that an earlier demo left there is replaced.
        out: shows the story.
        err: shows progress.
        model_path: the folder of the model that the story is of; the one that ships is then
            measured beside it.

    Raises:
        NearestError: matplotlib is missing, or the folder cannot be used.
    """
    require("matplotlib", "plots")
    started = time.perf_counter()
    split = split_topics(topics)
    corpus = _write_corpus(out_path, split)
    _say(
        out,
        "Corpus",
        f"Python’s reference: {len(split.memory)} topics to remember, {len(split.tuning)} to tune "
        f"on, {len(split.test)} to test",
    )
    out.print(Text(f"written to {out_path / 'corpus'}\n"), soft_wrap=True)

    model, tokenizer = load_model_and_tokenizer(str(model_path))
    steps = _Steps(model, tokenizer, model_path, out_path / "python.memory", out, err)
    steps.build(corpus["memory"])
    tuned = steps.tune(corpus["tuning"])
    test = list(read_documents([corpus["test"]]))
    base, knn = steps.evaluate(corpus["test"])
    _say(
        out,
        "Generate",
        "continue prompts greedily, quoting at a low temperature, and name the sources",
    )
    writings = [steps.write(prompt) for prompt in PROMPTS]
    memory = Memory.open(steps.path)
    story = Story(
        python=platform.python_version(),
        model=model_path.name,
        ships=model_path == MODEL,
        parameters=model.num_parameters(),
        split=split,
        entries=memory.entries,
        tuned=tuned,
        base=base,
        knn=knn,
        passage=score_passage(model, tokenizer, memory, test[typical_document(base, knn)]),
        writings=writings,
        writing_temperature=TEMPERATURE,
        beside=None if model_path == MODEL else _beside(out_path, corpus, out, err),
        seconds=time.perf_counter() - started,
    )
    report = out_path / "report.html"
    with disk_errors_explained(out_path):
        write_atomically(report, render(story).encode())
    _say(out, "Report", f"{report}, after {story.seconds:.0f} s. Now with your own documents:")
    for words in YOUR_TURN:
        _show(out, *words)


def _beside(out_path: Path, corpus: dict[str, Path], out: Console, err: Console) -> Compared:
    """The same three steps with the model that ships."""
    out.print(Text("The same with the small model that ships with nearest\n", style="bold"))
    model, tokenizer = load_model_and_tokenizer(str(MODEL))
    steps = _Steps(model, tokenizer, MODEL, out_path / "python-small.memory", out, err)
    steps.build(corpus["memory"])
    steps.tune(corpus["tuning"])
    base, knn = steps.evaluate(corpus["test"])
    return Compared(MODEL.name, model.num_parameters(), base, knn)


@dataclass(frozen=True)
class _Steps:
    """What the commands do, one method a command: say it, do it, show what came of it."""

    model: PreTrainedModel
    tokenizer: Any
    source: Path
    path: Path
    out: Console
    err: Console

    def build(self, corpus: Path) -> None:
        _say(self.out, "Build", f"encode the topics with {self.source.name}, index every position")
        _show(
            self.out,
            "nearest",
            "build",
            str(self.source),
            str(corpus),
            "--out",
            str(self.path),
            "--no-tune",
        )
        _remove_earlier(self.path, self.model, corpus)
        with reports.live_progress(self.err) as progress:
            memory = Memory.build(
                self.model,
                self.tokenizer,
                read_documents([corpus]),
                self.path,
                tune=False,  # on other topics next
                progress=progress,
            )
        self.out.print(
            f"{memory.entries:,} entries: each a hidden state, and the token that came next\n"
        )

    def tune(self, text: Path) -> Tuned:
        _say(self.out, "Tune", "find the weight λ of the memory, temperature and k on other topics")
        _show(self.out, "nearest", "tune", str(self.path), "--text", str(text))
        with reports.live_progress(self.err) as progress:
            tuned = cast(  # kNN-LM has no gate to train
                Tuned,
                tune(
                    self.model,
                    Memory.open(self.path),
                    read_documents([text]),
                    tokenizer=self.tokenizer,
                    progress=progress,
                ),
            )
        found = tuned.settings
        self.out.print(
            f"λ {found.lam:g}, temperature {found.temperature:g}, k {found.k}: perplexity "
            f"{math.exp(tuned.base_nll):.1f} → {math.exp(tuned.nll):.1f} on {tuned.tokens:,} "
            "tokens\n"
        )
        return tuned

    def evaluate(self, text: Path) -> list[Result]:
        _say(self.out, "Evaluate", "predict topics that neither memory nor tuning has seen")
        _show(self.out, "nearest", "eval", str(self.path), "--text", str(text))
        with reports.live_progress(self.err) as progress:
            results = evaluate(
                self.model,
                Memory.open(self.path),
                read_documents([text]),
                ["base", "knn"],
                tokenizer=self.tokenizer,
                progress=progress,
            )
        self.out.print(reports.results_table(results), Text())
        return results

    def write(self, prompt: str) -> Writing:
        options = ("--sources", "--knn-temperature", f"{TEMPERATURE:g}")
        _show(self.out, "nearest", "generate", str(self.path), "--prompt", prompt, *options)
        memory = Memory.open(self.path)
        base, knn = (
            generate(
                self.model,
                self.tokenizer,
                memory,
                prompt,
                method=method,
                settings={"temperature": TEMPERATURE},
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
            for method in ("base", "knn")
        )
        self.out.print(reports.shaded_generation(knn, 3))
        alone = Text.assemble(("the model alone: ", "dim"), prompt, (base.text, "dim"), "\n")
        self.out.print(alone)
        return Writing(base, knn)


def _write_corpus(out_path: Path, split: Split) -> dict[str, Path]:
    folder = out_path / "corpus"
    files = {part: folder / f"{part}.jsonl" for part in ("memory", "tuning", "test")}
    with disk_errors_explained(out_path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise FolderError(
                f"{folder} cannot be made, a file is in the way: give --out another folder"
            ) from error
        for part, file in files.items():
            write_jsonl(file, getattr(split, part))
    return files


def _remove_earlier(path: Path, model: PreTrainedModel, corpus: Path) -> None:
    """Remove the memory that an earlier demo made, with this model or another, and nothing else."""
    if not (path / MANIFEST).exists():
        return  # building refuses a folder that holds anything else
    try:
        mine = read_manifest(path).model.fingerprint == model_fingerprint(model)
        if not mine:
            memory = Memory.open(path)
            ids = {memory.document(number).id for number in range(memory.documents)}
            mine = ids == {document.id for document in read_documents([corpus])}
    except FolderError as error:
        raise FolderError(
            f"{path} is in the way, and cannot be told to be an earlier demo's ({error}): remove "
            "it, or give --out another folder"
        ) from error
    if path.is_symlink() or not mine:
        raise FolderError(f"{path} was not made by the demo: give --out another folder")
    with disk_errors_explained(path):
        shutil.rmtree(path)


def _say(out: Console, step: str, what: str) -> None:
    out.print(Text.assemble((step, "bold"), " – ", what))


def _show(out: Console, *words: str) -> None:
    out.print(Text("$ " + shlex.join(words), style="cyan"), soft_wrap=True)
