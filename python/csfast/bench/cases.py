"""The problems that the operations must solve: tests check each, ``csfast bench`` times some.

Everything is made on the CPU from a seed and then moved, so that all devices get the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..codes import levels as levels_
from ..codes import planes
from ..types import Code


@dataclasses.dataclass(frozen=True)
class Problem:
    """The tensors of one feed-forward layer, its codes, and a batch of activations."""

    codes: Tensor  # (n_neurons, 2, groups, group_bytes) uint8
    equal: Tensor  # (d,) float32
    row_scale: Tensor  # (n_neurons, 2) float32, the norm of the down row folded into [:, 1]
    gate: Tensor  # (n_neurons, d) T
    up: Tensor  # (n_neurons, d) T
    down_t: Tensor  # (n_neurons, d) T
    x: Tensor  # (batch, d) T
    bits: Code


@dataclasses.dataclass(frozen=True)
class Biases:
    """Biases of a layer, and what recovery makes of them."""

    gate: Tensor  # (n_neurons,) T
    up: Tensor  # (n_neurons,) T
    down: Tensor  # (d,) T
    offset: Tensor  # (n_neurons, 2) float32, the norm of the down row folded into [:, 1]

    def of_execute(self) -> dict[str, Tensor]:
        """Give the three that `ops.execute` takes, by name."""
        return {"gate_bias": self.gate, "up_bias": self.up, "down_bias": self.down}


@dataclasses.dataclass(frozen=True)
class NestedProblem:
    """The nested codes of one feed-forward layer's gate and up, and a batch of activations."""

    levels: tuple[levels_.Packed, ...]  # of pairs
    gate: tuple[levels_.Level, ...]  # (n_neurons, d), on the CPU, as are those of up
    up: tuple[levels_.Level, ...]
    equal: Tensor  # (d,) float32
    x: Tensor  # (batch, d) T


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a problem, and how to make one."""

    name: str
    batch: int
    d: int
    n_neurons: int

    def make(self, dtype: torch.dtype, device: str, *, bits: Code = 2, seed: int = 0) -> Problem:
        """Make a layer like a trained one: its channels differ in size by factors of up to 8.

        Args:
            dtype: T, of the weights and the activations.
            device: Where the tensors shall be.
            bits: Code of the weights, 1 to 4 or "ternary".
            seed: Of the random numbers.
        """
        tensors, equal = self._draw(seed)
        return _problem(tensors, equal, dtype, device, bits)

    def make_exact(
        self, dtype: torch.dtype, device: str, *, bits: Code = 2, seed: int = 0
    ) -> Problem:
        """Make a layer of small integers, on which `execute` has nothing to round but its output.

        The gate of a neuron is at least 248 or at most -248, so that silu is the identity or zero
        in float32. Every sum stays below 2^24 up to 4000 neurons. Arguments are those of `make`.
        """
        g = torch.Generator().manual_seed(seed)
        x = _signs(g, self.batch, self.d, 2)
        gate = _sparse(g, self.n_neurons, self.d, 4)
        up = _sparse(g, self.n_neurons, self.d, 4)
        # Channel 0 decides: 8 * 32 = 256, and four others of at most 2 each.
        x[:, 0] = 8
        gate[:, 0] = 32 * _signs(g, self.n_neurons, 1, 1)[:, 0]
        down_t = _signs(g, self.n_neurons, self.d, 1)
        return _problem((gate, up, down_t, x), torch.ones(self.d), dtype, device, bits)

    def make_biases(self, problem: Problem, *, exact: bool = False, seed: int = 1) -> Biases:
        """Make biases of the size of the projections' outputs, or small integers for `make_exact`.

        Args:
            problem: What they belong to; it says T and the device.
            exact: Whether they are integers of at most 2.
            seed: Of the random numbers.
        """
        g = torch.Generator().manual_seed(seed)
        sizes = (self.n_neurons, self.n_neurons, self.d)
        drawn = [_signs(g, 1, n, 2)[0] if exact else torch.randn(n, generator=g) for n in sizes]
        dtype, device = problem.x.dtype, problem.x.device
        gate, up, down = (t.to(dtype) for t in drawn)
        norm = problem.down_t.float().norm(dim=1).cpu()
        offset = torch.stack([gate.float(), up.float() * norm], dim=1)
        return Biases(gate.to(device), up.to(device), down.to(device), offset.to(device))

    def make_nested(
        self, dtype: torch.dtype, device: str, *, bits: Sequence[int] = (3, 3), seed: int = 0
    ) -> NestedProblem:
        """Code the layer of `make` in levels, each weight by its nearest code.

        Args:
            dtype: T, of the weights and the activations.
            device: Where the tensors shall be.
            bits: Of every level, 1 to 4.
            seed: Of the random numbers.
        """
        tensors, equal = self._draw(seed)
        gate, up, _, x = (t.to(dtype) for t in tensors)
        levels = [levels_.fit_rows(w, None, bits, equal=equal) for w in (gate, up)]
        return _nested_problem(levels[0], levels[1], equal, x, device)

    def make_nested_exact(
        self, dtype: torch.dtype, device: str, *, bits: Sequence[int] = (3, 3), seed: int = 0
    ) -> NestedProblem:
        """Draw codes whose steps are powers of two, from 1/8 to 2: nothing is rounded.

        Every sum of magnitudes is below 2^24 times its last place, 2^-4, up to d = 256 of 4 bits:
        2 levels * 15 * 127 * 256 is below 2^20. The activations of a row are multiples of its
        scale. Arguments are those of `make_nested`.
        """
        g = torch.Generator().manual_seed(seed)
        groups = -(-self.d // levels_.GROUP)

        def level(width: int) -> levels_.Level:
            shape = (self.n_neurons, self.d)
            codes = torch.randint(0, 2**width, shape, generator=g, dtype=torch.uint8)
            octaves = torch.randint(0, 4, (self.n_neurons, groups), generator=g)
            top = 1.0 + torch.randint(0, 2, (self.n_neurons,), generator=g)
            return levels_.Level(width, codes, (octaves * levels_.OCTAVE).to(torch.uint8), top)

        gate, up = (tuple(level(width) for width in bits) for _ in range(2))
        x = torch.randint(-127, 128, (self.batch, self.d), generator=g).float()
        x[:, 0] = 127
        return _nested_problem(gate, up, torch.ones(self.d), x.to(dtype), device)

    def _draw(self, seed: int) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Gate, up, transposed down and activations like trained ones, and their equaliser."""
        g = torch.Generator().manual_seed(seed)
        gain = torch.exp2(torch.rand(self.d, generator=g) * 3)
        x = torch.randn(self.batch, self.d, generator=g) * gain
        gate, up = (
            torch.randn(self.n_neurons, self.d, generator=g) / (gain * self.d**0.5)
            for _ in range(2)
        )
        down_t = torch.randn(self.n_neurons, self.d, generator=g) / self.n_neurons**0.5
        return (gate, up, down_t, x), planes.equalizer(gain.square())

    def nested_bytes(self, bits: Sequence[int], n_levels: int | None = None) -> int:
        """Least bytes that `nested` reads."""
        return levels_.n_bytes(self.n_neurons, self.d, bits, n_levels)

    def sense_bytes(self, bits: Code) -> int:
        """Least bytes that `sense` and `select` read."""
        return planes.n_bytes(self.n_neurons, self.d, bits)

    def execute_bytes(self, itemsize: int, density: float) -> int:
        """Least bytes that `execute` reads of the weights for one row, or for rows that agree."""
        return 3 * self.d * itemsize * round(density * self.n_neurons)


def _problem(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    equal: Tensor,
    dtype: torch.dtype,
    device: str,
    bits: Code,
) -> Problem:
    gate, up, down_t, x = (t.to(dtype) for t in tensors)
    scales = [planes.fit_scale(w, equal, bits) for w in (gate, up)]
    codes = [planes.encode(w, equal, s, bits) for w, s in zip((gate, up), scales, strict=True)]
    norm = down_t.float().norm(dim=1)
    return Problem(
        codes=torch.stack(codes, dim=1).to(device),
        equal=equal.to(device),
        row_scale=torch.stack([scales[0], scales[1] * norm], dim=1).to(device),
        gate=gate.to(device),
        up=up.to(device),
        down_t=down_t.to(device),
        x=x.to(device),
        bits=bits,
    )


def _nested_problem(
    gate: tuple[levels_.Level, ...],
    up: tuple[levels_.Level, ...],
    equal: Tensor,
    x: Tensor,
    device: str,
) -> NestedProblem:
    pairs = [levels_.pair(levels_.pack(a), levels_.pack(b)) for a, b in zip(gate, up, strict=True)]
    moved = tuple(
        levels_.Packed(p.bits, p.codes.to(device), p.exponent.to(device), p.top.to(device))
        for p in pairs
    )
    return NestedProblem(moved, gate, up, equal.to(device), x.to(device))


def _signs(g: torch.Generator, rows: int, columns: int, most: int) -> Tensor:
    """Integers of magnitude 1 to `most`."""
    sign = 2.0 * torch.randint(0, 2, (rows, columns), generator=g) - 1
    return sign * torch.randint(1, most + 1, (rows, columns), generator=g)


def _sparse(g: torch.Generator, rows: int, columns: int, filled: int) -> Tensor:
    """Rows of zeros with `filled` entries of -1 or 1, at columns drawn with replacement."""
    out = torch.zeros(rows, columns)
    at = torch.randint(0, columns, (rows, filled), generator=g)
    return out.scatter_(1, at, _signs(g, rows, filled, 1))


@dataclasses.dataclass(frozen=True)
class ProjectCase:
    """Sizes of a problem of `ops.project`, and how to make one."""

    name: str
    batch: int
    d: int
    m: int

    def make(self, dtype: torch.dtype, device: str, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Make Gaussian ``phi (m, d)``, rows of about unit norm, and ``x (batch, d)``, both T."""
        g = torch.Generator().manual_seed(seed)
        phi = torch.randn(self.m, self.d, generator=g) / self.d**0.5
        x = torch.randn(self.batch, self.d, generator=g)
        return phi.to(device, dtype), x.to(device, dtype)

    def make_exact(
        self, dtype: torch.dtype, device: str, *, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Make integers of magnitude 1 to 8: no sum reaches 2^24 below d = 262,144."""
        g = torch.Generator().manual_seed(seed)
        phi, x = _signs(g, self.m, self.d, 8), _signs(g, self.batch, self.d, 8)
        return phi.to(device, dtype), x.to(device, dtype)

    def project_bytes(self, itemsize: int) -> int:
        """Least bytes that `project` reads and writes."""
        return (self.m + self.batch) * self.d * itemsize + self.batch * self.m * 4


@dataclasses.dataclass(frozen=True)
class PursuitProblem:
    """A dictionary and signals that few of its atoms make up, in float64."""

    atoms: Tensor  # (m, n_atoms)
    signal: Tensor  # (batch, m)
    gram: Tensor  # (n_atoms, n_atoms)
    correlation: Tensor  # (batch, n_atoms)
    energy: Tensor  # (batch,)
    support: Tensor  # (batch, n_nonzero) int64: the atoms of each signal, ascending


@dataclasses.dataclass(frozen=True)
class PursuitCase:
    """Sizes of a problem of `ops.omp`, and how to make one."""

    name: str
    batch: int
    m: int  # length of a signal
    n_atoms: int
    n_nonzero: int  # atoms in a signal
    group: int = 1  # neighbouring atoms that a signal has all or none of

    def make(self, *, noise_db: float = -20.0, seed: int = 0) -> PursuitProblem:
        """Make Gaussian atoms of unit norm and signals with Gaussian coefficients and noise.

        Args:
            noise_db: Energy of the noise over that of the signal, in decibels.
            seed: Of the random numbers.
        """
        g = torch.Generator().manual_seed(seed)
        atoms = torch.randn(self.m, self.n_atoms, generator=g, dtype=torch.float64)
        atoms /= atoms.norm(dim=0)
        order = torch.rand(self.batch, self.n_atoms // self.group, generator=g).argsort(dim=1)
        groups = order[:, : self.n_nonzero // self.group].sort(dim=1).values
        support = (groups[..., None] * self.group + torch.arange(self.group)).flatten(1)
        coef = torch.zeros(self.batch, self.n_atoms, dtype=torch.float64)
        drawn = torch.randn(self.batch, self.n_nonzero, generator=g, dtype=torch.float64)
        coef.scatter_(1, support, drawn)
        signal = coef @ atoms.T
        noise = torch.randn(self.batch, self.m, generator=g, dtype=torch.float64)
        noise *= (signal.norm(dim=1) / noise.norm(dim=1))[:, None] * 10.0 ** (noise_db / 20)
        signal += noise
        return PursuitProblem(
            atoms=atoms,
            signal=signal,
            gram=atoms.T @ atoms,
            correlation=signal @ atoms,
            energy=signal.square().sum(dim=1),
            support=support,
        )


CASES = (
    Case("smallest", batch=1, d=1, n_neurons=1),
    Case("ragged", batch=3, d=33, n_neurons=7),
    Case("off_tile", batch=3, d=200, n_neurons=77),
    Case("empty_batch", batch=0, d=64, n_neurons=8),
    Case("demo_layer", batch=1, d=384, n_neurons=1152),
    Case("demo_layer_batch", batch=16, d=384, n_neurons=1152),
)
LARGE = Case("large", batch=1, d=2048, n_neurons=8192)
PROJECTS = (
    ProjectCase("smallest", batch=1, d=1, m=1),
    ProjectCase("ragged", batch=3, d=33, m=7),
    ProjectCase("off_line", batch=5, d=200, m=77),
    ProjectCase("empty_batch", batch=0, d=64, m=8),
    ProjectCase("sketch", batch=1, d=4096, m=512),
    ProjectCase("sketch_batch", batch=16, d=1000, m=96),
)
LINEARS = (
    ProjectCase("smallest", batch=1, d=1, m=1),
    ProjectCase("off_line", batch=3, d=33, m=7),
    ProjectCase("off_tile", batch=16, d=200, m=77),
    ProjectCase("two_parts", batch=19, d=576, m=64),
    ProjectCase("empty_batch", batch=0, d=64, m=8),
)
PURSUITS = (
    PursuitCase("smallest", batch=1, m=1, n_atoms=1, n_nonzero=1),
    PursuitCase("ragged", batch=3, m=20, n_atoms=33, n_nonzero=4),
    PursuitCase("off_block", batch=5, m=64, n_atoms=257, n_nonzero=7),
    PursuitCase("empty_batch", batch=0, m=8, n_atoms=16, n_nonzero=2),
    PursuitCase("standard", batch=200, m=256, n_atoms=1024, n_nonzero=32),
    PursuitCase("pairs", batch=5, m=40, n_atoms=66, n_nonzero=8, group=2),
    PursuitCase("blocks", batch=20, m=128, n_atoms=480, n_nonzero=24, group=6),
    PursuitCase("deep", batch=2, m=160, n_atoms=300, n_nonzero=72),
    PursuitCase("wide", batch=2, m=96, n_atoms=2600, n_nonzero=12),
    PursuitCase("widest", batch=2, m=64, n_atoms=4100, n_nonzero=8),
)
# What is timed, by device: throughput of many signals, on CUDA also the latency of few.
PURSUIT_LOADS = {
    "cpu": (
        PursuitCase("small", batch=400, m=64, n_atoms=128, n_nonzero=8),
        PursuitCase("standard", batch=200, m=256, n_atoms=1024, n_nonzero=32),
        PursuitCase("large", batch=40, m=512, n_atoms=2048, n_nonzero=64),
    ),
    "cuda": (
        PursuitCase("small", batch=4096, m=64, n_atoms=128, n_nonzero=8),
        PursuitCase("middle", batch=4096, m=128, n_atoms=512, n_nonzero=16),
        PursuitCase("standard", batch=5000, m=256, n_atoms=1024, n_nonzero=32),
        PursuitCase("large", batch=5000, m=512, n_atoms=2048, n_nonzero=64),
        PursuitCase("layers", batch=32, m=112, n_atoms=448, n_nonzero=16),
        PursuitCase("few", batch=132, m=256, n_atoms=1024, n_nonzero=32),
    ),
}
