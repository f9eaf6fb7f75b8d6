import hashlib
import json
import lzma
import re

import pytest

from csfast import documents
from csfast.types import Document

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


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "x", r"a\.csv: want a name that ends in"),
        ("a.txt", " \n", "want text, the file is empty"),
        ("a.jsonl", "\n", "want at least one record"),
        ("a.jsonl", "{", "line 1: want a JSON record"),
        ("a.jsonl", "[" * 100_000, "line 1: want a JSON record"),
        ("a.jsonl", "[]", "want a JSON object, not list"),
        ("a.jsonl", "{}", "task: want a string"),
        ("a.jsonl", '{"task": "../x", "text": "y"}', "want 'group' or 'group/name'"),
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
