"""Translate with a trained model: greedy and beam search over cached keys and values.

A beam keeps its finished hypotheses among its places and ranks all of them by log probability / length^alpha, so that
long and short ones compete fairly (Wu et al. 2016, arXiv:1609.08144, section 7, without the coverage term). A beam of 1
is greedy search.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.config import StudyError
from lib.progress import Progress
from lib.training import device
from lib.translation import END_ID, PAD_ID, START_ID, TranslationModel, pad

BATCH = 64


@torch.inference_mode()
def search(model: TranslationModel, input_ids: Tensor, attention_mask: Tensor, beams: int, max_length: int,
           length_penalty: float = 1.0) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The best hypothesis of each source, without ``<s>``, padded after ``</s>``, and its score.

    Args:
        input_ids, attention_mask: sources, (batch, length).
        beams: hypotheses kept at every step; 1 is greedy search.
        max_length: tokens of a hypothesis at most, ``</s>`` included.
        length_penalty: alpha; 0 does not correct for length, 1 averages over tokens.

    Returns:
        Tokens (batch, steps taken) and log probability / length^alpha (batch,).
    """
    if beams < 1:
        raise StudyError(f"search: beams: found {beams}, expected 1 (greedy) or more")
    size, where = len(input_ids), input_ids.device
    source = [
        (keys.repeat_interleave(beams, 0), values.repeat_interleave(beams, 0))
        for keys, values in model.source_keys_values(model.encode(input_ids, attention_mask))
    ]
    mask = attention_mask.repeat_interleave(beams, 0)
    tokens = torch.full((size * beams, 1), START_ID, device=where)
    scores = torch.full((size, beams), float("-inf"), device=where)
    scores[:, 0] = 0.0  # all places start alike, so only one of them may branch
    finished = torch.zeros(size, beams, dtype=torch.bool, device=where)
    lengths = torch.zeros(size, beams, device=where)
    past = None
    for _ in range(max_length):
        states, past = model.decode(tokens[:, -1:], source, mask, past)
        step = model.embedding.logits(states[:, -1]).float().log_softmax(-1).view(size, beams, -1)
        step = step.masked_fill(finished[..., None], float("-inf"))
        step[..., PAD_ID] = torch.where(finished, 0.0, float("-inf"))  # a finished hypothesis only gets padding
        total = scores[..., None] + step
        lengths = lengths + ~finished
        ranked = total / lengths[..., None] ** length_penalty
        chosen = ranked.flatten(1).topk(beams).indices
        parent, token = chosen // step.shape[-1], chosen % step.shape[-1]
        scores = total.flatten(1).gather(1, chosen)
        finished, lengths = finished.gather(1, parent) | (token == END_ID), lengths.gather(1, parent)
        rows = (parent + torch.arange(size, device=where)[:, None] * beams).flatten()
        tokens = torch.cat([tokens[rows], token.view(-1, 1)], 1)
        if beams > 1:
            past = [(keys[rows], values[rows]) for keys, values in past]
        if finished.all():
            break
    normalised = scores / lengths**length_penalty
    best = normalised.argmax(1)
    return tokens.view(size, beams, -1)[torch.arange(size, device=where), best, 1:], normalised.amax(1)


def translate(model: TranslationModel, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], beams: int,
              max_length: int, length_penalty: float = 1.0, title: str = "translating") -> list[str]:  # fmt: skip
    """Translations of ``sentences``, in order, as detokenised text. Batches are made of similar lengths."""
    model.eval().to(device())
    sources = tokenizer(list(sentences), truncation=True, max_length=max_length)["input_ids"]
    order = np.argsort([len(ids) for ids in sources], kind="stable")[::-1]
    progress, result = Progress(title, len(sources)), [""] * len(sources)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        ids = pad([sources[i] for i in rows], PAD_ID).to(device())
        found, _ = search(model, ids, (ids != PAD_ID).long(), beams, max_length, length_penalty)
        for i, text in zip(rows, tokenizer.batch_decode(found.tolist(), skip_special_tokens=True), strict=True):
            result[i] = text.strip()
        progress.update(start + len(rows))
    progress.close()
    return result
