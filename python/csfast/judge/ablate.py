"""Rules that choose what to read, and quantisation, compared at equal bytes.

One method after the other is fitted, brought to the bytes that were asked for, and measured; its
rows are then final, and kept in a file that an interrupted run goes on from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import judge, models
from ..files import check_writable, read_bounded, write_atomic
from ..judge import CHUNK, Judge, Measured, Piece, Progress, Rule, Sample, Setting
from ..models import Ffn
from ..types import Document, PlanError
from .rules import Fit, catalogue, oracles

RESAMPLES = 2000  # of the bootstrap: the quantiles of .025 and .975 rest on 50 draws each
FAR = 0.05  # of the target: a trial that misses it by more is repeated
DENSITY_MIN = 1e-4  # below it no rule keeps anything worth a row
FORMAT = "csfast-ablation-2"  # of a resume file


def ablate(
    model: nn.Module,
    tokenizer: Any,
    documents_select: Sequence[Document],
    documents_report: Sequence[Document],
    *,
    methods: Sequence[str] | str = "full",
    bytes_fractions: Sequence[float] = (0.25, 0.35, 0.55, 0.75),
    densities: Sequence[float] | None = None,
    tokens: int = 1500,
    calibration_tokens: int = 2000,
    response_tokens: int = 256,
    max_tokens: int = 2048,
    retrieval_prompts: int = 0,
    chunk: int = CHUNK,
    resamples: int = RESAMPLES,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare rules that choose what to read, and quantisation, at equal bytes.

    Everything that is fitted or chosen is fitted and chosen on `documents_select`: operators,
    thresholds, the density that meets the bytes, which setting counts as best. The rows are
    measured on `documents_report`, paired with the dense model.

    Args:
        model: A causal language model in evaluation mode, without csfast applied; float32 for
            differences below .001.
        tokenizer: Its tokenizer.
        documents_select: What to fit and choose on.
        documents_report: What to report on.
        methods: Names of methods, ``"full"`` for `catalogue.default_methods` or ``"quick"`` for
            `catalogue.quick_methods`.
        bytes_fractions: Bytes to meet, as fractions of the dense 16-bit bytes of the structure.
        densities: If given, densities to meet, instead of bytes. Rows then have no target, and the
            density asked for as `target_density`.
        tokens: Scored tokens of each task to stop at; half as many for choosing.
        calibration_tokens: Tokens of each task to fit operators and thresholds to.
        response_tokens: Tokens of one document to score at most.
        max_tokens: Tokens of one document at most, its prompt included.
        retrieval_prompts: Retrieval prompts to make and to report on, if the documents to report on
            hold none. They stand in a row of their own, outside the means.
        chunk: Sparse positions that run together; bounds memory, changes rounding only. Joint
            supports are of requests that run together.
        resamples: Draws of the bootstrap over documents.
        seed: Of the choice of documents, the retrieval prompts, what is drawn or trained, and the
            bootstrap.
        resume: File that keeps the rows of every method that is done. If it exists, the run goes on
            from there. It is not removed at the end.
        progress: Called with steps done and their number, over all methods.

    Returns:
        What ``csfast ablate --json`` writes; docs/schemas.md explains every key.

    Raises:
        ValueError: A method is unknown or named twice, a number is out of range, or nothing would
            run sparse.
        PlanError: The resume file is damaged or belongs to other arguments.
        KeyboardInterrupt: On Ctrl-C; the resume file holds all methods that were done.
    """
    for fraction in bytes_fractions:
        if not 0 < fraction <= 1:
            raise ValueError(f"[ablate] bytes fraction {fraction}: want one in (0, 1].")
    for density in densities or ():
        if not 0 < density <= 1:
            raise ValueError(f"[ablate] density {density}: want one in (0, 1].")
    ffns = models.find_ffns(model)
    sets = {"full": catalogue.default_methods, "quick": catalogue.quick_methods}
    if isinstance(methods, str):
        if methods not in sets:
            raise ValueError(
                f"[ablate] methods = {methods!r}: want full, quick or a list of names."
            )
        names = sets[methods](ffns[0].shape)
    else:
        names = tuple(methods)
    asked = bytes_fractions if densities is None else densities
    if not names or not asked:
        what = "bytes fractions" if densities is None else "densities"
        raise ValueError(f"[ablate] no methods or no {what}: want at least one of both.")
    for name in names:
        catalogue.family(name)
        if names.count(name) > 1:
            raise ValueError(f"[ablate] method {name!r} is named twice: want each once.")
    both = set(documents_select) & set(documents_report)
    if both:
        raise ValueError(
            f"[ablate] {len(both)} documents in both parts: want disjoint parts, as "
            "documents.split gives them."
        )

    def pieces(documents: Sequence[Document], n: int) -> list[Piece]:
        return judge.choose(
            "ablate",
            model,
            tokenizer,
            documents,
            tokens=n,
            response_tokens=response_tokens,
            max_tokens=max_tokens,
            seed=seed,
        )

    # What is fitted to some documents looks better on them: density and the best setting are chosen
    # on others.
    fitted = pieces(documents_select[0::2], calibration_tokens)
    tried = pieces(documents_select[1::2], max(2, tokens // 2))
    kept = pieces(
        judge.with_retrieval(
            model,
            tokenizer,
            documents_report,
            n=retrieval_prompts,
            max_tokens=max_tokens,
            seed=f"{seed}/report",
        ),
        tokens,
    )
    model_hash = models.fingerprint(model).model_hash
    key = _key(
        model_hash, (fitted, tried, kept), (names, densities is None, asked, chunk, resamples, seed)
    )
    keep = None if resume is None else pathlib.Path(resume)
    state = _start(keep, key)

    among = [*fitted, *tried, *kept]
    half = judge.CACHE_BYTES // 2
    trial = Judge(model, ffns, tried, chunk=chunk, cache_bytes=half, among=among)
    final = Judge(model, ffns, kept, chunk=chunk, cache_bytes=half, among=among)
    of_fit = Judge(model, ffns, fitted, chunk=chunk, cache_bytes=0, among=among)
    # Steps: batches captured, batches scored dense, then those of every method and a fit.
    each = 1 + len(trial.batches) + len(final.batches)
    total = len(of_fit.batches) + (1 + len(names)) * each
    report = progress or (lambda done, total: None)
    before = 0

    def done(n: int) -> None:
        report(before + n, total)

    sample = of_fit.capture(_watched(names, model, ffns), done)
    before += len(of_fit.batches)
    trial_dense = trial.dense(done)
    before += len(trial.batches)
    final_dense = final.dense(done)
    before += 1 + len(final.batches)

    fit = Fit(model, ffns, sample, seed=seed)
    for name in names:
        if name not in state.rows:
            rule = catalogue.build(name, fit)
            done(1)
            wanted, notes = _wanted(rule, asked, by_bytes=densities is None)
            settings, measured, wanted = _met(rule, sample, wanted, trial, lambda n: done(1 + n))
            chosen = _rows(settings, measured, trial_dense, tried, resamples=0, seed=seed)
            settings = _calibrated(rule, sample, wanted)
            measured = final.measure(
                settings, lambda n: done(1 + len(trial.batches) + n), record=True
            )
            rows = _rows(settings, measured, final_dense, kept, resamples=resamples, seed=seed)
            for row, on_select in zip(rows, chosen, strict=True):
                row["select_delta"] = on_select["delta"]
            if densities is not None and len(rows) == len(densities):
                for row, density in zip(rows, densities, strict=True):
                    row["target_density"] = density
            state.rows[name] = rows
            state.notes[name] = notes
            if keep is not None:
                _keep(keep, key, state)
        before += each
        done(0)
    rows = [row for name in names for row in state.rows[name]]
    groups = judge.by_group(kept)
    return {
        "rows": rows,
        "best": [_best(rows, each) for each in asked] if densities is None else [],
        "notes": [note for name in names for note in state.notes[name]],
        "dense": {
            group: sum(final_dense[i] for i in members) / sum(kept[i].n_sparse for i in members)
            for group, members in groups.items()
        },
        "documents": {group: len(members) for group, members in groups.items()},
        "tokens": {
            group: sum(kept[i].n_tokens for i in members) for group, members in groups.items()
        },
        "sparse_tokens": {
            group: sum(kept[i].n_sparse for i in members) for group, members in groups.items()
        },
        "outside": judge.outside(kept),
        "seed": seed,
        "model_hash": model_hash,
    }


@dataclasses.dataclass
class _State:
    """What is done so far; the whole of a resume file."""

    rows: dict[str, list[dict[str, Any]]]  # of every method
    notes: dict[str, list[str]]


def _key(model_hash: str, parts: Sequence[Sequence[Piece]], settings: object) -> str:
    """SHA-256 over everything that the rows depend on."""
    head = [FORMAT, model_hash, repr(settings), torch.__version__]
    digest = hashlib.sha256(json.dumps(head).encode())
    for part in parts:
        for piece in part:
            digest.update(json.dumps([piece.n_prompt, piece.document.group]).encode())
            digest.update(piece.ids.numpy().tobytes())
    return digest.hexdigest()


def _start(resume: pathlib.Path | None, key: str) -> _State:
    """The state in the resume file, or an empty one if there is no file yet."""
    if resume is None:
        return _State({}, {})
    if not resume.exists():
        check_writable(resume)
        return _State({}, {})
    try:
        found = json.loads(read_bounded(resume))
    except (ValueError, RecursionError) as error:
        raise PlanError(f"[ablate] {resume.name}: want a whole JSON file ({error}).") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise PlanError(f"[ablate] {resume.name}: want a file of ablate's option resume.")
    if found.get("key") != key:
        raise PlanError(
            f"[ablate] {resume.name}: was begun with another model, documents or options; "
            "want the same, or another file."
        )
    return _State(found["rows"], found["notes"])


def _keep(resume: pathlib.Path, key: str, state: _State) -> None:
    """Write the state, whole or not at all."""
    whole = {"format": FORMAT, "key": key, **dataclasses.asdict(state)}
    write_atomic(resume, (json.dumps(whole, allow_nan=False) + "\n").encode())


def _watched(
    methods: Sequence[str], model: nn.Module, ffns: Sequence[Ffn]
) -> dict[str, list[nn.Module]]:
    """Modules beside the layers whose inputs some of the methods need."""
    found: dict[str, list[nn.Module]] = {}
    if "oracle-layer" in methods:
        found[oracles.STREAM] = [model.get_submodule(f.name.rpartition(".")[0]) for f in ffns]
    if "oracle-head" in methods:
        found[oracles.HEADS] = [each.output for each in oracles.find_attention(model, ffns)]
    return found


def _wanted(
    rule: Rule, asked: Sequence[float], *, by_bytes: bool
) -> tuple[list[tuple[float | None, float]], list[str]]:
    """Target and density of every row of a rule, and a note for each target out of reach."""
    empty, full = _bytes_at(rule, 0.0), _bytes_at(rule, 1.0)
    if empty == full:
        return [(None, 1.0)], []
    if not by_bytes:
        return [(None, density) for density in asked], []
    wanted: list[tuple[float | None, float]] = []
    notes = []
    for fraction in asked:
        density = (fraction - empty) / (full - empty)
        if density <= 0:
            notes.append(
                f"{rule.name} cannot reach {fraction:.2f} of the bytes: "
                f"choosing alone costs {empty:.3f}."
            )
        else:
            wanted.append((fraction, min(density, 1.0)))
    return wanted, notes


def _bytes_at(rule: Rule, density: float) -> float:
    """Fraction of the dense bytes that a rule reads if every layer keeps `density`."""
    counts = [[density * count for count in rule.full(ffn.shape)] for ffn in rule.ffns]
    return judge.spent(rule, torch.tensor(counts, dtype=torch.float64))


@torch.no_grad()
def _calibrated(
    rule: Rule, sample: Sample, wanted: Sequence[tuple[float | None, float]]
) -> list[Setting]:
    """The wanted settings with their thresholds."""
    found = rule.calibrate(sample, [density for _, density in wanted])
    return [
        Setting(rule, target, density, thresholds)
        for (target, density), thresholds in zip(wanted, found, strict=True)
    ]


def _met(
    rule: Rule,
    sample: Sample,
    wanted: Sequence[tuple[float | None, float]],
    trial: Judge,
    done: Callable[[int], None],
) -> tuple[list[Setting], list[Measured], list[tuple[float | None, float]]]:
    """Bring settings to their targets on the trial's documents.

    Thresholds were calibrated on dense states; sparse states differ, and so does what is kept. The
    density is corrected in proportion; where the first trial was far off the bytes, it is tried
    once more and corrected along the line through both.

    Returns:
        Settings and what they measured, of the last trial of each, and targets with the densities
        that should meet them.
    """
    settings = _calibrated(rule, sample, wanted)
    measured = trial.measure(settings, done)
    spent = [judge.spent(rule, judge.mean_read(trial.pieces, of.read)) for of in measured]
    empty = _bytes_at(rule, 0.0)
    corrected = list(wanted)
    for i, (target, density) in enumerate(wanted):
        if density == 1:
            continue
        if target is None:
            kept = judge.mean(
                judge.densities(rule, judge.mean_read(trial.pieces, measured[i].read))
            )
            scale = density / max(kept, DENSITY_MIN)
        else:
            scale = (target - empty) / max(spent[i] - empty, 1e-9)
        corrected[i] = (target, _inside(density * scale))
    far = [
        i
        for i, (target, density) in enumerate(wanted)
        if target is not None and density < 1 and abs(spent[i] - target) > FAR * target
    ]
    if not far:
        return settings, measured, corrected
    again = _calibrated(rule, sample, [corrected[i] for i in far])
    for i, setting, of in zip(far, again, trial.measure(again, done), strict=True):
        target, before, now = setting.target, settings[i].density, setting.density
        assert target is not None
        second = judge.spent(rule, judge.mean_read(trial.pieces, of.read))
        settings[i], measured[i] = setting, of
        if second != spent[i]:
            slope = (now - before) / (second - spent[i])
            corrected[i] = (target, _inside(now + (target - second) * slope))
    return settings, measured, corrected


def _inside(density: float) -> float:
    """A density that a rule can be calibrated for."""
    return min(max(density, DENSITY_MIN), 1.0)


def _rows(
    settings: Sequence[Setting],
    measured: Sequence[Measured],
    dense: Sequence[float],
    pieces: Sequence[Piece],
    *,
    resamples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """One row a setting, as ``csfast ablate --json`` writes it."""
    groups = judge.by_group(pieces)
    in_mean = judge.in_mean(pieces)
    rows = []
    for setting, found in zip(settings, measured, strict=True):
        rule = setting.rule
        pairs = {
            group: [(found.loss[j] - dense[j], pieces[j].n_sparse) for j in members]
            for group, members in groups.items()
        }
        per_task = {
            group: sum(delta for delta, _ in members) / sum(n for _, n in members)
            for group, members in pairs.items()
        }
        read = judge.mean_read(pieces, found.read)
        per_layer = judge.densities(rule, read)
        per_task_layer = {
            group: judge.densities(rule, of_group)
            for group, of_group in judge.read_by_group(pieces, found.read).items()
        }
        recall, energy = (None, None) if found.recovery is None else found.recovery.means()
        shapes = [ffn.shape for ffn in rule.ffns]
        row: dict[str, Any] = {
            "method": rule.name,
            "family": catalogue.family(rule.name),
            "structure": rule.structure,
            "target": setting.target,
            "density": judge.mean(per_layer),
            "density_per_layer": per_layer,
            "density_per_task": {
                group: judge.mean(layers) for group, layers in per_task_layer.items()
            },
            "density_per_task_layer": per_task_layer,
            "sensor_fraction": sum(rule.sensor_bytes(shape) for shape in shapes)
            / sum(rule.dense_bytes(shape) for shape in shapes),
            "bytes_fraction": judge.spent(rule, read),
            "recall": recall,
            "energy": energy,
            "delta": judge.mean(per_task[group] for group in in_mean),
            "per_task": per_task,
        }
        for key, sums in (("kl", found.kl), ("top1_agreement", found.n_agree)):
            if sums is not None:
                of_task = {
                    group: sum(sums[j] for j in members) / sum(pieces[j].n_sparse for j in members)
                    for group, members in groups.items()
                }
                row[key] = judge.mean(of_task[group] for group in in_mean)
                row[f"per_task_{key}"] = of_task
        if resamples:
            draws = judge.bootstrap(pairs, resamples=resamples, seed=seed)
            row["ci95"] = judge.interval(judge.mean_draws([draws[g] for g in in_mean]))
            row["per_task_ci95"] = {group: judge.interval(d) for group, d in draws.items()}
        rows.append(row)
    return rows


def _best(rows: Sequence[Mapping[str, Any]], fraction: float) -> dict[str, Any]:
    """The few-bit rule and the other selection rule that `select` preferred at one target."""
    found: dict[str, Any] = {"target": fraction}
    for key, kind in (("few_bit", "few-bit"), ("other", "selection")):
        members = [row for row in rows if row["target"] == fraction and row["family"] == kind]
        best = min(members, key=lambda row: float(row["select_delta"]), default=None)
        found[key] = None if best is None else best["method"]
        found[f"{key}_delta"] = None if best is None else best["delta"]
    ours, other = found["few_bit_delta"], found["other_delta"]
    found["ratio"] = ours / other if ours is not None and other is not None and other > 0 else None
    return found
