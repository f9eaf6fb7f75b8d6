"""Measure all that is timed on a GPU, by one command.

    python bench/gpu.py [--out FOLDER] [--commit HASH] [--only STAGE ...]

From the root of the repository, with csfast installed with CUDA. Stages, in this order, each with
the file that it writes:

    layers    csfast bench --device cuda         layers.json
    pursuits  csfast bench omp --device cuda     pursuits.json
    native    bench/bench_ffn.cu                 native.json

The native benchmark is built while the others run, at the lowest priority and for this GPU alone:
what they measure are graphs, which do not wait for the host. Files are written as `bench/record.py`
does it. Last, what is to be reached is shown beside what was. The exit status is 1 if a stage
failed; the files of the others are whole. Tests and sanitizers are `tools/gpu_check.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import torch

import record
from csfast import doctor, ops
from csfast.bench import timing

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench-gpu"
FILES = {stage: f"{stage}.json" for stage in ("layers", "pursuits", "native")}
SECONDS = 330  # of a stage, at most: twice what the longest is expected to take


def command_of(stage: str, commit: str) -> list[str]:
    """Give the command of a stage, run where its file goes: no folder gets into the results."""
    if stage == "native":
        return [str(BUILD / "bench" / "bench_ffn_cuda"), "--json", "--commit", commit]
    what = ["omp"] if stage == "pursuits" else []
    options = ["--device", "cuda", "--json", FILES[stage], "--commit", commit]
    return [sys.executable, "-m", "csfast", "bench", *what, *options]


def architecture(major: int, minor: int) -> str:
    """Give CMake's name for machine code of this GPU: from 9.0 on with what is not portable."""
    return f"{major}{minor}{'a' if major >= 9 else ''}-real"


def build_command(nvcc: str, arch: str) -> str:
    """Give the shell command that builds the native benchmark."""
    options = f"-DCSFAST_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES={arch} -DCMAKE_CUDA_COMPILER='{nvcc}'"
    half = max(1, (os.cpu_count() or 1) // 2)
    return (
        f"nice -n 19 cmake -S . -B '{BUILD}' {options} && "
        f"nice -n 19 cmake --build '{BUILD}' --target bench_ffn_cuda --parallel {half}"
    )


def run(stage: str, command: list[str], out: pathlib.Path) -> bool:
    """Run the command of a stage in `out`, record what it wrote, and say how it went.

    Standard output of the native benchmark is its file; status 1 may mean that one case failed,
    and the others are there.
    """
    clock = timing.Clock()
    partial = out / (FILES[stage] + ".partial")
    with contextlib.ExitStack() as opened:
        stream = opened.enter_context(partial.open("w")) if stage == "native" else None
        try:
            code = subprocess.run(command, cwd=out, stdout=stream, timeout=SECONDS).returncode
            said = f"exit status {code}"
        except subprocess.TimeoutExpired:
            code, said = -1, f"ended after {SECONDS} s"
    if stage == "native" and partial.stat().st_size > 0:
        partial.replace(out / FILES[stage])
    partial.unlink(missing_ok=True)
    written = out / FILES[stage]
    if written.exists():
        try:
            document = json.loads(written.read_text(encoding="utf-8"))
            written.write_text(record.recorded(document), encoding="utf-8")
        except ValueError as error:
            code, said = -1, f"{said}, {error}"
    print(f"{stage}: {said}, {clock.seconds():.0f} s", flush=True)
    return code == 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "bench" / "results" / "h200")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--only", nargs="+", choices=tuple(FILES), default=tuple(FILES))
    asked = parser.parse_args(arguments)
    try:
        doctor.require(torch.device("cuda"))
    except ops.BackendError as error:
        sys.stderr.write(f"gpu: {error}\n")
        return 1
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    build = None
    log = out / "build.log"
    if "native" in asked.only:
        folders = os.environ.get("PATH", "") + os.pathsep + "/usr/local/cuda/bin"
        nvcc = shutil.which("nvcc", path=folders)
        if nvcc is None:
            sys.stderr.write("gpu: [gpu] no nvcc on the path: want it for native.\n")
            return 1
        with log.open("w", encoding="utf-8") as stream:
            build = subprocess.Popen(
                build_command(nvcc, architecture(*torch.cuda.get_device_capability())),
                shell=True,
                cwd=ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
    passed = True
    for stage in ("layers", "pursuits"):
        if stage in asked.only:
            passed &= run(stage, command_of(stage, asked.commit), out)
    if build is not None:
        if build.wait() == 0:
            passed &= run("native", command_of("native", asked.commit), out)
        else:
            print(f"native: not built\n{log.read_text(encoding='utf-8')[-2000:]}", flush=True)
            passed = False
    sys.stdout.flush()
    tables = ROOT / "tools" / "readme_tables.py"
    passed &= subprocess.run([sys.executable, str(tables), "--targets", str(out)]).returncode == 0
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
