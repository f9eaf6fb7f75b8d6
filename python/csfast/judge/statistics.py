"""What is said of many documents: means over tokens, then tasks, and resampled intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .batch import Piece, by_group, in_mean


def mean_read(pieces: Sequence[Piece], read: Tensor) -> Tensor:
    """Give what a token reads of each layer, ``(n_layers, n_counts)`` float64.

    The mean over the tokens of a task, then over the tasks that count for means.

    Args:
        pieces: What was scored.
        read: Sums over the tokens of each, ``(n_pieces, n_layers, n_counts)``.
    """
    by_task = read_by_group(pieces, read)
    return torch.stack([by_task[group] for group in in_mean(pieces)]).mean(dim=0)


def read_by_group(pieces: Sequence[Piece], read: Tensor) -> dict[str, Tensor]:
    """Give what a token of each task reads of each layer, ``(n_layers, n_counts)`` float64."""
    found = {}
    for group, members in by_group(pieces).items():
        n_sparse = sum(pieces[i].n_sparse for i in members)
        found[group] = read[members].double().sum(dim=0) / n_sparse
    return found


def bootstrap(
    pairs: Mapping[str, Sequence[tuple[float, int]]], *, resamples: int, seed: int
) -> dict[str, NDArray[np.float64]]:
    """Draw documents with replacement; gives the resampled delta of every task, ``(resamples,)``.

    A pair is one document's summed delta and its number of tokens, so that long documents weigh
    as they do in the mean itself.
    """
    draws = {}
    for number, (group, members) in enumerate(pairs.items()):
        delta = np.array([pair[0] for pair in members])
        n_tokens = np.array([pair[1] for pair in members], dtype=np.float64)
        rng = np.random.default_rng([seed, number])
        pick = rng.integers(0, len(members), size=(resamples, len(members)))
        draws[group] = delta[pick].sum(axis=1) / n_tokens[pick].sum(axis=1)
    return draws


def mean_draws(draws: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Give the resampled mean over some tasks."""
    found: NDArray[np.float64] = np.mean(draws, axis=0)
    return found


def interval(draws: NDArray[np.float64]) -> list[float]:
    """Give the middle 95 % of resampled values."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return [float(low), float(high)]


def mean(values: Iterable[float]) -> float:
    """Give the mean, summed exactly."""
    members = [float(value) for value in values]
    return math.fsum(members) / len(members)
