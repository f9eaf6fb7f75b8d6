"""Commands that make a plan and run a model by it."""

from __future__ import annotations

import pathlib
import sys
from typing import Annotated

import typer
from rich.console import Console

from .. import demo as demo_
from .. import doctor as doctor_
from .. import models, patch
from ..bench import timing
from ..calibration import TOKENS_MAX
from ..calibration import calibrate as calibrate_
from ..plan import Plan
from ..report import tables
from ..types import POOLED
from .app import (
    Bits,
    Block,
    Data,
    Density,
    DeviceName,
    Json,
    Limit,
    Model,
    Overwrite,
    Part,
    Resume,
    Seed,
    Where,
    app,
    check_outputs,
    code,
    load,
    progress,
    read_documents,
    resumable,
    write_json,
)


@app.command()
def demo(
    out: Annotated[pathlib.Path, typer.Option(help="Folder for plan and page.")] = pathlib.Path(),
    json_file: Json = None,
) -> None:
    """Do the whole job on the embedded model and show dense beside csfast."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"[demo] {str(out)!r}: want a folder.")
    out.mkdir(parents=True, exist_ok=True)
    check_outputs(out / demo_.PAGE, out / demo_.PLAN, json_file)
    results = demo_.run(out, Console())
    write_json(json_file, results)


@app.command()
def calibrate(
    model: Model,
    data: Data = None,
    out: Annotated[pathlib.Path, typer.Option(help="Where to write the plan.")] = pathlib.Path(
        "csfast.plan.safetensors"
    ),
    resume: Resume = False,
    overwrite: Overwrite = False,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to use, at most.")] = TOKENS_MAX,
    bits: Annotated[str, typer.Option(help="Codes of the sensor, such as 2,3,ternary.")] = "2,3",
    blocks: Annotated[str, typer.Option(help="Sizes of block, such as 1,16.")] = "1",
    joint: Annotated[bool, typer.Option("--joint", help="For batches with one support too.")] = (
        False
    ),
    feedback: Annotated[
        bool, typer.Option(help="Fit codes to the text; without, each weight by itself.")
    ] = True,
    part: Annotated[Part, typer.Option(help="Half of the data to use.")] = Part.SELECT,
    limit: Limit = None,
    device: Where = DeviceName.CPU,
    seed: Seed = 0,
) -> None:
    """Find a model's codes and thresholds on sample text and write them to a plan."""
    clock = timing.Clock()
    check_outputs(out)
    with resumable("calibrate", out, resume=resume, overwrite=overwrite) as partial:
        samples = read_documents(data, part, limit)
        net, tokenizer = load(model, device)
        with progress("calibrate") as advance:
            plan = calibrate_(
                net,
                samples,
                tokenizer,
                bits=[code(text) for text in bits.split(",")],
                blocks=[_size(text) for text in blocks.split(",")],
                joint=joint,
                feedback=feedback,
                seed=seed,
                resume=partial,
                progress=advance,
                max_tokens=tokens,
            )
        plan.save(out)
    Console().print(
        f"{out}: {len(plan.layers)} layers, {sum(plan.n_tokens.values())} tokens, "
        f"{out.stat().st_size:,} bytes, {clock.seconds():.1f} s"
    )


@app.command()
def generate(
    model: Model,
    plan: Annotated[pathlib.Path | None, typer.Argument(help="Plan; not with --dense.")] = None,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    density: Density = 0.5,
    bits: Bits = "2",
    block: Block = 1,
    task: Annotated[str, typer.Option(help="Thresholds: pooled, or a task's.")] = POOLED,
    dense: Annotated[bool, typer.Option("--dense", help="Run the model as it is.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest.")] = 0.0,
    seed: Seed = 0,
    device: Where = DeviceName.CPU,
) -> None:
    """Continue a prompt, streaming the text."""
    if plan is None and not dense:
        raise ValueError("[generate] no plan: want one, or --dense.")
    net, tokenizer = load(model, device)
    if plan is not None and not dense:
        loaded = Plan.load(plan)
        patch.apply(net, loaded, density=density, bits=code(bits), block=block, task=task)
    clock = timing.Clock()
    for piece in models.stream_text(
        net,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    ):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    share = 1.0 if plan is None or dense else patch.stats(net).density
    typer.echo(f"csfast: {clock.seconds():.1f} s, {share:.2f} of the neurons executed.", err=True)


@app.command()
def doctor() -> None:
    """Say what this machine offers and whether csfast works on it."""
    findings = doctor_.examine()
    Console().print(tables.findings(findings))
    if any(finding.is_fault for finding in findings):
        raise typer.Exit(1)


def _size(text: str) -> int:
    """The size of block that a text names."""
    if not text.isdecimal():
        raise ValueError(f"[calibrate] blocks = {text!r}: want whole numbers, such as 1,16.")
    return int(text)
