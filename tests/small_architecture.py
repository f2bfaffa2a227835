"""An architecture for model=automtl, which jobs.search would otherwise have to find."""

from collections.abc import Sequence
from typing import Any

INTERACTIONS = ["product_inner", "product_outer", "cross_2", "attention_2", "mlp_8", "skip"]  # one of every kind


def small_architecture(tasks: Sequence[str], interaction: str = "attention_2") -> dict[str, Any]:
    """Experts of every operation: the first of the tasks has all, each other one the first and another."""
    experts = [["mlp_8", "gating"], ["conv_3", "skip"], ["mlp_8", "mlp_4"], ["skip", "conv_3"]]
    chosen = {task: sorted({1, 1 + t % len(experts)}) if t else [1, 2, 3, 4] for t, task in enumerate(tasks)}
    return {"width": 16, "token_dim": 8, "interaction": interaction, "experts": experts, "tasks": chosen}


def with_architecture(model: dict[str, Any], tasks: Sequence[str], interaction: str = "attention_2") -> dict[str, Any]:
    """A model's settings, with an architecture for these tasks where its fusion needs one."""
    if model["fusion"]["name"] != "automtl":
        return model
    return model | {"fusion": model["fusion"] | {"architecture": small_architecture(tasks, interaction)}}


def small_supernet(interaction: Sequence[str] = INTERACTIONS) -> dict[str, Any]:
    """The settings of a fusion that holds such architectures."""
    blocks = ["mlp_8", "mlp_4", "gating", "conv_3", "skip"]
    return {
        "name": "automtl_supernet", "width": 16, "token_dim": 8, "experts": 3, "depth": 2,
        "interaction": list(interaction), "blocks": blocks,
    }  # fmt: skip
