"""Coherence and restricted isometry: known dictionaries, laws, and those of a model."""

import json
import math

import pytest
import torch

import tiny
from csfast import documents
from csfast.judge import dictionaries, phase
from csfast.pursuit import operators
from texts import make_documents


@pytest.fixture(scope="module")
def fit():
    parts = [documents.split(make_documents(24), part) for part in ("select", "report")]
    model = tiny.make_model(initializer_range=0.1)
    return phase.capture(model, tiny.make_tokenizer(), *parts, tokens=100, retrieval_prompts=0)[0]


@pytest.fixture(scope="module")
def found(fit):
    return dictionaries.analyse(fit, n_groups=40, n_supports=4)


def supports(n, k, count=5):
    draw = torch.Generator().manual_seed(0)
    return [torch.randperm(n, generator=draw)[:k] for _ in range(count)]


def test_an_orthonormal_dictionary_promises_everything():
    eye = torch.eye(12, dtype=torch.float64)
    got = dictionaries.facts("eye", eye, supports(12, 4), supports(12, 4))
    assert (got["m"], got["n"], got["k"]) == (12, 12, 4)
    assert got["coherence"] == got["babel"] == got["welch"] == 0.0
    assert got["guaranteed"] == 12
    assert got["used"] == got["drawn"] == pytest.approx([1.0, 1.0])


def test_parallel_atoms_promise_nothing():
    twice = torch.eye(6).repeat(1, 2)
    assert dictionaries.guaranteed(twice) == 0
    some = [torch.tensor([0, 6, 1])]
    assert dictionaries.facts("twice", twice, some, some)["used"] == pytest.approx([0.0, 2.0])


def test_what_is_guaranteed_is_recovered():
    """Spikes and the cosines of Hadamard: coherence 1/8, so four atoms for certain."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < 64:
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    both = torch.cat([torch.eye(64, dtype=torch.float64), hadamard / 8], dim=1)
    assert operators.coherence(both) == pytest.approx(1 / 8)
    k = dictionaries.guaranteed(both)
    assert k == math.ceil((1 + 8) / 2) - 1 == 4
    signals = phase.synthetic(k, 128, 200, torch.Generator().manual_seed(0)).value
    _, taken = phase.pursue(both, signals @ both.T, k)
    assert torch.equal(taken, signals != 0)


@pytest.mark.parametrize(("m", "n"), [(8, 8), (8, 20), (30, 60), (2, 3), (5, 1)])
def test_the_guarantee_is_at_least_that_of_coherence(m, n):
    phi = operators.gaussian(m, n, torch.Generator().manual_seed(m))
    k = dictionaries.guaranteed(phi)
    mu = operators.coherence(phi)
    assert k >= (min(n, math.ceil((1 + 1 / mu) / 2) - 1) if mu else n)
    if 0 < k < n:
        assert operators.babel(phi, k) + operators.babel(phi, k - 1) < 1
    if 0 < k + 1 < n:
        assert operators.babel(phi, k + 1) + operators.babel(phi, k) >= 1
    assert mu >= dictionaries.welch(m, n) - 1e-12


def test_simplices_reach_the_least_coherence():
    """Three atoms in the plane, 120 degrees apart."""
    angle = torch.arange(3, dtype=torch.float64) * 2 * math.pi / 3
    atoms = torch.stack([angle.cos(), angle.sin()])
    assert operators.coherence(atoms) == pytest.approx(dictionaries.welch(2, 3)) == 0.5


def test_lengths_count_where_weighted_and_nowhere_else():
    atoms = torch.eye(4, dtype=torch.float64) * torch.tensor([1.0, 2.0, 4.0, 8.0])
    some = [torch.tensor([0, 3]), torch.tensor([1, 2])]
    plain = dictionaries.facts("", atoms, some, some)
    weighted = dictionaries.facts("", atoms, some, some, weighted=True)
    assert plain["used"] == pytest.approx([1.0, 1.0])
    assert weighted["used"] == pytest.approx([1 / 32.5, 64 / 32.5])
    assert weighted["coherence"] == plain["coherence"]
    phi = operators.gaussian(12, 20, torch.Generator().manual_seed(0)).double()
    phi /= phi.norm(dim=0)
    given = supports(20, 6)
    assert dictionaries.weighted_isometry(phi, given) == pytest.approx(
        operators.restricted_isometry(phi, given)
    )
    assert dictionaries.weighted_isometry(phi, supports(20, 13))[0] == 0.0


def test_atoms_that_are_zero_are_left_out():
    atoms = torch.eye(5, dtype=torch.float64)
    atoms[:, 2] = 0
    some = [torch.tensor([2, 3]), torch.tensor([2]), torch.tensor([0, 4])]
    got = dictionaries.facts("", atoms, some, some)
    assert got["n"] == 4 and got["guaranteed"] == 4
    assert got["used"] == pytest.approx([1.0, 1.0])


def test_every_layer_has_its_dictionaries(found, fit):
    assert len(found["layers"]) == len(fit.ffns) == 2
    for layer in found["layers"]:
        assert [d["name"] for d in layer["groups"]] == ["Phi", "Phi, weighted by usage"]
        assert [d["name"] for d in layer["rows"]] == [
            name
            for side in ("gate", "up")
            for name in (side, f"{side}, 2 bits", f"{side}, 3 bits", f"{side}, rank 8")
        ]
        for d in layer["groups"]:
            assert (d["m"], d["n"], d["k"]) == (20, 40, 10)
        for d in layer["rows"]:
            assert (d["n"], d["k"]) == (160, 40)
            assert d["m"] == (8 if "rank" in d["name"] else 64)
        for d in [*layer["groups"], *layer["rows"]]:
            assert d["welch"] <= d["coherence"] <= 1
            assert d["babel"] <= (d["k"] - 1) * d["coherence"] * (1 + 1e-12)
            for low, high in (d["used"], d["drawn"]):
                assert 0 <= low <= 1 <= high
            if not d["weighted"]:
                # Gershgorin.
                assert d["used"][1] <= 1 + d["babel"] + 1e-9
    json.dumps(found, allow_nan=False)


def test_rows_are_seen_as_the_inputs_see_them(fit, found):
    """The cosine of two neurons is the correlation, about zero, of what they measure."""
    x = fit.sample.inputs[0].double()
    z = x @ fit.ffns[0].gate.weight.detach().double().T
    z = z / z.norm(dim=0)
    cosine = (z.T @ z).abs()
    cosine.fill_diagonal_(0)
    # The ridge changes the metric by a ten-thousandth of its mean.
    assert found["layers"][0]["rows"][0]["coherence"] == pytest.approx(
        float(cosine.max()), abs=2e-3
    )


def test_more_bits_and_a_full_rank_come_to_the_exact_rows(fit):
    got = dictionaries.analyse(fit, n_groups=40, n_supports=2, bits=(1, 4), rank=64)
    # The factors are kept in float32; the metric's condition is at most 100 = sqrt(1 / RIDGE).
    for layer in got["layers"]:
        gate, one, four, full = layer["rows"][:4]
        assert full["coherence"] == pytest.approx(gate["coherence"], abs=1e-3)
        assert full["used"] == pytest.approx(gate["used"], rel=1e-2, abs=1e-3)
        assert abs(four["babel"] - gate["babel"]) < abs(one["babel"] - gate["babel"])


def test_equal_seeds_give_equal_figures(fit, found):
    assert dictionaries.analyse(fit, n_groups=40, n_supports=4) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_groups": 1}, "n_groups = 1: want at least 2."),
        ({"ratio": 0.0}, "ratio = 0.0: want one in (0, 1]."),
        ({"ratio": math.nan}, "ratio = nan: want one in (0, 1]."),
        ({"density": 1.0}, "density = 1.0: want one in (0, 1)."),
        ({"n_supports": 0}, "n_supports = 0: want at least 1."),
        ({"rank": 0}, "rank = 0: want 1 to 64."),
        ({"rank": 65}, "rank = 65: want 1 to 64."),
    ],
)
def test_numbers_out_of_range_are_refused(fit, options, message):
    with pytest.raises(ValueError) as error:
        dictionaries.analyse(fit, **options)
    assert str(error.value) == f"[dictionaries] {message}"
