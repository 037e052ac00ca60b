"""The runs of notebook 03: second-order, upstream and compound pruning, and sparse engines (Kurtic et al. 2022).

Sparsities are shares of the encoder's linear weights that are removed. A budget is one of the paper's two schedules, by
its length: "long" has the shape of 30 epochs, "short" that of 10.
"""

from typing import Any, Literal

from transformers import BertConfig

from lib.compressors import CompressorSpec
from lib.compressors.obert import TEN_EPOCHS, THIRTY_EPOCHS
from lib.config import StudyError
from lib.distillation import Distillation
from lib.models import ARCHITECTURES, layer_count, load_config
from lib.plans.block_movement import UNSTRUCTURED
from lib.plans.common import at_hand, encoder_layers, on_other_processors
from lib.settings import Profile
from lib.specs import (
    FisherCostSpec,
    LatencyModel,
    LatencySpec,
    Spec,
    TrainSpec,
    UpstreamSpec,
    data_source,
    dense_spec,
    training_settings,
)

Budget = Literal["short", "long"]
RANKINGS = ("obert", "magnitude", "movement")
SHALLOW_FIRST_STEP = 0.3  # the paper's first step for models that have lost layers
SOFT = Distillation(hard=0.0, logits=1.0, temperature=2.0)  # "hardness 1": the teacher's logits alone
SOFTER = Distillation(hard=0.0, logits=1.0, temperature=5.5)  # upstream, and 8epochs_sparse_transfer_squad.yaml
MASKED = 0.15
# What the numbers of the abstract stand for: share of the layers, sparsity of their weights, length of runs. The last
# has all three savings where a quarter of the layers is not a whole number.
HEADLINE = ((1, 0.8, 4), (1 / 2, 0.9, 1), (1 / 4, 0.8, 4), (1 / 2, 0.8, 4))


def schedule(profile: Profile, budget: Budget) -> dict[str, list[float]]:
    """``prune_at`` and ``rewind_at`` of a budget, with the profile's number of prunings in the long one."""
    if budget == "short":
        return {name: list(moments) for name, moments in TEN_EPOCHS.items()}
    first, last = THIRTY_EPOCHS["prune_at"][0], THIRTY_EPOCHS["prune_at"][-1]
    n = profile.obert.prunings
    moments = [first + (last - first) * step / max(1, n - 1) for step in range(n)]
    return {"prune_at": moments, "rewind_at": moments}


def _pruning(
    profile: Profile, task: str, sparsity: float, importance: str, group: int, **changes: Any
) -> CompressorSpec:
    settings = profile.obert
    values: dict[str, Any] = {"sparsity": sparsity, "group": group, "importance": importance}
    if sparsity and importance != "magnitude":
        values |= {
            "gradients": settings.gradients,
            "gradient_batch": settings.gradient_batches.get(task, settings.gradient_batch),
            "dampening": settings.dampening, "width": settings.widths[0 if group == 1 else 1],
        }  # fmt: skip
    return CompressorSpec(name="obert", settings=values | changes)


def _movement(sparsity: float) -> CompressorSpec:
    """Movement pruning (Sanh, Wolf and Rush 2020, arXiv:2005.07683): a trained score per weight, the best k kept.

    It has its authors' own schedule, over 10 to 80 % of training, and ranks within each matrix as they do: the scores
    say where a weight is going, not how large it is, and oBERT's few large steps would take out large ones at once.
    Only the scores' order counts, so their learning rate does not.
    """
    settings = {"mask": "top-k", "density": round(1 - sparsity, 6), "per_matrix": True, "begin": 0.1, "end": 0.8}
    return CompressorSpec(name="block_movement", settings=UNSTRUCTURED | settings)


def _training(profile: Profile, task: str, epochs: float) -> Any:
    settings = profile.obert
    examples = {"train_examples": settings.train_examples} if task == settings.task else {}
    batch = {"batch_size": settings.batch_sizes[task]} if task in settings.batch_sizes else {}
    return training_settings(profile, task, epochs=epochs, learning_rate=settings.learning_rate, **examples, **batch)


def _epochs(profile: Profile, task: str, budget: Budget) -> float:
    settings = profile.obert
    if budget == "long":
        return settings.other_tasks.get(task, settings.long_epochs)
    if settings.short_epochs is None:
        raise StudyError("obert.short_epochs: the profile leaves the short budget out; give it a number of epochs")
    return settings.short_epochs


def pruned(profile: Profile, seed: int, sparsity: float, importance: str = "obert", group: int = 1,
           budget: Budget = "long", layers: int | None = None, task: str = "") -> TrainSpec:  # fmt: skip
    """Gradual pruning of a task's finished dense model, distilled from it.

    "movement", and sparsity 0 at full depth, begin with the pre-trained encoder: a student that is its own teacher has
    nothing to learn and nothing to move for, and the authors' dense students begin there too.

    Args:
        sparsity: 0 is the paper's fair control: a dense student under the same recipe.
        importance: one of ``RANKINGS``; "movement" has the budget's epochs, but a schedule of its own.
        layers: kept; the others are dropped from the top and the rest fine-tuned first.
        task: the headline task where none is given.
    """
    task, total = task or profile.obert.task, encoder_layers(profile)
    teacher, shallow = dense_spec(profile, task, seed), layers is not None and layers < total
    first = min(SHALLOW_FIRST_STEP if shallow else profile.obert.first_step, sparsity)
    changes = schedule(profile, budget) | {"first_step": first}
    pruning = _pruning(profile, task, sparsity, importance, group, **changes)
    start: TrainSpec | None = fewer_layers(profile, seed, layers, task) if shallow and layers else teacher
    if importance == "movement":
        pruning, start = _movement(sparsity), None
    elif not sparsity and not shallow:
        start = None
    return teacher.model_copy(update={
        "start": start, "compressor": pruning,
        "training": _training(profile, task, _epochs(profile, task, budget)), "distillation": SOFT, "teacher": teacher,
    })  # fmt: skip


def fewer_layers(profile: Profile, seed: int, layers: int, task: str = "") -> TrainSpec:
    """The dense model with its top layers dropped, fine-tuned again under the long budget, distilled."""
    task, total = task or profile.obert.task, encoder_layers(profile)
    teacher = dense_spec(profile, task, seed)
    if not 0 < layers < total:
        raise StudyError(f"obert.compound_layers: {layers} of {total} layers; give 1 to {total}")
    drop = CompressorSpec(name="layer_dropping", settings={"drop": list(range(layers + 1, total + 1))})
    return teacher.model_copy(update={
        "start": teacher, "compressor": drop, "training": _training(profile, task, _epochs(profile, task, "long")),
        "distillation": SOFT, "teacher": teacher,
    })  # fmt: skip


def one_shot(profile: Profile, seed: int, sparsity: float, importance: str, recomputations: int = 1,
             task: str = "") -> TrainSpec:  # fmt: skip
    """Prune the finished dense model at once and train no further."""
    task = task or profile.obert.task
    teacher = dense_spec(profile, task, seed)
    changes: dict[str, Any] = {"prune_at": [], "rewind_at": []}
    changes |= {"recomputations": recomputations} if recomputations > 1 else {}
    return teacher.model_copy(update={
        "start": teacher, "compressor": _pruning(profile, task, sparsity, importance, 1, **changes),
        "training": _training(profile, task, 0),
    })  # fmt: skip


def language_model(profile: Profile, sparsity: float = 0.0) -> UpstreamSpec:
    """The encoder under a language-modelling head: dense, or pruned in a second stage and distilled from the first."""
    settings = profile.obert
    text = settings.upstream_task
    training = training_settings(
        profile, text, epochs=settings.upstream_epochs, learning_rate=settings.learning_rate, stride=0,
        train_examples=settings.train_examples if text == settings.task else profile.tasks[text].train_examples,
    )  # fmt: skip
    dense = UpstreamSpec(
        task=text, data=data_source(profile, text), encoder=profile.encoder, seed=profile.seeds[0], training=training,
        masked=MASKED,
    )  # fmt: skip
    if not sparsity:
        return dense
    changes = schedule(profile, "long") | {"first_step": min(settings.first_step, sparsity)}
    return dense.model_copy(update={
        "training": training.model_copy(update={"epochs": settings.upstream_prune_epochs}),
        "compressor": _pruning(profile, text, sparsity, "obert", 1, **changes), "start": dense,
        "distillation": SOFTER, "teacher": dense,
    })  # fmt: skip


def transfer(profile: Profile, task: str, seed: int, sparsity: float) -> TrainSpec:
    """Sparse transfer: the upstream encoder, its zeros held, fine-tuned on a task and distilled from its dense model.

    Sparsity 0 is the control: the dense upstream encoder, trained alike.
    """
    teacher, settings = dense_spec(profile, task, seed), profile.obert
    return teacher.model_copy(update={
        "start": language_model(profile, sparsity), "teacher": teacher, "distillation": SOFTER,
        "compressor": CompressorSpec(name="fixed_masks") if sparsity else None,
        "training": training_settings(
            profile, task, epochs=settings.transfer_epochs, learning_rate=settings.learning_rate
        ),
    })  # fmt: skip


def in_int8(profile: Profile, start: TrainSpec) -> TrainSpec:
    """Quantisation-aware training of a pruned model, its masks held."""
    training = _training(profile, start.task, profile.obert.int8_epochs)
    teacher = dense_spec(profile, start.task, start.seed)
    return start.model_copy(update={
        "start": start, "compressor": CompressorSpec(name="sparse_int8"), "training": training,
        "distillation": SOFT, "teacher": teacher,
    })  # fmt: skip


def _rankings(profile: Profile, task: str, seed: int) -> list[Spec]:
    """Dense, its control, and every ranking at every sparsity."""
    plan: list[Spec] = [dense_spec(profile, task, seed)]
    for sparsity in profile.obert.sparsities:
        plan += [pruned(profile, seed, sparsity, importance, task=task) for importance in RANKINGS]
        if len(plan) == 1 + len(RANKINGS):
            plan.append(pruned(profile, seed, 0.0, task=task))
    return plan


def _one_shot(profile: Profile, task: str, seed: int) -> list[Spec]:
    ways = [("obert", parts) for parts in profile.obert.recomputations] + [("magnitude", 1)]
    points = profile.obert.one_shot_sparsities
    return [one_shot(profile, seed, sparsity, *way, task) for way in ways for sparsity in points]


def headline_compounds(profile: Profile, task: str, seed: int) -> list[Spec]:
    """``HEADLINE`` where the profile's compounds have the sparsity and the encoder so many layers; runs in INT8 too."""
    plan: list[Spec] = []
    for share, sparsity, group in HEADLINE:
        layers = share * encoder_layers(profile)
        if sparsity in profile.obert.compound_sparsities and layers == int(layers):
            sparse = pruned(profile, seed, sparsity, group=group, layers=int(layers), task=task)
            plan += [sparse, in_int8(profile, sparse)] if group > 1 else [sparse]
    return plan


def _compound(profile: Profile, seed: int) -> list[Spec]:
    """Fewer layers × runs of four × INT8, each stage a run of its own."""
    plan: list[Spec] = []
    for layers in profile.obert.compound_layers:
        for sparsity in profile.obert.compound_sparsities:
            sparse = pruned(profile, seed, sparsity, group=4, layers=layers)
            plan += [sparse, in_int8(profile, sparse)]
    return plan


def _upstream(profile: Profile, seed: int) -> list[Spec]:
    settings = profile.obert
    plan: list[Spec] = []
    for sparsity in settings.upstream_sparsities:
        plan += [language_model(profile), language_model(profile, sparsity)]
        for task in settings.transfer_tasks:
            if seed in profile.task_seeds(task):
                plan += [dense_spec(profile, task, seed), transfer(profile, task, seed, sparsity)]
                plan += [transfer(profile, task, seed, 0.0)]
    return plan


def prunes_upstream(profile: Profile) -> bool:
    """Whether the language model is pruned: the profile asks for it, has its tasks, and the encoder is a BERT.

    Raises:
        StudyError: the encoder's config cannot be loaded.
    """
    settings = profile.obert
    tasks = {settings.upstream_task, *settings.transfer_tasks}
    bert = isinstance(load_config(profile.encoder), BertConfig)  # all that ``lib.upstream`` handles
    return bool(settings.upstream_sparsities) and tasks <= set(profile.tasks) and bert


def obert(profile: Profile) -> list[Spec]:
    """All quality runs of notebook 03, what the claims need first, a whole seed before the next one.

    Upstream pruning is left out where it cannot be done (``prunes_upstream``).

    Raises:
        StudyError: the profile has no headline task, or the encoder's config cannot be loaded.
    """
    settings = profile.obert
    if settings.task not in profile.tasks:
        raise StudyError(f"obert.task: the profile has no task '{settings.task}'; it has {', '.join(profile.tasks)}")
    reduced = settings if prunes_upstream(profile) else settings.model_copy(update={"upstream_sparsities": ()})
    profile = profile.model_copy(update={"obert": reduced})
    plan: list[Spec] = []
    others = [task for task in settings.other_tasks if task in profile.tasks]
    for seed in profile.seeds:
        for task in (settings.task, *others):
            if seed in profile.task_seeds(task):
                plan += [*_rankings(profile, task, seed), *headline_compounds(profile, task, seed)]
                plan += _one_shot(profile, task, seed)
        if seed in profile.task_seeds(settings.task):
            plan += [*_compound(profile, seed), *_upstream(profile, seed)]
            if settings.short_epochs:
                plan += [pruned(profile, seed, sparsity, budget="short") for sparsity in (*settings.sparsities, 0.0)]
    return plan


def fisher_cost(profile: Profile) -> list[Spec]:
    """What the block Fisher costs, at each width; MiniLM in full where it is the encoder."""
    settings = profile.obert
    full = "minilm" if profile.encoder == "minilm" else ""
    return [
        FisherCostSpec(
            weights=settings.cost_weights, width=width, gradients=1024, threads=profile.latency.threads,
            rounds=profile.latency.rounds, full=full,
        )
        for width in dict.fromkeys(settings.widths)
    ]  # fmt: skip


def model_name(layers: int, sparsity: float, group: int = 1) -> str:
    """A model's name in the speed records: "6 layers 90 % in runs of 4"."""
    share = f"{100 * sparsity:g} %" + (" in runs of 4" if group == 4 else "") if sparsity else "dense"
    return f"{layers} layers {share}"


def sparse_speed(profile: Profile) -> list[Spec]:
    """Latency at the published size: dense models on dense engines, sparse ones on sparse engines.

    Every run has the whole dense model in it, and those of the first sparsity the dense model of their own depth. The
    conditions of one set of models follow each other, so that its exports are used again. Processors of
    ``latency.also_with`` come last. Runs that this processor or none of their engines here can make are left out unless
    they are recorded.
    """
    settings = profile.obert
    architecture = settings.speed_architecture
    if architecture not in ARCHITECTURES:
        raise StudyError(f"obert.speed_architecture: unknown '{architecture}'; known: {', '.join(ARCHITECTURES)}")
    total = layer_count(ARCHITECTURES[architecture])

    def model(layers: int, sparsity: float = 0.0, group: int = 1) -> dict[str, LatencyModel]:
        drop = tuple(range(layers + 1, total + 1))
        made = LatencyModel(architecture=architecture, drop=drop, sparsity=sparsity, group=group)  # type: ignore[arg-type]
        return {model_name(layers, sparsity, group): made}

    def run(models: dict[str, LatencyModel], group: tuple[str, ...], batch: int, length: int) -> LatencySpec:
        return LatencySpec(
            models=model(total) | models, dense=model_name(total, 0.0), engines=group, batch=batch, length=length,
            threads=profile.latency.threads, rounds=settings.speed_rounds,
        )  # fmt: skip

    def on(groups: tuple[tuple[str, ...], ...]) -> list[LatencySpec]:
        dense = {name: made for layers in settings.speed_layers for name, made in model(layers).items()}
        plan = [run(dense, settings.dense_engines, *condition) for condition in settings.speed_conditions]
        for number, group in enumerate(groups):
            for layers in settings.speed_layers if number == 0 else settings.speed_layers[:1]:
                for place, sparsity in enumerate(settings.speed_sparsities):
                    # one sparsity a run: an engine like DeepSparse holds gigabytes for every model and batch
                    sparse = model(layers, sparsity, 1) | model(layers, sparsity, 4)
                    models = sparse if place else model(layers) | sparse
                    plan += [run(models, group, *condition) for condition in settings.speed_conditions]
        return plan

    also = on_other_processors(profile, on(settings.sparse_engines_also))
    return at_hand(profile, [*on(settings.sparse_engines), *also])


def published_checkpoints(profile: Profile) -> list[Spec]:
    """The authors' own pruned models, evaluated as they come from the hub."""
    return [
        TrainSpec(
            task=task, data=data_source(profile, task), encoder=name, seed=profile.seeds[0],
            training=training_settings(profile, task, epochs=0), compressor=CompressorSpec(name="fixed_masks"),
        )
        for name, task in profile.obert.checkpoints.items()
        if task in profile.tasks and profile.data == "hub"
    ]  # fmt: skip
