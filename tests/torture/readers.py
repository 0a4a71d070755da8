"""Eight processes that evaluate while one adds, removes and compacts."""

import json
import os
import time
from pathlib import Path
from typing import Any

from memories import DOCUMENTS, MODEL, TEXT, furnish
from nearest import Document, Memory, evaluate

PROCESSES, SECONDS = 8, 300


def measured(memory: Memory) -> str:
    """The nll of a text by two methods, to every digit."""
    results = evaluate(
        MODEL[0], memory, TEXT, ["retomaton", "suffix"], tokenizer=MODEL[1], k=8, suffix_k=20
    )
    return json.dumps([result.nll for result in results])


def read(path: Path, out: Path, until: float) -> None:
    """Evaluate the newest generation again and again, and write down what came."""
    memory = Memory.open(path)
    with out.open("w") as file:
        while True:
            memory = memory.refresh()
            file.write(f"{memory.manifest.version}\t{measured(memory)}\n")
            if time.time() >= until:
                break


def readers(folder: Path, share: float) -> dict[str, Any]:
    """Every answer is that of a committed generation."""
    path = folder / "memory"
    furnish(path)
    until = time.time() + SECONDS * share
    children = []
    for number in range(PROCESSES):
        child = os.fork()
        if not child:
            code = 1
            try:
                read(path, folder / f"{number}.txt", until)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    memory = Memory.open(path)
    expected = {memory.manifest.version: measured(memory)}
    number = 0
    while time.time() < until:
        number += 1
        step = number % 5
        if step < 3:
            memory = memory.add(*MODEL, [Document(f"n{number}", DOCUMENTS[number % 9].text[::-1])])
        elif step == 3:
            memory = memory.remove([f"n{number - 1}"])
        else:
            memory = memory.compact()
        expected[memory.manifest.version] = measured(memory)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    seen = []
    for reader in range(PROCESSES):
        for line in (folder / f"{reader}.txt").read_text().splitlines():
            generation, answer = line.split("\t")
            assert expected[int(generation)] == answer
            seen.append(int(generation))
    return {"evaluations": len(seen), "generations": len(expected), "seen": len(set(seen))}
