"""The decode engine: the model's own tokens, whatever drafts them and whoever is beside them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest
import torch

import csfast
import tiny
from axes import inside
from csfast import models, ops

FAMILIES = [kind for kind in tiny.FAMILIES if kind not in ("qwen2-tied", "gemma-untied")]
LONG = {"max_position_embeddings": 1024}
# So that windows begin within a part of the attention that is summed up apart, and beyond it.
WINDOWS = {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]}
MORE = {
    "mistral": {"sliding_window": 40},
    "phi3": {"sliding_window": 40},
    "gemma2": WINDOWS,
    "gemma3": WINDOWS,
}


@functools.cache
def made(kind="llama", dtype=torch.float32):
    """A model whose norms, biases and heads all matter."""
    model = tiny.make_model(kind, initializer_range=0.1, **LONG, **MORE.get(kind, {}))
    model.set_attn_implementation("eager")  # others leave the caps of Gemma 2 out
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    for parameter in model.parameters():  # not the buffers of rotary positions
        parameter.data = parameter.data.to(dtype)
    return model


@functools.cache
def sketched(kind="llama", dtype=torch.float32, bits="4"):
    with tempfile.TemporaryDirectory() as folder:
        texts = tiny.make_ids(6, 48)
        return csfast.sketch(made(kind, dtype), texts, out=pathlib.Path(folder) / "s", bits=bits)


def spoiled(sketch, *, step=None):
    """The sketch with other codes, which still claims to be of the model."""
    draws = torch.Generator().manual_seed(2)

    def other(level):
        codes = torch.randint(0, 256, level.codes.shape, generator=draws, dtype=torch.uint8)
        return dataclasses.replace(
            level,
            codes=codes,
            step=level.step if step is None else torch.full_like(level.step, step),
        )

    matrices = {
        name: dataclasses.replace(matrix, levels=tuple(map(other, matrix.levels)))
        for name, matrix in sketch.matrices.items()
    }
    return dataclasses.replace(sketch, matrices=matrices)


def native_of(engine, length=512):
    """The native engine with room for texts of a length."""
    engine._make_room(length)
    return engine._native


def logits_of(engine, ids, chunks, *, coded=False):
    """Logits of all tokens of one text, taken in chunks of some sizes over and over."""
    native = native_of(engine, len(ids))
    native.rewind(0, 0)
    rows, sizes, at = [], itertools.cycle(chunks), 0
    while at < len(ids):
        part = ids[at : at + next(sizes)]
        native.step([0] * len(part), part, 0, coded)
        rows.append(engine.logits[: len(part)].clone())
        at += len(part)
    return torch.cat(rows)


def greedy_differs(model, ids, found):
    """The gap of the two best logits where a continuation leaves the model's own; 0 if nowhere."""
    with torch.no_grad():
        logits = model(torch.tensor([ids + found])).logits[0, len(ids) - 1 : -1]
    best = logits.topk(2).values
    off = (logits.argmax(dim=1) != torch.tensor(found)).nonzero()
    return 0.0 if len(off) == 0 else float(best[off[0, 0], 0] - best[off[0, 0], 1])


@inside(kind=FAMILIES)
def test_follows_transformers_in_float32(kind):
    """Logits are off by no more than a few times what transformers itself is in float32."""
    model = made(kind)
    (ids,) = tiny.make_ids(1, 600, seed=3)
    with torch.no_grad():
        theirs = model(ids).logits[0]
        exact = made.__wrapped__(kind, torch.float64)(ids).logits[0]
    engine = csfast.Engine(model, threads=2)
    found = logits_of(engine, ids[0].tolist(), [16])
    own = (found - exact).abs().max()
    assert float(own) < 8 * float((theirs - exact).abs().max()), float(own)
    (made_text,) = engine.generate(ids[:, :40], max_new_tokens=60, longest=0)
    assert greedy_differs(model, ids[0, :40].tolist(), made_text.ids) < 1e-3
    with torch.no_grad():
        whole = torch.cat([ids[0, :40], torch.tensor(made_text.ids)])[None]
        theirs = model(whole).logits[0, 39:-1].log_softmax(dim=-1)
    wanted = theirs[torch.arange(len(made_text.ids)), made_text.ids]
    assert torch.allclose(torch.tensor(made_text.logprobs), wanted, atol=1e-4)
    assert set(made_text.effort) == {"dense"} and made_text.checks == len(made_text.ids) - 1


@inside(kind=["llama", "qwen2", "gemma3"], dtype=[torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_company(kind, dtype):
    (ids,) = (sample[0].tolist() for sample in tiny.make_ids(1, 300, seed=4))
    sketch = sketched(kind, dtype, "2")
    for coded in (False, True):
        alone = logits_of(
            csfast.Engine(made(kind, dtype), sketch, threads=1), ids, [1], coded=coded
        )
        assert bool(torch.isfinite(alone).all())
        for threads, chunks in ((1, [16]), (2, [2, 3, 5, 7]), (3, [11, 1, 16, 4])):
            engine = csfast.Engine(made(kind, dtype), sketch, threads=threads)
            for _ in range(2):
                assert torch.equal(logits_of(engine, ids, chunks, coded=coded), alone)


def test_texts_beside_each_other_do_not_meet():
    engine = csfast.Engine(made(), threads=2)
    bound = engine._weights.bound(256)
    cache, workspace = (
        torch.zeros(n, dtype=torch.uint8) for n in ops.native.engine_bytes(bound, 3, 256)
    )
    logits = torch.zeros(16, 260)
    native = ops.native.Engine(bound, cache, workspace, logits, 3, 256, 2)
    texts = [sample[0].tolist() for sample in tiny.make_ids(3, 64, seed=5)]
    alone = [logits_of(engine, text, [16]) for text in texts]
    draws = torch.Generator().manual_seed(0)
    at = [0, 0, 0]
    while min(at) < 40:
        rows = torch.randint(0, 3, (5,), generator=draws).tolist()
        places = []
        for text in rows:
            places.append((text, at[text]))
            at[text] += 1
        native.step(rows, [texts[text][i] for text, i in places], 0, False)
        for row, (text, i) in enumerate(places):
            assert torch.equal(logits[row], alone[text][i])
        assert [native.length(text) for text in range(3)] == at
        if max(at) > 55:
            at = [length // 2 for length in at]
            for text, length in enumerate(at):
                native.rewind(text, length)


@inside(kind=["llama", "gemma3"], dtype=[torch.float32, torch.bfloat16])
def test_lossless_is_dense_for_every_length_of_drafts(kind, dtype):
    model, good = made(kind, dtype), sketched(kind, dtype)
    prompts = [sample[0].tolist() for sample in tiny.make_ids(2, 33, seed=6)]
    prompts.append(prompts[0] * 3)  # what can be looked up
    dense = csfast.Engine(model, threads=2).generate(prompts, longest=0, max_new_tokens=50)
    kept = {}
    for name, sketch in (
        ("good", good),
        ("bad", spoiled(good)),
        ("off", spoiled(good, step=math.inf)),
        ("none", None),
    ):
        engine = csfast.Engine(model, sketch, threads=2)
        for longest in range(1, 16):
            for surely, lookup in ((0.0, False), (0.2, True)):
                found = engine.generate(
                    prompts, longest=longest, surely=surely, lookup=lookup, max_new_tokens=50
                )
                for ours, wanted in zip(found, dense, strict=True):
                    assert (ours.ids, ours.logprobs) == (wanted.ids, wanted.logprobs)
                    assert ours.finish_reason == wanted.finish_reason
                    assert len(ours.effort) == len(ours.ids)
                kept[name, longest, lookup] = sum(
                    how in ("drafted", "looked up") for ours in found for how in ours.effort
                )
    assert kept["good", 8, False] > 4 * kept["bad", 8, False]
    assert kept["off", 8, False] == kept["none", 8, False] == 0


def test_a_rejected_draft_that_stays_in_the_text_is_caught():
    """What the test above compares sees the one mistake that this loop makes on purpose."""
    sketch = spoiled(sketched())
    (prompt,) = (sample[0].tolist() for sample in tiny.make_ids(1, 33, seed=6))
    engine = csfast.Engine(made(), sketch, threads=1)
    dense = engine.generate(prompt, longest=0, max_new_tokens=30)[0].ids
    native = native_of(engine)

    def decoded(n_too_many):
        native.rewind(0, 0)
        for token in prompt[:-1]:
            native.step([0], [token], 1, False)
        new, token = [], prompt[-1]
        while len(new) < 30:
            before = native.length(0)
            native.step([0], [token], 0, True)
            draft = native.choice(0)[0]
            native.rewind(0, before)
            native.step([0, 0], [token, draft], 0, False)
            first = native.choice(0)[0]
            kept = first == draft
            native.rewind(0, before + 1 + kept + (0 if kept else n_too_many))
            new += [first, native.choice(1)[0]] if kept else [first]
            token = new[-1]
        return new[:30]

    assert decoded(0) == dense
    assert decoded(1) != dense


def test_every_instruction_set_gives_the_same_bits():
    """With weights of bfloat16, of the model and of its sketch."""
    here = digest()
    for isa in ("base", "avx2"):
        done = subprocess.run(
            [sys.executable, "-c", "import test_engine; print(test_engine.digest())"],
            env={
                **os.environ,
                "CSFAST_ISA": isa,
                "PYTHONPATH": os.pathsep.join(
                    [str(pathlib.Path(__file__).parents[i]) for i in (0, 1)]
                    + [os.environ.get("PYTHONPATH", "")]
                ),
            },
            capture_output=True,
            text=True,
        )
        if f"CSFAST_ISA = {isa}: want a processor with" not in done.stderr:
            assert done.stdout.strip() == here, (isa, done.stderr)


def digest():
    """Of the bits of logits, of steps of the model and of its sketch."""
    found = hashlib.sha256()
    for kind in ("llama", "gemma3"):
        engine = csfast.Engine(made(kind, torch.bfloat16), sketched(kind, torch.bfloat16, "2"))
        (ids,) = (sample[0].tolist() for sample in tiny.make_ids(1, 40, seed=7))
        for coded in (False, True):
            found.update(logits_of(engine, ids, [7], coded=coded).numpy().tobytes())
    return found.hexdigest()


def test_takes_text_ids_and_tensors():
    tokenizer = tiny.make_tokenizer()
    engine = csfast.Engine(made(), sketched(), tokenizer=tokenizer, threads=1)
    text = "the same in every form"
    ids = models.prompt_ids(tokenizer, text)
    forms = [text, ids, torch.tensor(ids), torch.tensor([ids])]
    found = [engine.generate(form, max_new_tokens=20)[0] for form in forms]
    assert all(result == found[0] for result in found)
    assert engine.generate([ids, text], max_new_tokens=20) == [found[0]] * 2
    assert found[0].text == tokenizer.decode(found[0].ids, skip_special_tokens=True)
    stream = engine.stream(text, max_new_tokens=20)
    assert (stream.result().ids, stream.result().finish_reason) == ([], "cancelled")
    first = next(stream)
    left = stream.result()
    assert left.finish_reason == "cancelled" and 0 < len(left.ids) < 20
    assert first + "".join(stream) == found[0].text and stream.result() == found[0]
    end = found[0].ids[9]
    engine._ends = frozenset([end])
    ended = engine.generate(ids, max_new_tokens=20)[0]
    first = found[0].ids.index(end) + 1
    assert (ended.ids, ended.finish_reason) == (found[0].ids[:first], "stop")
    assert found[0].finish_reason == "length"
    needed = engine.needed_bytes(len(ids) + 20)
    bound, cache, workspace = engine._bound
    assert needed == {
        "cache": cache.nbytes,
        "workspace": workspace.nbytes,
        "logits": engine.logits.nbytes,
        "tables": bound.layers[0].cosine.nbytes + bound.layers[0].sine.nbytes,
    }


def test_logits_that_are_not_finite_end_that_text_alone():
    model = tiny.make_model()
    engine = csfast.Engine(model, threads=1)
    (prompt,) = (sample[0].tolist() for sample in tiny.make_ids(1, 20, seed=8))
    wanted = engine.generate(prompt, max_new_tokens=10)[0]
    odd = next(token for token in range(256) if token not in [*prompt, *wanted.ids])
    with torch.no_grad():  # read where the token is
        model.model.embed_tokens.weight[odd, 3] = math.nan
    with pytest.raises(csfast.NotFiniteError, match=r"^\[engine\] logits after position 20: not"):
        engine.generate([*prompt, odd], max_new_tokens=10)
    native = native_of(engine, 30)
    native.rewind(0, 20)
    with pytest.raises(csfast.NotFiniteError, match="position 20: not finite; want a model"):
        native.round(0, odd, [1, 2], 0, 0.1)
    assert native.length(0) == 20
    assert engine.generate(prompt, max_new_tokens=10)[0] == wanted


def test_threads_take_turns_and_a_stream_notices():
    engine = csfast.Engine(made(), sketched(), threads=1)
    prompts = [[5, 6, 7], [9, 8, 7, 6]]
    wanted = [engine.generate(prompt, max_new_tokens=40)[0] for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda i: engine.generate(prompts[i % 2], max_new_tokens=40)[0], range(8))
        assert list(found) == wanted * 4
    rounds = engine._rounds(prompts[0], 40, 8, 0.2, True)
    next(rounds)
    engine.generate(prompts[1], max_new_tokens=2)
    with pytest.raises(RuntimeError, match=r"^\[engine\] a stream that another call came between"):
        next(rounds)


def test_refuses_what_does_not_fit(monkeypatch):
    engine = csfast.Engine(made(), sketched(), threads=1)
    wanted = engine.generate([1], max_new_tokens=2)
    with monkeypatch.context() as patched, pytest.raises(MemoryError, match="bytes for 512 pos"):

        def full(*_, **__):
            raise RuntimeError("no memory")

        patched.setattr(torch, "zeros", full)
        engine.generate([1] * 300, max_new_tokens=2)
    assert engine.generate([1], max_new_tokens=2) == wanted
    native = native_of(engine)
    for error, message, call in (
        (
            ValueError,
            "1040 tokens, prompt included: want 1 to 1024",
            lambda: engine.generate([1] * 20, max_new_tokens=1020),
        ),
        (ValueError, "token 260: want 0 to 259", lambda: engine.generate([1, 260])),
        (ValueError, "token -1: want 0 to 259", lambda: engine.generate([1, -1])),
        (ValueError, "an empty prompt", lambda: engine.generate(torch.ones(0, dtype=torch.int64))),
        (TypeError, "no tokenizer: want token ids", lambda: engine.generate("text")),
        (TypeError, "want whole numbers", lambda: engine.generate(torch.ones(3))),
        (TypeError, "prompts of type NoneType", lambda: engine.generate(None)),
        (ValueError, "longest = 16: want 0 to 15", lambda: engine.generate([1], longest=16)),
        (ValueError, "surely = 2: want 0 to 1", lambda: engine.generate([1], surely=2)),
        (ValueError, "max_new_tokens = 0", lambda: engine.generate([1], max_new_tokens=0)),
        (TypeError, "max_new_tokens = 1.5", lambda: engine.generate([1], max_new_tokens=1.5)),
        (
            TypeError,
            "a model of torch.float32: want torch.bfloat16",
            lambda: csfast.Engine(made(), dtype=torch.bfloat16),
        ),
        (
            TypeError,
            "dtype = torch.float16: want float32 or bfloat16",
            lambda: csfast.Engine(made(), dtype=torch.float16),
        ),
        (
            TypeError,
            "a model of torch.float16: want float32",
            lambda: csfast.Engine(tiny.make_model(dtype=torch.float16)),
        ),
        (ValueError, "threads = 0", lambda: csfast.Engine(made(), threads=0)),
        (
            csfast.SketchError,
            "not those that the sketch codes",
            lambda: csfast.Engine(tiny.make_model(seed=5), sketched()),
        ),
        (
            csfast.UnsupportedModelError,
            "rotary positions of type 'dynamic'",
            lambda: csfast.Engine(
                tiny.make_model(
                    rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
                )
            ),
        ),
        (
            csfast.UnsupportedModelError,
            r"of type 'unknown': want one of llama",
            lambda: csfast.Engine(torch.nn.Linear(2, 2).eval()),
        ),
        (
            ValueError,
            "head_dim = 8: want a multiple of 16",
            lambda: csfast.Engine(tiny.make_model(head_dim=8)).generate([1]),
        ),
        (ValueError, "0 rows, 0 quiet", lambda: native.step([], [], 0, False)),
        (ValueError, "17 rows", lambda: native.step([0] * 17, [1] * 17, 0, False)),
        (ValueError, "text = 1: want one of 1", lambda: native.step([1], [1], 0, False)),
        (ValueError, "length = 999 of text 0", lambda: native.rewind(0, 999)),
        (ValueError, "16 drafts given", lambda: native.round(0, 1, [1] * 16, 0, 0.5)),
        (
            ValueError,
            "no sketch: want one to draft with",
            lambda: native_of(csfast.Engine(made())).step([0], [1], 0, True),
        ),
    ):
        with pytest.raises(error, match=message):
            call()
    native.rewind(0, 0)
    for _ in range(32):
        native.step([0] * 16, [1] * 16, 16, False)
    with pytest.raises(ValueError, match="position 512: want room for it: there is some for 512"):
        native.step([0], [1], 0, False)
    assert native.length(0) == 512
