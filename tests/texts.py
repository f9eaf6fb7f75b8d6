"""Documents of four tasks, made up, small enough to score within a test."""

import itertools

import torch

from csfast.judge import Piece
from csfast.types import Document

TASKS = ("code", "instruct", "math", "prose", "retrieval")  # in the order of their names
WORDS = ("stone", "river", "count", "seven", "lamp", "under", "green", "walks")


def make_documents(n):
    """``4 n`` documents, prompts and plain texts, all different."""
    found = []
    for i in range(n):
        text = f"{i} " + " ".join(itertools.islice(itertools.cycle(WORDS[i % 8 :] + WORDS), 12))
        found += [
            Document("math/sum", f"What is {i} + {i}?", f" {2 * i} in all"),
            Document("code/f", f"def f{i}(x):", f" return x + {i}  # {text[:30]}"),
            Document("prose/story", "", text),
            Document("instruct/say", f"Say {text[:20]}", f" {text[:24]}"),
        ]
    return found


def make_pieces(sizes):
    """Pieces of ``(n_prompt, n_sparse)`` with tokens of their own."""
    draw = torch.Generator().manual_seed(0)
    return [
        Piece(
            Document(f"{TASKS[i % 5]}/x", "a", "b"),
            torch.randint(0, 200, (1, prompt + sparse + 1), generator=draw),
            prompt,
        )
        for i, (prompt, sparse) in enumerate(sizes)
    ]
