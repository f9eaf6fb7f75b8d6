"""Axes of tests: products cut down to pairs, values that one test goes through, tests for a GPU."""

import functools
import inspect
import itertools

import pytest
import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)

# Instead of the fixture: for what the CPU does not read, designs above all.
on_gpu = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


def pairs(axes):
    """Rows of values in which any two values of two axes meet, a few more than there must be.

    Greedy: the row that makes the most pairs meet that have not yet, ties to the first in order of
    the product.
    """
    names = list(axes)
    if len(names) < 2:
        return [list(row) for row in itertools.product(*axes.values())]
    rows = list(itertools.product(*(range(len(axes[name])) for name in names)))
    among = list(itertools.combinations(range(len(names)), 2))

    def met_by(row):
        return {(i, j, row[i], row[j]) for i, j in among}

    missing = set().union(*map(met_by, rows))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(met_by(row) & missing))
        chosen.append(best)
        missing -= met_by(best)
    return [[axes[name][i] for name, i in zip(names, row, strict=True)] for row in sorted(chosen)]


def name_of(value):
    """What stands for a value in the name of a test."""
    return str(getattr(value, "name", value)).removeprefix("torch.").replace(" ", "")


def pairwise(**axes):
    """Run a test for any two values of any two axes, not for their whole product."""
    axes = {name: list(values) for name, values in axes.items()}
    rows = pairs(axes)
    ids = ["-".join(name_of(value) for value in row) for row in rows]
    return pytest.mark.parametrize(list(axes), rows, ids=ids)


def inside(**axes):
    """Run a test for the whole product of some axes as one item; a failure says where it was."""
    axes = {name: list(values) for name, values in axes.items()}

    def decorate(test):
        @functools.wraps(test)
        def whole(*given, **named):
            for values in itertools.product(*axes.values()):
                at = dict(zip(axes, values, strict=True))
                try:
                    test(*given, **named, **at)
                except BaseException as error:
                    error.add_note(", ".join(f"{n} = {name_of(v)}" for n, v in at.items()))
                    raise

        signature = inspect.signature(test)
        left = [p for name, p in signature.parameters.items() if name not in axes]
        whole.__signature__ = signature.replace(parameters=left)
        return whole

    return decorate
