"""Host time of one call, in microseconds: a bound layer, with inputs that move, and `ops.ffn`.

    python bench/host.py [--device cpu|cuda] [--rounds N]

What a call costs before the device has done anything: at (896, 4864), one row, by default on the
CPU at a size whose work is next to nothing. Calls are made in runs of 100 that end before a queue
is full; medians over runs. `moved` gives every call another input and output, as decoding does.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from csfast import ops
from csfast.bench import cases, timing
from csfast.layer import Decision, Layer, Sensor, Weights
from csfast.session import Session

CALLS = 100  # of one run: at three kernels each they fit into a queue of 1,024


def microseconds(call: Callable[[int], object], rounds: int, device: torch.device) -> float:
    """Give the median time of a call over runs of `CALLS`."""
    found = []
    for turn in range(rounds + 3):  # the first warm up
        if device.type == "cuda":
            torch.cuda.synchronize()
        clock = timing.Clock()
        for i in range(CALLS):
            call(i)
        if turn >= 3:
            found.append(clock.seconds() / CALLS * 1e6)
    return statistics.median(found)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    device = torch.device(given.device)
    sizes = (896, 4864) if device.type == "cuda" else (64, 48)
    p = cases.Case("host", 1, *sizes).make(torch.bfloat16, given.device, bits=2)
    threshold = torch.full((16,), 0.7, device=device)
    sensor, weights = Sensor(p.codes, p.equal, p.row_scale, p.bits), Weights(p.gate, p.up, p.down_t)
    session = Session(device)
    number = session.bind(Layer(sensor, weights, Decision(threshold)), max_batch=16)
    eager = Layer(sensor, weights, Decision(threshold[:1]))
    out = torch.empty_like(p.x)
    xs = [p.x.clone() for _ in range(CALLS)]
    outs = [torch.empty_like(p.x) for _ in range(CALLS)]
    calls: dict[str, Callable[[int], object]] = {
        "bound": lambda i: session.ffn(number, p.x, out),
        "moved": lambda i: session.ffn(number, xs[i], outs[i]),
        "ops.ffn": lambda i: ops.ffn(eager, p.x),
    }
    for name, call in calls.items():
        print(f"{name:>8}: {microseconds(call, given.rounds, device):.2f} us")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
