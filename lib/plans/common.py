"""Plans that every notebook may use: the dense models, their latency on every engine, the training loop's speed."""

from collections.abc import Iterable, Sequence

from lib import engines, environment
from lib.data import get_task
from lib.models import ARCHITECTURES, SPEED_ARCHITECTURES, architecture_of, layer_count, load_config
from lib.records import record_path
from lib.settings import Profile
from lib.specs import (
    EngineQualitySpec,
    LatencyModel,
    LatencySpec,
    MajoritySpec,
    Spec,
    StockComparisonSpec,
    data_source,
    dense_spec,
)


def encoder_layers(profile: Profile) -> int:
    """How many layers the profile's encoder has."""
    return layer_count(load_config(profile.encoder))


def dense(profile: Profile) -> list[Spec]:
    """Dense baselines of every task and seed, first seeds first."""
    order = [(seed, task) for seed in profile.seeds for task in profile.tasks if seed in profile.task_seeds(task)]
    return [dense_spec(profile, task, seed) for seed, task in order if get_task(task).kind != "translation"]


def majority(profile: Profile) -> list[Spec]:
    """What one answer for all scores: the most frequent label, or none where questions may have no answer."""
    tasks = [task for task in profile.tasks if get_task(task).kind == "classification" or get_task(task).unanswerable]
    return with_data(profile, [MajoritySpec(task=task, data=data_source(profile, task)) for task in tasks])


def engine_latency(profile: Profile) -> list[Spec]:
    """Every engine on the dense encoder and on the dense published-size BERT, at every batch and length."""
    base = SPEED_ARCHITECTURES[profile.latency.base_shape]
    return [
        LatencySpec(
            models={name: LatencyModel(architecture=name)}, dense=name, engines=profile.latency.engines, batch=batch,
            length=length, threads=profile.latency.threads, rounds=profile.latency.rounds,
        )
        for name in dict.fromkeys((timed_architecture(profile), base))
        for batch in profile.latency.batches
        for length in profile.latency.lengths
    ]  # fmt: skip


def timed_architecture(profile: Profile) -> str:
    """The profile's encoder as an architecture with random weights.

    A folder or another name of the hub is timed at the published size, and so is XLNet, which ONNX engines do not run.
    """
    name = architecture_of(profile.encoder)
    if name is None or ARCHITECTURES[name].model_type == "xlnet":
        return SPEED_ARCHITECTURES[profile.latency.base_shape]
    return name


def on_other_processors(profile: Profile, specs: Sequence[LatencySpec]) -> list[LatencySpec]:
    """``specs`` once more for each kind of processor of ``latency.also_with``.

    Raises:
        StudyError: a kind that no record's hardware could be of.
    """
    kinds = profile.latency.also_with
    for kind in kinds:
        environment.kind_of_processor(kind)
    return [spec.model_copy(update={"instructions": kind}) for kind in kinds for spec in specs]


def at_hand(profile: Profile, specs: Iterable[LatencySpec | EngineQualitySpec]) -> list[Spec]:
    """Those of ``specs`` that this processor and one of their engines can run, or that are recorded."""
    return [spec for spec in specs if _runs_here(spec) or record_path(profile, spec).exists()]


def _runs_here(spec: LatencySpec | EngineQualitySpec) -> bool:
    if isinstance(spec, EngineQualitySpec):
        return engines.unavailable_reason(spec.engine) is None
    needed = (spec.reference,) if spec.reference else spec.engines  # without the reference there are no ratios
    return environment.offers(spec.instructions) and any(engines.unavailable_reason(name) is None for name in needed)


def has_data(profile: Profile, task: str) -> bool:
    """Whether the data of a task can be had: a local task that is not the user's own needs a folder."""
    given = profile.data != "local" or profile.data_dir is not None or task in profile.own_tasks
    return given or data_source(profile, task) != "local"


def with_data(profile: Profile, specs: Iterable[Spec]) -> list[Spec]:
    """Those of ``specs``, each of one task, that have their data or are recorded; a printed line says what is left out.

    All of them where no task of the profile has its data: then nothing is computed, and what is missing is counted.
    """
    plan = list(specs)
    if not any(has_data(profile, task) for task in profile.tasks):
        return plan
    kept, left_out = list[Spec](), dict[str, None]()
    for spec in plan:
        task: str = spec.task  # type: ignore[union-attr]
        if has_data(profile, task) or record_path(profile, spec).exists():
            kept.append(spec)
        else:
            left_out[get_task(task).title] = None
    if left_out:
        titles = ", ".join(left_out)
        print(f"no data here: {titles}; runs that are not recorded are left out (set STUDY_DATA or data_dir)")
    return kept


def stock_comparison(profile: Profile) -> StockComparisonSpec:
    """Our training loop against the stock Trainer on the profile's first QA task."""
    task = next((name for name in profile.tasks if get_task(name).kind == "qa"), next(iter(profile.tasks)))
    settings = profile.tasks[task]
    return StockComparisonSpec(
        encoder=profile.encoder, task=task, data=data_source(profile, task), batch=32,
        rounds=min(3, profile.latency.rounds), examples=profile.latency.comparison_examples,
        max_length=settings.max_length, threads=profile.latency.threads,
    )  # fmt: skip
