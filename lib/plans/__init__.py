"""Which runs a notebook asks for, in the order in which they are worth computing when time is short.

A plan is a list of specs; asking for the same spec in two notebooks costs nothing, the record is shared.
"""

from collections.abc import Callable

from lib.models import SPEED_ARCHITECTURES
from lib.plans.block_movement import (
    block_movement,
    block_sparse_speed,
    published_shape_speed,
    trained_speed,
    training_overhead,
)
from lib.plans.common import dense, encoder_layers, engine_latency, majority, stock_comparison
from lib.plans.frontier import frontier, recipe_latency, recipe_seeds, recipes
from lib.plans.fullyqt import fully_quantized, translation, translation_speed
from lib.plans.kronecker import factorisation, kronecker, kronecker_speed
from lib.plans.obert import fisher_cost, obert, published_checkpoints, sparse_speed
from lib.plans.poor_mans_bert import (
    contributions,
    halved_speed,
    layer_dropping,
    layer_sets,
    poor_mans_bert,
    similarity_of,
)
from lib.plans.structured_qa import operating_speed, point_name, structured_qa
from lib.settings import Profile
from lib.specs import Spec

__all__ = [
    "MEASURED_FIRST", "PLANS", "SPEED_ARCHITECTURES", "block_movement", "block_sparse_speed", "contributions",
    "dense", "encoder_layers", "engine_latency", "factorisation", "fisher_cost", "frontier", "fully_quantized",
    "halved_speed", "kronecker", "kronecker_speed", "layer_dropping", "layer_sets", "majority", "make_plan", "obert",
    "operating_speed", "point_name", "published_checkpoints", "published_shape_speed", "recipe_latency", "recipe_seeds",
    "recipes", "similarity_of", "sparse_speed", "stock_comparison", "structured_qa", "trained_speed",
    "training_overhead", "translation", "translation_speed",
]  # fmt: skip

PLANS: dict[str, Callable[[Profile], list[Spec]]] = {
    "block_movement": block_movement,
    "published_shape_speed": published_shape_speed,
    "block_sparse_speed": block_sparse_speed,
    "training_overhead": lambda profile: [training_overhead(profile)],
    "dense": dense,
    "majority": majority,
    "engine_latency": engine_latency,
    "stock_comparison": lambda profile: [stock_comparison(profile)] if profile.latency.compare_training else [],
    "contributions": contributions,
    "poor_mans_bert": poor_mans_bert,
    "halved_speed": halved_speed,
    "structured_qa": structured_qa,
    "obert": obert,
    "fisher_cost": fisher_cost,
    "sparse_speed": sparse_speed,
    "published_checkpoints": published_checkpoints,
    "frontier": frontier,
    "operating_speed": operating_speed,
    "translation": translation,
    "fullyqt": fully_quantized,
    "translation_speed": translation_speed,
    "factorisation": lambda profile: [factorisation(profile)],
    "kronecker": kronecker,
    "kronecker_speed": kronecker_speed,
}

# What a plan must have measured before all of it can be planned.
MEASURED_FIRST: dict[str, Callable[[Profile], list[Spec]]] = {"poor_mans_bert": contributions}


def make_plan(name: str, profile: Profile, budget_minutes: float | None) -> list[Spec]:
    """The plan called ``name``; one that depends on measurements makes them, within the budget."""
    return poor_mans_bert(profile, budget_minutes) if name == "poor_mans_bert" else PLANS[name](profile)
