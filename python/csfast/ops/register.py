"""From a row of the table to a registered operation: schema, allocation, fake, run and checks.

All that a row means is worked out when it is registered; a call walks tuples.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native
from . import check
from .row import Arg, Op, Sizes

Derived = Callable[[str, Sizes], int]  # a size that no tensor has, given the operation's name

# Lives as long as the module: torch forgets the operations of a library that is collected.
_LIBRARY = torch.library.Library("csfast", "DEF")  # type: ignore[no-untyped-call]


def register(op: Op, derived: dict[str, Derived]) -> Callable[..., Any]:
    """Register an operation with torch.

    Args:
        op: Its row.
        derived: What gives the sizes that no tensor has.

    Returns:
        A function of all arguments in the order of the row, which checks them and calls the
        overload that they ask for.
    """
    for overload in op.overloads:
        run, fake = _made(op, overload, derived)
        text = schema(op, overload)
        name = text.partition("(")[0]
        _LIBRARY.define(text, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        for key, implementation in (("CPU", run), ("CUDA", _on_its_device(run))):
            _LIBRARY.impl(name, implementation, key)  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"csfast::{name}", fake, lib=_LIBRARY)
    return _checked(op)


def schema(op: Op, overload: str) -> str:
    """Write the schema of an overload: what must be given first, then what has a default."""
    aliases = iter("ab")

    def declared(arg: Arg) -> str:
        if not arg.shape:
            default = "" if arg.default is None else f"={arg.default!r}"
            return f"{check.KINDS[arg.kind][0]} {arg.name}{default}"
        if arg.mutable:
            return f"Tensor({next(aliases)}!) {arg.name}"
        if arg.optional and arg.name not in op.switches:
            return f"Tensor? {arg.name}=None"
        return f"Tensor{'[]' * arg.many} {arg.name}"

    args = ", ".join(declared(arg) for arg in _args(op, overload))
    outs = ", ".join("Tensor" for _ in _outs(op, overload))
    return f"{op.name}{'.' * bool(overload)}{overload}({args}) -> ({outs})"


def _args(op: Op, overload: str) -> list[Arg]:
    """The arguments of an overload in the order of its schema."""
    demanded = op.overloads[overload]
    here = [arg for arg in op.args if arg.name in demanded or arg.name not in op.switches]

    def place(arg: Arg) -> int:
        if arg.name in demanded:
            return 1
        return 2 if arg.optional or arg.default is not None else 0

    return sorted(here, key=place)


def _outs(op: Op, overload: str) -> list[Arg]:
    return [out for out in op.outs if not out.optional or out.name in op.overloads[overload]]


def _made(
    op: Op, overload: str, derived: dict[str, Derived]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What runs an overload, and what only allocates its outputs."""
    native = getattr(_native, op.name)
    names = [arg.name for arg in op.args]
    given_as = _args(op, overload)
    defaults = tuple(arg.default for arg in given_as)
    # From the order of the schema, with a None at its end, to that of the row.
    given_at = {arg.name: place for place, arg in enumerate(given_as)}
    to_row = operator.itemgetter(*(given_at.get(name, -1) for name in names))
    places = [place for place, arg in enumerate(op.args) if arg.shape]
    sized = [
        (names.index(arg.name), arg, tuple(map(str, arg.shape)))
        for name in op.sized_by
        for arg in op.tensors
        if arg.name == name
    ]
    outs = [_Room(op.name, out, derived) for out in _outs(op, overload)]
    scratch = [_Room(op.name, out, derived) for out in op.scratch]
    missing = (None,) * (len(op.outs) - len(outs))

    def sizes_of(row: tuple[Any, ...]) -> tuple[Sizes, Tensor]:
        sizes: Sizes = dict(zip(names, row, strict=True))
        for place, arg, dims in sized:
            if arg.many and not row[place]:
                raise ValueError(f"[{op.name}] no {arg.name}: want at least one.")
            shape = (row[place][0] if arg.many else row[place]).shape
            if len(shape) != len(dims):
                check.refuse_axes(op.name, arg.name, shape, dims)
            sizes.update(zip(dims, shape, strict=True))
        op.check(op.name, sizes)
        return sizes, row[sized[0][0]]

    def run(*given: Any) -> Any:
        row = to_row((*given, *defaults[len(given) :], None))
        sizes, like = sizes_of(row)
        made = [room.made(sizes, like) for room in outs]
        sizes["is_cuda"] = like.is_cuda
        work = [room.made(sizes, like) for room in scratch]
        native(*_without_autograd(row, places), *work, *made, *missing, stream(like))
        return made[0] if len(made) == 1 else tuple(made)

    def fake(*given: Any) -> Any:
        sizes, like = sizes_of(to_row((*given, *defaults[len(given) :], None)))
        made = [room.made(sizes, like) for room in outs]
        return made[0] if len(made) == 1 else tuple(made)

    return run, fake


class _Room:
    """An output or scratch of one operation, to be allocated for every call."""

    def __init__(self, op: str, out: Arg, derived: dict[str, Derived]) -> None:
        self._op = op
        self._shape = out.shape
        self._is_zeroed = out.default == 0
        self._dtype = None if out.kind == "T" else getattr(torch, out.kind)
        self._derived = [(dim, derived[str(dim)]) for dim in out.shape if dim in derived]

    def made(self, sizes: Sizes, like: Tensor) -> Tensor:
        """Allocate it on the device of `like`, in its dtype for T; adds to `sizes`."""
        for name, size_of in self._derived:
            sizes[str(name)] = size_of(self._op, sizes)
        new = like.new_zeros if self._is_zeroed else like.new_empty
        shape = [dim if isinstance(dim, int) else sizes[dim] for dim in self._shape]
        return new(shape, dtype=self._dtype)


def _without_autograd(row: tuple[Any, ...], places: list[int]) -> list[Any]:
    """The arguments with tensors that may be shown to other libraries at some places."""
    plain = list(row)
    for place in places:
        value = plain[place]
        if isinstance(value, list):
            plain[place] = [member.detach() for member in value]
        elif value is not None and value.requires_grad:
            plain[place] = value.detach()
    return plain


def stream(x: Tensor) -> int:
    """Give the current CUDA stream of the tensor's device, or 0 on the CPU."""
    # The public way makes a Stream each time, which takes longer than all else of a call.
    return torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0


def _on_its_device(run: Callable[..., object]) -> Callable[..., object]:
    """The same with the CUDA device of the first tensor made current: kernels start on that one."""

    def guarded(first: Tensor | list[Tensor], *rest: object) -> object:
        place = (first if isinstance(first, Tensor) else first[0]).get_device()
        if torch.cuda.current_device() == place:
            return run(first, *rest)
        with torch.cuda.device(place):
            return run(first, *rest)

    return guarded


def _checked(op: Op) -> Callable[..., Any]:
    """What checks the arguments of a row and calls the overload that they ask for."""
    names = [arg.name for arg in op.args]
    tensors = [(place, arg) for place, arg in enumerate(op.args) if arg.shape]
    scalars = [
        (place, arg.name, check.KINDS[arg.kind][1])
        for place, arg in enumerate(op.args)
        if not arg.shape
    ]
    switches = [names.index(name) for name in op.switches]
    packet = getattr(torch.ops.csfast, op.name)
    overloads = {
        tuple(name in demanded for name in op.switches): (
            getattr(packet, overload or "default"),
            [names.index(arg.name) for arg in _args(op, overload)],
        )
        for overload, demanded in op.overloads.items()
    }

    def call(*given: Any) -> Any:
        check.tensors(op.name, tensors, given)
        row = list(given)
        for place, name, value_of in scalars:
            row[place] = value_of(op.name, name, given[place])
        run, order = overloads[tuple([given[place] is not None for place in switches])]
        return run(*[row[place] for place in order])

    return call
