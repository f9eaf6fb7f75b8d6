"""What `ops.omp` costs, beside other ways to run the same pursuit.

Signals are k-sparse in Gaussian atoms of unit norm, with noise 20 dB below them; two batches of
them take turns. The Gram matrix of the dictionary is known to all; `complete` and the baselines
start from the signals, `support` leaves the coefficients out, `pursuit` starts from the
correlations and leaves them out, too. Baselines are scikit-learn (on the CPU), the progressive
recursion in float32 torch, and the package orthogonal-matching-pursuit-gpu where it is installed.

On CUDA `complete` and `pursuit` are also timed with each design of `DESIGNS` that takes the sizes
and is not what `designs.omp_plan` names, as rows such as `pursuit flat`: what one run says of all
of them decides over the plan.

A row carries the share of a sample of its signals whose support is that of float64: without it, a
time says nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import doctor, ops, reference
from ..designs import omp_plan
from . import head, timing
from .cases import PURSUIT_LOADS, PursuitCase

VARIANTS = ("complete", "support", "pursuit")
DESIGNS = ("flat", "deep")  # raced on CUDA with the plan, where they fit and are not the plan
QUICK = (PursuitCase("quick", batch=64, m=64, n_atoms=128, n_nonzero=8),)
N_INPUTS = 2
PACKAGE = "orthogonal_matching_pursuit_gpu"
MARGIN = 1e-5  # two scores that are nearer than this, relatively, float32 may confuse
_SAMPLE = 1 << 28  # float64 entries of directions that the reference may hold at a time


@dataclasses.dataclass(frozen=True)
class _Input:
    """A batch of signals, float32 on the device."""

    y: Tensor  # (batch, m)
    correlation: Tensor  # (batch, n_atoms)
    energy: Tensor  # (batch,)


def run(
    loads: Sequence[PursuitCase] | None = None,
    *,
    device: torch.device,
    runs: int = 20,
    variants: Sequence[str] = VARIANTS,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    found: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure the loads, one row for each load and variant, and on CUDA for each design.

    Args:
        loads: The problems; those of `cases.PURSUIT_LOADS` for the device if left out.
        device: Where to measure.
        runs: Measurements of every variant.
        variants: Which of `VARIANTS`.
        seed: Of the problems.
        progress: Told the case that is about to be measured.
        found: Given the results so far, after every case.

    Returns:
        The head of `head.of`, ``notes`` and ``rows``. Times in microseconds, of the whole batch;
        ``us_per_atom`` is one of them over the atoms taken one after another. ``agreement`` is the
        share of ``agreement_problems`` signals, on which float64 is sure, with the same support.

    Raises:
        ValueError: A variant is unknown.
        BackendError: The device's backend is missing.
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise ValueError(f"[bench] variant {variant!r}: want one of {', '.join(VARIANTS)}.")
    doctor.require(device)
    notes: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    results = {**head.of(device), "notes": notes, "rows": rows}
    for load in PURSUIT_LOADS[device.type] if loads is None else loads:
        if progress is not None:
            progress(name_of(load))
        rows += _measure(load, device, runs, variants, seed, notes)
        if found is not None:
            found(results)
    return results


def name_of(load: PursuitCase) -> str:
    """Give the name of a load in the results, such as ``omp m=256 n=1024 k=32 batch=5000``."""
    return f"omp m={load.m} n={load.n_atoms} k={load.n_nonzero} batch={load.batch}"


def designs(load: PursuitCase) -> list[str]:
    """Name the designs of `DESIGNS` that take a load on Hopper, beside the one of the plan."""
    sizes = (load.batch, load.n_atoms, load.n_nonzero)
    chosen = omp_plan(*sizes).partition(":")[0]
    fit = []
    for design in DESIGNS:
        try:
            omp_plan(*sizes, design=design)
        except ValueError:
            continue
        if design != chosen:
            fit.append(design)
    return fit


def progressive(gram: Tensor, correlation: Tensor, count: int) -> Tensor:
    """Run the pursuit as torch operations, one after another: the ordinary way on a GPU.

    The recursion of the directions (eq. 16 of docs/math.md), for atoms of unit norm.

    Args:
        gram: ``(n_atoms, n_atoms)``, of any float type.
        correlation: ``(batch, n_atoms)``, of the same type.
        count: Atoms to take.

    Returns:
        The atoms in the order taken, ``(batch, count)``, int64.
    """
    batch, n_atoms = correlation.shape
    left = correlation.clone()
    direction = left.new_empty(batch, count, n_atoms)
    index = torch.empty(batch, count, dtype=torch.int64, device=left.device)
    for i in range(count):
        atom = left.abs().argmax(dim=1, keepdim=True)
        index[:, i : i + 1] = atom
        row = gram[atom[:, 0]]
        if i > 0:
            known = direction[:, :i]
            weight = known.gather(2, atom[:, None].expand(batch, i, 1))  # (batch, i, 1)
            row = torch.baddbmm(row[:, None], weight.mT, known, alpha=-1)[:, 0]
            row *= (1 - weight.square().sum(dim=1)).clamp_min(1e-6).rsqrt()
        direction[:, i] = row
        left -= left.gather(1, atom) / row.gather(1, atom) * row
        left.scatter_(1, atom, 0.0)
    return index


def _measure(
    load: PursuitCase,
    device: torch.device,
    runs: int,
    variants: Sequence[str],
    seed: int,
    notes: dict[str, str],
) -> list[dict[str, Any]]:
    """Time one load and give its rows."""
    count = load.n_nonzero
    # One dictionary for all batches: the seed decides over it, so batches are cut from one problem.
    problem = dataclasses.replace(load, batch=N_INPUTS * load.batch).make(seed=seed)
    atoms, gram = problem.atoms.float().to(device), problem.gram.float().to(device)
    inputs = [
        _Input(*(t[i::N_INPUTS].float().contiguous().to(device) for t in parts))
        for parts in [(problem.signal, problem.correlation, problem.energy)]
        for i in range(N_INPUTS)
    ]
    budget = torch.full((load.batch,), count, dtype=torch.int32, device=device)

    def from_signals(i: int, *, coef: bool, design: str = "") -> ops.Pursuit:
        y = inputs[i].y
        given = (gram, y @ atoms, y.square().sum(dim=1), budget)
        return ops.omp(*given, budget_max=count, coef=coef, design=design)

    def pursuit(i: int, *, design: str = "") -> ops.Pursuit:
        given = (gram, inputs[i].correlation, inputs[i].energy, budget)
        return ops.omp(*given, budget_max=count, coef=False, design=design)

    ours: dict[str, Callable[[int], ops.Pursuit]] = {
        "complete": functools.partial(from_signals, coef=True),
        "support": functools.partial(from_signals, coef=False),
        "pursuit": pursuit,
    }
    for design in designs(load) if device.type == "cuda" else ():
        try:
            pursuit(0, design=design)
        except ValueError as error:  # it takes the sizes, but this device has no room for it
            notes[f"{name_of(load)} {design}"] = str(error)
            continue
        ours[f"complete {design}"] = functools.partial(from_signals, coef=True, design=design)
        ours[f"pursuit {design}"] = functools.partial(pursuit, design=design)
    variants = [name for name in ours if name.partition(" ")[0] in variants]
    baselines, eager = _baselines(gram, atoms, inputs, count, notes)
    timings = timing.compare(
        {**{name: ours[name] for name in variants}, **baselines},
        n_inputs=N_INPUTS,
        device=device,
        runs=runs,
        warmup=1,
        eager=eager,
    )
    took = {name: timings[name].median * 1e6 for name in baselines}
    rows = []
    for name in variants:
        median = timings[name].median * 1e6
        agreement, sure = _agreement(ours[name](0).index, problem.gram, problem.correlation, count)
        rows.append(
            {
                "case": name_of(load),
                "variant": name,
                "median_us": median,
                "p10_us": timings[name].p10 * 1e6,
                "p90_us": timings[name].p90 * 1e6,
                "problems_per_second": load.batch / timings[name].median,
                "us_per_atom": median / count,
                "agreement": agreement,
                "agreement_problems": sure,
                "baselines": took,
                "ratio_vs_best": min(took.values()) / median,
            }
        )
    return rows


def _agreement(index: Tensor, gram: Tensor, correlation: Tensor, count: int) -> tuple[float, int]:
    """Give the share of the surely decided problems of a sample with float64's support.

    Args:
        index: What was found for the first of the batches, ``(batch, count)``.
        gram: ``(n_atoms, n_atoms)``, float64.
        correlation: Of all batches, ``(N_INPUTS * batch, n_atoms)``, float64.
        count: Atoms taken.
    """
    size = max(1, _SAMPLE // (count * gram.shape[0] * 8))
    want, margin = reference.omp_supports(gram, correlation[::N_INPUTS][:size], count)
    sure = margin > MARGIN
    got = index[: len(want)].cpu().long().sort(dim=1).values
    same = (got == want.sort(dim=1).values).all(dim=1)
    n_sure = int(sure.sum())
    return (float((same & sure).sum()) / n_sure if n_sure else 1.0), n_sure


def _baselines(
    gram: Tensor, atoms: Tensor, inputs: list[_Input], count: int, notes: dict[str, str]
) -> tuple[dict[str, Callable[[int], object]], list[str]]:
    """Give the other ways that work here, and which of them CUDA cannot capture."""
    found: dict[str, Callable[[int], object]] = {
        "torch f32": lambda i: progressive(gram, inputs[i].y @ atoms, count)
    }
    eager: list[str] = []
    if gram.device.type == "cpu" and importlib.util.find_spec("sklearn") is not None:
        linear_model = importlib.import_module("sklearn.linear_model")
        plain = gram.double().numpy()
        columns = [(i.y @ atoms).double().T.numpy() for i in inputs]

        def solve(i: int) -> object:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns where it stops early
                return linear_model.orthogonal_mp_gram(plain, columns[i], n_nonzero_coefs=count)

        found["scikit-learn f64"] = solve
    elif gram.device.type == "cpu":
        notes["scikit-learn f64"] = "unavailable: scikit-learn is not installed"
    if importlib.util.find_spec(PACKAGE) is None:
        notes[PACKAGE] = "unavailable: not installed"
        return found, eager
    try:
        run_omp = importlib.import_module(PACKAGE).run_omp
    except ImportError as error:  # its native half is of another Python
        notes[PACKAGE] = f"unavailable: {error}"
    else:
        found[f"{PACKAGE} f32"] = lambda i: run_omp(
            atoms, inputs[i].y, count, normalize=False, fit_intercept=False
        )
        eager.append(f"{PACKAGE} f32")
    return found, eager
