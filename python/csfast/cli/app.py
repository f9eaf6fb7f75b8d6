"""The application: what its commands share, and one clear line for every mistake."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
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
ORDER = (
    *("demo", "doctor", "calibrate", "sketch", "generate", "chat"),
    *("eval", "tokens", "ablate", "phase", "report", "bench"),
)  # of the commands in the help
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


# What the parser raises of an option or argument; typer names only this one that is made of it.
_UsageError: type[Any] = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """The commands, with errors that a user can mend put in one line."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Name the commands in the order in which one meets them."""
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def make_context(self, *arguments: Any, **more: Any) -> Any:
        """Read the options before the command; give mistakes in them exit code 2."""
        given = arguments[1] if len(arguments) > 1 else more["args"]
        try:
            return super().make_context(*arguments, **more)
        except _UsageError as error:
            if not given:  # the parser shows its help
                raise
            raise _refused(error) from None

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command; give typed errors exit code 2 and Ctrl-C exit code 130."""
        try:
            with _log_on_stderr():
                done = super().invoke(ctx)
                sys.stdout.flush()  # here, where a full disk is still told in one line
                return done
        except _UsageError as error:
            raise _refused(error) from None
        except KeyboardInterrupt as stop:
            hint = "; go on with --resume" if isinstance(stop, _Resumable) else "."
            typer.echo(f"csfast: interrupted{hint}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader has seen enough, as in `csfast ... | head`; the rest has nowhere to go.
            _discard_output()
            raise typer.Exit(0) from None
        except (
            *(ValueError, TypeError, OSError, MemoryError, RuntimeError),
            ops.NotFiniteError,
        ) as error:
            known = not isinstance(error, RuntimeError) or isinstance(error, ops.BackendError)
            if ctx.params["debug"] or not (known or _is_of_memory(error)):
                raise
            try:
                sys.stdout.flush()
            except OSError:
                _discard_output()
            typer.echo(f"csfast: {_line(error)}", err=True)
            raise typer.Exit(USAGE_ERROR) from error


def _refused(error: Any) -> typer.Exit:
    """Say in one line what is wrong with a command, and where to read what is right."""
    path = "csfast" if error.ctx is None else error.ctx.command_path
    typer.echo(f"csfast: {_line(error.format_message())} See `{path} --help`.", err=True)
    return typer.Exit(USAGE_ERROR)


def _is_of_memory(error: Exception) -> bool:
    """Whether there was not enough memory; torch says so on the CPU by an error of no class."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _line(error: object) -> str:
    """Text in one line, whatever another library said."""
    return " ".join(str(error).split())


def _discard_output() -> None:
    """Let what is still to be printed go nowhere."""
    with contextlib.suppress(io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run language models by reading only the weights that each token needs. `csfast demo` "
    "shows all of it on a model that ships with csfast; with a model of your own, begin with "
    "`csfast calibrate`, then `csfast generate` or `csfast chat`.",
)

Model = Annotated[
    str,
    typer.Argument(
        help="Folder of a model, GGUF file, name in the local cache of Hugging Face, or the word "
        "demo for the model that ships with csfast.",
        metavar="MODEL",
    ),
]
PlanFile = Annotated[
    pathlib.Path, typer.Argument(help="Plan made by csfast calibrate.", metavar="PLAN")
]
Data = Annotated[
    pathlib.Path | None,
    typer.Option(
        "--data", help=".jsonl, .jsonl.xz, .json or .txt; the shipped sample if left out."
    ),
]
Density = Annotated[
    float, typer.Option(help="Fraction of the feed-forward neurons to run for a token, in (0, 1].")
]
Bits = Annotated[
    str,
    typer.Option(
        help="Size of the codes that neurons are chosen by: 1 to 4 bits, or ternary; the plan must "
        "hold them."
    ),
]
Block = Annotated[
    int, typer.Option(help="Neurons that are run or skipped together; the plan must hold it.")
]
Json = Annotated[pathlib.Path | None, typer.Option("--json", help="Write the results here.")]
Html = Annotated[pathlib.Path | None, typer.Option("--html", help="Write a page here.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Documents of every task, at most.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on where an interrupted run with this output stopped.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Begin anew where an interrupted run left something.")
]
Where = Annotated[
    DeviceName | None,
    typer.Option("--device", help="Where to run; left out, cuda where there is one."),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Threads on the CPU; left out, as many as torch takes."),
]
Retrieval = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Retrieval prompts to make, in a row of their own outside the mean; "
        "left out, none beside --data.",
    ),
]
Task = Annotated[
    str,
    typer.Option(
        help="What the choice is tuned to: pooled, all of the plan's text, or a task of it."
    ),
]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn at random.")]


def main() -> None:
    """Run the command line; the console script's entry point."""
    _want_streams()
    try:
        app()
    except SystemExit as done:
        if done.code == INTERRUPTED:
            # Python takes a second to take torch down, and files are whole already.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise
    except OSError as error:  # of what is printed before any command, such as the version
        _discard_output()
        typer.echo(f"csfast: {_line(error)}", err=True)
        raise SystemExit(USAGE_ERROR) from None


def _want_streams() -> None:
    """Refuse a closed stdout; keep the numbers of closed streams from files opened later."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    if sys.stdout is None:
        typer.echo("csfast: [write] stdout is closed: want somewhere to write to.", err=True)
        raise SystemExit(USAGE_ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not have every character


def _say_version(wanted: bool) -> None:
    """Print the version and stop, where no command need follow."""
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_say_version, help="Print the version."),
    ] = False,
) -> None:
    """Read the options that stand before a command."""


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


def place(device: DeviceName | None, threads: int | None) -> torch.device:
    """Choose where to run and by how many threads, and say so on stderr."""
    where = doctor.best_device() if device is None else torch.device(device.value)
    doctor.require(where)
    if threads is not None:
        torch.set_num_threads(threads)
    typer.echo(f"csfast: on {doctor.place_name(where)}.", err=True)
    busy = doctor.busy(torch.get_num_threads()) if where.type == "cpu" else None
    if busy is not None:
        typer.echo(f"csfast: {busy}.", err=True)
    return where


def load(model: str, where: torch.device, *, dtype: str = "auto") -> tuple[Any, Any]:
    """Load a model and its tokenizer; the word demo stands for the shipped one."""
    path = models.demo_folder() if model == "demo" else model
    return models.load(path, dtype=dtype, device=where)


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Show what csfast logs, such as the bytes that `apply` is about to take."""
    logger = logging.getLogger("csfast")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("csfast: %(message)s"))
    # What runs dense as it must, such as a prompt, is told by counts, not between pieces of text.
    handler.addFilter(
        lambda record: record.levelno > logging.INFO or not record.getMessage().startswith("[ffn]")
    )
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


def headed(results: dict[str, Any], where: torch.device) -> dict[str, Any]:
    """Add what results depend on beside their arguments."""
    return {**head.of(where, command=command()), **results}


def refuse_options(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Refuse options that were given where they say nothing."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = next(each for each in context.command.params if each.name == name).opts[0]
            raise typer.BadParameter(
                f"{why}: want it left out.", ctx=context, param_hint=f"'{option}'"
            )


def check_outputs(*paths: pathlib.Path | None, inputs: Iterable[pathlib.Path | None] = ()) -> None:
    """Refuse outputs that could not be written, before the work.

    Nor may they overwrite each other, or what the command reads.
    """
    seen: set[str] = set()
    read = {os.path.realpath(path) for path in inputs if path is not None}
    for path in paths:
        if path is None:
            continue
        files.check_writable(path)
        target = os.path.realpath(path)
        if target in read:
            raise ValueError(f"[write] {str(path)!r} is read by this command: want another file.")
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


@contextlib.contextmanager
def resumable_folder(
    verb: str,
    out: pathlib.Path,
    *,
    resume: bool,
    overwrite: bool,
    is_begun: Callable[[pathlib.Path], bool],
    clear: Callable[[pathlib.Path], None],
) -> Iterator[None]:
    """Write a folder in parts, which an interrupted run leaves and a resumed one goes on from.

    What is there is gone on with, or removed, only if that is asked for.
    """
    if resume and overwrite:
        raise ValueError(f"[{verb}] --resume and --overwrite: want one of them.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"[{verb}] {str(out)!r}: want a folder, or nothing there.")
    if is_begun(out) and not resume:
        if not overwrite:
            raise FileExistsError(
                f"[{verb}] {str(out)!r} has a {verb}, whole or in parts: want --resume or "
                "--overwrite."
            )
        clear(out)
    try:
        yield
    except KeyboardInterrupt as stop:
        raise _Resumable from stop


def write_json(path: pathlib.Path | None, results: dict[str, Any]) -> None:
    """Write the results whole or not at all."""
    if path is None:
        return
    sys.stdout.flush()  # before what may go to the same place
    files.write_atomic(path, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
