import copy
import dataclasses
import gc
import hashlib
import logging
import math
import operator
import pickle
import weakref

import pytest
import torch
import transformers

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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "block"), [(3, 1), (2, 16), ("ternary", 1), ("ternary", 16)])
def test_runs_the_neurons_that_the_plan_chooses(kind, bits, block, plans):
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
    "adapter": ("llama", _adapt, "layer 1: a projection was replaced"),
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
