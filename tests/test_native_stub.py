"""The committed stub of the native module is what nanobind generates from it."""

import os
import pathlib
import subprocess
import sys

import csfast
import pytest
from csfast import ops

PACKAGE = pathlib.Path(csfast.__file__).parent
SOURCE = pathlib.Path(__file__).parents[1] / "python" / "csfast"


def test_stub_is_fresh(tmp_path):
    pytest.importorskip("nanobind", reason="needs nanobind's stub generator")
    script = [sys.executable, "-m", "nanobind.stubgen", "-m", "_native", "-O", str(tmp_path)]
    path = os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])
    # nanobind's backend finds the libraries of torch through the process that loads both.
    subprocess.run(script, check=True, env={**os.environ, "PYTHONPATH": path})
    committed = (SOURCE / "_native.pyi").read_text()
    assert (tmp_path / "_native.pyi").read_text() == committed


def test_every_function_names_its_tensors():
    """Without a signature of its own a function would show ndarray, which no tensor is."""
    text = (SOURCE / "_native.pyi").read_text()
    assert "ndarray" not in text
    assert text.count("torch.Tensor") > 40


def test_isa_is_known():
    assert ops.isa() in ("base", "avx512")
    assert ops.backend_info()["isa"] == ops.isa()
