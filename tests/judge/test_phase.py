"""Phase diagrams: what is recovered is what was put in, and runs can be broken off and repeated."""

import json
import math

import pytest
import torch

import tiny
from csfast import documents, reference
from csfast.judge import phase
from csfast.pursuit import operators
from csfast.types import PlanError
from texts import make_documents

OPTIONS = {"n_groups": 40, "steps": 3, "trials": 12}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def parts():
    texts = make_documents(24)
    return [documents.split(texts, part) for part in ("select", "report")]


@pytest.fixture(scope="module")
def captured(parts):
    model = tiny.make_model(initializer_range=0.1)
    return phase.capture(model, tiny.make_tokenizer(), *parts, tokens=60, retrieval_prompts=0)


@pytest.fixture(scope="module")
def found(captured):
    return phase.diagrams(*captured, **OPTIONS)


def test_the_captured_parts_are_of_the_two_parts(captured, parts):
    fit, shown = captured
    assert len(fit.sample.inputs) == len(shown.inputs) == 2
    for sample in (fit.sample, shown):
        assert {len(x) for x in sample.inputs} == {len(sample.where.row)}
    assert not torch.equal(fit.sample.inputs[0][:8], shown.inputs[0][:8])


def test_pursuit_is_that_of_the_reference():
    signals = phase.synthetic(4, 32, 50, seeded())
    phi = operators.gaussian(20, 32, seeded(1)).double()
    y = signals.value @ phi.T
    estimate, mask = phase.pursue(phi, y, 4)
    for row in range(50):
        oracle = reference.omp(phi.T @ phi, y[row] @ phi, float(y[row] @ y[row]), 4)
        wanted = torch.zeros(32, dtype=torch.float64)
        wanted[oracle.index] = oracle.coef
        assert mask[row].nonzero().flatten().tolist() == sorted(oracle.index)
        # Normal equations of four unit-size columns, condition below 100: 100 * 4 * 2^-23.
        assert torch.allclose(estimate[row], wanted, atol=5e-5)


def test_more_measurements_than_entries_recover_everything():
    signals = phase.synthetic(1, 16, 64, seeded())
    for name, figures in phase.recovered(signals, 16, 1, seeded(1)).items():
        if name == "omp":
            assert figures == {"exact": 1.0, "recall": 1.0, "energy": pytest.approx(1.0)}
        else:
            assert figures["recall"] > 0.5  # the matched filter sees one atom among sixteen well


def test_pursuit_beats_the_matched_filter_and_both_fail_on_dense_signals():
    sparse = phase.recovered(phase.synthetic(6, 128, 100, seeded()), 48, 6, seeded(1))
    dense = phase.recovered(phase.synthetic(60, 128, 100, seeded()), 48, 60, seeded(1))
    assert sparse["omp"]["exact"] > 0.9 > 0.5 > sparse["matched"]["exact"]
    assert dense["omp"]["exact"] == dense["matched"]["exact"] == 0.0
    # Chance is 60 / 128; pursuit takes no more atoms than there are measurements.
    assert dense["omp"]["recall"] < 0.6


def test_what_is_known_needs_no_measurement():
    """An innovation of nothing leaves the known entries, which are then the wanted ones."""
    known = torch.rand(30, 24, generator=seeded(), dtype=torch.float64)
    found = phase.recovered(phase.Signals(torch.zeros_like(known), known), 6, 5, seeded(1))
    assert set(found) == {"omp", "matched", "prior"}
    for figures in found.values():
        assert figures == {"exact": 1.0, "recall": 1.0, "energy": 1.0}


def test_a_sparse_innovation_is_found_where_the_whole_is_not():
    """Half of the entries are in use; one in twenty differs from what is known."""
    draw = seeded()
    n, k = 128, 64
    known = torch.where(
        torch.rand(100, n, generator=draw) < 0.5,
        1 + torch.rand(100, n, generator=draw),
        torch.rand(100, n, generator=draw) * 0.1,
    ).double()
    change = phase.synthetic(6, n, 100, draw).value.sign() * 2
    innovation = torch.where(known + change > 0, change, -known * (change != 0))
    whole = phase.recovered(phase.Signals(known + innovation), 32, k, seeded(1))
    through = phase.recovered(phase.Signals(innovation, known), 32, k, seeded(1))
    assert whole["omp"]["recall"] < 0.6
    assert through["omp"]["recall"] > 0.97
    assert through["omp"]["recall"] > through["prior"]["recall"]


def test_the_largest_are_taken_and_ties_go_to_the_lower_index():
    values = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert phase.top(values, 2).tolist() == [[False, True, True, False], [True, True, False, False]]


def test_axes_rise_and_end_where_they_should():
    measurements, sparsity = phase.axes(128, 12)
    assert measurements[-1] == 128 and sparsity[0] == round(128 / 24) and sparsity[-1] == 64
    for axis in (measurements, sparsity):
        assert len(axis) == 12 and axis == sorted(set(axis))


def test_the_constant_is_that_of_the_line_where_half_is_recovered():
    n, ks = 100, [5, 10, 20]
    measurements = list(range(5, 101, 5))
    rate = [[float(m > 2.0 * operators.sample_bound(k, n, 1.0)) for k in ks] for m in measurements]
    # A step between two measurements is placed midway: off by half a step of 5 at most.
    slack = 2.5 / operators.sample_bound(ks[0], n, 1.0)
    assert phase.constant(rate, measurements, ks, n) == pytest.approx(2.0, abs=slack)
    assert phase.constant([[0.0]] * 20, measurements, [5], n) is None


def test_the_diagrams_are_complete(found, captured):
    assert [d["name"] for d in found["diagrams"]] == ["synthetic", "usage", "innovation", "choice"]
    assert found["n_groups"] == 40 and found["group_neurons"] == 4
    for diagram in found["diagrams"]:
        methods = {"omp", "matched"} | ({"prior"} if diagram["name"] == "choice" else set())
        assert set(diagram["methods"]) == methods
        for tables in diagram["methods"].values():
            assert set(tables) == {"exact", "recall", "energy"}
            for table in tables.values():
                assert len(table) == 3 and {len(row) for row in table} == {3}
                assert all(0 <= value <= 1 + 1e-12 for row in table for value in row)
    assert len(found["layers"]) == len(captured[0].ffns)
    for layer in found["layers"]:
        assert 0 < layer["innovation_share"] <= 1 and 0 < layer["usage_share"] <= 1
        assert layer["innovation_energy"] > 0
    json.dumps(found, allow_nan=False)


def test_usage_is_that_of_the_layer_and_its_mean_that_of_the_task(captured):
    fit, shown = captured
    usage, mean = phase.usages(fit, shown, 40)
    x = shown.inputs[1][3].double()
    ffn = fit.ffns[1]
    gate, up, down = (m.weight.detach().double() for m in (ffn.gate, ffn.up, ffn.down))
    each = (torch.nn.functional.silu(gate @ x) * (up @ x)).abs() * down.norm(dim=0)
    perm = fit.layouts(4)[1].perm
    assert torch.allclose(usage[1, 3], each[perm].view(40, 4).norm(dim=1), rtol=1e-4)
    before, _ = phase.usages(fit, fit.sample, 40)
    of_fit = fit.sample.where.task[fit.sample.where.row]
    task = int(shown.where.task[shown.where.row[3]])
    assert torch.allclose(mean[1, 3], before[1][of_fit == task].mean(dim=0), rtol=1e-12)
    assert shown.where.tasks == fit.sample.where.tasks == ("code", "instruct", "math", "prose")


def test_equal_seeds_give_equal_diagrams_and_others_differ(captured, found):
    assert phase.diagrams(*captured, **OPTIONS) == found
    fit, shown = captured
    other = phase.Fit(fit.model, fit.ffns, fit.sample, seed=1)
    assert phase.diagrams(other, shown, **OPTIONS)["diagrams"] != found["diagrams"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 10, 35])
def test_a_run_that_was_broken_off_goes_on(captured, found, tmp_path, after):
    resume = tmp_path / "partial"

    def stop(done, total):
        assert total == 4 * 3 * 3
        if done == after:
            raise Stop

    with pytest.raises(Stop):
        phase.diagrams(*captured, **OPTIONS, resume=resume, progress=stop)
    assert resume.exists() == (after > 3)
    steps = []
    again = phase.diagrams(
        *captured, **OPTIONS, resume=resume, progress=lambda done, total: steps.append(done)
    )
    assert again == found
    assert steps[0] == (after - 1) // 3 * 3 + 1 and steps[-1] == 36


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "whole JSON file"),
        ("[]", "want a file of the option --resume"),
        ('{"format": "other"}', "want a file of the option --resume"),
        (f'{{"format": "{phase.FORMAT}", "settings": []}}', "begun with another model"),
    ],
)
def test_a_damaged_or_foreign_resume_file_is_refused(captured, tmp_path, text, message):
    resume = tmp_path / "partial"
    resume.write_text(text)
    with pytest.raises(PlanError, match=message):
        phase.diagrams(*captured, **OPTIONS, resume=resume)
    assert resume.read_text() == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_groups": 1}, r"\[phase\] n_groups = 1: want at least 2\."),
        ({"trials": 0}, r"\[phase\] trials = 0: want at least 1\."),
        ({"steps": 1}, r"\[phase\] steps = 1: want 2 to 19 for 40 groups\."),
        ({"steps": 20}, r"\[phase\] steps = 20: want 2 to 19 for 40 groups\."),
    ],
)
def test_numbers_out_of_range_are_refused(captured, options, message):
    with pytest.raises(ValueError, match=message):
        phase.diagrams(*captured, **{**OPTIONS, **options})


def test_usage_that_is_not_finite_is_refused(captured):
    fit, shown = captured
    broken = phase.Sample([x * math.nan for x in shown.inputs], shown.where, {})
    with pytest.raises(ValueError, match=r"\[phase\] usage: want it finite"):
        phase.diagrams(fit, broken, **OPTIONS)


def test_layers_of_different_sizes_are_refused(captured):
    fit, shown = captured
    other = tiny.make_model(intermediate_size=96)
    mixed = [fit.ffns[0], phase.models.find_ffns(other)[0]]
    with pytest.raises(ValueError, match=r"\[phase\] layers of 2 sizes: want all of one size\."):
        phase.usages(phase.Fit(fit.model, mixed, fit.sample), shown, 40)


def test_nothing_to_run_is_refused(parts):
    with pytest.raises(ValueError, match=r"\[phase\] 0 documents"):
        phase.capture(tiny.make_model(), tiny.make_tokenizer(), [], parts[1])
