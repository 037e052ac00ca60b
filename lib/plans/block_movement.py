"""The runs of notebook 04: block movement pruning (Lagunas et al. 2021), and its published shapes timed again.

Pruning starts with the pre-trained encoder and, unless said otherwise, learns from the finished dense model of the same
task (0.1 cross-entropy, 0.9 KL at T = 2). What is worth most comes first.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import AutoModel

from lib.compressors import CompressorSpec
from lib.distillation import Distillation
from lib.models import ARCHITECTURES, SPEED_ARCHITECTURES, architecture_of, count_parameters, layer_count
from lib.plans.common import at_hand, with_data
from lib.plans.fullyqt import dense_translation
from lib.published_shapes import HEADLINE, PublishedShape, distinct_shapes, published_shapes
from lib.records import Record
from lib.settings import Profile
from lib.specs import (
    LatencyModel,
    LatencySpec,
    Spec,
    TrainingSpeedSpec,
    TrainSpec,
    TranslationSpec,
    dense_spec,
    training_settings,
)
from lib.training import TrainingSettings

COPIES = 4  # of a model's weights that an engine may hold while it prepares and runs one, its export included
CHUNK_BYTES = 12_000_000_000
UNSTRUCTURED = {"variant": "block", "block": [1, 1]}
PAPER_SCORE_LEARNING_RATE = 1e-2
WITHOUT_TEACHER = ("hybrid-alone",)
BEST_K = ("hybrid-top-k", "movement", "magnitude")


def pruned(profile: Profile, task: str, seed: int, method: str, strength: float | Sequence[float],
           block: Sequence[int] | None = None) -> TrainSpec:  # fmt: skip
    """Prune while fine-tuning.

    Args:
        method: a name in ``lib.figures.METHODS``: "hybrid", "block", "struct" (masks by threshold), "hybrid-alone"
            (hybrid without a teacher), "hybrid-large" (with the profile's large teacher), "hybrid-top-k", "movement",
            "magnitude" (masks that keep the best).
        strength: lambda_f of a threshold and the density that stays in any case; the density of the others.
        block: rows and columns of a block; None means the profile's.
    """
    settings, dense = profile.block_movement, dense_spec(profile, task, seed)
    rate = settings.score_learning_rates.get(task, PAPER_SCORE_LEARNING_RATE)
    choice: dict[str, Any] = {"block": list(block or settings.block), "score_learning_rate": rate}
    if isinstance(strength, float):
        choice |= {"mask": "top-k", "density": strength} | (UNSTRUCTURED if method != "hybrid-top-k" else {})
        if method == "magnitude":
            choice |= {"importance": "magnitude"}
    else:
        final_lambda = strength[0] * settings.lambda_factors.get(task, 1.0)
        choice |= {"final_lambda": final_lambda, "ffn_lambda": settings.ffn_lambda}
        if strength[1]:
            choice |= {"least_density": strength[1]}
        if method in ("block", "struct"):
            choice |= {"variant": method}
        if method == "struct":
            choice |= {"attention_lambda": settings.struct_attention_lambda}
    epochs = settings.epoch_factor * dense.training.epochs
    update: dict[str, Any] = {
        "compressor": CompressorSpec(name="block_movement", settings=choice),
        "training": _training(profile, task, epochs),
    }
    if method not in WITHOUT_TEACHER:
        large = method == "hybrid-large" and settings.large_teacher
        teacher = dense.model_copy(update={"encoder": large}) if large else dense
        update |= {"distillation": Distillation(), "teacher": teacher}
    return dense.model_copy(update=update)


def _training(profile: Profile, task: str, epochs: float) -> TrainingSettings:
    sizes = profile.block_movement.batch_sizes
    return training_settings(profile, task, epochs=epochs, **({"batch_size": sizes[task]} if task in sizes else {}))


def filled(profile: Profile, hybrid: TrainSpec) -> TrainSpec:
    """Make a finished hybrid model dense within what it kept, and train it on with the same teacher, without masks."""
    epochs = profile.block_movement.refill_epoch_factor * dense_spec(profile, hybrid.task, hybrid.seed).training.epochs
    compressor = CompressorSpec(name="refill", settings={"seed": hybrid.seed})
    training = _training(profile, hybrid.task, epochs)
    return hybrid.model_copy(update={"compressor": compressor, "start": hybrid, "training": training})


def distilled_dense(profile: Profile, task: str, seed: int) -> TrainSpec:
    """The fair control: nothing pruned, the same teacher and as many epochs as a hybrid run."""
    dense = dense_spec(profile, task, seed)
    training = _training(profile, task, profile.block_movement.epoch_factor * dense.training.epochs)
    return dense.model_copy(update={"distillation": Distillation(), "teacher": dense, "training": training})


def block_movement(profile: Profile) -> list[Spec]:
    """All training runs of notebook 04, the headline first: dense, hybrid and hybrid filled of every task at the first
    strength, then the first task's other strengths, variants and baselines, generation, ablations.

    Runs without data are left out where others have theirs (``with_data``).
    """
    settings, plan = profile.block_movement, list[Spec]()
    tasks = [task for task in settings.tasks if task in profile.tasks]
    for position, strength in enumerate(settings.strengths):
        for seed, task in _runs(profile, tasks if position == 0 else tasks[:1]):
            hybrid = pruned(profile, task, seed, "hybrid", strength)
            plan += [dense_spec(profile, task, seed), hybrid, filled(profile, hybrid)]
    for seed, task in _runs(profile, [settings.variant_task]):
        plan += _variants(profile, task, seed)
    plan += translation_pruning(profile)
    for seed, task in _runs(profile, settings.ablation_tasks):
        plan += _ablations(profile, task, seed)
    return with_data(profile, plan)


def _runs(profile: Profile, tasks: Iterable[str]) -> list[tuple[int, str]]:
    """(seed, task) of the profile's tasks among ``tasks``, first seeds first."""
    wanted = [task for task in tasks if task in profile.tasks]
    return [(seed, task) for seed in profile.seeds for task in wanted if seed in profile.task_seeds(task)]


def _variants(profile: Profile, task: str, seed: int) -> list[Spec]:
    settings = profile.block_movement
    plan: list[Spec] = [dense_spec(profile, task, seed)]
    for strength in settings.strengths[: settings.variant_strengths]:
        plan += [pruned(profile, task, seed, method, strength) for method in ("struct", "block")]
    plan += [pruned(profile, task, seed, method, density) for density in settings.densities for method in BEST_K]
    if settings.large_teacher:
        hybrid = pruned(profile, task, seed, "hybrid-large", settings.strengths[0])
        plan += [hybrid, filled(profile, hybrid)]
    return plan


def _ablations(profile: Profile, task: str, seed: int) -> list[Spec]:
    """Hybrid as it is, without a teacher, with other blocks; and the fair control."""
    settings, first = profile.block_movement, profile.block_movement.strengths[0]
    sizes = [size for size in settings.block_sizes if size != settings.block]
    return [
        dense_spec(profile, task, seed),
        *(pruned(profile, task, seed, method, first) for method in ("hybrid", *WITHOUT_TEACHER)),
        *(pruned(profile, task, seed, "hybrid", first, size) for size in sizes),
        distilled_dense(profile, task, seed),
    ]


def translation_pruning(profile: Profile) -> list[Spec]:
    """Generation: hybrid pruning of the finished encoder-decoder, without a teacher, at some densities (best k)."""
    settings, plan = profile.block_movement, list[Spec]()
    for task in settings.translation_tasks:
        for seed in profile.task_seeds(task) if task in profile.translation else ():
            dense = dense_translation(profile, task, seed)
            plan.append(dense)
            plan += [pruned_translation(profile, dense, density) for density in settings.translation_densities]
    return plan


def pruned_translation(profile: Profile, dense: TranslationSpec, density: float) -> TranslationSpec:
    """Prune a finished translation model while it trains on, at half its learning rate."""
    settings, training = profile.block_movement, dense.training
    rate = settings.score_learning_rates.get(dense.task, PAPER_SCORE_LEARNING_RATE)
    choice = {"block": list(settings.translation_block), "mask": "top-k", "density": density,
              "score_learning_rate": rate}  # fmt: skip
    changes = {
        "epochs": settings.translation_epoch_factor * training.epochs,
        "learning_rate": training.learning_rate / 2,
    }
    compressor = CompressorSpec(name="block_movement", settings=choice)
    training = training.model_copy(update=changes)
    return dense.model_copy(update={"compressor": compressor, "start": dense, "training": training})


def chosen_shapes(profile: Profile) -> dict[str, PublishedShape]:
    """Published shapes to time, by name: the headline's first, then others spread over the speed-ups.

    BERT-base's come before BERT-large's; with fewer than all they are the only ones.
    """
    count, shapes = profile.block_movement.shapes, list(distinct_shapes().values())
    filled = next(shape for shape in published_shapes() if shape.checkpoint == HEADLINE)
    headline = [shape for shape in shapes if shape.name == filled.name]
    others = sorted((shape for shape in shapes if shape not in headline), key=lambda shape: shape.speedup)
    base = [shape for shape in others if shape.model == "bert-base-uncased"]
    large = [shape for shape in others if shape.model != "bert-base-uncased"]
    if count is not None:
        step = len(base) / max(1, count - 1)
        spread = [base[int((i + 0.5) * step)] for i in range(count - 1)]
        return {shape.name: shape for shape in [*headline, *spread]}
    spread = [shape for part in (base, large) for start in range(4) for shape in part[start::4]]
    return {shape.name: shape for shape in [*headline, *spread]}


def published_shape_speed(profile: Profile) -> list[Spec]:
    """Latency of the published shapes with random weights, dense BERT-base beside them (and BERT-large once).

    Each run is one engine and as many models as fit the memory; the first runs of all engines come first. Engines that
    are not here are left out unless they are recorded.
    """
    settings, latency = profile.block_movement, profile.latency
    models: dict[str, LatencyModel] = {}
    for name, shape in chosen_shapes(profile).items():
        if shape.model == "bert-large-uncased":
            models.setdefault("dense large", LatencyModel(architecture=shape.model))
        models[name] = LatencyModel(architecture=shape.model, shapes=shape.shapes)
    dense = LatencyModel(architecture="bert-base-uncased")
    return at_hand(profile, [
        LatencySpec(
            models={"dense": dense, **chunk}, dense="dense", engines=(engine,), batch=batch,
            length=settings.shape_length, threads=latency.threads, rounds=latency.rounds,
        )
        for batch in settings.shape_batches
        for chunk in chunks(models, CHUNK_BYTES - resident_bytes(dense))
        for engine in settings.shape_engines
    ])  # fmt: skip


def resident_bytes(model: LatencyModel) -> int:
    """Memory that a model may take while it is timed, on any engine."""
    config = ARCHITECTURES[model.architecture]
    with torch.device("meta"):
        parameters = count_parameters(AutoModel.from_config(config))
    head = 4 * config.hidden_size**2 // config.num_attention_heads
    for heads, units in model.shapes:
        parameters -= head * (config.num_attention_heads - heads)
        parameters -= 2 * config.hidden_size * (config.intermediate_size - units)
    return 4 * parameters * COPIES


def chunks(models: dict[str, LatencyModel], limit: int) -> list[dict[str, LatencyModel]]:
    """Models in their order, in groups whose ``resident_bytes`` stay under ``limit``; a group has one at least."""
    groups: list[dict[str, LatencyModel]] = []
    used = 0
    for name, model in models.items():
        size = resident_bytes(model)
        if not groups or used + size > limit:
            groups.append({})
            used = 0
        groups[-1][name] = model
        used += size
    return groups


def block_sparse_speed(profile: Profile) -> list[Spec]:
    """Block-sparse against dense execution of a model whose attention lacks blocks, at several densities.

    With the base shape it is the headline's, and the share of blocks that its hybrid model kept in each layer is one of
    the densities; otherwise a dense model of the profile's shape. The other densities are the same in every layer.
    """
    settings, architecture = profile.block_movement, SPEED_ARCHITECTURES[profile.latency.base_shape]
    filled = next(shape for shape in published_shapes() if shape.checkpoint == HEADLINE)
    hybrid = next(shape for shape in published_shapes() if shape.name == filled.name and shape.variant == "hybrid")
    at_base = architecture == filled.model
    full = LatencyModel(architecture=architecture, shapes=filled.shapes if at_base else ())
    n = layer_count(ARCHITECTURES[architecture])
    densities = {"published blocks": hybrid.attention_densities} if at_base else {}
    densities |= {f"{100 * share:g} % of blocks": (share,) * n for share in settings.block_sparse_densities}
    block = (32, 32) if architecture != "tiny" else (4, 4)
    models = {"dense": LatencyModel(architecture=architecture), "all blocks": full} | {
        name: full.model_copy(update={"attention_block": block, "attention_densities": kept})
        for name, kept in densities.items()
    }
    return [
        LatencySpec(
            models=models, dense="dense", engines=("pytorch-fp32", "pytorch-bsr-fp32"), batch=batch,
            length=settings.shape_length, threads=profile.latency.threads, rounds=profile.latency.rounds,
        )
        for batch in settings.shape_batches
        if settings.block_sparse_densities
    ]  # fmt: skip


def trained_speed(profile: Profile, records: Iterable[Record]) -> list[Spec]:
    """Latency of the shapes that finished pruning runs ended with, dense beside them; one run per engine.

    A model's name is the hash of its record. Empty when the encoder is no architecture known by name. Engines that are
    not here are left out unless they are recorded.
    """
    encoder = architecture_of(profile.encoder)
    shapes = {
        record.hash: tuple(zip(record["compression"]["heads"], record["compression"]["units"], strict=True))
        for record in records
        if isinstance(record.spec, TrainSpec) and "stored_density" in record["compression"]
    }
    if encoder is None or not shapes:
        return []
    models = {name: LatencyModel(architecture=encoder, shapes=shape) for name, shape in shapes.items()}
    settings, latency = profile.block_movement, profile.latency
    return at_hand(profile, [
        LatencySpec(
            models={"dense": LatencyModel(architecture=encoder), **models}, dense="dense", engines=(engine,),
            batch=batch, length=settings.shape_length, threads=latency.threads, rounds=latency.rounds,
        )
        for batch in settings.shape_batches
        for engine in settings.shape_engines
    ])  # fmt: skip


# Ways to train whose cost beside dense training is measured, by the names that the notebook uses.
TRAINED_WITH: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "block": {"variant": "block"},
    "movement": UNSTRUCTURED | {"mask": "top-k", "density": 0.3},
    "magnitude": UNSTRUCTURED | {"mask": "top-k", "density": 0.3, "importance": "magnitude"},
}


def training_overhead(profile: Profile) -> TrainingSpeedSpec:
    """Full training steps with masks and scores beside dense ones, interleaved: what block movement pruning costs."""
    settings, latency = profile.block_movement, profile.latency
    dense = LatencyModel(architecture=settings.overhead_shape)
    compressors = {
        name: CompressorSpec(name="block_movement", settings={"block": list(settings.block)} | choice)
        for name, choice in TRAINED_WITH.items()
    }
    return TrainingSpeedSpec(
        models=dict.fromkeys(("dense", *compressors), dense), dense="dense", compressors=compressors,
        batch=settings.overhead_batch, length=settings.overhead_length, threads=latency.threads,
        rounds=latency.rounds, bf16=True, frozen_embeddings=profile.training.freeze_embeddings,
    )  # fmt: skip
