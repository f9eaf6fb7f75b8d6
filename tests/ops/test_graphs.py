"""What a decode step relies on: kernels that are captured once, replayed, and always equal."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from csfast import ops, reference
from csfast.bench import cases
from csfast.codes import planes
from csfast.layer import Decision, Layer, Sensor, Weights
from csfast.session import Session
from numeric import assert_within, ffn_path, missed_tolerance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ops.cuda_available(), reason="needs a CUDA device"),
]

BITS = 2


def with_threshold(layer: Layer, threshold: Tensor, tile_rows: int = 1, **more) -> Layer:
    """The same with another decision."""
    return dataclasses.replace(layer, decision=Decision(threshold, tile_rows, **more))


def select(
    layer: Layer, threshold: Tensor, x: Tensor, tile_rows: int = 1, **more
) -> tuple[ops.TileList, Tensor]:
    return ops.select(layer.sensor, Decision(threshold, tile_rows, **more), x)


def execute(layer: Layer, x: Tensor, tiles: ops.TileList, design: str = "") -> Tensor:
    return ops.execute(layer.weights, tiles, x, activation=layer.activation, design=design)


def sense(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    return ops.sense(layer.sensor.codes, layer.sensor.equal, x, bits=BITS)


def usage_of(layer: Layer, x: Tensor) -> Tensor:
    nothing = torch.zeros(x.shape[0], device=x.device)
    return ops.recover(*sense(layer, x), layer.sensor.row_scale, threshold=nothing).usage


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def make_layer(d: int, n_neurons: int, dtype: torch.dtype) -> Layer:
    rows = [random((n_neurons, d), dtype, seed) / d**0.5 for seed in range(3)]
    equal = torch.ones(d, device="cuda")
    scales = [planes.fit_scale(w, equal, BITS) for w in rows[:2]]
    codes = [planes.encode(w, equal, s, BITS) for w, s in zip(rows[:2], scales, strict=True)]
    sensor = Sensor(
        torch.stack(codes, dim=1).contiguous(),
        equal,
        torch.stack(scales, dim=1).contiguous(),
        BITS,
    )
    return Layer(sensor, Weights(*rows), Decision(torch.zeros(1, device="cuda")))


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=[(1, 1), (3, 4)], ids=["one_row", "three_rows_in_fours"])
def sizes(request):
    """Batch and tile_rows."""
    return request.param


@pytest.fixture
def layer(dtype):
    return make_layer(264, 1001, dtype)


def bits_of(t: Tensor) -> Tensor:
    """The bytes, so that not-a-number compares too."""
    return t.contiguous().view(torch.uint8)


def assert_same_list(got: ops.TileList, want: ops.TileList) -> None:
    assert torch.equal(got.n_tiles, want.n_tiles)
    for b, n in enumerate(want.n_tiles.tolist()):
        assert torch.equal(got.tile[b, :n], want.tile[b, :n])


def thresholds_of(layer: Layer, x: Tensor) -> list[Tensor]:
    """Thresholds that keep everything, half, a tenth and nothing of what x uses."""
    usage = usage_of(layer, x)
    some = [usage.quantile(1 - density, dim=1) for density in (0.5, 0.1)]
    return [torch.zeros_like(some[0]), *some, torch.full_like(some[0], torch.inf)]


def capture(call):
    """Capture `call` after a run of it outside; kernels are loaded when they first run."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = call()
    return graph, returned


def test_replayed_select_and_execute_follow_x_and_threshold(layer, dtype, sizes):
    batch, tile_rows = sizes
    x = random((batch, 264), dtype, 10)
    threshold = torch.zeros(batch, device="cuda")

    def both():
        tiles, missed = select(layer, threshold, x, tile_rows)
        return tiles, missed, execute(layer, x, tiles)

    graph, (tiles, missed, out) = capture(both)
    seen = []
    for seed in (11, 12):
        x.copy_(random((batch, 264), dtype, seed))
        for wanted in thresholds_of(layer, x):
            threshold.copy_(wanted)
            for written in (tiles.tile, tiles.n_tiles):
                written.fill_(0x7FFFFFFF)
            for written in (missed, out):
                written.fill_(torch.nan)
            graph.replay()
            want_tiles, want_missed, want_out = both()
            assert_same_list(tiles, want_tiles)
            assert torch.equal(missed, want_missed)
            assert torch.equal(out, want_out)
            seen.append(int(tiles.n_tiles.sum()))
    n_tiles_max = batch * -(-1001 // tile_rows)
    assert seen[0] == seen[4] == n_tiles_max and seen[3] == seen[7] == 0
    assert 0 < seen[2] < seen[1] < n_tiles_max


def test_replayed_ffn_follows_x_and_threshold_and_counts(layer, dtype, sizes):
    batch, tile_rows = sizes
    x = random((batch, 264), dtype, 20)
    threshold = torch.zeros(batch, device="cuda")
    stats = torch.zeros(2, dtype=torch.int64, device="cuda")
    whole = with_threshold(layer, threshold, tile_rows)
    graph, out = capture(lambda: ops.ffn(whole, x, stats=stats))
    for seed in (21, 22):
        x.copy_(random((batch, 264), dtype, seed))
        for wanted in thresholds_of(layer, x):
            threshold.copy_(wanted)
            out.fill_(torch.nan)
            stats.zero_()
            graph.replay()
            tiles, _ = select(layer, threshold, x, tile_rows)
            want = execute(layer, x, tiles, design=ffn_path(x, 1001))
            assert torch.equal(out, want)
            executed = 0
            for b, n in enumerate(tiles.n_tiles.tolist()):
                first = tiles.tile[b, :n].long() * tile_rows
                executed += int((first + tile_rows).clamp(max=1001).sub(first).sum())
            assert stats.tolist() == [batch, executed]


@pytest.mark.parametrize("tile_rows", [1, 16, 100])
def test_a_replayed_joint_decision_follows_its_weights(layer, dtype, tile_rows):
    """Groups, biases and one list for the batch; rows gain and lose their votes between replays."""
    batch = 5
    x = random((batch, 264), dtype, 25)
    biases = [random((n,), dtype, 26 + i) for i, n in enumerate((1001, 1001, 264))]
    offset = torch.stack([biases[0].float(), biases[1].float()], dim=1).contiguous()
    threshold = torch.zeros(1, device="cuda")
    votes = torch.ones(batch, device="cuda")
    stats = torch.zeros(2, dtype=torch.int64, device="cuda")
    recovery = {"offset": offset, "votes": votes, "activation": "gelu_tanh"}
    recovery["tile_rows"] = tile_rows
    names = ("gate_bias", "up_bias", "down_bias")
    biased = Layer(
        dataclasses.replace(layer.sensor, offset=offset),
        dataclasses.replace(layer.weights, **dict(zip(names, biases, strict=True))),
        Decision(threshold, tile_rows, votes),
        "gelu_tanh",
    )

    def run():
        return ops.ffn(biased, x, stats=stats)

    graph, out = capture(run)
    y, scale = sense(layer, x)
    kept = []
    for cast in ([1, 1, 1, 1, 1], [0, 2, 0, 0.5, 0], [0, 0, 0, 0, 0]):
        votes.copy_(torch.tensor(cast))
        usage = ops.recover(y, scale, layer.sensor.row_scale, threshold=threshold, **recovery).usage
        for wanted in (0.0, float(usage.quantile(0.7)), float("inf"), float("nan")):
            threshold.fill_(wanted)
            out.fill_(torch.nan)
            stats.zero_()
            graph.replay()
            support = ops.recover(
                y,
                scale,
                layer.sensor.row_scale,
                threshold=threshold,
                **recovery,
            )
            told = {"activation": "gelu_tanh"}
            tiles, missed = ops.select(biased.sensor, biased.decision, x, **told)
            assert torch.equal(tiles.tile, support.index)
            assert torch.equal(tiles.n_tiles, support.count)
            allowed = missed_tolerance(support.missed, support.usage)
            assert_within(missed, support.missed.double(), allowed)
            path = ffn_path(x, 1001, is_joint=True)
            want = ops.execute(biased.weights, tiles, x, design=path, **told)
            assert torch.equal(out, want)
            first = tiles.tile[0, : int(tiles.n_tiles)].long() * tile_rows
            executed = int((first + tile_rows).clamp(max=1001).sub(first).sum())
            assert stats.tolist() == [batch, batch * executed]
            kept.append(executed)
        threshold.fill_(0.0)
    assert kept[0] == kept[3] == kept[4] == kept[7] == 1001
    assert 0 < kept[1] < 1001 and 0 < kept[5] < 1001
    assert kept[2] == kept[6] == 0 and kept[8:] == [0] * 4
    assert torch.equal(out, biases[2].expand(batch, -1))


def test_a_captured_session_overwrites_its_output(layer, dtype):
    x, out = random((2, 264), dtype, 30), torch.empty(2, 264, dtype=dtype, device="cuda")
    threshold = usage_of(layer, x).quantile(0.7, dim=1)
    session = Session(torch.device("cuda"))
    number = session.bind(with_threshold(layer, threshold), max_batch=2)
    graph, _ = capture(lambda: session.ffn(number, x, out))
    for seed in (31, 32, 33):
        x.copy_(random((2, 264), dtype, seed))
        out.fill_(torch.nan)
        graph.replay()
        tiles, _ = select(layer, threshold, x, 1)
        assert torch.equal(out, execute(layer, x, tiles, design=ffn_path(x, 1001)))


def test_a_replayed_projection_follows_x(dtype):
    phi, x = random((40, 264), dtype, 35), random((5, 264), dtype, 36)
    graph, y = capture(lambda: ops.project(phi, x, rows=33))
    for seed in (37, 38):
        x.copy_(random((5, 264), dtype, seed))
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, ops.project(phi, x, rows=33))


DESIGNS = ("list", "list bulk", "list portable", "range", "range portable", "batch", "general")


@pytest.mark.parametrize("design", DESIGNS)
def test_layers_after_one_another_wait_for_what_they_need(design):
    """Kernels that begin early touch nothing that the call before still writes or reads."""
    if "bulk" in design and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    layers = [make_layer(264, 1001, torch.bfloat16) for _ in range(3)]
    is_joint = design == "batch"
    x = torch.empty((3 if is_joint else 1, 264), dtype=torch.bfloat16, device="cuda")
    votes = torch.ones(3, device="cuda") if is_joint else None
    threshold = torch.empty(1, device="cuda")
    stats = torch.zeros(2, dtype=torch.int64, device="cuda")

    def run(wait=False):
        out = x
        for layer in layers:
            now = with_threshold(layer, threshold, votes=votes)
            out = ops.ffn(now, out, stats=stats, design=design)
            if wait:
                torch.cuda.synchronize()
        return out

    x.zero_()
    threshold.zero_()
    graph, out = capture(run)
    for seed, limit in enumerate((0.0, 0.001, 0.01, float("inf"), float("nan"))):
        x.copy_(4 * random(tuple(x.shape), torch.bfloat16, seed))
        threshold.fill_(limit)
        stats.zero_()
        want = run(wait=True)
        counted = stats.clone()
        for _ in range(40):
            out.fill_(torch.nan)
            stats.zero_()
            graph.replay()
            assert torch.equal(bits_of(out), bits_of(want)) and torch.equal(stats, counted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_replayed_capped_layer_follows_its_cap(dtype):
    layer = make_layer(264, 1001, dtype)
    x = random((2, 264), dtype, 5)
    threshold = torch.zeros(2, device="cuda")
    cap = torch.zeros(2, dtype=torch.int32, device="cuda")
    stats = torch.zeros(2, dtype=torch.int64, device="cuda")
    dropped = torch.zeros(1, dtype=torch.int64, device="cuda")
    capped = with_threshold(layer, threshold, cap=cap)

    def run():
        return ops.ffn(capped, x, stats=stats, dropped=dropped)

    graph, out = capture(run)
    for caps in ([0, 1001], [10, 500], [-3, 2000]):
        cap.copy_(torch.tensor(caps, dtype=torch.int32))
        out.fill_(torch.nan)
        stats.zero_()
        dropped.zero_()
        graph.replay()
        tiles, _ = select(layer, threshold, x, cap=cap)
        assert torch.equal(out, execute(layer, x, tiles, design=ffn_path(x, 1001)))
        n = [min(max(c, 0), 1001) for c in caps]
        assert stats.tolist() == [2, sum(n)] and int(dropped) == 2002 - sum(n)


@pytest.mark.parametrize("n_levels", [1, 2])
def test_a_replayed_nested_measurement_follows_x(dtype, n_levels):
    p = cases.Case("nested", batch=5, d=264, n_neurons=301).make_nested(dtype, "cuda")
    x = p.x.clone()
    graph, (y, scale) = capture(lambda: ops.nested(p.levels, p.equal, x, n_levels=n_levels))
    for seed in (1, 2):
        x.copy_(random((5, 264), dtype, seed))
        y.fill_(torch.nan)
        graph.replay()
        want, want_scale = ops.nested(p.levels, p.equal, x, n_levels=n_levels)
        assert torch.equal(y, want)
        assert torch.equal(scale, want_scale)


def test_a_replayed_ternary_selection_follows_x(dtype):
    made = cases.Case("ternary", batch=5, d=264, n_neurons=301)
    p = made.make(dtype, "cuda", bits="ternary")
    x = p.x.clone()
    threshold = torch.zeros(5, device="cuda")

    sensor = Sensor(p.codes, p.equal, p.row_scale, "ternary")

    def run():
        return ops.select(sensor, Decision(threshold), x)

    graph, (tiles, missed) = capture(run)
    for seed, quantile in ((1, 0.5), (2, 0.9)):
        x.copy_(random((5, 264), dtype, seed))
        y, scale = ops.sense(p.codes, p.equal, x, bits="ternary")
        usage = ops.recover(y, scale, p.row_scale, threshold=torch.zeros_like(threshold)).usage
        threshold.copy_(usage.quantile(quantile, dim=1))
        graph.replay()
        want, want_missed = run()
        assert_same_list(tiles, want)
        assert torch.equal(missed, want_missed)
        assert 0 < int(tiles.n_tiles.sum()) < 5 * 301


def test_a_side_stream_gives_the_same(layer, dtype, sizes):
    batch, tile_rows = sizes
    x = random((batch, 264), dtype, 40)
    threshold = thresholds_of(layer, x)[1]
    want_tiles, want_missed = select(layer, threshold, x, tile_rows)
    want = execute(layer, x, want_tiles)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        busy = torch.empty(
            1 << 24, device="cuda"
        ).normal_()  # so that a wrong stream would overtake
        late = x * 0 + busy.sum().mul(0).to(dtype) + x
        tiles, missed = select(layer, threshold, late, tile_rows)
        got = execute(layer, late, tiles)
    torch.cuda.current_stream().wait_stream(side)
    assert_same_list(tiles, want_tiles)
    assert torch.equal(missed, want_missed)
    assert torch.equal(got, want)


def test_two_hundred_runs_agree_bit_for_bit(layer, dtype):
    x = random((5, 264), dtype, 50)
    x[1, 7] = torch.nan  # keeps every neuron of its row
    threshold = usage_of(layer, x).nan_to_num(0.0).quantile(0.6, dim=1)
    budget = torch.tensor([0, 5, 500, 1000, 1001], dtype=torch.int32, device="cuda")
    y, scale = sense(layer, x)
    first = None
    for _ in range(200):
        top = ops.recover(y, scale, layer.sensor.row_scale, budget=budget)
        tiles, missed = select(layer, threshold, x, 1)
        listed = torch.arange(1001, device="cuda") < tiles.n_tiles[:, None]
        run = (
            bits_of(top.count),
            bits_of(top.missed),
            bits_of(tiles.n_tiles),
            bits_of(tiles.tile.where(listed, -1)),
            bits_of(missed),
            bits_of(execute(layer, x, tiles)),
        )
        first = first or run
        assert all(torch.equal(a, b) for a, b in zip(run, first, strict=True))


def test_a_row_does_not_depend_on_its_batch(layer, dtype):
    x = random((6, 264), dtype, 60)
    threshold = usage_of(layer, x).quantile(0.6, dim=1)
    stats = torch.zeros(2, dtype=torch.int64, device="cuda")
    together = ops.ffn(with_threshold(layer, threshold), x, stats=stats)
    for b in range(6):
        alone = ops.ffn(with_threshold(layer, threshold[b : b + 1]), x[b : b + 1], stats=stats)
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("garbage", [0x7FFFFFFF, -1, -(2**31), 250])
def test_nothing_beyond_a_list_is_read(layer, dtype, garbage):
    """251 tiles of four: 250 exists, so that reading it by mistake changes the sum."""
    x = random((2, 264), dtype, 70)
    tile = torch.arange(251, dtype=torch.int32, device="cuda").repeat(2, 1)
    tile[0, 3:] = garbage
    tile[1] = garbage
    n_tiles = torch.tensor([3, 0], dtype=torch.int32, device="cuda")
    out = execute(layer, x, ops.TileList(tile, n_tiles, 4))
    clean = torch.zeros_like(tile)
    clean[0, :3] = torch.arange(3, dtype=torch.int32)
    assert torch.equal(out, execute(layer, x, ops.TileList(clean, n_tiles, 4)))
    assert not out[1].any() and out[0].any()


@pytest.mark.parametrize("which", ["gate", "up", "down_t", "x"])
def test_rows_off_sixteen_bytes_give_the_same(dtype, which):
    """Exact in float32 whatever the order: small integers, and gates so large that silu(g) is g."""
    generator = torch.Generator().manual_seed(80)

    def integers(low: int, high: int, rows: int) -> Tensor:
        return torch.randint(low, high, (rows, 264), generator=generator).to("cuda", dtype)

    given = {
        "gate": integers(0, 2, 1001),
        "up": integers(-1, 2, 1001),
        "down_t": integers(-1, 2, 1001),
        "x": integers(0, 2, 2),
    }
    assert (given["x"].float() @ given["gate"].float().T).min() > 20
    index = torch.arange(1001, dtype=torch.int32, device="cuda").repeat(2, 1)
    tiles = ops.TileList(index, torch.tensor([1001, 400], dtype=torch.int32, device="cuda"), 1)
    kept = [torch.arange(1001, device="cuda"), torch.arange(400, device="cuda")]
    want = reference.execute(**given, tiles=kept, tile_rows=1).to(dtype)

    def run():
        weights = Weights(given["gate"], given["up"], given["down_t"])
        return ops.execute(weights, tiles, given["x"])

    assert torch.equal(run(), want)

    shifted = torch.empty(given[which].numel() + 1, dtype=dtype, device="cuda")[1:]
    given[which] = shifted.view(given[which].shape).copy_(given[which])
    assert given[which].data_ptr() % 16 != 0
    assert torch.equal(run(), want)


def test_measurements_off_their_columns_are_refused():
    """Gate and up of a neuron are read at once; a single column lies anywhere."""
    y = torch.zeros(17, dtype=torch.int32, device="cuda")[1:]
    scale = torch.ones(1, device="cuda")
    limit = torch.ones(1, device="cuda")
    with pytest.raises(ValueError, match=r"\[recover\] y begins 4 bytes past a multiple of 8"):
        ops.recover(y.view(1, 8, 2), scale, torch.ones(8, 2, device="cuda"), threshold=limit)
    one = ops.recover(y.view(1, 16, 1), scale, torch.ones(16, 1, device="cuda"), threshold=limit)
    assert one.count.tolist() == [0]


def test_codes_off_sixteen_bytes_are_refused(layer, dtype):
    shifted = torch.empty(layer.sensor.codes.numel() + 1, dtype=torch.uint8, device="cuda")[1:]
    codes = shifted.view(layer.sensor.codes.shape).copy_(layer.sensor.codes)
    with pytest.raises(ValueError, match=r"\[sense\] codes begins 1 bytes past a multiple of 16"):
        ops.sense(codes, layer.sensor.equal, random((1, 264), dtype, 90), bits=BITS)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("codes", "codes begins 1 bytes past a multiple of 16"),
        ("exponent", "exponent begins 1 bytes past a multiple of 2"),
    ],
)
def test_levels_off_their_loads_are_refused(which, message):
    p = cases.Case("nested", batch=1, d=264, n_neurons=8).make_nested(torch.bfloat16, "cuda")
    given = getattr(p.levels[1], which)
    shifted = torch.empty(given.numel() + 1, dtype=torch.uint8, device="cuda")[1:]
    level = dataclasses.replace(p.levels[1], **{which: shifted.view(given.shape).copy_(given)})
    with pytest.raises(ValueError, match=rf"\[nested\] {message}"):
        ops.nested((p.levels[0], level), p.equal, p.x)


def test_waiting_for_every_kernel_works_under_capture_too():
    """With CSFAST_SYNC=1, in a process of its own: it is read at the first launch."""
    program = """
import torch
from csfast import ops
from csfast.layer import Weights
x = torch.ones(1, 64, device="cuda")
rows = torch.ones(32, 64, device="cuda")
tiles = ops.tile(torch.arange(32, dtype=torch.int32, device="cuda")[None],
                 torch.full((1,), 32, dtype=torch.int32, device="cuda"))
want = ops.execute(Weights(rows, rows, rows), tiles, x)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    got = ops.execute(Weights(rows, rows, rows), tiles, x)
graph.replay()
assert torch.equal(got, want) and want.min() == 32 * 64 * 64
"""
    environment = {**os.environ, "CSFAST_SYNC": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
