"""The dense part of a ranker as files: torch.export's program and, on request, AOTInductor's library."""

# Shapes: B rows, T tasks, E width of all embeddings, D dense columns.

import copy
import io
import json
import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from features.batch import Batch
from features.errors import UserError, one_line
from models.ranker import POOLED, UNPOOLED, Ranker
from pipeline.release.export.lowering import Lowered
from pipeline.serving.archive import MODEL, ROOT, SAMPLE_INPUTS
from pipeline.serving.manifest import COMPILED, DENSE
from pipeline.serving.program import graph_program
from pipeline.torch_compat import compile_program

MAX_ROWS = 1 << 20  # of a batch
UNUSED = (POOLED, UNPOOLED, "managed", "row_losses")  # modules of a ranker that no logit depends on
GRAPH = f"{ROOT}/models/{MODEL}.json"
IDENTIFIER = f"{ROOT}/.data/serialization_id"
MARCH = {"AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}  # what torch's names of a processor's instructions stand for

logger = logging.getLogger(__name__)


class Dense(nn.Module):
    """A ranker from its embeddings on: (embedding_BE, dense_BD) -> logit_BT."""

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        self.ranker = copy.copy(ranker)
        kept = {name: copy.deepcopy(module) for name, module in ranker.named_children() if name not in UNUSED}
        self.ranker._modules = {**kept, **dict.fromkeys(UNUSED)}
        for tensor in (*self.ranker.parameters(), *self.ranker.buffers()):
            # One after the other in a file: none a view of another.
            tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)

    def forward(self, embedding_BE: Tensor, dense_BD: Tensor) -> Tensor:  # noqa: D102
        # Labels are read in training alone, ids only for the embeddings.
        batch: Any = Batch(None, dense_BD, None, None, None, None)
        return self.ranker.units(self.ranker.dense_outputs(embedding_BE, batch))


def write_program(ranker: Ranker, embedding_dim: int, dense_width: int, folder: Path, compiled: bool) -> list[str]:
    """Writes the dense program of a ranker into a folder; returns the names of the files.

    Of the same weights DENSE has the same bytes; COMPILED has not, compilers write paths and identifiers.

    Args:
        ranker: its dense weights loaded; its tables may be on the meta device.
        embedding_dim: E. dense_width: D.
        compiled: COMPILED too, for this torch and processors of this kind.
    Raises:
        UserError: operators that pipeline.serving.operators does not have; no compiler.
    """
    check_compiler(compiled)
    program = exported(ranker, embedding_dim, dense_width)
    content = archive_of(program)
    try:
        graph_program(content, "its program", len(ranker.units.scales), (embedding_dim, dense_width))
    except UserError as error:
        raise UserError(
            f"this model cannot be served yet: {error.args[0].partition(': no program')[0]}. A fusion that is new adds its "
            "operators to pipeline/serving/operators.py."
        ) from None
    (folder / DENSE).write_bytes(content)
    if not compiled:
        return [DENSE]
    if torch.backends.mkldnn.is_available():
        program = with_rows(Lowered(program), embedding_dim, dense_width)
    try:
        compile_program(program, folder / COMPILED, MARCH.get(torch.backends.cpu.get_cpu_capability()))
    except RuntimeError as error:
        raise UserError(
            f"target=aot: the program cannot be compiled: {one_line(error)}. Set target=eager, or see that the C++ compiler "
            "works."
        ) from None
    return [DENSE, COMPILED]


def check_compiler(compiled: bool) -> None:
    """Raises UserError where a program is to be compiled and there is no compiler."""
    wanted = os.environ.get("CXX", "g++")
    if compiled and shutil.which(wanted) is None:
        raise UserError(
            f"target=aot: no C++ compiler {wanted} here. Install one (Debian: g++) or name it in CXX, one "
            "command without arguments, or set target=eager."
        )


def exported(ranker: Ranker, embedding_dim: int, dense_width: int) -> torch.export.ExportedProgram:
    """The dense part as torch.export has it, for 1 to MAX_ROWS rows."""
    return with_rows(Dense(ranker).eval(), embedding_dim, dense_width)


def with_rows(module: nn.Module, embedding_dim: int, dense_width: int) -> torch.export.ExportedProgram:
    """A module of (embedding_BE, dense_BD) as torch.export has it, for 1 to MAX_ROWS rows."""
    rows = torch.export.Dim("B", min=1, max=MAX_ROWS)
    # Sizes of 0 and 1 would be taken for constants.
    example = torch.zeros(2, embedding_dim), torch.zeros(2, dense_width)
    with torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=({0: rows}, {0: rows}))


def archive_of(program: torch.export.ExportedProgram) -> bytes:
    """A program in torch's format, without sample inputs, which are a pickle, and paths of this machine."""
    written, content = io.BytesIO(), io.BytesIO()
    torch.export.save(program, written)
    with zipfile.ZipFile(written) as source, zipfile.ZipFile(content, "w") as archive:
        for entry in source.infolist():
            name = f"{ROOT}/{entry.filename.partition('/')[2]}"
            if name == IDENTIFIER:
                continue
            member = b"" if name == SAMPLE_INPUTS else source.read(entry)
            archive.writestr(zipfile.ZipInfo(name), _without_traces(member) if name == GRAPH else member)
    return content.getvalue()


def _without_traces(content: bytes) -> bytes:
    model = json.loads(content)
    for node in model["graph_module"]["graph"]["nodes"]:
        node["metadata"].pop("stack_trace", None)
    return json.dumps(model, sort_keys=True).encode()
