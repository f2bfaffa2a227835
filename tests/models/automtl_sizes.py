"""Names of candidates and places of features, drawn for tests of AutoMTL."""

import random

from hypothesis import strategies as st
from reference_checks import Sizes, drawn_sizes

BLOCKS = ["gating", "mlp_1", "mlp_2", "mlp_4", "conv_1", "conv_3", "conv_5", "conv_7", "skip"]
INTERACTIONS = [
    "product_inner", "product_outer", "cross_1", "cross_2", "cross_3", "attention_1", "attention_2", "attention_4", "mlp_1",
    "mlp_3", "mlp_4", "skip",
]  # fmt: skip


def some(names: list[str], most: int = 6) -> st.SearchStrategy[list[str]]:
    """Different names in any order."""
    return st.lists(st.sampled_from(names), unique=True, min_size=1, max_size=most)


def automtl_sizes(**further: st.SearchStrategy) -> st.SearchStrategy[Sizes]:
    """H, F, W, N and what models of AutoMTL are built for otherwise."""
    common = {
        "H": st.integers(1, 5), "F": st.integers(1, 3), "W": st.sampled_from([4, 8]), "N": st.integers(1, 3),
        "nested": st.booleans(),
    }  # fmt: skip
    return drawn_sizes(**(common | further))


def columns(size: Sizes) -> list[list[int]]:
    """Of up to F features their columns of x_BD: some more than others, in no order."""
    order, features = random.Random(size.seed).sample(range(size.D), size.D), min(size.F, size.D)
    return [*([column] for column in order[: features - 1]), order[features - 1 :]]
