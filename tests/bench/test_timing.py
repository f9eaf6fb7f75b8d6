"""The stopwatch: turns, quantiles, refusals."""

import pytest
import torch

from csfast import ops
from csfast.bench import timing

CPU = torch.device("cpu")


def recorder(log, name):
    return lambda i: log.append((name, i))


def test_variants_take_turns():
    log = []
    timing.compare(
        {name: recorder(log, name) for name in "ab"}, n_inputs=3, device=CPU, runs=6, warmup=0
    )
    assert [name for name, _ in log] == ["a", "b", "b", "a"] * 3


@pytest.mark.parametrize("n_variants", [1, 2, 3, 4, 7])
def test_no_call_finds_the_input_of_a_recent_one(n_variants):
    log = []
    variants = {str(name): recorder(log, name) for name in range(n_variants)}
    timing.compare(variants, n_inputs=3, device=CPU, runs=21, warmup=0)
    inputs = [i for _, i in log]
    assert inputs == [call % 3 for call in range(21 * n_variants)]
    assert {i for name, i in log if name == 0} == {0, 1, 2}


def test_warmup_does_not_count():
    log = []
    found = timing.compare({"a": recorder(log, "a")}, n_inputs=2, device=CPU, runs=4, warmup=3)
    assert found["a"].runs == 4
    assert len(log) == 7


def test_quantiles_are_ordered_and_in_seconds():
    one, other = torch.randn(64, 64), torch.randn(64, 64)
    found = timing.compare({"mm": lambda i: one @ other}, n_inputs=1, device=CPU, runs=20)
    assert 0 < found["mm"].p10 <= found["mm"].median <= found["mm"].p90 < 1


def test_summary_takes_ranks():
    found = timing._summary([float(i) for i in range(100, -1, -1)])
    assert (found.p10, found.median, found.p90, found.runs) == (10.0, 50.0, 90.0, 101)


def test_clock_advances():
    clock = timing.Clock()
    first = clock.seconds()
    assert 0 <= first <= clock.seconds()


@pytest.mark.parametrize("numbers", [{"runs": 0}, {"warmup": -1}, {"n_inputs": 0}])
def test_refuses_senseless_numbers(numbers):
    with pytest.raises(ValueError, match=r"^\[timing\] runs = .*: want"):
        timing.compare({}, **{"n_inputs": 1, "device": CPU, **numbers})


@pytest.mark.gpu
@pytest.mark.skipif(not ops.cuda_available(), reason="needs a CUDA device")
def test_what_cannot_be_captured_is_timed_call_by_call():
    x = torch.ones(1 << 16, device="cuda")
    seen = []

    def waits(i):
        seen.append(i)
        return float(x.sum())  # no graph can hold the copy to the host

    found = timing.compare(
        {"captured": lambda i: x.sum(), "eager": waits},
        n_inputs=2,
        device=torch.device("cuda"),
        runs=4,
        warmup=0,
        eager=("eager",),
    )
    assert list(found) == ["captured", "eager"]
    assert sorted(set(seen)) == [0, 1] and len(seen) == 4
    assert found["eager"].median > 0
