"""The benchmark: what its files hold, and that what it times is right."""

import dataclasses
import json
import math

import pytest
import torch

from csfast import bench, ops, planes, reference

CPU = torch.device("cpu")
SMALL = bench.Setting(192, 256, 0.25)
ROW = {
    "case": str,
    "variant": str,
    "median_us": float,
    "p10_us": float,
    "p90_us": float,
    "bytes": int,
    "fraction_of_read_bandwidth": float,
    "baselines": dict,
    "ratio_vs_best": float,
}


@pytest.fixture(scope="module")
def results():
    return bench.run([SMALL], device=CPU, runs=3, n_layers=2, compiled=False)


def test_results_have_the_agreed_form(results):
    assert set(results) == {"machine", "rows"}
    assert [row["variant"] for row in results["rows"]] == list(bench.VARIANTS)
    for row in results["rows"]:
        assert {name: type(value) for name, value in row.items()} == ROW
        assert row["case"] == "ffn d=192 F=256 density=.25"
        assert set(row["baselines"]) == {"torch bf16", "torch f32"}
        assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
        best = min(row["baselines"].values())
        assert math.isclose(row["ratio_vs_best"], best / row["median_us"])
    json.dumps(results, allow_nan=False)


def test_bandwidth_and_fractions_fit_together(results):
    bandwidth = results["machine"]["read_bandwidth"]
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


def test_a_ternary_layer_is_measured_too():
    setting = bench.Setting(192, 256, 0.25, "ternary")
    found = bench.run([setting], device=CPU, runs=1, n_layers=1, compiled=False)
    assert [row["variant"] for row in found["rows"]] == list(bench.VARIANTS)
    read = {row["variant"]: row["bytes"] for row in found["rows"]}
    assert read["select"] == 2 * 256 * 48 + 8 * 256 + (4 + 2) * 192  # three groups of 80 channels
    assert {row["case"] for row in found["rows"]} == {"ffn d=192 F=256 density=.25 bits=ternary"}


@pytest.mark.parametrize("bits", [2, "ternary"])
def test_random_layers_are_sensed_as_trained_ones_are(bits):
    """The shared row scale is no worse than a twentieth more error than one fitted for each row."""
    setting = dataclasses.replace(SMALL, bits=bits)
    layer = bench._random_layer(setting, torch.Generator().manual_seed(0), CPU)
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
    found = bench.run([SMALL], device=CPU, runs=1, n_layers=1, variants=("sense",), compiled=False)
    assert [row["variant"] for row in found["rows"]] == ["sense"]


def test_equal_seeds_give_equal_layers():
    one, other = (
        bench._random_layer(SMALL, torch.Generator().manual_seed(3), CPU) for _ in range(2)
    )
    assert torch.equal(one.codes, other.codes) and torch.equal(one.x, other.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ("prefill",)}, r"^\[bench\] variant 'prefill': want one of complete"),
        ({"settings": [bench.Setting(64, 64, 0.0)]}, r"^\[bench\] density = 0.0: want"),
        ({"settings": [bench.Setting(64, 64, 1.5)]}, r"^\[bench\] density = 1.5: want"),
    ],
)
def test_refuses_what_it_cannot_measure(options, message):
    with pytest.raises(ValueError, match=message):
        bench.run(**{"settings": [SMALL], "device": CPU, **options})
