"""Parts of the model by config: the name of a registered class and its arguments."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError, validate_call

from features.errors import UserError, fault_text

Kind = TypeVar("Kind")


def chosen(part: str, registry: Mapping[str, type[Kind]], config: Mapping[str, Any]) -> type[Kind]:
    """The class that `config["name"]` names.

    Args:
        part: the key under `model`, for messages.
    Raises:
        UserError: an unknown name.
    """
    if (name := str(config.get("name"))) not in registry:
        raise UserError(f"model.{part}.name: {name} is not one of {', '.join(registry)}")
    return registry[name]


def build(part: str, kind: type[Kind], config: Mapping[str, Any], *sizes: Any) -> Kind:
    """An instance of `kind` from `sizes` and the arguments in `config`.

    Raises:
        UserError: arguments that the class does not take, or one that it lacks.
    """
    arguments = {key: value for key, value in config.items() if key != "name"}
    made = kind.__new__(kind)
    try:
        validate_call(type(made).__init__)(made, *sizes, **arguments)
    except ValidationError as error:
        faults = "; ".join(f"model.{part}.{_path(e['loc'], arguments)}: {fault_text(e)}" for e in error.errors())
        raise UserError(f"{faults} ({part} {config['name']})") from None
    return made


def _path(place: tuple[str | int, ...], arguments: Mapping[str, Any]) -> str:
    """The key of a fault: of an argument, or below one that is a mapping. Below others it would name types."""
    return ".".join(map(str, place if isinstance(arguments.get(str(place[0])), Mapping) else place[:1]))
