"""Trellis codes: a few bits a weight that choose among twice as many levels as they could name.

A weight of ``bits`` bits takes one of ``2^(bits + 1)`` levels. Which half of them is open depends
on the weights before it in its sequence, so that one path is chosen through all of them: .9 to
1.3 dB better than fitted levels of as many bits, at a decoder that is linear over GF(2).

Every column of a matrix is 16 sequences, one a lane: rows ``lane + 16 t`` for t = 0, 1, 2, ...
Each weight stores one bit ``u`` and ``bits - 1`` bits ``raw``. With nu, the memory of the code::

    z1[t] = sum of h0[i] u[t - i],  z0[t] = sum of h1[i] u[t - i]     delays i <= nu, modulo 2
    index = 4 * raw + 2 * z1 + z0,  value = table[index]              u is 0 before the start

Layout, ``uint8 (ceil(rows / 64), ceil(cols / 8), bits, 64)``: a tile is 64 rows by 8 columns. Byte
``4 * (row % 16) + col % 4`` has places for eight weights: four steps ``(row % 64) // 16`` of two
sequences, place ``4 * (col % 8 // 4) + step``. The first 64 bytes hold u, place p in bit p. What
follows is raw: one bit a weight in bit ``PLACE[p]``; of two bits a weight 64 bytes with the places
0 to 3 and 64 with 4 to 7; of three bits the same with the lower two, then 64 bytes with the third
of place p in bit p. Rows and columns of padding have any code.

Source:
    Ungerboeck, "Channel coding with multilevel/phase signals", IEEE Trans. Information Theory,
    1982 (the polynomials); Marcellin and Fischer, "Trellis coded quantization of memoryless and
    Gauss-Markov sources", IEEE Trans. Communications, 1990.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 16  # rows side by side, each in a sequence of its own
STEPS = 4  # of a sequence in one byte
PLACES = 2 * STEPS  # weights of a byte, of two sequences
TILE_ROWS = LANES * STEPS
TILE_COLS = 8
BITS = (1, 2, 3, 4)
NU = 8  # memory of the codes of a sketch: u reaches back over two tiles
PLACE = (2, 3, 6, 7, 0, 1, 4, 5)  # bit of the raw bit of each place, where a weight has one
# By nu: h0 and h1, bit i is the delay i.
POLYNOMIALS = {
    3: (0o13, 0o04),
    4: (0o23, 0o04),
    5: (0o45, 0o10),
    6: (0o103, 0o24),
    7: (0o235, 0o126),
    8: (0o515, 0o362),
}
LARGEST = 63  # of a table: two products of it + 64 with int8 stay within int16
# The lower half of each table: levels fitted to 32,768 draws of a normal distribution, paths and
# means of what takes a level in turn, thirty times, then rounded.
_LOWER = {
    1: (-63, -12),
    2: (-63, -36, -19, -6),
    3: (-63, -46, -35, -26, -19, -13, -8, -3),
    4: (-63, -52, -45, -40, -35, -31, -28, -25, -22, -19, -16, -13, -10, -7, -4, -1),
}
# What a value of 1 stands for where weights have unit variance.
UNIT = {1: 1.224 / 63, 2: 1.886 / 63, 3: 2.582 / 63, 4: 3.385 / 63}


def table(bits: int) -> Tensor:
    """Give the levels of a code by index, ``(2^(bits + 1),)``, int8, rising and odd-symmetric.

    Raises:
        ValueError: `bits` is not 1 to 4.
    """
    _check(bits)
    lower = _LOWER[bits]
    return torch.tensor([*lower, *(-v for v in reversed(lower))], dtype=torch.int8, device="cpu")


def pack(index: Tensor, u: Tensor, bits: int) -> Tensor:
    """Pack the codes of a matrix.

    Args:
        index: Indices of levels, ``(rows, cols)``, uint8, below ``2^(bits + 1)``.
        u: The bits that choose the path, ``(rows, cols)``, uint8, 0 or 1.
        bits: Of a weight, 1 to 4.

    Returns:
        ``(ceil(rows / 64), ceil(cols / 8), bits, 64)``, uint8.

    Raises:
        ValueError: `bits` is not 1 to 4, or an index is not what its sequence of u allows.
    """
    _check(bits)
    if not torch.equal(index & 3, _subsets(u, NU)):
        raise ValueError("[trellis] index: want one whose lowest two bits follow from u.")
    codes = torch.zeros(*_tiles(index), bits, 64, dtype=torch.uint8, device=index.device)
    steps, raw = _in_lanes(u), _in_lanes(index >> 2)
    for s in range(PLACES):
        codes[:, :, 0] |= steps[s] << s
        if bits == 2:
            codes[:, :, 1] |= raw[s] << PLACE[s]
        if bits >= 3:
            codes[:, :, 1 + s // 4] |= (raw[s] & 3) << 2 * (s % 4)
        if bits == 4:
            codes[:, :, 3] |= raw[s] >> 2 << s
    return codes


def indices(codes: Tensor, rows: int, cols: int) -> Tensor:
    """Give the indices of levels that codes stand for, ``(rows, cols)``, uint8.

    Args:
        codes: As `pack` gives them; their third axis says how many bits a weight has.
        rows: Of the matrix.
        cols: Of the matrix.

    Raises:
        ValueError: The codes are not those of a matrix of that size.
    """
    tiles = (-(-rows // TILE_ROWS), -(-cols // TILE_COLS))
    bits = codes.shape[2] if codes.dim() == 4 else 0
    if codes.dtype != torch.uint8 or codes.shape != (*tiles, bits, 64) or bits not in BITS:
        raise ValueError(
            f"[trellis] codes of {codes.dtype} {tuple(codes.shape)}: want uint8 "
            f"{(*tiles, 'bits', 64)} for {rows} rows of {cols}, bits 1 to 4."
        )
    u = _in_rows([codes[:, :, 0] >> s & 1 for s in range(PLACES)])
    index = _subsets(u, NU)
    if bits == 2:
        index |= _in_rows([codes[:, :, 1] >> PLACE[s] & 1 for s in range(PLACES)]) << 2
    if bits >= 3:
        index |= _in_rows([codes[:, :, 1 + s // 4] >> 2 * (s % 4) & 3 for s in range(PLACES)]) << 2
    if bits == 4:
        index |= _in_rows([codes[:, :, 3] >> s & 1 for s in range(PLACES)]) << 4
    return index[:rows, :cols].contiguous()


def values(codes: Tensor, rows: int, cols: int) -> Tensor:
    """Give the values that codes stand for, ``(rows, cols)``, int8, in steps of their rows."""
    index = indices(codes, rows, cols)
    return table(codes.shape[2]).to(codes.device)[index.int()]


def encode(
    target: Tensor, levels: Tensor, *, weight: Tensor | None = None, nu: int = NU
) -> tuple[Tensor, Tensor]:
    """Choose the path of least squared error for every sequence of a column, by Viterbi.

    The specification, in float64; ties go to the state whose oldest bit is 0, the lower index and
    the lower state.

    Args:
        target: ``(rows,)``, floating.
        levels: ``(2^(bits + 1),)``.
        weight: What the squared error of a row counts, ``(rows,)``; None is 1.
        nu: Memory of the code, 3 to 8.

    Returns:
        Indices of levels and the bits u, both ``(rows,)``, uint8.

    Raises:
        ValueError: `nu` has no polynomials.
    """
    if nu not in POLYNOMIALS:
        raise ValueError(f"[trellis] nu = {nu}: want 3 to 8.")
    rows, states = len(target), 1 << nu
    padding = -rows % LANES
    x = torch.nn.functional.pad(target.double(), (0, padding)).reshape(-1, LANES)
    w = torch.ones_like(target) if weight is None else weight
    w = torch.nn.functional.pad(w.double(), (0, padding)).reshape(-1, LANES)
    window = torch.arange(2 * states)
    subset = 2 * _parity(window & POLYNOMIALS[nu][0]) + _parity(window & POLYNOMIALS[nu][1])
    to = torch.arange(states)
    before = torch.stack([to >> 1, to >> 1 | states >> 1])  # (2, states)
    taken = subset[before << 1 | to & 1]
    cost = torch.full((states, LANES), torch.inf, dtype=torch.float64)
    cost[0] = 0
    came, best = [], []
    for t in range(len(x)):
        error = (x[t][None] - levels.double()[:, None]).square() * w[t]  # (levels, lanes)
        least, place = error.reshape(-1, 4, LANES).min(0)
        both = cost[before] + least[taken]  # (2, states, lanes)
        older = both[1] < both[0]
        cost = torch.where(older, both[1], both[0])
        came.append(older)
        best.append(place * 4 + torch.arange(4)[:, None])
    index, u = torch.zeros_like(x, dtype=torch.uint8), torch.zeros_like(x, dtype=torch.uint8)
    state, lane = cost.argmin(0), torch.arange(LANES)
    for t in reversed(range(len(x))):
        older = came[t][state, lane].long()
        index[t] = best[t][taken[older, state], lane].to(torch.uint8)
        u[t] = (state & 1).to(torch.uint8)
        state = before[older, state]
    return index.reshape(-1)[:rows], u.reshape(-1)[:rows]


def _check(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"[trellis] bits = {bits}: want 1 to 4.")


def _parity(x: Tensor) -> Tensor:
    for shift in (8, 4, 2, 1):
        x = x ^ x >> shift
    return x & 1


def _subsets(u: Tensor, nu: int) -> Tensor:
    """Which of the four subsets of levels each weight takes from, by u ``(rows, cols)``."""
    subset = torch.zeros_like(u)
    for delay in range(nu + 1):
        step = LANES * delay
        past = torch.zeros_like(u)
        if step < len(u):
            past[step:] = u[: len(u) - step]
        h0, h1 = (polynomial >> delay & 1 for polynomial in POLYNOMIALS[nu])
        subset ^= past * (2 * h0 + h1)
    return subset


def _tiles(index: Tensor) -> tuple[int, int]:
    return -(-index.shape[0] // TILE_ROWS), -(-index.shape[1] // TILE_COLS)


def _in_lanes(x: Tensor) -> Tensor:
    """From ``(rows, cols)`` to ``(places, row tiles, column tiles, 64)``, padded with zeros."""
    (down, across), (rows, cols) = _tiles(x), x.shape
    padded = torch.nn.functional.pad(x, (0, across * TILE_COLS - cols, 0, down * TILE_ROWS - rows))
    parts = padded.reshape(down, STEPS, LANES, across, 2, TILE_COLS // 2)
    return parts.permute(4, 1, 0, 3, 2, 5).reshape(PLACES, down, across, LANES * TILE_COLS // 2)


def _in_rows(steps: list[Tensor]) -> Tensor:
    """From eight places ``(row tiles, column tiles, 64)`` to ``(rows, cols)`` with padding."""
    parts = torch.stack(steps)
    _, down, across, _ = parts.shape
    parts = parts.reshape(2, STEPS, down, across, LANES, TILE_COLS // 2).permute(2, 1, 4, 3, 0, 5)
    return parts.reshape(down * TILE_ROWS, across * TILE_COLS)
