"""Text files to calibrate on and to score: read, checked, split."""

from __future__ import annotations

import collections
import hashlib
import json
import lzma
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from .types import Document

BYTES_MAX = 1 << 30  # of one file once unpacked; the project's largest is 5 MB
_TASK = re.compile(r"[a-z0-9_]{1,32}(/[A-Za-z0-9_.-]{1,64})?")


def read(path: str | pathlib.Path) -> list[Document]:
    """Read a file of documents.

    Args:
        path: ``.jsonl`` or ``.jsonl.xz``, one record a line: ``{"task", "prompt", "response"}``
            with an optional ``"answer"``, or ``{"task", "text"}``; other keys are ignored. ``.txt``
            is one plain document of the task ``prose``. UTF-8.

    Returns:
        The documents, in the order of the file; at least one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The name's ending, the encoding or a record is not as above; the message names
            the line.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"[read] {str(file)!r}: want a file of documents.")
    text = _text(file)
    if file.suffix == ".txt":
        if not text.strip():
            raise ValueError(f"[read] {file.name}: want text, the file is empty.")
        return [Document("prose/txt", "", text)]
    documents = [_document(file.name, *line) for line in enumerate(_lines(text), 1) if line[1]]
    if not documents:
        raise ValueError(f"[read] {file.name}: want at least one record, the file has none.")
    return documents


def split(
    documents: Iterable[Document], part: Literal["select", "report", "all"]
) -> list[Document]:
    """Keep the half of the documents that may be chosen on, or the half that is reported.

    The half depends on the document alone, by SHA-256 of its prompt and response: first byte even
    is ``select``, odd is ``report``.

    Raises:
        ValueError: ``part`` is none of the three.
    """
    if part not in ("select", "report", "all"):
        raise ValueError(f"[split] part = {part!r}: want select, report or all.")
    parity = {"select": 0, "report": 1}.get(part)
    return [d for d in documents if parity is None or _first_byte(d) % 2 == parity]


def few(documents: Iterable[Document], per_task: int) -> list[Document]:
    """Keep the first `per_task` documents of every task, in their order."""
    seen: collections.Counter[str] = collections.Counter()
    kept = []
    for document in documents:
        seen[document.group] += 1
        if seen[document.group] <= per_task:
            kept.append(document)
    return kept


def _first_byte(document: Document) -> int:
    return hashlib.sha256((document.prompt + document.response).encode()).digest()[0]


def _text(file: pathlib.Path) -> str:
    """The file's text, unpacked, its size bounded before it is held."""
    if not file.name.endswith((".jsonl", ".jsonl.xz", ".txt")):
        raise ValueError(f"[read] {file.name}: want a name that ends in .jsonl, .jsonl.xz or .txt.")
    try:
        with lzma.open(file) if file.suffix == ".xz" else file.open("rb") as stream:
            raw = stream.read(BYTES_MAX + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"[read] {file.name}: want a whole xz file ({error}).") from error
    if len(raw) > BYTES_MAX:
        raise ValueError(f"[read] {file.name}: want at most {BYTES_MAX} bytes of text.")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"[read] {file.name}: want UTF-8, byte {error.start} is not.") from error


def _lines(text: str) -> Iterator[str]:
    """Lines by the newline alone: a record may hold other characters that end lines."""
    return (line.strip() for line in text.split("\n"))


def _document(name: str, number: int, line: str) -> Document:
    """The document of one line."""
    where = f"[read] {name}, line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: want a JSON record ({error}).") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: want a JSON object, not {type(record).__name__}.")
    task = _string(where, record, "task")
    if not _TASK.fullmatch(task):
        raise ValueError(f"{where}: task = {task!r}: want 'group' or 'group/name'.")
    if "text" in record:
        return Document(task, "", _string(where, record, "text"))
    prompt, response = _string(where, record, "prompt"), _string(where, record, "response")
    answer = record.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise ValueError(f"{where}: answer: want a string, not {type(answer).__name__}.")
    return Document(task, prompt, response, answer)


def _string(where: str, record: dict[str, Any], key: str) -> str:
    """A string of the record that is there and not empty."""
    value = record.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: {key}: want a string that is not empty.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {key}: want text, not half a surrogate pair.") from error
    return value
