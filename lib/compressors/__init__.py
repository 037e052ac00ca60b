"""The compressors by name. A name with a colon, ``package.module:Class``, is a user's own."""

import importlib
from collections.abc import Sequence
from typing import Any

from pydantic import Field, ValidationError

from lib.compressors.base import Compressor
from lib.compressors.block_movement import BlockMovement
from lib.compressors.kronecker import Kronecker
from lib.compressors.l0_gates import L0Gates
from lib.compressors.layer_dropping import LayerDropping
from lib.compressors.masked import FixedMasks
from lib.compressors.obert import ObertPruning
from lib.compressors.quantization import Quantization
from lib.compressors.refill import Refill
from lib.compressors.sparse_int8 import SparseInt8
from lib.compressors.structured import StructuredPruning
from lib.config import StudyError
from lib.problems import first_problem
from lib.settings import Strict

COMPRESSORS: dict[str, type[Compressor]] = {
    cls.name: cls
    for cls in (
        LayerDropping, Kronecker, L0Gates, StructuredPruning, BlockMovement, Refill, FixedMasks, ObertPruning,
        SparseInt8, Quantization,
    )
}  # fmt: skip

__all__ = [
    "COMPRESSORS", "BlockMovement", "Compressor", "CompressorSpec", "FixedMasks", "Kronecker", "L0Gates",
    "LayerDropping", "ObertPruning", "Quantization", "Refill", "SparseInt8", "StructuredPruning", "make_compressor",
]  # fmt: skip


class CompressorSpec(Strict):
    """A compressor's name and its settings, as a run's spec holds them."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)


def make_compressor(spec: CompressorSpec, informed: Sequence[dict[str, Any]] = ()) -> Compressor:
    """Build the compressor that a spec names, with the results that it is informed by.

    Raises:
        StudyError: unknown name, or settings that the method does not have or allow.
    """
    if ":" in spec.name:
        module, _, attribute = spec.name.partition(":")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise StudyError(f"compressor '{spec.name}' cannot be imported ({error})") from None
    elif spec.name in COMPRESSORS:
        cls = COMPRESSORS[spec.name]
    else:
        raise StudyError(f"unknown compressor '{spec.name}'; known: {', '.join(COMPRESSORS)}, or 'module:Class'")
    try:
        return cls(cls.Settings.model_validate(spec.settings), informed)
    except ValidationError as error:
        raise StudyError(f"compressor {spec.name}: setting {first_problem(error, 'as a whole')}") from None
