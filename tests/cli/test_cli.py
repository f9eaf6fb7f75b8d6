"""The command line: every command on the shipped model, and one clear line for every mistake."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from typer.testing import CliRunner

import csfast
import pages
from csfast import Document, documents, judge, models
from csfast.cli import app
from csfast.judge import phase
from csfast.report import page as page_
from csfast.report import panels, results

TEXT = "Once upon a time, in the morning, the old sailor walked along the quiet street. " * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def data(folder):
    """A few short documents of both parts."""
    path = folder / "data.jsonl"
    records = [
        {"task": f"{task}/made", "prompt": f"{i} {TEXT[:60]}", "response": f" {i} {TEXT[:400]}"}
        for task in ("prose", "math")
        for i in range(12)
    ]
    path.write_text("\n".join(json.dumps(r) for r in records))
    return path


@pytest.fixture(scope="module")
def plan(folder, data):
    path = folder / "demo.plan.safetensors"
    done = call("calibrate", "demo", "--data", data, "--out", path, "--tokens", 1500)
    assert done.exit_code == 0, done.output
    return path


@pytest.fixture(scope="module")
def sketch(folder):
    """A coarse sketch of the shipped model, a folder."""
    made = folder / "demo.sketch"
    model, tokenizer = models.load(models.demo_folder())
    sample = documents.split(documents.read(models.demo_folder() / "sample.jsonl"), "select")
    few = documents.few(sample, 2)
    csfast.sketch(model, few, tokenizer, out=made, bits="2+2,head=4", max_tokens=600)
    return made


def call(*arguments):
    return CliRunner().invoke(app.app, [str(a) for a in arguments])


def refused(*arguments):
    """The one line that a mistake gives."""
    done = call(*arguments)
    assert done.exit_code == app.USAGE_ERROR, done.output
    assert "Traceback" not in done.output
    *notes, line = done.stderr.splitlines()
    known = ("bytes beside the model", "csfast: on ", "cores are busy")
    assert all(any(part in note for part in known) for note in notes), notes
    assert line.startswith("csfast: ")
    return line.removeprefix("csfast: ")


def test_calibrate_writes_a_plan_of_the_model(plan):
    loaded = csfast.Plan.load(plan)
    assert len(loaded.layers) == len(loaded.model.shapes)
    assert not list(plan.parent.glob("*.partial"))


def test_calibrate_says_the_bytes_of_the_plan_and_goes_without_feedback(folder, data, plan):
    path = folder / "plain.plan"
    done = call(
        *("calibrate", "demo", "--data", data, "--out", path, "--tokens", 1500),
        *("--bits", "2", "--no-feedback"),
    )
    assert done.exit_code == 0, done.output
    assert f" {path.stat().st_size:,} bytes," in " ".join(done.stdout.split())
    fitted, plain = csfast.Plan.load(plan), csfast.Plan.load(path)
    assert fitted.feedback is True and plain.feedback is False
    for a, b in zip(fitted.layers, plain.layers, strict=True):
        assert not torch.equal(a.codes[2], b.codes[2])


def test_calibrate_takes_codes_blocks_and_joint_batches(folder, data):
    path = folder / "more.plan"
    options = ("--bits", "ternary,2", "--blocks", "16,1", "--joint")
    done = call("calibrate", "demo", "--data", data, "--out", path, "--tokens", 1500, *options)
    assert done.exit_code == 0, done.output
    assert "positions for codes with feedback of 384 channels: want 2688 or more" in done.stderr
    loaded = csfast.Plan.load(path)
    assert loaded.bits == (2, "ternary") and loaded.blocks == (1, 16)
    assert loaded.batches == (1, 2, 4, 8, 16)
    options = ("--bits", "ternary", "--block", 16)
    done = call("generate", "demo", path, "--prompt", TEXT[:80], "--max-new-tokens", 4, *options)
    assert done.exit_code == 0 and done.stdout.strip(), done.output
    out = folder / "blocks.json"
    done = call(
        *("eval", "demo", path, "--data", data, "--limit", 1, "--tokens", 100, *options),
        *("--json", out),
    )
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())
    assert (results["bits"], results["block"]) == ("ternary", 16)


def test_eval_judges_a_sketch(folder, sketch):
    made, codes = sketch, csfast.Sketch.load(sketch)
    texts = [{"task": task, "text": f"{i} {TEXT}"} for task in ("tale", "b") for i in range(9)]
    data = folder / "texts.jsonl"
    data.write_text("\n".join(json.dumps(text) for text in texts))
    out, left, written = (folder / name for name in ("a.json", "a.json.partial", "t.json"))
    given = ("eval", "demo", "--sketch", made, "--data", data, "--json", out)
    options = ("--prompts", 2, "--new-tokens", 12, "--rollouts", 1, "--seed", 3)
    html = folder / "sketch.html"
    done = call(*given, *options, "--traces", written, "--html", html)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert html.read_text() == page_.render(sketch=results.read(out, "sketch"))
    assert ", 2 levels" in html.read_text()
    assert found["bits"] == codes.bits(2) and set(found["bits"]) == {
        *("stored", "read", "ffn", "attention", "head")
    }
    assert found["format"] == "csfast results 1" and found["levels"] == 2
    assert list(found["tasks"]) == list(found["text"]["tasks"]) == ["b", "tale"]
    for entry in found["tasks"].values():
        assert {"kl", "kl_ci95", "top1", "delta", "tokens"} <= set(entry)
        assert entry["tokens"] == 24 and entry["kl"] > 0
    rolled = judge.read_traces(written)
    assert len(rolled) == len(found["tasks"]) == found["rollouts"]
    assert found["expected_accepted"] == {
        f"{n}": judge.expected_accepted(rolled, n) for n in range(1, 16)
    }
    shown = " ".join(done.stdout.split())
    assert "bits a weight read" in shown and "Drafts that a check keeps" in shown
    done = call(*given, *options, "--levels", 1)
    assert done.exit_code == 0, done.output
    base = json.loads(out.read_text())
    assert base["kl"] > found["kl"] and base["bits"]["read"] < found["bits"]["read"]
    # Drafts are of the first level, whatever is judged.
    assert base["expected_accepted"] == found["expected_accepted"]
    for more, message in (
        (("--levels", 3), "[eval] --levels 3 of a sketch of 2: want no more."),
        (("--rollouts", 0, "--traces", written), "[eval] --traces with --rollouts 0"),
        (("--html", out), "is given twice: want a file for each output"),
        (("--traces", out), "is given twice: want a file for each output"),
        (("--traces", made / "sketch.json"), "is read by this command: want another file."),
        (("--new-tokens", 5000), "[eval] new_tokens = 5000 in a context of"),
    ):
        assert message in refused(*given, *more)
    assert "[eval] --resume without --json" in refused(*given[:-2], "--resume")
    assert "missing" in refused("eval", "demo", "--sketch", folder / "missing")
    left.write_text("some work")
    assert "is what an interrupted run left" in refused(*given, *options)
    assert "want a whole JSON file" in refused(*given, *options, "--resume")
    options = (*options[:-4], "--rollouts", 0, "--seed", 3)
    assert call(*given, *options, "--overwrite").exit_code == 0 and not left.exists()
    assert json.loads(out.read_text())["tasks"] == found["tasks"]


def test_generate_streams_text(plan):
    done = call("generate", "demo", plan, "--prompt", TEXT[:80], "--max-new-tokens", 8)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip()
    assert "bytes beside the model" in done.stderr
    assert "calls of layers dense" not in done.stderr


def test_generate_drafts_with_a_sketch_and_says_what_it_bought(sketch, monkeypatch):
    engine = csfast.Engine(models.demo_folder(), sketch)
    (wanted,) = engine.generate(TEXT[:80], max_new_tokens=48, longest=0, lookup=False)
    (drafted,) = engine.generate(TEXT[:80], max_new_tokens=48)
    n = len(wanted.ids) - 1
    assert drafted.ids == wanted.ids and drafted.checks < n
    given = ("generate", "demo", "--sketch", sketch, "--prompt", TEXT[:80])
    for more, result in (((), drafted), (("--dense", "--device", "cpu"), wanted)):
        done = call(*given, "--max-new-tokens", 48, *more)
        assert done.exit_code == 0, done.output
        assert done.stdout == wanted.text + "\n"
        line = re.fullmatch(
            r"csfast: (\d+) tokens, the first after [\d.]+ s, then ([\d.]+) tokens/s, (.+)\.",
            done.stderr.splitlines()[-1],
        )
        assert line is not None and int(line[1]) == n + 1 and float(line[2]) > 0
        shares = [result.effort.count(how) / n for how in ("drafted", "looked up")]
        assert line[3] == (
            f"{n / result.checks:.2f} tokens a check, {shares[0]:.2f} drafted, "
            f"{shares[1]:.2f} looked up"
        )
    done = call(*given, "--max-new-tokens", 1)
    assert re.search(r"csfast: 1 tokens, the first after [\d.]+ s\.$", done.stderr.strip())
    assert "missing" in refused("generate", "demo", "--sketch", sketch / "missing", *given[4:])

    def fail(*_, **__):
        raise csfast.NotFiniteError("[engine] logits after position 3: not finite")

    monkeypatch.setattr(csfast.Engine, "_rounds", fail)
    assert refused(*given) == "[engine] logits after position 3: not finite"


def test_generate_at_density_one_is_dense(plan):
    options = ("--prompt", TEXT[:80], "--max-new-tokens", 12)
    full = call("generate", "demo", plan, "--density", 1, *options)
    dense = call("generate", "demo", "--dense", *options)
    assert full.exit_code == dense.exit_code == 0
    assert full.stdout == dense.stdout
    assert "calls of layers dense (density 1)" in full.stderr


def test_eval_writes_the_agreed_json(plan, data, folder):
    out, page = folder / "eval.json", folder / "eval.html"
    done = call(
        *("eval", "demo", plan, "--data", data, "--limit", 3, "--density", 0.5),
        *("--json", out, "--html", page),
    )
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())
    assert {"tasks", "mean_delta", "density", "density_per_layer", "bytes_fraction"} <= set(results)
    assert {"token_bytes_fraction", "seed", "plan_hash", "model_hash"} <= set(results)
    assert results["plan_hash"] == csfast.Plan.load(plan).plan_hash
    assert results["machine"]["device"] == "cpu" and results["command"][0] == "csfast"
    for row in results["tasks"].values():
        assert {"dense_loss", "loss", "delta", "ci95", "kl", "top1_agreement"} <= set(row)
        assert {"exact_match", "tokens", "sparse_tokens"} <= set(row)
        assert row["delta"] == pytest.approx(row["loss"] - row["dense_loss"])
    assert page.read_text().lstrip().lower().startswith("<!doctype html")


def test_data_of_any_form_and_task_are_calibrated_on_and_judged(folder):
    """Without made prompts, but where they are asked for, and then outside the mean."""
    forms = (
        lambda i: {"text": f"{i} {TEXT[:300]}"},
        lambda i: {"task": "Q & A", "prompt": f"{i}?", "completion": f" {i} {TEXT[:200]}"},
    )
    path, made, out = folder / "any.jsonl", folder / "any.plan", folder / "any.json"
    lines = [json.dumps(forms[i % 2](i)) for i in range(24)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    options = ("--data", path, "--tokens")
    done = call("calibrate", "demo", *options, 1200, "--no-feedback", "--out", made)
    assert done.exit_code == 0, done.output
    assert csfast.Plan.load(made).tasks == ("pooled", "Q & A", "text")
    for more, outside in (((), []), (("--retrieval", 2), ["retrieval"])):
        done = call("eval", "demo", made, *options, 40, *more, "--json", out)
        assert done.exit_code == 0, done.output
        found = json.loads(out.read_text())
        assert list(found["tasks"]) == ["Q & A", "text", *outside]
        assert found["outside"] == outside
        mean = sum(found["tasks"][task]["delta"] for task in ("Q & A", "text")) / 2
        assert found["mean_delta"] == pytest.approx(mean)


def test_ablate_writes_the_agreed_json(data, folder):
    out, page = folder / "ablation.json", folder / "ablation.html"
    done = call(
        *("ablate", "demo", "--data", data, "--tokens", 30, "--bytes", ".5,.9"),
        *("--methods", "planes-b2,oracle-neuron", "--json", out, "--html", page),
    )
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    assert [(row["method"], row["target"]) for row in rows] == [
        *(("planes-b2", 0.5), ("planes-b2", 0.9), ("oracle-neuron", 0.5), ("oracle-neuron", 0.9)),
    ]
    for row in rows:
        assert {"density", "sensor_fraction", "bytes_fraction", "delta", "per_task"} <= set(row)
        assert {"recall", "energy", "density_per_layer", "density_per_task"} <= set(row)
    assert page.read_text().lstrip().lower().startswith("<!doctype html")
    assert not list(folder.glob("*.partial"))


def test_bench_of_omp_writes_its_json(folder):
    out = folder / "omp.json"
    done = call("bench", "omp", "--quick", "--json", out, "--commit", "abc")
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())
    assert [row["variant"] for row in results["rows"]] == ["complete", "support", "pursuit"]
    assert {row["agreement"] for row in results["rows"]} == {1.0}
    assert results["commit"] == "abc"
    assert "problems/s" in done.output


@pytest.mark.parametrize("generate", [False, True])
def test_tokens_writes_the_agreed_json(plan, data, folder, generate):
    out, page = folder / "tokens.json", folder / "tokens.html"
    done = call(
        *("tokens", "demo", plan, "--data", data, "--limit", 3, "--density", 0.5, "--tokens", 8),
        *("--json", out, "--html", page, *(["--generate"] if generate else [])),
    )
    assert done.exit_code == 0, done.output
    found = results.read(out, "effort")
    assert found["generated"] == generate
    assert {"math", "prose"} <= {e["task"] for e in found["examples"]}
    for example in found["examples"]:
        assert 1 <= len(example["tokens"]) < 8
    assert "effort" in done.stdout and "prose" in done.stdout
    assert 'id="effort"' in page.read_text()


PHASE = ("--groups", 24, "--steps", 3, "--trials", 6, "--tokens", 20, "--limit", 3)


def test_phase_writes_the_agreed_json_and_resumes(data, folder):
    out, known, page = (folder / name for name in ("phase.json", "known.json", "phase.html"))
    files = ("--json", out, "--dictionaries", known, "--html", page)
    done = call("phase", "demo", "--data", data, *PHASE, *files)
    assert done.exit_code == 0, done.output
    found = results.read(out, "phase")
    assert found["n_groups"] == 24 and len(found["layers"]) == 6
    assert len(results.read(known, "dictionaries")["layers"]) == 6
    assert "Pursuit is certain" in " ".join(done.stdout.split())
    assert 'id="phase"' in page.read_text() and 'id="dictionaries"' in page.read_text()
    assert not list(folder.glob("*.partial"))
    # What an interrupted run would have left: begun with other options, it is refused.
    partial = folder / "phase.json.partial"
    partial.write_text(json.dumps({"format": phase.FORMAT, "settings": [], "rows": {}}))
    refusal = refused("phase", "demo", "--data", data, *PHASE, "--json", out, "--resume")
    assert refusal.startswith("[phase] phase.json.partial: was begun with another model")
    partial.unlink()


def test_report_puts_files_on_one_page(folder):
    options = []
    for kind, make in pages.MADE.items():
        path = folder / f"given-{kind}.json"
        path.write_text(json.dumps(make()))
        options += [f"--{kind.replace('_', '-')}", path]
    out = folder / "report.html"
    done = call("report", out, *options)
    assert done.exit_code == 0, done.output
    assert "report.html" in done.stdout
    text = out.read_text()
    assert all(f'<h2 id="{kind}">' in text for kind in pages.MADE)
    assert text == page_.render(**pages.everything())


def test_bench_writes_the_agreed_json(folder):
    out = folder / "bench.json"
    done = call("bench", "execute", "--quick", "--json", out)
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())
    assert [row["variant"] for row in results["rows"]] == ["execute"]
    assert "execute" in done.stdout


def test_doctor_is_content():
    done = call("doctor")
    assert done.exit_code == 0, done.output
    assert "agree with the reference" in done.stdout


def test_version_and_help():
    assert call("--version").stdout.strip() == csfast.__version__
    whole = call("--help").stdout
    assert [whole.index(f" {command} ") for command in app.ORDER] == sorted(
        whole.index(f" {command} ") for command in app.ORDER
    )
    for command in app.ORDER:
        done = call(command, "--help")
        assert done.exit_code == 0 and "--no-" not in done.stdout.replace("--no-feedback", "")
    assert "--no-" not in whole


def test_a_sample_limit_counts_for_every_task(data):
    kept = app.read_documents(data, app.Part.ALL, 2)
    assert [d.group for d in kept] == ["prose", "prose", "math", "math"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("calibrate", "{folder}/nowhere"), "nowhere"),
        (("calibrate", "demo", "--data", "{folder}/missing.jsonl"), "[read]"),
        (("calibrate", "demo", "--data", "{folder}/bad.csv"), "want a name that ends in"),
        (("calibrate", "demo", "--data", "{folder}/broken.jsonl"), "line 1: want a JSON record"),
        (("generate", "demo", "{folder}/missing.plan", "--prompt", "x"), "missing.plan"),
        (("generate", "demo", "{folder}/bad.csv", "--prompt", "x"), "[plan]"),
        (
            ("generate", "demo", "--prompt", "x"),
            "[generate] no plan: want one, --sketch or --dense.",
        ),
        (("generate", "demo", "{plan}", "--prompt", ""), "prompt"),
        (("generate", "demo", "{plan}", "--prompt", "x", "--density", "1.5"), "density"),
        (("generate", "demo", "{plan}", "--prompt", "x", "--density", "0"), "density"),
        (("generate", "demo", "{plan}", "--prompt", "x", "--bits", "4"), "bits"),
        (("generate", "demo", "{plan}", "--prompt", "x", "--task", "chess"), "chess"),
        (("eval", "demo", "{plan}", "--data", "{folder}/missing.jsonl"), "[read]"),
        (("eval", "demo", "{plan}", "--data", "{data}", "--density", "nan"), "density"),
        (("ablate", "{folder}/nowhere", "--data", "{data}"), "nowhere"),
        (("ablate", "demo", "--data", "{data}", "--methods", "magic"), "method 'magic'"),
        (("ablate", "demo", "--data", "{data}", "--bytes", ".5,x"), "--bytes '.5,x'"),
        (("ablate", "demo", "--data", "{data}", "--bytes", "1.5"), "bytes fraction 1.5"),
        (("ablate", "demo", "--data", "{data}", "--resume"), "--resume without --json"),
        (("eval", "demo", "{plan}", "--data", "{one}", "--part", "report"), "no document"),
        (("bench", "sense", "--quick", "--json", "{folder}/no/such/folder.json"), "no/such"),
        (("tokens", "demo", "{plan}", "--data", "{data}", "--density", "2"), "[tokens] density"),
        (("tokens", "demo", "{plan}", "--data", "{data}", "--bits", "4"), "bits"),
        (("tokens", "demo", "{folder}/missing.plan"), "missing.plan"),
        (("phase", "demo", "--data", "{data}", "--resume"), "[phase] --resume without --json"),
        (("phase", "{folder}/nowhere", "--data", "{data}"), "nowhere"),
        (("report", "{folder}/page.html"), "[report] nothing to show"),
        (("report", "{folder}/page.html", "--ablation", "{folder}/none.json"), "none.json"),
        (
            ("report", "{folder}/page.html", "--ablation", "{folder}/broken.jsonl"),
            "[report] broken.jsonl: want a whole JSON file",
        ),
        (
            ("report", "{folder}/page.html", "--phase", "{folder}/other.json"),
            "[report] other.json without 'n_groups': want it.",
        ),
        (
            ("report", "{folder}/no/such/page.html", "--demo", "{folder}/empty.json"),
            "no/such",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, message, plan, data, folder):
    (folder / "bad.csv").write_text("a,b\n" * 100)
    (folder / "broken.jsonl").write_text("{\n")
    (folder / "other.json").write_text('{"rows": []}')
    (folder / "empty.json").write_text("{}")
    # A document that is not in the part that is reported.
    alone = documents.split(
        [Document("prose/made", "", f"{i} {TEXT}") for i in range(20)], "select"
    )[0]
    (folder / "one.jsonl").write_text(json.dumps({"task": alone.task, "text": alone.response}))
    names = {"folder": folder, "plan": plan, "data": data, "one": folder / "one.jsonl"}
    assert message in refused(*(a.format(**names) for a in arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
@pytest.mark.parametrize("command", [("calibrate", "demo"), ("bench",)])
def test_a_missing_device_is_one_line(command):
    assert "cuda" in refused(*command, "--device", "cuda").lower()


def test_wrong_options_are_refused_before_any_work():
    for arguments, message in (
        (("bench", "prefill"), "'prefill' is not one of"),
        (("eval", "demo"), "neither PLAN nor --sketch: want one of them"),
        (("eval", "demo", "p", "--sketch", "s"), "both PLAN and --sketch: want one of them"),
        (("eval", "demo", "p", "--levels", 1), "Invalid value for '--levels': it has no meaning"),
        (("eval", "demo", "p", "--resume"), "Invalid value for '--resume': it has no meaning"),
        (("eval", "demo", "--sketch", "s", "--density", 1), "'--density': it has no meaning"),
        (("eval", "demo", "--sketch", "s", "--retrieval", 1), "'--retrieval': it has no meaning"),
        (("eval", "demo", "--sketch", "s", "--levels", 0), "Invalid value for '--levels'"),
        (("generate", "demo", "p", "--sketch", "s"), "both PLAN and --sketch: want one of them"),
        (("chat", "demo", "p", "--sketch", "s"), "both PLAN and --sketch: want one of them"),
        (("generate", "demo", "--sketch", "s", "--device", "cuda"), "runs on the CPU only"),
        (("chat", "demo", "--sketch", "s", "--device", "cuda"), "runs on the CPU only"),
        (("generate", "demo", "--sketch", "s", "--bits", 3), "'--bits': it has no meaning"),
        (("generate", "demo", "--sketch", "s", "--temperature", 1), "'--temperature': the engine"),
        (("chat", "demo", "--sketch", "s", "--seed", 1), "'--seed': the engine of --sketch takes"),
        (("eval", "demo", "p", "--limit", 0), "Invalid value for '--limit'"),
        (("eval", "demo", "p", "--wrong"), "No such option: --wrong"),
        (("wrong",), "No such command 'wrong'"),
        (("--wrong", "eval"), "No such option: --wrong"),
    ):
        line = refused(*arguments)
        assert message in line and line.endswith(" --help`.")
    assert "Usage" in call().output


def test_debug_shows_where_an_error_came_from(folder):
    done = call("--debug", "calibrate", folder / "nowhere")
    assert isinstance(done.exception, OSError | ValueError)


def test_results_name_no_folders_of_a_machine(monkeypatch):
    given = ["eval", "org/model", "/data/of/someone/a.plan", "--json", "results/a.json"]
    monkeypatch.setattr(sys, "argv", ["csfast", *given])
    want = ["csfast", "eval", "org/model", "a.plan", "--json", "results/a.json"]
    assert app.command() == want


def test_results_are_not_half_written(folder, monkeypatch):
    out = folder / "whole.json"
    out.write_text("before")
    with pytest.raises(ValueError, match="not JSON compliant"):
        app.write_json(out, {"loss": float("nan")})
    assert out.read_text() == "before"
    app.write_json(out, {"loss": 1.0})
    assert json.loads(out.read_text()) == {"loss": 1.0}
    assert not list(folder.glob(".whole.json*"))


@pytest.mark.parametrize("name", ["none/a", ".", "{folder}/circle"])
@pytest.mark.parametrize(
    "command",
    [
        ("calibrate", "nowhere", "--out"),
        ("eval", "nowhere", "no.plan", "--json"),
        ("eval", "nowhere", "no.plan", "--html"),
        ("ablate", "nowhere", "--json"),
        ("ablate", "nowhere", "--html"),
        ("tokens", "nowhere", "no.plan", "--json"),
        ("tokens", "nowhere", "no.plan", "--html"),
        ("phase", "nowhere", "--json"),
        ("phase", "nowhere", "--dictionaries"),
        ("phase", "nowhere", "--html"),
        ("bench", "--json"),
        ("demo", "--out", "{folder}", "--json"),
        ("report",),
    ],
    ids=" ".join,
)
def test_an_output_is_checked_before_anything_else(command, name, folder):
    circle = folder / "circle"
    if not circle.is_symlink():
        circle.symlink_to("circle")
    line = refused(*(word.format(folder=folder) for word in (*command, name)))
    assert line.startswith(f"[write] '{name.format(folder=folder)}'")


def test_outputs_do_not_overwrite_each_other(folder):
    (folder / "other").symlink_to("same")
    outputs = ("--json", folder / "same", "--html", folder / "other")
    assert "is given twice: want a file for each output" in refused("ablate", "nowhere", *outputs)
    assert "nowhere" in refused("ablate", "nowhere", "--json", "/dev/null", "--html", "/dev/null")


@pytest.mark.parametrize(
    "command",
    [
        ("calibrate", "nowhere", "--data", "{read}", "--out", "{link}"),
        ("eval", "nowhere", "{read}", "--json", "{read}"),
        ("eval", "nowhere", "no.plan", "--data", "{read}", "--html", "{link}"),
        ("ablate", "nowhere", "--data", "{read}", "--json", "{read}"),
        ("tokens", "nowhere", "{read}", "--html", "{read}"),
        ("phase", "nowhere", "--data", "{read}", "--dictionaries", "{read}"),
        ("report", "{link}", "--ablation", "{read}"),
        ("report", "{link}", "--sketch", "no.json", "--sketch", "{read}"),
    ],
    ids=" ".join,
)
def test_an_output_does_not_overwrite_what_is_read(command, tmp_path):
    read, link = tmp_path / "read", tmp_path / "link"
    read.write_text("kept")
    link.symlink_to(read)
    line = refused(*(word.format(read=read, link=link) for word in command))
    assert line.endswith("is read by this command: want another file.")
    assert read.read_text() == "kept"


def test_a_folder_for_the_demo_is_no_file(folder):
    (folder / "file").write_text("kept")
    assert refused("demo", "--out", folder / "file").endswith("want a folder.")


@pytest.mark.parametrize(
    "command", [("calibrate", "--out"), ("ablate", "--json"), ("phase", "--json")], ids=" ".join
)
def test_what_an_interrupted_run_left_is_kept(command, folder):
    verb, option = command
    out, left = folder / f"left-{verb}", folder / f"left-{verb}.partial"
    left.write_text("some work")
    given = (verb, folder / "nowhere", option, out)
    line = refused(*given)
    assert f"[{verb}] '{left}' is what an interrupted run left" in line
    assert "--resume" in line and "--overwrite" in line
    assert "want one of them" in refused(*given, "--resume", "--overwrite")
    assert "nowhere" in refused(*given, "--resume") and left.read_text() == "some work"
    assert "nowhere" in refused(*given, "--overwrite") and not left.exists()
    nothing = (verb, folder / "nowhere", option, "/dev/null")
    assert "want the file that the interrupted run" in refused(*nothing, "--resume")


def test_bench_writes_into_a_pipe_once(folder):
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    found = []
    reader = threading.Thread(target=lambda: found.append(json.loads(pipe.read_text())))
    reader.start()
    assert call("bench", "omp", "--quick", "--json", pipe).exit_code == 0
    reader.join(30)
    assert len(found[0]["rows"]) == 3


def test_ctrl_c_ends_calibration_and_it_resumes(folder):
    out = folder / "slow.plan.safetensors"
    partial = pathlib.Path(f"{out}.partial")
    command = [sys.executable, "-m", "csfast", "calibrate", "demo", "--out", str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    try:
        deadline = time.monotonic() + 120
        while not partial.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        assert partial.exists(), process.communicate()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == app.INTERRUPTED, errors
    assert "csfast: interrupted; go on with --resume" in errors and "Traceback" not in errors
    assert not out.exists() and partial.exists()
    done = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert out.exists() and not partial.exists()


def test_ctrl_c_ends_an_ablation_and_leaves_its_rows(data, folder):
    out = folder / "stopped.json"
    partial = pathlib.Path(f"{out}.partial")
    # Training predictors lasts long enough to be interrupted.
    methods = "oracle-neuron,dejavu-384,dejavu-383,dejavu-382,dejavu-381,dejavu-380"
    options = ["--data", str(data), "--tokens", "30", "--methods", methods, "--json", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "csfast", "ablate", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
    )
    try:
        deadline = time.monotonic() + 120
        while not partial.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        assert partial.exists(), process.communicate()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == app.INTERRUPTED, errors
    assert "csfast: interrupted; go on with --resume" in errors and "Traceback" not in errors
    assert not out.exists()
    assert list(json.loads(partial.read_text())["rows"]) == ["oracle-neuron"]


def test_a_reader_that_leaves_is_no_error(plan):
    done = subprocess.run(
        f"{sys.executable} -m csfast generate demo {plan} --prompt 'The old' | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute on an idle machine, many on a busy one
def test_the_demo_does_the_whole_job(tmp_path):
    out = tmp_path / "demo.json"
    done = call("demo", "--out", tmp_path, "--json", out)
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())
    assert set(results) == {
        *("machine", "calibration", "samples", "generation", "evaluation", "bench", "slower"),
        "seconds",
    }
    page = (tmp_path / "csfast-demo.html").read_text()
    verdict = panels.demo_verdict(results)
    assert f'<p class="verdict">{verdict}</p>' in page and results["samples"] in page
    assert verdict in " ".join(done.stdout.split())
    csfast.Plan.load(tmp_path / "csfast-demo.plan.safetensors")
    slow = [row for row in results["bench"] if row["ratio_vs_best"] < 1]
    assert len(results["slower"]) >= len(slow)
    # Samples are chosen by the stated rule: of every task the first text nothing was chosen on.
    shipped = documents.read(models.demo_folder() / "sample.jsonl")
    first = documents.few(documents.split(shipped, "report"), 1)
    assert [row["task"] for row in results["generation"]] == [d.group for d in first]
    for row, document in zip(results["generation"], first, strict=True):
        assert row["prompt"] and (document.prompt or document.response).startswith(row["prompt"])
