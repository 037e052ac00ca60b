"""A transformers model as one ONNX graph with dynamic batch and length, kept on disk until the model changes.

One export serves every engine that is not PyTorch. It uses torch's ``torch.export``-based exporter: the older tracing
one drops the attention mask of transformers 5 models without a word, so that padded inputs get wrong logits. Attention
is exported as plain matrix products ("eager"), which ONNX Runtime and OpenVINO fuse better than a decomposed sdpa call.
"""

import contextlib
import copy
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib.config import StudyError
from lib.models import layer_parts, layers
from lib.quantized_layers import is_quantized

OPSET = 18  # the lowest that torch's exporter writes without a conversion afterwards
_ONE_FILE_LIMIT = 1_800_000_000  # bytes; a protobuf file ends at 2 GiB, larger weights go into a file beside it


def logits_of(output: Any) -> tuple[Tensor, ...]:
    """All logits of a transformers output, in its order: start and end, or the classification's."""
    return tuple(value for name, value in output.items() if name.endswith("logits"))


def evaluation_copy(model: nn.Module, attention: str, dtype: torch.dtype, device: str) -> Any:
    """An independent, frozen copy with the given attention, or its own where the architecture has no other."""
    copied: Any = copy.deepcopy(model).to(device=device, dtype=dtype).eval().requires_grad_(False)
    if is_quantized(model):  # another kernel would leave the softmax unrounded
        return copied
    with quiet(), contextlib.suppress(AttributeError, ValueError, NotImplementedError):
        copied.set_attn_implementation(attention)
    return copied


def _fill_empty_layers(model: Any) -> None:
    """Give layers pruned to no head or no unit at all one whose weights are zero, in place.

    The function stays the same; engines refuse matrices without a row. It costs what one head or unit costs.
    """
    with torch.no_grad(), contextlib.suppress(StudyError):
        for layer in layers(model):
            parts = layer_parts(layer)
            if parts.attention_output.weight.shape[1] == 0:
                head_size = model.config.hidden_size // model.config.num_attention_heads
                _fill((parts.query, parts.key, parts.value), parts.attention_output, head_size)
            if parts.ffn_out.weight.shape[1] == 0:
                _fill((parts.ffn_in,), parts.ffn_out, 1)


def _fill(inward: tuple[nn.Linear, ...], outward: nn.Linear, width: int) -> None:
    for linear in inward:
        linear.weight = nn.Parameter(linear.weight.new_zeros(width, linear.weight.shape[1]))
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.new_zeros(width))
    outward.weight = nn.Parameter(outward.weight.new_zeros(outward.weight.shape[0], width))


class _LogitsOnly(nn.Module):
    """Positional inputs, tuple of logits: what the exporter can name."""

    def __init__(self, model: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model: Any = model
        self.names = names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return logits_of(self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=True))


def export_onnx(model: nn.Module, names: Sequence[str], file: Path) -> None:
    """Write ``model`` in fp32; inputs ``names`` of shape (batch, length), outputs ``logits_0``, ``logits_1`` ...

    Raises:
        StudyError: the exporter cannot express the model.
    """
    copied = evaluation_copy(model, "eager", torch.float32, "cpu")
    _fill_empty_layers(copied)
    wrapped = _LogitsOnly(copied, tuple(names))
    # Sizes of 0 and 1 would be baked in, and equal sizes taken for the same dimension.
    example = {name: torch.zeros(2, 16, dtype=torch.int64) for name in names}
    if "attention_mask" in example:
        example["attention_mask"][:, :12] = 1
    with torch.no_grad():
        outputs = len(wrapped(*example.values()))
    dynamic = torch.export.Dim.DYNAMIC
    external = sum(tensor.nbytes for tensor in wrapped.state_dict().values()) > _ONE_FILE_LIMIT
    try:
        with quiet():
            torch.onnx.export(
                wrapped,
                tuple(example.values()),
                str(file),
                dynamo=True,
                dynamic_shapes=(tuple({0: dynamic, 1: dynamic} for _ in names),),
                input_names=list(names),
                output_names=[f"logits_{i}" for i in range(outputs)],
                opset_version=OPSET,
                external_data=external,
                optimize=True,  # folds the weights' transposes, without which int8 quantisers find no weights
                verbose=False,
            )
    except OSError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise StudyError(f"{type(model).__name__} cannot be exported ({reason}); use a pytorch engine") from error


def first_line(error: Exception) -> str:
    """What a library's error says, short enough for a message of ours: one line, no colours."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def fingerprint(model: nn.Module, names: Sequence[str] = ()) -> str:
    """12 hex digits over a model's class, config, weights and exporter versions: equal means the same export."""
    config = getattr(model, "config", None)
    described = config.to_json_string() if config is not None else ""
    versions = [importlib.metadata.version(package) for package in ("torch", "transformers", "onnxscript")]
    about = repr((type(model).__name__, described, tuple(names), OPSET, versions))
    digest = hashlib.blake2b(about.encode(), digest_size=6)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def cached_export(folder: Path, name: str, key: str, build: Callable[[Path], None]) -> Path:
    """``folder / name`` as ``build`` writes it, reused while ``key`` is the same; never left half-written.

    Raises:
        StudyError: the folder cannot be written.
    """
    target, stamp = folder / name, folder / f"{name}.key"
    try:
        if target.is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8") == key:
            return target
        folder.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        for stale in _parts(target):
            stale.unlink()
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as temporary:
            build(Path(temporary) / name)
            for made in Path(temporary).iterdir():
                os.replace(made, folder / made.name)
        stamp.write_text(key, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise StudyError(f"cannot write {target}: {reason}; free space or give a writable folder") from None
    return target


def export_bytes(target: Path) -> int:
    """Size on disk of an export: its graph, and its weights where they lie beside it."""
    return sum(path.stat().st_size for path in _parts(target))


def _parts(target: Path) -> list[Path]:
    return [path for path in target.parent.glob(f"{target.stem}.*") if path.suffix != ".key"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep exporters' and quantisers' progress bars, notices and version warnings out of notebooks."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        if importlib.util.find_spec("rich"):
            import rich

            console = rich.get_console()
            stack.callback(setattr, console, "is_jupyter", console.is_jupyter)
            stack.callback(setattr, console, "quiet", console.quiet)
            # Under Jupyter rich draws through a widget, which ignores ``quiet``.
            console.quiet, console.is_jupyter = True, False
        yield
