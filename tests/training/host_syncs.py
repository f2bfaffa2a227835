"""Counts what a host would wait for a GPU for: operators whose result, or its shape, it needs."""

from collections import Counter
from threading import get_ident
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITED_FOR = {
    "_local_scalar_dense",
    "nonzero",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "masked_select",
    "equal",
}


class HostSyncs(TorchDispatchMode):
    """Counts them within a block, by name: on CUDA each waits for all that was launched before. Collectives as well."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self.tolist, self.thread = Tensor.tolist, get_ident()
        Tensor.tolist = lambda tensor: self._tolist(tensor)
        return super().__enter__()

    def _tolist(self, tensor: Tensor) -> Any:
        """A copy to the host, which is no operator where it lies there; threads that read batches ahead do not count."""
        self.waits["tolist"] += get_ident() == self.thread
        return self.tolist(tensor)

    def __exit__(self, *error: object) -> None:
        Tensor.tolist = self.tolist
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            self.messages[name.rstrip("_")] += 1
        elif name in WAITED_FOR or (name == "repeat_interleave" and not (kwargs or {}).get("output_size")):
            self.waits[name] += 1
        elif name == "bincount":
            self.waits[name] += 2  # the least and the largest number
        elif name in ("index", "index_put", "index_put_"):  # a mask's places are counted first
            self.waits["mask"] += sum(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        return func(*args, **(kwargs or {}))
