"""A small encoder-decoder Transformer for translation, with every matrix product, softmax and LayerNorm in the open.

The post-norm model of Vaswani et al. 2017 (arXiv:1706.03762), sections 3.1 to 3.5: sinusoidal positions, one embedding
table for source, target and output, a byte-level BPE vocabulary trained on both languages together. Each operation that
full quantisation has to reach (``lib.quantizers``) is a module of its own. Search is in ``lib.search``.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.modeling_outputs import Seq2SeqLMOutput

from lib.config import StudyError
from lib.settings import Strict

PAD, START, END = "<pad>", "<s>", "</s>"
PAD_ID, START_ID, END_ID = 0, 1, 2
IGNORED = -100  # the label of padding

KeysValues = tuple[Tensor, Tensor]  # each (batch, heads, length, head_size)


class TranslationShape(Strict):
    """Size of a translation model: ``layers`` of the encoder and as many of the decoder; ``vocabulary`` at most."""

    vocabulary: int = Field(ge=300)
    hidden_size: int = Field(ge=4)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    units: int = Field(ge=1)


class TranslationConfig(PreTrainedConfig):
    """What ``TranslationModel`` is built from; the names are transformers' own."""

    model_type = "study_translation"
    vocab_size: int = 8000
    hidden_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    dropout: float = 0.0
    label_smoothing: float = 0.0
    is_encoder_decoder: bool = True


class MatrixProduct(nn.Module):
    """``scale * a @ b``."""

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return (a @ b) * scale


class MaskedSoftmax(nn.Module):
    """Softmax over the last dimension of what ``mask`` (True = may be seen, broadcastable) leaves."""

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1)


class TokenEmbedding(nn.Embedding):
    """One table, (vocabulary, hidden), that embeds tokens and scores them at the output."""

    def table(self) -> Tensor:
        """The weights as both uses see them."""
        return self.weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.table())

    def logits(self, states: Tensor) -> Tensor:
        """Scores of every token, (…, vocabulary)."""
        return F.linear(states, self.table())


class Attention(nn.Module):
    """Multi-head attention; keys and values are projected apart from the query so that a cache can keep them."""

    def __init__(self, config: TranslationConfig) -> None:
        super().__init__()
        self.heads, self.head_size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.query, self.key, self.value, self.output = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )
        self.scores, self.softmax, self.context = MatrixProduct(), MaskedSoftmax(), MatrixProduct()

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.heads, self.head_size)).transpose(1, 2)

    def keys_values(self, memory: Tensor) -> KeysValues:
        return self._split(self.key(memory)), self._split(self.value(memory))

    def forward(self, states: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        query = self._split(self.query(states))
        scores = self.scores(query, keys.transpose(-1, -2), self.head_size**-0.5)
        context = self.context(self.softmax(scores, mask), values)
        return self.output(context.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """``ffn_out(relu(ffn_in(x)))``."""

    def __init__(self, config: TranslationConfig) -> None:
        super().__init__()
        self.ffn_in = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_out = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        return self.ffn_out(F.relu(self.ffn_in(states)))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each added to its input and normalised."""

    def __init__(self, config: TranslationConfig) -> None:
        super().__init__()
        self.attention, self.ffn = Attention(config), FeedForward(config)
        self.attention_norm, self.ffn_norm = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        attended = self.attention(states, *self.attention.keys_values(states), mask)
        states = self.attention_norm(states + self.dropout(attended))
        return self.ffn_norm(states + self.dropout(self.ffn(states)))


class DecoderLayer(nn.Module):
    """Self-attention to the left, attention to the source, feed-forward."""

    def __init__(self, config: TranslationConfig) -> None:
        super().__init__()
        self.attention, self.cross, self.ffn = Attention(config), Attention(config), FeedForward(config)
        self.attention_norm, self.cross_norm, self.ffn_norm = (nn.LayerNorm(config.hidden_size) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor, mask: Tensor | None, source: KeysValues, source_mask: Tensor,
                past: KeysValues | None = None) -> tuple[Tensor, KeysValues]:  # fmt: skip
        keys, values = self.attention.keys_values(states)
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        states = self.attention_norm(states + self.dropout(self.attention(states, keys, values, mask)))
        states = self.cross_norm(states + self.dropout(self.cross(states, *source, source_mask)))
        return self.ffn_norm(states + self.dropout(self.ffn(states))), (keys, values)


class TranslationModel(PreTrainedModel):
    """Encoder and decoder over one embedding table."""

    config_class = TranslationConfig
    main_input_name = "input_ids"

    def __init__(self, config: TranslationConfig) -> None:
        super().__init__(config)
        if config.hidden_size % config.num_attention_heads:
            raise StudyError(
                f"translation model: hidden_size {config.hidden_size} does not divide by {config.num_attention_heads} "
                "heads; change one of them"
            )
        self.embedding = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.encoder_layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.decoder_layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder_input, self.decoder_input = nn.Identity(), nn.Identity()  # where the sum with positions passes
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5)

    def set_dropout(self, rate: float) -> None:
        """Change every dropout rate, for training on."""
        self.config.dropout = rate
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = rate

    def _embed(self, ids: Tensor, first: int = 0) -> Tensor:
        states = self.embedding(ids) * self.config.hidden_size**0.5
        return self.dropout(states + positions(ids.shape[1], self.config.hidden_size, first).to(states))

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """States of the source, (batch, length, hidden)."""
        states, mask = self.encoder_input(self._embed(input_ids)), _visible(attention_mask)
        for layer in self.encoder_layers:
            states = layer(states, mask)
        return states

    def source_keys_values(self, memory: Tensor) -> list[KeysValues]:
        """What every decoder layer attends to in the source."""
        crosses = [layer.cross for layer in self.decoder_layers if isinstance(layer, DecoderLayer)]
        return [cross.keys_values(memory) for cross in crosses]

    def decode(self, ids: Tensor, source: Sequence[KeysValues], attention_mask: Tensor,
               past: Sequence[KeysValues] | None = None) -> tuple[Tensor, list[KeysValues]]:  # fmt: skip
        """States of target positions, (batch, length, hidden), and all keys and values so far.

        Args:
            ids: target tokens, (batch, length); with ``past`` only the newest one.
            source: of ``source_keys_values``.
            attention_mask: of the source, (batch, source length).
            past: keys and values of the tokens before ``ids``, as returned.
        """
        states = self.decoder_input(self._embed(ids, past[0][0].shape[2] if past else 0))
        length = ids.shape[1]
        causal = None if past else torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        mask, present = _visible(attention_mask), []
        for index, layer in enumerate(self.decoder_layers):
            states, kept = layer(states, causal, source[index], mask, past[index] if past else None)
            present.append(kept)
        return states, present

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None,
                decoder_input_ids: Tensor | None = None, **ignored: Any) -> Seq2SeqLMOutput:  # fmt: skip
        """Teacher-forced pass.

        Args:
            labels: target tokens that end in ``</s>``, ``IGNORED`` where padded; gives the smoothed cross-entropy and
                the logits of the real target tokens, (tokens, vocabulary).
            decoder_input_ids: instead of labels; gives the logits of all positions, (batch, length, vocabulary).
        """
        if decoder_input_ids is None:
            assert labels is not None
            decoder_input_ids = shifted(labels)
        source = self.source_keys_values(self.encode(input_ids, attention_mask))
        states, _ = self.decode(decoder_input_ids, source, attention_mask)
        if labels is None:
            return Seq2SeqLMOutput(logits=self.embedding.logits(states))
        real = labels != IGNORED
        logits = self.embedding.logits(states[real])
        loss = F.cross_entropy(logits.float(), labels[real], label_smoothing=self.config.label_smoothing)
        return Seq2SeqLMOutput(loss=loss, logits=logits)


def positions(length: int, width: int, first: int = 0) -> Tensor:
    """Sinusoids of positions ``first`` onwards, (length, width): section 3.5 of Vaswani et al."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(first, first + length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]


def shifted(labels: Tensor) -> Tensor:
    """Decoder inputs of ``labels``: ``<s>`` first, everything one later, padding as ``<pad>``."""
    ids = labels.new_full(labels.shape, START_ID)
    ids[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, PAD_ID)
    return ids


def _visible(attention_mask: Tensor) -> Tensor:
    return attention_mask.bool()[:, None, None, :]


def new_model(shape: TranslationShape, vocabulary: int, dropout: float, label_smoothing: float,
              seed: int) -> TranslationModel:  # fmt: skip
    """A model with random weights; ``vocabulary`` is how many tokens the trained vocabulary really has."""
    config = TranslationConfig(
        vocab_size=vocabulary, hidden_size=shape.hidden_size, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.units, dropout=dropout,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TranslationModel(config)


def train_vocabulary(pairs: Dataset, size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE vocabulary of at most ``size`` tokens over both languages: reversible, no unknown token.

    The same pairs give the same vocabulary.

    Raises:
        StudyError: a size that does not even hold the bytes.
    """
    if size < 300:
        raise StudyError(f"vocabulary: found {size} tokens, expected 300 or more: 256 bytes, 3 marks, some merges")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[PAD, START, END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((text for column in ("source", "target") for text in pairs[column]), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, END_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=START, eos_token=END,
        model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def encode_pairs(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """``input_ids`` and ``labels`` of sentence pairs, both ending in ``</s>``, and their ``length`` together."""

    def tokenise(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
        source, target = (
            tokenizer(rows[column], truncation=True, max_length=max_length)["input_ids"]
            for column in ("source", "target")
        )
        lengths = [len(a) + len(b) for a, b in zip(source, target, strict=True)]
        return {"input_ids": source, "labels": target, "length": lengths}

    return pairs.map(tokenise, batched=True, remove_columns=pairs.column_names, keep_in_memory=True)


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of tokens as one (batch, longest) tensor, filled up with ``value`` on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def collate_pairs(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Features of ``encode_pairs`` as a padded batch."""
    ids = pad([row["input_ids"] for row in rows], PAD_ID)
    batch = {"input_ids": ids, "attention_mask": (ids != PAD_ID).long()}
    if "labels" in rows[0]:
        batch["labels"] = pad([row["labels"] for row in rows], IGNORED)
    return batch
