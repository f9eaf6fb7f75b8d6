"""Files of results: what csfast writes as JSON, read back and checked before anything is shown.

One description for each kind says what a page needs of it; more may be there. Nothing here draws.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..files import read_bounded
from ..types import ResultsError

Check = Callable[[Any, str], None]  # (value, where it stands)


@dataclass(frozen=True)
class Field:
    """A key of an object.

    Attributes:
        check: What its value must be.
        required: Whether it must be there.
    """

    check: Check
    required: bool = True


def read(path: str | os.PathLike[str], kind: str) -> Any:
    """Read a file of results and check it.

    Args:
        path: The file.
        kind: One of `KINDS`.

    Raises:
        ResultsError: The file is no JSON of this kind.
        OSError: It cannot be read.
    """
    file = pathlib.Path(path)
    try:
        found = json.loads(read_bounded(file))
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"[report] {file.name}: want a whole JSON file ({error}).") from error
    if kind in TABLES and isinstance(found, dict) and "rows" in found:
        found = found["rows"]  # what else is there says how the rows were made
    if kind in LISTS and isinstance(found, dict):
        found = [found]
    check(kind, found, name=file.name)
    return found


def check(kind: str, value: Any, *, name: str = "") -> None:
    """Check that a value is what a page can show.

    Args:
        kind: One of `KINDS`.
        value: What `json` gives, or the function that makes such results.
        name: What errors call it; the kind if left out.

    Raises:
        ResultsError: Something is missing, or is something else; the error says where.
    """
    KINDS[kind](value, name or kind)


# What a value can be


def _wrong(value: Any, where: str, wanted: str) -> ResultsError:
    given = repr(value)
    given = given if len(given) <= 60 else f"{given[:57]}..."
    return ResultsError(f"[report] {where} = {given}: want {wanted}.")


def number(value: Any, where: str) -> None:
    """Want a finite number."""
    # A whole number may be too long for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise _wrong(value, where, "a finite number")


def text(value: Any, where: str) -> None:
    """Want a text."""
    if not isinstance(value, str):
        raise _wrong(value, where, "a text")


def flag(value: Any, where: str) -> None:
    """Want true or false."""
    if not isinstance(value, bool):
        raise _wrong(value, where, "true or false")


def code(value: Any, where: str) -> None:
    """Want the name of a code: its bits, or a word."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise _wrong(value, where, "a number of bits or a name")


def within(low: float, high: float) -> Check:
    """Want a number from `low` to `high`."""

    def of(value: Any, where: str) -> None:
        number(value, where)
        if not low <= value <= high:
            wanted = f"a number from {low:g} on" if high == math.inf else f"{low:g} to {high:g}"
            raise _wrong(value, where, wanted)

    return of


def whole(least: int) -> Check:
    """Want a whole number, `least` or more."""

    def of(value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 10**18:
            raise _wrong(value, where, f"a whole number, {least} or more")

    return of


def interval(value: Any, where: str) -> None:
    """Want two numbers."""
    many(number)(value, where)
    if len(value) != 2:
        raise _wrong(value, where, "two numbers")


def maybe(inner: Check) -> Check:
    """Want null, or what `inner` wants."""

    def of(value: Any, where: str) -> None:
        if value is not None:
            inner(value, where)

    return of


def many(inner: Check, *, least: int = 0) -> Check:
    """Want a list of such values, with so many at least."""

    def of(value: Any, where: str) -> None:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise _wrong(value, where, "a list")
        if len(value) < least:
            raise _wrong(value, where, f"a list of at least {least}")
        for place, member in enumerate(value):
            inner(member, f"{where}[{place}]")

    return of


def each(inner: Check, *, least: int = 0) -> Check:
    """Want an object with such values under any keys."""

    def of(value: Any, where: str) -> None:
        _object(value, where)
        if len(value) < least:
            raise _wrong(value, where, f"an object with at least {least} entries")
        for key, member in value.items():
            inner(member, f"{where}.{_key(key)}")

    return of


def fields(**wanted: Field | Check) -> Check:
    """Want an object with these keys; others may be there."""

    def of(value: Any, where: str) -> None:
        _object(value, where)
        for key, field in wanted.items():
            if not isinstance(field, Field):
                field = Field(field)
            if key in value:
                field.check(value[key], f"{where}.{key}")
            elif field.required:
                raise ResultsError(f"[report] {where} without {key!r}: want it.")

    return of


def optional(inner: Check) -> Field:
    """Give a key that may be missing."""
    return Field(inner, required=False)


def all_of(*checks: Check) -> Check:
    """Want what all of them want, in turn."""

    def of(value: Any, where: str) -> None:
        for inner in checks:
            inner(value, where)

    return of


def _object(value: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        raise _wrong(value, where, "an object")


def _key(key: Any) -> str:
    return str(key)[:60]


# What must fit together


def _same_tasks(value: Any, where: str) -> None:
    """Every row of an ablation has the tasks that the dense model was scored on."""
    for place, row in enumerate(value["rows"]):
        for key in ("per_task", "per_task_ci95", "density_per_task", "density_per_task_layer"):
            missing = set(value["dense"]) - set(row.get(key, value["dense"]))
            if missing:
                raise ResultsError(
                    f"[report] {where}.rows[{place}].{key} without {sorted(missing)[0]!r}: want "
                    "every task of dense."
                )
        _same_layers(row, f"{where}.rows[{place}]")


def _named_best(value: Any, where: str) -> None:
    """A loss in ``best`` is that of a method."""
    for place, best in enumerate(value["best"]):
        for key in ("few_bit", "other"):
            if best[f"{key}_delta"] is not None and best[key] is None:
                wanted = f"the method that {key}_delta is of"
                raise _wrong(best[key], f"{where}.best[{place}].{key}", wanted)


def _same_layers(value: Any, where: str) -> None:
    """Densities by task are of as many layers as those of all tasks."""
    layers = value.get("density_per_layer")
    for task, of_task in value.get("density_per_task_layer", {}).items():
        if layers is None or len(of_task) != len(layers):
            raise ResultsError(
                f"[report] {where}.density_per_task_layer.{_key(task)} of {len(of_task)} layers: "
                "want as many as in density_per_layer."
            )


def _full_tables(value: Any, where: str) -> None:
    """Tables of a phase diagram have a value for every cell."""
    size = len(value["measurements"]), len(value["sparsity"])
    for i, diagram in enumerate(value["diagrams"]):
        for method, tables in diagram["methods"].items():
            for figure, table in tables.items():
                if len(table) != size[0] or any(len(row) != size[1] for row in table):
                    raise ResultsError(
                        f"[report] {where}.diagrams[{i}].methods.{_key(method)}.{_key(figure)}: "
                        f"want {size[0]} rows of {size[1]}, as measurements and sparsity have."
                    )


def _same_dictionaries(value: Any, where: str) -> None:
    """All layers have the dictionaries of the first, in its order."""
    for key in ("groups", "rows"):
        names = [d["name"] for d in value["layers"][0][key]]
        for place, layer in enumerate(value["layers"]):
            if [d["name"] for d in layer[key]] != names:
                raise ResultsError(
                    f"[report] {where}.layers[{place}].{key}: want the dictionaries of the first "
                    "layer."
                )


def _same_depth(value: Any, where: str) -> None:
    """All tokens of a page have as many layers."""
    depths = {len(t["density"]) for e in value["examples"] for t in e["tokens"]}
    if len(depths) > 1:
        raise ResultsError(
            f"[report] {where}: tokens of {sorted(depths)} layers: want as many for all."
        )


def _same_texts(value: Any, where: str) -> None:
    """Both kinds of text of a sketch have the same tasks."""
    missing = set(value["tasks"]) ^ set(value["text"]["tasks"])
    if missing:
        raise ResultsError(
            f"[report] {where}: {_key(min(missing))!r} stands in tasks or in text.tasks alone: "
            "want the same tasks in both."
        )


def _lengths(value: Any, where: str) -> None:
    """Keys are numbers of drafts."""
    for key in value:
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10):
            raise ResultsError(f"[report] {where}.{_key(key)}: want a number of drafts.")


# What the kinds are

_count = whole(0)
_share = within(0, 1 + 1e-6)  # rounding of sums of shares
_densities = many(_share, least=1)

_row = fields(
    method=text,
    family=text,
    structure=optional(text),
    target=maybe(number),
    density=number,
    density_per_layer=optional(_densities),
    density_per_task=optional(each(_share)),
    density_per_task_layer=optional(each(_densities)),
    sensor_fraction=number,
    bytes_fraction=number,
    recall=optional(maybe(number)),
    energy=optional(maybe(number)),
    delta=number,
    per_task=each(number),
    ci95=interval,
    per_task_ci95=each(interval),
    select_delta=optional(number),
    kl=optional(number),
    top1_agreement=optional(_share),
    per_task_kl=optional(each(number)),
    per_task_top1_agreement=optional(each(_share)),
)

_ablation = all_of(
    fields(
        rows=many(_row, least=1),
        best=many(
            fields(
                target=number,
                few_bit=maybe(text),
                few_bit_delta=maybe(number),
                other=maybe(text),
                other_delta=maybe(number),
                ratio=maybe(number),
            )
        ),
        notes=many(text),
        dense=each(number, least=1),
        documents=each(_count),
        tokens=each(_count),
        sparse_tokens=each(_count),
        seed=_count,
        model_hash=text,
    ),
    _same_tasks,
    _named_best,
)

_evaluation = all_of(
    fields(
        tasks=each(
            fields(
                dense_loss=number,
                loss=number,
                delta=number,
                ci95=interval,
                kl=number,
                top1_agreement=number,
                exact_match=maybe(number),
                dense_exact_match=maybe(number),
                answers=_count,
                tokens=whole(1),
                sparse_tokens=_count,
            ),
            least=1,
        ),
        mean_delta=number,
        outside=optional(many(text)),
        mean_ci95=interval,
        density=number,
        density_per_layer=_densities,
        density_per_task_layer=optional(each(_densities)),
        bytes_fraction=number,
        token_bytes_fraction=number,
        asked_density=number,
        bits=code,
        seed=_count,
        task=text,
        plan_hash=text,
        model_hash=text,
    ),
    _same_layers,
)

_phase = all_of(
    fields(
        n_groups=whole(2),
        group_neurons=_count,
        measurements=many(whole(1), least=1),
        sparsity=many(whole(1), least=1),
        trials=_count,
        constant=maybe(within(0, 1e9)),
        diagrams=many(
            fields(
                name=text,
                methods=each(
                    fields(
                        exact=many(many(_share)),
                        recall=many(many(_share)),
                        energy=many(many(_share)),
                    ),
                    least=1,
                ),
            )
        ),
        layers=many(
            fields(usage_share=_share, innovation_share=_share, innovation_energy=number), least=1
        ),
        seed=_count,
        model_hash=text,
    ),
    _full_tables,
)

_dictionary = fields(
    name=text,
    m=_count,
    n=_count,
    k=_count,
    coherence=number,
    welch=number,
    babel=number,
    guaranteed=_count,
    weighted=flag,
    used=interval,
    drawn=interval,
)

_dictionaries = all_of(
    fields(
        ratio=number,
        density=number,
        supports=_count,
        layers=many(fields(groups=many(_dictionary, least=1), rows=many(_dictionary)), least=1),
        seed=_count,
        model_hash=text,
    ),
    _same_dictionaries,
)

_effort = all_of(
    fields(
        examples=many(
            fields(
                task=text,
                prompt=text,
                first=text,
                tokens=many(
                    fields(
                        text=text,
                        dense_loss=number,
                        loss=number,
                        entropy=number,
                        density=_densities,
                    ),
                    least=1,
                ),
            )
        ),
        generated=flag,
        asked_density=number,
        bits=code,
        task=text,
        seed=_count,
        plan_hash=text,
        model_hash=text,
    ),
    _same_depth,
)

_agreed = {
    key: check
    for name, of in (("kl", number), ("top1", _share), ("delta", number))
    for key, check in ((name, of), (f"{name}_ci95", interval))
}
_agreed_by_task = each(fields(**_agreed, tokens=whole(1), documents=whole(1)), least=1)
_bits = within(0, 1e6)  # narrow matrices have more of steps and permutations than of codes

_sketch = all_of(
    fields(
        bits=fields(stored=_bits, read=_bits, ffn=_bits, attention=_bits, head=_bits),
        tasks=_agreed_by_task,
        **_agreed,
        expected_accepted=all_of(each(within(0, 1e9)), _lengths),
        text=fields(tasks=_agreed_by_task, **_agreed),
        outside=many(text),
        levels=whole(1),
        new_tokens=whole(1),
        rollouts=_count,
        seed=_count,
        model_hash=text,
        command=optional(many(text)),
        about=optional(text),
    ),
    _same_texts,
)

_positive = within(1e-300, 1e300)
_size_curve = many(
    fields(
        params=_positive,
        tokens=_positive,
        method=text,
        density=maybe(number),
        delta=number,
        ci95=interval,
    ),
    least=1,
)

_storage = many(
    fields(name=text, bits_read=number, bits_stored=number, delta=number, ci95=interval, kind=text),
    least=1,
)

# Of one text; a time is that of at least one token, and of no more than anyone waits for.
_time = within(1e-9, 1e9)
_side = fields(text=text, seconds=_time, tokens_per_second=maybe(_time))

_demo = fields(
    calibration=optional(maybe(fields(seconds=number, tokens=_count))),
    evaluation=optional(maybe(_evaluation)),
    seconds=optional(number),
    slower=optional(maybe(many(text))),
    samples=optional(maybe(text)),
    generation=optional(
        maybe(
            many(
                fields(
                    task=text,
                    prompt=text,
                    dense=_side,
                    csfast=_side,
                )
            )
        )
    ),
    bench=optional(
        maybe(
            many(
                fields(
                    case=text,
                    variant=text,
                    median_us=_time,
                    ratio_vs_dense=_time,
                )
            )
        )
    ),
    machine=optional(maybe(each(lambda value, where: None))),
)

KINDS: dict[str, Check] = {
    "ablation": _ablation,
    "evaluation": _evaluation,
    "phase": _phase,
    "dictionaries": _dictionaries,
    "effort": _effort,
    "size_curve": _size_curve,
    "storage": _storage,
    "demo": _demo,
    "sketch": many(_sketch, least=1),
}
TABLES = frozenset({"size_curve", "storage"})  # kinds that are lists of rows
LISTS = frozenset({"sketch"})  # kinds that are lists of results, of which a file may hold one
