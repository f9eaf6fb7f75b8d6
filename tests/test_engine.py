import copy
import gc
import hashlib
import logging
import math
import pickle
import weakref

import pytest
import torch

import csfast
import numeric
import tiny
from csfast import engine, models, ops, reference
from csfast.plan import Plan

KINDS = ["llama", "qwen2"]


def calibrated(model, **options):
    samples = tiny.make_ids(30, 80)
    return csfast.calibrate(model, samples, densities=(0.1, 0.25, 0.5, 0.75), **options)


@pytest.fixture(scope="module")
def plans():
    """A plan for each kind and dtype of model that a test asks for, made once."""
    made: dict[tuple[str, torch.dtype], Plan] = {}

    def plan(kind="llama", dtype=torch.float32):
        if (kind, dtype) not in made:
            made[kind, dtype] = calibrated(tiny.make_model(kind, dtype=dtype))
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


def layers_of(model):
    return [f.module for f in models.find_ffns(model)]


def decode(model, ids, n_steps):
    """Logits of a prompt and of the greedy tokens after it, one by one over the cache."""
    with torch.no_grad():
        out = model(ids, use_cache=True)
        logits = [out.logits[:, -1]]
        for _ in range(n_steps):
            step = logits[-1].argmax(dim=-1, keepdim=True)
            out = model(step, past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[:, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("kind", KINDS)
def test_density_one_is_the_original_bit_for_bit(kind, dtype, plans):
    model, ids = tiny.make_model(kind, dtype=dtype), tiny.make_ids(1, 20)[0]
    wanted = decode(model, ids, 20)
    csfast.apply(model, plans(kind, dtype), density=1)
    assert torch.equal(decode(model, ids, 20), wanted)
    assert csfast.stats(model).tokens == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3, engine.BATCH_MAX])
def test_full_support_agrees_with_float64(kind, dtype, batch, plans):
    """Through the kernels, which the counters prove, within the bound derived for them."""
    model = tiny.make_model(kind, dtype=dtype)
    csfast.apply(model, plans(kind, dtype), density=0.5)
    draw = torch.Generator().manual_seed(0)
    for mlp in layers_of(model):
        mlp.__dict__["_csfast"].threshold.fill_(-1)
        x = torch.randn(batch, 1, 64, generator=draw).to(dtype)
        with torch.no_grad():
            found = mlp(x)[:, 0]
        gate, up = mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()
        problem = gate, up, mlp.down_proj.weight.detach().T, x[:, 0]
        everything = torch.ones(batch, 160, dtype=torch.bool)
        wanted = reference.execute(*problem, [torch.arange(160)] * batch, tile_rows=1)
        gate, up, down_t, flat = problem
        tolerance = numeric.execute_tolerance(gate, up, down_t, flat, everything)
        numeric.assert_within(found, wanted, tolerance)
    counted = csfast.stats(model)
    assert counted.tokens == (batch, batch) and counted.neurons == (160 * batch, 160 * batch)
    assert counted.density == 1


@pytest.mark.parametrize("kind", KINDS)
def test_runs_the_neurons_that_the_plan_chooses(kind, plans):
    model, plan = tiny.make_model(kind), plans(kind)
    csfast.apply(model, plan, density=0.25, bits=3, task="text")
    x = torch.randn(4, 1, 64, generator=torch.Generator().manual_seed(0))
    for i, mlp in enumerate(layers_of(model)):
        gate, up, down = (m.weight.detach() for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        layer = plan.layers[i]
        codes = layer.encode(gate, up, down, bits=3)
        threshold = torch.full((4,), plan.threshold(i, bits=3, density=0.25, task="text"))
        wanted = ops.ffn(
            *(codes, layer.equal, layer.row_scale[3], threshold),
            *(gate, up, down.T.contiguous(), x[:, 0]),
            bits=3,
        )
        with torch.no_grad():
            assert torch.equal(mlp(x)[:, 0], wanted)
    assert 0.1 < csfast.stats(model).density < 0.5


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
    csfast.apply(model, plans())
    layer = layers_of(model)[0].__dict__["_csfast"]
    owned = [weakref.ref(t) for t in (layer.codes, layer.down_t, layer.threshold, layer.shared)]
    del layer
    csfast.remove(model)
    gc.collect()
    assert [ref() for ref in owned] == [None] * 4


def test_bytes_are_named_and_are_what_is_owned(plans, caplog):
    model = tiny.make_model(dtype=torch.bfloat16)
    wanted = csfast.needed_bytes(model, bits=3)
    with caplog.at_level(logging.INFO, logger="csfast"):
        done = csfast.apply(model, plans(dtype=torch.bfloat16), bits=3)
    assert f"2 layers take {wanted} bytes" in caplog.text
    layers = [m.__dict__["_csfast"] for m in layers_of(model)]
    owned = sum(
        t.nbytes for x in layers for t in (x.codes, x.equal, x.row_scale, x.threshold, x.down_t)
    )
    assert done.n_bytes == wanted == owned + layers[0].shared.counts.nbytes


def test_limit_is_kept_before_anything_is_allocated(plans, monkeypatch):
    model = tiny.make_model()
    before, n_bytes = state_of(model), csfast.needed_bytes(model)
    monkeypatch.setattr(engine, "_bind", lambda *a: pytest.fail("allocated"))
    with pytest.raises(csfast.ResourceLimitError, match=f"{n_bytes} bytes .*at most {n_bytes - 1}"):
        csfast.apply(model, plans(), limit_bytes=n_bytes - 1)
    assert state_of(model) == before


def test_memory_of_the_machine_is_the_limit_otherwise(plans, monkeypatch):
    monkeypatch.setattr(engine, "_free_share", lambda device: 1000)
    with pytest.raises(csfast.ResourceLimitError, match="want at most 1000"):
        csfast.apply(tiny.make_model(), plans())
    monkeypatch.undo()
    assert 1 << 20 < engine._free_share(torch.device("cpu")) < 1 << 50


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
    layer = layers_of(model)[0].__dict__["_csfast"]
    place = layer.threshold.data_ptr()
    found = []
    for density in (0.1, 0.75):
        csfast.set_density(model, density, task="text")
        before = csfast.stats(model).neurons[0]
        decode(model, ids, 5)
        found.append(csfast.stats(model).neurons[0] - before)
    assert found[1] > 3 * found[0] > 0
    assert layer.threshold.data_ptr() == place
    csfast.set_density(model, 1)
    assert torch.equal(decode(model, ids, 5), wanted)


def test_prompts_and_large_batches_run_the_original(plans):
    model = tiny.make_model()
    mlp = layers_of(model)[0]
    x = torch.randn(engine.BATCH_MAX + 1, 1, 64)
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


STALE = {
    "written": (_write, "layer 1: up_proj was written to"),
    "replaced": (_replace, "layer 1: up_proj was moved or replaced"),
    "adapter": (_adapt, "layer 1: a projection was replaced"),
    "loaded": (_load, "layer 0: gate_proj was written to"),
    "cast": (lambda m: m.to(torch.bfloat16), "layer 0: gate_proj was moved or replaced"),
}


@pytest.mark.parametrize("name", STALE)
def test_changed_weights_are_noticed(name, plans):
    change, message = STALE[name]
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.5)
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
        plan = calibrated(model)
        csfast.apply(model, plan, density=0.5)
        model(torch.tensor([[3]]))
        assert csfast.stats(model).tokens == (1, 1)


def test_failing_kernels_are_counted_and_answered_densely(plans, monkeypatch, caplog):
    model, ids = tiny.make_model(), tiny.make_ids(1, 20)[0]
    wanted = decode(model, ids, 4)
    csfast.apply(model, plans(), density=0.1)

    def fail(*arguments):
        raise csfast.BackendError("[ffn] the device failed")

    monkeypatch.setattr(ops.Session, "ffn", fail)
    with caplog.at_level(logging.WARNING, logger="csfast"):
        assert torch.equal(decode(model, ids, 4), wanted)
    assert csfast.stats(model).fallbacks == (4, 4)
    assert len(caplog.records) == 1 and "the device failed" in caplog.text


def test_our_own_mistakes_are_not_hidden(plans, monkeypatch):
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.1)

    def fail(*arguments):
        raise ValueError("[session] no such layer")

    monkeypatch.setattr(ops.Session, "ffn", fail)
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
def test_compiled_after_apply_gives_the_same(backend, plans):
    model = tiny.make_model()
    csfast.apply(model, plans(), density=0.25)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    try:
        with torch.no_grad():
            for token in (3, 4):
                step = torch.tensor([[token]])
                assert torch.equal(compiled(step).logits, model(step).logits)
            csfast.set_density(model, 0.75)
            assert torch.equal(compiled(step).logits, model(step).logits)
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.gpu
def test_runs_on_the_gpu():
    if not ops.cuda_available():
        pytest.skip("needs a CUDA device and a build with CUDA")
    model = tiny.make_model(dtype=torch.bfloat16).cuda()
    plan = csfast.calibrate(model, tiny.make_ids(30, 80))
    ids = tiny.make_ids(1, 10)[0].cuda()
    wanted = decode(model, ids, 10)
    csfast.apply(model, plan, density=1)
    assert torch.equal(decode(model, ids, 10), wanted)
    csfast.set_density(model, 0.5)
    assert decode(model, ids, 10).isfinite().all()
    assert csfast.stats(model).tokens == (10, 10) and 0.3 < csfast.stats(model).density < 0.7
    csfast.remove(model)
    assert torch.equal(decode(model, ids, 10), wanted)
