"""Locks on a store: objects with an owner and a time, which a dead owner's outlive by LEASE_S at most."""

from pipeline.storage.base import Lock
from pipeline.storage.store_path import StorePath

LEASE_S = 30.0  # after which an owner that has not renewed its lease is taken to be dead


def lease(path: StorePath, shared: bool, wait: bool) -> Lock:
    """A lease on a path. Raises BlockingIOError where another process has it and `wait` is false."""
    raise NotImplementedError
