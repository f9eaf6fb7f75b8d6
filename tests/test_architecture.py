"""The borders of csfast: who may know whom, and what may stand nowhere."""

import ast
import functools
import pathlib
import re

import pytest

from axes import inside

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "csfast"
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in MODULES}
NATIVE = sorted(
    path
    for folder in ("cpp", "cuda", "python/bindings", "bench")
    for pattern in ("*.h", "*.cc", "*.cuh", "*.cu", "*.inc")
    for path in (ROOT / folder).rglob(pattern)
)
CMAKE = sorted(
    path
    for path in ROOT.rglob("CMakeLists.txt")
    if not {"build", ".venv"} & set(path.relative_to(ROOT).parts)
)

# Each room, a module or a package of that name, may import the rooms on its line and no others of
# ours. A room stands below everything that it may import, so there are no cycles between rooms.
MAY_IMPORT = {
    "_version": set(),
    "types": set(),
    "layer": {"types"},
    "files": {"types"},
    "container": {"files", "types"},
    "codes": {"types"},
    "reference": {"codes", "types"},
    "documents": {"types"},
    "traces": {"files", "types"},
    "ops": {"_native", "codes", "layer", "types"},
    "designs": {"ops"},
    "session": {"layer", "ops"},
    "pursuit": {"ops"},
    "models": {"types"},
    "sketches": {"codes", "container", "files", "models", "types"},
    "plan": {"codes", "container", "files", "layer", "models", "types"},
    "calibration": {"codes", "container", "files", "models", "ops", "plan", "sketches", "types"},
    "engine": {"models", "ops", "sketches", "types"},
    "votes": set(),
    "bypass": {"models", "votes"},
    "patch": {"bypass", "codes", "layer", "models", "ops", "plan", "session", "types", "votes"},
    "__init__": {
        "_version",
        "bypass",
        "calibration",
        "documents",
        "engine",
        "models",
        "ops",
        "patch",
    }
    | {"plan", "sketches", "types"},
    "doctor": {"_version", "codes", "layer", "models", "ops", "reference"},
    "bench": {"codes", "designs", "doctor", "layer", "ops", "reference", "session", "types"},
    "judge": {"codes", "files", "layer", "models", "ops", "patch", "plan", "pursuit", "reference"}
    | {"sketches", "traces", "types"},
    "report": {"_version", "doctor", "files", "types"},
    "demo": {"bench", "calibration", "doctor", "documents", "judge", "models", "patch", "plan"}
    | {"report", "types"},
    "cli": {"_version", "bench", "calibration", "demo", "doctor", "documents", "engine", "files"}
    | {"judge", "models", "ops", "patch", "plan", "report", "sketches", "types"},
    "__main__": {"cli"},
}
# What `import csfast` is for a program that runs a model: it reaches no judge and no page.
RUN_BY_IMPORT = (
    "__init__ _native _version bypass calibration codes container documents engine files layer "
    "models ops patch plan session sketches types votes"
).split()
# Each operation may include the headers on its line, its own and those that all may.
OPERATIONS = re.findall(
    r"set\(CSFAST_OPERATIONS ([\w ]+)\)", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
)[0].split()
MAY_INCLUDE: dict[str, set[str]] = {
    **{verb: set() for verb in OPERATIONS},
    "execute": {"tile"},  # reads a tile list
    "select": {"sense", "recover", "tile"},
    "ffn": {"select", "execute", "tile"},
    "session": {"ffn"},
    "engine": {"linear", "sketch"},
}
ALL_MAY_INCLUDE = {"design", "layer", "prepared", "types", "planes", "trellis", "isa"}
# Each folder of cuda/ may include headers of the folders on its line, its own and those of common.
ROOMS: dict[str, set[str]] = {
    **{verb: set() for verb in ["common", *OPERATIONS]},
    "select": {"sense", "recover"},
    "ffn": {"select", "execute"},
}


@functools.cache
def tree_of(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def ours(path: pathlib.Path) -> set[str]:
    """Our own modules that the file imports, dotted, such as ``codes.planes``."""
    package = NAMES[path].split(".")[:-1]
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif (node.module or "").split(".")[0] == "csfast":
                base = []
            else:
                continue
            module = (node.module or "").removeprefix("csfast").lstrip(".")
            base = [*base, *filter(None, module.split("."))]
            for alias in node.names:
                found.add(resolved([*base, alias.name]) or resolved(base) or "__init__")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.split(".")[0] != "csfast", f"{path}: want a relative import"
    return found


def resolved(parts: list[str]) -> str | None:
    """The module or package of a dotted name, if it is one."""
    name = ".".join(parts)
    if name in NAMES.values() or name == "_native":
        return name
    return f"{name}.__init__" if name and f"{name}.__init__" in NAMES.values() else None


def room(name: str) -> str:
    return name.split(".")[0]


def closure(names: set[str]) -> set[str]:
    """All modules that these import, directly or not, themselves included."""
    paths = {name: path for path, name in NAMES.items()}
    seen, rest = set(), set(names)
    while rest:
        name = rest.pop()
        seen.add(name)
        if name in paths:
            rest |= ours(paths[name]) - seen
    return seen


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


every_module = inside(path=MODULES)


def test_every_room_has_its_line():
    assert {room(name) for name in NAMES.values()} == set(MAY_IMPORT)


@every_module
def test_modules_import_only_what_they_may(path):
    own = room(NAMES[path])
    extra = {room(name) for name in ours(path)} - MAY_IMPORT[own] - {own}
    assert not extra, f"{path.name} may not import {sorted(extra)}"


def test_imports_point_downwards():
    seen = {"_native"}
    for name, below in MAY_IMPORT.items():
        assert below <= seen, f"{name} stands above {sorted(below - seen)}"
        seen.add(name)


def test_modules_of_a_room_make_no_circle():
    below = {NAMES[path]: ours(path) for path in MODULES}
    while below:
        free = {name for name, names in below.items() if not names & set(below) - {name}}
        assert free, f"a circle among {sorted(below)}"
        below = {name: names for name, names in below.items() if name not in free}


def test_importing_csfast_reaches_no_judge_report_bench_or_command_line():
    assert {room(name) for name in closure({"__init__"})} == set(RUN_BY_IMPORT)


@pytest.mark.parametrize(
    ("package", "modules"),
    [
        ("transformers", {"models"}),
        ("time", {"bench.timing"}),
        ("datetime", set()),
        ("pickle", set()),
        ("subprocess", set()),
        ("typer", {"cli"}),
        ("jinja2", {"models.chat", "report.page"}),
        ("rich", {"cli", "demo", "report.tables"}),
        ("triton", {"bench.teal"}),
    ],
)
def test_heavy_or_dangerous_packages_stay_where_they_belong(package, modules):
    found = {NAMES[path] for path in MODULES if package in theirs(path)}
    assert not {name for name in found if name not in modules and room(name) not in modules}


def test_the_native_module_is_imported_by_ops_alone():
    assert {room(NAMES[path]) for path in MODULES if "_native" in ours(path)} == {"ops"}


TORCH_FREE = [
    "types",
    "files",
    "documents",
    "traces",
    "judge.retrieval",
    *(f"report.{name}" for name in ("plots", "words", "findings", "fronts", "panels")),
    *(f"report.{name}" for name in ("results", "page", "sketches")),
]


@inside(name=TORCH_FREE)
def test_nouns_and_pages_are_free_of_torch_and_so_is_what_they_import(name):
    paths = {name: path for path, name in NAMES.items()}
    for reached in closure({name}):
        assert "torch" not in theirs(paths[reached]), reached


@every_module
def test_no_code_is_read_from_data(path):
    for call in calls(path):
        name = ast.unparse(call.func)
        assert name not in {"eval", "exec", "compile", "torch.load", "__import__"}, name
        for keyword in call.keywords:
            assert not (
                keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False"
            ), f"line {call.lineno}"


@every_module
def test_what_a_layer_ran_before_is_known_to_the_patch_alone(path):
    assert NAMES[path] == "patch" or "dense_forward" not in path.read_text(encoding="utf-8")


@every_module
def test_nothing_prints(path):
    for call in calls(path):
        assert ast.unparse(call.func) != "print", f"line {call.lineno}"


@every_module
def test_the_environment_is_not_read(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in {"os.environ", "os.getenv"}, f"line {node.lineno}"


@every_module
def test_nothing_is_caught_broadly(path):
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = "" if node.type is None else ast.unparse(node.type)
        raises = any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(node))
        broad = not caught or re.search(r"\b(Base)?Exception\b", caught)
        assert not broad or raises, f"line {node.lineno}"


@every_module
def test_no_module_keeps_changing_state(path):
    for node in ast.walk(tree_of(path)):
        assert not isinstance(node, ast.Global), f"line {node.lineno}"


def test_native_code_reads_two_environment_variables():
    text = "".join(path.read_text() for path in NATIVE)
    assert set(re.findall(r"getenv\(\"?(\w+)", text)) <= {"CSFAST_SYNC", "CSFAST_ISA"}


@inside(folder=["cpp", "cuda", "bench"])
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
            assert path.suffix in (".h", ".inc", ".cc"), path
        elif folder == "cuda" and (path.suffix == ".h" or path.stem in ("choose", "no_cuda")):
            found = re.search(r'cuda_runtime|#include ".*\.cuh"|__device__', path.read_text())
            assert not found, f"{path}: {found[0]}"


def test_every_launch_is_checked():
    for path in NATIVE:
        assert path.name == "launch.cuh" or "<<<" not in path.read_text(), path


def test_devices_are_asked_in_one_place():
    """What runs per token asks nothing: who launches knows the machine, or was prepared for it."""
    asks = re.compile(r"\bcuda(GetDevice|DeviceGetAttribute|FuncSetAttribute|PointerGet)\w*\(")
    for path in NATIVE:
        if path.relative_to(ROOT).parts[0] == "cuda" and asks.search(path.read_text()):
            assert path.name in ("device.cc", "launch.cc"), path


def test_float_results_need_no_atomics():
    """Atomics are for counts in shared memory; a float sum by atomics depends on the schedule."""
    for path in NATIVE:
        for line in path.read_text().splitlines():
            found = re.search(r"atomic\w+\((.*)", line)
            if found and path.suffix in (".cu", ".cuh"):
                assert re.search(r"\bcount\b|\bdigit", found[1]), f"{path}: {line.strip()}"


@inside(verb=MAY_INCLUDE)
def test_operations_include_only_what_they_compose(verb):
    for path in NATIVE:
        is_own = path.stem == verb and path.relative_to(ROOT).parts[0] == "cpp"
        if is_own or path.parent == ROOT / "cuda" / verb:
            found = set(re.findall(r'#include "csfast/(\w+)\.h"', path.read_text()))
            assert found <= MAY_INCLUDE[verb] | ALL_MAY_INCLUDE | {verb}, path


@inside(room=ROOMS)
def test_rooms_of_kernels_include_only_what_they_compose(room):
    paths = [path for path in NATIVE if path.parent == ROOT / "cuda" / room]
    assert paths
    for path in paths:
        text = path.read_text()
        folders = set(re.findall(r'#include "(\w+)/', text))
        assert folders <= ROOMS[room] | {room, "common", "csfast"}, path
        if room == "common":
            assert set(re.findall(r'#include "csfast/(\w+)\.h"', text)) <= ALL_MAY_INCLUDE, path


def test_every_folder_of_kernels_is_a_room():
    folders = {path.parent.name for path in NATIVE if path.parent.parent == ROOT / "cuda"}
    assert folders == set(ROOMS)


@inside(verb=[verb for verb in OPERATIONS if verb != "read"])  # which the benchmarks have
def test_an_operation_is_the_same_word_everywhere(verb):
    for path in (
        f"cpp/include/csfast/{verb}.h",
        f"cpp/{verb}.cc",
        f"cuda/{verb}/{verb}.cu",
        f"python/bindings/{verb}.cc",
        f"tests/ops/test_{verb}.py",
    ):
        assert (ROOT / path).is_file(), path
    calls_of_ops = tree_of(PACKAGE / "ops" / "__init__.py").body
    assert verb in {node.name for node in calls_of_ops if isinstance(node, ast.FunctionDef)}


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
