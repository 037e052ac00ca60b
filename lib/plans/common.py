"""Plans that every notebook may use: the dense models, their latency on every engine, the training loop's speed."""

from collections.abc import Iterable, Sequence

from lib import engines, environment
from lib.config import StudyError
from lib.data import get_task
from lib.models import layer_count, load_config
from lib.records import record_path
from lib.settings import Profile
from lib.specs import LatencyModel, LatencySpec, MajoritySpec, Spec, StockComparisonSpec, data_source, dense_spec

# The published BERT sizes whose speed is measured, by the names that profiles use.
SPEED_ARCHITECTURES = {"tiny": "tiny", "base": "bert-base-uncased", "large": "bert-large-uncased"}


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
    return [MajoritySpec(task=task, data=data_source(profile, task)) for task in tasks]


def engine_latency(profile: Profile) -> list[Spec]:
    """Every engine on the dense encoder and on the dense published-size BERT, at every batch and length."""
    base = SPEED_ARCHITECTURES[profile.latency.base_shape]
    encoder = {"minilm": "minilm", "tiny-bert": "tiny"}.get(profile.encoder, base)
    return [
        LatencySpec(
            models={name: LatencyModel(architecture=name)}, dense=name, engines=profile.latency.engines, batch=batch,
            length=length, threads=profile.latency.threads, rounds=profile.latency.rounds,
        )
        for name in dict.fromkeys((encoder, base))
        for batch in profile.latency.batches
        for length in profile.latency.lengths
    ]  # fmt: skip


def on_other_processors(profile: Profile, specs: Sequence[LatencySpec]) -> list[LatencySpec]:
    """``specs`` once more for a processor with each instruction set of ``latency.also_with``.

    Raises:
        StudyError: a name that no record's hardware could have.
    """
    kinds, known = profile.latency.also_with, environment.ISA_OF_INTEREST
    if unknown := [name for name in kinds if name not in known]:
        raise StudyError(f"latency.also_with: '{unknown[0]}' is no instruction set of {', '.join(known)}")
    return [spec.model_copy(update={"instructions": kind}) for kind in kinds for spec in specs]


def at_hand(profile: Profile, specs: Iterable[LatencySpec]) -> list[Spec]:
    """Those of ``specs`` that this processor and one of their engines can run, or that are recorded."""
    return [
        spec
        for spec in specs
        if (
            environment.offers(spec.instructions)
            and any(engines.unavailable_reason(engine) is None for engine in spec.engines)
        )
        or record_path(profile, spec).exists()
    ]


def stock_comparison(profile: Profile) -> StockComparisonSpec:
    """Our training loop against the stock Trainer on the profile's first QA task."""
    task = next((name for name in profile.tasks if get_task(name).kind == "qa"), next(iter(profile.tasks)))
    settings = profile.tasks[task]
    return StockComparisonSpec(
        encoder=profile.encoder, task=task, data=data_source(profile, task), batch=32,
        rounds=min(3, profile.latency.rounds), examples=profile.latency.comparison_examples,
        max_length=settings.max_length, threads=profile.latency.threads,
    )  # fmt: skip
