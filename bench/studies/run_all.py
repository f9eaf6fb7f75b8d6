"""Train the models of the size curve and run every study that wants a GPU, by one command.

    python bench/studies/run_all.py train --data DATA --out RUNS
    python bench/studies/run_all.py measure --data DATA --runs RUNS --out RESULTS [--commit HASH]

`train` needs the training text in DATA/train and leaves nine models in RUNS, three sizes at three
lengths. `measure` needs DATA/valid.jsonl.xz and writes, to RESULTS,

    size-curve.json       rules at densities on all models of RUNS
    ablate-demo.json      all rules at equal bytes on the demo model
    ablate-120m.json      the same on the largest model
    storage-demo.json     ways to store few-bit weights, on the demo model
    storage-120m.json     the same on the largest model

What there is to do runs side by side, on all GPUs in turn, each with a log of its own. A `measure`
that was interrupted, or ran out of `--seconds`, goes on where it stopped if it is called again.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from csfast.bench import head

HERE = pathlib.Path(__file__).resolve().parent
SIZES = ("120m", "60m", "17m")  # longest first
LARGEST = "120m"


class Job(NamedTuple):
    """A command with the file that it writes."""

    name: str
    command: tuple[str, ...]
    result: pathlib.Path | None = None  # done if it is there


def tool(name: str, *options: str) -> tuple[str, ...]:
    """Give the command of a program beside this one."""
    return (sys.executable, str(HERE / f"{name}.py"), *options)


def training(args: argparse.Namespace) -> list[Job]:
    """Give what there is to train."""
    lengths = [f"{length:g}" for length in args.lengths]
    text = ("--data", str(args.data / "train"), "--out", str(args.out))
    workers = max(1, (os.cpu_count() or 2) // 2 // min(len(SIZES), max(1, args.gpus)) - 1)
    return [
        Job(
            size,
            tool(
                *("size_curve", "train", *text, "--size", size, "--workers", str(workers)),
                *("--lengths", *lengths),
            ),
        )
        for size in SIZES
    ]


def measurements(args: argparse.Namespace) -> list[Job]:
    """Give what there is to measure."""
    of_largest = [p for p in args.runs.iterdir() if p.name.startswith(f"{LARGEST}-")]
    if not of_largest:
        raise SystemExit(f"run_all: no model of {LARGEST} in {args.runs.name}: train first.")
    largest = str(max(of_largest, key=lambda path: float(path.name.split("-")[1][:-1])))
    valid, tokens = str(args.data / "valid.jsonl.xz"), str(args.tokens)
    commit = () if args.commit is None else ("--commit", args.commit)

    def of(name: str) -> pathlib.Path:
        return args.out / f"{name}.json"

    def ablation(name: str, model: str) -> Job:
        options = ("--data", valid, "--tokens", tokens, "--device", "cuda", "--resume")
        command = (sys.executable, "-m", "csfast", "ablate", model, *options)
        return Job(name, (*command, "--json", str(of(name))), of(name))

    def storage(name: str, model: str) -> Job:
        options = ("--data", str(args.data), "--tokens", tokens, "--device", "cuda", *commit)
        command = tool("storage", model, *options, "--json", str(of(name)))
        return Job(name, command, of(name))

    models = ("measure", "--data", str(args.data), "--runs", str(args.runs), "--tokens", tokens)
    curve = of("size-curve")
    # On two GPUs the first has both studies of storage, which take about as long as the rest.
    return [
        storage("storage-120m", largest),
        ablation("ablate-120m", largest),
        storage("storage-demo", "demo"),
        Job("size-curve", tool("size_curve", *models, "--json", str(curve)), curve),
        ablation("ablate-demo", "demo"),
    ]


def run(jobs: Sequence[Job], logs: pathlib.Path, gpus: int, seconds: float) -> dict[str, Any]:
    """Run jobs side by side, job `i` on GPU `i` modulo their number.

    Returns:
        The exit status of each by name, None if it was stopped.
    """
    logs.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    running: dict[str, subprocess.Popen[bytes]] = {}
    status: dict[str, Any] = {}
    try:
        for number, job in enumerate(jobs):
            if job.result is not None and job.result.exists():
                status[job.name] = 0
                continue
            visible = {"CUDA_VISIBLE_DEVICES": str(number % gpus), "PYTHONUNBUFFERED": "1"}
            with (logs / f"{job.name}.log").open("ab") as log:
                running[job.name] = subprocess.Popen(
                    job.command, stdout=log, stderr=log, env={**os.environ, **visible}
                )
        while running and time.monotonic() - start < seconds:
            for name, process in list(running.items()):
                if process.poll() is not None:
                    status[name] = process.returncode
                    print(
                        f"{time.monotonic() - start:6.0f} s  {name}: {process.returncode}",
                        flush=True,
                    )
                    del running[name]
            time.sleep(0.5)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for name, process in running.items():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            status[name] = None
    return status


def complete(path: pathlib.Path, command: Sequence[str], commit: str | None) -> None:
    """Add to a result what its command did not say of where it comes from."""
    found = json.loads(path.read_text(encoding="utf-8"))
    # Without the folders of one machine: only the names of files.
    named = [pathlib.Path(word).name for word in command]
    found = {**head.of(torch.device("cuda"), command=named), **found, "commit": commit}
    about = {"demo": "demo model", LARGEST: f"model of {LARGEST}"}
    found["about"] = about.get(path.stem.rpartition("-")[2], "all models of the curve")
    path.write_text(head.text_of(found), encoding="utf-8")


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("train")
    verb.add_argument("--out", type=pathlib.Path, required=True, help="folder of the models")
    verb.add_argument("--lengths", type=float, nargs="+", default=[12, 36, 100], help="10^6 tokens")
    verb = verbs.add_parser("measure")
    verb.add_argument("--runs", type=pathlib.Path, required=True, help="folder of the models")
    verb.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    verb.add_argument("--tokens", type=int, default=2000, help="scored tokens of every task")
    verb.add_argument("--commit", help="what the records say they were made from")
    for verb in verbs.choices.values():
        verb.add_argument("--data", type=pathlib.Path, required=True, help="folder of the text")
        verb.add_argument("--seconds", type=float, default=float("inf"), help="to stop after")
    args = parser.parse_args()
    args.gpus = torch.cuda.device_count()
    if args.gpus == 0:
        sys.stderr.write("run_all: no CUDA device: want one.\n")
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = training(args) if args.verb == "train" else measurements(args)
    fresh = [job for job in jobs if job.result is not None and not job.result.exists()]
    status = run(jobs, args.out / "logs", args.gpus, args.seconds)
    for job in fresh:
        if job.result is not None and status[job.name] == 0:
            complete(job.result, job.command, args.commit)
    left = [name for name, code in status.items() if code != 0]
    print(f"not done: {', '.join(left)}" if left else "done", flush=True)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
