"""The runs of notebook 07: Kronecker factors, trained in two stages (Tahaei et al. 2021)."""

from typing import Any

from lib.compressors import CompressorSpec
from lib.distillation import Distillation
from lib.kronecker_models import KroneckerShapes, configuration
from lib.models import ARCHITECTURES, SPEED_ARCHITECTURES, layer_count, load_config
from lib.plans.common import at_hand, has_data
from lib.settings import Profile
from lib.specs import (
    DataSource,
    FactorisationSpec,
    LatencyModel,
    LatencySpec,
    Spec,
    TextDistillationSpec,
    TrainSpec,
    data_source,
    dense_spec,
    training_settings,
)
from lib.training import TrainingSettings

# What an ablation leaves out: (first stage, teacher in the second stage, nearest factors).
VARIANTS: dict[str, tuple[bool, bool, bool]] = {
    "full": (True, True, True),
    "no_text": (False, True, True),
    "no_teacher": (True, False, True),
    "neither": (False, False, True),
    "random": (True, True, False),
    "random_no_text": (False, True, False),
}


def encoder_shapes(profile: Profile, name: str) -> KroneckerShapes:
    """A published configuration at the size of the profile's encoder."""
    return configuration(name, load_config(profile.encoder))


def compressor(profile: Profile, name: str, nearest: bool = True) -> CompressorSpec:
    """The compressor of a configuration, with factors nearest to the pre-trained weights or at random."""
    settings = encoder_shapes(profile, name).model_dump(mode="json", exclude_defaults=True)
    return CompressorSpec(name="kronecker", settings=settings | ({} if nearest else {"initialisation": "random"}))


def objective(profile: Profile, labels: bool) -> Distillation:
    """The paper's loss, every term of unit weight: sums over the layers where ``Distillation`` takes means.

    Args:
        labels: whether there is a task, with labels and logits, or only text.
    """
    n, task = layer_count(load_config(profile.encoder)), float(labels)
    return Distillation(hard=task, logits=task, temperature=1.0, embedding=1.0, hidden_states=n, attention_scores=n)


def text_stage(profile: Profile, name: str, nearest: bool = True) -> TextDistillationSpec:
    """The first stage; every task and seed of a configuration starts with the same one."""
    settings, training = profile.kronecker, profile.training.model_dump(exclude={"checkpoint_minutes"})
    tasks = _text_tasks(profile)
    sources = [data_source(profile, task) for task in tasks if task not in profile.own_tasks]
    rest: DataSource = "embedded" if sources else "local"  # a user's own files alone are local
    values: dict[str, Any] = training | {
        "epochs": settings.text_epochs, "batch_size": settings.text_batch_size, "freeze_embeddings": False,
        "learning_rate": settings.text_learning_rate, "max_length": settings.text_max_length,
        "stride": settings.text_max_length // 8, "train_examples": settings.text_examples,
        "eval_examples": settings.text_held_out,
    }  # fmt: skip
    return TextDistillationSpec(
        tasks=tasks, data=next((source for source in sources if source != "embedded"), rest),
        encoder=profile.encoder, seed=profile.seeds[0], training=TrainingSettings.model_validate(values),
        compressor=compressor(profile, name, nearest), distillation=objective(profile, labels=False),
    )  # fmt: skip


def _text_tasks(profile: Profile) -> tuple[str, ...]:
    """The tasks whose text is read: where those chosen have their data without a folder, of the others none."""
    named = profile.kronecker.text_tasks
    if not all(has_data(profile, task) for task in profile.tasks):
        return named  # nothing is computed, and the recorded first stage is to be found
    return tuple(task for task in named if has_data(profile, task)) or tuple(profile.tasks)


def task_stage(profile: Profile, task: str, seed: int, name: str, variant: str = "full") -> TrainSpec:
    """The second stage on one task, after the first one or without it; ``variant`` is one of ``VARIANTS``."""
    text, teacher, nearest = VARIANTS[variant]
    settings, parent = profile.kronecker, dense_spec(profile, task, seed)
    changes: dict[str, Any] = {
        "epochs": settings.epochs.get(task, settings.epoch_factor * profile.tasks[task].epochs),
        "learning_rate": settings.learning_rate, "freeze_embeddings": False,
    }  # fmt: skip
    update: dict[str, Any] = {
        "compressor": compressor(profile, name, nearest), "training": training_settings(profile, task, **changes),
        "start": text_stage(profile, name, nearest) if text else None,
    }  # fmt: skip
    if teacher:
        update |= {"teacher": parent, "distillation": objective(profile, labels=True)}
    return parent.model_copy(update=update)


def variant_of(spec: TrainSpec) -> str:
    """Which of ``VARIANTS`` a run with Kronecker factors is."""
    assert spec.compressor is not None
    nearest = spec.compressor.settings.get("initialisation", "nearest") == "nearest"
    parts = (isinstance(spec.start, TextDistillationSpec), spec.teacher is not None, nearest)
    return next((name for name, wanted in VARIANTS.items() if wanted == parts), "other")


def factorisation(profile: Profile) -> FactorisationSpec:
    """How near sums of products come to the pre-trained weights, in both orders of the factors."""
    shapes: dict[str, KroneckerShapes] = {}
    for name in profile.kronecker.untrained:
        for terms in profile.kronecker.error_terms:
            for swap in (False, True):
                changed = encoder_shapes(profile, name).model_copy(update={"terms": terms, "swap": swap})
                shapes[f"{name}, {terms} term{'s' * (terms > 1)}{', swapped' * swap}"] = changed
    return FactorisationSpec(encoder=profile.encoder, shapes=shapes)


def kronecker(profile: Profile) -> list[Spec]:
    """All quality runs of notebook 07.

    First the headline: both stages of the first two configurations on every task, one seed; then the ablations, then
    further seeds, then the configurations left over.
    """
    settings = profile.kronecker
    tasks = [task for task in settings.tasks if task in profile.tasks]
    ablated = [task for task in settings.ablation_tasks if task in profile.tasks]
    plan: list[Spec] = []
    for seed in profile.seeds:
        for name in settings.configurations[:2]:
            plan += _configuration(profile, name, tasks, seed)
        if seed == profile.seeds[0]:
            for variant in settings.ablations:
                if variant == "random":
                    plan.append(text_stage(profile, settings.configurations[0], nearest=False))
                plan += _configuration(profile, settings.configurations[0], ablated, seed, variant)
    for seed in profile.seeds:
        for name in settings.configurations[2:]:
            plan += _configuration(profile, name, tasks, seed)
        if seed != profile.seeds[0]:
            for variant in settings.ablations:
                plan += _configuration(profile, settings.configurations[0], ablated, seed, variant)
    return plan


def _configuration(profile: Profile, name: str, tasks: list[str], seed: int, variant: str = "full") -> list[Spec]:
    plan: list[Spec] = [text_stage(profile, name)] if variant == "full" else []
    for task in tasks:
        if seed in profile.task_seeds(task):
            plan += [dense_spec(profile, task, seed), task_stage(profile, task, seed, name, variant)]
    return plan


def kronecker_speed(profile: Profile) -> list[Spec]:
    """Latency of the configurations at the published size, random weights, one run per engine, dense beside them.

    Engines that are not here are left out unless they are recorded.
    """
    settings, architecture = profile.kronecker, SPEED_ARCHITECTURES[profile.kronecker.speed_shape]
    models = {"dense": LatencyModel(architecture=architecture)} | {
        name: LatencyModel(architecture=architecture, kronecker=configuration(name, ARCHITECTURES[architecture]))
        for name in settings.untrained
    }
    return at_hand(profile, [
        LatencySpec(
            models=models, dense="dense", engines=(engine,), batch=batch, length=settings.speed_length,
            threads=profile.latency.threads, rounds=profile.latency.rounds,
        )
        for batch in settings.speed_batches
        for engine in settings.speed_engines
    ])  # fmt: skip
