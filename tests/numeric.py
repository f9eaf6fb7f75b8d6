"""Error bounds of the operations, derived, and the assertions that use them."""

import functools

import torch

from csfast import reference

UNIT = 2.0**-24  # half the distance of 1 and the next float32: the error of one rounding
EPS_F32 = 2 * UNIT


@functools.cache
def made(case, dtype, device, bits=2):
    """The problem of a case, made once for all tests: fitting its codes is most of the work.

    By one thread: the tensors are small, and where cores are shared, threads wait for each other.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return case.make(dtype, device, bits=bits)
    finally:
        torch.set_num_threads(n_threads)


def dot_tolerance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Bound on the error of ``a @ b.T`` summed in float32, entry by entry.

    Any order of n additions errs by at most ``(n + 1) * eps * (|a| @ |b|.T)`` to first order
    (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1); the products of
    half-precision inputs are exact in float32. What bfloat16 instructions flush is below 2^-126.
    """
    n = a.shape[-1]
    return (n + 1) * (EPS_F32 * (a.double().abs() @ b.double().abs().T) + 2.0**-120)


def usage_tolerance(y: torch.Tensor, scale: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
    """Bound on the error of the float32 usage, and so the margin of a threshold.

    With u = 2^-24: g and up each carry three roundings (the conversion of y and two products), 3 u
    relative. exp(-g) is right to 2 ulp (4 u) of an argument that is off by 3 u |g|; of that,
    1 + exp(-g) feels the share s = sigmoid(-g), and adding and dividing round once each. The
    product with up rounds once more and brings its 3 u. Together
    3 + s (3 |g| + 4) + 2 + 3 + 1 <= 13 + 3 s |g|; 16 + 4 s |g| covers the second order. Where
    exp(-g) overflows (g < -88.7) the usage is 0, and was at most 89 exp(-88.7) |up| < 2^-121 |up|.
    """
    z = scale.double()[:, None, None] * row_scale.double() * y.double()
    g, up = z[..., 0], z[..., 1].abs()
    usage = (torch.nn.functional.silu(g) * up).abs()
    return usage * (16 + 4 * g.abs() * torch.sigmoid(-g)) * UNIT + up * 2.0**-121 + 2.0**-140


def execute_tolerance(gate, up, down_t, x, mask) -> torch.Tensor:
    """Bound on the error of `execute` on the neurons of ``mask (batch, n_neurons)``.

    g and u are dot products. silu has slope at most 1.1 and rounds by at most 8 u (see
    `usage_tolerance` without its error of g), a = silu(g) u once more. The sum of the n kept
    neurons, cut into at most 32 runs, takes at most n + 33 additions. The output is rounded to its
    dtype once, to zero below the smallest normal number.
    """
    xd, gated, upd, down = (t.double() for t in (x, gate, up, down_t))
    dg, du = dot_tolerance(x, gate), dot_tolerance(x, up)
    s = torch.nn.functional.silu(xd @ gated.T)
    u = xd @ upd.T
    ds = 1.1 * dg + 8 * UNIT * s.abs()
    da = ds * u.abs() + (s.abs() + ds) * du + EPS_F32 * (s * u).abs()
    keep = mask.double()
    da, a = da * keep, (s * u).abs() * keep
    n = keep.sum(dim=1, keepdim=True)
    total = da @ down.abs() + (n + 33) * EPS_F32 * ((a + da) @ down.abs())
    exact = ((s * u) * keep) @ down
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


def middle_threshold(problem, quantile: float = 0.6) -> torch.Tensor:
    """A threshold that keeps about ``1 - quantile`` of every row's neurons, ``(batch,)`` float32.

    It stands midway between two usages, so that no neuron is nearer to it than it must be.
    """
    y, scale = reference.sense(problem.codes, problem.equal, problem.x, bits=problem.bits)
    ranked = reference.usage(y, scale, problem.row_scale).sort(dim=1).values
    n = ranked.shape[1]
    low = min(int(quantile * n), n - 1)
    high = min(low + 1, n - 1)
    return ((ranked[:, low] + ranked[:, high]) / 2).float().contiguous()
