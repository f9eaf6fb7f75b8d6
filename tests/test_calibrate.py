import os
import signal
import threading
import time

import pytest
import torch

import tiny
from csfast import models, reference
from csfast.calibrate import _BINS, _SHIFT, _thresholds, calibrate
from csfast.plan import Plan
from csfast.types import Document, PlanError

DENSITIES = (0.1, 0.25, 0.5, 0.75, 1.0)


def run(model=None, samples=None, **options):
    model = tiny.make_model() if model is None else model
    samples = tiny.make_ids(30, 80) if samples is None else samples
    return calibrate(model, samples, **{"densities": DENSITIES, **options})


def kept_fraction(model, plan, ids, *, bits, density, task="pooled"):
    """Fraction of neurons that the thresholds keep at the sparse positions, layer by layer."""
    kept = [[] for _ in plan.layers]
    ffns = models.find_ffns(model)

    def watch(layer):
        def hook(_, inputs):
            x = inputs[0][0, models.N_DENSE :]
            weights = (w.weight for w in (ffns[layer].gate, ffns[layer].up, ffns[layer].down))
            codes = plan.layers[layer].encode(*weights, bits=bits)
            y, scale = reference.sense(codes, plan.layers[layer].equal, x, bits=bits)
            usage = reference.usage(y, scale, plan.layers[layer].row_scale[bits])
            threshold = plan.threshold(layer, bits=bits, density=density, task=task)
            full = torch.full_like(scale, threshold)
            kept[layer].append(reference.keep_threshold(usage, full, scale).double().mean())

        return hook

    handles = [f.module.register_forward_pre_hook(watch(i)) for i, f in enumerate(ffns)]
    with torch.no_grad():
        for sample in ids:
            model(sample)
    for handle in handles:
        handle.remove()
    return [float(torch.stack(k).mean()) for k in kept]


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thresholds_keep_the_wanted_fraction(bits, dtype):
    model, ids = tiny.make_model(dtype=dtype), tiny.make_ids(30, 80)
    plan = run(model, ids)
    for density in DENSITIES[:-1]:
        for found in kept_fraction(model, plan, ids, bits=bits, density=density):
            # The same positions as in calibration, counted by the kernels' arithmetic in float64: a
            # bin is 1/64 octave wide and interpolated, so the fraction may move by a part of it.
            assert found == pytest.approx(density, abs=0.002)


def test_pooled_weighs_tasks_equally():
    draw = torch.Generator().manual_seed(0)
    histogram = torch.zeros(1, 2, _BINS, dtype=torch.int64)
    few = torch.rand(1000, generator=draw) + 1
    many = torch.rand(9000, generator=draw) + 2
    for task, usage in enumerate((few, many)):
        bins = usage.view(torch.int32) >> _SHIFT
        histogram[0, task] = torch.bincount(bins, minlength=_BINS)
    pooled, first, second = _thresholds(histogram, (0.5, 0.75, 1.0))[0]
    assert pooled[0] == pytest.approx(2, rel=1 / 64) and pooled[1] == pytest.approx(1.5, rel=1 / 64)
    assert first[0] == pytest.approx(float(few.median()), rel=1 / 64)
    assert second[0] == pytest.approx(float(many.median()), rel=1 / 64)
    assert pooled[2] == first[2] == second[2] == 0


def test_dead_neurons_have_threshold_zero():
    histogram = torch.zeros(1, 1, _BINS, dtype=torch.int64)
    histogram[0, 0, 0] = 90  # usages of 0
    histogram[0, 0, 127 << (23 - _SHIFT)] = 10  # usages of about 1
    found = _thresholds(histogram, (0.05, 0.5, 1.0))[0, 0]
    assert 1 <= found[0] <= 1 + 1 / 64 and found[1] == 0


def test_equal_arguments_give_equal_bytes():
    first, second = run(), run()
    assert first.plan_hash == second.plan_hash
    assert run(seed=1).plan_hash != first.plan_hash


def test_documents_are_calibrated_by_task():
    documents = [Document("math/a", "1+1=", " two" * 8) for _ in range(9)]
    documents += [Document("prose/b", "", "once upon a time " * 9) for _ in range(3)]
    plan = run(samples=documents, tokenizer=tiny.make_tokenizer())
    assert plan.tasks == ("pooled", "math", "prose")
    assert set(plan.n_tokens) == {"math", "prose"} and min(plan.n_tokens.values()) > 16
    assert not torch.equal(plan.thresholds[2][:, 1], plan.thresholds[2][:, 2])


def test_strings_and_one_sample_will_do():
    text = "It was a calm day, and nobody was in a hurry. " * 4
    plan = run(samples=text, tokenizer=tiny.make_tokenizer())
    assert plan.tasks == ("pooled", "text")


def test_padding_changes_nothing():
    """A short sequence beside a long one counts as it does alone."""
    model = tiny.make_model()
    long, short = tiny.make_ids(1, 120)[0], tiny.make_ids(1, 60, seed=1)[0]
    both = run(model, [long, short])
    assert both.n_tokens["text"] == 120 + 60 - 2 * models.N_DENSE
    changed = short.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 256
    assert run(model, [long, changed]).plan_hash != both.plan_hash


def test_share_of_tokens_is_kept():
    plan = run(max_tokens=2000)
    assert plan.n_tokens["text"] <= 2000
    assert plan.n_tokens["text"] == 25 * (80 - models.N_DENSE)


def test_model_is_left_as_it_was():
    model = tiny.make_model()
    before = {n: (p._version, p.data_ptr()) for n, p in model.named_parameters()}
    run(model)
    assert {n: (p._version, p.data_ptr()) for n, p in model.named_parameters()} == before
    assert not model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_massive_channels_change_nothing(kind):
    """Outliers that leave the function alone leave codes, thresholds and so all supports alone."""
    plain, massive = tiny.make_model(kind), tiny.make_model(kind)
    tiny.scale_channels(massive)
    one, other = run(plain), run(massive)
    for i, (a, b) in enumerate(zip(one.layers, other.layers, strict=True)):
        assert torch.equal(a.equal[4:], b.equal[4:])
        assert torch.equal(a.equal[:4], 64 * b.equal[:4])
        for bits in (2, 3):
            assert torch.equal(a.row_scale[bits], b.row_scale[bits])
            mlps = (m.model.layers[i].mlp for m in (plain, massive))
            codes = [
                p.encode(m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight, bits=bits)
                for m, p in zip(mlps, (a, b), strict=True)
            ]
            assert torch.equal(*codes)
    for bits in (2, 3):
        # The forward passes round in another order, so a few usages move to a neighbouring bin.
        torch.testing.assert_close(one.thresholds[bits], other.thresholds[bits], rtol=1e-3, atol=0)


def test_progress_is_told_after_every_batch():
    seen = []
    run(progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 1 and seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == seen[0][1] > seen[0][0] > 0


class StopError(Exception):
    pass


def test_interrupted_run_goes_on_to_the_same_bytes(tmp_path):
    samples = tiny.make_ids(120, 80)
    wanted = run(samples=samples).plan_hash
    for stop_after in range(1, 6):
        path = tmp_path / f"{stop_after}.resume"
        calls = []

        def stop(done, total, calls=calls, stop_after=stop_after):
            calls.append(done)
            if len(calls) == stop_after:
                raise StopError

        with pytest.raises(StopError):
            run(samples=samples, resume=path, progress=stop)
        assert len(calls) == stop_after
        rest = []
        plan = run(samples=samples, resume=path, progress=lambda d, t, rest=rest: rest.append(d))
        assert plan.plan_hash == wanted
        assert not rest or rest[0] > calls[-1]
    again = run(samples=samples, resume=path, progress=lambda d, t: pytest.fail("ran again"))
    assert again.plan_hash == wanted


@pytest.mark.parametrize(
    "change",
    [
        {"model": tiny.make_model(seed=1)},
        {"samples": tiny.make_ids(30, 80, seed=1)},
        {"bits": (2,)},
        {"seed": 1},
        {"max_tokens": 1000},
    ],
    ids=["model", "samples", "bits", "seed", "max_tokens"],
)
def test_resume_of_other_arguments_is_refused(tmp_path, change):
    run(resume=tmp_path / "a.resume")
    with pytest.raises(PlanError, match="was begun with another model, samples or options"):
        run(**change, resume=tmp_path / "a.resume")


def test_damaged_resume_file_is_refused(tmp_path):
    run(resume=tmp_path / "a.resume")
    raw = bytearray((tmp_path / "a.resume").read_bytes())
    raw[-5] ^= 1
    (tmp_path / "a.resume").write_bytes(raw)
    with pytest.raises(PlanError, match="SHA-256"):
        run(resume=tmp_path / "a.resume")
    run().save(tmp_path / "a.plan")
    with pytest.raises(PlanError, match="want a file of calibrate's option resume"):
        run(resume=tmp_path / "a.plan")


@pytest.mark.slow
def test_ctrl_c_comes_through_at_once(tmp_path):
    """At the sizes of the demo model: what a signal waits for is one product, or one write."""
    sizes = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1152}
    model = tiny.make_model(
        dtype=torch.bfloat16, num_hidden_layers=6, max_position_embeddings=2048, **sizes
    )
    before = {n: sorted(vars(m)) for n, m in model.named_modules()}
    waits = []
    for delay in (0.05, 0.2, 0.4, 0.7, 1.1):
        sent = []

        def interrupt(sent=sent):
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Timer(delay, interrupt)
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            run(model, tiny.make_ids(60, 700), resume=tmp_path / "a.resume")
            timer.join()
        waits.append(time.monotonic() - sent[0])
    assert {n: sorted(vars(m)) for n, m in model.named_modules()} == before
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not list(tmp_path.glob("*.tmp"))
    # The median, since other processes of the machine may hold up any one of them.
    assert sorted(waits)[2] < 0.25, waits


def test_plan_belongs_to_its_model(tmp_path):
    model = tiny.make_model()
    plan = run(model)
    plan.save(tmp_path / "a.plan")
    Plan.load(tmp_path / "a.plan").check(model)
