"""Which fusions are a plain chain of layers where there is one task: what a fused model can be made of (models.emm)."""

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any, NamedTuple

from models.fusion import FUSIONS
from models.fusion.level import unit_counts

# Fusions that for one task are one multi-layer perceptron whatever their arguments, and the name of their StackedMLP.
PERCEPTRONS = {"shared_bottom": "bottom", "single_task": "networks", "aitm": "networks"}
# Those that are one as long as every level has one expert, and the name of a level's StackedMLP.
ONE_EXPERT = {
    "mmoe": "experts.{}",
    "ml_mmoe": "experts.{}",
    "cgc": "levels.{}.experts",
    "ple": "levels.{}.experts",
    "adatt": "levels.{}.experts",
}
CHAINS = (
    f"{', '.join(PERCEPTRONS)}; {' and '.join(ONE_EXPERT)} with one expert a level (of adatt with native=false as well)"
)


class ChainLayer(NamedTuple):
    """A layer with ReLU. name: in the fusion's state. width: of its output."""

    name: str
    width: int


def chain_of(fusion: Mapping[str, Any]) -> list[ChainLayer] | None:
    """The layers of a fusion that for one task is a chain of them, from the input on; None where it is no chain.

    Between layers of a chain there is nothing: a gate over one expert is 1 (MMoE, CGC, PLE), a step without a task before it
    does not exist (AITM). Not so the scalar of a cross-stitch, or AdaTT's native expert, which counts twice with its gate.

    Args:
        fusion: `model.fusion` of a config, of which a fusion has been built.
    """
    name = fusion["name"]
    if name in PERCEPTRONS:
        return _layers(PERCEPTRONS[name], fusion["widths"])
    if name not in ONE_EXPERT:
        return None
    parameters = signature(FUSIONS[name]).parameters.items()
    arguments = {key: p.default for key, p in parameters if p.default is not Parameter.empty} | dict(fusion)
    levels = arguments["levels"]
    if arguments.get("native"):
        return None
    if "num_experts" in arguments:
        counts = [arguments["num_experts"]] * len(levels)
    else:
        counts = [
            sum(units) for units in unit_counts(arguments["task_experts"], arguments["shared_experts"], 1, len(levels))
        ]
    if set(counts) != {1}:
        return None
    return [layer for k, widths in enumerate(levels) for layer in _layers(ONE_EXPERT[name].format(k), widths)]


def _layers(network: str, widths: list[int]) -> list[ChainLayer]:
    return [ChainLayer(f"{network}.layers.{k}", width) for k, width in enumerate(widths)]
