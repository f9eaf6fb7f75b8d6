"""Few-bit codes of the matrices of all layers at once, and the rotations before them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from csfast import ops
from csfast.calibration import sketching
from csfast.calibration.passes import undisturbed
from csfast.codes import rotation, trellis
from csfast.models import Stacked

GROUP = 64  # columns with one step, and columns whose errors are spread at once
SEARCH = (1.0, 0.9, 0.8, 0.7, 0.6)  # of the largest weight: steps that GPTQ tries
SPREADS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2)  # of the root mean square: steps of fitted levels
JOBS = 8  # searches of paths side by side on a GPU, as many as it has queues by default

Bits = dict[str, float]  # by name of matrix, of all its weights together


@dataclasses.dataclass
class Made:
    """What a row replaces.

    Attributes:
        weights: By name of matrix, as the model has it, ``(rows, cols)``.
        stored: Bits of each of these.
        read: Bits of each that a token reads.
        patch: Replaces what modules of the copy compute, while it is entered.
        spent: Gives what was read, if only running it says so.
    """

    weights: dict[str, Tensor]
    stored: Bits
    read: Bits
    patch: Callable[[], contextlib.AbstractContextManager[None]] | None = None
    spent: Callable[[], Bits] | None = None

    def beside(self, other: Made) -> Made:
        """Give both, which replace different matrices."""
        assert self.patch is None or other.patch is None
        return Made(
            {**self.weights, **other.weights},
            {**self.stored, **other.stored},
            {**self.read, **other.read},
            self.patch or other.patch,
        )


# Rotations


class Turn(Protocol):
    """A rotation of the inputs of a matrix, in their dtype."""

    def inputs(self, x: Tensor) -> Tensor:
        """Rotate ``(..., cols)``."""

    def weight(self, weight: Tensor) -> Tensor:
        """Rotate a weight ``(rows, cols)`` so that it takes rotated inputs."""

    def undo(self, rotated: Tensor) -> Tensor:
        """Give back what was rotated."""


class Unturned:
    """No rotation."""

    def inputs(self, x: Tensor) -> Tensor:
        """Give the inputs as they are."""
        return x

    weight = undo = inputs


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """A rotation by a matrix ``(cols, cols)``, float64."""

    by: Tensor

    def inputs(self, x: Tensor) -> Tensor:
        """Rotate ``(..., cols)``."""
        return (x.double() @ self.by).to(x.dtype)

    weight = inputs

    def undo(self, rotated: Tensor) -> Tensor:
        """Give back what was rotated."""
        return (rotated.double() @ self.by.T).to(rotated.dtype)


@functools.cache
def orthogonal(cols: int) -> Tensor:
    """A random orthogonal matrix, ``(cols, cols)``, float64, on the CPU."""
    draws = torch.Generator().manual_seed(cols)
    normal = torch.randn(cols, cols, generator=draws, dtype=torch.float64)
    found: Tensor = torch.linalg.qr(normal)[0]
    return found


def turn_of(name: str, moment: Tensor, seed: int, column: Tensor | None = None) -> tuple[Turn, int]:
    """Give a rotation by its name, and the bits that it takes.

    Args:
        name: One of none; full; block, which is neither dealt nor scaled; dealt, the package's; and
            unscaled, the same with columns of the weight as they are.
        moment: Second moment of the inputs.
        seed: Of the signs.
        column: Mean square of each column of the weight, for dealt.
    """
    cols, device = len(moment), moment.device
    if name == "none":
        return Unturned(), 0
    if name == "full":
        return Whole(orthogonal(cols).to(device)), 0
    energy = torch.ones(cols) if name == "block" else moment.diagonal()
    turn = rotation.fit(energy, column=column if name == "dealt" else None, seed=seed)
    n_bits = (32 if name == "dealt" else 16) * cols
    if name == "block":  # signs follow from the seed
        turn = rotation.Rotation(torch.arange(cols, dtype=torch.int32), turn.scale)
        n_bits = 0
    elif name not in ("dealt", "unscaled"):
        raise ValueError(f"[codes] rotation {name!r}: want none, full, block, unscaled or dealt.")
    return turn.to(device), n_bits


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """Matrices of one size, rotated, with how errors spread; one of each layer.

    Attributes:
        stacks: The matrices.
        turns: Rotations of their inputs.
        left: ``(layers, rows, cols)``, float32.
        moment: Of their inputs, ``(layers, cols, cols)``, float32.
        factor: ``(layers, cols, cols)``, float32, from `feedback.spread`.
        gains: What is folded in.
        own: Bits of the rotation of each.
    """

    stacks: list[Stacked]
    turns: list[Turn]
    left: Tensor
    moment: Tensor
    factor: Tensor
    gains: list[Tensor | None]
    own: list[int]

    @property
    def size(self) -> int:
        """Weights of a matrix."""
        return self.left[0].numel()

    def back(self, value: Tensor) -> dict[str, Tensor]:
        """Give matrices as the model has them, from ``(layers, rows, cols)``, by name."""
        return {
            stack.name: unfolded(turn.undo(v), gain)
            for stack, turn, gain, v in zip(self.stacks, self.turns, self.gains, value, strict=True)
        }

    def made(self, value: Tensor, n_bits: float) -> Made:
        """Give what replaces the matrices, at so many bits of each beside its rotation."""
        bits = {s.name: n_bits + own for s, own in zip(self.stacks, self.own, strict=True)}
        return Made(self.back(value), bits, dict(bits))


def unfolded(whole: Tensor, gain: Tensor | None) -> Tensor:
    """Take the gain of the norm out of a matrix; nothing reads a column where it is 0."""
    return whole if gain is None else torch.where(gain == 0, 0.0, whole / gain)


def together(parts: Sequence[Made]) -> Made:
    """Give all parts as one."""
    return functools.reduce(Made.beside, parts)


# Codes of one number at a time, for all layers at once


class Code(Protocol):
    """Rounds columns that feedback has moved."""

    def begin(self, part: Tensor) -> None:
        """Look at the columns of a block, ``(columns, layers, rows)``, before any is rounded."""

    def nearest(self, column: Tensor) -> Tensor:
        """Give the value of a column ``(layers, rows)``."""


class Uniform:
    """Symmetric steps, one a row and group, searched for the least squared error."""

    def __init__(self, bits: int) -> None:
        self.most = (2**bits - 1) / 2
        self.step = torch.empty(0)

    def begin(self, part: Tensor) -> None:
        """Search the steps."""
        largest = part.abs().amax(0).clamp_min(1e-9)
        least = torch.full_like(largest, torch.inf)
        self.step = largest
        for share in SEARCH:
            step = largest * share / self.most
            error = (part - self._rounded(part, step)).square().sum(0)
            better = error < least
            least = torch.where(better, error, least)
            self.step = torch.where(better, step, self.step)

    def _rounded(self, x: Tensor, step: Tensor) -> Tensor:
        place: Tensor = (x / step + self.most).round().clamp(0, 2 * self.most)
        found: Tensor = (place - self.most) * step
        return found

    def nearest(self, column: Tensor) -> Tensor:
        """Round."""
        return self._rounded(column, self.step)


class Fitted:
    """Levels fitted to normal draws; a step a row ``(layers, rows)``, or searched for groups."""

    def __init__(self, bits: int, step: Tensor | None, device: torch.device) -> None:
        self.levels = normal_levels(bits).to(device)
        self.between = (self.levels[1:] + self.levels[:-1]) / 2
        self.is_grouped = step is None
        self.step = torch.empty(0) if step is None else step

    def begin(self, part: Tensor) -> None:
        """Search the steps, if they are not given."""
        if not self.is_grouped:
            return
        own = part.square().mean(0).sqrt()
        least = torch.full_like(own, torch.inf)
        self.step = own
        for spread in SPREADS:
            step = (own * spread).bfloat16().float()
            error = (part - self._rounded(part, step)).square().sum(0)
            better = error < least
            least = torch.where(better, error, least)
            self.step = torch.where(better, step, self.step)

    def _rounded(self, x: Tensor, step: Tensor) -> Tensor:
        inverse = torch.where(step > 0, 1 / step, 0.0)
        return self.levels[torch.bucketize(x * inverse, self.between)] * step

    def nearest(self, column: Tensor) -> Tensor:
        """Round."""
        return self._rounded(column, self.step)


@functools.cache
def normal_levels(bits: int) -> Tensor:
    """Levels of least squared error for normal draws, ``(2^bits,)``, float32, on the CPU.

    Source:
        Max, "Quantizing for minimum distortion", IRE Trans. Information Theory, 1960.
    """
    x = torch.linspace(-7, 7, 140_001, dtype=torch.float64)
    density = torch.exp(-x * x / 2)
    # Many levels want a density like the cube root of that of the draws: three times the variance.
    places = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    levels = math.sqrt(6) * torch.erfinv(2 * places - 1)
    for _ in range(300):
        nearest = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros_like(levels).index_add_(0, nearest, density)
        sums = torch.zeros_like(levels).index_add_(0, nearest, density * x)
        levels = torch.where(mass > 0, sums / mass.clamp_min(1e-300), levels)
    return levels.float()


class Lattice:
    """Points of E8 within a ball: eight rows of a column are one of them, in steps of their rows.

    Source:
        Conway and Sloane, "Fast quantizing and decoding algorithms for lattice quantizers and
        codes", IEEE Trans. Information Theory, 1982; Tseng et al., "QuIP#", 2024.
    """

    def __init__(self, bits: int, step: Tensor) -> None:
        self.norm = ball(bits)
        self.fine = lattice_scale(bits)
        self.step = step

    def begin(self, part: Tensor) -> None:
        """Nothing depends on the block."""

    def nearest(self, column: Tensor) -> Tensor:
        """Round eight rows at a time."""
        rows = column.shape[-1]
        inverse = torch.where(self.step > 0, 1 / self.step, 0.0)
        x = F.pad(column * inverse * self.fine, (0, -rows % 8))
        x = x.view(*x.shape[:-1], -1, 8)
        point = in_ball(x, self.norm).flatten(-2)[..., :rows]
        return point * (self.step / self.fine)


@functools.cache
def ball(bits: int) -> int:
    """The largest squared norm whose points of E8 are at most ``2^(8 bits)``."""
    count, norm = 1, 0
    while True:
        m = norm // 2 + 1
        count += 240 * sum(d**3 for d in range(1, m + 1) if m % d == 0)
        if count > 2 ** (8 * bits):
            return norm
        norm += 2


@functools.cache
def lattice_scale(bits: int) -> float:
    """What normal draws are multiplied with, so that the ball loses least of them."""
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    scales = [0.5 * 1.05**i for i in range(60)]
    errors = [float((in_ball(x * c, ball(bits)) / c - x).square().mean()) for c in scales]
    return scales[errors.index(min(errors))]


def in_ball(x: Tensor, norm: int) -> Tensor:
    """Points of E8 near to ``x (..., 8)`` of at most that squared norm; on its rim not the nearest.

    What would fall outside is drawn in by several factors, the least of which always suffices, as
    no place is further than 1 from a point.
    """
    radius = math.sqrt(norm)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-9)
    shares = torch.linspace(1, (radius - 1) / radius, 8, device=x.device)
    shrunk = (radius * shares.view(-1, *[1] * x.dim()) / length).clamp_max(1)
    tried = torch.cat([x[None], x * shrunk])
    point = nearest_e8(tried)
    error = (point - x).square().sum(-1)
    outside = point.square().sum(-1) > norm + 1e-3
    best = error.masked_fill(outside, torch.inf).argmin(0)
    return point.gather(0, best[None, ..., None].expand(1, *x.shape))[0]


def nearest_e8(x: Tensor) -> Tensor:
    """The point of E8 that is nearest to each ``x (..., 8)``."""

    def even(x: Tensor) -> Tensor:
        """Whole numbers of an even sum: the one that was nearest to going the other way goes."""
        near = x.round()
        off = x - near
        worst = off.abs().argmax(-1, keepdim=True)
        other = torch.where(off.gather(-1, worst) >= 0, 1.0, -1.0)
        is_odd = near.sum(-1, keepdim=True) % 2 != 0
        return near.scatter_add(-1, worst, torch.where(is_odd, other, 0.0))

    whole, half = even(x), even(x - 0.5) + 0.5
    closer = (half - x).square().sum(-1, keepdim=True) < (whole - x).square().sum(-1, keepdim=True)
    return torch.where(closer, half, whole)


def rounded(left: Tensor, factor: Tensor | None, code: Code) -> Tensor:
    """Round matrices of all layers column by column, as `feedback.round_columns` does one.

    Args:
        left: ``(layers, rows, cols)``, float32.
        factor: ``(layers, cols, cols)``; None rounds every column by itself.
        code: What a column may be.
    """
    rest, found = left.clone(), torch.empty_like(left)
    cols = left.shape[2]
    for start in range(0, cols, GROUP):
        stop = min(start + GROUP, cols)
        part = rest[:, :, start:stop].permute(2, 0, 1).contiguous()
        code.begin(part)
        value, error = torch.empty_like(part), torch.empty_like(part)
        for i, c in enumerate(range(start, stop)):
            value[i] = code.nearest(part[i])
            if factor is None:
                continue
            spread = factor[:, c, c:stop]
            error[i] = (part[i] - value[i]) / spread[:, :1]
            part[i + 1 :] -= error[i] * spread[:, 1:].T[:, :, None]
        found[:, :, start:stop] = value.permute(1, 2, 0)
        if factor is not None and stop < cols:
            moved = error.permute(1, 2, 0).contiguous()
            rest[:, :, stop:].baddbmm_(moved, factor[:, start:stop, stop:], alpha=-1)
    return found


def fitted(left: Tensor, value: Tensor, moment: Tensor | None, step: Tensor) -> Tensor:
    """Steps of rows in closed form: of least error on the outputs, or without a moment on weights.

    Args:
        left: ``(..., rows, cols)``.
        value: In steps, likewise.
        moment: Of the inputs, ``(..., cols, cols)``.
        step: What stays where there is no better one, ``(..., rows)``.
    """
    seen = value if moment is None else value @ moment
    best = (left * seen).sum(-1) / (value * seen).sum(-1)
    is_sound = torch.isfinite(best) & (best > 0) & (step > 0)
    return torch.where(is_sound, best, step).bfloat16().float()


def by_rows(of: Prepared, left: Tensor, code: Callable[[Tensor], Code]) -> Tensor:
    """Code with one step a row, fitted after each of as many passes as the package makes."""
    step = left.square().mean(-1).sqrt().bfloat16().float()
    for _ in range(sketching.PASSES):
        value = rounded(left, of.factor, code(step))
        value = value * torch.where(step > 0, 1 / step, 0.0)[..., None]
        step = fitted(left, value, of.moment, step)
    return value * step[..., None]


def searched(
    left: Tensor,
    moment: Tensor,
    factor: Tensor,
    bits: int,
    *,
    nu: int = trellis.NU,
    passes: int | None = None,
    by_outputs: bool = True,
    fed: bool = True,
) -> Tensor:
    """Code a matrix by trellises as `sketching` does, or with something else than it does.

    Args:
        left: ``(rows, cols)``.
        moment: ``(cols, cols)``.
        factor: ``(cols, cols)``.
        bits: Of a weight.
        nu: Memory of the code.
        passes: With the steps that the last one's codes want; `sketching.PASSES` if left out.
        by_outputs: Whether steps are fitted to outputs, or to weights.
        fed: Whether errors are fed back.

    Returns:
        What the codes stand for, ``(rows, cols)``, float32.
    """
    if not fed:
        factor = torch.eye(len(factor), device=factor.device)
    step = (left.square().mean(1).sqrt() * trellis.UNIT[bits]).bfloat16().float()
    for _ in range(sketching.PASSES if passes is None else passes):
        _, small = ops.encode(left, factor, step, bits=bits, nu=nu)
        value = small.float()
        step = fitted(left, value, moment if by_outputs else None, step)
    return step[:, None] * value


def side_by_side(jobs: Sequence[Callable[[], Any]], device: torch.device) -> list[Any]:
    """Run searches of paths, several at a time, each on a stream of its own."""

    def run(job: Callable[[], Any]) -> Any:
        with undisturbed(), sketching._stream_of_its_own(device):
            return job()

    if device.type == "cuda":  # torch loads its linear algebra at the first call
        torch.linalg.cholesky(torch.eye(1, device=device))
        torch.cuda.synchronize(device)
    n_threads = JOBS if device.type == "cuda" else torch.get_num_threads()
    with concurrent.futures.ThreadPoolExecutor(n_threads) as pool:
        try:
            return list(pool.map(run, jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
