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
from csfast.calibration.passes import undisturbed
from csfast.codes import feedback
from csfast.documents import read, split
from csfast.judge import agreement
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


@pytest.fixture
def race(monkeypatch):
    monkeypatch.syspath_prepend(STUDIES)
    yield importlib.import_module("codes")
    for name in ("codes", "code_kinds", "code_rows", "code_study"):
        sys.modules.pop(name, None)


def test_codes_race_by_one_judge_and_the_table_goes_on(race, tmp_path):
    kinds = sys.modules["code_kinds"]
    folder, data, out = tmp_path / "tiny", tmp_path / "valid.jsonl", tmp_path / "codes.json"
    tiny.make_model("llama-tied").save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    lines = [
        {"task": d.task, "prompt": d.prompt, "response": d.response}
        for d in make_documents(10)
        if d.prompt
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def args(only):
        words = [folder, data, "--json", out, "--prompts", 2, "--new-tokens", 4, "--only", only]
        return race.arguments([str(word) for word in words])

    first, _ = race.run(args("dense,trellis 3,rotated GPTQ 3,mix 2.53"))
    others = "head trellis 4 best 64 exact,layers 2+2 0.25,trellis 3 norms scales refitted"
    rows, failed = race.run(args(f"{others},trellis 3,rotated GPTQ 2"))
    assert failed == [] and rows[:4] == json.loads(out.read_text())["rows"][:4] and len(rows) == 8
    by_name = {row["name"]: row for row in rows}
    assert abs(by_name["dense"]["kl"]) < 1e-6 < by_name["trellis 3"]["kl"] < 1e-2
    assert by_name["dense"]["bits"] == dict.fromkeys(("ffn", "attention", "head"), 16) | {
        key: pytest.approx(16.06, abs=1e-3) for key in ("stored", "read")
    }
    assert by_name["rotated GPTQ 3"]["bits"]["attention"] == 3.25
    assert 2 < by_name["layers 2+2 0.25"]["bits"]["read"] < 4.7
    assert [row["relative_error"] is None for row in first] == [True, False, False, False]
    assert any(line.startswith("<= 3.3 bits read: ") for line in race.summary(rows))
    with pytest.raises(SystemExit, match="--only 'other': want names or kinds"):
        race.chosen(args("other"))

    with undisturbed():
        study = race.Study(args("dense"))
        # What the package codes, this codes; what a rule reads all of, or nothing, is uniform.
        package = race.ours(3, 3)(study).weights
        same = race.varied(3, 3)(study).weights
        assert all(torch.allclose(same[n], w, atol=1e-6) for n, w in package.items())
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        for share, uniform in ((0.0, race.varied(3)), (1.0, race.varied(3, 3))):
            want = uniform(study).weights["layers.1.o"]
            made = race.by_channel(3, 3, share)(study)
            study.put("layers.1.o", made.weights["layers.1.o"])
            with made.patch():
                found = study.twins["layers.1.o"].linears[0](x)
            torch.testing.assert_close(found, x @ want.T, atol=1e-5, rtol=1e-4)
            with race.by_neuron(3, None, share)(study).patch():
                found = study.twin.model.layers[1].mlp(x)
            exact = study.model.model.layers[1].mlp(x)
            assert torch.allclose(found, exact, atol=1e-6) == (share == 1.0)
        # One judge: the same figures as csfast eval has of these weights.
        study.restore()
        made = race.gptq(2)(study)
        for name, weight in made.weights.items():
            study.put(name, weight)
        weights = {
            name: parameter
            for name, parameter in study.twin.named_parameters()
            if name.endswith("proj.weight")
        }
        documents = split(read(data), "report")
        tokenizer = tiny.make_tokenizer()
        known, _ = agreement.judge_weights(
            study.model, tokenizer, weights, documents, per_task=2, new_tokens=4, rollouts=0
        )
        found = study.judged()
        assert found["kl"] == pytest.approx(known["kl"], rel=0.01)
        assert found["top1"] == known["top1"] and set(found["tasks"]) == set(known["tasks"])
        # All layers at once round as one layer does.
        (of,) = study.prepared("dealt", kinds=("o",))
        code = kinds.Uniform(3)
        whole = kinds.rounded(of.left, of.factor, code)
        for one, left, factor in zip(whole, of.left, of.factor, strict=True):
            want = feedback.round_columns(
                left,
                factor,
                lambda _, column: code.nearest(column[None])[0],
                begin=lambda _, __, part: code.begin(part.T[:, None]),
            )
            torch.testing.assert_close(one, want, atol=1e-6, rtol=1e-5)
    # E8: 1 + 240 + 2160 points of norms 0, 2, 4, and so on; none of a ball is nearer.
    assert [kinds.ball(bits) for bits in (1, 2)] == [2, 10]
    x = 1.2 * torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    near = kinds.in_ball(x, 2)
    signs = torch.tensor([[1 - 2 * (i >> j & 1) for j in range(8)] for i in range(256)])
    units = torch.cat([torch.eye(8), -torch.eye(8)])
    pairs = (units[:, None] + units).flatten(0, 1)
    points = [torch.zeros(1, 8), signs[signs.prod(1) == 1] / 2]
    points.append(pairs[pairs.square().sum(1) == 2].unique(dim=0))
    every = torch.cat(points)
    assert len(every) == 241
    gap = torch.cdist(near, every).amin(1)
    assert gap.max() < 1e-5
    best = torch.cdist(x, every).amin(1).square().mean()
    assert best <= (near - x).square().sum(1).mean() < 1.05 * best
    # Levels of two bits for normal draws, as Max has them.
    torch.testing.assert_close(
        kinds.normal_levels(2), torch.tensor([-1.510, -0.4528, 0.4528, 1.510]), atol=1e-3, rtol=0
    )
    assert race.interpolated([(2, 1.0), (4, 0.01)], 3) == pytest.approx(0.1)
