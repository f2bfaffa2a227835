"""Fusions: the part between input and towers, x_BD -> h_BTD, one file and one class each."""

from typing import Any

from pydantic import ValidationError, validate_call
from torch import nn

from features.errors import UserError
from models.fusion.adatt import AdaTT
from models.fusion.mmoe import MMoE
from models.fusion.ple import PLE
from models.fusion.shared_bottom import SharedBottom

FUSIONS: dict[str, type[nn.Module]] = {
    "shared_bottom": SharedBottom,
    "mmoe": MMoE,
    "ple": PLE,
    "adatt": AdaTT,
}


def build_fusion(config: dict[str, Any], in_dim: int, num_tasks: int) -> Any:
    """The fusion named `config["name"]` with the other keys as its arguments: a module with `out_dim` and `gates`.

    Raises:
        UserError: an unknown name, or arguments that the class does not take.
    """
    arguments = {key: value for key, value in config.items() if key != "name"}
    name = config.get("name")
    if name not in FUSIONS:
        raise UserError(f"model.fusion.name: {name} is not one of {', '.join(FUSIONS)}")
    try:
        fusion = FUSIONS[name].__new__(FUSIONS[name])
        validate_call(FUSIONS[name].__init__)(fusion, in_dim, num_tasks, **arguments)
        return fusion
    except ValidationError as error:
        faults = "; ".join(f"model.fusion.{e['loc'][0]}: {e['msg']}" for e in error.errors())
        raise UserError(f"{faults} (fusion {name})") from None
