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
from csfast import Document, container, models
from csfast.cli import app
from csfast.judge import ablate, evaluate
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

    def applied(self, **options):
        self.apply(**options)
        return self.model

    def threshold(self, **options):
        self.plan.threshold(**{"layer": 0, "bits": 2, "density": 0.5, **options})

    def vote(self, votes):
        csfast.set_votes(self.applied(joint=True), votes)

    def evaluate(self, documents=None, *, model=None, **options):
        model = self.model if model is None else model
        documents = TEXTS if documents is None else documents
        evaluate.evaluate(model, self.tokenizer, self.plan, documents, **options)

    def ablate(self, select=None, report=None, **options):
        select, report = TEXTS[:2] if select is None else select, report or TEXTS[2:]
        ablate.ablate(self.model, self.tokenizer, select, report, **options)

    def command(self, *arguments):
        """The command line, with the error itself in place of its one line."""
        names = {"folder": self.folder, "plan": self.folder / "cli.plan"}
        self.plan.save(names["plan"])
        app.app(["--debug", *(a.format(**names) for a in arguments)], standalone_mode=False)

    def stream(self, prompt="a", **options):
        options = {"max_new_tokens": 4, **options}
        list(models.stream_text(self.model, self.tokenizer, prompt, **options))

    def documents(self, text, name="a.jsonl"):
        (self.folder / name).write_text(text)
        return csfast.read_documents(self.folder / name)


@pytest.fixture(scope="module")
def plan():
    model = tiny.make_model()
    return csfast.calibrate(model, IDS, blocks=(1, 16), joint=True, densities=(0.25, 0.5))


@pytest.fixture
def setting(plan, tmp_path):
    return Setting(tiny.make_model(), plan, tmp_path, tiny.make_tokenizer())


def poisoned():
    """A model one of whose layers is fed with infinity."""
    model = tiny.make_model()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[0] = float("inf")
    return model


def without_joint(s):
    plan = csfast.calibrate(s.model, IDS, densities=(0.25, 0.5))
    csfast.apply(s.model, plan, joint=True)


def not_finite(s):
    with torch.no_grad():
        s.model.model.layers[1].mlp.down_proj.weight[3, 5] = NAN
    s.calibrate()


def old_plan(s):
    s.plan.save(s.folder / "a.plan")
    tensors, fields = container.unpack((s.folder / "a.plan").read_bytes())
    (s.folder / "a.plan").write_bytes(container.pack(tensors, {**fields, "version": "2"}))
    Plan.load(s.folder / "a.plan")


def other_bytes(s, raw):
    (s.folder / "a.plan").write_bytes(raw)
    Plan.load(s.folder / "a.plan")


def voted_for_two(s):
    s.vote([True, False])
    with torch.no_grad():
        s.model(torch.tensor([[1]] * 3))


def without_end(s):
    s.model.generation_config.eos_token_id = None
    csfast.unfinished_votes(s.applied(joint=True)).__enter__()


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
TEXTS = [Document("prose", "", f"{i} once upon a time there was a sailor " * 4) for i in range(4)]

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
        "task 'pooled': want up to 64 printable characters, the first a letter, digit or _",
    ),
    "five bits": (
        lambda s: s.calibrate(bits=(5,)),
        E,
        'bits = (5,): want some of 1, 2, 3, 4 and "ternary"',
    ),
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
    "samples of None": (lambda s: s.calibrate(None), TypeError, "samples = None: want a seque"),
    "sample of a list": (lambda s: s.calibrate([[1, 2]]), TypeError, "samples[0] of type list"),
    "ids of float32": (
        lambda s: s.calibrate([IDS[0].float()]),
        TypeError,
        "token ids of torch.float32; want torch.int64",
    ),
    "ids of rank 3": (lambda s: s.calibrate([IDS[0][None]]), E, "shape (1, 1, 80): want (1, n_t"),
    "task without a name": (
        lambda s: s.calibrate([Document("", "", "y")], tokenizer=s.tokenizer),
        E,
        "samples[0]: task '': want up to 64 printable characters, the first a letter",
    ),
    "task that begins with a blank": (
        lambda s: s.calibrate([Document(" b", "", "y")], tokenizer=s.tokenizer),
        E,
        "task ' b': want up to 64 printable characters, the first a letter",
    ),
    "bits a number": (lambda s: s.calibrate(bits=2), TypeError, "bits = 2: want a sequence"),
    "bits a string": (lambda s: s.calibrate(bits="2"), TypeError, "bits = '2': want a sequence"),
    "bits a float": (lambda s: s.calibrate(bits=(2.0,)), E, "bits = (2.0,): want some of 1, 2"),
    "trits": (
        lambda s: s.calibrate(bits=("trits",)),
        E,
        "bits = ('trits',): want some of 1, 2, 3, 4 and \"ternary\", each once",
    ),
    "ternary twice": (lambda s: s.calibrate(bits=("ternary",) * 2), E, "each once"),
    "ternary not calibrated": (
        lambda s: s.apply(bits="ternary"),
        E,
        "bits = 'ternary': want one of 2, 3",
    ),
    "command for no code": (
        lambda s: s.command("generate", "demo", "{plan}", "--prompt", "x", "--bits", "trits"),
        P,
        "this plan wants 2",
    ),
    "command for strange blocks": (
        lambda s: s.command("calibrate", "demo", "--blocks", "1,x"),
        E,
        "[calibrate] blocks = 'x': want whole numbers, such as 1,16",
    ),
    "command for strange bits": (
        lambda s: s.command("calibrate", "demo", "--bits", "2,x"),
        E,
        "[calibrate] bits = (2, 'x'): want some of",
    ),
    "bits nested": (lambda s: s.calibrate(bits=([2],)), E, "bits = ([2],): want some of 1, 2"),
    "no blocks": (lambda s: s.calibrate(blocks=()), E, "blocks = (): want sizes from 1 to 128"),
    "block 0": (lambda s: s.calibrate(blocks=(0, 4)), E, "blocks = (0, 4): want sizes from 1"),
    "block 129": (lambda s: s.calibrate(blocks=(129,)), E, "blocks = (129,): want sizes from 1"),
    "block twice": (lambda s: s.calibrate(blocks=(4, 4)), E, "from 1 to 128, each once"),
    "block a float": (lambda s: s.calibrate(blocks=(4.0,)), E, "blocks = (4.0,): want sizes"),
    "block a truth": (lambda s: s.calibrate(blocks=(True, 4)), E, "blocks = (True, 4): want s"),
    "blocks a number": (lambda s: s.calibrate(blocks=16), TypeError, "blocks = 16: want a seq"),
    "joint a string": (
        lambda s: s.calibrate(joint="yes"),
        TypeError,
        "[calibrate] joint = 'yes': want True or False",
    ),
    "feedback a number": (
        lambda s: s.calibrate(feedback=1),
        TypeError,
        "[calibrate] feedback = 1: want True or False",
    ),
    "densities a number": (lambda s: s.calibrate(densities=0.5), TypeError, "densities = 0.5: wa"),
    "density a string": (lambda s: s.calibrate(densities=("a",)), TypeError, "want numbers"),
    "density infinite": (lambda s: s.calibrate(densities=(float("inf"),)), E, "want rising frac"),
    "seed a float": (lambda s: s.calibrate(seed=1.5), E, "seed = 1.5: want a whole number"),
    "seed too large": (lambda s: s.calibrate(seed=2**63), E, "want a whole number from 0 to 2^63"),
    "tokens below 0": (lambda s: s.calibrate(max_tokens=-1), E, "or raise max_tokens"),
    "tokens a string": (
        lambda s: s.calibrate(max_tokens="many"),
        TypeError,
        "max_tokens = 'many': want a whole number",
    ),
    "weight not finite": (not_finite, E, "weights of model.layers.1.mlp: want them finite"),
    "calibrate None": (
        lambda s: csfast.calibrate(None, IDS),
        TypeError,
        "model of type NoneType: want an nn.Module",
    ),
    "calibrate a layer": (
        lambda s: s.calibrate(model=torch.nn.Linear(3, 4).eval()),
        M,
        "Linear: want layers with gate_proj, up_proj and down_proj",
    ),
    "resume a folder": (lambda s: s.calibrate(resume=s.folder), P, "want a regular file"),
    "resume in no folder": (
        lambda s: s.calibrate(resume=s.folder / "none" / "a.resume"),
        FileNotFoundError,
        "none': want one that is there",
    ),
    # Plan
    "truncated plan": (truncated, P, "want"),
    "flipped bit": (flipped, P, "want data that fit their SHA-256"),
    "no plan file": (lambda s: Plan.load(s.folder / "x"), FileNotFoundError, "no such file"),
    "folder as plan": (lambda s: Plan.load(s.folder), P, "want a regular file"),
    "plan of text": (lambda s: other_bytes(s, b"a plan, perhaps?"), P, "[plan] header of"),
    "empty plan": (lambda s: other_bytes(s, b""), P, "file of 0 bytes: want a header"),
    "plan of the last version": (old_plan, P, "version '2': this csfast wants '3'; calibrate ag"),
    "plan saved nowhere": (
        lambda s: s.plan.save(s.folder / "none" / "a.plan"),
        FileNotFoundError,
        "/none': want one that is there",
    ),
    "plan saved over a folder": (
        lambda s: s.plan.save(s.folder),
        IsADirectoryError,
        "a folder; want a file",
    ),
    "threshold of no layer": (lambda s: s.threshold(layer=2), E, "layer = 2: want 0 to 1"),
    "threshold of layer -1": (lambda s: s.threshold(layer=-1), E, "layer = -1: want 0 to 1"),
    "threshold of a name": (
        lambda s: s.threshold(layer="mlp"),
        TypeError,
        "[threshold] layer = 'mlp': want a number",
    ),
    "threshold of bits": (lambda s: s.threshold(bits=1), E, "bits = 1: want one of 2, 3"),
    "threshold of text": (lambda s: s.threshold(bits="2"), E, "bits = '2': want one of 2, 3"),
    "threshold of block": (lambda s: s.threshold(block=4), E, "block = 4: want one of 1, 16"),
    "threshold of batch 0": (lambda s: s.threshold(batch=0), E, "batch = 0: want 1 to 16"),
    "threshold of batch 17": (lambda s: s.threshold(batch=17), E, "batch = 17: want 1 to 16"),
    "threshold of task": (lambda s: s.threshold(task="x"), E, "task = 'x': want one of pooled"),
    "threshold of density": (lambda s: s.threshold(density=0.1), E, "want 0.25 to 1, as far as"),
    "check a string": (
        lambda s: s.plan.check("model"),
        TypeError,
        "model of type str: want an nn.Module",
    ),
    "check another width": (
        lambda s: s.plan.check(tiny.make_model(intermediate_size=96)),
        P,
        "layer 0 has d = 64, n_neurons = 96: this plan wants d = 64, n_neurons = 160",
    ),
    "check another activation": (
        lambda s: s.plan.check(tiny.make_model(hidden_act="gelu_pytorch_tanh")),
        P,
        "of activation gelu_tanh: this plan wants silu",
    ),
    "check with biases": (
        lambda s: s.plan.check(tiny.make_model(mlp_bias=True)),
        P,
        "feed-forward weights have SHA-256",
    ),
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
    "block not calibrated": (lambda s: s.apply(block=8), E, "block = 8: want one of 1, 16"),
    "joint not calibrated": (
        without_joint,
        E,
        "[apply] joint = True: want a plan calibrated with joint = True",
    ),
    "joint of 1": (lambda s: s.apply(joint=1), TypeError, "[apply] joint = 1: want True or False"),
    "density asked as text": (
        lambda s: s.apply(density="half"),
        TypeError,
        "density = 'half': want a number",
    ),
    "bits asked as text": (lambda s: s.apply(bits="2"), E, "bits = '2': want one of 2, 3"),
    "plan as a path": (
        lambda s: csfast.apply(s.model, "a.plan"),
        TypeError,
        "[apply] plan of type str: want a csfast.Plan",
    ),
    "apply to a string": (
        lambda s: csfast.apply("model", s.plan),
        TypeError,
        "model of type str: want an nn.Module",
    ),
    "limit as text": (
        lambda s: s.apply(limit_bytes="1 GB"),
        TypeError,
        "limit_bytes = '1 GB': want a whole number",
    ),
    "limit below 0": (
        lambda s: s.apply(limit_bytes=-1),
        csfast.ResourceLimitError,
        "copies of weights and workspace: want at most -1",
    ),
    "limit": (lambda s: s.apply(limit_bytes=10), csfast.ResourceLimitError, "want at most 10"),
    "applied twice": (lambda s: s.apply(s.applied()), E, "call csfast.remove first"),
    "apply while training": (lambda s: s.apply(s.model.train()), M, "call model.eval()"),
    "apply to compiled": (lambda s: s.apply(torch.compile(s.model)), M, "compile after apply"),
    "changed weights": (changed_weights, csfast.StaleWeightsError, "down_proj was written to"),
    "apply in float64": (lambda s: s.apply(s.model.double()), M, "a weight of torch.float64"),
    "apply with ReLU": (
        lambda s: s.apply(tiny.make_model(hidden_act="relu")),
        M,
        "model.layers.0.mlp.act_fn: ReLU(): want SiLU or GELU approximated by tanh",
    ),
    "needed bytes of five bits": (
        lambda s: csfast.needed_bytes(s.model, bits=5),
        E,
        '[needed_bytes] bits = 5: want 1, 2, 3, 4 or "ternary"',
    ),
    "needed bytes of block 0": (
        lambda s: csfast.needed_bytes(s.model, block=0),
        E,
        "[needed_bytes] block = 0: want 1 to 128",
    ),
    "needed bytes of half a block": (
        lambda s: csfast.needed_bytes(s.model, block=0.5),
        E,
        "[needed_bytes] block = 0.5: want 1 to 128",
    ),
    "needed bytes of a string": (
        lambda s: csfast.needed_bytes("model"),
        TypeError,
        "model of type str: want an nn.Module",
    ),
    "remove from a string": (
        lambda s: csfast.remove("model"),
        TypeError,
        "[remove] model of type str: want an nn.Module",
    ),
    "removed twice": (
        lambda s: [csfast.remove(s.applied()), csfast.remove(s.model)],
        E,
        "[remove] a model without csfast",
    ),
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
    "set_density NaN": (
        lambda s: csfast.set_density(s.applied(), NAN),
        E,
        "density = nan: want 0.25 to 1",
    ),
    "set_density as text": (
        lambda s: csfast.set_density(s.applied(), "half"),
        TypeError,
        "density = 'half': want a number",
    ),
    "set_density of no task": (
        lambda s: csfast.set_density(s.applied(), 0.5, "x"),
        E,
        "task = 'x': want one of pooled, text",
    ),
    # set_votes
    "votes without apply": (
        lambda s: csfast.set_votes(s.model, [True]),
        E,
        "[set_votes] a model without csfast",
    ),
    "votes for own supports": (
        lambda s: csfast.set_votes(s.applied(), [True]),
        E,
        "[set_votes] a model with joint = False: want apply(..., joint=True)",
    ),
    "no votes at all": (lambda s: s.vote([]), E, "votes of shape (0,): want (n,), n from 1 to 16"),
    "seventeen votes": (lambda s: s.vote([True] * 17), E, "votes of shape (17,): want (n,)"),
    "votes of two axes": (
        lambda s: s.vote(torch.ones(2, 2, dtype=torch.bool)),
        E,
        "votes of shape (2, 2): want (n,)",
    ),
    "votes of whole numbers": (lambda s: s.vote([1, 0]), TypeError, "votes = [1, 0]: want bool"),
    "votes of a string": (lambda s: s.vote("yes"), TypeError, "votes = 'yes': want booleans"),
    "votes of one truth": (lambda s: s.vote(True), TypeError, "votes = True: want booleans"),
    "votes of float32": (
        lambda s: s.vote(torch.ones(2)),
        TypeError,
        "[set_votes] votes of torch.float32: want torch.bool",
    ),
    "votes elsewhere": (
        lambda s: s.vote(torch.ones(2, dtype=torch.bool, device="meta")),
        E,
        "votes on meta: want cpu or cpu",
    ),
    "votes of another batch": (
        voted_for_two,
        E,
        "[ffn] a batch of 3 sequences and 2 votes: want one for each",
    ),
    "unfinished of own supports": (
        lambda s: csfast.unfinished_votes(s.applied()).__enter__(),
        E,
        "[set_votes] a model with joint = False",
    ),
    "unfinished without end": (
        without_end,
        E,
        "[unfinished_votes] a model without eos_token_id: want one given",
    ),
    # models.load
    "no such model": (
        lambda s: models.load(s.folder / "x"),
        FileNotFoundError,
        "want a model folder, a GGUF file, or the name of a model in the local cache",
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
    "temperature infinite": (
        lambda s: s.stream(temperature=float("inf")),
        E,
        "temperature = inf: want 0",
    ),
    "temperature as text": (
        lambda s: s.stream(temperature="hot"),
        TypeError,
        "temperature = 'hot': want a number",
    ),
    "prompt of bytes": (lambda s: s.stream(b"a"), TypeError, "prompt of type bytes: want text"),
    "half a token": (
        lambda s: s.stream(max_new_tokens=0.5),
        TypeError,
        "max_new_tokens = 0.5: want a whole number",
    ),
    "seed of a stream": (lambda s: s.stream(seed="x"), TypeError, "seed = 'x': want a whole nu"),
    # evaluate and ablate
    "evaluate at density 0": (lambda s: s.evaluate(density=0.0), E, "density = 0.0: want one in"),
    "evaluate at NaN": (lambda s: s.evaluate(density=NAN), E, "density = nan: want one in (0, 1]"),
    "evaluate nothing": (lambda s: s.evaluate([]), E, "[evaluate] 0 documents: want at least one"),
    "evaluate one token": (lambda s: s.evaluate(tokens=1), E, "tokens = 1: want at least 2"),
    "evaluate short responses": (
        lambda s: s.evaluate(response_tokens=1),
        E,
        "response_tokens = 1: want at least 2",
    ),
    "evaluate seed -1": (lambda s: s.evaluate(seed=-1), E, "seed = -1: want 0 or more"),
    "evaluate another model": (
        lambda s: s.evaluate(model=tiny.make_model(seed=1)),
        P,
        "weights have SHA-256",
    ),
    "evaluate another task": (
        lambda s: s.evaluate([Document("chess\n", "", "e4 e5 " * 20)]),
        E,
        "[evaluate] task 'chess\\n': want up to 64 printable characters",
    ),
    "evaluate short texts": (
        lambda s: s.evaluate([Document("prose", "", "x")]),
        E,
        "want at least one with two tokens after its dense part",
    ),
    "evaluate bits not calibrated": (
        lambda s: s.evaluate(bits=4, retrieval_prompts=0, answers=0),
        E,
        "bits = 4: want one of 2, 3",
    ),
    "ablate an unknown rule": (
        lambda s: s.ablate(methods=["magic"]),
        E,
        "[ablate] method 'magic': want one of",
    ),
    "ablate a rule twice": (
        lambda s: s.ablate(methods=["teal", "teal"]),
        E,
        "[ablate] method 'teal' is named twice",
    ),
    "ablate at no bytes": (
        lambda s: s.ablate(bytes_fractions=(0.0,)),
        E,
        "[ablate] bytes fraction 0.0: want one in (0, 1]",
    ),
    "ablate at too many bytes": (
        lambda s: s.ablate(bytes_fractions=(2.0,)),
        E,
        "[ablate] bytes fraction 2.0: want one in (0, 1]",
    ),
    "ablate one part": (
        lambda s: s.ablate(TEXTS, TEXTS, methods=["teal"]),
        E,
        "4 documents in both parts: want disjoint parts",
    ),
    # read_documents
    "no documents": (lambda s: s.documents(""), E, "want at least one record"),
    "not JSON": (lambda s: s.documents("{"), E, "line 1: want a JSON record"),
    "record of a list": (lambda s: s.documents("[1]"), E, "want a JSON object, not list"),
    "record of a numbered task": (
        lambda s: s.documents('{"task": 1, "text": "x"}'),
        E,
        "task = '1': want 'group' or 'group/name'",
    ),
    "record of a strange task": (
        lambda s: s.documents('{"task": "[A] B", "text": "x"}'),
        E,
        "task = '[A] B': want 'group' or 'group/name'",
    ),
    "record without response": (
        lambda s: s.documents('{"task": "math", "prompt": "x"}'),
        E,
        "response: want a string that is not empty",
    ),
    "record with an empty prompt": (
        lambda s: s.documents('{"task": "math", "prompt": "", "response": "y"}'),
        E,
        "prompt: want a string that is not empty",
    ),
    "answer a number": (
        lambda s: s.documents('{"task": "a", "prompt": "x", "response": "y", "answer": 3}'),
        E,
        "answer: want a string, not int",
    ),
    "second line broken": (
        lambda s: s.documents('{"task": "math", "text": "x"}\n{"task'),
        E,
        "a.jsonl, line 2: want a JSON record",
    ),
    "not xz": (lambda s: s.documents("x", "a.jsonl.xz"), E, "a.jsonl.xz: want a whole xz file"),
    "empty text": (lambda s: s.documents(" ", "a.txt"), E, "a.txt: want text, the file is empty"),
    "folder as documents": (
        lambda s: csfast.read_documents(s.folder),
        FileNotFoundError,
        "want a file of documents",
    ),
    "other ending": (lambda s: s.documents("x", "a.csv"), E, "want a name that ends in"),
    "no such file": (
        lambda s: csfast.read_documents(s.folder / "x.txt"),
        FileNotFoundError,
        "want a file of documents",
    ),
    # the command line
    "command for no model": (
        lambda s: s.command("calibrate", "{folder}/none"),
        FileNotFoundError,
        "[load] '",
    ),
    "command for no plan": (
        lambda s: s.command("generate", "demo", "{folder}/none.plan", "--prompt", "x"),
        FileNotFoundError,
        "no such file",
    ),
    "command without plan": (
        lambda s: s.command("generate", "demo", "--prompt", "x"),
        E,
        "[generate] no plan: want one, --sketch or --dense",
    ),
    "command with another plan": (
        lambda s: s.command("generate", "demo", "{plan}", "--prompt", "x"),
        P,
        "with 6 layers: this plan wants 2",
    ),
    "command for no data": (
        lambda s: s.command("eval", "demo", "{plan}", "--data", "{folder}/none.jsonl"),
        FileNotFoundError,
        "want a file of documents",
    ),
}


def test_the_table_is_long_enough():
    assert len(TABLE) >= 100


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
