"""Number formats of the all-to-alls of tables: embeddings forward, their gradients backward."""

import math

from fbgemm_gpu.quantize_comm import QuantizationContext, QuantizedCommCodec
from torch import Tensor
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.types import CommOp, QuantizedCommCodecs

from pipeline.torch_compat import precision
from pipeline.training.config import Settings

OPERATIONS = (
    CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL,
    CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER,
    CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL,
)


class ScaledCodec(QuantizedCommCodec):
    """A format of few exponents for small numbers: they are multiplied by a power of two, which is exact, and sent.

    TorchRec's own `loss_scale` divides before it goes back to float32, where the small numbers are lost again.

    Args:
        codec: of the format. scale: the power of two.
    """

    def __init__(self, codec: QuantizedCommCodec, scale: float) -> None:
        super().__init__(precision(codec))
        self.scale = scale

    def encode(self, input_tensor: Tensor, ctx: QuantizationContext | None = None) -> Tensor:
        """In the format, times the scale."""
        return super().encode(input_tensor * self.scale, ctx)

    def decode(self, input_tensor: Tensor, ctx: QuantizationContext | None = None) -> Tensor:
        """In float32, over the scale."""
        return super().decode(input_tensor, ctx) / self.scale


def codecs(settings: Settings) -> dict[str, QuantizedCommCodecs] | None:
    """TorchRec's registry of codecs for `settings.communication`; None where all is float32.

    TorchRec's own registry sends fp16 for bf16 between CPUs, though gloo has bf16 by now. So this one is filled here.
    """
    formats = settings.communication
    if formats.forward == formats.backward == "fp32":
        return None
    config = QCommsConfig(CommType(formats.forward), CommType(formats.backward))
    found = {operation.name: get_qcomm_codecs(config) for operation in OPERATIONS}
    if formats.backward == "fp16":
        # A gradient of a mean over the batch falls below 6e-5, where fp16 has fewer digits, and below 6e-8, where it has none.
        scale = 2.0 ** round(math.log2(settings.order().batch_size))
        for pair in found.values():
            pair.backward = ScaledCodec(pair.backward, scale)
    return found
