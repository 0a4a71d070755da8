"""Commands that continue a prompt, and that show everything."""

import json
from pathlib import Path
from typing import Annotated

import typer

from nearest import reports
from nearest.cli.app import err, open_with_model, opened_beside, out, quiet_libraries
from nearest.cli.options import (
    AsJson,
    Force,
    MemoryPath,
    MethodSettings,
    MoreMemories,
    Opening,
    given,
    numbers,
)


def generate(
    memory: MemoryPath,
    prompt: Annotated[
        str, typer.Option(help="Text to continue; the source, of an encoder–decoder.")
    ],
    method: Annotated[
        str, typer.Option(help="base, knn, retomaton, suffix, hybrid, knn+mixture …")
    ] = "knn",
    sources: Annotated[bool, typer.Option("--sources", help="Name the documents used.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 60,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams to search with.")] = 1,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy.")] = False,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    show: Annotated[int, typer.Option(min=1, help="Documents to show at most.")] = 5,
    *,
    opening: Opening,
    settings: MethodSettings,
    beside: MoreMemories,
    replay: Annotated[
        str, typer.Option(help='Positions of the prompt to look up before the last, or "full".')
    ] = "0",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt; with --sources, shade each token by how much the memory decided it."""
    quiet_libraries()
    import torch

    from nearest.verbs.generate import generate as continue_prompt

    opened, loaded, tokenizer = open_with_model(memory, opening)
    torch.manual_seed(seed)
    generation = continue_prompt(
        loaded,
        tokenizer,
        opened_beside(opened, beside),
        prompt,
        method=method,
        weights=numbers(beside.weights, "weights", "0.7,0.3"),
        sources=sources,
        force=force,
        replay=int(replay) if replay.isdecimal() else replay,
        settings=given(**vars(settings)),
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=sample,
    )
    if as_json:
        typer.echo(json.dumps(generation.to_dict()))
    else:
        out.print(reports.shaded_generation(generation, show))


def demo(
    out_path: Annotated[
        Path, typer.Option("--out", help="Folder for the memory and report.")
    ] = Path("demo"),
) -> None:
    """The whole story offline, in minutes: build, tune, evaluate, generate, report.html."""
    quiet_libraries()
    from nearest.demo.run import run_demo

    run_demo(out_path, out, err)
