"""What every test starts from: no network, no data directory of the user's, small models, a small profile."""

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
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

from lib.config import ROOT
from lib.environment import fast_cpu_environment
from lib.gates import gate_shapes
from lib.models import load_model, load_tokenizer
from lib.records import Record
from lib.specs import Spec, spec_hash

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


# Started with the allocator's variables, so that a command need not start itself again.
ENVIRONMENT = os.environ | fast_cpu_environment() | {"OMP_NUM_THREADS": "1"}


def start_module(module: str, *arguments: Any, progress: Path, **environ: str) -> subprocess.Popen[str]:
    """The command line of ``module``; progress lines go to a file, so that stderr holds errors alone."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT, env=ENVIRONMENT | {"STUDY_PROGRESS": str(progress)} | environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip


def run_module(module: str, *arguments: Any, progress: Path, **environ: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line of ``module``."""
    process = start_module(module, *arguments, progress=progress, **environ)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def without_timings(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what time, interruptions and a commit made meanwhile change."""
    kept = {key: value for key, value in record.items() if key not in ("created", "seconds", "commit")}
    if training := record["result"].get("training"):
        steady = {key: value for key, value in training.items() if key not in ("seconds", "resumed")}
        kept["result"] = record["result"] | {"training": steady}
    return kept


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


@torch.no_grad()
def span_logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Start and end logits at the real tokens, (2, tokens)."""
    output, real = model(**batch), batch["attention_mask"].bool()
    return torch.stack([output.start_logits[real], output.end_logits[real]])


def random_gates(model: PreTrainedModel, kinds: Sequence[Any], seed: int = 3) -> dict[str, list[torch.Tensor]]:
    """Gate values in 0 to 1, about a fifth of them 0, different in every layer."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {kind: [torch.rand(n, generator=generator) for n in gate_shapes(model, kind)] for kind in kinds}
    return {kind: [torch.where(row < 0.2, 0.0, row) for row in rows] for kind, rows in drawn.items()}


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


def record(spec: Spec, **result: Any) -> Record:
    """A finished run with this result, as frames and verdicts read it."""
    return Record(
        hash=spec_hash(spec), spec=spec, result=result, data=None, code="c", commit=None, created="2026-01-01",
        seconds=1.0, hardware={"cpu": "Toy CPU"}, packages={},
    )  # fmt: skip


def small_profile(results: Path) -> dict[str, Any]:
    """A complete profile as plain values."""
    sentences = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_length": 32, "train_examples": 32,
                 "eval_examples": 16}  # fmt: skip
    return {
        "encoder": "tiny-bert", "data": "embedded", "seeds": [0, 1], "results": str(results),
        "training": {"dropout": 0.0, "freeze_embeddings": True, "attention": "eager", "precision": "fp32",
                     "warmup": 0.0, "weight_decay": 0.01, "max_grad_norm": 1.0, "checkpoint_minutes": 5},
        "tasks": {"world_sentiment": sentences},
        "translation": {"world_translation": {
            "vocabulary": 320, "hidden_size": 16, "layers": 1, "heads": 2, "units": 32, "epochs": 1, "batch_size": 16,
            "learning_rate": 3e-3, "warmup": 0.0, "dropout": 0.0, "label_smoothing": 0.1, "max_length": 40, "beams": 2,
            "length_penalty": 1.0, "train_examples": 64, "eval_examples": 6, "seeds": 1,
        }},
        "latency": {"engines": ["pytorch-fp32"], "threads": 1, "batches": [1], "lengths": [16], "rounds": 1,
                    "comparison_examples": 32, "compare_training": True,
                    "base_shape": "tiny", "also_with": []},
        "layer_dropping": {"k": [2], "strategies": ["top"], "thresholds": [0.9],
                           "contribution_examples": 16, "grid_tasks": ["world_sentiment"],
                           "half_tasks": [], "speed_engines": ["pytorch-fp32"], "speed_k": [2],
                           "ablation_k": [2], "ablation_tasks": []},
        "frontier": {"task": "world_qa", "seeds": {}, "layers_dropped": [0, 2], "operating_points": [[1, 1]],
                     "distilled_longer": [], "block_movement": False, "kronecker": [], "engines": ["onnxruntime-int8"],
                     "reference": "pytorch-fp32", "batch": 1, "length": 16},
        "kronecker": {
            "configurations": ["kron8"], "untrained": ["kron8"], "tasks": ["world_sentiment"], "epoch_factor": 1,
            "epochs": {}, "learning_rate": 1e-3,
            "text_tasks": ["world_sentiment", "world_qa"], "text_examples": 16, "text_held_out": 8, "text_epochs": 1,
            "text_batch_size": 8, "text_learning_rate": 1e-3, "text_max_length": 64, "ablations": ["no_text"],
            "ablation_tasks": ["world_sentiment"], "error_terms": [1], "speed_shape": "tiny",
            "speed_engines": ["pytorch-fp32"], "speed_batches": [1], "speed_length": 16,
        },
        "obert": {
            "task": "world_sentiment", "train_examples": 32, "other_tasks": {}, "sparsities": [0.8], "short_epochs": 1,
            "batch_sizes": {}, "long_epochs": 1, "prunings": 3, "first_step": 0.5, "learning_rate": 1e-3,
            "gradient_batches": {},
            "gradients": 4, "gradient_batch": 4, "widths": [16, 16], "dampening": 1e-7, "one_shot_sparsities": [0.8],
            "recomputations": [1], "upstream_task": "world_sentiment", "transfer_tasks": ["world_sentiment"],
            "upstream_sparsities": [0.8], "upstream_epochs": 1, "upstream_prune_epochs": 1, "transfer_epochs": 1,
            "compound_layers": [2], "compound_sparsities": [0.8], "int8_epochs": 0.5, "cost_weights": 500,
            "speed_architecture": "tiny", "speed_layers": [4, 2], "speed_sparsities": [0.9],
            "speed_conditions": [[1, 16]], "speed_rounds": 1, "dense_engines": ["pytorch-fp32"],
            "sparse_engines": [["pytorch-csr-fp32"], ["deepsparse-fp32"]],
            "sparse_engines_also": [["pytorch-csr-fp32"]],
        },
        "block_movement": {
            "tasks": ["world_sentiment"], "variant_task": "world_sentiment", "ablation_tasks": [], "block": [4, 4],
            "epoch_factor": 1, "refill_epoch_factor": 1, "batch_sizes": {},
            "score_learning_rates": {"world_sentiment": 1.0},
            "strengths": [[0.01, 0.1]], "lambda_factors": {}, "ffn_lambda": 1, "struct_attention_lambda": 0.1,
            "variant_strengths": 0,
            "densities": [], "block_sizes": [], "large_teacher": None, "translation_tasks": [],
            "translation_densities": [0.5], "translation_epoch_factor": 1, "translation_block": [4, 4], "shapes": 1,
            "shape_engines": ["pytorch-fp32"], "shape_batches": [1], "shape_length": 16, "block_sparse_densities": [],
            "overhead_shape": "tiny", "overhead_batch": 2, "overhead_length": 16,
        },
        "fully_quantized": {
            "bits": [8], "tasks": ["world_translation"], "epochs": {"world_translation": 1.0},
            "learning_rate": 0.5, "aware_delay": 0.1,
            "scratch": {"world_translation": [8]}, "scratch_delay": 0.25, "ablation_task": "world_translation",
            "delays": [0.0], "delay_bits": [8], "naive_bits": [8], "naive_epochs": 1.0,
            "part_bits": [4], "calibration": [2, 4],
            "qa_task": "world_qa", "qa_bits": [8], "qa_aware_bits": [], "qa_epochs": 1, "qa_learning_rate": 5e-4,
            "qa_engines": [], "speed_task": "world_translation", "speed_conditions": [[1, 16]],
        },
        "structured_pruning": {
            "tasks": ["world_qa"], "seeds": {}, "head_densities": [0.5], "unit_densities": [0.5],
            "operating_points": [[0.5, 0.5]], "embedding_densities": [], "gate_epochs": 1, "gate_batch_size": 8,
            "retrain_epochs": 1, "retrain_learning_rate": 1e-3, "gain_examples": 8, "leave_one_out_examples": 4,
            "speed_shape": "tiny", "speed_engines": ["pytorch-fp32"], "speed_points": [[0.5, 0.5]],
            "speed_batches": [1], "speed_length": 16,
        },
    }  # fmt: skip
