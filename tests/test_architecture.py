"""The borders of csfast: who may know whom, and what may stand nowhere."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "csfast"
MODULES = sorted(PACKAGE.glob("*.py"))
NATIVE = sorted(
    path
    for folder in ("cpp", "cuda", "python/bindings", "bench")
    for pattern in ("*.h", "*.cc", "*.cuh", "*.cu")
    for path in (ROOT / folder).rglob(pattern)
)
CMAKE = sorted(
    path
    for path in ROOT.rglob("CMakeLists.txt")
    if not {"build", ".venv"} & set(path.relative_to(ROOT).parts)
)

# Each module may import the modules on its line and no others of ours. A module stands below
# everything that it may import; the test of order makes cycles impossible.
MAY_IMPORT: dict[str, set[str]] = {
    "_version": set(),
    "types": set(),
    "tasks": set(),
    "feedback": set(),
    "planes": {"feedback", "types"},
    "nested": {"feedback", "planes"},
    "operators": set(),
    "timing": set(),
    "reference": {"nested", "planes", "types"},
    "documents": {"types"},
    "ops": {"_native", "nested", "types"},
    "pursuit": {"ops"},
    "cases": {"nested", "planes", "reference", "types"},
    "models": {"types"},
    "plan": {"feedback", "models", "planes", "types"},
    "blocks": set(),
    "calibrate": {"blocks", "models", "ops", "plan", "planes", "reference", "types"},
    "engine": {"models", "ops", "plan", "planes", "types"},
    "quantize": {"feedback"},
    "judge": {"models", "tasks", "types"},
    "rules": {"blocks", "judge", "models", "planes", "types"},
    "compressed": {"judge", "ops", "pursuit", "rules", "types"},
    "oracles": {"judge", "models", "rules", "types"},
    "mixed": {"judge", "models", "nested", "rules", "types"},
    "baselines": {
        "compressed",
        "feedback",
        "judge",
        "mixed",
        "models",
        "oracles",
        "plan",
        "planes",
        "quantize",
        "reference",
        "rules",
    }
    | {"types"},
    "evaluate": {"engine", "judge", "models", "ops", "plan", "rules", "tasks", "types"},
    "ablate": {"baselines", "judge", "models", "oracles", "plan", "rules", "types"},
    "effort": {"engine", "evaluate", "judge", "models", "plan", "types"},
    "phase": {"judge", "models", "operators", "ops", "plan", "rules", "types"},
    "dictionaries": {"judge", "models", "operators", "planes", "rules"},
    "plots": set(),
    "results": {"plan", "types"},
    "fronts": {"plots"},
    "panels": {"fronts", "plots"},
    "report": {"_version", "fronts", "panels", "plan", "plots", "results"},
    "doctor": {"_version", "models", "ops", "planes", "reference"},
    "bench_triton": set(),
    "bench": {"bench_triton", "cases", "doctor", "nested", "ops", "planes", "timing", "types"},
    "bench_omp": {"cases", "doctor", "ops", "reference", "timing"},
    "tables": {"doctor"},
    "demo": {"bench", "calibrate", "doctor", "documents", "engine", "evaluate", "models", "plan"}
    | {"report", "tables", "timing", "types"},
    "__init__": {"_version", "calibrate", "documents", "engine", "models", "ops", "plan", "types"},
    "cli": {
        "_version",
        "ablate",
        "bench",
        "bench_omp",
        "calibrate",
        "demo",
        "dictionaries",
        "doctor",
        "documents",
        "effort",
        "engine",
        "evaluate",
    }
    | {
        "models",
        "ops",
        "panels",
        "phase",
        "plan",
        "report",
        "results",
        "tables",
        "timing",
        "types",
    },
    "__main__": {"cli"},
}
# Each operation may include the headers on its line, its own and those that all may.
MAY_INCLUDE = {
    "sense": set(),
    "nested": set(),
    "recover": set(),
    "tile": set(),
    "omp": set(),
    "project": set(),
    "execute": {"tile"},  # reads a tile list
    "select": {"sense", "recover", "tile"},
    "ffn": {"select", "execute", "tile"},
    "session": {"ffn"},
}
ALL_MAY_INCLUDE = {"design", "types", "planes", "isa"}


def tree_of(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def ours(path: pathlib.Path) -> set[str]:
    """Names of our own modules that the file imports."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            if node.level == 1:
                found |= {node.module} if node.module else {a.name for a in node.names}
            elif (node.module or "").split(".")[0] == "csfast":
                found.add(node.module.removeprefix("csfast").lstrip(".") or "__init__")
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("csfast").lstrip(".") or "__init__"
                for a in node.names
                if a.name.split(".")[0] == "csfast"
            }
    return {name.split(".")[0] for name in found}


def theirs(path: pathlib.Path) -> set[str]:
    """Names of foreign packages that the file imports when it runs."""
    tree = tree_of(path)
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
    return found


def calls(path: pathlib.Path) -> list[ast.Call]:
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]


def test_every_module_has_its_line():
    assert {path.stem for path in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_import_only_what_they_may(path):
    extra = ours(path) - MAY_IMPORT[path.stem]
    assert not extra, f"{path.name} may not import {sorted(extra)}"


def test_imports_point_downwards():
    seen = {"_native"}
    for name, below in MAY_IMPORT.items():
        assert below <= seen, f"{name} stands above {sorted(below - seen)}"
        seen.add(name)


@pytest.mark.parametrize(
    ("package", "modules"),
    [
        ("transformers", {"models"}),
        ("time", {"timing"}),
        ("datetime", set()),
        ("pickle", set()),
        ("subprocess", set()),
        ("typer", {"cli"}),
        ("jinja2", {"report"}),
        ("rich", {"cli", "demo", "tables"}),
        ("triton", {"bench_triton"}),
    ],
)
def test_heavy_or_dangerous_packages_stay_where_they_belong(package, modules):
    found = {path.stem for path in MODULES if package in theirs(path)}
    assert found <= modules


def test_the_native_module_is_imported_by_ops_alone():
    assert {path.stem for path in MODULES if "_native" in ours(path)} == {"ops"}


@pytest.mark.parametrize(
    "name", ["types", "tasks", "documents", "plots", "results", "fronts", "panels", "report"]
)
def test_nouns_are_free_of_torch(name):
    assert "torch" not in theirs(PACKAGE / f"{name}.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_code_is_read_from_data(path):
    for call in calls(path):
        name = ast.unparse(call.func)
        assert name not in {"eval", "exec", "compile", "torch.load", "__import__"}, name
        for keyword in call.keywords:
            assert not (
                keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False"
            ), f"line {call.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_nothing_prints(path):
    for call in calls(path):
        assert ast.unparse(call.func) != "print", f"line {call.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_environment_is_not_read(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in {"os.environ", "os.getenv"}, f"line {node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_nothing_is_caught_broadly(path):
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = "" if node.type is None else ast.unparse(node.type)
        raises = any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(node))
        broad = not caught or re.search(r"\b(Base)?Exception\b", caught)
        assert not broad or raises, f"line {node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_module_keeps_changing_state(path):
    for node in ast.walk(tree_of(path)):
        assert not isinstance(node, ast.Global), f"line {node.lineno}"


def test_native_code_reads_two_environment_variables():
    text = "".join(path.read_text() for path in NATIVE)
    assert set(re.findall(r"getenv\(\"?(\w+)", text)) <= {"CSFAST_SYNC", "CSFAST_ISA"}


@pytest.mark.parametrize("folder", ["cpp", "cuda", "bench"])
def test_native_code_knows_no_framework(folder):
    for path in NATIVE:
        if path.relative_to(ROOT).parts[0] == folder:
            found = re.search(
                r"#include [<\"](torch|ATen|c10|nanobind|Python)\b.*", path.read_text()
            )
            assert not found, f"{path}: {found[0]}"


def test_host_code_knows_no_cuda():
    for path in NATIVE:
        folder = path.relative_to(ROOT).parts[0]
        if folder == "cpp" or (folder == "bench" and path.suffix != ".cu"):
            assert "cuda_runtime" not in path.read_text(), path
            assert path.suffix in (".h", ".cc"), path


def test_every_launch_is_checked():
    for path in NATIVE:
        assert path.name == "launch.cuh" or "<<<" not in path.read_text(), path


def test_float_results_need_no_atomics():
    """Atomics are for counts in shared memory; a float sum by atomics depends on the schedule."""
    for path in NATIVE:
        for line in path.read_text().splitlines():
            found = re.search(r"atomic\w+\((.*)", line)
            if found and path.suffix in (".cu", ".cuh"):
                assert re.search(r"\bcount\b|\bdigit", found[1]), f"{path}: {line.strip()}"


@pytest.mark.parametrize("verb", MAY_INCLUDE)
def test_operations_include_only_what_they_compose(verb):
    for path in NATIVE:
        if path.stem == verb and path.relative_to(ROOT).parts[0] in ("cpp", "cuda"):
            found = set(re.findall(r'#include "csfast/(\w+)\.h"', path.read_text()))
            assert found <= MAY_INCLUDE[verb] | ALL_MAY_INCLUDE | {verb}, path


@pytest.mark.parametrize(
    "verb", ["sense", "nested", "recover", "tile", "omp", "project", "execute", "select", "ffn"]
)
def test_an_operation_is_the_same_word_everywhere(verb):
    for path in (
        f"cpp/include/csfast/{verb}.h",
        f"cpp/{verb}.cc",
        f"cuda/{verb}.cu",
        f"python/bindings/{verb}.cc",
        f"tests/test_{verb}.py",
    ):
        assert (ROOT / path).is_file(), path
    functions = {n.name for n in tree_of(PACKAGE / "ops.py").body if isinstance(n, ast.FunctionDef)}
    assert verb in functions


def test_builds_are_for_every_machine_of_the_architecture():
    for path in [*CMAKE, ROOT / "pyproject.toml"]:
        text = path.read_text()
        assert "-march=native" not in text and "-mtune=native" not in text, path
        assert "ffast-math" not in text, path
        assert "GLOB" not in text, f"{path}: files are listed"


def test_no_path_of_one_machine():
    """A path below someone's home, or below a root that only one machine has."""
    private = re.compile(r"(?<![\w./-])/(home|root|work|mnt|scratch)/\w")
    names = ("*.py", "*.md", "*.sh", "*.toml", "*.txt", "*.yaml", "*.json")
    tracked = [
        path
        for folder in ("python", "tests", "tools", "docs", "bench", "cpp", "cuda", "constraints")
        for name in names
        for path in (ROOT / folder).rglob(name)
        if path.parent.name != "demo_model" and path != pathlib.Path(__file__)
    ]
    for path in [*tracked, *ROOT.glob("*.md"), ROOT / "csfast.sh", ROOT / "pyproject.toml"]:
        assert not private.search(path.read_text(encoding="utf-8")), path
