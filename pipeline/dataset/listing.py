"""What lies in a dataset's folder on a store: all of it by one listing, in place of a request a file."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from pipeline.storage.store_path import StorePath, described_below, on_store

Item = TypeVar("Item")
Found = TypeVar("Found")

AT_ONCE = 16  # requests


def sizes_below(folder: StorePath) -> dict[str, int]:
    """The bytes of all files below a folder, by their names relative to it."""
    return {str(file.relative_to(folder)): info.get("size") or 0 for file, info in described_below(folder).items()}


def each_of(folder: Path, call: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
    """What a call returns for each item, in order; at the same time where the folder that it asks of is on a store."""
    if not on_store(folder):
        return [call(item) for item in items]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(call, items))
