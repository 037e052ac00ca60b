"""What every test starts from: no network, no data directory of the user's, small models, a small profile."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("STUDY_DATA", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are small, and a busy machine then costs little
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import yaml
from transformers import (
    AutoModelForQuestionAnswering,
    BertConfig,
    DistilBertConfig,
    PreTrainedModel,
    RobertaConfig,
    XLNetConfig,
)

from lib.models import load_model, load_tokenizer

torch.set_num_threads(1)  # models this small gain nothing from two, and lose a lot on a busy machine

# Four layers each. The wide initialisation makes every layer change its input visibly.
SMALL = {
    "bert": BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=40, initializer_range=0.3,
    ),
    "roberta": RobertaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=40, initializer_range=0.3, type_vocab_size=1, pad_token_id=1,
    ),
    "distilbert": DistilBertConfig(
        vocab_size=60, dim=32, n_layers=4, n_heads=4, hidden_dim=48, max_position_embeddings=40, initializer_range=0.3,
    ),
    "xlnet": XLNetConfig(vocab_size=60, d_model=32, n_layer=4, n_head=4, d_inner=48, initializer_range=0.3),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    monkeypatch.delenv("STUDY_DATA", raising=False)
    monkeypatch.delenv("STUDY_PROGRESS", raising=False)


@pytest.fixture
def tiny_bert():
    """A 4-layer BERT with random weights under a QA head, in eval mode."""
    return load_model("tiny-bert", "qa").eval()


@pytest.fixture(scope="session")
def tokenizer():
    """bert-base-uncased's WordPiece tokenizer, from the packaged encoder."""
    return load_tokenizer("minilm")


@pytest.fixture
def small_model() -> Callable[..., PreTrainedModel]:
    """Builds a 4-layer model of an architecture in ``SMALL`` under a QA head, in eval mode."""

    def build(architecture: str, attention: str = "eager") -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            config = copy.deepcopy(SMALL[architecture])  # a model keeps its config and changes it
            return AutoModelForQuestionAnswering.from_config(config, attn_implementation=attention).eval()

    return build


def padded_batch(architecture: str) -> dict[str, torch.Tensor]:
    """Three sequences of 9, 6 and 3 tokens; XLNet is padded on the left, as its tokenizer does."""
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 9, dtype=torch.long)
    for row, length in ((1, 6), (2, 3)):
        padding = slice(0, 9 - length) if architecture == "xlnet" else slice(length, 9)
        mask[row, padding], ids[row, padding] = 0, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def profile_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a profile that trains in a second; dotted keyword arguments change it, ``None`` removes a key."""

    def write(name: str = "tiny", **changes: Any) -> Path:
        values = small_profile(tmp_path / "results")
        for key, value in changes.items():
            node, (*parents, last) = values, key.split(".")
            for parent in parents:
                node = node[parent]
            if value is None:
                del node[last]
            else:
                node[last] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return path

    return write


def small_profile(results: Path) -> dict[str, Any]:
    """A complete profile as plain values."""
    sentences = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_length": 32, "train_examples": 32,
                 "eval_examples": 16}  # fmt: skip
    return {
        "encoder": "tiny-bert", "data": "embedded", "seeds": [0, 1], "results": str(results),
        "training": {"dropout": 0.0, "freeze_embeddings": True, "attention": "eager", "precision": "fp32",
                     "warmup": 0.0, "weight_decay": 0.01, "max_grad_norm": 1.0, "checkpoint_minutes": 5},
        "tasks": {"world_sentiment": sentences},
        "latency": {"engines": ["pytorch-fp32"], "threads": 1, "batches": [1], "lengths": [16], "rounds": 1,
                    "comparison_examples": 32,
                    "base_shape": "tiny"},
        "layer_dropping": {"k": [2], "strategies": ["top"], "thresholds": [0.9], "grid_tasks": ["world_sentiment"],
                           "half_tasks": [], "ablation_k": [2], "ablation_tasks": []},
        "structured_pruning": {
            "tasks": ["world_qa"], "head_densities": [0.5], "unit_densities": [0.5], "operating_points": [[0.5, 0.5]],
            "embedding_densities": [], "gate_epochs": 1, "gate_batch_size": 8, "retrain_epochs": 1,
            "retrain_learning_rate": 1e-3, "gain_examples": 8, "leave_one_out_examples": 4, "speed_shape": "tiny",
            "speed_points": [[0.5, 0.5]], "speed_batches": [1], "speed_length": 16,
        },
    }  # fmt: skip
