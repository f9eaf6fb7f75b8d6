"""Tokens a second through `generate` of transformers, dense beside csfast, and what csfast costs.

    python bench/generate.py MODEL|SHAPE --json FILE [--plan PLAN] [--density D] [--bits B]
        [--device cpu|cuda] [--new N] [--rounds N] [--compiled] [--threads N] [--commit HASH]

MODEL is what `csfast generate` takes. SHAPE is 8b, 1b or .5b: a Llama of that size with random
weights, which reads as many bytes as a trained one; its plan is made here, without feedback, from
random tokens, and the time that takes is that of a calibration of its size. One request, greedy,
decoded to the last token, in turns: dense (`csfast.dense`), csfast, dense, csfast. `--compiled`
asks `generate` for a static cache, whose decoding step it compiles. The prompt is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import statistics
import tempfile
from typing import Any

import torch
import transformers

import csfast
from csfast import models
from csfast.bench import head, timing
from csfast.files import write_atomic

PROMPT = 128  # tokens
# d, neurons, layers, heads, heads of keys and values, vocabulary, whether embeddings are shared
SHAPES = {
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
    "1b": (2048, 8192, 16, 32, 8, 128256, True),
    ".5b": (896, 4864, 24, 14, 2, 151936, True),
}


def random_model(shape: str, device: torch.device) -> Any:
    """Give a Llama of random weights, bfloat16, made where it runs."""
    d, n_neurons, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    config = transformers.LlamaConfig(
        hidden_size=d,
        intermediate_size=n_neurons,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        eos_token_id=None,
        pad_token_id=0,
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def decoded(model: Any, ids: torch.Tensor, n_new: int, options: dict[str, Any]) -> float:
    """Give the seconds of `n_new` tokens after the prompt: of that many and one, less one."""
    seconds = []
    for n in (1, n_new + 1):
        clock = timing.Clock()
        out = model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, **options)
        out.cpu()  # waits
        if out.shape[1] != ids.shape[1] + n:
            raise RuntimeError(f"[generate] {out.shape[1] - ids.shape[1]} new tokens: want {n}.")
        seconds.append(clock.seconds())
    return seconds[1] - seconds[0]


def row_of(name: str, seconds: list[float], n_new: int) -> dict[str, Any]:
    """Give a row of the results."""
    rates = sorted(n_new / s for s in seconds)
    return {
        "case": name,
        "tokens_per_second": statistics.median(rates),
        "slowest": rates[0],
        "fastest": rates[-1],
    }


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--plan", type=pathlib.Path)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=pathlib.Path, required=True)
    parser.add_argument("--commit")
    given = parser.parse_args()
    device = torch.device(given.device)
    torch.set_num_threads(given.threads)

    costs: dict[str, Any] = {}
    if given.model in SHAPES:
        model = random_model(given.model, device)
        draw = torch.Generator().manual_seed(0)
        size = model.config.vocab_size
        texts = [torch.randint(0, size, (1, 1024), generator=draw) for _ in range(8)]
        clock = timing.Clock()
        plan = csfast.calibrate(model, texts, bits=(given.bits,), feedback=False)
        costs["calibrate_seconds"] = clock.seconds()
    else:
        model, _ = models.load(given.model, device=given.device, dtype="bfloat16")
        if given.plan is None:
            parser.error("a MODEL wants --plan")
        plan = csfast.Plan.load(given.plan)
    ids = torch.randint(
        3, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(1)
    ).to(device)
    options = {"cache_implementation": "static"} if given.compiled else {"disable_compile": True}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "plan"
        plan.save(path)
        costs["plan_bytes"] = path.stat().st_size
    clock = timing.Clock()
    applied = csfast.apply(model, plan, density=given.density, bits=given.bits)
    costs |= {"apply_seconds": clock.seconds(), "apply_bytes": applied.n_bytes}
    seconds: dict[str, list[float]] = {"dense": [], "csfast": []}
    for turn in range(given.rounds + 1):  # the first warms up
        for name, found in seconds.items():
            with csfast.dense(model) if name == "dense" else contextlib.nullcontext():
                if given.compiled:
                    # What generate compiled of the other one asks other things.
                    torch.compiler.reset()
                    decoded(model, ids, given.new, options)
                took = decoded(model, ids, given.new, options)
            if turn:
                found.append(took)
    counted = csfast.stats(model)  # of compiled steps nothing is
    costs["density"] = counted.density if any(counted.tokens) else None
    rows = [row_of(name, found, given.new) for name, found in seconds.items()]
    ratio = rows[1]["tokens_per_second"] / rows[0]["tokens_per_second"]
    command = ["python", "bench/generate.py", given.model]
    command += [f"--density={given.density:g}", f"--bits={given.bits}", f"--device={given.device}"]
    command += ["--compiled"] if given.compiled else []
    document = head.of(device, command=command, commit=given.commit)
    document |= {"about": f"generate {given.model}", "ratio": ratio, "costs": costs, "rows": rows}
    write_atomic(given.json, head.text_of(document).encode())
    for row in rows:
        print(f"{row['case']:>7}: {row['tokens_per_second']:.1f} tokens/s")
    print(f"  ratio: {ratio:.2f}; {costs}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
