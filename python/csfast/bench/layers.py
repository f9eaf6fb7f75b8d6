"""What the operations of a feed-forward layer cost, beside the dense layer in torch.

Layers of random weights rotate so that no cache holds them, all variants and baselines run in
turns (`bench.timing`), and thresholds are the quantiles of the estimated usage that give the wanted
density. What fractions of the read bandwidth refer to is measured in the same turns: a reader of
the very weights (`bench.reader`), so that a fraction above 1 is a mistake of the run (`too_fast`).

On a GPU every measurement is a CUDA graph, and there are two more baselines, which are sparse
themselves: the neurons of the list gathered into dense matrices for cuBLAS, and the rule of TEAL as
Triton kernels (`bench.teal`) at the same density of channels, which a single row allows.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import doctor, ops
from ..codes import levels, planes
from ..layer import Decision, Layer, Sensor, Weights
from ..session import Session, ffn_workspace
from ..types import Code
from . import head, timed, timing
from .reader import MOST_BUFFERS, Reader
from .timed import LayerCase

VARIANTS = ("complete", "execute", "select", "sense", "nested")
EXECUTE = ("complete", "execute")  # of these, what gives the layer's output
NESTED_BITS = 3  # of the level that the variant of that name reads, whatever the code of the case
GATHER = "gather + cuBLAS"
TEAL = "triton TEAL rule"
READ = "read"  # of the turns: what fractions of the bandwidth refer to
COMPILE_SECONDS = 60.0  # of the searches of torch.compile in all, from which no other one begins


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One layer of random weights with what csfast keeps of it."""

    gate: Tensor  # (n_neurons, d)
    up: Tensor  # (n_neurons, d)
    down: Tensor  # (d, n_neurons)
    down_t: Tensor  # (n_neurons, d)
    codes: Tensor  # (n_neurons, 2, groups, group_bytes), uint8
    equal: Tensor  # (d,), float32
    row_scale: Tensor  # (n_neurons, 2), float32
    level: levels.Packed  # of gate and up, arbitrary
    x: Tensor  # (batch, d)


def run(
    cases: Sequence[LayerCase],
    *,
    device: torch.device,
    runs: int = 40,
    variants: Sequence[str] = VARIANTS,
    n_layers: int | None = None,
    compiled: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    found: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure the cases, one row for each case and variant.

    Args:
        cases: The problems; those of one shape are best neighbours, they share their weights.
        device: Where to measure.
        runs: Measurements of every variant.
        variants: Which of `VARIANTS`.
        n_layers: Layers to rotate over; as many as no cache holds if left out.
        compiled: Whether ``torch.compile`` is among the baselines.
        seed: Of the random weights.
        progress: Told the case that is about to be measured.
        found: Given the results so far, after every case.

    Returns:
        The head of `head.of`, ``notes``, ``read_bandwidth`` of the best case in bytes a second,
        ``compile_seconds`` if anything was compiled, and ``rows``. Times in microseconds;
        ``bytes`` is what a call has to read; ``ratio_vs_best`` is the time of the fastest baseline
        over ours, ``ratio_vs_dense`` that of the fastest dense one; ``sigma`` is the density times
        the latter, 1 at best, for what executes; ``workspace_bytes`` what a session holds for
        `complete`.

    Raises:
        ValueError: A variant is unknown, a density out of range, the tiles do not divide the
            neurons, or there is no row.
        BackendError: The device's backend is missing.
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise ValueError(f"[bench] variant {variant!r}: want one of {', '.join(VARIANTS)}.")
    for case in cases:
        if not 0 < case.density <= 1:
            raise ValueError(f"[bench] density = {case.density}: want a fraction in (0, 1].")
        if case.tile_rows < 1 or case.n_neurons % case.tile_rows != 0:
            raise ValueError(
                f"[bench] tile_rows = {case.tile_rows} of {case.n_neurons} neurons: want a divisor."
            )
        if case.batch < 1:
            raise ValueError(f"[bench] batch = {case.batch}: want at least 1.")
    doctor.require(device)
    notes: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    results = {**head.of(device), "notes": notes, "read_bandwidth": 0.0, "rows": rows}
    compiler = _Compiler(device) if compiled else None
    layers: list[_Layer] = []
    dense: dict[str, Callable[[int], Tensor]] = {}
    shape: tuple[int, int, Code, int] | None = None
    for case in cases:
        if progress is not None:
            progress(case.name)
        if shape != (case.d, case.n_neurons, case.bits, case.batch):
            shape = (case.d, case.n_neurons, case.bits, case.batch)
            layers, dense = [], {}  # frees the last shape's before the next one's are made
            generator = torch.Generator(device).manual_seed(seed)
            count = timed.n_layers_of(case, device) if n_layers is None else n_layers
            layers = [_random_layer(case, generator, device) for _ in range(count)]
            dense = _dense_baselines(layers, device, compiler, notes)
        measured, bandwidth = _measure(case, layers, dense, device, runs, variants, notes)
        rows += measured
        results["read_bandwidth"] = max(results["read_bandwidth"], bandwidth)
        if compiler is not None:
            results["compile_seconds"] = compiler.seconds
        if found is not None:
            found(results)
    return results


def too_fast(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the rows that cannot be true: they read faster than reading alone does.

    Of layers that no cache holds, on a machine that does nothing else, there are none.
    """
    return [
        f"{row['case']} {row['variant']}: {row['fraction_of_read_bandwidth']:.3f} of what reading "
        "alone reaches: want at most 1."
        for row in rows
        if row["fraction_of_read_bandwidth"] > 1
    ]


def _reading(layers: Sequence[_Layer]) -> tuple[Callable[[int], None], float]:
    """Give what reads the weights of layers, for `timing.compare`, and what a call of it reads.

    On the CPU a call reads one of the three matrices of its layer, in turns: what takes about as
    long as the operations do is as often disturbed. On a GPU a few of the calls read everything
    between them, because the time of a kernel that reads a small layer is that of its start.

    Returns:
        The call, and the bytes of one, on average over the layers.
    """
    tables = [table for layer in layers for table in (layer.gate, layer.up, layer.down_t)]
    n_bytes = sum(table.numel() * table.element_size() for table in tables)
    if tables[0].device.type == "cpu":
        each = [Reader([table]) for table in tables]
        turns = itertools.count()
        return lambda i: each[3 * i + next(turns) // len(layers) % 3](), n_bytes / len(tables)
    most = MOST_BUFFERS
    some = [Reader(tables[i : i + most]) for i in range(0, len(tables), most)]

    def read(i: int) -> None:
        if i < len(some):
            some[i]()

    return read, n_bytes / len(layers)


def _random_layer(case: LayerCase, generator: torch.Generator, device: torch.device) -> _Layer:
    """Make a layer whose usage is spread as random weights spread it.

    `cases.Case.make` does so too, but fits every row: ten seconds for one layer of d = 2048.
    """
    d, n_neurons, bits = case.d, case.n_neurons, case.bits

    def rows() -> Tensor:
        return torch.randn(n_neurons, d, generator=generator, device=device).div_(d**0.5).bfloat16()

    gate, up, down_t = rows(), rows(), rows()
    equal = torch.ones(d, device=device)
    codes, scales = [], []
    for weight in (gate, up):
        # Rows are alike, so a few of them tell the scale of all.
        scale = planes.fit_scale(weight[:32], equal, bits).median().expand(n_neurons).contiguous()
        codes.append(planes.encode(weight, equal, scale, bits))
        scales.append(scale)
    row_scale = torch.stack(scales, dim=1)
    row_scale[:, 1] *= down_t.float().norm(dim=1)
    x = torch.randn(case.batch, d, generator=generator, device=device).bfloat16()
    return _Layer(
        gate=gate,
        up=up,
        down=down_t.T.contiguous(),
        down_t=down_t,
        codes=torch.stack(codes, dim=1).contiguous(),
        equal=equal,
        row_scale=row_scale.contiguous(),
        level=_random_level(n_neurons, d, generator, device),
        x=x,
    )


def _random_level(
    n_neurons: int, d: int, generator: torch.Generator, device: torch.device
) -> levels.Packed:
    """Make any codes and steps: what they are changes no time."""

    def drawn(below: int, *row: int) -> Tensor:
        shape = (n_neurons, 2, *row)
        return torch.randint(below, shape, dtype=torch.uint8, generator=generator, device=device)

    chunks, chunk_bytes = planes.row_shape(d, NESTED_BITS)
    return levels.Packed(
        bits=NESTED_BITS,
        codes=drawn(256, chunks, chunk_bytes),
        exponent=drawn(64, 2 * chunks),
        top=torch.ones(n_neurons, 2, dtype=torch.bfloat16, device=device),
    )


def _dense(gate: Tensor, up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    """The feed-forward layer as models write it."""
    a = functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
    out: Tensor = functional.linear(a, down)
    return out


class _Compiler:
    """Compiles the dense layer for one shape after the other, as long as that may take.

    On a GPU with everything that can be searched, but no graphs of its own: ours hold its kernels.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.name = "torch.compile max-autotune bf16" if on_gpu else "torch.compile bf16"
        self.seconds = 0.0
        self._mode = "max-autotune-no-cudagraphs" if on_gpu else None
        self._most = COMPILE_SECONDS if on_gpu else float("inf")

    def compile(
        self, weights: tuple[Tensor, ...], notes: dict[str, str]
    ) -> Callable[..., Tensor] | None:
        """Give the compiled layer for tensors of this shape, or none, and say why in `notes`."""
        if self.seconds >= self._most:
            shape = f"d={weights[0].shape[1]} F={weights[0].shape[0]} batch={weights[3].shape[0]}"
            notes[f"{self.name} {shape}"] = f"left out: {self.seconds:.0f} s were spent on others"
            return None
        clock = timing.Clock()
        torch.compiler.reset()  # or the shapes before this one would count as recompilations
        fused: Callable[..., Tensor] = torch.compile(_dense, dynamic=False, mode=self._mode)
        try:
            fused(*weights)
        except (RuntimeError, OSError, ImportError) as error:
            notes[self.name] = "unavailable: " + _reason(error)
            return None
        finally:
            self.seconds += clock.seconds()
        return fused


def _reason(error: BaseException) -> str:
    """First line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _dense_baselines(
    layers: list[_Layer], device: torch.device, compiler: _Compiler | None, notes: dict[str, str]
) -> dict[str, Callable[[int], Tensor]]:
    """Give the dense layer in every form that works here; `notes` says which did not, and why."""
    weights = [(layer.gate, layer.up, layer.down, layer.x) for layer in layers]
    found: dict[str, Callable[[int], Tensor]] = {"torch bf16": lambda i: _dense(*weights[i])}
    if device.type == "cpu":
        wide = [tuple(t.float() for t in w) for w in weights]
        found["torch f32"] = lambda i: _dense(*wide[i])
    if compiler is not None:
        fused = compiler.compile(weights[0], notes)
        if fused is not None:
            found[compiler.name] = lambda i: fused(*weights[i])
    return found


def _sparse_baselines(
    case: LayerCase,
    layers: list[_Layer],
    tiles: list[ops.TileList],
    device: torch.device,
    notes: dict[str, str],
) -> dict[str, Callable[[int], Tensor]]:
    """Give what else a GPU can do with such a density; on the CPU nothing is compared with.

    `notes` says what is left out, and why.
    """
    if device.type == "cpu":
        return {}
    neurons = [_neurons(case, tile) for tile in tiles]
    found: dict[str, Callable[[int], Tensor]] = {
        GATHER: lambda i: gathered(layers[i].gate, layers[i].up, layers[i].down_t, layers[i].x,
                                   neurons[i])
    }  # fmt: skip
    if importlib.util.find_spec("triton") is None:
        notes[TEAL] = "unavailable: triton is not installed"
    elif case.batch > 1:
        notes[TEAL] = "left out where rows share a support: the rule is one row's"
    elif case.tile_rows > 1:
        notes[TEAL] = "left out where neurons are kept in blocks: the rule has channels"
    else:
        kernels = importlib.import_module(".teal", __package__)
        try:
            found[TEAL] = _teal(kernels, case, layers, device)
        except kernels.FAILURES as error:
            notes[TEAL] = "unavailable: " + _reason(error)
    return found


def _neurons(case: LayerCase, tiles: ops.TileList) -> Tensor:
    """List the neurons of the only list of `tiles`, int64."""
    kept = tiles.tile[0, : int(tiles.n_tiles)].long()
    rows = torch.arange(case.tile_rows, device=kept.device)
    return (kept[:, None] * case.tile_rows + rows).flatten()


def gathered(gate: Tensor, up: Tensor, down_t: Tensor, x: Tensor, neurons: Tensor) -> Tensor:
    """Copy the neurons' rows into dense matrices, then run the layer on these."""
    g = functional.linear(x, gate.index_select(0, neurons))
    u = functional.linear(x, up.index_select(0, neurons))
    return (functional.silu(g) * u) @ down_t.index_select(0, neurons)


def threshold_of(values: Tensor, density: float) -> float:
    """Give the magnitude over which `density` of the values lie: at most, where some are equal.

    Halfway between the last that is kept and the next, so that rounding does not decide.
    """
    magnitudes = values.flatten().abs().double().sort(descending=True).values
    kept = max(1, round(density * len(magnitudes)))
    return float(magnitudes[kept - 1 : kept + 1].mean()) if kept < len(magnitudes) else -1.0


def _teal(
    kernels: types.ModuleType, case: LayerCase, layers: list[_Layer], device: torch.device
) -> Callable[[int], Tensor]:
    """Give the layer by the rule of TEAL, cut as is fastest on these layers."""
    weights, thresholds, products = [], [], []
    for layer in layers:
        by_channel = torch.stack((layer.gate.T, layer.up.T))  # (2, d, n_neurons)
        weights.append(by_channel)
        of_x = threshold_of(layer.x, case.density)
        kept = torch.where(layer.x.float().abs() > of_x, layer.x, 0)
        sums = (kept @ by_channel).float()  # (2, 1, n_neurons)
        a = functional.silu(sums[0]) * sums[1]
        thresholds.append((of_x, threshold_of(a, case.density)))
        products.append(sums[:, 0].contiguous())
    room = torch.zeros(2, case.n_neurons, device=device)

    def gate_up(config: Any) -> Callable[[int], object]:
        return lambda i: kernels.gate_up(layers[i].x, weights[i], thresholds[i][0], room, config)

    def down(config: Any) -> Callable[[int], object]:
        out = room[0, : case.d] if case.d <= case.n_neurons else room.new_zeros(case.d)
        return lambda i: kernels.down(products[i], layers[i].down_t, thresholds[i][1], out, config)

    chosen = []
    for step in (gate_up, down):
        named = {str(config): config for config in kernels.CONFIGS}
        timings = timing.compare(
            {name: step(config) for name, config in named.items()},
            n_inputs=len(layers),
            device=device,
            runs=5,
            warmup=1,
        )
        chosen.append(named[min(timings, key=lambda name: timings[name].median)])
    configs = (chosen[0], chosen[1])

    def ffn(i: int) -> Tensor:
        out: Tensor = kernels.ffn(layers[i].x, weights[i], layers[i].down_t, thresholds[i], configs)
        return out

    return ffn


def _measure(
    case: LayerCase,
    layers: list[_Layer],
    dense: dict[str, Callable[[int], Tensor]],
    device: torch.device,
    runs: int,
    variants: Sequence[str],
    notes: dict[str, str],
) -> tuple[list[dict[str, Any]], float]:
    """Time one case; give its rows and the bytes a second that reading alone reaches."""
    bits, tile_rows = case.bits, case.tile_rows
    votes = torch.ones(case.batch, device=device) if case.batch > 1 else None
    bound, tiles = [], []
    session = Session(device)
    for layer in layers:
        sensor = Sensor(layer.codes, layer.equal, layer.row_scale, bits)
        y, scale = ops.sense(sensor.codes, sensor.equal, layer.x, bits=bits)
        n_groups = -(-case.n_neurons // tile_rows)
        budget = torch.tensor([max(1, round(case.density * n_groups))])
        support = ops.recover(
            y,
            scale,
            sensor.row_scale,
            budget=budget.to(device, torch.int32),
            tile_rows=tile_rows,
            votes=votes,
        )
        kept = support.index[0, : int(support.count)].long()
        threshold = support.usage[0, kept].min().reshape(1)
        tiles.append(ops.TileList(support.index, support.count, tile_rows))
        weights = Weights(layer.gate, layer.up, layer.down_t)
        one = Layer(sensor, weights, Decision(threshold, tile_rows, votes))
        every = dataclasses.replace(
            one.decision, threshold=threshold.expand(case.batch).contiguous()
        )
        session.bind(dataclasses.replace(one, decision=every), max_batch=case.batch)
        bound.append(one)
    outs = [torch.empty_like(layer.x) for layer in layers]

    def select(i: int) -> object:
        return ops.select(bound[i].sensor, bound[i].decision, layers[i].x)

    def execute(i: int) -> object:
        return ops.execute(bound[i].weights, tiles[i], layers[i].x)

    def sense(i: int) -> object:
        return ops.sense(layers[i].codes, layers[i].equal, layers[i].x, bits=bits)

    def level(i: int) -> object:
        return ops.nested([layers[i].level], layers[i].equal, layers[i].x)

    def complete(i: int) -> None:
        session.ffn(i, layers[i].x, outs[i])

    ours: dict[str, Callable[[int], object]] = {
        "complete": complete,
        "execute": execute,
        "select": select,
        "sense": sense,
        "nested": level,
    }
    reading, reading_bytes = _reading(layers)
    sparse = _sparse_baselines(case, layers, tiles, device, notes)
    timings = timing.compare(
        {**{name: ours[name] for name in variants}, **dense, **sparse, READ: reading},
        n_inputs=len(layers),
        device=device,
        runs=runs,
    )
    bandwidth = reading_bytes / timings[READ].median
    n_kept = sum(int(t.n_tiles.sum()) for t in tiles) / len(tiles)
    read = _bytes(case, n_kept)
    baselines = {name: timings[name].median * 1e6 for name in (*dense, *sparse)}
    best_dense = min(baselines[name] for name in dense)
    workspace = ffn_workspace(case.batch, case.d, case.n_neurons, device)
    rows = []
    for name in variants:
        median = timings[name].median * 1e6
        rows.append(
            {
                "case": case.name,
                "variant": name,
                "density": case.density,
                "batch": case.batch,
                "median_us": median,
                "p10_us": timings[name].p10 * 1e6,
                "p90_us": timings[name].p90 * 1e6,
                "bytes": read[name],
                "fraction_of_read_bandwidth": read[name] / timings[name].median / bandwidth,
                "workspace_bytes": workspace if name == "complete" else None,
                "baselines": baselines,
                "ratio_vs_best": min(baselines.values()) / median,
                "ratio_vs_dense": best_dense / median,
                "sigma": sigma(case.density, best_dense, median) if name in EXECUTE else None,
            }
        )
    return rows, bandwidth


def sigma(density: float, dense: float, sparse: float) -> float:
    """Give the part of the dense time that is due, over the time taken: 1 is ideal."""
    return density * dense / sparse


def _bytes(case: LayerCase, kept: float) -> dict[str, int]:
    """Give what a call has to read, in bytes, when `kept` tiles are executed."""
    x = 2 * case.batch * case.d
    select = planes.n_bytes(case.n_neurons, case.d, case.bits) + x
    execute = round(kept * (case.tile_rows * 3 * 2 * case.d + 4)) + x
    return {
        "sense": select - 8 * case.n_neurons,  # the row scales are read by recover
        "nested": levels.n_bytes(case.n_neurons, case.d, (NESTED_BITS,)) + x,
        "select": select,
        "execute": execute,
        "complete": select + execute,
    }
