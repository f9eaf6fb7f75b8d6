import hashlib
import json
import lzma
import re

import pytest

from csfast import documents
from csfast.types import Document, is_task

RECORDS = [
    {"task": "math/sums", "prompt": "1 + 1 =", "response": " 2", "answer": "2"},
    {"task": "prose/novel", "text": "It was a calm day.\u2028The end.", "source": "ignored"},
]
WANTED = [
    Document("math/sums", "1 + 1 =", " 2", "2"),
    Document("prose/novel", "", "It was a calm day.\u2028The end."),
]


def write(path, text):
    opened = lzma.open(path, "wb") if path.suffix == ".xz" else path.open("wb")
    with opened as stream:
        stream.write(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz"])
def test_reads_records_in_order(tmp_path, name):
    text = "\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS) + "\n\n"
    assert documents.read(write(tmp_path / name, text)) == WANTED


def test_text_file_is_one_plain_document(tmp_path):
    found = documents.read(write(tmp_path / "a.txt", "One.\nTwo.\n"))
    assert found == [Document("prose/txt", "", "One.\nTwo.\n")]
    assert found[0].group == "prose"


FORMS = [
    ({"text": "hello"}, Document("text", "", "hello")),
    ({"task": None, "text": "hello", "prompt": None}, Document("text", "", "hello")),
    ({"task": "Fragen & Antworten/x y", "text": "a"}, Document("Fragen & Antworten/x y", "", "a")),
    ({"prompt": "a", "response": " b"}, Document("text", "a", " b")),
    ({"task": "GSM8K", "prompt": "a", "completion": " b"}, Document("GSM8K", "a", " b")),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        Document("text", "", "b", None, (("user", "a"),)),
    ),
    (
        {
            "text": "the same as text",
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
                {"role": "user", "content": "left unanswered"},
            ],
        },
        Document(
            "text",
            "",
            "d",
            None,
            (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")),
        ),
    ),
    (
        {
            "prompt": [{"role": "user", "content": "a"}],
            "completion": [{"role": "assistant", "content": "b"}],
        },
        Document("text", "", "b", None, (("user", "a"),)),
    ),
]
MARKS = {"utf-8": b"\xef\xbb\xbf", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}
MARKS |= {"utf-32-le": b"\xff\xfe\x00\x00", "utf-32-be": b"\x00\x00\xfe\xff"}


def test_reads_records_as_people_have_them(tmp_path):
    records, wanted = zip(*FORMS, strict=True)
    lines = "\n\n".join(map(json.dumps, records))
    for name, text in {
        "a.jsonl": lines,
        "A.JSONL": lines.replace("\n", "\r\n"),
        "a.jsonl.xz": lines,
        "a.json": json.dumps(records, indent=1),
        "b.json": lines,
    }.items():
        assert documents.read(write(tmp_path / name, text)) == list(wanted), name


@pytest.mark.parametrize("encoding", MARKS)
def test_a_byte_order_mark_is_no_text(tmp_path, encoding):
    for name, text, wanted in (
        (
            "a.txt",
            "hello w\u00f6rld\r\nand\r\n",
            Document("prose/txt", "", "hello w\u00f6rld\nand\n"),
        ),
        ("a.jsonl", '{"text": "hello"}\r\n\r\n', Document("text", "", "hello")),
        ("a.json", '[{"text": "hello"}]', Document("text", "", "hello")),
    ):
        raw = MARKS[encoding] + text.encode(encoding)
        assert documents.read(write(tmp_path / name, raw)) == [wanted]


def test_marks_of_files_that_were_put_together_are_no_text(tmp_path):
    raw = b'\xef\xbb\xbf{"text": "a"}\r\n' * 3
    assert documents.read(write(tmp_path / "a.jsonl", raw)) == [Document("text", "", "a")] * 3


def test_a_long_text_file_is_cut_between_lines(tmp_path):
    text = "".join(f"Line {i} of a long book. \n" for i in range(4000))
    found = documents.read(write(tmp_path / "a.txt", text))
    assert "".join(d.response for d in found) == text
    assert len(found) > 10 and {d.task for d in found} == {"prose/txt"}
    assert all(documents.PART <= len(d.response) < 2 * documents.PART for d in found)
    assert all(d.response.endswith("\n") for d in found)
    whole = "x" * 3 * documents.PART
    assert [d.response for d in documents.read(write(tmp_path / "b.txt", whole))] == [whole]


@pytest.mark.parametrize("name", ["a", "b.c-d", "_x", "9", "Q&A (hard)", "\u6570\u5b66", 64 * "x"])
def test_names_of_tasks(name):
    assert is_task(name)
    assert not is_task("x" * 65) and not is_task(name + "/x") and not is_task(f" {name}")


@pytest.mark.parametrize("name", ["", "pooled", ".x", "-x", "a\tb", "[red]"])
def test_names_of_no_task(name):
    assert not is_task(name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "x", r"a\.csv: want a name that ends in"),
        ("a.txt", " \n", "want text, the file is empty"),
        ("a.jsonl", "\n", "want at least one record"),
        ("a.jsonl", "{", "line 1: want a JSON record"),
        ("a.jsonl", "[" * 100_000, "line 1: want a JSON record"),
        ("a.jsonl", "[]", "want a JSON object, not list"),
        ("a.jsonl", "{}", 'line 1: want "text", "messages", or "prompt" with .*it has none'),
        ("a.jsonl", '{"a": 1}', "line 1: want .* it has a"),
        ("a.jsonl", '{"task": "../x", "text": "y"}', "want 'group' or 'group/name'"),
        ("a.jsonl", '{"task": "pooled", "text": "y"}', "task = 'pooled': want .* not 'pooled'"),
        ("a.jsonl", '{"task": 7, "text": "y"}', "task = '7': want"),
        ("a.jsonl", '{"task": "a\\nb", "text": "y"}', "want .* printable characters"),
        ("a.jsonl", f'{{"task": "{"x" * 65}", "text": "y"}}', "want .* up to 64"),
        ("a.jsonl", '\n\r\n{"task": "math", "text": " \\n\\t"}', "line 3: text: want a string"),
        ("a.jsonl", '{"prompt": "x", "completion": ""}', "completion: want a string"),
        ("a.jsonl", '{"messages": []}', "line 1: messages: want a list"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "an answer of the role"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', "after others"),
        ("a.jsonl", '{"messages": [{"content": "a"}]}', "line 1, message 1: role: want"),
        ("a.jsonl", '{"messages": ["a"]}', "message 1: want an object of role and content"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "message 1: content: want text",
        ),
        (
            "a.jsonl",
            '{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":" "}]}',
            "message 2: content: want text that is not blank",
        ),
        ("a.json", '[{"text": "y"}, {"text": ""}]', "record 2: text: want a string"),
        ("a.json", "[]", "want at least one record"),
        ("a.json", "[{]", "line 1: want a JSON record"),
        ("a.jsonl", b"\xff\xfea", "want UTF-16-LE, as its mark says, byte 2 is not"),
        ("a.jsonl", '{"task": "math", "text": ""}', "text: want a string that is not empty"),
        ("a.jsonl", '{"task": "math", "prompt": "x"}', "response: want a string"),
        ("a.jsonl", '{"task": "math", "text": "\\ud800"}', "half a surrogate pair"),
        ("a.jsonl", '{"task":"math","prompt":"x","response":"y","answer":1}', "answer: want"),
        ("a.jsonl", b"\xff", "want UTF-8, byte 0"),
    ],
)
def test_refuses_what_it_cannot_read(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        documents.read(write(tmp_path / name, text))


def test_refuses_half_an_archive(tmp_path):
    path = write(tmp_path / "a.jsonl.xz", json.dumps(RECORDS[0]))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="want a whole xz file"):
        documents.read(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("nothing.txt")):
        documents.read(tmp_path / "nothing.txt")


def test_split_depends_on_the_text_alone():
    many = [Document("code/x", f"p{i}", f"r{i}") for i in range(200)]
    select, report = documents.split(many, "select"), documents.split(many, "report")
    assert sorted([*select, *report], key=many.index) == many == documents.split(many, "all")
    assert len(select) > 60 and len(report) > 60
    for document in select:
        assert hashlib.sha256((document.prompt + document.response).encode()).digest()[0] % 2 == 0
    assert documents.split(reversed(many), "select") == select[::-1]


def test_split_refuses_other_parts():
    with pytest.raises(ValueError, match="part = 'test': want select, report or all"):
        documents.split([], "test")
