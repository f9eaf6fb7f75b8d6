"""The whole job on the embedded model, dense beside csfast at every step.

Everything shown is computed here and now: thresholds from one half of the shipped text, texts and
losses from the other, times in turns.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import doctor, documents, models, patch
from .bench import layers, timing
from .bench.timed import LayerCase
from .calibration import calibrate
from .judge import evaluate
from .plan import Plan
from .report import page as page_
from .report import panels, tables, words
from .types import Document

PAGE, PLAN = "csfast-demo.html", "csfast-demo.plan.safetensors"
DENSITY = 0.5
BITS = 2
NEW_TOKENS = 32  # of one text
PROMPT_WORDS = 60  # of a plain text
SAMPLES = (
    "Of every task the first text of the half that nothing was chosen on, in the order of the "
    f"file: its prompt, or the first {PROMPT_WORDS} words of a plain text; at most {NEW_TOKENS} "
    "new tokens, the likeliest each time."
)
EVAL_TOKENS = 1000  # scored of every task: a first look, `csfast eval` takes four times as many
EVAL_ANSWERS = 8  # decoded of every task that has short ones


def run(folder: pathlib.Path, console: Console, device: torch.device) -> dict[str, Any]:
    """Calibrate, generate, judge and time; write ``csfast-demo.html`` and the plan to `folder`.

    Args:
        folder: Exists; takes ``csfast-demo.html`` and ``csfast-demo.plan.safetensors``.
        console: Where it is shown.
        device: Where everything runs.

    Returns:
        What was measured: ``machine``, ``calibration``, ``samples`` (by which rule they were
        chosen), ``generation``, ``evaluation``, ``bench``, ``slower`` (a sentence for everything in
        which csfast lost) and ``seconds``; docs/schemas.md explains every key.
    """
    clock = timing.Clock()
    console.rule("doctor")
    console.print(tables.findings(doctor.examine()))

    console.rule("calibrate")
    model, tokenizer = models.load(models.demo_folder(), device=device)
    texts = documents.read(models.demo_folder() / "sample.jsonl")
    plan, calibration = _calibrate(model, tokenizer, texts, folder, console)

    console.rule(f"generate: {DENSITY:.0%} of the neurons, chosen by {words.code(BITS)}")
    reported = documents.split(texts, "report")
    generation = _generate(model, tokenizer, plan, _prompts(reported), console)

    console.rule("quality, on text that nothing was chosen on")
    with _bar(console) as bar:
        quality = evaluate.evaluate(
            model,
            tokenizer,
            plan,
            reported,
            density=DENSITY,
            bits=BITS,
            tokens=EVAL_TOKENS,
            retrieval_prompts=12,
            answers=EVAL_ANSWERS,
            progress=_mover(bar, "evaluate"),
        )
    console.print(tables.quality(quality))

    console.rule("time")
    console.print(_rates(generation))
    shape = plan.model.shapes[0]
    cases = [LayerCase(shape.d, shape.n_neurons, DENSITY), LayerCase(2048, 8192, 0.25)]
    with console.status("bench"):
        times = layers.run(
            cases, device=device, runs=15, variants=("complete",), n_layers=4, compiled=False
        )
    console.print(tables.speed(times))

    slower = _slower(generation, times["rows"])
    for sentence in slower:
        console.print(sentence, style="red", highlight=False)
    results = {
        "machine": times["machine"],
        "calibration": calibration,
        "samples": SAMPLES,
        "generation": generation,
        "evaluation": quality,
        "bench": times["rows"],
        "slower": slower,
        "seconds": clock.seconds(),
    }
    page = folder / PAGE
    page_.write_report(page, evaluation=quality, demo=results)
    console.print(panels.demo_verdict(results), style="bold", highlight=False)
    console.print(f"{page} written; {results['seconds']:.0f} s in all.")
    return results


def _calibrate(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Document],
    folder: pathlib.Path,
    console: Console,
) -> tuple[Plan, dict[str, Any]]:
    """Make the plan, save it, and give it with what it took."""
    clock = timing.Clock()
    with _bar(console) as bar:
        plan = calibrate(
            model,
            documents.split(texts, "select"),
            tokenizer,
            progress=_mover(bar, "calibrate"),
        )
    path = folder / PLAN
    plan.save(path)
    found = {
        "seconds": clock.seconds(),
        "tokens": sum(plan.n_tokens.values()),
        "plan_bytes": path.stat().st_size,
    }
    console.print(
        f"{found['tokens']} tokens in {found['seconds']:.1f} s; {path.name} has "
        f"{found['plan_bytes'] / 2**20:.2f} MiB"
    )
    return plan, found


def _bar(console: Console) -> Progress:
    """Give a bar that leaves nothing behind, and nothing at all in a file or a pipe."""
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _mover(bar: Progress, name: str) -> Callable[[int, int], None]:
    """Give what moves a new line of the bar."""
    task = bar.add_task(name, total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)


def _prompts(texts: Sequence[Document]) -> Iterator[tuple[str, str]]:
    """Give (task, prompt) for every task, by the rule that `SAMPLES` states."""
    for document in documents.few(texts, 1):
        plain = " ".join(document.response.split(" ")[:PROMPT_WORDS])
        yield document.group, document.prompt or plain


def _generate(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    prompts: Iterator[tuple[str, str]],
    console: Console,
) -> list[dict[str, Any]]:
    """Continue every prompt by the dense model and by csfast, streaming both."""
    patch.apply(model, plan, density=DENSITY, bits=BITS)
    found = []
    for task, prompt in prompts:
        shown = prompt if len(prompt) <= 300 else "... " + prompt[-300:]
        console.print(f"{task}: {shown}", style="dim", markup=False, highlight=False)
        with patch.dense(model):
            dense = _stream(model, tokenizer, prompt, "dense", console)
        sparse = _stream(model, tokenizer, prompt, "csfast", console)
        found.append(
            {"task": task, "prompt": prompt, "dense": dense, "csfast": sparse}
            | {"same_text": dense["text"] == sparse["text"]}
        )
    patch.remove(model)
    return found


def _stream(model: Any, tokenizer: Any, prompt: str, name: str, console: Console) -> dict[str, Any]:
    """Stream one continuation; seconds are counted from the first piece on, after the prompt."""
    console.print(f"{name:>6}: ", style="bold", end="")
    pieces: list[str] = []
    clock = timing.Clock()
    for piece in models.stream_text(model, tokenizer, prompt, max_new_tokens=NEW_TOKENS):
        if not pieces:
            clock = timing.Clock()
        pieces.append(piece)
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    seconds = clock.seconds()
    console.print()
    text = "".join(pieces)
    after_first = len(tokenizer.encode(text, add_special_tokens=False)) - 1
    return {
        "text": text,
        "seconds": seconds,
        "tokens_per_second": after_first / seconds if after_first > 0 else None,
    }


def _rates(generation: Sequence[dict[str, Any]]) -> Table:
    """Give the time of a token of the generated texts, in milliseconds."""
    table = Table("task", "dense, ms a token", "csfast, ms a token", "same text", "against dense")
    for row in generation:
        ratio = _rate_ratio(row)
        table.add_row(
            row["task"],
            *("-" if r is None else f"{1000 / r:.2f}" for r in _both_rates(row)),
            "yes" if row["same_text"] else "no",
            "too short to tell" if ratio is None else tables.verdict(ratio),
        )
    return table


def _both_rates(row: dict[str, Any]) -> tuple[float | None, float | None]:
    return row["dense"]["tokens_per_second"], row["csfast"]["tokens_per_second"]


def _rate_ratio(row: dict[str, Any]) -> float | None:
    """Give how many times as many tokens csfast gives in a second, if both gave enough."""
    dense, sparse = _both_rates(row)
    return None if dense is None or sparse is None else sparse / dense


def _slower(generation: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Give a sentence for everything in which csfast lost against dense."""
    named = [(f"{row['task']} text", _rate_ratio(row)) for row in generation]
    named += [(f"a layer of {words.case(r['case'])}", r["ratio_vs_dense"]) for r in rows]
    return [
        f"csfast is slower here: {name} takes {1 / ratio:.2f} times as long as dense."
        for name, ratio in named
        if ratio is not None and ratio < 1
    ]
