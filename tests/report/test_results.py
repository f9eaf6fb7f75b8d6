"""Files of results: whole ones pass, damaged ones are refused with what was wanted, and where."""

import copy
import json
import math
import pathlib
import re

import hypothesis
import hypothesis.strategies as st
import pytest

import pages
from axes import inside
from csfast.report import page, results
from csfast.types import ResultsError

KINDS = sorted(pages.MADE)
ROOT = pathlib.Path(__file__).parents[2]
SECTIONS = {
    "dictionaries": "Dictionaries",
    "phase": "Phases",
    "size_curve": "Size and training",
    "sketch": "Agreement of a sketch",
}
# Keys that are names of the user's, of methods, or numbers of drafts.
FREE = {*pages.TASKS, "omp", "matched", "prior", *(f"{n}" for n in range(1, 16))}


def test_every_kind_is_described():
    assert set(results.KINDS) == set(pages.MADE) == set(page.SECTIONS)


@inside(kind=KINDS)
def test_whole_results_pass_and_come_back(kind, tmp_path):
    path = tmp_path / f"{kind}.json"
    made = pages.MADE[kind]()
    path.write_text(json.dumps(made))
    assert results.read(path, kind) == made
    if kind == "sketch":  # a file has one, as a rule
        path.write_text(json.dumps(made[0]))
        assert results.read(path, kind) == made[:1]


@inside(kind=KINDS)
def test_more_than_is_needed_may_be_there(kind):
    made = pages.MADE[kind]()
    extra = [{**made[0], "more": [1, None]}] if isinstance(made, list) else {**made, "more": {}}
    results.check(kind, extra)


def keys(value):
    """Every key of a structure."""
    if isinstance(value, dict):
        return set(value).union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


@inside(kind=[*KINDS, "layers", "pursuits"])
def test_every_key_is_explained_on_the_page_of_schemas(kind):
    """Results that tests make up have every key; those of the benchmarks are recorded ones."""
    text = (ROOT / "docs" / "schemas.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"(?ms)^## ([^\n]+)\n(.*?)(?=^## |\Z)", text))
    mine = parts["What stands in all of them"] + parts[SECTIONS.get(kind, kind.capitalize())]
    if kind in KINDS:
        made = pages.MADE[kind]()
        if kind == "demo":  # these have sections of their own
            made.update(machine={}, bench=[], evaluation={})
        found = keys(made)
    else:
        made = json.loads((ROOT / "bench" / "results" / "cpu" / f"{kind}.json").read_text())
        found = {"machine"}.union(*(set(row) for row in made["rows"]))
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", mine))))
    assert found - FREE - named == set()


def changed(kind, change):
    made = copy.deepcopy(pages.MADE[kind]())
    change(made)
    return made


REFUSALS = {
    "no list": ("ablation", lambda a: a.update(rows=3), "ablation.rows = 3: want a list."),
    "empty": (
        "ablation",
        lambda a: a.update(rows=[]),
        "ablation.rows = []: want a list of at least 1.",
    ),
    "missing": ("ablation", lambda a: a.pop("best"), "ablation without 'best': want it."),
    "a text for a number": (
        "ablation",
        lambda a: a["rows"][3].update(delta="x"),
        "ablation.rows[3].delta = 'x': want a finite number.",
    ),
    "a flag for a number": (
        "ablation",
        lambda a: a["rows"][0].update(delta=True),
        "ablation.rows[0].delta = True: want a finite number.",
    ),
    "not a number": (
        "ablation",
        lambda a: a["rows"][0].update(delta=math.nan),
        "ablation.rows[0].delta = nan: want a finite number.",
    ),
    "infinite": (
        "storage",
        lambda s: s[1].update(bits_read=math.inf),
        "storage[1].bits_read = inf: want a finite number.",
    ),
    "half an interval": (
        "ablation",
        lambda a: a["rows"][0].update(ci95=[1.0]),
        "ablation.rows[0].ci95 = [1.0]: want two numbers.",
    ),
    "a task too few": (
        "ablation",
        lambda a: a["rows"][1]["per_task"].pop("math"),
        "ablation.rows[1].per_task without 'math': want every task of dense.",
    ),
    "a best loss of nothing": (
        "ablation",
        lambda a: a["best"][1].update(other=None),
        "ablation.best[1].other = None: want the method that other_delta is of.",
    ),
    "a layer too few": (
        "ablation",
        lambda a: a["rows"][0].update(density_per_task_layer={"math": [0.5], "prose": [0.5]}),
        "ablation.rows[0].density_per_task_layer.math of 1 layers: want as many as in "
        "density_per_layer.",
    ),
    "a density above 1": (
        "evaluation",
        lambda e: e.update(density_per_layer=[0.5, 1.5]),
        "evaluation.density_per_layer[1] = 1.5: want 0 to 1.",
    ),
    "no tokens": (
        "evaluation",
        lambda e: e["tasks"]["math"].update(tokens=0),
        "evaluation.tasks.math.tokens = 0: want a whole number, 1 or more.",
    ),
    "a list for a code": (
        "evaluation",
        lambda e: e.update(bits=[2]),
        "evaluation.bits = [2]: want a number of bits or a name.",
    ),
    "a number for a text": (
        "effort",
        lambda e: e["examples"][0].update(prompt=3),
        "effort.examples[0].prompt = 3: want a text.",
    ),
    "a number for a flag": (
        "effort",
        lambda e: e.update(generated=1),
        "effort.generated = 1: want true or false.",
    ),
    "layers that differ": (
        "effort",
        lambda e: e["examples"][0]["tokens"][0].update(density=[0.5]),
        "effort: tokens of [1, 2] layers: want as many for all.",
    ),
    "a row too few": (
        "phase",
        lambda p: p["diagrams"][1]["methods"]["omp"]["recall"].pop(),
        "phase.diagrams[1].methods.omp.recall: want 4 rows of 4, as measurements and sparsity "
        "have.",
    ),
    "no measurement": (
        "phase",
        lambda p: p["measurements"].insert(0, 0),
        "phase.measurements[0] = 0: want a whole number, 1 or more.",
    ),
    "a negative number": (
        "phase",
        lambda p: p.update(constant=-1.0),
        "phase.constant = -1.0: want 0 to 1e+09.",
    ),
    "a dictionary too few": (
        "dictionaries",
        lambda d: d["layers"].append({"groups": d["layers"][0]["groups"][:1], "rows": []}),
        "dictionaries.layers[3].groups: want the dictionaries of the first layer.",
    ),
    "no size": (
        "size_curve",
        lambda s: s[0].update(params=0),
        "size_curve[0].params = 0: want 1e-300 to 1e+300.",
    ),
    "no object": (
        "demo",
        lambda d: d.update(generation=["x"]),
        "demo.generation[0] = 'x': want an object.",
    ),
    "no sketch": ("sketch", lambda s: s.clear(), "sketch = []: want a list of at least 1."),
    "a task of one text alone": (
        "sketch",
        lambda s: s[1]["text"]["tasks"].pop("prose"),
        "sketch[1]: 'prose' stands in tasks or in text.tasks alone: want the same tasks in both.",
    ),
    "drafts without a number": (
        "sketch",
        lambda s: s[0]["expected_accepted"].update(four=2.0),
        "sketch[0].expected_accepted.four: want a number of drafts.",
    ),
    "a long value": (
        "demo",
        lambda d: d.update(slower="x" * 100),
        f"demo.slower = '{'x' * 56}...: want a list.",
    ),
}


@inside(name=REFUSALS)
def test_what_does_not_fit_is_refused(name):
    kind, change, message = REFUSALS[name]
    made = changed(kind, change)
    with pytest.raises(ResultsError) as error:
        results.check(kind, made)
    assert str(error.value) == f"[report] {message}"
    with pytest.raises(ResultsError):
        page.render(**{kind: made})


@inside(kind=KINDS, value=[None, 3, "x", [], [3], {}])
def test_other_json_is_refused(kind, value):
    # A demo may have left everything out; an object that says nothing is one.
    if kind == "demo" and value == {}:
        return results.check(kind, value)
    with pytest.raises(ResultsError, match=r"^\[report\] a\.json"):
        results.check(kind, value, name="a.json")
    return None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "want a whole JSON file"),
        ("", "want a whole JSON file"),
        ("[" * 100_000, "want a whole JSON file"),
        ("[NaN]", "a.json = [nan]: want an object"),
        ('{"rows": 1e999}', "a.json.rows = inf: want a list"),
    ],
)
def test_damaged_files_are_refused(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ResultsError) as error:
        results.read(path, "ablation")
    assert str(error.value).startswith("[report] a.json") and message in str(error.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ResultsError, match="want a whole JSON file"):
        results.read(path, "demo")
    with pytest.raises(ResultsError, match="want a regular file"):
        results.read(tmp_path, "demo")
    with pytest.raises(FileNotFoundError):
        results.read(tmp_path / "none.json", "demo")


def places(value, at=()):
    """Every place of a structure."""
    yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*at, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*at, number))


STRANGE = st.sampled_from(
    [None, True, -1, 0, 10**400, 1e300, -1e-300, math.nan, math.inf, "", "x", [], [0.5], {}, [[]]]
)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(st.data())
def test_damage_anywhere_is_refused_or_shown_but_never_a_fault(data):
    """One value replaced, or one left out: a page, or a ResultsError, nothing else."""
    kind = data.draw(st.sampled_from(KINDS))
    made = copy.deepcopy(pages.MADE[kind]())
    where = data.draw(st.sampled_from([place for place in places(made) if place]))
    inner = made
    for key in where[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        del inner[where[-1]]
    else:
        inner[where[-1]] = data.draw(STRANGE)
    try:
        text = page.render(**{kind: made})
    except ResultsError as error:
        assert str(error).startswith("[report] ") and str(error).endswith(".")
    else:
        pages.Page(text)
