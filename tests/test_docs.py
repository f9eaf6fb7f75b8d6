"""What the documents say is there: names in backticks exist, links lead somewhere."""

import functools
import pathlib
import re

import pytest

from axes import inside

ROOT = pathlib.Path(__file__).parents[1]
DOCS = sorted(
    path
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "bench").rglob("*.md"),
    ]
    if path.name != "CHANGELOG.md"  # speaks of what was there once
)
CODE = ("python", "cpp", "cuda", "bench", "tools", "tests", ".ci")
SUFFIXES = {".py", ".pyi", ".h", ".cc", ".cuh", ".cu", ".inc", ".txt", ".sh", ".toml", ".html"}
LINE = 110  # characters
# Of other projects and their files.
FOREIGN = {"ptxas", "nvdisasm", "hex", "dp4a", "sha256sum", "manifest.json"}
PLACES = ("", "python/csfast", "cpp", "cpp/include", "cuda", "bench/results")
# Of formulas and examples.
SYMBOL = re.compile(r"([A-Za-z]|phi|mu|sum|mean|rms)(_[A-Za-z0-9]+)+|theta|e5d0|(block|joint)[A-Z]")


def sources():
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES and "build" not in path.parts:
                yield path
    yield from (
        ROOT / name for name in ("pyproject.toml", "CMakeLists.txt", "csfast.sh", ".ci/run")
    )


@functools.cache
def words():
    """Every identifier of the code, and the names of its files and folders."""
    found = set()
    for path in sources():
        if path != pathlib.Path(__file__):
            found |= set(re.findall(r"[A-Za-z_]\w*", path.read_text(encoding="utf-8")))
    return found | {path.name for path in (ROOT / "bench" / "results").iterdir()}


def spans(text):
    """What stands in backticks outside of blocks of code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"^    .*$", "", text, flags=re.M)
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def missing_in(span):
    """Names of a span that nothing in the tree has."""
    if re.fullmatch(r"[\w.*<>-]+(/[\w.*<>-]+)+/?", span) and "<" not in span and "*" not in span:
        if any((ROOT / place / span).exists() for place in PLACES):
            return []
        if pathlib.Path(span).suffix:
            return [span]
    if re.fullmatch(r"[\w-]+\.(py|md|h|cc|cu|cuh|sh|toml|json|html)", span):
        return [] if span in FOREIGN or any(ROOT.rglob(span)) else [span]
    placeholders = set(re.findall(r"\b[A-Z]{2,}\b", span)) if span.startswith("csfast ") else set()
    known = words() | FOREIGN | placeholders
    return [
        name
        for name in re.findall(r"(?<![\w\\])[A-Za-z_][A-Za-z0-9_]{2,}", span)
        if name not in known and not SYMBOL.fullmatch(name)
    ]


@inside(path=DOCS)
def test_names_in_backticks_exist(path):
    text = path.read_text(encoding="utf-8")
    found = {span: missing_in(span) for span in spans(text)}
    assert not {span: names for span, names in found.items() if names}


def head_of(path):
    """The comment that a source file opens with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".py":
        text = "\n".join(lines)
        found = re.match(r'(?:#.*\n)*"""(.*?)"""', text, flags=re.S)
        return found[1] if found else ""
    head = []
    for line in lines:
        if not line.startswith("//"):
            break
        head.append(line)
    return "\n".join(head)


def test_names_in_backticks_of_head_comments_exist():
    found = {}
    for path in sources():
        for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", head_of(path)):
            if names := missing_in(span):
                found[f"{path.relative_to(ROOT)}: {span}"] = names
    assert not found


@inside(path=DOCS)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def anchors_of(path):
    """What links may lead to within a page: its headings, as GitHub writes them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    heads = (head.lower() for head in re.findall(r"^#+ (.*)$", text, flags=re.M))
    return {re.sub(r"[^\w\- ]", "", head).replace(" ", "-") for head in heads}


@inside(path=DOCS)
def test_anchors_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", path.read_text("utf-8")):
        if "://" not in target:
            assert anchor in anchors_of(path.parent / target if target else path), anchor


@pytest.mark.parametrize("path", [*DOCS, ROOT / "CHANGELOG.md"], ids=lambda path: path.stem)
def test_lines_are_short(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= LINE, f"{path.name}:{number} has {len(line)} characters"
