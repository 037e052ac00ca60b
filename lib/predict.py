"""Ask a question-answering model on disk, compressed or not.

python -m lib.predict FOLDER --question "Who mined the ore?" --context "The ore was mined by Orla Venn."
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import qa
from lib.command_line import Parser
from lib.config import StudyError
from lib.data import QA_FEATURES
from lib.evaluation import predict
from lib.surgery import load_compressed


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, context: str,
           max_length: int = 384, stride: int = 128) -> str:  # fmt: skip
    """The span of ``context`` that answers ``question``; "" when the model finds none.

    Args:
        max_length, stride: tokens of a window and of the overlap of two; a long context is read in windows.

    Raises:
        StudyError: an empty question or context, or a model without start and end logits.
    """
    if not question.strip() or not context.strip():
        raise StudyError("predict: question and context must not be empty")
    none: dict[str, list] = {"text": [], "answer_start": []}
    row = {"id": "0", "title": "", "context": context, "question": question, "answers": none}
    dataset = Dataset.from_list([row], features=QA_FEATURES)
    max_length = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
    features = qa.features(dataset, tokenizer, max_length, min(stride, max_length // 3), training=False)
    features = features.add_column("length", [len(ids) for ids in features["input_ids"]])
    outputs = predict(model, tokenizer, features, bf16=False, title="predicting")
    if len(outputs) != 2:
        raise StudyError(f"predict: {type(model).__name__} has no start and end logits; give a model that answers")
    starts, ends = outputs
    answers, _ = qa.extract_answers(dataset, features, starts, ends, null_threshold=math.inf)
    return answers["0"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the answer: 0, or 2 after one line about a user's mistake."""
    parser = Parser(prog="python -m lib.predict", description="Ask a question-answering model on disk.")
    parser.add_argument("folder", type=Path, help="folder of a model saved by this study or by save_pretrained")
    parser.add_argument("--question", required=True)
    parser.add_argument("--context", required=True)
    try:
        options = parser.parse_args(arguments)
        model, tokenizer = load_compressed(options.folder)
        if tokenizer is None:
            raise StudyError(f"{options.folder} holds no tokenizer; save it beside the model")
        print(answer(model, tokenizer, options.question, options.context))
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
