"""The bootstrap, the wheel's content and the stub."""

import os
import pathlib
import shutil
import subprocess
import tomllib

import pytest

import csfast

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "csfast.sh"
INSTALLED = pathlib.Path(csfast.__file__).parent
TOOLS = ("sh", "dirname", "find", "cksum", "sort", "cat", "rm", "mkdir")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def machine(folder, *, tools=TOOLS, **programs):
    """A folder of programs that is the whole PATH: the tools, and scripts by name."""
    for tool in tools:
        (folder / tool).symlink_to(shutil.which(tool))
    for name, text in programs.items():
        program = folder / name.replace("_", ".")
        program.write_text(f"#!{shutil.which('sh')}\n{text}\n")
        program.chmod(0o755)
    return folder


def clone(folder):
    """A tree with the script and what decides its stamp."""
    folder.mkdir()
    for name in ("pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copy(SCRIPT, folder)
    for name in ("constraints", "cpp", "cuda", "python"):
        (folder / name).mkdir()
        (folder / name / "file.txt").write_text(name)
    return folder


def run(tree, path, *arguments, **environment):
    return subprocess.run(
        [str(path / "sh"), str(tree / "csfast.sh"), *arguments],
        env={"PATH": str(path), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def path(tmp_path):
    folder = tmp_path / "path"
    folder.mkdir()
    return folder


@pytest.fixture
def tree(tmp_path):
    return clone(tmp_path / "tree")


def python_that(answers):
    """A python whose `-c` programs succeed unless they contain what `answers` refuses."""
    refusals = "\n".join(f'case "$2" in *{word}*) exit 1 ;; esac' for word in answers)
    return f"""
[ "$1" = -c ] && {{
{refusals}
exit 0
}}
[ "$2" = venv ] && {{
for folder; do :; done
mkdir -p "$folder/bin"
cat "$0" >"$folder/bin/python"
exec /bin/chmod +x "$folder/bin/python"
}}
echo "$@" >>"$LOG"
exit 0
"""


def test_the_script_is_sh_and_executable():
    assert os.access(SCRIPT, os.X_OK)
    assert SCRIPT.read_text().startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n", str(SCRIPT)], check=True)


@pytest.mark.parametrize("arguments", [(), ("build",)])
def test_a_wrong_verb_shows_the_usage(tree, path, arguments):
    done = run(tree, machine(path), *arguments)
    assert done.returncode == 2
    assert done.stderr == "usage: ./csfast.sh demo|test [options]\n"


def test_without_python_one_line_says_what_to_install(tree, path):
    done = run(tree, machine(path, g__="exit 0"), "demo")
    assert done.returncode == 1
    assert done.stderr == (
        "csfast.sh: missing: Python 3.11 or newer, a C++20 compiler. On Debian or Ubuntu: "
        "apt-get install -y python3 python3-venv python3-dev g++\n"
    )


def test_an_old_python_does_not_count(tree, path):
    done = run(tree, machine(path, python3="exit 1", **{"g++": "exit 0"}), "demo")
    assert done.returncode == 1
    assert "missing: Python 3.11 or newer. On" in done.stderr


@pytest.mark.parametrize(
    ("refused", "missing", "packages"),
    [
        (["ensurepip"], "the venv module of python3", "python3-venv"),
        (["Python.h"], "the headers of python3", "python3-dev"),
        (
            ["ensurepip", "Python.h"],
            "the venv module of python3, the headers of python3",
            "python3-venv python3-dev",
        ),
    ],
)
def test_half_a_python_does_not_do(tree, path, refused, missing, packages):
    done = run(tree, machine(path, python3=python_that(refused), **{"g++": "exit 0"}), "test")
    assert done.returncode == 1
    want = f"missing: {missing}. On Debian or Ubuntu: apt-get install -y {packages}\n"
    assert done.stderr == f"csfast.sh: {want}"


def test_without_a_compiler_nothing_is_installed(tree, path):
    done = run(tree, machine(path, python3=python_that([])), "demo")
    assert done.returncode == 1
    assert "missing: a C++20 compiler. On Debian or Ubuntu: apt-get install -y g++\n" in done.stderr
    assert not (tree / ".venv").exists()


@pytest.mark.parametrize(
    ("refused", "nvidia_smi", "want"),
    [
        (["torch"], "exit 1", "-c {tree}/constraints/cpu.txt {tree}[test]"),
        (["torch"], "exit 0", "{tree}[test]"),
        ([], "exit 1", "{tree}[test]"),
    ],
    ids=["cpu", "gpu", "torch is there"],
)
def test_the_right_torch_is_installed(tree, path, tmp_path, refused, nvidia_smi, want):
    programs = {"g++": "exit 0", "nvidia-smi": nvidia_smi, "python3": python_that(refused)}
    log = tmp_path / "log"
    done = run(tree, machine(path, **programs), "demo", "--out", "here", LOG=str(log))
    assert done.returncode == 0, done.stderr
    pip = "-m pip install --quiet --disable-pip-version-check "
    lines = log.read_text().splitlines()
    assert lines == [pip + want.format(tree=tree), "-m csfast demo --out here"]


def test_a_second_run_installs_nothing_until_a_source_changes(tree, path, tmp_path):
    programs = machine(path, **{"g++": "exit 0", "python3": python_that(["torch"])})
    log = tmp_path / "log"

    def pip_calls(verb):
        log.write_text("")
        assert run(tree, programs, verb, LOG=str(log)).returncode == 0
        return sum("pip install" in line for line in log.read_text().splitlines())

    assert pip_calls("demo") == 1
    assert pip_calls("demo") == 0
    assert pip_calls("test") == 0
    (tree / "cpp" / "file.txt").write_text("changed")
    assert pip_calls("test") == 1
    assert pip_calls("test") == 0


def test_a_failed_installation_is_tried_again(tree, path, tmp_path):
    failing = python_that(["torch"]).replace("exit 0\n", "exit 0\n")
    failing = failing.replace('echo "$@"', 'case "$2" in pip) exit 3 ;; esac\necho "$@"')
    programs = machine(path, **{"g++": "exit 0", "python3": failing})
    done = run(tree, programs, "demo", LOG=str(tmp_path / "log"))
    assert done.returncode == 1
    assert done.stderr.endswith("csfast.sh: the installation failed, see above\n")
    assert not (tree / ".venv" / "csfast-stamp").exists()


def test_the_stub_is_the_one_that_the_build_made():
    committed = (ROOT / "python" / "csfast" / "_native.pyi").read_text(encoding="utf-8")
    assert (INSTALLED / "_native.pyi").read_text(encoding="utf-8") == committed


def test_the_package_ships_what_it_needs():
    for name in ("config.json", "model.safetensors", "tokenizer.json", "sample.jsonl"):
        assert (INSTALLED / "demo_model" / name).is_file(), name
    shipped = sum(p.stat().st_size for p in (INSTALLED / "demo_model").iterdir())
    assert shipped < 28 * 2**20


def test_the_version_is_said_once():
    assert csfast.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert "version" in PROJECT["project"]["dynamic"]


def test_torch_is_neither_capped_nor_built_against():
    assert not [r for r in PROJECT["build-system"]["requires"] if "torch" in r]
    assert not [r for r in PROJECT["project"]["dependencies"] if "<" in r or "==" in r]


def test_the_licence_is_the_one_that_is_declared():
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
