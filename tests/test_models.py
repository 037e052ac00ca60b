"""Encoders: exact parameter counts (oracle check 18), damaged or missing weights, layer access, reproducible heads."""

import hashlib
import os
import shutil

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from lib import models
from lib.config import StudyError
from lib.models import (
    ARCHITECTURES,
    count_parameters,
    layer_parts,
    layers,
    load_config,
    load_model,
    load_tokenizer,
    published_parameters,
    random_model,
    remove_layers,
)
from lib.published import published

# architecture: parameters of the encoder with its pooler, parameters of one of its layers
EXACT = {
    "bert-base-uncased": (109_482_240, 7_087_872),
    "bert-large-uncased": (335_141_888, 12_596_224),
    "roberta-base": (124_645_632, 7_087_872),
    "xlnet-base-cased": (116_718_336, 7_678_464),
    "distilbert-base-uncased": (66_362_880, 7_087_872),
}
PRINTED_AS = {
    "bert-base-uncased": "BERT-base",
    "roberta-base": "RoBERTa-base",
    "xlnet-base-cased": "XLNet-base",
    "distilbert-base-uncased": "DistilBERT-base",
}


@pytest.mark.parametrize("architecture", EXACT)
def test_parameter_counts_are_exact(architecture):
    total, layer = EXACT[architecture]
    for dropped in (0, 2, 4):
        assert published_parameters(architecture, dropped) == total - dropped * layer


def test_six_layers_less_than_bert_base_round_to_the_printed_count():
    printed = published("sajjad2020", metric="parameters", model="BERT-base")
    assert set(printed["K"]) >= {0, 6}
    for row in printed.itertuples():
        assert round(published_parameters("bert-base-uncased", int(row.K)) / 1e6) == pytest.approx(row.value, abs=1)


def test_published_counts_reject_what_does_not_exist():
    with pytest.raises(StudyError, match="cannot drop 12 layers; give 0 to 11"):
        published_parameters("bert-base-uncased", 12)
    with pytest.raises(StudyError, match="unknown architecture 'bert-tiny'; known: bert-base-uncased"):
        published_parameters("bert-tiny")


def test_a_layers_size_follows_from_its_shape():
    """Four maps of attention, two of the FFN, two LayerNorms, by hand."""
    hidden, units = 768, 3072
    by_hand = 4 * (hidden * hidden + hidden) + 2 * hidden * units + units + hidden + 2 * 2 * hidden
    assert by_hand == EXACT["bert-base-uncased"][1]


def test_packaged_minilm_is_a_six_layer_bert_and_its_tokenizer_lower_cases():
    assert models.layer_count(load_config("minilm")) == 6
    assert load_tokenizer("minilm").tokenize("Mill") == ["mill"]


def test_wrong_checksum_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(models, "packaged_minilm_dir", lambda: tmp_path)
    found = hashlib.sha256(b"other weights").hexdigest()[:12]
    with pytest.raises(StudyError, match=f"sha256 is {found}….*expected {models.MINILM_SHA256[:12]}.*reinstall"):
        load_model("minilm", "qa")
    os.remove(tmp_path / "model.safetensors")
    with pytest.raises(StudyError, match=r"model\.safetensors is missing"):
        load_model("minilm", "qa")


@pytest.fixture
def saved(tmp_path, tiny_bert, tokenizer):
    """A healthy model folder."""
    tiny_bert.save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def test_a_local_folder_loads_its_own_weights(saved, tiny_bert):
    loaded = load_model(str(saved), "classification", num_labels=3)
    theirs, ours = tiny_bert.bert.state_dict(), loaded.bert.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs if "pooler" not in name)
    assert loaded.config.num_labels == 3 and loaded.classifier.out_features == 3


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: os.truncate(folder / "model.safetensors", 1000), "save or install it again"),
        (lambda folder: os.truncate(folder / "config.json", 40), "not a valid JSON file"),
        (lambda folder: (folder / "compression.json").write_text("{}"), "lib.surgery.load_compressed"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_a_damaged_folder_is_one_line(saved, damage, said):
    damage(saved)
    with pytest.raises(StudyError) as caught:
        load_model(str(saved), "qa")
    assert said in str(caught.value) and "\n" not in str(caught.value) and str(saved) in str(caught.value)


def test_a_damaged_tokenizer_is_one_line(saved):
    (saved / "tokenizer.json").write_text("{")
    with pytest.raises(StudyError, match="could not be loaded"):
        load_tokenizer(str(saved))


@pytest.mark.parametrize("load", [lambda name: load_model(name, "qa"), load_tokenizer, load_config])
def test_an_encoder_that_only_the_hub_has_says_how_to_work_offline(load):
    with pytest.raises(StudyError, match=r"encoder 'nobody/no-such-model'.*offline, use encoder=minilm") as caught:
        load("nobody/no-such-model")
    assert "\n" not in str(caught.value) and str(caught.value).endswith("to ask the hub, set HF_HUB_OFFLINE=0")


def test_another_kind_of_encoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(StudyError, match="of type 'gpt2'; this study handles bert, roberta, distilbert, xlnet"):
        load_config(str(tmp_path))


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_layer_parts_have_the_shapes_that_their_names_say(small_model, architecture):
    stack = layers(small_model(architecture))
    assert len(stack) == 4
    for layer in stack:
        parts = layer_parts(layer)
        for linear in (parts.query, parts.key, parts.value, parts.attention_output):
            assert (linear.out_features, linear.in_features) == (32, 32)
        assert (parts.ffn_in.out_features, parts.ffn_out.in_features) == (48, 48)
        assert len({id(part) for part in vars(parts).values()}) == 6
        covered = sum(count_parameters(part) for part in vars(parts).values())
        assert covered == count_parameters(layer) - 4 * 32  # all but two LayerNorms


def test_xlnet_has_layers_but_no_parts(small_model):
    stack = layers(small_model("xlnet"))
    assert len(stack) == 4
    with pytest.raises(StudyError, match="XLNetLayer has no query/key/value"):
        layer_parts(stack[0])


def test_a_model_without_layers_is_refused():
    with pytest.raises(StudyError, match="no list of layers"):
        layers(type("Odd", (nn.Module,), {"base_model_prefix": "base"})())


def test_cutting_a_random_model_leaves_the_published_shape_alone():
    before = ARCHITECTURES["tiny"].to_dict()
    model = random_model("tiny")
    remove_layers(model, list(layers(model))[1:3])
    assert model.config.num_hidden_layers == len(layers(model)) == 2
    config = load_config("tiny-bert")
    config.num_hidden_layers = 1
    assert ARCHITECTURES["tiny"].to_dict() == before
    assert len(layers(random_model("tiny"))) == len(layers(load_model("tiny-bert", "qa"))) == 4


def test_random_models_of_a_given_shape_and_of_every_architecture():
    shape = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}
    model = random_model(shape, "classification")
    expected = count_parameters(BertModel(BertConfig(**shape))) + 24 * 2 + 2
    assert count_parameters(model) == expected and not model.training
    assert len(layers(random_model("xlnet-base-cased"))) == 12


def test_heads_depend_on_the_seed_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (load_model("minilm", "qa", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state()), "loading a model must not disturb the caller's random numbers"
    assert torch.equal(first.qa_outputs.weight, again.qa_outputs.weight)
    assert not torch.equal(first.qa_outputs.weight, other.qa_outputs.weight)
    assert torch.equal(layer_parts(layers(first)[0]).query.weight, layer_parts(layers(other)[0]).query.weight)


def test_dropout_replaces_every_rate():
    model = load_model("tiny-bert", "classification", dropout=0.0)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.0}
    kept = load_model("tiny-bert", "classification")
    assert {module.p for module in kept.modules() if isinstance(module, nn.Dropout)} == {0.1}


def test_regression_has_one_output():
    model = load_model("tiny-bert", "regression", num_labels=5)
    assert model.config.problem_type == "regression" and model.classifier.out_features == 1
