"""Few unknowns from few linear measurements: what stands around `ops.omp`.

Measurements ``y = A x`` of ``n_atoms`` unknowns by a sensing matrix ``A (m, n_atoms)`` with ``m``
well below ``n_atoms`` can be undone where x is sparse. The usage of a layer is not, but its
innovation is: what differs from the mean of the task. Where even that is spread over all unknowns,
the linear estimate `mmse` is the better one. Equations 18 and 19 of docs/math.md.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from .. import ops


@dataclasses.dataclass(frozen=True)
class Measured:
    """What `ops.omp` knows a dictionary and its signals by, float32."""

    gram: Tensor  # (n_atoms, n_atoms)
    correlation: Tensor  # (batch, n_atoms)
    energy: Tensor  # (batch,)


class Rules(TypedDict, total=False):
    """The options of `ops.omp` that say when it ends and how much it takes at once."""

    tolerance: float
    residual_max: float
    correlation_min: float
    gain_min: float
    per_step: int
    group: int
    start: Tensor
    start_count: Tensor


def measure(dictionary: Tensor, y: Tensor) -> Measured:
    """Compute what `ops.omp` needs, in float64, rounded to float32 once.

    Args:
        dictionary: Atoms as columns, ``(m, n_atoms)``, of any float type.
        y: Signals, ``(batch, m)``, of any float type.

    Raises:
        ValueError: The shapes do not fit together, or the devices differ.
        TypeError: A tensor is not of a float type.
    """
    _check_sensing(dictionary, y)
    atoms, signals = dictionary.double(), y.double()
    return Measured(
        gram=(atoms.T @ atoms).float(),
        correlation=(signals @ atoms).float(),
        energy=signals.square().sum(dim=1).float(),
    )


def dense(pursuit: ops.Pursuit, n_atoms: int) -> Tensor:
    """Spread the coefficients of a pursuit over all atoms, ``(batch, n_atoms)`` float32.

    Args:
        pursuit: With coefficients.
        n_atoms: Atoms of the dictionary.

    Raises:
        ValueError: The pursuit has no coefficients.
    """
    if pursuit.coef.shape != pursuit.index.shape:
        raise ValueError("[pursuit] a pursuit without coefficients: want coef=True.")
    out = pursuit.coef.new_zeros(pursuit.coef.shape[0], n_atoms)
    # Entries beyond count are atom 0 with coefficient 0, so they add nothing to it.
    return out.scatter_add_(1, pursuit.index.long(), pursuit.coef)


def innovation(
    dictionary: Tensor,
    y: Tensor,
    prior: Tensor,
    budget: Tensor,
    *,
    budget_max: int,
    **rules: Unpack[Rules],
) -> tuple[Tensor, ops.Pursuit]:
    """Estimate unknowns that differ from a prior in few places, from few measurements.

    The prior explains ``A prior`` of the measurements; the pursuit explains what is left.

    Args:
        dictionary: Sensing matrix A, ``(m, n_atoms)``, of any float type.
        y: Measurements ``A x``, ``(batch, m)``, of any float type.
        prior: What is expected, ``(n_atoms,)`` or ``(batch, n_atoms)``, of any float type.
        budget: Places in which each signal may differ, ``(batch,)``, int32.
        budget_max: Places to make room for, 1 to `n_atoms`.
        rules: Options of `ops.omp`.

    Returns:
        The estimate, prior plus innovation, ``(batch, n_atoms)``, float32, and the pursuit that
        found the innovation. A signal that is not finite is estimated by the prior; its status says
        so.

    Raises:
        ValueError: The shapes do not fit together, or an option is out of range.
        TypeError: A tensor has another dtype.
        BackendError: The device has no csfast backend, or it failed.
    """
    _check_sensing(dictionary, y)
    n_atoms = dictionary.shape[1]
    _check_unknowns("prior", prior, y.shape[0], n_atoms)
    left = y.double() - prior.double() @ dictionary.double().T
    measured = measure(dictionary, left)
    pursuit = ops.omp(
        measured.gram,
        measured.correlation,
        measured.energy,
        budget,
        budget_max=budget_max,
        **rules,
    )
    return prior.float() + dense(pursuit, n_atoms), pursuit


def mmse(dictionary: Tensor, y: Tensor, mean: Tensor, variance: Tensor, *, noise: float) -> Tensor:
    """Estimate unknowns of known mean and variance from few noisy measurements, linearly.

    The least mean squared error of all linear estimates, for unknowns that are independent: least
    squares weighted by the prior. Solved in float64, by a pseudo-inverse, so that without noise it
    is the estimate of least weighted distance to the mean.

    Args:
        dictionary: Sensing matrix A, ``(m, n_atoms)``, of any float type.
        y: Measurements ``A x``, ``(batch, m)``, of any float type.
        mean: Of the unknowns, ``(n_atoms,)`` or ``(batch, n_atoms)``, of any float type.
        variance: Of the unknowns, of either shape, of any float type, at least 0.
        noise: Variance of the noise in each measurement, at least 0.

    Returns:
        The estimate, ``(batch, n_atoms)``, float32.

    Raises:
        ValueError: The shapes do not fit together, or a variance or the noise is negative or not
            finite.
        TypeError: A tensor is not of a float type.

    Source:
        Kay, "Fundamentals of statistical signal processing: estimation theory", 1993, theorem 12.1.
    """
    _check_sensing(dictionary, y)
    batch, n_atoms = y.shape[0], dictionary.shape[1]
    _check_unknowns("mean", mean, batch, n_atoms)
    _check_unknowns("variance", variance, batch, n_atoms)
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"[pursuit] noise = {noise}: want a finite variance of at least 0.")
    if not bool((variance.isfinite() & (variance >= 0)).all()):
        raise ValueError("[pursuit] variance has an entry below 0 or not finite: want none.")
    atoms, center, spread = dictionary.double(), mean.double(), variance.double()
    left = y.double() - center @ atoms.T
    gain = spread[..., None, :] * atoms  # ([batch,] m, n_atoms)
    covariance = gain @ atoms.T + noise * torch.eye(len(atoms), dtype=atoms.dtype, device=y.device)
    solved = torch.linalg.pinv(covariance, hermitian=True) @ left[..., None]
    estimate: Tensor = center + (solved.mT @ gain)[..., 0, :]
    return estimate.float()


def support_energy(value: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """Give the share of the energy of `value` that a support holds.

    Args:
        value: ``(batch, n_atoms)``, of any float type.
        index: The support, ``(batch, width)``, int32, without repeats up to `count`.
        count: Entries of `index` that count, ``(batch,)``, int32.

    Returns:
        ``(batch,)``, float64, 0 to 1; 1 where there is no energy.

    Raises:
        ValueError: The shapes do not fit together.
    """
    fit = value.shape[:1] == index.shape[:1] == count.shape
    if value.dim() != 2 or index.dim() != 2 or not fit:
        raise ValueError(
            f"[pursuit] value {tuple(value.shape)}, index {tuple(index.shape)} and count "
            f"{tuple(count.shape)}: want (batch, n_atoms), (batch, width) and (batch,)."
        )
    squares = value.double().square()
    kept = squares.gather(1, index.long())
    valid = torch.arange(index.shape[1], device=index.device) < count[:, None]
    total = squares.sum(dim=1)
    share = torch.where(valid, kept, torch.zeros_like(kept)).sum(dim=1) / total
    return torch.where(total == 0, torch.ones_like(total), share)


def _check_sensing(dictionary: Tensor, y: Tensor) -> None:
    """Refuse a sensing matrix and measurements that do not belong together."""
    for name, tensor in (("dictionary", dictionary), ("y", y)):
        if not tensor.is_floating_point():
            raise TypeError(f"[pursuit] {name} is {tensor.dtype}: want a float type.")
    if dictionary.dim() != 2 or y.dim() != 2 or y.shape[1] != dictionary.shape[0]:
        raise ValueError(
            f"[pursuit] dictionary {tuple(dictionary.shape)} and y {tuple(y.shape)}: want "
            "(m, n_atoms) and (batch, m)."
        )
    if dictionary.device != y.device:
        raise ValueError(
            f"[pursuit] dictionary on {dictionary.device} and y on {y.device}: want one device."
        )


def _check_unknowns(name: str, tensor: Tensor, batch: int, n_atoms: int) -> None:
    """Refuse what has not an entry for every unknown."""
    if not tensor.is_floating_point():
        raise TypeError(f"[pursuit] {name} is {tensor.dtype}: want a float type.")
    if tuple(tensor.shape) not in ((n_atoms,), (batch, n_atoms)):
        raise ValueError(
            f"[pursuit] {name} has shape {tuple(tensor.shape)}: want (n_atoms,) = ({n_atoms},) or "
            f"(batch, n_atoms) = ({batch}, {n_atoms})."
        )
