"""The benchmark of omp: what its file holds, and that what it times is right."""

import json
import math
import sys

import pytest
import torch

from csfast import ops, reference
from csfast.bench import head, pursuits
from csfast.bench.cases import PURSUIT_LOADS, PursuitCase

CPU = torch.device("cpu")
SMALL = PursuitCase("small", batch=6, m=40, n_atoms=60, n_nonzero=5)
ROW = {
    "case": str,
    "variant": str,
    "median_us": float,
    "p10_us": float,
    "p90_us": float,
    "problems_per_second": float,
    "us_per_atom": float,
    "agreement": float,
    "agreement_problems": int,
    "baselines": dict,
    "ratio_vs_best": float,
}


@pytest.fixture(scope="module")
def results():
    return pursuits.run([SMALL], device=CPU, runs=2)


def test_results_have_the_agreed_form(results):
    assert head.faults(results) == []
    assert {*results} - {*head.KEYS} == {"notes", "rows"}
    assert [row["variant"] for row in results["rows"]] == list(pursuits.VARIANTS)
    for row in results["rows"]:
        assert {name: type(value) for name, value in row.items()} == ROW
        assert row["case"] == "omp m=40 n=60 k=5 batch=6"
        assert {"torch f32", "scikit-learn f64"} <= set(row["baselines"])
        assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
        best = min(row["baselines"].values())
        assert math.isclose(row["ratio_vs_best"], best / row["median_us"])
        assert math.isclose(row["problems_per_second"] * row["median_us"], 6e6)
        assert math.isclose(row["us_per_atom"] * 5, row["median_us"])
        assert row["agreement"] == 1 and 1 <= row["agreement_problems"] <= 6
    json.dumps(results, allow_nan=False)


def test_one_variant_alone():
    found = pursuits.run([SMALL], device=CPU, runs=1, variants=("pursuit",))
    assert [row["variant"] for row in found["rows"]] == ["pursuit"]


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ((132, 256, 1024, 32), ["flat", "deep"]),
        ((32, 112, 448, 16), ["flat", "deep"]),
        ((5000, 256, 1024, 64), ["deep"]),  # the plan is flat
        ((5000, 512, 2048, 64), []),  # the plan is deep, flat has no room
        ((5000, 512, 3000, 8), []),
        ((6, 40, 58, 5), ["deep"]),
    ],
)
def test_designs_are_those_that_take_the_load_beside_the_plan(sizes, want):
    assert pursuits.designs(PursuitCase("load", *sizes)) == want


def test_designs_are_raced_on_cuda_alone(results):
    assert not any(" " in row["variant"] for row in results["rows"])


@pytest.mark.gpu
@pytest.mark.skipif(not ops.cuda_available(), reason="needs a CUDA device")
def test_designs_are_raced_on_cuda():
    found = pursuits.run([SMALL], device=torch.device("cuda"), runs=1, variants=("pursuit",))
    names = ["pursuit", *(f"pursuit {design}" for design in pursuits.DESIGNS)]
    assert [row["variant"] for row in found["rows"]] == names
    assert all(row["agreement"] == 1 for row in found["rows"])


def test_the_ordinary_way_is_the_same_pursuit():
    problem = PursuitCase("ordinary", batch=30, m=64, n_atoms=128, n_nonzero=6).make()
    got = pursuits.progressive(problem.gram.float(), problem.correlation.float(), 6)
    want, margin = reference.omp_supports(problem.gram, problem.correlation, 6)
    clear = margin > pursuits.MARGIN
    assert clear.sum() >= 28
    assert torch.equal(got[clear], want[clear])


def test_agreement_counts_supports_not_their_order():
    problem = SMALL.make()
    want, margin = reference.omp_supports(problem.gram, problem.correlation, 5)
    of_first = want[:: pursuits.N_INPUTS].int()
    sure = int((margin[:: pursuits.N_INPUTS] > pursuits.MARGIN).sum())
    given = (problem.gram, problem.correlation, 5)
    assert pursuits._agreement(of_first.flip(1), *given) == (1.0, sure)
    wrong = of_first.clone()
    wrong[0, 0] = next(j for j in range(60) if j not in of_first[0].tolist())
    assert pursuits._agreement(wrong, *given) == ((sure - 1) / sure, sure)


def test_the_package_is_a_baseline_where_it_is_installed(tmp_path, monkeypatch):
    module = tmp_path / f"{pursuits.PACKAGE}.py"
    module.write_text(
        "calls = []\n"
        "def run_omp(X, y, n_nonzero_coefs, *, normalize, fit_intercept):\n"
        "    calls.append((X.shape, y.shape, n_nonzero_coefs, normalize, fit_intercept))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = pursuits.run([SMALL], device=CPU, runs=1, variants=("pursuit",))
    assert f"{pursuits.PACKAGE} f32" in found["rows"][0]["baselines"]
    calls = sys.modules.pop(pursuits.PACKAGE).calls
    assert set(calls) == {((40, 60), (6, 40), 5, False, False)}


def test_a_package_that_cannot_be_imported_is_left_out(tmp_path, monkeypatch):
    module = tmp_path / f"{pursuits.PACKAGE}.py"
    module.write_text("raise ImportError('no native half')\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = pursuits.run([SMALL], device=CPU, runs=1, variants=("pursuit",))
    assert f"{pursuits.PACKAGE} f32" not in found["rows"][0]["baselines"]
    notes = found["notes"]
    assert notes[pursuits.PACKAGE] == "unavailable: no native half"


def test_loads_are_those_of_the_targets():
    sizes = {device: {(c.m, c.n_atoms, c.n_nonzero) for c in PURSUIT_LOADS[device]} for device in
             ("cpu", "cuda")}  # fmt: skip
    for device in sizes:
        assert {(256, 1024, 32), (512, 2048, 64)} <= sizes[device]
    assert any(load.batch <= 132 for load in PURSUIT_LOADS["cuda"])


def test_refuses_an_unknown_variant():
    with pytest.raises(ValueError, match=r"^\[bench\] variant 'x': want one of complete, support"):
        pursuits.run([SMALL], device=CPU, variants=("x",))
