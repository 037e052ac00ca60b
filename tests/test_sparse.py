"""What a sparse model is worth on disk and on engines: storage read back, simulated INT8, CSR, DeepSparse's process."""

import copy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import padded_batch
from torch import nn

from lib import deepsparse, deepsparse_graph, engines
from lib.agreement import check_agreement, random_batch
from lib.compressors import SparseInt8
from lib.compressors.masked import encoder_linears
from lib.config import StudyError
from lib.int8_linear import AVERAGING, Int8Linear, round_to_int8
from lib.models import random_model
from lib.onnx_export import export_onnx
from lib.sparse_layers import SparseLinear, make_sparse, zero_at_random
from lib.sparse_storage import HEADER, MAGIC, encode_bitmask, encode_csr, int8_scale, storage
from lib.surgery import cut, save_compressed


def sparse_matrix(rows: int, columns: int, sparsity: float, group: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns + group)
    weight = torch.randn(rows, columns, generator=generator)
    alive = torch.rand(rows, columns // group, generator=generator) >= sparsity
    return weight * alive.repeat_interleave(group, 1)


def on_int8_grid(weight: torch.Tensor) -> bool:
    """Whether every value is a whole multiple of its row's scale, to float32's rounding."""
    steps = weight.detach() / int8_scale(weight)
    return bool((steps - steps.round()).abs().max() < 1e-3)


def decode_bitmask(data: bytes) -> torch.Tensor:
    """The matrix that ``encode_bitmask`` wrote, fp32."""
    magic, group, width, rows, columns = HEADER.unpack_from(data)
    assert magic == MAGIC
    at, runs = HEADER.size, rows * columns // group
    scales = np.frombuffer(data, np.float32, rows if width == 1 else 0, at)
    at += scales.nbytes
    bits = np.frombuffer(data, np.uint8, -(-runs // 8), at)
    dense = np.zeros((runs, group), np.float32)
    kept = np.frombuffer(data, np.int8 if width == 1 else np.float32, offset=at + len(bits))
    dense[np.unpackbits(bits, count=runs).astype(bool)] = kept.reshape(-1, group)
    dense = dense.reshape(rows, columns) * (scales[:, None] if width == 1 else 1)
    return torch.from_numpy(dense)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("int8", [False, True])
def test_bitmask_is_read_back_to_the_bit_and_takes_the_bytes_it_should(group, sparsity, int8):
    weight = sparse_matrix(12, 20, sparsity, group)
    if int8:
        weight = round_to_int8(weight)
    data = encode_bitmask(weight, group, int8)
    torch.testing.assert_close(decode_bitmask(data), weight, rtol=1e-6 if int8 else 0, atol=0)
    alive = int((weight.view(-1, group) != 0).any(1).sum())
    header = 17
    assert len(data) == header + (48 if int8 else 0) + -(-240 // group // 8) + alive * group * (1 if int8 else 4)


def test_csr_takes_the_bytes_it_should():
    weight = sparse_matrix(12, 20, 0.9)
    alive = int((weight != 0).sum())
    assert len(encode_csr(weight)) == 17 + 4 * 13 + alive * (2 + 4)
    assert len(encode_csr(round_to_int8(weight), int8=True)) == 17 + 48 + 4 * 13 + alive * (2 + 1)
    with pytest.raises(StudyError, match="70000 columns, 16 bits number at most 65536"):
        encode_csr(torch.zeros(1, 70000))


def test_uneven_input_is_one_line():
    with pytest.raises(StudyError, match="groups of 4 do not divide rows of 6"):
        encode_bitmask(torch.ones(2, 6), 4)


def test_storage_of_a_model_falls_with_its_sparsity_and_precision(tiny_bert):
    linears, whole = encoder_linears(tiny_bert), sum(p.numel() for p in tiny_bert.parameters())
    inside = sum(linear.weight.numel() for linear in linears)
    dense = storage(tiny_bert, linears)
    assert 4 * whole < dense["dense"] < 4 * whole + 20_000  # the header of safetensors
    zero_at_random(tiny_bert, 0.9)
    sparse = storage(tiny_bert, linears)
    assert sparse["dense"] == dense["dense"] and sparse["gzip"] < dense["gzip"]
    saved = dense["dense"] - sparse["bitmask"]
    assert saved == pytest.approx(4 * inside * 0.9 - inside / 8, rel=0.02)
    for linear in linears:
        linear.weight.data = round_to_int8(linear.weight)
    small = storage(tiny_bert, linears, int8=linears)
    assert small["bitmask"] < sparse["bitmask"]
    assert small["dense"] == pytest.approx(dense["dense"] - 3 * inside, rel=0.01)


def test_rounding_keeps_zeros_and_the_largest_value_and_is_idempotent():
    weight = sparse_matrix(6, 8, 0.5)
    rounded = round_to_int8(weight)
    assert bool((rounded[weight == 0] == 0).all())
    assert float((rounded - weight).abs().max()) <= float(int8_scale(weight).max()) / 2 * (1 + 1e-6)
    torch.testing.assert_close(rounded.abs().amax(1), weight.abs().amax(1))
    torch.testing.assert_close(round_to_int8(rounded), rounded)
    assert on_int8_grid(rounded) and not on_int8_grid(weight)
    assert torch.equal(round_to_int8(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_int8_linear_computes_with_rounded_input_and_weight():
    torch.manual_seed(0)
    plain = nn.Linear(8, 4)
    simulated = Int8Linear(plain)
    states = torch.randn(3, 5, 8)
    simulated.train()
    trained = simulated(states)
    assert float(simulated.low) == float(states.min()) and float(simulated.high) == float(states.max())
    simulated.eval()
    scale = (states.max() - states.min()) / 255
    zero = (-states.min() / scale).round()
    rounded = ((states / scale + zero).round().clamp(0, 255) - zero) * scale
    expected = rounded @ round_to_int8(plain.weight).T + plain.bias
    torch.testing.assert_close(simulated(states), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-5)
    assert 0 < float((expected - plain(states)).detach().abs().max()) < 0.1


def test_ranges_are_a_running_average_and_rest_in_eval_mode():
    simulated = Int8Linear(nn.Linear(2, 2)).train()
    for high in (1.0, 3.0):
        simulated(torch.tensor([[0.5, high]]))
    assert float(simulated.high) == pytest.approx(AVERAGING * 1 + (1 - AVERAGING) * 3) and float(simulated.low) == 0
    before = float(simulated.high)
    simulated.eval()(torch.tensor([[9.0, 9.0]]))
    assert float(simulated.high) == before


def test_gradients_pass_inside_the_range_and_stop_outside():
    simulated = Int8Linear(nn.Linear(2, 1, bias=False)).train()
    simulated(torch.tensor([[0.0, 1.0]]))
    simulated.eval()
    states = torch.tensor([[0.5, 7.0]], requires_grad=True)
    simulated(states).sum().backward()
    assert states.grad is not None and float(states.grad[0, 1]) == 0 and float(states.grad[0, 0]) != 0
    assert bool((simulated.weight.grad[0] != 0).all())


def test_compound_model_ends_on_the_grid_with_its_zeros_and_is_not_saved(tiny_bert, tokenizer, tmp_path):
    zero_at_random(tiny_bert, 0.75, 4)
    zeros = [linear.weight == 0 for linear in encoder_linears(tiny_bert)]
    before = tiny_bert.eval()(**padded_batch("bert")).start_logits.detach()
    compressor = SparseInt8(None)
    compressor.attach(tiny_bert)
    tiny_bert.train()(**padded_batch("bert"))
    compressor.step(0.5, None)
    model = compressor.finalize(tiny_bert).eval()
    linears = encoder_linears(model)
    assert all(isinstance(linear, Int8Linear) and on_int8_grid(linear.weight) for linear in linears)
    assert all(bool((linear.weight[zero] == 0).all()) for linear, zero in zip(linears, zeros, strict=True))
    assert on_int8_grid(model.get_input_embeddings().weight)
    after = model(**padded_batch("bert")).start_logits
    assert 0 < float((after - before).detach().abs().max()) < 0.5 * float(before.detach().abs().max())
    summary = compressor.summary()
    assert summary["bits"] == 8 and summary["storage"]["bitmask"] < summary["storage"]["dense"] < 4 * 30522 * 32
    with pytest.raises(StudyError, match="simulated INT8 is not saved"):
        save_compressed(model, tokenizer, tmp_path / "model")


@pytest.mark.parametrize("group", [1, 4])
def test_random_masks_have_the_asked_for_share(group):
    model = random_model("tiny")
    zero_at_random(model, 0.9, group)
    for linear in encoder_linears(model):
        runs = (linear.weight == 0).view(-1, group)
        assert bool((runs.any(1) == runs.all(1)).all())
        assert int(runs.all(1).sum()) == round(0.9 * len(runs))
    with pytest.raises(StudyError, match="groups of 5 do not divide rows of 32"):
        zero_at_random(model, 0.5, 5)


@pytest.mark.parametrize("layout", ["csr", "tiles"])
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0])
def test_sparse_layers_compute_the_same_in_less_space(layout, sparsity):
    torch.manual_seed(0)
    linear = nn.Linear(16, 8)
    linear.weight.data = sparse_matrix(8, 16, sparsity)
    made = SparseLinear(linear, layout)
    for states in (torch.randn(5, 16), torch.randn(2, 3, 16)):
        torch.testing.assert_close(made(states), linear(states), rtol=1e-4, atol=1e-5)
    if layout == "csr":
        assert made.nbytes == int((linear.weight != 0).sum()) * (4 + 8) + 8 * 9 + 4 * 8


def test_tiles_need_rows_and_columns_of_four():
    with pytest.raises(StudyError, match="tiles of 4×4 do not divide a matrix of \\(6, 8\\)"):
        SparseLinear(nn.Linear(8, 6), "tiles")


@pytest.mark.parametrize("engine", ["pytorch-csr-fp32", "pytorch-tiles-fp32", "openvino-sparse-int8"])
def test_sparse_engines_agree_with_pytorch(engine, tmp_path):
    if engines.unavailable_reason(engine):
        pytest.skip(engines.unavailable_reason(engine))
    model = random_model("tiny")
    zero_at_random(model, 0.9, 4)
    dense, batches = copy.deepcopy(model), [random_batch(2, 16, 1000, 1, padding=8), random_batch(3, 9, 1000, 2)]
    prepared = engines.prepare(engine, model, batches[0], 1, batches, tmp_path)
    assert check_agreement(prepared, dense, batches)["cosine"] > 0.95
    if engine != "openvino-sparse-int8":
        plain = engines.prepare("pytorch-fp32", model, batches[0], 1, batches, tmp_path)
        assert prepared.size_bytes < plain.size_bytes
        assert not [module for module in model.modules() if isinstance(module, SparseLinear)]  # the model is untouched


def test_make_sparse_replaces_every_encoder_map_and_nothing_else():
    model = random_model("tiny")
    make_sparse(model, "csr")
    assert len([module for module in model.modules() if isinstance(module, SparseLinear)]) == 4 * 6
    assert isinstance(model.qa_outputs, nn.Linear)


def test_maps_that_cannot_be_stored_sparse_stay_dense_and_right(tiny_bert):
    """One layer has lost all of its FFN units, another has a number of them that tiles do not divide."""
    cut(tiny_bert, units=[[], range(6), range(8), range(64)])
    batch = padded_batch("bert")
    expected = tiny_bert(**batch).start_logits.detach()
    for layout, sparse in (("csr", 4 * 4 + 2 * 3), ("tiles", 4 * 4 + 2 * 2)):
        model = copy.deepcopy(tiny_bert).requires_grad_(False)
        make_sparse(model, layout)
        assert sum(isinstance(module, SparseLinear) for module in model.modules()) == sparse
        torch.testing.assert_close(model(**batch).start_logits, expected, rtol=1e-4, atol=1e-5)


def test_openvino_says_when_its_sparse_weights_would_do_nothing(monkeypatch):
    monkeypatch.setattr(engines, "isa_flags", lambda: ("avx512f",))
    assert "need AMX INT8" in str(engines.unavailable_reason("openvino-sparse-int8"))


def test_absent_deepsparse_is_a_reason_and_no_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(deepsparse, "FOLDER", tmp_path / "none")
    for engine in ("deepsparse-fp32", "deepsparse-int8"):
        assert str(engines.unavailable_reason(engine)).startswith("not available: DeepSparse")
    with pytest.raises(StudyError, match="--with-deepsparse"):
        engines.prepare("deepsparse-fp32", random_model("tiny"), random_batch(1, 8, 99), 1, None, tmp_path)


FAKE = '''
"""Stands in for DeepSparse: says what it was asked for."""
import numpy as np
__version__ = "0.0"
class Engine:
    def __init__(self, model, batch_size, num_cores, input_shapes):
        print("a banner on standard output")
        if batch_size == 7:
            raise RuntimeError("NM: no batches of 7\\nmore")
        if batch_size == 9:
            import os
            os._exit(3)
        self.shape, self.cores = input_shapes, num_cores
    def run(self, inputs):
        assert [list(array.shape) for array in inputs] == self.shape
        return [inputs[0].astype(np.float64) * 2, np.full((1, 2, 3), self.cores)]
'''


@pytest.fixture
def worker(monkeypatch, tmp_path) -> Any:
    """DeepSparse's process with a stand-in for the package."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "deepsparse.py").write_text(FAKE, encoding="utf-8")
    python = tmp_path / "environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    script = f'#!/bin/sh\nshift\nPYTHONSAFEPATH=1 PYTHONPATH="{tmp_path / "site"}" exec "{sys.executable}" "$@"\n'
    python.write_text(script, encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(deepsparse, "FOLDER", tmp_path / "environment")
    return deepsparse.Worker(Path("model.onnx"), 2, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="DeepSparse runs on Linux only")
def test_deepsparse_answers_every_shape_and_reports_what_went_wrong(worker):
    assert worker.version == "0.0"
    for shape in ((2, 3), (1, 5), (2, 3)):
        ids = np.arange(np.prod(shape)).reshape(shape)
        outputs = worker.run({"input_ids": ids, "attention_mask": np.ones(shape)})
        assert outputs[0].dtype == np.float32 and np.array_equal(outputs[0], 2 * ids)
        assert outputs[1].shape == (1, 2, 3) and outputs[1][0, 0, 0] == 2
    seven = {"input_ids": np.ones((7, 2)), "attention_mask": np.ones((7, 2))}
    with pytest.raises(StudyError, match="deepsparse: RuntimeError: NM: no batches of 7"):
        worker.run(seven)
    assert worker.run({"input_ids": np.ones((1, 2)), "attention_mask": np.ones((1, 2))})[0].shape == (1, 2)
    with pytest.raises(StudyError, match=r"its process ended .*; leave this engine out"):
        worker.run({"input_ids": np.ones((9, 2)), "attention_mask": np.ones((9, 2))})


@pytest.mark.skipif(sys.platform != "linux", reason="DeepSparse runs on Linux only")
def test_deepsparse_process_ends_with_its_model(worker):
    process = worker._process
    assert process.poll() is None
    worker._end()
    assert process.poll() is not None


def exported(tmp_path, model=None):
    """An export as it comes, and as DeepSparse reads it; both loaded, with their files."""
    onnx = pytest.importorskip("onnx")
    new, old = tmp_path / "new.onnx", tmp_path / "old.onnx"
    export_onnx(model or random_model("tiny"), ("input_ids", "attention_mask"), new)
    graph = onnx.load(new)
    graph.ir_version = 10
    onnx.save(graph, new)
    deepsparse_graph.readable(new, old)
    written = onnx.load(old)
    onnx.checker.check_model(written)
    assert written.ir_version == deepsparse_graph.IR_VERSION < 10
    return graph.graph, written.graph, (new, old)


def kinds(graph):
    return Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize("head", ["qa", "classification"])
def test_graphs_are_written_as_deepsparse_reads_them_and_compute_the_same(tmp_path, head):
    runtime = pytest.importorskip("onnxruntime")
    new, old, files = exported(tmp_path, random_model("tiny", head))
    before, after = kinds(new), kinds(old)
    assert before["LayerNormalization"] == 9  # after the embeddings, and two in each of four layers
    assert after["ReduceMean"] - before["ReduceMean"] == 18
    for kind in ("LayerNormalization", "Where", "GatherND", "Range", "Split", "Squeeze"):
        assert kind not in after, kind
    assert all(a.i >= 0 for node in old.node if node.op_type == "Gather" for a in node.attribute)  # -1 is not compiled
    makers = {node.output[0]: node for node in old.node}
    for node in (node for node in old.node if node.op_type == "Erf"):
        plus_one = next(other for other in old.node if node.output[0] in other.input)
        product = next(other for other in old.node if plus_one.output[0] in other.input)
        assert makers[product.input[0]].op_type == "Add" and product.input[1] == plus_one.output[0]  # x · (1 + erf)
    batch = {name: random_batch(3, 12, 99, 1, padding=4)[name] for name in ("input_ids", "attention_mask")}
    sessions = [runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"]) for file in files]
    wanted, found = (session.run(None, batch) for session in sessions)
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5)


def test_a_graph_that_looks_otherwise_is_left_as_it_is(tmp_path):
    onnx = pytest.importorskip("onnx")
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        make("Erf", ["x"], ["e"]), make("Add", ["e", "third"], ["a"]), make("Mul", ["third", "a"], ["m"]),
        make("Mul", ["m", "x"], ["g"]), make("Split", ["g"], ["left", "right"], axis=1),
        make("Squeeze", ["left", "second"], ["l"]), make("Squeeze", ["right", "second"], ["r"]),
        make("Add", ["l", "r"], ["sum"]), make("Cast", ["x"], ["truth"], to=9),
        make("Where", ["truth", "third", "sum"], ["y"]),
    ]  # fmt: skip
    constants = {"third": np.float32(0.3), "second": np.array([1])}
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    ends = [value("x", 1, [2, 2])], [value("y", 1, [2])]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "other", *ends, tensors), ir_version=9)
    onnx.save(model, tmp_path / "other.onnx")
    deepsparse_graph.readable(tmp_path / "other.onnx", tmp_path / "same.onnx")
    assert list(onnx.load(tmp_path / "same.onnx").graph.node) == nodes
