"""The only stopwatch of csfast: interleaved measurements, their median and tenths.

What is compared is called in turns, so that a change of clock rate or a noisy neighbour meets all
variants alike, and every call takes the next input, so that none finds its weights in a cache.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping

import torch


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    p10: float
    p90: float
    runs: int  # measurements behind the quantiles


class Clock:
    """Seconds since it was made, for progress and token rates."""

    def __init__(self) -> None:
        """Start counting."""
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Give the seconds passed."""
        return time.perf_counter() - self._start


def today() -> str:
    """Give the day in UTC, such as ``2026-01-31``, for the head of results."""
    return time.strftime("%Y-%m-%d", time.gmtime())


def compare(
    variants: Mapping[str, Callable[[int], object]],
    *,
    n_inputs: int,
    device: torch.device,
    runs: int = 30,
    warmup: int = 3,
    eager: Collection[str] = (),
) -> dict[str, Timing]:
    """Time several ways to do the same, in turns over rotating inputs.

    On the CPU a measurement is one call. On CUDA it is one replay of a graph that holds a call for
    each input, divided by their number, so the host does not show.

    Args:
        variants: Name to closure; the closure takes the number of the input, in ``[0, n_inputs)``.
            On CUDA it must be capturable.
        n_inputs: Inputs to rotate over; together they should exceed every cache.
        device: Where the closures work.
        runs: Measurements of every variant, at least 1.
        warmup: Rounds before them that do not count.
        eager: Names of variants that CUDA cannot capture: their calls are timed one by one, with
            whatever the host adds.

    Returns:
        Name to timing, in the order of `variants`.

    Raises:
        ValueError: ``runs``, ``warmup`` or ``n_inputs`` is out of range.
    """
    if runs < 1 or warmup < 0 or n_inputs < 1:
        raise ValueError(
            f"[timing] runs = {runs}, warmup = {warmup}, n_inputs = {n_inputs}: want runs and "
            "n_inputs of at least 1 and a warmup of at least 0."
        )
    if device.type == "cuda":
        once = _on_cuda(
            {name: fn for name, fn in variants.items() if name not in eager}, n_inputs, device
        ) | _one_by_one({name: fn for name, fn in variants.items() if name in eager})
    else:
        once = _on_cpu(variants)
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    call = 0
    for turn in range(-warmup, runs):
        # Another variant goes first every turn: the first one pays for what the last one evicted.
        for name in _rotated(names, turn):
            # Every call takes the next input, or a variant would find what the last one has read.
            value = once[name](call % n_inputs)
            call += 1
            if turn >= 0:
                seconds[name].append(value)
    return {name: _summary(values) for name, values in seconds.items()}


def _rotated(names: list[str], turn: int) -> Iterator[str]:
    """Yield the names, starting with another one every turn."""
    for i in range(len(names)):
        yield names[(turn + i) % len(names)]


def _on_cpu(
    variants: Mapping[str, Callable[[int], object]],
) -> dict[str, Callable[[int], float]]:
    """Give, for every variant, what measures one call."""

    def measured(fn: Callable[[int], object]) -> Callable[[int], float]:
        def once(i: int) -> float:
            start = time.perf_counter()
            fn(i)
            return time.perf_counter() - start

        return once

    return {name: measured(fn) for name, fn in variants.items()}


def _on_cuda(
    variants: Mapping[str, Callable[[int], object]], n_inputs: int, device: torch.device
) -> dict[str, Callable[[int], float]]:
    """Give, for every variant, what replays its graph once and measures that."""

    def measured(fn: Callable[[int], object]) -> Callable[[int], float]:
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # capture wants a warmed-up closure on a side stream
            for i in range(n_inputs):
                fn(i)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(n_inputs):
                fn(i)

        return lambda _: _seconds_on_cuda(graph.replay) / n_inputs

    return {name: measured(fn) for name, fn in variants.items()}


def _one_by_one(
    variants: Mapping[str, Callable[[int], object]],
) -> dict[str, Callable[[int], float]]:
    """Give, for every variant, what measures one call on the GPU."""

    def measured(fn: Callable[[int], object]) -> Callable[[int], float]:
        return lambda i: _seconds_on_cuda(lambda: fn(i))

    return {name: measured(fn) for name, fn in variants.items()}


def _seconds_on_cuda(work: Callable[[], object]) -> float:
    """Time what `work` puts on the current stream."""
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _summary(seconds: list[float]) -> Timing:
    """Give the median and the tenths; ranks are rounded, nothing is interpolated."""
    ordered = sorted(seconds)

    def at(fraction: float) -> float:
        return ordered[round(fraction * (len(ordered) - 1))]

    return Timing(median=at(0.5), p10=at(0.1), p90=at(0.9), runs=len(ordered))
