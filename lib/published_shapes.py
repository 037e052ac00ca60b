"""Shapes of pruned models that the authors of block movement pruning published, with their F1 and GPU speed-up.

57 of the SQuAD 1.1 checkpoints of huggingface/nn_pruning (Apache-2.0): of each family (hybrid, hybrid filled and
struct; BERT-base and BERT-large) those on the frontier of F1 and speed-up, without near duplicates, and the hybrid
model behind the headline's; 44 shapes in all. With its shape the speed of a model can be measured again at full size,
without its weights. The published speed-ups are all relative to dense BERT-base, also BERT-large's (a GPU, batch 128).
Their code removes a head when its query, key or value is empty; that changes the function, and only here are its shapes
taken as they are.
"""

from functools import cache
from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lib.models import ARCHITECTURES, layer_count
from lib.published import Evidence, read_rows

HEADLINE = "squad_v1-207"  # "2.4 times faster, 74 % smaller, 1 F1 lost" is this checkpoint
FILE = Path(__file__).with_suffix(".csv")
SOURCE = "huggingface/nn_pruning (Apache-2.0), analysis/article/files/results_squadv1.json"


class PublishedShape(BaseModel):
    """One checkpoint. ``heads``, ``units`` and ``attention_weights`` (non-zero) are per layer; ``f1`` in percent."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    checkpoint: str = Field(min_length=1)
    model: Literal["bert-base-uncased", "bert-large-uncased"]
    variant: Literal["hybrid", "hybrid-filled", "struct"]
    teacher: Literal["base", "large"]
    heads: tuple[int, ...]
    units: tuple[int, ...]
    attention_weights: tuple[int, ...]
    f1: float = Field(ge=0, le=100)
    speedup: float = Field(gt=0)
    evidence: Evidence

    @field_validator("heads", "units", "attention_weights", mode="before")
    @classmethod
    def _numbers(cls, text: str) -> list[str]:
        return text.split()

    @model_validator(mode="after")
    def _fits_its_model(self) -> "PublishedShape":
        config = ARCHITECTURES[self.model]
        limits = {"heads": config.num_attention_heads, "units": config.intermediate_size,
                  "attention_weights": 4 * config.hidden_size**2}  # fmt: skip
        for field, limit in limits.items():
            values = getattr(self, field)
            if len(values) != layer_count(config) or not all(0 <= value <= limit for value in values):
                raise ValueError(f"{field}: expected {layer_count(config)} numbers from 0 to {limit}")
        return self

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(heads, units) of every layer, as ``LatencyModel`` takes them."""
        return tuple(zip(self.heads, self.units, strict=True))

    @property
    def attention_densities(self) -> tuple[float, ...]:
        """Share of the weights within each layer's kept heads that are not zero, at most 1."""
        config = ARCHITECTURES[self.model]
        head = 4 * config.hidden_size * config.hidden_size // config.num_attention_heads
        return tuple(
            min(1.0, weights / (head * heads)) if heads else 0.0
            for weights, heads in zip(self.attention_weights, self.heads, strict=True)
        )

    @property
    def stored_weights(self) -> int:
        """Weights of the linear maps once heads and units are removed; zeros inside them count."""
        config = ARCHITECTURES[self.model]
        head = 4 * config.hidden_size * config.hidden_size // config.num_attention_heads
        return head * sum(self.heads) + 2 * config.hidden_size * sum(self.units)

    @property
    def weights(self) -> int:
        """Non-zero weights of the linear maps."""
        return sum(self.attention_weights) + 2 * ARCHITECTURES[self.model].hidden_size * sum(self.units)

    @property
    def name(self) -> str:
        """Name of the shape, the same for two checkpoints that share it (a hybrid model and the filled one)."""
        return f"{self.model.split('-')[1]} {sum(self.heads)} heads {sum(self.units)} units"


@cache
def published_shapes(file: Path = FILE) -> tuple[PublishedShape, ...]:
    """Every checkpoint of the file, validated.

    Raises:
        StudyError: the file is missing or damaged; names the line.
    """
    return tuple(read_rows(file, PublishedShape))


def distinct_shapes() -> dict[str, PublishedShape]:
    """One checkpoint per distinct shape, by the shape's name."""
    return {shape.name: shape for shape in reversed(published_shapes())}


def shapes_frame() -> pd.DataFrame:
    """One row per checkpoint: name of its shape, model, variant, teacher, F1, speed-up over BERT-base, densities in
    percent (``density`` of non-zero weights, ``stored density`` after removal, both of the unpruned model's)."""
    rows = []
    for shape in published_shapes():
        config = ARCHITECTURES[shape.model]
        total = layer_count(config) * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size)
        rows.append({
            "checkpoint": shape.checkpoint, "shape": shape.name, "model": shape.model, "variant": shape.variant,
            "teacher": shape.teacher, "f1": shape.f1, "speedup": shape.speedup, "heads": sum(shape.heads),
            "units": sum(shape.units), "density": 100 * shape.weights / total,
            "stored density": 100 * shape.stored_weights / total,
        })  # fmt: skip
    return pd.DataFrame(rows)
