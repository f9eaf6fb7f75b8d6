"""Text files to calibrate on and to score: read, checked, split."""

from __future__ import annotations

import codecs
import collections
import hashlib
import json
import lzma
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from .types import PLAIN, TASK_RULE, Document, Turn, is_task

BYTES_MAX = 1 << 30  # of one file once unpacked; the project's largest is 5 MB
PART = 4096  # characters of a document of a long text: about a thousand tokens of English
ENDINGS = (".jsonl", ".jsonl.xz", ".json", ".txt")
# Marks that editors put before a text to name its encoding; the longer ones first.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_MARK = "\ufeff"  # what such a mark is as a character
_FORMS = '"text", "messages", or "prompt" with "response" or "completion"'


def read(path: str | pathlib.Path) -> list[Document]:
    """Read a file of documents.

    Args:
        path: ``.jsonl`` or ``.jsonl.xz``, one record a line, or ``.json``, a list of records.
            A record has ``"messages"``, a chat of ``{"role", "content"}`` whose last turn of the
            assistant is the response; or ``"text"``; or ``"prompt"`` with ``"response"`` or
            ``"completion"``, texts or messages. It may have a ``"task"``, any name, which is
            ``"text"`` if left out, and an ``"answer"``. Other keys are ignored, and so are those
            that hold null. ``.txt`` is plain text of the task ``prose``: one document, or of a long
            one a document every few thousand characters. UTF-8, or what the byte order mark says;
            lines end as they do on any system.

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
    if file.suffix.lower() == ".txt":
        if not text.strip():
            raise ValueError(f"[read] {file.name}: want text, the file is empty.")
        return [Document("prose/txt", "", part) for part in _parts(text.replace("\r\n", "\n"))]
    found = [_document(where, record) for where, record in _records(file, text)]
    if not found:
        raise ValueError(f"[read] {file.name}: want at least one record, the file has none.")
    return found


def split(
    documents: Iterable[Document], part: Literal["select", "report", "all"]
) -> list[Document]:
    """Keep the half of the documents that may be chosen on, or the half that is reported.

    The half depends on the document alone, by SHA-256 of its turns, prompt and response: first byte
    even is ``select``, odd is ``report``.

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
    turns = "".join(text for _, text in document.turns)
    return hashlib.sha256((turns + document.prompt + document.response).encode()).digest()[0]


def _text(file: pathlib.Path) -> str:
    """The file's text, unpacked, its size bounded before it is held."""
    name = file.name.lower()
    if not name.endswith(ENDINGS):
        endings = ", ".join(ENDINGS[:-1])
        raise ValueError(
            f"[read] {file.name}: want a name that ends in {endings} or {ENDINGS[-1]}."
        )
    try:
        with lzma.open(file) if name.endswith(".xz") else file.open("rb") as stream:
            raw = stream.read(BYTES_MAX + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"[read] {file.name}: want a whole xz file ({error}).") from error
    if len(raw) > BYTES_MAX:
        raise ValueError(f"[read] {file.name}: want at most {BYTES_MAX} bytes of text.")
    mark = next((mark for mark in _MARKS if raw.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    try:
        return raw[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place = len(mark) + error.start
        wanted = "UTF-8" if encoding == "utf-8" else f"{encoding.upper()}, as its mark says"
        raise ValueError(f"[read] {file.name}: want {wanted}, byte {place} is not.") from error


def _parts(text: str) -> Iterator[str]:
    """Whole lines together, as few as make a part; what is left at the end goes to the last."""
    start = 0
    while len(text) - start >= 2 * PART:
        end = text.find("\n", start + PART) + 1
        if not end or not text[end:].strip():
            break
        if text[start:end].strip():
            yield text[start:end]
        start = end
    yield text[start:]


def _records(file: pathlib.Path, text: str) -> Iterator[tuple[str, Any]]:
    """The records of a file, each with where it stands."""
    if file.suffix.lower() == ".json":
        # A list; or, as some name them, lines.
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            whole = None
        if isinstance(whole, (list, dict)):
            for number, record in enumerate(whole if isinstance(whole, list) else [whole], 1):
                yield f"[read] {file.name}, record {number}", record
            return
    # By the newline alone: a record may hold other characters that end lines. Files that were put
    # together have marks within.
    for number, line in enumerate(text.split("\n"), 1):
        where, line = f"[read] {file.name}, line {number}", line.strip().strip(_MARK).strip()
        if not line:
            continue
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: want a JSON record ({error}).") from error


def _document(where: str, record: Any) -> Document:
    """The document of one record."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: want a JSON object, not {type(record).__name__}.")
    given = {key: value for key, value in record.items() if value is not None}
    task = given.get("task", PLAIN)
    if not isinstance(task, str) or not is_task(task.split("/", 1)[0]):
        raise ValueError(
            f"{where}: task = {str(task)[:80]!r}: want 'group' or 'group/name', a group of "
            f"{TASK_RULE}."
        )
    _encodable(f"{where}: task", task)
    if "messages" in given:
        return _chat(where, task, given["messages"])
    if "text" in given:
        return Document(task, "", _string(where, given, "text"))
    if "prompt" not in given:
        raise ValueError(f"{where}: want {_FORMS}; it has {', '.join(map(str, given)) or 'none'}.")
    key = "response" if "response" in given else "completion"
    if key not in given:
        raise ValueError(f"{where}: response: want a string that is not empty, or a completion.")
    if isinstance(given["prompt"], list) and isinstance(given[key], list):
        return _chat(where, task, given["prompt"] + given[key])
    prompt, response = _string(where, given, "prompt"), _string(where, given, key)
    answer = given.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise ValueError(f"{where}: answer: want a string, not {type(answer).__name__}.")
    return Document(task, prompt, response, answer)


def _chat(where: str, task: str, messages: Any) -> Document:
    """The document of a chat: what comes before the assistant's last turn, and that turn."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages: want a list of them that is not empty.")
    turns = [_turn(f"{where}, message {i}", message) for i, message in enumerate(messages, 1)]
    last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=0)
    if last == 0:
        raise ValueError(f"{where}: messages: want an answer of the role 'assistant' after others.")
    if not turns[last][1].strip():
        raise ValueError(f"{where}, message {last + 1}: content: want text that is not blank.")
    return Document(task, "", turns[last][1], None, tuple(turns[:last]))


def _turn(where: str, message: Any) -> Turn:
    """Role and text of one message; its content is a string, or parts that are text."""
    if not isinstance(message, dict):
        raise ValueError(f"{where}: want an object of role and content.")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where}: role: want a string that is not empty.")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    if not isinstance(content, str):
        raise ValueError(f"{where}: content: want text.")
    return _encodable(f"{where}: role", role), _encodable(f"{where}: content", content)


def _string(where: str, record: Mapping[str, Any], key: str) -> str:
    """A string of the record that is there and not blank."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {key}: want a string that is not empty.")
    return _encodable(f"{where}: {key}", value)


def _encodable(where: str, value: str) -> str:
    """The value, if it can be encoded."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: want text, not half a surrogate pair.") from error
    return value
