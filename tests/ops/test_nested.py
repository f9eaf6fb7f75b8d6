import dataclasses
import functools
import math

import pytest
import torch

from axes import DTYPES, inside, pairwise
from csfast import _native, ops, reference
from csfast.bench.cases import CASES, LARGE, Case
from csfast.codes import levels as levels_
from csfast.codes import planes
from csfast.codes.levels import GROUP, Level, Packed
from numeric import assert_within, made, made_nested, nested_size, nested_tolerance

NAN, INF = float("nan"), float("inf")
OFF_TILE, BATCH = CASES[2], CASES[5]
WIDTHS = [(1,), (2,), (3,), (4,), (3, 3), (1, 2, 3, 4)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors are small: where cores are shared, threads wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(params=WIDTHS, ids=lambda bits: "+".join(map(str, bits)))
def widths(request):
    return request.param


def drawn(n_neurons, d, bits, device, seed=1):
    """Levels of random bytes: all codes, all exponents, those of padding included."""
    g = torch.Generator().manual_seed(seed)
    chunks = -(-d // 128)
    levels = []
    for width in bits:
        codes = torch.randint(0, 256, (n_neurons, 2, chunks, 16 * width), generator=g)
        exponent = torch.randint(0, 256, (n_neurons, 2, 2 * chunks), generator=g)
        top = torch.exp2(torch.randint(-20, 21, (n_neurons, 2), generator=g).float())
        top *= 1 + torch.rand(n_neurons, 2, generator=g)
        levels.append(
            Packed(
                width,
                codes.to(device, torch.uint8),
                exponent.to(device, torch.uint8),
                top.to(device, torch.bfloat16),
            )
        )
    return levels


def activations(batch, d, dtype, device, seed=2):
    return torch.randn(batch, d, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def check(levels, equal, x):
    """Against the reference, for every number of levels."""
    for n_levels in range(1, len(levels) + 1):
        y, scale = ops.nested(levels, equal, x, n_levels=n_levels)
        want, want_scale = reference.nested(levels[:n_levels], equal, x)
        assert y.dtype == torch.float32
        assert_within(y, want, nested_tolerance(levels[:n_levels], equal, x))
        assert torch.equal(scale, want_scale)


# The operation.


@pairwise(case=CASES, dtype=DTYPES)
def test_matches_reference(case, dtype, device):
    p = made_nested(case, dtype, device)
    check(p.levels, p.equal, p.x)


@inside(dtype=DTYPES)
def test_matches_reference_at_every_width(widths, dtype, device):
    p = made_nested(OFF_TILE, dtype, device, widths)
    check(p.levels, p.equal, p.x)


@inside(batch=[1, 2, 3, 7], n_neurons=[1, 2, 3, 70])
def test_matches_reference_on_any_bytes(batch, n_neurons, widths, device):
    """Exponents to 255, and codes and exponents of padding, which must not count."""
    d = 300
    x = activations(batch, d, torch.float32, device)
    check(drawn(n_neurons, d, widths, device), torch.ones(d, device=device), x)


def test_matches_reference_on_a_large_layer(device):
    x = activations(2, LARGE.d, torch.bfloat16, device)
    levels = drawn(LARGE.n_neurons, LARGE.d, (3, 3), device)
    check(levels, torch.ones(LARGE.d, device=device), x)


@pairwise(case=CASES[:4], widths=WIDTHS, dtype=DTYPES)
def test_is_exact_where_nothing_rounds(case, widths, dtype, device):
    """A rounding bound grows with the width and hides a lost term; powers of two leave no excuse.

    At most two levels, whose sums stay below 2^24 times their last place.
    """
    p = case.make_nested_exact(dtype, device, bits=widths[:2])
    y, scale = ops.nested(p.levels, p.equal, p.x)
    want, _ = reference.nested(p.levels, p.equal, p.x)
    assert torch.equal(y.double(), want)
    assert torch.equal(scale, torch.ones_like(scale))
    size = nested_size(p.levels, p.equal, p.x)
    assert bool((size * 2**4 < 2**24).all())


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_code_and_every_exponent_counts(width, device):
    """One channel at a time: a product with the factor and one with half the top, both rounded."""
    d, n_neurons = 256, 128  # 256 rows, one an exponent
    rows = torch.arange(2 * n_neurons)
    codes = (torch.arange(d) + rows[:, None]).remainder(2**width).to(torch.uint8)
    exponent = rows[:, None].expand(-1, d // GROUP).to(torch.uint8)
    level = Level(width, codes, exponent, 1 + (rows % 128).float() / 128)
    packed = levels_.pack(level)
    pairs = Packed(
        width,
        packed.codes.view(n_neurons, 2, -1, 16 * width).to(device),
        packed.exponent.view(n_neurons, 2, -1).to(device),
        packed.top.view(n_neurons, 2).to(device),
    )
    y, scale = ops.nested([pairs], torch.ones(d, device=device), torch.eye(d, device=device))
    n = 127 * (2 * codes.float() - (2**width - 1))
    fraction = torch.tensor([2.0 ** (-e / 16) for e in range(256)], dtype=torch.float64).float()
    want = level.top[:, None] / 2 * (fraction[:, None] * n)
    assert torch.equal(y.flatten(1).cpu(), want.T)
    assert torch.equal(scale.cpu(), torch.full((d,), 1 / 127))


def test_measures_what_the_levels_stand_for(widths, device):
    """The scale times a measurement is the product of the decoded row with the rounded activation.

    Decoding rounds a step and a weight once each, and every level added to those before it.
    """
    p = made_nested(OFF_TILE, torch.float32, device, widths)
    y, scale = ops.nested(p.levels, p.equal, p.x)
    q, _ = planes.quantize(p.x, p.equal)
    rows = torch.stack([levels_.decode(p.gate), levels_.decode(p.up)], dim=1).double().to(device)
    want = torch.einsum("bc,jrc->bjr", q.double(), rows)
    decoded = (2 + len(widths)) * 2.0**-24 * nested_size(p.levels, p.equal, p.x)
    assert_within(y, want, nested_tolerance(p.levels, p.equal, p.x) + decoded)
    assert bool((scale > 0).all())


def test_measures_the_rows(dtype, device):
    """Every level brings the measurement nearer to the product, by more than half of it."""
    p = made_nested(BATCH, dtype, device, (3, 3, 3))
    exact = made(BATCH, dtype, "cpu")
    rows = torch.stack([exact.gate, exact.up], dim=1).double().to(device)
    q, _ = planes.quantize(p.x, p.equal)
    want = torch.einsum("bc,jrc->bjr", q.double(), rows / p.equal.double())
    errors = [
        float((ops.nested(p.levels, p.equal, p.x, n_levels=n)[0] - want).norm() / want.norm())
        for n in (1, 2, 3)
    ]
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2


def test_fewer_levels_are_those_levels_alone(device):
    """Whatever lies in the levels beyond."""
    levels = drawn(70, 300, (3, 3, 2), device)
    others = [levels[0], *drawn(70, 300, (4, 1), device, seed=9)]
    x, equal = activations(3, 300, torch.float32, device), torch.ones(300, device=device)
    want, _ = ops.nested(levels[:1], equal, x)
    assert torch.equal(ops.nested(levels, equal, x, n_levels=1)[0], want)
    assert torch.equal(ops.nested(others, equal, x, n_levels=1)[0], want)
    assert not torch.equal(ops.nested(others, equal, x)[0], want)


@inside(dtype=DTYPES)
def test_scale_is_that_of_sense(dtype, device):
    p = made_nested(BATCH, dtype, device)
    plain = made(BATCH, dtype, device)
    assert torch.equal(
        ops.nested(p.levels, p.equal, p.x)[1], ops.sense(plain.codes, p.equal, p.x, bits=2)[1]
    )


@inside(batch=[2, 3, 4, 7, 9])
def test_companions_in_the_batch_change_nothing(batch, widths, device):
    levels = drawn(70, 300, widths, device)
    x, equal = activations(batch, 300, torch.float32, device), torch.ones(300, device=device)
    y, scale = ops.nested(levels, equal, x)
    for b in range(batch):
        alone, alone_scale = ops.nested(levels, equal, x[b : b + 1].clone())
        assert torch.equal(y[b : b + 1], alone)
        assert torch.equal(scale[b : b + 1], alone_scale)


def test_neighbours_change_nothing(widths, device):
    """A neuron measured alone, and where it stands among others."""
    levels = drawn(67, 300, widths, device)
    x, equal = activations(3, 300, torch.float32, device), torch.ones(300, device=device)
    y, _ = ops.nested(levels, equal, x)
    for j in (0, 1, 31, 66):
        one = [
            Packed(
                p.bits,
                p.codes[j : j + 1].clone(),
                p.exponent[j : j + 1].clone(),
                p.top[j : j + 1].clone(),
            )
            for p in levels
        ]
        assert torch.equal(y[:, j : j + 1], ops.nested(one, equal, x)[0])


def test_counting_codes_from_the_other_end_negates_the_measurements(widths, device):
    levels = drawn(70, 300, widths, device)
    flipped = [dataclasses.replace(p, codes=~p.codes) for p in levels]
    x, equal = activations(3, 300, torch.float32, device), torch.ones(300, device=device)
    y, _ = ops.nested(levels, equal, x)
    assert torch.equal(ops.nested(flipped, equal, x)[0], -y)


def test_doubling_a_top_doubles_its_row(device):
    levels = drawn(70, 300, (3,), device)
    doubled = [dataclasses.replace(levels[0], top=levels[0].top * 2)]
    x, equal = activations(3, 300, torch.float32, device), torch.ones(300, device=device)
    assert torch.equal(ops.nested(doubled, equal, x)[0], 2 * ops.nested(levels, equal, x)[0])


def test_where_arrays_begin_changes_nothing():
    """On the CPU; on CUDA codes begin at multiples of 16 bytes."""
    levels = drawn(70, 300, (3, 4), "cpu")
    x, equal = activations(3, 300, torch.float32, "cpu"), torch.ones(300)

    def shifted(t):
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

    moved = [Packed(p.bits, shifted(p.codes), shifted(p.exponent), shifted(p.top)) for p in levels]
    assert moved[0].codes.data_ptr() % 16 != 0
    want, _ = ops.nested(levels, equal, x)
    assert torch.equal(ops.nested(moved, shifted(equal), shifted(x))[0], want)


def test_threads_change_nothing():
    levels = drawn(3000, 300, (3, 3), "cpu")
    x, equal = activations(3, 300, torch.bfloat16, "cpu"), torch.ones(300)
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, _ = ops.nested(levels, equal, x)
        for several in (2, 3):
            torch.set_num_threads(several)
            assert torch.equal(ops.nested(levels, equal, x)[0], one)
    finally:
        torch.set_num_threads(n_threads)


def test_two_hundred_runs_are_equal(device):
    p = made_nested(BATCH, torch.bfloat16, device)
    first, _ = ops.nested(p.levels, p.equal, p.x)
    for _ in range(200):
        assert torch.equal(ops.nested(p.levels, p.equal, p.x)[0], first)


@inside(dtype=DTYPES)
def test_zero_and_not_finite_rows(dtype, device):
    p = made_nested(OFF_TILE, dtype, device)
    x = torch.zeros(4, 200, dtype=dtype, device=device)
    x[1, 7], x[2, 199], x[3, 0] = NAN, INF, -INF
    y, scale = ops.nested(p.levels, p.equal, x)
    assert not y.any()
    assert scale[0] == 0
    assert scale[1:].isnan().all()


def test_rows_of_zeros_measure_zero(device):
    levels = drawn(5, 300, (3, 3), device)
    for level in levels:
        level.top[2] = 0
    y, _ = ops.nested(levels, torch.ones(300, device=device), torch.ones(2, 300, device=device))
    assert not y[:, 2].any()
    assert bool((y[:, [0, 1, 3, 4]] != 0).all())


def test_largest_sums_stay_exact(device):
    """Every code and every activation at its most, on 2^18 channels: groups of 121,920."""
    d = 1 << 18
    full = torch.full((1, 2, d // 128, 64), 0xFF, dtype=torch.uint8, device=device)
    level = Packed(
        4,
        full,
        torch.zeros(1, 2, d // 64, dtype=torch.uint8, device=device),
        torch.tensor([[2.0, 2.0**-60]], dtype=torch.bfloat16, device=device),
    )
    x, equal = torch.ones(3, d, device=device), torch.ones(d, device=device)
    y, _ = ops.nested([level], equal, x)
    want = torch.tensor([15.0 * 127 * d, 15.0 * 127 * d * 2.0**-61], dtype=torch.float64)
    assert_within(y.cpu(), want.expand(3, 1, 2), nested_tolerance([level], equal, x).cpu())


def test_recover_takes_the_measurements(device):
    """With row scales of 1 and of the norm of the down row."""
    p, plain = made_nested(BATCH, torch.float32, device), made(BATCH, torch.float32, device)
    y, scale = ops.nested(p.levels, p.equal, p.x)
    norm = plain.down_t.float().norm(dim=1)
    row_scale = torch.stack([torch.ones_like(norm), norm], dim=1)
    found = ops.recover(y, scale, row_scale, threshold=torch.zeros(16, device=device)).usage
    exact = torch.nn.functional.silu(plain.x @ plain.gate.T) * (plain.x @ plain.up.T) * norm
    off = found.double() - exact.double().abs()
    assert float(off.norm() / exact.double().norm()) < 0.1


def test_is_registered_with_torch(device):
    p = made_nested(OFF_TILE, torch.bfloat16, device)
    parts = ([level.codes for level in p.levels], [level.exponent for level in p.levels])
    torch.library.opcheck(
        torch.ops.csfast.nested.default,
        (*parts, [level.top for level in p.levels], p.equal, p.x, [3, 3]),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_compiles_in_one_graph(device):
    p = made_nested(OFF_TILE, torch.bfloat16, device)

    def block(x):
        return ops.nested(p.levels, p.equal, x * 2, n_levels=1)[0] + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(p.x), block(p.x))


@pytest.mark.parametrize(
    ("n_levels", "error", "message"),
    [
        (0, ValueError, "n_levels = 0: want 1 to the 2 given"),
        (3, ValueError, "n_levels = 3: want 1 to the 2 given"),
        (-1, ValueError, r"n_levels = -1: want 0 to 2\^31 - 1"),
        (1.0, TypeError, "n_levels is a float: want an int"),
    ],
)
def test_refuses_levels_that_are_not_there(n_levels, error, message):
    p = made_nested(OFF_TILE, torch.bfloat16, "cpu")
    with pytest.raises(error, match=rf"\[nested\] {message}\."):
        ops.nested(p.levels, p.equal, p.x, n_levels=n_levels)


def test_refuses_more_levels_than_there_may_be():
    levels = drawn(3, 64, (1,) * 5, "cpu")
    with pytest.raises(
        ValueError, match=r"\[nested\] 5 codes, 5 exp.*: want as many of each, at m"
    ):
        ops.nested(levels, torch.ones(64), torch.ones(1, 64))


@inside(width=[0, 5])
def test_refuses_other_widths(width):
    level = Packed(
        width,
        torch.zeros(1, 2, 1, 16 * width, dtype=torch.uint8),
        torch.zeros(1, 2, 2, dtype=torch.uint8),
        torch.zeros(1, 2, dtype=torch.bfloat16),
    )
    with pytest.raises(ValueError, match=rf"\[nested\] bits\[0\] = {width}: want 1 to 4\."):
        ops.nested([level], torch.ones(64), torch.ones(1, 64))


def test_the_registered_operation_refuses_no_level():
    with pytest.raises(ValueError, match=r"\[nested\] no codes: want at least one\."):
        torch.ops.csfast.nested.default([], [], [], torch.ones(8), torch.ones(1, 8), [])


def test_the_kernel_refuses_by_itself():
    outputs = (torch.empty(1, 256, dtype=torch.int8), torch.empty(1, 3, 2), torch.empty(1), 0)
    with pytest.raises(ValueError, match=r"\[nested\] n_levels = 0: want 1 to 4\."):
        _native.nested([], [], [], torch.ones(8), torch.ones(1, 8), [], *outputs)


# The codes.


@functools.cache
def layer(n=48, d=200, seed=0):
    """Rows, inputs whose channels hang together, their second moment, and an equaliser."""
    g = torch.Generator().manual_seed(seed)
    gain = torch.exp2(torch.rand(d, generator=g) * 3)
    x = torch.randn(4 * d, d // 2, generator=g) @ torch.randn(d // 2, d, generator=g) / d**0.5
    x = (x + 0.1 * torch.randn(4 * d, d, generator=g)) * gain
    w = torch.randn(n, d, generator=g) / (gain * d**0.5)
    equal = torch.exp2(-torch.round(torch.log2(x.square().mean(dim=0).sqrt())))
    moment = x.double().T @ x.double() / len(x)
    return w, x, moment, equal


def distance(w, coded, moment):
    """Mean squared error of the output."""
    off = (w - coded).double()
    return float(torch.einsum("ic,cd,id->", off, moment, off))


def same(a, b):
    """Whether two levels are equal, bit for bit."""
    return (
        a.bits == b.bits
        and a.group == b.group
        and torch.equal(a.codes, b.codes)
        and torch.equal(a.exponent, b.exponent)
        and torch.equal(a.top, b.top)
    )


def fits(moment):
    """Both fits of the layer's rows, by name, with or without feedback."""
    w, x, of_inputs, equal = layer()
    activation = (x[:, : len(w)].double().T @ x[:, : len(w)].double()) if moment else None
    return {
        "rows": lambda bits: levels_.fit_rows(w, of_inputs if moment else None, bits, equal=equal),
        "neurons": lambda bits: levels_.fit_neurons(w, activation, bits),
    }


@pytest.mark.parametrize("moment", [False, True], ids=["plain", "feedback"])
@pytest.mark.parametrize("which", ["rows", "neurons"])
def test_a_prefix_of_a_code_is_the_shorter_code(which, moment):
    fit = fits(moment)[which]
    whole = fit((3, 3, 2))
    for n in (1, 2):
        part = fit((3, 3, 2)[:n])
        assert len(part) == n
        assert all(same(a, b) for a, b in zip(part, whole[:n], strict=True))


@pytest.mark.parametrize("moment", [False, True], ids=["plain", "feedback"])
@pytest.mark.parametrize("which", ["rows", "neurons"])
def test_fits_are_deterministic(which, moment):
    fit = fits(moment)[which]
    assert all(same(a, b) for a, b in zip(fit((3, 3)), fit((3, 3)), strict=True))


@inside(width=[1, 2, 3, 4], feedback=[False, True])
def test_the_error_of_rows_falls_with_every_level(width, feedback):
    w, _, moment, equal = layer()
    levels = levels_.fit_rows(w, moment if feedback else None, (width,) * 4, equal=equal)
    errors = [distance(w, levels_.decode(levels[:n]) * equal, moment) for n in range(1, 5)]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == 4


@pytest.mark.parametrize("bits", [(1,), (2,), (3,), (4,), (3, 3)])
def test_feedback_lessens_the_error_of_the_output_of_rows(bits):
    """Rounding each weight by itself is what it may fall back to, so it cannot be worse."""
    w, _, moment, equal = layer()
    plain, fed = (levels_.fit_rows(w, m, bits, equal=equal) for m in (None, moment))
    assert distance(w, levels_.decode(fed) * equal, moment) < distance(
        w, levels_.decode(plain) * equal, moment
    )


@pytest.mark.parametrize("bits", [(1,), (2,), (3,), (4,), (3, 3)])
def test_feedback_lessens_the_error_of_the_output_of_neurons(bits):
    w, x, _, _ = layer()
    down_t = w / levels_.output_scale(w)
    activation = x[:, : len(w)].double()
    moment = activation.T @ activation / len(activation)
    plain, fed = (levels_.fit_neurons(down_t, m, bits) for m in (None, moment))
    errors = [distance(down_t.T, levels_.decode(levels).T, moment) for levels in (fed, plain)]
    assert errors[0] < errors[1]


def test_the_equaliser_is_in_the_weights_and_in_the_metric():
    w, _, moment, equal = layer()
    wide = equal.double()
    given = levels_.fit_rows(w, moment, (3, 3), equal=equal)
    folded = levels_.fit_rows(w / equal, moment * wide * wide[:, None], (3, 3))
    assert all(same(a, b) for a, b in zip(given, folded, strict=True))


@inside(power=[-60, -1, 1, 40], feedback=[False, True])
def test_scaling_rows_by_a_power_of_two_scales_their_tops(power, feedback):
    w, _, moment, equal = layer()
    given = moment if feedback else None
    for a, b in zip(
        levels_.fit_rows(w, given, (3, 2), equal=equal),
        levels_.fit_rows(w * 2.0**power, given, (3, 2), equal=equal),
        strict=True,
    ):
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.exponent, b.exponent)
        assert torch.equal(a.top * 2.0**power, b.top)


@pytest.mark.parametrize("power", [-300, 300])
def test_the_scale_of_the_moment_changes_nothing(power):
    w, _, moment, equal = layer()
    want = levels_.fit_rows(w, moment, (3,), equal=equal)
    assert same(levels_.fit_rows(w, moment * 2.0**power, (3,), equal=equal)[0], want[0])


@inside(width=[1, 2, 3, 4], d=[1, 63, 64, 65, 200], feedback=[False, True])
def test_is_exact_on_its_own_levels(width, d, feedback):
    """Every group has an outermost code, and one the row's largest step, of bfloat16."""
    g = torch.Generator().manual_seed(width * 1000 + d)
    n, groups = 9, -(-d // GROUP)
    codes = torch.randint(0, 2**width, (n, d), generator=g, dtype=torch.uint8)
    codes[:, ::GROUP] = 0
    exponent = torch.randint(0, 200, (n, groups), generator=g).to(torch.uint8)
    exponent[:, -1] = 0
    top = (1 + torch.randint(0, 128, (n,), generator=g) / 128) * 2.0**-7
    w = Level(width, codes, exponent, top).decode()
    moment = None
    if feedback:
        x = torch.randn(2 * d, d, generator=g, dtype=torch.float64)
        moment = x.T @ x
    first, second = levels_.fit_rows(w, moment, (width, 2))
    assert torch.equal(first.codes, codes)
    assert torch.equal(first.decode(), w)
    assert not second.decode().any()
    by_neurons = levels_.fit_neurons(w, None, (width,))
    assert torch.equal(by_neurons[0].decode(), w)


@inside(d=[1, 63, 64, 65, 127, 129, 200])
def test_any_width_of_rows(d):
    """The best uniform code of 3 bits loses 3.74 % of what is Gaussian (Max, 1960).

    A third more for weights whose channels differ.
    """
    w, _, _, equal = layer()
    level = levels_.fit_rows(w[:, :d], None, (3,), equal=equal[:d])[0]
    assert level.codes.shape == (48, d)
    assert level.exponent.shape == (48, -(-d // 64))
    assert int(level.codes.max()) < 8
    evened = w[:, :d] / equal[:d]
    lost = (level.decode() - evened).square().sum() / evened.square().sum()
    assert float(lost) < 0.05


@pytest.mark.parametrize("feedback", [False, True], ids=["plain", "feedback"])
def test_rows_of_zeros_are_coded_as_zeros(feedback):
    w, x, moment, equal = layer()
    w = w.clone()
    w[5] = 0
    activation = x[:, : len(w)].double()
    given = moment if feedback else None
    for level in levels_.fit_rows(w, given, (3, 3), equal=equal):
        assert level.top[5] == 0
        assert not level.decode()[5].any()
        assert bool(torch.isfinite(level.decode()).all())
    for level in levels_.fit_neurons(torch.zeros(48, 70), activation.T @ activation, (3, 3)):
        assert not level.decode().any()


def test_groups_of_zeros_beside_others_are_almost_zeros():
    w = layer()[0].clone()
    w[:, :64] = 0
    level = levels_.fit_rows(w, None, (3,))[0]
    assert bool((level.exponent[:, 0] == 255).all())
    assert bool((level.decode()[:, :64].abs() < 2.0**-14 * w.abs().amax(dim=1)[:, None]).all())


def test_importance_of_columns_moves_the_steps():
    """What weighs nothing has no say: the others get the steps that they would have alone."""
    w = layer()[0].clone()
    w[:, 1::2] *= 0.01
    w[:, 0] = w.abs().amax() * 1.5  # the largest of every row is among those that count
    weight = torch.zeros(200)
    weight[::2] = 1.0
    weighted, plain = (levels_.fit_neurons(w, None, (3,), weight=v)[0] for v in (weight, None))
    errors = [float((level.decode() - w)[:, ::2].square().sum()) for level in (weighted, plain)]
    assert errors[0] < errors[1]


def test_a_group_may_be_wider():
    w, _, moment, _ = layer()
    level = levels_.fit_rows(w, moment, (3,), group=128)[0]
    assert level.exponent.shape == (48, 2)
    assert level.group == 128
    errors = [
        distance(w, levels_.fit_rows(w, moment, (width,), group=128)[0].decode(), moment)
        for width in (3, 8)
    ]
    assert errors[1] < errors[0] / 100
    with pytest.raises(ValueError, match=r"\[nested\] group = 128: want 64 to pack\."):
        levels_.pack(level)


def test_output_scale_is_the_root_mean_square():
    w = layer()[0].clone()
    w[:, 3] = 0
    scale = levels_.output_scale(w)
    assert scale[3] == 1
    want = w.double().square().mean(dim=0).sqrt()
    live = torch.arange(200) != 3
    # Squares, 48 additions and the root round once each.
    assert bool(((scale.double() - want).abs()[live] <= 26 * 2.0**-24 * want[live]).all())


def test_factors_are_powers_of_two_rounded_once():
    exponent = torch.arange(256, dtype=torch.uint8)
    want = torch.tensor([2.0 ** (-e / 16) for e in range(256)], dtype=torch.float64).float()
    assert torch.equal(levels_.factor(exponent), want)
    assert levels_.factor(exponent)[16] == 0.5 and math.isclose(want[1], 0.957603, rel_tol=1e-6)


@inside(width=[1, 2, 3, 4], d=[1, 64, 100, 128, 200])
def test_unpacks_what_it_packed(width, d):
    level = levels_.fit_rows(layer()[0][:, :d], None, (width,))[0]
    packed = levels_.pack(level)
    chunks = -(-d // 128)
    assert packed.codes.shape == (48, chunks, 16 * width)
    assert packed.exponent.shape == (48, 2 * chunks)
    assert packed.top.dtype == torch.bfloat16
    assert same(levels_.unpack(packed, d), level)
    pairs = levels_.pair(packed, packed)
    rows = levels_.unpack(pairs, d)
    assert torch.equal(rows.codes[::2], level.codes) and torch.equal(rows.codes[1::2], level.codes)
    assert torch.equal(rows.top, level.top.repeat_interleave(2))


def test_tops_have_the_digits_of_bfloat16():
    for level in levels_.fit_rows(*layer()[:1], None, (3, 3)):
        assert torch.equal(level.top, level.top.bfloat16().float())


@pytest.mark.parametrize("case", [OFF_TILE, Case("wide", batch=1, d=384, n_neurons=5)])
def test_n_bytes_are_those_of_the_arrays(case):
    p = made_nested(case, torch.float32, "cpu", (3, 2, 4))
    for n_levels in (1, 2, 3):
        arrays = [t for q in p.levels[:n_levels] for t in (q.codes, q.exponent, q.top)]
        size = sum(t.numel() * t.element_size() for t in (*arrays, p.equal))
        assert levels_.n_bytes(case.n_neurons, case.d, (3, 2, 4), n_levels) == size
        assert case.nested_bytes((3, 2, 4), n_levels) == size
    assert case.nested_bytes((3, 2, 4)) == size


def test_layout_of_two_groups():
    """The first group of a chunk has shifts 0 and 2 of the pairs and bytes 0 to 7 of the bits."""
    codes = torch.zeros(1, 128, dtype=torch.uint8)
    codes[0, :64] = 7
    packed = levels_.pack(Level(3, codes, torch.tensor([[3, 9]], dtype=torch.uint8), torch.ones(1)))
    assert packed.codes.tolist() == [[[0x0F] * 32 + [0xFF] * 8 + [0] * 8]]
    assert packed.exponent.tolist() == [[3, 9]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": ()}, "bits of no level: want 1 to 8 of each"),
        ({"bits": (3, 0)}, "bits = 0: want 1 to 8 of each level"),
        ({"bits": (9,)}, "bits = 9: want 1 to 8 of each level"),
        ({"group": 0}, "group = 0: want at least 1 weight"),
        ({"moment": torch.eye(199)}, r"moment \(199, 199\): want \(200, 200\)"),
        ({"moment": torch.ones(200)}, r"moment \(200,\): want \(200, 200\)"),
        ({"moment": torch.full((200, 200), NAN)}, "moment: want finite numbers"),
        ({"moment": torch.zeros(200, 200)}, "moment of trace 0: want above 0"),
        ({"moment": torch.ones(200, 200) - 0.5 * torch.eye(200)}, "want a positive semi-definite"),
        ({"weight": torch.zeros(0, 200)}, r"weight \(0, 200\) of torch.float32: want floating"),
        ({"weight": torch.zeros(200)}, r"weight \(200,\) of torch.float32: want floating \(n, d\)"),
        ({"weight": torch.zeros(3, 200, dtype=torch.int32)}, "of torch.int32: want floating"),
        ({"weight": torch.full((3, 200), NAN)}, r"weight: want finite weights of .* below 2\^120"),
        ({"weight": torch.full((3, 200), INF)}, "weight: want finite weights"),
        ({"weight": torch.full((3, 200), 1e37)}, "weight: want finite weights"),
        ({"equal": torch.ones(199)}, r"equal \(199,\): want \(200,\)"),
        ({"equal": torch.zeros(200)}, "equal: want finite numbers, none below 1.17"),
        ({"equal": torch.full((200,), NAN)}, "equal: want finite numbers"),
        ({"equal": torch.full((200,), 2.0**-122)}, "weight / equal: want finite weights"),
    ],
)
def test_rows_refuse(change, message):
    good = dict(weight=torch.ones(3, 200), moment=torch.eye(200), bits=(3,), equal=torch.ones(200))
    levels_.fit_rows(**good)
    with pytest.raises(ValueError, match=rf"\[nested\] .*{message}.*\."):
        levels_.fit_rows(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": ()}, "bits of no level"),
        ({"bits": (9,)}, "bits = 9: want 1 to 8"),
        ({"group": -1}, "group = -1: want at least 1"),
        ({"moment": torch.eye(70)}, r"moment \(70, 70\): want \(3, 3\)"),
        ({"moment": torch.full((3, 3), INF)}, "moment: want finite numbers"),
        ({"moment": torch.zeros(3, 3)}, "moment of trace 0"),
        ({"down_t": torch.full((3, 70), NAN)}, "down_t: want finite weights"),
        ({"down_t": torch.ones(70)}, r"down_t \(70,\) of torch.float32: want floating"),
        ({"weight": torch.ones(3)}, r"weight \(3,\): want \(70,\)"),
        ({"weight": torch.full((70,), -1.0)}, "weight: want finite numbers, none below 0"),
    ],
)
def test_neurons_refuse(change, message):
    good = dict(down_t=torch.ones(3, 70), moment=torch.eye(3), bits=(3,), weight=torch.ones(70))
    levels_.fit_neurons(**good)
    with pytest.raises(ValueError, match=rf"\[nested\] .*{message}.*\."):
        levels_.fit_neurons(**{**good, **change})


def test_packing_refuses():
    level = levels_.fit_rows(torch.ones(3, 70), None, (5,))[0]
    with pytest.raises(ValueError, match=r"\[nested\] bits = 5: want 1 to 4 to pack\."):
        levels_.pack(level)
    narrow, wide = (
        levels_.pack(levels_.fit_rows(torch.ones(3, 70), None, (b,))[0]) for b in (2, 3)
    )
    with pytest.raises(
        ValueError, match=r"\[nested\] gate of 2 bits .*, up of 3 bits .*: want the"
    ):
        levels_.pair(narrow, wide)
    with pytest.raises(ValueError, match=r"\[nested\] bits = 8: want 1 to 4 to pack\."):
        levels_.n_bytes(8, 8, (8,))
    with pytest.raises(ValueError, match=r"\[nested\] bits of no level: want 1 to 4 of each\."):
        levels_.n_bytes(8, 8, ())
    with pytest.raises(ValueError, match=r"\[nested\] n_levels = 3: want 1 to 2\."):
        levels_.n_bytes(8, 8, (3, 3), 3)
