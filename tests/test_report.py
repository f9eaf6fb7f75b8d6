"""The page: whole, self-contained, honest about who wins, and safe with any text."""

import copy
import html.parser
import re

import pytest

from csfast import report

HOSTILE = '"><script>alert(1)</script>&<b>'


def row(method, family, bytes_fraction, delta, *, target=None, spread=0.001):
    interval = [delta - spread, delta + spread]
    return {
        "method": method,
        "family": family,
        "target": target,
        "density": 0.3,
        "sensor_fraction": 0.1,
        "bytes_fraction": bytes_fraction,
        "delta": delta,
        "per_task": {"math": delta, "prose": delta / 2},
        "ci95": interval,
        "per_task_ci95": {"math": interval, "prose": interval},
        "select_delta": delta,
    }


@pytest.fixture
def ablation():
    return {
        "rows": [
            row("oracle-neuron", "oracle", 0.35, 0.003, target=0.35),
            row("planes-b2", "few-bit", 0.35, 0.02, target=0.35),
            row("planes-b2", "few-bit", 0.55, -0.001, target=0.55),
            row("teal", "selection", 0.35, 1.3, target=0.35),
            row("rtn-int8", "quantised", 0.52, 0.0001),
            row("rtn-int4", "quantised", 0.36, 0.3),
            row("rtn-int3", "quantised", 0.36, 0.0205),
            row("rtn-int2", "quantised", 0.14, 1.0),
        ],
        "best": [
            {
                "target": 0.35,
                "few_bit": "planes-b2",
                "few_bit_delta": 0.02,
                "other": "teal",
                "other_delta": 1.3,
                "ratio": 0.02 / 1.3,
            },
            {
                "target": 0.55,
                "few_bit": "planes-b2",
                "few_bit_delta": 0.5,
                "other": "cats",
                "other_delta": 0.25,
                "ratio": 2.0,
            },
            {
                "target": 0.1,
                "few_bit": None,
                "few_bit_delta": None,
                "other": "teal",
                "other_delta": 3.0,
                "ratio": None,
            },
        ],
        "notes": ["cats cannot reach 0.25 of the bytes."],
        "dense": {"math": 1.25, "prose": 3.5},
        "documents": {"math": 10, "prose": 4},
        "tokens": {"math": 300, "prose": 310},
        "sparse_tokens": {"math": 290, "prose": 306},
        "seed": 7,
        "model_hash": "ab" * 32,
    }


@pytest.fixture
def evaluation():
    entry = {
        "dense_loss": 1.5,
        "loss": 1.5625,
        "delta": 0.0625,
        "ci95": [0.05, 0.075],
        "kl": 0.04,
        "top1_agreement": 0.93,
        "exact_match": 0.5,
        "dense_exact_match": 0.75,
        "answers": 4,
        "documents": 9,
        "tokens": 200,
        "sparse_tokens": 191,
    }
    none = {**entry, "exact_match": None, "dense_exact_match": None, "answers": 0}
    return {
        "tasks": {"math": entry, "prose": none},
        "mean_delta": 0.0625,
        "mean_ci95": [0.05, 0.075],
        "density": 0.49,
        "density_per_layer": [0.4, 0.58],
        "bytes_fraction": 0.58,
        "token_bytes_fraction": 0.75,
        "asked_density": 0.5,
        "bits": 2,
        "task": "pooled",
        "seed": 0,
        "plan_hash": "cd" * 32,
        "model_hash": "ab" * 32,
    }


@pytest.fixture
def demo():
    side = {"text": "a text", "seconds": 1.0, "tokens_per_second": 31.5}
    return {
        "machine": {"cpu": "a machine", "threads": 2},
        "calibration": {"seconds": 12.5, "tokens": 20_000, "plan_bytes": 1},
        "generation": [
            {
                "task": "math",
                "prompt": "What is 1 + 1?",
                "dense": side,
                "csfast": {**side, "text": "another", "tokens_per_second": None},
                "same_text": False,
            }
        ],
        "bench": [
            {
                "case": "ffn d=384 F=1152 density=.5",
                "variant": "complete",
                "median_us": 80.0,
                "baselines": {"torch bf16": 70.0, "torch f32": 90.0},
                "ratio_vs_best": 0.875,
            }
        ],
        "slower": ["Small layers are slower."],
        "seconds": 41.0,
    }


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and text; fails on tags that do not nest."""

    VOID = frozenset({"meta", "br", "img", "input", "link"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_every_part(tmp_path, ablation, evaluation, demo):
    path = tmp_path / "page.html"
    report.write_report(path, ablation=ablation, evaluation=evaluation, demo=demo)
    page = Page(path.read_text())
    text = " ".join(" ".join(page.text).split())
    for part in (
        "planes-b2 loses +0.0200 nats",
        "cats cannot reach",
        "+0.0625",
        "382 of 400 response tokens",
        "50.0 %",
        "75.0 %",
        "31.5 tokens/s",
        "Small layers are slower.",
        "0.88",
    ):
        assert part in text, part
    assert page.tags.count("svg") == 1 + 1 + 2 + 4  # bars, plot, one a task, one a legend entry
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("part", ["ablation", "evaluation", "demo"])
def test_each_part_stands_alone(part, request):
    page = Page(report.render(**{part: request.getfixturevalue(part)}))
    assert "csfast report" in "".join(page.text)


def test_the_page_needs_nothing_from_elsewhere(ablation, evaluation, demo):
    text = report.render(ablation=ablation, evaluation=evaluation, demo=demo)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|src=", text)


def hostile(value):
    """The same structure with every name and text made hostile, where it is free."""
    value = copy.deepcopy(value)
    for key, inner in list(value.items()):
        if key in {"method", "few_bit", "other", "text", "prompt", "case", "variant", "task"}:
            value[key] = HOSTILE if inner is not None else None
        elif key in {"model_hash", "plan_hash", "cpu"}:
            value[key] = HOSTILE
        elif key in {"notes", "slower"}:
            value[key] = [HOSTILE]
        elif key == "baselines":
            value[key] = {HOSTILE: 70.0}
        elif isinstance(inner, dict):
            value[key] = hostile(inner)
        elif isinstance(inner, list) and inner and isinstance(inner[0], dict):
            value[key] = [hostile(member) for member in inner]
    return value


def test_hostile_text_is_escaped(ablation, evaluation, demo):
    evaluation = hostile(evaluation)
    evaluation["tasks"] = {HOSTILE: evaluation["tasks"]["math"]}
    text = report.render(ablation=hostile(ablation), evaluation=evaluation, demo=hostile(demo))
    page = Page(text)
    assert HOSTILE in "".join(page.text)
    assert {"script", "b"} & set(page.tags) <= {"b"}
    assert page.tags.count("b") == Page(report.render(demo=demo, evaluation=evaluation)).tags.count(
        "b"
    )
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_sentences_follow_the_rows(ablation):
    said = report.findings(ablation)
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
    assert "rtn-int8 reads 0.52 and loses +0.9000" in report.findings(ablation)[6]
    assert report.findings(ablation)[6].endswith("selection wins.")


def test_quantisation_wins_with_fewer_bytes_and_less_loss(ablation):
    for of in ablation["rows"]:
        if of["method"] == "rtn-int2":
            of.update(delta=0.01, ci95=[0.005, 0.015])
    said = report.findings(ablation)[3]
    assert said == (
        "rtn-int2 reads 0.14 and loses +0.0100; planes-b2 reads more, 0.35, and loses more, "
        "+0.0200: quantisation wins."
    )


def points_of(text):
    return [
        [tuple(map(float, pair.split(","))) for pair in line.split()]
        for line in re.findall(r'<polyline class="line ours-a[^>]*points="([^"]*)"', text)
    ]


def test_the_plot_puts_less_loss_lower_and_more_bytes_to_the_right(ablation):
    (left, right), *_ = points_of(report.render(ablation=ablation))
    assert left[0] < right[0] and left[1] < right[1]


def test_extreme_losses_stay_on_the_plot(ablation):
    for of, delta in zip(
        ablation["rows"], (0.0, 0.0, 0.0, 500.0, -3.0, 1e-9, 0.0, 0.0), strict=True
    ):
        of.update(delta=delta, ci95=[-1e9, 1e9])
    text = report.render(ablation=ablation)
    for number in re.findall(r'\b(?:cx|cy|x1|x2|y1|y2)="([^"]*)"', text):
        assert -1 <= float(number) <= 830


def test_the_bent_scale_is_odd_and_rises():
    values = [-2.0, -0.1, -0.001, 0.0, 0.001, 0.1, 2.0]
    bent = [report._bent(v) for v in values]
    assert bent == sorted(bent)
    assert bent == [-b for b in reversed(bent)]


def test_a_failed_write_leaves_the_old_page(tmp_path, ablation):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(FileNotFoundError):
        report.write_report(tmp_path / "none" / "page.html", ablation=ablation)
    assert path.read_text() == "old"


def test_nothing_to_show_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^\[report\] nothing to show: want an ablation, .*\.$"):
        report.write_report(tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
