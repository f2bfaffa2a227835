"""How this process multiplies and adds up: TensorFloat-32, and sums in the same order every time."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import deterministic as torch_deterministic

from pipeline.training.config import Settings

deterministic: Any = torch_deterministic  # a module with a property, which mypy does not see
logger = logging.getLogger(__name__)


@contextmanager
def arithmetic(settings: Settings) -> Iterator[None]:
    """Sets both for the block, after which this process is as before, but for cuBLAS's workspace: scoring is in float32.

    It begins before CUDA and NCCL do, which read the environment once.
    """
    precision, repeatable = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    filled = deterministic.fill_uninitialized_memory
    if torch.cuda.is_available():
        _multiply("high" if settings.precision == "tf32" else "highest")
    elif settings.precision == "tf32" and os.environ.get("RANK", "0") == "0":
        logger.info("train.precision=tf32: a CPU has no TF32, products are in float32")
    if settings.deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS sums in one order only with such a workspace
        deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if torch.cuda.is_available():
            _multiply(precision)
        torch.use_deterministic_algorithms(repeatable)
        deterministic.fill_uninitialized_memory = filled


def _multiply(precision: str) -> None:
    """Through the older of torch's two settings: after the newer one torch.compile raises when it reads the older."""
    with warnings.catch_warnings():  # some versions advise the newer one
        warnings.simplefilter("ignore")
        torch.set_float32_matmul_precision(precision)
