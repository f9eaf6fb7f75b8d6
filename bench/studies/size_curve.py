"""Does what csfast saves grow with the model? Train three sizes at three lengths, and measure.

    python bench/studies/size_curve.py train --data DATA --out RUNS --size 120m --lengths 20 60 180
    python bench/studies/size_curve.py measure --data DATA --runs RUNS --json size-curve.json

`train` needs one GPU and writes RUNS/<size>-<tokens>m for every length, in bfloat16 as transformers
reads it. All sizes share the tokenizer and the recipe of the demo model (`train_demo.py`): one run
at the full learning rate, from which each length branches off to fall to zero over its last
quarter, so that every length is a finished model and no token is trained on twice for two of them.
`measure` compares rules at densities, and plain quantisation, on text that nothing was chosen on,
for the models in RUNS that are there; an interrupted one goes on from the file beside the result.
DATA is as `train_demo.py` wants it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import demo_data
import train_demo

# Widths like those of the demo model: heads of 64 channels, three neurons a channel, one key and
# value head for three to five of the query.
NOT_KEPT = ("density_per_layer", "density_per_task", "density_per_task_layer", "per_task_ci95")
SIZES: dict[str, dict[str, int]] = {
    "17m": {"d": 384, "layers": 8, "heads": 6, "groups": 2},
    "60m": {"d": 640, "layers": 12, "heads": 10, "groups": 2},
    "120m": {"d": 768, "layers": 16, "heads": 12, "groups": 4},
}
DECAY = 0.25  # of a length: the part over which the learning rate falls to zero
DENSITIES = (0.1, 0.25, 0.5)
VALID = "valid.jsonl.xz"  # text to fit rules to, and to report on
METHODS = (
    *("oracle-neuron", "planes-b2", "planes-b3", "teal"),
    *("rtn-int4", "rtn-int3", "gptq-int4", "gptq-int3"),
)


def config_of(size: str) -> dict[str, Any]:
    """The configuration of one size, as transformers writes it."""
    sizes = SIZES[size]
    return {
        **train_demo.CONFIG,
        "hidden_size": sizes["d"],
        "intermediate_size": 3 * sizes["d"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["groups"],
    }


def train(args: argparse.Namespace) -> None:
    """Train one size and export it at every length."""
    start = time.time()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    log = (out / f"{args.size}.jsonl").open("a")

    def say(**entry: Any) -> None:
        line = json.dumps({"size": args.size, "seconds": round(time.time() - start, 1), **entry})
        log.write(line + "\n")
        log.flush()
        print(line, flush=True)

    device = torch.device("cuda" if torch.cuda.device_count() else "cpu")
    batches = train_demo.Batches(args, device)  # forks before anything touches the GPU
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    batches.place(args.seed)
    config = config_of(args.size)
    run = Run(config, batches, device, peak=args.peak)
    say(parameters=sum(w.numel() for w in run.model.parameters()), config=config)
    lengths = [round(length * 1e6) for length in args.lengths]
    for number, length in enumerate(lengths):
        for step in run.hold(int(length * (1 - DECAY))):
            if step in (5, 20) or step % 200 == 0:
                say(step=step, seen=run.seen, loss=round(run.loss(), 4), speed=round(run.speed()))
            left = args.until - (time.time() - start) if args.until else float("inf")
            if number == len(lengths) - 1 and run.tail_seconds(length) > left:
                break  # no time for more: what is left is for the decay
        reached = min(length, max(round(run.seen / (1 - DECAY)), run.seen))
        state = run.state()
        for _ in run.fall(reached):
            pass
        folder = out / f"{args.size}-{length / 1e6:g}m"
        folder.mkdir(exist_ok=True)
        train_demo.export(run.model, folder)
        (folder / "training.json").write_text(
            json.dumps({"size": args.size, "asked": length, "tokens": run.seen, **run.about()})
        )
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((train_demo.HERE / name).read_bytes())
        say(exported=folder.name, seen=run.seen, loss=round(run.loss(), 4))
        run.restore(state)
    batches.close()


class Run:
    """A model in training: steps at the full rate, and branches that fall to zero."""

    def __init__(
        self,
        config: dict[str, Any],
        batches: train_demo.Batches,
        device: torch.device,
        *,
        peak: float,
    ) -> None:
        self.batches, self.device, self.peak = batches, device, peak
        self.model = train_demo.Llama(config).to(device)
        named = list(self.model.named_parameters())
        self.muon = train_demo.Muon([w for n, w in named if w.dim() == 2 and "embed" not in n])
        rest = [w for n, w in named if w.dim() != 2 or "embed" in n]
        cuda = device.type == "cuda"
        self.adam = torch.optim.AdamW(
            rest, lr=train_demo.LR_REST, betas=(0.9, 0.95), weight_decay=0.0, fused=cuda
        )
        loss = train_demo.weighted_loss
        self.loss_of = torch.compile(loss, dynamic=False) if cuda else loss
        self.step = self.seen = 0
        self.marks: list[Any] = []
        self.last = torch.zeros((), device=device)
        self.begun = (0.0, 0)  # time and tokens when the speed became steady

    def hold(self, until: int) -> Iterator[int]:
        """Step at the full rate until so many tokens were seen."""
        while self.seen < until:
            self._step(min(1.0, (self.step + 1) / train_demo.WARM_STEPS))
            yield self.step

    def fall(self, until: int) -> Iterator[int]:
        """Step while the rate falls to zero at so many tokens."""
        first, span = self.seen, max(until - self.seen, 1)
        while self.seen < until:
            self._step(max(0.0, 1 - (self.seen - first) / span))
            yield self.step

    def speed(self) -> float:
        """Tokens per second since the tenth step."""
        return (self.seen - self.begun[1]) / max(time.time() - self.begun[0], 1e-3)

    def tail_seconds(self, length: int) -> float:
        """What the decay that would begin now takes, and a little for the export."""
        if self.step < 30:
            return 0.0
        return self.seen * DECAY / (1 - DECAY) / self.speed() + 5

    def loss(self) -> float:
        """Of the last step, nats per weighted token."""
        return float(self.last)

    def about(self) -> dict[str, Any]:
        """What a record needs."""
        return {
            "parameters": sum(w.numel() for w in self.model.parameters()),
            "tokens_per_second": round(self.speed()),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
        }

    def state(self) -> dict[str, Any]:
        """Everything that a step changes."""
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "adam": self.adam.state_dict(),
                "muon": self.muon.momentum,
                "at": (self.step, self.seen),
            }
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to what `state` gave."""
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        for kept, held in zip(self.muon.momentum, state["muon"], strict=True):
            kept.copy_(held)
        passed = self.seen - state["at"][1]
        self.step, self.seen = state["at"]
        self.begun = (self.begun[0], self.begun[1] - passed)

    def _step(self, rate: float) -> None:
        self.batches.progress.value = min(1.0, self.seen / 1e8)
        ids, weight = self.batches.next()
        loss = self.loss_of(self.model, ids, weight)
        loss.backward()
        for group in self.adam.param_groups:
            group["lr"] = train_demo.LR_REST * self.peak * rate
        self.muon.step(train_demo.LR_MATRIX * self.peak * rate)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        self.last = loss.detach()
        self.step += 1
        self.seen += ids.shape[0] * demo_data.CONTEXT
        if self.device.type == "cuda":  # stay at most two steps ahead of the device
            mark = torch.cuda.Event()
            mark.record()
            self.marks.append(mark)
            if len(self.marks) > 2:
                self.marks.pop(0).synchronize()
        if self.step == 10:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.begun = (time.time(), self.seen)


def measure(args: argparse.Namespace) -> None:
    """Compare rules on every model that is there."""
    from csfast import documents, models
    from csfast.bench import head
    from csfast.files import write_atomic
    from csfast.judge.ablate import ablate

    start = time.time()
    found = documents.read(args.data / VALID)
    select, report = (documents.split(found, part) for part in ("select", "report"))
    rows: list[dict[str, Any]] = []
    folders = sorted(
        (f for f in args.runs.iterdir() if (f / "training.json").exists()),
        key=lambda f: (list(SIZES).index(f.name.split("-")[0]), float(f.name.split("-")[1][:-1])),
    )
    chosen = [f for f in folders if not args.only or f.name in args.only]
    if not chosen:
        raise SystemExit(f"size_curve: no models in {args.runs.name}: train some first.")
    # Without the folders of one machine: only the names of files.
    command = ["size_curve.py", *(Path(word).name for word in sys.argv[1:])]
    result: dict[str, Any] = {
        **head.of(torch.device(args.device), command=command),
        "seed": args.seed,
        "tokens": args.tokens,
        "models": [],
        "rows": rows,
    }
    partial = args.json.with_name(f"{args.json.name}.partial")
    if partial.exists():  # an interrupted run goes on with the models that it lacks
        before = json.loads(partial.read_text())
        if (before["seed"], before["tokens"]) == (args.seed, args.tokens):
            result["models"] += before["models"]
            rows += before["rows"]
    known = [(model["size"], model["asked"]) for model in result["models"]]
    for folder in chosen:
        about = json.loads((folder / "training.json").read_text())
        if (about["size"], about["asked"]) in known:
            continue
        model, tokenizer = models.load(folder, dtype="float32", device=args.device)
        d = model.config.hidden_size
        names = {f"lowrank-{d // part}": f"lowrank-d/{part}" for part in (8, 4)}
        table = ablate(
            model,
            tokenizer,
            select,
            report,
            methods=(*METHODS, *names),
            densities=args.densities,
            tokens=args.tokens,
            seed=args.seed,
        )
        result["models"].append({**about, "dense": table["dense"], "documents": table["documents"]})
        rows += [
            {
                **{key: row[key] for key in row if key not in NOT_KEPT},
                # A rank is told by its share of the width, which is what models have in common.
                "method": names.get(row["method"], row["method"]),
                "size": about["size"],
                "params": about["parameters"],
                "tokens": about["tokens"],
                "density": row.get("target_density"),
                "density_met": row["density"],
            }
            for row in table["rows"]
        ]
        result["seconds"] = round(time.time() - start, 1)
        write_atomic(partial, head.text_of(result).encode())
        print(folder.name, table["dense"], result["seconds"], flush=True)
    partial.replace(args.json)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("train", help="train one size at every length")
    verb.add_argument("--data", type=Path, required=True, help="folder of the text")
    verb.add_argument("--out", type=Path, required=True, help="folder of the models")
    verb.add_argument("--size", choices=SIZES, required=True)
    verb.add_argument("--lengths", type=float, nargs="+", required=True, help="10^6 tokens")
    verb.add_argument(
        "--until", type=float, help="seconds after which the last length is cut short"
    )
    verb.add_argument("--rows", type=int, default=32, help="rows of a batch")
    verb.add_argument("--peak", type=float, default=1.0, help="factor on learning rates")
    verb.add_argument("--most", type=int, help="documents of each task, for a dry run")
    verb.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2 - 1))
    verb = verbs.add_parser("measure", help="compare rules on the models")
    verb.add_argument("--data", type=Path, required=True, help="folder of the text")
    verb.add_argument("--runs", type=Path, required=True, help="folder of the models")
    verb.add_argument("--only", nargs="+", help="names of models")
    verb.add_argument("--json", type=Path, required=True)
    verb.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    verb.add_argument("--tokens", type=int, default=6000, help="scored tokens of every task")
    verb.add_argument("--device", default="cuda")
    for verb in verbs.choices.values():
        verb.add_argument("--seed", type=int, default=0)
    found = parser.parse_args(given)
    found.resume = None
    return found


if __name__ == "__main__":
    arguments_given = arguments()
    {"train": train, "measure": measure}[arguments_given.verb](arguments_given)
