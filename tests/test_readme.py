"""The documents: what they name exists, and their figures come from results."""

import importlib.util
import pathlib
import re
from xml.etree import ElementTree

import pytest
import torch
import typer

import csfast
import pages
from axes import inside
from csfast import models
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


@inside(page=PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@inside(page=PAGES)
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


def test_the_readme_is_short(tool):
    assert len(README.splitlines()) <= 120
    rows = [line for line in README.splitlines() if line.startswith("|")]
    assert 2 < len(rows) <= 14
    # So it stays when every row that it may have is there, and what is said of sketches.
    found = [*tool.load(ROOT / "bench" / "results"), *map(judged, tool.PRETRAINED)]
    runs = [{**GENERATED, "machine": GPU | {"gpu": f"NVIDIA {n}"}} for n in range(tool.MOST)]
    most = tool.render(README, [*found, *runs]).splitlines()
    assert len(most) <= 120
    assert sum(line.startswith("|") for line in most) == tool.MOST + 2


def test_the_pretrained_model_stands_first(tool):
    rows = [line for line in README.splitlines() if line.startswith("|")][2:]
    first = tool.PRETRAINED[0].removesuffix("-Instruct")
    names = [row.split(" | ")[0] for row in rows]
    assert names[:2] == [f"| {first}, csfast", f"| {first}, int8"]
    own = names.index("| demo model, csfast")
    assert all(name.endswith(", sketch") for name in names[2:own])
    # What is said in words is what the first row has.
    _, _, _, loss, also = rows[0].strip("| ").split(" | ")
    assert f"costs {float(loss.split()[0]):.3f} nats".replace("0.", ".") in README
    assert also.endswith("top-1 0.85") and "another for one in seven" in README


def judged(about, read=3.25, **changes):
    """What `csfast eval --sketch` wrote, recorded."""
    return {
        **pages.judged(read, name=about),
        "machine": GPU,
        "commit": "abc",
        "date": "2026-01-31",
        **changes,
    }


def test_sketches_of_pretrained_models_come_from_what_eval_wrote(tool):
    smollm, gemma = tool.PRETRAINED
    none = judged(smollm, 6.5, expected_accepted={})
    found = [judged("demo model", 3.0), judged(gemma), none, judged(smollm, 2.5), judged(smollm)]
    head = "| bits read | head | stored | KL, 95 % | top-1 | loss over dense, 95 % | kept of 4 |"
    row = "0.1250 [0.0938, 0.1562] | 0.889 | +0.0625 [+0.0469, +0.0781] | "
    said = tool.sketches(found)
    titles = [line for line in said.splitlines() if line.endswith("2026-01-31:")]
    where = "NVIDIA H200, commit abc, 2026-01-31:"
    assert titles == [f"{name}, {where}" for name in (smollm, gemma, "demo model")]
    assert f"{smollm}, {where}\n\n{head}\n" in said and said.startswith("Bits are those")
    assert [line for line in said.splitlines() if line.startswith("|")][2:5] == [
        f"| 2.50 | 5.00 | 6.50 | {row}3.41 |",
        f"| 3.25 | 6.50 | 6.50 | {row}3.41 |",
        f"| 6.50 | 13.00 | 6.50 | {row}- |",
    ]
    # README has the one of each pretrained model that reads most within a bound.
    lines = tool.figures(found).splitlines()
    assert lines[2:4] == [
        f"| {name}, sketch | 16 bits | 3.25 bits | +0.0625 [+0.0469, +0.0781] "
        "| KL 0.125, 3.41 of 4 kept |"
        for name in ("SmolLM2-135M", gemma)
    ]
    assert lines[4] == "" and lines[5].startswith("A [*sketch*](docs/sketch.md) is the whole model")
    assert "6.50 bits | " in tool.figures([none]) and "- of 4 kept" in tool.figures([none])
    # Without a record nothing is said of any.
    assert tool.sketches([]) == "" and "sketch" not in tool.figures(found[:1])
    text = "<!-- sketches -->\nold\n<!-- /sketches -->\n"
    bare = tool.render(text, [], {"sketches": tool.sketches})
    assert bare == "<!-- sketches -->\n<!-- /sketches -->\n"


def example():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return block


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    code = example()
    assert len(code.splitlines()) <= 25
    (name,) = re.findall(r'name = "(\w+/[\w.-]+)"', code)  # one that is to be had
    shipped = pathlib.Path(models.demo_folder())
    (tmp_path / "model").mkdir()
    for path in shipped.iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    lines = (shipped / "sample.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    texts = [line for line in lines if '"task": "code/' in line][:2]
    (tmp_path / "texts.jsonl").write_text("".join(texts), encoding="utf-8")
    ran = []
    monkeypatch.setattr(csfast, "remove", lambda model: ran.append(csfast.stats(model)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    code = code.replace(name, "model").replace("max_new_tokens=200", "max_new_tokens=8")
    exec(compile(code, "README.md", "exec"), {})
    sparse, dense = capsys.readouterr().out.split("Why is the sky blue?")[1:]
    assert sparse and dense
    (stats,) = ran
    # The first of eight tokens is the prompt's, in either mode.
    assert stats.tokens[0] == 7 and 0 < stats.density < 1
    assert stats.dense["dense()"] == 8 * len(stats.tokens)
    assert (tmp_path / "mistral.plan.safetensors").is_file()


def test_the_test_command_is_what_ci_runs():
    assert re.search(r"(?m)^    \./csfast\.sh test( |$)", README)
    assert "\n./csfast.sh test\n" in (ROOT / ".ci" / "run").read_text()


WITH_FIGURES = [
    *("README.md", "docs/speed.md", "docs/findings.md", "docs/quality.md"),
    "docs/decisions/0006-sketches-are-trellis-codes.md",
]


@inside(page=WITH_FIGURES)
def test_figures_are_up_to_date(tool, page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tool.render(text, tool.load(ROOT / "bench" / "results"), tool.PAGES[page]) == text


def test_every_page_with_figures_is_checked(tool):
    assert set(tool.PAGES) == set(WITH_FIGURES)


SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_is_up_to_date(tool):
    drawn = tool.picture(tool.load(ROOT / "bench" / "results"))
    assert (ROOT / tool.PICTURE).read_text(encoding="utf-8") == drawn
    assert f"]({tool.PICTURE})" in README


def test_the_picture_has_four_lines_and_a_style_of_its_own(tool):
    drawn = tool.picture(tool.load(ROOT / "bench" / "results"))
    root = ElementTree.fromstring(drawn)
    lines = [node.get("class") for node in root.iter(f"{SVG}polyline")]
    assert lines == [
        "line oracle dashed",
        "line selection",
        "line quantised dashed",
        "line few-bit",
    ]
    said = {node.text for node in root.iter(f"{SVG}text")}
    assert {"csfast", "TEAL", "quantised, read whole", "perfect choice", "int8"} <= said
    (style,) = (node.text for node in root.iter(f"{SVG}style"))
    assert "prefers-color-scheme: dark" in style and "{%" not in style
    for name in ("few-bit", "selection", "quantised", "oracle"):
        assert f".{name} {{ --c: var(--{name}); }}" in style
    used = {name for node in root.iter() for name in (node.get("class") or "").split()}
    assert used <= set(re.findall(r"\.([a-z][\w-]*)", style)), "what no rule says is black"


def test_without_results_the_pages_say_so(tool):
    bare = tool.render(README, [])
    assert bare.count(tool.MISSING) == 1
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    bare = tool.render(text, [], tool.SPEED_TABLES)
    assert bare.count(tool.MISSING) == len(tool.SPEED_TABLES) - 1 + len(tool.TARGETS)


GENERATED = {
    "about": "generate 8b",
    "command": ["python", "bench/generate.py", "8b", "--density=0.25", "--compiled"],
    "machine": {"device": "cuda", "gpu": "NVIDIA H200"},
    "ratio": 1.2,
    "costs": {"calibrate_seconds": 28.1, "apply_seconds": 22.9, "apply_bytes": 4.7e9},
    "rows": [
        {"case": "dense", "tokens_per_second": 125.0},
        {"case": "csfast", "tokens_per_second": 150.0},
    ],
}
GENERATED["costs"]["plan_bytes"] = 939e6


def test_whole_models_come_from_what_generate_wrote(tool):
    small = {**GENERATED, "about": "generate 1b"}
    small["costs"] = {k: v / 10 for k, v in GENERATED["costs"].items() if k != "calibrate_seconds"}
    said = tool.generate([small, GENERATED]).splitlines()
    assert said[2] == (
        "| 1B shape, compiled | NVIDIA H200 | .25 | 125.0 | 150.0 | 1.20x | - | 2 | 0.47 | 0.09 |"
    )
    assert said[3].endswith("| 1.20x | 28 | 23 | 4.70 | 0.94 |")
    slow = {"device": "cpu", "cpu": "box", "threads": 2}
    quick = {**small, "machine": slow, "command": ["--density=0.5"]}
    quick["costs"] = {**small["costs"], "apply_seconds": 0.51}
    runs = [small, GENERATED, quick]
    assert tool.figures(runs).splitlines()[2:] == [
        "| 8B shape, compiled, H200, .25, tokens/s | 125 | 150 | 1.20x "
        "| calibrate 28 s, apply 23 s |",
        "| 1B shape, 2 CPU cores, .50, tokens/s | 125 | 150 | 1.20x | apply 0.5 s |",
    ]


def test_figures_come_from_results(tool):
    row = LAYER | {"case": "ffn d=2048 F=8192 density=.50", "variant": "complete"}
    row |= {"median_us": 2000.0, "baselines": {"torch f32": 9000.0, "torch bf16": 6000.0}}
    row |= {"ratio_vs_best": 3.0, "ratio_vs_dense": 3.0, "fraction_of_read_bandwidth": None}
    of = {"commit": "abc", "date": "2026-01-31", "rows": [row]}
    results = [{**of, "machine": {"device": "cpu", "cpu": "box", "threads": 2}}]
    assert tool.figures(results).splitlines()[2:] == [
        "| layer, 2 CPU cores, .50, ms | 6 | 2 | 3.00x | dense: torch |"
    ]
    said = tool.cpu(results)
    assert said.startswith("2048 x 8192, box, 2 threads, commit abc, 2026-01-31:")
    assert said.endswith("| - | 0.80 | 6000.0, 3.00x | torch 6000.0, 3.00x |")
    row = LAYER | {"case": "ffn d=4096 F=14336 density=.25", "variant": "complete"}
    assert tool.figures(of_gpu(row)).splitlines()[2:] == [
        "| layer, H200, .25, ms | 0.088 | 0.011 | 8.00x | dense: compiled, in a CUDA graph |"
    ]
    assert tool.cpu(of_gpu(row)) == tool.MISSING


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
    smollm, gemma = tool.PRETRAINED
    bits = {"stored": 3.3, "read": 3.06, "head": 16.0}
    under = {"name": tool.UNDER, "bits": bits, "kl": 0.125, "kl_ci95": [0.1, 0.15], "top1": 0.9}
    coded = [{**under, "name": f"head {name} on {tool.UNDER}", "kl": 0.25} for name in tool.HEADS]
    other = {**under, "bits": {**bits, "read": 3.05}, "kl": 0.0117, "kl_ci95": [0.01, 0.02]}
    raced = [
        {"about": gemma, "new_tokens": 96, "rows": [other, *coded]},
        {"about": smollm, "new_tokens": 96, "rows": [under, {**under, "name": "E8 3"}, *coded]},
    ]
    text = tool.codes(raced, [tool.UNDER, "E8 3", "of nobody"])
    assert text.splitlines() == [
        "| code | bits | SmolLM2-135M: KL, 95 % | top-1 | Gemma 3 270M: KL, 95 % | top-1 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| trellis 3 | 3.06, 3.05 | .125 [.100, .150] | .900 | .0117 [.0100, .0200] | .900 |",
        "| E8 3 | 3.06 | .125 [.100, .150] | .900 | - | - |",
    ]
    assert "\n| trellis 4+2 | 16.00 | +0.12500 | 16.00 | +0.23830 |\n" in tool.heads(raced)
    assert tool.codes([], tool.CODES) == tool.heads([]) == tool.MISSING
    task = {"dense_loss": 2.0, "loss": 2.5, "delta": 0.5, "ci95": [0.25, 0.75], "kl": 0.25}
    tasks = {"math": task | {"top1_agreement": 0.5}, "code": task | {"top1_agreement": 1.0}}
    found = {"mean_delta": 0.5, "mean_ci95": [0.4, 0.6], "tasks": tasks}
    found |= {"bits": 3, "density": 0.5, "bytes_fraction": 0.64}
    of = tool.PRETRAINED[0]
    int8 = {"method": "rtn-int8", "bytes_fraction": 0.53, "delta": 0.25, "ci95": [0.2, 0.3]}
    of = tool.PRETRAINED[0]
    whole = {"about": of, "best": [], "dense": {"math": 1.0, "code": 2.0}, "rows": [int8]}
    others = [{**found, "bits": 2}, {**found, "density": 0.25}, {**whole, "about": "demo model"}]
    lines = tool.figures([found, *others, whole, {**found, "about": of}]).splitlines()
    also = "2.000 | 2.500 | +0.5000 [+0.4000, +0.6000] | 0.64 of bytes, KL 0.25, top-1 0.75 |"
    assert lines[2:] == [
        f"| SmolLM2-135M, csfast | {also}",
        "| SmolLM2-135M, int8 | 1.500 | 1.750 | +0.2500 [+0.2000, +0.3000] | 0.53 of bytes |",
        f"| demo model, csfast | {also}",
    ]
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
    assert tool.layers(results) == tool.cpu(results) == tool.MISSING
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
    assert tool.cpu(results) == tool.layers(results) == tool.native(results) == tool.MISSING
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
    with pytest.raises(ValueError, match=r"^\[readme_tables\] marker 'figures' stands 0 times"):
        tool.render(README.replace("<!-- figures -->", ""), [])
