"""The runs of notebook 02: gates on heads and FFN units (McCarley et al. 2019).

Densities are shares kept. An operating point is a pair (heads, units), by default the ones of the paper's Table 1.
"""

from collections.abc import Mapping
from typing import Any

from lib.compressors import CompressorSpec
from lib.config import StudyError
from lib.data import get_task
from lib.distillation import Distillation
from lib.models import ARCHITECTURES, SPEED_ARCHITECTURES
from lib.plans.common import at_hand
from lib.settings import Profile
from lib.specs import ImportanceSpec, LatencyModel, LatencySpec, Spec, TrainSpec, dense_spec, training_settings
from lib.surgery import even_shapes

Densities = Mapping[str, float]

# What follows the pruning of an operating point, by the names that the notebook uses.
RECOVERIES: dict[str, Distillation | None] = {
    "retrain": None,
    "distil": Distillation(hard=0.0, logits=1.0),
    "retrain and distil": Distillation(hard=0.5, logits=0.5),
}


def gate_training(profile: Profile, task: str, seed: int, densities: Densities,
                  parent: TrainSpec | None = None) -> TrainSpec:  # fmt: skip
    """Train L0 gates on a finished model, everything else frozen, until these densities are met.

    ``parent`` is the run that made the model; None is the dense one, another makes a compound of two methods.
    """
    settings = profile.structured_pruning
    parent = parent or dense_spec(profile, task, seed)
    training = training_settings(profile, task, epochs=settings.gate_epochs, batch_size=settings.gate_batch_size)
    compressor = CompressorSpec(name="l0_gates", settings={"densities": dict(densities)})
    unaided = {"teacher": None, "distillation": None, "informed_by": ()}
    return parent.model_copy(update={"compressor": compressor, "start": parent, "training": training} | unaided)


def importance(profile: Profile, task: str, seed: int, method: str) -> ImportanceSpec:
    """Measure the gain of all gates, or leave each head out, on the finished dense model."""
    settings, parent = profile.structured_pruning, dense_spec(profile, task, seed)
    examples = settings.gain_examples if method == "gain" else settings.leave_one_out_examples
    return ImportanceSpec(task=task, data=parent.data, start=parent, method=method, examples=examples)  # type: ignore[arg-type]


def pruned(profile: Profile, task: str, seed: int, densities: Densities, selection: str,
           recovery: str | None = None, parent: TrainSpec | None = None,
           epochs: float | None = None) -> TrainSpec:  # fmt: skip
    """Cut a finished model to these densities at once, and then train it no further or in some way.

    Args:
        selection: "l0" (gates trained per kind, then combined), "l0-joint", "gain", "leave-one-out", "magnitude",
            "random", or "magnitude-iterative" (magnitude, a little at a time during training).
        recovery: one of ``RECOVERIES``; the teacher is the dense model.
        parent: as in ``gate_training``; for the selections "l0", "l0-joint", "magnitude" and "random".
        epochs: of the recovery; None takes the profile's ``retrain_epochs``.
    """
    settings, teacher = profile.structured_pruning, dense_spec(profile, task, seed)
    start = parent or teacher
    informed: tuple[Any, ...] = ()
    choice: dict[str, Any] = {"densities": dict(densities)}
    if selection in ("magnitude", "magnitude-iterative"):
        choice |= {"importance": "magnitude"} | ({"iterative": True} if selection != "magnitude" else {})
    elif selection == "random":
        choice |= {"importance": "random", "seed": seed}
    elif selection == "l0":
        informed = tuple(gate_training(profile, task, seed, {kind: value}, parent) for kind, value in densities.items())
    elif selection == "l0-joint":
        informed = (gate_training(profile, task, seed, densities, parent),)
    else:
        informed = (importance(profile, task, seed, selection.replace("-", "_")),)
    trained = (epochs or settings.retrain_epochs) if recovery else 0
    changes = {"epochs": trained} | ({"learning_rate": settings.retrain_learning_rate} if recovery else {})
    update: dict[str, Any] = {
        "compressor": CompressorSpec(name="structured", settings=choice), "start": start, "informed_by": informed,
        "training": training_settings(profile, task, **changes),
    }  # fmt: skip
    if recovery and RECOVERIES[recovery]:
        update |= {"distillation": RECOVERIES[recovery], "teacher": teacher}
    return teacher.model_copy(update=update)


def trained_longer(profile: Profile, task: str, seed: int) -> TrainSpec:
    """The fair control of retraining: the dense model, trained on for as long."""
    settings, parent = profile.structured_pruning, dense_spec(profile, task, seed)
    training = training_settings(
        profile, task, epochs=settings.retrain_epochs, learning_rate=settings.retrain_learning_rate
    )
    return parent.model_copy(update={"start": parent, "training": training})


def _selections(profile: Profile, task: str, seed: int) -> list[Spec]:
    """Five ways to choose, at every density of heads and of units."""
    settings, plan = profile.structured_pruning, list[Spec]()
    for kind, densities in (("heads", settings.head_densities), ("units", settings.unit_densities)):
        for density in densities:
            plan.append(gate_training(profile, task, seed, {kind: density}))
            methods = ["gain", "magnitude", "random"] + ["leave-one-out"] * (kind == "heads")
            plan += [pruned(profile, task, seed, {kind: density}, method) for method in methods]
    return plan


def _points(profile: Profile, task: str, seed: int, everything: bool) -> list[Spec]:
    """The operating points: heads and units together, and what training afterwards brings."""
    plan: list[Spec] = []
    for heads, units in profile.structured_pruning.operating_points:
        both = {"heads": heads, "units": units}
        if everything:
            others = ("gain", "magnitude", "random")
            plan += [pruned(profile, task, seed, both, selection) for selection in others]
            plan += [gate_training(profile, task, seed, both)]
        plan += [pruned(profile, task, seed, both, "l0")]
        recoveries = RECOVERIES if everything else ("retrain and distil",)
        plan += [pruned(profile, task, seed, both, "l0", recovery) for recovery in recoveries]
        if everything:
            plan += [pruned(profile, task, seed, both, "magnitude-iterative", "retrain")]
    return plan


def structured_qa(profile: Profile) -> list[Spec]:
    """All quality runs of notebook 02: the first task in full, the others at the operating points alone.

    Nothing where none of the chosen tasks is question answering.

    Raises:
        StudyError: the profile has question answering, and ``structured_pruning.tasks`` names no task of it.
    """
    settings, plan = profile.structured_pruning, list[Spec]()
    tasks = [task for task in settings.tasks if task in profile.tasks and get_task(task).kind == "qa"]
    there = ", ".join(task for task in profile.tasks if get_task(task).kind == "qa")
    if there and not any(task in profile.tasks for task in settings.tasks):
        raise StudyError(
            f"structured_pruning.tasks: found {', '.join(settings.tasks)}, expected question-answering tasks of "
            f"profile {profile.name}: {there}"
        )
    seeds = {task: profile.task_seeds(task, settings.seeds) for task in tasks}
    for seed in profile.seeds:
        for task in tasks:
            if seed not in seeds[task]:
                continue
            first = task == tasks[0]
            plan += [dense_spec(profile, task, seed)]
            if first:
                plan += _selections(profile, task, seed)
                plan += [trained_longer(profile, task, seed)]
            plan += _points(profile, task, seed, everything=first)
            if first:
                densities = settings.embedding_densities
                plan += [gate_training(profile, task, seed, {"embedding": density}) for density in densities]
    return plan


def operating_speed(profile: Profile) -> list[Spec]:
    """Latency of the published operating points at the published size, one run per engine, dense beside them.

    The paper prints shares for the whole model; here they are spread evenly over the layers, to whole heads and units.
    Engines that are not here are left out unless they are recorded.
    """
    settings, latency = profile.structured_pruning, profile.latency
    architecture = SPEED_ARCHITECTURES[settings.speed_shape]
    models = {"dense": LatencyModel(architecture=architecture)}
    for heads, units in settings.speed_points:
        shapes = even_shapes(ARCHITECTURES[architecture], heads, units)
        models[point_name(heads, units)] = LatencyModel(architecture=architecture, shapes=shapes)
    return at_hand(profile, [
        LatencySpec(
            models=models, dense="dense", engines=(engine,), batch=batch, length=settings.speed_length,
            threads=latency.threads, rounds=latency.rounds,
        )
        for batch in settings.speed_batches
        for engine in settings.speed_engines
    ])  # fmt: skip


def point_name(heads: float, units: float) -> str:
    """Name of an operating point by what is removed, in percent."""
    return f"{100 * (1 - heads):.1f} % heads, {100 * (1 - units):.1f} % units"
