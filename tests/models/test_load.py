"""Loading: what comes in whole, and one clear line for everything that does not."""

import importlib.util
import json
import logging
import pathlib
import shutil
import socket

import huggingface_hub
import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from csfast import calibrate, models
from csfast.types import UnsupportedModelError


@pytest.fixture
def folder(tmp_path):
    tiny.make_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "tiny")
    tiny.make_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_load_gives_back_what_was_saved(folder, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, tokenizer = models.load(folder)
    assert models.fingerprint(model) == models.fingerprint(tiny.make_model(dtype=torch.bfloat16))
    assert not model.training and tokenizer.eos_token_id == 257
    assert models.load(str(folder), dtype=torch.float32)[0].dtype == torch.float32


def _edit(name, change):
    """A change of a JSON file of the model folder."""

    def edit(folder):
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return edit


def _raw(name, change):
    """A change of the bytes of a file of the model folder."""

    def edit(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return edit


def _tensors(change):
    """A change of the weights of the model folder."""

    def edit(folder):
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return edit


def _without(part):
    return _tensors(lambda found: {k: v for k, v in found.items() if part not in k})


def _cast(dtype):
    """Feed-forward weights of another type."""
    return _tensors(lambda f: {k: v.to(dtype) if "mlp" in k else v for k, v in f.items()})


def _rename(name):
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def _shards(index):
    """One shard of two, and an index of both."""

    def edit(folder):
        names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        found = load_file(folder / "model.safetensors")
        _rename(names[0])(folder)
        where = {"metadata": {}, "weight_map": {name: names[".1." in name] for name in found}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(where if index else {}))

    return edit


MARK = b"\xef\xbb\xbf"
CONFIG, TOKENS, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
OWN_CODE = _edit(CONFIG, lambda c: c.update(model_type="x", auto_map={"AutoConfig": "a.B"}))


def _config(**values):
    return _edit(CONFIG, lambda c: c.update(values))


BAD_FOLDERS = {
    "no config": (lambda f: (f / CONFIG).unlink(), "want a model folder with config"),
    "broken config": (_raw(CONFIG, lambda b: b"{"), "want a sound config.json, JSON in UTF-8"),
    "config is a list": (_raw(CONFIG, lambda b: b"[]"), "want a configuration"),
    "config is null": (_raw(CONFIG, lambda b: b"null"), "want a configuration"),
    "config in UTF-16": (
        _raw(CONFIG, lambda b: b.decode().encode("utf-16")),
        "want a sound config.json, JSON in UTF-8",
    ),
    "own code": (OWN_CODE, "without code of its author"),
    "not causal": (_config(model_type="vit", architectures=[]), "want a causal language model"),
    "no type": (_edit(CONFIG, lambda c: c.pop("model_type")), "want a configuration"),
    "no heads": (_config(num_attention_heads=0), "ZeroDivisionError"),
    "heads of text": (_config(num_attention_heads="four"), "want a"),
    "negative size": (_config(hidden_size=-64), "want a whole model folder"),
    "odd activation": (_config(hidden_act="wow"), "want a whole model folder"),
    "odd dtype": (_config(dtype="float99", torch_dtype="float99"), "want a"),
    "another size": (
        _config(hidden_size=128),
        "all tensors in their shapes; 21 missing or other, such as lm_head.weight",
    ),
    "fewer words": (
        _config(vocab_size=100),
        "all tensors .* 2 missing or other, such as lm_head.weight",
    ),
    "more layers": (
        _config(num_hidden_layers=3),
        "all tensors in their shapes; 9 missing or other, such as model.layers.2.input",
    ),
    "fewer layers": (_config(num_hidden_layers=1), "uses all tensors; 9 left out, such as model."),
    "quantised": (
        _config(quantization_config={"quant_method": "gptq"}),
        "want weights that are not quantised",
    ),
    "integers": (_cast(torch.int8), r"not quantised, not model.layers.0.mlp.down_proj.* of I8"),
    "eight bits": (_cast(torch.float8_e4m3fn), "not quantised, not model.* of F8_E4M3"),
    "scales": (
        _tensors(lambda f: {**f, "model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}),
        "uses all tensors; 1 left out, such as model.layers.0.mlp.up_proj.weight_scale",
    ),
    "another bias": (
        _tensors(lambda f: {**f, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
        "uses all tensors; 1 left out",
    ),
    "pickled": (_rename("pytorch_model.bin"), "want weights in .safetensors files"),
    "another name": (_rename("weights.safetensors"), "want a whole model folder"),
    "cut": (_raw(WEIGHTS, lambda b: b[: len(b) // 2]), "want a whole model folder"),
    "cut head": (_raw(WEIGHTS, lambda b: b[:20]), "want a whole model folder"),
    "longer": (_raw(WEIGHTS, lambda b: b + b"junk"), "want a whole model folder"),
    "empty weights": (_raw(WEIGHTS, lambda b: b""), "want a whole model folder"),
    "pointer": (_raw(WEIGHTS, lambda b: b"version https://git-lfs"), "want a whole model folder"),
    "shard missing": (_shards(True), "want a whole model folder .*model-00002-of-00002"),
    "odd index": (_shards(False), "want a whole model folder"),
    "no down_proj": (
        _without("layers.0.mlp.down_proj"),
        "all tensors .* 1 missing or other, such as model.layers.0.mlp.down_proj.weight",
    ),
    "no norms": (_without("norm"), "all tensors in their shapes; 5 missing"),
    "no embedding": (_without("embed"), "all tensors in their shapes; 1 missing"),
    "no head": (_without("lm_head"), "all tensors .* such as lm_head.weight"),
    "no tokenizer": (
        lambda f: [p.unlink() for p in f.glob("tokenizer*")],
        "want a tokenizer beside the weights",
    ),
    "tokenizer gone": (lambda f: (f / TOKENS).unlink(), "want a sound tokenizer"),
    "tokenizer empty": (_raw(TOKENS, lambda b: b"{}"), "want a sound tokenizer"),
    "tokenizer is null": (_raw(TOKENS, lambda b: b"null"), "want a sound tokenizer"),
    "tokenizer cut": (_raw(TOKENS, lambda b: b[: len(b) // 2]), "want a sound tokenizer.json"),
    "tokenizer binary": (_raw(TOKENS, lambda b: bytes(range(256))), "want a sound tokenizer.json"),
    "no words": (_edit(TOKENS, lambda t: t["model"].pop("vocab")), "want a sound tokenizer"),
    "words empty": (_edit(TOKENS, lambda t: t["model"]["vocab"].clear()), "one of 0 tokens beside"),
    "more words": (
        _edit(TOKENS, lambda t: t["model"]["vocab"].update({"a" * n: 200 + n for n in range(99)})),
        "the model's own tokenizer, not one of .* beside an embedding of 260 rows",
    ),
    "settings cut": (_raw("generation_config.json", lambda b: b[:5]), "want a sound generation_co"),
    **{
        f"marked {name}": (
            _raw(name, lambda b: MARK + b),
            f"want {name} without a byte order mark",
        )
        for name in (CONFIG, TOKENS, "tokenizer_config.json", "generation_config.json")
    },
    "marked template": (
        lambda f: (f / "chat_template.jinja").write_bytes(MARK + b"x"),
        "want chat_template.jinja without a byte order mark",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_load_refuses_other_folders(folder, name):
    change, message = BAD_FOLDERS[name]
    change(folder)
    with pytest.raises(UnsupportedModelError, match=message) as refusal:
        models.load(folder)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600


def test_quantised_within_the_model_is_refused(folder):
    config = transformers.Gemma3Config().to_dict()
    config["text_config"]["quantization_config"] = {"quant_method": "gptq"}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="want weights that are not quantised"):
        models.load(folder)


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2-tied", "gemma", "llama-bias", "phi3"])
def test_tied_and_fused_weights_are_not_missing(kind, tmp_path, caplog):
    model = tiny.make_model(kind)
    model.save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    assert models.fingerprint(models.load(tmp_path)[0]) == models.fingerprint(model)
    assert not caplog.messages


def test_tensors_of_no_module_are_left_out_by_name(folder, caplog):
    _tensors(lambda f: {**f, "vision.weight": torch.ones(1)})(folder)
    before = transformers.utils.logging.get_verbosity()
    models.load(folder)
    assert transformers.utils.logging.get_verbosity() == before
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "no use for are left out: 1, such as vision.weight" in caplog.messages[0]


def test_a_language_model_within_a_model_is_run(tmp_path):
    text = {**tiny.SIZES, "head_dim": 16, "pad_token_id": 0}
    eyes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    eyes |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    marks = {"image_token_index": 259, "boi_token_index": 258, "eoi_token_index": 258}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=eyes, mm_tokens_per_image=1, **marks
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = models.load(tmp_path)
    assert models.context_length(model) == 256 and models.vocabulary(model) == 260
    assert len(models.find_ffns(model)) == 2
    assert list(models.stream_text(model, tokenizer, "hi", max_new_tokens=2))
    with pytest.raises(ValueError, match="want at most 256 together"):
        models.stream_text(model, tokenizer, "hi", max_new_tokens=255)
    plan = calibrate(model, ["hello world " * 60], tokenizer, feedback=False)
    assert plan.model == models.fingerprint(model)


def test_load_downloads_nothing():
    message = "or the name of a model in the local cache; `hf download nobody/no-such-model` br"
    with pytest.raises(FileNotFoundError, match=message):
        models.load("nobody/no-such-model")


@pytest.mark.parametrize("name", ["no/such/folder", "./folder", "a..b", "none.gguf/"])
def test_what_is_no_name_is_not_to_be_downloaded(name):
    with pytest.raises(FileNotFoundError, match=r"name of a model in the local cache\.$"):
        models.load(name)


@pytest.fixture
def cache(folder, tmp_path, monkeypatch):
    """The folder as model of a cache, by the name of org/tiny."""
    place = tmp_path / "hub" / "models--org--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots").mkdir()
    folder.rename(place / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return place / "snapshots" / ("0" * 40)


def test_a_name_is_looked_for_in_the_cache(cache):
    found = models.load("org/tiny")[0]
    assert models.fingerprint(found) == models.fingerprint(tiny.make_model(dtype=torch.bfloat16))


def test_what_the_cache_lacks_is_named_with_its_command(cache):
    (cache / WEIGHTS).unlink()
    with pytest.raises(UnsupportedModelError, match="`hf download org/tiny` completes the cache"):
        models.load("org/tiny")


def write_gguf(path, model, *, architecture="llama", code=None):
    """Write a model of the kind llama as a GGUF file, its matrices in a code of few bits."""
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    pytest.importorskip("accelerate", reason="needs accelerate")
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads["q_proj"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = {i: word for word, i in tiny.make_tokenizer().get_vocab().items()} | {
        258: "he",
        259: "ll",
    }
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([words.get(i, f"<{i}>") for i in range(config.vocab_size)])
    writer.add_token_types([1] * 256 + [3] * (config.vocab_size - 256))
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        rows = tensor.float().numpy()
        for part, n in heads.items():
            if part in name:  # rotary halves side by side, as llama.cpp has them
                halves = rows.reshape(n, 2, -1, rows.shape[-1])
                rows = numpy.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        kind = None if code is None or rows.ndim < 2 else gguf.GGMLQuantizationType[code]
        rows = rows if kind is None else gguf.quants.quantize(rows, kind)
        writer.add_tensor(known, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_the_model_that_it_was_made_of(tmp_path):
    made = tiny.make_model()
    model, tokenizer = models.load(write_gguf(tmp_path / "a.gguf", made))
    assert models.fingerprint(model) == models.fingerprint(made)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, made(ids).logits, rtol=0, atol=1e-5)
    assert tokenizer("ab").input_ids == tiny.make_tokenizer()("ab").input_ids
    assert models.end_tokens(model) == {257} and models.context_length(model) == 256


@pytest.mark.parametrize("code", ["Q8_0", "Q4_0"])
def test_codes_of_a_gguf_file_are_unpacked(code, tmp_path):
    made = tiny.make_model()
    path = write_gguf(tmp_path / "a.gguf", made, code=code)
    model, _ = models.load(path)
    assert model.dtype == torch.bfloat16
    assert models.load(path, dtype="float32")[0].dtype == torch.float32
    found, want = (models.find_ffns(m)[1].down.weight.float() for m in (model, made))
    # Half a step of the largest of 32 weights, a step being a 127th or an eighth of it.
    bound = want.abs().max() * {"Q8_0": 1 / 254, "Q4_0": 1 / 8}[code]
    assert 0 < (found - want).abs().max() < bound + want.abs().max() / 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:5000], "want a GGUF file that transformers reads"),
        (lambda raw: raw[:-5000], "want a"),
        (lambda raw: b"junk" * 99, "want a GGUF file"),
        (lambda raw: b"", "want a GGUF file"),
    ],
)
def test_damaged_gguf_files_are_refused(change, message, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", tiny.make_model())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UnsupportedModelError, match=message):
        models.load(path)


def test_gguf_files_of_other_architectures_are_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", tiny.make_model(), architecture="rwkv6")
    with pytest.raises(UnsupportedModelError, match="architecture rwkv6 is not supported"):
        models.load(path)


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_what_reads_gguf_files_is_named_where_it_is_missing(missing, tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    with pytest.raises(UnsupportedModelError, match=f"pip install .*{missing}"):
        models.load(tmp_path / "a.gguf")


def test_a_file_of_another_kind_is_refused(folder):
    with pytest.raises(UnsupportedModelError, match=r"want a model folder, or a \.gguf file"):
        models.load(folder / WEIGHTS)


def test_own_code_is_never_run(folder):
    marker = folder / "was_run"
    (folder / "a.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    OWN_CODE(folder)
    with pytest.raises(UnsupportedModelError):
        models.load(folder)
    assert not marker.exists()


def test_demo_folder_is_in_the_package():
    assert models.demo_folder().parent == pathlib.Path(models.__file__).parents[1]


def test_copies_of_a_folder_are_the_same_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    first, second = (models.load(p)[0] for p in (folder, tmp_path / "copy"))
    assert models.fingerprint(first) == models.fingerprint(second)


def test_missing_device_is_named(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device = 'cuda:0': want cpu"):
        models.load(folder, device="cuda:0")


def test_a_configuration_with_nan_is_refused_by_its_name(tmp_path):
    tiny.make_model().save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": float("nan")}))
    with pytest.raises(UnsupportedModelError, match="rms_norm_eps = NaN"):
        models.load(tmp_path)
