"""Refusals before anything is allocated: what is no tensor, out of range, or absurd in size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..types import TERNARY, Code
from .row import Arg

INT32_MAX = 2**31 - 1
_STRIDED = torch.strided
_CODES: dict[Code, int] = {1: 1, 2: 2, 3: 3, 4: 4, TERNARY: 5}  # as csfast::Code numbers them


def tensors(op: str, places: Iterable[tuple[int, Arg]], given: Sequence[Any]) -> None:
    """Refuse what torch could not even dispatch: no tensor, no plain memory, several devices.

    Args:
        op: Whom the message names.
        places: Where in `given` which tensor is wanted.
        given: All arguments.
    """
    first: torch.device | None = None
    for place, arg in places:
        value = given[place]
        if isinstance(value, Tensor) and value.layout is _STRIDED and value.device == first:
            continue
        if arg.many:
            for i, member in enumerate(value):
                first = _device_of(op, f"{arg.name}[{i}]", member, first)
        elif value is not None or not arg.optional:
            first = _device_of(op, arg.name, value, first)


def _device_of(op: str, name: str, value: Any, first: torch.device | None) -> torch.device:
    """The device of a tensor that is none of these; `first` is that of those before."""
    if not isinstance(value, Tensor):
        raise TypeError(f"[{op}] {name} is a {type(value).__name__}: want a torch.Tensor.")
    if value.layout != torch.strided:
        raise TypeError(f"[{op}] {name} is {value.layout}: want a strided tensor.")
    device = value.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"[{op}] {name} is on {device}: want cpu or cuda.")
    if first is not None and device != first:
        raise ValueError(
            f"[{op}] {name} is on {device}, the tensors before it on {first}: want all tensors of "
            "a call on one device."
        )
    return device


def code(op: str, name: str, bits: Any) -> int:
    """Give the number of a code, `csfast::Code`."""
    found = _CODES.get(bits) if isinstance(bits, (int, str)) else None
    if found is None:
        of_type(op, "bits", bits, (int, str), f'an int or "{TERNARY}"')
        raise ValueError(f'[{op}] bits = {bits!r}: want 1 to 4 or "{TERNARY}".')
    return found


def integer(op: str, name: str, value: Any) -> Any:
    """Refuse what is no int from 0 to 2^31 - 1."""
    of_type(op, name, value, int, "an int")
    if not 0 <= value <= INT32_MAX:
        raise ValueError(f"[{op}] {name} = {value}: want 0 to 2^31 - 1.")
    return value


def integers(op: str, **values: Any) -> None:
    """Refuse those that are no ints from 0 to 2^31 - 1."""
    for name, value in values.items():
        integer(op, name, value)


def activation(op: str, name: str, value: Any) -> Any:
    """Refuse what is no activation."""
    of_type(op, name, value, str, "a str")
    if value not in ("silu", "gelu_tanh"):
        raise ValueError(f"[{op}] {name} = {value}: want silu or gelu_tanh.")
    return value


def of_type(op: str, name: str, value: Any, types: type | tuple[type, ...], word: str) -> Any:
    """Refuse what is not of a type, which the message calls `word`."""
    if not isinstance(value, types):
        raise TypeError(f"[{op}] {name} is a {type(value).__name__}: want {word}.")
    return value


# Of a scalar: its type in a schema of torch, and what gives the value to hand over.
KINDS: dict[str, tuple[str, Callable[[str, str, Any], Any]]] = {
    "int": ("int", integer),
    "ints": (
        "int[]",
        lambda op, name, v: [integer(op, f"{name}[{i}]", n) for i, n in enumerate(v)],
    ),
    "float": ("float", lambda op, name, v: of_type(op, name, v, (int, float), "a float")),
    "bool": ("bool", lambda op, name, v: of_type(op, name, v, bool, "a bool")),
    "str": ("str", lambda op, name, v: of_type(op, name, v, str, "a str")),
    "activation": ("str", activation),
    "code": ("int", code),
}


def refuse_axes(op: str, name: str, given: Sequence[int], wanted: Sequence[str]) -> NoReturn:
    """Refuse a tensor of another number of axes."""
    raise ValueError(f"[{op}] {name} has {len(given)} axes: want ({', '.join(wanted)}).")


def total(op: str, batch: int, n_neurons: int) -> None:
    """Refuse more rows or neurons than an index can count."""
    if batch > 65535 or n_neurons * max(batch, 1) > INT32_MAX:
        raise ValueError(
            f"[{op}] batch = {batch} rows of {n_neurons} neurons: want at most 65535 rows and "
            "fewer than 2^31 neurons in all."
        )
