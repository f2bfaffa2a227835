"""Whether this machine reaches the stores of a job: it may not, and then nobody is to wait here as long as the job would."""

from contextlib import suppress
from pathlib import Path

from pipeline.storage.patience import patiently_for
from pipeline.storage.store_path import StorePath

ANSWER_S = 5.0  # for which a store is asked, once

_answering: dict[str, bool] = {}  # by store


def answers(path: Path) -> bool:
    """Whether a path's store answers; True on a mounted file system."""
    if not isinstance(path, StorePath):
        return True
    store = "/".join(str(path).split("/")[:3])
    if store not in _answering:
        _answering[store] = _answers_now(path)
    return _answering[store]


def _answers_now(path: StorePath) -> bool:
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            patiently_for(ANSWER_S, path, path.system.info, path.key)
    except OSError:
        return False
    return True


def is_seen(path: Path) -> bool:
    """Whether a path is there, as far as this machine sees."""
    try:
        return answers(path) and path.exists()
    except OSError:
        return False
