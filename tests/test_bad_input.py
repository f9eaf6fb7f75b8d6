"""One table of what may go wrong at the front doors: a typed error that says what was wanted.

The files of plans and models have tables of their own in test_plan.py and test_models.py, the
tensors of the operations in the test of each operation.
"""

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

import csfast
import tiny
from csfast import Document, models
from csfast.plan import Plan

IDS = tiny.make_ids(30, 80)
NAN = float("nan")


@dataclasses.dataclass
class Setting:
    """What a row of the table has at hand."""

    model: object
    plan: Plan
    folder: pathlib.Path
    tokenizer: object

    def calibrate(self, samples=IDS, *, model=None, **options):
        csfast.calibrate(self.model if model is None else model, samples, **options)

    def apply(self, model=None, **options):
        csfast.apply(self.model if model is None else model, self.plan, **options)

    def applied(self):
        self.apply()
        return self.model

    def stream(self, prompt="a", **options):
        options = {"max_new_tokens": 4, **options}
        list(models.stream_text(self.model, self.tokenizer, prompt, **options))

    def documents(self, text, name="a.jsonl"):
        (self.folder / name).write_text(text)
        return csfast.read_documents(self.folder / name)


@pytest.fixture(scope="module")
def plan():
    return csfast.calibrate(tiny.make_model(), IDS, densities=(0.25, 0.5))


@pytest.fixture
def setting(plan, tmp_path):
    return Setting(tiny.make_model(), plan, tmp_path, tiny.make_tokenizer())


def poisoned():
    """A model one of whose layers is fed with infinity."""
    model = tiny.make_model()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[0] = float("inf")
    return model


def flipped(s):
    s.plan.save(s.folder / "a.plan")
    raw = bytearray((s.folder / "a.plan").read_bytes())
    raw[-9] ^= 4
    (s.folder / "a.plan").write_bytes(raw)
    Plan.load(s.folder / "a.plan")


def truncated(s):
    s.plan.save(s.folder / "a.plan")
    os.truncate(s.folder / "a.plan", 1000)
    Plan.load(s.folder / "a.plan")


def resumed_with_other_model(s):
    s.calibrate(resume=s.folder / "a.resume")
    s.calibrate(model=tiny.make_model(seed=1), resume=s.folder / "a.resume")


def changed_weights(s):
    model = s.applied()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
        model(torch.tensor([[1]]))


E, M, P = ValueError, csfast.UnsupportedModelError, csfast.PlanError
LONG = Document("math", "x" * 300, "y")

TABLE = {
    # calibrate
    "no samples": (lambda s: s.calibrate([]), E, r"[calibrate] no samples: want at least one"),
    "empty string": (lambda s: s.calibrate([""]), E, "samples[0]: an empty string; want text"),
    "sample of bytes": (lambda s: s.calibrate([b"x"]), TypeError, "of type bytes: want a string"),
    "text without tokenizer": (lambda s: s.calibrate("x"), E, "and no tokenizer: want one"),
    "ids of int32": (
        lambda s: s.calibrate([IDS[0].int()]),
        TypeError,
        "samples[0]: token ids of torch.int32; want torch.int64",
    ),
    "ids of rank 1": (lambda s: s.calibrate([IDS[0][0]]), E, "shape (80,): want (1, n_tokens)"),
    "two rows of ids": (lambda s: s.calibrate([torch.cat(IDS)]), E, "shape (30, 80): want (1,"),
    "no ids": (lambda s: s.calibrate([IDS[0][:, :0]]), E, "shape (1, 0): want (1, n_tokens)"),
    "ids beyond words": (
        lambda s: s.calibrate([IDS[0] + 200]),
        E,
        "want 0 to 260 exclusive",
    ),
    "ids below 0": (lambda s: s.calibrate([IDS[0] - 300]), E, "token ids from -"),
    "too few tokens": (
        lambda s: s.calibrate([i[:, :40] for i in IDS[:1]]),
        E,
        "task 'text' has 8 positions that would run sparse: want at least 16",
    ),
    "prompt beyond context": (
        lambda s: s.calibrate([LONG], tokenizer=s.tokenizer),
        E,
        "task 'math' has 0 positions",
    ),
    "document without text": (
        lambda s: s.calibrate([Document("math", "x", "")], tokenizer=s.tokenizer),
        E,
        "a document of 'math' without text: want some",
    ),
    "task named pooled": (
        lambda s: s.calibrate([Document("pooled/x", "", "y")], tokenizer=s.tokenizer),
        E,
        "task 'pooled' is taken",
    ),
    "five bits": (lambda s: s.calibrate(bits=(5,)), E, "bits = (5,): want some of 1, 2, 3, 4"),
    "no bits": (lambda s: s.calibrate(bits=()), E, "bits = (): want some of"),
    "bits twice": (lambda s: s.calibrate(bits=(2, 2)), E, "each once"),
    "density above 1": (lambda s: s.calibrate(densities=(0.5, 2.0)), E, "want rising fractions"),
    "density 0": (lambda s: s.calibrate(densities=(0.0, 0.5)), E, "want rising fractions"),
    "density NaN": (lambda s: s.calibrate(densities=(NAN,)), E, "want rising fractions"),
    "densities falling": (lambda s: s.calibrate(densities=(0.5, 0.1)), E, "want rising"),
    "no densities": (lambda s: s.calibrate(densities=()), E, "want rising fractions"),
    "seed below 0": (lambda s: s.calibrate(seed=-1), E, "seed = -1: want a whole number"),
    "no tokens": (lambda s: s.calibrate(max_tokens=0), E, "or raise max_tokens"),
    "infinite activation": (
        lambda s: s.calibrate(model=poisoned()),
        E,
        "[calibrate] input of model.layers.1.mlp: not finite",
    ),
    "calibrate while training": (
        lambda s: s.calibrate(model=tiny.make_model().train()),
        M,
        "call model.eval()",
    ),
    "calibrate when applied": (
        lambda s: s.calibrate(model=s.applied()),
        E,
        "csfast is applied to: call csfast.remove first",
    ),
    "resume of another": (resumed_with_other_model, P, "was begun with another model"),
    "calibrate a string": (
        lambda s: csfast.calibrate("model", IDS),
        TypeError,
        "model of type str: want an nn.Module",
    ),
    # Plan
    "truncated plan": (truncated, P, "want"),
    "flipped bit": (flipped, P, "want data that fit their SHA-256"),
    "no plan file": (lambda s: Plan.load(s.folder / "x"), FileNotFoundError, "No such file"),
    "folder as plan": (lambda s: Plan.load(s.folder), P, "want a regular file"),
    # apply
    "plan of another model": (
        lambda s: s.apply(tiny.make_model(seed=1)),
        P,
        "weights have SHA-256",
    ),
    "plan of another type": (lambda s: s.apply(tiny.make_model("qwen2")), P, "of type 'qwen2'"),
    "plan of another dtype": (
        lambda s: s.apply(tiny.make_model(dtype=torch.bfloat16)),
        P,
        "in bfloat16: this plan wants float32",
    ),
    "density 0 asked": (lambda s: s.apply(density=0.0), E, "density = 0.0: want 0.25 to 1"),
    "density 1.1 asked": (lambda s: s.apply(density=1.1), E, "density = 1.1: want 0.25 to 1"),
    "density NaN asked": (lambda s: s.apply(density=NAN), E, "density = nan: want 0.25 to 1"),
    "bits not calibrated": (lambda s: s.apply(bits=4), E, "bits = 4: want one of 2, 3"),
    "task not calibrated": (lambda s: s.apply(task="x"), E, "task = 'x': want one of pooled, text"),
    "limit": (lambda s: s.apply(limit_bytes=10), csfast.ResourceLimitError, "want at most 10"),
    "applied twice": (lambda s: s.apply(s.applied()), E, "call csfast.remove first"),
    "apply while training": (lambda s: s.apply(s.model.train()), M, "call model.eval()"),
    "apply to compiled": (lambda s: s.apply(torch.compile(s.model)), M, "compile after apply"),
    "changed weights": (changed_weights, csfast.StaleWeightsError, "down_proj was written to"),
    "remove without apply": (lambda s: csfast.remove(s.model), E, "[remove] a model without cs"),
    "stats without apply": (lambda s: csfast.stats(s.model), E, "[stats] a model without csfast"),
    "dense without apply": (
        lambda s: csfast.dense(s.model).__enter__(),
        E,
        "[dense] a model without csfast",
    ),
    "set_density without apply": (
        lambda s: csfast.set_density(s.model, 0.5),
        E,
        "[set_density] a model without csfast",
    ),
    "set_density out of range": (
        lambda s: csfast.set_density(s.applied(), 0.01),
        E,
        "density = 0.01: want 0.25 to 1",
    ),
    # models.load
    "no such model": (
        lambda s: models.load(s.folder / "x"),
        FileNotFoundError,
        "want a model folder, or the name of a model in the local cache",
    ),
    "folder without model": (lambda s: models.load(s.folder), M, "want a model folder with conf"),
    # stream_text
    "empty prompt": (lambda s: s.stream(""), E, "[generate] an empty prompt: want text"),
    "prompt beyond the context": (
        lambda s: s.stream("x" * 300),
        E,
        "a prompt of 301 tokens and 4 new ones: want at most 256 together",
    ),
    "answer beyond the context": (lambda s: s.stream(max_new_tokens=300), E, "want at most 256"),
    "no new tokens": (lambda s: s.stream(max_new_tokens=0), E, "max_new_tokens = 0: want at"),
    "temperature below 0": (lambda s: s.stream(temperature=-1.0), E, "temperature = -1.0: want 0"),
    "temperature NaN": (lambda s: s.stream(temperature=NAN), E, "temperature = nan: want 0"),
    # read_documents
    "no documents": (lambda s: s.documents(""), E, "want at least one record"),
    "not JSON": (lambda s: s.documents("{"), E, "line 1: want a JSON record"),
    "other ending": (lambda s: s.documents("x", "a.csv"), E, "want a name that ends in"),
    "no such file": (
        lambda s: csfast.read_documents(s.folder / "x.txt"),
        FileNotFoundError,
        "want a file of documents",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_refused_by_name(setting, name):
    attempt, error, message = TABLE[name]
    with pytest.raises(error, match=re.escape(message)) as caught:
        attempt(setting)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    "name", [n for n in TABLE if n.startswith(("plan of", "density", "limit"))]
)
def test_refused_apply_leaves_the_model_alone(setting, name):
    before = {n: type(m) for n, m in setting.model.named_modules()}
    with pytest.raises(TABLE[name][1]):
        TABLE[name][0](setting)
    assert {n: type(m) for n, m in setting.model.named_modules()} == before
    assert not any(m._forward_pre_hooks for m in setting.model.modules())


def test_source_folder_without_native_module_says_so(tmp_path):
    """One line about what is missing, before torch is imported."""
    source = pathlib.Path(csfast.__file__).parent
    shutil.copytree(source, tmp_path / "csfast", ignore=shutil.ignore_patterns("_native*", "demo*"))
    done = subprocess.run(
        [sys.executable, "-c", "import csfast"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: [csfast] the native module is not there: want csfast")
