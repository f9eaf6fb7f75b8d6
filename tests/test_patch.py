import contextlib
import copy
import dataclasses
import functools
import gc
import hashlib
import logging
import math
import operator
import pickle
import threading
import weakref
from concurrent import futures

import pytest
import torch
import transformers
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as torch_modules
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import csfast
import numeric
import tiny
from axes import DTYPES, inside, pairwise
from csfast import judge, models, ops, patch, reference
from csfast.layer import Decision, Layer, Sensor, Weights
from csfast.plan import Plan
from csfast.session import Session

KINDS = list(tiny.FAMILIES)
BLOCKS = (1, 16)
DENSITIES = (0.1, 0.25, 0.5, 0.75)


def calibrated(model, **options):
    return csfast.calibrate(model, tiny.make_ids(30, 80), densities=DENSITIES, **options)


@pytest.fixture(scope="module")
def plans():
    """A plan for each kind and dtype of model that a test asks for, made once."""
    made: dict[tuple[str, torch.dtype], Plan] = {}

    def plan(kind="llama", dtype=torch.float32):
        if (kind, dtype) not in made:
            model = tiny.make_model(kind, dtype=dtype)
            bits = (2, 3, "ternary")
            made[kind, dtype] = calibrated(model, bits=bits, blocks=BLOCKS, joint=kind == "llama")
        return made[kind, dtype]

    return plan


def state_of(model):
    """Everything about a model that must come back: modules, weights, where they lie."""
    modules = {n: (type(m), sorted(vars(m))) for n, m in model.named_modules()}
    weights = {
        n: (p._version, p.data_ptr(), hashlib.sha256(p.detach().view(torch.uint8).numpy()).digest())
        for n, p in model.named_parameters()
    }
    return modules, weights, list(model.state_dict())


def shared_of(model):
    return layers_of(model)[0].__dict__["_csfast"].shared


def layers_of(model):
    return [f.module for f in models.find_ffns(model)]


def decode(model, ids, n_steps):
    """Logits of a prompt and of the greedy tokens after it, one by one over the cache."""
    name = models.cache_argument(model)
    with torch.no_grad():
        out = model(ids, use_cache=True)
        logits = [out.logits[:, -1]]
        for _ in range(n_steps):
            step = logits[-1].argmax(dim=-1, keepdim=True)
            out = model(step, use_cache=True, **{name: out[name]})
            logits.append(out.logits[:, -1])
    return torch.stack(logits)


@inside(dtype=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_density_one_is_the_original_bit_for_bit(kind, dtype, plans):
    model, ids = tiny.make_model(kind, dtype=dtype), tiny.make_ids(1, 20)[0]
    wanted = decode(model, ids, 20)
    csfast.apply(model, plans(kind, dtype), density=1)
    assert torch.equal(decode(model, ids, 20), wanted)
    assert csfast.stats(model).tokens == (0, 0)


@pairwise(kind=KINDS, dtype=DTYPES, size=[(1, 1), (3, 16), (patch.BATCH_MAX, 1)])
def test_full_support_agrees_with_float64(kind, dtype, size, plans):
    """Through the kernels, which the counters prove, within the bound derived for them."""
    batch, block = size
    model = tiny.make_model(kind, dtype=dtype)
    csfast.apply(model, plans(kind, dtype), density=0.5, block=block)
    shared_of(model).threshold.fill_(-1)
    draw = torch.Generator().manual_seed(0)
    everything = torch.ones(batch, 160, dtype=torch.bool)
    for ffn in models.find_ffns(model):
        x = torch.randn(batch, 1, 64, generator=draw).to(dtype)
        with torch.no_grad():
            found = ffn.module(x)[:, 0]
        gate, up, down = (w.detach() for w in ffn.weights)
        problem = gate, up, down.T, x[:, 0]
        more = {
            "gate_bias": ffn.gate.bias,
            "up_bias": ffn.up.bias,
            "down_bias": ffn.down.bias,
            "activation": ffn.activation,
        }
        all_tiles = [torch.arange(160)] * batch
        with torch.no_grad():
            wanted = reference.execute(*problem, all_tiles, tile_rows=1, **more)
            tolerance = numeric.execute_tolerance(*problem, everything, **more)
        numeric.assert_within(found, wanted, tolerance)
    counted = csfast.stats(model)
    assert counted.tokens == (batch, batch) and counted.neurons == (160 * batch, 160 * batch)
    assert counted.density == 1


@inside(code=[(3, 1), (2, 16), ("ternary", 1), ("ternary", 16)])
@pytest.mark.parametrize("kind", KINDS)
def test_runs_the_neurons_that_the_plan_chooses(kind, code, plans):
    bits, block = code
    model, plan = tiny.make_model(kind), plans(kind)
    # Hidden states of four tokens, whose size differs between versions of transformers.
    states = {}
    with judge.watching(layers_of(model), lambda i, x: states.setdefault(i, x[0, -4:, None])):
        with torch.no_grad():
            model(tiny.make_ids(1, 40, seed=9)[0])
    csfast.apply(model, plan, density=0.25, bits=bits, block=block, task="text")
    for i, ffn in enumerate(models.find_ffns(model)):
        layer, x = plan.layers[i], states[i]
        order = torch.arange(160) if block == 1 else layer.order[block]
        gate, up, down = (w.detach() for w in ffn.weights)
        threshold = plan.threshold(i, bits=bits, density=0.25, task="text", block=block)
        # The codes of the neurons as they are, put in order.
        sensor = Sensor(
            *(layer.codes[bits][order], layer.equal, layer.row_scale[bits][order], bits),
            None if ffn.offset() is None else ffn.offset()[order],
        )
        weights = Weights(
            *(gate[order], up[order], down.T[order]),
            None if ffn.gate.bias is None else ffn.gate.bias.detach()[order],
            None if ffn.up.bias is None else ffn.up.bias.detach()[order],
            ffn.down.bias,
        )
        decision = Decision(torch.full((4,), threshold), block)
        wanted = ops.ffn(Layer(sensor, weights, decision, ffn.activation), x[:, 0])
        with torch.no_grad():
            assert torch.equal(ffn.module(x)[:, 0], wanted)
    assert 0 < csfast.stats(model).density < 0.8


@pytest.mark.parametrize("block", BLOCKS)
def test_codes_are_a_copy_of_the_plans(block, plans):
    """What csfast owns is its own: neither writes to the other, and `remove` frees it."""
    model, plan = tiny.make_model(), plans()
    csfast.apply(model, plan, block=block)
    for layer, of_plan in zip(layers_of(model), plan.layers, strict=True):
        codes = layer.__dict__["_csfast"].bound.sensor.codes
        assert torch.equal(codes, of_plan.sensor(bits=2, block=block).codes)
        assert codes.data_ptr() != of_plan.codes[2].data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_generates_with_every_decoding_method(kind, plans):
    model, plan = tiny.make_model(kind), plans(kind)
    csfast.apply(model, plan, density=0.5)
    ids = torch.cat(tiny.make_ids(3, 10))
    n_before = 0
    for options in ({"do_sample": False}, {"num_beams": 4}, {"do_sample": True, "top_k": 5}):
        torch.manual_seed(0)
        found = model.generate(ids, max_new_tokens=12, min_new_tokens=12, **options)
        assert found.shape == (3, 22)
        n = csfast.stats(model).tokens[0]
        # 11 of the 12 tokens are made by a step of one token a sequence, each sequence a row.
        assert n - n_before == 11 * 3 * options.get("num_beams", 1)
        n_before = n
    assert csfast.stats(model).fallbacks == (0, 0)
    assert 0.3 < csfast.stats(model).density < 0.7


def test_static_cache_gives_the_same_tokens(plans):
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.5)
    ids = tiny.make_ids(1, 10)[0]
    options = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True}
    wanted = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), wanted)


def test_a_row_is_its_own(dtype, plans):
    """What a sequence gets does not depend on its neighbours in the batch."""
    model = tiny.make_model(dtype=dtype)
    csfast.apply(model, plans(dtype=dtype), density=0.5)
    mlp = layers_of(model)[0]
    x = torch.randn(5, 1, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        together = mlp(x)
        for row in range(5):
            assert torch.equal(mlp(x[row : row + 1]), together[row : row + 1])


@inside(dtype=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_remove_restores_exactly(kind, dtype, plans):
    model, ids = tiny.make_model(kind, dtype=dtype), tiny.make_ids(1, 20)[0]
    before, wanted = state_of(model), decode(model, ids, 10)
    csfast.apply(model, plans(kind, dtype), density=0.25)
    modules, weights, names = state_of(model)
    assert weights == before[1] and names == before[2]
    assert modules != before[0]
    assert not torch.equal(decode(model, ids, 10), wanted)
    csfast.remove(model)
    assert state_of(model) == before
    assert torch.equal(decode(model, ids, 10), wanted)
    csfast.apply(model, plans(kind, dtype), density=0.25)


def test_remove_frees_what_csfast_owned(plans):
    model = tiny.make_model()
    csfast.apply(model, plans(), block=16)
    layer = layers_of(model)[0].__dict__["_csfast"]
    weights, shared = layer.bound.weights, layer.shared
    tensors = (layer.bound.sensor.codes, weights.down_t, weights.gate, shared.threshold, shared)
    owned = [weakref.ref(t) for t in tensors]
    del layer, weights, shared, tensors
    csfast.remove(model)
    gc.collect()
    assert [ref() for ref in owned] == [None] * 5


@pytest.mark.parametrize("kind", ["llama", "llama-bias", "phi3"])
@pytest.mark.parametrize(("bits", "block"), [(3, 1), (3, 16), ("ternary", 1)])
def test_bytes_are_named_and_are_what_is_owned(kind, bits, block, plans, caplog):
    model = tiny.make_model(kind, dtype=torch.bfloat16)
    wanted = csfast.needed_bytes(model, bits=bits, block=block)
    with caplog.at_level(logging.INFO, logger="csfast"):
        done = csfast.apply(model, plans(kind, torch.bfloat16), bits=bits, block=block)
    assert f"2 layers take {wanted} bytes" in caplog.text
    theirs = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shared = shared_of(model)
    tensors = [shared.threshold, shared.counts, *shared.session._workspaces.values()]
    for mlp in layers_of(model):
        bound = mlp.__dict__["_csfast"].bound
        tensors += [*vars(bound.sensor).values(), *vars(bound.weights).values()]
    mine = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in theirs
    }
    assert done.n_bytes == wanted == sum(mine.values())


def test_limit_is_kept_before_anything_is_allocated(plans, monkeypatch):
    model = tiny.make_model()
    before, n_bytes = state_of(model), csfast.needed_bytes(model)
    monkeypatch.setattr(patch, "_bind", lambda *a: pytest.fail("allocated"))
    with pytest.raises(csfast.ResourceLimitError, match=f"{n_bytes} bytes .*at most {n_bytes - 1}"):
        csfast.apply(model, plans(), limit_bytes=n_bytes - 1)
    assert state_of(model) == before


def test_memory_of_the_machine_is_the_limit_otherwise(plans, monkeypatch):
    monkeypatch.setattr(patch, "_free_share", lambda device: 1000)
    with pytest.raises(csfast.ResourceLimitError, match="want at most 1000"):
        csfast.apply(tiny.make_model(), plans())
    monkeypatch.undo()
    assert 1 << 20 < patch._free_share(torch.device("cpu")) < 1 << 50


def test_second_apply_is_refused(plans):
    model = tiny.make_model()
    csfast.apply(model, plans())
    with pytest.raises(ValueError, match=r"\[apply\] csfast is applied .*call csfast\.remove"):
        csfast.apply(model, plans())


def test_dense_blocks_may_be_nested(plans):
    model, ids = tiny.make_model(), tiny.make_ids(1, 20)[0]
    wanted = decode(model, ids, 5)
    csfast.apply(model, plans(), density=0.25)
    with csfast.dense(model):
        with pytest.raises(KeyError), csfast.dense(model):
            raise KeyError
        assert torch.equal(decode(model, ids, 5), wanted)
    assert csfast.stats(model).tokens == (0, 0)
    assert not torch.equal(decode(model, ids, 5), wanted)
    assert csfast.stats(model).tokens == (5, 5)


def test_density_changes_without_allocation(plans):
    model, ids = tiny.make_model(), tiny.make_ids(1, 20)[0]
    wanted = decode(model, ids, 5)
    csfast.apply(model, plans(), density=0.1)
    place = shared_of(model).threshold.data_ptr()
    found = []
    for density in (0.1, 0.75):
        csfast.set_density(model, density, task="text")
        before = csfast.stats(model).neurons[0]
        decode(model, ids, 5)
        found.append(csfast.stats(model).neurons[0] - before)
    assert found[1] > 3 * found[0] > 0
    assert shared_of(model).threshold.data_ptr() == place
    csfast.set_density(model, 1)
    assert torch.equal(decode(model, ids, 5), wanted)


def test_prompts_and_large_batches_run_the_original(plans):
    model = tiny.make_model()
    mlp = layers_of(model)[0]
    x = torch.randn(patch.BATCH_MAX + 1, 1, 64)
    with torch.no_grad():
        inputs = [x, x[:3].reshape(1, 3, 64), x[:2, 0], x[:0], x[:2].expand(2, 1, 64)[:, :, ::1]]
        wanted = [mlp(v) for v in inputs[:4]]
        csfast.apply(model, plans(), density=0.1)
        for v, w in zip(inputs, wanted, strict=False):
            assert torch.equal(mlp(v), w)
    assert csfast.stats(model).tokens == (0, 0)


def test_gradients_and_training_run_the_original(plans):
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.1)
    step = torch.tensor([[3]])
    model(step).logits.sum().backward()
    assert all(p.grad is not None for p in layers_of(model)[0].parameters())
    model.train()
    with torch.no_grad():
        model(step)
    assert csfast.stats(model).tokens == (0, 0)
    model.eval()
    with torch.no_grad():
        model(step)
    assert csfast.stats(model).tokens == (1, 1)


def _write(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1


def _replace(model):
    mlp = model.model.layers[1].mlp
    mlp.up_proj.weight = torch.nn.Parameter(mlp.up_proj.weight.detach().clone())


def _load(model):
    model.load_state_dict(tiny.make_model(seed=1).state_dict())


def _adapt(model):
    mlp = model.model.layers[1].mlp
    adapter = torch.nn.Sequential(mlp.up_proj)
    mlp.up_proj = adapter


def _write_bias(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.bias[0] += 1


def _add_bias(model):
    model.model.layers[0].mlp.gate_proj.bias = torch.nn.Parameter(torch.zeros(160))


def _write_fused(model):
    with torch.no_grad():
        model.model.layers[1].mlp.gate_up_proj.weight[200, 3] += 1


STALE = {
    "written": ("llama", _write, "layer 1: up_proj was written to"),
    "replaced": ("llama", _replace, "layer 1: up_proj was moved or replaced"),
    "adapter": ("llama", _adapt, "layer 1: up_proj was replaced"),
    "loaded": ("llama", _load, "layer 0: gate_proj was written to"),
    "cast": ("llama", lambda m: m.to(torch.bfloat16), "layer 0: gate_proj was moved or replaced"),
    "bias written": ("llama-bias", _write_bias, r"layer 1: down_proj\.bias was written to"),
    "bias added": ("llama", _add_bias, r"layer 0: gate_proj\.bias was moved or replaced"),
    "fused": ("phi3", _write_fused, "layer 1: gate_up_proj was written to"),
}


@pytest.mark.parametrize("name", STALE)
@pytest.mark.parametrize("block", BLOCKS)
def test_changed_weights_are_noticed(name, block, plans):
    kind, change, message = STALE[name]
    model = tiny.make_model(kind)
    csfast.apply(model, plans(kind), density=0.5, block=block)
    change(model)
    with torch.no_grad(), pytest.raises(csfast.StaleWeightsError, match=message):
        model(torch.tensor([[3]]))
    csfast.remove(model)
    with torch.no_grad():
        model(torch.tensor([[3]]))


def _double(*arguments):
    return 2 * arguments[-1]


def _hook(mlp, stack):
    stack.callback(mlp.up_proj.register_forward_hook(_double).remove)


def _pre_hook(mlp, stack):
    hook = mlp.down_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    stack.callback(hook.remove)


def _hook_on_activation(mlp, stack):
    stack.callback(mlp.act_fn.register_forward_hook(_double).remove)


def _global_hook(mlp, stack):
    def double_linear(module, args, out):
        return 2 * out if isinstance(module, torch.nn.Linear) else out

    stack.callback(torch_modules.register_module_forward_hook(double_linear).remove)


def _global_pre_hook(mlp, stack):
    stack.callback(torch_modules.register_module_forward_pre_hook(lambda *a: None).remove)


def _prune(mlp, stack):
    prune.l1_unstructured(mlp.up_proj, "weight", amount=0.5)


def _normalise(mlp, stack):
    torch.nn.utils.parametrizations.weight_norm(mlp.up_proj)


def _wrap(mlp, stack):
    old = mlp.up_proj.forward
    mlp.up_proj.forward = lambda x: 2 * old(x)
    stack.callback(delattr, mlp.up_proj, "forward")


def _wrap_activation(mlp, stack):
    old = mlp.act_fn.forward
    mlp.act_fn.forward = lambda x: 2 * old(x)
    stack.callback(delattr, mlp.act_fn, "forward")


def _compile_in_place(mlp, stack):
    mlp.up_proj.compile(backend="eager")
    stack.callback(torch.compiler.reset)
    stack.callback(delattr, mlp.up_proj, "_compiled_call_impl")


def _class(name):
    """Of a class of torch or transformers another forward or call, while the block lasts."""

    def change(mlp, stack):
        kind = {"module": transformers.models.llama.modeling_llama.LlamaMLP}.get(
            name.split()[0], torch.nn.Linear
        )
        attribute = name.split()[1]
        old = getattr(kind, attribute)
        patched = pytest.MonkeyPatch()
        patched.setattr(kind, attribute, lambda self, x: 2 * old(self, x))
        stack.callback(patched.undo)

    return change


def _mode(make):
    return lambda mlp, stack: stack.enter_context(make())


class _Plain(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class _PlainDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


BYPASSED = {
    "forward hook": ("hooks", _hook),
    "forward pre-hook": ("hooks", _pre_hook),
    "hook on the activation": ("hooks", _hook_on_activation),
    "hook on all modules": ("hooks", _global_hook),
    "pre-hook on all modules": ("hooks", _global_pre_hook),
    "pruned": ("hooks", _prune),
    "parametrised": ("wrapped", _normalise),
    "wrapped projection": ("wrapped", _wrap),
    "wrapped activation": ("wrapped", _wrap_activation),
    "projection compiled in place": ("wrapped", _compile_in_place),
    "forward of the class": ("wrapped", _class("module forward")),
    "forward of all linear layers": ("wrapped", _class("linear forward")),
    "call of all linear layers": ("wrapped", _class("linear __call__")),
    "dispatch mode": ("tracing", _mode(_PlainDispatch)),
    "counted operations": ("hooks", _mode(lambda: FlopCounterMode(display=False))),
    "function mode": ("tracing", _mode(_Plain)),
    "forward-mode": ("transform", _mode(forward_ad.dual_level)),
    "autocast": ("autocast", _mode(lambda: torch.autocast("cpu", torch.bfloat16))),
    "gradients of weights": ("gradients", _mode(torch.enable_grad)),
    "training": ("training", lambda mlp, stack: mlp.train()),
}


@pytest.mark.parametrize("name", BYPASSED)
def test_the_original_runs_where_kernels_would_bypass_something(name, plans, caplog):
    reason, change = BYPASSED[name]
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))
    outs = []
    for is_applied in (False, True):
        model = tiny.make_model()
        mlp = layers_of(model)[0]
        if is_applied:
            csfast.apply(model, plans(), density=0.1)
        with caplog.at_level(logging.WARNING, logger="csfast"):
            with torch.no_grad(), contextlib.ExitStack() as stack:
                change(mlp, stack)
                outs.append([mlp(x), mlp(x)])
    for wanted, found in zip(*outs, strict=True):
        assert torch.equal(wanted, found) and wanted.requires_grad == found.requires_grad
    counted = csfast.stats(model)
    assert counted.tokens == (0, 0) and counted.dense == {reason: 2}
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("[ffn] ") and ("the original runs" in said or "runs dense" in said)
    if name not in ("pruned", "parametrised", "training"):  # which stay
        with torch.no_grad():
            mlp(x)
        assert csfast.stats(model).tokens == (1, 0)


def test_backward_hooks_see_every_gradient(plans):
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.1)
    mlp, x = layers_of(model)[0], torch.randn(1, 1, 64)
    seen = []
    mlp.gate_proj.register_full_backward_hook(lambda *arguments: seen.append("full"))
    mlp.up_proj.register_full_backward_pre_hook(lambda *arguments: seen.append("pre"))
    mlp(x).sum().backward()
    assert sorted(seen) == ["full", "pre"]
    assert csfast.stats(model).dense == {"gradients": 1}


def test_another_activation_is_noticed(plans):
    for replacement in (torch.nn.ReLU(), torch.nn.SiLU()):
        model = tiny.make_model()
        csfast.apply(model, plans(), density=0.1)
        layers_of(model)[1].act_fn = replacement
        with torch.no_grad(), pytest.raises(csfast.StaleWeightsError, match="1: act_fn was repla"):
            model(torch.tensor([[3]]))
        csfast.remove(model)


def test_an_activation_that_is_a_function_is_noticed_too(plans):
    model = tiny.make_model()
    for mlp in layers_of(model):
        del mlp.act_fn
        mlp.act_fn = torch.nn.functional.silu
    csfast.apply(model, plans(), density=0.1)
    with torch.no_grad():
        model(torch.tensor([[3]]))
        layers_of(model)[0].act_fn = torch.relu
        with pytest.raises(csfast.StaleWeightsError, match="0: act_fn was replaced"):
            model(torch.tensor([[3]]))
    assert csfast.stats(model).tokens == (1, 1)


def test_autocast_to_the_dtype_of_the_weights_changes_nothing(plans):
    model = tiny.make_model(dtype=torch.bfloat16)
    csfast.apply(model, plans(dtype=torch.bfloat16), density=0.25)
    mlp, x = layers_of(model)[0], torch.randn(1, 1, 64).bfloat16()
    with torch.no_grad():
        wanted = mlp(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(mlp(x), wanted)
            assert mlp(x.float()).dtype == torch.bfloat16
    assert csfast.stats(model).tokens == (2, 0)
    assert csfast.stats(model).dense == {"autocast": 1}


def test_a_default_device_is_no_reason(plans):
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.25)
    with torch.no_grad(), torch.device("cpu"):
        model(torch.tensor([[3]]))
    assert csfast.stats(model).tokens == (1, 1)


def test_transforms_and_traces_see_the_original(plans):
    model = tiny.make_model()
    mlp = layers_of(model)[0]
    x = torch.randn(4, 1, 1, 64)
    with torch.no_grad():
        wanted = mlp(x[:, 0])
        csfast.apply(model, plans(), density=0.1)
        torch.testing.assert_close(torch.func.vmap(mlp)(x)[:, 0], wanted)
        _, slope = torch.func.jvp(mlp, (x[0],), (torch.ones_like(x[0]),))
        assert slope.ne(0).any()
        for trace in (
            torch.jit.trace(mlp, x[0], check_trace=False),
            torch.fx.symbolic_trace(mlp),
            make_fx(mlp)(x[0]),
        ):
            torch.testing.assert_close(trace(x[1]), wanted[1:2])
    steep = torch.func.grad(lambda v: mlp(v).sum())(x[0])
    assert steep.ne(0).any()
    assert csfast.stats(model).tokens == (0, 0)
    assert set(csfast.stats(model).dense) >= {"transform", "tracing", "gradients"}


def test_frozen_weights_want_no_gradient(plans):
    model = tiny.make_model().requires_grad_(False)
    csfast.apply(model, plans(), density=0.25)
    mlp, x = layers_of(model)[0], torch.randn(1, 1, 64)
    mlp(x)
    assert csfast.stats(model).tokens == (1, 0)
    mlp(x.clone().requires_grad_()).sum().backward()
    mlp.down_proj.weight.requires_grad_(True)
    mlp(x).sum().backward()
    assert mlp.down_proj.weight.grad is not None
    assert csfast.stats(model).tokens == (1, 0)


@pytest.mark.parametrize("adapted", ["forward", "child"])
def test_weights_called_by_others_are_the_users(adapted, plans):
    """`functional_call` with other weights, and children that share the weights they replace."""
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.1)
    mlp, x = layers_of(model)[0], torch.randn(1, 1, 64)
    if adapted == "child":
        new = torch.nn.Linear(64, 160, bias=False)
        new.weight = mlp.up_proj.weight
        mlp.up_proj = new
    with torch.no_grad(), pytest.raises(csfast.StaleWeightsError, match="up_proj was"):
        if adapted == "child":
            mlp(x)
        else:
            weight = torch.zeros_like(mlp.up_proj.weight)
            torch.func.functional_call(mlp, {"up_proj.weight": weight}, (x,))
    assert csfast.stats(model).tokens == (0, 0)


def test_arguments_of_another_form_are_the_originals(plans):
    model = tiny.make_model()
    mlp, x = layers_of(model)[0], torch.randn(1, 1, 64)
    csfast.apply(model, plans(), density=0.1)
    with csfast.dense(model), torch.no_grad():
        wanted = mlp(x)
    with torch.no_grad():
        assert torch.equal(mlp(x=x), wanted)
        assert torch.equal(mlp(torch.nn.Parameter(x)), wanted)
        with pytest.raises(TypeError):
            mlp(x, x)
    assert csfast.stats(model).dense == {"dense()": 1, "layout": 3}


def wrapped_twice(mlp):
    """What accelerate, profilers and others do to a forward."""
    for _ in range(2):
        mlp.forward = functools.partial(lambda inner, *a, **k: inner(*a, **k), mlp.forward)


def test_a_forward_wrapped_after_apply_outlives_remove(plans):
    model, ids = tiny.make_model(), tiny.make_ids(1, 20)[0]
    wanted = decode(model, ids, 5)
    csfast.apply(model, plans(), density=0.25)
    sparse = decode(model, ids, 5)
    for mlp in layers_of(model):
        wrapped_twice(mlp)
    assert torch.equal(decode(model, ids, 5), sparse)
    kept = model.model.layers[0].mlp.forward
    csfast.remove(model)
    assert torch.equal(decode(model, ids, 5), wanted)
    for mlp in (layer.mlp for layer in model.model.layers):
        del mlp.forward
    csfast.apply(model, plans(), density=0.25)
    model.model.layers[0].mlp.forward = kept
    assert torch.equal(decode(model, ids, 5), sparse)


def test_a_forward_that_was_put_back_is_no_wrapper(plans):
    """Whoever wraps and unwraps by attribute leaves csfast's own forward on the instance."""
    model = tiny.make_model()
    before = state_of(model)
    csfast.apply(model, plans(), density=0.25)
    for mlp in layers_of(model):
        mlp.forward = mlp.forward
    csfast.remove(model)
    assert state_of(model) == before
    csfast.apply(model, plans(), density=0.25)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_hooks_are_seen_by_compiled_models(backend, plans):
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.25)
    layers_of(model)[0].up_proj.register_forward_hook(_double)
    step = torch.tensor([[3]])
    try:
        with torch.no_grad():
            found = torch.compile(model, backend=backend, fullgraph=True)(step).logits
            torch.testing.assert_close(found, model(step).logits)
    finally:
        torch.compiler.reset()
    assert csfast.stats(model).dense == {"hooks": 1}


def test_dense_reaches_compiled_models(plans):
    model = tiny.make_model()
    step = torch.tensor([[3]])
    with torch.no_grad():
        wanted = model(step).logits
        csfast.apply(model, plans(), density=0.1)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        try:
            sparse = compiled(step).logits
            with csfast.dense(model):
                assert torch.equal(compiled(step).logits, wanted)
            assert torch.equal(compiled(step).logits, sparse)
            assert not torch.equal(sparse, wanted)
        finally:
            torch.compiler.reset()


def in_threads(*jobs):
    """Run some functions at once; raises what one of them raises."""
    with futures.ThreadPoolExecutor(len(jobs)) as pool:
        return [job.result() for job in [pool.submit(job) for job in jobs]]


def large_model():
    """A model whose kernels run long enough to overlap."""
    return tiny.make_model(hidden_size=256, intermediate_size=1024)


@pytest.mark.parametrize("joint", [False, True])
def test_threads_share_a_model(joint):
    model = large_model()
    csfast.apply(model, calibrated(model, joint=joint), density=0.5, joint=joint)
    prompts = [torch.cat(tiny.make_ids(n, 6, seed=n)) for n in (1, 3)]

    def generate(ids):
        return model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)

    wanted = [generate(ids) for ids in prompts]
    found = in_threads(*(lambda ids=ids: [generate(ids) for _ in range(6)] for ids in prompts))
    for one, several in zip(wanted, found, strict=True):
        assert all(torch.equal(one, other) for other in several)
    counted = csfast.stats(model)
    assert counted.tokens == (7 * 19 * 4,) * 2 and counted.dense == {"prompt": 2 * 7 * 2}


def test_dense_blocks_are_of_their_thread(plans):
    model, ids = tiny.make_model(), tiny.make_ids(1, 10)[0]
    wanted = decode(model, ids, 20)
    csfast.apply(model, plans(), density=0.25)
    sparse = decode(model, ids, 20)
    inside, outside = threading.Event(), threading.Event()

    def dense():
        with csfast.dense(model):
            inside.set()
            assert outside.wait(60)
            return decode(model, ids, 20)

    def usual():
        assert inside.wait(60)
        found = decode(model, ids, 20)
        outside.set()
        return found

    exact, same = in_threads(dense, usual)
    assert torch.equal(exact, wanted) and torch.equal(same, sparse)
    assert torch.equal(decode(model, ids, 20), sparse)


def test_density_may_change_and_csfast_may_go_while_others_generate(plans):
    model, ids = tiny.make_model(), tiny.make_ids(1, 10)[0]
    step = torch.tensor([[3]])
    with torch.no_grad():
        outs = [model(step).logits]
        csfast.apply(model, plans(), density=0.25)
        outs.append(model(step).logits)
    done = threading.Event()

    def generate():
        n = 0
        while not done.is_set() or n < 5:
            assert decode(model, ids, 10).isfinite().all()
            n += 1

    def change():
        try:
            for _ in range(30):
                csfast.set_density(model, 0.75)
                csfast.stats(model)
                csfast.set_density(model, 0.25)
            for _ in range(10):
                csfast.remove(model)
                csfast.apply(model, plans(), density=0.25)
        finally:
            done.set()

    in_threads(generate, generate, change)
    with torch.no_grad():
        assert torch.equal(model(step).logits, outs[1])
        csfast.remove(model)
        assert torch.equal(model(step).logits, outs[0])


def test_streams_take_turns(monkeypatch):
    """Only a change of stream waits: the first time for the device, then for the call before."""
    said = []

    class Stream(str):
        def wait_event(self, event):
            said.append(f"{self} waits for {event.after}")

    class Event:
        after = None

        def record(self, stream):
            self.after = str(stream)

    now = {"stream": Stream("a"), "captures": False}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now["stream"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now["captures"])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append("all"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    turns = patch._Turns(torch.device("cuda"))
    for stream in "aabCbbac":
        now |= {"stream": Stream(stream), "captures": stream.isupper()}
        turns.begin()
        turns.end()
    assert said == ["all", "a waits for b", "c waits for a"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype, plans):
    model, ids = tiny.make_model(), torch.cat(tiny.make_ids(3, 10))
    outs = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            for joint in (False, True):
                csfast.apply(model, plans(), density=0.5, joint=joint)
                if joint:
                    csfast.set_votes(model, [True, False, True])
                outs.append(decode(model, ids, 5))
                csfast.set_density(model, 0.25)
                outs.append(decode(model, ids, 5))
                outs.append(torch.tensor(csfast.stats(model).neurons))
                assert torch.get_default_dtype() == default
                csfast.remove(model)
        finally:
            torch.set_default_dtype(torch.float32)
    for wanted, found in zip(outs[:6], outs[6:], strict=True):
        assert torch.equal(wanted, found) and wanted.dtype == found.dtype


def test_the_default_device_changes_nothing(plans):
    model = tiny.make_model()
    with torch.device("meta"):
        csfast.apply(model, plans(), density=0.5, joint=True)
        csfast.set_density(model, 0.25)
        csfast.set_votes(model, [True, False])
        csfast.set_votes(model, None)
    assert decode(model, tiny.make_ids(1, 10)[0], 5).isfinite().all()
    assert csfast.stats(model).tokens == (5, 5)


def test_dense_calls_are_counted_by_reason_and_told_once(plans, caplog):
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.25)
    prompt, name = torch.cat(tiny.make_ids(2, 10)), models.cache_argument(model)
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="csfast"):
        for _ in range(2):
            model(prompt)
            cache = model(prompt, use_cache=True)[name]
            model(prompt[:, :3], **{name: cache})
            model(prompt[:, :1], **{name: cache})
            model(torch.full((17, 1), 3))
            with csfast.dense(model):
                model(prompt[:, :1])
            csfast.set_density(model, 1)
            model(prompt[:, :1])
            csfast.set_density(model, 0.25)
            model.train()(prompt[:, :1])
            model.eval()
            layers_of(model)[1](torch.zeros(1, 64))
            layers_of(model)[1](torch.zeros(0, 1, 64))
            layers_of(model)[1](torch.zeros(2, 1, 128)[..., ::2])
        model.model(prompt)
    assert csfast.stats(model).dense == {
        "prompt": 10,
        "several tokens": 4,
        "batch above 16": 4,
        "dense()": 4,
        "density 1": 4,
        "training": 4,
        "layout": 6,
    }
    assert csfast.stats(model).tokens == (4, 4) and sum(csfast.stats(model).fallbacks) == 0
    assert len(caplog.records) == 7
    loud = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(loud) == 4 and any("a batch of more than 16 sequences" in text for text in loud)


def test_assisted_generation_is_told(plans, caplog):
    model, ids = tiny.make_model(), tiny.make_ids(1, 20)[0]
    csfast.apply(model, plans(), density=0.25)
    with caplog.at_level(logging.WARNING, logger="csfast"):
        model.generate(
            ids.repeat(1, 3), max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3
        )
    counted = csfast.stats(model)
    assert counted.dense["several tokens"] > 0 and counted.dense["prompt"] == 2
    assert caplog.text.count("assisted generation") == 1


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_caches_of_other_kinds_are_told_apart(cache, plans):
    model, ids = tiny.make_model(), tiny.make_ids(1, 10)[0]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    csfast.apply(model, plans(), density=0.25)
    wanted = model.generate(ids, **options)
    found = model.generate(ids, cache_implementation=cache, disable_compile=True, **options)
    assert torch.equal(found, wanted)
    assert csfast.stats(model).dense == {"prompt": 4} and csfast.stats(model).tokens == (10, 10)


def test_sequences_in_one_row_run_dense_alone_or_in_company(plans, caplog):
    """As `generate_batch` calls a model: it says where in the row the requests end."""
    model = tiny.make_model()
    rows = torch.tensor([[3, 4]])
    position = torch.zeros_like(rows)
    apart = torch.eye(2, dtype=torch.bool)[None, None]
    with torch.no_grad():
        wanted = model(rows, attention_mask=apart, position_ids=position).logits
        csfast.apply(model, plans(), density=0.1)
        with caplog.at_level(logging.WARNING, logger="csfast"):
            ends = torch.tensor([0, 1, 2])
            found = model(
                rows, attention_mask=apart, position_ids=position, cu_seq_lens_q=ends
            ).logits
            alone = model(rows[:, :1], cu_seq_lens_q=ends[:2]).logits
    assert torch.equal(found, wanted)
    torch.testing.assert_close(alone, wanted[:, :1])
    assert csfast.stats(model).dense == {"continuous batching": 4}
    assert caplog.text.count("continuous batching") == 1
    with torch.no_grad():
        model(rows[:, :1])
    assert csfast.stats(model).tokens == (1, 1)


def test_input_of_another_dtype_is_refused(plans):
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.5)
    with torch.no_grad(), pytest.raises(csfast.StaleWeightsError, match=r"x is torch\.bfloat16 on"):
        layers_of(model)[0](torch.zeros(1, 1, 64, dtype=torch.bfloat16))


def test_weights_of_inference_mode_work():
    with torch.inference_mode():
        model = tiny.make_model()
        plan = calibrated(model, joint=True)
        csfast.apply(model, plan, density=0.5, joint=True)
        model(torch.tensor([[3]]))
        assert csfast.stats(model).tokens == (1, 1)
        votes = torch.tensor([True, False])
    with torch.no_grad():
        csfast.set_density(model, 0.25)
        csfast.set_votes(model, votes)
        model(torch.tensor([[3], [4]]))
        csfast.set_votes(model, None)
        model(torch.tensor([[3]] * 3))
    assert csfast.stats(model).tokens == (6, 6)


def test_failing_kernels_are_counted_and_answered_densely(plans, monkeypatch, caplog):
    model, ids = tiny.make_model(), tiny.make_ids(1, 20)[0]
    wanted = decode(model, ids, 4)
    csfast.apply(model, plans(), density=0.1)

    def fail(*arguments):
        raise csfast.BackendError("[ffn] the device failed")

    monkeypatch.setattr(Session, "ffn", fail)
    with caplog.at_level(logging.WARNING, logger="csfast"):
        assert torch.equal(decode(model, ids, 4), wanted)
    assert csfast.stats(model).fallbacks == (4, 4)
    assert len(caplog.records) == 1 and "the device failed" in caplog.text


def test_our_own_mistakes_are_not_hidden(plans, monkeypatch):
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.1)

    def fail(*arguments):
        raise ValueError("[session] no such layer")

    monkeypatch.setattr(Session, "ffn", fail)
    with torch.no_grad(), pytest.raises(ValueError, match="no such layer"):
        model(torch.tensor([[3]]))


def test_input_that_is_not_finite_runs_every_neuron(plans):
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.1)
    x = torch.randn(2, 1, 64)
    x[0, 0, 5] = math.nan
    with torch.no_grad():
        out = layers_of(model)[0](x)
    assert out[0].isnan().all() and out[1].isfinite().all()
    assert csfast.stats(model).neurons[0] >= 160


def test_copies_and_pickles_are_refused(plans):
    model = tiny.make_model()
    csfast.apply(model, plans())
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"\[apply\] a copy or pickle .*call csfast\.remove"):
            attempt(model)
    csfast.remove(model)
    assert type(copy.deepcopy(model).model.layers[0].mlp) is type(model.model.layers[0].mlp)


def test_saved_model_is_the_original(plans, tmp_path):
    model = tiny.make_model()
    csfast.apply(model, plans())
    model.save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    plans().check(models.load(tmp_path)[0])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("kind", "block", "joint"),
    [("llama", 1, False), ("llama", 16, True), ("llama-bias", 16, False), ("phi3", 1, False)],
)
def test_compiled_after_apply_gives_the_same(backend, kind, block, joint, plans):
    model = tiny.make_model(kind)
    csfast.apply(model, plans(kind), density=0.25, block=block, joint=joint)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    try:
        with torch.no_grad():
            for token in (3, 4):
                step = torch.tensor([[token], [7]])
                assert torch.equal(compiled(step).logits, model(step).logits)
            csfast.set_density(model, 0.75)
            assert torch.equal(compiled(step).logits, model(step).logits)
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_massive_channels_choose_the_same_neurons(kind):
    """Function-preserving outliers change neither what runs nor what comes out."""
    results = []
    for massive in (False, True):
        model = tiny.make_model(kind)
        if massive:
            tiny.scale_channels(model)
        plan = calibrated(model)
        csfast.apply(model, plan, density=0.25)
        logits = decode(model, tiny.make_ids(1, 20)[0], 40)
        results.append((csfast.stats(model).neurons, logits))
    (few, one), (same, other) = results
    assert few == same
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_two_models_do_not_meet(plans):
    first, second = tiny.make_model(), tiny.make_model()
    csfast.apply(first, plans(), density=0.1)
    csfast.apply(second, plans(), density=0.75)
    step = torch.tensor([[3]])
    with torch.no_grad(), csfast.dense(first):
        first(step)
        second(step)
    assert csfast.stats(first).tokens == (0, 0) and csfast.stats(second).tokens == (1, 1)
    csfast.remove(first)
    assert csfast.stats(second).tokens == (1, 1)


RAGGED = ["once upon a time", "xy", "12 + 34 =", "the quick brown fox jumps over it"]


def padded(texts):
    """Token ids and mask of texts, padded on the left as `generate` wants them."""
    tokenizer = tiny.make_tokenizer()
    rows = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "phi3"])
@pytest.mark.parametrize("block", BLOCKS)
def test_ragged_batches_give_every_sequence_its_own_text(kind, block, plans):
    """Own supports: padding and neighbours change nothing about what a sequence is answered."""
    model = tiny.make_model(kind)
    csfast.apply(model, plans(kind), density=0.5, block=block)
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    for n in range(1, len(RAGGED) + 1):
        ids, mask = padded(RAGGED[:n])
        together = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
        for row in range(n):
            alone, mask = padded(RAGGED[row : row + 1])
            found = model.generate(alone, attention_mask=mask, **options)
            assert torch.equal(found[0, alone.shape[1] :], together[row])
    assert csfast.stats(model).fallbacks == (0, 0)


def joint_output(model, plan, number, x, votes, *, density, block=1):
    """What one layer gives for a batch that shares a support, straight from the operation."""
    ffn = models.find_ffns(model)[number]
    layer = plan.layers[number]
    order = torch.arange(160) if block == 1 else layer.order[block]
    gate, up, down = (w.detach() for w in ffn.weights)
    n = max(sum(votes), 1)
    threshold = plan.threshold(number, bits=2, density=density, block=block, batch=n)
    found = Layer(
        Sensor(layer.codes[2][order], layer.equal, layer.row_scale[2][order], 2),
        Weights(gate[order], up[order], down.T[order].contiguous()),
        Decision(torch.tensor([threshold]), block, torch.tensor(votes).float() / n),
    )
    return ops.ffn(found, x[:, 0])[:, None]


@inside(is_joint=[False, True])
@pytest.mark.parametrize(("block", "most"), [(1, 40), (16, 2)])
@torch.no_grad()
def test_a_cap_keeps_the_largest_usages(block, most, is_joint, plans):
    """A quarter of 160 neurons, or of their ten blocks, where the threshold alone keeps half."""
    model, x = tiny.make_model(), torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(0))
    csfast.apply(model, plans(), density=0.5, block=block, joint=is_joint)
    for layer in layers_of(model):
        layer(x)
    free = csfast.stats(model).neurons
    assert max(free) > 3 * most * block
    csfast.remove(model)
    done = csfast.apply(model, plans(), density=0.5, block=block, joint=is_joint, cap=0.25)
    assert done.cap == 0.25
    assert done.n_bytes == csfast.needed_bytes(model, block=block) + 2 * 16 * 4
    found = [layer(x) for layer in layers_of(model)]
    counted = csfast.stats(model).neurons
    assert max(counted) <= 3 * most * block and all(map(operator.lt, counted, free))
    for layer, out in zip(layers_of(model), found, strict=True):
        bound = layer.__dict__["_csfast"].bound
        lists = 1 if is_joint else 3
        votes = torch.full((3,), 1 / 3) if is_joint else None
        threshold = bound.decision.threshold[:lists]
        cap = torch.full((lists,), most, dtype=torch.int32)
        capped = dataclasses.replace(bound, decision=Decision(threshold, block, votes, cap))
        assert torch.equal(ops.ffn(capped, x[:, 0]), out[:, 0])


@torch.no_grad()
def test_a_cap_holds_in_a_compiled_model(plans):
    model, x = tiny.make_model(), torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(0))
    csfast.apply(model, plans(), density=0.5, cap=0.1)
    layer = layers_of(model)[0]
    wanted = layer(x)
    with csfast.dense(model):
        assert not torch.equal(layer(x), wanted)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), wanted)


@pytest.mark.parametrize("cap", [0, -0.1, 1.5, float("nan"), True, "0.5"])
def test_refuses_a_cap_that_is_no_fraction(cap, plans):
    with pytest.raises(ValueError, match=rf"\[apply\] cap = {cap!r}: want a fraction in"):
        csfast.apply(tiny.make_model(), plans(), cap=cap)


@pytest.mark.parametrize("block", BLOCKS)
def test_joint_supports_are_those_of_the_votes(block, plans):
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.25, block=block, joint=True)
    draw = torch.Generator().manual_seed(0)
    cases = [[True] * 3, [True, False, True], [False, False, True], [True] * 16, [False] * 2]
    for votes in cases:
        x = torch.randn(len(votes), 1, 64, generator=draw)
        everyone = [True] * len(votes)
        for given in (None, votes, torch.tensor(votes)):
            csfast.set_votes(model, given)
            for number, mlp in enumerate(layers_of(model)):
                wanted = joint_output(
                    *(model, plans(), number, x, everyone if given is None else votes),
                    density=0.25,
                    block=block,
                )
                with torch.no_grad():
                    assert torch.equal(mlp(x), wanted)


def test_joint_support_of_one_is_its_own(plans):
    outs = []
    for joint in (False, True):
        model = tiny.make_model()
        csfast.apply(model, plans(), density=0.25, joint=joint)
        outs.append(decode(model, tiny.make_ids(1, 20)[0], 20))
        counted = csfast.stats(model)
    assert torch.equal(*outs) and 0.1 < counted.density < 0.5


def test_rows_without_a_vote_change_nothing(plans):
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.25, joint=True)
    csfast.set_votes(model, [True, True, False])
    (mlp, _) = layers_of(model)
    x = torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[2] = math.nan
    with torch.no_grad():
        found, same = mlp(x), mlp(other)
        csfast.set_votes(model, None)
        assert not torch.equal(mlp(x), found)
    assert torch.equal(found[:2], same[:2]) and found[2].isfinite().all()


def test_nothing_runs_where_nobody_votes(plans):
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.25, joint=True)
    csfast.set_votes(model, [False, False])
    with torch.no_grad():
        assert layers_of(model)[0](torch.randn(2, 1, 64)).eq(0).all()
    assert csfast.stats(model).neurons == (0, 0)


def test_votes_are_for_batches_of_their_size(plans):
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.25, joint=True)
    csfast.set_votes(model, [True, False])
    message = r"\[ffn\] a batch of 3 sequences and 2 votes: want one for each"
    with torch.no_grad():
        with pytest.raises(ValueError, match=message):
            model(torch.tensor([[3]] * 3))
        model(torch.tensor([[3]] * 2))
        csfast.set_votes(model, None)
        assert shared_of(model).votes.weight[:2].tolist() == [0.5, 0.5]
        for n in (3, 1, 16, 2):
            model(torch.tensor([[3]] * n))
    assert csfast.stats(model).tokens == (24, 24)


def test_votes_outlast_a_change_of_density(plans):
    x = torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(0))
    votes = [True, False, True]
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.1, joint=True)
    csfast.set_votes(model, votes)
    places = [shared_of(model).threshold.data_ptr(), shared_of(model).votes.weight.data_ptr()]
    csfast.set_density(model, 0.5)
    with torch.no_grad():
        found = layers_of(model)[1](x)
    assert torch.equal(found, joint_output(model, plans(), 1, x, votes, density=0.5))
    assert places == [
        shared_of(model).threshold.data_ptr(),
        shared_of(model).votes.weight.data_ptr(),
    ]


def test_sequences_that_have_ended_lose_their_vote(plans):
    """Sequence 1 ends at the third token of five, sequence 0 at the fourth."""
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.5, joint=True)
    ids, mask = padded(RAGGED[:3])
    ends_at = {1: 3, 0: 4}
    seen = []

    def end(tokens, scores):
        n_new = tokens.shape[1] - ids.shape[1] + 1
        weight = shared_of(model).votes.weight[:3].tolist()
        seen.append((n_new, [w > 0 for w in weight]))
        scores[:, 257] = -math.inf
        for row, last in ends_at.items():
            if n_new == last:
                scores[row] = -math.inf
                scores[row, 257] = 0
        return scores

    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with csfast.unfinished_votes(model) as criterion:
        out = model.generate(
            *(ids,),
            attention_mask=mask,
            logits_processor=transformers.LogitsProcessorList([end]),
            stopping_criteria=transformers.StoppingCriteriaList([criterion]),
            **options,
        )
        assert shared_of(model).votes.weight[:3].tolist() == [0, 0, 1]
    # Before the first token nobody has been asked; the prompt ran dense.
    assert seen[1:] == [
        (2, [True, True, True]),
        (3, [True, True, True]),
        (4, [True, False, True]),
        (5, [False, False, True]),
        (6, [False, False, True]),
    ]
    ended = out[:, ids.shape[1] :] == 257
    assert ended.nonzero().tolist() == [[0, 3], [1, 2]]
    assert not shared_of(model).votes.are_given
    assert shared_of(model).votes.weight[:3].tolist() == pytest.approx([1 / 3] * 3)


def test_votes_of_beams_are_everyone(plans):
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.5, joint=True)
    with csfast.unfinished_votes(model, eos_token_id=[257, 3]) as criterion:
        found = model.generate(
            torch.cat(tiny.make_ids(3, 10)),
            max_new_tokens=6,
            num_beams=4,
            stopping_criteria=transformers.StoppingCriteriaList([criterion]),
        )
    assert len(found) == 3 and csfast.stats(model).fallbacks == (0, 0)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda m: csfast.set_density(m, 0.01),
        lambda m: csfast.set_density(m, 0.75, task="x"),
        lambda m: csfast.set_votes(m, [True] * 17),
        lambda m: csfast.set_votes(m, [0, 1, 1]),
        lambda m: csfast.apply(m, calibrated(tiny.make_model())),
    ],
)
def test_refused_changes_change_nothing(attempt, plans):
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.25, joint=True)
    csfast.set_votes(model, [True, False, True])
    x = torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = layers_of(model)[0](x)
        with pytest.raises((ValueError, TypeError)):
            attempt(model)
        assert torch.equal(layers_of(model)[0](x), wanted)


@pytest.mark.gpu
def test_votes_on_the_gpu_are_not_waited_for():
    if not ops.cuda_available():
        pytest.skip("needs a CUDA device and a build with CUDA")
    model = tiny.make_model(dtype=torch.bfloat16).cuda()
    csfast.apply(model, calibrated(model, joint=True), density=0.5, joint=True)
    x = torch.randn(3, 1, 64, device="cuda").bfloat16()
    votes = torch.tensor([True, False, True], device="cuda")
    layer = layers_of(model)[0]  # looking for layers waits, to see what their activations are
    with torch.no_grad():
        layer(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            csfast.set_votes(model, votes)
            layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert shared_of(model).votes.weight[:3].tolist() == [0.5, 0, 0.5]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "bits", "block", "joint"),
    [
        ("llama", 2, 1, False),
        ("llama-bias", "ternary", 16, False),
        ("gemma", 3, 1, True),
        ("phi3", 2, 16, True),
    ],
)
def test_runs_on_the_gpu(kind, bits, block, joint):
    if not ops.cuda_available():
        pytest.skip("needs a CUDA device and a build with CUDA")
    model = tiny.make_model(kind, dtype=torch.bfloat16).cuda()
    plan = csfast.calibrate(
        model, tiny.make_ids(30, 80), bits=(bits,), blocks=(block,), joint=joint
    )
    ids = tiny.make_ids(1, 10)[0].cuda()
    wanted = decode(model, ids, 10)
    csfast.apply(model, plan, density=1, bits=bits, block=block, joint=joint)
    assert torch.equal(decode(model, ids, 10), wanted)
    csfast.set_density(model, 0.5)
    assert decode(model, ids, 10).isfinite().all()
    counted = csfast.stats(model)
    assert counted.tokens == (10, 10) and counted.fallbacks == (0, 0)
    assert 0.2 < counted.density < 0.8
    csfast.remove(model)
    assert torch.equal(decode(model, ids, 10), wanted)


def test_remove_undoes_all_layers_whichever_the_model_still_has(plans):
    model, other = tiny.make_model(), tiny.make_model()
    kinds = [type(layer) for layer in layers_of(model)]
    csfast.apply(model, plans(), density=0.25)
    first, second = layers_of(model)
    other.model.layers[0].mlp = first
    csfast.remove(other)
    assert [type(first), type(second)] == kinds
    with pytest.raises(ValueError, match=r"\[remove\]"):
        csfast.remove(model)
    csfast.apply(model, plans(), density=0.25)
    model.model.layers[0].mlp = layers_of(tiny.make_model())[0]
    csfast.remove(model)
    assert type(first) is kinds[0]
