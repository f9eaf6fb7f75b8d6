"""`csfast bench`: its file, and that a run which cannot be true fails."""

import json
import pathlib

import pytest
import torch
from typer.testing import CliRunner

from csfast.bench import head, timed
from csfast.cli import app
from csfast.cli import bench as bench_
from csfast.report import tables

ROW = {
    "case": "ffn d=2048 F=8192 density=.25",
    "variant": "execute",
    "median_us": 10.0,
    "baselines": {"torch bf16": 40.0},
    "ratio_vs_best": 4.0,
    "ratio_vs_dense": 4.0,
    "sigma": 1.0,
}


def call(*arguments):
    return CliRunner().invoke(app.app, ["bench", *map(str, arguments)])


@pytest.fixture
def measured(monkeypatch):
    """Lets the benchmark find one row, of the fraction that the test asks for."""
    asked = []

    def of(fraction):
        def run(cases, *, device, found, **options):
            asked.append(tuple(cases))
            row = {**ROW, "fraction_of_read_bandwidth": fraction}
            results = {**head.of(device), "notes": {}, "read_bandwidth": 1e9, "rows": [row]}
            found(results)
            return results

        monkeypatch.setattr(bench_.bench_, "run", run)
        return asked

    return of


def test_what_reads_faster_than_reading_fails_and_says_which_row(measured, tmp_path):
    measured(1.04)
    done = call("--json", tmp_path / "out.json")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == (
        "csfast: [bench] ffn d=2048 F=8192 density=.25 execute: 1.040 of what reading alone "
        "reaches: want at most 1."
    )
    assert json.loads((tmp_path / "out.json").read_text())["rows"]  # what was found stays


@pytest.mark.parametrize(("fraction", "options"), [(1.0, ()), (1.04, ("--quick",))])
def test_what_can_be_true_passes_and_a_quick_run_says_nothing_of_it(measured, fraction, options):
    measured(fraction)
    assert call(*options).exit_code == 0


def test_the_cases_are_those_of_the_list(measured):
    asked = measured(0.5)
    assert call().exit_code == call("--quick").exit_code == 0
    assert asked == [timed.BESIDE_TORCH["cpu"], (timed.QUICK,)]


def test_the_file_has_the_head_of_all_results(measured, tmp_path, monkeypatch):
    measured(0.5)
    monkeypatch.setattr("sys.argv", ["csfast", "bench", "--json", str(tmp_path / "out.json")])
    assert call("--json", tmp_path / "out.json", "--commit", "abc").exit_code == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert head.faults(found) == []
    assert found["commit"] == "abc"
    assert found["command"] == ["csfast", "bench", "--json", "out.json"]
    assert found["machine"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("file", ["h200/native", "h200/layers", "cpu/native", "cpu/layers"])
def test_one_table_shows_what_any_benchmark_wrote(file):
    path = pathlib.Path(__file__).parents[2] / "bench" / "results" / f"{file}.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    found = list(tables.speed(results).columns[0].cells)
    assert [case for case in found if case] == [
        row["case"].removeprefix("ffn ") for row in results["rows"]
    ]
