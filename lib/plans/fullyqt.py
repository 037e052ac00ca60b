"""The runs of notebook 06: the fully quantised Transformer (Prato, Charlaix and Rezagholizadeh 2020)."""

from collections.abc import Iterator
from typing import Any

from lib.compressors import CompressorSpec
from lib.config import StudyError
from lib.plans.common import at_hand, with_data
from lib.quantized_layers import PARTS
from lib.settings import Profile
from lib.specs import (
    EngineQualitySpec,
    Spec,
    TrainSpec,
    TranslationLatencySpec,
    TranslationSpec,
    data_source,
    dense_spec,
    training_settings,
)
from lib.training import TrainingSettings
from lib.translation import TranslationShape

# What is taken away from the paper's recipe, alone and together.
GUARDS: dict[str, dict[str, bool]] = {
    "masked scores counted": {"mask_guard": False},
    "denominator from zero": {"denominator_guard": False},
    "neither guard": {"mask_guard": False, "denominator_guard": False},
}


def quantization(bits: int, **settings: Any) -> CompressorSpec:
    """The compressor's spec; settings at their default are left out."""
    return CompressorSpec(name="quantization", settings={"bits": bits} | settings)


def translation_shape(profile: Profile, task: str) -> TranslationShape:
    """The size of a task's translation model.

    Raises:
        StudyError: the profile has no such translation task.
    """
    if task not in profile.translation:
        known = ", ".join(profile.translation)
        raise StudyError(f"profile {profile.name} has no translation task '{task}'; it has {known}")
    return TranslationShape.model_validate(
        profile.translation[task].model_dump(include=set(TranslationShape.model_fields))
    )


def dense_translation(profile: Profile, task: str, seed: int, **changes: Any) -> TranslationSpec:
    """The dense translation model of a task, trained from random weights; ``changes`` are of its training.

    Raises:
        StudyError: the profile has no such translation task.
    """
    shape, settings = translation_shape(profile, task), profile.translation[task]
    values = settings.model_dump(
        include={"epochs", "batch_size", "learning_rate", "warmup", "dropout", "max_length", "train_examples",
                 "eval_examples"}
    )  # fmt: skip
    shared = profile.training.model_dump(include={"precision", "weight_decay", "max_grad_norm"})
    return TranslationSpec(
        task=task, data=data_source(profile, task), seed=seed, shape=shape,
        training=TrainingSettings.model_validate(values | shared | {"freeze_embeddings": False} | changes),
        label_smoothing=settings.label_smoothing, beams=settings.beams, length_penalty=settings.length_penalty,
    )  # fmt: skip


def translation(profile: Profile) -> list[Spec]:
    """The dense translation models, the headline task first; those without data are left out by ``with_data``."""
    tasks = [(task, seed) for task in profile.translation for seed in profile.task_seeds(task)]
    return with_data(profile, [dense_translation(profile, task, seed) for task, seed in tasks])


def trained_on(profile: Profile, task: str, seed: int, compressor: CompressorSpec | None = None) -> TranslationSpec:
    """The finished dense model, trained on for a while: quantised, or dense as the fair control."""
    settings, dense = profile.fully_quantized, dense_translation(profile, task, seed)
    values = {"epochs": settings.epochs[task] * dense.training.epochs,
              "learning_rate": settings.learning_rate * dense.training.learning_rate}  # fmt: skip
    training = dense.training.model_copy(update=values)
    return dense.model_copy(update={"start": dense, "training": training, "compressor": compressor})


def aware(profile: Profile, task: str, seed: int, bits: int, **settings: Any) -> TranslationSpec:
    """Quantisation-aware training that begins with the finished dense model."""
    delay = profile.fully_quantized.aware_delay
    return trained_on(profile, task, seed, quantization(bits, delay=delay, **settings))


def post_training(profile: Profile, task: str, seed: int, bits: int, **settings: Any) -> TranslationSpec:
    """The finished dense model, calibrated and rounded."""
    dense = dense_translation(profile, task, seed)
    compressor = quantization(bits, **_calibration(profile), **settings)
    untrained = dense.training.model_copy(update={"epochs": 0.0})
    return dense.model_copy(update={"start": dense, "training": untrained, "compressor": compressor})


def from_scratch(profile: Profile, task: str, seed: int, bits: int, delay: float, **settings: Any) -> TranslationSpec:
    """The paper's procedure: train from random weights, quantised after a delay."""
    dense = dense_translation(profile, task, seed)
    return dense.model_copy(update={"compressor": quantization(bits, delay=delay, **settings)})


def _calibration(profile: Profile) -> dict[str, int]:
    batches, size = profile.fully_quantized.calibration
    return {"calibration_batches": batches, "calibration_batch_size": size}


def _precision(profile: Profile, task: str, seed: int) -> Iterator[Spec]:
    """Dense, rounded afterwards, trained on rounded, and the control."""
    yield dense_translation(profile, task, seed)
    for bits in profile.fully_quantized.bits:
        yield post_training(profile, task, seed, bits)
        yield aware(profile, task, seed, bits)
    yield trained_on(profile, task, seed)


def _simpler(profile: Profile, task: str, seed: int) -> Iterator[Spec]:
    """Rounded after training with one range per matrix, and with LayerNorm's variance rounded from zero."""
    for bits in profile.fully_quantized.bits:
        yield post_training(profile, task, seed, bits, bucketing=False)
        yield post_training(profile, task, seed, bits, **GUARDS["denominator from zero"])


def _ablations(profile: Profile, task: str, seed: int) -> Iterator[Spec]:
    """Parts one by one, guards taken away in training, delays."""
    settings = profile.fully_quantized
    yield aware(profile, task, seed, min(settings.bits), bucketing=False)
    for bits in settings.part_bits:
        yield from (post_training(profile, task, seed, bits, parts=[part]) for part in PARTS)
    for bits in settings.naive_bits:
        for taken in GUARDS.values():
            naive = from_scratch(profile, task, seed, bits, 0.0, **taken, watch=True)
            shorter = naive.training.model_copy(update={"epochs": settings.naive_epochs * naive.training.epochs})
            yield naive.model_copy(update={"training": shorter})
    for bits in settings.delay_bits:
        for delay in (*settings.delays, settings.scratch_delay):
            yield from_scratch(profile, task, seed, bits, delay)


def qa_post_training(profile: Profile, seed: int, bits: int, **settings: Any) -> TrainSpec:
    """The finished dense QA model, calibrated and rounded."""
    task = profile.fully_quantized.qa_task
    dense = dense_spec(profile, task, seed)
    compressor = quantization(bits, **_calibration(profile), **settings)
    training = training_settings(profile, task, epochs=0)
    return dense.model_copy(update={"start": dense, "training": training, "compressor": compressor})


def qa_trained_on(profile: Profile, seed: int, bits: int | None, recalibrated: bool = True) -> TrainSpec:
    """The finished dense QA model, trained on: quantised, or dense as the fair control.

    ``recalibrated`` takes the ranges anew after training, which has dropout; the paper does not say so.
    """
    settings = profile.fully_quantized
    dense = dense_spec(profile, settings.qa_task, seed)
    training = training_settings(
        profile, settings.qa_task, epochs=settings.qa_epochs, learning_rate=settings.qa_learning_rate
    )
    batches, size = settings.calibration
    anew = {"recalibration_batches": batches, "calibration_batch_size": size} if recalibrated else {}
    compressor = quantization(bits, delay=settings.aware_delay, **anew) if bits else None
    return dense.model_copy(update={"start": dense, "training": training, "compressor": compressor})


def _question_answering(profile: Profile, seed: int) -> Iterator[Spec]:
    settings = profile.fully_quantized
    dense = dense_spec(profile, settings.qa_task, seed)
    yield dense
    for bits in settings.qa_bits:
        yield qa_post_training(profile, seed, bits)
        yield qa_post_training(profile, seed, bits, **GUARDS["denominator from zero"])
    if len(settings.qa_bits) > 1:
        yield qa_post_training(profile, seed, max(settings.qa_bits), bucketing=False)
        yield from (qa_post_training(profile, seed, max(settings.qa_bits), parts=[part]) for part in PARTS)
    yield from at_hand(profile, [
        EngineQualitySpec(
            task=dense.task, data=dense.data, start=dense, engine=engine, threads=profile.latency.threads,
            calibration=settings.calibration[0] * settings.calibration[1],
        )
        for engine in settings.qa_engines
    ])  # fmt: skip
    if settings.qa_aware_bits:
        yield from (qa_trained_on(profile, seed, bits) for bits in settings.qa_aware_bits)
        yield qa_trained_on(profile, seed, None)
        yield qa_trained_on(profile, seed, max(settings.qa_aware_bits), recalibrated=False)


def fully_quantized(profile: Profile) -> list[Spec]:
    """All quality runs of notebook 06: what the headline needs first, the longest runs last.

    Engines that are not here are left out unless they are recorded, and runs without data where others have theirs
    (``with_data``).
    """
    settings, plan = profile.fully_quantized, list[Spec]()
    for task in settings.tasks:
        for seed in profile.task_seeds(task):
            plan += _precision(profile, task, seed)
    if settings.qa_task in profile.tasks:
        for seed in profile.task_seeds(settings.qa_task):
            plan += _question_answering(profile, seed)
    for task in dict.fromkeys([settings.ablation_task, *settings.tasks]):
        for seed in profile.task_seeds(task):
            plan += _simpler(profile, task, seed)
    for seed in profile.task_seeds(settings.ablation_task):
        plan += _ablations(profile, settings.ablation_task, seed)
    for task, widths in settings.scratch.items():
        for seed in profile.task_seeds(task):
            plan += [from_scratch(profile, task, seed, bits, settings.scratch_delay) for bits in widths]
    return with_data(profile, plan)


def translation_speed(profile: Profile) -> list[Spec]:
    """Latency of the translation model's shape on every engine."""
    latency, settings = profile.latency, profile.fully_quantized
    return [
        TranslationLatencySpec(
            shape=translation_shape(profile, settings.speed_task), engines=latency.engines, batch=batch, length=length,
            threads=latency.threads, rounds=latency.rounds,
        )
        for batch, length in settings.speed_conditions
    ]  # fmt: skip
