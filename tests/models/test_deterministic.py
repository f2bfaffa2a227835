"""Operators that GPUs have no deterministic form of: no model uses one (train.deterministic would raise)."""

from typing import Any

import pytest
import torch
from test_fusion import ENCODERS, MODELS, SCHEMA, batch
from torch.utils._python_dispatch import TorchDispatchMode

from features.schema.schema import Schema
from models.ranker import ModelConfig, Ranker

NAMES = ("put_", "histc", "median", "kthvalue", "nll_loss", "scatter_reduce", "_ctc_loss", "reflection_pad1d_backward")


class AsOnGpus(TorchDispatchMode):
    """Raises for what torch.use_deterministic_algorithms raises for on CUDA, among the operators that models might use."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(NAMES), name
        assert name != "bincount" or len(args) < 2, "with weights"
        assert name != "cumsum" or not args[0].is_floating_point(), "of floats"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("content", MODELS)
def test_no_shipped_model_uses_an_operator_without_a_deterministic_form_on_gpus(content):
    config = ModelConfig.model_validate(content)
    model = Ranker(Schema.parse(SCHEMA, "small.yaml"), ENCODERS, config, device="cpu")
    torch.use_deterministic_algorithms(True)
    try:
        with AsOnGpus():
            model(batch()).square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_such_an_operator_is_noticed():
    with pytest.raises(AssertionError, match="of floats"), AsOnGpus():
        torch.ones(3).cumsum(0)
