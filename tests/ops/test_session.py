import dataclasses

import pytest
import torch

from axes import inside
from csfast import ops
from csfast.bench.cases import CASES, Case
from csfast.session import Session
from numeric import layer_of, made, middle_threshold


def bind(session, p, threshold, max_batch, *, stats=None, **parts):
    return session.bind(layer_of(p, threshold, **parts), max_batch=max_batch, stats=stats)


def opened(device, case=CASES[5], dtype=torch.bfloat16, bits=2, **more):
    p = made(case, dtype, device, bits=bits)
    threshold = middle_threshold(p)
    session = Session(torch.device(device))
    layer = bind(session, p, threshold, case.batch, **more)
    return session, layer, p, threshold


def want(p, threshold, x):
    return ops.ffn(layer_of(p, threshold[: len(x)]), x)


@inside(batch=[0, 1, 7, 16])
def test_equals_ffn(batch, dtype, bits, device):
    session, layer, p, threshold = opened(device, dtype=dtype, bits=bits)
    x = p.x[:batch]
    out = torch.full_like(x, 7)
    session.ffn(layer, x, out)
    assert torch.equal(out, want(p, threshold, x))


@inside(batch=[0, 7, 16], tile_rows=[1, 100], is_joint=[False, True])
def test_equals_ffn_in_every_form(batch, tile_rows, is_joint, dtype, device):
    case, activation = CASES[5], "gelu_tanh"
    p = made(case, dtype, device)
    biases = case.make_biases(p)
    votes = torch.linspace(0, 1, 16).to(device) if is_joint else None
    told = {"tile_rows": tile_rows, "activation": activation}
    threshold = middle_threshold(p, biases=biases, votes=votes, **told)
    more = {"offset": biases.offset, **biases.of_execute(), **told}
    session = Session(torch.device(device))
    bound_threshold = threshold.expand(16).contiguous()
    layer = bind(session, p, bound_threshold, 16, votes=votes, **more)
    out = torch.full_like(p.x[:batch], 7)
    session.ffn(layer, p.x[:batch], out)
    of_batch = layer_of(
        p,
        threshold if is_joint else threshold[:batch],
        votes=votes[:batch] if is_joint else None,
        **more,
    )
    assert torch.equal(out, ops.ffn(of_batch, p.x[:batch]))


def test_reads_weights_and_the_first_threshold_at_every_call(device):
    case = CASES[5]
    p = made(case, torch.bfloat16, device)
    votes = torch.ones(16, device=device)
    threshold = torch.full((16,), float("inf"), device=device)
    threshold[0] = 0
    stats = torch.zeros(2, dtype=torch.int64, device=device)
    session = Session(torch.device(device))
    layer = bind(session, p, threshold, 16, votes=votes, stats=stats)
    out = torch.empty_like(p.x)
    session.ffn(layer, p.x, out)
    assert stats.tolist() == [16, 16 * 1152]
    votes.zero_()
    session.ffn(layer, p.x, out)
    assert stats.tolist() == [32, 16 * 1152]
    assert not out.any()


def test_refuses_a_weight_that_turned_negative():
    p = made(CASES[2], torch.bfloat16, "cpu")
    votes = torch.ones(3)
    session = Session(torch.device("cpu"))
    layer = bind(session, p, torch.ones(3), 3, votes=votes)
    votes[2] = -1
    with pytest.raises(ValueError, match=r"\[ffn\] votes\[2\] = -1\.0+: want at least 0\."):
        session.ffn(layer, p.x, torch.empty_like(p.x))


def test_takes_more_rows_than_a_layer_is_prepared_for(device):
    session, layer, p, threshold = opened(device, Case("many_rows", batch=20, d=64, n_neurons=96))
    for batch in (16, 17, 20):
        x = p.x[:batch]
        out = torch.full_like(x, 7)
        session.ffn(layer, x, out)
        assert torch.equal(out, want(p, threshold, x))


@inside(batch=[1, 4])
def test_takes_an_x_that_begins_anywhere(batch, device):
    session, layer, p, threshold = opened(device)
    x = torch.cat([p.x.new_zeros(1), p.x[:batch].flatten()])[1:].view(batch, -1)
    assert x.data_ptr() % 16 != 0
    out = torch.full_like(x, 7)
    session.ffn(layer, x, out)
    assert torch.equal(out, want(p, threshold, x))
    session.ffn(layer, p.x[:batch], out)
    assert torch.equal(out, want(p, threshold, p.x[:batch]))


def test_every_batch_runs_as_prepared_whatever_ran_before(device):
    session, layer, p, threshold = opened(device)
    x, out = p.x.clone(), torch.empty_like(p.x)
    for batch in (*range(1, 17), 2, 16, 1):
        session.ffn(layer, x[-batch:], out[-batch:])
        expected = want(p, threshold[:batch], x[-batch:])
        assert torch.equal(out[-batch:], expected), batch


def test_calls_on_their_way_keep_what_they_were_given(device):
    session, layer, p, threshold = opened(device)
    rows = [(p.x[i : i + 1].clone(), torch.empty_like(p.x[:1])) for i in range(16)]
    for x, out in (*rows, *rows[::-1]):
        session.ffn(layer, x, out)
    for x, out in rows:
        assert torch.equal(out, want(p, threshold, x))


def test_a_small_layer_leaves_a_large_one_its_shared_memory(device):
    """Kernels are told at binding how much shared memory a block may have; layers share kernels."""
    votes, threshold = torch.ones(4, device=device), torch.zeros(4, device=device)
    cases = [Case("long", batch=4, d=64, n_neurons=n) for n in (20_000, 64)]
    long, short = [made(case, torch.bfloat16, device) for case in cases]
    session = Session(torch.device(device))
    layer = bind(session, long, threshold, 4, votes=votes)
    other = bind(session, short, threshold, 4, votes=votes)
    found = []
    for number, p in ((layer, long), (other, short), (layer, long)):
        found.append(torch.empty_like(p.x))
        session.ffn(number, p.x, found[-1])
        ops.ffn(layer_of(short, threshold[:1], votes=votes), short.x)
    assert torch.equal(found[0], ops.ffn(layer_of(long, threshold[:1], votes=votes), long.x))
    assert torch.equal(found[2], found[0])


def test_layers_of_several_sizes(device):
    session = Session(torch.device(device))
    problems = [made(case, torch.float32, device) for case in (CASES[1], CASES[2], CASES[1])]
    thresholds = [middle_threshold(p) for p in problems]
    layers = [bind(session, p, t, 3) for p, t in zip(problems, thresholds, strict=True)]
    assert layers == [0, 1, 2]
    for layer, p, threshold in zip(layers, problems, thresholds, strict=True):
        out = torch.empty_like(p.x)
        session.ffn(layer, p.x, out)
        assert torch.equal(out, want(p, threshold, p.x))


def test_reads_the_threshold_at_every_call(device):
    session, layer, p, threshold = opened(device)
    out = torch.empty_like(p.x)
    session.ffn(layer, p.x, out)
    threshold.fill_(float("inf"))
    session.ffn(layer, p.x, out)
    assert not out.any()


def test_counts(device):
    stats = torch.zeros(2, dtype=torch.int64, device=device)
    session, layer, p, threshold = opened(device, stats=stats)
    out = torch.empty_like(p.x)
    for _ in range(3):
        session.ffn(layer, p.x, out)
    whole = layer_of(p, threshold)
    tiles, _ = ops.select(whole.sensor, whole.decision, p.x)
    assert stats.tolist() == [48, 3 * int(tiles.n_tiles.sum())]


def test_keeps_what_was_bound_alive(device):
    session, layer, p, threshold = opened(device)
    x, out = p.x.clone(), torch.empty_like(p.x)
    expected = want(p, threshold, x)
    del p, threshold
    noise = [torch.full((1152, 384), 9.0, dtype=torch.bfloat16, device=device) for _ in range(20)]
    session.ffn(layer, x, out)
    assert torch.equal(out, expected)
    assert len(noise) == 20


def test_weights_that_want_gradients(device):
    p = made(CASES[2], torch.bfloat16, device)
    threshold = middle_threshold(p)
    wanting = dataclasses.replace(p, gate=torch.nn.Parameter(p.gate))
    session = Session(torch.device(device))
    out = torch.empty_like(p.x)
    session.ffn(bind(session, wanting, threshold, 3), p.x, out)
    assert torch.equal(out, want(p, threshold, p.x))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": (17, 384)}, ValueError, "batch = 17: layer 0 was bound for at most 16"),
        ({"x": (4, 383)}, ValueError, r"want \(batch, d = 384\)"),
        ({"out": (5, 384)}, ValueError, r"want \(batch, d = 384\)"),
        ({"layer": 1}, ValueError, "layer = 1: want one of 1 bound"),
        ({"layer": -1}, ValueError, "layer = -1: want one of 1 bound"),
        ({"dtype": torch.float32}, TypeError, "want torch.bfloat16"),
        ({"transposed": True}, TypeError, "other strides"),
        ({"device": "meta"}, ValueError, "on meta"),
    ],
    ids=str,
)
def test_refuses_calls_that_do_not_fit(change, error, message):
    session, layer, _, _ = opened("cpu")
    options = {
        "dtype": change.get("dtype", torch.bfloat16),
        "device": change.get("device", "cpu"),
    }
    x = torch.zeros(change.get("x", (4, 384)), **options)
    out = torch.zeros(change.get("out", x.shape), **options)
    if "transposed" in change:
        x = torch.zeros(384, 4, **options).T
    with pytest.raises(error, match=r"\[session\] .*" + message):
        session.ffn(change.get("layer", layer), x, out)


def test_refuses_other_devices():
    with pytest.raises(ValueError, match=r"\[session\] device = meta: want cpu or cuda"):
        Session(torch.device("meta"))


def test_refuses_a_threshold_of_another_size():
    p = made(CASES[2], torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match=r"\[session\] .*max_batch = 4"):
        bind(Session(torch.device("cpu")), p, torch.zeros(3), 4)


def test_a_refused_layer_leaves_the_session_usable():
    session, layer, p, threshold = opened("cpu")
    with pytest.raises(ValueError, match="row_scale"):
        bind(session, dataclasses.replace(p, row_scale=p.row_scale[:5]), threshold, 16)
    out = torch.empty_like(p.x)
    session.ffn(layer, p.x, out)
    assert torch.equal(out, want(p, threshold, p.x))
    assert bind(session, p, threshold, 16) == 1
