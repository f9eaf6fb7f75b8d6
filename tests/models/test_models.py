import pytest
import torch
import transformers
from torch import nn

import tiny
from axes import DTYPES, inside
from csfast import models
from csfast.types import LayerShape, UnsupportedModelError

FIRST = "model.layers.0.mlp"


FUSED = ["phi3"]
APART = [kind for kind in tiny.FAMILIES if kind not in FUSED]


@pytest.mark.parametrize("kind", APART)
def test_finds_layers_by_structure(kind):
    model = tiny.make_model(kind)
    ffns = models.find_ffns(model)
    assert [f.name for f in ffns] == [f"model.layers.{i}.mlp" for i in range(2)]
    for ffn, layer in zip(ffns, model.model.layers, strict=True):
        mlp = layer.mlp
        assert ffn.module is mlp and ffn.linears == (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        assert ffn.down is mlp.down_proj
        for projection, linear in ((ffn.gate, mlp.gate_proj), (ffn.up, mlp.up_proj)):
            assert projection.weight is linear.weight and projection.bias is linear.bias
        assert (ffn.gate.bias is not None) == (kind == "llama-bias")
        assert ffn.activation == ("gelu_tanh" if kind.startswith("gemma") else "silu")
        assert ffn.shape == LayerShape(d=64, n_neurons=160)


@pytest.mark.parametrize("kind", FUSED)
def test_finds_fused_layers(kind):
    model = tiny.make_model(kind)
    for ffn, layer in zip(models.find_ffns(model), model.model.layers, strict=True):
        mlp = layer.mlp
        fused = mlp.gate_up_proj.weight
        assert ffn.module is mlp and ffn.linears == (mlp.gate_up_proj, mlp.down_proj)
        assert torch.equal(ffn.gate.weight, fused[:160]) and torch.equal(ffn.up.weight, fused[160:])
        # Read where they are.
        assert ffn.gate.weight.data_ptr() == fused.data_ptr()
        assert ffn.up.weight.data_ptr() == fused[160:].data_ptr()
        assert ffn.down is mlp.down_proj
        assert ffn.activation == "silu" and ffn.shape == LayerShape(d=64, n_neurons=160)


class Fused(nn.Module):
    """A fused layer with biases, in the form of Phi-3."""

    def __init__(self, *, bias=True, gate_first=True):
        super().__init__()
        self.gate_up_proj = nn.Linear(64, 320, bias=bias)
        self.down_proj = nn.Linear(160, 64, bias=bias)
        self.activation_fn = nn.SiLU()
        self.gate_first = gate_first

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        if not self.gate_first:
            gate, up = up, gate
        return self.down_proj(up * self.activation_fn(gate))


def test_biases_of_fused_layers_are_cut_apart():
    (ffn,) = models.find_ffns(nn.Sequential(Fused()).eval())
    x = torch.randn(5, 64)
    both = ffn.module.gate_up_proj
    assert torch.equal(ffn.gate.bias, both.bias[:160]) and torch.equal(ffn.up.bias, both.bias[160:])
    # A product by half the rows may add in another order: 64 terms, as numeric.py counts.
    torch.testing.assert_close(ffn.gate(x), both(x)[:, :160])
    torch.testing.assert_close(ffn.up(x), both(x)[:, 160:])


@inside(dtype=DTYPES)
@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_dense_is_the_module_bit_for_bit(kind, dtype):
    model = tiny.make_model(kind, dtype=dtype)
    draw = torch.Generator().manual_seed(0)
    for ffn in models.find_ffns(model):
        for shape in ((1, 1, 64), (3, 7, 64), (5, 64)):
            x = torch.randn(shape, generator=draw).to(dtype)
            with torch.no_grad():
                gate, a = ffn.activations(x)
                assert torch.equal(ffn.dense(x), ffn.module(x))
                assert torch.equal(ffn.down(a), ffn.module(x))
            assert gate.shape == a.shape == (*shape[:-1], 160)


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_offset_is_what_biases_add_to_readings(kind):
    (ffn, _) = models.find_ffns(tiny.make_model(kind))
    norm = ffn.down.weight.detach().norm(dim=0)
    torch.testing.assert_close(ffn.down_norm(), norm)
    if kind != "llama-bias":
        assert ffn.offset() is None
        return
    offset = ffn.offset()
    assert torch.equal(offset[:, 0], ffn.gate.bias)
    assert torch.equal(offset[:, 1], ffn.up.bias * ffn.down_norm())
    x = torch.randn(9, 64)
    reading = x @ ffn.up.weight.T * norm + offset[:, 1]
    torch.testing.assert_close(reading, ffn.up(x) * norm)


def test_one_bias_alone_is_taken():
    model = tiny.make_model()
    for layer in model.model.layers:
        layer.mlp.up_proj.bias = nn.Parameter(torch.randn(160))
    for ffn in models.find_ffns(model):
        assert ffn.gate.bias is None and ffn.down.bias is None
        assert ffn.offset()[:, 0].eq(0).all() and ffn.offset()[:, 1].ne(0).all()


def test_same_activation_under_another_name_is_taken():
    model = tiny.make_model("gemma", hidden_activation="gelu_new", hidden_act="gelu_new")
    assert {f.activation for f in models.find_ffns(model)} == {"gelu_tanh"}


def test_finding_leaves_the_model_alone():
    model = tiny.make_model()
    before = {name: (p._version, p.data_ptr()) for name, p in model.named_parameters()}
    models.find_ffns(model)
    assert {name: (p._version, p.data_ptr()) for name, p in model.named_parameters()} == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def _mlp(change):
    """A model whose first layer was changed."""

    def make():
        model = tiny.make_model()
        change(model.model.layers[0].mlp)
        return model

    return make


class Multiplied(nn.Module):
    """The four children of a layer, put to another use."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, x):
        return 0.5 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Sharded(torch.Tensor):
    """Stands for a tensor that lies on several devices."""


class Quantised(nn.Linear):
    """Stands for a linear layer of another library."""


def _adapter(mlp):
    mlp.up_proj = nn.Module()
    mlp.up_proj.base_layer = nn.Linear(64, 160, bias=False)


def _quantised(mlp):
    mlp.gate_proj = Quantised(64, 160, bias=False)


def _multiplied():
    model = tiny.make_model()
    model.model.layers[0].mlp = Multiplied(model.model.layers[0].mlp)
    return model.eval()


def _meta():
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SIZES)).eval()


def _shared():
    model = tiny.make_model()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return model


def _tied():
    model = tiny.make_model()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


def _mixture():
    sizes = {**tiny.SIZES, "num_local_experts": 2, "num_experts_per_tok": 1}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()


def _expert_list():
    model = tiny.make_model()
    layer = model.model.layers[0]
    layer.second = tiny.make_model(seed=1).model.layers[0].mlp
    return model


def _in_sequence(layer):
    return lambda: nn.Sequential(layer).eval()


def _odd_rows():
    layer = Fused()
    layer.gate_up_proj = nn.Linear(64, 321)
    return nn.Sequential(layer).eval()


def _two_activations():
    model = tiny.make_model()
    model.model.layers[1].mlp.act_fn = nn.GELU(approximate="tanh")
    return model


def _half_bias(mlp):
    mlp.up_proj.bias = nn.Parameter(torch.zeros(160, dtype=torch.bfloat16))


def _without_activation():
    model = tiny.make_model()
    del model.model.layers[0].mlp.act_fn
    return model


def _other_family():
    sizes = {"vocab_size": 260, "n_embd": 64, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def _compiled_in_place(mlp):
    mlp.compile(backend="eager")


def _mixed_dtypes():
    model = tiny.make_model()
    model.model.layers[1].mlp.to(torch.bfloat16)
    return model


UNSUPPORTED = {
    "training": (lambda: tiny.make_model().train(), "in training mode: call model.eval"),
    "exact GELU": (
        lambda: tiny.make_model(hidden_act="gelu"),
        f"{FIRST}.act_fn: GELU.*want SiLU or GELU approximated by tanh",
    ),
    "ReLU": (lambda: tiny.make_model("gemma2", hidden_activation="relu"), "act_fn: ReLU.*: want"),
    "ReLU of a fused layer": (
        lambda: tiny.make_model("phi3", hidden_act="relu"),
        f"{FIRST}.activation_fn: ReLU.*: want",
    ),
    "softmax": (
        _mlp(lambda m: setattr(m, "act_fn", nn.Softmax(dim=-1))),
        "act_fn: Softmax.*: want",
    ),
    "no activation": (_without_activation, f"{FIRST}: want an activation named act_fn or"),
    "several activations": (_two_activations, "layers of several activations; want one"),
    "bias of another dtype": (_mlp(_half_bias), f"{FIRST}: want one device and one dtype"),
    "up before gate": (
        _in_sequence(Fused(gate_first=False)),
        "0: computes something else than",
    ),
    "odd number of fused rows": (_odd_rows, "0.gate_up_proj: a weight of 321 rows; want those of"),
    "float64": (
        lambda: tiny.make_model(dtype=torch.float64),
        f"{FIRST}.gate_proj: a weight of torch.float64; want one of float32",
    ),
    "compiled": (lambda: torch.compile(tiny.make_model()), "made by torch.compile"),
    "compiled layer": (_mlp(_compiled_in_place), "mlp: compiled; want the original"),
    "mixture": (_mixture, "experts"),
    "two in a layer": (_expert_list, "several feed-forward layers in one"),
    "other family": (
        _other_family,
        "GPT2LMHeadModel: want layers with gate_proj, up_proj and down_proj, as in Llama, or gate_",
    ),
    "parameter of its own": (
        _mlp(lambda m: m.register_parameter("scale", nn.Parameter(torch.ones(1)))),
        f"{FIRST}: want no parameter of its own, not 'scale'",
    ),
    "quantised": (_mlp(_quantised), "gate_proj: Quantised, perhaps quantised"),
    "adapter": (_mlp(_adapter), r"up_proj: an adapter \(LoRA\)"),
    "meta": (_meta, "gate_proj: a meta tensor; want a weight that is loaded"),
    "offloaded": (_mlp(lambda m: setattr(m, "_hf_hook", 1)), "forward was replaced"),
    "offloaded linear": (_mlp(lambda m: setattr(m.up_proj, "_hf_hook", 1)), "up_proj: hooked"),
    "patched": (_mlp(lambda m: setattr(m, "forward", m.forward)), "forward was replaced"),
    "hooked": (
        _mlp(lambda m: m.down_proj.register_forward_hook(lambda *a: None)),
        "down_proj: hooked",
    ),
    "shared module": (_shared, "shares weights with model.layers.0.mlp"),
    "tied": (_tied, "model.layers.1.mlp: shares weights with model.layers.0.mlp"),
    "extra child": (
        _mlp(lambda m: m.add_module("norm", nn.LayerNorm(64))),
        "want gate_proj, up_proj, down_proj, act_fn only, not 'norm'",
    ),
    "other formula": (_multiplied, "computes something else than"),
    "other sizes": (
        _mlp(lambda m: setattr(m, "up_proj", nn.Linear(64, 96, bias=False))),
        r"weights \(160, 64\), \(96, 64\), \(64, 160\): want",
    ),
    "strided": (
        _mlp(lambda m: setattr(m.gate_proj, "weight", nn.Parameter(torch.zeros(64, 160).T))),
        r"gate_proj: a weight of strides \(1, 160\); want it contiguous",
    ),
    "strided bias": (
        _mlp(lambda m: setattr(m.up_proj, "bias", nn.Parameter(torch.zeros(320)[::2]))),
        r"up_proj: a bias of strides \(2,\); want it contiguous",
    ),
    "several dtypes": (_mixed_dtypes, "several devices or dtypes"),
    "weight subclass": (
        _mlp(lambda m: setattr(m.gate_proj, "weight", nn.Parameter(Sharded(torch.zeros(160, 64))))),
        "perhaps sharded; want a tensor",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_refuses_models_it_cannot_run(name):
    make, message = UNSUPPORTED[name]
    with pytest.raises(UnsupportedModelError, match=message):
        models.find_ffns(make())


def test_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"model of type str: want an nn\.Module"):
        models.find_ffns("a model")


def test_fingerprint_follows_content_alone():
    found = models.fingerprint(tiny.make_model(dtype=torch.bfloat16))
    assert found == models.fingerprint(tiny.make_model(dtype=torch.bfloat16))
    assert (found.model_type, found.dtype) == ("llama", "bfloat16")
    others = [
        tiny.make_model(),
        tiny.make_model(seed=1, dtype=torch.bfloat16),
        tiny.make_model("qwen2", dtype=torch.bfloat16),
    ]
    hashes = {found.model_hash, *(models.fingerprint(m).model_hash for m in others)}
    assert len(hashes) == 4


def test_fingerprint_covers_biases_and_activation():
    model = tiny.make_model("llama-bias")
    hashes = [models.fingerprint(model).model_hash]
    for name in ("gate_proj", "up_proj", "down_proj"):
        with torch.no_grad():
            getattr(model.model.layers[1].mlp, name).bias[3] += 1
        hashes.append(models.fingerprint(model).model_hash)
    gelu, silu = tiny.make_model(hidden_act="gelu_pytorch_tanh"), tiny.make_model()
    assert models.fingerprint(gelu).activation == "gelu_tanh"
    assert models.fingerprint(silu).activation == "silu"
    hashes += [models.fingerprint(m).model_hash for m in (gelu, silu)]
    assert len(set(hashes)) == 6


@pytest.mark.parametrize("kind", FUSED)
def test_fingerprint_covers_fused_weights(kind):
    model = tiny.make_model(kind)
    before = models.fingerprint(model).model_hash
    with torch.no_grad():
        model.model.layers[0].mlp.gate_up_proj.weight[200, 3] += 1
    assert models.fingerprint(model).model_hash != before
