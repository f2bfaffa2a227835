"""Tables with kernel fused_uvm_caching: how many of their rows a GPU caches, and whether they are fetched a batch ahead."""

from collections import Counter
from collections.abc import Sequence

from torchrec.distributed.planner.types import ShardingOption, Storage
from torchrec.distributed.types import CacheParams, ShardingPlan

KERNEL, DENSE = "fused_uvm_caching", "dense"  # the latter is that of data_parallel tables
LEAST, MOST = 0.02, 0.95  # of a table's rows; TorchRec takes neither none nor all
SLOT = 20  # bytes beside a cached row: which it is, when it was used, and whether a batch that was fetched needs it


def cache_rows(placed: ShardingPlan, options: Sequence[ShardingOption], room: int, prefetch: bool) -> float | None:
    """Lets the tables that are cached have what their GPUs have left, the same share of the rows of each.

    Args:
        placed: the plan, which gets the share. options: the same as the planner chose it, with LEAST of the rows cached; the
            bytes of their shards become those of the share.
        room: bytes of a GPU for tables. prefetch: whether the training loop fetches rows a batch ahead.
    Returns: the share; None where no table is cached.
    """
    used, whole = Counter[int](), Counter[int]()
    cached = [option for option in options if option.compute_kernel == KERNEL]
    # FBGEMM's other kernels of the same lookup are asked to fetch as well, and have to know.
    others = CacheParams(prefetch_pipeline=True) if cached and prefetch else None
    shardings = [sharding for module in placed.plan.values() for sharding in module.values()]
    for sharding in shardings:
        sharding.cache_params = others if sharding.compute_kernel != DENSE else None
    if not cached:
        return None
    for option in options:
        for shard in option.shards:
            used[shard.rank or 0] += shard.storage.hbm if shard.storage else 0
    # Tables that are fetched ahead have a cache each; else those of a look-up share one, whose rows are as wide as its widest.
    widest = 0 if prefetch else max(shard.size[1] for option in cached for shard in option.shards)
    for option in cached:
        for shard in option.shards:
            whole[shard.rank or 0] += _bytes(option, shard.size, widest)
    share = min(MOST, LEAST + min(max(room - used[rank], 0) / whole[rank] for rank in whole))
    for option in cached:
        for shard in option.shards:
            shard.storage = (shard.storage or Storage(0, 0)) + Storage(
                int((share - LEAST) * _bytes(option, shard.size, widest)), 0
            )
    for sharding in shardings:
        if sharding.compute_kernel == KERNEL:
            sharding.cache_params = CacheParams(load_factor=share, prefetch_pipeline=prefetch)
    return share


def is_cached(plan: ShardingPlan) -> bool:
    """Whether any table of a plan is cached, be it on another rank: ranks run one loop."""
    return any(sharding.compute_kernel == KERNEL for module in plan.plan.values() for sharding in module.values())


def _bytes(option: ShardingOption, size: Sequence[int], widest: int) -> int:
    rows, columns = size
    return rows * (max(columns, widest) * option.tensor.element_size() + SLOT)
