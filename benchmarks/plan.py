"""What `nearest build --plan` says beside what then happens, each in a process of its own.

Memory is what the process holds itself (RssAnon), at most and beyond what it held once the model
was loaded: mapped files are in memory only as long as there is room.

    python benchmarks/plan.py
    python benchmarks/plan.py --only "wikitext2 valid"
"""

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from common import MODEL, arguments, machine, report

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "wikitext2 valid": ("wikitext2/valid.jsonl", {"keys": "none"}),
    "wikitext2 train": ("wikitext2/train.jsonl", {"keys": "none"}),
    "dclaw train": ("dclaw/train.jsonl", {"keys": "none"}),
    "one document": ("one.txt", {"keys": "none"}),
    "dclaw valid, fp16": ("dclaw/valid.jsonl", {"keys": "fp16"}),
    "dclaw test, int8": ("dclaw/test.jsonl", {"keys": "int8"}),
}


def main() -> None:
    options = arguments(__doc__, only="", child="")
    if options.child:
        what, corpus, settings = json.loads(options.child)
        child(what, corpus, settings, options.work)
        return
    one = options.work / "one.txt"
    lines = (options.corpora / "wikitext2" / "train.jsonl").read_text().splitlines()
    one.write_text("\n".join(json.loads(line)["text"] for line in lines))
    for name, (corpus, settings) in RUNS.items():
        if options.only and name != options.only:
            continue
        path = one if corpus == one.name else options.corpora / corpus
        said, found = (in_process(what, path, settings) for what in ("plan", "build"))
        keys = said.keys() & found.keys()
        ratios = {key: said[key] / found[key] for key in sorted(keys) if found[key]}
        report(corpus=name, said=said, found=found, said_by_found=ratios)
    report(**machine())


def in_process(what: str, corpus: Path, settings: dict[str, Any]) -> dict[str, float]:
    call = [sys.executable, __file__, "--child", json.dumps([what, str(corpus), settings])]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(what: str, corpus: str, settings: dict[str, Any], work: Path) -> None:
    from nearest import Memory, read_documents
    from nearest.build.build import BuildOptions, planned_memory
    from nearest.encode.loading import load_model_and_tokenizer

    model, tokenizer = load_model_and_tokenizer(str(MODEL), device="cpu")
    path = work / "planned.memory"
    shutil.rmtree(path, ignore_errors=True)
    documents, before, started = read_documents([corpus]), held(), time.perf_counter()
    if what == "plan":
        found = planned_memory(path, documents, model, tokenizer, BuildOptions(**settings))
        report(
            entries=found.entries,
            disk_mb=found.bytes_needed / 1e6,
            memory_mb=found.memory_bytes / 1e6,
            seconds=found.seconds,
            **{f"{name} s": seconds for name, seconds in found.stages.items()},
            plan_seconds=time.perf_counter() - started,
        )
        return
    most, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], held())

    thread = threading.Thread(target=watch)
    thread.start()
    stages: dict[str, float] = {}
    last = started

    def progress(stage: str, _done: int, _total: int | None) -> None:
        nonlocal last
        now = time.perf_counter()
        name = f"{stage.split(' IVF')[0]} s"
        stages[name], last = stages.get(name, 0.0) + now - last, now

    memory = Memory.build(model, tokenizer, documents, path, progress=progress, **settings)
    seconds = time.perf_counter() - started
    done.set()
    thread.join()
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    report(
        entries=memory.entries,
        disk_mb=size / 1e6,
        memory_mb=(most[0] - before) / 1e6,
        seconds=seconds,
        **stages,
    )


def held() -> int:
    """Bytes of memory that the process holds itself."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
