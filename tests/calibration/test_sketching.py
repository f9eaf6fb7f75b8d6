"""Sketches: made, interrupted, written, read, and what is refused."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil

import pytest
import torch

import csfast
from axes import inside
from csfast import sketches
from csfast.calibration import sketching
from tiny import FAMILIES, make_model

# Four levels of four bits left at most .0056 of the logits' deviation, measured over the families;
# a gain or an order of rows that is wrong leaves all of it.
FINE = "4+4+4+4"


def _texts(n=6, length=48, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 250, (1, length), generator=draws) for _ in range(n)]


def _hashes(folder: pathlib.Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@inside(kind=[k for k in FAMILIES if k not in ("llama-tied", "qwen2-tied")])
def test_follows_the_model_of_every_family(kind, tmp_path):
    model = make_model(kind)
    made = csfast.sketch(model, _texts(), out=tmp_path / kind, bits=FINE)
    ids = _texts(1, seed=9)[0]
    with torch.no_grad():
        wanted = model(ids).logits
        coded = make_model(kind, tie_word_embeddings=False)
        coded.load_state_dict(model.state_dict(), strict=False)
        coded.load_state_dict(dict(made.weights(model)), strict=False)
        found = coded(ids).logits
    assert float((found - wanted).std() / wanted.std()) < 1e-2
    bits = made.bits(None)
    assert bits["read"] == bits["stored"] > 16
    assert made.bits(1)["read"] < 0.5 * bits["stored"]


def test_folds_gains_in(tmp_path):
    model = make_model("llama")
    first = csfast.sketch(model, _texts(), out=tmp_path / "a", bits="2")
    block = model.model.layers[0]
    with torch.no_grad():
        for norm, linears in (
            (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj)),
            (block.input_layernorm, (block.self_attn.v_proj,)),
            (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
        ):
            if linears[0] is not block.self_attn.v_proj:
                norm.weight[[3, 17, 40, 63]] *= 64
            for linear in linears:
                linear.weight[:, [3, 17, 40, 63]] /= 64
    second = csfast.sketch(model, _texts(), out=tmp_path / "b", bits="2")
    for name, matrix in first.matrices.items():
        assert torch.equal(matrix.levels[0].codes, second.matrices[name].levels[0].codes), name


@inside(bits=["3+2", "2.5+2"])
def test_goes_on_with_the_same_bytes(bits, tmp_path):
    tmp_path = tmp_path / bits
    tmp_path.mkdir()
    model = make_model("llama")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    csfast.sketch(model, _texts(), out=whole, bits=bits)

    class Stop(Exception):
        pass

    n_steps = 0

    def count(done, total):
        nonlocal n_steps
        n_steps = total

    csfast.sketch(model, _texts(), out=tmp_path / "counted", bits=bits, progress=count)
    for at in (1, n_steps // 3, n_steps // 2, n_steps - 1):

        def stop(done, total, at=at):
            if done == at:
                raise Stop

        with pytest.raises(Stop):
            csfast.sketch(model, _texts(), out=parts, bits=bits, progress=stop, resume=True)
        (parts / ".csfast-0123456789abcdef.tmp").write_bytes(b"of a killed run")
        csfast.sketch(model, _texts(), out=parts, bits=bits, resume=True)
        assert _hashes(parts) == _hashes(whole)
        shutil.rmtree(parts)
    with pytest.raises(csfast.SketchError, match="has a sketch; want resume"):
        csfast.sketch(model, _texts(), out=whole, bits=bits)
    with pytest.raises(csfast.SketchError, match="begun with another model, text or settings"):
        csfast.sketch(model, _texts(), out=whole, bits="3+3", resume=True)


def test_verifies_what_it_reads(tmp_path):
    model = make_model("llama")
    good = tmp_path / "good"
    made = csfast.sketch(model, _texts(), out=good, bits="2")
    read = csfast.Sketch.load(good)
    assert all(
        torch.equal(a.decode(), b.decode())
        for a, b in zip(made.matrices.values(), read.matrices.values(), strict=True)
    )

    def spoiled(change):
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        change(bad)
        return bad

    def flip(name, at):
        def change(folder):
            raw = bytearray((folder / name).read_bytes())
            raw[at] ^= 1
            (folder / name).write_bytes(raw)

        return change

    def edit(**fields):
        def change(folder):
            index = json.loads((folder / "sketch.json").read_text())
            index.update(fields)
            index.pop("sha256")
            (folder / "sketch.json").write_bytes(sketches.index_of(index))

        return change

    def swap(folder):
        (folder / "layer-00000.safetensors").rename(folder / "x")
        (folder / "layer-00001.safetensors").rename(folder / "layer-00000.safetensors")
        (folder / "x").rename(folder / "layer-00001.safetensors")

    matrices = json.loads((good / "sketch.json").read_text())["matrices"]
    matrices["head"]["rows"] += 64
    for change, message in (
        (flip("layer-00000.safetensors", -1), r"layer-00000.safetensors: tensor '.*': want data"),
        (flip("layer-00000.safetensors", 40), "layer-00000.safetensors: header"),
        (flip("sketch.json", 30), "sketch.json: (want|format)"),
        (lambda f: (f / "sketch.json").write_bytes(b"[]"), "want an object"),
        (lambda f: (f / "head.safetensors").write_bytes(b"x"), "head.safetensors: file of 1"),
        (edit(format="csfast-sketch-9"), "format 'csfast-sketch-9'; want"),
        (edit(tables={}), "tables of levels"),
        (edit(matrices=matrices), "tensor 'head.0.codes' is"),
        (swap, "want the file that sketch.json was written with"),
    ):
        with pytest.raises(csfast.SketchError, match=message):
            csfast.Sketch.load(spoiled(change))
    for name, message in (("head.safetensors", "missing"), ("sketch.json", "has no sketch.json")):
        with pytest.raises(FileNotFoundError, match=rf"^\[sketch\] .*{message}"):
            csfast.Sketch.load(spoiled(lambda f, name=name: (f / name).unlink()))
    with pytest.raises(FileNotFoundError, match="want the folder of a sketch"):
        csfast.Sketch.load(good / "sketch.json")
    with pytest.raises(ValueError, match="n_levels = 0: want 1 or more"):
        made.bits(0)
    other = make_model("llama", seed=1)
    with pytest.raises(csfast.SketchError, match="weights are not those"):
        made.check(other)
    with pytest.raises(csfast.SketchError, match="of a llama model: this is a mistral"):
        made.check(make_model("mistral"))


def test_codes_what_is_odd(tmp_path):
    # Widths that are no multiple of 16, a row of zeros, a row of one number, a text of one token.
    model = make_model("llama", hidden_size=40, intermediate_size=50)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[5] = 0
        model.model.layers[0].mlp.down_proj.weight[6] = 0.25
    made = csfast.sketch(model, _texts(1, length=1), out=tmp_path / "a", bits=FINE)
    decoded = dict(made.weights(model))["model.layers.0.mlp.down_proj.weight"]
    assert not decoded[5].any()
    assert float((decoded[6] - 0.25).abs().max()) < 0.01
    # Averages: what matters more has more bits, and no more than asked for is spent.
    average = csfast.sketch(make_model("llama"), _texts(), out=tmp_path / "b", bits=2.5)
    first = [m for m in average.matrices.values() if m.name != "head"]
    size = sum(m.rows * m.cols for m in first)
    assert 2.2 < sum(m.levels[0].bits * m.rows * m.cols for m in first) / size <= 2.5
    assert {m.levels[0].bits for m in first} >= {2, 3} and average.matrices["head"].n_levels == 2
    # Beyond four bits the first level is two codes; what comes after it is a level of its own.
    finer = csfast.sketch(make_model("llama"), _texts(), out=tmp_path / "c", bits="4.5+2,head=4+2")
    first = [m for m in finer.matrices.values() if m.name != "head"]
    assert 4.2 < sum(sum(c.bits for c in m.read(1)) * m.rows * m.cols for m in first) / size <= 4.5
    assert {tuple(c.bits for c in m.levels) for m in first} >= {(4, 2), (4, 1, 2)}
    assert {m.n_levels for m in finer.matrices.values()} == {2}
    assert torch.equal(first[0].decode(2), first[0].decode())


def test_refuses_what_it_cannot_code(tmp_path):
    model = make_model("llama")
    for bits, message in (
        ("5", "want 1 to 4 levels of 1 to 4 bits"),
        ("heads=3", "want 1 to 4 levels"),
        ("ffn=3", "want levels of qkv as well"),
        (1.5, "want an average from 2 to 5"),
        (float("nan"), "want 1 to 4 levels"),
        ("2.5+3+3+3", "want at most 2 levels more"),
        ("2.5,down=3", "want head="),
        ({"head": (3,)}, "want one entry a matrix"),
    ):
        with pytest.raises(ValueError, match=rf"\[sketch\] bits.*{message}"):
            csfast.sketch(model, _texts(), out=tmp_path / "refused", bits=bits)
        assert not (tmp_path / "refused").exists()
    assert sketching.parse_average(" 2.6").bits == 2.6
    assert sketching.parse_average("2.6+3,head=4") == sketching.Average(2.6, (3,), (4,))
    assert sketching.check_bits("3,head=4") == "3,head=4"
    assert sketching.parse_bits("3,down=4+2,head=2")["down"] == (4, 2)
    with pytest.raises(ValueError, match="no samples"):
        csfast.sketch(model, [], out=tmp_path)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"\[sketch\] .*layers.1.self_attn.o_proj.weight: not finite"
    ):
        csfast.sketch(model, _texts(), out=tmp_path / "nan", bits="3")
    quantised = make_model("llama")
    quantised.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(csfast.UnsupportedModelError, match="a model that is quantised"):
        csfast.sketch(quantised, _texts(), out=tmp_path / "q")
    quantised.config.quantization_config = None
    quantised.config.model_type = "opt"
    with pytest.raises(csfast.UnsupportedModelError, match="a model of type 'opt': want one of"):
        csfast.sketch(quantised, _texts(), out=tmp_path / "q")
