"""Rules whose precision follows the support: what they run, count and store."""

import pytest
import torch

import tiny
from csfast import judge, models
from csfast.judge import rules
from csfast.judge.rules import catalogue, mixed
from csfast.judge.rules.mixed import Storage
from csfast.types import LayerShape
from texts import TASKS

SHAPE = LayerShape(d=384, n_neurons=1152)
KINDS = ("llama-bias", "gemma")
METHODS = ("mixed-3+3", "mixed-2+4-g32", "mixed-3+3-plain", "mixed-3+3-cell", "mixed-3+3-usage")
SEPARATE = ("drop-3+3", "mixed-3/6", "drop-2/4", "drop-2/16")


@pytest.fixture(scope="module", params=KINDS)
def fit(request):
    ffns = models.find_ffns(tiny.make_model(request.param))
    draw = torch.Generator().manual_seed(3)
    rows, columns = 4, 50
    where = judge.Where(
        rows,
        columns,
        torch.arange(rows).repeat_interleave(columns),
        torch.arange(columns).repeat(rows),
        torch.arange(rows).repeat_interleave(5),
        torch.arange(rows) % len(TASKS),
        TASKS,
        len(TASKS),
    )
    inputs = [torch.randn(rows * columns, 64, generator=draw) for _ in ffns]
    return rules.Fit(tiny.make_model(request.param), ffns, judge.Sample(inputs, where, {}))


@torch.no_grad()
def run(rule, fit, density, layer=0):
    (thresholds,) = rule.calibrate(fit.sample, [density])
    return rule.run(layer, fit.sample.inputs[layer], thresholds[layer], fit.sample.where)


def error_of(rule, fit, density):
    out, _ = run(rule, fit, density)
    ffn, x = fit.ffns[0], fit.sample.inputs[0]
    with torch.no_grad():
        exact = ffn.module(x)
    return float((out - exact).norm() / exact.norm())


@pytest.mark.parametrize("method", [*METHODS, *SEPARATE])
def test_more_bytes_are_less_error(fit, method):
    rule = catalogue.build(method, fit)
    errors = [error_of(rule, fit, density) for density in (0.15, 0.5, 1.0)]
    assert errors[0] > errors[1] > errors[2]
    # Six bits in all err by a few per cent of a standard deviation, four by a quarter.
    assert errors[2] < {"drop-2/4": 0.25, "drop-2/16": 1e-6}.get(method, 0.1)


@pytest.mark.parametrize("method", [*METHODS, *SEPARATE])
def test_the_share_asked_for_is_read(fit, method):
    rule = catalogue.build(method, fit)
    shape = fit.ffns[0].shape
    empty, full = rule.sensor_bytes(shape), rule.n_bytes(shape, rule.full(shape))
    for share in (0.2, 0.6, 1.0):
        _, read = run(rule, fit, share)
        spent = rule.n_bytes(shape, read.double().mean(dim=0).tolist())
        # Whole neurons of 200 tokens on one dial.
        assert spent == pytest.approx(empty + share * (full - empty), abs=0.01 * (full - empty))


def test_the_layer_that_is_not_refined_is_the_base(fit):
    """With thresholds nothing exceeds, the base alone is run; with those of all, everything."""
    rule = catalogue.build("mixed-3+3", fit)
    x = fit.sample.inputs[0]
    with torch.no_grad():
        nothing, read = rule.run(0, x, (float("inf"), float("inf")), fit.sample.where)
        base, of_base = rule.run(0, x, (0.0, float("inf")), fit.sample.where)
    assert read.sum() == 0 and of_base.tolist() == [[160, 0]] * len(x)
    bias = fit.ffns[0].down.bias
    assert torch.equal(nothing, torch.zeros_like(x) if bias is None else bias.detach().expand_as(x))
    with torch.no_grad():
        exact = fit.ffns[0].module(x)
    assert 0.02 < float((base - exact).norm() / (exact - nothing).norm()) < 0.5


def test_not_a_number_is_read_in_full(fit):
    rule = catalogue.build("mixed-3+3", fit)
    x = fit.sample.inputs[0][:3].clone()
    x[1, 5] = float("nan")
    with torch.no_grad():
        _, read = rule.run(0, x, (float("inf"), float("inf")), fit.sample.where)
    assert read.tolist() == [[0, 0], [160, 160], [0, 0]]


def test_feedback_helps_where_inputs_are_alike(fit):
    """On inputs of few directions, codes with feedback err less than those without."""
    draw = torch.Generator().manual_seed(5)
    few = torch.randn(8, 64, generator=draw)
    inputs = [torch.randn(200, 8, generator=draw) @ few for _ in fit.ffns]
    alike = rules.Fit(fit.model, fit.ffns, judge.Sample(inputs, fit.sample.where, {}))
    errors = [
        error_of(catalogue.build(method, alike), alike, 1.0)
        for method in ("mixed-2+2", "mixed-2+2-plain")
    ]
    assert errors[0] < 0.7 * errors[1]


def test_names():
    assert Storage.parse("mixed-3+3") == Storage(True, 3, 3, is_nested=True)
    assert Storage.parse("drop-2/16-g128-plain") == Storage(
        False, 2, 16, is_nested=False, group=128, has_feedback=False
    )
    assert Storage.parse("mixed-3+3-cell-usage") == Storage(
        True, 3, 3, is_nested=True, is_relative=True, by_usage=True
    )
    for name in ("mixed-3", "mixed-3+16", "mixed-0+3", "mixed-3+3-g", "planes-b2", "mixed-3+3-x"):
        assert Storage.parse(name) is None


@pytest.mark.parametrize("name", ["mixed-3+16", "mixed-9+3", "drop-3"])
def test_another_name_is_refused(name):
    with pytest.raises(ValueError, match=rf"^\[ablate\] method '{name.replace('+', '.')}': want"):
        catalogue.family(name)


def test_bytes_by_hand():
    """A row of 384 weights has six groups of 64, each of a byte, and a scale of two."""
    base, level = 384 * 3 / 8 + 6 + 2, 384 * 3 / 8 + 6 + 2
    nested = Storage.parse("mixed-3+3")
    assert mixed.base_row_bytes(nested, SHAPE) == base == mixed.full_row_bytes(nested, SHAPE)
    assert mixed.stored_bytes(nested, SHAPE) == 1152 * (3 * (base + level) + 2) + 384 * 2
    # Refinement in fixed fractions of the base's steps has none of its own.
    cell = Storage.parse("mixed-3+3-cell")
    assert mixed.base_row_bytes(cell, SHAPE) == base
    assert mixed.full_row_bytes(cell, SHAPE) == 144
    # A sensing copy has no down rows.
    copy = Storage.parse("drop-3/16")
    assert mixed.stored_bytes(copy, SHAPE) == 1152 * (2 * base + 3 * 768 + 2) + 384 * 2
    apart = Storage.parse("mixed-3/6-g128")
    assert mixed.base_row_bytes(apart, SHAPE) == 384 * 3 / 8 + 3 + 2
    assert mixed.stored_bytes(apart, SHAPE) == 1152 * (3 * (149 + 293) + 2) + 384 * 2
