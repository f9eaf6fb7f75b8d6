"""Error bounds of the operations, derived, and the assertions that use them."""

import functools
import math

import torch

from csfast import designs, reference
from csfast.codes import levels as levels_
from csfast.codes import planes
from csfast.layer import Decision, Layer, Sensor, Weights

UNIT = 2.0**-24  # half the distance of 1 and the next float32: the error of one rounding
EPS_F32 = 2 * UNIT


def by_one_thread(make):
    """What `make` gives. Small tensors: where cores are shared, threads wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return make()
    finally:
        torch.set_num_threads(n_threads)


@functools.cache
def made(case, dtype, device, bits=2):
    """The problem of a case, made once for all tests: fitting its codes is most of the work."""
    return by_one_thread(lambda: case.make(dtype, device, bits=bits))


@functools.cache
def made_nested(case, dtype, device, bits=(3, 3)):
    """The same, in levels."""
    return by_one_thread(lambda: case.make_nested(dtype, device, bits=bits))


def layer_of(
    p, threshold, *, activation="silu", offset=None, tile_rows=1, votes=None, cap=None, **biases
):
    """The layer of a problem, with a decision."""
    sensor = Sensor(p.codes, p.equal, p.row_scale, p.bits, offset)
    weights = Weights(p.gate, p.up, p.down_t, **biases)
    return Layer(sensor, weights, Decision(threshold, tile_rows, votes, cap), activation)


def dot_tolerance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Bound on the error of ``a @ b.T`` summed in float32, entry by entry.

    Any order of n additions errs by at most ``(n + 1) * eps * (|a| @ |b|.T)`` to first order
    (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1); the products of
    half-precision inputs are exact in float32. What bfloat16 instructions flush is below 2^-126.
    """
    n = a.shape[-1]
    return (n + 1) * (EPS_F32 * (a.double().abs() @ b.double().abs().T) + 2.0**-120)


def nested_size(levels, equal: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sum of the magnitudes that a nested measurement adds up, entry by entry, float64."""
    q = planes.quantize(x, equal)[0].double().abs()
    weights = [levels_.unpack(packed, x.shape[1]).decode().double().abs() for packed in levels]
    return (q @ torch.stack(weights).sum(dim=0).T).view(len(x), len(levels[0].codes), 2)


def nested_tolerance(levels, equal: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Bound on the error of the nested measurement, entry by entry.

    Parts of a group's integer are exact. Each term meets at most a product, an addition for every
    group, five that gather the lanes of a warp, the product with the top, and an addition for every
    further level, in whatever order: as in `dot_tolerance`, with the sum of the magnitudes that
    they add up to. Whatever falls below the normal numbers is below 2^-126 each time.
    """
    n = levels[0].exponent.shape[-1] + 6 + len(levels)
    return n * (EPS_F32 * nested_size(levels, equal, x) + 2.0**-126)


def _activation_at(z: torch.Tensor, activation: str):
    """w, dw/dz and the roundings of w, where the activation is z sigmoid(w): silu has w = z."""
    if activation == "silu":
        return z, torch.ones_like(z), 0
    c1 = 2 * (2 / math.pi) ** 0.5
    c3 = 0.044715 * c1
    # w = z (c1 + c3 z^2): z^2, c3 and their product round, so do c1, the sum and the product with
    # z, and all terms have one sign: 5 u.
    return z * (c1 + c3 * z * z), c1 + 3 * c3 * z * z, 5


def activation_tolerance(z: torch.Tensor, dz: torch.Tensor, activation: str) -> torch.Tensor:
    """Bound on the error of the float32 activation of a gate that is off by at most `dz`.

    With u = 2^-24, act(z) = z sigmoid(w) and s = sigmoid(-w): z itself is off by dz, exp(-w) by
    dw = w' dz and the roundings r of w, and right to 2 ulp (4 u); 1 + exp(-w) feels the share s of
    that; adding and dividing round once each. To first order

        sigmoid(w) dz (1 + |z| s w') + |act(z)| (s (r |w| + 4) + 2) u

    a quarter more covers the second order. Where exp(-w) overflows (w < -88.7) the activation is 0,
    and was at most 89 exp(-88.7) < 2^-121.
    """
    w, slope, roundings = _activation_at(z, activation)
    s = torch.sigmoid(-w)
    size = z.abs()
    moved = torch.sigmoid(w) * dz * (1 + size * s * slope)
    rounded = size * torch.sigmoid(w) * (s * (roundings * w.abs() + 4) + 2) * UNIT
    return 1.25 * (moved + rounded) + 2.0**-121


def usage_tolerance(
    y: torch.Tensor,
    scale: torch.Tensor,
    row_scale: torch.Tensor,
    offset: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """Bound on the error of the float32 usage, and so the margin of a threshold.

    With u = 2^-24: g and up each carry three roundings (the conversion of y and two products), 3 u
    relative to what the offset is added to, and one of that addition. The product of activation and
    up rounds once more and brings the error of both.
    """
    v = scale.double()[:, None, None] * row_scale.double() * y.double()
    dv = 3 * UNIT * v.abs()
    if offset is not None:
        v = v + offset.double()
        dv = dv + UNIT * v.abs()
    if v.shape[2] == 1:
        return 1.25 * dv[..., 0] + 2.0**-140
    g, up = v[..., 0], v[..., 1].abs()
    act = reference.activate(g, activation).abs()
    dact = activation_tolerance(g, dv[..., 0], activation)
    return dact * up + (act + dact) * dv[..., 1] + 1.25 * UNIT * act * up + 2.0**-140


def group_tolerance(usage: torch.Tensor, tolerance: torch.Tensor, group_rows: int) -> torch.Tensor:
    """Bound on the error of the usage of groups of neurons whose usages err by `tolerance`.

    The norm moves by no more than the norm of the errors. Its B squares and B additions and the
    root round once each: ((B + 1) / 2 + 1) u relative, rounded up. A square below 2^-126 loses up
    to 2^-150 of it, the sum B times that, and a root r of a moves by at most the root of that.
    """
    if group_rows == 1:
        return tolerance
    moved = reference.group(tolerance, group_rows)
    group = reference.group(usage, group_rows)
    lost = group_rows**0.5 * 2.0**-75
    return 1.25 * (moved + (group_rows + 3) / 2 * UNIT * group) + lost


def joint_tolerance(
    usage: torch.Tensor, tolerance: torch.Tensor, votes: torch.Tensor
) -> torch.Tensor:
    """Bound on the error of the joint usage: R products and additions of R voting rows."""
    n_rows = int((votes != 0).sum())
    moved = reference.joint(tolerance, votes)
    return 1.25 * (moved + (n_rows + 1) * UNIT * reference.joint(usage, votes)) + n_rows * 2.0**-149


def missed_tolerance(missed: torch.Tensor, usage: torch.Tensor) -> torch.Tensor:
    """Bound on the difference of two sums of what was missed of ``usage (lists, n_groups)``.

    The same float32 squares, at most n of them and none negative, in two orders: each sum rounds n
    times, by u of itself. A square below 2^-126 may lose 2^-150.
    """
    n = usage.shape[1]
    return 2.5 * n * UNIT * missed.double() + n * 2.0**-148


def execute_tolerance(
    gate,
    up,
    down_t,
    x,
    mask,
    *,
    gate_bias=None,
    up_bias=None,
    down_bias=None,
    activation="silu",
) -> torch.Tensor:
    """Bound on the error of `execute` on the neurons of ``mask (batch, n_neurons)``.

    g and u are dot products and perhaps a bias, whose addition rounds once. Both activations have
    slopes of at most 1.14, and round, by `activation_tolerance` without its error of g, by at most
    8 u of their size, gelu_tanh by 3 u more where it is negative; a = act(g) u rounds once more.
    The sum of the n kept neurons, cut into at most 160 runs that are added up sixteen ways, takes
    at most n + 48 additions, that of a bias one more. Tensor cores cut 8 products and what they are
    added to off at 2^-23 of the largest (Fasi, Higham, Mikaitis, Pranesh, Numerical behavior of
    NVIDIA tensor cores, PeerJ Computer Science 7, 2021): nine errors for eight additions. Their dot
    products are of parts of the rows, far fewer additions than the bound has. The output is rounded
    to its dtype once, to zero below the smallest normal number.
    """
    xd, gated, upd, down = (t.double() for t in (x, gate, up, down_t))
    g, u = xd @ gated.T, xd @ upd.T
    dg, du = dot_tolerance(x, gate), dot_tolerance(x, up)
    if gate_bias is not None:
        g = g + gate_bias.double()
        dg = dg + UNIT * (g.abs() + dg)
    if up_bias is not None:
        u = u + up_bias.double()
        du = du + UNIT * (u.abs() + du)
    s = reference.activate(g, activation)
    ds = 1.14 * dg
    ds = ds + 8 * UNIT * (s.abs() + ds) + (3 * UNIT if activation == "gelu_tanh" else 0)
    da = ds * u.abs() + (s.abs() + ds) * du + EPS_F32 * (s * u).abs()
    keep = mask.double()
    da, a = da * keep, (s * u).abs() * keep
    n = keep.sum(dim=1, keepdim=True)
    total = da @ down.abs() + (9 / 8 * n + 48) * EPS_F32 * ((a + da) @ down.abs())
    exact = ((s * u) * keep) @ down
    if down_bias is not None:
        exact = exact + down_bias.double()
        total = total + UNIT * (exact.abs() + total)
    limits = torch.finfo(x.dtype)
    smallest = max(limits.tiny * limits.eps, 2.0**-126)
    return total + limits.eps / 2 * (exact.abs() + total) + smallest


def assert_within(got: torch.Tensor, want: torch.Tensor, tolerance: torch.Tensor) -> None:
    """Every entry of `got` is within `tolerance` of `want`; not-a-number never is."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, want {tuple(want.shape)}"
    excess = (got.double() - want).abs() / tolerance.clamp_min(torch.finfo(torch.float64).tiny)
    bad = ~(excess <= 1)
    assert not bad.any(), (
        f"{int(bad.sum())} of {bad.numel()} out, worst {excess.max():.3g}x allowed"
    )


def assert_same_support(got: torch.Tensor, want: torch.Tensor, distance, margin) -> None:
    """Masks agree, except where the decision was closer than the margin of error."""
    differ = got != want
    assert not (differ & (distance > margin)).any(), f"{int(differ.sum())} neurons differ"


def ffn_path(x: torch.Tensor, n_neurons: int, *, is_joint: bool = False) -> str:
    """The path of `ops.execute` that adds up as `ops.ffn` does; of no account on the CPU."""
    sizes = (*x.shape, n_neurons)
    return designs.choose(*sizes, shared=is_joint, senses=True, dtype=x.dtype).split()[0]


def mask_of(tile: torch.Tensor, n_tiles: torch.Tensor, tile_rows: int, n_neurons: int):
    """The neurons ``(batch, n_neurons)`` that a tile list stands for."""
    mask = torch.zeros(len(n_tiles), n_neurons, dtype=torch.bool, device=tile.device)
    for row, count in enumerate(n_tiles.tolist()):
        for t in tile[row, :count].tolist():
            mask[row, t * tile_rows : (t + 1) * tile_rows] = True
    return mask


def split_tiles(tile: torch.Tensor, n_tiles: torch.Tensor) -> list[torch.Tensor]:
    """A tile list as reference.py has it."""
    return [tile[row, :count].long() for row, count in enumerate(n_tiles.tolist())]


def usage_of(problem, *, biases=None, activation="silu", tile_rows=1, votes=None):
    """What a problem's measurements promise, in float64, and the margin of error of float32.

    Both ``(lists, n_groups)``, and the scales ``(batch,)``.
    """
    y, scale = reference.sense(problem.codes, problem.equal, problem.x, bits=problem.bits)
    given = (y, scale, problem.row_scale, None if biases is None else biases.offset, activation)
    usage, margin = reference.usage(*given), usage_tolerance(*given)
    margin = group_tolerance(usage, margin, tile_rows)
    usage = usage if tile_rows == 1 else reference.group(usage, tile_rows)
    if votes is not None:
        margin = joint_tolerance(usage, margin, votes)
        usage = reference.joint(usage, votes)
    return usage, margin, scale


def middle_threshold(problem, quantile: float = 0.6, **more) -> torch.Tensor:
    """A threshold that keeps about ``1 - quantile`` of every list's groups, ``(lists,)`` float32.

    It stands midway between two usages, so that no group is nearer to it than it must be.
    """
    ranked = usage_of(problem, **more)[0].sort(dim=1).values
    n = ranked.shape[1]
    low = min(int(quantile * n), n - 1)
    high = min(low + 1, n - 1)
    return ((ranked[:, low] + ranked[:, high]) / 2).float().contiguous()
