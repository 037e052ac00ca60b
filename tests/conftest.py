"""What every test starts from: no network, no data directory of the user's, a small model."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("STUDY_DATA", None)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from lib.models import load_model, load_tokenizer

torch.set_num_threads(min(2, os.cpu_count() or 1))


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
