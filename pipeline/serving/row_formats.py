"""Rows of embedding tables as bytes, and back: float32, float16, and FBGEMM's rows of 8 and 4 bits.

A row of 8 or 4 bits has a scale and a bias of its own: 8 bits a number and then two float32, or 4 bits, the even places in the
lower ones, and then two float16. Torch itself has these formats, in operators that are not part of its documented interface:
they are used here alone.
"""

# Shapes: N rows, R rows of a file, D numbers of a row, W bytes of a row.

from typing import get_args

import torch
from torch import Tensor

from features.errors import UserError
from pipeline.serving.manifest import TableFormat

FORMATS: tuple[TableFormat, ...] = get_args(TableFormat)


def row_bytes(form: TableFormat, dim: int) -> int:
    """W."""
    return {"fp32": 4 * dim, "fp16": 2 * dim, "int8": dim + 8, "int4": (dim + 1) // 2 + 4}[form]


def stored(value_ND: Tensor, form: TableFormat) -> Tensor:
    """byte_NW of float32 rows.

    Raises:
        UserError: a number that is not finite, or not in the range of the format.
    """
    if not bool(value_ND.isfinite().all()):
        raise UserError("a number that is not finite")
    if form == "fp32":
        return value_ND.contiguous().view(torch.uint8)
    if form == "fp16":
        half_ND = value_ND.half()
        return _within(half_ND, half_ND, form).contiguous().view(torch.uint8)
    if form == "int8":
        byte_NW = torch.ops.quantized.embedding_bag_byte_prepack(value_ND)
        return _within(byte_NW, byte_NW[:, -8:].contiguous().view(torch.float32), form)
    byte_NW = torch.ops.quantized.embedding_bag_4bit_prepack(value_ND, False)
    return _within(byte_NW, byte_NW[:, -4:].contiguous().view(torch.float16), form)


def looked_up(byte_RW: Tensor, row_N: Tensor, form: TableFormat) -> Tensor:
    """value_ND, float32. row_N: int64, each below R, which the caller has checked."""
    if form == "fp32":
        return byte_RW.view(torch.float32).index_select(0, row_N)
    if form == "fp16":
        return byte_RW.view(torch.float16).index_select(0, row_N).float()
    look_up = {
        "int8": torch.ops.quantized.embedding_bag_byte_rowwise_offsets,
        "int4": torch.ops.quantized.embedding_bag_4bit_rowwise_offsets,
    }[form]
    bag_N = torch.arange(len(row_N) + 1)  # sums of one row each
    return look_up(byte_RW, row_N, bag_N, False, 0, False, None, None, True)


def _within(found: Tensor, number: Tensor, form: TableFormat) -> Tensor:
    if not bool(number.isfinite().all()):
        raise UserError(f"a number that is beyond the range of {form}")
    return found
