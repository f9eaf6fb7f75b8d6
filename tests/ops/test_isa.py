"""Every instruction set passes the tests of the operations, and CSFAST_ISA chooses among them."""

import functools
import os
import pathlib
import subprocess
import sys

import pytest

from csfast import ops

TESTS = pathlib.Path(__file__).parent
FILES = [
    str(TESTS / f"test_{op}.py")
    for op in (
        "sense",
        "nested",
        "project",
        "linear",
        "recover",
        "omp",
        "select",
        "execute",
        "ffn",
        "session",
    )
]


def run(isa, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS.parent,
        env={**os.environ, "CSFAST_ISA": isa},
        capture_output=True,
        text=True,
    )


@functools.cache
def asked(isa):
    """A process that was asked for an instruction set and prints what it got."""
    return run(isa, "-c", "from csfast import ops; print(ops.isa())")


def skip_unless_it_runs(isa):
    if f"[isa] CSFAST_ISA = {isa}: want a processor with" in asked(isa).stderr:
        pytest.skip(f"this processor has no {isa}")


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_operations_pass_with_lesser_instruction_sets(isa):
    if ops.isa() == isa:
        pytest.skip(f"this run is already the one with {isa}")
    skip_unless_it_runs(isa)
    slow = (
        "not compiles and not registered and not two_hundred and not large and not standard"
        " and not scikit and not ten_thousand"
    )
    options = ("-q", "-x", "-m", "not gpu", "-k", slow, "-p", "no:cacheprovider")
    done = run(isa, "-m", "pytest", *options, *FILES)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_gives_what_was_asked_for(isa):
    skip_unless_it_runs(isa)
    assert asked(isa).stdout.strip() == isa, asked(isa).stderr


@pytest.mark.parametrize("isa", ["sse9", "avx", "AVX512", " base"])
def test_refuses_an_unknown_instruction_set(isa):
    done = asked(isa)
    assert done.returncode == 1
    assert f"[isa] CSFAST_ISA = {isa}: want base, avx2 or avx512." in done.stderr
