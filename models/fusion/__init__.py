"""Fusions: the part between input and towers, x_BD -> h_BTD, one file and one class each."""

from collections.abc import Mapping, Sequence
from typing import Any

from features.errors import UserError
from models.fusion.adatt import AdaTT
from models.fusion.aitm import AITM
from models.fusion.apem import APEM
from models.fusion.automtl import AutoMTL, Supernet
from models.fusion.autotask import AutoTask
from models.fusion.cross_stitch import CrossStitch
from models.fusion.dtrn import DTRN
from models.fusion.emm import EMM
from models.fusion.fusion import Fusion
from models.fusion.home import HoME
from models.fusion.mmoe import MMoE
from models.fusion.multitab import MultiTab
from models.fusion.pepnet import PEPNet
from models.fusion.ple import CGC, PLE
from models.fusion.shared_bottom import SharedBottom
from models.fusion.single_task import SingleTask
from models.fusion.stem import STEM
from models.fusion.tasks import TaskInfo
from models.registry import build, chosen

FUSIONS: dict[str, type[Fusion]] = {
    "single_task": SingleTask,
    "shared_bottom": SharedBottom,
    "cross_stitch": CrossStitch,
    "mmoe": MMoE,
    "ml_mmoe": MMoE,
    "cgc": CGC,
    "ple": PLE,
    "adatt": AdaTT,
    "aitm": AITM,
    "emm": EMM,
    "apem": APEM,
    "dtrn": DTRN,
    "multitab": MultiTab,
    "autotask": AutoTask,
    "home": HoME,
    "pepnet": PEPNet,
    "stem": STEM,
    "automtl": AutoMTL,
    "automtl_supernet": Supernet,
}


def fusion_class(config: dict[str, Any]) -> type[Fusion]:
    """The class that `config["name"]` names. Raises UserError for an unknown name."""
    return chosen("fusion", FUSIONS, config)


def build_fusion(
    config: dict[str, Any],
    in_dim: int,
    tasks: Sequence[str],
    fields: Sequence[str],
    sequences: Mapping[str, int] | None = None,
    columns: Sequence[Sequence[int]] = (),
    infos: Sequence[TaskInfo] | None = None,
) -> Any:
    """The fusion named `config["name"]` with the other keys as its arguments.

    Args:
        in_dim: D of x_BD, or of a token. tasks, fields: names, in order; a field is a feature.
        sequences: fields that are read item by item, with the most items each may have.
        columns: of x_BD, by field.
        infos: of the same tasks; None: all are binary, of all rows.
    Raises:
        UserError: an unknown name, arguments that the class does not take, or tasks or features that do not exist.
    """
    kind = fusion_class(config)
    config = dict(config)
    names = dict.fromkeys(kind.task_arguments, tasks) | dict.fromkeys(kind.field_arguments, fields)
    for key, known in names.items():
        if (chosen_names := config.get(key)) is None:
            continue
        if not isinstance(chosen_names, list):
            raise UserError(f"model.fusion.{key}: {chosen_names} is no list: write [{chosen_names}]")
        if unknown := [str(name) for name in _flat(chosen_names) if name not in known]:
            raise UserError(f"model.fusion.{key}: {', '.join(unknown)} is not one of {', '.join(known)}")
        config[key] = _indices(chosen_names, known)
    sizes: tuple[Any, ...] = (in_dim, len(tasks), len(fields)) if kind.fields else (in_dim, len(tasks))
    if kind.sequences:
        sizes += ({fields.index(name): length for name, length in (sequences or {}).items()},)
    if kind.reads_columns:
        sizes += (columns,)
    if kind.reads_tasks:
        if "tasks" in config:
            raise UserError("model.fusion.tasks: the schema says what its tasks are; leave it out")
        config["tasks"] = infos or [TaskInfo(name) for name in tasks]
    return build("fusion", kind, config, *sizes)


def _flat(names: Sequence[Any]) -> list[Any]:
    """The names in lists of names, and in lists of such lists."""
    return [name for part in names for name in (_flat(part) if isinstance(part, list) else [part])]


def _indices(names: Sequence[Any], known: Sequence[str]) -> list[Any]:
    """Of each name its place in `known`, in lists as `names` has them."""
    return [_indices(name, known) if isinstance(name, list) else known.index(name) for name in names]
