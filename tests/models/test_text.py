"""Text in tokens: what the tokenizer gives, what ends it, what a chat looks like."""

import itertools

import numpy
import pytest
import torch

import tiny
from csfast import calibrate, judge, models
from csfast.types import Document, UnsupportedModelError

BOS, EOS = 256, 257


def tokens(text):
    return tiny.make_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_encode_marks_where_the_response_begins():
    found = models.encode(tiny.make_tokenizer(), Document("math", "ab", " c"), max_tokens=100)
    assert found.ids.tolist() == [[BOS, *tokens("ab"), *tokens(" c"), EOS]]
    assert found.ids.dtype == torch.int64 and found.n_prompt == 3


def test_encode_runs_the_start_of_plain_text_dense():
    long, short = ("x" * n for n in (100, 10))
    found = models.encode(tiny.make_tokenizer(), Document("prose", "", long), max_tokens=64)
    assert found.ids.tolist() == [[BOS, *tokens(long)][:64]] and found.n_prompt == 32
    found = models.encode(tiny.make_tokenizer(), Document("prose", "", short), max_tokens=64)
    assert found.ids.shape == (1, 11) and found.n_prompt == 11


def test_encode_cuts_the_end_of_a_response():
    found = models.encode(tiny.make_tokenizer(), Document("math", "ab", "c" * 50), max_tokens=10)
    assert found.ids.tolist() == [[BOS, *tokens("ab"), *tokens("c" * 7)]]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (Document("math", "a" * 20, "b"), "a prompt of 21 tokens: want fewer than 21"),
        (Document("math", "a", ""), "a document of 'math' without text"),
    ],
)
def test_encode_refuses(document, message):
    with pytest.raises(ValueError, match=message):
        models.encode(tiny.make_tokenizer(), document, max_tokens=21)


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_streamed_text_is_that_of_generate(kind):
    model, tokenizer = tiny.make_model(kind), tiny.make_tokenizer()
    ids = torch.tensor([[BOS, *tokens("hello")]])
    wanted = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    pieces = list(models.stream_text(model, tokenizer, "hello", max_new_tokens=40))
    assert "".join(pieces) == tokenizer.decode(wanted, skip_special_tokens=True)
    assert len(pieces) > 1 and all(pieces)


def test_streaming_ends_at_the_mark():
    model = tiny.make_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens are equally likely: the first wins
    model.generation_config.eos_token_id = [5, 0]
    assert list(models.stream_text(model, tiny.make_tokenizer(), "a", max_new_tokens=9)) == []
    model.generation_config.eos_token_id = 5
    text = "".join(models.stream_text(model, tiny.make_tokenizer(), "a", max_new_tokens=9))
    assert text == "!" * 9


def test_half_characters_are_held_back():
    tokenizer = tiny.make_tokenizer()

    def pieces(ids):
        return list(models.pieces(tokenizer, iter(ids), frozenset()))

    assert pieces(tokens("aé€b")) == ["a", "é", "€", "b"]
    assert pieces(tokens("é")[:1]) == ["\ufffd"]


def test_draws_follow_the_seed():
    model, tokenizer = tiny.make_model(), tiny.make_tokenizer()
    before = torch.random.get_rng_state()

    def text(seed):
        pieces = models.stream_text(
            model, tokenizer, "a", max_new_tokens=20, temperature=1.0, seed=seed
        )
        return "".join(pieces)

    assert text(1) == text(1) != text(2)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_stops_the_model_comes_out_of_the_stream(error):
    model = tiny.make_model()
    pieces = models.stream_text(model, tiny.make_tokenizer(), "a", max_new_tokens=9)
    next(pieces)

    def stop(*_):
        raise error("stopped")

    model.model.layers[0].register_forward_pre_hook(stop)
    with pytest.raises(error, match="stopped"):
        next(pieces)
    assert list(pieces) == []


def test_caller_of_a_stream_may_ask_for_gradients():
    pieces = models.stream_text(tiny.make_model(), tiny.make_tokenizer(), "a", max_new_tokens=5)
    for _ in itertools.islice(pieces, 2):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


MARKS = {"none": "$A", "begin": "<s> $A", "both": "<s> $A </s>", "end": "$A </s>"}
S, END, A, B, C, D = 1, 2, 6, 7, 8, 9  # of `tiny.make_words`; with a blank before, 10 more


@pytest.mark.parametrize("single", MARKS.values(), ids=MARKS)
@pytest.mark.parametrize("spaced", [False, True])
def test_tokens_are_those_of_the_tokenizer(single, spaced):
    tokenizer = tiny.make_words(single, spaced=spaced)
    for text in ("a", "a b c", "", "  a", "<s> a b", "<s>a</s>", "<s><s> a", "</s>", "<s>"):
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        begins = ["<s>"] if single.startswith("<s>") and not text.startswith("<s>") else []
        ends = ["</s>"] if single.endswith("</s>") and not text.endswith("</s>") else []
        before, after = (tokenizer.convert_tokens_to_ids(marks) for marks in (begins, ends))
        assert models.token_ids(tokenizer, text, continued=False) == before + bare + after
        assert models.token_ids(tokenizer, text, continued=True) == before + bare
        if "s>" not in text:
            assert models.token_ids(tokenizer, text, continued=False) == tokenizer(text).input_ids


def test_padding_truncation_and_segments_of_a_tokenizer_change_no_tokens():
    plain = tiny.make_words()
    other = tiny.make_words(
        padding_side="left",
        truncation_side="left",
        model_max_length=3,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    other.backend_tokenizer.enable_padding(length=9, direction="left")
    other.backend_tokenizer.enable_truncation(2)
    for text in ("a", "a b c d a b c d"):
        wanted = models.token_ids(plain, text, continued=True)
        assert models.token_ids(other, text, continued=True) == wanted
    document = Document("x", "a b", " c")
    found = [models.encode(t, document, max_tokens=9).ids.tolist() for t in (plain, other)]
    assert found[0] == found[1] == [[S, A, B, C, END]]


def first_ids(model, run):
    """The tokens of the first call of a model."""
    found = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, given: found.append(given[0][0].tolist()))
    run()
    hook.remove()
    return found[0]


@pytest.mark.parametrize("single", MARKS.values(), ids=MARKS)
def test_everything_that_reads_text_begins_it_once(single):
    model, tokenizer = tiny.make_model(), tiny.make_words(single)
    for text in ("a b c", "<s> a b c"):
        wanted = [S, A, B, C] if "<s>" in single + text else [A, B, C]
        streamed = models.stream_text(model, tokenizer, text, max_new_tokens=1)
        assert first_ids(model, lambda pieces=streamed: list(pieces)) == wanted
        long = text + " a b c d e f g h i j" * 9
        taken = first_ids(
            model, lambda text=long: calibrate(model, [text], tokenizer, feedback=False)
        )
        assert taken[: len(wanted)] == wanted
        pair = models.encode(tokenizer, Document("x", text, " d"), max_tokens=99)
        assert pair.ids.tolist() == [[*wanted, D, END]] and pair.n_prompt == len(wanted)


@pytest.mark.parametrize("response", [" c d", " c d</s>"])
@pytest.mark.parametrize("single", MARKS.values(), ids=MARKS)
def test_a_response_ends_once(single, response):
    found = models.encode(tiny.make_words(single), Document("x", "a", response), max_tokens=99)
    assert found.ids[0, found.n_prompt :].tolist() == [C, D, END]


def test_a_tokenizer_without_marks_adds_none():
    tokenizer = tiny.make_words("$A", bos_token=None, eos_token=None)
    assert models.encode(tokenizer, Document("x", "a", " b"), max_tokens=9).ids.tolist() == [[A, B]]
    assert models.encode(tokenizer, Document("x", "", "a b"), max_tokens=9).ids.tolist() == [[A, B]]


@pytest.mark.parametrize(
    ("prompt", "response"), [("a b", " c d"), ("a b ", "c d"), ("a", "b"), ("a ", " b")]
)
def test_a_response_gets_no_blank_of_its_own(prompt, response):
    tokenizer = tiny.make_words(spaced=True)
    found = models.encode(tokenizer, Document("x", prompt, response), max_tokens=99)
    assert found.ids[0, : found.n_prompt].tolist() == tokenizer(prompt).input_ids
    pieces = tokenizer.convert_ids_to_tokens(found.ids[0, 1:-1].tolist())
    assert "".join(pieces) == "▁" + (prompt + response).replace(" ", "▁")


def ends_of(kind):
    made = {"number": int, "list": lambda e: [e], "tuple": lambda e: (4, e)}
    made |= {"tensor": torch.tensor, "row": lambda e: torch.tensor([3, e]), "array": numpy.int64}
    return made[kind]


@pytest.mark.parametrize("kind", ["number", "list", "tuple", "tensor", "row", "array"])
def test_text_ends_where_generate_ends_it(kind):
    model, tokenizer = tiny.make_model(), tiny.make_tokenizer()
    ids = torch.tensor([[BOS, *tokens("hello")]])
    model.generation_config.eos_token_id = None
    free = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    end = free[7]
    model.generation_config.eos_token_id = [end]
    made = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    assert len(made) <= 8 and made == free[: free.index(end) + 1] and not {3, 4} & set(made)
    model.generation_config.eos_token_id = ends_of(kind)(end)
    text = "".join(models.stream_text(model, tokenizer, "hello", max_new_tokens=20))
    assert text == tokenizer.decode(made[:-1], skip_special_tokens=True)
    steps = []
    hook = model.register_forward_pre_hook(lambda *_: steps.append(1))
    list(models.stream_text(model, tokenizer, "hello", max_new_tokens=20))
    hook.remove()
    assert len(steps) == len(made)


def test_settings_of_generation_outrank_the_configuration():
    model = tiny.make_model()
    assert model.config.eos_token_id == EOS
    model.generation_config.eos_token_id = None
    assert models.end_tokens(model) == frozenset()
    model.generation_config = None
    assert models.end_tokens(model) == {EOS}
    model.config.eos_token_id = None
    assert models.end_tokens(model) == frozenset()
    assert models.end_tokens(torch.nn.Linear(2, 2)) == frozenset()


def test_an_empty_text_says_why(caplog):
    model, tokenizer = tiny.make_model(tie_word_embeddings=False), tiny.make_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens are equally likely: the first wins
    model.generation_config.eos_token_id = 0
    assert not list(models.stream_text(model, tokenizer, "a", max_new_tokens=3))
    assert caplog.messages[-1] == "[generate] no text: the first token, '!', ends it."
    model.generation_config.eos_token_id = None
    words = tiny.make_words()  # whose first is a mark for padding
    assert not list(models.stream_text(model, words, "a", max_new_tokens=3))
    assert caplog.messages[-1] == (
        "[generate] no text: tokens without any came first: 3, such as <pad>, <pad>, <pad>."
    )
    assert list(models.stream_text(model, tokenizer, "a", max_new_tokens=1)) == ["!"]
    assert len(caplog.messages) == 2


@pytest.mark.parametrize("prompt", [" ", "", []])
def test_a_prompt_without_tokens_is_refused(prompt):
    tokenizer = tiny.make_words("$A", chat_template="x")
    with pytest.raises(ValueError, match="want"):
        models.stream_text(tiny.make_model(), tokenizer, prompt, max_new_tokens=1)


def test_tokens_without_an_embedding_are_refused():
    model, tokenizer = tiny.make_model(vocab_size=8), tiny.make_words()
    assert models.vocabulary(model) == 8
    with pytest.raises(ValueError, match=r"\[generate\] token 9 .* embedding has 8 rows"):
        models.stream_text(model, tokenizer, "a d", max_new_tokens=1)
    with pytest.raises(ValueError, match=r"\[calibrate\] token 15"):
        calibrate(model, ["a j " * 50], tokenizer)
    plain = [Document("prose", "", "a j " * 50)]
    options = {"tokens": 9, "response_tokens": 9, "max_tokens": 99, "seed": 0}
    with pytest.raises(ValueError, match=r"\[eval\] token 15"):
        judge.choose("eval", model, tokenizer, plain, **options)
    models.check_ids("x", model, [0, 7])
    models.check_ids("x", torch.nn.Linear(2, 2), [99])


CHAT = (
    "{% for m in messages %}<s> {{ m['role'][0] | replace('u', 'a') }} {{ m['content'] }} </s> "
    "{% endfor %}{% if add_generation_prompt %}b{% endif %}"
)


@pytest.mark.parametrize("single", MARKS.values(), ids=MARKS)
def test_a_chat_is_the_text_of_the_template(single):
    model, tokenizer = tiny.make_model(), tiny.make_words(single, chat_template=CHAT)
    messages = [{"role": "user", "content": "c d"}]
    pieces = models.stream_text(model, tokenizer, messages, max_new_tokens=1)
    wanted = [S, A, C, D, END, B]
    assert first_ids(model, lambda: list(pieces)) == wanted
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found == wanted
    assert models.render(tokenizer, messages, answered=True) == "<s> a c d </s> "


@pytest.mark.parametrize(
    ("template", "messages", "error", "message"),
    [
        (None, [{"role": "user", "content": "a"}], UnsupportedModelError, "has no chat template"),
        (CHAT, [], ValueError, "no messages: want at least one"),
        (CHAT, ["a"], TypeError, "message 'a': want one with role and content"),
        (CHAT, [{"content": "a"}], TypeError, "want one with role and content"),
        ("{{ raise_exception('odd roles') }}", None, ValueError, "refuses .odd roles."),
        ("{{ messages[0]['content'] + 1 }}", None, ValueError, "refuses"),
        ("{% if %}", None, ValueError, "refuses"),
        ("{{ ''.__class__.__mro__ }}", None, ValueError, "refuses"),
    ],
)
def test_chats_that_no_template_takes_are_refused(template, messages, error, message):
    tokenizer = tiny.make_words(chat_template=template)
    messages = [{"role": "user", "content": "a"}] if messages is None else messages
    with pytest.raises(error, match=message):
        models.render(tokenizer, messages, answered=False)


@pytest.mark.parametrize("ends", [[257, None], "x", 1.5, True, [[1]], torch.tensor([1.5])])
def test_ends_that_are_no_tokens_are_refused(ends):
    model = tiny.make_model()
    model.generation_config.eos_token_id = ends
    with pytest.raises(ValueError, match=r"\[generate\] eos_token_id = .*: want whole numbers"):
        models.end_tokens(model)


def test_logits_that_are_not_a_number_are_no_text():
    model = tiny.make_model()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(ValueError, match=r"\[generate\] logits that are not a number"):
        list(models.stream_text(model, tiny.make_tokenizer(), "ab", max_new_tokens=2))
