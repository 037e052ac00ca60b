"""Ask a question-answering model on disk, compressed or not, in PyTorch or on an inference engine.

python -m lib.predict FOLDER --question "Who mined the ore?" --context "The ore was mined by Orla Venn."
python -m lib.predict FOLDER --engine openvino-int8 --question … --context …
"""

import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import corpus, qa
from lib.command_line import Parser, exit_code
from lib.config import StudyError
from lib.data import QA_FEATURES
from lib.engine_quality import OnEngine, calibration_batches
from lib.engines import ENGINES, Prepared, prepare
from lib.environment import usable_cpus
from lib.evaluation import predict
from lib.local_data import Rows, read_squad
from lib.specs import EngineQualitySpec
from lib.surgery import load_compressed

LOGITS = ("start_logits", "end_logits")
MAX_LENGTH, STRIDE = 384, 128
CALIBRATION = EngineQualitySpec.model_fields["calibration"].default  # examples, as for the study's scores


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, context: str,
           max_length: int = MAX_LENGTH, stride: int = STRIDE, engine: Prepared | None = None) -> str:  # fmt: skip
    """The best span of ``context``, whatever the model thinks of no answer; "" where a window has room for none.

    Args:
        max_length, stride: tokens of a window and of the overlap of two; a long context is read in windows.
        engine: what computes the logits, from ``on_engine``; PyTorch by default.

    Raises:
        StudyError: an empty question or context, or a model without start and end logits.
    """
    if not question.strip() or not context.strip():
        raise StudyError("predict: question and context must not be empty")
    none: dict[str, list] = {"text": [], "answer_start": []}
    row = {"id": "0", "title": "", "context": context, "question": question, "answers": none}
    dataset, features = _windows([row], model, tokenizer, max_length, stride)
    features = features.add_column("length", [len(ids) for ids in features["input_ids"]])
    runner = OnEngine(engine, LOGITS) if engine else model
    starts, ends = predict(runner, tokenizer, features, bf16=False, title="predicting")
    answers, _ = qa.extract_answers(dataset, features, starts, ends, null_threshold=math.inf)
    return answers["0"]


def on_engine(engine: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path,
              questions: Rows | None = None, threads: int | None = None) -> Prepared:  # fmt: skip
    """``model`` made ready on one of ``lib.engines.ENGINES``, once for any number of calls of ``answer``.

    Args:
        folder: where the engine's files are kept as long as it is used, and reused for the same model.
        questions: rows as in SQuAD, the first ``CALIBRATION`` of which an int8 engine that ranges activations
            beforehand sees; by default training questions of the embedded corpus.
        threads: all usable CPUs by default.

    Raises:
        StudyError: unknown or unavailable engine, or a model that it cannot run or that has no start and end logits.
    """
    rows = questions or corpus.world_qa()["train"]
    _, features = _windows(rows[:CALIBRATION], model, tokenizer, MAX_LENGTH, STRIDE)
    batches = calibration_batches(tokenizer, features, CALIBRATION)
    return prepare(engine, model, batches[0], threads or usable_cpus(), batches, Path(folder))


def _windows(rows: Rows, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int,
             stride: int) -> tuple[Dataset, Dataset]:  # fmt: skip
    """Questions as a data set, and as the windows that the model reads."""
    if "QuestionAnswering" not in type(model).__name__:
        raise StudyError(f"predict: {type(model).__name__} has no start and end logits; give a model that answers")
    dataset = Dataset.from_list(rows, features=QA_FEATURES)
    max_length = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
    return dataset, qa.features(dataset, tokenizer, max_length, min(stride, max_length // 3), training=False)


def _parser() -> Parser:
    parser = Parser(prog="python -m lib.predict", description="Ask a question-answering model on disk.")
    parser.add_argument("folder", type=Path, help="folder of a model saved by this study or by save_pretrained")
    parser.add_argument("--question", required=True)
    parser.add_argument("--context", required=True)
    default = "PyTorch in fp32, on the GPU where there is one"
    described = f"what computes the answer (default: {default}): {', '.join(ENGINES)}"
    parser.add_argument("--engine", choices=ENGINES, metavar="NAME", help=described)
    described = (
        f"SQuAD JSON whose first {CALIBRATION} questions give the int8 engines of OpenVINO and DeepSparse their "
        "activations' ranges; training data of the model's task are best (default: questions of the embedded corpus)"
    )
    parser.add_argument("--calibrate-on", type=Path, metavar="FILE", help=described)
    described = "keep the files that the engine needs here, and reuse them (default: make them in every call)"
    parser.add_argument("--engine-files", type=Path, metavar="FOLDER", help=described)
    return parser


def _main(arguments: Sequence[str] | None) -> None:
    options = _parser().parse_args(arguments)
    if not options.engine and (options.calibrate_on or options.engine_files):
        raise StudyError("--calibrate-on and --engine-files are for an engine; name it with --engine")
    model, tokenizer = load_compressed(options.folder)
    if tokenizer is None:
        raise StudyError(f"{options.folder} holds no tokenizer; save it beside the model")
    questions = read_squad(options.calibrate_on, unanswerable=True) if options.calibrate_on else None
    with tempfile.TemporaryDirectory(prefix="engine-") as made:
        folder = options.engine_files or made
        engine = on_engine(options.engine, model, tokenizer, folder, questions) if options.engine else None
        print(answer(model, tokenizer, options.question, options.context, engine=engine))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the answer; returns the exit code."""
    return exit_code(lambda: _main(arguments), "interrupted; no answer was found yet")


if __name__ == "__main__":
    sys.exit(main())
