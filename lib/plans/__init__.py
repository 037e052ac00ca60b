"""Which runs a notebook asks for, in the order in which they are worth computing when time is short.

A plan is a list of specs; asking for the same spec in two notebooks costs nothing, the record is shared.
"""

from collections.abc import Callable

from lib.config import Profile
from lib.plans.common import SPEED_ARCHITECTURES, dense, encoder_layers, engine_latency, stock_comparison
from lib.plans.poor_mans_bert import (
    contributions,
    halved_speed,
    layer_dropping,
    layer_sets,
    poor_mans_bert,
    similarity_of,
)
from lib.plans.structured_qa import operating_speed, point_name, structured_qa
from lib.specs import Spec

__all__ = [
    "PLANS", "SPEED_ARCHITECTURES", "contributions", "dense", "encoder_layers", "engine_latency", "halved_speed",
    "layer_dropping", "layer_sets", "make_plan", "operating_speed", "point_name", "similarity_of", "stock_comparison",
    "structured_qa",
]  # fmt: skip

PLANS: dict[str, Callable[[Profile], list[Spec]]] = {
    "dense": dense,
    "engine_latency": engine_latency,
    "stock_comparison": lambda profile: [stock_comparison(profile)],
    "contributions": contributions,
    "poor_mans_bert": poor_mans_bert,
    "halved_speed": halved_speed,
    "structured_qa": structured_qa,
    "operating_speed": operating_speed,
}


def make_plan(name: str, profile: Profile, budget_minutes: float | None) -> list[Spec]:
    """The plan called ``name``; one that depends on measurements makes them, within the budget."""
    return poor_mans_bert(profile, budget_minutes) if name == "poor_mans_bert" else PLANS[name](profile)
