"""Saving and loading compressed models (oracle check 12): identical in a new process, never mistaken for plain ones."""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import padded_batch, random_gates
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)

from lib import surgery
from lib.config import StudyError
from lib.gates import fold_gates
from lib.models import ARCHITECTURES, count_parameters, layer_parts, layers, load_model
from lib.surgery import cut, drop_layers, even_shapes, layer_shapes, load_compressed, save_compressed

# Loads a folder and writes its logits; runs in a process of its own.
OTHER_PROCESS = """
import sys
import safetensors.torch
import torch
from lib.surgery import load_compressed
folder, batch, target, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # sums are split by threads
model, tokenizer = load_compressed(folder)
assert not model.training and tokenizer is not None
output = model(**safetensors.torch.load_file(batch))
names = ("logits", "start_logits", "end_logits")
safetensors.torch.save_file({name: output[name].detach() for name in names if name in output}, target)
"""


def cut_widths(model) -> None:
    """Slice heads and FFN units by hand, differently in every layer, down to none."""
    for layer, (heads, units) in zip(layers(model), ((4, 48), (1, 10), (2, 0), (0, 48)), strict=True):
        parts = layer_parts(layer)
        for linear in (parts.query, parts.key, parts.value):
            keep(linear, 8 * heads, None)
        keep(parts.attention_output, None, 8 * heads)
        keep(parts.ffn_in, units, None)
        keep(parts.ffn_out, None, units)


def keep(linear, rows, columns) -> None:
    linear.weight = nn.Parameter(linear.weight[:rows, :columns].clone())
    linear.bias = nn.Parameter(linear.bias[:rows].clone())
    linear.out_features, linear.in_features = linear.weight.shape


def gated(model):
    """Fractional gates of every kind, folded in; what is closed is cut, in two places down to nothing."""
    values = random_gates(model, ("heads", "units", "embedding"))
    values["heads"][1], values["units"][2] = torch.zeros(4), torch.zeros(48)
    fold_gates(model, values)
    cut(model, *([row.nonzero().flatten().tolist() for row in values[kind]] for kind in ("heads", "units")))
    return model


@torch.no_grad()
def logits(model, batch) -> dict[str, torch.Tensor]:
    output = model(**batch)
    return {name: output[name] for name in ("logits", "start_logits", "end_logits") if name in output}


@pytest.fixture
def models(small_model, tokenizer):
    """Name -> model: layers dropped, or widths that differ, under heads of both kinds; attention as the loader's."""
    found = {
        "bert without layers": small_model("bert", "sdpa"),
        "xlnet without layers": small_model("xlnet"),
    }
    for model in found.values():
        drop_layers(model, {1, 3})
    for name in ("bert", "roberta", "distilbert"):
        found[f"{name} cut"] = small_model(name, "sdpa")
    found["classifier cut"] = AutoModelForSequenceClassification.from_config(
        BertConfig(**small_model("bert").config.to_diff_dict() | {"num_labels": 3})
    ).eval()
    for name, model in found.items():
        if name.endswith("cut"):
            cut_widths(model)
    for name in ("bert", "roberta"):
        found[f"{name} gated and cut"] = gated(small_model(name, "sdpa"))
    return found


def test_logits_are_identical_in_a_new_process(models, tokenizer, tmp_path):
    """One process loads all of them, since starting it is what takes long."""
    calls = []
    for number, (name, model) in enumerate(models.items()):
        batch = padded_batch(name.split()[0])  # "classifier" is padded like BERT
        safetensors.torch.save_file(batch, tmp_path / f"{number}.batch")
        save_compressed(model, tokenizer, tmp_path / str(number))
        calls.append([str(tmp_path / file) for file in (str(number), f"{number}.batch", f"{number}.logits")])
    loop = "".join(f"sys.argv[1:] = {[*call, str(torch.get_num_threads())]!r}\n{OTHER_PROCESS}" for call in calls)
    done = subprocess.run([sys.executable, "-c", f"import sys\n{loop}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for number, (name, model) in enumerate(models.items()):
        loaded = safetensors.torch.load_file(tmp_path / f"{number}.logits")
        expected = logits(model, padded_batch(name.split()[0]))
        assert set(loaded) == set(expected)
        assert all(torch.equal(loaded[key], value) for key, value in expected.items()), name


def test_the_form_says_whether_transformers_can_read_it(models, tokenizer, tmp_path):
    for name, model in models.items():
        folder = save_compressed(model, tokenizer, tmp_path / name)
        assert (folder / "compression.json").exists() == name.endswith("cut"), name
        assert (folder / "model.safetensors").exists() != name.endswith("cut"), name
    plain = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "bert without layers")
    batch = padded_batch("bert")
    assert torch.equal(plain(**batch).start_logits, logits(models["bert without layers"], batch)["start_logits"])


def test_shapes_and_tokenizer_survive(models, tokenizer, tmp_path):
    folder = save_compressed(models["bert cut"], tokenizer, tmp_path)
    loaded, again = load_compressed(folder)
    assert layer_shapes(loaded) == [
        {"attention": 32, "units": 48}, {"attention": 8, "units": 10},
        {"attention": 16, "units": 0}, {"attention": 0, "units": 48},
    ]  # fmt: skip
    assert again.tokenize("An old mill") == tokenizer.tokenize("An old mill")
    assert AutoTokenizer.from_pretrained(folder).tokenize("mill") == ["mill"]


@pytest.mark.parametrize(
    "entry",
    [AutoModel, AutoModelForQuestionAnswering, AutoModelForSequenceClassification, BertModel, BertForQuestionAnswering,
     BertForSequenceClassification],
)  # fmt: skip
@pytest.mark.parametrize(
    "arguments",
    [{}, {"ignore_mismatched_sizes": True}, {"use_safetensors": True}, {"config": BertConfig(num_hidden_layers=4)}],
    ids=["plain", "ignoring sizes", "safetensors", "own config"],
)
def test_transformers_stops_with_a_message_that_names_the_loader(models, tokenizer, tmp_path, entry, arguments):
    save_compressed(models["bert cut"], tokenizer, tmp_path)
    with pytest.raises(Exception, match=r"compressed model: load it with lib\.surgery\.load_compressed"):
        entry.from_pretrained(tmp_path, **arguments)


def test_our_own_encoder_loading_names_the_loader_too(models, tokenizer, tmp_path):
    save_compressed(models["bert cut"], tokenizer, tmp_path)
    with pytest.raises(StudyError, match=r"load it with lib\.surgery\.load_compressed"):
        load_model(str(tmp_path), "qa")


def test_a_folder_that_is_used_again_holds_only_the_new_model(models, tokenizer, tmp_path):
    for name in ("bert without layers", "bert cut", "classifier cut", "bert without layers"):
        save_compressed(models[name], tokenizer, tmp_path)
        loaded, _ = load_compressed(tmp_path)
        batch = padded_batch("bert")
        found, expected = logits(loaded, batch), logits(models[name], batch)
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name


def test_what_is_cut_is_gone_and_the_rest_is_as_it_was(small_model):
    model, dense = small_model("bert"), small_model("bert")
    cut(model, heads=[[3, 1, 3], [], range(4), [0]], units=[range(48), [47, 0], [], [5]])
    assert [(shape["attention"] // 8, shape["units"]) for shape in layer_shapes(model)] == [
        (2, 48), (0, 2), (4, 0), (1, 1),
    ]  # fmt: skip
    first, whole = layer_parts(layers(model)[0]), layer_parts(layers(dense)[0])
    kept = [*range(8, 16), *range(24, 32)]  # in their old order, however they are named
    assert torch.equal(first.key.weight, whole.key.weight[kept]) and torch.equal(first.key.bias, whole.key.bias[kept])
    assert torch.equal(first.attention_output.weight, whole.attention_output.weight[:, kept])
    second, whole = layer_parts(layers(model)[1]), layer_parts(layers(dense)[1])
    assert torch.equal(second.ffn_in.weight, whole.ffn_in.weight[[0, 47]])
    assert torch.equal(second.ffn_out.weight, whole.ffn_out.weight[:, [0, 47]])
    assert torch.equal(second.ffn_out.bias, whole.ffn_out.bias)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({"heads": [[0]] * 3}, "cut: heads are given for 3 layers, the model has 4"),
        ({"units": [[0]] * 5}, "cut: units are given for 5 layers, the model has 4"),
        ({"heads": [[0], [1], [4], [0]]}, "cut: layer 3, heads: found 4, expected 0 to 3"),
        ({"heads": [[-1], [1], [0], [0]]}, "cut: layer 1, heads: found -1, expected 0 to 3"),
        ({"units": [[0], [48], [0], [0]]}, "cut: layer 2, units: found 48, expected 0 to 47"),
    ],
)
def test_what_cannot_be_kept_is_one_line(small_model, kept, said):
    with pytest.raises(StudyError) as caught:
        cut(small_model("bert"), **kept)
    assert str(caught.value) == said


def test_xlnet_cannot_be_cut(small_model):
    with pytest.raises(StudyError, match="xlnet has no heads known here; use BERT or RoBERTa"):
        cut(small_model("xlnet"), heads=[[0]] * 4)


@pytest.mark.parametrize(
    ("heads", "units"),
    [(0.0, 0.0), (44.3, 0.0), (0.0, 47.7), (44.3, 47.7), (52.6, 65.2), (57.6, 73.7), (60.1, 78.4), (100.0, 100.0)],
)
def test_even_shapes_meet_the_printed_percentages_of_bert_large(heads, units):
    """384 heads and 98,304 units in all; no two layers differ by more than one."""
    shapes = even_shapes(ARCHITECTURES["bert-large-uncased"], 1 - heads / 100, 1 - units / 100)
    per_layer = [list(column) for column in zip(*shapes, strict=True)]
    assert [sum(column) for column in per_layer] == [round(384 * (1 - heads / 100)), round(98304 * (1 - units / 100))]
    assert round(100 - sum(per_layer[0]) / 3.84, 1) == pytest.approx(heads, abs=0.11)  # a head is 0.26 %
    assert round(100 - sum(per_layer[1]) / 983.04, 1) == units
    assert len(shapes) == 24 and all(max(column) - min(column) <= 1 for column in per_layer)


def test_even_shapes_fit_what_cut_expects():
    model = load_model("tiny-bert", "qa")
    shapes = even_shapes(model.config, 0.4, 0.3)
    cut(model, [range(heads) for heads, _ in shapes], [range(units) for _, units in shapes])
    assert [(shape["attention"] // 8, shape["units"]) for shape in layer_shapes(model)] == list(shapes)
    assert sum(heads for heads, _ in shapes) == 6 and sum(units for _, units in shapes) == 77
    dense = count_parameters(load_model("tiny-bert", "qa"))
    assert dense - count_parameters(model) == 10 * (4 * 8 * 32 + 3 * 8) + 179 * (2 * 32 + 1)


def edit(folder, **changes) -> None:
    path = folder / "compression.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "cut off": (lambda folder: os.truncate(folder / "compression.json", 50), "compression.json is damaged"),
    "not an object": (lambda folder: (folder / "compression.json").write_text("[]"), "compression.json is damaged"),
    "unknown type": (lambda folder: edit(folder, config={"model_type": "nope"}), "compression.json is damaged"),
    "no type": (lambda folder: edit(folder, config={}), "compression.json is damaged"),
    "a layer too few": (lambda folder: edit(folder, layers=[{"attention": 8, "units": 8}]), "is damaged"),
    "no width": (lambda folder: edit(folder, layers=[{"attention": "x", "units": 8}] * 4), "is damaged"),
    "other widths": (lambda folder: edit(folder, layers=[{"attention": 8, "units": 8}] * 4), "does not fit"),
    "weights cut off": (lambda folder: os.truncate(folder / "compressed.safetensors", 1000), "does not fit"),
    "weights missing": (lambda folder: (folder / "compressed.safetensors").unlink(), "does not fit"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line(models, tokenizer, tmp_path, damage):
    save_compressed(models["bert cut"], tokenizer, tmp_path)
    harm, said = DAMAGE[damage]
    harm(tmp_path)
    with pytest.raises(StudyError) as caught:
        load_compressed(tmp_path)
    assert said in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_damage_of_a_plain_model_is_one_line(models, tokenizer, tmp_path, file):
    save_compressed(models["bert without layers"], tokenizer, tmp_path)
    os.truncate(tmp_path / file, 50)
    with pytest.raises(StudyError, match="is damaged") as caught:
        load_compressed(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unwritable_folder_is_one_line(models, tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StudyError, match=r"cannot save the model to .*file.*; free some space or give another"):
        save_compressed(models["bert cut"], tokenizer, tmp_path / "file")


def test_a_full_disk_while_weights_are_written_is_one_line(models, tokenizer, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(surgery.safetensors.torch, "save_model", full)
    with pytest.raises(StudyError, match="No space left on device"):
        save_compressed(models["bert cut"], tokenizer, tmp_path)
