"""Releases of torch, TorchRec and FBGEMM that belong together: checked before a job imports them."""

import re
from importlib import metadata

from features.errors import UserError

# TorchRec and FBGEMM 1.N are built for torch 2.(N + 5): FBGEMM's release table. The packages declare no torch requirement.
AHEAD = 5
BUILT_FOR_TORCH = ("torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")


def check_versions() -> None:
    """Compares the installed releases; FBGEMM of another torch fails at best with an undefined symbol, late and in many lines.

    What is not installed, a nightly build or a later major version is not judged.

    Raises:
        UserError: two that do not belong together.
    """
    torch = _installed("torch")
    if torch is None or (found := re.match(r"2\.(\d+)\.", torch)) is None:
        return
    fitting = int(found[1]) - AHEAD
    for name in BUILT_FOR_TORCH:
        version = _installed(name)
        built = re.match(r"1\.(\d+)\.", version or "")
        if built and int(built[1]) != fitting:
            raise UserError(
                f"{name} {version} is built for torch 2.{int(built[1]) + AHEAD}, and torch {torch} is installed. Install what "
                f"belongs together: requirements-gpu.txt or requirements-cpu.txt, or torchrec and fbgemm-gpu 1.{fitting}"
            )


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
