"""The token view's data: the text is whole, the effort is that of decoding."""

import json
import math

import pytest
import torch

import tiny
from csfast import judge, models, patch
from csfast.judge import evaluate, tokens
from csfast.types import PlanError

OPTIONS = {"retrieval_prompts": 0, "tokens": 24}


@pytest.fixture(scope="module")
def shown(model, tokenizer, plan, held_out):
    return tokens.examples(model, tokenizer, plan, held_out, **OPTIONS)


def test_every_task_has_one_text(shown, plan, model):
    assert [e["task"] for e in shown["examples"]] == ["code", "instruct", "math", "prose"]
    assert shown["plan_hash"] == plan.plan_hash and not shown["generated"]
    for example in shown["examples"]:
        assert 1 <= len(example["tokens"]) < 24
        for token in example["tokens"]:
            assert len(token["density"]) == 2 and all(0 <= d <= 1 for d in token["density"])
            assert token["dense_loss"] > 0 and token["loss"] > 0
            assert 0 < token["entropy"] < math.log(260)
    json.dumps(shown, allow_nan=False)


def test_the_text_is_that_of_the_document(shown, held_out):
    originals = {(d.prompt, d.response) for d in held_out}
    for example in shown["examples"]:
        response = example["first"] + "".join(t["text"] for t in example["tokens"])
        if example["task"] == "prose":
            whole = example["prompt"] + response
            assert any(r.startswith(whole) for _, r in originals)
        else:
            assert any(
                p == example["prompt"] and (r + "</s>").startswith(response) for p, r in originals
            )


def test_losses_are_those_of_the_judge(shown, model, tokenizer, plan, held_out):
    setting = evaluate.planned(model, plan)
    for example in shown["examples"]:
        (document,) = [
            d
            for d in held_out
            if d.group == example["task"]
            and (
                d.prompt == example["prompt"]
                if d.prompt
                else d.response.startswith(example["prompt"])
            )
        ]
        whole = judge.encoded(tokenizer, document, 256)
        piece = judge.Piece(document, whole.ids[:, : whole.n_prompt + 24], whole.n_prompt)
        of = judge.effort(model, setting, piece)
        assert [t["loss"] for t in example["tokens"]] == of.loss.tolist()
        assert [t["dense_loss"] for t in example["tokens"]] == of.dense_loss.tolist()
        assert [t["density"] for t in example["tokens"]] == of.density.tolist()


def test_generated_text_is_what_decoding_gives(model, tokenizer, plan, held_out):
    got = tokens.examples(model, tokenizer, plan, held_out, generate=True, density=0.5, **OPTIONS)
    assert got["generated"]
    patch.apply(model, plan, density=0.5)
    try:
        for example in got["examples"]:
            ids = tokenizer.encode(example["prompt"])
            name = models.cache_argument(model)
            cache, step, made = None, torch.tensor([ids]), []
            with torch.no_grad():
                for _ in range(24):
                    out = model(input_ids=step, use_cache=True, **{name: cache})
                    cache = out[name]
                    step = out.logits[:, -1:].argmax(dim=-1)
                    made.append(int(step))
            shown = example["first"] + "".join(t["text"] for t in example["tokens"])
            assert shown == tokenizer.decode(made)
            # The likeliest of 260 tokens has at least their mean probability.
            assert all(t["loss"] <= math.log(260) for t in example["tokens"])
    finally:
        patch.remove(model)
    assert "forward" not in vars(model.model.layers[0].mlp)


def test_full_density_costs_everything_and_nothing(model, tokenizer, plan, held_out):
    got = tokens.examples(model, tokenizer, plan, held_out, density=1.0, **OPTIONS)
    for example in got["examples"]:
        for token in example["tokens"]:
            assert token["density"] == [1.0, 1.0]
            assert token["loss"] == token["dense_loss"]


def test_characters_stay_whole(tokenizer):
    text = "aé漢🙂b"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = tokens.texts(tokenizer, ids, 1)
    assert "".join(pieces) == text[1:]
    assert pieces == ["", "é", "", "", "漢", "", "", "", "🙂", "b"]


def test_a_text_that_ends_within_a_character_ends_with_its_mark(tokenizer):
    ids = tokenizer.encode("a漢", add_special_tokens=False)
    pieces = tokens.texts(tokenizer, ids[:3], 0)
    assert pieces[0] == "a" and pieces[1] == "" and pieces[2].startswith(tokens.HALF)


def test_the_long_enough_comes_before_the_longest(tokenizer):
    def piece(n):
        return judge.Piece(None, torch.zeros(1, 2 + n, dtype=torch.int64), 2)

    short, enough, longest = piece(5), piece(tokens.TOKENS_MIN + 1), piece(80)
    assert tokens._long_enough([short, enough, longest]) is enough
    assert tokens._long_enough([piece(3), short]) is short


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens": 2}, ValueError, r"^\[tokens\] tokens = 2: want at least 3\.$"),
        ({"density": 0.0}, ValueError, r"^\[tokens\] density = 0\.0: want one in \(0, 1\]\.$"),
        ({"bits": 4}, ValueError, "bits = 4: want one of 2, 3"),
        ({"task": "chess"}, ValueError, "'chess': want one of"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_what_cannot_be_shown_is_refused(model, tokenizer, plan, held_out, options, error, message):
    with pytest.raises(error, match=message):
        tokens.examples(model, tokenizer, plan, held_out, **{**OPTIONS, **options})


def test_another_model_is_refused(tokenizer, plan, held_out):
    with pytest.raises(PlanError):
        tokens.examples(tiny.make_model(seed=3), tokenizer, plan, held_out, **OPTIONS)
