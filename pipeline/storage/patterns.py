"""Glob patterns with `**`, as pathlib reads them."""

import fnmatch


def matches(names: tuple[str, ...], parts: tuple[str, ...], is_dir: bool) -> bool:
    """Whether the names of a path, relative to a folder, match the parts of a pattern; `**` in the end is for folders."""
    if not parts:
        return not names
    if parts[0] == "**":
        return (
            is_dir
            if len(parts) == 1
            else any(matches(names[skip:], parts[1:], is_dir) for skip in range(len(names) + 1))
        )
    return bool(names) and fnmatch.fnmatchcase(names[0], parts[0]) and matches(names[1:], parts[1:], is_dir)
