"""The command that talks: turn by turn, with all that was said before."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import typer

from .. import models
from ..engine import Engine
from ..sketches import Sketch
from ..types import POOLED
from .app import (
    Bits,
    Block,
    Density,
    DeviceName,
    Model,
    Seed,
    Task,
    Threads,
    Where,
    app,
    load,
    place,
)
from .run import (
    Dense,
    NewTokens,
    PlanOrNone,
    SketchOrNone,
    System,
    Temperature,
    applied,
    check_sketched,
    drafting,
    say,
    say_drafted,
    want_template,
)


@app.command()
def chat(
    context: typer.Context,
    model: Model,
    plan: PlanOrNone = None,
    sketch: SketchOrNone = None,
    system: System = None,
    density: Density = 0.5,
    bits: Bits = "2",
    block: Block = 1,
    task: Task = POOLED,
    dense: Dense = False,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Where = None,
    threads: Threads = None,
) -> None:
    """Talk with an instruct model; lines from a pipe are a turn each.

    Ctrl-C stops an answer, Ctrl-D leaves. Without a plan or a sketch the model runs dense.
    """
    if sys.stdin is None:
        raise OSError("[chat] stdin is closed: want a terminal, or a turn a line.")
    if sketch is not None:
        check_sketched(context, plan, device)
    where = place(device if sketch is None else DeviceName.CPU, threads)
    codes = None if sketch is None else Sketch.load(sketch)
    net, tokenizer = load(model, where)
    want_template(model, tokenizer)
    engine = None if codes is None else Engine(net, codes, tokenizer=tokenizer)
    if engine is None:
        applied(net, None if dense else plan, density=density, bits=bits, block=block, task=task)
    if engine is None and plan is None and not dense:
        typer.echo("csfast: no plan, so the model runs dense.", err=True)
    messages: list[models.Message] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    for text in _turns():
        messages.append({"role": "user", "content": text})
        room = _room(net, tokenizer, messages, max_new_tokens)
        if engine is not None:
            ids = models.prompt_ids(tokenizer, messages)
            said = say_drafted(drafting(engine, ids, room, dense=dense), stoppable=True)
        else:
            pieces = models.stream_text(
                net,
                tokenizer,
                messages,
                max_new_tokens=room,
                temperature=temperature,
                seed=seed,
            )
            said = say(pieces, stoppable=True)
        messages.append({"role": "assistant", "content": said})


def _turns() -> Iterator[str]:
    """What the user says, a line each, until the input ends; empty lines say nothing."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
        return
    typer.echo("csfast: Ctrl-C stops an answer, Ctrl-D leaves.", err=True)
    while True:
        try:
            line = input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            typer.echo("\ncsfast: Ctrl-D leaves.", err=True)
            continue
        if line.strip():
            yield line.strip()


def _room(net: Any, tokenizer: Any, messages: list[models.Message], most: int) -> int:
    """How many tokens an answer may have after all that was said."""
    length = models.context_length(net)
    if length is None:
        return most
    n_tokens = len(models.prompt_ids(tokenizer, messages))
    if n_tokens >= length:
        raise ValueError(
            f"[chat] {n_tokens} tokens were said, and the model's context is of {length}: want a "
            "shorter chat; begin a new one."
        )
    return min(most, length - n_tokens)
