"""What a profile says: one class for each section of the YAML file, with the meaning and range of every key."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt


class Strict(BaseModel):
    """Base of everything read from YAML or a record: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskSettings(Strict):
    """How one task is fine-tuned and measured.

    ``epochs`` may be fractional; ``learning_rate`` is the peak of a linear warm-up and decay; ``max_length`` and
    ``stride`` are in tokens (``stride`` is the overlap of two QA windows); ``dropout`` replaces the profile's, and
    ``attention_dropout`` that of the attention probabilities, whose random numbers cost most on a CPU; ``seeds`` is how
    many of the profile's seeds this task gets.
    """

    epochs: PositiveFloat
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    max_length: int = Field(ge=8, le=512)
    stride: int = Field(default=0, ge=0)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    attention_dropout: float | None = Field(default=None, ge=0, lt=1)
    train_examples: PositiveInt | None = None
    eval_examples: PositiveInt | None = None
    seeds: PositiveInt = 1


class TranslationSettings(Strict):
    """How the translation model of one task is built, trained and searched with.

    ``vocabulary`` is in tokens, at most; ``max_length`` in tokens of either side; ``layers`` counts the encoder's, the
    decoder has as many. ``dropout`` is after every attention and feed-forward block.
    """

    vocabulary: int = Field(ge=300)
    hidden_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    units: PositiveInt
    epochs: PositiveFloat
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    warmup: float = Field(ge=0, lt=1)
    dropout: float = Field(ge=0, lt=1)
    label_smoothing: float = Field(ge=0, lt=1)
    max_length: int = Field(ge=8, le=512)
    beams: PositiveInt
    length_penalty: float = Field(ge=0)
    train_examples: PositiveInt | None = None
    eval_examples: PositiveInt | None = None
    seeds: PositiveInt = 1


class OwnTask(Strict):
    """A user's own data by its files, .json in SQuAD format or .tsv (``lib.own_data``).

    Without ``validation`` a tenth of ``train`` is held out. ``columns`` (one or two texts) and ``label`` name those of
    a TSV file whose header does not say it by itself.
    """

    train: Path
    validation: Path | None = None
    columns: tuple[str, ...] = Field(default=(), max_length=2)
    label: str = ""


class LatencySettings(Strict):
    """Conditions under which speed is measured: every engine, batch and length pair named here.

    ``comparison_examples`` is how many features the comparison with a stock Trainer trains on in each round;
    ``compare_training`` says whether notebook 01 makes it. ``also_with`` names kinds of processors, by an
    instruction set that one has (NAME) and others that it lacks (NAME_without_NAME): the sparse engines of notebook 03
    and the recipes of notebook 08 are timed once more on each.
    """

    engines: tuple[str, ...] = Field(min_length=1)
    threads: PositiveInt
    batches: tuple[PositiveInt, ...] = Field(min_length=1)
    lengths: tuple[PositiveInt, ...] = Field(min_length=1)
    rounds: PositiveInt
    comparison_examples: int = Field(ge=8)
    compare_training: bool
    base_shape: Literal["tiny", "base", "large"]
    also_with: tuple[str, ...]


class TrainingDefaults(Strict):
    """Training choices shared by all tasks of a profile.

    ``dropout`` 0 and ``freeze_embeddings`` make a CPU run about twice as fast and change the result slightly;
    ``attention`` only changes speed. ``precision`` "auto" is bf16 where the hardware computes in it, else fp32.
    """

    dropout: float = Field(ge=0, lt=1)
    freeze_embeddings: bool
    attention: Literal["eager", "sdpa"]
    precision: Literal["auto", "bf16", "fp32"]
    warmup: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    max_grad_norm: PositiveFloat
    checkpoint_minutes: PositiveFloat


class LayerDroppingSettings(Strict):
    """The grid of notebook 05. ``k`` lists how many layers to drop; ``None`` means every K the encoder allows.

    ``grid_tasks`` get every strategy and K, ``half_tasks`` only half of the layers dropped from the top. How much a
    layer contributes is measured on ``contribution_examples`` of the validation split, ``None`` for all.
    Speed is measured with each of ``speed_k`` top layers of the published-size BERT dropped.
    """

    k: tuple[PositiveInt, ...] | None
    strategies: tuple[Literal["top", "bottom", "odd", "even", "symmetric", "contribution"], ...] = Field(min_length=1)
    thresholds: tuple[float, ...]
    contribution_examples: PositiveInt | None
    grid_tasks: tuple[str, ...]
    half_tasks: tuple[str, ...]
    speed_engines: tuple[str, ...] = Field(min_length=1)
    speed_k: tuple[PositiveInt, ...] = Field(min_length=1)
    ablation_k: tuple[PositiveInt, ...] = Field(min_length=1)
    ablation_tasks: tuple[str, ...]


Density = Annotated[float, Field(gt=0, le=1)]
PrunedDensity = Annotated[float, Field(gt=0, lt=1)]  # gates that all stay open are not trained


class StructuredPruningSettings(Strict):
    """The runs of notebook 02. Densities are shares kept; a point is (heads, units).

    The first task of ``tasks`` gets every selection and density, the others the operating points. ``seeds`` are those
    of tasks that run with more (or fewer) here than elsewhere. Speed is measured at ``speed_shape`` with
    ``speed_length`` tokens.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    seeds: dict[str, PositiveInt]
    head_densities: tuple[PrunedDensity, ...]
    unit_densities: tuple[PrunedDensity, ...]
    operating_points: tuple[tuple[PrunedDensity, PrunedDensity], ...]
    embedding_densities: tuple[PrunedDensity, ...]
    gate_epochs: PositiveFloat
    gate_batch_size: PositiveInt
    retrain_epochs: PositiveFloat
    retrain_learning_rate: PositiveFloat
    gain_examples: PositiveInt
    leave_one_out_examples: PositiveInt
    speed_shape: Literal["tiny", "base", "large"]
    speed_engines: tuple[str, ...] = Field(min_length=1)
    speed_points: tuple[tuple[Density, Density], ...]
    speed_batches: tuple[PositiveInt, ...]
    speed_length: PositiveInt


Configuration = Literal["kron8", "kron19", "kron21"]


Bits = Annotated[int, Field(ge=2, le=8)]
Share = Annotated[float, Field(ge=0, le=1)]


class FullyQuantizedSettings(Strict):
    """The runs of notebook 06.

    Every task of ``tasks`` (of ``translation``) is quantised after training and trained on quantised, for its share in
    ``epochs`` of its dense training and with that share of its learning rate, rounding from ``aware_delay`` on.
    ``scratch`` trains quantised from the start, as the paper does, rounding from ``scratch_delay`` on: task -> bits.
    ``ablation_task`` gets the delays; training without a guard at ``naive_bits`` for ``naive_epochs``, a share; no
    bucketing; and the parts one by one at ``part_bits``. ``qa_task`` (of the profile's ``tasks``) is quantised after
    ``qa_engines`` run it in their own precision. Calibration is (batches, examples in each). Speed of the translation
    model is measured at pairs of (batch, tokens).
    """

    bits: tuple[Bits, ...] = Field(min_length=1)
    tasks: tuple[str, ...] = Field(min_length=1)
    epochs: dict[str, Share]
    learning_rate: Share
    aware_delay: Share
    scratch: dict[str, tuple[Bits, ...]]
    scratch_delay: Share
    ablation_task: str
    delays: tuple[Share, ...]
    delay_bits: tuple[Bits, ...]
    naive_bits: tuple[Bits, ...]
    naive_epochs: Share
    part_bits: tuple[Bits, ...]
    calibration: tuple[PositiveInt, PositiveInt]
    qa_task: str
    qa_bits: tuple[Bits, ...]
    qa_aware_bits: tuple[Bits, ...]
    qa_epochs: PositiveFloat
    qa_learning_rate: PositiveFloat
    qa_engines: tuple[str, ...]
    speed_task: str
    speed_conditions: tuple[tuple[PositiveInt, PositiveInt], ...]


class KroneckerSettings(Strict):
    """The runs of notebook 07.

    ``configurations`` are published ones, carried over to the profile's encoder and trained; the first gets the
    ablations. ``untrained`` are those whose errors and speed are measured. The first stage reads the training text of
    ``text_tasks``, ``text_examples`` of each at most. The second trains ``epoch_factor`` times a task's own epochs, or
    as ``epochs`` says. ``error_terms`` are how many products the nearest ones are sums of.
    """

    configurations: tuple[Configuration, ...] = Field(min_length=1)
    untrained: tuple[Configuration, ...] = Field(min_length=1)
    tasks: tuple[str, ...] = Field(min_length=1)
    epoch_factor: PositiveFloat
    epochs: dict[str, PositiveFloat]
    learning_rate: PositiveFloat
    text_tasks: tuple[str, ...] = Field(min_length=1)
    text_examples: PositiveInt
    text_held_out: PositiveInt
    text_epochs: PositiveFloat
    text_batch_size: PositiveInt
    text_learning_rate: PositiveFloat
    text_max_length: int = Field(ge=32, le=512)
    ablations: tuple[Literal["no_text", "no_teacher", "neither", "random", "random_no_text"], ...]
    ablation_tasks: tuple[str, ...]
    error_terms: tuple[PositiveInt, ...] = Field(min_length=1)
    speed_shape: Literal["tiny", "base", "large"]
    speed_engines: tuple[str, ...] = Field(min_length=1)
    speed_batches: tuple[PositiveInt, ...]
    speed_length: PositiveInt


class FrontierSettings(Strict):
    """The compounds of notebook 08: every number of layers dropped with every operating point (heads, units) kept.

    ``[1, 1]`` prunes no head or unit. ``distilled_longer`` adds single compounds that are distilled for epochs of their
    own: (layers dropped, heads kept, units kept, epochs). ``block_movement`` adds notebook 04's hybrid model at its
    first strength, filled, and ``kronecker`` these configurations of notebook 07. Quality is measured on ``task``
    through ``engines``, latency at ``batch`` and ``length`` against the dense model on ``reference``. ``seeds`` are
    those of tasks that run with more (or fewer) here than elsewhere.
    """

    task: str
    seeds: dict[str, PositiveInt]
    layers_dropped: tuple[int, ...] = Field(min_length=1)
    operating_points: tuple[tuple[Density, Density], ...] = Field(min_length=1)
    distilled_longer: tuple[tuple[NonNegativeInt, Density, Density, PositiveFloat], ...]
    block_movement: bool
    kronecker: tuple[Configuration, ...]
    engines: tuple[str, ...] = Field(min_length=1)
    reference: str
    batch: PositiveInt
    length: PositiveInt


Sparsity = Annotated[float, Field(gt=0, lt=1)]


class ObertSettings(Strict):
    """The runs of notebook 03. Sparsities are shares of the encoder's linear weights that are removed.

    ``task`` is the one that is pruned in full, on ``train_examples`` of its examples, with the paper's two schedules
    over ``short_epochs`` and ``long_epochs``, the long one in ``prunings`` steps, the first to ``first_step``.
    ``other_tasks`` get every ranking at every sparsity, one-shot pruning and the headline compounds too, the long
    schedule over the epochs given with each.
    ``batch_sizes`` names tasks that are pruned with other batches than the dense model trains with, and
    ``gradient_batches`` tasks whose gradients are means over other batches than ``gradient_batch``.
    ``widths`` are those of the Fisher's blocks for single weights and for runs of four. One-shot pruning is measured at
    ``one_shot_sparsities``, split into each of ``recomputations``. ``upstream_task`` lends its text to the language
    model, ``transfer_tasks`` get its pruned encoder. ``compound_layers`` are layers kept. ``cost_weights`` is the slice
    that the Fisher's cost is measured on. Speed is measured at ``speed_conditions``, pairs of batch and tokens: dense
    models on ``dense_engines``, sparse ones on ``sparse_engines``, each group of engines in one run: the first group at
    all ``speed_layers``, the others at the first of them; processors of ``latency.also_with`` get the groups of
    ``sparse_engines_also``. ``checkpoints`` maps published models of the hub to their tasks.
    """

    task: str
    train_examples: PositiveInt | None
    other_tasks: dict[str, PositiveFloat]
    sparsities: tuple[Sparsity, ...] = Field(min_length=1)
    short_epochs: PositiveFloat | None  # None leaves the short budget out
    long_epochs: PositiveFloat
    batch_sizes: dict[str, PositiveInt]
    prunings: PositiveInt
    first_step: Sparsity
    learning_rate: PositiveFloat
    gradients: PositiveInt
    gradient_batch: PositiveInt
    gradient_batches: dict[str, PositiveInt]
    widths: tuple[PositiveInt, PositiveInt]
    dampening: PositiveFloat
    one_shot_sparsities: tuple[Sparsity, ...]
    recomputations: tuple[PositiveInt, ...]
    upstream_task: str
    transfer_tasks: tuple[str, ...]
    upstream_sparsities: tuple[Sparsity, ...]
    upstream_epochs: PositiveFloat
    upstream_prune_epochs: PositiveFloat
    transfer_epochs: PositiveFloat
    compound_layers: tuple[PositiveInt, ...]
    compound_sparsities: tuple[Sparsity, ...]
    int8_epochs: PositiveFloat
    cost_weights: PositiveInt
    speed_architecture: str
    speed_layers: tuple[PositiveInt, ...] = Field(min_length=1)
    speed_sparsities: tuple[Sparsity, ...]
    speed_conditions: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(min_length=1)
    speed_rounds: PositiveInt
    dense_engines: tuple[str, ...] = Field(min_length=1)
    sparse_engines: tuple[tuple[str, ...], ...]
    sparse_engines_also: tuple[tuple[str, ...], ...]
    checkpoints: dict[str, str] = Field(default_factory=dict)


BlockSize = tuple[PositiveInt, PositiveInt]


class BlockMovementSettings(Strict):
    """The runs of notebook 04.

    ``tasks`` get hybrid pruning, the first at all ``strengths``, the others at the first one; ``variant_task`` the
    other ways to prune, at the first ``variant_strengths``; ``ablation_tasks`` no teacher and other block sizes. A
    strength is lambda and the density of each kind that stays, however strong lambda is. ``block`` is (rows, columns).
    Epochs are multiples of the task's own, ``batch_sizes`` those of tasks that are pruned with other ones.
    ``score_learning_rates`` names tasks that do not take the paper's 0.01, ``lambda_factors`` tasks whose loss is so
    small that lambda has to be.
    ``struct_attention_lambda`` replaces attention's share of lambda (1) for whole heads. ``shapes`` is how many of the
    published shapes are timed, null all.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    variant_task: str
    ablation_tasks: tuple[str, ...]
    block: BlockSize
    epoch_factor: PositiveFloat
    refill_epoch_factor: PositiveFloat
    batch_sizes: dict[str, PositiveInt]
    score_learning_rates: dict[str, PositiveFloat]
    strengths: tuple[tuple[PositiveFloat, Annotated[float, Field(ge=0, lt=1)]], ...] = Field(min_length=1)
    ffn_lambda: PositiveFloat
    struct_attention_lambda: PositiveFloat
    lambda_factors: dict[str, PositiveFloat]
    variant_strengths: int = Field(ge=0)
    densities: tuple[Density, ...]
    block_sizes: tuple[BlockSize, ...]
    large_teacher: str | None
    translation_tasks: tuple[str, ...]
    translation_densities: tuple[Density, ...]
    translation_epoch_factor: PositiveFloat
    translation_block: BlockSize
    shapes: PositiveInt | None
    shape_engines: tuple[str, ...] = Field(min_length=1)
    shape_batches: tuple[PositiveInt, ...] = Field(min_length=1)
    shape_length: PositiveInt
    block_sparse_densities: tuple[Density, ...]
    overhead_shape: str
    overhead_batch: PositiveInt
    overhead_length: PositiveInt


class Profile(Strict):
    """One scale of the study. ``tasks`` maps a task's name to its settings; the first QA task is the headline one."""

    name: str
    encoder: str = Field(min_length=1)
    data: Literal["embedded", "local", "hub"]
    data_dir: Path | None = None
    results: Path
    seeds: tuple[int, ...] = Field(min_length=1)
    training: TrainingDefaults
    tasks: dict[str, TaskSettings] = Field(min_length=1)
    own_tasks: dict[Annotated[str, Field(pattern=r"^\w+$")], OwnTask] = Field(default_factory=dict)
    translation: dict[str, TranslationSettings] = Field(min_length=1)
    latency: LatencySettings
    layer_dropping: LayerDroppingSettings
    structured_pruning: StructuredPruningSettings
    fully_quantized: FullyQuantizedSettings
    block_movement: BlockMovementSettings
    obert: ObertSettings
    kronecker: KroneckerSettings
    frontier: FrontierSettings

    def task_seeds(self, task: str, own: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """The seeds that ``task``, of ``tasks`` or ``translation``, runs with under this profile.

        Args:
            own: how many seeds some tasks have in one notebook, instead of their number elsewhere.

        Raises:
            StudyError: the profile has no such task.
        """
        settings = self.tasks.get(task) or self.translation.get(task)
        if settings is None:
            from lib.config import StudyError  # which reads these settings

            known = ", ".join([*self.tasks, *self.translation])
            raise StudyError(f"task '{task}' is not among those of this run; it has {known}")
        return self.seeds[: (own or {}).get(task, settings.seeds)]
