"""Commands that make a plan and run a model by it."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import demo as demo_
from .. import doctor as doctor_
from .. import models, patch
from ..bench import timing
from ..calibration import TOKENS_MAX, sketching
from ..calibration import calibrate as calibrate_
from ..engine import Engine, Stream
from ..plan import Plan
from ..report import tables
from ..sketches import Sketch
from ..types import POOLED, UnsupportedModelError
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
    Task,
    Threads,
    Where,
    app,
    check_outputs,
    code,
    load,
    place,
    progress,
    read_documents,
    refuse_options,
    resumable,
    resumable_folder,
    write_json,
)

PlanOrNone = Annotated[
    pathlib.Path | None,
    typer.Argument(help="Plan made by csfast calibrate; not with --dense.", metavar="[PLAN]"),
]
SketchOrNone = Annotated[
    pathlib.Path | None,
    typer.Option(
        "--sketch",
        help="Folder of csfast sketch: on the CPU it drafts tokens, and the model checks them.",
        metavar="DIR",
    ),
]
Dense = Annotated[bool, typer.Option("--dense", help="Run the model as it is.")]
System = Annotated[
    str | None, typer.Option(help="System prompt: what the model is told before the chat.")
]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens to make, at most.")]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="How freely tokens are drawn; 0 takes the likeliest.")
]

OF_PLANS = ("density", "bits", "block", "task")  # options that say nothing without a plan
OF_DRAWS = ("temperature", "seed")


@app.command()
def demo(
    out: Annotated[pathlib.Path, typer.Option(help="Folder for plan and page.")] = pathlib.Path(),
    json_file: Json = None,
    device: Where = None,
    threads: Threads = None,
) -> None:
    """Do the whole job on the embedded model and show dense beside csfast."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"[demo] {str(out)!r}: want a folder.")
    out.mkdir(parents=True, exist_ok=True)
    check_outputs(out / demo_.PAGE, out / demo_.PLAN, json_file)
    results = demo_.run(out, Console(), place(device, threads))
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
    bits: Annotated[
        str,
        typer.Option(help="Sizes of the codes that neurons are chosen by, such as 2,3,ternary."),
    ] = "2,3",
    blocks: Annotated[
        str, typer.Option(help="Numbers of neurons to run or skip together, such as 1,16.")
    ] = "1",
    joint: Annotated[
        bool, typer.Option("--joint", help="Also for batches whose rows share the choice.")
    ] = (False),
    no_feedback: Annotated[
        bool, typer.Option("--no-feedback", help="Code each weight by itself, not to fit the text.")
    ] = False,
    part: Annotated[Part, typer.Option(help="Half of the data to use.")] = Part.SELECT,
    limit: Limit = None,
    device: Where = None,
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Find a model's codes and thresholds on sample text and write them to a plan."""
    clock = timing.Clock()
    check_outputs(out, inputs=(data,))
    with resumable("calibrate", out, resume=resume, overwrite=overwrite) as partial:
        samples = read_documents(data, part, limit)
        where = place(device, threads)
        net, tokenizer = load(model, where)
        with progress("calibrate") as advance:
            plan = calibrate_(
                net,
                samples,
                tokenizer,
                bits=[code(text) for text in bits.split(",")],
                blocks=[_size(text) for text in blocks.split(",")],
                joint=joint,
                feedback=not no_feedback,
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
def sketch(
    model: Model,
    out: Annotated[pathlib.Path, typer.Option("--out", "-o", help="Folder to write to.")],
    data: Data = None,
    bits: Annotated[
        str,
        typer.Option(
            help="Levels of bits such as 3+3,head=4+2, or the average of the first, such as 2.6."
        ),
    ] = sketching.DEFAULT,
    resume: Resume = False,
    overwrite: Overwrite = False,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to use, at most.")
    ] = sketching.TOKENS_MAX,
    part: Annotated[Part, typer.Option(help="Half of the data to use.")] = Part.SELECT,
    limit: Limit = None,
    device: Where = None,
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Code all weights of a model in few bits, fitted to sample text, into a folder."""
    clock = timing.Clock()
    wanted = sketching.check_bits(bits)
    with resumable_folder(
        "sketch",
        out,
        resume=resume,
        overwrite=overwrite,
        is_begun=sketching.is_begun,
        clear=sketching.clear,
    ):
        samples = read_documents(data, part, limit)
        where = place(device, threads)
        # Second moments in float32 on a CPU: sums of products of bfloat16 are slower there.
        net, tokenizer = load(model, where, dtype="float32" if where.type == "cpu" else "auto")
        with progress("sketch") as advance:
            made = sketching.make(
                net,
                samples,
                tokenizer,
                out=out,
                bits=wanted,
                resume=resume,
                progress=advance,
                seed=seed,
                max_tokens=tokens,
            )
    stored = made.bits()
    Console().print(
        f"{out}: {len(made.matrices)} matrices, {stored['stored']:.2f} bits a weight stored, "
        f"{stored['read']:.2f} in the first level, {clock.seconds():.1f} s"
    )


@app.command()
def generate(
    context: typer.Context,
    model: Model,
    plan: PlanOrNone = None,
    sketch: SketchOrNone = None,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask the prompt by the model's chat template.")
    ] = False,
    system: System = None,
    density: Density = 0.5,
    bits: Bits = "2",
    block: Block = 1,
    task: Task = POOLED,
    dense: Dense = False,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Where = None,
    threads: Threads = None,
) -> None:
    """Continue a prompt, or answer it with --chat, streaming the text."""
    if sketch is not None:
        check_sketched(context, plan, device)
    elif plan is None and not dense:
        raise ValueError("[generate] no plan: want one, --sketch or --dense.")
    if not prompt:
        raise ValueError("[generate] an empty prompt: want text, by --prompt.")
    if system is not None and not chat:
        raise ValueError("[generate] --system without --chat: want both, or none.")
    where = place(device if sketch is None else DeviceName.CPU, threads)
    codes = None if sketch is None else Sketch.load(sketch)
    net, tokenizer = load(model, where)
    given: str | list[models.Message] = prompt
    if chat:
        want_template(model, tokenizer)
        before = [] if system is None else [{"role": "system", "content": system}]
        given = [*before, {"role": "user", "content": prompt}]
    elif models.has_template(tokenizer):
        typer.echo(
            "csfast: this model has a chat template: --chat asks it the prompt, without which the "
            "prompt is only continued.",
            err=True,
        )
    if codes is not None:
        engine = Engine(net, codes, tokenizer=tokenizer)
        ids = models.prompt_ids(tokenizer, given)
        say_drafted(drafting(engine, ids, max_new_tokens, dense=dense), stoppable=False)
        return
    applied(net, None if dense else plan, density=density, bits=bits, block=block, task=task)
    clock = timing.Clock()
    pieces = models.stream_text(
        net,
        tokenizer,
        given,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    say(pieces, stoppable=False)
    counted = None if plan is None or dense else patch.stats(net)
    share = 1.0 if counted is None else counted.density
    calls = {} if counted is None else {k: n for k, n in counted.dense.items() if k != "prompt"}
    others = "".join(f", {n} calls of layers dense ({reason})" for reason, n in calls.items())
    typer.echo(
        f"csfast: {clock.seconds():.1f} s, {share:.2f} of the neurons executed{others}.", err=True
    )


@app.command()
def doctor() -> None:
    """Say what this machine offers and whether csfast works on it."""
    findings = doctor_.examine()
    Console().print(tables.findings(findings))
    if any(finding.is_fault for finding in findings):
        raise typer.Exit(1)


def want_template(model: str, tokenizer: Any) -> None:
    """Refuse a model that cannot be talked with, by the name it was asked for."""
    if not models.has_template(tokenizer):
        raise UnsupportedModelError(
            f"[chat] {model}: has no chat template: want an instruct model; csfast generate "
            "without --chat continues a text."
        )


def applied(
    net: Any, plan: pathlib.Path | None, *, density: float, bits: str, block: int, task: str
) -> None:
    """Apply a plan from a file, if there is one."""
    if plan is not None:
        loaded = Plan.load(plan)
        patch.apply(net, loaded, density=density, bits=code(bits), block=block, task=task)


def check_sketched(
    context: typer.Context, plan: pathlib.Path | None, device: DeviceName | None
) -> None:
    """Refuse what the engine, which runs a model with its sketch, does not have."""
    if plan is not None:
        raise typer.BadParameter("both PLAN and --sketch: want one of them.", ctx=context)
    if device is DeviceName.CUDA:
        raise typer.BadParameter(
            "the engine of --sketch runs on the CPU only: want cpu, or it left out.",
            ctx=context,
            param_hint="'--device'",
        )
    refuse_options(context, OF_PLANS, "it has no meaning for sketches")
    refuse_options(context, OF_DRAWS, "the engine of --sketch takes the likeliest token")


def drafting(engine: Engine, ids: list[int], max_new_tokens: int, *, dense: bool) -> Stream:
    """Let the engine continue a prompt, with drafts or without any."""
    if dense:
        return engine.stream(ids, max_new_tokens=max_new_tokens, longest=0, lookup=False)
    return engine.stream(ids, max_new_tokens=max_new_tokens)


def say_drafted(stream: Stream, *, stoppable: bool) -> str:
    """Print what the engine makes as it comes, and a line of how it came; give the text."""
    clock = timing.Clock()
    began: list[tuple[float, int]] = []  # when the first text came, and with how many tokens

    def pieces() -> Iterator[str]:
        for piece in stream:
            if not began:
                began.append((clock.seconds(), len(stream.result().ids)))
            yield piece

    text = say(pieces(), stoppable=stoppable)
    seconds = clock.seconds()
    made = stream.result()
    parts = [f"{len(made.ids)} tokens"]
    if began:
        first, n_first = began[0]
        parts.append(f"the first after {first:.2f} s")
        if len(made.ids) > n_first:
            parts.append(f"then {(len(made.ids) - n_first) / (seconds - first):.1f} tokens/s")
    if made.checks:
        n_checked = len(made.ids) - 1  # the first is the prompt's own
        parts.append(f"{n_checked / made.checks:.2f} tokens a check")
        for how in ("drafted", "looked up"):
            parts.append(f"{made.effort.count(how) / n_checked:.2f} {how}")
    typer.echo(f"csfast: {', '.join(parts)}.", err=True)
    return text


def say(pieces: Iterator[str], *, stoppable: bool) -> str:
    """Print text as it comes and give it whole; Ctrl-C may end it, or the command."""
    said: list[str] = []
    try:
        for piece in pieces:
            said.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not stoppable:
            raise
    sys.stdout.write("\n")
    sys.stdout.flush()
    return "".join(said)


def _size(text: str) -> int:
    """The size of block that a text names."""
    if not text.isdecimal():
        raise ValueError(f"[calibrate] blocks = {text!r}: want whole numbers, such as 1,16.")
    return int(text)
