"""Results as tables for the terminal, dense beside csfast in every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..doctor import Finding
from . import words


def findings(found: Sequence[Finding]) -> Table:
    """Give what the doctor found."""
    table = Table.grid(padding=(0, 2))
    for finding in found:
        mark = "[red]fault[/]" if finding.is_fault else "ok"
        table.add_row(mark, finding.subject, finding.text)
    return table


def quality(results: dict[str, Any]) -> Table:
    """Give the evaluation: one row a task, the mean below."""
    tasks = results["tasks"].values()
    outside = results.get("outside", [])
    sparse = sum(row["sparse_tokens"] for row in tasks) / sum(row["tokens"] for row in tasks)
    table = Table(
        title=f"Quality with {results['density']:.1%} of the neurons executed: loss, nats a token",
        caption=f"{results['bytes_fraction']:.1%} of the bytes of the dense feed-forward layers "
        f"are read, {sparse:.1%} of the tokens are predicted sparsely. KL: divergence of the "
        "predictions. top-1: both find the same token likeliest. right: short answers, dense and "
        "csfast.",
        padding=0,
    )
    table.add_column("task", no_wrap=True)
    for name in ("dense", "csfast", "change", "95 %", "KL", "top-1", "right"):
        table.add_column(name, justify="right", no_wrap=True)
    for task in sorted(results["tasks"], key=outside.__contains__):
        row = results["tasks"][task]
        if task == next(iter(outside), None):
            table.add_section()
            table.add_row("mean", "", "", f"{results['mean_delta']:+.4f}")
            table.add_section()
        low, high = row["ci95"]
        table.add_row(
            escape(task),
            f"{row['dense_loss']:.4f}",
            f"{row['loss']:.4f}",
            f"{row['delta']:+.4f}",
            f"{low:+.4f} .. {high:+.4f}",
            f"{row['kl']:.4f}",
            f"{row['top1_agreement']:.3f}",
            _answers(row),
        )
    if not outside:
        table.add_section()
        table.add_row("mean", "", "", f"{results['mean_delta']:+.4f}")
    return table


def agreement(results: dict[str, Any]) -> Table:
    """Give how closely a sketch follows its model: one row a task, the mean below."""
    bits, accepted = results["bits"], results["expected_accepted"]
    drafts = ", ".join(f"{accepted[n]:.2f} of {n}" for n in ("4", "8", "15") if n in accepted)
    table = Table(
        title=f"A sketch of {bits['read']:.2f} bits a weight read, {bits['stored']:.2f} stored, "
        "beside the dense model",
        caption=f"own: along {results['new_tokens']} tokens that the dense model goes on with; "
        "text: along what the documents go on with. KL: divergence of the predictions, nats a "
        "token. top-1: both find the same token likeliest. change: of the loss."
        + (f" Drafts that a check keeps: {drafts}." if drafts else ""),
        padding=0,
    )
    table.add_column("task", no_wrap=True)
    for name in ("own KL", "95 %", "top-1", "text KL", "95 %", "top-1", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    text, outside = results["text"], results["outside"]
    rows = [(escape(task), row, text["tasks"][task]) for task, row in results["tasks"].items()]
    n_mean = len(rows) - len(outside)  # those outside the mean come last
    for name, own, given in [*rows[:n_mean], ("mean", results, text), *rows[n_mean:]]:
        if own is results:
            table.add_section()
        cells = []
        for of in (own, given):
            low, high = of["kl_ci95"]
            cells += [f"{of['kl']:.4f}", f"{low:.4f} .. {high:.4f}", f"{of['top1']:.3f}"]
        table.add_row(name, *cells, f"{given['delta']:+.4f}", end_section=own is results)
    return table


def effort(results: dict[str, Any]) -> Table:
    """Give the effort of texts: one row a text."""
    kind = "generated" if results["generated"] else "held-out"
    table = Table(
        title=f"Effort of {kind} texts at density {results['asked_density']:g}",
        caption="effort: fraction of the neurons executed for a token, mean over layers; losses in "
        "nats per token.",
        padding=0,
    )
    table.add_column("task", no_wrap=True)
    for name in ("tokens", "effort", "least", "most", "dense", "csfast", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for example in results["examples"]:
        tokens = example["tokens"]
        efforts = [sum(t["density"]) / len(t["density"]) for t in tokens]
        dense, sparse = (
            sum(t[key] for t in tokens) / len(tokens) for key in ("dense_loss", "loss")
        )
        table.add_row(
            escape(example["task"]),
            str(len(tokens)),
            f"{sum(efforts) / len(efforts):.3f}",
            f"{min(efforts):.3f}",
            f"{max(efforts):.3f}",
            f"{dense:.4f}",
            f"{sparse:.4f}",
            f"{sparse - dense:+.4f}",
        )
    return table


def _answers(row: dict[str, Any]) -> str:
    """The share of right short answers, dense and csfast."""
    if row["exact_match"] is None:
        return "-"
    return f"{row['dense_exact_match']:.2f}, {row['exact_match']:.2f}"


def speed(results: dict[str, Any]) -> Table:
    """Give the benchmark: dense beside ours in milliseconds, and how they compare."""
    machine = results["machine"]
    said = [machine.get("gpu") or machine["cpu"]]  # on a GPU a benchmark without torch says no more
    said += [f"{machine['threads']} threads"] if "threads" in machine else []
    said += [machine["isa"]] if "isa" in machine else []
    table = Table(
        title="Time of a feed-forward layer, median, in milliseconds",
        caption=f"{', '.join(said)}. d: channels, F: neurons, density: fraction of the neurons "
        "executed. complete: the whole layer, as dense; the others are parts of it. docs/speed.md "
        "has more.",
        padding=0,
    )
    for name in ("case", "variant", "dense", "csfast", "against dense"):
        right = name in ("dense", "csfast")
        # A narrow terminal breaks names, never figures.
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "case")
    for row in results["rows"]:
        ours, ratio = row["median_us"] / 1000, row["ratio_vs_dense"]
        table.add_row(
            row["case"].removeprefix("ffn "),
            row["variant"],
            f"{ours * ratio:.3f}",
            f"{ours:.3f}",
            verdict(ratio) if row["sigma"] is not None else f"{1 / ratio:.0%} of it",
        )
        best = min(row["baselines"], key=row["baselines"].__getitem__)
        if row["ratio_vs_best"] < ratio and row["sigma"] is not None:
            table.add_row("", "", f"{row['baselines'][best] / 1000:.3f}", "", f"by {best}")
    return table


def pursuits(results: dict[str, Any]) -> Table:
    """Give the benchmark of omp: the best other way beside ours, and whether ours is right."""
    table = Table(
        title="Orthogonal matching pursuit, median",
        caption="other: the fastest of the other ways, from the signals; us/atom: of the whole "
        "batch; agrees: share of the signals with the support of float64.",
        padding=0,
    )
    for name in ("case", "variant", "other", "problems/s", "us/atom", "agrees", "verdict"):
        right = name in ("problems/s", "us/atom", "agrees")
        # A narrow terminal breaks names, never figures.
        wraps = name in ("case", "other")
        table.add_column(name, justify="right" if right else "left", no_wrap=not wraps)
    for row in results["rows"]:
        best = min(row["baselines"], key=row["baselines"].__getitem__)
        table.add_row(
            row["case"].removeprefix("omp "),
            row["variant"],
            best,
            f"{row['problems_per_second']:,.0f}",
            f"{row['us_per_atom']:.2f}",
            f"{row['agreement']:.4f}",
            verdict(row["ratio_vs_best"]),
        )
    return table


def verdict(ratio: float) -> str:
    """Say in few letters how csfast compares; `ratio` is the dense time over ours."""
    said = words.ratio(ratio).replace(" times", "x")
    return said if ratio >= 1 else f"[red]{said}[/]"
