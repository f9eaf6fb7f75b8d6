"""Text of the demo model: documents, tokenizer, what is withheld from training, packed rows.

A document is its text, or a prompt and a response that are tokenised apart and joined. Token 0
opens every document and therefore also closes the one before it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import lzma
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

TASKS = ("math", "code", "prose", "instruct")
LEFT_OUT = ("math/mawps",)  # its terms are not verified
# Share-alike sources may be learnt from, but their text is not passed on in the sample file.
NOT_PASSED_ON = (
    "instruct/dialogue_sgd",
    "instruct/openqa_hotpot",
    "instruct/cot_ecqa",
    "prose/tinystories",
    "prose/tinystories_lc",
)
WITHHELD_ONE_IN = 50
END = "<|endoftext|>"
VOCABULARY = 8192
CONTEXT = 2048
SAMPLE_BYTES = 205_000  # per task: four of them and the retrieval samples stay below 1 MiB
SAMPLE_TOKENS = 1950
SAMPLE_CHARACTERS = 6000
SAMPLE_RETRIEVAL = ((200, 8), (500, 6), (1000, 4), (1500, 2))  # (tokens, samples of each kind)
PIECE = 512  # tokens between places in a long document where a row may begin


@dataclass(frozen=True)
class Document:
    """A task's name and its text; `response` is empty for plain text."""

    task: str
    prompt: str
    response: str


def load_tasks() -> ModuleType:
    """Import csfast/tasks.py by its path, so that the package need not be built."""
    path = Path(__file__).resolve().parents[2] / "python" / "csfast" / "judge" / "retrieval.py"
    spec = importlib.util.spec_from_file_location("csfast_tasks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def documents(folder: Path, task: str) -> list[Document]:
    """Read one of TASKS from its xz file, except the sources in LEFT_OUT."""
    raw = lzma.decompress((folder / f"{task}.txt.xz").read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    found = []
    for name, span in manifest[task]["tasks"].items():
        if name not in LEFT_OUT:
            for text in raw[span["start"] : span["end"]].decode().split("\0")[:-1]:
                prompt, _, response = text.partition("\1")
                found.append(Document(name, prompt, response))
    return found


def is_withheld(document: Document) -> bool:
    """Whether the first 32 bits of the SHA-256 of prompt + response divide by WITHHELD_ONE_IN."""
    digest = hashlib.sha256((document.prompt + document.response).encode()).hexdigest()
    return int(digest[:8], 16) % WITHHELD_ONE_IN == 0


def make_tokenizer(folder: Path, seed: int) -> Tokenizer:
    """Train byte-level BPE with single digits on about 9 MB of each task, nothing withheld."""
    rng = random.Random(seed)
    tasks = load_tasks()
    texts = []
    for task in TASKS:
        kept = [d for d in documents(folder, task) if not is_withheld(d)]
        rng.shuffle(kept)
        room = 9_000_000
        for document in kept:
            texts += [document.prompt[:20_000]] + [document.response] * bool(document.response)
            room -= min(len(document.prompt), 20_000) + len(document.response)
            if room < 0:
                break
    for i in range(3000):
        sample = tasks.retrieval_sample(tasks.KINDS[i % 3], 500, rng, rough_count)
        texts.append(sample.prompt)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, 0)]
            ),
        ]
    )
    return tokenizer


def rough_count(text: str) -> int:
    """Tokens of a text before there is a tokenizer."""
    return len(re.findall(r"\d|[^\W\d]+|[^\w\s]|\n| (?=\d)", text)) + 1


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write what AutoTokenizer needs for a fast tokenizer."""
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer: Tokenizer, prompt: str, response: str = "") -> tuple[list[int], int]:
    """Ids of token 0, prompt and response; and how many of them are the prompt's."""
    head = tokenizer.encode(prompt).ids
    tail = tokenizer.encode(response, add_special_tokens=False).ids if response else []
    return head + tail, len(head)


def sample_records(
    folder: Path, tokenizer: Tokenizer, seed: int
) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Choose the sample file's records from what is withheld; count what was passed over.

    Sources take turns, so that many small ones do not drown in a large one. A document is passed
    over if 100 characters from a third or two thirds of its way stand in a document trained on.
    """
    rng = random.Random(seed)
    records: list[dict[str, str]] = []
    passed_over = {}
    for task in TASKS:
        found = documents(folder, task)
        trained = "\0".join(d.prompt + d.response for d in found if not is_withheld(d))
        sources: dict[str, list[Document]] = {}
        for document in found:
            if is_withheld(document) and document.task not in NOT_PASSED_ON:
                sources.setdefault(document.task, []).append(document)
        for of_source in sources.values():
            rng.shuffle(of_source)
        room, passed_over[task] = SAMPLE_BYTES, 0
        while sources:
            for name in list(sources):
                document = sources[name].pop()
                if not sources[name]:
                    del sources[name]
                record = _record(document, tokenizer)
                line = len(json.dumps(record, ensure_ascii=False).encode()) + 1 if record else 0
                if record is None or line > room:
                    continue
                if _stands_in(document, trained):
                    passed_over[task] += 1
                    continue
                room -= line
                records.append(record)
            if room < 300:
                break
    tasks = load_tasks()
    for tokens, samples in SAMPLE_RETRIEVAL:
        for kind in tasks.KINDS:
            for _ in range(samples):
                made = tasks.retrieval_sample(kind, tokens, rng, lambda t: _count(tokenizer, t))
                records.append(
                    {
                        "task": made.task,
                        "prompt": made.prompt,
                        "response": made.response,
                        "answer": made.answer,
                    }
                )
    rng.shuffle(records)
    return records, passed_over


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text).ids)


def _record(document: Document, tokenizer: Tokenizer) -> dict[str, str] | None:
    """The document as a record, cut if it is plain text; None if it is too long."""
    if not document.response:
        text = document.prompt[:SAMPLE_CHARACTERS]
        while _count(tokenizer, text) > SAMPLE_TOKENS:
            text = text[: len(text) * 9 // 10]
        return {"task": document.task, "text": text}
    if len(encode(tokenizer, document.prompt, document.response)[0]) > SAMPLE_TOKENS:
        return None
    record = {"task": document.task, "prompt": document.prompt, "response": document.response}
    answer = short_answer(document)
    if answer:
        record["answer"] = answer
    return record


def short_answer(document: Document) -> str:
    """What is judged in a response, where that is short; else nothing."""
    response = document.response.strip()
    if document.task == "math/gsm8k":
        return response.rpartition("####")[2].strip()
    if document.task == "math/aqua":
        return response.rpartition("The answer is (")[2][:1]
    return response if len(response) <= 40 and "\n" not in response else ""


def _stands_in(document: Document, trained: str) -> bool:
    """Whether a window of a long document stands in the text trained on."""
    text = (document.prompt + document.response)[:SAMPLE_CHARACTERS]
    if len(text) < 600:
        return False
    return any(text[at : at + 100] in trained for at in (len(text) // 3, 2 * len(text) // 3))


@dataclass(frozen=True)
class Stream:
    """Tokens of one task's documents in random order.

    Attributes:
        ids: Token ids, uint16; every document opens with token 0.
        starts: Where a row may begin, int64: documents, and every PIECE tokens within long ones.
    """

    ids: np.ndarray
    starts: np.ndarray


def streams(
    folder: Path, tokenizer_path: Path, seed: int, *, workers: int, most: int | None = None
) -> dict[str, Stream]:
    """Tokenise what is not withheld, on many processes; at most `most` documents of each task."""
    made = {}
    with ProcessPoolExecutor(workers, initializer=_open, initargs=(str(tokenizer_path),)) as pool:
        read = pool.map(documents, [folder] * len(TASKS), TASKS)
        for task, found in zip(TASKS, read, strict=True):
            kept = [d for d in found if not is_withheld(d)]
            random.Random(f"{seed}/{task}").shuffle(kept)
            kept = kept[:most]
            # Documents differ in size, so many small groups share the work evenly.
            groups = [kept[i : i + 400] for i in range(0, len(kept), 400)]
            pieces = [p for group in pool.map(_encode_group, groups) for p in group]
            made[task] = _join(pieces)
    return made


_tokenizer: Tokenizer | None = None  # of a worker process


def _open(path: str) -> None:
    """Give a worker process its tokenizer."""
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = Tokenizer.from_file(path)


def _encode_group(group: list[Document]) -> list[np.ndarray]:
    assert _tokenizer is not None
    heads = _tokenizer.encode_batch_fast([d.prompt for d in group])
    tails = _tokenizer.encode_batch_fast([d.response for d in group], add_special_tokens=False)
    return [np.array(h.ids + t.ids, np.uint16) for h, t in zip(heads, tails, strict=True)]


def _join(pieces: list[np.ndarray]) -> Stream:
    """Lay documents end to end, leaving room for one more row after the last start."""
    begins = np.cumsum([0] + [len(p) for p in pieces])[:-1]
    starts = np.concatenate(
        [b + np.arange(0, len(p), PIECE) for b, p in zip(begins, pieces, strict=True)]
    )
    ids = np.concatenate(pieces)
    return Stream(ids, starts[starts < len(ids) - CONTEXT - 1].astype(np.int64))


def put_retrieval_rows(
    tokenizer_path: str, seed: int, rows: int, progress: Callable[[], float], queue: Queue[Any]
) -> None:
    """Put blocks of packed retrieval rows into a queue for ever; the body of a worker process."""
    _open(tokenizer_path)
    made = packed_retrieval(seed, progress)
    while True:
        block = [next(made) for _ in range(rows)]
        queue.put((np.stack([ids for ids, _ in block]), np.stack([mask for _, mask in block])))


def packed_retrieval(
    seed: int, progress: Callable[[], float]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Give rows of whole samples: ids ``(CONTEXT + 1,)`` and which of them are answers.

    One context is asked many questions, each closed by token 0, because an answer teaches and the
    random context does not. Contexts are short at first.
    """
    assert _tokenizer is not None
    tokenizer, rng, tasks = _tokenizer, random.Random(seed), load_tasks()

    def count(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    while True:
        ids, mask = [0], [False]
        while (room := CONTEXT + 1 - len(ids)) >= 170:
            tokens = _context_tokens(rng, progress(), room)
            kind = rng.choice(tasks.KINDS)
            context = tasks.retrieval_context(kind, tokens, rng, count)
            most_queries = 3 + tokens // 25
            for i, query in enumerate(context.queries[:most_queries]):
                prompt = (context.text if i == 0 else "") + query.question.lstrip("\n" * (i > 0))
                asked = tokenizer.encode(prompt, add_special_tokens=False).ids
                given = [*tokenizer.encode(query.response, add_special_tokens=False).ids, 0]
                if len(ids) + len(asked) + len(given) > CONTEXT + 1:
                    break
                ids += asked + given
                mask += [False] * len(asked) + [True] * len(given)
        pad = CONTEXT + 1 - len(ids)
        yield np.array(ids + [0] * pad, np.uint16), np.array(mask + [False] * pad, bool)


def _context_tokens(rng: random.Random, progress: float, room: int) -> int:
    """Length of the next context: 100..400 at first, later up to all there is room for."""
    if rng.random() < max(0.15, 1 - 6 * progress):
        most = 400
    elif rng.random() < 0.4:
        most = 1000
    else:
        most = 1900
    return min(rng.randint(100 if most == 400 else 200, most), room - 60, 1900)
