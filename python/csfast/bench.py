"""What the operations of a feed-forward layer cost, beside the dense layer in torch.

Layers of random weights rotate so that no cache holds them, all variants and baselines run in
turns (`csfast.timing`), and thresholds are the quantiles of the estimated usage that give the
wanted density. The read bandwidth that fractions refer to is measured in the same run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import doctor, nested, ops, planes, timing
from .types import Code

VARIANTS = ("complete", "execute", "select", "sense", "nested")
NESTED_BITS = 3  # of the level that the variant of that name reads, whatever `Setting.bits`
N_LAYERS = 6  # rotated: 600 MB of bf16 weights at d = 2048, F = 8192, more than any cache holds
# Bytes read at a time for the bandwidth, and how many such slices take turns. On the CPU a slice is
# about what a sparse layer reads, and all of them are more than any cache holds; a GPU reads 32 MB
# in less time than it takes to fill the machine, so its slices are larger.
_SLICES = {"cpu": (32 << 20, 16), "cuda": (1 << 30, 2)}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One problem: a layer's sizes and the density that is executed."""

    d: int  # channels of the activation
    n_neurons: int  # rows of the gate and of the up projection
    density: float  # fraction of the neurons, in (0, 1]
    bits: Code = 2  # of a weight
    tile_rows: int = 1  # neurons that are kept and read as one

    @property
    def case(self) -> str:
        """Its name in the results, for example ``ffn d=2048 F=8192 density=.25``."""
        density = f"{self.density:.2f}".removeprefix("0")
        bits = "" if self.bits == 2 else f" bits={self.bits}"
        blocks = "" if self.tile_rows == 1 else f" blocks={self.tile_rows}"
        return f"ffn d={self.d} F={self.n_neurons} density={density}{bits}{blocks}"


CPU_SETTINGS = (
    *(Setting(2048, 8192, density) for density in (0.5, 0.25, 0.1)),
    Setting(2048, 8192, 0.25, tile_rows=16),
)
CUDA_SETTINGS = CPU_SETTINGS + tuple(Setting(4096, 14336, density) for density in (0.5, 0.25, 0.1))


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
    level: nested.Packed  # of gate and up, arbitrary
    x: Tensor  # (1, d)


def run(
    settings: Sequence[Setting],
    *,
    device: torch.device,
    runs: int = 40,
    variants: Sequence[str] = VARIANTS,
    n_layers: int = N_LAYERS,
    compiled: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure the settings, one row for each setting and variant.

    Args:
        settings: The problems; those of one shape are best neighbours, they share their weights.
        device: Where to measure.
        runs: Measurements of every variant.
        variants: Which of `VARIANTS`.
        n_layers: Layers to rotate over.
        compiled: Whether ``torch.compile`` is among the baselines.
        seed: Of the random weights.
        progress: Told the case that is about to be measured.

    Returns:
        ``{"machine": {...}, "rows": [...]}``. Times in microseconds; ``bytes`` is what a call has
        to read; ``ratio_vs_best`` is the time of the fastest dense baseline over ours.

    Raises:
        ValueError: A variant is unknown, a density out of range, or the tiles do not divide the
            neurons.
        BackendError: The device's backend is missing.
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise ValueError(f"[bench] variant {variant!r}: want one of {', '.join(VARIANTS)}.")
    for setting in settings:
        if not 0 < setting.density <= 1:
            raise ValueError(f"[bench] density = {setting.density}: want a fraction in (0, 1].")
        if setting.tile_rows < 1 or setting.n_neurons % setting.tile_rows != 0:
            raise ValueError(
                f"[bench] tile_rows = {setting.tile_rows} of {setting.n_neurons} neurons: want a "
                "divisor."
            )
    doctor.require(device)
    bandwidth = read_bandwidth(device)
    notes: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    layers: list[_Layer] = []
    dense: dict[str, Callable[[int], Tensor]] = {}
    shape: tuple[int, int, Code] | None = None
    for setting in settings:
        if progress is not None:
            progress(setting.case)
        if shape != (setting.d, setting.n_neurons, setting.bits):
            shape = (setting.d, setting.n_neurons, setting.bits)
            layers, dense = [], {}  # frees the last shape's before the next one's are made
            generator = torch.Generator(device).manual_seed(seed)
            layers = [_random_layer(setting, generator, device) for _ in range(n_layers)]
            dense = _baselines(layers, device, compiled, notes)
        rows += _measure(setting, layers, dense, device, runs, variants, bandwidth)
    machine = doctor.machine(device)
    machine["read_bandwidth"] = bandwidth  # bytes per second
    machine["notes"] = notes
    return {"machine": machine, "rows": rows}


def read_bandwidth(device: torch.device, *, runs: int = 32) -> float:
    """Measure how many bytes a second the device reads: the best of several plain readers."""
    n_bytes, n_slices = _SLICES[device.type]
    floats = torch.ones(n_slices, n_bytes // 4, device=device)
    matrices = floats.view(n_slices, -1, 2048)
    halves = floats.view(torch.bfloat16).view(n_slices, -1, 2048)
    vector = torch.ones(2048, device=device)
    half = vector.bfloat16()
    readers: dict[str, Callable[[int], Tensor]] = {
        "sum": lambda i: floats[i].sum(),
        "mv float32": lambda i: matrices[i] @ vector,
        "mv bfloat16": lambda i: halves[i] @ half,
    }
    timings = timing.compare(readers, n_inputs=n_slices, device=device, runs=runs, warmup=1)
    return n_bytes / min(t.median for t in timings.values())


def _random_layer(setting: Setting, generator: torch.Generator, device: torch.device) -> _Layer:
    """Make a layer whose usage is spread as random weights spread it.

    `cases.Case.make` does so too, but fits every row: ten seconds for one layer of d = 2048.
    """
    d, n_neurons, bits = setting.d, setting.n_neurons, setting.bits

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
    x = torch.randn(1, d, generator=generator, device=device).bfloat16()
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
) -> nested.Packed:
    """Make any codes and steps: what they are changes no time."""

    def drawn(below: int, *row: int) -> Tensor:
        shape = (n_neurons, 2, *row)
        return torch.randint(below, shape, dtype=torch.uint8, generator=generator, device=device)

    chunks, chunk_bytes = planes.row_shape(d, NESTED_BITS)
    return nested.Packed(
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


def _baselines(
    layers: list[_Layer], device: torch.device, compiled: bool, notes: dict[str, str]
) -> dict[str, Callable[[int], Tensor]]:
    """Give the dense layer in every form that works here; `notes` says which did not, and why."""
    weights = [(layer.gate, layer.up, layer.down, layer.x) for layer in layers]
    found: dict[str, Callable[[int], Tensor]] = {"torch bf16": lambda i: _dense(*weights[i])}
    if device.type == "cpu":
        wide = [tuple(t.float() for t in w) for w in weights]
        found["torch f32"] = lambda i: _dense(*wide[i])
    if compiled:
        fused = torch.compile(_dense, dynamic=False)
        try:
            fused(*weights[0])
        except (RuntimeError, OSError, ImportError) as error:
            reason = str(error).strip() or type(error).__name__
            notes["torch.compile bf16"] = "unavailable: " + reason.splitlines()[0]
        else:
            found["torch.compile bf16"] = lambda i: fused(*weights[i])
    return found


def _measure(
    setting: Setting,
    layers: list[_Layer],
    dense: dict[str, Callable[[int], Tensor]],
    device: torch.device,
    runs: int,
    variants: Sequence[str],
    bandwidth: float,
) -> list[dict[str, Any]]:
    """Time one setting and give its rows."""
    bits, tile_rows = setting.bits, setting.tile_rows
    thresholds, tiles = [], []
    session = ops.Session(device)
    for layer in layers:
        y, scale = ops.sense(layer.codes, layer.equal, layer.x, bits=bits)
        n_groups = -(-setting.n_neurons // tile_rows)
        budget = torch.tensor([max(1, round(setting.density * n_groups))])
        support = ops.recover(
            y,
            scale,
            layer.row_scale,
            budget=budget.to(device, torch.int32),
            group_rows=tile_rows,
        )
        kept = support.index[0, : int(support.count)].long()
        threshold = support.usage[0, kept].min().reshape(1)
        thresholds.append(threshold)
        tiles.append(ops.TileList(support.index, support.count, tile_rows))
        session.bind(
            codes=layer.codes,
            equal=layer.equal,
            row_scale=layer.row_scale,
            threshold=threshold,
            gate=layer.gate,
            up=layer.up,
            down_t=layer.down_t,
            bits=bits,
            max_batch=1,
            tile_rows=tile_rows,
        )
    outs = [torch.empty_like(layer.x) for layer in layers]

    def select(i: int) -> object:
        layer = layers[i]
        return ops.select(
            layer.codes,
            layer.equal,
            layer.row_scale,
            thresholds[i],
            layer.x,
            bits=bits,
            tile_rows=tile_rows,
        )

    def execute(i: int) -> object:
        layer = layers[i]
        return ops.execute(layer.gate, layer.up, layer.down_t, layer.x, tiles[i])

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
    timings = timing.compare(
        {**{name: ours[name] for name in variants}, **dense},
        n_inputs=len(layers),
        device=device,
        runs=runs,
    )
    n_kept = sum(int(t.n_tiles.sum()) for t in tiles) / len(tiles)
    read = _bytes(setting, n_kept)
    baselines = {name: timings[name].median * 1e6 for name in dense}
    return [
        {
            "case": setting.case,
            "variant": name,
            "median_us": timings[name].median * 1e6,
            "p10_us": timings[name].p10 * 1e6,
            "p90_us": timings[name].p90 * 1e6,
            "bytes": read[name],
            "fraction_of_read_bandwidth": read[name] / timings[name].median / bandwidth,
            "baselines": baselines,
            "ratio_vs_best": min(baselines.values()) / (timings[name].median * 1e6),
        }
        for name in variants
    ]


def _bytes(setting: Setting, kept: float) -> dict[str, int]:
    """Give what a call has to read, in bytes, when `kept` tiles are executed."""
    x = 2 * setting.d
    select = planes.n_bytes(setting.n_neurons, setting.d, setting.bits) + x
    execute = round(kept * (setting.tile_rows * 3 * 2 * setting.d + 4)) + x
    return {
        "sense": select - 8 * setting.n_neurons,  # the row scales are read by recover
        "nested": nested.n_bytes(setting.n_neurons, setting.d, (NESTED_BITS,)) + x,
        "select": select,
        "execute": execute,
        "complete": select + execute,
    }
