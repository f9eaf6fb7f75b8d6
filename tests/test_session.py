import pytest
import torch

from csfast import ops
from csfast.cases import CASES
from numeric import made, middle_threshold


def bound(p, threshold, **more):
    return dict(
        codes=p.codes,
        equal=p.equal,
        row_scale=p.row_scale,
        threshold=threshold,
        gate=p.gate,
        up=p.up,
        down_t=p.down_t,
        bits=p.bits,
        **more,
    )


def opened(device, case=CASES[5], dtype=torch.bfloat16, bits=2, **more):
    p = made(case, dtype, device, bits=bits)
    threshold = middle_threshold(p)
    session = ops.Session(torch.device(device))
    layer = session.bind(**bound(p, threshold, max_batch=case.batch, **more))
    return session, layer, p, threshold


def want(p, threshold, x):
    return ops.ffn(
        p.codes,
        p.equal,
        p.row_scale,
        threshold[: len(x)],
        p.gate,
        p.up,
        p.down_t,
        x,
        bits=p.bits,
    )


@pytest.mark.parametrize("batch", [0, 1, 7, 16])
def test_equals_ffn(batch, dtype, bits, device):
    session, layer, p, threshold = opened(device, dtype=dtype, bits=bits)
    x = p.x[:batch]
    out = torch.full_like(x, 7)
    session.ffn(layer, x, out)
    assert torch.equal(out, want(p, threshold, x))


def test_layers_of_several_sizes(device):
    session = ops.Session(torch.device(device))
    problems = [made(case, torch.float32, device) for case in (CASES[1], CASES[2], CASES[1])]
    thresholds = [middle_threshold(p) for p in problems]
    layers = [
        session.bind(**bound(p, t, max_batch=3)) for p, t in zip(problems, thresholds, strict=True)
    ]
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
    tiles, _ = ops.select(p.codes, p.equal, p.row_scale, threshold, p.x, bits=2)
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
    tensors = bound(p, threshold, max_batch=3)
    tensors["gate"] = torch.nn.Parameter(p.gate)
    session = ops.Session(torch.device(device))
    out = torch.empty_like(p.x)
    session.ffn(session.bind(**tensors), p.x, out)
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
        ops.Session(torch.device("meta"))


def test_refuses_a_threshold_of_another_size():
    p = made(CASES[2], torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match=r"\[session\] .*max_batch = 4"):
        ops.Session(torch.device("cpu")).bind(**bound(p, torch.zeros(3), max_batch=4))


def test_a_refused_layer_leaves_the_session_usable():
    session, layer, p, threshold = opened("cpu")
    tensors = bound(p, threshold, max_batch=16)
    with pytest.raises(ValueError, match="row_scale"):
        session.bind(**{**tensors, "row_scale": p.row_scale[:5]})
    out = torch.empty_like(p.x)
    session.ffn(layer, p.x, out)
    assert torch.equal(out, want(p, threshold, p.x))
    assert session.bind(**tensors) == 1
