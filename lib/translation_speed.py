"""Latency of a translation model on every engine, in the engine's own precision: real INT8, never simulated."""

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import Seq2SeqLMOutput

from lib import benchmark, engines
from lib.agreement import check_agreement, random_batch
from lib.config import StudyError
from lib.specs import TranslationLatencySpec
from lib.translation import TranslationModel, new_model


class PairScores(nn.Module):
    """A teacher-forced pass over pairs whose target has the source's tokens: all that an engine needs to be timed."""

    base_model_prefix = ""  # no encoder below a head

    def __init__(self, model: TranslationModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, return_dict: bool = True) -> Any:
        """Logits of every target position, (batch * length, vocabulary)."""
        output = self.model(input_ids, attention_mask, decoder_input_ids=input_ids)
        return Seq2SeqLMOutput(logits=output.logits.flatten(0, 1))


def run_translation_latency(spec: TranslationLatencySpec) -> dict[str, Any]:
    """The model on every engine at one batch and length, interleaved; engines that are not there are listed.

    Raises:
        StudyError: no engine is available, or one computes something else.
    """
    vocabulary = spec.shape.vocabulary
    model = PairScores(new_model(spec.shape, vocabulary, 0.0, 0.0, seed=0)).eval()
    checks = [random_batch(2, 24, vocabulary, 1, padding=12), random_batch(3, 17, vocabulary, 2, padding=4)]
    unavailable = {name: reason for name in spec.engines if (reason := engines.unavailable_reason(name))}
    present = [name for name in spec.engines if name not in unavailable]
    if not present:
        raise StudyError("latency: no engine is available; " + "; ".join(unavailable.values()))
    with tempfile.TemporaryDirectory(prefix="latency-") as folder:
        prepared = {
            name: engines.prepare(name, model, checks[0], spec.threads, checks, Path(folder)) for name in present
        }
        agreement = {name: check_agreement(engine, model, checks) for name, engine in prepared.items()}
        rows = benchmark.latency(prepared, spec.batch, spec.length, spec.threads, vocabulary, rounds=spec.rounds)
    for row in rows:
        row["size_bytes"] = prepared[row["engine"]].size_bytes
    return {"rows": rows, "agreement": agreement, "unavailable": unavailable}
