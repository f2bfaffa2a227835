"""Private names of torch that serving uses; tests/pipeline/test_dense_program.py checks them. No torchrec here."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

MODEL = "model"  # the name that torch gives the only model of a package


def compiled_program(path: Path, runners: int) -> Callable[..., Tensor]:
    """The function of AOTInductor's package: positional tensors in, its one tensor out.

    torch._inductor.aoti_load_package would import the compiler, which takes seconds.

    Args:
        runners: how many threads may run it at once; others wait.
    """
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), MODEL, False, runners, -1)

    def run(*inputs: Tensor) -> Tensor:
        (found,) = loader.run(list(inputs))
        return found

    return run
