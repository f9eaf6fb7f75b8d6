"""Rules that choose what is read: what they keep, what they compute and what they count."""

import pytest
import torch

import tiny
from csfast import baselines, models, ops, planes, reference
from csfast.types import LayerShape

SHAPE = LayerShape(d=384, n_neurons=1152)
METHODS = (
    "oracle-neuron",
    "ternary",
    "planes-b1",
    "planes-b2",
    "planes-b3",
    "planes-b4",
    "teal",
    "cats",
    "lowrank-8",
    "griffin",
    "static",
    "rtn-int8",
    "rtn-int2",
)
SELECTING = tuple(name for name in METHODS if not name.startswith("rtn"))


@pytest.fixture(scope="module")
def model():
    return tiny.make_model()


@pytest.fixture(scope="module")
def ffns(model):
    return models.find_ffns(model)


@pytest.fixture(scope="module")
def inputs():
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(200, 64, generator=draw) for _ in range(2)]


@pytest.fixture(scope="module")
def rules(ffns, inputs):
    built = dict(zip(METHODS, baselines.build(METHODS, ffns, inputs), strict=True))
    for layer, x in enumerate(inputs):
        built["griffin"].observe(layer, x[:20])
    return built


@torch.no_grad()
def run(rule, layer, x, density):
    (thresholds,) = rule.thresholds(layer, x, [density])
    return rule.run(layer, x, thresholds)


@pytest.mark.parametrize("method", SELECTING)
def test_full_density_is_the_dense_layer(rules, ffns, inputs, method):
    for layer, (ffn, x) in enumerate(zip(ffns, inputs, strict=True)):
        out, read = run(rules[method], layer, x, 1.0)
        with torch.no_grad():
            assert torch.equal(out, ffn.module(x))
        assert read.tolist() == [len(x) * 64, len(x) * 160]


@pytest.mark.parametrize("method", SELECTING)
def test_the_density_asked_for_is_kept_on_the_calibration_inputs(rules, inputs, method):
    for density in (0.1, 0.5):
        _, read = run(rules[method], 0, inputs[0], density)
        kept = rules[method].density(LayerShape(64, 160), *(read / len(inputs[0])).tolist())
        # A quantile of 200 tokens; one neuron's share where a rule keeps neurons for all tokens.
        assert kept == pytest.approx(density, abs=1 / 160)


def test_the_oracle_beats_every_rule_that_keeps_neurons(rules, ffns, inputs):
    with torch.no_grad():
        dense = ffns[0].module(inputs[0])
    error = {
        method: (run(rules[method], 0, inputs[0], 0.3)[0] - dense).square().sum().item()
        for method in SELECTING
        if method != "teal"
    }
    assert min(error, key=error.get) == "oracle-neuron"
    assert error["planes-b1"] > error["ternary"] > error["planes-b2"]
    assert error["planes-b2"] > error["planes-b3"] > error["planes-b4"]
    assert error["planes-b2"] < error["static"]


def method_of(bits):
    return bits if bits == "ternary" else f"planes-b{bits}"


@pytest.mark.parametrize("bits", [1, 2, 3, 4, "ternary"])
def test_planes_estimate_what_the_reference_estimates(rules, ffns, inputs, bits):
    rule, x, ffn = rules[method_of(bits)], inputs[1], ffns[1]
    equal = planes.equalizer(x.square().mean(dim=0))
    weights = (ffn.gate.weight, ffn.up.weight, ffn.down.weight)
    layer = baselines.LayerPlan.fit(*weights, equal, (bits,))
    codes = layer.encode(*weights, bits=bits)
    y, scale = reference.sense(codes, equal, x, bits=bits)
    expected = reference.usage(y, scale, layer.row_scale[bits])
    with torch.no_grad():
        usage = rule.score(1, x, x, x)
    # Six float32 roundings of a product of three factors, and the exponential of silu.
    assert torch.allclose(usage.double(), expected, rtol=16 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("bits", [2, 3, "ternary"])
def test_planes_keep_what_the_native_operation_keeps(rules, ffns, inputs, bits):
    rule, x, ffn = rules[method_of(bits)], inputs[0], ffns[0]
    equal = planes.equalizer(x.square().mean(dim=0))
    weights = (ffn.gate.weight, ffn.up.weight, ffn.down.weight)
    layer = baselines.LayerPlan.fit(*weights, equal, (bits,))
    codes = layer.encode(*weights, bits=bits)
    ((threshold,),) = rule.thresholds(0, x, [0.4])
    tiles, _ = ops.select(
        codes, equal, layer.row_scale[bits], torch.full((len(x),), threshold), x, bits=bits
    )
    with torch.no_grad():
        usage = rule.score(0, x, x, x)
    for row, n, scores in zip(tiles.tile, tiles.n_tiles, usage, strict=True):
        clear = (scores - threshold).abs() > 1e-5 * threshold
        keep = torch.zeros(160, dtype=torch.bool)
        keep[row[:n].long()] = True
        assert torch.equal(keep[clear], (scores >= threshold)[clear])
        assert clear.sum() > 150


def test_teal_reads_nothing_of_what_it_skips(rules, ffns, inputs):
    x = inputs[0].clone()
    ((channel, neuron),) = rules["teal"].thresholds(0, x, [0.5])
    with torch.no_grad():
        out, read = rules["teal"].run(0, x, (channel, neuron))
        small = torch.where(x.abs() < channel, torch.randn_like(x) * 1e-6, x)
        again, _ = rules["teal"].run(0, small, (channel, neuron))
    assert torch.equal(out, again)
    assert read.tolist()[0] == (x.abs() >= channel).sum()


def test_cats_looks_at_the_gate_alone(rules, ffns, inputs):
    x = inputs[0]
    ((threshold,),) = rules["cats"].thresholds(0, x, [0.5])
    with torch.no_grad():
        gate = torch.nn.functional.silu(ffns[0].gate(x))
        _, read = rules["cats"].run(0, x, (threshold,))
    assert read[1] == (gate.abs() >= threshold).sum()


def test_low_rank_of_full_rank_is_the_oracle(ffns, inputs):
    full, oracle = baselines.build(["lowrank-64", "oracle-neuron"], ffns, inputs)
    with torch.no_grad():
        gate = torch.nn.functional.silu(ffns[0].gate(inputs[0]))
        a = gate * ffns[0].up(inputs[0])
        expected = oracle.score(0, inputs[0], gate, a)
        # Whitening and its inverse in float64, factors rounded to float32: a few hundred roundings.
        assert torch.allclose(full.score(0, inputs[0], gate, a), expected, atol=1e-5)


def test_low_rank_knows_the_inputs_it_was_fitted_to(ffns):
    draw = torch.Generator().manual_seed(0)
    basis = torch.randn(8, 64, generator=draw)
    x = torch.randn(400, 8, generator=draw) @ basis  # inputs in eight dimensions
    rule, oracle = baselines.build(["lowrank-8", "oracle-neuron"], ffns, [x, x])
    with torch.no_grad():
        gate = torch.nn.functional.silu(ffns[0].gate(x))
        a = gate * ffns[0].up(x)
        assert torch.allclose(rule.score(0, x, gate, a), oracle.score(0, x, gate, a), atol=1e-4)


def test_griffin_keeps_the_same_neurons_for_every_token(rules, inputs):
    rule = rules["griffin"]
    ((threshold,),) = rule.thresholds(0, inputs[0], [0.25])
    keep = ~(rule.score(0, inputs[0], inputs[0], inputs[0]) < threshold)
    assert torch.equal(keep, keep[:1].expand_as(keep))
    assert keep[0].sum() == 40


# Bytes, by hand for d = 384, F = 1152: dense 3 * 384 * 1152 * 2 = 2,654,208.


def rule_of(name):
    model = tiny.make_model(hidden_size=384, intermediate_size=1152, num_hidden_layers=1)
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(16, 384, generator=draw)]
    return baselines.build([name], models.find_ffns(model), inputs)[0]


@pytest.mark.parametrize(
    ("method", "sensor", "half"),
    [
        # 576 neurons of 3 * 384 * 2 + 4 = 2308 bytes: 1,329,408.
        ("oracle-neuron", 0, 1_329_408),
        ("static", 0, 1_329_408),
        ("griffin", 0, 1_329_408),
        # Codes 2 * 1152 rows of 5 groups of 16 bytes: 184,320; scales 9,216; equaliser 1,536.
        ("ternary", 195_072, 195_072 + 1_329_408),
        # Codes 2 * 1152 rows of 3 chunks of 32 bytes: 221,184; scales 9,216; equaliser 1,536.
        ("planes-b2", 231_936, 231_936 + 1_329_408),
        # 48 bytes a chunk: 331,776.
        ("planes-b3", 342_528, 342_528 + 1_329_408),
        # The gate: 884,736; 576 neurons of 2 * 384 * 2 + 4 = 1540 bytes: 887,040.
        ("cats", 884_736, 884_736 + 887_040),
        # 2 * 48 * (384 + 1152) * 2 = 294,912.
        ("lowrank-48", 294_912, 294_912 + 1_329_408),
        # 192 channels of 2 * 1152 * 2 + 4 = 4612 bytes, 576 neurons of 772 bytes.
        ("teal", 0, 192 * 4612 + 576 * 772),
    ],
)
def test_bytes_are_those_counted_by_hand(method, sensor, half):
    rule = rule_of(method)
    assert baselines.dense_bytes(SHAPE) == 2_654_208
    assert rule.sensor_bytes(SHAPE) == sensor
    assert rule.n_bytes(SHAPE, 192, 576) == half
    assert rule.density(SHAPE, 192, 576) == 0.5


def test_bytes_of_planes_are_those_of_the_formula():
    assert baselines.planes_bytes(SHAPE, 2, 576) == 231_936 + 1_329_408
    assert baselines.planes_bytes(SHAPE, "ternary", 576) == 195_072 + 1_329_408


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_rounding_counts_codes_and_scales(bits):
    rule = rule_of(f"rtn-int{bits}")
    n_weights = 3 * 384 * 1152
    one, two = (n_weights * bits / 8 + n_weights / 64 * 2 * scales for scales in (1, 2))
    assert one <= rule.n_bytes(SHAPE, 384, 1152) <= two


def test_rounding_errs_by_half_a_step():
    draw = torch.Generator().manual_seed(0)
    weight = torch.rand(10, 100, generator=draw) * 2 - 1
    for bits in (8, 4):
        rounded, n_bytes = baselines.round_to_nearest(weight, bits)
        # The largest step is 2 / (2^bits - 1); scales and minima are rounded to 11 bits.
        assert (rounded - weight).abs().max() <= 1 / (2**bits - 1) + 2**-10
        assert n_bytes in (1000 * bits / 8 + 40, 1000 * bits / 8 + 80)
        assert rounded.shape == weight.shape


def test_rounding_is_better_with_more_bits(rules, ffns, inputs):
    with torch.no_grad():
        dense = ffns[0].module(inputs[0])
    errors = [
        (run(rules[name], 0, inputs[0], 1.0)[0] - dense).norm() / dense.norm()
        for name in ("rtn-int8", "rtn-int2")
    ]
    assert errors[0] < 0.02 < errors[1]


def test_two_levels_of_equal_weights_are_exact():
    weight = torch.full((3, 130), 0.25)
    rounded, _ = baselines.round_to_nearest(weight, 2)
    assert torch.equal(rounded, weight)


@pytest.mark.parametrize("name", baselines.default_methods(SHAPE))
def test_default_methods_have_a_family(name):
    assert baselines.family(name) in {"oracle", "few-bit", "selection", "quantised"}


@pytest.mark.parametrize(
    "name", ["", "omp", "planes-b", "planes-bx", "ternary-2", "lowrank-1.5", "rtn-int-4"]
)
def test_an_unknown_method_is_refused(ffns, inputs, name):
    with pytest.raises(ValueError, match=r"^\[ablate\] method .*: want one of .*\.$"):
        baselines.build([name], ffns, inputs)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("planes-b5", r"^\[planes\] bits = 5: want"),
        ("lowrank-65", r"^\[ablate\] lowrank-65: want a rank from 1 to 64\.$"),
        ("lowrank-0", r"^\[ablate\] lowrank-0: want a rank from 1 to 64\.$"),
        ("rtn-int9", r"^\[ablate\] rtn-int9: want 2 to 8 bits\.$"),
        ("rtn-int1", r"^\[ablate\] rtn-int1: want 2 to 8 bits\.$"),
    ],
)
def test_a_number_out_of_range_is_refused(ffns, inputs, name, message):
    with pytest.raises(ValueError, match=message):
        baselines.build([name], ffns, inputs)
