"""What evaluate gives: paired figures, every byte counted, and the model as it was."""

import copy
import json
import math

import pytest
import torch

import tiny
from csfast import calibrate, documents, judge, models, patch
from csfast.judge import evaluate
from csfast.types import Document, PlanError, UnsupportedModelError
from texts import make_documents

OPTIONS = {"retrieval_prompts": 0, "tokens": 150, "resamples": 50}


@pytest.fixture(scope="module")
def results(model, tokenizer, plan, held_out):
    return evaluate.evaluate(model, tokenizer, plan, held_out, density=0.5, answers=3, **OPTIONS)


def test_chunks_change_rounding_only(model, tokenizer, plan, held_out, results):
    parts = evaluate.evaluate(
        model, tokenizer, plan, held_out, density=0.5, answers=3, chunk=3, **OPTIONS
    )
    assert parts["density_per_layer"] == results["density_per_layer"]
    for group, entry in results["tasks"].items():
        for key in ("dense_loss", "loss", "kl", "top1_agreement"):
            assert parts["tasks"][group][key] == pytest.approx(entry[key], rel=1e-4)


def test_full_density_scores_the_dense_model(model, tokenizer, plan, held_out):
    full = evaluate.evaluate(model, tokenizer, plan, held_out, density=1.0, answers=2, **OPTIONS)
    assert full["bytes_fraction"] == full["token_bytes_fraction"] == 1
    assert full["density_per_layer"] == [1.0, 1.0]
    for entry in full["tasks"].values():
        assert entry["delta"] == 0 and entry["kl"] == 0 and entry["top1_agreement"] == 1
        assert entry["ci95"] == [0, 0]
        assert entry["exact_match"] == entry["dense_exact_match"]


# What evaluate gives


def test_results_have_the_keys_others_build_on(results):
    assert list(results["tasks"]) == ["code", "instruct", "math", "prose"]
    assert results["outside"] == []
    for entry in results["tasks"].values():
        assert {
            *("dense_loss", "loss", "delta", "ci95", "kl", "top1_agreement", "exact_match"),
            *("tokens", "sparse_tokens"),
        } <= set(entry)
        assert entry["delta"] == pytest.approx(entry["loss"] - entry["dense_loss"])
        assert entry["ci95"][0] <= entry["delta"] + 1e-9 or entry["documents"] < 8
        assert entry["kl"] > 0
        assert 0 < entry["top1_agreement"] <= 1
        # All tokens after the prompt but the first of each document come from sparse positions.
        assert entry["tokens"] - entry["sparse_tokens"] == entry["documents"]
    deltas = [entry["delta"] for entry in results["tasks"].values()]
    assert results["mean_delta"] == pytest.approx(sum(deltas) / 4)
    assert results["mean_ci95"][0] <= results["mean_delta"] <= results["mean_ci95"][1]
    json.dumps(results, allow_nan=False)


@pytest.mark.parametrize(("kind", "dtype"), [("qwen2", torch.float32), ("llama", torch.bfloat16)])
def test_other_models_and_dtypes_are_judged(tokenizer, held_out, kind, dtype):
    other = tiny.make_model(kind, dtype=dtype, initializer_range=0.1)
    plan = calibrate(other, documents.split(make_documents(12), "select"), tokenizer)
    found = evaluate.evaluate(other, tokenizer, plan, held_out, density=0.5, bits=3, **OPTIONS)
    assert 0.3 < found["density"] < 0.7
    assert all(entry["kl"] > 0 for entry in found["tasks"].values())
    full = evaluate.evaluate(other, tokenizer, plan, held_out, density=1.0, **OPTIONS)
    assert full["mean_delta"] == 0


def test_results_name_plan_and_model(results, plan):
    assert results["plan_hash"] == plan.plan_hash
    assert results["model_hash"] == plan.model.model_hash
    assert results["seed"] == 0


def test_results_count_bytes(results, model):
    # d = 64 pads to a chunk of 128: 160 * 2 * 32 + 160 * 8 + 64 * 4 bytes of sensing.
    dense, sensor = 3 * 64 * 160 * 2, 10_240 + 1280 + 256
    neurons = [density * 160 for density in results["density_per_layer"]]
    spent = sum(sensor + n * (3 * 64 * 2 + 4) for n in neurons)
    assert results["bytes_fraction"] == pytest.approx(spent / (2 * dense))
    # Attention 64 * (64 + 32 + 32 + 64) a layer and a head of 260 * 64, at two bytes.
    rest = (2 * 64 * 192 + 260 * 64) * 2
    assert results["token_bytes_fraction"] == pytest.approx((spent + rest) / (2 * dense + rest))
    assert results["density"] == pytest.approx(sum(results["density_per_layer"]) / 2)
    by_task = results["density_per_task_layer"]
    assert set(by_task) == set(results["tasks"])
    for layer, density in enumerate(results["density_per_layer"]):
        assert density == pytest.approx(sum(of[layer] for of in by_task.values()) / len(by_task))
    assert 0.3 < results["density"] < 0.7


def test_results_are_the_same_twice(model, tokenizer, plan, held_out, results):
    again = evaluate.evaluate(model, tokenizer, plan, held_out, density=0.5, answers=3, **OPTIONS)
    assert again == results


def test_short_answers_are_decoded(results):
    assert results["tasks"]["math"]["answers"] == 3
    assert 0 <= results["tasks"]["math"]["exact_match"] <= 1
    assert results["tasks"]["prose"]["exact_match"] is None


@pytest.mark.parametrize(
    ("text", "right"),
    [(" 48213", True), (" a = b = 48213\nmore", True), ("48214", False), ("", False)],
)
def test_a_retrieval_answer_is_judged_by_its_number(text, right):
    document = Document("retrieval/variables", "let a = 48213", " a = 48213", "48213")
    assert evaluate._is_right(document, text) == right


@pytest.mark.parametrize(
    ("text", "right"), [(" 12", True), ("12\nQuestion", True), ("120", False), ("", False)]
)
def test_a_short_answer_is_judged_whole(text, right):
    assert evaluate._is_right(Document("math/sum", "6 + 6", " 12"), text) == right


# The model is left alone


def test_the_modules_are_restored_after_an_error(model, tokenizer, plan, held_out):
    def stop(done, total):
        raise KeyboardInterrupt

    before = [vars(ffn.module).copy() for ffn in models.find_ffns(model)]
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(model, tokenizer, plan, held_out, progress=stop, **OPTIONS)
    ffns = models.find_ffns(model)
    assert [vars(ffn.module) for ffn in ffns] == before


def test_a_model_with_csfast_applied_is_refused(model, tokenizer, plan, held_out):
    patch.apply(model, plan)
    try:
        with pytest.raises(ValueError, match=r"^\[.*\].*csfast"):
            evaluate.evaluate(model, tokenizer, plan, held_out, **OPTIONS)
    finally:
        patch.remove(model)


def test_progress_rises_to_the_total(model, tokenizer, plan, held_out):
    seen = []
    evaluate.evaluate(
        model, tokenizer, plan, held_out, progress=lambda *at: seen.append(at), **OPTIONS
    )
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(set(done)) and done[-1] == totals[0] and len(set(totals)) == 1


# Refusals


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, math.nan])
def test_a_density_out_of_range_is_refused(model, tokenizer, plan, held_out, density):
    with pytest.raises(ValueError, match=r"^\[evaluate\] density = .*: want one in \(0, 1\]\.$"):
        evaluate.evaluate(model, tokenizer, plan, held_out, density=density)


def test_no_documents_are_refused(model, tokenizer, plan):
    with pytest.raises(ValueError, match=r"^\[evaluate\] 0 documents: want at least one\.$"):
        evaluate.evaluate(model, tokenizer, plan, [])


def test_documents_without_sparse_tokens_are_refused(model, tokenizer, plan):
    short = [Document("prose/x", "", "as short as thirty-two tokens")]
    with pytest.raises(ValueError, match=r"^\[evaluate\] 1 documents: want at least one with two"):
        evaluate.evaluate(model, tokenizer, plan, short)


def test_a_name_of_no_task_is_refused(model, tokenizer, plan):
    for name in ("", ".x", "pooled"):
        odd = [Document(f"{name}/x", "a", "bcd")]
        with pytest.raises(ValueError, match=rf"^\[evaluate\] task '{name}': want up to 64 "):
            evaluate.evaluate(model, tokenizer, plan, odd)


def test_tasks_have_any_name_and_made_prompts_stand_outside_the_mean(tokenizer):
    long = tiny.make_model(max_position_embeddings=2048, initializer_range=0.1)
    texts = [
        Document(
            {"math": "Sums & so on", "code": "text"}.get(d.group, d.group), d.prompt, d.response
        )
        for d in make_documents(12)
    ]
    select, report = (documents.split(texts, part) for part in ("select", "report"))
    plan = calibrate(long, select, tokenizer)
    given = {"density": 0.5, "answers": 0, "tokens": 100, "resamples": 50}
    alone = evaluate.evaluate(long, tokenizer, plan, report, **given)
    found = evaluate.evaluate(long, tokenizer, plan, report, retrieval_prompts=6, **given)
    mine = ["Sums & so on", "instruct", "prose", "text"]
    assert list(alone["tasks"]) == mine and alone["outside"] == []
    assert list(found["tasks"]) == [*mine, "retrieval"] and found["outside"] == ["retrieval"]
    deltas = [found["tasks"][task]["delta"] for task in mine]
    assert found["mean_delta"] == pytest.approx(sum(deltas) / 4)
    # What is made beside them changes nothing of theirs but what batches round.
    for key in ("mean_delta", "bytes_fraction", "density"):
        assert found[key] == pytest.approx(alone[key], rel=0.02, abs=1e-5)
    assert found["mean_ci95"] == pytest.approx(alone["mean_ci95"], rel=0.02, abs=1e-5)
    only = [
        d
        for d in judge.with_retrieval(long, tokenizer, report, n=6, max_tokens=2048, seed="0")
        if d.group == "retrieval"
    ]
    left = evaluate.evaluate(long, tokenizer, plan, only, **given)
    assert left["outside"] == [] and left["mean_delta"] == left["tasks"]["retrieval"]["delta"]


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"


def test_chats_are_scored_by_the_template_of_the_model(model, tokenizer, plan):
    chats = [
        Document("chat", "", f" the answer {i} is long enough", None, (("user", f"what is {i}?"),))
        for i in range(6)
    ]
    options = {"density": 0.5, "answers": 4, "tokens": 100, "resamples": 20}
    with pytest.raises(UnsupportedModelError, match="has no chat template"):
        evaluate.evaluate(model, tokenizer, plan, chats, **options)
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHAT
    found = evaluate.evaluate(model, own, plan, chats, **options)["tasks"]["chat"]
    assert found["documents"] >= 3 and found["delta"] != 0 and found["answers"] == 0
    texts = [
        Document("chat", f"<user>what is {i}?</s>\n<assistant>", d.response)
        for i, d in enumerate(chats)
    ]
    same = evaluate.evaluate(model, tokenizer, plan, texts, **options)["tasks"]["chat"]
    assert (found["tokens"], found["sparse_tokens"]) == (same["tokens"], same["sparse_tokens"])
    own.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ValueError, match=r"refuses \(no such role\)"):
        evaluate.evaluate(model, own, plan, chats, **options)


@pytest.mark.parametrize("name", ["tokens", "response_tokens"])
def test_too_few_tokens_are_refused(model, tokenizer, plan, held_out, name):
    with pytest.raises(ValueError, match=rf"^\[evaluate\] {name} = 1: want at least 2\.$"):
        evaluate.evaluate(model, tokenizer, plan, held_out, **{name: 1})


def test_a_negative_seed_is_refused(model, tokenizer, plan, held_out):
    with pytest.raises(ValueError, match=r"^\[evaluate\] seed = -1: want 0 or more\.$"):
        evaluate.evaluate(model, tokenizer, plan, held_out, seed=-1, **OPTIONS)


def test_a_plan_of_another_model_is_refused(tokenizer, plan, held_out):
    with pytest.raises(PlanError):
        evaluate.evaluate(tiny.make_model(seed=5), tokenizer, plan, held_out)


@pytest.mark.parametrize("kind", ["llama-bias", "gemma", "phi3"])
@pytest.mark.parametrize(("bits", "block"), [(2, 1), (2, 16), ("ternary", 48)])
def test_a_layer_is_judged_as_it_is_executed(kind, bits, block):
    """The judge's supports have the sizes of decoding's, its outputs are theirs up to rounding."""
    model = tiny.make_model(kind)
    plan = calibrate(model, tiny.make_ids(30, 80), bits=(bits,), blocks=(block,))
    ffns = models.find_ffns(model)
    rule = evaluate.PlanRule(ffns, plan, density=0.4, bits=bits, block=block, task="pooled")
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        judged = [rule.run(layer, x, (), None) for layer in range(2)]
        patch.apply(model, plan, density=0.4, bits=bits, block=block)
        for layer, (out, _) in enumerate(judged):
            found = ffns[layer].module(x[:, None])[:, 0]
            # Float32 sums of 160 products of sums of 64, in another order.
            torch.testing.assert_close(found, out, rtol=1e-5, atol=1e-6 * float(out.abs().max()))
    counted = patch.stats(model).neurons
    assert counted == tuple(int(counts.sum()) for _, counts in judged)
    assert 0 < counted[0] < 16 * 160
