"""The cluster backends by the name that a cluster's file gives as `backend`."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from features.errors import UserError, did_you_mean, fault_text, join_faults
from pipeline.cluster.base import Backend, Cluster
from pipeline.cluster.kubernetes.backend import Kubernetes
from pipeline.cluster.local import Local
from pipeline.cluster.slurm import Slurm

BACKENDS: dict[str, type[Cluster]] = {"local": Local, "slurm": Slurm, "kubernetes": Kubernetes}
CHECKED: tuple[type[Backend], ...] = (Local, Slurm, Kubernetes)  # by mypy: they have the protocol's methods


def open_cluster(content: Mapping[str, Any], where: str) -> Any:
    """The backend that a cluster's file describes. Contacts nothing.

    Args:
        content: of the file. where: it stands, for errors.
    Raises:
        UserError: an unknown backend, unknown keys, or values of the wrong type, all named in one line.
    """
    name = str(content.get("backend"))
    if name not in BACKENDS:
        raise UserError(f"{where}: backend: {name} is not one of {', '.join(BACKENDS)}{did_you_mean(name, BACKENDS)}")
    try:
        return BACKENDS[name].model_validate(content)
    except ValidationError as error:
        fields = BACKENDS[name].model_fields
        places = ((".".join(map(str, e["loc"])), _fault(e, fields)) for e in error.errors())
        raise UserError(
            f"{where}: {join_faults([f'{place}: {what}' if place else what for place, what in places])}"
        ) from None


def _fault(error: Any, fields: Iterable[str]) -> str:
    """What is wrong with a setting, and for an unknown key at the top the nearest of the backend's own."""
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        return f"no such setting{did_you_mean(str(error['loc'][0]), fields)}"
    return fault_text(error)
