"""Short human names of specs, for file names and progress lines."""

from pathlib import Path
from typing import Any

from lib.compressors import CompressorSpec
from lib.specs import (
    ContributionSpec,
    EngineQualitySpec,
    FactorisationSpec,
    FisherCostSpec,
    ImportanceSpec,
    LatencySpec,
    MajoritySpec,
    Spec,
    StockComparisonSpec,
    TextDistillationSpec,
    TrainSpec,
    TranslationLatencySpec,
    TranslationSpec,
    UpstreamSpec,
)


def label(spec: Spec) -> str:
    """A short human name, used in file names and progress lines."""
    if isinstance(spec, TrainSpec):
        return _trained(spec)
    if isinstance(spec, TextDistillationSpec):
        return f"{_name(spec.compressor)}_{_factors(spec.compressor.settings)}_seed{spec.seed}"
    if isinstance(spec, FactorisationSpec):
        return Path(spec.encoder).name
    if isinstance(spec, TranslationSpec):
        return _translated(spec)
    if isinstance(spec, ImportanceSpec):
        return f"{spec.task}_{spec.method}_seed{spec.start.seed}"
    if isinstance(spec, TranslationLatencySpec):
        shape = spec.shape
        return f"{shape.hidden_size}x{shape.layers}_batch{spec.batch}_length{spec.length}"
    if isinstance(spec, EngineQualitySpec):
        return f"{spec.engine}_{label(spec.start)}"
    if isinstance(spec, FisherCostSpec):
        return f"width{spec.width}"
    if isinstance(spec, UpstreamSpec):
        sparsity = 100 * spec.compressor.settings.get("sparsity", 0) if spec.compressor else 0
        return f"{spec.task}_{f'pruned_{sparsity:g}' if sparsity else 'dense'}_seed{spec.seed}"
    if isinstance(spec, ContributionSpec | MajoritySpec | StockComparisonSpec):
        return spec.task
    where = f"_{spec.instructions}" if isinstance(spec, LatencySpec) and spec.instructions else ""
    return f"{spec.dense}_batch{spec.batch}_length{spec.length}{where}"


def _trained(spec: TrainSpec) -> str:
    compressor, settings = spec.compressor, spec.compressor.settings if spec.compressor else {}
    parts = [spec.task, _name(compressor)]
    parts += ["-".join(map(str, settings["drop"]))] if "drop" in settings else []
    parts += [f"{kind}{density:g}" for kind, density in settings.get("densities", {}).items()]
    parts += [f"{100 * settings['sparsity']:g}"] if "sparsity" in settings else []
    parts += [f"runs{settings['group']}"] if settings.get("group", 1) > 1 else []
    parts += [settings["importance"]] if settings.get("importance") in ("magnitude", "movement") else []
    if compressor and compressor.name == "structured":
        sources = [getattr(source, "method", "l0") for source in spec.informed_by[:1]]
        parts += [settings.get("importance", ""), *sources, "trained" if spec.training.epochs else ""]
    parts += [_factors(settings), "text" if isinstance(spec.start, TextDistillationSpec) else "", _blocks(compressor)]
    return "_".join([*filter(None, parts), f"seed{spec.seed}"])


def _translated(spec: TranslationSpec) -> str:
    settings = spec.compressor.settings if spec.compressor else {}
    bits = f"{settings['bits']}bit_" if "bits" in settings else ""
    parts = [spec.task, _name(spec.compressor), _blocks(spec.compressor), f"{bits}seed{spec.seed}"]
    return "_".join(filter(None, parts))


def _name(compressor: CompressorSpec | None) -> str:
    """A compressor's name; a user's own ``module:Class`` is its class."""
    return compressor.name.rpartition(":")[2] if compressor else "dense"


def _blocks(compressor: CompressorSpec | None) -> str:
    """Variant, block and strength of block movement pruning, for a label; empty for other compressors."""
    if compressor is None or compressor.name != "block_movement":
        return ""
    settings = compressor.settings
    block = "x".join(map(str, settings.get("block", ())))
    names = [name for name in ("final_lambda", "density") if name in settings]
    strength = [f"{name.removeprefix('final_')}{settings[name]:g}" for name in names]
    return "-".join([settings.get("variant", "hybrid"), block, *strength])


def _factors(settings: dict[str, Any]) -> str:
    """Shapes of Kronecker factors, for a label; empty for other compressors."""
    if "embedding" not in settings or "attention" not in settings:
        return ""
    shapes = ["x".join(map(str, settings[kind])) for kind in ("attention", "ffn")]
    extra = [settings.get("initialisation", "")] if settings.get("initialisation") == "random" else []
    return "-".join([*shapes, str(settings["embedding"]), *extra])
