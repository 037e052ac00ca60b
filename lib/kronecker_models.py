"""Kronecker factors in a whole encoder: which weight gets which shape, the published configurations, exact sizes.

KroneckerBERT (Tahaei et al. 2021, arXiv:2109.06243, section 3 and Table 1). Shapes are written (n1, m1), as there:
inputs and outputs of the first factor. The printed pair for the feed-forward part is taken for the map into it and
turned round for the map out of it; the printed parameter counts and FLOPs do not tell this from other readings.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from pydantic import PositiveInt
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from lib.config import StudyError
from lib.kronecker import KroneckerEmbedding, KroneckerLinear, Shape, second_shape
from lib.models import ARCHITECTURES, base_model, count_parameters, layer_parts, layers
from lib.settings import Strict

Initialisation = Literal["nearest", "random"]
Kind = Literal["attention", "ffn", "embedding"]
KINDS: tuple[Kind, ...] = ("attention", "ffn", "embedding")


class KroneckerShapes(Strict):
    """The first factor's shape for every kind of weight, written (n1, m1) as the paper does: its inputs, its outputs.

    ``attention`` serves query, key, value and output. ``ffn`` serves the map into the feed-forward part, and turned
    round, (m1, n1), the map out of it. ``embedding`` is n of A (vocabulary, d / n) ⊗ B (1, n). ``terms`` products are
    added up. ``swap`` exchanges the two factors of every product: same size and cost, another approximation.
    """

    attention: tuple[PositiveInt, PositiveInt]
    ffn: tuple[PositiveInt, PositiveInt]
    embedding: PositiveInt
    terms: PositiveInt = 1
    swap: bool = False


# KroneckerBERT8, 19 and 21, named after their compression of BERT-base (19 is the first version's).
PUBLISHED: dict[str, KroneckerShapes] = {
    "kron8": KroneckerShapes(attention=(384, 384), ffn=(2, 8), embedding=8),
    "kron19": KroneckerShapes(attention=(48, 384), ffn=(2, 16), embedding=12),
    "kron21": KroneckerShapes(attention=(48, 384), ffn=(2, 16), embedding=16),
}
PUBLISHED_ON = "bert-base-uncased"


def kronecker_modules(model: nn.Module) -> dict[str, KroneckerLinear | KroneckerEmbedding]:
    """The factorised parts of a model by their path; empty for a model without any."""
    kinds = (KroneckerLinear, KroneckerEmbedding)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


class Wanted(NamedTuple):
    """What is wanted of one weight: its kind, and the shapes of its factors."""

    kind: Kind
    first: Shape
    second: Shape


def wanted_factors(model: nn.Module, shapes: KroneckerShapes) -> dict[str, Wanted]:
    """Path -> factors, for every weight that ``shapes`` speaks of, whether it is factorised already or not.

    Raises:
        StudyError: an architecture without known linear maps (XLNet), or a shape that does not divide a weight.
    """
    (n1, m1), (f1, g1) = shapes.attention, shapes.ffn
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, Wanted] = {}

    def want(kind: Kind, module: Any, size: Shape, first: Shape) -> None:
        path = paths[id(module)]
        second = second_shape(size, first, path)
        found[path] = Wanted(kind, second, first) if shapes.swap else Wanted(kind, first, second)

    table = word_embedding(model)
    vocabulary, width = table.num_embeddings, table.embedding_dim
    if width % shapes.embedding:
        raise StudyError(
            f"kronecker: embedding: {shapes.embedding} does not divide the width {width}; give one of its divisors"
        )
    want("embedding", table, (vocabulary, width), (vocabulary, width // shapes.embedding))
    for layer in layers(model):
        parts = layer_parts(layer, (nn.Linear, KroneckerLinear))
        for linear in (parts.query, parts.key, parts.value, parts.attention_output):
            want("attention", linear, (linear.out_features, linear.in_features), (m1, n1))
        want("ffn", parts.ffn_in, (parts.ffn_in.out_features, parts.ffn_in.in_features), (g1, f1))
        want("ffn", parts.ffn_out, (parts.ffn_out.out_features, parts.ffn_out.in_features), (f1, g1))
    return found


def word_embedding(model: nn.Module) -> Any:
    """The table of word vectors, ``nn.Embedding`` or ``KroneckerEmbedding``.

    Raises:
        StudyError: an architecture that keeps it elsewhere (XLNet).
    """
    try:
        return base_model(model).get_submodule("embeddings.word_embeddings")
    except AttributeError:
        raise StudyError(f"kronecker: {type(model).__name__} has no word embeddings known here; use BERT") from None


def factorise(model: nn.Module, shapes: KroneckerShapes, initialisation: Initialisation = "nearest",
              seed: int = 0) -> dict[str, float]:  # fmt: skip
    """Put factors in the place of the encoder's weights and word embeddings, in place.

    Args:
        initialisation: "nearest" to the weights that were there, or "random".
        seed: of random factors.

    Returns:
        Relative error of every product by path; empty for random factors.

    Raises:
        StudyError: an architecture or a shape that is impossible, or a model that is factorised already.
    """
    wanted, errors = wanted_factors(model, shapes), dict[str, float]()
    if kronecker_modules(model):
        raise StudyError("kronecker: the model consists of Kronecker factors already; start with a dense one")
    generator = torch.Generator().manual_seed(seed)
    for path, (_, first, _) in wanted.items():
        old: Any = model.get_submodule(path)
        new = _counterpart(old, first, shapes.terms, path)
        if old.weight.device.type != "meta":  # there nothing but the shapes matters
            if initialisation == "nearest":
                errors[path] = new.set_nearest(old.weight)
            else:
                new.set_random(generator=generator)
        _replace(model, path, new)
    return errors


def _counterpart(old: Any, first: Shape, terms: int, path: str) -> KroneckerLinear | KroneckerEmbedding:
    kind = KroneckerEmbedding if isinstance(old, nn.Embedding) else KroneckerLinear
    return kind.like(old, first, terms, path)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def factor_shapes(model: nn.Module) -> dict[str, dict[str, list[int]]]:
    """Path -> ``a`` and ``b``, each [terms, rows, columns], of the factorised parts, to be saved beside the weights."""
    return {
        path: {"a": [module.terms, *module.first], "b": [module.terms, *module.second]}
        for path, module in kronecker_modules(model).items()
    }


def apply_factor_shapes(model: nn.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Put factors of saved shapes, with random values, in the place of dense parts, in place.

    Raises:
        ValueError, AttributeError, KeyError: a path or a shape that the model does not have.
    """
    for path, shapes in saved.items():
        old: Any = model.get_submodule(path)
        (terms, m1, n1), (_, *second) = shapes["a"], shapes["b"]
        new = _counterpart(old, (m1, n1), terms, path)
        if list(new.second) != second:
            raise ValueError(f"{path}: factors {m1, n1} and {second} do not make {tuple(old.weight.shape)}")
        _replace(model, path, new)


def dense_parameters(model: nn.Module) -> int:
    """Parameters that a model would have with every product built."""
    modules = kronecker_modules(model).values()
    return count_parameters(model) + sum(m.shape[0] * m.shape[1] - m.a.numel() - m.b.numel() for m in modules)


def encoder_parameters(config: PreTrainedConfig, shapes: KroneckerShapes | None = None) -> int:
    """Exact count of an encoder with its pooler, dense or factorised, on the meta device."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)
        if shapes:
            factorise(model, shapes)
    return count_parameters(model)


@lru_cache(maxsize=64)
def _dense_count(architecture: str, shapes: KroneckerShapes | None) -> int:
    return encoder_parameters(ARCHITECTURES[architecture], shapes)


def published_ratio(name: str) -> float:
    """Parameters of BERT-base over those of a published configuration, both counted."""
    return _dense_count(PUBLISHED_ON, None) / _dense_count(PUBLISHED_ON, published_shapes(name))


def published_shapes(name: str) -> KroneckerShapes:
    """The configuration of a published model.

    Raises:
        StudyError: unknown name.
    """
    if name not in PUBLISHED:
        raise StudyError(f"kronecker: unknown configuration '{name}'; known: {', '.join(PUBLISHED)}")
    return PUBLISHED[name]


def configuration(name: str, config: PreTrainedConfig) -> KroneckerShapes:
    """A published configuration carried over to an encoder of another size.

    What stays is the small factor of every weight: B of the attention maps, A of the feed-forward ones. The n of the
    embedding is the divisor of the width that brings the whole encoder nearest to the published ratio, since the share
    of the embeddings differs between encoders. BERT-base gets the published shapes.

    Raises:
        StudyError: unknown name, or a width that the small factors do not divide.
    """
    published, base, width = published_shapes(name), ARCHITECTURES[PUBLISHED_ON].hidden_size, config.hidden_size
    small = [base // size for size in published.attention]
    attention = tuple(width // size for size in small)
    if any(width % size for size in small):
        raise StudyError(f"kronecker: {name}: the width {width} is no multiple of {max(small)}; take another encoder")
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    dense = encoder_parameters(config)
    shapes = published.model_copy(update={"attention": attention, "embedding": 1})
    rest = encoder_parameters(config, shapes) - config.vocab_size * width - 1

    def distance(n: int) -> float:
        ratio = dense / (rest + config.vocab_size * width // n + n)
        return abs(ratio / published_ratio(name) - 1)

    return shapes.model_copy(update={"embedding": min(divisors, key=distance)})
