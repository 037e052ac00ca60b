"""How a translation run is carried out: vocabulary, model, compressor, training, search, BLEU.

BLEU is sacrebleu's on detokenised text (Post 2018), always searched in fp32, with beam and with greedy search.
"""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import safetensors.torch
from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lib import metrics, model_cost
from lib.batches import TrainingData
from lib.compressors import Compressor, make_compressor
from lib.compressors.base import Diverged
from lib.config import StudyError
from lib.data import get_task, load_task
from lib.labels import label
from lib.models import count_parameters
from lib.problems import first_line
from lib.quantized_layers import is_quantized
from lib.quantized_storage import DESCRIPTION as GRIDS
from lib.quantized_storage import load_quantized, save_quantized
from lib.records import checkpoints_folder
from lib.runs import ensure_weights, leave_behind
from lib.search import translate
from lib.settings import Profile
from lib.specs import TranslationSpec
from lib.training import device, fine_tune, use_bf16
from lib.translation import (
    TranslationConfig,
    TranslationModel,
    collate_pairs,
    encode_pairs,
    new_model,
    train_vocabulary,
)

WEIGHTS = "model.safetensors"
EXAMPLES = 3  # translations kept in a record


def run_translation(spec: TranslationSpec, profile: Profile, keep_weights: bool = False) -> dict[str, Any]:
    """Train, compress, translate, score. Dense models and ``keep_weights`` leave their weights behind.

    A compressor that watches for it may diverge: the result then says where, its score is 0, and nothing else follows.
    """
    data, settings = _data(spec, profile), spec.training
    model, tokenizer = _initial(spec, profile, data)
    compressor = make_compressor(spec.compressor) if spec.compressor else Compressor(None)
    compressor.attach(model)
    compressor.use_data(_training_data(spec, data, tokenizer))
    result: dict[str, Any] = {"train_examples": len(data["train"]), "eval_examples": len(data["test"])}
    if settings.epochs:
        try:
            outcome = fine_tune(
                model, tokenizer, encode_pairs(data["train"], tokenizer, settings.max_length), settings, spec.seed,
                checkpoints_folder(profile, spec), compressor, None, label(spec), profile.training.checkpoint_minutes,
                collate_pairs,
            )  # fmt: skip
        except Diverged:
            if not compressor.divergence:
                raise
            leave_behind(profile, spec)
            return result | {"score": 0.0, "diverged": compressor.divergence}
        result["training"] = outcome.model_dump(mode="json")
    trained: Any = compressor.finalize(model)
    result |= evaluate_translation(spec, trained, tokenizer, data)
    result["model"] = describe_translation(trained)
    result["compression"] = compressor.summary()
    kept = keep_weights or spec.compressor is None
    leave_behind(profile, spec, partial(save_translation, trained, tokenizer) if kept else None)
    return result


def _training_data(spec: TranslationSpec, data: DatasetDict, tokenizer: PreTrainedTokenizerFast) -> TrainingData:
    """The training pairs for compressors that calibrate on them."""
    return TrainingData(
        lambda: encode_pairs(data["train"], tokenizer, spec.training.max_length), collate_pairs,
        tokenizer.model_input_names, spec.seed, device(), use_bf16(spec.training.precision),
    )  # fmt: skip


def finished_translation(profile: Profile, spec: TranslationSpec) -> tuple[TranslationModel, PreTrainedTokenizerFast]:
    """The model that a run ended with; trained again when its weights have not travelled with its record."""
    return load_translation(ensure_weights(profile, spec, lambda: run_translation(spec, profile, keep_weights=True)))


def evaluate_translation(spec: TranslationSpec, model: TranslationModel, tokenizer: PreTrainedTokenizerFast,
                         data: DatasetDict) -> dict[str, Any]:  # fmt: skip
    """BLEU in percent on the test split by beam search (``score``) and greedily.

    Of invented tasks, whose sentences belong to nobody, the first translations are kept.
    """

    def searched(beams: int) -> list[str]:
        title = f"{label(spec)}, translating ({'greedy' if beams == 1 else f'{beams} beams'})"
        source = data["test"]["source"]
        return translate(model, tokenizer, source, beams, spec.training.max_length, spec.length_penalty, title)

    def bleu(found: list[str]) -> float:
        return metrics.score(spec.task, found, data["test"]["target"])["bleu"]

    best = searched(spec.beams)
    result = {
        "score": bleu(best), "greedy": bleu(searched(1)), "signature": metrics.signature(),
    }  # fmt: skip
    if get_task(spec.task).embedded:
        rows = data["test"].select(range(min(EXAMPLES, len(best))))
        result["examples"] = [{**row, "found": found} for row, found in zip(rows, best, strict=False)]
    return result


def describe_translation(model: TranslationModel) -> dict[str, int]:
    """Size of a model: layers of encoder and decoder, parameters in all and outside the embedding table, bytes."""
    parameters = count_parameters(model)
    return {
        "layers": len(model.encoder_layers) + len(model.decoder_layers),
        "parameters": parameters,
        "layer_parameters": parameters - count_parameters(model.embedding),
        "size_bytes": model_cost.size_on_disk(model),
    }


def save_translation(model: TranslationModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write vocabulary, config and weights so that ``load_translation`` gives back the same model.

    A quantised model is stored as integers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.config.save_pretrained(folder)
    if is_quantized(model):
        save_quantized(model, folder / WEIGHTS)
    else:
        (folder / GRIDS).unlink(missing_ok=True)
        safetensors.torch.save_model(model, str(folder / WEIGHTS))


def load_translation(folder: Path) -> tuple[TranslationModel, PreTrainedTokenizerFast]:
    """What ``save_translation`` wrote, in eval mode.

    Raises:
        StudyError: not such a folder, or a damaged one.
    """
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        model = TranslationModel(TranslationConfig.from_pretrained(folder))
        if (folder / GRIDS).is_file():
            load_quantized(model, folder / WEIGHTS)
        else:
            safetensors.torch.load_model(model, str(folder / WEIGHTS))
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        reason = first_line(error)
        raise StudyError(f"translation model {folder} cannot be loaded ({reason}); remove it to train again") from None
    return model.eval(), tokenizer


def _data(spec: TranslationSpec, profile: Profile) -> DatasetDict:
    if get_task(spec.task).kind != "translation":
        raise StudyError(f"task '{spec.task}' is no translation; give multi30k, wmt14 or world_translation")
    settings = spec.training
    return _load(spec.task, spec.data, profile.data_dir, settings.train_examples, settings.eval_examples)


@lru_cache(maxsize=2)
def _load(task: str, source: str, data_dir: Path | None, train: int | None, evaluation: int | None) -> DatasetDict:
    return load_task(task, source, data_dir, train, evaluation)


def _initial(spec: TranslationSpec, profile: Profile,
             data: DatasetDict) -> tuple[TranslationModel, PreTrainedTokenizerFast]:  # fmt: skip
    settings = spec.training
    if spec.start is not None:
        model, tokenizer = finished_translation(profile, spec.start)
        model.set_dropout(settings.dropout)
        model.config.label_smoothing = spec.label_smoothing
        return model, tokenizer
    tokenizer = train_vocabulary(data["train"], spec.shape.vocabulary)
    return new_model(spec.shape, len(tokenizer), settings.dropout, spec.label_smoothing, spec.seed), tokenizer
