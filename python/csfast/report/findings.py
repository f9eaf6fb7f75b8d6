"""What an ablation found, in sentences: three for everyone, and every comparison for who wants it.

Losses are differences to the dense model on the same tokens. Where two intervals overlap, neither
wins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import words

SAME_BYTES = 0.01  # more is the same number of bytes: selection meets its target to about that

Row = Mapping[str, Any]


def headlines(ablation: Mapping[str, Any]) -> list[str]:
    """Say the most important, losses included: at most three sentences, about one number of bytes.

    That number is the middle one of those asked for at which csfast was measured. Told there are
    csfast beside the best other rule that skips, beside weights that are quantised and read whole,
    and beside precision that follows the neurons; where there is none of the last, beside a perfect
    choice.

    Args:
        ablation: What `ablate.ablate` gives.
    """
    rows = ablation["rows"]
    known = sorted(
        (best for best in ablation["best"] if best["few_bit_delta"] is not None),
        key=lambda best: float(best["target"]),
    )
    if not known:
        return []
    middle = known[(len(known) - 1) // 2]
    ours = _row_of(rows, middle["few_bit"], middle)
    said = [_beside_rules(middle, known, rows)]
    for sentence in (
        _beside_quantised(middle, ours, rows),
        _beside_mixed(middle, rows) or _beside_perfect(middle, rows),
    ):
        if sentence:
            said.append(sentence)
    return said


def _row_of(rows: Sequence[Row], method: str | None, best: Mapping[str, Any]) -> Row | None:
    """The row of a method at the bytes of an entry of ``best``, if it is there."""
    found = [row for row in rows if row["method"] == method and row["target"] == best["target"]]
    return found[0] if found else None


def _beside_rules(
    middle: Mapping[str, Any], known: Sequence[Mapping[str, Any]], rows: Sequence[Row]
) -> str:
    """How csfast compares with the best other rule that skips, wherever it was measured."""
    loss = float(middle["few_bit_delta"])
    said = (
        f"At {middle['target']:.0%} of the bytes csfast ({words.short(middle['few_bit'])}) loses "
        f"{nats(loss)} nats a token ({math.expm1(min(loss, 9.0)):+.1%} perplexity)"
    )
    if middle["other_delta"] is not None:
        said += (
            f", the best other rule that skips, {words.plain(middle['other'])}, "
            f"{nats(middle['other_delta'])}"
        )
    places: dict[str, list[str]] = {}
    for best in known:
        if best["other_delta"] is not None:
            places.setdefault(_winner(best, rows), []).append(f"{best['target']:.0%}")
    parts = [
        f"{verdict} at {_listed(places[verdict])}"
        for verdict in ("ahead", "level", "behind")
        if verdict in places
    ]
    return f"{said}. csfast is {_listed(parts)}." if parts else f"{said}."


def _winner(best: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Whether csfast is ahead, behind or level at one number of bytes."""
    ours, other = (_row_of(rows, best[key], best) for key in ("few_bit", "other"))
    if ours is not None and other is not None and _overlap(ours, other):
        return "level"
    return "ahead" if best["few_bit_delta"] < best["other_delta"] else "behind"


def _overlap(one: Row, other: Row) -> bool:
    return bool(one["ci95"][0] <= other["ci95"][1] and other["ci95"][0] <= one["ci95"][1])


def _beside_quantised(middle: Mapping[str, Any], ours: Row | None, rows: Sequence[Row]) -> str:
    """How weights that are quantised alike and read whole compare within csfast's bytes."""
    plain = [row for row in rows if row["family"] == "quantised"]
    if not plain:
        return ""
    within = [row for row in plain if row["bytes_fraction"] <= middle["target"] + SAME_BYTES]
    if not within:
        first = min(plain, key=lambda row: float(row["bytes_fraction"]))
        return (
            f"Weights quantised and read whole do not get by with so few bytes: "
            f"{words.plain(first['method'])}, read {first['bytes_fraction']:.0%} and lose "
            f"{nats(first['delta'])}."
        )
    best = min(within, key=lambda row: float(row["delta"]))
    if ours is not None and _overlap(ours, best):
        verdict = "are level with csfast there"
    elif best["delta"] < middle["few_bit_delta"]:
        verdict = "do better there"
    else:
        verdict = "do worse there"
    return (
        f"Weights quantised and read whole {verdict}: {words.plain(best['method'])}, read "
        f"{best['bytes_fraction']:.0%} and lose {nats(best['delta'])}."
    )


def _beside_mixed(middle: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """What precision that follows the neurons does within csfast's bytes."""
    within = [
        row
        for row in rows
        if row["family"] == "mixed" and row["bytes_fraction"] <= middle["target"] + SAME_BYTES
    ]
    if not within:
        return ""
    best = min(within, key=lambda row: float(row["delta"]))
    return (
        f"Research, not what apply runs: {words.plain(best['method'])}, read "
        f"{best['bytes_fraction']:.0%} and lose {nats(best['delta'])}."
    )


def _beside_perfect(middle: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """What a choice that knows the answer would lose."""
    perfect = _row_of(rows, "oracle-neuron", middle)
    if perfect is None:
        return ""
    return (
        f"A perfect choice of neurons, which no rule can make, would lose {nats(perfect['delta'])} "
        "there: the rest is what choosing costs."
    )


def nats(value: float) -> str:
    """Give a difference of losses in as many digits as tell something."""
    return f"{value:+.3f}" if abs(value) >= 0.0095 else f"{value:+.4f}"


def _listed(parts: Sequence[str]) -> str:
    """Join with commas and a last *and*."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def comparisons(ablation: Mapping[str, Any]) -> list[str]:
    """Compare everything that can be compared, losses included.

    Args:
        ablation: What `ablate.ablate` gives.

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
        f"{target} {best['few_bit']} loses {signed(best['few_bit_delta'])} nats a token and the "
        f"best other rule, {best['other']}, {signed(best['other_delta'])}"
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
    read = f"{row['method']} reads {row['bytes_fraction']:.2f} and loses {signed(row['delta'])}"
    few_bit = [other for other in rows if other["family"] == "few-bit"]
    rivals = [
        other for other in few_bit if other["bytes_fraction"] <= row["bytes_fraction"] + SAME_BYTES
    ]
    if not rivals:
        beaten = [other for other in few_bit if row["ci95"][1] < other["ci95"][0]]
        if beaten:
            worse = max(beaten, key=lambda other: float(other["bytes_fraction"]))
            return (
                f"{read}; {worse['method']} reads more, {worse['bytes_fraction']:.2f}, and loses "
                f"more, {signed(worse['delta'])}: quantisation wins."
            ), "quantisation"
        return f"{read}; no few-bit selection of 16-bit neurons gets by with so little.", "none"
    rival = min(rivals, key=lambda other: float(other["delta"]))
    against = (
        f"{read}; {rival['method']} at {rival['bytes_fraction']:.2f} loses {signed(rival['delta'])}"
    )
    if row["ci95"][1] < rival["ci95"][0]:
        return f"{against}: quantisation wins.", "quantisation"
    if rival["ci95"][1] < row["ci95"][0]:
        return f"{against}: selection wins.", "selection"
    return f"{against}: their intervals overlap.", "none"


def _mixed_sentence(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """How precision that follows the support compares with weights quantised alike."""
    said = f"{row['method']} reads {row['bytes_fraction']:.2f} and loses {signed(row['delta'])}; "
    plain = [other for other in rows if other["family"] == "quantised"]
    within = [r for r in plain if r["bytes_fraction"] <= row["bytes_fraction"] + SAME_BYTES]
    level = [r for r in plain if r["delta"] <= row["delta"]]
    if within:
        best = min(within, key=lambda other: float(other["delta"]))
        lost = signed(best["delta"])
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


def signed(value: float) -> str:
    """Give a difference of losses in four digits."""
    return f"{value:+.4f}"
