"""A model with what codes are fitted to, a copy that takes them, and the judge of both."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from code_kinds import Bits, Made, Prepared, searched, side_by_side, turn_of, unfolded
from csfast import documents, judge, models, sketches
from csfast.calibration import sketching
from csfast.calibration.passes import undisturbed
from csfast.calibration.samples import draw, sorted_samples
from csfast.codes import feedback, trellis
from csfast.judge import agreement
from csfast.models import Stacked

LOGIT_BYTES = 2 << 30  # of the prompts that are read at a time


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: Of the code.
        kind: What it is compared with.
        make: Codes the model.
        seconds: A guess of what it takes on an H200, for SmolLM2-135M.
    """

    name: str
    kind: str
    make: Callable[[Study], Made]
    seconds: float


class Study:
    """A model with its moments and continuations, and a copy whose weights are replaced."""

    def __init__(self, args: argparse.Namespace) -> None:
        data = args.data / "valid.jsonl.xz" if args.data.is_dir() else args.data
        found = documents.read(data)
        self.seed: int = args.seed
        self.device = torch.device(args.device)
        self.model, tokenizer = models.load(args.model, dtype="float32", device=self.device)
        self.stacks = models.find_linears(self.model)
        self.by_name = {stack.name: stack for stack in self.stacks}
        select = documents.split(found, "select")
        drawn = draw(sorted_samples(select), self.model, tokenizer, args.tokens, args.seed)
        self.texts = [encoded.ids for taken in drawn for encoded in taken]
        say(f"{len(self.texts)} texts of {sum(t.shape[1] for t in self.texts)} tokens: moments")
        self.moments = sketching._moments(self.model, self.stacks, self.texts, lambda: None)
        self.prompts = agreement.choose_prompts(
            self.model,
            tokenizer,
            documents.split(found, "report"),
            per_task=args.prompts,
            new_tokens=args.new_tokens,
            seed=args.seed,
        )
        say(f"{len(self.prompts)} prompts continued by {args.new_tokens} tokens")
        embedding = self.model.get_input_embeddings()
        own = {
            name: parameter.clone()
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if self.model.get_submodule(name.rpartition(".")[0]) is not embedding
        }
        self.twin = agreement.coded(self.model, own)
        self.twins = {stack.name: stack for stack in models.find_linears(self.twin)}
        self.new_tokens: int = args.new_tokens
        keep = torch.float32 if self.device.type == "cuda" else torch.float16
        self.dense: list[tuple[Tensor, Tensor]] = [None] * len(self.prompts)  # type: ignore[list-item]
        for place, logits in self.read(self.model):
            self.dense[place] = (logits.to(keep), logits.argmax(-1))
        self.kept: dict[Any, Any] = {}  # what the last rows prepared
        self.matrices: dict[tuple[str, tuple[int, ...]], sketches.Matrix] = {}

    # Judging

    @torch.no_grad()
    def read(self, model: nn.Module) -> Iterator[tuple[int, Tensor]]:
        """Give the number of every prompt and logits along its continuation, float32."""
        n = self.new_tokens
        words = self.stacks[-1].rows
        n_rows = max(1, min(agreement.ROWS, LOGIT_BYTES // (4 * n * words)))
        texts = [torch.cat([prompt.ids, prompt.own])[:-1] for prompt in self.prompts]
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
        for start in range(0, len(order), n_rows):
            members = order[start : start + n_rows]
            width = max(len(texts[i]) for i in members)
            ids = torch.zeros(len(members), width, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(members):  # at the left, so that all end together
                ids[row, width - len(texts[i]) :], mask[row, width - len(texts[i]) :] = texts[i], 1
            logits = model(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                position_ids=(mask.cumsum(1) - 1).clamp_min(0).to(self.device),
                use_cache=False,
                logits_to_keep=n,
            ).logits
            for row, i in enumerate(members):
                yield i, logits[row].float()

    def judged(self) -> dict[str, Any]:
        """Compare the copy with the model along its continuations, as `agreement` does."""
        sums: dict[int, Tensor] = {}
        for place, logits in self.read(self.twin):
            dense, best = self.dense[place]
            p, q = dense.float().log_softmax(-1), logits.log_softmax(-1)
            target = self.prompts[place].own.to(self.device)[:, None]
            values = [
                (p.exp() * (p - q)).sum(1),
                best == logits.argmax(1),
                (p - q).gather(1, target)[:, 0],
            ]
            sums[place] = torch.stack([value.double().sum() for value in values])
        records = [[*sums[i].tolist(), self.new_tokens] for i in range(len(self.prompts))]
        pieces = [judge.Piece(p.document, p.ids[None], len(p.ids)) for p in self.prompts]
        found = agreement._summary(pieces, records, resamples=2000, seed=self.seed)
        return {
            **{key: found[key] for key in ("kl", "kl_ci95", "top1")},
            "tasks": {
                task: {key: of[key] for key in ("kl", "top1")}
                for task, of in found["tasks"].items()
            },
        }

    def put(self, name: str, weight: Tensor) -> None:
        """Replace a matrix of the copy."""
        linears = self.twins[name].linears
        parts = torch.split(weight, [linear.weight.shape[0] for linear in linears])
        for linear, part in zip(linears, parts, strict=True):
            linear.weight.data.copy_(part)

    def plain(self, name: str) -> Tensor:
        """Give a matrix as the model has it, ``(rows, cols)``."""
        return torch.cat([linear.weight.detach() for linear in self.by_name[name].linears])

    def restore(self) -> None:
        """Undo what `put` did."""
        for stack in self.stacks:
            self.put(stack.name, self.plain(stack.name))

    def run(self, row: Row) -> dict[str, Any]:
        """Code, judge, and count bits."""
        start = time.monotonic()
        with undisturbed():
            made = row.make(self)
            self.restore()
            for name, weight in made.weights.items():
                self.put(name, weight)
            with made.patch() if made.patch is not None else contextlib.nullcontext():
                judged = self.judged()
            if made.spent is not None:
                made.read = made.spent()
            error = None if made.patch else self.relative_error(made.weights)
        return {
            "name": row.name,
            "kind": row.kind,
            "bits": self.bits(made),
            **judged,
            "relative_error": error,
            "seconds": time.monotonic() - start,
        }

    def relative_error(self, weights: Mapping[str, Tensor]) -> float | None:
        """What replaced matrices leave of their outputs' squares, on average over matrices."""
        found = []
        for name, weight in weights.items():
            gain = self.by_name[name].gain()
            whole = self.plain(name)
            error = weight - whole
            if gain is not None:
                error, whole = error * gain, whole * gain
            moment = self.moments[name]
            found.append(((error @ moment) * error).sum() / ((whole @ moment) * whole).sum())
        return float(torch.stack(found).mean()) if found else None

    def bits(self, made: Made) -> dict[str, float]:
        """Bits a weight: stored and read of the layers, with norms; read of each part."""
        size = {stack.name: stack.rows * stack.cols for stack in self.stacks}

        def each(bits: Bits, kinds: Sequence[str]) -> tuple[float, int]:
            names = [stack.name for stack in self.stacks if stack.kind in kinds]
            whole = sum(bits.get(name, 16.0 * size[name]) for name in names)
            return whole, sum(size[name] for name in names)

        norms = 16 * sum(p.numel() for p in self.model.parameters() if p.dim() == 1)
        layers = (*sketches.PARTS["ffn"], *sketches.PARTS["attention"])
        found = {}
        for what, bits in (("stored", made.stored), ("read", made.read)):
            whole, n = each(bits, layers)
            found[what] = (whole + norms) / n
        for part, kinds in sketches.PARTS.items():
            whole, n = each(made.read, kinds)
            found[part] = whole / n
        return found

    # Coding

    def keep(self, key: Any, make: Callable[[], Any], most: int = 4) -> Any:
        """Give what was made before under a key, of the last few."""
        if key not in self.kept:
            of_kind = [other for other in self.kept if other[0] == key[0]]
            for other in of_kind[: len(of_kind) + 1 - most]:
                del self.kept[other]
            self.kept[key] = make()
        return self.kept[key]

    def prepared(
        self, turn: str, *, folded: bool = True, kinds: Sequence[str] | None = None
    ) -> list[Prepared]:
        """Give all matrices of the layers rotated, those of one size together.

        Args:
            turn: Name of the rotation.
            folded: Whether gains of norms are folded in, as in a sketch.
            kinds: Of matrices to give; all of the layers if left out.
        """
        asked = tuple(kinds or ("qkv", "o", "gate_up", "down"))

        def make(kind: str) -> list[Prepared]:
            sizes: dict[tuple[int, int], list[Stacked]] = {}
            for stack in self.stacks:
                if stack.kind == kind:
                    sizes.setdefault((stack.rows, stack.cols), []).append(stack)
            return [self._prepared(of, turn, folded) for of in sizes.values()]

        # Of two rotations at a time: each is as large as the model three times over.
        return [
            part
            for kind in asked
            for part in self.keep(
                ("prepared", turn, folded, kind), functools.partial(make, kind), 8
            )
        ]

    def _prepared(self, stacks: list[Stacked], turn: str, folded: bool) -> Prepared:
        turns, lefts, moments, factors, gains, own = [], [], [], [], [], []
        for stack in stacks:
            gain = stack.gain()
            moment = self.moments[stack.name].double()
            whole = self.plain(stack.name)
            if gain is not None and folded:
                whole = whole * gain
            elif gain is not None:
                moment = moment * gain.double() * gain.double()[:, None]
            found, n_bits = turn_of(turn, moment, self.seed, whole.square().mean(0))
            wide = found.inputs(found.inputs(moment).T).T.contiguous()
            turns.append(found)
            own.append(n_bits)
            gains.append(gain if folded else None)
            lefts.append(found.weight(whole))
            moments.append(wide.float())
            factors.append(feedback.spread(wide))
        return Prepared(
            stacks,
            turns,
            torch.stack(lefts),
            torch.stack(moments),
            torch.stack(factors),
            gains,
            own,
        )

    def trellis(self, of: Prepared, left: Tensor, bits: int, **options: Any) -> Tensor:
        """Code matrices of one size by trellises, ``(layers, rows, cols)``."""
        found = torch.empty_like(left)

        def job(i: int) -> Callable[[], None]:
            def code() -> None:
                part = left[i].contiguous()
                found[i] = searched(part, of.moment[i], of.factor[i], bits, **options)

            return code

        side_by_side([job(i) for i in range(len(left))], self.device)
        return found

    def levels(self, of: Prepared, bits: Sequence[int], **options: Any) -> list[Tensor]:
        """Code by trellises in levels, each of what those before leave."""
        left, found = of.left, []
        for n in bits:
            found.append(self.trellis(of, left, n, **options))
            left = left - found[-1]
        return found

    def code(self, wanted: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Code matrices at bits of each level as the package does, if that was not done before."""
        known: dict[str, list[tuple[int, ...]]] = {}
        for name, bits in self.matrices:
            known.setdefault(name, []).append(bits)
        missing = []
        for name, bits in wanted:
            longer = [other for other in known.get(name, []) if other[: len(bits)] == bits]
            if longer and (name, bits) not in self.matrices:
                matrix = self.matrices[name, longer[0]]
                levels = matrix.levels[: len(bits)]
                self.matrices[name, bits] = dataclasses.replace(matrix, levels=levels)
            elif not longer:
                missing.append((name, bits))
        missing.sort(key=lambda pair: -self.by_name[pair[0]].rows * self.by_name[pair[0]].cols)

        def job(name: str, bits: tuple[int, ...]) -> Callable[[], sketches.Matrix]:
            stack, moment = self.by_name[name], self.moments[name]
            levels = sketching.Levels(bits)
            return lambda: sketching.code(stack, moment.clone(), levels, self.seed)

        found = side_by_side([job(*pair) for pair in missing], self.device)
        self.matrices.update(zip(missing, found, strict=True))

    def coded(self, each: Mapping[str, tuple[int, ...]], base: int | None = None) -> Made:
        """Code matrices as the package does.

        Args:
            each: Bits of each level, by name of matrix.
            base: Levels that are read, all if left out.
        """
        self.code(list(each.items()))
        made = Made({}, {}, {})
        for name, bits in each.items():
            matrix = self.matrices[name, bits]
            made.weights[name] = self.decoded(matrix, base)
            own = 8 * matrix.rotation.words().nbytes
            sizes = [8 * (level.codes.nbytes + level.step.nbytes) for level in matrix.levels]
            made.stored[name], made.read[name] = own + sum(sizes), own + sum(sizes[:base])
        return made

    def decoded(self, matrix: sketches.Matrix, n_codes: int | None = None) -> Tensor:
        """Give what the first codes of a matrix stand for, as the model has it, on the device."""
        rows, cols = matrix.rows, matrix.cols
        whole = torch.zeros(rows, cols, device=self.device)
        for level in matrix.levels[:n_codes]:
            value = trellis.values(level.codes.to(self.device), rows, cols)
            whole += level.step.to(self.device).float()[:, None] * value
        turn = matrix.rotation
        there = turn.to(self.device)
        return unfolded(there.undo(whole), self.by_name[matrix.name].gain())

    def layers(self, *kinds: str) -> list[str]:
        """Names of the matrices of the layers, or of those of some kinds."""
        return [
            stack.name
            for stack in self.stacks
            if (stack.kind in kinds if kinds else stack.kind != "head")
        ]

    def costs(self, bits: int) -> dict[str, float]:
        """What coding each matrix at so many bits costs, as the package finds it."""

        def make() -> dict[str, float]:
            stacks = [self.by_name[name] for name in self.layers()]
            moments = {name: moment.clone() for name, moment in self.moments.items()}
            trials = sketching._trials(self.texts)
            return sketching._costs(
                self.model, stacks, moments, trials, bits, self.seed, lambda: None
            )

        found: dict[str, float] = self.keep(("costs", bits), make)
        return found

    @torch.no_grad()
    def crossed(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Moments of the copy's inputs, and of the model's with them, of all matrices but the head.

        Returns:
            ``E[x' x']`` and ``E[x x']``, ``(cols, cols)``, by name, without gains.
        """
        seen: dict[str, Tensor] = {}
        names = self.layers()
        zeros = {n: torch.zeros_like(self.moments[n]) for n in names}
        own, cross = zeros, {n: torch.zeros_like(z) for n, z in zeros.items()}

        def watch(stack: Stacked, see: Callable[[str, Tensor], None]) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                see(stack.name, stack.inputs(args[0] if args else next(iter(kwargs.values()))))

            module = stack.linears[0] if stack.norm is None else stack.norm
            return module.register_forward_pre_hook(hook, with_kwargs=True).remove

        def add(name: str, x: Tensor) -> None:
            own[name].addmm_(x.T, x)
            cross[name].addmm_(seen[name].T, x)

        with contextlib.ExitStack() as hooks:
            for name in names:
                hooks.callback(watch(self.by_name[name], seen.__setitem__))
                hooks.callback(watch(self.twins[name], add))
            for ids in self.texts:
                models.hidden_states(self.model, ids.to(self.device))
                models.hidden_states(self.twin, ids.to(self.device))
        n_tokens = sum(ids.shape[1] for ids in self.texts)
        for name in names:
            own[name] /= n_tokens
            cross[name] /= n_tokens
        return own, cross
