"""Write the layers that are timed down for the benchmarks in C++.

    python tools/bench_cases.py

From `csfast.bench.timed` to `bench/cases.inc` and `bench/matrices.inc`; tests compare the two.
"""

from __future__ import annotations

import pathlib

import torch

from csfast.bench import timed

PATH = pathlib.Path(__file__).resolve().parents[1] / "bench" / "cases.inc"
MATRICES_PATH = PATH.with_name("matrices.inc")
HEAD = """\
// Written by tools/bench_cases.py from python/csfast/bench/timed.py: the layers that are timed.
// {name, d, n_neurons, density, batch, block_rows, layers}
"""
MATRICES_HEAD = """\
// Written by tools/bench_cases.py from python/csfast/bench/timed.py: the matrices that are timed.
// Bits are those of each level; none stand for the matrix itself.
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


def levels(bits: tuple[int, ...]) -> str:
    """Give the bits of a matrix in C++."""
    return f'"{"+".join(map(str, bits))}"'


def matrix(case: timed.MatrixCase) -> str:
    """Give a matrix in C++."""
    return f'    {{"{case.name}", {case.rows}, {case.cols}, {levels(case.bits)}, {case.batch}}},\n'


def passed(case: timed.PassCase) -> str:
    """Give a pass in C++."""
    bits = case.bits or ((),) * len(timed.PASS)
    return f'    {{"{case.name}", {{{", ".join(map(levels, bits))}}}, {case.batch}}},\n'


def matrices_text() -> str:
    """Give the whole file of matrices."""
    shapes = ", ".join(f"{{{rows}, {cols}}}" for rows, cols in timed.PASS.values())
    found = MATRICES_HEAD
    for name, cases in (("kMatrices", timed.MATRICES), ("kQuickMatrices", timed.QUICK_MATRICES)):
        found += f"inline constexpr Matrix {name}[] = {{\n{''.join(map(matrix, cases))}}};\n"
    found += f"inline constexpr Matrix kEncoded = {matrix(timed.ENCODED).strip().rstrip(',')};\n"
    found += f"inline constexpr int kPassLayers = {timed.PASS_LAYERS};\n"
    found += f"inline constexpr Shape kPassShapes[] = {{\n    {shapes}}};\n"
    return found + (
        f"inline constexpr Pass kPasses[] = {{\n{''.join(map(passed, timed.PASSES))}}};\n"
    )


if __name__ == "__main__":
    MATRICES_PATH.write_text(matrices_text(), encoding="utf-8")
    PATH.write_text(text(), encoding="utf-8")
