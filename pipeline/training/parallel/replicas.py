"""2D parallelism: tables sharded within groups of ranks and copied from group to group; the copies are averaged."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.remote_device import _remote_device
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.types import EnumerableShardingSpec, ShardingEnv2D, ShardingPlan


class CopiedTables(DistributedModelParallel):
    """A model whose tables lie once in each group of consecutive ranks.

    A group sees the rows of its own ranks only. TorchRec divides what ranks add up for a table by the ranks of the group,
    and the loss is scaled for an average over all ranks: so a group's gradient is that of its own rows times the number of
    groups, and the average over the groups that of the global batch. With SGD and an average after each step, weights are
    those of one copy. An optimiser with momentum, or an average after several steps, is not the same: each copy steps
    with its own gradients, and weights and momentum are averaged.

    DMPCollection of TorchRec does this on GPUs only, and averages the state of Adagrad alone.

    Args:
        model, device, sharders, wrapper: as DistributedModelParallel's.
        plan: for the ranks of one group, from 0 on.
        group: ranks of one.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, plan: ShardingPlan, group: int, **arguments: Any
    ) -> None:
        shape = (dist.get_world_size() // group, group)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
        world = dist.GroupMember.WORLD
        assert world is not None
        env = ShardingEnv2D(
            sharding_pg=mesh.get_group("shard"),
            replica_pg=mesh.get_group("replicate"),
            global_pg=world,
            device_mesh=mesh,
            use_inter_host_allreduce=True,  # which is how it calls groups of consecutive ranks
        )
        env.output_dtensor = False  # the state is that of a group: checkpoints are the same as without copies
        timeout = world._get_backend(device).options._timeout
        for part in (env.sharding_pg, env.replica_pg):  # that of a part is half an hour, whatever the run's is
            dist.distributed_c10d._set_pg_timeout(timeout, part)
        _move(plan, dist.get_rank() // group * group, device)
        super().__init__(model, env=env, device=device, plan=plan, **arguments)
        self.replicas, self.averaged = env.replica_pg, True

    def average(self) -> None:
        """Makes the copies equal: weights and the optimiser's state become their mean over the groups."""
        if self.averaged:
            return
        state = [self.state_dict(), *self.fused_optimizer.state_dict()["state"].values()]
        pending = [
            dist.all_reduce(tensor, dist.ReduceOp.AVG, group=self.replicas, async_op=True)
            for named in state
            for tensor in _parts(named)
        ]
        for work in pending:
            work.wait()
        self.averaged = True


def after_step(model: nn.Module, step: int, every: int) -> None:
    """To be called after each step, numbered from 1: averages copied tables every so many; of others nothing."""
    if isinstance(model, CopiedTables):
        model.averaged = False
        if step % every == 0:
            model.average()


def settle(model: nn.Module) -> None:
    """To be called before the state is read or saved: copies of tables are made equal."""
    if isinstance(model, CopiedTables):
        model.average()


def _parts(named: dict[str, Any]) -> list[Tensor]:
    """This rank's parts of the tables in a state, as views."""
    return [s.tensor for value in named.values() if isinstance(value, ShardedTensor) for s in value.local_shards()]


def _move(plan: ShardingPlan, first: int, device: torch.device) -> None:
    """Moves a plan from the ranks 0, 1, ... to `first`, `first` + 1, ..."""
    for module in plan.plan.values():
        for placed in module.values():
            placed.ranks = [rank + first for rank in placed.ranks or []]
            if isinstance(placed.sharding_spec, EnumerableShardingSpec):
                for part in placed.sharding_spec.shards:
                    rank = part.placement.rank() + first
                    place = device.type if device.type == "cpu" else f"{device.type}:{rank % get_local_size()}"
                    part.placement = _remote_device(f"rank:{rank}/{place}")
