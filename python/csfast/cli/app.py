"""The application: what its commands share, and one clear line for every mistake."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from .. import doctor, documents, files, models, ops
from .._version import __version__
from ..bench import head
from ..types import Code, Document

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


class _Resumable(KeyboardInterrupt):
    """Ctrl-C, and what was done until then is kept."""


class Commands(TyperGroup):
    """The commands, with errors that a user can mend put in one line."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command; give typed errors exit code 2 and Ctrl-C exit code 130."""
        try:
            with _log_on_stderr():
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            hint = "; go on with --resume" if isinstance(stop, _Resumable) else "."
            typer.echo(f"csfast: interrupted{hint}", err=True)
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
    typer.Option(
        "--data", help=".jsonl, .jsonl.xz, .json or .txt; the shipped sample if left out."
    ),
]
Density = Annotated[float, typer.Option(help="Fraction of neurons to execute, in (0, 1].")]
Bits = Annotated[
    str, typer.Option(help="Code of the sensor: 1 to 4 bits, or ternary; the plan must hold it.")
]
Block = Annotated[int, typer.Option(help="Neurons kept or skipped as one; the plan must hold it.")]
Json = Annotated[pathlib.Path | None, typer.Option("--json", help="Write the results here.")]
Html = Annotated[pathlib.Path | None, typer.Option("--html", help="Write a page here.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Documents of every task, at most.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on where an interrupted run with this output stopped.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Begin anew where an interrupted run left something.")
]
Where = Annotated[DeviceName, typer.Option("--device", help="Where to run.")]
Retrieval = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Retrieval prompts to make, in a row of their own outside the mean; "
        "left out, none beside --data.",
    ),
]
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


def read_documents(data: pathlib.Path | None, part: Part, limit: int | None) -> list[Document]:
    """Read a half of the data, at most `limit` documents of every task."""
    path = models.demo_folder() / "sample.jsonl" if data is None else data
    found = documents.split(documents.read(path), part.value)
    if not found:
        raise ValueError(
            f"[documents] {path}: no document in its part {part.value!r}: want more documents, or "
            "--part all where a command has it."
        )
    return found if limit is None else documents.few(found, limit)


def n_retrieval(asked: int | None, data: pathlib.Path | None, of_sample: int) -> int:
    """How many retrieval prompts to make: as many as asked for, or some beside the sample."""
    if asked is not None:
        return asked
    return of_sample if data is None else 0


def code(text: str) -> Code:
    """The code that a text names; what names none is refused by whom it is given to."""
    return int(text) if text.isdecimal() else text


def load(model: str, device: DeviceName, *, dtype: str = "auto") -> tuple[Any, Any]:
    """Load a model and its tokenizer; the word demo stands for the shipped one."""
    doctor.require(torch.device(device.value))
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


def notes() -> Console:
    """Give the console for what is not a result."""
    return Console(stderr=True)


@contextlib.contextmanager
def progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr; gives what moves it: ``advance(done, total)``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    console = notes()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def command() -> list[str]:
    """Give the command line, absolute paths by their names alone: the rest is of one machine."""
    paths = [(word, pathlib.Path(word)) for word in sys.argv[1:]]
    return ["csfast", *(path.name if path.is_absolute() else word for word, path in paths)]


def headed(results: dict[str, Any], device: DeviceName) -> dict[str, Any]:
    """Add what results depend on beside their arguments."""
    return {**head.of(torch.device(device.value), command=command()), **results}


def check_outputs(*paths: pathlib.Path | None) -> None:
    """Refuse outputs that could not be written, or would overwrite each other, before the work."""
    seen: set[str] = set()
    for path in paths:
        if path is None:
            continue
        files.check_writable(path)
        target = os.path.realpath(path)
        if target in seen and not (path.exists() and not path.is_file()):
            raise ValueError(f"[write] {str(path)!r} is given twice: want a file for each output.")
        seen.add(target)


@contextlib.contextmanager
def resumable(
    verb: str, out: pathlib.Path | None, *, resume: bool, overwrite: bool
) -> Iterator[pathlib.Path | None]:
    """Give the file that keeps what is done of an output; it goes once the block has ended.

    What an interrupted run left there is gone on with, or overwritten, only if that is asked for.
    None where nothing can be kept: for an output that is no file, and for none at all.
    """
    if resume and overwrite:
        raise ValueError(f"[{verb}] --resume and --overwrite: want one of them.")
    partial = None if out is None else files.partial_of(out)
    if partial is None:
        if resume:
            raise ValueError(
                f"[{verb}] --resume of {'no output' if out is None else str(out)!r}: want the file "
                "that the interrupted run was to write."
            )
        yield None
        return
    if partial.exists() and not resume:
        if not overwrite:
            raise ValueError(
                f"[{verb}] {str(partial)!r} is what an interrupted run left: want --resume to go "
                "on with it, or --overwrite to begin anew."
            )
        partial.unlink()
    try:
        yield partial
    except KeyboardInterrupt as stop:
        if partial.exists():
            raise _Resumable from stop
        raise
    partial.unlink(missing_ok=True)


def write_json(path: pathlib.Path | None, results: dict[str, Any]) -> None:
    """Write the results whole or not at all."""
    if path is None:
        return
    sys.stdout.flush()  # before what may go to the same place
    files.write_atomic(path, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
