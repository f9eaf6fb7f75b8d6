import itertools
import math

import pytest

from axes import inside, pairs


@pytest.mark.parametrize("sizes", [(2, 3), (6, 5, 3), (5, 6, 3, 2), (1, 4), (3,), (2, 2, 2, 2, 2)])
def test_any_two_values_of_two_axes_meet(sizes):
    axes = {f"axis{i}": [f"{i}{j}" for j in range(n)] for i, n in enumerate(sizes)}
    rows = pairs(axes)
    for i, j in itertools.combinations(range(len(sizes)), 2):
        assert {(row[i], row[j]) for row in rows} == set(
            itertools.product(axes[f"axis{i}"], axes[f"axis{j}"])
        )
    assert {row[0] for row in rows} == set(axes["axis0"])
    assert len(rows) <= 2 * math.prod(sorted(sizes)[-2:])


def test_a_test_goes_through_all_values_and_says_where_it_fails():
    seen = []

    @inside(a=[1, 2], b="xy")
    def body(a, b, c):
        seen.append((a, b, c))
        assert (a, b) != (2, "x")

    with pytest.raises(AssertionError) as failure:
        body(c=0)
    assert seen == [(1, "x", 0), (1, "y", 0), (2, "x", 0)]
    assert failure.value.__notes__ == ["a = 2, b = x"]
