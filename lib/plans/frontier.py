"""The runs of notebook 08: compounds of methods that no single paper has, their quality and latency on engines.

A compound is made in the order that a practitioner would: drop layers from the pre-trained encoder and distil the dense
model into it, train gates on what is left, cut, distil again, and let an engine quantise the rest. Beside it stand the
other methods whose models a dense engine can quantise: hybrid blocks, filled, and Kronecker factors.
"""

from lib.compressors.layer_dropping import layers_to_drop
from lib.config import StudyError
from lib.kronecker_models import configuration
from lib.models import ARCHITECTURES, same_size
from lib.plans.block_movement import filled
from lib.plans.block_movement import pruned as pruned_in_blocks
from lib.plans.common import at_hand, encoder_layers, on_other_processors, timed_architecture
from lib.plans.kronecker import task_stage
from lib.plans.poor_mans_bert import dropped_and_distilled
from lib.plans.structured_qa import pruned
from lib.records import Record
from lib.settings import Profile
from lib.specs import EngineQualitySpec, LatencyModel, LatencySpec, Spec, TrainSpec, dense_spec, spec_hash

UNTOUCHED = (1.0, 1.0)
DENSE = "dense"
HYBRID = "hybrid blocks, filled"
FACTORS = "Kronecker factors: "  # and the configuration


def recipe_name(dropped: int, heads: float, units: float, epochs: float | None = None) -> str:
    """What a recipe takes away, for tables and legends; ``epochs`` when it is distilled for longer than the others."""
    parts = [f"{dropped} layer{'s' if dropped > 1 else ''} dropped"] if dropped else []
    if (heads, units) != UNTOUCHED:
        parts.append(f"{100 * (1 - heads):.0f} % heads, {100 * (1 - units):.0f} % units cut")
    if epochs is not None:
        parts.append(f"{epochs:g} epochs")
    return "; ".join(parts) or DENSE


def recipes(profile: Profile, seed: int) -> dict[str, TrainSpec]:
    """Name -> the run that ends in the recipe's model; the dense model, which all are compared with, is the first.

    Raises:
        StudyError: as many layers dropped as the encoder has; longer distillation of a model that is not cut.
    """
    settings = profile.frontier
    grid = [(dropped, *point, None) for dropped in settings.layers_dropped for point in settings.operating_points]
    whole: tuple[int, float, float, float | None] = (0, *UNTOUCHED, None)
    compounds = [whole, *grid, *settings.distilled_longer]
    made = {recipe_name(*compound): _compound(profile, seed, *compound) for compound in compounds}
    if settings.block_movement:
        strength = profile.block_movement.strengths[0]
        made[HYBRID] = filled(profile, pruned_in_blocks(profile, settings.task, seed, "hybrid", strength))
    for name in settings.kronecker:
        made[FACTORS + name] = task_stage(profile, settings.task, seed, name)
    return made


def _compound(profile: Profile, seed: int, dropped: int, heads: float, units: float, epochs: float | None) -> TrainSpec:
    """Layers dropped, then gates on what is left, then distillation for so many epochs (None: as notebook 02 does)."""
    task, n = profile.frontier.task, encoder_layers(profile)
    if not 0 <= dropped < n:
        raise StudyError(f"frontier: {dropped} layers dropped is impossible with {n} layers; give 0 to {n - 1}")
    base = dense_spec(profile, task, seed)
    if dropped:
        base = dropped_and_distilled(profile, task, seed, layers_to_drop("top", dropped, n))
    both = {kind: share for kind, share in (("heads", heads), ("units", units)) if share < 1}
    if not both and epochs is not None:
        raise StudyError("frontier.distilled_longer: [1, 1] cuts nothing that could be distilled for longer; keep less")
    if not both:
        return base
    parent = base if dropped else None
    return pruned(profile, task, seed, both, "l0", "retrain and distil", parent, epochs)


def recipe_seeds(profile: Profile) -> tuple[int, ...]:
    """The seeds that recipes are made with."""
    return profile.task_seeds(profile.frontier.task, profile.frontier.seeds)


def frontier(profile: Profile) -> list[Spec]:
    """Every recipe, what it is made from and its quality on every engine, a seed before the next.

    After the dense model come the compounds that are distilled for longer: a budget that ends early has spent its time
    on those that one would take. Engines that are not here are left out unless they are recorded.
    """
    plan: list[Spec] = []
    first = {DENSE, *(recipe_name(*compound) for compound in profile.frontier.distilled_longer)}
    for seed in recipe_seeds(profile):
        made = recipes(profile, seed)
        for recipe in [made[name] for name in sorted(made, key=lambda name: name not in first)]:
            plan += [*recipe.informed_by, *([recipe.start] if recipe.start else []), recipe]
            plan += at_hand(profile, [_quality(profile, recipe, engine) for engine in profile.frontier.engines])
    return plan


def _quality(profile: Profile, recipe: TrainSpec, engine: str) -> EngineQualitySpec:
    return EngineQualitySpec(
        task=recipe.task, data=recipe.data, start=recipe, engine=engine, threads=profile.latency.threads
    )


def recipe_latency(profile: Profile, records: list[Record]) -> list[Spec]:
    """Latency of every recipe that is finished, on every engine, beside the dense model on the reference engine.

    The models have the recipes' shapes and random weights. One seed stands for all: seeds differ in which heads and
    units a layer keeps, hardly in how many. Empty where the encoder has the sizes of no published architecture.

    Raises:
        StudyError: the encoder cannot be read.
    """
    size = same_size(profile.encoder)
    if size is None:
        return []
    settings, latency = profile.frontier, profile.latency
    seed = recipe_seeds(profile)[0]
    done = {record.hash: record for record in records}
    architecture = timed_architecture(profile) if ARCHITECTURES[size].model_type == "xlnet" else size
    models = {DENSE: LatencyModel(architecture=architecture)}
    for name, spec in recipes(profile, seed).items():
        record = done.get(spec_hash(spec))
        if record is not None and name.startswith(FACTORS):
            shapes = configuration(name.removeprefix(FACTORS), ARCHITECTURES[architecture])
            models[name] = LatencyModel(architecture=architecture, kronecker=shapes)
        elif record is not None and name != DENSE:
            models[name] = latency_model(record, architecture)
    engines = tuple(dict.fromkeys((settings.reference, *settings.engines)))
    run = LatencySpec(
        models=models, dense=DENSE, engines=engines, batch=settings.batch, length=settings.length,
        threads=latency.threads, rounds=latency.rounds, reference=settings.reference,
    )  # fmt: skip
    return at_hand(profile, [run, *on_other_processors(profile, [run])])


def latency_model(record: Record, architecture: str) -> LatencyModel:
    """A random-weight model of the shape that a finished run ended with.

    Raises:
        StudyError: the record does not say what its model's layers look like.
    """
    shapes = record["model"].get("shapes")
    if shapes is None:
        raise StudyError(f"record {record.hash} says nothing of its layers' shapes; refresh computes it again")
    n = ARCHITECTURES[architecture].num_hidden_layers
    drop = tuple(range(len(shapes) + 1, n + 1))
    return LatencyModel(architecture=architecture, drop=drop, shapes=tuple((heads, units) for heads, units in shapes))
