"""Retrieval tasks: prompts of a chosen length whose answer stands somewhere in the prompt.

Everything is made from templates by an explicit random generator, so fresh prompts never run out,
need no files, and equal seeds give equal prompts. Dropping the wrong token or neuron of a model
shows here first: an answer of five random digits cannot be guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Final

KINDS: Final = ("key_value", "needle", "variables")
TOKENS_MIN: Final = 100
TOKENS_MAX: Final = 1900

# A key, a fact's subject or a variable's name; enough of them for the longest prompt.
_WORDS: Final = tuple(
    """
    acorn almond amber anchor antler apple apron arrow attic autumn bacon badge badger bakery
    bamboo banjo barley barrel basin basket beacon beaver bell bench berry bishop blanket blossom
    bonnet bottle boulder branch brandy brass bread breeze brick bridge bronze brook broom bucket
    buffalo bundle butter button cabin cactus camel candle canoe canyon carbon cargo carpet carrot
    castle cattle cedar cellar chalk cherry chess chimney cider cinder circus clay cliff clover
    cloud coal cobalt coffee comet compass copper coral corn cotton cradle crane crater creek
    cricket crown crystal curtain cypress daisy dancer desert diamond dinner doctor dolphin donkey
    dragon drum eagle earth ebony echo elbow ember emerald engine falcon farmer feather fennel ferry
    fiddle finger flag flame flint flower flute forest fossil fountain fox frost galaxy garden
    garlic garnet gate ginger glacier glass globe goat gold granite grape gravel guitar hammer
    hamlet harbor harp harvest hazel helmet heron hill hollow honey horse hotel hunter igloo indigo
    iron island ivory jacket jaguar jasmine jewel jungle kettle kitchen kitten ladder lagoon lamp
    lantern lark lattice laurel lava leather lemon lentil lettuce library lily lime linen lion
    lizard lobster locket lotus lumber magnet maple marble market meadow melon mercury metal mill
    mint mirror monkey moss motor mountain muffin mustard needle nest nickel north nutmeg oak oasis
    ocean olive onion opal orange orchard orchid otter oven owl oyster paddle palace panther paper
    parrot pasture peach pearl pebble pelican pencil pepper piano pigeon pillow pine pirate planet
    plaza plum pocket pond poppy potato prairie prism pumpkin quartz quilt rabbit radish rain raven
    reef ribbon rice river robin rocket rope rose ruby saddle saffron sail salmon sand sapphire
    satin saucer scarf school sesame shadow shark shell shore shovel silk silver skate sleet smoke
    snow soup sparrow spice spider spinach spoon spruce squash stable star steam stone storm straw
    summit sunset swan table tailor temple thistle thunder tiger timber toast tomato torch tower
    train trumpet tulip tunnel turkey turtle valley vanilla velvet violet violin walnut walrus water
    whale wheat willow window winter wolf wool yarn zebra zinc
    """.split()
)
_FACTS: Final = ("magic number", "secret code", "locker number", "lucky number", "access code")
_PEOPLE: Final = tuple(
    """
    Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karen Louis Maria Nora Oscar Paula
    Robert Sofia Thomas Vera
    """.split()
)
_CROWDS: Final = (
    "The teacher",
    "The old sailor",
    "A young painter",
    "The baker",
    "Her brother",
    "His aunt",
    "The children",
    "Our neighbour",
    "Two students",
    "The mayor",
)
_DEEDS: Final = (
    "walked along",
    "looked at",
    "talked about",
    "painted",
    "remembered",
    "wrote about",
    "visited",
    "liked",
    "dreamed of",
    "cleaned",
    "waited near",
    "read about",
    "drew",
    "worried about",
)
_THINGS: Final = (
    "the quiet street",
    "the long road",
    "an old house",
    "the small shop",
    "the green park",
    "a wooden boat",
    "the broken clock",
    "the new school",
    "the empty room",
    "a warm kitchen",
    "the tall trees",
    "the railway station",
    "a letter from home",
    "the busy square",
    "the dark wood",
    "the blue door",
)
_TIMES: Final = (
    "in the morning",
    "after lunch",
    "before dinner",
    "last week",
    "on Sunday",
    "in the spring",
    "all day long",
    "with a friend",
    "for an hour",
    "without a word",
    "once again",
    "late at night",
)
_WEATHER: Final = (
    "It was a calm day.",
    "The wind was cold.",
    "Nobody was in a hurry.",
    "The sun came out.",
    "Everything was quiet.",
    "It rained for a while.",
    "The news was good.",
    "Time passed slowly.",
)
_REMARKS: Final = (
    "# check this step again",
    "# nothing changes here",
    "# the next part is short",
    "# keep the order",
    "pass",
    "print()",
    "# see the notes",
    "# this part is done",
)


@dataclass(frozen=True)
class Sample:
    """One prompt with its right continuation.

    Attributes:
        task: Name of the task, for example ``"retrieval/needle"``.
        prompt: Text the model is given.
        response: Text the model should give, from its leading space to its last character.
        answer: What in the response is judged, for example ``"48213"``.
    """

    task: str
    prompt: str
    response: str
    answer: str


@dataclass(frozen=True)
class Query:
    """One question about a context.

    Attributes:
        question: Text that follows the context.
        response: Text the model should give.
        answer: What in the response is judged.
    """

    question: str
    response: str
    answer: str


@dataclass(frozen=True)
class Context:
    """A text with facts in it and every question that it answers.

    Attributes:
        task: Name of the task.
        text: The facts, among what distracts from them.
        queries: Questions in random order; ``text + queries[0].question`` has the wanted length.
    """

    task: str
    text: str
    queries: tuple[Query, ...]


def retrieval_sample(
    kind: str, tokens: int, rng: Random, count_tokens: Callable[[str], int]
) -> Sample:
    """Make a prompt of about the wanted length, and its answer.

    The prompt has at most ``tokens`` tokens and falls short of that by less than one line of its
    text, which is about ten tokens.

    Args:
        kind: One of ``KINDS``: ``key_value`` (find a key in a list or a table), ``needle``
            (find a fact in a story) or ``variables`` (follow a chain of assignments).
        tokens: Wanted length of the prompt, in ``[TOKENS_MIN, TOKENS_MAX]``.
        rng: Source of randomness; equal states give equal samples.
        count_tokens: Gives the number of tokens of a text, special tokens included if they count.

    Returns:
        The sample; its task is ``"retrieval/" + kind``.

    Raises:
        ValueError: ``kind`` or ``tokens`` is out of range, or ``count_tokens`` counts so sparsely
            that the generator has too few words for the length.
    """
    context = retrieval_context(kind, tokens, rng, count_tokens)
    query = context.queries[0]
    return Sample(context.task, context.text + query.question, query.response, query.answer)


def retrieval_context(
    kind: str, tokens: int, rng: Random, count_tokens: Callable[[str], int]
) -> Context:
    """Make a context that answers several questions, the first of which completes the length.

    Training asks them all after one context; evaluation asks the first. The arguments and errors
    are those of ``retrieval_sample``.
    """
    if kind not in _DRAFTS:
        raise ValueError(f"[tasks] kind {kind!r}: must be one of {', '.join(KINDS)}.")
    if not TOKENS_MIN <= tokens <= TOKENS_MAX:
        raise ValueError(
            f"[tasks] tokens = {tokens}: must lie between {TOKENS_MIN} and {TOKENS_MAX}."
        )
    render, most = _DRAFTS[kind](rng, tokens)

    def length(items: int) -> int:
        context = render(items)
        return count_tokens(context.text + context.queries[0].question)

    items = _most_that_fit(length, tokens, least=5, most=most)
    if items == most:
        raise ValueError(
            f"[tasks] {most} lines of {kind} have {length(items)} tokens by count_tokens: "
            f"{tokens} were wanted, so it must count more finely."
        )
    return render(items)


def is_correct(sample: Sample, text: str) -> bool:
    """Whether a generated text gives exactly the sample's answer.

    Only the first line counts, without what follows an end-of-text mark and without white space
    around it; of a chain ``c = b = 48213`` only what follows the last equals sign counts.

    Args:
        sample: The sample whose prompt was continued.
        text: The continuation, as generated.
    """
    line = text.split("\n", 1)[0].split("<|endoftext|>", 1)[0]
    return line.rsplit("=", 1)[-1].strip() == sample.answer


def _most_that_fit(length: Callable[[int], int], tokens: int, *, least: int, most: int) -> int:
    """Largest number of items whose length is at most `tokens`, guessing by the slope so far."""
    floor = length(least)
    if floor > tokens:
        raise ValueError(
            f"[tasks] the shortest prompt has {floor} tokens by count_tokens: {tokens} were wanted."
        )
    fits, over, at_fits, slope = least, most + 1, floor, floor / least
    while over - fits > 1:
        step = max(1, int((tokens - at_fits) / slope))
        guess = min(fits + step, over - 1)
        seen = length(guess)
        if seen <= tokens:
            fits, at_fits = guess, seen
        else:
            over = guess
        if guess != least:
            slope = max(1.0, (seen - floor) / (guess - least))
    return fits


def _value(rng: Random) -> str:
    """Five random digits."""
    return str(rng.randrange(10_000, 100_000))


def _question(subject: str) -> str:
    """The question's words, the same for every kind."""
    return f"\nQuestion: What is the {subject}?\nAnswer:"


def _key_value(rng: Random, _: int) -> tuple[Callable[[int], Context], int]:
    """A list or a table of keys and values; an item is one key with its value."""
    keys = rng.sample(_WORDS, len(_WORDS))
    values = [_value(rng) for _ in keys]
    order = rng.sample(range(len(keys)), len(keys))
    as_table = rng.random() < 0.5

    def render(items: int) -> Context:
        pairs = list(zip(keys[:items], values, strict=False))
        if as_table:
            body = "\n".join(f"| {key} | {value} |" for key, value in pairs)
            text = f"Here is a table.\n| key | value |\n| --- | --- |\n{body}\n"
        else:
            body = "\n".join(f"- {key}: {value}" for key, value in pairs)
            text = f"Here is a list of values.\n{body}\n"
        queries = (
            Query(_question(f"value of {keys[i]}"), f" {values[i]}", values[i])
            for i in order
            if i < items
        )
        return Context("retrieval/key_value", text, tuple(queries))

    return render, len(keys)


def _needle(rng: Random, tokens: int) -> tuple[Callable[[int], Context], int]:
    """A story with one to eight facts in it; an item is one sentence of the story."""
    most_facts = min(8, tokens // 40)  # a fact has some 15 tokens; half of the story is story
    sentences = [_sentence(rng) for _ in range(400)]
    facts = [
        (rng.random(), rng.choice(_FACTS), subject, _value(rng))
        for subject in rng.sample(_WORDS, rng.randint(1, most_facts))
    ]

    def render(items: int) -> Context:
        story = sentences[:items]
        for place, fact, subject, value in sorted(facts, reverse=True):
            story.insert(int(place * (items + 1)), f"The {fact} of the {subject} is {value}.")
        text = f"Here is a story.\n{_paragraphs(story)}\n"
        queries = (
            Query(_question(f"{fact} of the {subject}"), f" {value}", value)
            for _, fact, subject, value in facts
        )
        return Context("retrieval/needle", text, tuple(queries))

    return render, len(sentences)


def _sentence(rng: Random) -> str:
    """One sentence of a story without numbers in it."""
    draw = rng.random()
    if draw < 0.1:
        return rng.choice(_WEATHER)
    who = rng.choice(_PEOPLE) if draw < 0.6 else rng.choice(_CROWDS)
    when = f" {rng.choice(_TIMES)}" if rng.random() < 0.5 else ""
    return f"{who} {rng.choice(_DEEDS)} {rng.choice(_THINGS)}{when}."


def _paragraphs(sentences: list[str]) -> str:
    """Sentences in paragraphs of eight."""
    return "\n".join(" ".join(sentences[i : i + 8]) for i in range(0, len(sentences), 8))


def _variables(rng: Random, _: int) -> tuple[Callable[[int], Context], int]:
    """A program of assignments in interleaved chains; an item is one line of it."""
    names = iter(rng.sample(_WORDS, len(_WORDS)))
    lines = list(_program(rng, names))
    origins = {name: origin for name, origin in lines if name}
    remarks = [rng.choice(_REMARKS) for _ in lines]
    order = rng.sample(range(len(lines)), len(lines))

    def render(items: int) -> Context:
        body = "\n".join(
            f"let {name} = {origin}" if name else remark
            for (name, origin), remark in zip(lines[:items], remarks, strict=False)
        )
        # A name that was given a number itself needs no chain, so it is not asked for.
        asked = (lines[i][0] for i in order if i < items and lines[i][1] in origins)
        queries = (_chain_query(name, origins) for name in asked)
        return Context("retrieval/variables", f"Here is a program.\n{body}\n", tuple(queries))

    return render, len(lines)


def _program(rng: Random, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Lines as (name, what it is set to), until the names run out; an empty name is a remark."""
    ends: list[tuple[str, int]] = []  # last name of each chain that may grow, names in it
    first = True
    yield "", ""
    for name in names:
        if rng.random() < 0.2:
            yield "", ""
        # The second name is a copy, so that the shortest program has something to ask for.
        if ends and (first or rng.random() < 0.6 or len(ends) > 12):
            first = False
            origin, length = ends.pop(rng.randrange(len(ends)))
        else:
            origin, length = _value(rng), 0
        if length < 3:
            ends.append((name, length + 1))
        yield name, origin


def _chain_query(name: str, origins: dict[str, str]) -> Query:
    """The question for a name; the response walks back along its chain to the number."""
    chain = [name]
    while chain[-1] in origins:
        chain.append(origins[chain[-1]])
    return Query(_question(f"value of {name}"), " " + " = ".join(chain), chain[-1])


_DRAFTS: Final[dict[str, Callable[[Random, int], tuple[Callable[[int], Context], int]]]] = {
    "key_value": _key_value,
    "needle": _needle,
    "variables": _variables,
}
