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
from . import findings, fronts, panels, plots, results, sketches

# What a page can show, in its order: what it is called there, and what makes it.
SECTIONS: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "demo": ("Dense beside csfast", panels.demo),
    "ablation": ("Loss against bytes", fronts.ablation),
    "evaluation": ("Quality beside dense", panels.evaluation),
    "sketch": ("What a sketch costs", sketches.sketches),
    "effort": ("Effort, token by token", panels.effort),
    "size_curve": ("Size and training", panels.size_curve),
    "storage": ("Storage", panels.storage),
    "phase": ("Phases of recovery", panels.phase),
    "dictionaries": ("Coherence and isometry", panels.dictionaries),
}
# Sections that are research, with nothing that `apply` could run. They are folded, but for the
# first of a page that has nothing else.
RESEARCH = ("size_curve", "storage", "phase", "dictionaries")


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
    sketch: Sequence[Mapping[str, Any]] | None = None,
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
        sketch: What ``csfast eval --sketch --json`` writes, of one sketch or of several.

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
        "sketch": sketch,
    }
    titles = {name: title for name, (title, _) in SECTIONS.items() if given[name] is not None}
    if not titles:
        raise ValueError(f"[report] nothing to show: want one of {', '.join(SECTIONS)}.")
    shown: dict[str, Any] = dict.fromkeys(SECTIONS)
    for name in titles:
        results.check(name, given[name])
        shown[name] = SECTIONS[name][1](given[name])
    if ablation is not None:
        shown["ablation"]["headlines"] = findings.headlines(ablation)
        shown["ablation"]["comparisons"] = findings.comparisons(ablation)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        signed=findings.signed, fixed=_fixed, share=_share, interval=_interval, range=_range
    )
    template = pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        shown,
        version=__version__,
        titles=titles,
        unfolded=next(iter(titles)),
        palette=range(plots.PALETTE),
    )


# Numbers


def _fixed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _interval(value: Sequence[float]) -> str:
    return f"{value[0]:+.4f} … {value[1]:+.4f}"


def _range(value: Sequence[float]) -> str:
    """An interval of what is not a difference."""
    return f"{value[0]:.4f} … {value[1]:.4f}"
