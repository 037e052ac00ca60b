"""``python -m lib.predict``: a model on disk answers, on any engine, and mistakes are one line."""

import json
import re

import pytest

from lib import corpus, predict
from lib.config import ROOT, StudyError
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


def test_an_engine_gives_pytorchs_answer_and_keeps_its_files_where_asked(folder, tmp_path, capsys):
    row = corpus.world_qa()["validation"][0]
    command = [str(folder), "--question", row["question"], "--context", row["context"]]
    answers = []
    for options in ([], ["--engine", "onnxruntime-fp32", "--engine-files", str(tmp_path / "files")]):
        assert predict.main([*command, *options]) == 0
        answers.append(capsys.readouterr().out.strip())
    assert answers[0] == answers[1] and answers[0] in row["context"]
    assert (tmp_path / "files" / "fp32.onnx").is_file()


def test_the_answer_comes_from_the_engine(tokenizer, tmp_path):
    rows = corpus.world_qa()["validation"][:8]
    asked, prepared = (load_model("tiny-bert", "qa", seed=seed).eval() for seed in (0, 1))
    engine = predict.on_engine("pytorch-fp32", prepared, tokenizer, tmp_path, threads=1)
    own, others, through = (
        [predict.answer(model, tokenizer, row["question"], row["context"], engine=used) for row in rows]
        for model, used in ((asked, None), (prepared, None), (asked, engine))
    )
    assert through == others != own


def test_an_int8_engine_is_calibrated_on_the_corpus_or_on_a_file(folder, tmp_path, capsys):
    answer = {"text": "Orla Venn", "answer_start": CONTEXT.index("Orla")}
    question = {"id": "1", "question": "Who built the mill?", "answers": [answer]}
    squad = tmp_path / "squad.json"
    squad.write_text(json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": [question]}]}]}))
    command = [str(folder), "--question", "Who built the mill?", "--context", CONTEXT, "--engine", "openvino-int8"]
    ranges = []
    for options in ([], ["--calibrate-on", str(squad)]):
        assert predict.main([*command, *options, "--engine-files", str(tmp_path / "files")]) == 0
        assert capsys.readouterr().out.strip() in CONTEXT
        ranges.append((tmp_path / "files" / "int8-static.xml.key").read_text())
    assert ranges[0] != ranges[1]


def test_the_snippet_of_the_docs_runs_as_printed(folder, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(
        r"```py\n(.*?)```", (ROOT / "docs" / "own_model_and_data.md").read_text(encoding="utf-8"), re.S
    )
    monkeypatch.chdir(tmp_path)
    code = code.replace("results/study/recipes/NAME", str(folder)).replace("openvino-int8", "pytorch-fp32")
    exec(compile(code, "own_model_and_data.md", "exec"), {})
    assert capsys.readouterr().out.strip() in "The ore was mined by Orla Venn."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "--question", " ", "--context", "a"], "question and context must not be empty"),
        (["{folder}", "--question", "a"], "required: --context; see python -m lib.predict --help"),
        (
            ["{folder}", "--question", "a", "--context", "b", "--engine", "abacus"],
            "argument --engine: invalid choice: 'abacus' (choose from",
        ),
        (["{folder}", "--question", "a", "--context", "b", "--calibrate-on", "c"], "name it with --engine"),
        (
            ["{folder}", "--question", "a", "--context", "b", "--engine", "openvino-int8", "--calibrate-on", "no.json"],
            "no.json",
        ),
        (["no/such", "--question", "a", "--context", "b"], "no/such holds no model: config.json is missing"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, arguments, message):
    assert predict.main([argument.format(folder=folder) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and len(error.strip().splitlines()) == 1


def test_ctrl_c_is_one_line(folder, monkeypatch, capsys):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "answer", stop)
    assert predict.main([str(folder), "--question", "a", "--context", "b"]) == 130
    assert capsys.readouterr().err == "interrupted; no answer was found yet\n"


def test_a_classifier_cannot_answer(tokenizer):
    with pytest.raises(StudyError, match="BertForSequenceClassification has no start and end logits"):
        predict.answer(load_model("tiny-bert", "classification").eval(), tokenizer, "Who?", CONTEXT)


def test_an_engine_that_cannot_run_here_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = [str(folder), "--question", "a", "--context", "b", "--engine", "openvino-fp32"]
    assert predict.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: engine 'openvino-fp32' is not available: package onnxscript is not installed")
    assert len(error.strip().splitlines()) == 1
