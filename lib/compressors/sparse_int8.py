"""INT8 on top of sparsity: the last part of oBERT's compound compression (Kurtic et al. 2022, section 4.3).

Quantisation-aware training with the masks held: encoder linear maps compute with 8-bit weights and inputs
(``lib.int8_linear``), word embeddings are rounded to 8 bits a row. Softmax, attention's two products, LayerNorm, GELU
and the task head stay in floating point; DeepSparse's own recipe quantises attention's products as well.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from lib.compressors.masked import FixedMasks
from lib.int8_linear import put_int8_linears, round_to_int8
from lib.sparse_storage import storage


class SparseInt8(FixedMasks):
    """Fine-tunes a sparse model in simulated INT8; what ``finalize`` leaves computes in 8 bits on its own.

    Its modules are not transformers', so such a model is measured and stored in the record's sizes, not saved.
    """

    name: ClassVar[str] = "sparse_int8"

    def attach(self, model: PreTrainedModel) -> None:
        super().attach(model)
        self.linears = list(put_int8_linears(model, self.linears))
        self.embeddings: nn.Module = model.get_input_embeddings()
        self._round_embeddings()

    @torch.no_grad()
    def _round_embeddings(self) -> None:
        weight = self.embeddings.get_parameter("weight")
        weight.copy_(round_to_int8(weight))

    def finalize(self, model: PreTrainedModel) -> PreTrainedModel:
        model = super().finalize(model)
        self._round_embeddings()
        with torch.no_grad():
            for linear in self.linears:
                linear.weight.copy_(round_to_int8(linear.weight))
        return model

    def summary(self) -> dict[str, Any]:
        """As for fixed masks; ``storage`` with 8-bit values for the encoder's matrices and the word embeddings."""
        sizes = storage(self.model, self.linears, int8=[*self.linears, self.embeddings])
        return super().summary() | {"bits": 8, "storage": sizes}
