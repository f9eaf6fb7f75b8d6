"""Rules that predict usage from the input by something smaller: low rank, linear, trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...judge import BYTES, Where
from ...types import LayerShape
from ..rules import Fit, NeuronRule, check_rank

TRAIN_STEPS = 400  # of `DejaVu`; twice as many gain nothing on the demo model
TRAIN_ROWS = 512  # positions of one step
TOP = 0.25  # share of the neurons that `DejaVu` learns to tell from the others


class LowRank(NeuronRule):
    """Estimate usage from gate and up matrices of low rank, the best for the calibration inputs.

    ``W S = U s V'`` with ``S`` the square root of the inputs' second moment; the estimate is
    ``U_r s_r (V_r' S^-1 x)``, which is the rank-r matrix of least mean squared error.

    Source:
        Yuan et al., "ASVD: activation-aware singular value decomposition", 2023; the exact
        whitening is Wang et al., "SVD-LLM", 2024.
    """

    def __init__(self, name: str, fit: Fit, rank: int) -> None:
        """Cut the factors of every layer to `rank`."""
        super().__init__(name, fit.ffns)
        check_rank(name, fit.ffns, rank)
        self.rank = rank
        self._factors = []
        for layer in range(len(fit.ffns)):
            pair = [fit.right_factors(layer, up=up) for up in (False, True)]
            self._factors.append(
                [(left[:, :rank].contiguous(), right[:rank].contiguous()) for left, right in pair]
            )

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the usage of the low-rank estimate."""
        xf = x.float()
        ffn = self.ffns[layer]
        z_gate, z_up = (
            F.linear(xf @ right.T, left, None if bias is None else bias.float())
            for (left, right), bias in zip(
                self._factors[layer], (ffn.gate.bias, ffn.up.bias), strict=True
            )
        )
        return (ffn.act(z_gate) * z_up).abs() * self.norm[layer]

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give two pairs of factors at 16 bits."""
        return 2.0 * self.rank * (shape.d + shape.n_neurons) * BYTES


class Linear(NeuronRule):
    """Estimate the usage of every neuron by a linear map of the input, fitted by least squares."""

    def __init__(self, name: str, fit: Fit) -> None:
        """Fit the map of every layer, with a little ridge."""
        super().__init__(name, fit.ffns)
        self._map = [fit.ridge(layer, fit.usage(layer)) for layer in range(len(fit.ffns))]

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the estimate, which may be negative."""
        return x.float() @ self._map[layer][:-1] + self._map[layer][-1]

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give the map with its constants at 16 bits."""
        return float((shape.d + 1) * shape.n_neurons * BYTES)


class DejaVu(NeuronRule):
    """Predict by a small network which neurons are among the most used quarter.

    Two matrices with a rectifier between (the publication's are for layers whose activation is
    one), trained by binary cross entropy on the calibration positions.

    Source:
        Liu et al., "Deja Vu: contextual sparsity for efficient LLMs at inference time", 2023.
    """

    def __init__(self, name: str, fit: Fit, width: int) -> None:
        """Train a predictor with `width` hidden units for every layer."""
        super().__init__(name, fit.ffns)
        check_rank(name, fit.ffns, width)
        self.width = width
        self._nets = []
        for layer, x in enumerate(fit.sample.inputs):
            usage = fit.usage(layer)
            n_top = max(1, round(TOP * usage.shape[1]))
            least = usage.topk(n_top, dim=1).values[:, -1:]
            draw = fit.generator(layer, width)
            self._nets.append(_trained(x.float(), usage >= least, width, draw))

    def score(self, layer: int, x: Tensor, gate: Tensor, a: Tensor, where: Where) -> Tensor:
        """Give the logit of every neuron."""
        inner, outer, bias = self._nets[layer]
        return F.linear(F.relu(F.linear(x.float(), inner)), outer, bias)

    def sensor_bytes(self, shape: LayerShape) -> float:
        """Give both matrices and the constants at 16 bits."""
        return float((self.width * (shape.d + shape.n_neurons) + shape.n_neurons) * BYTES)


def _trained(
    x: Tensor, label: Tensor, width: int, draw: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Train ``outer relu(inner x) + bias`` to tell labels ``(n, n_neurons)``."""
    d, n_neurons = x.shape[1], label.shape[1]
    scale = x.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    inner = (torch.randn(width, d, generator=draw) / d**0.5).to(x.device)
    outer = (torch.randn(n_neurons, width, generator=draw) / width**0.5).to(x.device)
    share = label.float().mean(dim=0).clamp(1e-3, 1 - 1e-3)
    weights = [inner, outer, torch.logit(share)]
    rows = torch.randint(len(x), (TRAIN_STEPS, TRAIN_ROWS), generator=draw).to(x.device)
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        optimizer = torch.optim.Adam(weights, lr=3e-3)
        for step in range(TRAIN_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * (1 - step / TRAIN_STEPS)
            some = x.index_select(0, rows[step]) / scale
            logit = F.linear(F.relu(F.linear(some, inner)), outer, weights[2])
            wanted = label.index_select(0, rows[step]).float()
            loss = F.binary_cross_entropy_with_logits(logit, wanted)
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = gradient
            optimizer.step()
    return (inner / scale).detach(), outer.detach(), weights[2].detach()
