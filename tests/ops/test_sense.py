import pytest
import torch

from axes import DTYPES, inside, pairwise
from csfast import ops, reference
from csfast.bench.cases import CASES, LARGE, Case
from csfast.codes import planes
from numeric import made


def n_codes(bits):
    return 3 if bits == "ternary" else 2**bits


@pairwise(case=CASES, dtype=DTYPES, bits=planes.CODES)
def test_equals_reference_exactly(case, dtype, bits, device):
    """The product is specified in integers, so there is no tolerance."""
    p = made(case, dtype, device, bits=bits)
    y, scale = ops.sense(p.codes, p.equal, p.x, bits=bits)
    want_y, want_scale = reference.sense(p.codes, p.equal, p.x, bits=bits)
    assert torch.equal(y, want_y)
    assert torch.equal(scale, want_scale)


@pytest.mark.parametrize("bits", [2, 3, "ternary"])
def test_equals_reference_on_a_large_layer(bits, device):
    """Any byte is five ternary digits: the 13 that no code packs to as well."""
    g = torch.Generator().manual_seed(1)
    shape = (LARGE.n_neurons, 2, *planes.row_shape(LARGE.d, bits))
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g).to(device)
    x = torch.randn(2, LARGE.d, generator=g).to(device)
    equal = torch.ones(LARGE.d, device=device)
    y, scale = ops.sense(codes, equal, x, bits=bits)
    want_y, want_scale = reference.sense(codes, equal, x, bits=bits)
    assert torch.equal(y, want_y)
    assert torch.equal(scale, want_scale)


@inside(seed=range(50))
def test_rounds_the_activation_as_specified(seed, dtype, device):
    """Fifty rows with exponents from 2^-20 to 2^20: divisions and products round once each."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 97, generator=g) * torch.exp2(torch.randint(-20, 21, (4, 1), generator=g))
    x = x.clamp(-60000, 60000).to(device, dtype)
    equal = torch.exp2(torch.randint(-2, 3, (97,), generator=g).float()).to(device)
    codes = torch.randint(0, 256, (3, 2, 1, 32), dtype=torch.uint8, generator=g).to(device)
    y, scale = ops.sense(codes, equal, x, bits=2)
    want_y, want_scale = reference.sense(codes, equal, x, bits=2)
    assert torch.equal(y, want_y)
    assert torch.equal(scale, want_scale)


def test_every_code_counts(bits, device):
    """One channel at a time, every code: y is 127 times its level."""
    d = 256
    u = torch.arange(2 * d, dtype=torch.int64).remainder(n_codes(bits)).view(2, d).to(torch.uint8)
    codes = planes.pack(u, bits)[None].to(device)
    x = torch.eye(d, device=device)
    y, scale = ops.sense(codes, torch.ones(d, device=device), x, bits=bits)
    assert torch.equal(y[:, 0].cpu(), 127 * planes.levels_of(u, bits).int().T)
    assert torch.equal(scale.cpu(), torch.full((d,), 1 / 127))


@inside(dtype=DTYPES)
def test_massive_channels_change_nothing(dtype, bits, device):
    """Four channels 64 times as large, their weights 1 / 64: the equaliser takes all of it up."""
    case = Case("outliers", batch=3, d=200, n_neurons=77)
    plain = made(case, torch.float32, "cpu", bits=bits)
    at = torch.tensor([3, 64, 127, 199])
    x, gate, up = plain.x.clone(), plain.gate.clone(), plain.up.clone()
    x[:, at] *= 64
    gate[:, at] /= 64
    up[:, at] /= 64

    def run(x, gate, up, mean_square):
        equal = planes.equalizer(mean_square)
        scales = [planes.fit_scale(w, equal, bits) for w in (gate, up)]
        codes = [planes.encode(w, equal, s, bits) for w, s in zip((gate, up), scales, strict=True)]
        packed = torch.stack(codes, dim=1).to(device)
        return ops.sense(packed, equal.to(device), x.to(device, dtype), bits=bits)

    mean_square = plain.x.square().mean(dim=0)
    massive = mean_square.clone()
    massive[at] *= 64**2
    y, scale = run(plain.x, plain.gate, plain.up, mean_square)
    y_massive, scale_massive = run(x, gate, up, massive)
    assert torch.equal(y, y_massive)
    assert torch.equal(scale, scale_massive)
    assert y.abs().max() > 0


def test_counting_codes_from_the_other_end_negates_the_measurements(bits, device):
    """Padding included: its codes change as well."""
    p = made(CASES[2], torch.float32, device, bits=bits)
    y, _ = ops.sense(p.codes, p.equal, p.x, bits=bits)
    u = planes.unpack(p.codes.flatten(0, 1), bits, p.codes[0, 0].numel() * 8)
    flipped = planes.pack(n_codes(bits) - 1 - u, bits).view_as(p.codes)
    assert not torch.equal(flipped, p.codes)
    got, _ = ops.sense(flipped, p.equal, p.x, bits=bits)
    assert torch.equal(got, -y)


def test_permuting_the_batch_permutes_the_result(device):
    p = made(CASES[5], torch.bfloat16, device)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3)).to(device)
    y, scale = ops.sense(p.codes, p.equal, p.x, bits=2)
    y_permuted, scale_permuted = ops.sense(p.codes, p.equal, p.x[order].contiguous(), bits=2)
    assert torch.equal(y[order], y_permuted)
    assert torch.equal(scale[order], scale_permuted)


@inside(dtype=DTYPES)
def test_zero_and_not_finite_rows(dtype, device):
    p = made(CASES[2], dtype, device)
    x = torch.zeros(4, 200, dtype=dtype, device=device)
    x[1, 7], x[2, 199], x[3, 0] = float("nan"), float("inf"), -float("inf")
    y, scale = ops.sense(p.codes, p.equal, x, bits=2)
    assert not y.any()
    assert scale[0] == 0
    assert scale[1:].isnan().all()


def test_activation_that_overflows_under_the_equaliser(device):
    p = made(CASES[2], torch.float32, device)
    x = torch.full((1, 200), 3e38, device=device)
    _, scale = ops.sense(p.codes, torch.full_like(p.equal, 4.0), x, bits=2)
    assert scale.isnan().all()


@inside(value=[1e-45, 1e-38, 1e-30])
def test_tiny_activations(value, device):
    """127 / peak may overflow; zeros must stay zeros and the peak must stay 127."""
    codes = torch.full((1, 2, 1, 32), 0xFF, dtype=torch.uint8, device=device)  # every code is 3
    x = torch.tensor([[value, 0.0]], device=device)
    y, scale = ops.sense(codes, torch.ones(2, device=device), x, bits=2)
    assert y.flatten().tolist() == [3 * 127, 3 * 127]
    assert scale.item() == (torch.tensor([value]) / torch.tensor([127.0])).item()


@pytest.mark.parametrize(
    ("bits", "d_max", "given"),
    [
        (1, 8_454_656, "channels of 1 bits"),
        (4, 563_584, "channels of 4 bits"),
        ("ternary", 524_288, "ternary channels"),
    ],
)
def test_width_at_which_int32_may_overflow(bits, d_max, given):
    d = d_max + 1
    codes = torch.zeros(1, 2, *planes.row_shape(d, bits), dtype=torch.uint8)
    message = rf"\[sense\] d = {d} {given}: want at most {d_max}, or int32 may overflow\."
    with pytest.raises(ValueError, match=message):
        ops.sense(codes, torch.ones(d), torch.zeros(1, d), bits=bits)


@inside(code=[0, 6, -1, 257, 1 << 30])
def test_refuses_a_code_that_is_none(code):
    codes, equal, x = torch.zeros(1, 2, 1, 32, dtype=torch.uint8), torch.ones(8), torch.ones(1, 8)
    with pytest.raises(ValueError, match=r"\[sense\] code = \d+: want 1 to 5, a csfast::Code\."):
        torch.ops.csfast.sense.default(codes, equal, x, code)


def test_largest_sum_does_not_overflow(device):
    """Every code and every activation at its most, on 256 k channels of 4 bits."""
    d = 1 << 18
    codes = torch.full((1, 2, d // 128, 64), 0xFF, dtype=torch.uint8, device=device)
    x = torch.ones(1, d, device=device)
    y, _ = ops.sense(codes, torch.ones(d, device=device), x, bits=4)
    assert y.flatten().tolist() == [15 * 127 * d] * 2


@inside(rows=[1, 4])
@pytest.mark.parametrize(("byte", "level"), [(0xFF, 1), (0, -1)])
def test_largest_ternary_sum_does_not_overflow(byte, level, rows, device):
    """Every code and every activation at its most, on as many channels as there may be."""
    d = 1 << 19
    codes = torch.full((1, 2, *planes.row_shape(d, "ternary")), byte, dtype=torch.uint8)
    x = torch.ones(rows, d, device=device)
    y, _ = ops.sense(codes.to(device), torch.ones(d, device=device), x, bits="ternary")
    assert y.flatten().tolist() == [level * 127 * d] * 2 * rows
