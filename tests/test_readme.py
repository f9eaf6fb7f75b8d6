"""The documents: what they name exists, and their figures come from results."""

import importlib.util
import pathlib
import re

import pytest
import typer

import csfast
from csfast.bench import layers, timed
from csfast.cli import app

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
    known = {c.name or c.callback.__name__ for c in app.app.registered_commands}
    named = set(re.findall(r"(?m)^(?:    |\| `|- `)csfast (\w+)", page.read_text(encoding="utf-8")))
    assert named <= known


def test_every_command_has_its_line():
    known = {c.name or c.callback.__name__ for c in app.app.registered_commands}
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"(?m)^- `csfast (\w+)", text)) == sorted(known)


def test_every_option_stands_on_the_page_of_commands_and_no_other():
    whole = typer.main.get_command(app.app)
    known = {
        option
        for command in (whole, *whole.commands.values())
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--")
    }
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) == known | {"--help"}


def test_python_names_of_the_readme_exist():
    for name in set(re.findall(r"\bcsfast\.(\w+)\(", README)):
        assert name in csfast.__all__, name


def test_pages_describe_every_public_name():
    text = "".join((ROOT / "docs" / page).read_text() for page in ("api.md", "advanced.md"))
    code = " ".join(re.findall(r"`([^`\n]+)`", text))
    assert set(csfast.__all__) <= set(re.findall(r"\w+", code))


def test_examples_of_the_python_interface_are_python():
    for page in ("api.md", "advanced.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert blocks
        for block in blocks:
            compile(block, page, "exec")


def test_the_example_is_python():
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        compile(block, "README.md", "exec")


def test_the_test_command_is_what_ci_runs():
    assert "    ./csfast.sh test\n" in README
    assert "\n./csfast.sh test\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md", "docs/findings.md"])
def test_figures_are_up_to_date(tool, page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tool.render(text, tool.load(ROOT / "bench" / "results"), tool.PAGES[page]) == text


def test_every_page_with_figures_is_checked(tool):
    assert set(tool.PAGES) == {"README.md", "docs/speed.md", "docs/findings.md"}


def test_without_results_the_pages_say_so(tool):
    bare = tool.render(README, [])
    assert bare.count(tool.MISSING) == len(tool.TABLES)
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    bare = tool.render(text, [], tool.SPEED_TABLES)
    assert bare.count(tool.MISSING) == len(tool.SPEED_TABLES) - 1 + len(tool.TARGETS)


def test_figures_come_from_results(tool):
    row = {"case": "ffn d=64 F=64 density=.25", "variant": "complete", "median_us": 2.0}
    row |= {"baselines": {"slow": 9.0, "quick": 6.0}, "ratio_vs_best": 3.0}
    row |= {"fraction_of_read_bandwidth": 0.5}
    text = tool.speed([{"machine": {"cpu": "box", "threads": 2}, "rows": [row]}])
    assert (
        "| box, 2 threads | ffn d=64 F=64 density=.25 | complete | 6 (quick) | 2 | 3.00x |" in text
    )


def test_findings_come_from_results(tool):
    row = {"method": "teal", "target": 0.25, "delta": 0.5, "ci95": [0.4, 0.6]}
    whole = {"method": "rtn-int4", "target": None, "delta": 0.03, "ci95": [0.02, 0.04]}
    whole |= {"bytes_fraction": 0.281}
    found = {"about": "a model", "best": [{"target": 0.25}, {"target": 0.5}], "rows": [row, whole]}
    more = {**row, "method": "cats", "target": 0.55}
    found["rows"].append(more)
    text = tool.rules([found, {"best": [], "rows": [row]}])
    assert text.startswith("a model, .25 and .55 of the bytes:\n\n| rule | .25 | .55 |")
    assert "\n| teal | +0.5000 [+0.4000, +0.6000] | - |\n" in text
    assert "\n| cats | - | +0.5000 [+0.4000, +0.6000] |\n" in text
    assert "a model, weights that are read whole:\n\n| code | bytes |" in text
    assert text.endswith("\n| rtn-int4 | 0.281 | +0.0300 [+0.0200, +0.0400] |")
    assert text.count("teal") == 1
    code = {"name": "mixed-3+3", "kind": "nested", "bits_stored": 6.35, "ci95": [0, 1]}
    rows = [{**code, "target": 0.2, "delta": 0.02}, {**code, "target": 0.3, "delta": 0.01}]
    text = tool.storage([{"about": "a model", "rows": rows[::-1]}, {"rows": []}])
    assert text.startswith("a model, loss over dense by the bits that are read for a weight:\n\n")
    assert "| kind | code | bits stored | 3.2 | 4.8 |" in text
    assert text.endswith("\n| nested | mixed-3+3 | 6.35 | +0.0200 | +0.0100 |")


def test_pretrained_models_stand_before_our_own(tool):
    task = {"dense_loss": 2.0, "loss": 2.5, "delta": 0.5, "ci95": [0.25, 0.75], "kl": 0.25}
    tasks = {"math": task | {"top1_agreement": 0.5}, "code": task | {"top1_agreement": 1.0}}
    found = {"mean_delta": 0.5, "mean_ci95": [0.4, 0.6], "tasks": tasks}
    found |= {"bits": 3, "density": 0.5, "bytes_fraction": 0.64}
    of = tool.PRETRAINED[0]
    lines = tool.quality([found, {**found, "about": of}]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        *["| SmolLM2-135M-Instruct"] * 3,
        *["| demo model"] * 3,
    ]
    assert lines[2].endswith(
        "| mean | 2.000 | 2.500 | +0.5000 [+0.4000, +0.6000] | 0.250 | 0.750 |"
    )
    text = tool.costs([found, {**found, "about": tool.PRETRAINED[0]}])
    first, second = (f"{name}, 3 bits, 0.50 of the neurons run" for name in (of, "demo model"))
    assert text.startswith(first) and 0 < text.index("| mean |") < text.index(second)
    assert "\n| mean | 2.000 | 2.500 | +0.5000 [+0.4000, +0.6000] | 0.250 | 0.750 |\n" in text
    assert "0.640 of the feed-forward bytes read:\n\n| task |" in text
    row = {"method": "teal", "target": 0.35, "delta": 0.5, "ci95": [0.4, 0.6]}
    found = [{"about": name, "best": [], "rows": [row]} for name in ("ours", tool.PRETRAINED[1])]
    text = tool.rules(found)
    assert text.startswith("Gemma 3 270M, .35 of the bytes:\n\n| rule | .35 |\n| --- | --- |\n")
    assert "\n\nours, .35 of the bytes:\n\n" in text


LAYER = {
    "case": "ffn d=4096 F=14336 density=.10",
    "variant": "execute",
    "density": 0.1,
    "batch": 1,
    "median_us": 11.0,
    "p10_us": 10.5,
    "p90_us": 11.75,
    "bytes": 35_000_000,
    "fraction_of_read_bandwidth": 0.75,
    "workspace_bytes": None,
    "baselines": {"torch bf16": 96.0, "torch.compile max-autotune bf16": 88.0, "gather": 60.0},
    "ratio_vs_best": 60 / 11,
    "ratio_vs_dense": 8.0,
    "sigma": 0.8,
}
GPU = {"device": "cuda", "gpu": "NVIDIA H200"}


def of_gpu(*rows):
    return [{"machine": GPU, "commit": "abc", "date": "2026-01-31", "rows": list(rows)}]


def test_layers_on_a_gpu_stand_beside_the_best_that_was_measured(tool):
    results = of_gpu(LAYER)
    said = tool.layers([*results, {**results[0], "commit": "def"}])
    assert (
        "| .10 | execute | 11.00 (10.50 .. 11.75) | 0.75 | 0.80 | 88.0, 8.00x "
        "| gather 60.0, 5.45x |"
    ) in said
    titles = [line for line in said.splitlines() if line.startswith("4096")]
    where = "4096 x 14336, NVIDIA H200, commit"
    assert titles == [f"{where} {commit}, 2026-01-31:" for commit in ("abc", "def")]
    assert "| 60 (gather) | 11 | 5.45x | 0.75 | 0.80 |" in tool.speed(results)
    assert tool.native(results) == tool.pursuits(results) == tool.MISSING


def test_what_is_to_be_reached_stands_beside_what_is(tool):
    said = tool.targets(of_gpu(LAYER))
    start = "| 4096 x 14336, .10 | execute | "
    assert f"{start}density * dense / time | >= 0.8 | 0.8 | yes | NVIDIA H200 |" in said
    assert f"{start}of read bandwidth | >= 0.76 | 0.75 | no | NVIDIA H200 |" in said
    assert said.count(tool.MISSING) == len(tool.TARGETS) - 2
    select = LAYER | {"case": "ffn d=4096 F=14336 density=.25", "variant": "select", "sigma": None}
    assert "| select | us | <= 11 | 11 | yes |" in tool.targets(of_gpu(select))


def test_layers_without_python_have_a_table_of_the_same_form(tool):
    row = LAYER | {"baselines": {"csfast all neurons": 90.0}, "workspace_bytes": 1 << 20}
    row |= {"ratio_vs_best": 90 / 11, "ratio_vs_dense": 90 / 11}
    results = of_gpu(row | {"case": f"{LAYER['case']} batch=4 joint"})
    said = tool.native(results)
    assert "| .10, 4 rows | execute | 11.00 (10.50 .. 11.75) | 0.75 | 0.80 " in said
    assert "| 90.0, 8.18x | all neurons 90.0, 8.18x |" in said
    assert said.splitlines()[2] == tool.layers(of_gpu(LAYER)).splitlines()[2]
    assert tool.layers(results) == tool.speed(results) == tool.MISSING
    assert tool.targets(results).count(tool.MISSING) == len(tool.TARGETS)


def test_pursuits_have_a_table_of_their_own(tool):
    row = {
        "case": "omp m=256 n=1024 k=32 batch=5000",
        "variant": "support",
        "median_us": 1000.0,
        "p10_us": 990.0,
        "p90_us": 1010.0,
        "problems_per_second": 5e6,
        "us_per_atom": 31.25,
        "agreement": 0.9995,
        "agreement_problems": 900,
        "baselines": {"torch f32": 9000.0, tool.PACKAGE: 6000.0},
        "ratio_vs_best": 6.0,
    }
    results = of_gpu(row)
    said = tool.pursuits(results)
    assert said.startswith("omp (256, 1024, 32) x 5000, NVIDIA H200, commit abc, 2026-01-31:\n\n")
    assert said.endswith(
        "| support | 1000 (990 .. 1010) | 5 | 31.25 | 0.9995 | 6.0x package | 6.0x |"
    )
    assert tool.speed(results) == tool.layers(results) == tool.native(results) == tool.MISSING
    start = "| omp (256, 1024, 32) x 5000 | support | "
    assert f"{start}times the package | >= 5 | 6 | yes | NVIDIA H200 |" in tool.targets(results)
    alone = of_gpu(row | {"baselines": {"torch f32": 9000.0}})
    assert f"{start}times the package | >= 5 | {tool.MISSING} | - | - |" in tool.targets(alone)


def test_targets_are_of_cases_that_are_measured(tool):
    cases = {case.name for case in timed.BESIDE_TORCH["cuda"]}
    for target in tool.TARGETS:
        if target.case.startswith("ffn "):
            assert target.case in cases and target.variant in layers.VARIANTS


def test_a_lost_marker_is_an_error(tool):
    with pytest.raises(ValueError, match=r"^\[readme_tables\] marker 'speed' stands 0 times"):
        tool.render(README.replace("<!-- speed -->", ""), [])
