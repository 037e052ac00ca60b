import dataclasses

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

from lib import benchmark
from lib.agreement import check_agreement, random_batch
from lib.benchmark import latency, main
from lib.config import StudyError
from lib.engines import Prepared, prepare
from lib.model_cost import flops, size_on_disk

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "vocab_size": 100, "max_position_embeddings": 64, "initializer_range": 0.2}  # fmt: skip
BATCHES = [random_batch(2, 16, 100, 1, padding=5), random_batch(3, 9, 100, 2)]


def bert(head=BertForQuestionAnswering, **shape):
    torch.manual_seed(0)
    return head(BertConfig(**{**SHAPE, **shape})).eval()


class Machine:
    """A clock that only the candidates move, and a log of who ran."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def candidate(self, name, *milliseconds):
        """Takes the given times in turn, over and over; every second call of a turn is the timed one."""
        count = [0]

        def call(batch):
            self.calls.append(name)
            self.now += milliseconds[count[0] % len(milliseconds)] / 1e3
            count[0] += 1

        return call

    def measure(self, candidates, **settings):
        defaults = {"batch": 4, "length": 8, "threads": 1, "vocab_size": 50, "rounds": 3, "warmup": 0, "min_seconds": 0}
        return latency(candidates, **{**defaults, **settings}, clock=lambda: self.now)


def test_row_contract_and_ratios_within_the_same_round():
    machine = Machine()
    # Settling calls cost 99 ms and must not count; the machine is twice as slow in round 2.
    dense = machine.candidate("dense", 99, 10, 99, 20, 99, 12)
    small = machine.candidate("small", 99, 5, 99, 10, 99, 3)
    rows = machine.measure({"dense": dense, "small": small})
    assert [row["name"] for row in rows] == ["dense", "small"]
    row = rows[1]
    conditions = {"name", "engine", "precision", "runs_on", "batch", "length", "threads", "n", "dense"}
    measured = {"median_ms", "q1_ms", "q3_ms", "throughput_per_s", "ratio_to_dense", "ratio_q1", "ratio_q3"}
    assert set(row) == conditions | measured
    assert row["median_ms"] == pytest.approx(5) and (row["q1_ms"], row["q3_ms"]) == pytest.approx((4, 7.5))
    assert row["ratio_to_dense"] == pytest.approx(2) and (row["ratio_q1"], row["ratio_q3"]) == pytest.approx((2, 3))
    assert row["throughput_per_s"] == pytest.approx(4 / 0.005) and row["n"] == 3 and row["dense"] == "dense"
    assert rows[0]["ratio_to_dense"] == rows[0]["ratio_q1"] == 1


def test_rounds_interleave_all_candidates_in_a_seeded_order():
    def order(seed):
        machine = Machine()
        candidates = {name: machine.candidate(name, 1) for name in "abcd"}
        machine.measure(candidates, rounds=6, warmup=2, seed=seed)
        assert machine.calls[:8] == list("aabbccdd")
        turns = machine.calls[8:]
        assert turns[::2] == turns[1::2]
        return [turns[i : i + 8 : 2] for i in range(0, len(turns), 8)]

    rounds = order(seed=1)
    assert len(rounds) == 6 and all(sorted(turn) == list("abcd") for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1
    assert order(seed=1) == rounds != order(seed=2)


def test_a_turn_repeats_until_its_time_is_spent_and_takes_the_median():
    machine = Machine()
    rows = machine.measure({"a": machine.candidate("a", 50, 2, 4, 30)}, rounds=1, min_seconds=0.03)
    assert machine.calls == ["a"] * 4
    assert rows[0]["median_ms"] == pytest.approx(4)


def test_calls_that_last_are_timed_at_once_and_short_ones_are_woken_first():
    machine = Machine()
    candidates = {"long": machine.candidate("long", 2000), "short": machine.candidate("short", 900)}
    machine.measure(candidates, rounds=4, warmup=2)
    assert machine.calls.count("long") == 1 + 4 and machine.calls.count("short") == 2 + 2 * 4


def test_every_name_may_have_its_own_dense():
    machine = Machine()
    candidates = {"a": machine.candidate("a", 8), "b": machine.candidate("b", 6), "b2": machine.candidate("b2", 2)}
    rows = machine.measure(candidates, dense={"b2": "b"})
    assert [row["ratio_to_dense"] for row in rows] == pytest.approx([1, 1, 3])
    assert machine.measure(candidates, dense="b")[0]["ratio_to_dense"] == pytest.approx(0.75)


def test_impossible_conditions_are_errors():
    machine = Machine()
    candidates = {"a": machine.candidate("a", 1)}
    for name in ("batch", "length", "threads", "rounds"):
        with pytest.raises(StudyError, match=f"{name}: found 0"):
            machine.measure(candidates, **{name: 0})
    with pytest.raises(StudyError, match="'z' is not among the candidates a"):
        machine.measure(candidates, dense="z")
    engine = Prepared("pytorch-fp32", "fp32", 1, 0, "", ("input_ids",), lambda batch: [])
    with pytest.raises(StudyError, match="prepared for 1 threads, not for 2"):
        machine.measure({"e": engine}, threads=2)


def test_thread_count_and_garbage_collection_are_put_back():
    import gc

    before = torch.get_num_threads()
    machine = Machine()
    machine.measure({"a": machine.candidate("a", 1)}, threads=before + 1)
    assert torch.get_num_threads() == before and gc.isenabled()


def perturbed(prepared, change):
    return dataclasses.replace(prepared, _run=lambda batch: change(prepared._run(batch)))


def test_agreement_fails_for_a_perturbed_model_and_names_engine_and_difference(tmp_path):
    model = bert()
    prepared = prepare("pytorch-fp32", model, BATCHES[0], 1, None, tmp_path)
    assert check_agreement(prepared, model, BATCHES)["argmax_agreement"] == 1
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, 0] += 0.1 * torch.arange(32)
    with pytest.raises(StudyError, match=r"pytorch-fp32: logits differ from PyTorch fp32 by [\d.e-]+ at most"):
        check_agreement(prepared, model, BATCHES)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_agreement_catches_wrong_outputs_at_every_precision(tmp_path, precision):
    model = bert()
    prepared = dataclasses.replace(prepare("pytorch-fp32", model, BATCHES[0], 1, None, tmp_path), precision=precision)
    assert check_agreement(prepared, model, BATCHES)["cosine"] == pytest.approx(1)
    wrong = {
        "NaN": lambda arrays: [array * np.nan for array in arrays],
        "scaled": lambda arrays: [array * 1.5 for array in arrays],
        "swapped outputs": lambda arrays: arrays[::-1],
    }
    for change in wrong.values():
        with pytest.raises(StudyError, match="not timed"):
            check_agreement(perturbed(prepared, change), model, BATCHES)
    with pytest.raises(StudyError, match="outputs of shapes"):
        check_agreement(perturbed(prepared, lambda arrays: arrays[:1]), model, BATCHES)


def test_an_ignored_attention_mask_is_caught_and_padding_positions_are_not_compared(tmp_path):
    model = bert()
    prepared = prepare("pytorch-fp32", model, BATCHES[0], 1, None, tmp_path)

    def unmasked(batch):
        return prepared._run({**batch, "attention_mask": np.ones_like(batch["attention_mask"])})

    with pytest.raises(StudyError):
        check_agreement(dataclasses.replace(prepared, _run=unmasked), model, BATCHES)

    def noise_in_padding(batch):
        return [array + 9 * (1 - batch["attention_mask"]) for array in prepared._run(batch)]

    check_agreement(dataclasses.replace(prepared, _run=noise_in_padding), model, BATCHES)


def test_a_wider_bound_lets_a_rough_quantisation_through(tmp_path):
    model = bert(BertForSequenceClassification, num_labels=2)
    prepared = dataclasses.replace(prepare("pytorch-fp32", model, BATCHES[0], 1, None, tmp_path), precision="int8")
    rough = perturbed(prepared, lambda arrays: [array * 1.5 for array in arrays])
    assert check_agreement(rough, model, BATCHES, bound=0.6)["relative_diff"] == pytest.approx(0.5)


def test_flops_equal_the_hand_count():
    model, batch, length = bert(), 3, 10
    hidden, units = 32, 64
    layer = 2 * length * (4 * hidden * hidden + 2 * hidden * units) + 2 * 2 * length * length * hidden
    assert flops(model, batch, length) == batch * (2 * layer + 2 * length * hidden * 2)


def test_size_on_disk_is_dominated_by_the_weights():
    model = bert()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights < size_on_disk(model) < weights + 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("", "required: command"),
     ("nothing", "invalid choice"),
     ("latency --engine warp", "invalid choice: 'warp'"),
     ("latency --batch two", "invalid int value: 'two'"),
     ("latency --batch 0", "--batch: found 0"),
     ("latency --rounds -1", "--rounds: found -1"),
     ("latency --encoder tiny --length 513", "--length: found 513, but 'tiny' has 512 positions"),
     ("latency --encoder tiny --keep-layers 4", "expected 1 to 3"),
     ("latency --encoder ./no-such-folder", "does not exist"),
     ("latency --speed 9", "unrecognized arguments: --speed 9")],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_only_unavailable_engines_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["latency", "--engine", "pytorch-cuda-fp16"]) == 2
    assert capsys.readouterr().err == "error: pytorch-cuda-fp16 is not available: no CUDA device\n"


def test_the_command_prints_a_table_with_the_conditions(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benchmark, "random_model", lambda shape: bert(num_hidden_layers=3))
    command = ("latency --encoder tiny --length 12 --rounds 2 --threads 1 --keep-layers 1 "
               "--engine pytorch-fp32 --engine pytorch-cuda-bf16")  # fmt: skip
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert "batch 1, 12 tokens, 1 threads, 2 rounds" in printed
    assert "pytorch-fp32 3 layers" in printed and "pytorch-fp32 1 layers" in printed
    assert "pytorch-cuda-bf16  not available: no CUDA device" in printed
