"""The translation model, its vocabulary, search, training and runs."""

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from lib.config import ROOT, StudyError, load_profile
from lib.data import load_task
from lib.labels import label
from lib.plans import make_plan
from lib.plans.fullyqt import dense_translation
from lib.runs import ensure
from lib.search import search, translate
from lib.specs import parse_spec
from lib.translation import (
    END_ID,
    IGNORED,
    PAD_ID,
    START_ID,
    TranslationModel,
    TranslationShape,
    collate_pairs,
    encode_pairs,
    new_model,
    positions,
    shifted,
    train_vocabulary,
)
from lib.translation_runs import finished_translation, load_translation, run_translation, save_translation

SHAPE = TranslationShape(vocabulary=300, hidden_size=16, layers=2, heads=2, units=24)
VOCABULARY = 12


@pytest.fixture
def model() -> TranslationModel:
    """Two small layers on each side over 12 tokens, with wide random weights, in eval mode."""
    made = new_model(SHAPE, VOCABULARY, 0.0, 0.1, seed=2).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.mul_(1.0 if name.startswith("embedding") else 2.0)
    return made


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    return load_task("world_translation", "embedded", train_examples=200)["train"]


def sources(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((len(lengths), max(lengths)), PAD_ID)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(row))
    return ids, (ids != PAD_ID).long()


def log_probabilities(model: TranslationModel, ids: torch.Tensor, target: list[int]) -> torch.Tensor:
    """Of every target token, without any cache, (tokens,)."""
    with torch.no_grad():
        inputs = torch.tensor([[START_ID, *target[:-1]]])
        output = model(ids[None], torch.ones_like(ids)[None], decoder_input_ids=inputs)
    return output.logits[0].log_softmax(-1)[range(len(target)), target]


def test_positions_are_the_papers_sinusoids():
    table = positions(50, 8)
    assert table.shape == (50, 8)
    for place, pair in ((0, 0), (7, 1), (49, 3)):
        angle = torch.tensor(place / 10_000 ** (2 * pair / 8))
        torch.testing.assert_close(table[place, 2 * pair : 2 * pair + 2], torch.stack([angle.sin(), angle.cos()]))
    torch.testing.assert_close(positions(3, 8, first=5), table[5:8])


def test_padding_changes_nothing(model):
    ids, mask = sources(7, 4)
    labels = torch.tensor([[5, 6, 7, END_ID], [8, END_ID, IGNORED, IGNORED]])
    together = model(ids, mask, labels=labels)
    alone = [model(ids[1:, :4], mask[1:, :4], labels=labels[1:, :2]), model(ids[:1], mask[:1], labels=labels[:1])]
    torch.testing.assert_close(together.logits, torch.cat([alone[1].logits, alone[0].logits]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.loss, (4 * alone[1].loss + 2 * alone[0].loss) / 6)


def test_the_target_sees_no_later_token(model):
    ids, mask = sources(5)
    inputs = torch.tensor([[START_ID, 4, 5, 6]])
    first = model(ids, mask, decoder_input_ids=inputs).logits
    inputs[0, 3] = 9
    second = model(ids, mask, decoder_input_ids=inputs).logits
    torch.testing.assert_close(first[:, :3], second[:, :3])
    assert not torch.allclose(first[:, 3], second[:, 3])


def test_the_loss_is_the_smoothed_cross_entropy(model):
    ids, mask = sources(5)
    labels = torch.tensor([[4, 7, END_ID, IGNORED]])
    output = model(ids, mask, labels=labels)
    inputs = shifted(labels)
    assert inputs.tolist() == [[START_ID, 4, 7, END_ID]]
    logits = model(ids, mask, decoder_input_ids=inputs).logits[0, :3].log_softmax(-1)
    wanted = -0.9 * logits[range(3), [4, 7, END_ID]] - 0.1 * logits.mean(-1)
    torch.testing.assert_close(output.loss, wanted.mean())


def test_the_same_seed_gives_the_same_model():
    weights = [new_model(SHAPE, VOCABULARY, 0.0, 0.0, seed).embedding.weight for seed in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_one_beam_is_greedy_search_without_a_cache(model):
    ids, mask = sources(6, 3, 5)
    found, scores = search(model, ids, mask, beams=1, max_length=9)
    for row, length in enumerate((6, 3, 5)):
        target: list[int] = []
        while len(target) < 9 and (not target or target[-1] != END_ID):
            inputs = torch.tensor([[START_ID, *target]])
            source = ids[row, None, :length]
            with torch.no_grad():
                logits = model(source, torch.ones_like(source), decoder_input_ids=inputs).logits
            logits[0, -1, PAD_ID] = float("-inf")
            target.append(int(logits[0, -1].argmax()))
        assert found[row].tolist()[: len(target)] == target
        assert set(found[row].tolist()[len(target) :]) <= {PAD_ID}
        torch.testing.assert_close(scores[row], log_probabilities(model, ids[row, :length], target).mean())


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all_hypotheses(model, alpha):
    ids, mask = sources(4)
    tokens = [token for token in range(VOCABULARY) if token != PAD_ID]
    finished = [[*start, END_ID] for n in (0, 1, 2) for start in itertools.product(tokens, repeat=n)
                if END_ID not in start]  # fmt: skip
    cut = [list(t) for t in itertools.product(tokens, repeat=3) if END_ID not in t]
    scored = []
    for target in finished + cut:
        scored.append((float(log_probabilities(model, ids[0], target).sum()) / len(target) ** alpha, target))
    best = max(scored)
    found, score = search(model, ids, mask, beams=1400, max_length=3, length_penalty=alpha)
    assert [token for token in found[0].tolist() if token != PAD_ID] == best[1]
    assert float(score[0]) == pytest.approx(best[0], abs=1e-4)


def test_beam_search_scores_what_it_returns_and_beats_greedy(model):
    lengths = (6, 3, 5, 6, 4, 7, 2, 8)
    ids, mask = sources(*lengths)
    greedy, greedy_scores = search(model, ids, mask, 1, 8, length_penalty=0.0)
    found, scores = search(model, ids, mask, 4, 8, length_penalty=0.0)
    assert (scores >= greedy_scores - 1e-4).all() and (scores > greedy_scores + 1e-4).any()
    for row, length in enumerate(lengths):
        target = [token for token in found[row].tolist() if token != PAD_ID]
        torch.testing.assert_close(scores[row], log_probabilities(model, ids[row, :length], target).sum())
    assert greedy.shape[1] <= 8
    with pytest.raises(StudyError, match="beams: found 0"):
        search(model, ids, mask, 0, 8)


def test_vocabulary_is_reversible_repeatable_and_ends_sentences(pairs):
    first, second = train_vocabulary(pairs, 400), train_vocabulary(pairs, 400)
    assert first.get_vocab() == second.get_vocab() and len(first) <= 400
    assert [first.pad_token_id, first.bos_token_id, first.eos_token_id] == [PAD_ID, START_ID, END_ID]
    for text in (*pairs["target"][:20], "Größe, 漢字 & «ça»!"):
        ids = first(text)["input_ids"]
        assert ids[-1] == END_ID and first.decode(ids, skip_special_tokens=True).strip() == text
    with pytest.raises(StudyError, match="vocabulary: found 200 tokens"):
        train_vocabulary(pairs, 200)


def test_features_are_cut_and_padded(pairs):
    tokenizer = train_vocabulary(pairs, 400)
    features = encode_pairs(pairs.select(range(30)), tokenizer, max_length=8)
    assert max(map(len, features["input_ids"])) == max(map(len, features["labels"])) == 8
    assert all(ids[-1] == END_ID for ids in (*features["input_ids"], *features["labels"]))
    batch = collate_pairs([features[i] for i in range(30)])
    for row in range(30):
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == features[row]["input_ids"]
        assert batch["labels"][row][batch["labels"][row] != IGNORED].tolist() == features[row]["labels"]
        assert features[row]["length"] == real.sum() + len(features[row]["labels"])


def test_saved_model_is_the_same_and_a_damaged_one_is_refused(model, pairs, tmp_path):
    tokenizer = train_vocabulary(pairs, 400)
    save_translation(model, tokenizer, tmp_path)
    loaded, vocabulary = load_translation(tmp_path)
    ids, mask = sources(6, 3)
    labels = torch.tensor([[4, END_ID], [5, END_ID]])
    assert torch.equal(loaded(ids, mask, labels=labels).logits, model(ids, mask, labels=labels).logits)
    assert vocabulary.get_vocab() == tokenizer.get_vocab()
    texts = pairs["source"][:3]
    wide = new_model(SHAPE, len(tokenizer), 0.0, 0.0, seed=2)
    assert translate(wide, tokenizer, texts, 2, 6) == translate(wide, vocabulary, texts, 2, 6)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(StudyError, match="remove it to train again"):
        load_translation(tmp_path)


def test_the_model_learns_a_small_corpus_by_heart(pairs):
    few = pairs.select(range(24))
    tokenizer = train_vocabulary(few, 400)
    shape = SHAPE.model_copy(update={"hidden_size": 48, "units": 96})
    learner = new_model(shape, len(tokenizer), 0.0, 0.0, seed=0)
    features = encode_pairs(few, tokenizer, 48)
    batch = collate_pairs([features[i] for i in range(24)])
    optimizer = torch.optim.Adam(learner.parameters(), 3e-3)
    for _ in range(220):
        optimizer.zero_grad()
        learner(**batch).loss.backward()
        optimizer.step()
    found = translate(learner, tokenizer, few["source"], 2, 48)
    assert sum(a == b for a, b in zip(found, few["target"], strict=True)) >= 22


def test_plan_label_and_unknown_task(profile_file):
    profile = load_profile(profile_file(seeds=[0, 1]))
    plan = make_plan("translation", profile, None)
    assert [label(spec) for spec in plan] == ["world_translation_dense_seed0"]
    assert parse_spec(json.loads(plan[0].model_dump_json())) == plan[0]
    with pytest.raises(StudyError, match="no translation task 'multi30k'; it has world_translation"):
        dense_translation(profile, "multi30k", 0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("translation.world_translation.vocabulary", 100, "vocabulary"),
        ("translation.world_translation.heads", 3, "expected a multiple of 3 heads"),
        ("translation.world_translation.seeds", 4, "only 2 listed"),
    ],
)
def test_impossible_settings_are_one_line(profile_file, key, value, message):
    with pytest.raises(StudyError, match=message):
        load_profile(profile_file(**{key: value}))


def test_a_run_makes_a_record_and_leaves_its_model(profile_file):
    profile = load_profile(profile_file())
    records = ensure(make_plan("translation", profile, None), profile)
    record = records[0]
    assert 0 <= record["score"] <= 100 and "tok:13a" in record["signature"] and len(record["examples"]) == 3
    assert record["model"]["size_bytes"] > 4 * record["model"]["parameters"]
    model, tokenizer = finished_translation(profile, record.spec)
    test = load_task("world_translation", "embedded", eval_examples=6)["test"]
    found = translate(model, tokenizer, test["source"], 2, record.spec.training.max_length)
    assert found[:3] == [row["found"] for row in record["examples"]]
    with pytest.raises(StudyError, match="'world_qa' is no translation"):
        run_translation(record.spec.model_copy(update={"task": "world_qa"}), profile)


def test_training_on_continues_the_finished_model(profile_file):
    profile = load_profile(profile_file())
    dense = dense_translation(profile, "world_translation", 0)
    on = dense_translation(profile, "world_translation", 0, epochs=0).model_copy(update={"start": dense})
    first, second = ensure([dense, on], profile)
    assert first["score"] == second["score"] and "training" not in second.result
    assert F.mse_loss(*(finished_translation(profile, spec)[0].embedding.weight for spec in (dense, on))) == 0


def test_an_interrupted_run_goes_on_exactly(profile_file, tmp_path):
    """Stopped after its first checkpoint, resumed in a new process: the same weights as without a stop."""
    changes = {"translation.world_translation.epochs": 2, "translation.world_translation.dropout": 0.2,
               "training.checkpoint_minutes": 1e-6}  # fmt: skip
    whole = profile_file("whole", **changes, results=str(tmp_path / "whole"))
    cut = profile_file("cut", **changes, results=str(tmp_path / "cut"))
    spec = make_plan("translation", load_profile(whole), None)[0]
    reference, _ = finished_translation(load_profile(whole), spec)
    command = [sys.executable, "-c", (
        "import os, signal, lib.training as t\n"
        "end = t.StudyCallback.on_step_end\n"
        "def stop(self, args, state, control, **rest):\n"
        "    if state.global_step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return end(self, args, state, control, **rest)\n"
        "t.StudyCallback.on_step_end = stop\n"
        f"from lib.runs import main\nmain(['translation', '--profile', {str(cut)!r}])"
    )]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    assert list((tmp_path / "cut" / "checkpoints").glob("*/checkpoint-4"))
    record = ensure([spec], load_profile(cut))[0]
    assert record["training"]["resumed"] == 4
    resumed, _ = finished_translation(load_profile(cut), spec)
    for (name, a), b in zip(reference.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
