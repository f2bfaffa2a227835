"""Settings by their dotted names, and as words of another job's command line."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def setting(key: str, value: str | Path, always: bool = False) -> str:
    """KEY=VALUE, the value in quotes where Hydra's grammar would read it as something else, such as `runs/[x]`.

    Args:
        always: in quotes whatever the value is.
    """
    text = str(value)
    if not always and re.fullmatch(r"[\w./:@%+-]*", text, re.ASCII):
        return f"{key}={text}"
    # In quotes \' is a quote, and backslashes are doubled only before one.
    quoted = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"{key}='{quoted}'"


def dotted(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a nested configuration, each by its dotted name; a mapping without settings is one itself."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
