"""The problems that the operations must solve: tests check each, ``csfast bench`` times some.

Everything is made on the CPU from a seed and then moved, so that all devices get the same numbers.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from . import planes
from .types import Code


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
        g = torch.Generator().manual_seed(seed)
        gain = torch.exp2(torch.rand(self.d, generator=g) * 3)
        x = torch.randn(self.batch, self.d, generator=g) * gain
        gate, up = (
            torch.randn(self.n_neurons, self.d, generator=g) / (gain * self.d**0.5)
            for _ in range(2)
        )
        down_t = torch.randn(self.n_neurons, self.d, generator=g) / self.n_neurons**0.5
        return _problem((gate, up, down_t, x), planes.equalizer(gain.square()), dtype, device, bits)

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

    def make(self, *, noise_db: float = -20.0, seed: int = 0) -> PursuitProblem:
        """Make Gaussian atoms of unit norm and signals with Gaussian coefficients and noise.

        Args:
            noise_db: Energy of the noise over that of the signal, in decibels.
            seed: Of the random numbers.
        """
        g = torch.Generator().manual_seed(seed)
        atoms = torch.randn(self.m, self.n_atoms, generator=g, dtype=torch.float64)
        atoms /= atoms.norm(dim=0)
        order = torch.rand(self.batch, self.n_atoms, generator=g).argsort(dim=1)
        support = order[:, : self.n_nonzero].sort(dim=1).values
        coef = torch.zeros(self.batch, self.n_atoms, dtype=torch.float64)
        drawn = torch.randn(self.batch, self.n_nonzero, generator=g, dtype=torch.float64)
        coef.scatter_(1, support, drawn)
        signal = coef @ atoms.T
        noise = torch.randn(self.batch, self.m, generator=g, dtype=torch.float64)
        noise *= (signal.norm(dim=1) / noise.norm(dim=1))[:, None] * 10.0 ** (noise_db / 20)
        signal += noise
        return PursuitProblem(
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
PURSUITS = (
    PursuitCase("smallest", batch=1, m=1, n_atoms=1, n_nonzero=1),
    PursuitCase("ragged", batch=3, m=20, n_atoms=33, n_nonzero=4),
    PursuitCase("off_block", batch=5, m=64, n_atoms=257, n_nonzero=7),
    PursuitCase("empty_batch", batch=0, m=8, n_atoms=16, n_nonzero=2),
    PursuitCase("standard", batch=200, m=256, n_atoms=1024, n_nonzero=32),
)
