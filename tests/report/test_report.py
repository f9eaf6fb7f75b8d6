"""The page: whole, self-contained, honest about who wins, legible, and safe with any text."""

import json
import math
import os
import re
import shutil
import subprocess

import pytest

import pages
from axes import inside
from csfast.judge.rules import catalogue
from csfast.report import findings, fronts, panels, plots
from csfast.report import page as page_
from csfast.report import words as words_
from csfast.types import LayerShape, ResultsError
from pages import Page, words

HOSTILE = '"><script>alert(1)</script>&<b>'


@pytest.fixture
def ablation():
    return pages.MADE["ablation"]()


@pytest.fixture
def everything():
    return pages.everything()


def sections(text):
    return re.findall(r'<h2 id="(\w+)">', text)


# What is shown


def test_the_page_holds_every_part(tmp_path, everything):
    path = tmp_path / "page.html"
    page_.write_report(path, **everything)
    text = path.read_text()
    assert sections(text) == list(page_.SECTIONS)
    for part in (
        "planes-b2 loses +0.0200 nats",
        "cats cannot reach",
        "+0.0625",
        "382 of 400 response tokens",
        "50.0 %",
        "75.0 %",
        "31.7 ms a token",
        "too short to time",
        "The first text of every task.",
        "Small layers are slower.",
        "1.14 times slower",
        "What is 1 + 1?",
        "M = 1.90 k log(G / k)",
        "nothing that decoding needs is guaranteed",
        "17M parameters",
        "Bits stored for a weight",
        "From 3.25 bits of a weight to 6.50, instead of 16,",
        "few, 2 levels",
    ):
        assert part in words(text), part
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


@inside(kind=page_.SECTIONS)
def test_each_part_stands_alone(kind):
    text = page_.render(**{kind: pages.MADE[kind]()})
    assert sections(text) == [kind] and "<nav>" not in text
    assert page_.SECTIONS[kind][0] in words(text)


@inside(kind=page_.SECTIONS)
def test_a_part_that_was_not_given_is_not_there(kind, everything):
    text = page_.render(**{name: made for name, made in everything.items() if name != kind})
    assert kind not in sections(text)
    assert sections(text) == re.findall(r'<a href="#(\w+)">', text)


def test_the_page_needs_nothing_from_elsewhere(everything):
    text = page_.render(**everything)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<iframe|src=", text)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    for name, value in page.attributes:
        assert name != "href" or value.startswith("#")
        assert name != "style" or re.fullmatch(r"max-width:\d+px", value)


def test_old_results_without_the_newer_keys_are_shown(ablation):
    for of in ablation["rows"]:
        for key in ("structure", "recall", "energy", "density_per_layer", "density_per_task"):
            del of[key]
        del of["density_per_task_layer"], of["select_delta"]
    text = page_.render(ablation=ablation)
    assert "Where the work is done" not in text and "What the rules find" not in text
    assert "planes-b2" in text


def hostile(value):
    """The same structure with every text made hostile, keys of free names included."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, list):
        return [hostile(member) for member in value]
    if isinstance(value, dict):
        return {key: hostile(inner) for key, inner in value.items()}
    return value


def test_hostile_text_is_escaped(everything):
    hostiles = {kind: hostile(value) for kind, value in everything.items()}
    ablated = hostiles["ablation"]
    ablated["dense"] = {HOSTILE: 1.0, **ablated["dense"]}
    for of in ablated["rows"]:
        for key in ("per_task", "per_task_ci95", "density_per_task", "density_per_task_layer"):
            of[key] = {HOSTILE: of[key]["math"], **of[key]}
    hostiles["evaluation"]["tasks"] = {HOSTILE: hostiles["evaluation"]["tasks"]["math"]}
    hostiles["evaluation"]["density_per_task_layer"] = {HOSTILE: [0.1, 0.2]}
    for diagram in hostiles["phase"]["diagrams"]:
        diagram["methods"] = {HOSTILE: diagram["methods"]["omp"], **diagram["methods"]}
    hostiles["demo"]["evaluation"] = hostiles["evaluation"]
    text = page_.render(**hostiles)
    page = Page(text)
    assert HOSTILE in "".join(page.text)
    assert "<script" not in text
    # Bold are two sides of a demo, a front and five words: no tag came from a text.
    assert page.tags.count("b") == Page(page_.render(**everything)).tags.count("b") == 8
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert {value for name, value in page.attributes if name == "style"} == {
        value for name, value in page.attributes if name == "style" and "<" not in value
    }


def test_nothing_to_show_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^\[report\] nothing to show: want one of .*\.$"):
        page_.write_report(tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_page(tmp_path, ablation):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(FileNotFoundError):
        page_.write_report(tmp_path / "none" / "page.html", ablation=ablation)
    with pytest.raises(ResultsError):
        page_.write_report(path, ablation={})
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


# What is unfolded


def body(text):
    """A page without its head."""
    return re.search(r"<body>.*</body>", text, re.DOTALL)[0]


def unfolded(**given):
    """What a page shows at first: its tags and its words."""
    page = pages.Unfolded(body(page_.render(**given)))
    return page.tags, " ".join(" ".join(page.text).split())


def test_many_tasks_fold_the_plot_of_their_losses():
    made = pages.evaluation()
    made["tasks"] = {f"task {i}": made["tasks"]["math"] for i in range(60)}
    del made["density_per_task_layer"]
    tags, shown = unfolded(evaluation=made)
    assert "svg" not in tags and tags.count("tr") == 62 and "52 %" not in shown
    assert page_.render(evaluation=made).count('class="interval few-bit"') == 2 * 61


def test_plots_are_told_to_who_does_not_see_them(everything):
    text = page_.render(**everything)
    figure = re.search(r"<figure.*?</figure>", text, re.DOTALL)[0]
    told = Page(re.search(r'<div class="unseen-text">.*?</div>', figure)[0]).text
    assert "csfast: +0.0200 at 0.35 (2 bits), -0.0010 at 0.55 (2 bits)." in told
    assert "other rules that skip: +1.3000 at 0.35 (TEAL)." in told
    labels = [value for name, value in Page(text).attributes if name == "aria-label"]
    assert all(labels) and len(labels) > 40
    assert "math: +0.0625 (+0.0500 to +0.0750); prose: +0.0625" in " ".join(labels)
    assert "Bytes that the feed-forward layers read: dense 100%, csfast 58%" in labels


def test_research_is_folded_and_marked(everything):
    _, shown = unfolded(**everything)
    for kind in page_.RESEARCH:
        title = page_.SECTIONS[kind][0]
        assert f"{title} research: nothing to run with apply" in shown
    for hidden in ("random operator", "17M parameters", "Bits stored for a weight", "chance 0.17"):
        assert hidden not in shown


@pytest.mark.parametrize("kind", page_.RESEARCH)
def test_research_alone_is_unfolded(kind):
    tags, _ = unfolded(**{kind: pages.MADE[kind]()})
    assert "svg" in tags


def test_few_plots_and_rows_are_unfolded():
    """The height of a page follows from what is unfolded; a browser measures it below."""
    made = {**pages.everything(), "ablation": pages.wide_ablation()}
    tags, _ = unfolded(**made)
    # Wide and narrow: two bars, the main plot, intervals of an evaluation, what sketches cost,
    # strips of a text; keys of the narrow main plot's four lines, and of the colours of effort.
    assert tags.count("svg") == 2 * 5 + 4 + 1
    assert tags.count("table") == 2 and tags.count("tr") == 4 + 3
    assert tags.count("pre") == 1 and tags.count("li") == 3 + 3


def test_words_that_want_explaining_are_folded(everything):
    _, shown = unfolded(**everything)
    for word in (
        "planes",
        "mmse",
        "ternary",
        "joint",
        "pooled",
        "tile",
        "sigma",
        "oracle-",
        "rtn-",
    ):
        assert word not in shown.lower(), word
    assert "of the neurons were executed (density" in shown
    assert "{" not in shown


def test_the_main_plot_has_four_lines_and_calls_the_blue_one_csfast():
    made = {**pages.ablation(), "rows": pages.wide_ablation()["rows"]}
    text = page_.render(ablation=made)
    main = re.search(r'<div class="wide">(.*?)</div>', text, re.DOTALL)[1]
    styles = re.findall(r'<polyline class="line ([\w-]+)', main)
    assert sorted(styles) == ["few-bit", "mixed", "quantised", "selection"]
    assert re.search(r'class="label few-bit">csfast</text>', main)
    page = pages.Unfolded(text)
    assert "classical compressed sensing" in " ".join(page.text)  # among what is folded
    everywhere = re.findall(r'class="label compressed">([^<]*)</text>', text)
    assert "classical compressed sensing" in everywhere


def test_points_of_one_name_in_a_row_are_named_once():
    names = ["a", "a", "b", "a"]
    points = [plots.Point(i, 0.0, 0.0, 0.0, "", name) for i, name in enumerate(names)]
    (line,) = fronts._named_once([plots.Line("l", "s0", "", tuple(points))])
    assert [point.name for point in line.points] == ["a", "", "b", "a"]


def test_the_folded_plot_of_all_families_says_which_it_adds():
    made = {**pages.ablation(), "rows": pages.wide_ablation()["rows"]}
    title = "All families, with unheard-of and perfect choice and classical compressed sensing"
    assert f"{title} A line joins" in words(page_.render(ablation=made))
    made["rows"] = [row for row in made["rows"] if row["family"] in ("few-bit", "quantised")]
    shown = words(page_.render(ablation=made))
    assert "All families A line joins" in shown and "an oracle" not in shown


def test_the_main_plot_takes_the_next_family_where_one_is_missing():
    rows = [r for r in pages.wide_ablation()["rows"] if r["family"] not in ("mixed", "quantised")]
    assert fronts.main_families(rows)[:3] == ["few-bit", "selection", "compressed"]
    assert fronts.main_families(rows[:3]) == ["oracle"]


def test_no_plot_has_a_colour_twice():
    made = {**pages.everything(), "ablation": pages.wide_ablation(), "phase": pages.phase(steps=12)}
    many = pages.size_curve()
    made["size_curve"] = [{**r, "method": f"{r['method']}-{i}"} for i in range(5) for r in many]
    for row in made["ablation"]["rows"][:]:
        if row["family"] == "selection":  # more methods than there are colours
            made["ablation"]["rows"] += [{**row, "method": f"{row['method']}-{i}"} for i in (7, 8)]
    text = page_.render(**made)
    plots_seen = 0
    for svg in re.findall(r"<svg viewBox.*?</svg>", text, re.DOTALL):
        styles = re.findall(r'<polyline class="line ([\w-]+)', svg)
        assert len(styles) == len(set(styles))
        plots_seen += len(styles) > 1
    assert plots_seen > 20
    assert "other rules that skip, 2 of 2" in words(text)


def test_every_method_of_an_ablation_has_plain_words():
    shape = LayerShape(384, 1152)
    for method in (*catalogue.default_methods(shape), *catalogue.quick_methods(shape)):
        assert words_.plain(method) != method, method
        assert not re.search(r"[a-z]-|-[a-z0-9]", words_.short(method)), method
    assert words_.plain("something-new") == words_.short("something-new") == "something-new"
    assert words_.short("planes-b2-block-16") == "2 bits, blocks of 16"
    assert words_.case("ffn d=384 F=1152 density=.50") == "384 channels, 1152 neurons, 50% executed"
    assert words_.case("ffn d=8 F=16 density=.25 bits=3 batch=4 joint") == (
        "8 channels, 16 neurons, 25% executed, bits: 3, requests that share their neurons: 4"
    )
    assert words_.case("omp m=2") == "omp m=2"


def test_made_prompts_stand_beneath_the_mean():
    made = pages.MADE["evaluation"]()
    made["tasks"] = {"retrieval": made["tasks"]["math"], **made["tasks"]}
    assert "not part of it" not in words(page_.render(evaluation=made))
    text = page_.render(evaluation={**made, "outside": ["retrieval"]})
    rows = re.findall(r"<tr[^>]*><td>([^<]*)</td>", text)
    assert rows == ["math", "prose", "mean", "retrieval"]
    names = re.findall(r'class="number end">([^<]*)</text>', text)
    assert names[:4] == rows and "prompts that csfast made; they are not part" in words(text)


def test_sketches_are_shown_by_what_they_cost():
    few, many = pages.sketch()
    worse = pages.judged(4.0, 0.25, folder="poor")
    other = pages.judged(3.5, 0.0, name="Gemma", model="cd" * 32)
    tags, shown = unfolded(sketch=[many, few, worse])
    assert (
        "From 3.25 bits of a weight to 6.50, instead of 16, the divergence from the dense model "
        "goes from 0.125 nats a token to 0.0050, and the share of tokens that both find likeliest "
        "from 88.9% to 99.5%."
    ) in shown
    # The words stand before the figures that want them, and nothing is said of neurons.
    for word in ("sketch", "Bits read", "stored", "KL", "Top-1"):
        assert shown.index(f"{word} ") < shown.index("few, 1 level 3.25 0.1250 0.0938 … 0.1562")
    assert tags.count("svg") == 2 and "neurons" not in shown
    row = "88.9 % +0.0625 3.41 3.00 3.12 6.50 6.50 SmolLM2"
    assert f"few, 1 level 3.25 0.1250 0.0938 … 0.1562 {row} poor, 1 level 4.00" in shown
    text = page_.render(sketch=[many, few, worse])
    main = re.search(r'<div class="wide">(.*?)</div>', text, re.DOTALL)[1]
    (line,) = re.findall(r'<polyline class="line few-bit" points="([^"]*)"', main)
    (left, top), (right, bottom) = (map(float, pair.split(",")) for pair in line.split())
    assert left < right and top < bottom  # more bits, less divergence; what is worse is not joined
    assert main.count("<title>") == 3 and 'class="whisker few-bit"' in main
    assert 'class="tick end">0.05</text>' in main  # the scale is logarithmic
    assert "SmolLM2: 0.125 at 3.25 bits, 0.250 at 4.00 bits, 0.0050 at 6.50 bits." in words(text)
    assert words(text).count("Drafts that a check keeps") == 1
    kept = few["expected_accepted"]["8"]
    assert "SmolLM2, few, 1 level: of 1 drafts 0.94 are kept, of 2" in text
    assert f"of 8 drafts {kept:.2f} are kept" in text

    # One alone is shown task by task, and has nothing to be drawn against.
    tags, shown = unfolded(sketch=[few])
    assert (
        "A sketch that reads 3.25 bits of a weight instead of 16 is 0.125 nats a token away from "
        "the dense model and finds the same token likeliest 88.9% of the time; of 4 tokens that it "
        "drafts a check keeps 3.4."
    ) in shown
    assert "math 0.0625 0.0469 … 0.0781 94.1 %" in shown and "mean 0.1250" in shown
    assert tags.count("svg") == 2 * 4 and tags.count("table") == 1
    bars = "Bits of a weight: dense 16.00 bits; all, stored 6.50 bits; all, read 3.25 bits; feed-"
    assert bars in page_.render(sketch=[few])
    none = {**few, "expected_accepted": {}, "rollouts": 0, "outside": ["math"]}
    text = page_.render(sketch=[none])
    assert "drafts a check" not in words(text) and "Rows beneath the mean" in words(text)
    assert re.findall(r"<tr[^>]*>\s*<td>([^<]*)</td>", text) == ["prose", "mean", "math"]

    # Models have a line and a sentence each; a divergence of nothing still has a place.
    text = page_.render(sketch=[few, many, other])
    main = re.search(r'<div class="wide">(.*?)</div>', text, re.DOTALL)[1]
    assert re.findall(r'class="label (s\d)">(SmolLM2|Gemma)<', main) == [
        ("s0", "SmolLM2"),
        ("s1", "Gemma"),
    ]
    assert (
        "Divergence from the dense model, nats a token: SmolLM2 0.125 at 3.25 bits of a weight, "
        "0.0050 at 6.50; Gemma 0.0000 at 3.50 bits of a weight."
    ) in words(text)
    assert not pages.collisions(text)
    twice = page_.render(sketch=[few, few, {**other, "about": "SmolLM2"}])
    assert "few, 1 level (2)" in twice and "SmolLM2 cdcdcdcd" in twice


# A demo


def test_a_demo_opens_with_its_verdict_and_two_bars():
    made = pages.MADE["demo"]()
    made["generation"][0]["csfast"]["tokens_per_second"] = 25.2
    tags, shown = unfolded(demo=made)
    assert (
        "On this machine csfast generated a token in 39.7 ms where dense took 31.7 ms, 1.25 times "
        "slower, read 58% of the bytes of the feed-forward layers and lost +0.062 nats a token on "
        "text it had not seen (+6.4% perplexity)."
    ) in shown
    assert tags.count("svg") == 2 and "pre" not in tags and "table" not in tags
    text = page_.render(demo=made)
    dense, ours, *_ = map(float, re.findall(r'<rect class="side [^>]* width="([^"]*)"', text))
    assert ours / dense == pytest.approx(31.5 / 25.2, rel=1e-2)


@pytest.mark.parametrize(
    ("change", "verdict", "bars"),
    [
        ({}, "On this machine csfast read 58% of the bytes of the feed-forward layers and", 2),
        ({"evaluation": None}, "neither speed nor quality was measured.", 0),
        ({"evaluation": None, "generation": None}, "neither speed nor quality was measured.", 0),
    ],
)
def test_a_demo_says_what_it_has(change, verdict, bars):
    tags, shown = unfolded(demo={**pages.MADE["demo"](), **change})
    assert verdict in shown and tags.count("svg") == bars


def test_a_demo_that_was_faster_says_so():
    made = pages.MADE["demo"]()
    made["generation"][0]["csfast"]["tokens_per_second"] = 63.0
    made["evaluation"] = None
    assert panels.demo_verdict(made) == (
        "On this machine csfast generated a token in 15.9 ms where dense took 31.7 ms, 2.00 times "
        "faster."
    )


def test_a_demo_shows_no_raw_structures():
    shown = words(body(page_.render(demo=pages.MADE["demo"]())))
    assert "{" not in shown and "'" not in shown
    assert "processor a machine threads 2" in shown and "left out" not in shown


# Sentences


def test_three_headlines_tell_an_ablation(ablation):
    said = findings.headlines(ablation)
    assert said == [
        "At 35% of the bytes csfast (2 bits) loses +0.020 nats a token (+2.0% perplexity), the "
        "best other rule that skips, TEAL (leaves out small inputs), +1.300. csfast is ahead at "
        "35% and behind at 55%.",
        "Weights quantised and read whole are level with csfast there: int3 weights, rounded, "
        "read 36% and lose +0.021.",
        "A perfect choice of neurons, which no rule can make, would lose +0.0030 there: the rest "
        "is what choosing costs.",
    ]


def test_headlines_turn_when_the_rows_turn(ablation):
    by_name = {row["method"]: row for row in reversed(ablation["rows"])}
    by_name["rtn-int3"].update(delta=0.03, ci95=[0.029, 0.031])
    assert "do worse there: int3" in findings.headlines(ablation)[1]
    by_name["rtn-int3"].update(delta=0.01, ci95=[0.009, 0.011])
    assert "do better there: int3" in findings.headlines(ablation)[1]
    by_name["teal"].update(ci95=[0.0, 2.0])
    assert "csfast is level at 35% and behind at 55%." in findings.headlines(ablation)[0]
    ablation["rows"].append(pages.row("mixed-3+3", "mixed", 0.25, 0.0067, target=0.25))
    assert findings.headlines(ablation)[2] == (
        "Research, not what apply runs: 3-bit weights, 3 bits more for neurons that matter, read "
        "25% and lose +0.0067."
    )
    few = [row for row in ablation["rows"] if row["method"] in ("rtn-int8", "planes-b2")]
    ablation["rows"] = few
    assert findings.headlines(ablation)[1:] == [
        "Weights quantised and read whole do not get by with so few bytes: int8 weights, rounded, "
        "read 52% and lose +0.0001."
    ]
    ablation["best"] = ablation["best"][2:]
    assert findings.headlines(ablation) == []
    assert "What was found" not in words(page_.render(ablation=ablation))


def test_sentences_follow_the_rows(ablation):
    said = findings.comparisons(ablation)
    assert said[0].endswith("teal, +1.3000: 2% of it.")
    assert said[1].endswith("cats, +0.2500: the other rule is better.")
    assert said[2] == "At 0.10 of the dense bytes no few-bit rule can be compared."
    assert said[3].startswith("rtn-int2") and "gets by with so little" in said[3]
    assert said[4].endswith("selection wins.")
    assert said[5].endswith("their intervals overlap.")
    assert said[6].endswith("quantisation wins.")
    assert said[7].startswith("Of 4 quantised rows 1 beat ") and " 1 lose to it" in said[7]


def test_sentences_turn_when_the_rows_turn(ablation):
    for of in ablation["rows"]:
        if of["method"] == "rtn-int8":
            of.update(delta=0.9, ci95=[0.8, 1.0])
    assert "rtn-int8 reads 0.52 and loses +0.9000" in findings.comparisons(ablation)[6]
    assert findings.comparisons(ablation)[6].endswith("selection wins.")


def test_quantisation_wins_with_fewer_bytes_and_less_loss(ablation):
    for of in ablation["rows"]:
        if of["method"] == "rtn-int2":
            of.update(delta=0.01, ci95=[0.005, 0.015])
    said = findings.comparisons(ablation)[3]
    assert said == (
        "rtn-int2 reads 0.14 and loses +0.0100; planes-b2 reads more, 0.35, and loses more, "
        "+0.0200: quantisation wins."
    )


def test_mixed_precision_is_told_beside_weights_quantised_alike():
    def row(method, family, read, delta):
        return {
            **{"method": method, "family": family, "target": read, "bytes_fraction": read},
            **{"delta": delta, "ci95": [delta - 0.001, delta + 0.001], "select_delta": delta},
        }

    rows = [
        row("rtn-int3", "quantised", 0.2, 0.25),
        row("gptq-int4", "quantised", 0.281, 0.02),
        row("rtn-int8", "quantised", 0.531, 0.0),
        row("mixed-3+3", "mixed", 0.15, 0.3),
        row("mixed-3+3", "mixed", 0.25, 0.0067),
        row("mixed-3+3", "mixed", 0.399, -0.001),
        {**row("mixed-3+3", "mixed", 0.399, -0.001), "target": 0.75},
    ]
    said = findings.comparisons({"best": [], "rows": rows})[4:]
    assert said == [
        "mixed-3+3 reads 0.15 and loses +0.3000; no weights quantised alike get by with so "
        "little, and the first to lose no more read 0.20 (rtn-int3).",
        "mixed-3+3 reads 0.25 and loses +0.0067; weights quantised alike lose +0.2500 within "
        "these bytes (rtn-int3), and the first to lose no more read 0.53 (rtn-int8).",
        "mixed-3+3 reads 0.40 and loses -0.0010; weights quantised alike lose +0.0200 within "
        "these bytes (gptq-int4), and none lose as little.",
    ]


def test_phases_are_told_with_their_failures():
    found = pages.MADE["phase"]()
    said = panels.phase_findings(found)
    assert said[0].startswith("Half of the made signals are recovered wholly at M = 1.90 k log")
    # 45 % of 24 groups; 1.9 * 10.8 * log(1 / .45) = 16.4 measurements.
    assert said[1].startswith("90 % of the energy of the usage is held by 11 of 24 groups, 45%")
    assert "want 16 measurements, 68% of the groups" in said[1]
    assert said[3] == (
        "Usage, 6 measurements for 4 of 24 groups: of what is wanted is found by pursuit 0.10, "
        "largest correlations 0.10 (chance 0.17); all of it by pursuit in 10% of the signals."
    )
    assert len(said) == 6 and "task mean alone 0.10" in said[5]
    found["constant"] = None
    assert panels.phase_findings(found)[0] == (
        "On this grid pursuit recovers half of the made signals nowhere."
    )


def test_coherence_is_told_with_what_it_does_not_promise():
    found = pages.MADE["dictionaries"]()
    groups, rows = panels.dictionary_findings(found)
    # (1 + 1 / .45) / 2 = 1.6; (1 + 1 / .8) / 2 = 1.1
    assert "coherence 0.45 to 0.45. Pursuit is certain to find k groups if mu < 1 / (2 k - 1), so "
    assert "for k = 1 at most (k = 1 by the cumulative coherence)" in groups
    assert "a token's support at density 0.25 has 32. So nothing that decoding needs" in groups
    assert groups.endswith("of atoms of unit norm go down to 0.05.")
    assert "has 288. So nothing" in rows and rows.endswith(
        "some supports are not even independent."
    )
    for layer in found["layers"]:
        layer["groups"][0].update(coherence=0.01, guaranteed=50)
    assert "So nothing" not in panels.dictionary_findings(found)[0]
    assert "for k = 50 at most" in panels.dictionary_findings(found)[0]


@pytest.mark.parametrize(
    ("coherence", "k"),
    [(1.0, 0), (0.5, 1), (1 / 3, 1), (0.33, 2), (0.2, 2), (0.19, 3), (0.0, 10**9)],
)
def test_the_bound_of_coherence_is_strict(coherence, k):
    assert panels._sure(coherence) == k
    if 0 < k < 10**9:
        assert coherence < 1 / (2 * k - 1) and coherence >= 1 / (2 * k + 1)


# Fronts and families


def test_the_front_is_what_no_other_row_beats(ablation):
    front = fronts.front(ablation["rows"], None)
    assert [(r["method"], r["bytes_fraction"]) for r in front] == [
        ("rtn-int2", 0.14),
        ("planes-b2", 0.35),
        ("rtn-int8", 0.52),
        ("planes-b2", 0.55),
    ]
    for member in front:
        for other in ablation["rows"]:
            if other["family"] != "oracle":
                assert not (
                    other["bytes_fraction"] <= member["bytes_fraction"]
                    and other["delta"] < member["delta"]
                )
    text = page_.render(ablation=ablation)
    assert "rtn-int2 (0.14, +1.0000), planes-b2 (0.35, +0.0200)" in words(text)
    assert text.count('<tr class="front">') == 4


def test_of_equal_bytes_the_lesser_loss_is_the_front():
    rows = [pages.row(name, "selection", 0.5, delta) for name, delta in (("a", 0.2), ("b", 0.1))]
    assert [r["method"] for r in fronts.front(rows, None)] == ["b"]
    assert [r["method"] for r in fronts.front([rows[1], rows[1]], None)] == ["b"]


def test_lines_join_what_was_chosen_elsewhere_and_rings_mark_the_front():
    """The best on the text for choosing is joined, the best on the text shown is ringed."""
    lucky = pages.row("lucky", "few-bit", 0.5, 0.1, target=0.5)
    chosen = pages.row("chosen", "few-bit", 0.5, 0.2, target=0.5)
    lucky["select_delta"], chosen["select_delta"] = 0.3, 0.2
    rows = [lucky, chosen]
    joined, loose = fronts.family_lines(rows, None, fronts.front(rows, None))
    assert [p.name for p in joined.points] == ["chosen"] and not joined.points[0].ring
    assert [p.name for p in loose.points] == ["lucky"] and loose.points[0].ring
    assert joined.joined and not loose.joined and joined.name == loose.name


@pytest.mark.parametrize(
    ("method", "family", "shown"),
    [
        ("random-144", "selection", "compressed"),
        ("innovation-36", "selection", "compressed"),
        ("mmse-72", "selection", "compressed"),
        ("probe-72", "selection", "compressed"),
        ("random", "selection", "selection"),
        ("lowrank-96", "selection", "selection"),
        ("random-1", "few-bit", "few-bit"),
        ("mixed-2-4", "mixed", "mixed"),
        ("new", "unheard-of", "unheard-of"),
    ],
)
def test_compressed_sensing_stands_apart(method, family, shown):
    assert fronts.family({"method": method, "family": family}) == shown


def test_families_differ_in_more_than_colour():
    marks = [mark for _, _, mark, _ in fronts.FAMILIES.values()]
    assert len(set(marks)) == len(marks) == 6


def test_attention_is_not_compared_with_feed_forward_layers():
    rows = pages.wide_ablation()["rows"]
    text = page_.render(ablation={**pages.ablation(), "rows": rows})
    assert "attention: bytes of its linear layers" in words(text)
    main, families = re.findall(r'<div class="wide">(.*?)</div>', text, re.DOTALL)[:2]
    assert "attention heads" not in main + families and "blocks of 4 neurons" in families


def test_an_ablation_of_one_kind_of_rule_is_shown():
    for wanted in ("oracle-neuron", "rtn-int8", "planes-b2"):
        made = pages.MADE["ablation"]()
        made["rows"] = [of for of in made["rows"] if of["method"] == wanted]
        shown = words(page_.render(ablation=made))
        assert wanted in shown and ("The front" in shown) == (wanted != "oracle-neuron")
    made["rows"] = [{**of, "structure": "attention"} for of in made["rows"]]
    assert "planes-b2" in words(page_.render(ablation=made))


# Effort


def spans_of(text):
    return re.findall(r'<span class="e(\d)( worse)?" title="([^"]*)">([^<]*)</span>', text)


def test_tokens_are_coloured_by_effort_and_underlined_by_loss():
    text = page_.render(effort=pages.MADE["effort"]())
    first, second, third, other = spans_of(text)
    assert [s[3] for s in (first, second, third, other)] == [" is", "↵\n", "two", "y"]
    assert first[0] < other[0] < second[0] < third[0]
    assert [bool(s[1]) for s in (first, second, third, other)] == [False, True, False, False]
    assert second[2] == "effort 0.50; loss 2.00, dense 1.00; entropy 2.00; layers .40 .60"
    assert ">0.30</span>" in text and ">0.75</span>" in text  # the ends of the scale
    assert "1 of 3 tokens underlined" in words(text)
    assert "…" in words(text)  # of a long prompt the end


def test_the_scale_of_effort_holds_constant_effort():
    made = pages.MADE["effort"]()
    for example in made["examples"]:
        for token in example["tokens"]:
            token["density"] = [1.0, 1.0]
    levels = {int(level) for level, *_ in spans_of(page_.render(effort=made))}
    assert len(levels) == 1
    made["examples"] = []
    assert "Effort" in words(page_.render(effort=made))


# Legibility


def colours(dark):
    """Colours of the page by name, as the style sheet has them."""
    text = page_.render(demo=pages.demo())
    blocks = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[0]))
    if dark:
        found |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[1]))
    return {name: [int(value[i : i + 2], 16) for i in (1, 3, 5)] for name, value in found.items()}


def mixed(top, share, bottom):
    return [share * a + (1 - share) * b for a, b in zip(top, bottom, strict=True)]


def luminance(colour):
    """Relative luminance, WCAG 2.1."""
    parts = [c / 255 for c in colour]
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_texts_and_marks_stand_out_from_what_is_behind_them(dark):
    """WCAG 2.1 wants 4.5 for text and 3 for what a plot is understood by."""
    of = colours(dark)
    for name in ("ink", "soft", "bad"):
        assert contrast(of[name], of["card"]) >= 4.5, name
        assert contrast(of[name], of["page"]) >= 4.5, name
    styles = [style for _, style, _, _ in fronts.FAMILIES.values()]
    for name in (*styles, *(f"s{i}" for i in range(plots.PALETTE)), "unknown", "ghost", "over"):
        assert contrast(of[name], of["card"]) >= 3, name


@pytest.mark.parametrize("dark", [False, True])
def test_effort_is_told_by_lightness_and_leaves_the_text_legible(dark):
    of = colours(dark)
    text = page_.render(effort=pages.MADE["effort"]())
    shares = [
        int(share) / 100
        for share in re.findall(r"\.tokens \.e\d \{ background: .*?var\(--veil\) (\d+)%", text)
    ]
    assert len(shares) == panels.LEVELS
    behind = [luminance(mixed(of["veil"], share, of["card"])) for share in shares]
    assert behind == sorted(behind, reverse=not dark)
    # Neighbours are told apart less than the ends, which must be: 1.5 is plain to see.
    ends = [mixed(of["veil"], share, of["card"]) for share in (shares[0], shares[-1])]
    assert contrast(*ends) > 1.5
    for share in shares:
        assert contrast(of["ink"], mixed(of["veil"], share, of["card"])) >= 4.5
    # Numbers in cells of a table stand on half of the colour at most.
    assert contrast(of["ink"], mixed(of["veil"], 0.5, of["card"])) >= 4.5
    heat = [luminance(mixed(of["heat"], i / 10, of["card"])) for i in range(11)]
    assert heat == sorted(heat, reverse=not dark)
    assert contrast(of["heat"], of["card"]) > 7


def test_no_label_covers_another(everything):
    assert not pages.collisions(page_.render(**everything))


@pytest.mark.parametrize("seed", range(3))
def test_no_label_covers_another_among_a_hundred_rows(seed):
    ablation = pages.wide_ablation(seed)
    assert len(ablation["rows"]) > 90
    text = page_.render(ablation=ablation)
    assert not pages.collisions(text)
    assert len(Page(text).tags) > 1000
    # Every method is named beside a plot, and every row stands in the table.
    for of in ablation["rows"]:
        name = (
            re.sub(r"-int\d+$", "", of["method"]) if of["family"] == "quantised" else of["method"]
        )
        assert f">{name}</text>" in text
        assert f"<td>{of['method']}</td>" in text


def test_a_page_of_everything_is_of_moderate_size():
    made = {**pages.everything(), "ablation": pages.wide_ablation()}
    made["phase"] = pages.phase(steps=12)
    assert len(page_.render(**made)) < 2 << 20


# Rendered

# A window has a least width, a frame has none: the page reports from within one.
FRAME = """<!doctype html>
<body><iframe src="page.html" style="border: 0; width: WIDTHpx; height: 1000px"></iframe>
<script>addEventListener("message", event => { document.body.textContent = event.data; });</script>
</body>
"""
MEASURE = """
<script>
const found = [];
const root = document.documentElement;
const folded = root.scrollHeight;
const main = document.querySelector("#ablation ~ .first figure").getBoundingClientRect();
document.querySelectorAll("details").forEach(each => each.open = true);
const differences = [...document.querySelectorAll("th")]
  .filter(each => /^(difference|loss over dense)$/.test(each.textContent))
  .map(each => Math.round(each.getBoundingClientRect().right));
if (root.scrollWidth > root.clientWidth) found.push(`page is ${root.scrollWidth} wide`);
let plots = 0;
document.querySelectorAll("svg").forEach(svg => {
  const frame = svg.getBoundingClientRect();
  if (!frame.width) return;
  plots++;
  const texts = [...svg.querySelectorAll("text")];
  const boxes = texts.map(text => text.getBoundingClientRect());
  boxes.forEach((a, i) => {
    if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1 ||
        a.bottom > frame.bottom + 1) found.push("leaves: " + texts[i].textContent);
    boxes.slice(0, i).forEach((b, j) => {
      const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      // A line of text has room above and below its letters.
      if (width > 1 && height > 3) found.push(texts[i].textContent + " on " + texts[j].textContent);
    });
  });
});
parent.postMessage(JSON.stringify(
  {plots, width: root.clientWidth, found, folded, main: main.bottom, differences}), "*");
</script>
"""
BROWSERS = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
BROWSER = next((path for path in BROWSERS if path), None)
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --hide-scrollbars --dump-dom"
)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium to render the page")
@pytest.mark.parametrize("width", [400, 1400, 1600])
def test_a_browser_finds_every_label_in_its_place(tmp_path, width):
    """Measured as rendered: nothing is wider than the window, no label covers another."""
    made = {**pages.everything(), "ablation": pages.wide_ablation(), "phase": pages.phase(steps=12)}
    del made["demo"]  # its own two bars come first
    scored = made["evaluation"]["tasks"]
    scored["a task with a rather long name that a user may have chosen"] = scored["math"]
    made["sketch"].append(pages.judged(3.5, 0.05, name="Gemma 3 270M", model="cd" * 32))
    text = page_.render(**made).replace("</body>", f"{MEASURE}</body>")
    (tmp_path / "page.html").write_text(text)
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)))
    done = subprocess.run(
        [
            str(BROWSER),
            *OPTIONS.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1800,1100",
            "--virtual-time-budget=20000",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    body = re.search(r"<body>(\{.*?\})</body>", done.stdout, re.DOTALL)
    assert body, done.stderr[-500:]
    measured = json.loads(pages.html_text(body[1]))
    assert measured["found"] == []
    assert measured["width"] == width
    assert measured["plots"] > 40
    # Columns of differences are seen without scrolling a table.
    assert len(measured["differences"]) >= 4 and max(measured["differences"]) <= width
    if width == 1400:
        assert measured["folded"] <= 6000
        assert measured["main"] <= 900  # the main plot is within the first screen


# Scales


def points_of(text, style):
    return [
        [tuple(map(float, pair.split(","))) for pair in line.split()]
        for line in re.findall(rf'<polyline class="line {style}[^>]*points="([^"]*)"', text)
    ]


def test_the_plot_puts_less_loss_lower_and_more_bytes_to_the_right(ablation):
    (left, right), *_ = points_of(page_.render(ablation=ablation), "few-bit")
    assert left[0] < right[0] and left[1] < right[1]


def test_extreme_losses_stay_on_the_plot(ablation):
    for of, delta in zip(
        ablation["rows"], (0.0, 0.0, 0.0, 500.0, -3.0, 1e-9, 0.0, 0.0), strict=True
    ):
        of.update(delta=delta, ci95=[-1e9, 1e9])
    text = page_.render(ablation=ablation)
    for number in re.findall(r'\b(?:cx|cy|x1|x2|y1|y2)="([^"]*)"', text):
        assert -1 <= float(number) <= plots.WIDE
    assert not pages.collisions(text)


def test_theory_is_drawn_where_its_measurements_are():
    found = pages.MADE["phase"]()
    n, ks, ms = found["n_groups"], found["sparsity"], found["measurements"]
    curve = panels._theory(found)
    assert len(curve) > 4
    for across, down in curve:
        j, i = across - 0.5, len(ms) - down - 0.5
        k = ks[int(j)] + (j - int(j)) * (ks[min(int(j) + 1, len(ks) - 1)] - ks[int(j)])
        m = ms[int(i)] + (i - int(i)) * (ms[min(int(i) + 1, len(ms) - 1)] - ms[int(i)])
        assert m == pytest.approx(found["constant"] * k * math.log(n / k))
    text = page_.render(phase=found)
    assert text.count('class="over"') == 8  # two maps of pursuit for each of four kinds
    found["constant"] = None
    assert 'class="over"' not in page_.render(phase=found)


def test_strongest_cells_of_a_phase_map_are_at_the_top_left():
    text = page_.render(phase=pages.MADE["phase"]())
    first = re.search(
        r"<svg viewBox[^>]*aria-label=\"pursuit: all wanted found\">(.*?)</svg>", text
    )[1]
    cells = [float(v) for v in re.findall(r'fill-opacity="([^"]*)"', first)]
    rows = [cells[i : i + 4] for i in range(0, 16, 4)]
    assert rows[0][0] == max(cells) and rows[-1][-1] == min(cells)
    assert rows == [sorted(row, reverse=True) for row in rows]


def test_studies_are_drawn_against_both_of_their_numbers():
    text = page_.render(size_curve=pages.size_curve(), storage=pages.storage())
    shown = words(text)
    for part in ("longest training", "17M parameters", "120M parameters", "Density 0.25"):
        assert part in shown
    assert "Bits read for a weight, on average" in shown and "Bits stored for a weight" in shown
    # One size, one length: nothing to draw a line through, so no plot, and no fault.
    alone = [of for of in pages.size_curve() if of["params"] == 17e6 and of["tokens"] == 1e8]
    assert "Size and training" in words(page_.render(size_curve=alone))
    assert "<polyline" not in page_.render(size_curve=alone)
