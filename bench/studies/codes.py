"""Which few-bit code of a whole model loses least? A race on a pretrained model, in one table.

    python bench/studies/codes.py MODEL DATA --device cuda --json codes-smollm2.json
    python bench/studies/codes.py MODEL DATA --list

Every row replaces weights of the model and reads the dense model's own greedy continuations of
prompts from one half of DATA; codes are fitted to texts of the other. A row is written as soon as
it is there, and rows that are there are not run again. Everything is float32.

Bits are of all linear maps but the head, with steps, permutations, column scales and the 16 bits of
every norm; those of the head stand apart. The rotated GPTQ rows are the opponent: random orthogonal
inputs, groups of 64 with a searched step of 16 bits, damped by .01. Rotations that follow from a
seed cost nothing. Rules that follow the token count what they read as if rows and columns could be
read one by one, and the estimate of the rule by layer is the error itself: both favour them. The
points of the E8 lattice within a ball are counted, and the ball is the largest that its bits name;
above 2 bits no table of them fits a machine. Continuations are held on the device: of 175 prompts
3.3 GB for 49,152 words, 17.6 GB for 262,144; on a CPU in half of that, as float16.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from code_kinds import Made
from code_rows import (
    HEADS,
    by_channel,
    by_layer,
    by_neuron,
    gptq,
    head_again,
    head_ours,
    head_rounded,
    head_scalar,
    lattice,
    mix,
    on,
    ours,
    refitted,
    scalar,
    varied,
)
from code_study import Row, Study, say
from csfast import models
from csfast.bench import head as record_head
from csfast.calibration import sketching
from csfast.calibration.passes import undisturbed
from csfast.files import write_atomic

DEMANDED = 0.85  # of the best uniform code's divergence, for a rule that follows the token
WIDTHS = ((2.6, "read"), (3.3, "read"), (4.3, "read"), (6.6, "stored"))


def table() -> list[Row]:
    """Give all rows, those that must be there first."""
    rows: list[Row] = []

    def add(kind: str, seconds: float, name: str, make: Callable[[Study], Made]) -> None:
        rows.append(Row(name, kind, make, seconds))

    add("reference", 1, "dense", lambda study: Made({}, {}, {}))
    for n in (3, 4, 2, 5, 6):
        add("rotated GPTQ", 3, f"rotated GPTQ {n}", gptq(n, turn="full"))
    for n in (3, 4):
        name = f"rotated GPTQ ffn 2 attention {n}"
        add("rotated GPTQ", 3, name, gptq(2, turn="full", attention=n))
    add("two levels", 4, "rotated GPTQ 3+3", gptq(3, 3, turn="full"))
    for levels in ((3, 3), (2, 2), (4, 1), (2, 4), (2, 1)):  # whose first levels follow
        add("two levels", 10, f"trellis {'+'.join(map(str, levels))}", ours(*levels))
    for n in (3, 2, 4, 1):
        add("trellis", 4, f"trellis {n}", ours(n))
    for average in (2.53, 3.25, 4.25):
        add("mix", 6, f"mix {average}", mix(average))
    for n in (2, 3, 4):
        add("scalar", 3, f"scalar {n}", scalar(n))
        add("scalar", 3, f"scalar {n} groups", scalar(n, grouped=True))
    add("two levels", 5, "scalar 3+3", scalar(3, 3))
    for n in (2, 3, 4):
        add("lattice", 8, f"E8 {n}", lattice(n))
    for n in (2, 3, 4):
        add("GPTQ", 3, f"GPTQ {n}", gptq(n))
        add("rounding", 2, f"round to nearest {n}", gptq(n, fed=False))
    for name, turn in (
        ("not rotated", "none"),
        ("not dealt", "block"),
        ("full rotation", "full"),
        ("columns as they are", "unscaled"),
    ):
        add("rotation", 7, f"trellis 3 {name}", varied(3, turn=turn))
    for n in (3, 4):
        name = f"rotated GPTQ {n} in blocks, columns scaled"
        add("rotation", 3, name, gptq(n, turn="dealt", folded=True))
    add("refit", 4, "trellis 3 one pass", varied(3, passes=1))
    add("refit", 8, "trellis 3 three passes", varied(3, passes=3))
    add("refit", 6, "trellis 3 fitted to weights", varied(3, by_outputs=False))
    for what in (("scales",), ("norms",), ("norms", "scales")):
        add("refit", 6, f"trellis 3 {' '.join(what)} refitted", refitted(3, what=what))
    for bits, nu in ((3, 4), (3, 6), (2, 4)):
        add("second trellis", 5, f"trellis {bits} memory {nu}", varied(bits, nu=nu))
    heads: dict[str, Callable[[Study], Made]] = {
        **{f"head scalar {n}": head_scalar(n) for n in (4, 6, 3, 5, 7, 8)},
        **{f"head trellis {a}+{b}": head_ours(a, b) for a, b in HEADS},
        **{f"head trellis {n}": head_ours(n) for n in (4, 3)},
        "head round to nearest 4": head_rounded(4),
    }
    for levels in HEADS:
        for best in (64, 256):
            name = f"head trellis {'+'.join(map(str, levels))} best {best}"
            heads[name] = head_again(*levels, best=best, exact=False)
    for n in (3, 4):
        for best in (64, 256):
            heads[f"head trellis {n} best {best} exact"] = head_again(n, best=best, exact=True)
    for name, make in heads.items():
        add("head", 3, name, make)
        add("head on trellis 3", 2, f"{name} on trellis 3", on(ours(3), make))
    for base, more, share, skip in (
        *((3, 3, 0.1, 0.0), (3, 3, 0.1, 0.25), (3, 3, 0.25, 0.25), (3, 3, 0.1, 0.5)),
        *((2, 2, 0.25, 0.0), (2, 2, 0.25, 0.25), (2, 4, 0.1, 0.0), (2, 4, 0.25, 0.25)),
    ):
        name = f"neurons {base}+{more} {share}" + (f" skip {skip}" if skip else "")
        add("by neuron", 6, name, by_neuron(base, more, share, skip))
    for base, share, skip in ((3, 0.02, 0.0), (3, 0.02, 0.25)):
        name = f"neurons {base} exact {share}" + (f" skip {skip}" if skip else "")
        add("by neuron", 5, name, by_neuron(base, None, share, skip))
    name = "neurons 3+3 0.1 no feedback in down"
    add("by neuron", 5, name, by_neuron(3, 3, 0.1, fed=False))
    for turn, said in (("dealt", ""), ("none", " not rotated")):
        for base, more, share in ((3, 3, 0.1), (3, 3, 0.25), (2, 2, 0.25), (2, 4, 0.125)):
            name = f"channels {base}+{more} {share}{said}"
            add("by channel", 7, name, by_channel(base, more, share, turn))
        name = f"channels 3 exact 0.02{said}"
        add("by channel", 4, name, by_channel(3, None, 0.02, turn))
        name = f"channels 3+3 0.1 no feedback{said}"
        add("by channel", 7, name, by_channel(3, 3, 0.1, turn, fed=False))
    for base, more, share in ((3, 3, 0.1), (3, 3, 0.25), (2, 2, 0.25)):
        add("by layer", 4, f"layers {base}+{more} {share}", by_layer(base, more, share))
    for average, after in ((2.53, 3), (3.25, 3)):
        add("mix", 12, f"mix {average}+{after}", mix(average, after))
    assert len({row.name for row in rows}) == len(rows)
    return rows


def interpolated(curve: Sequence[tuple[float, float]], bits: float) -> float:
    """Divergence at so many bits: its logarithm on lines between points, the last ones drawn on.

    Args:
        curve: Bits and divergence, at least two of different bits.
        bits: Where.
    """
    points = sorted(curve)
    place = next((i for i in range(1, len(points)) if bits <= points[i][0]), len(points) - 1)
    (b0, k0), (b1, k1) = points[place - 1], points[place]
    share = (bits - b0) / (b1 - b0)
    return math.exp((1 - share) * math.log(k0) + share * math.log(k1))


def frontier(rows: Sequence[Mapping[str, Any]], what: str) -> list[tuple[float, float]]:
    """Bits and divergence of rows that no other beats at as few bits."""
    points: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: (row["bits"][what], row["kl"])):
        if row["kl"] > 0 and (not points or row["kl"] < points[-1][1]):
            points.append((row["bits"][what], row["kl"]))
    return points


def of_kind(rows: Sequence[Mapping[str, Any]], *kinds: str) -> list[Mapping[str, Any]]:
    """Give the rows of some kinds."""
    return [row for row in rows if row["kind"] in kinds]


def summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lay out the table, and what it says of widths, heads and rules."""
    lines = [f"{'':44} {'stored':>6} {'read':>6} {'head':>6} {'KL':>9} {'top-1':>6}"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for row in sorted(rows, key=lambda row: kinds.index(row["kind"])):
        bits = row["bits"]
        lines.append(
            f"{row['name']:44} {bits['stored']:6.2f} {bits['read']:6.2f} {bits['head']:6.2f} "
            f"{row['kl']:9.5f} {row['top1']:6.3f}"
        )
    own = [*of_kind(rows, "trellis", "mix"), *_two_levels(rows, "trellis")]
    for most, what in WIDTHS:
        opponent = [*of_kind(rows, "rotated GPTQ"), *_two_levels(rows, "rotated GPTQ")]
        curve = frontier(opponent, what)
        fits = [row for row in own if row["bits"][what] <= most and row["kl"] > 0]
        if not fits or len(curve) < 2:
            continue
        best = min(fits, key=lambda row: row["kl"])
        there = interpolated(curve, best["bits"][what])
        lines.append(
            f"<= {most} bits {what}: {best['name']} {best['kl']:.5f} at {best['bits'][what]:.3f}, "
            f"rotated GPTQ {there:.5f}: {best['kl'] / there:.3f} of it"
        )
    uniform = frontier([*own, *of_kind(rows, "scalar", "lattice", "rotated GPTQ")], "read")
    for row in of_kind(rows, "by neuron", "by channel", "by layer"):
        if len(uniform) >= 2:
            there = interpolated(uniform, row["bits"]["read"])
            ratio = row["kl"] / there
            lines.append(
                f"{row['name']}: {row['kl']:.5f} at {row['bits']['read']:.3f} bits read, best "
                f"uniform code {there:.5f}: {ratio:.3f} of it, "
                f"{'within' if ratio <= DEMANDED else 'above'} {DEMANDED}"
            )
    alone = {row["name"]: row for row in rows}
    for row in of_kind(rows, "head on trellis 3"):
        if "trellis 3" in alone:
            added = row["kl"] - alone["trellis 3"]["kl"]
            head = row["name"].removesuffix(" on trellis 3")
            also = f", alone {alone[head]['kl']:.5f}" if head in alone else ""
            lines.append(
                f"{head} on trellis 3: {added:+.5f} at {row['bits']['head']:.2f} bits read{also}"
            )
    return lines


def _two_levels(rows: Sequence[Mapping[str, Any]], code: str) -> list[Mapping[str, Any]]:
    return [row for row in of_kind(rows, "two levels") if row["name"].startswith(code)]


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("data", type=Path, help="file of documents, or folder of valid.jsonl.xz")
    parser.add_argument("--json", type=Path, help="the table, to begin or to go on with")
    parser.add_argument("--only", help="names or kinds of rows, divided by commas")
    parser.add_argument("--skip", help="names or kinds of rows to leave out")
    parser.add_argument("--list", action="store_true", help="print names and kinds of rows")
    parser.add_argument("--prompts", type=int, default=35, help="of every task, at most")
    parser.add_argument("--new-tokens", type=int, default=96, help="of every prompt")
    parser.add_argument("--tokens", type=int, default=sketching.TOKENS_MAX, help="to fit to")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", help="what the record says it was made from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    if args.json is None and not args.list:
        parser.error("want --json, or --list.")
    return args


def chosen(args: argparse.Namespace) -> list[Row]:
    """Give the rows that are asked for."""
    rows = table()
    for option in ("only", "skip"):
        words = [word.strip() for word in (getattr(args, option) or "").split(",") if word.strip()]
        known = {row.name for row in rows} | {row.kind for row in rows}
        if odd := [word for word in words if word not in known]:
            raise SystemExit(f"codes: --{option} {odd[0]!r}: want names or kinds of --list.")
        if words:
            rows = [
                row
                for row in rows
                if (row.name in words or row.kind in words) == (option == "only")
            ]
    return rows


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Run what is not in the file yet.

    Returns:
        All rows of the file, and the names of those that failed: a row is no reason to give up the
        others.
    """
    start = time.monotonic()
    wanted = chosen(args)
    kept = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    done: list[dict[str, Any]] = kept.get("rows", [])
    names = {row["name"] for row in done}
    left = [row for row in wanted if row.name not in names]
    failed: list[str] = []
    if not left:
        return done, failed
    with undisturbed():
        study = Study(args)
    settings = {
        "model": Path(args.model).name,
        "model_hash": models.hash_of(study.stacks),
        "documents": len(study.prompts),
        "new_tokens": args.new_tokens,
        "tokens": sum(ids.shape[1] for ids in study.texts),
        "seed": args.seed,
    }
    if kept and {key: kept.get(key) for key in settings} != settings:
        raise SystemExit(
            f"codes: {args.json.name} is of another model, text or settings; want another file."
        )
    # Without the folders of one machine: only the names of files.
    command = ["codes.py", *(Path(word).name for word in sys.argv[1:])]
    about = record_head.of(study.device, command=command, commit=args.commit)
    for number, row in enumerate(left, 1):
        if time.monotonic() - start > args.seconds:
            say(f"{len(left) - number + 1} rows are left.")
            break
        try:
            found = study.run(row)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
            say(f"{row.name}:\n{traceback.format_exc()}")
            failed.append(row.name)
            continue
        done.append(found)
        document = {**about, **settings, "rows": done}
        write_atomic(args.json, record_head.text_of(document).encode())
        say(
            f"{time.monotonic() - start:6.0f} s {number:3}/{len(left)} {row.name:44} "
            f"{found['bits']['read']:6.3f} bits, head {found['bits']['head']:5.2f}: "
            f"KL {found['kl']:.5f} top-1 {found['top1']:.4f}, {found['seconds']:.1f} s"
        )
    return done, failed


def main() -> int:
    """Run the study."""
    args = arguments()
    if args.list:
        for row in chosen(args):
            say(f"{row.name:44} {row.kind:18} {row.seconds:3.0f} s")
        return 0
    done, failed = run(args)
    for line in summary(done):
        say(line)
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
