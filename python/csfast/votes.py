"""Who counts in joint supports: weights and thresholds of a batch, where the kernels read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

BATCH_MAX = 16  # sequences that decode together; a larger batch runs dense


@dataclasses.dataclass(eq=False)
class Votes:
    """Who has a vote in joint supports, on the device.

    Attributes:
        weight: ``(BATCH_MAX,)``, float32: 1 / number of votes for a row that has one, else 0.
        table: ``(1 + BATCH_MAX, n_layers)``, float32: thresholds by the number of votes.
        n_votes: ``(1,)``, float32.
        index: ``(1,)``, int64: the same, to look thresholds up.
        row: ``(1, n_layers)``, float32: what was looked up.
        n_rows: That the weights were written for.
        are_given: By `set_votes`; otherwise every row votes.
    """

    weight: Tensor
    table: Tensor
    n_votes: Tensor
    index: Tensor
    row: Tensor
    n_rows: int = 0
    are_given: bool = False

    @classmethod
    def none(cls, n_layers: int, device: torch.device) -> Votes:
        """Give the votes of nobody, for thresholds that are still to be written."""
        return cls(
            weight=torch.zeros(BATCH_MAX, dtype=torch.float32, device=device),
            table=torch.zeros(1 + BATCH_MAX, n_layers, dtype=torch.float32, device=device),
            n_votes=torch.zeros(1, dtype=torch.float32, device=device),
            index=torch.zeros(1, dtype=torch.int64, device=device),
            row=torch.zeros(1, n_layers, dtype=torch.float32, device=device),
        )

    def write(self, votes: Tensor, threshold: Tensor) -> None:
        """Give ``votes (n_rows,)`` the weights and thresholds of their number."""
        weight = self.weight[: len(votes)]
        weight.copy_(votes)
        torch.sum(weight, dim=0, keepdim=True, out=self.n_votes)
        self.index.copy_(self.n_votes)
        weight.div_(self.n_votes.clamp_(min=1))
        torch.index_select(self.table, 0, self.index, out=self.row)
        threshold[:, 0] = self.row[0]
        self.n_rows = len(votes)

    def expect(self, batch: int, threshold: Tensor) -> None:
        """See to it that the weights are those of a batch of this size."""
        if self.n_rows == batch:
            return
        if self.are_given:
            self.check_rows(batch)
        everyone = torch.ones(batch, dtype=torch.bool, device=self.weight.device)
        self.write(everyone, threshold)

    def check_rows(self, batch: int) -> None:
        """Refuse a batch of another size than the votes that were given."""
        if self.n_rows != batch:
            raise ValueError(
                f"[ffn] a batch of {batch} sequences and {self.n_rows} votes: want one for each; "
                "call csfast.set_votes."
            )

    def give(self, votes: Sequence[bool] | Tensor | None, threshold: Tensor) -> None:
        """Take what `set_votes` was given, after checking it."""
        if votes is None:
            self.are_given = False
            if self.n_rows:
                # At once: a captured graph of this batch does not come by to see to it.
                everyone = torch.ones(self.n_rows, dtype=torch.bool, device=self.weight.device)
                self.write(everyone, threshold)
            return
        if not isinstance(votes, Tensor):
            booleans = isinstance(votes, Sequence) and all(isinstance(v, bool) for v in votes)
            if not booleans or isinstance(votes, str):
                raise TypeError(f"[set_votes] votes = {votes!r}: want booleans.")
            votes = torch.tensor(votes, dtype=torch.bool, device="cpu")
        if votes.dtype != torch.bool:
            raise TypeError(f"[set_votes] votes of {votes.dtype}: want torch.bool.")
        if votes.ndim != 1 or not 1 <= len(votes) <= BATCH_MAX:
            raise ValueError(
                f"[set_votes] votes of shape {tuple(votes.shape)}: want (n,), n from 1 to "
                f"{BATCH_MAX}."
            )
        if votes.device not in (torch.device("cpu"), self.weight.device):
            raise ValueError(
                f"[set_votes] votes on {votes.device}: want cpu or {self.weight.device}."
            )
        self.write(votes, threshold)
        self.are_given = True
