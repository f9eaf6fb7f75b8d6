"""Time the chain of `sketch_gemv.cu` in torch: int4 and bfloat16, one row, one CUDA graph.

    python bench/studies/sketch_gemv.py [--runs N] [--record gemv.json --json FILE --commit HASH]

The linears of eight layers of the 8B shape, each reading the first outputs of the one before, by
`torch._weight_int4pack_mm` with groups of 64 and 128, each with the packing that is fastest, and by
`torch.nn.functional.linear` in bfloat16. Run it on the machine and directly behind `sketch_gemv
--json gemv.json`; `--record` puts the rows of both into one file with a head.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
LAYERS = 8  # their weights are many times the second-level cache

Linear = Callable[[Tensor], Tensor]


def int4_linear(rows: int, cols: int, group: int, inner: int) -> Linear:
    """Give a linear of random 4-bit weights, packed as torch wants them."""
    codes = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, device="cuda")
    packed = torch._convert_weight_to_int4pack(codes, inner)
    scales = torch.full((cols // group, rows, 2), 0.25 / cols**0.5, device="cuda")
    scales[..., 1] = 0
    steps = scales.to(torch.bfloat16)
    return lambda x: torch._weight_int4pack_mm(x, packed, group, steps)


def dense_linear(rows: int, cols: int) -> Linear:
    """Give a linear of random bfloat16 weights."""
    weight = torch.randn(rows, cols, dtype=torch.bfloat16, device="cuda") / cols**0.5
    return lambda x: torch.nn.functional.linear(x, weight)


def graph_of(linears: list[Linear], x: Tensor) -> torch.cuda.CUDAGraph:
    """Capture one pass of x through the linears."""

    def work() -> Tensor:
        y = x
        for linear, (_, cols) in zip(linears, list(SHAPES.values()) * LAYERS, strict=True):
            y = linear(y[:, :cols])
        return y

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = work()
    graph.replay()
    torch.cuda.synchronize()
    if not torch.isfinite(out).all():
        raise ValueError("[sketch_gemv] outputs that are not finite: want weights that keep them.")
    return graph


def timed(graphs: dict[str, torch.cuda.CUDAGraph], runs: int) -> dict[str, list[float]]:
    """Give microseconds a layer of each replay; graphs take turns."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for run in range(-3, runs):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if run >= 0:
                times[name].append(1e3 * begin.elapsed_time(end) / LAYERS)
    return times


def row_of(name: str, times: list[float], bits: float) -> dict[str, Any]:
    """Give a row as `sketch_gemv` writes it."""
    tenths = statistics.quantiles(times, n=10)
    weights = sum(rows * cols for rows, cols in SHAPES.values())
    return {
        "design": name,
        "bits": bits,
        "median_us": float(f"{statistics.median(times):.5g}"),
        "p10_us": float(f"{tenths[0]:.5g}"),
        "p90_us": float(f"{tenths[-1]:.5g}"),
        "bytes": round(weights * bits / 8),
    }


def main() -> None:
    """Time the chains, print a row each, write the file that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--record", type=Path, help="rows that `sketch_gemv --json` wrote")
    parser.add_argument("--json", type=Path, help="where rows of both go")
    parser.add_argument("--commit", help="what both are made from")
    options = parser.parse_args()
    x = torch.randn(1, 4096, dtype=torch.bfloat16, device="cuda")
    shapes = list(SHAPES.values()) * LAYERS
    graphs, bits = {}, {}
    kept = []  # what graphs read
    for group in (64, 128):
        for inner in (2, 4, 8):
            linears = [int4_linear(*shape, group, inner) for shape in shapes]
            name = f"torch int4pack group={group} inner={inner}"
            graphs[name], bits[name] = graph_of(linears, x), 4 + 32 / group
            kept.append(linears)
    linears = [dense_linear(*shape) for shape in shapes]
    graphs["torch bf16"], bits["torch bf16"] = graph_of(linears, x), 16
    kept.append(linears)
    rows = [row_of(name, times, bits[name]) for name, times in timed(graphs, options.runs).items()]
    for row in rows:
        print(*(f"{key}={value}" for key, value in row.items()))
    if options.record:
        found = json.loads(options.record.read_text())
        document = {
            "format": "csfast results 1",
            "command": ["sketch_gemv.py", "--record", "gemv.json"],
            "commit": options.commit,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "machine": {"device": "cuda", "gpu": torch.cuda.get_device_name()},
            "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
            "read_bandwidth": found["read_bandwidth"],
            "rows": found["rows"] + rows,
        }
        options.json.write_text(json.dumps(document))


if __name__ == "__main__":
    main()
