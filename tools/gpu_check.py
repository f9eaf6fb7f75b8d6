"""All that must hold on a GPU, in one run: tests, sanitizers, supports, as one JSON document.

    python tools/gpu_check.py --json OUT.json [--commit HASH] [--only STAGE ...]

From the root of the repository, with csfast installed with CUDA. Stages, in this order:

    tests      pytest -m gpu
    sanitizer  compute-sanitizer's four tools over small cases of every operation, and over two
               programs with a planted fault each, which it must catch
    omp        supports of 10,000 pursuits against float64

What is timed on a GPU is `bench/gpu.py`. The exit status is 1 if a test failed or none ran, if a
sanitizer reported something, if it missed a planted fault, or if more than a support in a thousand
differs. A stage whose tool is missing says so under "not_run". The document is written anew after
every stage, with the head of all results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from typing import Any

import torch

from csfast import designs, ops, reference, types
from csfast.bench import cases, head, timing
from csfast.bench import pursuits as pursuits_
from csfast.bench.reader import Reader
from csfast.codes import planes
from csfast.layer import Decision, Layer, Sensor, Weights

ROOT = pathlib.Path(__file__).parents[1]
STAGES = ("tests", "sanitizer", "omp")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 99  # exit status that compute-sanitizer is told to give when it reports something
SANITIZER_SECONDS = 240  # each; all run side by side
TEST_SECONDS = 420


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer that the sanitizers watch."""

    batch: int
    d: int
    n_neurons: int
    bits: types.Code
    tile_rows: int
    dtype: torch.dtype
    is_biased: bool = False  # and gated by gelu_tanh
    is_joint: bool = False  # one decision for the batch


# Every code and every dtype, rows on and off 16 bytes, sizes off every block and tile,
# more than one panel of x, whole groups of a batch and single rows.
SANITIZED = (
    Case(batch=1, d=256, n_neurons=96, bits=2, tile_rows=1, dtype=torch.bfloat16),
    Case(batch=6, d=136, n_neurons=67, bits=3, tile_rows=4, dtype=torch.float16),
    Case(batch=3, d=33, n_neurons=7, bits=1, tile_rows=1, dtype=torch.float32),
    Case(batch=2, d=4104, n_neurons=40, bits=4, tile_rows=64, dtype=torch.bfloat16),
    Case(batch=1, d=64, n_neurons=1100, bits=2, tile_rows=1, dtype=torch.float32),
    Case(batch=5, d=72, n_neurons=210, bits=2, tile_rows=16, dtype=torch.bfloat16, is_joint=True),
    Case(batch=2, d=40, n_neurons=50, bits=1, tile_rows=1, dtype=torch.float16, is_biased=True),
    Case(3, 33, 70, 3, 4, torch.float32, is_biased=True, is_joint=True),
    Case(batch=5, d=2700, n_neurons=37, bits="ternary", tile_rows=1, dtype=torch.bfloat16),
    Case(batch=1, d=200, n_neurons=150, bits="ternary", tile_rows=1, dtype=torch.float16),
    Case(batch=19, d=64, n_neurons=70, bits=2, tile_rows=1, dtype=torch.float16, is_joint=True),
)

# Every width, whole groups of a batch and single rows, half a chunk and more than a warp has in
# flight; neurons off every warp and block.
SANITIZED_NESTED = (
    (cases.Case("one", batch=1, d=1, n_neurons=1), (1,), torch.float32),
    (cases.Case("ragged", batch=3, d=33, n_neurons=7), (3, 3), torch.bfloat16),
    (cases.Case("off_block", batch=5, d=200, n_neurons=67), (2, 4), torch.float16),
    (cases.Case("several_levels", batch=2, d=64, n_neurons=33), (1, 2, 3, 4), torch.bfloat16),
)
SANITIZED_WIDE = cases.Case("wide", batch=2, d=4104, n_neurons=5)

# One of everything, sizes off every load and block, more channels than a warp has in flight.
SANITIZED_PROJECTS = (
    (cases.ProjectCase("one", batch=1, d=1, m=1), torch.float32),
    (cases.ProjectCase("ragged", batch=6, d=203, m=13), torch.bfloat16),
    (cases.ProjectCase("aligned", batch=5, d=2056, m=9), torch.float16),
)

# One atom, fewer atoms than lanes, more than threads, and what asks for each kernel and for rows
# that are spilled; and of each kernel the form for one atom a step and that for several.
SANITIZED_PURSUITS = tuple(
    (cases.PursuitCase(name, batch=batch, m=m, n_atoms=n_atoms, n_nonzero=n_nonzero), options)
    for name, batch, m, n_atoms, n_nonzero in (
        ("one", 1, 1, 1, 1),
        ("few", 3, 12, 17, 4),
        ("flat", 4, 80, 300, 20),
        ("deep", 140, 40, 1024, 4),
        ("deep and spilled", 2, 240, 1024, 80),
        ("wide", 2, 90, 2600, 6),
        ("wide and spilled", 2, 140, 2600, 24),
        ("general", 2, 60, 4100, 4),
    )
    for options in ({}, {"per_step": 2}, {"group": 2, "per_step": 2})
    if n_atoms % options.get("group", 1) == 0
)
# What is chosen for one atom a step and what is raced with it: less than a warp, threads without
# atoms, whole quads of rows and parts of them, more problems than blocks.
SANITIZED_DESIGNS = tuple(
    (cases.PursuitCase(f"{design} {n_atoms}", batch, m, n_atoms, n_nonzero), {"design": design})
    for design in ("quad", *pursuits_.DESIGNS)
    for batch, m, n_atoms, n_nonzero in ((3, 12, 20, 4), (4, 80, 300, 21), (300, 24, 64, 5))
)

PLANTED = {
    "memcheck": """
#include <cuda_runtime.h>
__global__ void write_past_the_end(int* a, int n) { if (threadIdx.x == 0) a[n] = 1; }
int main() {
  int* a = nullptr;
  cudaMalloc(&a, 256 * sizeof(int));
  write_past_the_end<<<1, 32>>>(a, 256);
  cudaDeviceSynchronize();
  return 0;
}
""",
    "racecheck": """
#include <cuda_runtime.h>
__global__ void read_without_barrier(int* a) {
  __shared__ int s[128];
  s[threadIdx.x] = threadIdx.x;
  a[threadIdx.x] = s[(threadIdx.x + 32) % 128];
}
int main() {
  int* a = nullptr;
  cudaMalloc(&a, 128 * sizeof(int));
  read_without_barrier<<<1, 128>>>(a);
  cudaDeviceSynchronize();
  return 0;
}
""",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Everything of csfast that wants a GPU.")
    parser.add_argument("--json", type=pathlib.Path, help="where the document goes")
    parser.add_argument("--commit", default="unknown", help="recorded as given")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--sanitize-target", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sanitize_target:
        return sanitize_target()
    if arguments.json is None:
        parser.error("--json is missing: want the path of the document.")
    if not ops.cuda_available():
        sys.stderr.write("gpu_check: no CUDA device, or csfast was built without CUDA.\n")
        return 1

    # Without the folders of one machine: only the names of files.
    command = ["python", "tools/gpu_check.py", *(pathlib.Path(a).name for a in sys.argv[1:])]
    document = head.of(torch.device("cuda"), command=command, commit=arguments.commit)
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "tests": tests,
        "sanitizer": sanitizer,
        "omp": pursuits,
    }
    for stage in STAGES:
        if stage not in arguments.only:
            continue
        clock = timing.Clock()
        document[stage] = run[stage]()
        document[stage]["seconds"] = round(clock.seconds(), 1)
        arguments.json.write_text(head.text_of(document), encoding="utf-8")
        print(stage, json.dumps(document[stage], indent=1), flush=True)
    failed = [name for name in arguments.only if document[name].get("passed") is False]
    print("failed: " + ", ".join(failed) if failed else "passed", flush=True)
    return 1 if failed else 0


def tests() -> dict[str, Any]:
    """Run the tests that are marked gpu."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "junit.xml"
        # Without the project's own options: they want plugins that a GPU machine need not have.
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests", "-q", "-o", "addopts="]
        status, output = finish(start([*command, f"--junitxml={report}"]), TEST_SECONDS)
        if not report.exists():
            return {"passed": False, "exit": status, "output": output[-4000:]}
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failures = [
        {
            "name": f"{case.get('classname')}.{case.get('name')}",
            "message": (fault.text or "")[-1500:],
        }
        for case in suite.iter("testcase")
        for fault in [*case.findall("failure"), *case.findall("error")]
    ]
    slowest = sorted(suite.iter("testcase"), key=lambda case: -float(case.get("time", 0)))[:5]
    return {
        "passed": status == 0 and counts["tests"] > counts["skipped"],
        "exit": status,
        **counts,
        "failed": failures[:20],
        "slowest": {str(case.get("name")): float(case.get("time", 0)) for case in slowest},
    }


def sanitizer() -> dict[str, Any]:
    """Run every tool over the operations, and those with a planted fault over that."""
    tool = find("compute-sanitizer")
    if tool is None:
        return {"not_run": "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin."}
    target = [sys.executable, str(pathlib.Path(__file__).resolve()), "--sanitize-target"]
    with tempfile.TemporaryDirectory() as folder:
        # The allocator of torch hands out parts of large blocks, beyond whose parts memcheck
        # would see nothing.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        running = {name: start(sanitized(tool, name, target), environment) for name in TOOLS}
        compiler = find("nvcc")
        planted: dict[str, Any] = {}
        for name, source in PLANTED.items():
            if compiler is None:
                planted[name] = {"not_run": "nvcc is neither on PATH nor in /usr/local/cuda/bin."}
                continue
            program = pathlib.Path(folder) / name
            program.with_suffix(".cu").write_text(source, encoding="utf-8")
            build = [compiler, "-arch=native", "-lineinfo", "-o", str(program)]
            status, output = finish(start([*build, str(program.with_suffix(".cu"))]), 60)
            if status == 0:
                caught = start(sanitized(tool, name, [str(program)]))
                status, output = finish(caught, SANITIZER_SECONDS)
            planted[name] = {"caught": status == FOUND, "exit": status, "output": output[-600:]}
        clean: dict[str, Any] = {}
        for name, process in running.items():
            status, output = finish(process, SANITIZER_SECONDS)
            clean[name] = {"passed": status == 0, "exit": status, "output": output[-1500:]}
    passed = all(c["passed"] for c in clean.values())
    return {
        "passed": passed and all(p.get("caught", True) for p in planted.values()),
        "operations": clean,
        "planted": planted,
    }


def sanitized(tool: str, name: str, command: list[str]) -> list[str]:
    """The command under one of the tools."""
    # Calls that torch makes to see whether they fail are not faults.
    options = ["--tool", name, "--error-exitcode", str(FOUND), "--print-limit", "10"]
    if name == "memcheck":
        options += ["--report-api-errors", "no"]
    return [tool, *options, *command]


def sanitize_target() -> int:
    """Call every operation on small cases. Copies nothing from the device that nobody wrote."""
    for case in SANITIZED:
        bits, tile_rows = case.bits, case.tile_rows
        on_host = layer(case, "cpu")
        codes, equal, row_scale, gate, up, down_t, x = (t.cuda() for t in on_host)
        y, scale = ops.sense(codes, equal, x, bits=bits)
        want, want_scale = reference.sense(on_host[0], on_host[1], on_host[6], bits=bits)
        assert torch.equal(y.cpu(), want) and torch.equal(scale.cpu(), want_scale), case

        votes = torch.arange(case.batch).float().cuda() if case.is_joint else None
        activation = "gelu_tanh" if case.is_biased else "silu"
        offset = torch.full_like(row_scale, 0.25) if case.is_biased else None
        bias = gate[:, 0].contiguous()
        biases = (bias, bias, x[0]) if case.is_biased else ()
        sensor = Sensor(codes, equal, row_scale, bits, offset)
        weights = Weights(gate, up, down_t, *biases)
        told = {"activation": activation}

        n_groups = -(-case.n_neurons // tile_rows)
        lists = 1 if case.is_joint else case.batch
        budget = torch.full((lists,), n_groups // 3, dtype=torch.int32)
        recovery = {"tile_rows": tile_rows, "votes": votes, "offset": offset, **told}
        top = ops.recover(y, scale, row_scale, budget=budget.cuda(), **recovery)
        assert torch.equal(top.count.cpu(), budget), case
        threshold = top.usage.median(dim=1).values.contiguous()
        support = ops.recover(y, scale, row_scale, threshold=threshold, **recovery)
        floats = y[..., :1].float().contiguous()
        column = row_scale[:, :1].contiguous()
        ops.recover(floats, scale, column, threshold=threshold[:1].repeat(case.batch))
        tiles = ops.TileList(support.index, support.count, tile_rows)
        sizes = {"tile_rows": tile_rows, "shared": case.is_joint, "dtype": case.dtype}
        path = designs.choose(case.batch, case.d, case.n_neurons, senses=True, **sizes).split()[0]
        out = ops.execute(weights, tiles, x, design=path, **told)
        index = torch.arange(case.n_neurons, dtype=torch.int32).repeat(case.batch, 1)
        count = torch.arange(case.batch, dtype=torch.int32) * 5 % (case.n_neurons + 1)
        held = ops.tile(index.cuda(), count.cuda(), tile_rows=tile_rows)
        on_cpu = ops.tile(index, count, tile_rows=tile_rows)
        assert torch.equal(held.tile.cpu(), on_cpu.tile), case

        decision = Decision(threshold, tile_rows, votes)
        listed, missed = ops.select(sensor, decision, x, **told)
        assert torch.equal(listed.n_tiles.cpu(), tiles.n_tiles.cpu()), case
        # In another order: see missed_tolerance in tests/numeric.py.
        near = {"rtol": case.n_neurons * 2.5 * 2.0**-24, "atol": case.n_neurons * 2.0**-148}
        assert torch.allclose(missed.cpu(), support.missed.cpu(), **near), case
        stats = torch.zeros(2, dtype=torch.int64).cuda()
        whole = Layer(sensor, weights, decision, activation)
        again = ops.ffn(whole, x, stats=stats)
        assert torch.equal(again.cpu(), out.cpu()), case
        assert int(stats.cpu()[0]) == case.batch, case
        cap = torch.full((lists,), 3, dtype=torch.int32)
        capping = Decision(threshold, tile_rows, votes, cap.cuda())
        capped, _ = ops.select(sensor, capping, x, **told)
        assert torch.equal(capped.n_tiles.cpu(), torch.minimum(cap, tiles.n_tiles.cpu())), case
        if case.dtype == torch.float32 or case.d % 8 > 0:
            continue
        for path in ("list", "list bulk", "range", "range bulk", *["batch"] * case.is_joint):
            if "bulk" in path and torch.cuda.get_device_capability() < (9, 0):
                continue
            want = ops.execute(weights, tiles, x, design=path, **told)
            for more in ("", " portable")[: 1 if "bulk" in path else 2]:
                got = ops.ffn(whole, x, design=path + more)
                assert torch.equal(got.cpu(), want.cpu()), (case, path, more)
    for nested_case, widths, dtype in SANITIZED_NESTED:
        p = nested_case.make_nested_exact(dtype, "cuda", bits=widths)
        for n_levels in range(1, len(widths) + 1):
            y, scale = ops.nested(p.levels, p.equal, p.x, n_levels=n_levels)
            want, want_scale = reference.nested(p.levels[:n_levels], p.equal, p.x)
            assert torch.equal(y.double(), want), nested_case
            assert torch.equal(scale, want_scale), nested_case
    p = SANITIZED_WIDE.make_nested(torch.bfloat16, "cuda", bits=(3, 3))
    assert bool(ops.nested(p.levels, p.equal, p.x)[0].isfinite().all())
    for measured, dtype in SANITIZED_PROJECTS:
        phi, x = measured.make_exact(dtype, "cpu")
        for rows in (measured.m, 1):
            y = ops.project(phi.cuda(), x.cuda(), rows=rows)
            assert torch.equal(y.cpu().double(), reference.project(phi, x, rows=rows)), measured
    # Whole chunks of a block and parts of them, in buffers of any length.
    words = [torch.arange(4 * n, dtype=torch.int32).cuda() for n in (1, 4096, 3 * 4096 + 7)]
    read = Reader(words)
    read()
    want = sum(4 * n * (4 * n - 1) // 2 for n in (1, 4096, 3 * 4096 + 7))
    assert int(read.sums.long().sum()) % 2**32 == want % 2**32
    watched = SANITIZED_PURSUITS + SANITIZED_DESIGNS
    made = {case: case.make() for case, _ in watched}
    for case, options in watched:
        parts = (made[case].gram, made[case].correlation, made[case].energy)
        tensors = [t.float().clone() for t in parts]
        tensors[1][0, 0] = float("nan") if case.batch > 2 else tensors[1][0, 0]
        budget = torch.full((case.batch,), case.n_nonzero, dtype=torch.int32)
        budget[-1] -= budget[-1] // 2  # another than the others, if that can be
        given = [*tensors, budget]
        start = made[case].support[:, :1].int().contiguous()
        for begin in ({}, {"start": start}):
            want = ops.omp(*given, budget_max=case.n_nonzero, **options, **begin)
            moved = {name: t.cuda() for name, t in begin.items()}
            got = ops.omp(*(t.cuda() for t in given), budget_max=case.n_nonzero, **options, **moved)
            # Of one atom nothing but rounding is left, which may be zero or not.
            for name in ("index", "count", "status")[: 2 if case.n_atoms == 1 else 3]:
                assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), (case, name)
    n_nested = len(SANITIZED_NESTED) + 1
    n_cases = len(SANITIZED) + n_nested + len(SANITIZED_PROJECTS) + len(watched)
    print(f"{n_cases} cases")
    return 0


def layer(case: Case, device: str) -> list[torch.Tensor]:
    """Random codes, equal, row_scale, gate, up, down_t and x."""
    generator = torch.Generator().manual_seed(0)
    d, n_neurons, bits = case.d, case.n_neurons, case.bits
    equal = torch.ones(d)
    rows = [torch.randn(n_neurons, d, generator=generator) / d**0.5 for _ in range(3)]
    scales = [planes.fit_scale(w, equal, bits) for w in rows[:2]]
    pairs = zip(rows[:2], scales, strict=True)
    codes = [planes.encode(w, equal, scale, bits) for w, scale in pairs]
    x = torch.randn(case.batch, d, generator=generator)
    made = [torch.stack(codes, dim=1).contiguous(), equal, torch.stack(scales, dim=1).contiguous()]
    made += [t.to(case.dtype) for t in (*rows, x)]
    return [t.to(device) for t in made]


def pursuits() -> dict[str, Any]:
    """Compare supports with those of float64 on many problems."""
    found: dict[str, Any] = {}
    for case, batches in (
        (cases.PursuitCase("standard", batch=1000, m=256, n_atoms=1024, n_nonzero=32), 10),
        (cases.PursuitCase("large", batch=500, m=512, n_atoms=2048, n_nonzero=64), 4),
    ):
        counts = {"problems": case.batch * batches, "sure": 0, "differ": 0}
        budget = torch.full((case.batch,), case.n_nonzero, dtype=torch.int32).cuda()
        for seed in range(batches):
            problem = case.make(seed=seed)
            gram, correlation, energy = (
                t.cuda() for t in (problem.gram, problem.correlation, problem.energy)
            )
            want, margin = reference.omp_supports(gram, correlation, case.n_nonzero)
            got = ops.omp(
                gram.float(),
                correlation.float(),
                energy.float(),
                budget,
                budget_max=case.n_nonzero,
                coef=False,
            ).index.long()
            sure = margin > pursuits_.MARGIN
            same = (got.sort(dim=1).values == want.sort(dim=1).values).all(dim=1)
            counts["sure"] += int(sure.sum())
            counts["differ"] += int((sure & ~same).sum())
        found[pursuits_.name_of(case)] = counts
    passed = all(c["differ"] <= 0.001 * c["sure"] for c in found.values())
    return {"passed": passed, "supports": found}


def find(program: str) -> str | None:
    """The path of a program of the CUDA toolkit."""
    folders = os.environ.get("PATH", "") + os.pathsep + "/usr/local/cuda/bin"
    return shutil.which(program, path=folders)


def start(command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command whose output is kept."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    """Wait for exit status and output; -1 if it had to be ended."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return -1, output + f"\nended after {seconds} s"
    return process.returncode, output


if __name__ == "__main__":
    raise SystemExit(main())
