"""The list of layers that are timed, and that the benchmarks in C++ have the same."""

import importlib.util
import json
import pathlib

import pytest
import torch

from csfast.bench import timed
from csfast.bench.timed import LayerCase

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("cases", ROOT / "tools" / "bench_cases.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_names_say_what_differs_from_the_ordinary():
    assert LayerCase(2048, 8192, 0.25).name == "ffn d=2048 F=8192 density=.25"
    assert LayerCase(64, 64, 1.0, "ternary").name == "ffn d=64 F=64 density=1.00 bits=ternary"
    case = LayerCase(64, 64, 0.1, tile_rows=16, batch=4)
    assert case.name == "ffn d=64 F=64 density=.10 blocks=16 batch=4 joint"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_has_a_name_of_its_own(device):
    names = [case.name for case in timed.CASES[device]]
    assert len(set(names)) == len(names) > 0
    assert {case.name for case in timed.BESIDE_TORCH[device]} <= set(names)


@pytest.mark.parametrize("cases", [timed.CASES, timed.BESIDE_TORCH], ids=["all", "beside torch"])
def test_cases_of_one_shape_and_batch_are_neighbours(cases):
    """They share weights, which are made anew whenever the shape or the batch changes."""
    for of_device in cases.values():
        made = [(case.d, case.n_neurons, case.batch) for case in of_device]
        changes = sum(made[i] != made[i - 1] for i in range(1, len(made)))
        assert changes == len(set(made)) - 1


def test_the_native_benchmarks_have_the_list(tool):
    assert tool.PATH.read_text(encoding="utf-8") == tool.text()
    for device, cases in timed.CASES.items():
        for case in cases:
            layers = timed.n_layers_of(case, torch.device(device))
            assert f'{{"{case.name}", {case.d}, {case.n_neurons}, ' in tool.line(case, layers)
    assert tool.MATRICES_PATH.read_text(encoding="utf-8") == tool.matrices_text()
    names = [case.name for case in (*timed.MATRICES, *timed.PASSES)]
    assert len(set(names)) == len(names)
    assert timed.MATRICES[-1].name == "sketch rows=2048 cols=8192 bits=3+3 batch=16"
    assert tool.matrix(timed.MATRICES[-1]).endswith('", 2048, 8192, "3+3", 16},\n')
    assert timed.PASSES[3].name == "sketch SmolLM2-135M bits=3,gate_up=2,head=4"
    assert tool.passed(timed.PASSES[3]).endswith('", {"3", "3", "2", "3", "4"}, 1},\n')


def test_the_native_benchmarks_have_one_code(tool):
    with pytest.raises(ValueError, match=r"bits=3: want the code of kCode"):
        tool.line(LayerCase(64, 64, 0.25, bits=3), 2)
    assert "kCode = Code::kBits2;" in (ROOT / "bench" / "cases.h").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "cases"),
    [
        ("h200/native", timed.CASES["cuda"]),
        ("h200/layers", timed.BESIDE_TORCH["cuda"]),
        ("cpu/layers", timed.CASES["cpu"]),
        ("cpu/native", timed.CASES["cpu"]),
    ],
)
def test_what_was_recorded_are_cases_of_the_list(file, cases):
    rows = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))["rows"]
    assert {row["case"] for row in rows} <= {case.name for case in cases}


def test_no_recorded_row_reads_faster_than_reading():
    """Null stands where what was measured with was slower than what was measured."""
    found = [
        row["fraction_of_read_bandwidth"]
        for path in sorted(RESULTS.rglob("*.json"))
        for row in json.loads(path.read_text(encoding="utf-8")).get("rows", ())
        if "fraction_of_read_bandwidth" in row
    ]
    known = [fraction for fraction in found if fraction is not None]
    assert known and all(0 < fraction <= 1 for fraction in known)


def test_rows_of_all_benchmarks_have_the_same_keys():
    keys = set()
    for path in sorted(RESULTS.rglob("*.json")):
        for row in json.loads(path.read_text(encoding="utf-8")).get("rows", ()):
            if row.get("case", "").startswith("ffn "):
                keys.add(tuple(row))
    assert len(keys) == 1
