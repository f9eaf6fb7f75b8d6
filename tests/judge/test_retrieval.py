"""Retrieval tasks: lengths, answers that can be found again by other means, refusals."""

from __future__ import annotations

import dataclasses
import re
from random import Random

import pytest

from csfast.judge import retrieval

LENGTHS = (200, 500, 1000, 1900)
CELLS = [(kind, tokens) for kind in retrieval.KINDS for tokens in LENGTHS]


def count_tokens(text: str) -> int:
    """Words, single digits and signs, and one opening token, as the demo model's tokenizer."""
    return len(re.findall(r"\d|[^\W\d]+|[^\w\s]|\n| (?=\d)", text)) + 1


def make(kind: str, tokens: int, seed: int) -> retrieval.Sample:
    return retrieval.retrieval_sample(kind, tokens, Random(seed), count_tokens)


def find_answer(sample: retrieval.Sample) -> str:
    """Answer a prompt by reading it, knowing nothing of how it was made."""
    asked = re.search(r"What is the (.+)\?\nAnswer:$", sample.prompt)
    assert asked is not None
    fact, _, subject = asked[1].rpartition(" of ")
    subject = subject.removeprefix("the ")
    if sample.task == "retrieval/needle":
        found = re.findall(rf"The {fact} of the {subject} is (\d+)\.", sample.prompt)
    elif sample.task == "retrieval/key_value":
        found = re.findall(rf"^[-|] {subject}(?::| \|) (\d+)", sample.prompt, re.MULTILINE)
    else:
        lines = re.findall(r"^let (\w+) = (\w+)$", sample.prompt, re.MULTILINE)
        origins = dict(lines)
        assert len(origins) == len(lines), "a variable is set twice"
        while subject in origins:
            subject = origins[subject]
        found = [subject]
    assert len(found) == 1, "the question has not exactly one answer"
    return found[0]


@pytest.mark.parametrize(("kind", "tokens"), CELLS)
def test_answer_can_be_found_in_the_prompt(kind: str, tokens: int) -> None:
    for seed in range(30):
        sample = make(kind, tokens, seed)
        assert find_answer(sample) == sample.answer
        assert sample.answer in sample.prompt
        assert sample.response.endswith(sample.answer)


@pytest.mark.parametrize(("kind", "tokens"), CELLS)
def test_prompt_is_as_long_as_wanted(kind: str, tokens: int) -> None:
    # Short by less than a line or sentence, the longest of which has 14 tokens by count_tokens.
    for seed in range(30):
        assert tokens - 14 < count_tokens(make(kind, tokens, seed).prompt) <= tokens


@pytest.mark.parametrize("kind", retrieval.KINDS)
def test_mean_length_is_within_five_per_cent(kind: str) -> None:
    for tokens in LENGTHS:
        lengths = [count_tokens(make(kind, tokens, seed).prompt) for seed in range(50)]
        assert 0.95 * tokens <= sum(lengths) / len(lengths) <= tokens


@pytest.mark.parametrize("kind", retrieval.KINDS)
def test_shortest_prompt_can_be_made(kind: str) -> None:
    for seed in range(100):
        sample = make(kind, retrieval.TOKENS_MIN, seed)
        assert find_answer(sample) == sample.answer


@pytest.mark.parametrize("kind", retrieval.KINDS)
def test_equal_seeds_give_equal_samples(kind: str) -> None:
    assert make(kind, 700, 3) == make(kind, 700, 3)
    assert make(kind, 700, 3) != make(kind, 700, 4)


@pytest.mark.parametrize("kind", retrieval.KINDS)
def test_samples_vary(kind: str) -> None:
    made = [make(kind, 300, seed) for seed in range(50)]
    assert {s.task for s in made} == {f"retrieval/{kind}"}
    assert len({s.answer for s in made}) > 45  # of 90,000: two equal among 50 is already rare
    assert len({s.prompt for s in made}) == 50


@pytest.mark.parametrize("kind", retrieval.KINDS)
def test_every_query_of_a_context_is_answered_by_it(kind: str) -> None:
    context = retrieval.retrieval_context(kind, 800, Random(5), count_tokens)
    assert context.queries
    for query in context.queries:
        prompt = context.text + query.question
        sample = retrieval.Sample(context.task, prompt, query.response, query.answer)
        assert find_answer(sample) == query.answer
        assert retrieval.is_correct(sample, query.response)


def test_sample_asks_the_first_query_of_its_context() -> None:
    context = retrieval.retrieval_context("needle", 400, Random(9), count_tokens)
    sample = make("needle", 400, 9)
    assert sample.prompt == context.text + context.queries[0].question
    assert sample.response == context.queries[0].response


def test_variables_are_asked_only_through_a_chain() -> None:
    # " c = b = 48213": two equals signs are one step back, and a chain has at most four names.
    signs = {make("variables", 500, seed).response.count("=") for seed in range(100)}
    assert signs == {2, 3, 4}


def test_sample_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make("needle", 200, 0).answer = "1"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 48213", True),
        ("48213\nQuestion: What", True),
        (" 48213<|endoftext|> 5", True),
        (" c = b = 48213", True),
        (" 48213 = c", False),
        ("\n48213", False),
        (" 482130", False),
        (" 4821", False),
        (" it is 48213", False),
        ("", False),
    ],
)
def test_is_correct_wants_exactly_the_answer(text: str, right: bool) -> None:
    sample = retrieval.Sample("retrieval/variables", "", " c = b = 48213", "48213")
    assert retrieval.is_correct(sample, text) is right


def test_refuses_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match=r"\[tasks\] kind 'haystack': must be one of key_value"):
        make("haystack", 500, 0)


@pytest.mark.parametrize("tokens", [retrieval.TOKENS_MIN - 1, retrieval.TOKENS_MAX + 1])
def test_refuses_lengths_out_of_range(tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"\[tasks\] tokens = {tokens}: must lie between"):
        make("needle", tokens, 0)


@pytest.mark.parametrize("kind", retrieval.KINDS)
def test_refuses_to_count_too_sparsely(kind: str) -> None:
    with pytest.raises(ValueError, match=r"\[tasks\] \d+ lines of .*: 1900 were wanted"):
        retrieval.retrieval_sample(kind, 1900, Random(0), lambda text: len(text.splitlines()))


@pytest.mark.parametrize("kind", retrieval.KINDS)
def test_refuses_to_count_too_finely(kind: str) -> None:
    with pytest.raises(ValueError, match=r"\[tasks\] the shortest prompt has \d+ tokens"):
        retrieval.retrieval_sample(kind, 100, Random(0), lambda text: 10 * len(text))
