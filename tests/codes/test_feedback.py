"""Rounding with feedback: what one column leaves undone moves the columns after it."""

import pytest
import torch

from csfast import reference
from csfast.codes import feedback, planes

UNIT = 2.0**-24


def problem(n=64, d=70, seed=0):
    """Rows, and the second moment of inputs that hang together; more columns than a block."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(400, d // 2, generator=draw) @ torch.randn(d // 2, d, generator=draw) / d**0.5
    x = x + 0.5 * torch.randn(400, d, generator=draw)
    return torch.randn(n, d, generator=draw), x.double().T @ x.double() / len(x)


def damped(moment):
    """What `feedback.spread` adds."""
    return moment + feedback.DAMP * moment.diagonal().mean() * torch.eye(len(moment)).double()


def coded(w, scale, bits, factor):
    ones = torch.ones(w.shape[1])
    return planes.unpack(planes.encode(w, ones, scale, bits, factor), bits, w.shape[1])


def error_of(w, codes, scale, bits, moment):
    """Mean squared error of the output, row by row."""
    off = w.double() - scale.double()[:, None] * planes.levels_of(codes, bits).double()
    return ((off @ moment) * off).sum(dim=1)


def test_agrees_with_the_reference(bits):
    """Rows of which every column was farther from a border than rounding moves it, exactly.

    In units of 2^-24, column j is off by its own roundings, j + 3 times the size of what it adds
    up, w_j and the errors e_i times the ratios r_ij; the ratio itself was rounded three times. The
    error of an earlier column moves with the column, so what it is off by comes along by the ratio.
    """
    w, moment = problem()
    scale = planes.fit_scale(w, torch.ones(70), bits)
    wanted, seen = reference.code_with_feedback(w, scale, bits, damped(moment))
    found = coded(w, scale, bits, feedback.spread(moment))
    factor = torch.linalg.cholesky(torch.linalg.inv(damped(moment)), upper=True)
    ratio = (factor / factor.diagonal()[:, None]).abs()
    levels = planes.levels_of(torch.arange(planes.n_codes(bits)), bits).double()
    h = scale.double()[:, None]
    error = (seen - h * levels[wanted.long()]).abs()
    off = torch.zeros_like(seen)
    for j in range(70):
        size = w[:, j].double().abs() + error[:, :j] @ ratio[:j, j]
        off[:, j] = (j + 6) * UNIT * size + off[:, :j] @ ratio[:j, j]
    borders = (levels[1:] + levels[:-1]) / 2
    margin = (seen[..., None] - h[..., None] * borders).abs().amin(dim=2)
    clear = (margin > off + 4 * UNIT * seen.abs()).all(dim=1)
    assert clear.double().mean() > 0.8
    assert torch.equal(found[clear], wanted[clear])


def test_is_exact_where_arithmetic_is(bits):
    """Few binary digits throughout: a factor of powers of two, and errors that are halves."""
    d = 140
    draw = torch.Generator().manual_seed(0)
    w = torch.randint(-8, 9, (32, d), generator=draw) / 4
    factor = torch.eye(d)
    factor[torch.arange(d - 1), torch.arange(1, d)] = 0.5  # to the next column
    factor[torch.arange(d - 70), torch.arange(70, d)] = -1.0  # and into the next block
    inverse = factor.double().T @ factor.double()
    scale = torch.ones(32)
    # Ties go up in codes of bits and to zero in ternary, to the lower in the reference: none here.
    w = w + 2.0**-9
    wanted, seen = reference.code_with_feedback(w, scale, bits, torch.linalg.inv(inverse))
    found = coded(w, scale, bits, factor)
    assert (seen.abs() < 2.0**6).all()
    assert torch.equal(found, wanted)


def test_the_factor_is_that_of_the_inverse():
    _, moment = problem()
    factor = feedback.spread(moment)
    assert factor.dtype == torch.float32 and torch.equal(factor, factor.triu())
    identity = factor.double().T @ factor.double() @ damped(moment)
    # Rounding the factor moves U'U by 2^-23 of the sizes of what it sums.
    size = factor.double().abs().T @ factor.double().abs() @ damped(moment).abs()
    assert ((identity - torch.eye(70)).abs() <= 2.0**-23 * size + 2.0**-40).all()


def test_lessens_the_error_in_the_metric_of_the_inputs(bits):
    w, moment = problem()
    scale = planes.fit_scale(w, torch.ones(70), bits)
    plain, fed = (
        error_of(w, coded(w, scale, bits, f), scale, bits, moment)
        for f in (None, feedback.spread(moment))
    )
    assert fed.sum() < plain.sum()


def test_inputs_that_are_strangers_change_nothing(bits):
    """A diagonal moment: no column can make up for another."""
    w, moment = problem()
    scale = planes.fit_scale(w, torch.ones(70), bits)
    factor = feedback.spread(moment.diagonal().diag())
    assert torch.equal(coded(w, scale, bits, factor), coded(w, scale, bits, None))


@pytest.mark.parametrize("power", [-40, 40])
def test_the_scale_of_the_moment_changes_nothing(bits, power):
    w, moment = problem()
    scale = planes.fit_scale(w, torch.ones(70), bits)
    given, scaled = (feedback.spread(m) for m in (moment, moment * 2.0 ** (2 * power)))
    assert torch.equal(scaled, given * 2.0**-power)
    assert torch.equal(coded(w, scale, bits, given), coded(w, scale, bits, scaled))


def test_rows_of_zeros_stay_zeros(bits):
    w, moment = problem()
    w[3] = 0
    scale = planes.fit_scale(w, torch.ones(70), bits)
    codes = coded(w, scale, bits, feedback.spread(moment))
    assert scale[3] == 0
    assert torch.equal(codes[3], coded(w, scale, bits, None)[3])


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (torch.zeros(3, 4), r"^\[feedback\] moment of shape \(3, 4\): want \(d, d\)\.$"),
        (torch.zeros(3), r"^\[feedback\] moment of shape \(3,\): want \(d, d\)\.$"),
        (torch.full((2, 2), float("nan")), r"^\[feedback\] moment: not finite; want finite"),
        (torch.full((2, 2), float("inf")), r"^\[feedback\] moment: not finite; want finite"),
    ],
)
def test_moments_that_are_none_are_refused(moment, message):
    with pytest.raises(ValueError, match=message):
        feedback.spread(moment)
