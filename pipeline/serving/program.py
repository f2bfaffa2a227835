"""The dense part of a package, from embeddings to logits: the graph that torch.export wrote, or AOTInductor's library of it."""

# Shapes: B rows, T tasks, E width of all embeddings, D dense columns.

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from features.errors import UserError, one_line
from features.regular_files import lstat_regular, read_regular
from pipeline import cores
from pipeline.serving.archive import damaged, read_archive
from pipeline.serving.graph import Calls
from pipeline.serving.manifest import COMPILED, DENSE, HINT, Manifest, StoredFile
from pipeline.serving.torch_compat import compiled_program
from pipeline.storage.files import sha256

Program = Callable[[Tensor, Tensor], Tensor]
INSTEAD = "or load the package with compiled=False."


def load_program(folder: Path, manifest: Manifest, compiled: bool = False) -> Program:
    """The dense program of a package: (embedding_BE, dense_BD) -> logit_BT. Several threads may call it at once.

    Args:
        compiled: the library that AOTInductor made of it. It is code, and is loaded only if its checksum is the manifest's.
    Raises:
        UserError: a file that is not the manifest's; no plain program; one compiled for another torch or processor.
    """
    tasks, widths = len(manifest.tasks), (manifest.embedding_dim, manifest.dense_width)
    if compiled:
        run = _compiled(folder, manifest)
    else:
        expected = _expected(folder, manifest, DENSE)
        run = graph_program(_read(folder, DENSE, expected), folder / DENSE, tasks, widths)

    @torch.inference_mode()
    def program(embedding_BE: Tensor, dense_BD: Tensor) -> Tensor:
        rows = len(dense_BD)
        for x, width in zip((embedding_BE, dense_BD), widths, strict=True):
            # Compiled code takes the sizes that it was compiled for as given.
            if x.shape != (rows, width) or x.dtype != torch.float32:
                raise ValueError(f"{x.dtype} of shape {[*x.shape]}, not float32 of {[rows, width]}")
        return run(embedding_BE.contiguous(), dense_BD.contiguous()) if rows else dense_BD.new_zeros(0, tasks)

    return program


def graph_program(content: bytes, where: object, tasks: int, widths: tuple[int, int]) -> Program:
    """The program that an archive has, after a trial on two rows.

    Args:
        where: the file, for errors. tasks: T. widths: E, D.
    Raises:
        UserError: it is none, or not one of these sizes.
    """
    module, tensors = read_archive(content, where)
    try:
        with torch.inference_mode():
            calls = Calls(module, tensors)
            found = calls.trial(*(torch.zeros(2, width) for width in widths))
    except (RuntimeError, TypeError, ValueError, LookupError, OverflowError, AttributeError, MemoryError) as error:
        raise damaged(where, one_line(error)) from None
    if not isinstance(found, Tensor) or found.shape != (2, tasks) or found.dtype != torch.float32:
        raise damaged(where, f"outputs that are not those of {tasks} tasks")
    return calls


def compiled_for() -> dict[str, str]:
    """What a compiled program depends on, for the manifest's versions: torch, and the processor's vector instructions."""
    return {"torch": str(torch.__version__), "cpu": torch.backends.cpu.get_cpu_capability()}


def _compiled(folder: Path, manifest: Manifest) -> Program:
    path = folder / COMPILED
    if not manifest.compiled:
        raise UserError(f"{folder}: no compiled program. Run jobs.export with target=aot, {INSTEAD}")
    expected = _expected(folder, manifest, COMPILED)
    for what, here in compiled_for().items():
        if (there := manifest.versions.get(what)) != here:
            raise UserError(
                f"{path}: compiled for {what} {there}, and here is {here}. Run jobs.export with target=aot on such a machine, "
                f"{INSTEAD}"
            )
    if lstat_regular(folder, COMPILED) is None or sha256(path) != expected.sha256:
        raise UserError(f"{path}: missing, or its checksum is not the manifest's. {HINT}")
    return compiled_program(path, cores.available())


def _expected(folder: Path, manifest: Manifest, name: str) -> StoredFile:
    if (expected := manifest.files.get(name)) is None:
        raise UserError(f"{folder}: its manifest names no {name}. {HINT}")
    return expected


def _read(folder: Path, name: str, expected: StoredFile) -> bytes:
    """A file's content, compared with the manifest in memory: no other content can take its place meanwhile."""
    try:
        content = read_regular(folder, name, expected.bytes)
    except FileNotFoundError:
        raise UserError(f"{folder / name} is missing. {HINT}") from None
    if hashlib.sha256(content).hexdigest() != expected.sha256:
        raise UserError(f"{folder / name}: its checksum is not the manifest's: it changed after it was written. {HINT}")
    return content
