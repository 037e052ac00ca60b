"""A Transformer whose every operation is quantised: modules, and how they get into a model.

Each tensor is rounded once, where it is made (``RunningRange``): the sum of embeddings and positions; queries, keys and
values; the attention scores; the softmax's numerator, denominator and output; the context; the outputs of attention,
of the feed-forward block's activation and of the block; LayerNorm's numerator, denominator, quotient and output. So
both sides of every matrix product are on a grid. Weights are rounded by their own range; biases and the sums of
residual connections are not rounded (Prato et al. 2020, section 3, after a reader's notes).

Works on ``lib.translation`` and on encoders with the parts of ``lib.models.layer_parts``. The modules subclass what
they replace and keep its parameter names.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from lib.config import StudyError
from lib.models import layer_parts, layers
from lib.quantizers import RunningRange, Switch, check_bits, fake_quantize, step_size, weight_range
from lib.settings import Strict
from lib.translation import Attention, FeedForward, MaskedSoftmax, TokenEmbedding, TranslationModel

Part = Literal["weights", "embeddings", "attention", "softmax", "ffn", "layer_norm"]
PARTS: tuple[Part, ...] = ("weights", "embeddings", "attention", "softmax", "ffn", "layer_norm")
ATTENTION = "study_quantized"
MARK = "study_quantization"  # attribute of a quantised model: its ``Weights``
FROM_SUMS = ("classifier", "out_proj")  # heads whose input no quantised module made


class Quantizing(Strict):
    """What is quantised and how.

    ``bucketing``: a range per output row of a weight, instead of one per matrix. ``parts``: everything, or some of it
    to see what it costs. ``mask_guard`` leaves masked scores out of the softmax input's range. ``denominator_guard``
    rounds LayerNorm's denominator over its own range, which does not reach 0; without it the variance is rounded like
    any other tensor that cannot be negative, from 0 on.
    """

    bits: int
    bucketing: bool = True
    parts: tuple[Part, ...] = Field(default=PARTS, min_length=1)
    mask_guard: bool = True
    denominator_guard: bool = True


class Weights:
    """Rounds weights by ``settings`` when ``switch`` says so; shared by all modules of a model."""

    def __init__(self, settings: Quantizing, switch: Switch) -> None:
        self.settings, self.switch = settings, switch

    def quantizes(self, embedding: bool) -> bool:
        """Whether weights of this kind are quantised at all."""
        return ("embeddings" if embedding else "weights") in self.settings.parts

    def __call__(self, weight: Tensor, embedding: bool = False, rows: Tensor | None = None) -> Tensor:
        """``weight``, or its rows ``rows`` alone, rounded."""
        chosen = weight if rows is None else F.embedding(rows, weight)
        if not self.switch.quantizing or self.switch.frozen or not self.quantizes(embedding):
            return chosen
        if rows is not None and self.settings.bucketing:
            low, high = chosen.detach().amin(-1, keepdim=True), chosen.detach().amax(-1, keepdim=True)
        else:
            low, high = weight_range(weight, self.settings.bucketing)
        return fake_quantize(chosen, low, high, self.settings.bits)


class QuantizedLinear(nn.Linear):
    """A linear map with rounded weights and, where asked for, a rounded input and output."""

    def __init__(self, linear: nn.Linear, weights: Weights, given: RunningRange | None,
                 made: RunningRange | None) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weights, self.given, self.made = weights, given, made

    def forward(self, input: Tensor) -> Tensor:
        if self.given is not None:
            input = self.given(input)
        output = F.linear(input, self.weights(self.weight), self.bias)
        return output if self.made is None else self.made(output)


class QuantizedEmbedding(nn.Embedding):
    """An embedding table with rounded rows."""

    def __init__(self, embedding: nn.Embedding, weights: Weights) -> None:
        shape = (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        super().__init__(*shape, _weight=embedding.weight.detach())
        self.weight, self.weights = embedding.weight, weights

    def forward(self, input: Tensor) -> Tensor:
        return self.weights(self.weight, embedding=True, rows=input)


class QuantizedTokenEmbedding(QuantizedEmbedding, TokenEmbedding):
    """The translation model's table: rounded for looking up and for the output's matrix product."""

    def table(self) -> Tensor:
        return self.weights(self.weight, embedding=True)


class QuantizedLayerNorm(nn.LayerNorm):
    """LayerNorm step by step in fp32, each step rounded."""

    def __init__(self, norm: nn.LayerNorm, weights: Weights, make: Callable[..., RunningRange]) -> None:
        nn.Module.__init__(self)
        self.normalized_shape, self.eps = norm.normalized_shape, norm.eps
        self.elementwise_affine = norm.elementwise_affine
        self.weight, self.bias, self.weights = norm.weight, norm.bias, weights
        self.guarded = weights.settings.denominator_guard
        self.numerator, self.quotient, self.made = make("numerator"), make("quotient"), make("output")
        self.denominator = make("denominator") if self.guarded else make("variance", from_zero=True)

    def forward(self, input: Tensor) -> Tensor:
        centred = input.float()
        numerator = self.numerator(centred - centred.mean(-1, keepdim=True))
        variance = numerator.square().mean(-1, keepdim=True) + self.eps
        denominator = self.denominator(variance.sqrt()) if self.guarded else self.denominator(variance).sqrt()
        quotient = self.quotient(numerator / denominator)
        return self.made(quotient * self.weights(self.weight) + self.bias)


class QuantizedSoftmax(MaskedSoftmax):
    """Softmax step by step in fp32, each step rounded, its input too."""

    def __init__(self, settings: Quantizing, make: Callable[..., RunningRange]) -> None:
        super().__init__()
        self.guarded = settings.mask_guard
        self.scores, self.numerator = make("scores"), make("numerator", from_zero=True)
        self.denominator, self.made = make("denominator"), make("output", from_zero=True)

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            scores = self.scores(scores)
        elif self.guarded:
            scores = self.scores(scores, mask).masked_fill(~mask, float("-inf"))
        else:
            scores = self.scores(scores.float().masked_fill(~mask, float("-inf")))
        numerator = self.numerator((scores - scores.amax(-1, keepdim=True)).exp())
        return self.made(numerator / self.denominator(numerator.sum(-1, keepdim=True)))


def _attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """transformers' eager attention over ``module.study_softmax``; its additive mask becomes a boolean one."""
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    visible = None if attention_mask is None else attention_mask > torch.finfo(attention_mask.dtype).min / 2
    shares = F.dropout(module.study_softmax(scores, visible), dropout, module.training)
    return (shares.to(value.dtype) @ value).transpose(1, 2).contiguous(), shares


def quantize_model(model: PreTrainedModel, settings: Quantizing, switch: Switch) -> None:
    """Put quantising modules in the place of a model's own, in place; nothing is rounded until ``switch`` says so.

    Raises:
        StudyError: bits out of range, a model that is quantised already, or an architecture without known parts.
    """
    check_bits(settings.bits)
    if is_quantized(model):
        raise StudyError("quantization: the model is quantised already; begin with a dense one")
    builder = _Builder(settings, switch)
    if isinstance(model, TranslationModel):
        builder.translation(model)
    else:
        builder.encoder(model)
    setattr(model, MARK, builder.weights)
    model.train(model.training)  # what was put in does now what the rest of the model does


def is_quantized(model: nn.Module) -> bool:
    """Whether ``quantize_model`` has changed this model."""
    return hasattr(model, MARK)


def weights_of(model: Any) -> Weights:
    """What rounds the weights of a model that ``quantize_model`` has changed."""
    return getattr(model, MARK)


def ranges(model: nn.Module) -> Iterator[RunningRange]:
    """Every activation's quantiser."""
    return (module for module in model.modules() if isinstance(module, RunningRange))


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and parameter of every weight that is rounded."""
    weights = weights_of(model)
    kinds = (QuantizedLinear, QuantizedEmbedding, QuantizedLayerNorm)
    for name, module in model.named_modules():
        if isinstance(module, kinds) and weights.quantizes(isinstance(module, QuantizedEmbedding)):
            yield f"{name}.weight", module.weight


class _Builder:
    """Makes and places the modules of one model."""

    def __init__(self, settings: Quantizing, switch: Switch) -> None:
        self.settings, self.switch = settings, switch
        self.weights = Weights(settings, switch)

    def range(self, part: Part, name: str, from_zero: bool = False) -> RunningRange | None:
        if part not in self.settings.parts:
            return None
        return RunningRange(self.switch, self.settings.bits, name, from_zero)

    def linear(self, model: nn.Module, name: str, given: RunningRange | None = None,
               made: RunningRange | None = None) -> None:  # fmt: skip
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        model.set_submodule(name, QuantizedLinear(old, self.weights, given, made))

    def norms_and_embeddings(self, model: nn.Module) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.LayerNorm) and "layer_norm" in self.settings.parts:
                make = self._maker(name)
                model.set_submodule(name, QuantizedLayerNorm(module, self.weights, make))
            elif isinstance(module, TokenEmbedding):
                model.set_submodule(name, QuantizedTokenEmbedding(module, self.weights))
            elif isinstance(module, nn.Embedding):
                model.set_submodule(name, QuantizedEmbedding(module, self.weights))

    def _maker(self, name: str) -> Callable[..., RunningRange]:
        def make(step: str, from_zero: bool = False) -> RunningRange:
            return RunningRange(self.switch, self.settings.bits, f"{name}, {step}", from_zero)

        return make

    def softmax(self, name: str) -> MaskedSoftmax:
        if "softmax" not in self.settings.parts:
            return MaskedSoftmax()
        return QuantizedSoftmax(self.settings, self._maker(name))

    def block(self, model: nn.Module, names: dict[str, str], from_zero: bool) -> None:
        """The six linear maps of a layer, or those of them that ``names`` has; ``from_zero`` after ReLU."""
        for kind, name in names.items():
            if kind in ("query", "key", "value"):
                self.linear(model, name, made=self.range("attention", f"{name}, output"))
            elif kind == "attention_output":
                given, made = (self.range("attention", f"{name}, {side}") for side in ("input", "output"))
                self.linear(model, name, given, made)
            elif kind == "ffn_in":
                self.linear(model, name)
            else:
                given = self.range("ffn", f"{name}, input", from_zero)
                self.linear(model, name, given, self.range("ffn", f"{name}, output"))

    def translation(self, model: TranslationModel) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, Attention):
                kinds = {kind: f"{name}.{kind}" for kind in ("query", "key", "value")}
                self.block(model, kinds | {"attention_output": f"{name}.output"}, False)
                module.softmax = self.softmax(f"{name}.softmax")
            elif isinstance(module, FeedForward):
                self.block(model, {kind: f"{name}.{kind}" for kind in ("ffn_in", "ffn_out")}, True)
        for side in ("encoder_input", "decoder_input"):
            if (made := self.range("embeddings", f"{side}, output")) is not None:
                model.set_submodule(side, made)
        self.norms_and_embeddings(model)

    def encoder(self, model: PreTrainedModel) -> None:
        """BERT, RoBERTa and DistilBERT: what ``lib.models.layer_parts`` knows."""
        names = {id(module): name for name, module in model.named_modules()}
        inside: set[str] = set()
        relu = str(getattr(model.config, "hidden_act", getattr(model.config, "activation", ""))) == "relu"
        for layer in layers(model):
            paths = {kind: names[id(linear)] for kind, linear in vars(layer_parts(layer)).items()}
            attention = model.get_submodule(paths["query"].rpartition(".")[0])
            attention.study_softmax = self.softmax(f"{paths['query'].rpartition('.')[0]}.softmax")
            self.block(model, paths, relu)
            inside |= set(paths.values())
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name not in inside:
                given = self.range("ffn", f"{name}, input") if name.rpartition(".")[2] in FROM_SUMS else None
                self.linear(model, name, given)
        self.norms_and_embeddings(model)
        use_quantized_attention(model)


def use_quantized_attention(model: PreTrainedModel) -> None:
    """Let transformers' attention modules call their ``study_softmax``."""
    AttentionInterface.register(ATTENTION, _attention_forward)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    model.set_attn_implementation(ATTENTION)


def freeze_weights(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Round all weights for good, in place; returns (low, step size) of each by name, as they are stored."""
    weights = weights_of(model)
    grids = {}
    with torch.no_grad():
        for name, weight in quantized_weights(model):
            low, high = weight_range(weight, weights.settings.bucketing)
            grids[name] = (low, step_size(low, high, weights.settings.bits))
            weight.copy_(fake_quantize(weight, low, high, weights.settings.bits))
    weights.switch.frozen = weights.switch.quantizing = True
    weights.switch.observing = False
    return grids
