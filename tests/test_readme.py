"""The documents: what they name exists, and their figures come from results."""

import importlib.util
import pathlib
import re

import pytest

import csfast
from csfast import cli

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "tools/readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_exist(page):
    known = {c.name or c.callback.__name__ for c in cli.app.registered_commands}
    named = set(re.findall(r"(?m)^(?:    |\| `)csfast (\w+)", page.read_text(encoding="utf-8")))
    assert named <= known


def test_every_command_has_its_line():
    known = {c.name or c.callback.__name__ for c in cli.app.registered_commands}
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?m)^\| `csfast (\w+)", text)) == known


def test_python_names_of_the_readme_exist():
    for name in set(re.findall(r"\bcsfast\.(\w+)\(", README)):
        assert name in csfast.__all__, name


def test_the_example_is_python():
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        compile(block, "README.md", "exec")


def test_the_test_command_is_what_ci_runs():
    assert "    ./csfast.sh test\n" in README
    assert "\n./csfast.sh test\n" in (ROOT / ".ci" / "run").read_text()


def test_figures_are_up_to_date(tool):
    assert tool.render(README, tool.load(ROOT / "bench" / "results")) == README


def test_without_results_the_readme_says_so(tool):
    bare = tool.render(README, [])
    assert bare.count(tool.MISSING) == len(tool.TABLES)


def test_figures_come_from_results(tool):
    row = {"case": "ffn d=64 F=64 density=.25", "variant": "complete", "median_us": 2.0}
    row |= {"baselines": {"slow": 9.0, "quick": 6.0}, "ratio_vs_best": 3.0}
    row |= {"fraction_of_read_bandwidth": 0.5}
    text = tool.speed([{"machine": {"cpu": "box", "threads": 2}, "rows": [row]}])
    assert (
        "| box, 2 threads | ffn d=64 F=64 density=.25 | complete | 6 (quick) | 2 | 3.00x |" in text
    )


def test_a_lost_marker_is_an_error(tool):
    with pytest.raises(ValueError, match=r"^\[readme_tables\] marker 'speed' stands 0 times"):
        tool.render(README.replace("<!-- speed -->", ""), [])
