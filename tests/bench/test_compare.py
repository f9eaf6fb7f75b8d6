"""Two files of timings beside each other: ratios, and what fails."""

import importlib.util
import json
import pathlib

import pytest
import torch

from csfast.bench import head

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare", ROOT / "bench" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(path, **medians):
    rows = [{"case": "ffn", "variant": name, "median_us": us} for name, us in medians.items()]
    path.write_text(json.dumps({**head.of(torch.device("cpu")), "rows": rows}))
    return str(path)


@pytest.fixture
def old(tmp_path):
    return results(tmp_path / "old.json", complete=10.0, select=4.0)


def test_ratios_are_new_over_old(tool, old, tmp_path, capsys):
    new = results(tmp_path / "new.json", select=2.0, complete=10.2, sense=1.0)
    assert tool.main([old, new]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["ffn", "complete", "10.00", "10.20", "1.020"]
    assert said[1].split() == ["ffn", "select", "4.00", "2.00", "0.500"]
    assert said[2] == "ffn sense: only in new.json"
    assert said[3] == "2 rows, geometric mean 0.714"
    assert len(said) == 4


def test_slower_than_the_tolerance_fails(tool, old, tmp_path, capsys):
    new = results(tmp_path / "new.json", complete=10.4, select=4.0)
    assert tool.main([old, new]) == 1
    assert "1 of 2 missing or slower by more than 3.0%" in capsys.readouterr().out
    assert tool.main([old, new, "--tolerance", ".05"]) == 0
    assert tool.main([old, new, "--only", "select"]) == 0


def test_a_missing_row_fails(tool, old, tmp_path, capsys):
    new = results(tmp_path / "new.json", complete=10.0)
    assert tool.main([old, new]) == 1
    assert "ffn select         4.00 missing  !" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "compare: Expecting"),
        ("{}", "new.json: 'format' is missing"),
        (json.dumps({**head.of(torch.device("cpu")), "rows": [{}]}), "no row has a median_us"),
    ],
)
def test_what_cannot_be_compared_says_so(tool, old, tmp_path, capsys, text, message):
    new = tmp_path / "new.json"
    new.write_text(text)
    assert tool.main([old, str(new)]) == 2
    assert message in capsys.readouterr().err


def test_a_row_that_stands_twice_or_takes_no_time_is_refused(tool):
    row = {"case": "ffn", "variant": "select", "median_us": 1.0}
    document = {**head.of(torch.device("cpu")), "rows": [row, row]}
    with pytest.raises(ValueError, match=r"^\[compare\] f: ffn select stands twice"):
        tool.medians(document, "f")
    with pytest.raises(ValueError, match=r"^\[compare\] f: ffn select takes 0\.0 us"):
        tool.medians({**document, "rows": [{**row, "median_us": 0.0}]}, "f")
    with pytest.raises(ValueError, match=r"^\[compare\] --only x: want a part"):
        tool.compare({("ffn", "select"): 1.0}, {}, "x")


@pytest.mark.parametrize("name", ["layers", "native", "pursuits"])
def test_recorded_files_compare_with_themselves(tool, name, capsys):
    path = str(ROOT / "bench" / "results" / "h200" / f"{name}.json")
    assert tool.main([path, path, "--tolerance", "0"]) == 0
    assert "geometric mean 1.000" in capsys.readouterr().out
