"""``python -m lib.predict``: a model on disk answers, and mistakes are one line."""

import pytest

from lib import predict
from lib.config import StudyError
from lib.models import load_model
from lib.surgery import cut, save_compressed

CONTEXT = "The old mill of Varn was built by Orla Venn. " * 8


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A QA model whose layers have lost heads and units, saved."""
    model = load_model("tiny-bert", "qa").eval()
    cut(model, heads=[[0], [], [1, 2], [3]], units=[range(10), range(3), [], range(64)])
    return save_compressed(model, tokenizer, tmp_path / "model")


def test_the_answer_is_a_span_of_a_context_longer_than_a_window(folder, capsys):
    assert predict.main([str(folder), "--question", "Who built the mill?", "--context", CONTEXT]) == 0
    found = capsys.readouterr().out.strip()
    assert found and found in CONTEXT


def test_windows_do_not_change_a_short_contexts_answer(tokenizer):
    model = load_model("tiny-bert", "qa").eval()
    question, context = "Who built the mill?", "The old mill was built by Orla Venn."
    whole, windows = (predict.answer(model, tokenizer, question, context, *sizes) for sizes in ((384, 128), (48, 8)))
    assert whole == windows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "--question", " ", "--context", "a"], "question and context must not be empty"),
        (["{folder}", "--question", "a"], "required: --context; see python -m lib.predict --help"),
        (["no/such", "--question", "a", "--context", "b"], "no/such holds no model: config.json is missing"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, arguments, message):
    assert predict.main([argument.format(folder=folder) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and len(error.strip().splitlines()) == 1


def test_a_classifier_cannot_answer(tokenizer):
    with pytest.raises(StudyError, match="BertForSequenceClassification has no start and end logits"):
        predict.answer(load_model("tiny-bert", "classification").eval(), tokenizer, "Who?", CONTEXT)
