"""The committed stub of the native module is what nanobind generates from it."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import csfast
from csfast import ops

SOURCE = pathlib.Path(__file__).parents[2] / "python" / "csfast"


def test_stub_is_fresh(tmp_path):
    pytest.importorskip("nanobind", reason="needs nanobind's stub generator")
    (module,) = pathlib.Path(csfast.__file__).parent.glob("_native*.so")
    shutil.copy(module, tmp_path)  # beside csfast/types.py it would hide Python's own
    subprocess.run(
        [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "_native", "-O", str(tmp_path)],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert (tmp_path / "_native.pyi").read_text() == (SOURCE / "_native.pyi").read_text()


def test_every_function_names_its_tensors():
    """Without a signature of its own a function would show ndarray, which no tensor is."""
    text = (SOURCE / "_native.pyi").read_text()
    assert "ndarray" not in text
    assert text.count("torch.Tensor") > 40


def test_isa_is_known():
    assert ops.isa() in ("base", "avx2", "avx512")
    assert ops.backend_info()["isa"] == ops.isa()
