"""Settings and groups that a job does not have, answered with the nearest one that it has."""

from collections.abc import Iterator
from typing import Any

from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigTypeError, OmegaConfBaseException

from features.errors import UserError, did_you_mean
from features.printable import printable

MAX_DEPTH = 8  # of the settings that are suggested
# Sections with keys that are not all in their files: of a schema, options of a model or a weighting, settings of one table,
# variables and resources of a cluster.
CLUSTER = ("environment", "secrets", "resources", "jobs", "paths", "devices", "node_selector")
EXTENSIBLE = (
    *("data.", "model.", "train.weighting.", "train.sharding.", "train.kernels."),
    *(f"cluster.{section}." for section in CLUSTER),
)


def explained(error: ConfigCompositionException) -> Exception:
    """The error for a setting or a value of a group that is not there or is of another kind; any other as it is."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        near = did_you_mean(f"{group}={name}", [f"{group}={option}" for option in error.options])
        return UserError(
            f"Could not find '{printable(error.missing_cfg_file[:200])}'{near}. Available options in '{group}': "
            f"{' '.join(error.options)}. Files of your own come with --config-dir=DIR."
        )
    if isinstance(cause, ConfigTypeError) and cause.full_key:
        key = printable(str(cause.full_key)[:200])
        return UserError(
            f"{key}: a list and a mapping cannot be merged. To replace one by the other: '~{key}' '+{key}=VALUE'"
        )
    if not isinstance(cause, OmegaConfBaseException) or not isinstance(cause.parent_node, DictConfig):
        return error
    key, name = str(cause.full_key), str(cause.key)
    inside = key.removesuffix(name)  # what stands before the part that is wrong, with its dot
    root: Any = cause.parent_node._get_root()
    known = sorted(_keys(root))
    nearest = did_you_mean(key, [k for k in known if k.startswith(inside) and "." not in k[len(inside) :]])
    if not nearest and (same := [k for k in known if k.rpartition(".")[2] == name]):
        nearest = f" (did you mean {same[0]}?)"
    adds = "; +KEY=VALUE adds a key that a file lacks" if key.startswith(EXTENSIBLE) else ""
    return UserError(f"{printable(key[:200])}: no such setting{nearest}. See --help{adds}.")


def _keys(config: DictConfig, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """The dotted names of all settings, without Hydra's own."""
    for key in map(str, config):
        if prefix or key != "hydra":
            yield f"{prefix}{key}"
            below = config._get_node(key)
            # What is missing, null or a reference has no keys of its own.
            if isinstance(below, DictConfig) and isinstance(below._content, dict) and depth < MAX_DEPTH:
                yield from _keys(below, f"{prefix}{key}.", depth + 1)
