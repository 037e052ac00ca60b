"""Turn decisions into smaller dense models, and save and load what ``from_pretrained`` cannot.

A model whose layers differ in width has no transformers config. It is saved as ``compressed.safetensors`` beside
``compression.json``, which lists every layer's widths; ``load_compressed`` rebuilds the shapes before it reads the
weights. transformers itself is made to stop at such a folder with a message that names the loader: the weights index
that it looks for first points at a file that is not there, whose name is the message. Otherwise it would say something
about missing files, or with ``ignore_mismatched_sizes`` silently re-initialise the pruned layers.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lib.config import StudyError
from lib.gates import head_size
from lib.int8_linear import Int8Linear
from lib.kronecker import KroneckerLinear
from lib.kronecker_models import apply_factor_shapes, factor_shapes, kronecker_modules
from lib.models import COMPRESSION_FILE as SHAPES
from lib.models import layer_count, layer_parts, layers, remove_layers
from lib.problems import first_line
from lib.quantized_layers import is_quantized
from lib.quantized_storage import DESCRIPTION as GRIDS
from lib.quantized_storage import load_quantized, save_quantized

WEIGHTS = "compressed.safetensors"
INDEX = "model.safetensors.index.json"
GUARD = "(a compressed model: load it with lib.surgery.load_compressed)"


def drop_layers(model: PreTrainedModel, numbers: Iterable[int]) -> list[nn.Module]:
    """Remove layers (1 = next to the embeddings) in place; returns the removed modules.

    Raises:
        StudyError: a number that does not exist, or no layer would be left.
    """
    stack, unwanted = layers(model), set(numbers)
    wrong = sorted(number for number in unwanted if not 1 <= number <= len(stack))
    if wrong or len(unwanted) >= len(stack):
        raise StudyError(f"cannot drop layers {sorted(unwanted)} of {len(stack)}; one at least must stay")
    removed = [layer for number, layer in enumerate(stack, start=1) if number in unwanted]
    remove_layers(model, removed)
    return removed


@torch.no_grad()
def cut(model: PreTrainedModel, heads: Sequence[Sequence[int]] | None = None,
        units: Sequence[Sequence[int]] | None = None) -> None:  # fmt: skip
    """Keep only some heads and FFN units, in place: every matrix loses the rows and columns of the others.

    What is removed must have no influence any more (its gate is 0), or the function changes. A layer may lose all of
    its heads or units: its attention or FFN then adds its output bias alone.

    Args:
        heads: per layer, the indices (from 0) of the heads that stay; None keeps all.
        units: per layer, the indices of the FFN units that stay; None keeps all.

    Raises:
        StudyError: an index that does not exist, or not one list per layer.
    """
    stack, size = layers(model), head_size(model)
    for kind, kept in (("heads", heads), ("units", units)):
        if kept is not None and len(kept) != len(stack):
            raise StudyError(f"cut: {kind} are given for {len(kept)} layers, the model has {len(stack)}")
    for number, layer in enumerate(stack):
        parts = layer_parts(layer)
        if heads is not None:
            inward = (parts.query, parts.key, parts.value)
            cut_between(inward, parts.attention_output, heads[number], size, f"layer {number + 1}, heads")
        if units is not None:
            cut_between((parts.ffn_in,), parts.ffn_out, units[number], 1, f"layer {number + 1}, units")


@torch.no_grad()
def cut_between(inward: Sequence[nn.Linear], outward: nn.Linear, kept: Sequence[int], size: int, where: str) -> None:
    """Keep some groups of ``size`` features between linear maps, in place: rows of ``inward``, columns of ``outward``.

    Raises:
        StudyError: an index in ``kept`` that does not exist; ``where`` begins the message.
    """
    inner = _columns(kept, outward.in_features // size, size, where)
    for linear in inward:
        _keep(linear, rows=inner)
    _keep(outward, columns=inner)


def even_shapes(config: PreTrainedConfig, head_density: float, unit_density: float) -> tuple[tuple[int, int], ...]:
    """(heads, units) of every layer when a density of each is kept and spread evenly over the layers.

    The totals are round(density * all), so a published percentage of the whole model is met to a head or unit.
    """
    n = layer_count(config)

    def spread(total: int) -> list[int]:
        return [(i + 1) * total // n - i * total // n for i in range(n)]

    heads = spread(round(head_density * n * config.num_attention_heads))
    units = spread(round(unit_density * n * config.intermediate_size))
    return tuple(zip(heads, units, strict=True))


def _columns(kept: Sequence[int], total: int, size: int, where: str) -> Tensor:
    """Indices of the features that belong to the kept heads or units, ascending."""
    wrong = [index for index in kept if not 0 <= index < total]
    if wrong:
        raise StudyError(f"cut: {where}: found {wrong[0]}, expected 0 to {total - 1}")
    starts = torch.tensor(sorted(set(kept)), dtype=torch.long)
    return (starts[:, None] * size + torch.arange(size)).flatten()


def _keep(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Slice a linear map in place."""
    weight = linear.weight
    if rows is not None:
        weight = weight[rows.to(weight.device)]
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[rows.to(weight.device)].clone())
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    linear.weight = nn.Parameter(weight.clone())
    linear.out_features, linear.in_features = weight.shape


def forget_parameters(optimizer: Any, gone: Iterable[nn.Parameter]) -> None:
    """Take parameters out of an optimizer in the middle of training, with their moments."""
    ids = {id(parameter) for parameter in gone}
    inner = getattr(optimizer, "optimizer", optimizer)
    for group in inner.param_groups:
        for parameter in group["params"]:
            if id(parameter) in ids:
                inner.state.pop(parameter, None)
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]


def layer_shapes(model: PreTrainedModel) -> list[dict[str, int]]:
    """Widths of every layer: ``attention`` = heads * head_size, ``units`` = FFN units."""
    parts = [layer_parts(layer, (nn.Linear, KroneckerLinear)) for layer in layers(model)]
    return [{"attention": part.value.out_features, "units": part.ffn_in.out_features} for part in parts]


def _resize(linear: nn.Linear, out_features: int, in_features: int) -> None:
    """Give a linear map new, uninitialised weights of another shape, in place."""
    linear.out_features, linear.in_features = out_features, in_features
    linear.weight = nn.Parameter(torch.empty(out_features, in_features))
    if linear.bias is not None:
        linear.bias = nn.Parameter(torch.empty(out_features))


def apply_shapes(model: PreTrainedModel, shapes: list[dict[str, int]]) -> None:
    """Resize every layer of ``model`` to ``shapes`` in place; the weights are left uninitialised."""
    for layer, shape in zip(layers(model), shapes, strict=True):
        parts = layer_parts(layer)
        hidden = parts.query.in_features
        for linear in (parts.query, parts.key, parts.value):
            _resize(linear, shape["attention"], hidden)
        _resize(parts.attention_output, hidden, shape["attention"])
        _resize(parts.ffn_in, shape["units"], hidden)
        _resize(parts.ffn_out, hidden, shape["units"])


def _is_uniform(model: PreTrainedModel) -> bool:
    """Whether transformers' own config describes this model, so that ``from_pretrained`` is right for it."""
    if kronecker_modules(model):
        return False
    if model.config.model_type == "xlnet":
        return True
    config = model.config
    units = config.hidden_dim if config.model_type == "distilbert" else config.intermediate_size
    return all(shape == {"attention": config.hidden_size, "units": units} for shape in layer_shapes(model))


def save_compressed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Save a compressed model so that ``load_compressed`` gives back identical logits in a new process.

    A model that only lost whole layers is saved plainly: ``from_pretrained`` loads it anywhere.

    Returns:
        The folder.

    Raises:
        StudyError: the folder cannot be written, or the model computes in simulated INT8, which no loader rebuilds.
    """
    folder = Path(folder)
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise StudyError("a model in simulated INT8 is not saved; keep the sparse model that it was made from")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (SHAPES, INDEX, WEIGHTS, GRIDS, "model.safetensors"):  # of another model that was saved here
            (folder / stale).unlink(missing_ok=True)
        tokenizer.save_pretrained(folder)
        if _is_uniform(model) and not is_quantized(model):
            model.save_pretrained(folder)
            return folder
        config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        shapes = {"format": 1, "config": config, "layers": layer_shapes(model)}
        if factors := factor_shapes(model):
            shapes["factors"] = factors
        (folder / SHAPES).write_text(json.dumps(shapes, indent=1), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps({"model_type": model.config.model_type}), encoding="utf-8")
        guard = {"metadata": {"total_size": 0}, "weight_map": {GUARD: f"{GUARD}.safetensors"}}
        (folder / INDEX).write_text(json.dumps(guard, indent=1), encoding="utf-8")
        if is_quantized(model):
            save_quantized(model, folder / WEIGHTS)
        else:
            safetensors.torch.save_model(model, str(folder / WEIGHTS))
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StudyError(f"cannot save the model to {folder} ({reason}); free some space or give another") from None
    return folder


def _auto_class(config: Any) -> Any:
    """The auto class of the head that a config's ``architectures`` names; of the bare encoder for ``BertModel``."""
    name = (config.architectures or [""])[0]
    if name.endswith("Model"):
        return AutoModel
    return AutoModelForQuestionAnswering if "QuestionAnswering" in name else AutoModelForSequenceClassification


def load_compressed(folder: str | Path) -> tuple[PreTrainedModel, Any]:
    """Load any model that ``save_compressed`` wrote, ready to run in eval mode.

    Raises:
        StudyError: not such a folder, or weights that do not fit the recorded shapes.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise StudyError(f"{folder} holds no model: config.json is missing; give a folder made by save_compressed")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer_config.json").is_file() else None
        if not (folder / SHAPES).is_file():
            auto = _auto_class(AutoConfig.from_pretrained(folder))
            return auto.from_pretrained(folder, use_safetensors=True).eval(), tokenizer
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        reason = first_line(error)
        raise StudyError(f"model folder {folder} is damaged ({reason}); save the model again") from None
    try:
        saved = json.loads((folder / SHAPES).read_text(encoding="utf-8"))
        config = AutoConfig.for_model(**saved["config"])
        model = _auto_class(config).from_config(config)
        apply_shapes(model, saved["layers"])
        apply_factor_shapes(model, saved.get("factors", {}))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, StudyError) as error:
        reason = first_line(error)
        raise StudyError(f"{folder / SHAPES} is damaged ({reason}); save the model again") from None
    if (folder / GRIDS).is_file():
        load_quantized(model, folder / WEIGHTS)
        return model.eval(), tokenizer
    try:
        safetensors.torch.load_model(model, str(folder / WEIGHTS))
    except (RuntimeError, OSError, safetensors.SafetensorError) as error:
        raise StudyError(f"{folder / WEIGHTS} does not fit {SHAPES} ({first_line(error)})") from None
    return model.eval(), tokenizer
