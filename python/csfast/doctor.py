"""Says whether csfast works on this machine, and with what."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import platform
import re
import sys
from typing import Any

import torch

from . import models, ops, reference
from ._version import __version__
from .codes import planes
from .layer import Weights


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    subject: str
    text: str
    is_fault: bool = False  # csfast does not work until this is mended


def examine() -> list[Finding]:
    """Look at everything that csfast needs, faults included, without raising for any of them."""
    return [
        Finding("csfast", __version__),
        Finding("python", f"{platform.python_version()} ({sys.platform})"),
        Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        Finding("cpu", f"{cpu_name()}, {os.cpu_count()} cores, {_memory()}"),
        Finding("load", busy(torch.get_num_threads()) or f"{os.getloadavg()[0]:.1f} of the cores"),
        *(Finding(f"backend {name}", text) for name, text in sorted(ops.backend_info().items())),
        _cuda(),
        _kernels(),
        _demo_model(),
    ]


def machine(device: torch.device) -> dict[str, Any]:
    """Give what a measurement depends on, for the head of a results file."""
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": ops.isa(),
        "torch": torch.__version__,
        "csfast": __version__,
        "platform": platform.platform(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        found["driver"] = _driver()
    return found


def best_device() -> torch.device:
    """Give the GPU where torch and csfast see one, else the CPU."""
    usable = ops.cuda_available() and torch.cuda.is_available()
    return torch.device("cuda" if usable else "cpu")


def place_name(device: torch.device) -> str:
    """Name a device and the threads that run on the CPU."""
    name = cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)
    n = torch.get_num_threads()
    return f"{device.type} ({name}), {n} thread{'s' if n > 1 else ''}"


def busy(threads: int) -> str | None:
    """Say how many threads to take where others keep the cores busy, or nothing where they do not.

    A layer waits for the last of its threads, so one that gets no core holds up all.

    Args:
        threads: As many as would be taken.
    """
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    free = max(1, math.floor(cores - load))
    if load < cores / 2 or threads <= free:
        return None
    return f"the cores are busy (load {load:.1f} of {cores}): --threads {free} may be faster"


def require(device: torch.device) -> None:
    """Refuse a device that cannot be used here.

    Raises:
        BackendError: It is a CUDA device, and torch or csfast sees none.
    """
    if device.type == "cuda" and not (ops.cuda_available() and torch.cuda.is_available()):
        raise ops.BackendError(
            f"[doctor] device {device}: want a GPU that torch and csfast were built for; "
            "csfast doctor says which half is missing."
        )


def cpu_name() -> str:
    """Give the processor's name, or its architecture where the system does not tell."""
    path = pathlib.Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _driver() -> str | None:
    """Version of the NVIDIA driver; none where the system does not tell."""
    path = pathlib.Path("/proc/driver/nvidia/version")
    if not path.is_file():
        return None
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", path.read_text(encoding="utf-8"))
    return found[1] if found else None


def _memory() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{pages / 2**30:.0f} GiB of memory"


def _cuda() -> Finding:
    """Say whether the GPU can be used, and if not, which half is missing."""
    ours, torchs = ops.cuda_available(), torch.cuda.is_available()
    if ours and torchs:
        return Finding("cuda", torch.cuda.get_device_name())
    if ours:
        return Finding("cuda", "csfast sees a device, but this torch does not")
    if torchs:
        return Finding("cuda", "torch sees a device, but this csfast does not")
    return Finding("cuda", "no device: the CPU is used")


def _kernels() -> Finding:
    """Run the kernels once against the float64 reference."""
    generator = torch.Generator().manual_seed(0)
    d, n_neurons, bits = 192, 64, 2
    gate, up, down_t = (torch.randn(n_neurons, d, generator=generator) / d**0.5 for _ in range(3))
    x = torch.randn(1, d, generator=generator)
    equal = planes.equalizer(torch.ones(d))
    scales = [planes.fit_scale(w, equal, bits) for w in (gate, up)]
    codes = torch.stack(
        [planes.encode(w, equal, s, bits) for w, s in zip((gate, up), scales, strict=True)], dim=1
    ).contiguous()
    y, _ = ops.sense(codes, equal, x, bits=bits)
    want_y, _ = reference.sense(codes, equal, x, bits=bits)
    everything = torch.arange(n_neurons, dtype=torch.int32)[None].contiguous()
    tiles = ops.tile(everything, torch.tensor([n_neurons], dtype=torch.int32))
    out = ops.execute(Weights(gate, up, down_t), tiles, x)
    want = reference.execute(gate, up, down_t, x, [torch.arange(n_neurons)], tile_rows=1)
    # Rounding of sums of d and then n_neurons terms of size about 1, four times over.
    tolerance = 4 * (d + n_neurons) * torch.finfo(torch.float32).eps
    error = float((out.double() - want).abs().max())
    if not torch.equal(y, want_y) or error > tolerance:
        return Finding("kernels", f"differ from the reference by {error:.1e}", is_fault=True)
    return Finding("kernels", f"{ops.isa()}: agree with the reference")


def _demo_model() -> Finding:
    weights = models.demo_folder() / "model.safetensors"
    if not weights.is_file():
        return Finding("demo model", "missing from the package: install csfast again", True)
    return Finding("demo model", f"{weights.stat().st_size / 2**20:.1f} MiB")
