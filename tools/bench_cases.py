"""Write the layers that are timed down for the benchmarks in C++.

    python tools/bench_cases.py

From `csfast.bench.timed` to `bench/cases.inc`; tests compare the two.
"""

from __future__ import annotations

import pathlib

import torch

from csfast.bench import timed

PATH = pathlib.Path(__file__).resolve().parents[1] / "bench" / "cases.inc"
HEAD = """\
// Written by tools/bench_cases.py from python/csfast/bench/timed.py: the layers that are timed.
// {name, d, n_neurons, density, batch, block_rows, layers}
"""
QUICK_LAYERS = 2


def line(case: timed.LayerCase, layers: int) -> str:
    """Give a case in C++.

    Raises:
        ValueError: Its code is not the one that the benchmarks in C++ have.
    """
    if case.bits != 2:
        raise ValueError(f"[bench_cases] {case.name}: want the code of kCode in bench/cases.h, 2.")
    sizes = f"{case.d}, {case.n_neurons}, {case.density:g}, {case.batch}, {case.tile_rows}"
    return f'    {{"{case.name}", {sizes}, {layers}}},\n'


def table(name: str, lines: list[str]) -> str:
    """Give a list of cases in C++."""
    return f"inline constexpr Case {name}[] = {{\n{''.join(lines)}}};\n"


def text() -> str:
    """Give the whole file."""
    found = HEAD
    for device, cases in timed.CASES.items():
        lines = [line(case, timed.n_layers_of(case, torch.device(device))) for case in cases]
        found += table(f"k{device.capitalize()}Cases", lines)
    return found + table("kQuickCases", [line(timed.QUICK, QUICK_LAYERS)])


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
