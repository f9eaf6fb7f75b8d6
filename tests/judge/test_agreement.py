"""What coded weights are said to cost, and what their drafts are said to hold."""

import copy
import dataclasses
import json

import pytest
import torch

import tiny
from csfast import apply, judge, models, traces
from csfast.judge import agreement
from csfast.types import Document, PlanError, ResultsError
from texts import make_documents

OPTIONS = {"per_task": 3, "new_tokens": 20, "rollouts": 1, "resamples": 50}


def perturbed(model, *, noise=0.05, seed=0):
    """Weights of all linears, and of the head by its name, each with some noise."""
    draw = torch.Generator().manual_seed(seed)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    own = dict(model.named_parameters(remove_duplicate=False))
    return {
        f"{name}.weight": own[f"{name}.weight"].detach()
        + noise * torch.randn(own[f"{name}.weight"].shape, generator=draw)
        for name in names
    }


@pytest.fixture(scope="module")
def beginnings():
    """Documents of three tasks, four of each, and a prompt that is made, long enough."""
    given = [d for d in make_documents(4) if d.group != "code"]
    return [
        dataclasses.replace(d, prompt=f"{d.prompt} It is asked again.") if d.prompt else d
        for d in given
    ] + [Document("retrieval/needle", "The number is 48213. What is it?", " 48213", "48213")]


@pytest.fixture(scope="module")
def weights(model):
    return perturbed(model)


@pytest.fixture(scope="module")
def found(model, tokenizer, weights, beginnings):
    return agreement.judge_weights(model, tokenizer, weights, beginnings, **OPTIONS)


def test_the_model_itself_agrees_with_itself(model, tokenizer, beginnings, device):
    model = copy.deepcopy(model).to(device)
    results, rolled = agreement.judge_weights(
        model, tokenizer, perturbed(model, noise=0.0), beginnings, **OPTIONS
    )
    for part in (results, results["text"]):
        assert (part["kl"], part["top1"], part["delta"]) == (0, 1, 0)
        for entry in part["tasks"].values():
            assert entry["kl_ci95"] == entry["delta_ci95"] == [0, 0]
            assert entry["top1_ci95"] == [1, 1]
    assert results["expected_accepted"] == {f"{n}": n for n in range(1, 16)}
    for trace in rolled:
        for each in trace.rounds:
            # One token a pass beside sixteen: the same sums in another order.
            assert each.draft_probability == pytest.approx(each.model_probability, rel=1e-3)


def test_figures_are_those_of_their_definitions(tokenizer, beginnings):
    # A tied head is coded; what tokens are looked up in is the model's.
    model = tiny.make_model("llama-tied", initializer_range=0.1)
    weights = perturbed(model)
    assert "lm_head.weight" in weights
    twin = copy.deepcopy(model)
    twin.lm_head.weight = torch.nn.Parameter(weights["lm_head.weight"])
    twin.load_state_dict(weights | {"model.embed_tokens.weight": model.lm_head.weight}, False)
    prompts = agreement.choose_prompts(model, tokenizer, beginnings, per_task=3, new_tokens=20)
    results, _ = agreement.judge_weights(
        model, tokenizer, weights, [], prompts=prompts, rollouts=0, resamples=50
    )
    assert list(results["tasks"]) == ["instruct", "math", "prose", "retrieval"]
    assert results["outside"] == ["retrieval"]
    assert results["expected_accepted"] == {}
    for part, key in ((results, "own"), (results["text"], "given")):
        for task, entry in part["tasks"].items():
            kl, agree, delta = [], [], []
            for prompt in (prompt for prompt in prompts if prompt.task == task):
                ids = torch.cat([prompt.ids, getattr(prompt, key)])
                with torch.no_grad():
                    p, q = (
                        m(ids[None]).logits[0, len(prompt.ids) - 1 : -1].double().log_softmax(-1)
                        for m in (model, twin)
                    )
                kl += torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
                agree += p.argmax(1) == q.argmax(1)
                delta += (p - q).gather(1, ids[len(prompt.ids) :, None])[:, 0]
            assert entry["tokens"] == len(kl) and entry["documents"] == (
                3 if task != "retrieval" else 1
            )
            # Float32 sums of 260 words.
            assert entry["kl"] == pytest.approx(torch.stack(kl).mean().item(), rel=1e-4)
            assert entry["top1"] == pytest.approx(torch.stack(agree).double().mean().item())
            assert entry["delta"] == pytest.approx(torch.stack(delta).mean().item(), abs=1e-5)
            assert 0 < entry["kl_ci95"][0] <= entry["kl"] <= entry["kl_ci95"][1]
        mean = sum(part["tasks"][task]["kl"] for task in ("instruct", "math", "prose")) / 3
        assert part["kl"] == pytest.approx(mean)
        assert part["kl_ci95"][0] <= part["kl"] <= part["kl_ci95"][1]


def test_prompts_are_beginnings_of_fitting_length(model, tokenizer):
    text = "The river walks under seven green lamps. " * 4
    given = [
        Document("math/a", "What is 1 + 1, then? ", "Two."),
        Document("math/b", "Short?", "Yes."),  # fewer than 16 tokens
        Document("math/c", "Long. " * 40, "Yes."),  # with what follows beyond a context of 256
        Document("prose/a", "", text),
        Document("prose/b", "", " "),
    ]
    prompts = agreement.choose_prompts(model, tokenizer, given, new_tokens=20)
    assert [prompt.task for prompt in prompts] == ["math", "prose"]
    math, prose = prompts
    half = len(text) // 2
    assert tokenizer.decode(math.ids) == "<s>What is 1 + 1, then? "
    assert tokenizer.decode(math.given) == "Two.</s>"
    assert tokenizer.decode(prose.ids) == f"<s>{text[:half]}"
    assert tokenizer.decode(prose.given) == text[half : half + 20]
    many = make_documents(20)
    first, again, other = (
        agreement.choose_prompts(model, tokenizer, many, per_task=4, new_tokens=4, seed=seed)
        for seed in (0, 0, 1)
    )
    assert len(first) == 12  # prompts of code are too short
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.own, b.own)
    assert any(a.ids.tolist() != b.ids.tolist() for a, b in zip(first, other, strict=True))


def test_continuations_and_rollouts_take_what_generate_takes(tokenizer, beginnings):
    for kind, more in (("llama", {}), ("gemma3", {"sliding_window": 8})):
        model = tiny.make_model(kind, initializer_range=0.1, **more)
        prompts = agreement.choose_prompts(model, tokenizer, beginnings, per_task=2, new_tokens=24)
        weights = perturbed(model, noise=0.02)
        _, rolled = agreement.judge_weights(
            model, tokenizer, weights, [], prompts=prompts, new_tokens=24, rollouts=2
        )
        twin = agreement.coded(model, weights)
        assert len(rolled) == len(prompts) and any(len(t.rounds) > 3 for t in rolled), kind
        for prompt, trace in zip(prompts, rolled, strict=True):
            n = len(prompt.ids)
            options = {"do_sample": False, "min_new_tokens": 60, "max_new_tokens": 60}
            text = model.generate(
                prompt.ids[None], attention_mask=torch.ones(1, n), pad_token_id=0, **options
            )[0]
            assert torch.equal(prompt.own, text[n : n + 24]), kind
            check_rounds(model, twin, text, trace)


@torch.no_grad()
def check_rounds(model, twin, text, trace):
    """Every round, drafted anew on keys and values made for it, along the model's own text."""
    assert trace.rounds[-1].position < trace.n_prompt + 24 <= sum_of(trace)
    for each in trace.rounds:
        name = models.cache_argument(model)
        cache = model(text[None, : each.position - 1], use_cache=True)[name]
        ids = text[each.position - 1 : each.position]
        tokens = [ids]
        for chance in each.draft_probability:
            logits = twin(tokens[-1][None], use_cache=True, **{name: cache}).logits[0]
            logits[:, tiny.SIZES["eos_token_id"]] = -torch.inf
            tokens.append(logits.argmax(-1))
            assert logits.softmax(-1).max().item() == pytest.approx(chance, rel=1e-3)
        drafts = torch.cat(tokens[1:])
        whole = torch.cat([text[: each.position], drafts])
        logits = model(whole[None]).logits[0, each.position - 1 : -1]
        logits[:, tiny.SIZES["eos_token_id"]] = -torch.inf
        assert (logits.argmax(-1) == drafts).tolist() == list(each.agreed)
        said = logits.softmax(-1).gather(1, drafts[:, None])[:, 0]
        assert said.tolist() == pytest.approx(each.model_probability, rel=1e-3, abs=1e-6)
        kept = text[each.position : each.position + each.n_accepted]
        assert torch.equal(drafts[: each.n_accepted], kept)


def sum_of(trace):
    """Tokens of a text once its last round is over."""
    last = trace.rounds[-1]
    return last.position + last.n_accepted + 1


def test_an_interrupted_run_goes_on_to_the_same_result(
    model, tokenizer, weights, beginnings, found, tmp_path
):
    path = tmp_path / "left.json"
    steps = []

    def stop(done, total):
        steps.append((done, total))
        if len(steps) == 4:
            raise KeyboardInterrupt

    given = (model, tokenizer, weights, beginnings)
    with pytest.raises(KeyboardInterrupt):
        agreement.judge_weights(*given, **OPTIONS, resume=path, progress=stop)
    assert len(json.loads(path.read_text())["records"]) == 3
    seen = []
    again = agreement.judge_weights(
        *given, **OPTIONS, resume=path, progress=lambda done, total: seen.append((done, total))
    )
    assert again[0] == found[0] and traces.laid_out(again[1]) == traces.laid_out(found[1])
    assert seen[-1][0] == seen[-1][1] == steps[0][1]
    other = {name: weight + 1 for name, weight in weights.items()}
    with pytest.raises(PlanError, match="was begun with another model, sketch"):
        agreement.judge_weights(model, tokenizer, other, beginnings, **OPTIONS, resume=path)
    path.write_text("{")
    with pytest.raises(PlanError, match="want a whole JSON file"):
        agreement.judge_weights(*given, **OPTIONS, resume=path)


def test_a_coded_model_shares_what_is_not_coded_and_refuses_what_does_not_fit(
    model, tokenizer, plan, weights, beginnings
):
    some = {name: weight for name, weight in weights.items() if "mlp" in name}
    twin = agreement.coded(model, some)
    for (name, own), (_, other) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert (other is own) == (name not in some)
        assert torch.equal(other, some.get(name, own))
    assert all(torch.equal(w, model.get_parameter(n)) is False for n, w in some.items())
    name = "model.layers.0.mlp.up_proj.weight"
    own = weights[name]
    for given, error, message in (
        ({"nothing.weight": own}, ValueError, "'nothing.weight': want the name of a parameter"),
        ({name: own[:3]}, ValueError, r"of shape \(3, 64\): want \(160, 64\)"),
        ({name: own.long()}, TypeError, "in torch.int64: want them floating"),
        ({name: own * torch.nan}, ValueError, "logits that are not finite: want sound weights"),
        ({"model.embed_tokens.weight": own}, ValueError, "want the embedding as the model has it"),
    ):
        with pytest.raises(error, match=message):
            agreement.judge_weights(model, tokenizer, given, beginnings, **OPTIONS)
    for options, message in (
        ({"per_task": 0}, "prompts = 0: want 1 or more"),
        ({"new_tokens": 0}, "new_tokens = 0: want 1 or more"),
        ({"new_tokens": 230}, "in a context of 256 tokens: want at most 224"),
        ({"rollouts": -1}, "rollouts = -1"),
        ({"prompts": []}, "0 prompts: want at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            agreement.judge_weights(model, tokenizer, weights, beginnings, **OPTIONS | options)
    short = [Document("math/a", "1?", "2")]
    with pytest.raises(ValueError, match="1 documents: want at least one with a prompt"):
        agreement.choose_prompts(model, tokenizer, short)
    applied = copy.deepcopy(model)
    apply(applied, plan)
    with pytest.raises(ValueError, match=r"call csfast\.remove first"):
        agreement.coded(applied, weights)


# Traces


def test_traces_are_read_as_they_were_written_and_damaged_ones_refused(found, tmp_path):
    results, rolled = found
    path = tmp_path / "traces.json"
    path.write_text(json.dumps({"prompts": traces.laid_out(rolled)}))
    again = judge.read_traces(path)
    assert traces.laid_out(again) == traces.laid_out(rolled)
    for a, b in zip(again, rolled, strict=True):
        assert (a.task, a.n_prompt) == (b.task, b.n_prompt)
        for one, other in zip(a.rounds, b.rounds, strict=True):
            assert (one.position, one.agreed) == (other.position, other.agreed)
            assert one.draft_probability == pytest.approx(other.draft_probability, abs=1e-6)
    rounds = [each for trace in again for each in trace.rounds]
    accepted = [(*each.agreed, False).index(False) for each in rounds]
    for length, value in results["expected_accepted"].items():
        assert value == sum(min(n, int(length)) for n in accepted) / len(accepted)
    with pytest.raises(ValueError, match=r"length = 16 of \d+ rounds of 15 drafts"):
        judge.expected_accepted(again, 16)
    with pytest.raises(ValueError, match="length = 1 of 0 rounds"):
        judge.expected_accepted([], 1)
    each = judge.Round(5, (True, False), (0.5, 0.25), (0.5, 0.125))
    for changes, message in (
        ({"position": 6}, r"position = 6: want 5"),
        ({"position": 5.0}, r"position = 5.0: want a int"),
        ({"agreed": (1, 0)}, r"agreed = \[1, 0\]: want at least one true or false"),
        ({"agreed": ()}, r"agreed = \[\]: want at least one"),
        ({"draft_probability": (0.5,)}, r"draft_probability = \[0.5\]: want 2 numbers"),
        ({"model_probability": (0.5, 1.5)}, r"model_probability = .*: want 2 numbers from 0 to 1"),
    ):
        made = judge.Trace("math", 4, (dataclasses.replace(each, **changes),))
        path.write_text(json.dumps({"prompts": traces.laid_out([made])}))
        with pytest.raises(
            ResultsError, match=rf"traces.json.prompts\[0\]\.rounds\[0\]\.{message}"
        ):
            judge.read_traces(path)
    one = traces.laid_out([judge.Trace("math", 4, (each,))])[0]
    for given, message in (
        ("{", "want a whole JSON file"),
        ("[]", "without 'prompts': want it"),
        ('{"prompts": {}}', "prompts = {}: want a list"),
        ('{"prompts": [3]}', r"prompts\[0\] without 'task'"),
        (json.dumps({"prompts": [one | {"task": "a/b"}]}), "want the name of a task"),
        (json.dumps({"prompts": [one | {"prompt_tokens": True}]}), "want a whole number, 1"),
        (json.dumps({"prompts": [one | {"rounds": []}]}), "rounds = .*: want at least one"),
        (json.dumps({"prompts": [one | {"rounds": one["rounds"] * 2}]}), "position = 5: want 7"),
    ):
        path.write_text(given)
        with pytest.raises(ResultsError, match=message):
            judge.read_traces(path)
