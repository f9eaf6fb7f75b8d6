"""Codes of weights: how they are fitted, packed and unpacked."""

import itertools

import pytest
import torch

from axes import inside
from csfast import _native
from csfast.codes import planes

TERNARY = planes.TERNARY


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def squared_error(w, scale, bits):
    equal = torch.ones(w.shape[1])
    codes = planes.unpack(planes.encode(w, equal, scale, bits), bits, w.shape[1])
    decoded = scale.double()[:, None] * planes.levels_of(codes, bits).double()
    return (decoded - w.double()).square().sum(dim=1)


@inside(d=[1, 79, 80, 81, 128, 129, 400, 1000])
def test_packing_loses_nothing(d, bits):
    n_codes = 3 if bits == TERNARY else 2**bits
    draw = torch.Generator().manual_seed(d)
    codes = torch.randint(0, n_codes, (5, d), generator=draw).to(torch.uint8)
    packed = planes.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.shape == (5, *planes.row_shape(d, bits))
    assert torch.equal(planes.unpack(packed, bits, d), codes)


def test_every_five_ternary_codes_have_their_byte():
    """All 243, in one row of 3888 bytes: channels k w + i, the byte rounded up."""
    every = torch.tensor(list(itertools.product(range(3), repeat=5)), dtype=torch.uint8)
    every = torch.cat([every, every[:13]])  # whole groups of 16
    packed = planes.pack(every.T.reshape(1, -1), TERNARY).flatten()
    value = every.long() @ torch.tensor([81, 27, 9, 3, 1])
    assert packed.tolist() == [-(-256 * v // 243) for v in value.tolist()]
    assert torch.equal(planes.unpack(packed.view(1, 16, 16), TERNARY, 1280).view(5, 256), every.T)


@pytest.mark.parametrize("bits", planes.CODES)
def test_levels_are_symmetric(bits):
    n_codes = 3 if bits == TERNARY else 2**bits
    levels = planes.levels_of(torch.arange(n_codes), bits)
    assert torch.equal(levels, -levels.flip(0))
    assert levels.max() == planes.level_max(bits)
    assert set(levels.diff().tolist()) == {1.0 if bits == TERNARY else 2.0}


def test_the_ternary_scale_is_the_best_of_all():
    """Of every scale that k weights of a row can have, and of a thousand others."""
    w = rows(20, 50) * torch.exp2(torch.randint(-3, 4, (20, 50)).float())
    got = squared_error(w, planes.fit_scale(w, torch.ones(50), TERNARY), TERNARY)
    ranked = w.abs().double().sort(dim=1, descending=True).values
    means = ranked.cumsum(dim=1) / torch.arange(1, 51)
    others = w.abs().amax(dim=1, keepdim=True) * torch.linspace(0.001, 1, 1000)
    for scale in torch.cat([means.float(), others], dim=1).unbind(dim=1):
        # Every term of either sum of 50 was rounded by 2^-24 in its scale.
        assert (got <= squared_error(w, scale, TERNARY) * (1 + 2.0**-20)).all()


def test_the_ternary_scale_is_the_mean_of_what_it_keeps():
    w = rows(64, 300)
    scale = planes.fit_scale(w, torch.ones(300), TERNARY)
    kept = w.abs() > scale[:, None] / 2
    mean = (w.abs().double() * kept).sum(dim=1) / kept.sum(dim=1)
    # One rounding to float32, of a sum in float64 in either order.
    assert ((scale.double() - mean).abs() <= 2.0**-23 * mean).all()
    # A Gaussian keeps what is beyond .612 standard deviations (Max 1960, of three levels): 54 %.
    assert 0.45 < kept.double().mean() < 0.63


def test_ternary_rows_that_are_ternary_are_exact():
    w = torch.randint(-1, 2, (40, 130), generator=torch.Generator().manual_seed(1)).float()
    w[:, 0] = 1
    w *= torch.exp2(torch.arange(40.0) - 20)[:, None]
    scale = planes.fit_scale(w, torch.ones(130), TERNARY)
    assert torch.equal(scale, torch.exp2(torch.arange(40.0) - 20))
    assert not squared_error(w, scale, TERNARY).any()


def test_a_row_of_zeros_has_no_scale(bits):
    w = torch.zeros(3, 40)
    scale = planes.fit_scale(w, torch.ones(40), bits)
    assert not scale.any()
    if bits == TERNARY:
        codes = planes.unpack(planes.encode(w, torch.ones(40), scale, bits), bits, 40)
        assert not planes.levels_of(codes, bits).any()


def test_rows_are_fitted_one_by_one(bits, monkeypatch):
    """Whatever rows are fitted beside them, and however many are sorted at a time."""
    w = rows(9, 77)
    whole = planes.fit_scale(w, torch.ones(77), bits)
    monkeypatch.setattr(planes, "_SORT_ROWS", 4)
    assert torch.equal(planes.fit_scale(w, torch.ones(77), bits), whole)
    assert torch.equal(planes.fit_scale(w[3:4], torch.ones(77), bits), whole[3:4])


def test_more_of_a_code_errs_less():
    w = rows(64, 512)
    order = (1, TERNARY, 2, 3, 4)
    errors = [squared_error(w, planes.fit_scale(w, torch.ones(512), b), b).sum() for b in order]
    assert errors == sorted(errors, reverse=True)
    # Least mean squared errors of a Gaussian (Max 1960): .3634, .1902 and .1188 of the variance.
    for error, least in zip(errors, (0.3634, 0.1902, 0.1188), strict=False):
        assert least * 0.97 < error / w.square().sum() < least * 1.05


def test_codes_are_those_of_the_evened_weights(bits):
    w, equal = rows(6, 90), torch.exp2(torch.arange(90) % 5 - 2.0)
    scale = planes.fit_scale(w * equal, equal, bits)
    assert torch.equal(scale, planes.fit_scale(w, torch.ones(90), bits))
    packed = planes.encode(w * equal, equal, scale, bits)
    assert torch.equal(packed, planes.encode(w, torch.ones(90), scale, bits))


def test_bytes_are_those_of_the_tensors(bits):
    w = torch.zeros(6, 90)
    codes = planes.encode(w, torch.ones(90), torch.zeros(6), bits)
    assert planes.n_bytes(3, 90, bits) == codes.numel() + 3 * 2 * 4 + 90 * 4


def test_ternary_codes_take_one_and_six_tenths_bits():
    """5120 channels are 64 groups: no padding."""
    assert planes.n_bytes(1, 5120, TERNARY) - 8 - 4 * 5120 == 2 * 5120 * 1.6 / 8


@inside(bits=[0, 5, -1, "2", "TERNARY", "", None])
@pytest.mark.parametrize("call", ["fit_scale", "encode", "pack", "unpack", "n_bytes", "levels_of"])
def test_refuses_a_code_that_is_none(call, bits):
    w, ones = torch.ones(2, 8), torch.ones(8)
    given = {
        "fit_scale": (w, ones, bits),
        "encode": (w, ones, torch.ones(2), bits),
        "pack": (w.to(torch.uint8), bits),
        "unpack": (torch.zeros(2, 1, 16, dtype=torch.uint8), bits, 8),
        "n_bytes": (2, 8, bits),
        "levels_of": (w, bits),
    }
    with pytest.raises(ValueError, match=rf'^\[planes\] bits = {bits!r}: want 1, 2, 3, 4 or "ter'):
        getattr(planes, call)(*given[call])


def test_the_activation_has_room_for_every_code():
    for d in (1, 80, 128, 129, 384, 400, 4096, 14336):
        width = _native.q_width(d)
        for bits in planes.CODES:
            groups, group_bytes = planes.row_shape(d, bits)
            channels = groups * (80 if bits == TERNARY else 128)
            assert width >= channels >= d
            assert channels * (1.6 if bits == TERNARY else bits) == groups * group_bytes * 8
        assert width % 128 == 0 and width - d < 256  # less than two chunks
