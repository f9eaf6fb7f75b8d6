"""Few-bit weights: plain rounding errs by half a step, calibrated rounding where it costs least."""

import pytest
import torch

from csfast.judge import quantize


def make_problem(n=24, d=150, *, n_tokens=600, seed=0):
    """Weights, and the second moment of inputs whose channels depend on each other."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, d, generator=draw)
    mix = torch.randn(d, d, generator=draw) * torch.rand(d, generator=draw).square()
    x = (torch.randn(n_tokens, d, generator=draw) @ mix).double()
    return weight, x.T @ x / n_tokens


# Plain rounding


def test_rounding_errs_by_half_a_step():
    draw = torch.Generator().manual_seed(0)
    weight = torch.rand(10, 100, generator=draw) * 2 - 1
    for bits in (8, 4):
        rounded, n_bytes = quantize.round_to_nearest(weight, bits)
        # The largest step is 2 / (2^bits - 1); scales and minima are rounded to 11 bits.
        assert (rounded - weight).abs().max() <= 1 / (2**bits - 1) + 2**-10
        assert n_bytes in (1000 * bits / 8 + 40, 1000 * bits / 8 + 80)
        assert rounded.shape == weight.shape


@pytest.mark.parametrize("kind", ["rtn", "gptq"])
def test_equal_weights_are_exact(kind):
    weight = torch.full((3, 130), 0.25)
    moment = torch.eye(130, dtype=torch.float64)
    rounded, _ = (
        quantize.round_to_nearest(weight, 2) if kind == "rtn" else quantize.gptq(weight, moment, 2)
    )
    assert torch.equal(rounded, weight)


# Calibrated rounding


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(24, 150), (5, 64), (7, 63), (3, 20), (1, 200)])
def test_calibrated_rounding_errs_less_where_it_counts(bits, shape):
    weight, moment = make_problem(*shape)
    plain, _ = quantize.round_to_nearest(weight, bits)
    fitted, n_bytes = quantize.gptq(weight, moment, bits)
    errors = [quantize.moment_error(of - weight, moment) for of in (fitted, plain)]
    assert errors[0] <= errors[1]
    assert fitted.shape == weight.shape and fitted.dtype == weight.dtype
    n, d = shape
    groups = -(-d // 64)
    assert n_bytes in (n * d * bits / 8 + 2 * n * groups * scales for scales in (1, 2))


def test_dependent_channels_gain_most():
    """Where channels are independent there is nothing to make up for."""
    weight, moment = make_problem()
    gains = []
    for of in (moment, moment.diagonal().diag()):
        plain, fitted = quantize.round_to_nearest(weight, 3)[0], quantize.gptq(weight, of, 3)[0]
        errors = [quantize.moment_error(r - weight, of) for r in (plain, fitted)]
        gains.append(errors[1] / errors[0])
    assert gains[0] < 0.6 * gains[1]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_on_the_grid_are_exact(bits):
    draw = torch.Generator().manual_seed(0)
    code = torch.randint(0, 2**bits, (9, 128), generator=draw).float()
    code[:, 0::64], code[:, 1::64] = 0, 2**bits - 1  # both ends are there in every group
    scale = torch.exp2(torch.randint(-3, 3, (9, 2), generator=draw).float())
    low = torch.randint(-8, 8, (9, 2), generator=draw).float() / 4
    weight = (code.view(9, 2, 64) * scale[..., None] + low[..., None]).flatten(1)
    _, moment = make_problem(9, 128)
    rounded, _ = quantize.gptq(weight, moment, bits)
    assert torch.equal(rounded, weight)


def test_every_weight_takes_one_of_the_levels():
    weight, moment = make_problem(6, 128)
    rounded, _ = quantize.gptq(weight, moment, 2)
    for row in rounded.view(6, 2, 64):
        for group in row:
            # Sums of the same two numbers may differ in the last place.
            assert len(group.double().mul(1e4).round().unique()) <= 4


def test_channels_that_were_never_seen_are_rounded_all_the_same():
    weight, moment = make_problem(8, 100)
    moment[:30] = 0
    moment[:, :30] = 0
    rounded, _ = quantize.gptq(weight, moment, 4)
    assert rounded.isfinite().all()
    # A step of the widest group: its range over 15 levels, clipped at .45 of it at worst.
    assert (rounded - weight)[:, :30].abs().max() <= 0.6 * float(weight.abs().max())
    nothing, _ = quantize.gptq(weight, torch.zeros_like(moment), 8)
    assert (nothing - weight).abs().max() <= 0.6 * float(weight.abs().max())


def test_columns_may_stand_in_any_order_of_groups():
    """Exchanging whole groups of columns exchanges the result, where inputs are independent."""
    weight, moment = make_problem(6, 128)
    of = moment.diagonal().diag()
    order = torch.cat([torch.arange(64, 128), torch.arange(64)])
    first, _ = quantize.gptq(weight, of, 3)
    second, _ = quantize.gptq(weight[:, order], of[order][:, order], 3)
    assert torch.equal(second, first[:, order])


def test_a_single_column_is_exact_up_to_its_scale():
    weight, moment = make_problem(5, 1)
    rounded, _ = quantize.gptq(weight, moment, 2)
    # A 16-bit scale has eleven bits.
    assert torch.allclose(rounded, weight, rtol=2**-10)


def test_half_precision_weights_keep_their_dtype():
    weight, moment = make_problem(4, 64)
    rounded, _ = quantize.gptq(weight.bfloat16(), moment, 8)
    assert rounded.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range_are_refused(bits):
    weight, moment = make_problem(2, 64)
    with pytest.raises(ValueError, match=rf"^\[ablate\] rtn-int{bits}: want 2 to 8 bits\.$"):
        quantize.round_to_nearest(weight, bits)
    with pytest.raises(ValueError, match=rf"^\[ablate\] gptq-int{bits}: want 2 to 8 bits\.$"):
        quantize.gptq(weight, moment, bits)
