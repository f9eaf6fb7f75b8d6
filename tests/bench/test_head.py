"""The head of results, and what is recorded of them."""

import importlib.util
import json
import pathlib
import re

import pytest
import torch

from csfast.bench import head

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
FILES = sorted(RESULTS.rglob("*.json"))
MADE = head.of(torch.device("cpu"), command=["csfast", "bench"], commit="abc")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("record", ROOT / "bench" / "record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_head_says_what_was_run_where_when_and_with_what():
    assert tuple(MADE) == head.KEYS
    assert head.faults(MADE) == []
    assert MADE["command"] == ["csfast", "bench"] and MADE["commit"] == "abc"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", MADE["date"])
    assert {"device", "cpu", "cores", "threads", "isa"} <= set(MADE["machine"])
    assert {"csfast", "torch"} <= set(MADE["versions"])
    assert not set(MADE["versions"]) & set(MADE["machine"])


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ([], "list instead of an object"),
        ({k: v for k, v in MADE.items() if k != "date"}, "'date' is missing"),
        ({**MADE, "format": "other 1"}, "format = 'other 1': want 'csfast results 1'"),
        ({**MADE, "command": "csfast bench"}, "'command' is no list"),
        ({**MADE, "machine": {"device": "tpu"}}, "machine.device = 'tpu': want 'cpu' or 'cuda'"),
    ],
)
def test_what_is_wrong_with_a_head_is_named(document, fault):
    assert head.faults(document) == [fault]


def test_results_are_json_with_a_row_a_line():
    rows = [{"delta": 1 / 3, "ci95": [0.123456789, 2.0]}, {"delta": None, "name": "x", "n": 7}]
    text = head.text_of({"rows": rows, "seconds": 12345.678, **MADE})
    assert [line.partition(":")[0] for line in text.splitlines()[1:-4]] == [
        *(f'"{key}"' for key in (*head.KEYS, "seconds", "rows")),
    ]
    found = json.loads(text)
    assert found["seconds"] == 12346.0 and found["machine"] == MADE["machine"]
    assert found["rows"] == [
        {"delta": 0.33333, "ci95": [0.12346, 2.0]},
        {"delta": None, "name": "x", "n": 7},
    ]
    assert json.loads(head.text_of({**MADE, "rows": []}))["rows"] == []
    assert head.text_of(found) == text  # written again it stays as it is


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        head.text_of({**MADE, "rows": [{"delta": float("nan")}]})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(RESULTS).as_posix())
def test_every_recorded_file_has_the_head_of_all(path):
    text = path.read_text(encoding="utf-8")
    found = json.loads(text)
    assert head.faults(found) == []
    assert head.text_of(found) == text
    device = "cpu" if path.parent.name == "cpu" else path.parent.name.upper()
    assert device in (found["machine"].get("gpu") or "cpu")


def test_all_results_together_are_small(tool):
    assert FILES
    assert sum(path.stat().st_size for path in FILES) <= tool.MOST_BYTES == 500_000


def test_what_nobody_reads_is_not_recorded(tool):
    ablated = {"structure": "ffn", "delta": 0.123456, "per_task": {"math": 0.123456}}
    ablated |= {"density_per_task_layer": {"math": [0.5]}, "density_per_layer": [0.123456, 0.5]}
    stored = {"bits_stored": 6.0, "per_task": {"math": 0.5}, "delta": 0.5, "density": 0.5}
    bits = {"stored": 3.1, "read": 3.1, "ffn": 3.0, "attention": 3.2, "head": 16.0}
    raced = {"name": "trellis 3", "bits": bits, "kl": 0.1, "tasks": {"math": {"kl": 0.1}}}
    raced |= {"relative_error": None, "seconds": 1.5}
    found = json.loads(tool.recorded({**MADE, "rows": [ablated, stored, raced]}))
    assert found["rows"] == [
        {
            "structure": "ffn",
            "delta": 0.12346,
            "per_task": {"math": 0.1235},
            "density_per_layer": [0.1235, 0.5],
        },
        {"bits_stored": 6.0, "delta": 0.5},
        {"name": "trellis 3", "bits": {"stored": 3.1, "read": 3.1, "head": 16.0}, "kl": 0.1},
    ]
    found = json.loads(tool.recorded({**MADE, "rows": [ablated]}, without=["per_task"]))
    assert "per_task" not in found["rows"][0]


def test_a_file_is_recorded_with_what_is_said_of_it(tool, tmp_path, capsys):
    file, to = tmp_path / "out.json", tmp_path / "h200"
    file.write_text(json.dumps({**MADE, "rows": [{"median_us": 1.23456789}]}))
    words = [str(file), "--to", str(to), "--as", "layers", "--commit", "def", "--note", "cold"]
    assert tool.main(words) == 0
    found = json.loads((to / "layers.json").read_text())
    assert (found["commit"], found["remarks"]) == ("def", ["cold"])
    assert found["rows"] == [{"median_us": 1.2346}]
    assert re.fullmatch(r"h200/layers\.json: \d+ bytes\n", capsys.readouterr().out)
    # What csfast eval --sketch wrote stays whole, so that a page can show it, and says its model.
    judged = {**MADE, "bits": {"read": 3.25}, "expected_accepted": {"4": 1 / 3}, "kl": 0.1234567}
    file.write_text(json.dumps(judged))
    words = [str(file), "--to", str(to), "--as", "sketch-smollm2-3"]
    assert tool.main(words) == 1
    assert "'about' is missing: want the model of the sketch, --about" in capsys.readouterr().err
    assert not (to / "sketch-smollm2-3.json").exists()
    assert tool.main([*words, "--about", "SmolLM2"]) == 0
    assert "bytes, a sketch of SmolLM2, 3.25 bits read of a weight\n" in capsys.readouterr().out
    kept = {**judged, "expected_accepted": {"4": 0.33333}, "kl": 0.12346, "about": "SmolLM2"}
    assert json.loads((to / "sketch-smollm2-3.json").read_text()) == kept


def test_a_file_without_a_head_is_refused(tool, tmp_path, capsys):
    file = tmp_path / "out.json"
    file.write_text('{"rows": []}')
    assert tool.main([str(file), "--to", str(tmp_path / "cpu")]) == 1
    assert not (tmp_path / "cpu").exists()
    assert "record: out.json: [record] 'format' is missing; " in capsys.readouterr().err


def test_what_makes_all_results_too_large_is_refused(tool, tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "one.json").write_text("x" * 499_000)
    path = tmp_path / "cpu" / "two.json"
    with pytest.raises(ValueError, match=r"^\[record\] two\.json of 2000 bytes beside 499000"):
        tool.write("x" * 2000, path, tmp_path)
    tool.write("x" * 1000, path, tmp_path)
    tool.write("y" * 1000, path, tmp_path)  # what is replaced does not count
    assert path.read_text() == "y" * 1000
