"""The benchmark: what its files hold, and that what it times is right."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import pytest
import torch

from csfast import ops, reference
from csfast.bench import head, timed
from csfast.bench import layers as layers_
from csfast.bench.cases import CASES
from csfast.bench.timed import LayerCase
from csfast.codes import planes
from csfast.session import ffn_workspace
from numeric import assert_within, execute_tolerance, made

ROOT = pathlib.Path(__file__).parents[2]
CPU = torch.device("cpu")
CUDA = torch.device("cuda")
SMALL = LayerCase(192, 256, 0.25)
ROW = {
    "case": str,
    "variant": str,
    "density": float,
    "batch": int,
    "median_us": float,
    "p10_us": float,
    "p90_us": float,
    "bytes": int,
    "fraction_of_read_bandwidth": float,
    "workspace_bytes": int | None,
    "baselines": dict,
    "ratio_vs_best": float,
    "ratio_vs_dense": float,
    "sigma": float | None,
}


def check_form(results, variants=layers_.VARIANTS):
    """What holds for the rows of any run of one case, on every device."""
    assert head.faults(results) == []
    assert {*results} - {*head.KEYS} == {"notes", "read_bandwidth", "rows"}
    assert [row["variant"] for row in results["rows"]] == list(variants)
    for row in results["rows"]:
        assert list(row) == list(ROW)
        for name, kind in ROW.items():
            assert isinstance(row[name], kind), name
        assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
        best = min(row["baselines"].values())
        assert math.isclose(row["ratio_vs_best"], best / row["median_us"])
        dense = min(us for name, us in row["baselines"].items() if name.startswith("torch"))
        assert math.isclose(row["ratio_vs_dense"], dense / row["median_us"])
        if row["variant"] in layers_.EXECUTE:
            assert math.isclose(row["sigma"], row["density"] * row["ratio_vs_dense"])
        else:
            assert row["sigma"] is None
        assert (row["workspace_bytes"] is None) == (row["variant"] != "complete")
    json.dumps(results, allow_nan=False)


@pytest.fixture(scope="module")
def results():
    return layers_.run([SMALL], device=CPU, runs=3, n_layers=2, compiled=False)


def test_results_have_the_agreed_form(results):
    check_form(results)
    for row in results["rows"]:
        assert row["case"] == "ffn d=192 F=256 density=.25"
        assert set(row["baselines"]) == {"torch bf16", "torch f32"}


def test_bandwidth_and_fractions_fit_together(results):
    bandwidth = results["read_bandwidth"]
    assert bandwidth > 1e8
    for row in results["rows"]:
        want = row["bytes"] / (row["median_us"] / 1e6) / bandwidth
        assert math.isclose(row["fraction_of_read_bandwidth"], want)


def test_bytes_are_those_of_the_layer(results):
    read = {row["variant"]: row["bytes"] for row in results["rows"]}
    kept = SMALL.density * SMALL.n_neurons
    assert read["execute"] == kept * (3 * 2 * SMALL.d + 4) + 2 * SMALL.d
    assert read["select"] == planes.n_bytes(SMALL.n_neurons, SMALL.d, SMALL.bits) + 2 * SMALL.d
    assert read["complete"] == read["select"] + read["execute"]


def test_blocks_are_measured_as_blocks():
    case = LayerCase(192, 256, 0.25, tile_rows=16)
    found = layers_.run([case], device=CPU, runs=1, n_layers=1, compiled=False)
    assert {row["case"] for row in found["rows"]} == {"ffn d=192 F=256 density=.25 blocks=16"}
    read = {row["variant"]: row["bytes"] for row in found["rows"]}
    assert read["execute"] == 4 * (16 * 3 * 2 * 192 + 4) + 2 * 192  # four blocks of sixteen
    assert found["machine"]["isa"] == ops.isa()


def test_rows_of_a_batch_share_a_support():
    case = LayerCase(192, 256, 0.25, batch=4)
    found = layers_.run([case], device=CPU, runs=1, n_layers=2, compiled=False)
    check_form(found)
    assert {row["case"] for row in found["rows"]} == {"ffn d=192 F=256 density=.25 batch=4 joint"}
    read = {row["variant"]: row["bytes"] for row in found["rows"]}
    assert read["execute"] == 64 * (3 * 2 * 192 + 4) + 4 * 2 * 192  # every neuron once for all rows
    assert read["select"] == planes.n_bytes(256, 192, 2) + 4 * 2 * 192
    space = next(row["workspace_bytes"] for row in found["rows"] if row["variant"] == "complete")
    assert space == ffn_workspace(4, 192, 256, CPU)


def test_sigma_is_the_share_of_the_dense_time_that_is_due_over_the_time_taken():
    assert layers_.sigma(0.25, 80.0, 20.0) == 1.0  # a quarter of the work in a quarter of the time
    assert layers_.sigma(0.1, 90.0, 18.0) == 0.5
    assert layers_.sigma(1.0, 90.0, 100.0) == 0.9


def test_a_row_that_reads_faster_than_reading_is_named(results):
    rows = [{**row, "fraction_of_read_bandwidth": 0.99} for row in results["rows"]]
    assert layers_.too_fast(rows) == []
    rows[1]["fraction_of_read_bandwidth"] = 1.04
    assert layers_.too_fast(rows) == [
        "ffn d=192 F=256 density=.25 execute: 1.040 of what reading alone reaches: want at most 1."
    ]


@pytest.mark.parametrize(("device", "count"), [("cpu", 2), ("cuda", 2), ("cuda", 100)])
def test_reading_takes_turns_over_the_weights_of_all_layers(monkeypatch, device, count):
    seen = []

    class Reader:
        def __init__(self, tables):
            self.tables = tables

        def __call__(self):
            seen.extend(self.tables)

    class Table:
        def __init__(self):
            self.device = torch.device(device)

        def numel(self):
            return 1000

        def element_size(self):
            return 2

    monkeypatch.setattr(layers_, "Reader", Reader)
    none = (None,) * 4
    layers = [layers_._Layer(Table(), Table(), None, Table(), *none, None) for _ in range(count)]
    read, n_bytes = layers_._reading(layers)
    calls = 3 * count if device == "cpu" else count  # a graph has one for each layer
    for call in range(calls):
        read(call % count)
    assert len(seen) * 2000 == calls * n_bytes
    wanted = {table for layer in layers for table in (layer.gate, layer.up, layer.down_t)}
    assert set(seen) == wanted and len(seen) == len(wanted)


@pytest.mark.parametrize("case", timed.CASES["cuda"], ids=lambda s: s.name)
def test_no_cache_holds_what_a_variant_reads(case):
    """An L2 of 60 MB, and the least that is read: by select, or at this density by execute."""
    read = layers_._bytes(case, case.density * case.n_neurons)
    for variant in ("select", "execute"):
        assert read[variant] * timed.n_layers_of(case, CUDA) > 2 * (60 << 20), variant


def test_at_least_32_layers_rotate_unless_they_are_large():
    for case in timed.CASES["cuda"]:
        large = 3 * 2 * case.d * case.n_neurons > 1 << 30
        assert timed.n_layers_of(case, CUDA) >= (8 if large else 32)


def test_gathered_neurons_are_the_layer_of_these_neurons():
    p = made(CASES[2], torch.float32, "cpu")
    neurons = torch.tensor([3, 4, 50, 76])
    got = layers_.gathered(p.gate, p.up, p.down_t, p.x, neurons)
    want = reference.execute(p.gate, p.up, p.down_t, p.x, [neurons], tile_rows=1)
    mask = torch.zeros(len(p.x), CASES[2].n_neurons, dtype=torch.bool)
    mask[:, neurons] = True
    assert_within(got, want, execute_tolerance(p.gate, p.up, p.down_t, p.x, mask))


def test_neurons_of_tiles_are_listed_in_order():
    tiles = ops.TileList(torch.tensor([[1, 3, 9]], dtype=torch.int32), torch.tensor([2]), 4)
    case = LayerCase(64, 64, 0.25, tile_rows=4)
    assert layers_._neurons(case, tiles).tolist() == [4, 5, 6, 7, 12, 13, 14, 15]


def test_the_threshold_of_a_density_keeps_that_many():
    values = torch.tensor([[0.5, -4.0, 1.0, -2.0, 3.0, 0.0, -0.25, 8.0]])
    for density, kept in ((0.1, 1), (0.25, 2), (0.5, 4), (0.9, 7), (1.0, 8)):
        assert int((values.abs() > layers_.threshold_of(values, density)).sum()) == kept
    assert layers_.threshold_of(values, 0.5) == 1.5  # halfway between what is kept and what is not
    equal = torch.ones(1, 8)
    assert int((equal > layers_.threshold_of(equal, 0.5)).sum()) == 0


def sparse_baselines(case, monkeypatch, installed):
    """The sparse baselines of a GPU, closures over a layer on the CPU, and the notes."""
    seen = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: (sys if installed else None) if name == "triton" else seen(name),
    )
    layer = layers_._random_layer(case, torch.Generator().manual_seed(0), CPU)
    kept = torch.arange(case.n_neurons // case.tile_rows, dtype=torch.int32)[None]
    tiles = ops.TileList(kept, torch.tensor([4], dtype=torch.int32), case.tile_rows)
    notes = {}
    found = layers_._sparse_baselines(case, [layer], [tiles], CUDA, notes)
    return found, notes, layer


def test_without_triton_a_note_says_so(monkeypatch):
    found, notes, layer = sparse_baselines(SMALL, monkeypatch, installed=False)
    assert list(found) == [layers_.GATHER]
    assert found[layers_.GATHER](0).shape == layer.x.shape
    assert notes == {layers_.TEAL: "unavailable: triton is not installed"}


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (dataclasses.replace(SMALL, batch=4), "rows share a support"),
        (dataclasses.replace(SMALL, tile_rows=16), "in blocks"),
    ],
)
def test_the_rule_of_teal_is_left_out_where_it_has_no_meaning(case, why, monkeypatch):
    found, notes, _ = sparse_baselines(case, monkeypatch, installed=True)
    assert list(found) == [layers_.GATHER]
    assert why in notes[layers_.TEAL]


def test_on_the_cpu_nothing_sparse_is_compared_with():
    layer = layers_._random_layer(SMALL, torch.Generator().manual_seed(0), CPU)
    notes = {}
    assert layers_._sparse_baselines(SMALL, [layer], [], CPU, notes) == {}
    assert notes == {}


def test_no_search_begins_when_its_time_is_spent():
    compiler = layers_._Compiler(CUDA)
    assert compiler.name == "torch.compile max-autotune bf16"
    compiler.seconds = layers_.COMPILE_SECONDS
    layer = layers_._random_layer(SMALL, torch.Generator().manual_seed(0), CPU)
    notes = {}
    assert compiler.compile((layer.gate, layer.up, layer.down, layer.x), notes) is None
    shape = "torch.compile max-autotune bf16 d=192 F=256 batch=1"
    assert notes == {shape: "left out: 60 s were spent on others"}


def test_the_benchmark_is_there_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; from csfast import bench, cli; "
        "assert 'csfast.bench.teal' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(ops.cuda_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ops.BackendError, match=r"^\[doctor\] device cuda: want a GPU"):
        layers_.run(timed.CASES["cuda"], device=CUDA)


@pytest.mark.gpu
@pytest.mark.skipif(not ops.cuda_available(), reason="needs a CUDA device and a build with CUDA")
@pytest.mark.parametrize("batch", [1, 4])
def test_a_gpu_has_every_baseline(batch):
    case = LayerCase(512, 1024, 0.25, batch=batch)
    found = layers_.run([case], device=CUDA, runs=2, n_layers=2, compiled=False)
    check_form(found)
    teal = {layers_.TEAL} if batch == 1 and importlib.util.find_spec("triton") else set()
    assert set(found["rows"][0]["baselines"]) == {"torch bf16", layers_.GATHER} | teal
    assert found["read_bandwidth"] > 1e11
    assert "gpu" in found["machine"] and {"driver", "cuda"} <= set(found["versions"])


@pytest.mark.gpu
@pytest.mark.skipif(not ops.cuda_available(), reason="needs a CUDA device and a build with CUDA")
def test_a_gpu_compiles_each_shape_once():
    cases = [LayerCase(512, 1024, density) for density in (0.5, 0.25)]
    found = layers_.run(cases, device=CUDA, runs=2, n_layers=2, variants=("execute",))
    names = [set(row["baselines"]) for row in found["rows"]]
    compiled = "torch.compile max-autotune bf16"
    assert compiled in found["notes"] or all(compiled in name for name in names)
    assert found["compile_seconds"] > 0


def test_a_ternary_layer_is_measured_too():
    case = LayerCase(192, 256, 0.25, "ternary")
    found = layers_.run([case], device=CPU, runs=1, n_layers=1, compiled=False)
    assert [row["variant"] for row in found["rows"]] == list(layers_.VARIANTS)
    read = {row["variant"]: row["bytes"] for row in found["rows"]}
    assert read["select"] == 2 * 256 * 48 + 8 * 256 + (4 + 2) * 192  # three groups of 80 channels
    assert {row["case"] for row in found["rows"]} == {"ffn d=192 F=256 density=.25 bits=ternary"}


@pytest.mark.parametrize("bits", [2, "ternary"])
def test_random_layers_are_sensed_as_trained_ones_are(bits):
    """The shared row scale is no worse than a twentieth more error than one fitted for each row."""
    case = dataclasses.replace(SMALL, bits=bits)
    layer = layers_._random_layer(case, torch.Generator().manual_seed(0), CPU)
    y, scale = ops.sense(layer.codes, layer.equal, layer.x, bits=bits)
    estimate = reference.usage(y, scale, layer.row_scale)
    x = layer.x.double()
    a = torch.nn.functional.silu(x @ layer.gate.double().T) * (x @ layer.up.double().T)
    true = a.abs() * layer.down_t.double().norm(dim=1)
    top = true.topk(64).indices[0]
    kept = torch.zeros(SMALL.n_neurons, dtype=torch.bool)
    kept[estimate.topk(64).indices[0]] = True
    assert kept[top].double().mean() > 0.6  # chance is .25


def test_one_variant_alone():
    found = layers_.run(
        [SMALL], device=CPU, runs=1, n_layers=1, variants=("sense",), compiled=False
    )
    assert [row["variant"] for row in found["rows"]] == ["sense"]


def test_equal_seeds_give_equal_layers():
    one, other = (
        layers_._random_layer(SMALL, torch.Generator().manual_seed(3), CPU) for _ in range(2)
    )
    assert torch.equal(one.codes, other.codes) and torch.equal(one.x, other.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ("prefill",)}, r"^\[bench\] variant 'prefill': want one of complete"),
        ({"cases": [LayerCase(64, 64, 0.0)]}, r"^\[bench\] density = 0.0: want"),
        ({"cases": [LayerCase(64, 64, 1.5)]}, r"^\[bench\] density = 1.5: want"),
        ({"cases": [LayerCase(64, 64, 0.5, batch=0)]}, r"^\[bench\] batch = 0: want at"),
        (
            {"cases": [LayerCase(64, 64, 0.5, tile_rows=24)]},
            r"^\[bench\] tile_rows = 24 of 64 neurons: want a divisor\.",
        ),
    ],
)
def test_refuses_what_it_cannot_measure(options, message):
    with pytest.raises(ValueError, match=message):
        layers_.run(**{"cases": [SMALL], "device": CPU, **options})
