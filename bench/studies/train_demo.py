"""Train the demo model that ships in the package, and measure it.

    python bench/studies/train_demo.py prepare --data DATA --out python/csfast/demo_model
    python bench/studies/train_demo.py train --data DATA --out RUN --seconds 560
    python bench/studies/train_demo.py evaluate --data DATA --model RUN --out RUN/evaluation.json

`prepare` trains the tokenizer and writes the configuration and the sample file, `train` needs one
GPU and writes `model.safetensors` in bfloat16, `evaluate` reads that back through transformers.
DATA holds `{math,code,prose,instruct}.txt.xz`, `manifest.json` and `valid.jsonl.xz`. The schedule
follows the clock, so the result depends on the machine's speed, not only on the seed.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import lzma
import math
import multiprocessing
import os
import random
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

import demo_data

HERE = Path(__file__).resolve().parents[2] / "python" / "csfast" / "demo_model"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": demo_data.VOCABULARY,
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": demo_data.CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
# Rows of a batch by task. In 1.6 G tokens mathematics is passed over forty times, others twenty.
ROWS = {"retrieval": 26, "math": 26, "code": 22, "prose": 22, "instruct": 32}
ANSWER_WEIGHT = 3.0  # a retrieval row has a tenth of the loss tokens of a row of text
LR_MATRIX, LR_REST = 0.02, 0.003  # the feasibility study's, for Muon and AdamW
DECAY = 0.05  # weight decay of matrices, per unit of learning rate
WARM_STEPS = 60
STABLE = 0.4  # part of the time at full rate; then linearly to zero
BLOCK = 8  # rows that a worker process hands over at once
LENGTHS = (200, 500, 1000, 1900)  # of evaluated retrieval prompts, in tokens


class Attention(nn.Module):
    """Causal attention with rotary positions and shared key and value heads."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        d, head = config["hidden_size"], config["head_dim"]
        self.head = head
        self.q_proj = nn.Linear(d, config["num_attention_heads"] * head, bias=False)
        self.k_proj = nn.Linear(d, config["num_key_value_heads"] * head, bias=False)
        self.v_proj = nn.Linear(d, config["num_key_value_heads"] * head, bias=False)
        self.o_proj = nn.Linear(config["num_attention_heads"] * head, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = (
            project(x).view(rows, length, -1, self.head).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-high, low], -1) * sin.to(x.dtype)


class Norm(nn.Module):
    """Root-mean-square norm in float32, as transformers computes it."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + CONFIG["rms_norm_eps"])
        return self.weight.to(x.dtype) * wide.to(x.dtype)


class Mlp(nn.Module):
    """Gated feed-forward."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        d, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.input_layernorm = Norm(config["hidden_size"])
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config["hidden_size"])
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The model, with the parameter names of transformers less the prefix ``model.``."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = Norm(config["hidden_size"])
        half = torch.arange(0, config["head_dim"], 2).float() / config["head_dim"]
        angles = torch.outer(torch.arange(demo_data.CONTEXT).float(), config["rope_theta"] ** -half)
        angles = torch.cat([angles, angles], -1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        outputs = math.sqrt(2 * config["num_hidden_layers"])  # keeps the residual stream's scale
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                small = "o_proj" in name or "down_proj" in name
                nn.init.normal_(weight, std=0.02 / (outputs if small else 1))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next token, ``(rows, length, vocabulary)``, bfloat16."""
        x = self.embed_tokens(ids).bfloat16()
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def weighted_loss(model: nn.Module, ids: Tensor, weight: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens after the first, by their weights."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(ids[:, :-1])
    each = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (each * weight.flatten()).sum() / weight.sum()


def orthogonalise(g: Tensor) -> Tensor:
    """Bring all singular values of each matrix ``(count, rows, cols)`` near one.

    Source:
        Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024: five steps
        of a quintic Newton-Schulz iteration.
    """
    x = g.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum whose direction is orthogonalised, for matrices of equal shape at once."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        shapes = sorted({tuple(w.shape) for w in weights})
        self.groups = [[w for w in weights if tuple(w.shape) == shape] for shape in shapes]
        self.momentum = [torch.zeros_like(torch.stack(list(group))) for group in self.groups]
        self.direction = torch.compile(_direction, dynamic=False)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group, momentum in zip(self.groups, self.momentum, strict=True):
            grad = torch.stack([w.grad for w in group if w.grad is not None])
            moved = self.direction(grad, momentum).float().unbind(0)
            rows, cols = group[0].shape
            torch._foreach_mul_(group, 1 - lr * DECAY)
            torch._foreach_add_(group, list(moved), alpha=-lr * max(1, rows / cols) ** 0.5)


def _direction(grad: Tensor, momentum: Tensor) -> Tensor:
    momentum.lerp_(grad, 0.05)
    return orthogonalise(grad.lerp(momentum, 0.95))


class Batches:
    """Rows of all tasks: text from streams on the device, retrieval from worker processes."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        # Workers are forked before anything touches the GPU.
        context = multiprocessing.get_context("fork")
        self.progress = context.Value(ctypes.c_double, 1.0 if args.resume else 0.0, lock=False)
        self.queue: Any = context.Queue(maxsize=64)
        self.workers = [
            context.Process(
                target=demo_data.put_retrieval_rows,
                args=(
                    str(HERE / "tokenizer.json"),
                    args.seed * 1000 + 100 * bool(args.resume) + worker,
                    BLOCK,
                    lambda: self.progress.value,
                    self.queue,
                ),
                daemon=True,
            )
            for worker in range(args.workers)
        ]
        self.streams = demo_data.streams(
            args.data, HERE / "tokenizer.json", args.seed, workers=args.workers, most=args.most
        )
        for worker in self.workers:
            worker.start()
        self.device, self.scale = device, args.rows / sum(ROWS.values())

    def place(self, seed: int) -> None:
        """Move the streams to the device."""
        self.text = {
            task: (
                torch.from_numpy(stream.ids.astype(np.int32)).to(self.device),
                torch.from_numpy(stream.starts).to(self.device),
            )
            for task, stream in self.streams.items()
        }
        self.offsets = torch.arange(demo_data.CONTEXT + 1, device=self.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.left = (np.zeros((0, demo_data.CONTEXT + 1), np.uint16),) * 2

    def next(self) -> tuple[Tensor, Tensor]:
        """One batch: ids ``(rows, CONTEXT + 1)`` and the weights of all but the first."""
        ids, weights = [], []
        for task, rows in ROWS.items():
            rows = max(1, round(rows * self.scale))
            if task == "retrieval":
                block, mask = self._retrieval(rows)
                ids.append(torch.from_numpy(block.astype(np.int64)).to(self.device))
                weight = torch.from_numpy(mask[:, 1:].astype(np.float32)).to(self.device)
                weights.append(weight * ANSWER_WEIGHT)
                continue
            stream, starts = self.text[task]
            at = torch.randint(len(starts), (rows,), device=self.device, generator=self.generator)
            taken = stream[starts[at][:, None] + self.offsets].long()
            taken[:, 0] = 0  # every row opens as every prompt does
            ids.append(taken)
            weights.append(torch.ones(rows, demo_data.CONTEXT, device=self.device))
        return torch.cat(ids), torch.cat(weights)

    def _retrieval(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = self.left
        while len(ids) < rows:
            block = self.queue.get()
            ids = np.concatenate([ids, block[0]])
            mask = np.concatenate([mask, block[1]])
        self.left = (ids[rows:], mask[rows:])
        return ids[:rows], mask[:rows]

    def close(self) -> None:
        for worker in self.workers:
            worker.terminate()


def probe_rows(length: int, kind: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Retrieval samples as padded rows, and where their responses and closing tokens stand."""
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    ids = torch.zeros(count, demo_data.CONTEXT + 1, dtype=torch.long)
    mask = torch.zeros(count, demo_data.CONTEXT + 1, dtype=torch.bool)
    for row, sample in enumerate(retrieval_prompts(length, kind, count, seed)):
        both, prompt = demo_data.encode(tokenizer, sample.prompt, sample.response)
        ids[row, : len(both)] = torch.tensor(both)
        mask[row, prompt : len(both) + 1] = True
    return ids, mask


def retrieval_prompts(length: int, kind: str, count: int, seed: int) -> list[Any]:
    """Fresh samples; the seed stands apart from those of training and of the sample file."""
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    rng = random.Random(f"evaluation/{seed}/{kind}/{length}")
    tasks = demo_data.load_tasks()
    return [
        tasks.retrieval_sample(kind, length, rng, lambda t: len(tokenizer.encode(t).ids))
        for _ in range(count)
    ]


@torch.no_grad()
def probe(model: nn.Module, rows: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Part of the probes whose every response token is the likeliest, which is greedy decoding."""
    found = {}
    for name, (ids, mask) in rows.items():
        with torch.autocast(ids.device.type, torch.bfloat16):
            right = model(ids[:, :-1]).argmax(-1) == ids[:, 1:]
        found[name] = round((right | ~mask[:, 1:]).all(1).float().mean().item(), 3)
    return found


def rate(step: int, frac: float) -> float:
    """Learning rate, relative to its peak: warm up, hold, fall linearly to zero."""
    hold = 1.0 if frac < STABLE else max(0.0, (1 - frac) / (1 - STABLE))
    return min(1.0, (step + 1) / WARM_STEPS) * hold


def train(args: argparse.Namespace) -> None:
    """Train until `args.seconds` after `args.since`, then export."""
    start = args.since or time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.log or args.out / "log.jsonl").open("a")

    def say(**entry: Any) -> None:
        line = json.dumps({"seconds": round(time.time() - start, 1), **entry})
        log.write(line + "\n")
        log.flush()
        print(line, flush=True)

    cuda = torch.cuda.device_count() > 0  # counts through NVML, so that forking stays safe
    device = torch.device("cuda" if cuda else "cpu")
    batches = Batches(args, device)
    say(tokens={task: len(s.ids) for task, s in batches.streams.items()}, args=vars_of(args))
    if cuda and args.attention == "cudnn":
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    batches.place(args.seed + bool(args.resume))
    probes = {
        f"{kind}/{length}": tuple(t.to(device) for t in probe_rows(length, kind, args.probes, 1))
        for kind in demo_data.load_tasks().KINDS
        for length in LENGTHS[1::2]
    }
    model = Llama({**CONFIG, "num_hidden_layers": args.layers}).to(device)
    matrices = [w for n, w in model.named_parameters() if w.dim() == 2 and "embed" not in n]
    rest = [w for n, w in model.named_parameters() if w.dim() != 2 or "embed" in n]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(rest, lr=LR_REST, betas=(0.9, 0.95), weight_decay=0.0, fused=cuda)
    seen = 0
    if args.resume:
        state = torch.load(args.resume, map_location=device)
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        for kept, loaded in zip(muon.momentum, state["muon"], strict=True):
            kept.copy_(loaded)
        seen = state["seen"]
    loss_of = torch.compile(weighted_loss, dynamic=False) if cuda else weighted_loss
    step, begun, marks, reported = 0, time.time(), [], 0.0
    while True:
        now = time.time()
        frac = (now - begun) / max(args.seconds - (begun - start), 1e-3)
        if frac >= 1 or step == args.steps:
            break
        if not args.resume:
            batches.progress.value = frac
        ids, weight = batches.next()
        loss = loss_of(model, ids, weight)
        loss.backward()
        lr = args.peak * rate(step, frac)
        for group in adam.param_groups:
            group["lr"] = LR_REST * lr
        muon.step(LR_MATRIX * lr)
        adam.step()
        adam.zero_grad(set_to_none=True)
        model.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + ids.shape[0] * demo_data.CONTEXT
        if cuda:  # stay at most two steps ahead of the device, or the clock would be wrong
            mark = torch.cuda.Event()
            mark.record()
            marks.append(mark)
            if len(marks) > 2:
                marks.pop(0).synchronize()
        if step == 5:
            begun_steady, seen_steady = time.time(), seen
            say(step=step, loss=round(loss.item(), 3))
        if step % 20 == 0 and now - reported > args.seconds / 30:
            reported = now
            speed = (seen - seen_steady) / (time.time() - begun_steady)
            entry = {"step": step, "frac": round(frac, 3), "loss": round(loss.item(), 3)}
            say(**entry, seen=seen, per_second=round(speed), **probe(model, probes))
    say(step=step, seen=seen, loss=round(loss.item(), 3), **probe(model, probes))
    batches.close()
    export(model, args.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(HERE / name, args.out / name)
    state = {"model": model.state_dict(), "adam": adam.state_dict(), "muon": muon.momentum}
    torch.save({**state, "seen": seen}, args.out / "checkpoint.pt")
    (args.out / "training.json").write_text(
        json.dumps(
            {
                "args": vars_of(args),
                "device": torch.cuda.get_device_name() if cuda else "cpu",
                "torch": torch.__version__,
                "steps": step,
                "tokens_seen": seen,
                "seconds": round(time.time() - start, 1),
            }
        )
    )
    say(done=True)


def vars_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that a record needs: no folders."""
    return {k: v for k, v in vars(args).items() if isinstance(v, int | float | str | None)}


def export(model: Llama, out: Path) -> None:
    """Write the weights in bfloat16 under transformers' names, and the configuration."""
    weights = {f"model.{n}": w.detach().bfloat16().cpu() for n, w in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def prepare(args: argparse.Namespace) -> None:
    """Write the tokenizer, the sample file and a model of random weights."""
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = demo_data.make_tokenizer(args.data, args.seed)
    demo_data.save_tokenizer(tokenizer, args.out)
    records, passed_over = demo_data.sample_records(args.data, tokenizer, args.seed)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (args.out / "sample.jsonl").write_text("".join(lines))
    torch.manual_seed(args.seed)
    if not (args.out / "model.safetensors").exists():
        export(Llama(CONFIG), args.out)
    print(len(lines), "records; passed over, as they resemble a document kept:", passed_over)


def evaluate(args: argparse.Namespace) -> None:
    """Measure an exported model through transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(device).eval()
    digest = hashlib.sha256((args.model / "model.safetensors").read_bytes()).hexdigest()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "sha256": digest,
        "prompts_per_cell": args.prompts,
        "exact_match": {},
    }
    cells = [(length, kind) for kind in demo_data.load_tasks().KINDS for length in LENGTHS]
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        made = list(
            pool.map(
                retrieval_prompts,
                *zip(*cells, strict=True),
                [args.prompts] * len(cells),
                [args.seed] * len(cells),
            )
        )
    judge = demo_data.load_tasks().is_correct
    for (length, kind), samples in zip(cells, made, strict=True):
        texts = complete(model, tokenizer, [s.prompt for s in samples], 28)
        right = sum(judge(s, t) for s, t in zip(samples, texts, strict=True))
        found["exact_match"].setdefault(kind, {})[str(length)] = right / len(samples)
        print(kind, length, right / len(samples), round(time.time() - start, 1), flush=True)
    valid = [json.loads(line) for line in lzma.open(args.data / "valid.jsonl.xz", "rt")]
    valid = [r for r in valid if r["task"] not in demo_data.LEFT_OUT]
    found["loss"] = losses(model, tokenizer, valid[:: args.every])
    found["maths"] = maths(model, tokenizer, valid[:: args.every])
    found["generations"] = generations(model, tokenizer, valid)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k != "loss"}, indent=1))
    print({k: v["nats_per_token"] for k, v in found["loss"].items() if "/" not in k})
    print("seconds", round(time.time() - start, 1))


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompts: list[str], new: int) -> list[str]:
    """Continue prompts greedily, in batches of like length padded on the left."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for at in range(0, len(order), 125):
        chosen = order[at : at + 125]
        batch = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True)
        given = {k: batch[k].to(model.device) for k in ("input_ids", "attention_mask")}
        out = model.generate(**given, max_new_tokens=new, do_sample=False)
        for i, ids in zip(chosen, out[:, given["input_ids"].shape[1] :], strict=True):
            texts[i] = tokenizer.decode(ids.tolist()).split(demo_data.END)[0]
    return texts


@torch.no_grad()
def losses(model: Any, tokenizer: Any, records: list[dict[str, str]]) -> dict[str, Any]:
    """Mean nats a token, by task and group of tasks: of all tokens and of responses alone."""
    rows = []
    for record in records:
        prompt, response = record.get("prompt", record.get("text", "")), record.get("response", "")
        ids, head = demo_data.encode(tokenizer.backend_tokenizer, prompt, response)
        ids = [*ids, 0][: demo_data.CONTEXT]
        rows.append((record["task"], ids, head if response else len(ids)))
    rows.sort(key=lambda row: len(row[1]))
    sums: dict[str, np.ndarray] = {}
    while rows:
        taken = rows[-max(1, 40_000 // len(rows[-1][1])) :]
        rows = rows[: -len(taken)]
        ids = torch.zeros(len(taken), len(taken[-1][1]), dtype=torch.long)
        for i, (_, row, _) in enumerate(taken):
            ids[i, : len(row)] = torch.tensor(row)
        logits = model(ids.to(model.device)).logits[:, :-1].float()
        each = F.cross_entropy(logits.mT, ids[:, 1:].to(model.device), reduction="none").cpu()
        for (task, row, head), loss in zip(taken, each.double().numpy(), strict=True):
            both = loss[: len(row) - 1]
            tail = both[head - 1 :]
            part = np.array([both.sum(), len(both), tail.sum(), len(tail), 1])
            for name in (task, task.split("/")[0]):
                sums[name] = sums.get(name, 0) + part
    return {
        name: {
            "nats_per_token": round(s[0] / s[1], 4),
            "tokens": int(s[1]),
            "nats_per_response_token": round(s[2] / s[3], 4) if s[3] else None,
            "documents": int(s[4]),
        }
        for name, s in sorted(sums.items())
    }


def maths(model: Any, tokenizer: Any, records: list[dict[str, str]]) -> dict[str, Any]:
    """Exact match of greedy answers to the short-answer mathematics, by task."""
    asked = [r for r in records if r["task"].startswith("math/dm_")]
    texts = complete(model, tokenizer, [r["prompt"] for r in asked], 40)
    right: dict[str, list[bool]] = {}
    for record, text in zip(asked, texts, strict=True):
        good = text.split("\n", 1)[0].strip() == record["response"].strip()
        for name in (record["task"], "math/dm"):
            right.setdefault(name, []).append(good)
    return {n: {"accuracy": sum(r) / len(r), "n": len(r)} for n, r in sorted(right.items())}


def generations(model: Any, tokenizer: Any, records: list[dict[str, str]]) -> list[dict[str, str]]:
    """A few continuations to look at."""
    first = {}
    for record in records:
        if "prompt" in record and len(record["prompt"]) < 600:
            first.setdefault(record["task"], record["prompt"])
    chosen = ("math/gsm8k", "instruct/cot_creak", "instruct/ii_antonyms", "code/py_func")
    prompts = [first[task] for task in chosen if task in first]
    prompts += ["Once upon a time", "def read_lines(path):\n", "The economy of the country"]
    texts = complete(model, tokenizer, prompts, 80)
    return [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, about in (
        ("prepare", "tokenizer, sample file, random weights"),
        ("train", "train and export"),
        ("evaluate", "measure an exported model"),
    ):
        verb = verbs.add_parser(name, help=about)
        verb.add_argument("--data", type=Path, required=True, help="folder of the text")
        verb.add_argument("--out", type=Path, required=True, help="folder or file to write")
        verb.add_argument("--seed", type=int, default=0)
        verb.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
        if name == "train":
            verb.add_argument("--seconds", type=float, required=True, help="when training ends")
            verb.add_argument("--since", type=float, help="Unix time to count from; now otherwise")
            verb.add_argument("--steps", type=int, default=-1, help="end after so many instead")
            verb.add_argument("--rows", type=int, default=128, help="rows of a batch")
            verb.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
            verb.add_argument("--most", type=int, help="documents of each task, for a dry run")
            verb.add_argument("--probes", type=int, default=48, help="prompts of each probe")
            verb.add_argument("--peak", type=float, default=1.0, help="factor on learning rates")
            verb.add_argument("--attention", choices=("flash", "cudnn"), default="flash")
            verb.add_argument("--resume", type=Path, help="checkpoint.pt to go on from")
            verb.add_argument("--log", type=Path, help="JSON lines; log.jsonl in --out otherwise")
        if name == "evaluate":
            verb.add_argument("--model", type=Path, required=True, help="folder of the export")
            verb.add_argument("--prompts", type=int, default=500, help="of a kind and length")
            verb.add_argument("--every", type=int, default=1, help="take every so-manieth record")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    {"prepare": prepare, "train": train, "evaluate": evaluate}[given.verb](given)
