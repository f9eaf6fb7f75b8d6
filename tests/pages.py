"""Results of every kind, small and made up, and how tests read a page."""

import html
import html.parser
import json
import random
import re

from csfast.report import plots

TASKS = ("math", "prose")


def row(method, family, bytes_fraction, delta, *, target=None, spread=0.001, density=0.3):
    """A row of an ablation of two layers."""
    interval = [delta - spread, delta + spread]
    layers = [density - 0.1, density + 0.1]
    keeps = family in ("oracle", "few-bit", "selection")
    return {
        "method": method,
        "family": family,
        "structure": "ffn",
        "target": target,
        "density": density,
        "density_per_layer": layers,
        "density_per_task": dict.fromkeys(TASKS, density),
        "density_per_task_layer": dict.fromkeys(TASKS, layers),
        "sensor_fraction": 0.1,
        "bytes_fraction": bytes_fraction,
        "recall": 0.8 if keeps else None,
        "energy": 0.9 if keeps else None,
        "delta": delta,
        "per_task": {"math": delta, "prose": delta / 2},
        "ci95": interval,
        "per_task_ci95": dict.fromkeys(TASKS, interval),
        "select_delta": delta,
        "kl": abs(delta) + 0.01,
        "top1_agreement": 0.9,
        "per_task_kl": dict.fromkeys(TASKS, abs(delta) + 0.01),
        "per_task_top1_agreement": dict.fromkeys(TASKS, 0.9),
    }


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


def wide_ablation(seed=0):
    """A hundred rows of many families at four targets."""
    draw = random.Random(seed)
    families = {
        "oracle": [f"oracle-block-{2**i}-original" for i in range(2, 8)],
        "few-bit": [*(f"planes-b{b}" for b in (1, 2, 3, 4)), "ternary", "planes-b2-joint-16"],
        "selection": ["teal", "cats", "lowrank-96", "griffin", "random-144", "innovation-72"],
        "mixed": ["mixed-2-4", "mixed-3-8"],
        "unheard-of": ["something-new"],
    }
    rows = []
    for family, methods in families.items():
        for number, method in enumerate(methods):
            for target in (0.25, 0.35, 0.55, 0.75):
                delta = (1 + number) * 0.3 * (1 - target) ** 4 * draw.uniform(0.8, 1.2)
                at = target + draw.uniform(-0.005, 0.005)
                made = row(method, family, at, delta, target=target, spread=delta / 4)
                made["density"] = min(0.9, target * draw.uniform(0.8, 1.1))
                made["recall"] = draw.random()
                rows.append(made)
    for bits in (8, 4, 3, 2):
        rows.append(row(f"rtn-int{bits}", "quantised", bits / 15, 4.0**-bits, spread=0.01))
        rows.append(row(f"gptq-int{bits}", "quantised", bits / 15 + 0.01, 3.0**-bits, spread=0.01))
    head = row("oracle-head", "oracle", 0.35, 0.5, target=0.35)
    rows.append({**head, "structure": "attention"})
    return {**ablation(), "rows": rows}


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
        "density_per_task_layer": {"math": [0.3, 0.5], "prose": [0.5, 0.66]},
        "bytes_fraction": 0.58,
        "token_bytes_fraction": 0.75,
        "asked_density": 0.5,
        "bits": 2,
        "task": "pooled",
        "seed": 0,
        "plan_hash": "cd" * 32,
        "model_hash": "ab" * 32,
    }


def phase(steps=4):
    """Diagrams of 24 groups in which fewer wanted entries and more measurements are better."""
    measurements = [24 * (i + 1) // steps for i in range(steps)]
    sparsity = [1 + 11 * i // (steps - 1) for i in range(steps)]
    rate = [[1 / (1 + 2.0 ** (4 * k - m)) for k in sparsity] for m in measurements]
    tables = {"exact": rate, "recall": rate, "energy": rate}
    low = {name: [[0.1] * steps for _ in range(steps)] for name in tables}
    return {
        "n_groups": 24,
        "group_neurons": 8,
        "measurements": measurements,
        "sparsity": sparsity,
        "trials": 50,
        "constant": 1.9,
        "diagrams": [
            {"name": "synthetic", "methods": {"omp": tables, "matched": low}},
            {"name": "usage", "methods": {"omp": low, "matched": low}},
            {"name": "innovation", "methods": {"omp": low, "matched": low}},
            {"name": "choice", "methods": {"omp": low, "matched": low, "prior": low}},
        ],
        "layers": [
            {"usage_share": 0.4, "innovation_share": 0.25, "innovation_energy": 0.5},
            {"usage_share": 0.5, "innovation_share": 0.35, "innovation_energy": 0.4},
        ],
        "seed": 0,
        "model_hash": "ab" * 32,
    }


def dictionary(name, *, weighted=False, coherence=0.45, k=32, low=0.05):
    return {
        "name": name,
        "m": 64,
        "n": 128,
        "k": k,
        "coherence": coherence,
        "welch": 0.09,
        "babel": 7.5,
        "guaranteed": 1,
        "weighted": weighted,
        "used": [low, 2.9],
        "drawn": [low, 2.7],
    }


def dictionaries():
    layer = {
        "groups": [dictionary("Phi"), dictionary("Phi, weighted by usage", weighted=True)],
        "rows": [
            dictionary("gate", coherence=0.8, k=288, low=0.002),
            dictionary("gate, rank 48", coherence=0.9, k=288, low=0.0),
        ],
    }
    return {
        "ratio": 0.5,
        "density": 0.25,
        "supports": 16,
        "layers": [layer, layer, layer],
        "seed": 0,
        "model_hash": "ab" * 32,
    }


def token(text, effort, *, loss=1.0, dense_loss=1.0):
    return {
        "text": text,
        "dense_loss": dense_loss,
        "loss": loss,
        "entropy": 2.0,
        "density": [effort - 0.1, effort + 0.1],
    }


def effort():
    return {
        "examples": [
            {
                "task": "math",
                "prompt": "What is 1 + 1?",
                "first": " It",
                "tokens": [token(" is", 0.3), token("\n", 0.5, loss=2.0), token("two", 0.72)],
            },
            {"task": "prose", "prompt": "p" * 900, "first": "x", "tokens": [token("y", 0.4)]},
        ],
        "generated": False,
        "asked_density": 0.5,
        "bits": 2,
        "task": "pooled",
        "seed": 0,
        "plan_hash": "cd" * 32,
        "model_hash": "ab" * 32,
    }


def size_curve():
    found = []
    for params in (17e6, 120e6):
        for tokens in (1e8, 4e8):
            for method, base in (("oracle", 0.02), ("planes-b2", 0.08)):
                for density in (0.25, 0.5):
                    delta = base * (17e6 / params) ** 0.4 * (1 - density)
                    found.append((params, tokens, method, density, delta))
            found.append((params, tokens, "rtn-int4", None, 0.05))
    return [
        {
            "params": params,
            "tokens": tokens,
            "method": method,
            "density": density,
            "delta": delta,
            "ci95": [0.9 * delta, 1.1 * delta],
        }
        for params, tokens, method, density, delta in found
    ]


def storage():
    return [
        {
            "name": f"{kind} {a}+{b}",
            "bits_read": a + 0.1 * b,
            "bits_stored": float(a + b),
            "delta": factor * 4.0**-a,
            "ci95": [factor * 4.0**-a * 0.8, factor * 4.0**-a * 1.2],
            "kind": kind,
        }
        for kind, factor in (("nested", 1.2), ("independent", 0.8))
        for a in (2, 3, 4)
        for b in (2, 3)
    ]


def demo():
    side = {"text": "a text", "seconds": 1.0, "tokens_per_second": 31.5}
    return {
        "machine": {"cpu": "a machine", "threads": 2, "notes": {"torch bf16": "left out"}},
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
                "ratio_vs_dense": 0.875,
            }
        ],
        "slower": ["Small layers are slower."],
        "samples": "The first text of every task.",
        "evaluation": evaluation(),
        "seconds": 41.0,
    }


def judged(read=3.25, kl=0.125, *, levels=1, model="ab" * 32, name="SmolLM2", folder="few"):
    """What `csfast eval --sketch` found of a sketch whose head takes twice the bits."""

    def of(kl):
        entry = {"kl": kl, "top1": 1 / (1 + kl), "delta": kl / 2}
        return {
            key: value
            for figure, middle in entry.items()
            for key, value in (
                (figure, middle),
                (f"{figure}_ci95", [0.75 * middle, min(1.25 * middle, 1.0)]),
            )
        }

    tasks = {
        task: {**of(factor * kl), "tokens": 96, "documents": 4}
        for task, factor in zip(TASKS, (0.5, 1.5), strict=True)
    }
    keeps = 1 - kl / 2
    return {
        "command": ["csfast", "eval", name, "--sketch", folder, "--json", "a.json"],
        "about": name,
        "bits": {"stored": 6.5, "read": read, "ffn": 3.0, "attention": 3.125, "head": 2 * read},
        "tasks": tasks,
        **of(kl),
        "expected_accepted": {f"{n}": sum(keeps**i for i in range(1, n + 1)) for n in range(1, 16)},
        "text": {"tasks": tasks, **of(kl)},
        "outside": [],
        "levels": levels,
        "new_tokens": 24,
        "rollouts": 8,
        "seed": 0,
        "model_hash": model,
    }


def sketch():
    return [judged(), judged(6.5, 0.005, levels=2)]


def apart(make):
    """The same results with no part in two places, as a file would have them."""
    return lambda: json.loads(json.dumps(make()))


MAKERS = {
    "ablation": ablation,
    "evaluation": evaluation,
    "phase": phase,
    "dictionaries": dictionaries,
    "effort": effort,
    "size_curve": size_curve,
    "storage": storage,
    "demo": demo,
    "sketch": sketch,
}
MADE = {kind: apart(make) for kind, make in MAKERS.items()}


def everything():
    return {kind: make() for kind, make in MADE.items()}


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


class Unfolded(Page):
    """Collects only what a page shows before anything is unfolded."""

    def __init__(self, text):
        self.hides = []  # of every open `details`: whether it hides what is in it
        super().__init__(text)

    def shown(self):
        return not any(self.hides)

    def handle_starttag(self, tag, attrs):
        if tag == "details":
            self.hides.append("open" not in dict(attrs))
        elif tag == "summary":
            self.hides[-1], self.behind = False, self.hides[-1]
        if self.shown():
            super().handle_starttag(tag, attrs)
        elif tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        if self.shown():
            super().handle_startendtag(tag, attrs)

    def handle_endtag(self, tag):
        super().handle_endtag(tag)
        if tag == "summary":
            self.hides[-1] = self.behind
        elif tag == "details":
            self.hides.pop()

    def handle_data(self, data):
        if self.shown():
            super().handle_data(data)


def words(text):
    """The text of a page, spaces evened out."""
    return " ".join(" ".join(Page(text).text).split())


def plots_of(text):
    """Every plot of a page: its size, and its texts with what they cover."""
    found = []
    for width, height, inside in re.findall(
        r'<svg viewBox="0 0 ([\d.e+]+) ([\d.e+]+)"[^>]*>(.*?)</svg>', text, re.DOTALL
    ):
        boxes = [
            (words_, plots.text_box(float(x), float(y), html_text(words_), style))
            for x, y, style, words_ in re.findall(
                r'<text x="([^"]*)" y="([^"]*)" class="([^"]*)">(.*?)</text>', inside
            )
        ]
        found.append((plots.Box(0, 0, float(width), float(height)), boxes))
    return found


def html_text(text):
    """A text as it is shown."""
    return html.unescape(text)


def collisions(text):
    """Pairs of texts of one plot that cover each other, and texts that leave their plot."""
    found = []
    for size, boxes in plots_of(text):
        found += [(words_, "leaves its plot") for words_, box in boxes if not size.holds(box)]
        for i, (words_, box) in enumerate(boxes):
            found += [(words_, other) for other, b in boxes[:i] if box.meets(b)]
    return found
