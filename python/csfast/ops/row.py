"""What the table of operations is written in: one row an operation, from which all else follows.

Arguments are written as a schema of torch is, with the shape of every tensor beside its dtype:

    float32[n_neurons 2]? offset    a tensor; ``?`` may be None, ``!`` is written to, ``[]`` a list
    int32[lists n_groups] index=0   an output that is filled with zeros before
    int tile_rows=1                 a scalar of one of the kinds of `check`

Where several dtypes are possible ``|`` divides them; T is one of float32, float16 and bfloat16, the
same for all such tensors of a call. A size is a number, or a word that means one size in a call.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable
from typing import Any

Sizes = dict[str, Any]  # of one call: its arguments and the sizes of its tensors, by name

_ARGUMENT = re.compile(
    r"(?P<kind>[\w|]+)(\[(?P<shape>[\w ]+)\](?P<many>(\[\])?)(?P<mark>[?!]*))? (?P<name>\w+)"
    r"(=(?P<default>.+))?"
)


@dataclasses.dataclass(frozen=True)
class Arg:
    """An argument or an output of an operation."""

    name: str  # as the native function and the registered operation call it
    kind: str  # dtype of a tensor, kind of a scalar
    shape: tuple[str | int, ...]  # of a tensor, which has an axis at least; () of a scalar
    optional: bool  # it may be None; an output: only the overloads that name it have it
    mutable: bool
    many: bool  # a list of tensors
    default: Any  # of a scalar, None: there is none


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation: the native function of that name, and how torch is to see it.

    The native function takes `args`, `scratch`, `outs` and the stream, in that order.
    """

    name: str
    args: tuple[Arg, ...]
    outs: tuple[Arg, ...]
    sized_by: tuple[str, ...]  # inputs that name the sizes; outputs are made like the first
    scratch: tuple[Arg, ...]  # memory that the native function works in
    check: Callable[[str, Sizes], None]  # refuses what would be absurd to allocate for
    # Overloads of the registered operation, and the optional arguments and outputs that each has
    # where others have none: inductor 2.13 cannot lower a mutable argument that is None.
    overloads: dict[str, tuple[str, ...]]

    @property
    def tensors(self) -> tuple[Arg, ...]:
        """The tensors that go in."""
        return tuple(arg for arg in self.args if arg.shape)

    @property
    def switches(self) -> tuple[str, ...]:
        """The optional inputs that decide which overload runs."""
        named = {name for names in self.overloads.values() for name in names}
        return tuple(arg.name for arg in self.args if arg.name in named)


def arguments(text: str) -> tuple[Arg, ...]:
    """Read arguments as the head of this file writes them, divided by commas."""
    found = []
    for part in re.split(r",\s*", text.strip()) if text else ():
        match = _ARGUMENT.fullmatch(part)
        assert match is not None, part
        shape, mark, default = match["shape"] or "", match["mark"] or "", match["default"]
        found.append(
            Arg(
                name=match["name"],
                kind=match["kind"],
                shape=tuple(int(s) if s.isdigit() else s for s in shape.split()),
                optional="?" in mark,
                mutable="!" in mark,
                many=bool(match["many"]),
                default=None if default is None else ast.literal_eval(default),
            )
        )
    return tuple(found)
