"""Rules that choose what is read: what they keep, what they compute and what they count."""

import itertools
import re

import pytest
import torch

import numeric
import tiny
from csfast import judge, models, ops, reference
from csfast.codes import planes
from csfast.judge import rules
from csfast.judge.rules import catalogue, compressed, magnitude, oracles
from csfast.layer import Decision, Sensor
from csfast.plan import LayerPlan
from csfast.types import Document, LayerShape
from texts import TASKS

SHAPE = LayerShape(d=384, n_neurons=1152)
# Rules whose thresholds are quantiles of their own scores, or numbers of neurons.
PLAIN = (
    "oracle-neuron",
    "oracle-block-4",
    "oracle-block-16",
    "oracle-block-16-original",
    "oracle-channel",
    "ternary",
    "planes-b1",
    "planes-b2",
    "planes-b3",
    "planes-b4",
    "planes-b1-plain",
    "planes-b2-plain",
    "planes-b3-plain",
    "planes-b4-plain",
    "ternary-plain",
    "planes-b2-block-4",
    "teal",
    "teal-greedy",
    "wina",
    "rsparse-4",
    "cats",
    "lowrank-8",
    "linear",
    "dejavu-8",
    "griffin",
    "static",
    "static-task",
    "random-20",
    "innovation-10",
    "mmse-10",
    "probe-10",
)
# And those that see other positions in a batch than in the sample.
SELECTING = (*PLAIN, "planes-b2-joint-2", "previous", "random")
METHODS = (*SELECTING, "oracle-head", "oracle-layer", "rtn-int8", "rtn-int2", "gptq-int2")


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


def make_where(n_rows=4, n_columns=50, n_prompt=5):
    """Documents of equal length, of one task after the other."""
    return judge.Where(
        n_rows,
        n_columns,
        torch.arange(n_rows).repeat_interleave(n_columns),
        torch.arange(n_columns).repeat(n_rows),
        torch.arange(n_rows).repeat_interleave(n_prompt),
        torch.arange(n_rows) % len(TASKS),
        TASKS,
        len(TASKS),
    )


WHERE = make_where()


@pytest.fixture(scope="module")
def fit(model, ffns, inputs):
    draw = torch.Generator().manual_seed(4)
    watched = {
        "heads": [torch.randn(200, 64, generator=draw) for _ in range(2)],
        "stream": [3 * x for x in inputs],
    }
    return rules.Fit(model, ffns, judge.Sample(inputs, WHERE, watched))


@pytest.fixture(scope="module")
def built(fit, inputs):
    found = {method: catalogue.build(method, fit) for method in METHODS}
    for layer, x in enumerate(inputs):
        found["griffin"].observe(layer, x[:20], WHERE)
    return found


def thresholds_of(rule, layer, fit, density):
    with torch.no_grad():
        (found,) = rule.calibrate(fit.sample, [density])
    return found[layer]


@torch.no_grad()
def run(rule, layer, fit, density):
    x = fit.sample.inputs[layer]
    return rule.run(layer, x, thresholds_of(rule, layer, fit, density), WHERE)


@pytest.mark.parametrize("method", SELECTING)
def test_full_density_is_the_dense_layer(built, fit, method):
    rule = built[method]
    for layer, (ffn, x) in enumerate(zip(fit.ffns, fit.sample.inputs, strict=True)):
        out, read = run(rule, layer, fit, 1.0)
        with torch.no_grad():
            assert torch.equal(out, ffn.module(x))
        assert read.tolist() == [list(rule.full(ffn.shape))] * len(x)
        assert read.dtype == torch.int64


@pytest.mark.parametrize("method", PLAIN)
def test_the_density_asked_for_is_kept_on_the_calibration_inputs(built, fit, method):
    for density in (0.1, 0.5):
        _, read = run(built[method], 0, fit, density)
        kept = built[method].density(LayerShape(64, 160), read.double().mean(dim=0).tolist())
        # A quantile of 200 tokens; where a rule keeps neurons for all tokens, the share of one; of
        # blocks, of one.
        size = int(re.search(r"block-(\d+)", f"{method} block-1")[1])
        if method.startswith(("random", "innovation", "mmse", "probe")):
            size = 4
        assert kept == pytest.approx(density, abs=size / 160)


def test_the_oracle_beats_every_rule_that_keeps_neurons(built, fit, ffns, inputs):
    with torch.no_grad():
        dense = ffns[0].module(inputs[0])
    error = {
        method: (run(built[method], 0, fit, 0.3)[0] - dense).square().sum().item()
        for method in SELECTING
        if isinstance(built[method], rules.NeuronRule) and method != "previous"
    }
    assert min(error, key=error.get) == "oracle-neuron"
    assert error["planes-b1"] > error["ternary"] > error["planes-b2"]
    assert error["planes-b2"] > error["planes-b3"] > error["planes-b4"]
    assert error["planes-b2"] < error["static"] < error["random"]
    assert error["oracle-neuron"] < error["oracle-block-4"] < error["oracle-block-16"]
    assert error["planes-b2"] < error["planes-b2-block-4"] < error["random"]


def method_of(bits, has_feedback=True):
    name = bits if bits == "ternary" else f"planes-b{bits}"
    return name if has_feedback else f"{name}-plain"


def layer_plan(fit, layer, equal, bits, has_feedback=True):
    """What a plan fitted to the same inputs holds of a layer."""
    moment = fit.moment(layer) if has_feedback else None
    return LayerPlan.fit(*fit.ffns[layer].weights, equal, (bits,), moment)


@pytest.mark.parametrize("has_feedback", [True, False], ids=["feedback", "plain"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, "ternary"])
def test_planes_estimate_what_the_reference_estimates(built, fit, inputs, bits, has_feedback):
    rule, x = built[method_of(bits, has_feedback)], inputs[1]
    equal = planes.equalizer(x.square().mean(dim=0))
    layer = layer_plan(fit, 1, equal, bits, has_feedback)
    y, scale = reference.sense(layer.codes[bits], equal, x, bits=bits)
    expected = reference.usage(y, scale, layer.row_scale[bits])
    with torch.no_grad():
        usage = rule.score(1, x, x, x, WHERE)
    # Six float32 roundings of a product of three factors, and the exponential of silu.
    assert torch.allclose(usage.double(), expected, rtol=16 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("has_feedback", [True, False], ids=["feedback", "plain"])
@pytest.mark.parametrize("bits", [2, 3, "ternary"])
def test_planes_keep_what_the_native_operation_keeps(built, fit, inputs, bits, has_feedback):
    rule, x = built[method_of(bits, has_feedback)], inputs[0]
    equal = planes.equalizer(x.square().mean(dim=0))
    layer = layer_plan(fit, 0, equal, bits, has_feedback)
    (threshold,) = thresholds_of(rule, 0, fit, 0.4)
    sensor = Sensor(layer.codes[bits], equal, layer.row_scale[bits], bits)
    tiles, _ = ops.select(sensor, Decision(torch.full((len(x),), threshold)), x)
    with torch.no_grad():
        usage = rule.score(0, x, x, x, WHERE)
    for row, n, scores in zip(tiles.tile, tiles.n_tiles, usage, strict=True):
        clear = (scores - threshold).abs() > 1e-5 * threshold
        keep = torch.zeros(160, dtype=torch.bool)
        keep[row[:n].long()] = True
        assert torch.equal(keep[clear], (scores >= threshold)[clear])
        assert clear.sum() > 150


def test_teal_reads_nothing_of_what_it_skips(built, fit, inputs):
    x = inputs[0].clone()
    channel, neuron = thresholds_of(built["teal"], 0, fit, 0.5)
    with torch.no_grad():
        out, read = built["teal"].run(0, x, (channel, neuron), WHERE)
        small = torch.where(x.abs() < channel, torch.randn_like(x) * 1e-6, x)
        again, _ = built["teal"].run(0, small, (channel, neuron), WHERE)
    assert torch.equal(out, again)
    assert torch.equal(read[:, 0], (x.abs() >= channel).sum(dim=1))


def test_cats_looks_at_the_gate_alone(built, fit, ffns, inputs):
    x = inputs[0]
    (threshold,) = thresholds_of(built["cats"], 0, fit, 0.5)
    with torch.no_grad():
        gate = torch.nn.functional.silu(ffns[0].gate(x))
        _, read = built["cats"].run(0, x, (threshold,), WHERE)
    assert torch.equal(read[:, 0], (gate.abs() >= threshold).sum(dim=1))


def test_low_rank_of_full_rank_is_the_oracle(fit, ffns, inputs):
    full, oracle = (catalogue.build(name, fit) for name in ("lowrank-64", "oracle-neuron"))
    with torch.no_grad():
        gate = torch.nn.functional.silu(ffns[0].gate(inputs[0]))
        a = gate * ffns[0].up(inputs[0])
        expected = oracle.score(0, inputs[0], gate, a, WHERE)
        # Whitening and its inverse in float64, factors rounded to float32: a few hundred roundings.
        assert torch.allclose(full.score(0, inputs[0], gate, a, WHERE), expected, atol=1e-5)


def test_low_rank_knows_the_inputs_it_was_fitted_to(model, ffns):
    draw = torch.Generator().manual_seed(0)
    basis = torch.randn(8, 64, generator=draw)
    x = torch.randn(400, 8, generator=draw) @ basis  # inputs in eight dimensions
    fit = rules.Fit(model, ffns, judge.Sample([x, x], make_where(4, 100), {}))
    rule, oracle = (catalogue.build(name, fit) for name in ("lowrank-8", "oracle-neuron"))
    with torch.no_grad():
        gate = torch.nn.functional.silu(ffns[0].gate(x))
        a = gate * ffns[0].up(x)
        found, expected = (of.score(0, x, gate, a, WHERE) for of in (rule, oracle))
        assert torch.allclose(found, expected, atol=1e-4)


def test_griffin_keeps_what_each_prompt_used(built, fit, ffns, inputs):
    (threshold,) = thresholds_of(built["griffin"], 0, fit, 0.25)
    keep = ~(built["griffin"].score(0, inputs[0], inputs[0], inputs[0], WHERE) < threshold)
    with torch.no_grad():
        a = torch.nn.functional.silu(ffns[0].gate(inputs[0][:20])) * ffns[0].up(inputs[0][:20])
    for row in range(4):
        part = a[5 * row : 5 * row + 5].double()
        most = (part / part.norm(dim=1, keepdim=True)).norm(dim=0).topk(40).indices
        expected = torch.zeros(160, dtype=torch.bool)
        expected[most] = True
        assert torch.equal(keep[WHERE.row == row], expected.expand(50, -1))


# Blocks


@pytest.mark.parametrize("method", ["oracle-block-16", "planes-b2-block-4", "mmse-10", "random-20"])
def test_blocks_are_kept_whole(built, fit, ffns, inputs, method):
    rule, x = built[method], inputs[0]
    thresholds = thresholds_of(rule, 0, fit, 0.3)
    with torch.no_grad():
        gate, a = ffns[0].activations(x)
        keep = rule.keep(0, x, gate, a, thresholds, WHERE)
    layout = rule.layouts[0]
    assert sum(len(part) for part in layout.perm.split(layout.block)) == 160
    for part in layout.perm.split(layout.block):
        assert torch.equal(keep[:, part], keep[:, part[:1]].expand(-1, len(part)))
    counts = rule.counted(0, keep)
    assert torch.equal(counts[:, 1], keep.sum(dim=1))
    assert torch.equal(counts[:, 0] * layout.block, counts[:, 1])


def test_a_layout_groups_and_spreads():
    layout = rules.Layout.of_order(torch.tensor([4, 1, 0, 3, 2]), 2)
    usage = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    expected = torch.tensor([[29.0, 17.0, 9.0]]).sqrt()
    assert torch.equal(layout.grouped(usage), expected)
    spread = layout.spread(torch.tensor([[7, 8, 9]]))
    assert spread.tolist() == [[8, 7, 9, 8, 7]]


# Oracles of other structures


def test_the_channel_oracle_reads_nothing_of_what_it_skips(built, fit, inputs):
    rule, x = built["oracle-channel"], inputs[0]
    channel, _ = thresholds_of(rule, 0, fit, 0.5)
    column = rule._column[0]
    with torch.no_grad():
        out, read = rule.run(0, x, (channel, float("-inf")), WHERE)
        small = torch.where(x.abs() * column < channel, x * 1e-3, x)
        again, _ = rule.run(0, small, (channel, float("-inf")), WHERE)
    assert torch.equal(out, again)
    assert torch.equal(read[:, 0], (x.abs() * column >= channel).sum(dim=1))


def test_the_layer_oracle_keeps_whole_layers_by_one_threshold(built, fit, ffns, inputs):
    rule = built["oracle-layer"]
    with torch.no_grad():
        (thresholds,) = rule.calibrate(fit.sample, [0.3])
        assert thresholds[0] == thresholds[1]
        n_kept = 0
        for layer, (ffn, x) in enumerate(zip(ffns, inputs, strict=True)):
            out, read = rule.run(layer, x, thresholds[layer], WHERE)
            dense = ffn.module(x)
            share = dense.norm(dim=1) / (3 * x).norm(dim=1).mean()
            expected = share >= thresholds[layer][0]
            assert torch.equal(read[:, 0].bool(), expected)
            assert torch.equal(out, torch.where(expected[:, None], dense, 0.0))
            n_kept += int(expected.sum())
    assert n_kept == 120
    assert rule.n_bytes(SHAPE, [0.5]) == 2_654_208 / 2
    assert rule.density(SHAPE, [0.25]) == 0.25


@torch.no_grad()
def test_the_head_oracle_takes_heads_out_and_leaves_keys_and_values(built, fit, model):
    rule = built["oracle-head"]
    # 64 * 64 query rows, 32 * 64 keys, as many values, 64 * 64 output columns, at two bytes.
    assert rule.dense_bytes(SHAPE) == 2 * (2 * 64 * 64 + 2 * 32 * 64)
    assert rule.n_bytes(SHAPE, [1.0]) == 2 * 2 * 32 * 64 + 2 * 64 * 16 * 2 + 4
    assert rule.density(SHAPE, [1.0]) == 0.25
    draw = torch.Generator().manual_seed(0)
    pieces = [
        judge.Piece(Document("math/x", "a", "b"), torch.randint(0, 200, (1, n), generator=draw), 3)
        for n in (20, 12)
    ]
    (batch,) = judge.batches(pieces, torch.device("cpu"))
    cache = judge.prefill(model, batch)
    dense = judge.follow(model, cache, batch)
    for density in (1.0, 0.5):
        (thresholds,) = rule.calibrate(fit.sample, [density])
        setting = judge.Setting(rule, None, density, thresholds)
        inputs, outputs = {}, {}
        modules = [layer.self_attn.o_proj for layer in model.model.layers]
        with judge.watching(modules, inputs.__setitem__):
            judge.follow(model, cache, batch)
        # Hooks see what the hooks before them left.
        with rule.patched(thresholds, batch, outputs.__setitem__):
            with judge.watching(modules, inputs.__setitem__):
                logits = judge.follow(model, cache, batch)
        assert torch.equal(judge.follow_by(model, cache, batch, setting)[0], logits)
        mine = batch.target != judge.NONE
        if density == 1:
            assert torch.equal(logits[mine], dense[mine])
        kept = (inputs[0][mine].view(-1, 4, 16) != 0).any(dim=2).sum(dim=1)
        assert torch.equal(outputs[0][:, 0], kept)
    x = fit.sample.watched["heads"][0]
    weight = model.model.layers[0].self_attn.o_proj.weight.view(64, 4, 16)
    added = torch.einsum("nhi,dhi->nhd", x.view(200, 4, 16), weight).norm(dim=2)
    assert torch.allclose(rule._score(0, x), added, rtol=1e-4)
    (thresholds,) = rule.calibrate(fit.sample, [0.5])
    out, counts = rule.run(0, x, thresholds[0], WHERE)
    assert int(counts.sum()) == 400
    keep = added >= thresholds[0][0]
    assert (out.view(200, 4, 16) != 0).any(dim=2).ne(keep).sum() <= 1


def test_attention_of_another_form_is_refused(model, ffns):
    odd = torch.nn.ModuleDict({"mlp": ffns[0].module})
    nested = torch.nn.ModuleDict({"block": odd})
    other = models.Ffn("block.mlp", *(getattr(ffns[0], n) for n in FIELDS))
    with pytest.raises(ValueError, match=r"^\[ablate\] oracle-head: no attention with o_proj"):
        oracles.find_attention(nested, [other])


FIELDS = tuple(field for field in models.Ffn.__dataclass_fields__ if field != "name")


# Input channels


def test_wina_weighs_inputs_by_their_columns(built, fit, ffns, inputs):
    thresholds = thresholds_of(built["wina"], 0, fit, 0.4)
    x = inputs[0]
    with torch.no_grad():
        _, read = built["wina"].run(0, x, thresholds, WHERE)
        for i, linear in enumerate((ffns[0].gate, ffns[0].up)):
            size = x.abs() * linear.weight.norm(dim=0)
            assert torch.equal(read[:, i], (size >= thresholds[i]).sum(dim=1))


def test_rsparse_of_full_rank_is_dense_at_every_density(fit, ffns, inputs):
    rule = catalogue.build("rsparse-64", fit)
    with torch.no_grad():
        dense = ffns[0].module(inputs[0])
    out, read = run(rule, 0, fit, 0.2)
    assert read[:, 0].double().mean() < 0.3 * 64
    # Two products of a few hundred terms in another order.
    assert torch.allclose(out, dense, atol=1e-5 * float(dense.abs().max()))


def test_rsparse_loses_less_than_skipping(built, fit, ffns, inputs):
    with torch.no_grad():
        dense = ffns[0].module(inputs[0])
    low_rank, skipped = (
        (run(built[n], 0, fit, 0.3)[0] - dense).norm() for n in ("rsparse-4", "teal")
    )
    assert low_rank < skipped


def test_the_greedy_search_goes_down_a_step_at_a_time(built, fit, ffns, inputs):
    path = built["teal-greedy"]._paths[0]
    step = magnitude.GREEDY_STEP
    assert path[0].tolist() == [1, 1, 1]
    assert path[-1] == pytest.approx([step] * 3)
    for above, below in itertools.pairwise(path):
        assert sorted((above - below).round(9)) == pytest.approx([0, 0, step])
    assert built["teal-greedy"].split(0, 1.0) == (1, 1, 1)
    assert sum(built["teal-greedy"].split(0, 0.42)) / 3 == pytest.approx(0.42)
    with torch.no_grad():
        dense = ffns[0].module(inputs[0])
    greedy, uniform = (
        (run(built[n], 0, fit, 0.4)[0] - dense).norm() for n in ("teal-greedy", "teal")
    )
    assert greedy < uniform


# Predictors


def test_ridge_finds_a_linear_map(fit, inputs):
    draw = torch.Generator().manual_seed(0)
    true = torch.randn(65, 7, generator=draw)
    target = inputs[0] @ true[:-1] + true[-1]
    found = fit.ridge(0, target)
    # The ridge is a hundredth of the mean second moment, over 200 positions.
    assert (found - true).norm() < 0.02 * true.norm()


def test_a_trained_predictor_knows_more_than_the_mean(built, fit, ffns, inputs):
    recall = {}
    for method in ("dejavu-8", "static", "linear"):
        rule, recovery = built[method], built[method].recovery()
        rule.record(recovery)
        run(rule, 0, fit, 0.25)
        run(rule, 1, fit, 0.25)
        rule.record(None)
        recall[method] = recovery.means()[0]
    assert recall["dejavu-8"] > recall["static"] + 0.02
    assert recall["linear"] > recall["static"]


def test_training_is_seeded(model, ffns, fit, built, inputs):
    again = catalogue.build("dejavu-8", fit)
    other = catalogue.build("dejavu-8", rules.Fit(model, ffns, fit.sample, seed=1))
    x = inputs[0]
    first, same, differs = (r.score(0, x, x, x, WHERE) for r in (built["dejavu-8"], again, other))
    assert torch.equal(first, same)
    assert not torch.equal(first, differs)
    assert not first.requires_grad


def test_static_task_keeps_what_each_task_uses(built, fit, ffns, inputs):
    (threshold,) = thresholds_of(built["static-task"], 0, fit, 0.25)
    keep = ~(built["static-task"].score(0, inputs[0], None, None, WHERE) < threshold)
    with torch.no_grad():
        usage = ffns[0].activations(inputs[0])[1].abs() * ffns[0].down_norm()
    for row in range(4):
        mine = WHERE.row == row
        most = usage[mine].double().square().mean(dim=0).topk(40).indices
        expected = torch.zeros(160, dtype=torch.bool)
        expected[most] = True
        assert torch.equal(keep[mine], expected.expand(50, -1))


def test_previous_keeps_what_the_position_before_used(built, fit, ffns, inputs):
    (threshold,) = thresholds_of(built["previous"], 0, fit, 0.3)
    with torch.no_grad():
        gate, a = ffns[0].activations(inputs[0])
        keep = built["previous"].keep(0, inputs[0], gate, a, (threshold,), WHERE)
        usage = a.abs() * ffns[0].down_norm()
    for i in range(200):
        expected = torch.ones(160, dtype=torch.bool) if i % 50 == 0 else usage[i - 1] >= threshold
        assert torch.equal(keep[i], expected)


def test_random_depends_on_the_place_alone(built, fit):
    rule = built["random"]
    (threshold,) = thresholds_of(rule, 0, fit, 0.3)
    whole = rule.score(0, torch.zeros(200, 64), None, None, WHERE)
    alone = rule.score(0, torch.zeros(50, 64), None, None, make_where(1, 50))
    assert torch.equal(whole[50:100], alone)
    assert (whole >= threshold).float().mean() == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(whole[0], whole[1])


# Joint supports


def ragged(lengths):
    """Documents of these numbers of sparse positions, as the judge batches them."""
    pieces = [
        judge.Piece(Document("math/x", "a", "b"), torch.zeros(1, n + 3, dtype=torch.int64), 2)
        for n in lengths
    ]
    (batch,) = judge.batches(pieces, torch.device("cpu"))
    return batch.where


@torch.no_grad()
def test_requests_that_agree_share_their_own_support(built, fit, inputs):
    where = ragged([10, 10])
    one, joint = built["planes-b2"], built["planes-b2-joint-2"]
    x = inputs[0][:10].repeat(2, 1)
    thresholds = thresholds_of(one, 0, fit, 0.4)
    assert torch.equal(
        joint.keep(0, x, None, None, 2 * thresholds, where),
        one.keep(0, x, None, None, thresholds, where),
    )
    assert thresholds_of(joint, 0, fit, 0.4)[0] == thresholds[0]


@torch.no_grad()
def test_a_joint_support_is_of_the_mean_over_those_who_vote(built, fit, inputs):
    where = ragged([4, 9, 9])
    joint = built["planes-b2-joint-2"]
    x = inputs[0][:22]
    thresholds = thresholds_of(joint, 0, fit, 0.4)
    score = joint.score(0, x, None, None, where)
    keep = joint.keep(0, x, None, None, thresholds, where)
    # Two groups: documents 0 and 2, and document 1 alone. The first ends after four positions.
    for position in range(9):
        at = {int(r): i for i, r in enumerate(where.row) if where.position[i] == position}
        voters = [score[at[r]] for r in (0, 2) if r in at]
        expected = torch.stack(voters).mean(dim=0) >= thresholds[len(voters) - 1]
        assert torch.equal(keep[at[2]], expected)
        if 0 in at:
            assert torch.equal(keep[at[0]], expected)
        assert torch.equal(keep[at[1]], score[at[1]] >= thresholds[0])


# Compressed sensing


def test_pursuit_recovers_what_is_sparse():
    draw = torch.Generator().manual_seed(0)
    phi = torch.randn(60, 100, generator=draw) / 60**0.5
    true = torch.zeros(50, 100)
    for row in true:
        row[torch.randperm(100, generator=draw)[:8]] = torch.randn(8, generator=draw).sign() + 2
    coef, taken = compressed.pursue(phi, true @ phi.T, 8)
    assert ((true != 0) == taken).all(dim=1).float().mean() >= 0.9
    right = ((true != 0) == taken).all(dim=1)
    # Least squares in float32 on eight well-conditioned columns.
    assert torch.allclose(coef[right], true[right], atol=1e-4)
    nothing, none = compressed.pursue(phi, torch.zeros(2, 60), 8)
    assert not nothing.any() and not none.any()


@torch.no_grad()
def test_measurements_are_those_of_the_fitted_usage(built, fit, inputs):
    rule = built["random-20"]
    fitted = fit.ridge(0, fit.layouts(4)[0].grouped(fit.usage(0)))
    expected = (inputs[0].double() @ fitted[:-1].double() + fitted[-1].double()) @ rule.phi[
        0
    ].T.double()
    scale = expected.abs().max()
    assert (rule.measure(0, inputs[0]) - expected).abs().max() <= 1e-5 * scale
    assert rule.phi[0].shape == (20, 40)
    # Entries of variance 1 / 20: 800 of them, five standard deviations.
    assert rule.phi[0].square().mean() * 20 == pytest.approx(1, abs=5 * (2 / 800) ** 0.5)


def test_raw_pursuit_keeps_as_many_blocks_at_every_position(built, fit):
    for density in (0.2, 0.5, 0.9):
        _, read = run(built["random-20"], 0, fit, density)
        assert read[:, 0].tolist() == [round(40 * density)] * 200


def test_an_innovation_that_is_sparse_is_found(built):
    rule = built["innovation-10"]
    draw = torch.Generator().manual_seed(0)
    true = torch.zeros(100, 40)
    true[torch.arange(100), torch.randint(0, 40, (100,), generator=draw)] = 3.0
    task = torch.zeros(100, dtype=torch.int64)
    found = rule.difference(0, true @ rule.phi[0].T, task)
    # Two atoms are taken where one is enough: the second gets nothing.
    assert (found - true).abs().amax(dim=1).lt(1e-4).float().mean() >= 0.95


def test_mmse_is_the_estimate_of_least_error(built):
    rule = built["mmse-10"]
    draw = torch.Generator().manual_seed(0)
    n, task = 20_000, 2
    deviation = rule.variance[0][task].sqrt()
    true = torch.randn(n, 40, generator=draw) * deviation
    y = true @ rule.phi[0].T
    found = rule.difference(0, y, torch.full((n,), task))
    error = (found - true).square().sum(dim=1).mean()
    # By the law of the linear estimate: the variance that measuring leaves.
    phi, c = rule.phi[0].double(), deviation.double().square().diag()
    gain = c @ phi.T @ torch.linalg.inv(phi @ c @ phi.T)
    assert error == pytest.approx(float((c - gain @ phi @ c).trace()), rel=0.05)
    other = (y @ torch.linalg.pinv(rule.phi[0]).T - true).square().sum(dim=1).mean()
    assert error < other


def test_priors_are_of_the_task(built, fit):
    usage = fit.layouts(4)[0].grouped(fit.usage(0))
    for task in range(4):
        mine = WHERE.task[WHERE.row] == task
        mean, variance = (
            usage[mine].double().mean(dim=0),
            usage[mine].double().var(dim=0, correction=0),
        )
        assert torch.allclose(built["mmse-10"].mean[0][task].double(), mean, rtol=1e-5)
        assert torch.allclose(built["mmse-10"].variance[0][task].double(), variance, rtol=1e-3)
    assert torch.allclose(built["mmse-10"].mean[0][4], usage.mean(dim=0), rtol=1e-5)


def test_probes_speak_for_neurons_that_depend_on_them(model, ffns):
    """Inputs in three dimensions: a few neurons tell which direction it was."""
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(400, 3, generator=draw) @ torch.randn(3, 64, generator=draw)] * 2
    fit = rules.Fit(model, ffns, judge.Sample(inputs, make_where(4, 100), {}))
    recall = {}
    for method in ("probe-40", "static"):
        rule = catalogue.build(method, fit)
        recovery = rule.recovery()
        rule.record(recovery)
        for layer in (0, 1):
            thresholds = thresholds_of(rule, layer, fit, 0.3)
            with torch.no_grad():
                rule.run(layer, inputs[layer], thresholds, fit.sample.where)
        recall[method] = recovery.means()[0]
    assert recall["probe-40"] > recall["static"] + 0.05


def test_pivots_leave_least_unexplained():
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(500, 3, generator=draw)
    usage = (hidden @ torch.randn(3, 30, generator=draw)).double()
    chosen = compressed._pivots(usage.float(), 3)
    assert len(set(chosen.tolist())) == 3
    centred = usage - usage.mean(dim=0)
    some = centred[:, chosen]
    left = centred - some @ torch.linalg.lstsq(some, centred).solution
    assert left.norm() < 1e-4 * centred.norm()


# Bytes, by hand for d = 384, F = 1152: dense 3 * 384 * 1152 * 2 = 2,654,208.


def rule_of(name):
    model = tiny.make_model(hidden_size=384, intermediate_size=1152, num_hidden_layers=1)
    draw = torch.Generator().manual_seed(0)
    sample = judge.Sample([torch.randn(16, 384, generator=draw)], make_where(4, 4), {})
    return catalogue.build(name, rules.Fit(model, models.find_ffns(model), sample))


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
        ("oracle-channel", 0, 192 * 4612 + 576 * 772),
        # A column of gate and one of up each have an index: 2 * 192 * (1152 * 2 + 4).
        ("wina", 0, 384 * 2308 + 576 * 772),
        ("teal-greedy", 0, 384 * 2308 + 576 * 772),
        # Three pairs of factors: 3 * 16 * (384 + 1152) * 2 = 147,456.
        ("rsparse-16", 147_456, 147_456 + 192 * 4612 + 576 * 772),
        # 36 blocks of 16 rows: an index each instead of one a neuron.
        ("oracle-block-16", 0, 576 * 2304 + 36 * 4),
        ("oracle-block-16-original", 0, 576 * 2304 + 36 * 4),
        ("planes-b2-block-16", 231_936, 231_936 + 576 * 2304 + 36 * 4),
        ("planes-b2-joint-4", 231_936, 231_936 + 1_329_408),
        ("static-task", 0, 1_329_408),
        ("previous", 0, 1_329_408),
        ("random", 0, 1_329_408),
        # 385 * 1152 * 2.
        ("linear", 887_040, 887_040 + 1_329_408),
        # (48 * (384 + 1152) + 1152) * 2.
        ("dejavu-48", 149_760, 149_760 + 1_329_408),
        # 288 blocks of four neurons. 72 * (385 + 288) * 2 = 96,912; 144 blocks kept.
        ("random-72", 96_912, 96_912 + 576 * 2304 + 144 * 4),
        # The prior mean and what it measures: (288 + 72) * 2 = 720 more.
        ("innovation-72", 97_632, 97_632 + 576 * 2304 + 144 * 4),
        ("mmse-72", 97_632, 97_632 + 576 * 2304 + 144 * 4),
        # 72 probes: two rows, 16 atoms (one a token of the sample) and two means, (768 + 18) * 2
        # bytes each; eight atoms and the mean of 288 blocks: 9 * 288 * 2.
        ("probe-72", 72 * 1572 + 5184, 72 * 1572 + 5184 + 576 * 2304 + 144 * 4),
    ],
)
def test_bytes_are_those_counted_by_hand(method, sensor, half):
    rule = rule_of(method)
    counts = [count / 2 for count in rule.full(SHAPE)]
    assert rule.dense_bytes(SHAPE) == 2_654_208
    assert rule.sensor_bytes(SHAPE) == sensor
    assert rule.n_bytes(SHAPE, counts) == half
    assert rule.density(SHAPE, counts) == 0.5


def test_bytes_of_planes_are_those_of_the_formula():
    assert rules.planes_bytes(SHAPE, 2, 576) == 231_936 + 1_329_408
    assert rules.planes_bytes(SHAPE, "ternary", 576) == 195_072 + 1_329_408


@pytest.mark.parametrize("kind", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_rounding_counts_codes_and_scales(bits, kind):
    rule = rule_of(f"{kind}-int{bits}")
    n_weights = 3 * 384 * 1152
    one, two = (n_weights * bits / 8 + n_weights / 64 * 2 * scales for scales in (1, 2))
    assert one <= rule.n_bytes(SHAPE, [1152.0]) <= two


def test_rounding_is_better_with_more_bits(built, fit, ffns, inputs):
    with torch.no_grad():
        dense = ffns[0].module(inputs[0])
    errors = [
        (run(built[name], 0, fit, 1.0)[0] - dense).norm() / dense.norm()
        for name in ("rtn-int8", "rtn-int2")
    ]
    assert errors[0] < 0.02 < errors[1]


def test_calibrated_rounding_beats_plain_rounding(built, fit, ffns, inputs):
    with torch.no_grad():
        dense = ffns[0].module(inputs[0])
    plain, fitted = (
        (run(built[name], 0, fit, 1.0)[0] - dense).norm() for name in ("rtn-int2", "gptq-int2")
    )
    assert fitted < plain


@pytest.mark.parametrize("shape", [SHAPE, LayerShape(64, 160), LayerShape(4096, 14336)])
def test_default_methods_are_known_and_named_once(shape):
    names = catalogue.default_methods(shape)
    assert len(set(names)) == len(names)
    assert set(catalogue.quick_methods(shape)) <= set(names)
    families = {catalogue.family(name) for name in names}
    assert families == {"oracle", "few-bit", "selection", "mixed", "quantised"}


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "omp",
            "planes-b",
            "planes-bx",
            "ternary-2",
            "lowrank-1.5",
            "rtn-int-4",
            "random-",
            "teal-2",
        ),
        *("planes-b2-block-", "oracle-block-4-originally", "oracle-block", "Teal", "planes-b２"),
    ],
)
def test_an_unknown_method_is_refused(fit, name):
    with pytest.raises(ValueError, match=r"^\[ablate\] method .*: want one of .*\.$"):
        catalogue.build(name, fit)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("planes-b5", r"^\[planes\] bits = 5: want"),
        ("lowrank-65", r"^\[ablate\] lowrank-65: want a rank from 1 to 64\.$"),
        ("lowrank-0", r"^\[ablate\] lowrank-0: want a rank from 1 to 64\.$"),
        ("rtn-int9", r"^\[ablate\] rtn-int9: want 2 to 8 bits\.$"),
        ("rtn-int1", r"^\[ablate\] rtn-int1: want 2 to 8 bits\.$"),
        ("gptq-int9", r"^\[ablate\] gptq-int9: want 2 to 8 bits\.$"),
        ("rsparse-65", r"^\[ablate\] rsparse-65: want a rank from 1 to 64\.$"),
        ("dejavu-0", r"^\[ablate\] dejavu-0: want a rank from 1 to 64\.$"),
        ("oracle-block-1", r"^\[ablate\] oracle-block-1: want blocks of 2 to 160 neurons\.$"),
        ("oracle-block-161", r"^\[ablate\] oracle-block-161: want blocks of 2 to 160"),
        ("planes-b2-block-0", r"^\[ablate\] planes-b2-block-0: want blocks of 2 to 160"),
        ("planes-b2-joint-1", r"^\[ablate\] planes-b2-joint-1: want 2 to 256 requests\.$"),
        ("planes-b2-joint-257", r"^\[ablate\] planes-b2-joint-257: want 2 to 256"),
        ("random-41", r"^\[ablate\] random-41: want 1 to 40 measurements\.$"),
        ("mmse-0", r"^\[ablate\] mmse-0: want 1 to 40 measurements\.$"),
        ("innovation-41", r"^\[ablate\] innovation-41: want 1 to 40 measurements\.$"),
        ("probe-7", r"^\[ablate\] probe-7: want 8 to 160 probes\.$"),
        ("probe-161", r"^\[ablate\] probe-161: want 8 to 160 probes\.$"),
    ],
)
def test_a_number_out_of_range_is_refused(fit, name, message):
    with pytest.raises(ValueError, match=message):
        catalogue.build(name, fit)


@pytest.mark.parametrize("kind", ["llama-bias", "gemma", "phi3"])
@pytest.mark.parametrize("bits", [2, "ternary"])
def test_families_are_estimated_as_the_reference_does(kind, bits, inputs):
    """Activation and biases of the layer itself enter the few-bit and the low-rank estimate."""
    ffns = models.find_ffns(tiny.make_model(kind))
    fit = rules.Fit(None, ffns, judge.Sample(inputs, WHERE, {}))
    rule, x, ffn = catalogue.build(method_of(bits), fit), inputs[1], ffns[1]
    codes = rule._codes[1]
    layer = layer_plan(fit, 1, codes.equal, bits)
    y, scale = reference.sense(layer.codes[bits], codes.equal, x, bits=bits)
    measured = (y, scale, layer.row_scale[bits], ffn.offset(), ffn.activation)
    with torch.no_grad():
        gate, a = ffn.activations(x)
        found = rule.score(1, x, gate, a, WHERE)
        error = (found.double() - reference.usage(*measured)).abs()
        assert bool((error <= numeric.usage_tolerance(*measured)).all())
        low = catalogue.build("lowrank-8", fit)
        z_gate, z_up = (
            projection(torch.zeros_like(x)).double()
            + x.double() @ (left.double() @ right.double()).T
            for projection, (left, right) in zip((ffn.gate, ffn.up), low._factors[1], strict=True)
        )
        wanted = (reference.activate(z_gate, ffn.activation) * z_up).abs() * ffn.down_norm()
        found = low.score(1, x, gate, a, WHERE)
    # Two float32 products in a row, of 64 and of 8 terms, and four roundings of the rest; sums of
    # terms that cancel leave an error relative to the largest.
    atol = (64 + 8 + 4) * torch.finfo(torch.float32).eps * float(wanted.max())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["llama-bias", "gemma", "phi3"])
@pytest.mark.parametrize("method", ["oracle-neuron", "cats", "teal", "wina"])
def test_families_run_densely_where_all_is_kept(kind, method, inputs):
    ffns = models.find_ffns(tiny.make_model(kind))
    fit = rules.Fit(None, ffns, judge.Sample(inputs, WHERE, {}))
    rule = catalogue.build(method, fit)
    everything = torch.ones(len(inputs[0]), 160, dtype=torch.bool)
    for layer, x in enumerate(inputs):
        out, _ = run(rule, layer, fit, 1.0)
        ffn = ffns[layer]
        with torch.no_grad():
            # Both in float32, in orders of their own where gate and up are fused.
            tolerance = 2 * numeric.execute_tolerance(
                *(ffn.gate.weight, ffn.up.weight, ffn.down.weight.T, x, everything),
                gate_bias=ffn.gate.bias,
                up_bias=ffn.up.bias,
                down_bias=ffn.down.bias,
                activation=ffn.activation,
            )
            numeric.assert_within(out, ffn.dense(x).double(), tolerance)


# Other families


OTHERS = {
    "gelu": ("gemma", {}),
    "fused": ("phi3", {}),
    "biases": ("llama", {"mlp_bias": True}),
}


@pytest.mark.parametrize("other", OTHERS)
@torch.no_grad()
def test_rules_run_layers_of_every_form(other):
    kind, changes = OTHERS[other]
    model = tiny.make_model(kind, **changes)
    ffns = models.find_ffns(model)
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(60, 64, generator=draw) for _ in ffns]
    where = make_where(4, 15)
    fit = rules.Fit(model, ffns, judge.Sample(inputs, where, {"stream": inputs}))
    methods = (*(m for m in SELECTING if m != "dejavu-8"), "oracle-layer", "rtn-int8", "gptq-int8")
    for method in methods:
        rule = catalogue.build(method, fit)
        if rule.observes:
            rule.observe(0, inputs[0][:20], where)
        (thresholds,) = rule.calibrate(fit.sample, [1.0])
        out, _ = rule.run(0, inputs[0], thresholds[0], where)
        dense = ffns[0].dense(inputs[0])
        # Rounding to eight bits errs by a hundredth; else sums of a few hundred products may stand
        # in another order.
        allowed = 0.02 if method.endswith("int8") else 1e-5
        assert (out - dense).norm() <= allowed * dense.norm(), method
    attention = oracles.find_attention(model, ffns)
    heads = model.config.num_attention_heads
    assert [each.n_heads for each in attention] == [heads] * len(ffns)
    linear = sum(
        module.weight.numel()
        for module in model.model.layers[0].self_attn.children()
        if isinstance(module, torch.nn.Linear)
    )
    each = attention[0]
    assert each.rest_bytes + heads * (each.head_bytes - 4) == 2 * linear
