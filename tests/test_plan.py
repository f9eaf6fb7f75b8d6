import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import signal
import struct
import time

import pytest
import safetensors
import torch

import tiny
from axes import inside
from csfast import container, files, models
from csfast import plan as plan_
from csfast.codes import feedback, planes
from csfast.plan import JOINT, LayerPlan, Mode, Plan
from csfast.types import LayerShape, PlanError

D, N_NEURONS, N_LAYERS = 8, 12, 2
CODES = (2, 3, "ternary")
DENSITIES = (0.1, 0.5, 1.0)


def make_codes(bits, draw):
    shape = (N_NEURONS, 2, *planes.row_shape(D, bits))
    return torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)


def make_plan(**changes):
    draw = torch.Generator().manual_seed(0)
    falling = torch.tensor([4.0, 1.0, 0.0]).expand(N_LAYERS, 2, 3)
    modes = [Mode(*s) for s in itertools.product(CODES, (1, 4, 16), (1, *JOINT))]
    values = {
        "model": models.Fingerprint(
            "llama", (LayerShape(D, N_NEURONS),) * N_LAYERS, "bfloat16", "silu", "0a" * 32
        ),
        "bits": CODES,
        "blocks": (1, 4, 16),
        "batches": (1, *JOINT),
        "tasks": ("pooled", "math"),
        "densities": DENSITIES,
        "layers": tuple(
            LayerPlan(
                torch.rand(D, generator=draw) + 0.5,
                {b: torch.rand(N_NEURONS, 2, generator=draw) for b in CODES},
                {b: make_codes(b, draw) for b in CODES},
                {n: torch.randperm(N_NEURONS, generator=draw) for n in (4, 16)},
            )
            for _ in range(N_LAYERS)
        ),
        "thresholds": {s: (1 + CODES.index(s.bits)) * s.block * s.batch * falling for s in modes},
        "n_tokens": {"math": 100},
        "feedback": True,
        "seed": 3,
    }
    return Plan(**{**values, **changes})


@pytest.fixture(scope="module")
def raw():
    return container.pack(*plan_._to_content(make_plan()))


def load(path, raw):
    path.write_bytes(raw)
    return Plan.load(path)


def rewrite(raw, *, fields=None, tensors=None, drop=()):
    """The file with other content and right hashes: damage that only meaning reveals."""
    old_tensors, old_fields = container.unpack(raw)
    content = {**old_tensors, **(tensors or {})}, {**old_fields, **(fields or {})}
    for name in drop:
        for part in content:
            part.pop(name, None)
    return container.pack(*content)


def reheader(raw, change):
    """The file with a changed header, its hash made right again."""
    (n,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + n])
    change(header)
    metadata = header.pop("__metadata__", None)
    if isinstance(metadata, dict):
        metadata.pop("header_sha256", None)
        metadata["header_sha256"] = container._header_hash(header, metadata)
    if metadata is not None:
        header["__metadata__"] = metadata
    text = container.canonical(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + raw[8 + n :]


def test_round_trip_keeps_everything(tmp_path):
    plan = make_plan()
    plan.save(tmp_path / "a.plan")
    found = Plan.load(tmp_path / "a.plan")
    simple = ("model", "bits", "blocks", "batches", "tasks", "densities", "n_tokens", "seed")
    for name in (*simple, "feedback", "modes", "plan_hash"):
        assert getattr(found, name) == getattr(plan, name), name
    assert len(plan.modes) == 3 * 3 * 5
    for mode in plan.modes:
        assert torch.equal(found.thresholds[mode], plan.thresholds[mode])
    for mine, theirs in zip(plan.layers, found.layers, strict=True):
        assert torch.equal(mine.equal, theirs.equal)
        assert all(torch.equal(mine.row_scale[b], theirs.row_scale[b]) for b in plan.bits)
        assert all(torch.equal(mine.codes[b], theirs.codes[b]) for b in plan.bits)
        assert all(torch.equal(mine.order[n], theirs.order[n]) for n in (4, 16))


def test_hash_is_that_of_the_file(tmp_path, raw):
    plan = load(tmp_path / "a.plan", raw)
    plan.save(tmp_path / "b.plan")
    assert (tmp_path / "b.plan").read_bytes() == raw
    assert plan.plan_hash == hashlib.sha256(raw).hexdigest()
    assert make_plan(seed=4).plan_hash != plan.plan_hash


def test_plan_takes_the_bytes_of_its_codes():
    """What a plan costs: codes of two rows a neuron, and little else."""
    plan = make_plan(
        bits=(2,),
        thresholds={s: t for s, t in make_plan().thresholds.items() if s.bits == 2},
        layers=tuple(
            dataclasses.replace(layer, row_scale={2: layer.row_scale[2]}, codes={2: layer.codes[2]})
            for layer in make_plan().layers
        ),
    )
    parts = [part.nbytes for part in container.laid_out(*plan_._to_content(plan))]
    assert parts.count(N_NEURONS * 2 * 32) == N_LAYERS  # one chunk of 128 channels at 2 bits
    fitted = N_LAYERS * (planes.n_bytes(N_NEURONS, D, 2) + 2 * 8 * N_NEURONS)
    assert sum(parts[1:]) == fitted + 3 * 5 * N_LAYERS * 2 * 3 * 4


def test_file_is_plain_safetensors(tmp_path, raw):
    (tmp_path / "a.plan").write_bytes(raw)
    with safetensors.safe_open(tmp_path / "a.plan", "pt") as file:
        assert file.metadata()["format"] == "csfast-plan"
        for name, mode in (
            ("thresholds.b2.block1", (2, 1, 1)),
            ("thresholds.b3.block16.joint8", (3, 16, 8)),
            ("thresholds.bternary.block4", ("ternary", 4, 1)),
        ):
            assert torch.equal(file.get_tensor(name), make_plan().thresholds[mode])
        layer = make_plan().layers[1]
        assert torch.equal(file.get_tensor("layers.1.order.block4"), layer.order[4])
        found = file.get_tensor("layers.1.row_scale.bternary")
        assert torch.equal(found, layer.row_scale["ternary"])
        for b in CODES:
            assert torch.equal(file.get_tensor(f"layers.1.codes.b{b}"), layer.codes[b])


def test_every_truncation_is_refused(tmp_path, raw):
    for n in range(len(raw)):
        with pytest.raises(PlanError):
            container.unpack(raw[:n])
    with pytest.raises(PlanError, match="want"):
        load(tmp_path / "a.plan", raw[: len(raw) // 2])


def test_every_flipped_bit_is_refused(raw):
    (n,) = struct.unpack_from("<Q", raw)
    draw = random.Random(0)
    header = [(byte, bit) for byte in range(8 + n) for bit in (draw.randrange(8),)]
    anywhere = [(draw.randrange(len(raw)), draw.randrange(8)) for _ in range(2000)]
    for byte, bit in [*header, *anywhere]:
        damaged = bytearray(raw)
        damaged[byte] ^= 1 << bit
        with pytest.raises(PlanError):
            container.unpack(bytes(damaged))


def test_added_bytes_are_refused(raw):
    for more in (b"\0", b" ", raw):
        with pytest.raises(PlanError, match="as its header says"):
            container.unpack(raw + more)


NAN, INFINITY = float("nan"), float("inf")
DRAW = torch.Generator().manual_seed(1)


def _with(name, index, value):
    """A change of one number of one tensor."""

    def change(raw):
        tensor = container.unpack(raw)[0][name]
        tensor[index] = value
        return rewrite(raw, tensors={name: tensor})

    return change


def _twice(name):
    """An order that names a neuron twice and so leaves one out."""

    def change(raw):
        order = container.unpack(raw)[0][name]
        order[0] = order[1]
        return rewrite(raw, tensors={name: order})

    return change


def _entry(name, **values):
    return lambda raw: reheader(raw, lambda h: h[name].update(values))


def _fields(**fields):
    return lambda raw: rewrite(raw, fields=fields)


BAD_PLANS = {
    "empty": (lambda raw: b"", "file of 0 bytes: want a header"),
    "seven bytes": (lambda raw: raw[:7], "file of 7 bytes"),
    "zeros": (lambda raw: bytes(64), "header of 0 bytes"),
    "huge header": (lambda raw: struct.pack("<Q", 1 << 62) + raw[8:], "at most 4194304"),
    "large header": (
        lambda raw: struct.pack("<Q", (4 << 20) + 8) + bytes((4 << 20) + 8),
        "at most 4194304",
    ),
    "text": (lambda raw: b"not a plan at all, but long enough to be one", "header of"),
    "deep JSON": (lambda raw: struct.pack("<Q", 80000) + b"[" * 80000, "want JSON"),
    "list header": (lambda raw: struct.pack("<Q", 8) + b"[]      ", "JSON object in its canon"),
    "spaced header": (
        lambda raw: raw.replace(b'","', b'", "', 1),
        "canonical|want JSON",
    ),
    "no metadata": (lambda raw: reheader(raw, lambda h: h.pop("__metadata__")), "want metadata"),
    "number as metadata": (
        lambda raw: reheader(raw, lambda h: h["__metadata__"].update(seed=3)),
        "metadata of strings",
    ),
    "pickled dtype": (
        _entry("layers.0.equal", dtype="O"),
        "dtype = 'O': want one of F32, F64, BF16",
    ),
    "integers": (_entry("layers.0.equal", dtype="I64", shape=[4]), "contiguous float32"),
    "gap": (_entry("layers.0.equal", data_offsets=[4, 36]), "no gaps"),
    "overlap": (_entry("layers.1.equal", data_offsets=[0, 32]), "no gaps"),
    "negative size": (_entry("layers.0.equal", shape=[-8]), "want at most four sizes"),
    "huge size": (_entry("layers.0.equal", shape=[1 << 62]), "want at most four sizes"),
    "product overflow": (_entry("layers.0.equal", shape=[1 << 29] * 4), "no gaps"),
    "true size": (_entry("layers.0.equal", shape=[True]), "want at most four sizes"),
    "extra key": (_entry("layers.0.equal", path="../../x"), "want dtype, shape and data_offsets"),
    "other hash": (
        lambda raw: reheader(
            raw, lambda h: h["__metadata__"].update({"sha256.thresholds.b2.block1": ""})
        ),
        "data that fit their SHA-256",
    ),
    "other format": (_fields(format="gguf"), "format = 'gguf'"),
    "old version": (
        _fields(version="2"),
        "format version '2': this csfast wants '3'; calibrate again",
    ),
    "version without codes": (
        lambda raw: rewrite(
            *(raw,),
            fields={"version": "2"},
            drop=["feedback", *(f"layers.{i}.codes.b{b}" for i in (0, 1) for b in CODES)],
        ),
        "format version '2': this csfast wants '3'; calibrate again",
    ),
    "next version": (_fields(version="4"), "format version '4': this csfast wants '3'"),
    "model type": (_fields(model_type="../x"), "want a model type"),
    "model dtype": (_fields(model_dtype="float64"), "want one of float32, float16, bfloat16"),
    "activation": (
        _fields(model_activation="relu"),
        "model_activation = 'relu': want one of silu, gelu_tanh",
    ),
    "no activation": (
        lambda raw: rewrite(raw, drop=["model_activation"]),
        "model_activation = '': want one of",
    ),
    "model hash": (_fields(model_hash="0A" * 32), "want 64 hexadecimal digits"),
    "shapes": (_fields(shapes="[[8]]"), "want pairs of sizes"),
    "shapes not JSON": (_fields(shapes="[[8"), "shapes: want JSON"),
    "shapes not a list": (_fields(shapes="{}"), "shapes: want a JSON list"),
    "fewer layers": (_fields(shapes="[[8,12]]"), "want exactly those of 1 layers"),
    "other sizes": (_fields(shapes="[[8,12],[8,13]]"), r"row_scale.* want \(13, 2\)"),
    "bits": (_fields(bits='[2,5,"ternary"]'), "bits = 2, 5, ternary: want some of 1, 2, 3, 4, ter"),
    "unhashable bits": (_fields(bits="[[2],3]"), "want some of 1, 2, 3, 4, ternary"),
    "bits falling": (_fields(bits='[3,2,"ternary"]'), "4, ternary, in this order"),
    "ternary first": (_fields(bits='["ternary",2,3]'), "4, ternary, in this order"),
    "ternary twice": (_fields(bits='[2,3,"ternary","ternary"]'), "ternary, in this order"),
    "ternary misspelt": (_fields(bits='[2,3,"Ternary"]'), "want some of 1, 2, 3, 4, ternary"),
    "bits as text": (_fields(bits='["2",3,"ternary"]'), "want some of 1, 2, 3, 4, ternary"),
    "bits as a float": (_fields(bits='[2.0,3,"ternary"]'), "want some of 1, 2, 3, 4, ternary"),
    "bits true": (_fields(bits='[true,3,"ternary"]'), "want some of 1, 2, 3, 4, ternary"),
    "ternary unsaid": (_fields(bits="[2,3]"), "codes.bternary.*: want exactly those"),
    "ternary without thresholds": (
        lambda raw: rewrite(raw, drop=["thresholds.bternary.block16.joint2"]),
        "thresholds.bternary.block16.joint2",
    ),
    "ternary scale": (_with("layers.1.row_scale.bternary", (3, 0), NAN), "want finite numbers"),
    "no bits": (_fields(bits="[]"), "want"),
    "too many bits": (_fields(bits=f"[{'2,' * 128}2]"), "129 bits: want at most 128"),
    "too many blocks": (_fields(blocks=f"[{'4,' * 9999}4]"), "10000 blocks: want at most 128"),
    "too many batches": (_fields(batches=str(list(range(1, 999)))), "998 batches: want at most"),
    "long list": (_fields(blocks=f"[{'0,' * 9999}4]"), r"blocks = 0, [0, ]*\.\.\.: want sizes"),
    "block 0": (_fields(blocks="[0,4,16]"), "blocks = 0, 4, 16: want sizes from 1 on"),
    "block a string": (_fields(blocks='["1",4,16]'), "blocks = 1, 4, 16: want sizes"),
    "block true": (_fields(blocks="[true,4,16]"), "want sizes from 1 on"),
    "blocks not a list": (_fields(blocks="4"), "blocks: want a JSON list"),
    "no blocks": (lambda raw: rewrite(raw, drop=["blocks"]), "blocks: want JSON"),
    "block without its order": (_fields(blocks="[1,4,8,16]"), "layers.0.order.block8"),
    "order of no block": (_fields(blocks="[1,4]"), "block16.*: want exactly those"),
    "blocks falling": (_fields(blocks="[16,4,1]"), "sizes from 1 to 128, rising"),
    "batches": (_fields(batches="[1,2,4,8,17]"), "thresholds.*: want exactly those"),
    "batch 0": (_fields(batches="[0,2,4,8,16]"), "batches = 0, 2, 4, 8, 16: want sizes"),
    "batches without own": (
        lambda raw: rewrite(
            *(raw,),
            fields={"batches": "[2,4,8,16]"},
            drop=[f"thresholds.b{b}.block{n}" for b in CODES for n in (1, 4, 16)],
        ),
        r"batches = \(2, 4, 8, 16\): want \(1,\) or \(1, 2, 4, 8, 16\)",
    ),
    "batches short": (
        lambda raw: rewrite(
            *(raw,),
            fields={"batches": "[1,2,4,8]"},
            drop=[f"thresholds.b{b}.block{n}.joint16" for b in CODES for n in (1, 4, 16)],
        ),
        r"want \(1,\) or \(1, 2, 4, 8, 16\)",
    ),
    "order twice": (_twice("layers.0.order.block4"), "each of the neurons 0 to 11 once"),
    "order out of range": (_with("layers.1.order.block16", 3, 12), "neurons 0 to 11 once"),
    "order negative": (_with("layers.1.order.block16", 3, -1), "neurons 0 to 11 once"),
    "order short": (
        lambda raw: rewrite(raw, tensors={"layers.0.order.block4": torch.arange(11)}),
        r"layers.0.order.block4 of shape \(11,\): want \(12,\)",
    ),
    "order of floats": (
        lambda raw: rewrite(raw, tensors={"layers.0.order.block4": torch.arange(12.0)}),
        "layers.0.order.block4: want a contiguous int64 tensor",
    ),
    "order of a matrix": (
        lambda raw: rewrite(raw, tensors={"layers.0.order.block4": torch.arange(12)[None]}),
        r"of shape \(1, 12\): want \(12,\)",
    ),
    "no pooled": (_fields(tasks='["math","pooled"]'), "'pooled' first"),
    "task twice": (_fields(tasks='["pooled","pooled"]'), "distinct names"),
    "task a list": (_fields(tasks='["pooled",[]]'), "distinct names"),
    "too few tasks": (_fields(tasks='["pooled"]', n_tokens="{}"), r"want \(2, 1, 3\)"),
    "densities falling": (_fields(densities="[0.5,0.1,1.0]"), "rising fractions"),
    "densities short of 1": (_fields(densities="[0.1,0.5,0.9]"), "end at 1"),
    "density NaN": (_fields(densities="[0.1,NaN,1.0]"), "rising fractions"),
    "tokens": (_fields(n_tokens='{"math":-1}'), "want whole numbers"),
    "feedback a number": (_fields(feedback="1"), "feedback: want a JSON bool"),
    "no feedback": (lambda raw: rewrite(raw, drop=["feedback"]), "feedback: want JSON"),
    "seed": (_fields(seed="-1"), r"want 0 to 2\^63"),
    "seed a float": (_fields(seed="1.5"), "want a JSON int"),
    "no seed": (lambda raw: rewrite(raw, drop=["seed"]), "seed: want JSON"),
    "missing tensor": (lambda raw: rewrite(raw, drop=["layers.1.equal"]), "layers.1.equal"),
    "odd tensor": (
        lambda raw: rewrite(raw, tensors={"extra": torch.zeros(1)}),
        "tensor 'extra': want exactly",
    ),
    "equal zero": (_with("layers.0.equal", 3, 0.0), "want positive factors"),
    "equal NaN": (_with("layers.0.equal", 3, NAN), "want finite numbers"),
    "scale infinite": (_with("layers.1.row_scale.b3", (0, 1), INFINITY), "want finite numbers"),
    "scale negative": (_with("layers.1.row_scale.b3", (0, 1), -1.0), "none below 0"),
    "codes missing": (
        lambda raw: rewrite(raw, drop=["layers.1.codes.b3"]),
        "tensor 'layers.1.codes.b3': want exactly those of 2 layers",
    ),
    "codes of a code that is none": (
        lambda raw: rewrite(raw, tensors={"layers.0.codes.b4": make_codes(4, DRAW)}),
        "tensor 'layers.0.codes.b4': want exactly",
    ),
    "codes of another code": (
        lambda raw: rewrite(raw, tensors={"layers.0.codes.b2": make_codes(3, DRAW)}),
        r"layers.0.codes.b2 of shape \(12, 2, 1, 48\): want \(12, 2, 1, 32\)",
    ),
    "codes of too few neurons": (
        lambda raw: rewrite(raw, tensors={"layers.0.codes.b3": make_codes(3, DRAW)[:11]}),
        r"layers.0.codes.b3 of shape \(11, 2, 1, 48\): want \(12, 2, 1, 48\)",
    ),
    "codes of wide rows": (
        lambda raw: rewrite(
            raw,
            tensors={
                "layers.1.codes.bternary": make_codes("ternary", DRAW)
                .expand(-1, -1, 2, -1)
                .contiguous()
            },
        ),
        r"codes.bternary of shape \(12, 2, 2, 16\): want \(12, 2, 1, 16\)",
    ),
    "codes flat": (
        lambda raw: rewrite(raw, tensors={"layers.0.codes.b2": make_codes(2, DRAW).flatten()}),
        r"of shape \(768,\): want \(12, 2, 1, 32\)",
    ),
    "codes of floats": (
        lambda raw: rewrite(raw, tensors={"layers.0.codes.b2": make_codes(2, DRAW).float()}),
        "layers.0.codes.b2: want a contiguous uint8 tensor",
    ),
    "codes shortened": (
        _entry("layers.0.codes.b2", shape=[12, 2, 1, 31]),
        "tensor 'layers.0.codes.b2': want 744 elements at byte",
    ),
    "codes called floats": (
        _entry("layers.0.codes.b2", dtype="F32", shape=[12, 2, 1, 8]),
        "layers.0.codes.b2: want a contiguous uint8 tensor",
    ),
    "codes of another hash": (
        lambda raw: reheader(
            raw, lambda h: h["__metadata__"].update({"sha256.layers.1.codes.b2": "0" * 64})
        ),
        "tensor 'layers.1.codes.b2': want data that fit their SHA-256",
    ),
    "threshold rises": (_with("thresholds.b2.block1", (0, 0, 1), 5.0), "do not rise"),
    "threshold NaN": (_with("thresholds.b2.block4.joint2", (0, 0, 1), NAN), "finite"),
    "threshold at 1": (_with("thresholds.b3.block16", (1, 1, 2), 0.1), "threshold 0 at density 1"),
}


@inside(name=BAD_PLANS)
def test_bad_plan_is_refused_by_name(tmp_path, raw, name):
    change, message = BAD_PLANS[name]
    damaged = change(raw)
    assert damaged != raw
    with pytest.raises(PlanError, match=message):
        load(tmp_path / "bad.plan", damaged)


def test_too_many_tensors_are_refused(monkeypatch, raw):
    monkeypatch.setattr(container, "TENSORS_MAX", 3)
    with pytest.raises(PlanError, match="want at most 3"):
        container.unpack(raw)


def test_large_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "large.plan"
    with path.open("wb") as stream:
        stream.truncate(files.FILE_BYTES_MAX + 1)  # sparse: takes no space
    with pytest.raises(PlanError, match="want at most 68719476736"):
        Plan.load(path)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(PlanError, match="want a regular file"):
            Plan.load(path)
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "none.plan")


def test_failed_save_leaves_the_old_plan_alone(tmp_path, monkeypatch):
    path = tmp_path / "a.plan"
    make_plan().save(path)
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        make_plan(seed=4).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.plan"]


def test_save_replaces_in_one_step(tmp_path):
    path = tmp_path / "a.plan"
    make_plan().save(path)
    make_plan(seed=4).save(path)
    assert Plan.load(path).seed == 4
    assert [p.name for p in tmp_path.iterdir()] == ["a.plan"]


def test_killed_writer_leaves_a_whole_plan(tmp_path):
    path = tmp_path / "a.plan"
    plans = [make_plan(seed=seed) for seed in range(2)]
    hashes = {plan.plan_hash for plan in plans}
    plans[0].save(path)
    draw = random.Random(0)
    for _ in range(30):
        writer = os.fork()
        if writer == 0:
            while True:
                for plan in plans:
                    plan.save(path)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        assert Plan.load(path).plan_hash in hashes


def test_threshold_interpolates_logarithms():
    plan = make_plan()
    assert plan.threshold(0, bits=2, density=0.1) == 4
    assert plan.threshold(0, bits=2, density=0.3) == pytest.approx(2)  # sqrt(4 * 1)
    assert plan.threshold(1, bits=3, density=0.5, task="math") == 2
    assert plan.threshold(1, bits="ternary", density=0.5, task="math") == 3
    assert plan.threshold(0, bits=2, density=0.1, block=16) == 64
    assert plan.threshold(0, bits=2, density=0.75) == 0.5  # towards 0, linear
    assert plan.threshold(0, bits=2, density=1) == 0


def test_threshold_interpolates_between_batches():
    """Linear in the logarithms of both: thresholds here grow with the batch, so they are it."""
    plan = make_plan()
    for batch in range(1, 17):
        assert plan.threshold(0, bits=2, density=0.1, batch=batch) == pytest.approx(4 * batch)
        assert plan.threshold(0, bits=2, density=1, batch=batch) == 0
    one = {s: t.clone() for s, t in plan.thresholds.items()}
    one[2, 1, 2][:, :, 1] = 0  # dead neurons: from a threshold of 0 it is linear
    plan = make_plan(thresholds=one)
    assert plan.threshold(0, bits=2, density=0.5, batch=3) == pytest.approx(4 * math.log2(1.5))


def test_threshold_refuses_joint_batches_it_does_not_hold():
    own = {s: t for s, t in make_plan().thresholds.items() if s.batch == 1}
    plan = make_plan(batches=(1,), thresholds=own)
    assert plan.threshold(0, bits=2, density=0.1) == 4
    with pytest.raises(ValueError, match="batch = 2: want 1 to 1, as far as this plan was"):
        plan.threshold(0, bits=2, density=0.1, batch=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 2}, "layer = 2: want 0 to 1"),
        ({"layer": -1}, "layer = -1"),
        ({"bits": 4}, "bits = 4: want one of 2, 3, ternary"),
        ({"bits": "4"}, "bits = '4': want one of 2, 3, ternary"),
        ({"block": 8}, "block = 8: want one of 1, 4, 16"),
        ({"batch": 17}, "batch = 17: want 1 to 16"),
        ({"batch": 0}, "batch = 0: want 1 to 16"),
        ({"task": "code"}, "task = 'code': want one of pooled, math"),
        ({"density": 0.05}, "density = 0.05: want 0.1 to 1"),
        ({"density": 1.5}, "density = 1.5"),
        ({"density": NAN}, "density = nan"),
    ],
)
def test_threshold_refuses_what_it_does_not_hold(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan().threshold(**{"layer": 0, "bits": 2, "density": 0.5, **arguments})


def test_parts_that_do_not_fit_make_no_plan():
    plan = make_plan()
    with pytest.raises(PlanError, match="1 layers: want 2"):
        dataclasses.replace(plan, layers=plan.layers[:1])


def fingerprint_plan(model):
    """A plan of any content for a model."""
    found = models.fingerprint(model)
    sizes = found.shapes
    layers = tuple(
        LayerPlan(
            torch.ones(s.d),
            {b: torch.ones(s.n_neurons, 2) for b in (2, 3)},
            {
                b: torch.zeros(s.n_neurons, 2, *planes.row_shape(s.d, b), dtype=torch.uint8)
                for b in (2, 3)
            },
        )
        for s in sizes
    )
    thresholds = {Mode(b, 1, 1): torch.zeros(len(sizes), 2, 3) for b in (2, 3)}
    return make_plan(
        model=found, bits=(2, 3), blocks=(1,), batches=(1,), layers=layers, thresholds=thresholds
    )


def test_check_accepts_its_own_model():
    fingerprint_plan(tiny.make_model()).check(tiny.make_model())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "qwen2"}, "of type 'qwen2': this plan wants 'llama'"),
        ({"num_hidden_layers": 3}, "with 3 layers: this plan wants 2"),
        ({"intermediate_size": 96}, "layer 0 has d = 64, n_neurons = 96: this plan wants d = 64,"),
        ({"dtype": torch.bfloat16}, "in bfloat16: this plan wants float32"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "of activation gelu_tanh: this plan wants silu"),
        ({"mlp_bias": True}, "weights have SHA-256"),
        ({"seed": 1}, "weights have SHA-256"),
    ],
)
def test_check_names_what_differs(changes, message):
    plan = fingerprint_plan(tiny.make_model())
    with pytest.raises(PlanError, match=message):
        plan.check(tiny.make_model(**changes))


def test_one_weight_makes_another_model():
    model = tiny.make_model()
    plan = fingerprint_plan(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1
    with pytest.raises(PlanError, match="weights have SHA-256"):
        plan.check(model)


def make_layer(n=96, d=40):
    """Gate, up and down, an equaliser, and the second moment of inputs that hang together."""
    draw = torch.Generator().manual_seed(0)
    gate, up, down_t = (torch.randn(n, d, generator=draw) for _ in range(3))
    x = torch.randn(500, d // 2, generator=draw) @ torch.randn(d // 2, d, generator=draw)
    equal = planes.equalizer(x.square().mean(dim=0))
    return (gate, up, down_t.T, equal), x.double().T @ x.double() / len(x)


@pytest.mark.parametrize("has_feedback", [False, True], ids=["plain", "feedback"])
def test_codes_are_those_of_the_fitted_scales(has_feedback):
    (gate, up, down, equal), moment = make_layer()
    wide = equal.double()
    factor = feedback.spread(moment * wide[:, None] * wide) if has_feedback else None
    layer = LayerPlan.fit(gate, up, down, equal, CODES, moment if has_feedback else None)
    assert torch.equal(layer.equal, equal) and not layer.order
    for bits in CODES:
        scales = [planes.fit_scale(weight, equal, bits) for weight in (gate, up)]
        for r, weight in enumerate((gate, up)):
            wanted = planes.encode(weight, equal, scales[r], bits, factor)
            assert torch.equal(layer.codes[bits][:, r], wanted)
        norm = torch.linalg.vector_norm(down, dim=0)
        folded = torch.stack([scales[0], scales[1] * norm], dim=1)
        assert torch.equal(layer.row_scale[bits], folded)


@pytest.mark.parametrize("bits", CODES)
def test_feedback_lessens_the_error_in_the_metric_of_the_inputs(bits):
    (gate, up, down, equal), moment = make_layer()
    errors = []
    for given in (None, moment):
        layer = LayerPlan.fit(gate, up, down, equal, (bits,), given)
        norm = torch.linalg.vector_norm(down.double(), dim=0)
        for r, (weight, factor) in enumerate(((gate, torch.ones_like(norm)), (up, norm))):
            level = planes.levels_of(planes.unpack(layer.codes[bits][:, r], bits, 40), bits)
            scale = layer.row_scale[bits][:, r].double() / factor
            off = weight.double() - scale[:, None] * level.double() * equal.double()
            errors.append(float(((off @ moment) * off).sum()))
    assert errors[2] < errors[0] and errors[3] < errors[1]


def test_rows_are_fitted_in_parts(monkeypatch):
    """However many at a time; with feedback a product of other rows may be summed otherwise."""
    problem, _ = make_layer()
    whole = LayerPlan.fit(*problem, CODES)
    monkeypatch.setattr(plan_, "_FIT_BYTES", 7 * 4 * 40)
    assert len(plan_._row_slices(96, 40)) == 14
    parts = LayerPlan.fit(*problem, CODES)
    for bits in CODES:
        assert torch.equal(whole.codes[bits], parts.codes[bits])
        assert torch.equal(whole.row_scale[bits], parts.row_scale[bits])


def test_codes_of_blocks_are_the_rows_in_their_order():
    problem, moment = make_layer()
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    layer = dataclasses.replace(LayerPlan.fit(*problem, CODES, moment), order={16: order})
    for bits in CODES:
        assert torch.equal(layer.sensor(bits=bits).codes, layer.codes[bits])
        found = layer.sensor(bits=bits, block=16).codes
        assert torch.equal(found, layer.codes[bits][order]) and found.is_contiguous()


def test_neuron_that_writes_nothing_is_coded():
    gate, up, down = torch.ones(4, 8), torch.ones(4, 8), torch.zeros(8, 4)
    layer = LayerPlan.fit(gate, up, down, torch.ones(8), (2,))
    assert layer.row_scale[2][:, 1].eq(0).all()
    assert layer.codes[2].shape == (4, 2, 1, 32)
    assert torch.equal(layer.codes[2][:, 0], layer.codes[2][:, 1])


@pytest.mark.parametrize("bits", CODES)
def test_inputs_that_were_always_zero_give_plain_codes(bits):
    problem, moment = make_layer()
    plain, fed = (LayerPlan.fit(*problem, (bits,), m) for m in (None, torch.zeros_like(moment)))
    assert torch.equal(plain.codes[bits], fed.codes[bits])


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (torch.zeros(40), r"\[fit\] moment of shape \(40,\): want \(40, 40\)\."),
        (torch.full((40, 40), NAN).double(), r"\[feedback\] moment: not finite; want finite"),
    ],
)
def test_moments_that_are_none_are_refused(moment, message):
    with pytest.raises(ValueError, match=message):
        LayerPlan.fit(*make_layer()[0], (2,), moment)
