"""Extractive question answering as BERT does it: tokenised windows in, answer texts out.

A context longer than the model's input is cut into windows that overlap by ``stride`` tokens (Devlin et al. 2019, sec.
4.2). The score of the span from token i to j is ``start_logits[i] + end_logits[j]``; no answer scores
``start_logits[CLS] + end_logits[CLS]`` (sec. 4.3). A question is unanswerable when the no-answer score, the lowest of
its windows, exceeds the best span's by more than a threshold.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lib.config import StudyError

MAX_QUESTION_TOKENS = 64
"""Longer questions are cut, as in the original BERT code, so that every window keeps room for its context."""
MIN_CONTEXT_TOKENS = 16
"""New context tokens that a window must have room for beside question, overlap and special tokens."""
CHUNK = 1024
"""Windows scored at a time: bounds the memory of the (windows, n_best, n_best) score array."""


def features(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int, training: bool
) -> Dataset:
    """Windows of at most ``max_length`` tokens, not padded (a collator pads each batch to its longest window).

    With ``training`` they carry ``start_positions`` and ``end_positions``, token indices of the first answer or of the
    [CLS] token where the window does not hold all of it. Otherwise ``example_id``, ``cls_index`` and
    ``offset_mapping`` (length, 2): the characters of the context that each token covers, -1 outside the context.
    Models without segments get no ``token_type_ids``. XLNet, which pads on the left and ends in [CLS], is handled.

    Raises:
        StudyError: the tokenizer has no offsets, or ``max_length`` leaves no room beside ``stride``.
    """
    if not tokenizer.is_fast:
        raise StudyError(f"tokenizer {type(tokenizer).__name__} gives no character offsets; use its fast version")
    special = tokenizer.num_special_tokens_to_add(pair=True)
    question_tokens = min(MAX_QUESTION_TOKENS, max_length - stride - special - MIN_CONTEXT_TOKENS)
    if question_tokens < MIN_CONTEXT_TOKENS // 2:
        raise StudyError(
            f"max_length {max_length} with stride {stride} leaves {question_tokens} tokens for the question, expected "
            f"{MIN_CONTEXT_TOKENS // 2} or more; raise max_length or lower stride"
        )

    def convert(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        questions = [_cut(question.strip(), tokenizer, question_tokens) for question in batch["question"]]
        return _windows(batch, questions, tokenizer, max_length, stride, training)

    return examples.map(
        convert, batched=True, remove_columns=examples.column_names, keep_in_memory=True, desc="Tokenising"
    )


def _cut(question: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """The question, or its first ``tokens`` tokens."""
    if len(question) <= tokens:
        return question
    offsets = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return question if len(offsets) <= tokens else question[: offsets[tokens - 1][1]]


TRAIN_COLUMNS = ("start_positions", "end_positions")
EVALUATION_COLUMNS = ("example_id", "cls_index", "offset_mapping")


def _windows(
    batch: dict[str, list[Any]],
    questions: list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
    training: bool,
) -> dict[str, list[Any]]:
    """One batch of ``features``. A tokenizer that pads on the left (XLNet) reads the context before the question."""
    question_first = tokenizer.padding_side == "right"
    texts = (questions, batch["context"]) if question_first else (batch["context"], questions)
    encoded = tokenizer(
        *texts,
        truncation="only_second" if question_first else "only_first",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=False,
    )
    owners = encoded["overflow_to_sample_mapping"]
    columns = {key: encoded[key] for key in tokenizer.model_input_names if key in encoded}
    extra: dict[str, list[Any]] = {name: [] for name in (TRAIN_COLUMNS if training else EVALUATION_COLUMNS)}
    for index, owner in enumerate(owners):
        context = np.array([part == int(question_first) for part in encoded.sequence_ids(index)])
        offsets = np.where(context[:, None], np.array(encoded["offset_mapping"][index]), -1)
        cls_index = encoded["input_ids"][index].index(tokenizer.cls_token_id)
        if training:
            first, last = _token_span(offsets, batch["answers"][owner], cls_index)
            extra["start_positions"].append(first)
            extra["end_positions"].append(last)
        else:
            extra["example_id"].append(batch["id"][owner])
            extra["cls_index"].append(cls_index)
            extra["offset_mapping"].append(offsets.astype(np.int32))
    return {**columns, **extra}


def _token_span(offsets: np.ndarray, answers: dict[str, list[Any]], cls_index: int) -> tuple[int, int]:
    """First and last token of the first answer, or [CLS] twice where this window does not hold all of it."""
    if not answers["text"]:
        return cls_index, cls_index
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    # A token that only covers white space (SentencePiece's "▁") has begin == end and is no part of an answer.
    overlaps = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > begin) & (offsets[:, 1] > offsets[:, 0]))
    inside = offsets[offsets[:, 0] >= 0]
    if not len(overlaps) or inside[0, 0] > begin or inside[-1, 1] < end:
        return cls_index, cls_index
    return int(overlaps[0]), int(overlaps[-1])


def unpadded(logits: np.ndarray, attention_mask: np.ndarray) -> list[np.ndarray]:
    """Rows of a padded batch (windows, length) cut to their real tokens, whichever side the padding is on."""
    return [row[mask.astype(bool)] for row, mask in zip(np.asarray(logits), np.asarray(attention_mask), strict=True)]


def extract_answers(
    dataset: Dataset,
    features: Dataset,
    start_logits: Sequence[np.ndarray] | np.ndarray,
    end_logits: Sequence[np.ndarray] | np.ndarray,
    n_best: int = 20,
    max_answer_length: int = 30,
    null_threshold: float = 0.0,
    unanswerable: bool = False,
) -> tuple[dict[str, str], dict[str, float]]:
    """Answer text and null-score difference (no answer minus best span) of every question in ``dataset``.

    ``start_logits`` and ``end_logits`` hold one row per window in the order of ``features``, an array (windows, length)
    or a list of arrays of any lengths; a row's first entries belong to the window's tokens and the rest is ignored (use
    ``unpadded`` for batches padded on the left). Among the ``n_best`` starts and ``n_best`` ends in the context, spans
    of up to ``max_answer_length`` tokens compete. With ``unanswerable`` a difference above ``null_threshold`` gives the
    answer ""; pass ``math.inf`` to get every best span, which ``best_null_threshold`` wants.
    """
    lengths, offsets, cls_index = _layout(features)
    if not len(lengths) == len(start_logits) == len(end_logits):
        raise ValueError(f"{len(start_logits)} and {len(end_logits)} rows of logits for {len(lengths)} windows")
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    best, null = np.empty(len(lengths)), np.empty(len(lengths))
    characters = np.empty((len(lengths), 2), dtype=np.int64)
    for begin in range(0, len(lengths), CHUNK):
        part = slice(begin, begin + CHUNK)
        start, end = (_padded(logits[part], lengths[part]) for logits in (start_logits, end_logits))
        rows = np.arange(len(start))
        null[part] = start[rows, cls_index[part]] + end[rows, cls_index[part]]
        for row, index in enumerate(range(begin, begin + len(start))):
            outside = offsets[bounds[index] : bounds[index + 1], 0] < 0
            start[row, : lengths[index]][outside] = end[row, : lengths[index]][outside] = -np.inf
        best[part], first, last = _best_spans(start, end, n_best, max_answer_length)
        first_token = bounds[:-1][part]
        characters[part] = np.stack([offsets[first_token + first, 0], offsets[first_token + last, 1]], axis=1)
    return _per_question(dataset, features["example_id"], best, characters, null, null_threshold, unanswerable)


def _layout(features: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens per window (windows,), character offsets of all tokens (tokens, 2), index of [CLS] (windows,)."""
    table = features.with_format("arrow")[:]
    nested = table["offset_mapping"].combine_chunks()
    offsets = nested.flatten().flatten().to_numpy().reshape(-1, 2)
    return nested.value_lengths().to_numpy(), offsets, table["cls_index"].to_numpy()


def _padded(logits: Sequence[np.ndarray] | np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Rows cut to ``lengths`` and padded with -inf, (windows, longest), in float64."""
    out = np.full((len(lengths), int(lengths.max())), -np.inf)
    for row, (values, length) in enumerate(zip(logits, lengths, strict=True)):
        out[row, :length] = values[:length]
    return out


def _best_spans(
    start: np.ndarray, end: np.ndarray, n_best: int, max_answer_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score, first and last token of each row's best span; the score is -inf where no span is allowed.

    Of equal scores the one whose start, then whose end, ranks first wins (earlier token first among equals).
    """
    rows = np.arange(len(start))
    starts = np.argsort(-start, axis=1, kind="stable")[:, :n_best]
    ends = np.argsort(-end, axis=1, kind="stable")[:, :n_best]
    scores = np.take_along_axis(start, starts, 1)[:, :, None] + np.take_along_axis(end, ends, 1)[:, None, :]
    length = ends[:, None, :] - starts[:, :, None] + 1
    scores[(length < 1) | (length > max_answer_length)] = -np.inf
    winner = scores.reshape(len(start), -1).argmax(axis=1)
    first, last = np.divmod(winner, ends.shape[1])
    return scores.reshape(len(start), -1)[rows, winner], starts[rows, first], ends[rows, last]


def _per_question(
    dataset: Dataset,
    owners: Sequence[str],
    best: np.ndarray,
    characters: np.ndarray,
    null: np.ndarray,
    null_threshold: float,
    unanswerable: bool,
) -> tuple[dict[str, str], dict[str, float]]:
    """The best window of each question decides its text, the least confident one its no-answer score."""
    winners: dict[str, int] = {}
    null_scores: dict[str, float] = {}
    for index, owner in enumerate(owners):
        if owner not in winners or best[index] > best[winners[owner]]:
            winners[owner] = index
        null_scores[owner] = min(null_scores.get(owner, np.inf), float(null[index]))
    answers: dict[str, str] = {}
    differences: dict[str, float] = {}
    for name, context in zip(dataset["id"], dataset["context"], strict=True):
        window = winners[name]
        differences[name] = float(null_scores[name] - best[window])
        begin, end = characters[window]
        none = best[window] == -np.inf or (unanswerable and differences[name] > null_threshold)
        answers[name] = "" if none else context[begin:end].strip()
    return answers, differences


def best_null_threshold(
    answers: Mapping[str, str],
    scores: Mapping[str, float],
    null_score_diffs: Mapping[str, float],
    has_answer: Mapping[str, bool],
) -> tuple[float, float]:
    """Best mean of ``scores`` in percent over all null thresholds, and that threshold.

    Follows ``find_best_thresh`` of the official SQuAD 2.0 script: from "every question is unanswerable" the questions
    are answered one by one in order of ``null_score_diffs``; an unanswerable one costs a point when it gets an answer.
    ``scores`` holds each answer's score from 0 to 1. Questions without a score are passed over.
    """
    current = best = float(sum(not answerable for answerable in has_answer.values()))
    threshold = 0.0
    for name in sorted(null_score_diffs, key=lambda name: null_score_diffs[name]):
        if name not in scores:
            continue
        current += scores[name] if has_answer[name] else -float(bool(answers[name]))
        if current > best:
            best, threshold = current, null_score_diffs[name]
    return 100.0 * best / len(scores), threshold
