"""What the papers print about quality against size, brought to the axes on which notebook 08 shows all methods."""

import pandas as pd
import torch
from torch import nn
from transformers import AutoModel

from lib.analysis import block_movement, kronecker, obert, published_retained, structured_qa
from lib.kronecker_models import PUBLISHED_ON, factorise, published_shapes
from lib.models import ARCHITECTURES, count_parameters, layers

KEPT = "weights kept (%)"  # of the encoder's layers, not zero
COLUMNS = ["style", KEPT, "retained", "data"]


def published_curves() -> pd.DataFrame:
    """Retained share against the encoder-layer weights kept, one curve per paper: style, weights kept (%), retained.

    Of every paper its main method on the data that its headline is about, named in ``data``: layers dropped from the
    top (Sajjad et al., Table 1), gates, retrained where the paper did (McCarley et al., Table 1), oBERT (Kurtic et al.,
    Table 1, 30 epochs), filled hybrid blocks (Lagunas et al., Table 2, taught by BERT-base), Kronecker factors (Tahaei
    et al., Table 5). The dense model, 100 % of either, begins each curve; of points of one size it has the best.
    """
    top = published_retained("sajjad2020", 12, place="v1 Table 1", model="BERT-base")
    means = top.groupby("dropped_share")["retained"].mean()
    gates = structured_qa.published_points().query("place == 'v1 Table 1'")
    sparse = obert.published_frame().query("place == 'Table 1' and method == 'obert' and epochs == 30")
    blocks = block_movement.published_curves().query("method == 'hybrid-filled' and teacher == 'base'")
    factors = kronecker.published_retained().query("task == 'squad_v1' and configuration != 'kron19'")  # in v1 alone
    curves = [
        _curve("top", "7 GLUE tasks, BERT-base", 100 * (1 - means.index.to_series()), means),
        # attention holds a third of a layer's weights, the units two thirds
        _curve("l0", "SQuAD 2.0, BERT-large", 100 * (gates["heads"] + 2 * gates["units"]) / 3, gates["retained"]),
        _curve("obert", "SQuAD 1.1, BERT-base", 100 - sparse["sparsity"], sparse["retained"]),
        _curve("hybrid", "SQuAD 1.1, BERT-base", blocks["density"], blocks["retained"]),
        _curve("kronecker", "SQuAD 1.1, BERT-base", factors["configuration"].map(factor_share), factors["retained"]),
    ]
    return pd.concat(curves, ignore_index=True)


def _curve(style: str, data: str, kept: pd.Series, retained: pd.Series) -> pd.DataFrame:
    """Points of one paper, the dense model first, then from large to small."""
    points = pd.DataFrame({KEPT: kept.astype(float), "retained": retained.astype(float)})
    dense = pd.DataFrame({KEPT: [100.0], "retained": [100.0]})
    smaller = points[points[KEPT] < 100].groupby(KEPT, as_index=False)["retained"].max().iloc[::-1]
    return pd.concat([dense, smaller]).assign(style=style, data=data)[COLUMNS]


def factor_share(name: str) -> float:
    """Parameters in BERT-base's layers once they are a published configuration's factors, percent of the dense ones."""
    with torch.device("meta"):
        model = AutoModel.from_config(ARCHITECTURES[PUBLISHED_ON])
        dense = _in_layers(model)
        factorise(model, published_shapes(name))
    return 100 * _in_layers(model) / dense


def _in_layers(model: nn.Module) -> int:
    return sum(count_parameters(layer) for layer in layers(model))
