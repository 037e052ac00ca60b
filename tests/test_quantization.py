"""Full quantisation (oracle check 14): the rounding itself, what it covers, storage, training, and what goes wrong."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import padded_batch, small_profile
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib import model_cost
from lib.batches import TrainingData
from lib.compressors import CompressorSpec, make_compressor
from lib.config import StudyError, load_profile
from lib.experiments import run_training
from lib.labels import label
from lib.plans.fullyqt import dense_translation
from lib.quantized_layers import (
    PARTS,
    QuantizedLayerNorm,
    QuantizedSoftmax,
    Quantizing,
    freeze_weights,
    quantize_model,
    ranges,
)
from lib.quantized_storage import pack, stored_bytes, unpack
from lib.quantizers import RunningRange, Switch, decode, encode, fake_quantize, step_size, weight_range
from lib.runs import ensure
from lib.surgery import load_compressed, save_compressed
from lib.training import StudyCallback
from lib.translation import TranslationModel, TranslationShape, collate_pairs, new_model, train_vocabulary
from lib.translation_runs import finished_translation, load_translation, run_translation, save_translation

BITS = (8, 6, 4)
each_bits = pytest.mark.parametrize("bits", BITS)


def range_of(*ends: float) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = (torch.tensor(end, dtype=torch.float64) for end in ends)
    return low, high


def values(size: int = 20000, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def translation_model() -> TranslationModel:
    shape = TranslationShape(vocabulary=300, hidden_size=16, layers=2, heads=2, units=24)
    return new_model(shape, 40, 0.0, 0.1, seed=2).eval()


def batch_of_pairs(vocabulary: int = 40) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(4)
    ids, labels = (torch.randint(3, vocabulary, (4, 7), generator=draw) for _ in range(2))
    ids[1, 5:], labels[2, 3:] = 0, -100
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def calibrated(model, batch, **settings) -> Switch:
    """``model`` quantised in place, its ranges taken from ``batch``."""
    switch = Switch(observing=True)
    quantize_model(model, Quantizing(**{"bits": 8} | settings), switch)
    with torch.no_grad():
        model(**batch)
    switch.observing, switch.quantizing = False, True
    return switch


# -- the rounding -----------------------------------------------------------------------------------------------------


@each_bits
def test_error_is_half_a_step_at_most_and_ends_are_exact(bits):
    low, high = range_of(-1.3, 2.1)
    x = values().clamp(-1.3, 2.1)
    found, step = fake_quantize(x, low, high, bits), (2.1 + 1.3) / (2**bits - 1)
    assert float((found - x).abs().max()) <= step / 2 * (1 + 1e-9)
    assert float((found - x).abs().max()) > 0.45 * step  # it does round
    assert len(found.unique()) == 2**bits
    ends = fake_quantize(torch.stack([low, high]), low, high, bits)
    torch.testing.assert_close(ends, torch.stack([low, high]), rtol=1e-14, atol=0)
    outside = fake_quantize(torch.tensor([-9.0, 9.0], dtype=torch.float64), low, high, bits)
    torch.testing.assert_close(outside, ends, rtol=0, atol=0)


@each_bits
def test_rounding_twice_is_rounding_once_and_codes_say_the_same(bits):
    low, high = range_of(-0.7, 1.9)
    x = values()
    once = fake_quantize(x, low, high, bits)
    torch.testing.assert_close(fake_quantize(once, low, high, bits), once, rtol=0, atol=0)
    codes = encode(x, low, step_size(low, high, bits), bits)
    assert codes.dtype == torch.uint8 and int(codes.max()) == 2**bits - 1
    assert torch.equal(decode(codes, low, step_size(low, high, bits)), once)


def test_the_gradient_is_one_in_range_and_zero_where_clamped():
    low, high = range_of(-0.5, 0.8)
    x = values().requires_grad_()
    weights = values(seed=1)
    (fake_quantize(x, low, high, 4) * weights).sum().backward()
    inside = ((x >= -0.5) & (x <= 0.8)).detach()
    assert inside.any() and not inside.all()
    torch.testing.assert_close(x.grad, weights * inside, rtol=0, atol=0)


@each_bits
def test_agrees_with_torch_where_zero_points_are_integers(bits):
    step, zero = 0.0625, 2**bits // 3
    low, high = torch.tensor(-zero * step), torch.tensor((2**bits - 1 - zero) * step)
    x = values().float() * high
    x = x[((x / step) % 1 - 0.5).abs() > 1e-3]  # a tie may go either way
    wanted = torch.fake_quantize_per_tensor_affine(x, step, zero, 0, 2**bits - 1)
    assert torch.equal(fake_quantize(x, low, high, bits), wanted)


def test_agrees_with_torch_per_row():
    steps, zeros = torch.tensor([0.5, 0.03125, 2.0]), torch.tensor([3, 100, 255], dtype=torch.int32)
    low, high = (-zeros * steps)[:, None], ((255 - zeros) * steps)[:, None]
    x = values(300).float().view(3, 100) * 40
    x = torch.where(((x / steps[:, None]) % 1 - 0.5).abs() > 1e-3, x, steps[:, None])
    wanted = torch.fake_quantize_per_channel_affine(x, steps, zeros, 0, 0, 255)
    assert torch.equal(fake_quantize(x, low, high, 8), wanted)


def test_a_range_of_one_point_is_that_point():
    point = torch.tensor(0.3)
    assert torch.equal(fake_quantize(torch.full((4,), 0.3), point, point, 8), torch.full((4,), 0.3))


def test_weight_ranges_by_row_and_over_all():
    weight = torch.tensor([[1.0, -2.0, 0.5], [10.0, 20.0, 12.0]])
    assert [end.tolist() for end in weight_range(weight, per_row=True)] == [[[-2.0], [10.0]], [[1.0], [20.0]]]
    assert [end.tolist() for end in weight_range(weight, per_row=False)] == [[[-2.0]], [[20.0]]]
    assert [end.tolist() for end in weight_range(weight[0], per_row=True)] == [[-2.0], [1.0]]
    by_row, over_all = (fake_quantize(weight, *weight_range(weight, rows), 4) for rows in (True, False))
    assert float((by_row - weight).abs().max()) <= 10 / 15 / 2 and float((over_all - weight).abs().max()) > 10 / 15 / 2


def test_running_average_has_its_closed_form():
    one = RunningRange(Switch(), 8, "x").train()
    batches = [values(50, seed) * (seed + 1) for seed in range(6)]
    for batch in batches:
        one(batch)
    for end, found in (("amin", one.low), ("amax", one.high)):
        seen = [float(getattr(batch, end)()) for batch in batches]
        wanted = 0.9**5 * seen[0] + sum(0.1 * 0.9 ** (5 - i) * seen[i] for i in range(1, 6))
        assert float(found) == pytest.approx(wanted, rel=1e-6)
    before = one.low.clone(), one.high.clone()
    one.eval()(1000 * batches[0])
    assert torch.equal(one.low, before[0]) and torch.equal(one.high, before[1]) and one.seen == 6


def test_nothing_is_rounded_before_the_switch_and_nothing_without_a_range():
    switch = Switch()
    one, x = RunningRange(switch, 4, "the place").train(), values().float()
    assert torch.equal(one(x), x)
    switch.quantizing = True
    assert len(one(x).unique()) == 16
    fresh = RunningRange(switch, 4, "the place").eval()
    with pytest.raises(StudyError, match="no calibration data reached the place"):
        fresh(x)


def test_from_zero_holds_the_lower_end():
    one = RunningRange(Switch(), 8, "x", from_zero=True).train()
    one(values().float() + 9)
    assert one.low == 0 and one.high > 9


def test_masked_positions_do_not_count():
    one, x = RunningRange(Switch(), 8, "x").train(), torch.tensor([[1.0, -50.0, 3.0], [2.0, 80.0, -1.0]])
    one(x, torch.tensor([[True, False, True]]))
    assert (float(one.low), float(one.high)) == (-1.0, 3.0)


# -- what is covered --------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Collects both operands of every matrix product; a linear map's second one is its transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.activations: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).split(".")[1]
        if name in ("mm", "bmm", "addmm"):
            first, second = [value for value in tree_leaves(args) if torch.is_tensor(value)][-2:]
            self.activations += [first, second] if name == "bmm" else [first]
            self.weights += [] if name == "bmm" else [second]
        return func(*args, **(kwargs or {}))


def products_off_grid(model, batch, bits: int) -> tuple[int, int]:
    """How many operands there are, and how many take more than 2^bits values (a weight: in some output row)."""
    with torch.no_grad(), Products() as seen:
        model(**batch)
    off = [len(operand.unique()) > 2**bits for operand in seen.activations]
    off += [any(len(row.unique()) > 2**bits for row in operand.T) for operand in seen.weights]
    return len(off), sum(off)


def test_both_sides_of_every_product_of_the_translation_model_are_rounded(translation_model):
    batch = batch_of_pairs()
    total, off = products_off_grid(translation_model, batch, 3)
    assert off == total
    calibrated(translation_model, batch, bits=3)
    total, off = products_off_grid(translation_model, batch, 3)
    # per encoder layer 4 + 2 linear maps and 2 attention products, per decoder layer 8 + 2 and 4, and the output's
    assert total == 2 * (2 * 8 + 2 * 14 + 1) and off == 0


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_both_sides_of_every_product_of_an_encoder_are_rounded(small_model, architecture):
    model, batch = small_model(architecture), padded_batch(architecture)
    calibrated(model, batch, bits=3)
    total, off = products_off_grid(model, batch, 3)
    assert total == 2 * (4 * 8 + 1) and off == 0


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_switched_off_the_model_is_the_dense_one(small_model, architecture):
    model, batch = small_model(architecture), padded_batch(architecture)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        wanted = model(**batch).start_logits[real]
    switch = calibrated(model, batch)
    with torch.no_grad():
        close = model(**batch).start_logits[real]
        switch.quantizing = False
        same = model(**batch).start_logits[real]
    torch.testing.assert_close(same, wanted, atol=2e-5, rtol=1e-4)
    error = float((close - wanted).norm() / wanted.norm())
    assert 1e-4 < error < 0.3


def test_more_bits_are_nearer_and_rows_are_nearer_than_matrices(translation_model):
    batch, dense = batch_of_pairs(), translation_model
    with torch.no_grad():
        dense.encoder_layers[0].ffn.ffn_in.weight[0] *= 30  # one row with a much larger range
        dense.encoder_layers[0].ffn.ffn_in.bias[0] = -1e3  # and no say in the result
        wanted = dense(**batch).logits
    errors = {}
    for settings in ({"bits": 8}, {"bits": 6}, {"bits": 4}, {"bits": 6, "bucketing": False}):
        model = copy.deepcopy(dense)
        calibrated(model, batch, parts=("weights",), **settings)
        with torch.no_grad():
            errors[tuple(settings.values())] = float((model(**batch).logits - wanted).norm())
    assert 0 < errors[8,] < errors[6,] < errors[4,] and errors[6, False] > 2 * errors[6,]


def test_a_part_alone_leaves_the_others_unrounded(translation_model):
    batch, counts = batch_of_pairs(), {}
    for part in PARTS:
        model = copy.deepcopy(translation_model)
        calibrated(model, batch, parts=(part,))
        counts[part] = sum(1 for _ in ranges(model))
    # two encoder and two decoder layers: 2 + 4 attentions, 4 + 6 norms, 4 feed-forward blocks
    assert counts == {"weights": 0, "embeddings": 2, "attention": 6 * 5, "softmax": 6 * 4, "ffn": 4 * 2,
                      "layer_norm": 10 * 4}  # fmt: skip


def test_zero_is_kept_after_relu_and_softmax_and_nowhere_else(translation_model):
    calibrated(translation_model, batch_of_pairs())
    held = {one.name for one in ranges(translation_model) if one.from_zero}
    assert len(held) == 4 + 2 * 6
    assert all("ffn_out, input" in name or "softmax, numerator" in name or "softmax, output" in name for name in held)
    assert all(one.low == 0 for one in ranges(translation_model) if one.from_zero)


def test_the_result_does_not_depend_on_the_batch(translation_model):
    batch = batch_of_pairs()
    calibrated(translation_model, batch)
    with torch.no_grad():
        together = translation_model(**batch).logits
        single = [
            translation_model(**{name: tensor[i : i + 1] for name, tensor in batch.items()}).logits for i in range(4)
        ]
        dense = copy.deepcopy(translation_model)
        dense.study_quantization.switch.quantizing = False
        rounding = float((dense(**batch).logits - together).norm())
    # a sum in another order may round to the next point of a grid, which is all that may differ
    assert float((together - torch.cat(single)).norm()) < 0.2 * rounding


def test_the_steps_of_layer_norm_and_softmax_give_the_usual_result_when_nothing_is_rounded():
    settings, switch = Quantizing(bits=8), Switch()
    norm = torch.nn.LayerNorm(16)
    torch.nn.init.normal_(norm.weight)
    quantised = QuantizedLayerNorm(norm, _weights(settings, switch), _maker(switch))
    x = values(160).float().view(10, 16)
    torch.testing.assert_close(quantised.eval()(x), norm(x))
    softmax, mask = QuantizedSoftmax(settings, _maker(switch)).eval(), torch.arange(16) < 11
    torch.testing.assert_close(softmax(x, mask), x.masked_fill(~mask, -math.inf).softmax(-1))
    torch.testing.assert_close(softmax(x), x.softmax(-1))


def _weights(settings, switch):
    from lib.quantized_layers import Weights

    return Weights(settings, switch)


def _maker(switch):
    return lambda name, from_zero=False: RunningRange(switch, 8, name, from_zero)


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guarded", "bad"), [(True, ""), (False, "quotient")])
def test_a_denominator_rounded_from_zero_divides_by_zero(guarded, bad):
    """One row varies 100 times less than the others: its variance rounds to 0, and the quotient's range to infinity."""
    switch, settings = Switch(watching=True), Quantizing(bits=8, denominator_guard=guarded)
    norm = QuantizedLayerNorm(torch.nn.LayerNorm(16), _weights(settings, switch), _maker(switch)).train()
    x = values(160).float().view(10, 16)
    x[3] /= 100
    norm(x)
    switch.quantizing = True
    assert torch.isfinite(norm(x)).all() == guarded and switch.first_bad == bad
    assert torch.isfinite(norm.quotient.high) == guarded


def test_masked_scores_in_the_range_spoil_it_at_once():
    x, mask = values(64).float().view(4, 16), torch.arange(16) < 11
    for guarded, bad in ((True, ""), (False, "scores")):
        switch = Switch(quantizing=True, watching=True)
        softmax = QuantizedSoftmax(Quantizing(bits=8, mask_guard=guarded), _maker(switch)).train()
        assert torch.isfinite(softmax(x, mask)).all() == guarded and switch.first_bad == bad


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_bits_out_of_range_are_one_line(translation_model, bits):
    compressor = make_compressor(CompressorSpec(name="quantization", settings={"bits": bits}))
    with pytest.raises(StudyError, match=f"bits: found {bits}, expected 2 to 8"):
        compressor.attach(translation_model)


def few_pairs() -> Dataset:
    return Dataset.from_dict({"input_ids": [[4, 5, 2]] * 3, "labels": [[6, 2]] * 3, "length": [5] * 3})


def data(features: Dataset) -> TrainingData:
    names = ["input_ids", "attention_mask"]
    return TrainingData(lambda: features, collate_pairs, names, 0, torch.device("cpu"), False)


def test_ranges_taken_anew_forget_what_training_saw(translation_model):
    """Ranges a hundred times too wide, as training left them, end as those of the data, everything rounded."""
    asked = {"bits": 8, "recalibration_batches": 1, "calibration_batch_size": 3}
    for settings, wide in (({"bits": 8}, True), (asked, False)):
        model = copy.deepcopy(translation_model).train()
        compressor = make_compressor(CompressorSpec(name="quantization", settings=settings))
        compressor.attach(model)
        compressor.use_data(data(few_pairs()))
        compressor.switch.quantizing = True
        for one in ranges(model):
            one.low.fill_(0.0 if one.from_zero else -1e4)
            one.high.fill_(1e4)
            one.seen.fill_(7)
        compressor.finalize(model)
        assert all((one.high == 1e4) == wide and one.seen == (7 if wide else 1) for one in ranges(model))


def test_calibration_on_no_data_is_refused(translation_model):
    pairs = few_pairs()
    asked = {"bits": 8, "calibration_batch_size": 2}
    cases = ((pairs.select([]), 0, "calibration_batches"), (pairs, 3, "calibration_batches"),
             (pairs, 3, "recalibration_batches"))  # fmt: skip
    for features, found, name in cases:
        compressor = make_compressor(CompressorSpec(name="quantization", settings=asked | {name: 2}))
        compressor.attach(copy.deepcopy(translation_model))
        with pytest.raises(StudyError, match=f"2 batches of 2 examples, there are {found} examples"):
            compressor.use_data(data(features))
    idle = make_compressor(CompressorSpec(name="quantization", settings={"bits": 8}))
    idle.attach(translation_model)
    idle.use_data(data(pairs))
    with pytest.raises(StudyError, match="no calibration data reached"):
        idle.finalize(translation_model)


def test_a_model_is_quantised_once(translation_model, small_model):
    calibrated(translation_model, batch_of_pairs())
    with pytest.raises(StudyError, match="quantised already"):
        quantize_model(translation_model, Quantizing(bits=8), Switch())
    with pytest.raises(StudyError, match="XLNet"):
        quantize_model(small_model("xlnet"), Quantizing(bits=8), Switch())
    with pytest.raises(StudyError, match="call finalize first"):
        stored_bytes(translation_model)


# -- storage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_packed_without_gaps(bits):
    codes = torch.randint(0, 2**bits, (7, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == math.ceil(91 * bits / 8)
    assert torch.equal(unpack(packed, bits, codes.shape), codes)


def test_packing_by_hand():
    assert pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist() == [0x12, 0xF0]
    assert pack(torch.tensor([0b000001, 0b100000], dtype=torch.uint8), 6).tolist() == [0b00000110, 0b00000000]


def finished(model, batch, **settings):
    compressor = make_compressor(CompressorSpec(name="quantization", settings={"bits": 8} | settings))
    compressor.attach(model)
    compressor.switch.observing = True
    with torch.no_grad():
        model(**batch)
    return compressor.finalize(model), compressor.summary()


@each_bits
@pytest.mark.parametrize("bucketing", [True, False])
def test_a_stored_translation_model_gives_identical_logits(translation_model, tmp_path, bits, bucketing):
    batch = batch_of_pairs()
    model, summary = finished(translation_model, batch, bits=bits, bucketing=bucketing)
    pairs = Dataset.from_dict({"source": ["a cat"] * 3, "target": ["eine Katze"] * 3})
    save_translation(model, train_vocabulary(pairs, 300), tmp_path)
    loaded, _ = load_translation(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert (tmp_path / "model.safetensors").stat().st_size == summary["stored_bytes"] == model_cost.size_on_disk(loaded)
    again = loaded.train()(**batch).loss  # and it can be trained no further by accident
    assert again.requires_grad and summary["bits"] == bits


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_a_stored_encoder_gives_identical_logits_and_fails_plainly_elsewhere(
    small_model, tokenizer, tmp_path, architecture
):
    batch = padded_batch(architecture)
    model, summary = finished(small_model(architecture), batch, bits=6)
    save_compressed(model, tokenizer, tmp_path)
    loaded, _ = load_compressed(tmp_path)
    with torch.no_grad():
        ours, theirs = model(**batch), loaded(**batch)
    assert torch.equal(ours.start_logits, theirs.start_logits) and torch.equal(ours.end_logits, theirs.end_logits)
    assert (tmp_path / "compressed.safetensors").stat().st_size == summary["stored_bytes"]
    with pytest.raises(OSError, match="load_compressed"):
        type(model).from_pretrained(tmp_path)
    norms = summary["norms"]
    assert list(norms) == [name for name, module in model.named_modules() if isinstance(module, QuantizedLayerNorm)]
    spreads = [high / low for low, high in (norm["denominator"] for norm in norms.values())]
    assert max(spreads) == pytest.approx(summary["denominator_spread"])
    (tmp_path / "quantization.json").write_text('{"format": 1, "bits": 5}')
    with pytest.raises(StudyError, match="save the model again"):
        load_compressed(tmp_path)


def test_eight_bits_are_nearly_four_times_smaller():
    shape = TranslationShape(vocabulary=300, hidden_size=256, layers=1, heads=4, units=512)
    dense = new_model(shape, 300, 0.0, 0.1, seed=0).eval()
    size, sizes = model_cost.size_on_disk(dense), {}
    for bits in BITS:
        _, summary = finished(copy.deepcopy(dense), batch_of_pairs(300), bits=bits)
        sizes[bits] = size / summary["stored_bytes"]
        weights = summary["quantized_weights"] + summary["float_weights"]
        assert weights == sum(parameter.numel() for parameter in dense.parameters())
        assert summary["float_weights"] == sum(p.numel() for n, p in dense.named_parameters() if n.endswith("bias"))
    assert 3.7 < sizes[8] < 4 and 4.8 < sizes[6] < 5.33 and 7 < sizes[4] < 8


# -- training ---------------------------------------------------------------------------------------------------------


def settings_of(compressor) -> CompressorSpec:
    return CompressorSpec(name="quantization", settings=compressor)


def test_the_delay_is_a_share_of_training(translation_model):
    compressor = make_compressor(settings_of({"bits": 8, "delay": 0.3}))
    compressor.attach(translation_model)
    for progress, on in ((0.0, False), (0.29, False), (0.3, True), (1.0, True)):
        compressor.step(progress, None)
        assert compressor.switch.quantizing is on


def test_every_weight_learns_through_its_rounding(translation_model):
    """Weights are never clamped, so the gradient of each is that of its rounded value."""
    linear, x = translation_model.encoder_layers[0].ffn.ffn_in, values(32).float().view(2, 16)
    rounded = fake_quantize(linear.weight.detach(), *weight_range(linear.weight, True), 4).requires_grad_()
    F.linear(x, rounded, linear.bias).square().sum().backward()
    calibrated(translation_model, batch_of_pairs(), bits=4, parts=("weights",))
    translation_model.encoder_layers[0].ffn.ffn_in(x).square().sum().backward()
    torch.testing.assert_close(linear.weight.grad, rounded.grad)
    assert (rounded.grad != 0).all()


def translation_specs(profile):
    """The dense model, and the quantised ones that begin with it."""
    dense = dense_translation(profile, "world_translation", 0)
    post = {"bits": 8, "calibration_batches": 2, "calibration_batch_size": 8}
    untrained = dense.training.model_copy(update={"epochs": 0})
    after = dense.model_copy(update={"start": dense, "training": untrained, "compressor": settings_of(post)})
    aware = dense.model_copy(update={"start": dense, "compressor": settings_of({"bits": 6, "delay": 0.25})})
    return dense, after, aware


def test_translation_runs_post_training_and_aware(profile_file):
    profile = load_profile(profile_file())
    specs = translation_specs(profile)
    assert [label(spec) for spec in specs] == [
        "world_translation_dense_seed0", "world_translation_quantization_8bit_seed0",
        "world_translation_quantization_6bit_seed0",
    ]  # fmt: skip
    dense, after, aware = ensure(specs, profile)
    assert "training" not in after.result and aware["training"]["steps"] == 4
    assert after["compression"]["stored_bytes"] == after["model"]["size_bytes"] < dense["model"]["size_bytes"]
    assert aware["model"]["size_bytes"] < after["model"]["size_bytes"]
    first, second = (finished_translation(profile, specs[1])[0].state_dict() for _ in range(2))  # made, then loaded
    assert all(torch.equal(first[name], second[name]) for name in first | second)


def test_the_naive_variant_diverges_and_its_record_says_where(profile_file):
    profile = load_profile(profile_file())
    dense = dense_translation(profile, "world_translation", 0)
    naive = {"bits": 8, "mask_guard": False, "denominator_guard": False, "watch": True}
    record = ensure([dense.model_copy(update={"compressor": settings_of(naive)})], profile)[0]
    assert record["score"] == 0 and "model" not in record.result
    assert record["diverged"] == {"place": "encoder_layers.0.attention.softmax, scores", "progress": 0.0}
    assert not list((profile.results / "checkpoints").iterdir())


def test_interrupted_quantised_training_goes_on_exactly(tmp_path, profile_file, monkeypatch):
    whole, cut = (
        load_profile(profile_file(name, results=str(tmp_path / name), **{"training.checkpoint_minutes": 1e-6}))
        for name in ("whole", "cut")
    )
    spec = dense_translation(whole, "world_translation", 0, epochs=2)
    spec = spec.model_copy(update={"compressor": settings_of({"bits": 6, "delay": 0.3})})
    reference, _ = finished_translation(whole, spec)
    end = StudyCallback.on_step_end

    def stop(self, args, state, control, **rest):
        if state.global_step == 5:
            raise KeyboardInterrupt
        return end(self, args, state, control, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(StudyCallback, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            run_translation(spec, cut)
    assert run_translation(spec, cut, keep_weights=True)["training"]["resumed"] == 4
    resumed, _ = finished_translation(cut, spec)
    pairs = zip(reference.state_dict().items(), resumed.state_dict().values(), strict=True)
    for (name, a), b in pairs:
        assert torch.equal(a, b), name


def test_bert_question_answering_post_training_and_aware(tmp_path, profile_file):
    values = small_profile(tmp_path)["tasks"]["world_sentiment"] | {"max_length": 64, "stride": 8, "train_examples": 16}
    profile = load_profile(profile_file(**{"tasks.world_qa": values | {"eval_examples": 8}}))
    from lib.specs import dense_spec

    dense = dense_spec(profile, "world_qa", 0)
    post = {"bits": 8, "calibration_batches": 2, "calibration_batch_size": 4}
    untrained = dense.training.model_copy(update={"epochs": 0, "precision": "bf16"})
    after = dense.model_copy(update={"start": dense, "training": untrained, "compressor": settings_of(post)})
    aware = dense.model_copy(update={"start": dense, "compressor": settings_of({"bits": 4})})
    for spec, bits in ((after, 8), (aware, 4)):
        result = run_training(spec, profile)
        assert 0 <= result["score"] <= 100 and result["compression"]["bits"] == bits
        assert result["model"]["size_bytes"] == result["compression"]["stored_bytes"]


def test_weights_are_frozen_on_their_grid(translation_model):
    batch = batch_of_pairs()
    switch = calibrated(translation_model, batch, bits=4)
    with torch.no_grad():
        rounded = translation_model(**batch).logits
        grids = freeze_weights(translation_model)
        assert switch.frozen and torch.equal(translation_model(**batch).logits, rounded)
    weight = translation_model.encoder_layers[0].ffn.ffn_in.weight
    low, step = grids["encoder_layers.0.ffn.ffn_in.weight"]
    codes = (weight - low) / step
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert codes.min().item() == 0 and round(codes.max().item()) == 15
