"""A checkpoint of whatever tensors, in blocks as ranks cut them, written byte by byte apart from the code that is tested."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from small_checkpoint import MANIFEST
from torch import Tensor


def cut(size: int, places: Sequence[int]) -> list[tuple[int, int]]:
    edges = sorted({0, size, *(place % (size + 1) for place in places)})
    return list(zip(edges, edges[1:], strict=False))


def write(path: Path, tensors: dict[str, Tensor], row_cuts: Sequence[int], column_cuts: Sequence[int]) -> Path:
    """Blocks of matrices lie in two files by turns. tensors: matrices, or anything else, which stays whole."""
    path.mkdir(parents=True)
    content, entries = {"rank-00000.bin": b"", "rank-00001.bin": b"x" * 64}, {}
    for name, tensor in tensors.items():
        parts = []
        shape = list(tensor.shape)
        matrix_RD = tensor if len(shape) == 2 else tensor.reshape(1, -1)
        cuts = (row_cuts, column_cuts) if len(shape) == 2 else ((), ())
        blocks = [(r, c) for r in cut(len(matrix_RD), cuts[0]) for c in cut(matrix_RD.shape[1], cuts[1])]
        for number, ((top, bottom), (left, right)) in enumerate(blocks):
            file = f"rank-{number % 2:05d}.bin"
            content[file] += bytes(-len(content[file]) % 64)
            block = matrix_RD[top:bottom, left:right].contiguous()
            place = {"offsets": [top, left], "sizes": [bottom - top, right - left]}
            if len(shape) != 2:
                place = {"offsets": [0] * len(shape), "sizes": shape}
            parts.append({**place, "file": file, "start": len(content[file])})
            content[file] += block.reshape(-1).view(torch.uint8).numpy().tobytes()
        entries[name] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape, "parts": parts}
    content["tensors.json"] = json.dumps({"version": 1, "tensors": entries}).encode()
    for name, data in content.items():
        (path / name).write_bytes(data)
    files = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in content.items()}
    (path / "manifest.json").write_text(MANIFEST.sealed(files).model_dump_json())
    return path
