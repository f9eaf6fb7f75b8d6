"""The studies that want a GPU: what is run, that it goes on, and the size curve of small models."""

import argparse
import importlib.util
import json
import pathlib
import sys

import pytest
import torch

import tiny
from csfast.bench import head
from texts import make_documents

STUDIES = pathlib.Path(__file__).parents[2] / "bench" / "studies"


def load(name):
    spec = importlib.util.spec_from_file_location(name, STUDIES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def study():
    return load("run_all")


def test_the_largest_model_is_studied_at_its_longest(study, tmp_path):
    for name in ("17m-100m", "120m-12m", "120m-100m", "120m-36m"):
        (tmp_path / name).mkdir()
    args = argparse.Namespace(
        data=pathlib.Path("data"), runs=tmp_path, out=pathlib.Path("out"), tokens=7, commit="abc"
    )
    jobs = {job.name: job for job in study.measurements(args)}
    assert set(jobs) == {
        *("size-curve", "ablate-demo", "ablate-120m", "storage-demo", "storage-120m"),
    }
    for name, job in jobs.items():
        assert str(job.result) == f"out/{name}.json" in job.command
        assert job.command[job.command.index("--tokens") + 1] == "7"
        model = str(tmp_path / "120m-100m")
        assert (model in job.command) == name.endswith("120m")
        assert ("demo" in job.command) == name.endswith("demo")


def test_without_the_largest_model_it_says_so(study, tmp_path):
    (tmp_path / "17m-100m").mkdir()
    with pytest.raises(SystemExit, match="no model of 120m in"):
        study.measurements(argparse.Namespace(runs=tmp_path))


def test_all_sizes_are_trained(study):
    args = argparse.Namespace(
        data=pathlib.Path("data"), out=pathlib.Path("runs"), lengths=[1, 2.5], gpus=2
    )
    jobs = study.training(args)
    assert [job.name for job in jobs] == ["120m", "60m", "17m"]
    for job in jobs:
        assert job.command[-3:] == ("--lengths", "1", "2.5") and "data/train" in job.command


def test_jobs_share_gpus_and_what_is_done_is_not_repeated(study, tmp_path):
    say = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    done = tmp_path / "done.json"
    done.write_text("{}")
    jobs = [
        *(study.Job(f"job{i}", (sys.executable, "-c", say)) for i in range(3)),
        study.Job("bad", (sys.executable, "-c", "raise SystemExit(3)")),
        study.Job("done", (sys.executable, "-c", "raise SystemExit(4)"), done),
    ]
    status = study.run(jobs, tmp_path / "logs", 2, 60)
    assert status == {"job0": 0, "job1": 0, "job2": 0, "bad": 3, "done": 0}
    said = [(tmp_path / "logs" / f"job{i}.log").read_text().strip() for i in range(3)]
    assert said == ["0", "1", "0"]
    assert not (tmp_path / "logs" / "done.log").exists()


def test_a_job_that_takes_too_long_is_interrupted(study, tmp_path):
    wait = "import time\ntry:\n  time.sleep(60)\nexcept KeyboardInterrupt:\n  print('kept')"
    status = study.run([study.Job("long", (sys.executable, "-c", wait))], tmp_path, 1, 3)
    assert status == {"long": None}
    assert (tmp_path / "long.log").read_text().strip() == "kept"


@pytest.fixture
def curve(monkeypatch):
    monkeypatch.syspath_prepend(STUDIES)
    yield load("size_curve")
    for name in ("demo_data", "train_demo"):
        sys.modules.pop(name, None)


def test_the_size_curve_has_every_model_and_goes_on(curve, tmp_path, monkeypatch):
    runs, out = tmp_path / "runs", tmp_path / "curve.json"
    for number, name in enumerate(("17m-1m", "60m-1m")):
        folder = runs / name
        tiny.make_model(seed=number).save_pretrained(folder)
        tiny.make_tokenizer().save_pretrained(folder)
        size = name.partition("-")[0]
        about = {"size": size, "asked": 10**6, "tokens": 10**6, "parameters": 1000 * (number + 1)}
        (folder / "training.json").write_text(json.dumps(about))
    lines = [
        {"task": d.task, "prompt": d.prompt, "response": d.response}
        for d in make_documents(10)
        if d.prompt
    ]
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(curve, "VALID", "valid.jsonl")
    monkeypatch.setattr(curve, "METHODS", ("oracle-neuron", "planes-b2", "rtn-int4"))
    words = ["measure", "--data", tmp_path, "--runs", runs, "--json", out, "--tokens", 20]
    words += ["--densities", 0.25, 0.5, "--device", "cpu"]
    args = curve.arguments([str(word) for word in words])
    curve.measure(argparse.Namespace(**{**vars(args), "only": ["17m-1m"]}))
    first = json.loads(out.read_text())
    out.rename(tmp_path / "curve.json.partial")  # what an interrupted run leaves
    curve.measure(args)
    whole = json.loads(out.read_text())
    assert whole["rows"][: len(first["rows"])] == first["rows"]
    assert [model["size"] for model in whole["models"]] == ["17m", "60m"]
    for size in ("17m", "60m"):
        rows = [row for row in whole["rows"] if row["size"] == size]
        assert [(row["method"], row["density"]) for row in rows][:5] == [
            *(("oracle-neuron", 0.25), ("oracle-neuron", 0.5)),
            *(("planes-b2", 0.25), ("planes-b2", 0.5)),
            ("rtn-int4", None),
        ]
    assert not (tmp_path / "curve.json.partial").exists()


def test_a_size_curve_of_nothing_says_so(curve, tmp_path, monkeypatch):
    (tmp_path / "valid.jsonl").write_text(
        json.dumps({"task": "math/sum", "prompt": "a", "response": "b"}) + "\n"
    )
    monkeypatch.setattr(curve, "VALID", "valid.jsonl")
    (tmp_path / "runs").mkdir()
    words = ["measure", "--data", tmp_path, "--runs", tmp_path / "runs", "--json", tmp_path / "o"]
    with pytest.raises(SystemExit, match="no models in runs"):
        curve.measure(curve.arguments([str(word) for word in words]))


def test_what_is_recorded_says_where_it_comes_from(study, tmp_path, monkeypatch):
    made = head.of(torch.device("cpu"), command=["csfast", "ablate"])
    monkeypatch.setattr(head, "of", lambda device, command: {**made, "command": command})
    path = tmp_path / "storage-120m.json"
    path.write_text(json.dumps({"rows": [{"delta": 1.5}]}))
    study.complete(path, ["python3", str(tmp_path / "storage.py"), "--tokens", "7"], "abc")
    found = json.loads(path.read_text())
    assert head.faults(found) == []
    assert found["command"] == ["python3", "storage.py", "--tokens", "7"]
    assert (found["commit"], found["about"]) == ("abc", "model of 120m")
    path.write_text(json.dumps({**made, "rows": []}))
    study.complete(path, ["other"], "def")  # a head of its own stays
    assert json.loads(path.read_text())["command"] == ["csfast", "ablate"]
