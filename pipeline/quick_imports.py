"""Imports that the garbage collector does not slow down."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Within it modules are imported without garbage collection; what they left is not gone over by later ones either.

    torch and TorchRec make 650,000 objects that live to the end. Collections while they are imported, and the last one, at
    the end of the process, take as long as the imports themselves.
    """
    collects, imported = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > imported:  # otherwise garbage would be frozen, and nothing else
            gc.freeze()
        if collects:
            gc.enable()
