"""The command line: one command for every job, one clear line for every mistake."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

from .. import demo as demo_
from .. import doctor as doctor_
from .. import documents, models, ops, patch
from .._version import __version__
from ..bench import layers as bench_
from ..bench import pursuits as bench_omp_
from ..bench import timing
from ..calibration import TOKENS_MAX
from ..calibration import calibrate as calibrate_
from ..files import write_atomic
from ..judge import dictionaries as dictionaries_
from ..judge import effort
from ..judge import phase as phase_
from ..judge.ablate import ablate as ablate_
from ..judge.evaluate import evaluate
from ..plan import Plan
from ..report import page, panels, tables
from ..report import results as results_
from ..types import POOLED, Code, Document

USAGE_ERROR = 2  # exit code of a command that was given something it cannot use
INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended


class Part(StrEnum):
    """Half of a data file: nothing is chosen on ``report``, nothing is reported on ``select``."""

    SELECT = "select"
    REPORT = "report"
    ALL = "all"


class DeviceName(StrEnum):
    """Where to run."""

    CPU = "cpu"
    CUDA = "cuda"


class Operation(StrEnum):
    """What to measure."""

    FFN = "ffn"
    EXECUTE = "execute"
    SELECT = "select"
    SENSE = "sense"
    NESTED = "nested"
    OMP = "omp"


class Commands(TyperGroup):
    """The commands, with errors that a user can mend put in one line."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command; give typed errors exit code 2 and Ctrl-C exit code 130."""
        try:
            with _log_on_stderr():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("csfast: interrupted.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader has seen enough, as in `csfast ... | head`; the rest has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except (ValueError, TypeError, OSError, MemoryError, ops.BackendError) as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"csfast: {error}", err=True)
            raise typer.Exit(USAGE_ERROR) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Dynamic sparse LLM inference: sense, recover, tile, execute.",
)

Model = Annotated[
    str, typer.Argument(help="Folder or cached name of a model, or the word demo.", metavar="MODEL")
]
PlanFile = Annotated[pathlib.Path, typer.Argument(help="Plan made by csfast calibrate.")]
Data = Annotated[
    pathlib.Path | None,
    typer.Option("--data", help=".jsonl, .jsonl.xz or .txt; the shipped sample if left out."),
]
Density = Annotated[float, typer.Option(help="Fraction of neurons to execute, in (0, 1].")]
Bits = Annotated[
    str, typer.Option(help="Code of the sensor: 1 to 4 bits, or ternary; the plan must hold it.")
]
Block = Annotated[int, typer.Option(help="Neurons kept or skipped as one; the plan must hold it.")]
Json = Annotated[pathlib.Path | None, typer.Option("--json", help="Write the results here.")]
Html = Annotated[pathlib.Path | None, typer.Option("--html", help="Write a page here.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Documents of every task, at most.")]
Where = Annotated[DeviceName, typer.Option("--device", help="Where to run.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]


def main() -> None:
    """Run the command line; the console script's entry point."""
    try:
        app()
    except SystemExit as done:
        if done.code == INTERRUPTED:
            # Python takes a second to take torch down, and files are whole already.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise


def _say_version(wanted: bool) -> None:
    """Print the version and stop, where no command need follow."""
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show where an error came from.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_say_version, help="Print the version."),
    ] = False,
) -> None:
    """Dynamic sparse LLM inference: sense, recover, tile, execute."""


@app.command()
def demo(
    out: Annotated[pathlib.Path, typer.Option(help="Folder for plan and page.")] = pathlib.Path(),
    json_file: Json = None,
) -> None:
    """Do the whole job on the embedded model and show dense beside csfast."""
    out.mkdir(parents=True, exist_ok=True)
    results = demo_.run(out, Console())
    _write_json(json_file, results)


@app.command()
def calibrate(
    model: Model,
    data: Data = None,
    out: Annotated[pathlib.Path, typer.Option(help="Where to write the plan.")] = pathlib.Path(
        "csfast.plan.safetensors"
    ),
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted run stopped.")] = False,
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
    samples = _documents(data, part, limit)
    net, tokenizer = _load(model, device)
    partial = out.with_name(out.name + ".partial")
    if not resume:
        partial.unlink(missing_ok=True)
    with _progress("calibrate") as advance:
        plan = calibrate_(
            net,
            samples,
            tokenizer,
            bits=[_code(text) for text in bits.split(",")],
            blocks=[_size(text) for text in blocks.split(",")],
            joint=joint,
            feedback=feedback,
            seed=seed,
            resume=partial,
            progress=advance,
            max_tokens=tokens,
        )
    plan.save(out)
    partial.unlink(missing_ok=True)
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
    net, tokenizer = _load(model, device)
    if plan is not None and not dense:
        loaded = Plan.load(plan)
        patch.apply(net, loaded, density=density, bits=_code(bits), block=block, task=task)
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


@app.command("eval")
def evaluate_(
    model: Model,
    plan: PlanFile,
    data: Data = None,
    density: Density = 0.5,
    bits: Bits = "2",
    block: Block = 1,
    task: Annotated[str, typer.Option(help="Thresholds: pooled, or a task's.")] = POOLED,
    part: Annotated[Part, typer.Option(help="Half of the data to use.")] = Part.REPORT,
    limit: Limit = None,
    tokens: Annotated[int, typer.Option(min=1, help="Scored tokens of every task.")] = 4000,
    json_file: Json = None,
    html_file: Html = None,
    device: Where = DeviceName.CPU,
    seed: Seed = 0,
) -> None:
    """Measure what sparsity costs: paired loss, divergence and agreement with the dense model."""
    samples = _documents(data, part, limit)
    loaded = Plan.load(plan)
    net, tokenizer = _load(model, device)
    with _progress("eval") as advance:
        results = evaluate(
            net,
            tokenizer,
            loaded,
            samples,
            density=density,
            bits=_code(bits),
            block=block,
            task=task,
            tokens=tokens,
            seed=seed,
            progress=advance,
        )
    Console().print(tables.quality(results))
    _write_json(json_file, _headed(results, device))
    if html_file is not None:
        page.write_report(html_file, evaluation=results)


@app.command()
def ablate(
    model: Model,
    data: Data = None,
    limit: Limit = None,
    tokens: Annotated[int, typer.Option(min=1, help="Scored tokens of every task.")] = 2000,
    methods: Annotated[
        str, typer.Option(help="full, quick, or names with commas between.", metavar="NAMES")
    ] = "full",
    bytes_: Annotated[
        str, typer.Option("--bytes", help="Fractions of the dense bytes.", metavar="FRACTIONS")
    ] = ".25,.35,.55,.75",
    resume: Annotated[
        bool, typer.Option(help="Go on where an interrupted run with this --json stopped.")
    ] = False,
    json_file: Json = None,
    html_file: Html = None,
    device: Where = DeviceName.CPU,
    seed: Seed = 0,
) -> None:
    """Compare csfast's selection with other rules and with quantisation, loss against bytes."""
    if resume and json_file is None:
        raise ValueError(
            "[ablate] --resume without --json: want the file of the run to go on with."
        )
    try:
        fractions = [float(part) for part in bytes_.split(",")]
    except ValueError as error:
        raise ValueError(
            f"[ablate] --bytes {bytes_!r}: want fractions with commas between."
        ) from error
    select = _documents(data, Part.SELECT, limit)
    kept = _documents(data, Part.REPORT, limit)
    net, tokenizer = _load(model, device, dtype="float32")  # rounding would blur small differences
    partial = None if json_file is None else json_file.with_name(json_file.name + ".partial")
    if partial is not None and not resume:
        partial.unlink(missing_ok=True)
    with _progress("ablate") as advance:
        results = ablate_(
            net,
            tokenizer,
            select,
            kept,
            methods=methods if methods in ("full", "quick") else methods.split(","),
            bytes_fractions=fractions,
            tokens=tokens,
            seed=seed,
            resume=partial,
            progress=advance,
        )
    table = Table("method", "density", "sensor", "bytes", "loss over dense, nats")
    for row in sorted(results["rows"], key=lambda row: (row["bytes_fraction"], row["delta"])):
        table.add_row(
            row["method"],
            f"{row['density']:.3f}",
            f"{row['sensor_fraction']:.3f}",
            f"{row['bytes_fraction']:.3f}",
            f"{row['delta']:+.4f}",
        )
    Console().print(table)
    _write_json(json_file, _headed(results, device))
    if partial is not None:
        partial.unlink(missing_ok=True)
    if html_file is not None:
        page.write_report(html_file, ablation=results)


@app.command()
def bench(
    operation: Annotated[Operation | None, typer.Argument(help="All but omp if left out.")] = None,
    device: Where = DeviceName.CPU,
    json_file: Json = None,
    quick: Annotated[bool, typer.Option("--quick", help="One small case, few runs.")] = False,
    commit: Annotated[str | None, typer.Option(help="Written beside the results.")] = None,
) -> None:
    """Time the operations of a layer beside the dense layer in torch, omp beside other pursuits."""
    if operation is Operation.OMP:
        _bench_omp(device, json_file, quick, commit)
        return
    names = {None: bench_.VARIANTS, Operation.FFN: ("complete",)}
    where = torch.device(device.value)
    settings: Sequence[bench_.Setting] = (
        bench_.CUDA_SETTINGS if where.type == "cuda" else bench_.CPU_SETTINGS
    )
    if quick:
        settings = (bench_.Setting(512, 1024, 0.25),)
    with _notes().status("bench") as status:
        results = bench_.run(
            settings,
            device=where,
            runs=5 if quick else 40,
            variants=names[operation] if operation in names else (str(operation),),
            compiled=not quick,
            progress=status.update,
            found=lambda results: _write_bench(json_file, results, commit),
        )
    Console().print(tables.speed(results))


def _write_bench(
    json_file: pathlib.Path | None, results: dict[str, Any], commit: str | None
) -> None:
    """Write what was measured so far."""
    results["machine"] |= {"command": _command(), "commit": commit}
    _write_json(json_file, results)


def _bench_omp(
    device: DeviceName, json_file: pathlib.Path | None, quick: bool, commit: str | None
) -> None:
    """Time orthogonal matching pursuit."""
    where = torch.device(device.value)
    with _notes().status("bench") as status:
        results = bench_omp_.run(
            bench_omp_.QUICK if quick else None,
            device=where,
            runs=3 if quick else 20,
            progress=status.update,
            found=lambda results: _write_bench(json_file, results, commit),
        )
    Console().print(tables.pursuits(results))


@app.command()
def doctor() -> None:
    """Say what this machine offers and whether csfast works on it."""
    findings = doctor_.examine()
    Console().print(tables.findings(findings))
    if any(finding.is_fault for finding in findings):
        raise typer.Exit(1)


@app.command()
def tokens(
    model: Model,
    plan: PlanFile,
    data: Data = None,
    density: Density = 0.5,
    bits: Bits = "2",
    task: Annotated[str, typer.Option(help="Thresholds: pooled, or a task's.")] = POOLED,
    generate: Annotated[
        bool, typer.Option("--generate", help="Continue the prompts instead of following the text.")
    ] = False,
    limit_tokens: Annotated[
        int, typer.Option("--tokens", min=3, help="Tokens of one text, at most.")
    ] = 160,
    part: Annotated[Part, typer.Option(help="Half of the data to use.")] = Part.REPORT,
    limit: Limit = None,
    json_file: Json = None,
    html_file: Html = None,
    device: Where = DeviceName.CPU,
    seed: Seed = 0,
) -> None:
    """Show what every token of a text cost, one text of every task."""
    samples = _documents(data, part, limit)
    loaded = Plan.load(plan)
    net, tokenizer = _load(model, device)
    with _progress("tokens") as advance:
        found = effort.examples(
            net,
            tokenizer,
            loaded,
            samples,
            density=density,
            bits=_code(bits),
            task=task,
            generate=generate,
            tokens=limit_tokens,
            seed=seed,
            progress=advance,
        )
    Console().print(tables.effort(found))
    _write_json(json_file, _headed(found, device))
    if html_file is not None:
        page.write_report(html_file, effort=found)


@app.command()
def phase(
    model: Model,
    data: Data = None,
    groups: Annotated[int, typer.Option(min=2, help="Groups of neurons a layer.")] = 128,
    steps: Annotated[int, typer.Option(min=2, help="Values of either axis.")] = 12,
    trials: Annotated[int, typer.Option(min=1, help="Signals of a cell.")] = 200,
    limit_tokens: Annotated[
        int, typer.Option("--tokens", min=2, help="Tokens of every task and part to look at.")
    ] = 400,
    limit: Limit = None,
    resume: Annotated[
        bool, typer.Option(help="Go on where an interrupted run with this --json stopped.")
    ] = False,
    json_file: Json = None,
    dictionaries_file: Annotated[
        pathlib.Path | None,
        typer.Option("--dictionaries", help="Write coherence and isometry of all layers here."),
    ] = None,
    html_file: Html = None,
    device: Where = DeviceName.CPU,
    seed: Seed = 0,
) -> None:
    """Measure which sparsity is recovered from how many measurements, and what theory promises."""
    if resume and json_file is None:
        raise ValueError("[phase] --resume without --json: want the file of the run to go on with.")
    select = _documents(data, Part.SELECT, limit)
    kept = _documents(data, Part.REPORT, limit)
    net, tokenizer = _load(model, device, dtype="float32")
    partial = None if json_file is None else json_file.with_name(json_file.name + ".partial")
    if partial is not None and not resume:
        partial.unlink(missing_ok=True)
    with _progress("capture") as advance:
        fit, shown = phase_.capture(
            net, tokenizer, select, kept, tokens=limit_tokens, seed=seed, progress=advance
        )
    with _progress("phase") as advance:
        found = phase_.diagrams(
            fit,
            shown,
            n_groups=groups,
            steps=steps,
            trials=trials,
            resume=partial,
            progress=advance,
        )
    with _progress("dictionaries") as advance:
        known = dictionaries_.analyse(fit, n_groups=groups, progress=advance)
    for sentence in (*panels.phase_findings(found), *panels.dictionary_findings(known)):
        Console().print(sentence)
    _write_json(json_file, _headed(found, device))
    _write_json(dictionaries_file, _headed(known, device))
    if partial is not None:
        partial.unlink(missing_ok=True)
    if html_file is not None:
        page.write_report(html_file, phase=found, dictionaries=known)


@app.command("report")
def report_(
    out: Annotated[pathlib.Path, typer.Argument(help="Page to write.", metavar="OUT.html")],
    ablation: Annotated[pathlib.Path | None, typer.Option(help="Of csfast ablate.")] = None,
    evaluation: Annotated[pathlib.Path | None, typer.Option(help="Of csfast eval.")] = None,
    phase_file: Annotated[
        pathlib.Path | None, typer.Option("--phase", help="Of csfast phase.")
    ] = None,
    dictionaries_file: Annotated[
        pathlib.Path | None, typer.Option("--dictionaries", help="Of csfast phase.")
    ] = None,
    effort_file: Annotated[
        pathlib.Path | None, typer.Option("--effort", help="Of csfast tokens.")
    ] = None,
    size_curve: Annotated[pathlib.Path | None, typer.Option(help="Rows of a size curve.")] = None,
    storage: Annotated[pathlib.Path | None, typer.Option(help="Rows of a storage study.")] = None,
    demo_file: Annotated[
        pathlib.Path | None, typer.Option("--demo", help="Of csfast demo.")
    ] = None,
) -> None:
    """Write one page of results from files of them."""
    files = {
        "ablation": ablation,
        "evaluation": evaluation,
        "phase": phase_file,
        "dictionaries": dictionaries_file,
        "effort": effort_file,
        "size_curve": size_curve,
        "storage": storage,
        "demo": demo_file,
    }
    given = {kind: results_.read(path, kind) for kind, path in files.items() if path is not None}
    page.write_report(out, **given)
    Console().print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")


def _documents(data: pathlib.Path | None, part: Part, limit: int | None) -> list[Document]:
    """Read a half of the data, at most `limit` documents of every task."""
    path = models.demo_folder() / "sample.jsonl" if data is None else data
    found = documents.split(documents.read(path), part.value)
    if not found:
        raise ValueError(f"[documents] {path}: no document in its part {part.value!r}.")
    return found if limit is None else documents.few(found, limit)


def _code(text: str) -> Code:
    """The code that a text names; what names none is refused by whom it is given to."""
    return int(text) if text.isdecimal() else text


def _size(text: str) -> int:
    """The size of block that a text names."""
    if not text.isdecimal():
        raise ValueError(f"[calibrate] blocks = {text!r}: want whole numbers, such as 1,16.")
    return int(text)


def _load(model: str, device: DeviceName, *, dtype: str = "auto") -> tuple[Any, Any]:
    """Load a model and its tokenizer; the word demo stands for the shipped one."""
    doctor_.require(torch.device(device.value))
    path = models.demo_folder() if model == "demo" else model
    return models.load(path, dtype=dtype, device=device.value)


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Show what csfast logs, such as the bytes that `apply` is about to take."""
    logger = logging.getLogger("csfast")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("csfast: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _notes() -> Console:
    """Give the console for what is not a result."""
    return Console(stderr=True)


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr; gives what moves it: ``advance(done, total)``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    console = _notes()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _command() -> list[str]:
    """Give the command line, absolute paths by their names alone: the rest is of one machine."""
    paths = [(word, pathlib.Path(word)) for word in sys.argv[1:]]
    return ["csfast", *(path.name if path.is_absolute() else word for word, path in paths)]


def _headed(results: dict[str, Any], device: DeviceName) -> dict[str, Any]:
    """Add what results depend on beside their arguments."""
    machine = doctor_.machine(torch.device(device.value))
    return {**results, "machine": machine, "command": _command()}


def _write_json(path: pathlib.Path | None, results: dict[str, Any]) -> None:
    """Write the results whole or not at all."""
    if path is None:
        return
    write_atomic(path, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
