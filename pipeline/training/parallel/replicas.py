"""2D parallelism: tables sharded within groups of ranks and replicated from group to group; the replicas are averaged."""

import math
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.types import EnumerableShardingSpec, ShardingEnv2D, ShardingPlan

from models.ranker import is_table
from pipeline.torch_compat import ShardedTensor, rank_device, set_timeout, timeout_of
from pipeline.training.state_names import in_ranker


def ranks_on_a_node(group: int, ranks_per_node: int) -> int:
    """How many consecutive ranks of a group share a node, whichever group it is.

    That is the smaller of the two where one divides the other. Otherwise some groups begin in the middle of a node: groups of
    4 on nodes of 6 ranks are split 4, 2 + 2 and 4, and parts of 2 are all that every group has on one node. Such groups are
    planned for, but not with table_row_wise (placements.check_groups).
    """
    return math.gcd(group, ranks_per_node)


class ReplicatedGroups(DistributedModelParallel):
    """A model with one replica of its tables in each group of consecutive ranks.

    A group sees the rows of its own ranks only. TorchRec divides what ranks add up for a table by the ranks of the group,
    and the loss is scaled for an average over all ranks: so a group's gradient is that of its own rows times the number of
    groups, and the average over the groups that of the global batch. With SGD and an average after each step, weights are
    those of one table. An optimiser with momentum, or an average after several steps, is not the same: each replica steps
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
            # TorchRec's own is that of LOCAL_WORLD_SIZE, and refuses a group that is a part of a node.
            node_group_size=ranks_on_a_node(group, int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))),
            use_inter_host_allreduce=True,  # which is how it calls groups of consecutive ranks
        )
        env.output_dtensor = False  # the state is that of a group: checkpoints are the same as without replicas
        for part in (env.sharding_pg, env.replica_pg):  # a new group has torch's default of half an hour
            set_timeout(part, timeout_of(world, device))
        _move(plan, dist.get_rank() // group * group, device)
        super().__init__(model, env=env, device=device, plan=plan, **arguments)
        self.replicas, self.averaged = env.replica_pg, True

    def average(self) -> None:
        """Makes the replicas equal: weights and the optimiser's state become their mean over the groups.

        Raises:
            TypeError: a table or a state that is not a ShardedTensor, which would be left out.
        """
        if self.averaged:
            return
        tables = {name: value for name, value in self.state_dict().items() if is_table(in_ranker(name))}
        if not tables:
            raise TypeError("the state dict has none of the tables, so their replicas could not be averaged")
        state = [tables, *self.fused_optimizer.state_dict()["state"].values()]
        pending = [
            dist.all_reduce(tensor, dist.ReduceOp.AVG, group=self.replicas, async_op=True)
            for named in state
            for tensor in _parts(named)
        ]
        for work in pending:
            work.wait()
        self.averaged = True


def after_step(model: nn.Module, step: int, every: int) -> None:
    """To be called after each step, numbered from 1: averages replicated tables every so many steps."""
    if isinstance(model, ReplicatedGroups):
        model.averaged = False
        if step % every == 0:
            model.average()


def synchronise(model: nn.Module) -> None:
    """To be called before the state is read or saved: makes the replicas of tables equal."""
    if isinstance(model, ReplicatedGroups):
        model.average()


def _parts(named: dict[str, Any]) -> list[Tensor]:
    """This rank's parts of sharded tables or of their state, as views.

    Raises:
        TypeError: a value of another kind, which would be left out of the average.
    """
    for name, value in named.items():
        if not isinstance(value, ShardedTensor):
            raise TypeError(
                f"{name} is a {type(value).__name__}, not a ShardedTensor: its replicas could not be averaged"
            )
    return [shard.tensor for value in named.values() for shard in value.local_shards()]


def _move(plan: ShardingPlan, first: int, device: torch.device) -> None:
    """Moves a plan from the ranks 0, 1, ... to `first`, `first` + 1, ..."""
    for module in plan.plan.values():
        for placed in module.values():
            placed.ranks = [rank + first for rank in placed.ranks or []]
            if isinstance(placed.sharding_spec, EnumerableShardingSpec):
                for part in placed.sharding_spec.shards:
                    rank = part.placement.rank() + first
                    place = device if device.type == "cpu" else torch.device(device.type, rank % get_local_size())
                    part.placement = rank_device(rank, place)
