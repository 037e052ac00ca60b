"""Block movement pruning (Lagunas, Charlaix, Sanh and Rush 2021, arXiv:2109.04838).

Every block of every encoder matrix has a score S that is trained beside the weights; the block is there while
sigmoid(S) > tau. tau rises from 0 along a cubic curve, and the loss gets a penalty that pushes scores down::

    lambda(t) * mean over kinds of ( lambda_kind * mean over the kind's matrices of mean sigmoid(S) )
    lambda(t) = lambda_f * tau(t) / tau_f

Kinds are attention and FFN. The blocks are free: 32 × 32 everywhere (*block*), 32 × 32 on attention and one score per
FFN unit, shared by its row and its column (*hybrid*), or whole heads and units (*struct*). ``BlockMovement`` trains and
removes what became empty; ``lib.compressors.refill`` makes a hybrid model dense within the heads and units that it kept
(*hybrid filled*). Blocks of 1 × 1 with the best k kept are unstructured movement pruning (Sanh, Wolf and Rush 2020),
and the same schedule over the weights' magnitude is the baseline of both.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, Trainer

from lib.block_scores import (
    KINDS,
    PARTS,
    Kind,
    MaskedBias,
    MaskedWeight,
    Matrix,
    Scores,
    original,
    put_mask,
    shape_summary,
)
from lib.blocks import (
    attention_parts,
    best,
    block_sums,
    ffn_parts,
    grid_of,
    remove_empty,
    times_blocks,
)
from lib.compressors.base import Compressor
from lib.config import StudyError
from lib.settings import Strict

HISTORY_POINTS = 20
RENEWALS = 200  # times that a top-k mask is chosen anew in a run; a threshold mask is, before every step
BINS = [-20.0, -10.0, -7.0, -5.0, -4.0, -3.0, -2.5, -2.2, -1.8, -1.4, -1.0, -0.6, -0.2, 0.2, 0.6, 1.0, 1.4, 1.8, 2.2,
        2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0]  # fmt: skip


def ramp(progress: float, begin: float, end: float) -> float:
    """0 until ``begin``, 1 from ``end`` on, cubic between: 1 - (1 - x)^3 (Zhu and Gupta 2017)."""
    x = min(1.0, max(0.0, (progress - begin) / (end - begin)))
    return 1 - (1 - x) ** 3


class BlockMovement(Compressor):
    """Trains scores and weights together; ``finalize`` writes the zeros in and removes empty heads and units."""

    class Settings(Strict):
        """``threshold`` masks follow tau and lambda, ``top-k`` masks keep a share ``density`` of each kind's blocks.

        However strong lambda is, a threshold leaves a share ``least_density`` of each kind (the paper, which chooses
        lambda for every task, has no such bound). The schedule is flat until progress ``begin`` and from ``end`` on.
        ``importance`` "magnitude" ranks by the weights' norm and trains no score. The best k are those of a kind, or
        with ``per_matrix`` of every matrix.
        """

        variant: Literal["block", "hybrid", "struct"] = "hybrid"
        block: tuple[PositiveInt, PositiveInt] = (32, 32)
        mask: Literal["threshold", "top-k"] = "threshold"
        importance: Literal["movement", "magnitude"] = "movement"
        final_threshold: float = Field(default=0.1, gt=0, lt=0.5)  # a score begins at sigmoid(0) = 0.5
        final_lambda: float = Field(default=10.0, ge=0)
        attention_lambda: float = Field(default=1.0, ge=0)
        ffn_lambda: float = Field(default=1.0, ge=0)
        least_density: float = Field(default=0.0, ge=0, lt=1)
        density: float | None = Field(default=None, gt=0, le=1)
        per_matrix: bool = False
        score_learning_rate: float = Field(default=1e-2, gt=0)
        begin: float = Field(default=0.05, ge=0, lt=1)
        end: float = Field(default=0.5, gt=0, le=1)

    name: ClassVar[str] = "block_movement"
    settings: Settings

    def attach(self, model: PreTrainedModel) -> None:
        settings = self.settings
        if settings.begin >= settings.end:
            raise StudyError(f"block_movement: begin {settings.begin} is not before end {settings.end}; lower it")
        if (settings.mask == "top-k") != (settings.density is not None):
            raise StudyError("block_movement: density belongs to top-k masks; give both or neither")
        if settings.mask != "top-k" and settings.per_matrix:
            raise StudyError("block_movement: per_matrix belongs to top-k masks; a threshold is one for all")
        if settings.mask == "top-k" and settings.least_density:
            raise StudyError("block_movement: least_density belongs to threshold masks; top-k masks have density")
        if settings.importance == "magnitude" and settings.mask != "top-k":
            raise StudyError("block_movement: magnitude has no scores for a threshold; give mask top-k and a density")
        self.model = model
        self.matrices = list(self._matrices(model))
        grids = {
            matrix.scores: grid_of(matrix.linear.weight.shape, matrix.block, f"{matrix.place}, {matrix.part}")
            for matrix in self.matrices
            if not matrix.turned
        }
        self.kinds: dict[str, Kind] = {matrix.scores: matrix.kind for matrix in self.matrices}
        self.scores = Scores(grids, settings.importance == "movement")
        model.add_module("study_scores", self.scores)
        for matrix in self.matrices:
            put_mask(matrix.linear, "weight", MaskedWeight(self.scores, matrix))
            if matrix.masked and matrix.linear.bias is not None:
                put_mask(matrix.linear, "bias", MaskedBias(self.scores, matrix))
        self.renewed = -1
        self.held: list[str] = []
        self.history: list[dict[str, Any]] = []

    def _matrices(self, model: PreTrainedModel) -> Iterator[Matrix]:
        variant = self.settings.variant
        for number, attention in enumerate(attention_parts(model)):
            for part in PARTS["attention"]:
                linear, block = getattr(attention, part), self.settings.block
                if variant == "struct":
                    out = part == "attention_output"
                    block = (linear.out_features, attention.size) if out else (attention.size, linear.in_features)
                yield Matrix("attention", attention.place, part, linear, block, f"attention{number}_{part}")
        for number, ffn in enumerate(ffn_parts(model)):
            if variant == "block":
                for part in PARTS["ffn"]:
                    linear = getattr(ffn, part)
                    yield Matrix("ffn", ffn.place, part, linear, self.settings.block, f"ffn{number}_{part}")
            else:  # a unit's row of the first matrix and its column of the second live and die together
                name, rows, columns = f"ffn{number}_units", (1, ffn.ffn_in.in_features), (ffn.ffn_out.out_features, 1)
                yield Matrix("ffn", ffn.place, "ffn_in", ffn.ffn_in, rows, name, masked=False)
                yield Matrix("ffn", ffn.place, "ffn_out", ffn.ffn_out, columns, name, turned=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        trained = list(self.scores.values.values())
        return [{"params": trained, "lr": self.settings.score_learning_rate, "weight_decay": 0.0}] if trained else []

    def threshold(self, progress: float) -> float:
        """tau(t): 0 at first, ``final_threshold`` at last."""
        return self.settings.final_threshold * ramp(progress, self.settings.begin, self.settings.end)

    def penalty_factor(self, progress: float) -> float:
        """lambda(t) = lambda_f * tau(t) / tau_f; 0 for top-k masks, which need no penalty."""
        if self.settings.mask == "top-k":
            return 0.0
        return self.settings.final_lambda * self.threshold(progress) / self.settings.final_threshold

    def penalty(self, progress: float) -> Tensor | float:
        factor = self.penalty_factor(progress)
        if factor == 0:
            return 0.0
        weight = {"attention": self.settings.attention_lambda, "ffn": self.settings.ffn_lambda}
        means: dict[Kind, list[Tensor]] = {}
        for name, scores in self.scores.values.items():
            means.setdefault(self.kinds[name], []).append(torch.sigmoid(scores).mean())
        return factor * torch.stack([weight[kind] * torch.stack(found).mean() for kind, found in means.items()]).mean()

    @torch.no_grad()
    def step(self, progress: float, trainer: Trainer) -> None:
        self._renew(progress)
        if len(self.history) <= progress * HISTORY_POINTS:
            self.history.append(self._state(progress))

    def _renew(self, progress: float) -> None:
        """Choose the masks that belong to this progress."""
        if self.settings.mask == "threshold":
            self._compare(self.threshold(progress))
        elif int(progress * RENEWALS) > self.renewed:
            self.renewed = int(progress * RENEWALS)
            self._choose_best(progress)
        for kind in KINDS:
            if not any(self.scores.mask(name).any() for name in self._of(kind)):
                raise StudyError(
                    f"block_movement: every {kind} block is pruned at {progress:.0%} of training; "
                    f"lower final_lambda or {kind}_lambda, or raise density or least_density"
                )

    def _compare(self, threshold: float) -> None:
        """Keep what is above the threshold, and in each kind the best ``least_density`` in any case."""
        bound = float(torch.logit(torch.tensor(threshold)))  # -inf for 0, so that all are kept
        self.held = []
        for kind in KINDS:
            names = self._of(kind)
            masks = [self.scores.values[name] > bound for name in names]
            if sum(int(mask.sum()) for mask in masks) < self._share(names, self.settings.least_density):
                self._keep_best(names, self.settings.least_density)
                self.held.append(kind)
                continue
            for name, mask in zip(names, masks, strict=True):
                self.scores.mask(name).copy_(mask)

    def _choose_best(self, progress: float) -> None:
        assert self.settings.density is not None
        share = 1 - (1 - self.settings.density) * ramp(progress, self.settings.begin, self.settings.end)
        for kind in KINDS:
            for names in [[name] for name in self._of(kind)] if self.settings.per_matrix else [self._of(kind)]:
                self._keep_best(names, share)

    def _keep_best(self, names: list[str], share: float) -> None:
        """Keep that share of the blocks of these matrices, ranked together."""
        ranked = [self._ranking(name) for name in names]
        for name, mask in zip(names, best(ranked, self._share(names, share)), strict=True):
            self.scores.mask(name).copy_(mask)

    def _share(self, names: list[str], share: float) -> int:
        """How many blocks are that share of these matrices'."""
        return round(share * sum(self.scores.mask(name).numel() for name in names))

    def _ranking(self, name: str) -> Tensor:
        """Trained scores, or the norm of each block's weights; two matrices that share scores are taken together."""
        if name in self.scores.values:
            return self.scores.values[name]
        squares = torch.zeros_like(self.scores.mask(name), dtype=torch.float32)
        for matrix in self.matrices:
            if matrix.scores == name:
                grid = squares.t().shape if matrix.turned else squares.shape
                sums = block_sums(original(matrix.linear).square(), grid)
                squares += sums.t() if matrix.turned else sums
        return squares.sqrt()

    def _of(self, kind: Kind) -> list[str]:
        """Names of the scores of a kind."""
        return [name for name, of in self.kinds.items() if of == kind]

    def _state(self, progress: float) -> dict[str, Any]:
        """A point of the history: schedule, densities of the masks, what is alive in each layer, scores."""
        kept = {matrix.part: 0 for matrix in self.matrices}
        for matrix in self.matrices:
            kept[matrix.part] += int(self.scores.mask(matrix.scores).sum()) * matrix.block[0] * matrix.block[1]
        weights = {part: sum(m.linear.weight.numel() for m in self.matrices if m.part == part) for part in kept}
        densities = {part: kept[part] / weights[part] for part in kept}
        densities["all"] = sum(kept.values()) / sum(weights.values())
        threshold = self.threshold(progress) if self.settings.mask == "threshold" else None
        return {
            "progress": progress, "threshold": threshold, "lambda": self.penalty_factor(progress),
            "held": list(self.held), "density": densities, "heads": self._alive("attention"),
            "units": self._alive("ffn"), "score_counts": {kind: self._counts(kind) for kind in KINDS},
        }  # fmt: skip

    def _alive(self, kind: Kind) -> list[int]:
        """In each place, how many heads or units the masks leave any influence, as ``remove_empty`` will find."""
        inward, outward = ("value", "attention_output") if kind == "attention" else ("ffn_in", "ffn_out")
        rows, columns = ([m for m in self.matrices if m.part == part] for part in (inward, outward))
        sizes = [part.size for part in attention_parts(self.model)] if kind == "attention" else [1] * len(rows)
        alive = []
        for one, other, size in zip(rows, columns, sizes, strict=True):
            here = self.scores.mask(one.scores).any(1).repeat_interleave(one.block[0])
            mask = self.scores.mask(other.scores)
            there = (mask.t() if other.turned else mask).any(0).repeat_interleave(other.block[1])
            alive.append(int((here.view(-1, size).any(1) & there.view(-1, size).any(1)).sum()))
        return alive

    def _counts(self, kind: Kind) -> list[int]:
        found = [self.scores.values[name].detach().flatten() for name in self._of(kind) if name in self.scores.values]
        if not found:
            return []
        values = torch.cat(found).float().cpu().clamp(BINS[0], BINS[-1])
        return [int(count) for count in torch.histogram(values, torch.tensor(BINS)).hist]

    @torch.no_grad()
    def finalize(self, model: PreTrainedModel) -> PreTrainedModel:
        if not all(torch.isfinite(scores).all() for scores in self.scores.values.values()):
            raise StudyError("block_movement: some scores are not finite; lower score_learning_rate or final_lambda")
        self._renew(1.0)
        self.history.append(self._state(1.0))
        for matrix in self.matrices:
            linear: Any = matrix.linear
            for name in list(linear.parametrizations):
                parametrize.remove_parametrizations(linear, name, leave_parametrized=True)
            if not matrix.masked:
                mask = self.scores.mask(matrix.scores)
                linear.weight.copy_(times_blocks(linear.weight, mask))
                linear.bias.mul_(mask.flatten())
        del model.study_scores
        heads = remove_empty(model)
        self.result = shape_summary(model) | {"kept_heads": heads, "history": self.history, "bins": BINS}
        return model

    def summary(self) -> dict[str, Any]:
        return self.result

    def state_dict(self) -> dict[str, Any]:
        return {"renewed": self.renewed, "history": self.history}

    def load_state_dict(self, state: dict[str, Any], model: PreTrainedModel) -> None:
        self.renewed, self.history = state["renewed"], list(state["history"])
