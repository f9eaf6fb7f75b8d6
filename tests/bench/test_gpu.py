"""The one command for a GPU: its stages, its refusals, and that a failure spares the rest."""

import importlib.util
import json
import pathlib
import sys

import pytest
import torch

from csfast import ops
from csfast.bench import head

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("record")


@pytest.mark.skipif(ops.cuda_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tool, tmp_path, capsys):
    assert tool.main(["--out", str(tmp_path / "out")]) == 1
    assert "gpu: [doctor] device cuda: want a GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_stage_is_a_usage_error(tool, capsys):
    with pytest.raises(SystemExit) as done:
        tool.main(["--only", "prefill"])
    assert done.value.code == 2
    assert "prefill" in capsys.readouterr().err


def test_commands_hold_no_folder_of_the_results(tool):
    for stage in ("layers", "pursuits"):
        command = tool.command_of(stage, "abc")
        assert command[1:4] == ["-m", "csfast", "bench"]
        assert command[-4:] == ["--json", tool.FILES[stage], "--commit", "abc"]
    assert "omp" in tool.command_of("pursuits", "abc")
    assert tool.command_of("native", "abc")[1:] == ["--json", "--commit", "abc"]


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "80-real"), ((9, 0), "90a-real"), ((10, 0), "100a-real")]
)
def test_machine_code_is_for_this_gpu(tool, capability, name):
    assert tool.architecture(*capability) == name
    assert f"-DCMAKE_CUDA_ARCHITECTURES={name} " in tool.build_command("nvcc", name)


def test_the_output_of_the_native_benchmark_is_its_file(tool, tmp_path, capsys):
    made = {**head.of(torch.device("cpu")), "rows": [{"median_us": 1.23456789}]}
    program = [sys.executable, "-c", f"print({json.dumps(json.dumps(made))})"]
    assert tool.run("native", program, tmp_path)
    written = json.loads((tmp_path / tool.FILES["native"]).read_text())
    assert written == {**made, "rows": [{"median_us": 1.2346}]}
    assert [path.name for path in tmp_path.iterdir()] == [tool.FILES["native"]]
    assert capsys.readouterr().out.startswith("native: exit status 0, ")


def test_a_failure_leaves_no_empty_file(tool, tmp_path, capsys):
    program = [sys.executable, "-c", "raise SystemExit(3)"]
    assert not tool.run("native", program, tmp_path)
    assert not tool.run("layers", program, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out.count("exit status 3") == 2


def test_output_without_a_head_is_a_failure(tool, tmp_path, capsys):
    program = [sys.executable, "-c", "print('{}')"]
    assert not tool.run("native", program, tmp_path)
    assert "exit status 0, [record] 'format' is missing" in capsys.readouterr().out


def test_a_stage_that_takes_too_long_is_ended(tool, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, "SECONDS", 0.5)
    program = [sys.executable, "-c", "import time; print('half', flush=True); time.sleep(60)"]
    assert not tool.run("layers", program, tmp_path)
    assert capsys.readouterr().out.startswith("layers: ended after 0.5 s")
