"""Groups of ranks that share tables, on several nodes: the plan's parts of a node are TorchRec's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed import comm

from features.errors import UserError
from pipeline.training.config import Settings
from pipeline.training.parallel import plan, shard
from pipeline.training.parallel.replicas import ranks_on_a_node
from pipeline.training.parallel.topology import Cluster


class Tables(nn.Module):
    """Three tables on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.configs = [EmbeddingBagConfig(9_000, 64, name=n, feature_names=[n]) for n in ("user", "item", "query")]
        self.embeddings = EmbeddingBagCollection(self.configs, device=torch.device("meta"))


def intra_node_groups(ranks: int, group: int, node_size: int, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The groups in which TorchRec exchanges what table_row_wise keeps on a node, of all ranks."""
    found: list[list[int]] = []

    def new_group(ranks: list[int], group_desc: str, **_: Any) -> object:
        if group_desc == "sharding_intra_pg":
            found.append(ranks)
        return object()

    for name in ("_INTRA_PG_2D", "_CROSS_PG_2D", "_NODE_GROUP_SIZE_2D"):
        monkeypatch.setattr(comm, name, None)
    fake = SimpleNamespace(
        get_backend=lambda _: "nccl",
        get_rank=lambda: 0,
        get_world_size=lambda part=None: group if part else ranks,
        new_group=new_group,
        barrier=lambda: None,
        ProcessGroup=object,
    )
    monkeypatch.setattr(comm, "dist", fake)
    env: Any = SimpleNamespace(sharding_pg="group", node_group_size=node_size, use_inter_host_allreduce=True)
    comm.intra_and_cross_node_pg_2D(env)
    return found


@pytest.mark.parametrize(
    ("ranks", "per_node", "group", "shared"),
    [
        (16, 8, 4, 4),
        (16, 8, 8, 8),
        (32, 8, 16, 8),
        (64, 8, 32, 8),
        (24, 8, 12, 4),
        (8, 8, 2, 2),
        (12, 6, 4, 2),
        (4, 1, 2, 1),
        (4, 8, 2, 2),
    ],
)
def test_a_table_on_one_machine_lies_in_one_of_torchrecs_groups_and_parts_of_nodes_are_refused(
    ranks: int, per_node: int, group: int, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ranks_on_a_node(group, per_node) == shared
    groups = intra_node_groups(ranks, group, shared, monkeypatch)
    assert all(len({rank // per_node for rank in peers}) == 1 for peers in groups)  # none leaves its node
    assert sorted(rank for peers in groups for rank in peers) == list(range(ranks))
    model, settings = (
        Tables(),
        Settings(batch_size=ranks * 8, sharding={"default": ["table_row_wise"]}, sharding_group=group),
    )
    cluster = Cluster(ranks, per_node, "cuda", 10**10, 10**12)
    if group % (whole := min(ranks, per_node)):
        with pytest.raises(
            UserError, match=rf"groups of {group} ranks .* are no whole nodes of {whole}\. Use row_wise, or a"
        ):
            plan.place(model, shard.sharders(settings), model.configs, settings, cluster)
        return
    placed, _ = plan.place(model, shard.sharders(settings), model.configs, settings, cluster)
    for sharding in placed.plan["embeddings"].values():
        on = sorted({part.placement.rank() for part in sharding.sharding_spec.shards})
        assert on in groups
