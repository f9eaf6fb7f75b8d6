"""One self-contained HTML page: what selection and quantisation cost, and what they save.

The page needs no script, no font and no network. Every text that comes from outside is escaped.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2

from .._version import __version__
from ..files import write_atomic
from . import fronts, panels, plots, results

# What a page can show, in its order: what it is called there, and what makes it.
SECTIONS: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "evaluation": ("Quality of one plan", panels.evaluation),
    "ablation": ("Loss against bytes", fronts.ablation),
    "effort": ("Effort, token by token", panels.effort),
    "phase": ("Phases of recovery", panels.phase),
    "dictionaries": ("Coherence and isometry", panels.dictionaries),
    "size_curve": ("Size and training", panels.size_curve),
    "storage": ("Storage", panels.storage),
    "demo": ("Demo", panels.demo),
}


def write_report(path: str | os.PathLike[str], **given: Any) -> None:
    """Write the page, whole or not at all.

    Args:
        path: Where to; replaced if it exists.
        **given: What to show, see `render`.

    Raises:
        ResultsError: Something is not what it was given as.
        ValueError: There is nothing to show.
        OSError: The file cannot be written.
    """
    write_atomic(pathlib.Path(path), render(**given).encode())


def render(
    *,
    ablation: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    phase: Mapping[str, Any] | None = None,
    dictionaries: Mapping[str, Any] | None = None,
    effort: Mapping[str, Any] | None = None,
    size_curve: Sequence[Mapping[str, Any]] | None = None,
    storage: Sequence[Mapping[str, Any]] | None = None,
    demo: Mapping[str, Any] | None = None,
) -> str:
    """Give the page as text. It shows what it is given.

    Args:
        ablation: What `ablate.ablate` gives.
        evaluation: What `evaluate.evaluate` gives.
        phase: What `phase.diagrams` gives.
        dictionaries: What `dictionaries.analyse` gives.
        effort: What `tokens.examples` gives.
        size_curve: Rows of ``params``, ``tokens``, ``method``, ``density``, ``delta``, ``ci95``.
        storage: Rows of ``name``, ``bits_read``, ``bits_stored``, ``delta``, ``ci95``, ``kind``.
        demo: What `demo.run` gives.

    Raises:
        ResultsError: Something is not what it was given as.
        ValueError: There is nothing to show.
    """
    given: dict[str, Any] = {
        "ablation": ablation,
        "evaluation": evaluation,
        "phase": phase,
        "dictionaries": dictionaries,
        "effort": effort,
        "size_curve": size_curve,
        "storage": storage,
        "demo": demo,
    }
    titles = {name: title for name, (title, _) in SECTIONS.items() if given[name] is not None}
    if not titles:
        raise ValueError(f"[report] nothing to show: want one of {', '.join(SECTIONS)}.")
    shown: dict[str, Any] = dict.fromkeys(SECTIONS)
    for name in titles:
        results.check(name, given[name])
        shown[name] = SECTIONS[name][1](given[name])
    if ablation is not None:
        shown["ablation"]["findings"] = findings(ablation)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(signed=_signed, fixed=_fixed, share=_share, interval=_interval)
    template = pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        shown, version=__version__, titles=titles, palette=range(plots.PALETTE)
    )


def findings(ablation: Mapping[str, Any]) -> list[str]:
    """Say in sentences what an ablation found, losses included.

    Args:
        ablation: What `evaluate.ablate` gives.

    Returns:
        One sentence for each number of bytes that was asked for, then one for each quantised row,
        a count of which won, and one for each row of a rule whose precision follows the support.
    """
    said = [_selection_sentence(best) for best in ablation["best"]]
    rows = ablation["rows"]
    verdicts = [
        _quantised_sentence(row, rows)
        for row in sorted(rows, key=lambda row: float(row["bytes_fraction"]))
        if row["family"] == "quantised"
    ]
    said += [sentence for sentence, _ in verdicts]
    if verdicts:
        wins = sum(verdict == "quantisation" for _, verdict in verdicts)
        losses = sum(verdict == "selection" for _, verdict in verdicts)
        said.append(
            f"Of {len(verdicts)} quantised rows {wins} beat selecting 16-bit neurons by few bits "
            f"within their bytes, {losses} lose to it, and {len(verdicts) - wins - losses} cannot "
            "be told apart or have no rival."
        )
    mixed: dict[tuple[str, float], Mapping[str, Any]] = {}
    for row in rows:  # beyond the bytes of its whole code, a rule meets every target with these
        if row["family"] == "mixed":
            mixed.setdefault((str(row["method"]), round(float(row["bytes_fraction"]), 3)), row)
    return said + [_mixed_sentence(row, rows) for row in mixed.values()]


def _selection_sentence(best: Mapping[str, Any]) -> str:
    """How the few-bit rule compares with the best other rule at one number of bytes."""
    target = f"At {best['target']:.2f} of the dense bytes"
    if best["few_bit_delta"] is None or best["other_delta"] is None:
        lacking = "few-bit rule" if best["few_bit_delta"] is None else "other rule"
        return f"{target} no {lacking} can be compared."
    pair = (
        f"{target} {best['few_bit']} loses {_signed(best['few_bit_delta'])} nats a token and the "
        f"best other rule, {best['other']}, {_signed(best['other_delta'])}"
    )
    if best["ratio"] is None:
        return f"{pair}."
    if best["ratio"] > 1:
        return f"{pair}: the other rule is better."
    return f"{pair}: {max(0.0, best['ratio']):.0%} of it."


def _quantised_sentence(
    row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> tuple[str, str]:
    """How a quantised row compares with few-bit selection within its bytes, and who wins."""
    read = f"{row['method']} reads {row['bytes_fraction']:.2f} and loses {_signed(row['delta'])}"
    few_bit = [other for other in rows if other["family"] == "few-bit"]
    rivals = [
        other
        for other in few_bit
        # A hundredth more is the same number of bytes: selection meets its target to about that.
        if other["bytes_fraction"] <= row["bytes_fraction"] + 0.01
    ]
    if not rivals:
        beaten = [other for other in few_bit if row["ci95"][1] < other["ci95"][0]]
        if beaten:
            worse = max(beaten, key=lambda other: float(other["bytes_fraction"]))
            return (
                f"{read}; {worse['method']} reads more, {worse['bytes_fraction']:.2f}, and loses "
                f"more, {_signed(worse['delta'])}: quantisation wins."
            ), "quantisation"
        return f"{read}; no few-bit selection of 16-bit neurons gets by with so little.", "none"
    rival = min(rivals, key=lambda other: float(other["delta"]))
    against = (
        f"{read}; {rival['method']} at {rival['bytes_fraction']:.2f} loses "
        f"{_signed(rival['delta'])}"
    )
    if row["ci95"][1] < rival["ci95"][0]:
        return f"{against}: quantisation wins.", "quantisation"
    if rival["ci95"][1] < row["ci95"][0]:
        return f"{against}: selection wins.", "selection"
    return f"{against}: their intervals overlap.", "none"


def _mixed_sentence(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """How precision that follows the support compares with weights quantised alike."""
    said = f"{row['method']} reads {row['bytes_fraction']:.2f} and loses {_signed(row['delta'])}; "
    plain = [other for other in rows if other["family"] == "quantised"]
    within = [r for r in plain if r["bytes_fraction"] <= row["bytes_fraction"] + 0.01]
    level = [r for r in plain if r["delta"] <= row["delta"]]
    if within:
        best = min(within, key=lambda other: float(other["delta"]))
        lost = _signed(best["delta"])
        said += f"weights quantised alike lose {lost} within these bytes ({best['method']}), "
    else:
        said += "no weights quantised alike get by with so little, "
    if not level:
        return f"{said}and none lose as little."
    first = min(level, key=lambda other: float(other["bytes_fraction"]))
    return (
        f"{said}and the first to lose no more read {first['bytes_fraction']:.2f} "
        f"({first['method']})."
    )


# Numbers


def _signed(value: float) -> str:
    return f"{value:+.4f}"


def _fixed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _interval(value: Sequence[float]) -> str:
    return f"{value[0]:+.4f} … {value[1]:+.4f}"
