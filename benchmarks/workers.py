"""A build by one process and by several, each with one thread: seconds, RAM of the driver, bytes.

`cpu_seconds` are those of all processes together: what sharing the work itself costs shows there,
whatever else the machine does.

Law's first documents, in segments of `--segment-tokens`; one command a build, in turns. Each size
of `--tokens` is built by each number of `--workers` (0: the command alone), and every file but the
manifest's times is compared with the first build. With `--keys none` there is no forward pass, so
that larger corpora can be tried. With `--ray local` workers run on a Ray cluster of this machine.

    OMP_NUM_THREADS=1 python benchmarks/workers.py [--tokens 100000,400000] [--workers 0,1,2]
"""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from common import MODEL, arguments, first_documents, machine, model_and_tokenizer, report
from nearest.store.manifest import MANIFEST


def corpus_of(options: object, tokenizer: object, tokens: int) -> Path:
    path = options.work / f"law-{tokens}.jsonl"
    documents = first_documents(options.corpora / "dclaw" / "train.jsonl", tokenizer, tokens)
    rows = (json.dumps({"id": d.id, "text": d.text}) + "\n" for d in documents)
    path.write_text("".join(rows), encoding="utf-8")
    return path


def built(corpus: Path, out: Path, workers: int, options: object) -> dict[str, float]:
    """Seconds, those of all its processes on a core, and the most RAM that the command held."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "nearest", "build", MODEL, corpus, "--out", out, "--no-tune"]
    command += ["--segment-tokens", str(options.segment_tokens), "--keys", options.keys]
    command += ["--workers", str(workers)] if workers else []
    command += ["--ray", options.ray] if workers and options.ray else []
    started, most, before = time.perf_counter(), 0, cpu_of_children()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    ended = threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.1):
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            held = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
            most = max(most, *held, 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    ended.set()
    watcher.join()
    if status:
        raise SystemExit(f"the build with {workers} workers ended with {status}")
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": cpu_of_children() - before,
        "driver_mb": most / 1e3,
    }


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def digests(memory: Path) -> dict[str, str]:
    files = (path for path in sorted(memory.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(memory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != MANIFEST
    }


def main() -> None:
    options = arguments(
        __doc__,
        tokens="100000,400000",
        workers="0,1,2",
        segment_tokens=50_000,
        rounds=1,
        keys="int8",
        ray="",
    )
    _, tokenizer = model_and_tokenizer()
    counts = [int(count) for count in options.workers.split(",")]
    report(**machine(), omp=os.environ.get("OMP_NUM_THREADS"))
    for tokens in map(int, options.tokens.split(",")):
        corpus = corpus_of(options, tokenizer, tokens)
        for round_ in range(options.rounds):
            first: dict[str, str] | None = None
            seconds: list[float] = []
            for count in counts:
                out = options.work / f"workers-{count}.memory"
                cost = built(corpus, out, count, options)
                seconds.append(cost["seconds"])
                made = digests(out)
                first = first or made
                report(
                    tokens=tokens,
                    round=round_,
                    workers=count,
                    **cost,
                    speed_up=seconds[0] / seconds[-1],
                    same_bytes=made == first,
                )


if __name__ == "__main__":
    main()
