import pytest
import torch

from axes import DTYPES, inside
from csfast import _native, ops, reference
from csfast.bench.cases import PROJECTS, ProjectCase
from numeric import assert_within, dot_tolerance

INF, NAN = float("inf"), float("nan")
RAGGED, OFF_LINE, EMPTY, SKETCH, SKETCH_BATCH = PROJECTS[1:]


@pytest.mark.parametrize("case", PROJECTS, ids=lambda c: c.name)
def test_matches_reference(case, dtype, device):
    phi, x = case.make(dtype, device)
    y = ops.project(phi, x)
    assert y.dtype == torch.float32
    assert_within(y, reference.project(phi, x), dot_tolerance(x, phi))


@pytest.mark.parametrize("case", PROJECTS, ids=lambda c: c.name)
def test_is_exact_on_integers(case, dtype, device):
    phi, x = case.make_exact(dtype, device)
    assert torch.equal(ops.project(phi, x).double(), reference.project(phi, x))


@inside(d=[7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 95, 96, 128, 257, 1031], dtype=DTYPES)
def test_no_channel_is_lost(d, dtype, device):
    """One channel at a time: the row of phi itself."""
    phi, _ = ProjectCase("one_hot", batch=1, d=d, m=5).make_exact(dtype, device)
    y = ops.project(phi, torch.eye(d, dtype=dtype, device=device))
    assert torch.equal(y, phi.T.float())


@inside(rows=[1, 2, 50, 76, 77], dtype=DTYPES)
def test_fewer_rows_are_a_prefix(rows, dtype, device):
    phi, x = OFF_LINE.make(dtype, device)
    whole = ops.project(phi, x)
    assert torch.equal(ops.project(phi, x, rows=rows), whole[:, :rows])
    assert torch.equal(ops.project(phi[:rows].contiguous(), x), whole[:, :rows])


@inside(dtype=DTYPES)
def test_is_linear(dtype, device):
    """Integers, so that it is linear bit for bit."""
    phi, x = SKETCH_BATCH.make_exact(dtype, device)
    u, v = x[:8].contiguous(), x[8:].contiguous()
    want = ops.project(phi, u) - 3 * ops.project(phi, v)
    assert torch.equal(ops.project(phi, u - 3 * v), want)


@inside(dtype=DTYPES)
def test_scaling_by_a_power_of_two_scales_every_bit(dtype, device):
    phi, x = OFF_LINE.make(dtype, device)
    want = ops.project(phi, x)
    assert torch.equal(ops.project(phi, 4 * x), 4 * want)
    assert torch.equal(ops.project(2 * phi, x), 2 * want)


@inside(dtype=DTYPES)
def test_passes_the_dot_test(dtype, device):
    """<phi u, v> = <u, phi' v>, exactly, on integers: the second product needs phi transposed."""
    phi, u = OFF_LINE.make_exact(dtype, device)
    _, v = ProjectCase("adjoint", batch=5, d=77, m=1).make_exact(dtype, device, seed=1)
    one = (ops.project(phi, u).double() * v.double()).sum(dim=1)
    other = (u.double() * ops.project(phi.T.contiguous(), v).double()).sum(dim=1)
    assert torch.equal(one, other)
    assert one.abs().min() > 0


def test_two_in_a_row_are_low_rank(device):
    """U V' x in float32, against the product of the two matrices."""
    left, _ = ProjectCase("left", batch=1, d=12, m=77).make(torch.float32, device)
    right, x = ProjectCase("right", batch=3, d=200, m=12).make(torch.float32, device, seed=1)
    inner = ops.project(right, x)
    got = ops.project(left, inner)
    want = reference.project(left, reference.project(right, x))
    # The error of the first product goes through the second, which adds its own.
    through = dot_tolerance(x, right) @ left.double().abs().T
    assert_within(got, want, through + dot_tolerance(inner, left))


@inside(dtype=DTYPES)
def test_a_row_does_not_depend_on_its_batch(dtype, device):
    phi, x = SKETCH_BATCH.make(dtype, device)
    y = ops.project(phi, x)
    for first, last in ((0, 1), (5, 7), (9, 13), (15, 16)):
        assert torch.equal(ops.project(phi, x[first:last]), y[first:last])


@inside(dtype=DTYPES)
def test_permuting_the_rows_of_phi_permutes_the_measurements(dtype, device):
    phi, x = SKETCH_BATCH.make(dtype, device)
    order = torch.randperm(SKETCH_BATCH.m, generator=torch.Generator().manual_seed(3)).to(device)
    assert torch.equal(ops.project(phi[order], x), ops.project(phi, x)[:, order])


@inside(dtype=DTYPES)
def test_where_tensors_begin_changes_nothing(dtype, device):
    """Off a multiple of 16 bytes, in the same order of summation."""
    phi, x = OFF_LINE.make(dtype, device)
    want = ops.project(phi, x)
    for which in range(2):
        given = [phi, x]
        shifted = torch.empty(given[which].numel() + 1, dtype=dtype, device=device)[1:]
        given[which] = shifted.view(given[which].shape).copy_(given[which])
        assert given[which].data_ptr() % 16 != 0
        assert torch.equal(ops.project(*given), want)


def test_threads_change_nothing():
    phi, x = SKETCH.make(torch.bfloat16, "cpu")
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.project(phi, x)
        torch.set_num_threads(2)
        two = ops.project(phi, x)
    finally:
        torch.set_num_threads(n_threads)
    assert torch.equal(one, two)


@inside(dtype=DTYPES)
def test_zero_and_empty(dtype, device):
    phi, x = OFF_LINE.make(dtype, device)
    assert not ops.project(phi, torch.zeros_like(x)).any()
    assert not ops.project(torch.zeros_like(phi), x).any()
    phi, x = EMPTY.make(dtype, device)
    assert ops.project(phi, x, rows=3).shape == (0, 3)


@inside(dtype=DTYPES)
def test_what_is_not_finite_stays_where_it_is(dtype, device):
    phi, x = OFF_LINE.make(dtype, device)
    phi[4] = phi[4].abs() + 1  # positive, so that infinity keeps its sign
    want = ops.project(phi, x)
    x[1, 8], x[2, 199], x[3, 0] = NAN, INF, -INF
    y = ops.project(phi, x)
    assert torch.equal(y[[0, 4]], want[[0, 4]])
    assert y[1].isnan().all()
    assert y[2, 4] == INF and y[3, 4] == -INF
    assert not y[2:4].isfinite().any()


def test_is_registered_with_torch(device):
    phi, x = RAGGED.make(torch.bfloat16, device)
    torch.library.opcheck(
        torch.ops.csfast.project.default,
        (phi, x, 5),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_compiles_in_one_graph(device):
    phi, x = RAGGED.make(torch.bfloat16, device)

    def block(x):
        return ops.project(phi, x * 2, rows=3) + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), block(x))


@inside(rows=[0, 8, -1])
def test_refuses_rows_that_are_not_there(rows):
    phi, x = RAGGED.make(torch.float32, "cpu")
    with pytest.raises(ValueError, match=rf"\[project\] rows = {rows}: want"):
        ops.project(phi, x, rows=rows)


@pytest.mark.parametrize(
    ("phi", "x", "y", "message"),
    [
        ((5, 4), (2, 4), (2, 6), r"rows = 6: want 1 to m = 5"),
        ((5, 4), (2, 4), (2, 0), r"rows = 0: want 1 to m = 5"),
        ((0, 4), (2, 4), (2, 0), r"m = 0: want 1 to 2\^31 - 1"),
        ((5, 0), (2, 0), (2, 5), r"d = 0: want 1 to 2\^31 - 1 channels"),
        ((5, 4), (2, 4), (3, 5), r"y has shape \(3, 5\): want \(batch = 2, rows = 5\)"),
    ],
)
def test_the_kernel_refuses_by_itself(phi, x, y, message):
    with pytest.raises(ValueError, match=r"\[project\] " + message):
        _native.project(torch.ones(phi), torch.ones(x), y[1], torch.ones(y), 0)
