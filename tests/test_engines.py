import copy
import dataclasses
import errno
import os
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lib import engines
from lib.agreement import check_agreement, random_batch
from lib.config import StudyError
from lib.engines import ENGINES, available_engines, prepare, safetensors_bytes, unavailable_reason
from lib.int8 import quantize_dynamic
from lib.onnx_export import cached_export

VOCAB = 200
SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "vocab_size": VOCAB, "max_position_embeddings": 80, "initializer_range": 0.2}  # fmt: skip
CPU = [engine for engine in ENGINES if "cuda" not in engine]
BATCHES = [
    random_batch(2, 16, VOCAB, 1, padding=5),
    random_batch(1, 40, VOCAB, 2),
    random_batch(5, 7, VOCAB, 3, padding=3),
]


def bert(head=BertForQuestionAnswering, **shape):
    torch.manual_seed(0)
    return head(BertConfig(**{**SHAPE, **shape})).eval()


def narrower(linear, out_features, in_features):
    linear.weight = torch.nn.Parameter(linear.weight[:out_features, :in_features].clone())
    if linear.bias is not None:
        linear.bias = torch.nn.Parameter(linear.bias[:out_features].clone())
    linear.out_features, linear.in_features = out_features, in_features


def pruned():
    """A layer dropped, one head gone from the first layer (8 of 32 columns), 24 of 64 units kept in the second."""
    model = bert(num_hidden_layers=3)
    del model.bert.encoder.layer[1]
    first, second = model.bert.encoder.layer
    for linear in (first.attention.self.query, first.attention.self.key, first.attention.self.value):
        narrower(linear, 24, 32)
    narrower(first.attention.output.dense, 32, 24)
    narrower(second.intermediate.dense, 24, 32)
    narrower(second.output.dense, 32, 24)
    return model


def hollow():
    """No head left in the first layer, no unit in the second."""
    model = bert()
    first, second = model.bert.encoder.layer
    for linear in (first.attention.self.query, first.attention.self.key, first.attention.self.value):
        narrower(linear, 0, 32)
    narrower(first.attention.output.dense, 32, 0)
    narrower(second.intermediate.dense, 0, 32)
    narrower(second.output.dense, 32, 0)
    return model


def roberta():
    torch.manual_seed(0)
    config = RobertaConfig(**{**SHAPE, "type_vocab_size": 1, "num_labels": 3, "pad_token_id": 1})
    return RobertaForSequenceClassification(config).eval()


def distilbert():
    torch.manual_seed(0)
    config = DistilBertConfig(
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        vocab_size=VOCAB,
        max_position_embeddings=80,
        initializer_range=0.2,
    )
    return DistilBertForQuestionAnswering(config).eval()


MODELS = {
    "qa": bert,
    "pruned": pruned,
    "hollow": hollow,
    "classifier": lambda: bert(BertForSequenceClassification, num_labels=3),
    "roberta": roberta,
    "distilbert": distilbert,
}


def without_types(batch):
    return {name: values for name, values in batch.items() if name != "token_type_ids"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One export folder per model, shared by its engines."""
    return {name: tmp_path_factory.mktemp(name) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_every_engine_agrees_on_other_batches_and_lengths_than_the_example(name, folders):
    model = MODELS[name]()
    batches = [without_types(batch) for batch in BATCHES] if name in ("roberta", "distilbert") else BATCHES
    for engine in available_engines("cpu"):
        prepared = prepare(engine, model, batches[1], 1, batches, folders[name])
        result = check_agreement(prepared, model, batches)
        if prepared.precision == "fp32":
            assert result["max_abs_diff"] < 1e-4 and result["argmax_agreement"] == 1
        outputs = prepared.run(batches[2])
        assert [array.dtype for array in outputs] == [np.float32] * len(outputs)
        assert len(outputs) == (1 if name in ("classifier", "roberta") else 2)
        assert prepared.size_bytes > 0 and prepared.runs_on


def test_one_export_serves_both_engines_and_is_replaced_with_the_weights(tmp_path):
    model = bert()
    prepare("onnxruntime-fp32", model, BATCHES[0], 1, None, tmp_path)
    written = (tmp_path / "fp32.onnx").stat().st_mtime_ns
    prepare("openvino-fp32", model, BATCHES[0], 1, None, tmp_path)
    assert (tmp_path / "fp32.onnx").stat().st_mtime_ns == written
    with torch.no_grad():
        model.qa_outputs.bias += 1
    prepared = prepare("onnxruntime-fp32", model, BATCHES[0], 1, None, tmp_path)
    assert (tmp_path / "fp32.onnx").stat().st_mtime_ns != written
    check_agreement(prepared, model, BATCHES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32.onnx", "fp32.onnx.key"]


def test_int8_files_are_smaller_and_new_calibration_data_are_used(tmp_path):
    model = bert(hidden_size=64, intermediate_size=256, vocab_size=VOCAB)
    size = {
        engine: prepare(engine, model, BATCHES[0], 1, BATCHES, tmp_path).size_bytes
        for engine in ("onnxruntime-fp32", "onnxruntime-int8", "openvino-fp32", "openvino-int8")
    }
    assert size["onnxruntime-int8"] < 0.6 * size["onnxruntime-fp32"]
    assert size["openvino-int8"] < 0.6 * size["openvino-fp32"]
    key = (tmp_path / "int8-static.xml.key").read_text()
    prepare("openvino-int8", model, BATCHES[0], 1, BATCHES[:1], tmp_path)
    assert (tmp_path / "int8-static.xml.key").read_text() != key


def test_a_graph_without_weights_to_quantise_is_an_error_not_an_fp32_model(tmp_path):
    source = tmp_path / "empty.onnx"
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 2])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 2])
    node = onnx.helper.make_node("MatMul", ["x", "x"], ["y"])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [value], [result]),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=9,
    )
    onnx.save(model, source)
    with pytest.raises(StudyError, match="found no weights"):
        quantize_dynamic(source, tmp_path / "int8.onnx", False)


def test_prepared_model_does_not_follow_later_changes(tmp_path):
    model = bert()
    prepared = prepare("pytorch-fp32", model, BATCHES[0], 1, None, tmp_path)
    before = prepared.run(BATCHES[0])[0]
    with torch.no_grad():
        model.qa_outputs.bias += 1
    assert np.array_equal(prepared.run(BATCHES[0])[0], before)
    assert model.config._attn_implementation == bert().config._attn_implementation


def test_static_int8_without_calibration_data_is_an_error(tmp_path):
    nothing: list[dict[str, Any]] = []
    for calibration in (None, nothing):
        with pytest.raises(StudyError, match="openvino-int8: no calibration data"):
            prepare("openvino-int8", bert(), BATCHES[0], 1, calibration, tmp_path)
    with pytest.raises(StudyError, match="calibration batch 1 has no 'token_type_ids'"):
        prepare("openvino-int8", bert(), BATCHES[0], 1, [BATCHES[0], without_types(BATCHES[1])], tmp_path)


@pytest.mark.parametrize(
    ("engine", "threads", "example", "message"),
    [("deepsparse-int9", 1, BATCHES[0], "unknown; allowed: pytorch-fp32"),
     ("pytorch-fp32", 0, BATCHES[0], "threads: found 0"),
     ("pytorch-fp32", 1, {"text": 1}, "no 'input_ids'")],
)  # fmt: skip
def test_bad_requests_are_one_line(tmp_path, engine, threads, example, message):
    with pytest.raises(StudyError, match=message) as caught:
        prepare(engine, bert(), example, threads, None, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_input_is_named(tmp_path):
    prepared = prepare("pytorch-fp32", bert(), BATCHES[0], 1, None, tmp_path)
    with pytest.raises(StudyError, match="input 'token_type_ids' is missing"):
        prepared.run(without_types(BATCHES[0]))


def test_engines_that_cannot_run_say_why(monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "native_bf16", lambda device: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unavailable_reason("pytorch-cuda-fp16") == "not available: no CUDA device"
    assert str(unavailable_reason("openvino-bf16")).startswith("not available: this CPU has no bf16")
    assert "openvino-bf16" not in available_engines()
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert unavailable_reason("openvino-int8") == "not available: package onnxscript is not installed"
    with pytest.raises(StudyError, match="pytorch-bf16' is not available"):
        prepare("pytorch-bf16", bert(), BATCHES[0], 1, None, tmp_path)


def test_an_engine_that_fails_on_a_model_is_one_line(monkeypatch, tmp_path):
    def broken(job):
        raise RuntimeError("\x1b[96mCheck failed\x1b[0m at core.cpp:132:\nsecond line")

    entry = dataclasses.replace(engines._TABLE["pytorch-fp32"], prepare=broken)
    monkeypatch.setitem(engines._TABLE, "pytorch-fp32", entry)
    with pytest.raises(StudyError) as caught:
        prepare("pytorch-fp32", bert(), BATCHES[0], 1, None, tmp_path)
    expected = "pytorch-fp32 cannot prepare BertForQuestionAnswering: Check failed at core.cpp:132:; leave it out"
    assert str(caught.value) == expected


def test_failed_write_leaves_nothing_and_is_one_line(tmp_path):
    def full(file):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StudyError, match=r"cannot write .*No space left on device; free space"):
        cached_export(tmp_path / "exports", "fp32.onnx", "key", full)
    assert list((tmp_path / "exports").iterdir()) == []


@pytest.mark.parametrize("name", ["qa", "pruned", "roberta"])
def test_size_equals_the_file_that_safetensors_writes(tmp_path, name):
    model = MODELS[name]()
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), file, metadata={"format": "pt"})
    assert safetensors_bytes(model) == file.stat().st_size


def test_shared_weights_count_once():
    model = bert()
    tied = copy.deepcopy(model)
    tied.bert.embeddings.position_embeddings.weight = tied.bert.embeddings.word_embeddings.weight
    saved = safetensors_bytes(model) - safetensors_bytes(tied)
    assert saved == pytest.approx(4 * 80 * 32, abs=200)
