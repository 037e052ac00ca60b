"""The runs of notebook 05: dropping layers before, during and after fine-tuning (Sajjad et al. 2020)."""

from collections.abc import Sequence

from lib.compressors import CompressorSpec
from lib.compressors.layer_dropping import above_threshold, layers_to_drop, possible
from lib.config import StudyError
from lib.distillation import Distillation
from lib.models import SPEED_ARCHITECTURES, layer_count, load_config
from lib.plans.common import encoder_layers
from lib.records import Record
from lib.runs import ensure
from lib.settings import Profile
from lib.specs import (
    ContributionSpec,
    LatencyModel,
    LatencySpec,
    Spec,
    TrainingSpeedSpec,
    TrainSpec,
    data_source,
    dense_spec,
    training_settings,
)


def contributions(profile: Profile) -> list[Spec]:
    """Layer contributions of the pre-trained encoder on each task's validation split.

    Raises:
        StudyError: a K of the profile is impossible; found before anything is measured for it.
    """
    _every_k(profile)
    return [
        ContributionSpec(
            task=task, data=data_source(profile, task), encoder=profile.encoder,
            max_length=profile.tasks[task].max_length, examples=profile.layer_dropping.contribution_examples,
        )
        for task in profile.tasks
        if task in (*profile.layer_dropping.grid_tasks, *profile.layer_dropping.half_tasks)
    ]  # fmt: skip


def _every_k(profile: Profile) -> tuple[int, ...]:
    """Every K of the profile, or every one that its encoder allows.

    Raises:
        StudyError: a K that leaves no layer.
    """
    n = encoder_layers(profile)
    ks = profile.layer_dropping.k or tuple(range(1, n))
    too_many = [k for k in ks if k >= n]
    if too_many:
        raise StudyError(f"layer_dropping.k: K={too_many[0]} is impossible, {profile.encoder} has {n} layers")
    return ks


def layer_sets(profile: Profile, similarity: Sequence[float]) -> dict[tuple[str, str], tuple[int, ...]]:
    """Layers dropped by each (strategy, variant), where a variant is ``K=2`` or ``similarity > 0.95``.

    Args:
        similarity: layer contributions, (n_layers,), that the contribution strategy ranks by.
    """
    n, ks = encoder_layers(profile), _every_k(profile)
    sets: dict[tuple[str, str], tuple[int, ...]] = {
        (strategy, f"K={k}"): layers_to_drop(strategy, k, n, similarity)
        for strategy in profile.layer_dropping.strategies
        for k in ks
        if possible(strategy, k, n)
    }
    if "contribution" in profile.layer_dropping.strategies:
        for threshold in profile.layer_dropping.thresholds:
            chosen = above_threshold(similarity, threshold)
            if 0 < len(chosen) < n:
                sets["contribution", f"similarity > {threshold}"] = chosen
    return sets


def dropped_before(profile: Profile, task: str, seed: int, drop: tuple[int, ...]) -> TrainSpec:
    """The paper's method: drop from the pre-trained encoder, then fine-tune."""
    return dense_spec(profile, task, seed).model_copy(update={"compressor": _dropping(drop)})


def dropped_after(profile: Profile, task: str, seed: int, drop: tuple[int, ...], retrain: bool) -> TrainSpec:
    """Drop from the fine-tuned model, then fine-tune again, or not at all."""
    parent = dense_spec(profile, task, seed)
    training = parent.training if retrain else training_settings(profile, task, epochs=0)
    return parent.model_copy(update={"compressor": _dropping(drop), "start": parent, "training": training})


def dropped_iteratively(profile: Profile, task: str, seed: int, drop: tuple[int, ...]) -> TrainSpec:
    """Drop one layer at a time while fine-tuning."""
    return dense_spec(profile, task, seed).model_copy(update={"compressor": _dropping(drop, iterative=True)})


def dropped_and_distilled(profile: Profile, task: str, seed: int, drop: tuple[int, ...]) -> TrainSpec:
    """Drop from the pre-trained encoder, then fine-tune with the dense model's logits as soft labels."""
    spec = dropped_before(profile, task, seed, drop)
    return spec.model_copy(update={"distillation": Distillation(), "teacher": dense_spec(profile, task, seed)})


def _dropping(drop: tuple[int, ...], iterative: bool = False) -> CompressorSpec:
    settings: dict[str, object] = {"drop": list(drop)}
    return CompressorSpec(name="layer_dropping", settings=settings | ({"iterative": True} if iterative else {}))


def layer_dropping(profile: Profile, similarity: dict[str, Sequence[float]]) -> list[Spec]:
    """All quality runs of notebook 05, dense baselines included.

    What the headline needs comes first, a whole seed before the next one: the dense model and the strategies at half
    the layers. Then every K from the top, dropping without further training, the orders of dropping and training, and
    the rest of the grid.

    Args:
        similarity: per task, the layer contributions that ``contributions`` measured.
    """
    half = encoder_layers(profile) // 2
    first: list[Spec] = []
    curve: list[Spec] = []
    untrained: list[Spec] = []
    ablation: list[Spec] = []
    rest: list[Spec] = []
    for seed in profile.seeds:
        tasks = [task for task in similarity if seed in profile.task_seeds(task)]
        baselines: list[Spec] = [dense_spec(profile, task, seed) for task in tasks]
        headline: list[Spec] = []
        for task in tasks:
            sets = layer_sets(profile, similarity[task])
            if task not in profile.layer_dropping.grid_tasks:
                sets = {key: drop for key, drop in sets.items() if key == ("top", f"K={half}")}
            for (strategy, variant), drop in sets.items():
                where = headline if variant == f"K={half}" else curve if strategy == "top" else rest
                where.append(dropped_before(profile, task, seed, drop))
                untrained.append(dropped_after(profile, task, seed, drop, retrain=False))
            if task in profile.layer_dropping.ablation_tasks:
                for k in profile.layer_dropping.ablation_k:
                    ablation += _ablation(profile, task, seed, sets, k)
        first += [*baselines, *headline]
    return [*first, *curve, *untrained, *ablation, *rest]


def _ablation(
    profile: Profile, task: str, seed: int, sets: dict[tuple[str, str], tuple[int, ...]], k: int
) -> list[Spec]:
    drop = sets.get(("top", f"K={k}"))
    if drop is None:
        return []
    return [
        dropped_after(profile, task, seed, drop, retrain=True),
        dropped_iteratively(profile, task, seed, drop),
        dropped_and_distilled(profile, task, seed, drop),
    ]


def halved_speed(profile: Profile) -> list[Spec]:
    """Fine-tuning and inference of the published-size BERT with all its layers and with fewer, interleaved.

    Training is measured with every parameter trained, as the paper does, in fp32 and in bf16.
    """
    architecture = SPEED_ARCHITECTURES[profile.latency.base_shape]
    n = layer_count(load_config(architecture))
    kept = {f"{n - k} layers": tuple(range(n - k + 1, n + 1)) for k in (0, *profile.layer_dropping.speed_k) if k < n}
    models = {
        name: LatencyModel(architecture=architecture, drop=drop, head="classification") for name, drop in kept.items()
    }
    settings, dense_name = profile.latency, f"{n} layers"
    length = min(settings.lengths)
    plan: list[Spec] = [
        TrainingSpeedSpec(
            models=models, dense=dense_name, batch=max(settings.batches), length=length, threads=settings.threads,
            rounds=settings.rounds, bf16=bf16,
        )
        for bf16 in (False, True)
    ]  # fmt: skip
    plan += [
        LatencySpec(
            models=models, dense=dense_name, engines=profile.layer_dropping.speed_engines, batch=batch, length=length,
            threads=settings.threads, rounds=settings.rounds,
        )
        for batch in settings.batches
    ]  # fmt: skip
    return plan


def poor_mans_bert(profile: Profile, budget_minutes: float | None = None) -> list[Spec]:
    """All of notebook 05; measures the layer contributions first, because the contribution strategy needs them.

    Tasks whose contributions the budget leaves out are left out here too.
    """
    plan = contributions(profile)
    records = ensure(plan, profile, budget_minutes=budget_minutes, title="layer contributions")
    return [*plan, *layer_dropping(profile, similarity_of(records))]


def similarity_of(records: Sequence[Record]) -> dict[str, Sequence[float]]:
    """Per task, the layer contributions that records of ``contributions`` hold."""
    return {record.spec.task: record["similarity"] for record in records if isinstance(record.spec, ContributionSpec)}
