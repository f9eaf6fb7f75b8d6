"""How should few-bit weights be stored? Compare codes at equal bytes read and equal bytes stored.

    python bench/studies/storage.py MODEL --data DATA --json storage-demo.json

Every way of storing the weights is run by the rule it is stored for (`csfast.mixed`), at several
numbers of bits read for a weight, scales, norms and indices counted; plain and calibrated
quantisation, and the 16-bit weights beside a sensing copy, are there to be compared with. Codes,
thresholds and the meeting of the bytes are fitted to one half of DATA, losses are of the other.
An interrupted run goes on from the file beside the result. `csfast report --storage` draws it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from csfast import documents, models
from csfast.bench import head
from csfast.files import write_atomic
from csfast.judge.ablate import ablate
from csfast.judge.rules import mixed
from csfast.types import LayerShape

BITS = (2.6, 3.0, 3.35, 3.6, 4.1, 5.0)  # read for a weight, on average
# Widths of base and refinement; then what the way of coding is worth, at the widths chosen.
WIDTHS = ("2+2", "2+3", "3+2", "3+3", "2+4", "3+4", "2+6", "3+5", "4+4")
NESTED = tuple(f"mixed-{widths}" for widths in WIDTHS)
WITHOUT = (
    *("mixed-3+3-g32", "mixed-3+3-g128", "mixed-3+3-g256"),
    *("mixed-3+3-plain", "mixed-3+3-cell", "mixed-3+3-usage", "drop-3+3", "mixed-2+4-plain"),
)
# A second code that does not refine the first: base and full side by side.
INDEPENDENT = ("mixed-2/4", "mixed-2/5", "mixed-3/5", "mixed-3/6", "mixed-4/8")
# A sensing copy that is not executed, beside plain codes of the weights or the weights themselves.
COPY = ("drop-2/4", "drop-3/4", "drop-2/6", "drop-2/16", "drop-3/16")
PLAIN = tuple(f"{kind}-int{bits}" for kind in ("rtn", "gptq") for bits in (2, 3, 4, 8))
KINDS = {
    "nested": NESTED,
    "nested, varied": WITHOUT,
    "independent": INDEPENDENT,
    "sensing copy": COPY,
    "plain": PLAIN,
}


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="demo, or a folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of valid.jsonl.xz")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--bits", type=float, nargs="+", default=list(BITS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tokens", type=int, default=6000, help="scored tokens of every task")
    parser.add_argument("--limit", type=int, help="documents of every task, for a trial")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", help="what the record says it was made from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.time()
    found = documents.read(args.data / "valid.jsonl.xz")
    select, report = (documents.split(found, part) for part in ("select", "report"))
    if args.limit:
        select, report = documents.few(select, args.limit), documents.few(report, args.limit)
    folder = models.demo_folder() if args.model == "demo" else args.model
    model, tokenizer = models.load(folder, dtype="float32", device=args.device)
    kind_of = {method: kind for kind in args.kinds for method in KINDS[kind]}
    with Progress(transient=True) as bar:
        task = bar.add_task("storage")
        table = ablate(
            model,
            tokenizer,
            select,
            report,
            methods=tuple(kind_of),
            bytes_fractions=[bits / 16 for bits in args.bits],
            tokens=args.tokens,
            seed=args.seed,
            resume=args.json.with_name(f"{args.json.name}.partial"),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    shapes = [ffn.shape for ffn in models.find_ffns(model)]
    rows = [
        {
            "name": row["method"],
            "kind": kind_of[row["method"]],
            "bits_read": 16 * row["bytes_fraction"],
            "bits_stored": stored_bits(row, shapes),
            **{key: row[key] for key in ("target", "density", "delta", "ci95", "per_task")},
            "select_delta": row["select_delta"],
        }
        for row in table["rows"]
    ]
    # Without the folders of one machine: only the names of files.
    command = ["storage.py", *(Path(word).name for word in sys.argv[1:])]
    record: dict[str, Any] = {
        **head.of(torch.device(args.device), command=command, commit=args.commit),
        "seconds": round(time.time() - start, 1),
        "notes": table["notes"],
        **{key: table[key] for key in ("dense", "documents", "tokens", "model_hash", "seed")},
        "rows": rows,
    }
    write_atomic(args.json, head.text_of(record).encode())
    for row in sorted(rows, key=lambda row: (row["name"], row["bits_read"])):
        print(
            f"{row['name']:18} {row['bits_read']:5.2f} read {row['bits_stored']:5.2f} stored "
            f"{row['delta']:+.4f} [{row['ci95'][0]:+.4f}, {row['ci95'][1]:+.4f}]"
        )


def stored_bits(row: dict[str, Any], shapes: Sequence[LayerShape]) -> float:
    """Bits that a method stores for a weight, everything counted."""
    storage = mixed.Storage.parse(row["method"])
    if storage is None:  # plain codes are read whole
        return 16.0 * float(row["bytes_fraction"])
    n_bytes = sum(mixed.stored_bytes(storage, shape) for shape in shapes)
    return 8 * n_bytes / sum(3 * shape.n_neurons * shape.d for shape in shapes)


if __name__ == "__main__":
    main()
