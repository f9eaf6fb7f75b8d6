"""Every instruction set passes the tests of the operations, and CSFAST_ISA chooses among them."""

import os
import pathlib
import subprocess
import sys

import pytest

from csfast import ops

TESTS = pathlib.Path(__file__).parent
FILES = [
    str(TESTS / f"test_{op}.py")
    for op in ("sense", "recover", "select", "execute", "ffn", "session")
]


def run(isa, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS.parent,
        env={**os.environ, "CSFAST_ISA": isa},
        capture_output=True,
        text=True,
    )


def test_operations_pass_without_avx512():
    if ops.isa() == "base":
        pytest.skip("this run is already the one without AVX-512")
    slow = "not compiles and not registered and not two_hundred and not large"
    options = ("-q", "-x", "-m", "not gpu", "-k", slow, "-p", "no:cacheprovider")
    done = run("base", "-m", "pytest", *options, *FILES)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_base_is_what_was_asked_for():
    done = run("base", "-c", "from csfast import ops; print(ops.isa())")
    assert done.stdout.strip() == "base", done.stderr


@pytest.mark.parametrize("isa", ["sse9", "AVX512", " base"])
def test_refuses_an_unknown_instruction_set(isa):
    done = run(isa, "-c", "from csfast import ops; ops.isa()")
    assert done.returncode == 1
    assert f"[isa] CSFAST_ISA = {isa}: want base or avx512." in done.stderr
