"""Kronecker factors (oracle check 15): nearest ones, maps that never build the product, exact sizes, two stages."""

import copy
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import padded_batch
from conftest import record as finished
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForQuestionAnswering, BertForQuestionAnswering, BertModel

from lib import experiments, model_cost, plans
from lib.analysis.kronecker import (
    ablation_frame,
    bounds,
    complete,
    cost_frame,
    error_frame,
    first_stage_frame,
    kronecker_frame,
    loss_curves,
    published_retained,
    speed_frame,
)
from lib.claims import NOT_RUN
from lib.claims import kronecker as claims_of
from lib.compressors import CompressorSpec, make_compressor
from lib.compressors.kronecker import Kronecker
from lib.config import StudyError, load_profile
from lib.data import TASKS
from lib.distillation import Distillation, Distiller, expose_attention_scores
from lib.engines import prepare
from lib.kronecker import (
    KroneckerEmbedding,
    KroneckerLinear,
    multiply_adds,
    nearest_kronecker,
    rearrange,
)
from lib.kronecker_models import (
    PUBLISHED,
    KroneckerShapes,
    configuration,
    dense_parameters,
    encoder_parameters,
    factor_shapes,
    factorise,
    kronecker_modules,
    published_ratio,
    wanted_factors,
)
from lib.models import ARCHITECTURES, base_model, count_parameters, layer_parts, layers, load_config, load_model
from lib.plans.kronecker import objective, task_stage, text_stage, variant_of
from lib.published import published
from lib.records import Record, weights_folder
from lib.runs import ensure
from lib.specs import (
    LatencyModel,
    LatencySpec,
    MajoritySpec,
    TextDistillationSpec,
    TrainingSpeedSpec,
    dense_spec,
    parse_spec,
    spec_hash,
)
from lib.surgery import drop_layers, load_compressed, save_compressed
from lib.text_distillation import under_head

SMALL = KroneckerShapes(attention=(4, 8), ffn=(2, 6), embedding=4)  # of conftest's models: width 32, 48 units

# (first factor, second factor, terms): a large factor on either side, square and not, one term and several.
CASES = [
    ((4, 6), (3, 2), 1),
    ((3, 2), (4, 6), 1),
    ((2, 2), (5, 7), 3),
    ((8, 1), (1, 8), 4),
    ((1, 3), (5, 2), 2),
]
cases = pytest.mark.parametrize(("first", "second", "terms"), CASES)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def total_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return sum(torch.kron(x, y) for x, y in zip(a, b, strict=True))


def test_rearranging_lays_every_block_out_in_a_row():
    weight = torch.arange(24.0).view(4, 6)
    rows = rearrange(weight, (2, 3))
    assert rows.shape == (6, 4)
    for i in range(2):
        for j in range(3):
            assert rows[3 * i + j].tolist() == weight[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten().tolist()


@cases
def test_a_sum_of_products_is_found_again(first, second, terms):
    a, b = random(terms, *first, seed=1), random(terms, *second, seed=2)
    weight = total_product(a, b)
    found = nearest_kronecker(weight, first, terms)
    assert found.a.shape == (terms, *first) and found.b.shape == (terms, *second)
    torch.testing.assert_close(total_product(found.a, found.b), weight, rtol=1e-12, atol=1e-12)
    assert found.error < 1e-12
    for x, y in zip(found.a, found.b, strict=True):
        assert x.norm().item() == pytest.approx(y.norm().item(), rel=1e-9), "A and B share each singular value's root"


@pytest.mark.parametrize("terms", [1, 2, 3, 5])
def test_the_squared_error_is_the_tail_of_the_squared_singular_values(terms):
    weight = random(12, 10)
    found = nearest_kronecker(weight, (4, 2), terms)
    sigma = torch.linalg.svdvals(rearrange(weight, (4, 2)))
    squared = (weight - total_product(found.a, found.b)).square().sum().item()
    assert squared == pytest.approx(sigma[terms:].square().sum().item(), rel=1e-10) and squared > 1e-3
    assert found.error == pytest.approx((squared / weight.square().sum().item()) ** 0.5, rel=1e-10)


def test_no_product_is_nearer():
    """Moving the factors in any direction makes it worse, to second order."""
    weight = random(6, 6)
    found = nearest_kronecker(weight, (2, 3))
    best = (weight - torch.kron(found.a[0], found.b[0])).norm()
    for seed in range(20):
        a, b = found.a[0] + 0.01 * random(2, 3, seed=seed), found.b[0] + 0.01 * random(3, 2, seed=100 + seed)
        assert (weight - torch.kron(a, b)).norm() > best


def test_full_rank_is_exact():
    weight = random(12, 10)
    found = nearest_kronecker(weight, (4, 2), 8)  # the rearranged weight is 8 by 15
    torch.testing.assert_close(total_product(found.a, found.b), weight, rtol=1e-12, atol=1e-12)
    assert found.error == 0


def test_float32_weights_keep_their_type():
    found = nearest_kronecker(random(12, 10).float(), (4, 2))
    assert found.a.dtype == found.b.dtype == torch.float32


@pytest.mark.parametrize("a_first", [True, False])
@cases
def test_forward_and_backward_equal_the_dense_map(first, second, terms, a_first):
    module = KroneckerLinear(first, second, terms, a_first=a_first).double()
    a, b = random(terms, *first, seed=1), random(terms, *second, seed=2)
    module.set_factors(a, b)
    nn.init.normal_(module.bias)
    torch.testing.assert_close(module.factors()[0], a)
    torch.testing.assert_close(module.factors()[1], b)
    a, b = a.requires_grad_(), b.requires_grad_()
    x = random(3, 5, module.in_features, seed=3)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = total_product(a, b)
    assert weight.shape == module.shape == (module.out_features, module.in_features)
    expected = F.linear(theirs, weight, module.bias)
    found = module(ours)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.square().sum().backward()
    bias_gradient = module.bias.grad.clone()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(bias_gradient, module.bias.grad - bias_gradient, rtol=1e-11, atol=1e-11)
    gradients = copy.deepcopy(module)
    with torch.no_grad():
        gradients.a.copy_(module.a.grad)
        gradients.b.copy_(module.b.grad)
    torch.testing.assert_close(gradients.factors()[0], a.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients.factors()[1], b.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(module.product(), weight)


@pytest.mark.parametrize(
    ("first", "second"), [((384, 384), (2, 2)), ((384, 48), (2, 16)), ((16, 2), (192, 384)), ((2, 16), (384, 192))]
)
def test_the_order_is_the_one_with_fewer_operations(first, second):
    """Counted by torch on both orders; the product's own size never turns up."""
    module = KroneckerLinear(first, second)
    counts = {}
    for a_first in (True, False):
        other = KroneckerLinear(first, second, a_first=a_first)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            other(torch.zeros(1, other.in_features))
        counts[a_first] = counter.get_total_flops()
        assert counts[a_first] == 2 * multiply_adds(first, second, 1, a_first)
    assert counts[module.a_first] == min(counts.values())


@cases
def test_every_row_of_the_table_is_the_products(first, second, terms):
    module = KroneckerEmbedding(first, second, terms).double()
    a, b = random(terms, *first, seed=1).requires_grad_(), random(terms, *second, seed=2).requires_grad_()
    with torch.no_grad():
        module.set_factors(a, b)
    table, ids = total_product(a, b), torch.arange(module.num_embeddings).repeat(2, 1)
    torch.testing.assert_close(module(ids), F.embedding(ids, table), rtol=1e-12, atol=1e-12)
    assert (module.num_embeddings, module.embedding_dim) == tuple(table.shape)
    module(ids[:, ::2]).pow(3).sum().backward()
    F.embedding(ids[:, ::2], table).pow(3).sum().backward()
    gradients = copy.deepcopy(module)
    with torch.no_grad():
        gradients.a.copy_(module.a.grad)
        gradients.b.copy_(module.b.grad)
    torch.testing.assert_close(gradients.factors()[0], a.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients.factors()[1], b.grad, rtol=1e-11, atol=1e-11)


def test_random_factors_give_weights_of_the_wanted_size_and_depend_on_the_seed():
    module = KroneckerLinear((64, 32), (8, 16), terms=3)
    module.set_random(0.02, torch.Generator().manual_seed(1))
    assert module.product().std().item() == pytest.approx(0.02, rel=0.1)
    again = KroneckerLinear((64, 32), (8, 16), terms=3)
    again.set_random(0.02, torch.Generator().manual_seed(1))
    assert torch.equal(module.a, again.a) and torch.equal(module.b, again.b)
    again.set_random(0.02, torch.Generator().manual_seed(2))
    assert not torch.equal(module.a, again.a)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: nearest_kronecker(random(12, 10), (5, 2)), "5 × 2 does not divide 12 × 10"),
        (lambda: nearest_kronecker(random(12, 10), (4, 0)), "4 × 0 does not divide 12 × 10"),
        (lambda: nearest_kronecker(random(12, 10), (4, 2), 9), "give 1 to 8, which is exact"),
        (lambda: nearest_kronecker(random(12, 10), (4, 2), 0), "give 1 to 8"),
        (lambda: KroneckerLinear.like(nn.Linear(10, 12), (5, 2), where="query"), "query: a first factor of 5 × 2"),
    ],
)
def test_factors_that_do_not_fit_are_one_line(call, said):
    with pytest.raises(StudyError) as caught:
        call()
    assert said in str(caught.value) and "\n" not in str(caught.value)


# --- in a whole encoder


@pytest.mark.parametrize(
    ("name", "exact", "printed"), [("kron8", 14_654_216, 14.3), ("kron19", 5_716_620, 5.7), ("kron21", 5_228_272, 5.2)]
)
def test_published_configurations_have_these_exact_sizes(name, exact, printed):
    """With positions, LayerNorms, biases and pooler. Two agree with the printed digits; the 7.7× model does not."""
    found = encoder_parameters(ARCHITECTURES["bert-base-uncased"], PUBLISHED[name])
    assert found == exact
    assert (round(found / 1e6, 1) == printed) == (name != "kron8")
    assert configuration(name, ARCHITECTURES["bert-base-uncased"]) == PUBLISHED[name]
    assert published_ratio(name) == pytest.approx(109_482_240 / exact)


@pytest.mark.parametrize(("name", "billions"), [("kron8", 5.5), ("kron19", 1.4), ("kron21", 1.4)])
def test_published_configurations_have_the_printed_operations(name, billions):
    """Table 6: FLOPs of the linear maps at 128 tokens, by the cheaper order of every map."""
    with torch.device("meta"):
        model = AutoModel.from_config(ARCHITECTURES["bert-base-uncased"])
        factorise(model, PUBLISHED[name])
    maps = [module for module in kronecker_modules(model).values() if isinstance(module, KroneckerLinear)]
    assert len(maps) == 72
    total = sum(2 * 128 * multiply_adds(m.first, m.second, m.terms, m.a_first) for m in maps)
    assert round(total / 1e9, 1) == billions


def test_configurations_carry_over_to_another_encoder():
    """The small factors stay, and the embedding's n brings MiniLM to the published ratios."""
    config = load_config("minilm")
    shapes = {name: configuration(name, config) for name in PUBLISHED}
    assert shapes["kron8"] == KroneckerShapes(attention=(192, 192), ffn=(2, 8), embedding=8)
    assert shapes["kron21"] == KroneckerShapes(attention=(24, 192), ffn=(2, 16), embedding=32)
    for name, wanted in shapes.items():
        ratio = encoder_parameters(config) / encoder_parameters(config, wanted)
        assert ratio == pytest.approx(published_ratio(name), rel=0.05)
    narrow = copy.deepcopy(config)
    narrow.hidden_size = 24
    with pytest.raises(StudyError, match="kron21: the width 24 is no multiple of 16"):
        configuration("kron21", narrow)
    with pytest.raises(StudyError, match="unknown configuration 'kron9'; known: kron8, kron19, kron21"):
        configuration("kron9", config)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("swap", [False, True])
def test_the_factorised_model_is_the_model_of_its_products(small_model, architecture, swap):
    shapes = SMALL.model_copy(update={"swap": swap, "terms": 2})
    dense, batch = small_model(architecture), padded_batch(architecture)
    model = copy.deepcopy(dense)
    errors = factorise(model, shapes)
    modules = kronecker_modules(model)
    assert len(modules) == 25 and set(errors) == set(modules) == set(wanted_factors(model, shapes))
    for path, module in modules.items():
        weight = dense.get_submodule(path).weight
        assert errors[path] == pytest.approx(((weight - module.product()).norm() / weight.norm()).item(), rel=1e-4)
        with torch.no_grad():
            weight.copy_(module.product())
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).start_logits, dense(**batch).start_logits, rtol=1e-4, atol=1e-4)
    assert dense_parameters(model) == count_parameters(dense) > count_parameters(model)


def test_enough_terms_change_nothing(small_model):
    dense, batch = small_model("bert"), padded_batch("bert")
    model = copy.deepcopy(dense)
    errors = factorise(model, KroneckerShapes(attention=(16, 16), ffn=(2, 2), embedding=4, terms=4))
    assert max(errors.values()) < 1e-6
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).start_logits, dense(**batch).start_logits, rtol=1e-4, atol=1e-5)


def test_the_ffns_second_map_has_the_first_ones_factors_turned_round(small_model):
    model = small_model("bert")
    factorise(model, SMALL)
    parts = layer_parts(layers(model)[0], (KroneckerLinear,))
    assert (parts.ffn_in.first, parts.ffn_in.second) == ((6, 2), (8, 16))
    assert (parts.ffn_out.first, parts.ffn_out.second) == ((2, 6), (16, 8))
    assert {linear.first for linear in (parts.query, parts.key, parts.value, parts.attention_output)} == {(8, 4)}
    with pytest.raises(StudyError, match="no query/key/value/FFN linear maps"):
        layer_parts(layers(model)[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"attention": (5, 8)},
            "encoder.layer.0.attention.self.query: a first factor of 8 × 5 does not divide 32 × 32",
        ),
        ({"ffn": (2, 7)}, "layer.0.intermediate.dense: a first factor of 7 × 2 does not divide 48 × 32"),
        ({"embedding": 5}, "embedding: 5 does not divide the width 32"),
        ({"terms": 200}, "200 terms"),
        ({"embedding": 0}, "setting embedding"),
        ({"attention": (4, 8, 1)}, "setting attention"),
        ({"rank": 2}, "setting rank"),
    ],
)
def test_impossible_shapes_are_one_line_before_anything_is_replaced(small_model, changes, said):
    model = small_model("bert")
    with pytest.raises(StudyError) as caught:
        make_compressor(CompressorSpec(name="kronecker", settings=SMALL.model_dump() | changes)).attach(model)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    if "terms" not in changes:
        assert not kronecker_modules(model)


def test_architectures_without_known_maps_are_one_line(small_model):
    with pytest.raises(StudyError, match="no word embeddings known here; use BERT"):
        factorise(small_model("xlnet"), SMALL)


def compressor(**changes) -> Kronecker:
    made = make_compressor(CompressorSpec(name="kronecker", settings=SMALL.model_dump() | changes))
    assert isinstance(made, Kronecker)
    return made


def test_the_compressor_says_what_it_did_and_keeps_factors_that_are_there(small_model):
    model = small_model("bert")
    first = compressor()
    first.attach(model)
    summary = first.summary()
    assert summary["parameters"] == count_parameters(base_model(model))
    assert summary["dense_parameters"] == count_parameters(base_model(small_model("bert")))
    assert summary["ratio"] == summary["dense_parameters"] / summary["parameters"]
    assert summary["factors"]["attention"] | {"error": 0} == {"a": [8, 4], "b": [4, 8], "weights": 16, "error": 0}
    assert [summary["factors"][kind]["weights"] for kind in ("attention", "ffn", "embedding")] == [16, 8, 1]
    assert all(0 < kind["error"] < 1 for kind in summary["factors"].values())
    before = copy.deepcopy(model.state_dict())
    second = compressor()
    second.attach(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "error" not in second.summary()["factors"]["ffn"] and second.summary()["ratio"] == summary["ratio"]
    with pytest.raises(StudyError, match="has other factors; give the settings of its own run"):
        compressor(embedding=8).attach(model)
    with pytest.raises(StudyError, match="consists of Kronecker factors already"):
        factorise(model, SMALL)


def test_random_initialisation_forgets_the_weights_and_repeats_itself(small_model):
    def built(**changes):
        model = small_model("bert")
        compressor(**changes).attach(model)
        return model.state_dict()

    nearest, random, again, other = built(), *(built(initialisation="random", seed=seed) for seed in (0, 0, 1))
    name = "bert.encoder.layer.2.output.dense.a"
    assert torch.equal(random[name], again[name]) and not torch.equal(random[name], other[name])
    assert not torch.equal(random[name], nearest[name])
    kept = "bert.encoder.layer.2.output.dense.bias"
    assert torch.equal(random[kept], nearest[kept]), "biases keep their pre-trained values"


# --- saved, loaded, exported

OTHER_PROCESS = """
import sys
import safetensors.torch
import torch
from lib.surgery import load_compressed
torch.set_num_threads(1)
for folder, batch, target in zip(*[iter(sys.argv[1:])] * 3):
    model, _ = load_compressed(folder)
    output = model(**safetensors.torch.load_file(batch))
    safetensors.torch.save_file({"out": output[0].detach()}, target)
"""


def test_outputs_are_identical_in_a_new_process(small_model, tokenizer, tmp_path):
    """Under a QA head, with attention scores exposed as after a distilled training, and without any head."""
    plain, exposed, swapped = small_model("bert", "sdpa"), small_model("roberta"), small_model("distilbert", "sdpa")
    bare = BertModel(small_model("bert", "sdpa").config).eval()
    for model in (plain, exposed, bare):
        factorise(model, SMALL)
    factorise(swapped, SMALL.model_copy(update={"swap": True, "terms": 3}))
    expose_attention_scores(exposed)
    arguments = []
    kinds = {"bert": plain, "roberta": exposed, "distilbert": swapped, "bare": bare}
    for name, model in kinds.items():
        safetensors.torch.save_file(padded_batch(name), tmp_path / f"{name}.batch")
        save_compressed(model, tokenizer, tmp_path / name)
        arguments += [str(tmp_path / part) for part in (name, f"{name}.batch", f"{name}.out")]
    done = subprocess.run([sys.executable, "-c", OTHER_PROCESS, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, model in kinds.items():
        found = safetensors.torch.load_file(tmp_path / f"{name}.out")["out"]
        with torch.no_grad():
            expected = model(**padded_batch(name))[0]
        real = padded_batch(name)["attention_mask"].bool()
        torch.testing.assert_close(found[real], expected[real], rtol=0, atol=0 if name != "roberta" else 1e-6)
        loaded, _ = load_compressed(tmp_path / name)
        assert type(loaded) is type(model) and factor_shapes(loaded) == factor_shapes(model)


@pytest.mark.parametrize("entry", [AutoModel, AutoModelForQuestionAnswering, BertForQuestionAnswering])
@pytest.mark.parametrize("arguments", [{}, {"ignore_mismatched_sizes": True}])
def test_transformers_stops_at_it_with_a_message(small_model, tokenizer, tmp_path, entry, arguments):
    model = small_model("bert")
    factorise(model, SMALL)
    save_compressed(model, tokenizer, tmp_path)
    with pytest.raises(Exception, match=r"compressed model: load it with lib\.surgery\.load_compressed"):
        entry.from_pretrained(tmp_path, **arguments)


@pytest.mark.parametrize(
    "change",
    [
        lambda factors: factors.popitem() and None,
        lambda factors: factors.update({"bert.no.such": {"a": [1, 2, 2], "b": [1, 2, 2]}}),
        lambda factors: next(iter(factors.values())).update(a=[1, 7, 7]),
        lambda factors: next(iter(factors.values())).update(b=[1, 3, 3]),
        lambda factors: next(iter(factors.values())).pop("a") and None,
    ],
    ids=["one missing", "no such part", "a does not divide", "b does not fit", "no a"],
)
def test_damaged_factors_are_one_line(small_model, tokenizer, tmp_path, change):
    model = small_model("bert")
    factorise(model, SMALL)
    save_compressed(model, tokenizer, tmp_path)
    path = tmp_path / "compression.json"
    saved = json.loads(path.read_text())
    change(saved["factors"])
    path.write_text(json.dumps(saved))
    with pytest.raises(StudyError, match=r"is damaged|does not fit") as caught:
        load_compressed(tmp_path)
    assert "\n" not in str(caught.value)


def test_engines_run_it_and_find_constant_weights(tmp_path):
    """One layer only: exporting takes long. Every weight has to be on the right of its product to become int8."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = load_model("tiny-bert", "qa").eval()
    drop_layers(model, {2, 3, 4})
    factorise(model, configuration("kron8", model.config))
    batch = {"input_ids": torch.arange(5, 23).view(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    prepared = prepare("onnxruntime-fp32", model, batch, 1, None, tmp_path)
    with torch.no_grad():
        expected = model(**batch).start_logits.numpy()
    assert abs(prepared.run(batch)[0] - expected).max() < 1e-5
    graph = onnx.load(tmp_path / "fp32.onnx").graph
    constants = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    assert sum(node.input[1] in constants for node in products) == 2 * 6 + 1  # two factors a map, and the head
    assert len(products) == 2 * 6 + 1 + 2  # and the attention's own two


# --- distillation and the two stages


def test_the_embedding_term_is_the_mean_squared_error_of_the_embedding_output(small_model):
    teacher, batch = small_model("bert"), padded_batch("bert")
    student = copy.deepcopy(teacher)
    factorise(student, SMALL)
    distiller = Distiller(Distillation(hard=0.0, logits=0.0, embedding=2.0), teacher)
    assert distiller.needs == {"output_hidden_states": True, "output_attentions": False}
    found = distiller.loss(student(**batch, **distiller.needs), None, batch)
    with torch.no_grad():
        ours, theirs = (model.bert.embeddings(input_ids=batch["input_ids"]) for model in (student, teacher))
    squares = (ours - theirs).square().mean(-1)[batch["attention_mask"].bool()]
    assert found.item() == pytest.approx(2 * squares.mean().item(), rel=1e-5) and squares.mean() > 1e-3
    found.backward()
    assert student.bert.embeddings.word_embeddings.a.grad.abs().sum() > 0
    assert layers(student)[0].output.dense.a.grad is None, "only the embeddings are asked for"


def test_the_whole_objective_is_the_sum_of_its_terms_and_zero_for_the_teacher_itself(small_model):
    settings = objective(load_profile("smoke"), labels=True)
    teacher, batch = small_model("bert"), padded_batch("bert")
    expose_attention_scores(teacher)
    student = copy.deepcopy(teacher)
    distiller = Distiller(settings, teacher)
    same = distiller.loss(student(**batch, **distiller.needs), torch.tensor(0.0), batch)
    assert same.item() == pytest.approx(0, abs=1e-5)
    factorise(student, SMALL)
    output = student(**batch, **distiller.needs)
    terms = distiller.terms(output, batch)
    assert set(terms) == {"logits", "hidden_states", "attention_scores", "embedding"}
    expected = 3.0 + terms["logits"] + terms["embedding"] + 4 * terms["hidden_states"] + 4 * terms["attention_scores"]
    assert min(value.item() for value in terms.values()) > 1e-4
    assert distiller.loss(output, torch.tensor(3.0), batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_new_weights_of_the_loss_leave_older_hashes_alone():
    assert "embedding" not in Distillation(hidden_states=1.0).model_dump(exclude_defaults=True)
    assert LatencyModel(architecture="tiny").model_dump(exclude_defaults=True) == {"architecture": "tiny"}


@pytest.fixture
def profile(profile_file):
    qa = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_length": 64, "stride": 8, "train_examples": 16,
          "eval_examples": 8}  # fmt: skip
    return load_profile(profile_file(**{"tasks.world_qa": qa, "kronecker.tasks": ["world_sentiment", "world_qa"]}))


def test_both_stages_end_to_end(profile):
    """One first stage serves a sentence task and question answering, which differ in head and pooler."""
    plan = plans.kronecker(profile)
    records = ensure(plan, profile)
    assert not records.missing and len(records) == len({spec_hash(spec) for spec in plan})
    text = [record for record in records if isinstance(record.spec, TextDistillationSpec)]
    assert len(text) == 1 and set(text[0]["after"]) == {"embedding", "hidden_states", "attention_scores"}
    assert text[0]["after"]["embedding"] < text[0]["before"]["embedding"]
    first, before = first_stage_frame(text, profile).set_index("term"), text[0]["before"]
    loss = before["embedding"] + 4 * (before["hidden_states"] + before["attention_scores"])  # summed over four layers
    assert first["share of loss (%)"].sum() == pytest.approx(100)
    assert first.loc["hidden_states", "share of loss (%)"] == pytest.approx(400 * before["hidden_states"] / loss)
    assert text[0]["train_examples"] >= 32 and text[0]["compression"]["initialisation"] == "nearest"
    assert text[0].data and text[0].data != records[1].data
    runs = [record for record in records if record.spec.kind == "train" and record.spec.compressor]
    assert {(record.spec.task, variant_of(record.spec)) for record in runs} >= {
        ("world_sentiment", "full"), ("world_qa", "full"), ("world_sentiment", "no_text"),
    }  # fmt: skip
    for record in runs:
        assert record["compression"]["ratio"] > 5 and 0 <= record["score"] <= 100
        assert not record.spec.training.freeze_embeddings and record.spec.teacher is not None
    assert not (profile.results / "checkpoints").exists() or not list((profile.results / "checkpoints").iterdir())


def test_the_second_stage_begins_with_the_weights_of_the_first(profile):
    spec = task_stage(profile, "world_sentiment", 1, "kron8")
    ensure([text_stage(profile, "kron8")], profile)
    model, _ = experiments._initial(spec, profile)
    text, _ = load_compressed(weights_folder(profile, text_stage(profile, "kron8")))
    fresh = load_model("tiny-bert", "classification", 2, seed=1)
    weights, begun = text.state_dict(), base_model(model).state_dict()
    assert begun.keys() == weights.keys() and kronecker_modules(model)
    for name, value in begun.items():
        if name.startswith("pooler"):
            assert torch.equal(value, base_model(fresh).state_dict()[name])
        else:
            assert torch.equal(value, weights[name]), name
    assert torch.equal(model.classifier.weight, fresh.classifier.weight), "the head is this seed's own"


def test_the_first_stages_weights_are_made_again_when_only_the_record_travelled(profile):
    spec = text_stage(profile, "kron8")
    ensure([spec], profile)
    first, _ = experiments.finished_model(profile, spec)
    for file in weights_folder(profile, spec).iterdir():
        file.unlink()
    weights_folder(profile, spec).rmdir()
    again, _ = experiments.finished_model(profile, spec)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())


def test_a_model_that_was_moved_while_its_loss_was_measured_still_trains(profile, monkeypatch):
    """To a GPU, which makes new parameters; under inference_mode those would take no gradients."""
    moved = []

    def to_another_device(model, *_):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        moved.append(model)
        return model

    monkeypatch.setattr(torch.nn.Module, "to", to_another_device)
    experiments.run_text_distillation(text_stage(profile, "kron8"), profile)
    assert moved and not any(parameter.is_inference() for model in moved for parameter in model.parameters())


def test_an_encoder_of_another_kind_does_not_go_under_the_head(small_model):
    with pytest.raises(StudyError, match=r"first stage: .* does not fit; give both stages one encoder"):
        under_head(small_model("distilbert").distilbert, small_model("bert"))


@pytest.mark.parametrize(
    ("update", "said"),
    [
        ({"distillation": Distillation(hard=0.0, logits=1.0)}, "has no logits; set hard and logits to 0"),
        ({"tasks": ("world_translation",)}, "'world_translation' is translation"),
        ({"tasks": ("sst3",)}, "unknown task 'sst3'"),
    ],
)
def test_a_first_stage_that_cannot_be_is_one_line(profile, update, said):
    with pytest.raises(StudyError, match=said):
        ensure([text_stage(profile, "kron8").model_copy(update=update)], profile)


def test_specs_survive_json_and_have_names_of_their_own(profile):
    specs = [*plans.kronecker(profile), plans.factorisation(profile), *plans.kronecker_speed(profile)]
    for spec in specs:
        again = parse_spec(spec.model_dump(mode="json"))
        assert again == spec and spec_hash(again) == spec_hash(spec)
    full, without = (task_stage(profile, "world_sentiment", 0, "kron8", variant) for variant in ("full", "no_text"))
    assert len({spec_hash(full), spec_hash(without), spec_hash(text_stage(profile, "kron8"))}) == 3
    assert spec_hash(text_stage(profile, "kron8")) != spec_hash(text_stage(profile, "kron8", nearest=False))


# --- how near, and how fast


def test_errors_fall_with_the_terms_and_ratios_too(profile):
    (record,) = ensure([plans.factorisation(profile).model_copy(update={"shapes": {
        str(terms): configuration("kron8", load_config("tiny-bert")).model_copy(update={"terms": terms})
        for terms in (1, 2, 4)
    }})], profile)  # fmt: skip
    found = [record["configurations"][terms] for terms in ("1", "2", "4")]
    for kind in ("attention", "ffn", "embedding"):
        errors = [one["factors"][kind]["error"] for one in found]
        assert errors == sorted(errors, reverse=True)
    assert found[2]["factors"]["attention"]["error"] < 1e-6, "four terms of 2 × 2 are exact"
    assert found[0]["ratio"] > found[1]["ratio"] > found[2]["ratio"]


def test_speed_runs_measure_operations_and_traffic(profile):
    (record,) = ensure(plans.kronecker_speed(profile), profile)
    models = record["models"]
    assert set(models) == {"dense", "kron8"} and len(record["rows"]) == 2
    assert models["kron8"]["flops"] < models["dense"]["flops"]
    assert models["kron8"]["parameters"] < models["dense"]["parameters"] / 6
    speed = speed_frame([record])
    cost = cost_frame(speed, profile).set_index("model")
    config = ARCHITECTURES["tiny"]
    weights = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    maps = config.num_hidden_layers * weights + 2 * config.hidden_size  # the head marks two ends
    assert cost.loc["dense", "linear"] == 2 * profile.kronecker.speed_length * maps
    assert (cost["flops"] - cost["linear"]).nunique() == 1, "attention's own products stay as they are"
    assert cost["published"].isna().all(), "printed for another shape"


def test_traffic_is_what_the_operations_read_and_write():
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Embedding(100, 8), nn.Linear(8, 4, bias=False)
            self.config = None

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.linear(self.table(input_ids)).transpose(1, 2)

    tokens, wide, narrow, weight = 2 * 5, 8 * 4, 4 * 4, 8 * 4 * 4
    lookup, product = tokens * (8 + 2 * wide), tokens * wide + weight + tokens * narrow
    assert model_cost.memory_traffic(Toy(), 2, 5) == lookup + product


def test_training_speed_refuses_what_it_would_not_build():
    model = LatencyModel(architecture="tiny", kronecker=configuration("kron8", ARCHITECTURES["tiny"]))
    spec = TrainingSpeedSpec(models={"k": model}, dense="k", batch=1, length=8, threads=1, rounds=1, bf16=False)
    with pytest.raises(StudyError, match="'k' is more than a model with layers dropped; leave it out"):
        experiments.run_training_speed(spec)


@pytest.mark.parametrize("step", [1, 3])
def test_a_first_stage_that_was_stopped_ends_as_an_undisturbed_one(profile_file, monkeypatch, step):
    profile = load_profile(profile_file(**{"training.checkpoint_minutes": 1e-9}))
    spec = text_stage(profile, "kron8")
    expected = experiments.run_text_distillation(spec, profile)
    weights = load_compressed(weights_folder(profile, spec))[0].state_dict()

    def stop(self, progress: float, trainer) -> None:
        if trainer.state.global_step >= step:
            raise KeyboardInterrupt

    elsewhere = load_profile(
        profile_file(results=str(profile.results / "again"), **{"training.checkpoint_minutes": 1e-9})
    )
    with monkeypatch.context() as patch:
        patch.setattr(Kronecker, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            experiments.run_text_distillation(spec, elsewhere)
    assert not weights_folder(elsewhere, spec).exists()
    found = experiments.run_text_distillation(spec, elsewhere)
    assert found["training"]["resumed"] == step and found["training"]["loss"] == expected["training"]["loss"]
    assert (found["before"], found["after"]) == (expected["before"], expected["after"])
    again = load_compressed(weights_folder(elsewhere, spec))[0].state_dict()
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


# --- what the notebook says of it


def test_published_numbers_are_complete_and_shares_follow_from_them():
    frame = published("tahaei2021")
    assert len(frame) == 101 and set(frame["evidence"]) == {"paper"}
    shares = published_retained().set_index(["configuration", "task"])["retained"]
    assert shares["kron8", "squad_v1"] == pytest.approx(100 * 86.3 / 88)
    assert shares["kron21", "cola"] == pytest.approx(100 * 28.3 / 52.8)
    assert shares["kron19", "sst2"] == pytest.approx(100 * 89.2 / 93.4), "v1's score over the later dense one"
    assert not shares.index.duplicated().any() and len(shares) == 3 * 10
    speeds = published("tahaei2021", metric="speedup", method="kron8")["value"]
    assert (speeds.min(), speeds.max()) == (0.74, 0.94)


def scores(**retained: float) -> pd.DataFrame:
    """Rows of ``kronecker_frame``: two seeds of SST-2, MRPC and RTE with these shares of a dense score of 80."""
    rows = []
    for task in ("sst2", "mrpc", "rte"):
        for seed in (0, 1):
            about = {"task": task, "title": TASKS[task].title, "seed": seed}
            about |= {"floor": 60.0, "informative": True, "loss left (%)": 97.0}
            dense = {"score": 80.0, "retained": 100.0, "paper retained": 100.0}
            rows.append(about | {"configuration": "dense", "variant": "dense"} | dense)
            for key, value in retained.items():
                name, _, variant = key.partition("_")
                shares = {"score": 0.8 * value, "retained": value, "paper retained": value}
                rows.append(about | {"configuration": name, "variant": variant} | shares)
    return pd.DataFrame(rows)


def timed(kron8: float, kron21: float) -> pd.DataFrame:
    common = {"cpu": "a CPU", "batch": 1, "length": 128, "threads": 2, "disturbed": False}
    return pd.DataFrame([
        common | {"engine": engine, "model": model} | dict.fromkeys(("ratio_to_dense", "ratio_q1", "ratio_q3"), ratio)
        for engine in ("e0", "e1") for model, ratio in (("dense", 1.0), ("kron8", kron8), ("kron21", kron21))
    ])  # fmt: skip


def test_verdicts_follow_the_numbers():
    rows = scores(kron8_full=99.5, kron8_no_text=90.0, kron8_no_teacher=99.9, kron21_full=95.0)
    found = claims_of.verdicts(rows, timed(0.8, 1.2)).set_index("claim")["verdict"]
    assert dict(zip(found.index.str.split(" ").str[:4].str.join(" "), found, strict=True)) == {
        "KroneckerBERT8 is 7.8 times": "does not hold here",
        "KroneckerBERT19 is 19.3 times": "holds",
        "KroneckerBERT21 is 21 times": "holds",
        "KroneckerBERT8 is slower than": "holds",
        "KroneckerBERT19 is faster than": "holds",
        "KroneckerBERT8 keeps its shares": "holds",
        "KroneckerBERT21 keeps its shares": "holds in part",  # of MRPC's F1 99.1 % are printed
        "KroneckerBERT8 retains more than": "holds",
        "KroneckerBERT21 retains more than": "does not hold here",
        "KroneckerBERT8 keeps that share": NOT_RUN,
        "KroneckerBERT21 keeps that share": NOT_RUN,
        "The first stage is": "holds",
        "The teacher helps in": "does not hold here",
    }
    dull = rows.assign(informative=rows["task"] == "rte")
    judged = claims_of.verdicts(dull, timed(0.8, 1.2)).set_index("claim")
    kept = judged.loc["KroneckerBERT21 retains more than 99 % on most GLUE tasks (not claimed)"]
    assert kept["ours"] == "0 of 1 tasks" and kept["evidence"].endswith("close to one answer for all: SST-2, MRPC")
    useless = rows.assign(floor=75.0)
    row = claims_of.verdicts(useless, timed(0.8, 1.2)).set_index("claim").loc["The first stage is worth much"]
    assert row["evidence"].endswith(
        "without it 6 of 6 do no better than one answer for all: their training loss ended at 97 % of its start or "
        "more, at the learning rate of the others"
    )
    assert (row["ours"], row["verdict"]) == ("nothing to compare", "not testable here")
    learnt = claims_of.verdicts(useless.assign(**{"loss left (%)": 30.0}), timed(0.8, 1.2)).set_index("claim")
    assert learnt.loc["The first stage is worth much", "verdict"] == "holds", "it learnt, and scores badly without it"
    mixed = timed(0.8, 1.2)
    for column in ("ratio_to_dense", "ratio_q1", "ratio_q3"):
        mixed.loc[mixed["engine"] == "e1", column] = [1.0, 1.1, 0.9]
    both = claims_of.verdicts(rows, mixed).set_index("claim")["verdict"]
    assert both["KroneckerBERT8 is slower than BERT-base"] == "holds in part"
    assert both["KroneckerBERT19 is faster than BERT-base on a CPU"] == "holds in part"
    open_ = timed(0.9, 1.2)
    open_.loc[(open_["engine"] == "e1") & (open_["model"] == "kron8"), "ratio_q3"] = 1.1
    slower = claims_of.verdicts(rows, open_).set_index("claim").loc["KroneckerBERT8 is slower than BERT-base"]
    assert slower["verdict"] == "holds" and "slower on 1 of them, 1 cannot tell" in slower["evidence"]
    other = claims_of.verdicts(rows, timed(1.1, 0.9)).set_index("claim")["verdict"]
    assert other["KroneckerBERT8 is slower than BERT-base"] == "does not hold here"
    assert other["KroneckerBERT19 is faster than BERT-base on a CPU"] == "does not hold here"


def latency(engine: str, spread: float, batch: int = 1) -> Record:
    """A run of BERT-base in 100 ms and of KroneckerBERT8 in 50, quartiles of the dense one ``spread`` ms apart."""
    bert = LatencyModel(architecture="bert-base-uncased")
    models = {"dense": bert, "kron8": bert.model_copy(update={"kronecker": PUBLISHED["kron8"]})}
    spec = LatencySpec(models=models, dense="dense", engines=(engine,), batch=batch, length=128, threads=2, rounds=3)
    half = spread / 2
    rows = [
        {"name": f"{model}/{engine}", "model": model, "engine": engine, "batch": batch, "length": 128, "threads": 2,
         "median_ms": ms, "q1_ms": ms - half, "q3_ms": ms + half, "ratio_to_dense": 100 / ms, "size_bytes": 1}
        for model, ms, half in (("dense", 100.0, half), ("kron8", 50.0, 25.0))
    ]  # fmt: skip
    costs = {
        "dense": {"layers": 12, "parameters": 8, "flops": 20e9, "traffic_bytes": 4e9},
        "kron8": {"layers": 12, "parameters": 1, "flops": 5e9, "traffic_bytes": 3e9},
    }
    return finished(spec, rows=rows, models=costs, agreement={row["name"]: {"relative_diff": 0.0} for row in rows})


def test_rates_are_shares_of_the_dense_models_on_the_same_engine():
    frame = speed_frame([latency("a", 20.0), latency("b", 20.2)]).set_index(["engine", "model"])
    assert frame.loc[("a", "dense"), ["GFLOP/s", "GB/s"]].tolist() == [200, 40]
    row = frame.loc[("a", "kron8")]
    assert (row["GFLOP/s"], row["GFLOP/s of dense (%)"]) == (100, 50) and row["GB/s of dense (%)"] == 150
    assert frame["disturbed"].tolist() == [False, False, True, True], "by the dense model's quartiles alone"
    assert speed_frame([]).empty


@pytest.mark.parametrize(
    ("operations", "traffic", "key"),
    [(50, 10, "arithmetic"), (50, 90, "arithmetic"), (49, 50, "traffic"), (49, 49, "neither")],
)
def test_what_may_hold_a_model_up_follows_its_rates(operations, traffic, key):
    """Bytes are measured by the most that any row moves on the processor: the dense model is no ceiling."""
    row = {"model": "kron8", "precision": "fp32", "disturbed": False, "cpu": "a CPU"}
    row |= {"GFLOP/s of dense (%)": operations, "GB/s": traffic}
    rest = [row | change for change in ({"model": "dense"}, {"precision": "int8"}, {"disturbed": True})]
    rest += [rest[0] | {"GB/s": 100.0}, rest[0] | {"GB/s": 1000.0, "cpu": "another"}]
    assert {name: len(rows) for name, rows in bounds(pd.DataFrame([row, *rest])).items() if len(rows)} == {key: 1}


def test_published_operations_stand_beside_what_they_were_printed_for():
    profile = load_profile("quick")
    cost = cost_frame(speed_frame([latency("a", 1.0), latency("a", 1.0, batch=2)]), profile).set_index(
        ["batch", "model"]
    )
    assert cost.loc[1, "published"].tolist() == ["21.7, 22", "5.2, 5.5"] and cost.loc[2, "published"].isna().all()
    attention = cost["flops"] - cost["linear"]
    assert set(attention.loc[1]) == {12 * 2 * 2 * 768 * 128**2} and set(attention.loc[2]) == {2 * attention.iloc[0]}
    assert cost.loc[(1, "kron8"), ["FLOPs ÷", "FLOPs per byte"]].tolist() == pytest.approx([4, 5 / 3])


def test_disturbed_runs_do_not_judge_speed():
    speed = timed(0.8, 1.2)
    noisy = speed["engine"] == "e1"
    speed.loc[noisy & (speed["model"] != "dense"), "ratio_to_dense"] = [3.0, 0.5]
    claims = ["KroneckerBERT8 is slower than BERT-base", "KroneckerBERT19 is faster than BERT-base on a CPU"]
    found = claims_of.verdicts(scores(), speed.assign(disturbed=noisy)).set_index("claim").loc[claims]
    assert found["verdict"].tolist() == ["holds", "holds"]
    assert found["ours"].tolist() == ["0.80 to 0.80 ×", "1.20 to 1.20 ×"]
    assert (
        found["evidence"]
        .str.contains("left out, the dense model's quartiles more than 20 % of its median apart: e1")
        .all()
    )
    starts = ("1 engine on", "1 of 1 reach the bound of 1.00 ×: 1 engine on")
    assert all(text.startswith(start) for text, start in zip(found["evidence"], starts, strict=True))
    found = claims_of.verdicts(scores(), speed.assign(disturbed=True)).set_index("claim").loc[claims]
    assert set(found["verdict"]) == {"cannot tell: every run was disturbed"}
    assert found["evidence"].str.endswith("apart: e0, e1").all()


def test_without_runs_only_the_sizes_are_decided():
    found = claims_of.verdicts(scores(), pd.DataFrame())
    assert set(found[found["check"] != "size"]["ours"]) == {NOT_RUN}
    assert found[found["check"] == "size"]["verdict"].tolist() == ["does not hold here", "holds", "holds"]


def test_ablations_are_compared_where_all_are_finished():
    rows = scores(kron8_full=99.0, kron8_no_text=90.0)
    rows = rows[~((rows["task"] == "rte") & (rows["seed"] == 1) & (rows["variant"] == "no_text"))]
    kept = complete(rows[rows["configuration"] == "kron8"], ["full", "no_text"])
    assert len(kept) == 10 and not ((kept["task"] == "rte") & (kept["seed"] == 1)).any()


def test_what_a_part_of_the_training_is_worth_is_paired_by_task_and_seed():
    """A seed that lacks one ablation still counts for the others; the dense model and one answer for all stand by."""
    rows = scores(kron8_full=90.0, kron8_no_text=85.0, kron8_no_teacher=88.0).assign(floor=60.0)
    rows = rows[rows["task"] == "rte"].reset_index(drop=True)
    second = (rows["seed"] == 1) & (rows["configuration"] == "kron8")
    rows.loc[second & (rows["variant"] == "no_text"), "score"] += 2
    rows = rows[~(second & (rows["variant"] == "no_teacher"))]
    table = ablation_frame(rows, "kron8").set_index("variant")
    whole = rows[(rows["configuration"] == "kron8") & (rows["variant"] == "full")]
    lacking = rows[(rows["configuration"] == "kron8") & (rows["variant"] == "no_text")]
    assert table.loc["no_text", "n"] == len(whole) and table.loc["no_teacher", "n"] == len(whole) - 1
    assert table.loc["no_text", "points"] == pytest.approx(lacking["score"].mean() - whole["score"].mean())
    assert table.loc["floor", "points"] == pytest.approx(60 - whole["score"].mean())
    assert table.loc["dense", "points"] > 0 and "full" not in table.index
    assert ablation_frame(rows[rows["configuration"] == "dense"], "kron8").empty


def test_a_share_beside_the_paper_is_one_of_the_papers_metric():
    """GLUE's table has F1 on MRPC: an accuracy 20 % lower and an F1 5 % lower are 5 % lost there."""
    profile = load_profile("study")
    student = task_stage(profile, "mrpc", 0, "kron8")
    runs = [finished(spec, score=score, f1=f1, compression={"ratio": 8.0}, model={"parameters": 8, "size_bytes": 32})
            for spec, score, f1 in ((dense_spec(profile, "mrpc", 0), 80.0, 90.0), (student, 64.0, 85.5))]  # fmt: skip
    floor = finished(MajoritySpec(task="mrpc", data="local"), score=60.0, f1=81.0)
    row = kronecker_frame([*runs, floor], profile).set_index("configuration").loc["kron8"]
    assert (row["retained"], row["paper retained"], row["floor"]) == (80.0, pytest.approx(95.0), 60.0)
    assert row["floor retained"] == pytest.approx(90.0) and np.isnan(row["loss left (%)"])


def test_frames_of_an_unfinished_study(profile):
    dense = ensure([dense_spec(profile, "world_sentiment", 0)], profile)
    frame = kronecker_frame(dense, profile)
    assert frame["configuration"].tolist() == ["dense"] and frame["retained"].tolist() == [100.0]
    assert first_stage_frame(dense, profile).empty and loss_curves(dense, profile).empty and error_frame([]).empty
    with pytest.raises(StudyError, match="no training run is finished yet"):
        kronecker_frame([], profile)
