"""The team's own configuration, a folder of YAML files, as a ConfigMap that is mounted into the pods."""

import os
from pathlib import Path

from features.errors import UserError

MAX_BYTES = 1 << 20  # of a ConfigMap
MAX_FILES = 1000


def config_files(folder: Path) -> dict[str, str]:
    """Contents of the YAML files of a configuration by their paths below it. Cluster files stay: pods submit nothing.

    Raises:
        UserError: too many, too large, or not UTF-8.
    """
    found: dict[str, str] = {}
    size = 0
    for place, below, names in os.walk(folder, followlinks=True):
        here = Path(place)
        below[:] = sorted(name for name in below if not name.startswith(".") and (here / name) != folder / "cluster")
        for name in sorted(names):
            path = here / name
            if name.startswith(".") or path.suffix.lower() not in (".yaml", ".yml"):
                continue
            size += path.stat().st_size
            if size > MAX_BYTES or len(found) == MAX_FILES:
                raise UserError(
                    f"{folder}: more than {MAX_FILES:,} files or 1 MiB, which is all that a ConfigMap holds: leave what "
                    "the job does not need out, or put the files into the image"
                )
            try:
                found[path.relative_to(folder).as_posix()] = path.read_text()
            except UnicodeDecodeError:
                raise UserError(f"{path} is not UTF-8") from None
    return found


def keys_of(files: dict[str, str]) -> dict[str, str]:
    """Keys of a ConfigMap by path: a key has no slashes, and no characters beyond ASCII."""
    return {path: f"file-{number}.yaml" for number, path in enumerate(files)}
