"""Settings of jobs.compare."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pipeline.storage.store_path import Place, on_store

SEARCHED, RANDOM = "automtl", "automtl_random"  # a model that is searched first, and random search in the same time


def _mounted(folder: Path) -> Path:
    """Raises ValueError for a folder on a store: several trainings share it, and what they have in common is locked there."""
    if on_store(folder):
        raise ValueError(f"{folder} must be on a mounted file system")
    return folder


class CompareConfig(BaseModel):
    """Settings of jobs.compare; see jobs/conf/compare.yaml."""

    model_config = ConfigDict(extra="forbid")
    folder: Annotated[Place, AfterValidator(_mounted)]
    recipe_name: str | None = None
    models: list[str] = Field(min_length=1)
    baseline: str | None = None
    seeds: int = Field(3, ge=1, le=1000)
    trees: list[Literal["boosted", "rmtgb"]] = ["boosted", "rmtgb"]
    trees_max_rows: int = Field(1_000_000, ge=1)
    patience: int = Field(2, ge=0)
    workers: int = Field(2, ge=1)
    overrides: list[str] = []
    searches: int = Field(1, ge=1)
    search_overrides: list[str] = []
    emm_sources: dict[str, list[str]] = {}
    model_overrides: dict[str, list[str]] = {}

    def own(self, name: str) -> list[str]:
        """The settings of one model. Drawn architectures are trained as those that are searched, unless told otherwise."""
        found = list(self.model_overrides.get(name, []))
        if name == RANDOM:
            found = [*self.model_overrides.get(SEARCHED, []), *found]
        if not any(text.startswith("model=") for text in found):
            found.insert(0, f"model={SEARCHED if name == RANDOM else name}")
        return found


def is_searched(own: list[str]) -> bool:
    """Whether a model's architecture is to be found, by its settings: one of AutoMTL's that is not given."""
    return f"model={SEARCHED}" in own and not any(text.lstrip("+").startswith("model.architecture=") for text in own)


def of_search(settings: list[str]) -> list[str]:
    """Those that a search has too: which rows and tasks, and its own; how a found model is trained is another matter."""
    return [text for text in settings if not _begins(text, "train.", "model.", "model=", "interaction=")]


def of_space(settings: list[str]) -> list[str]:
    """Those of a search that a draw has too: not how a search learns, but its budget."""
    return [text for text in settings if _begins(text, "search.budget") or not _begins(text, "search.")]


def of_training(own: list[str]) -> list[str]:
    """Those that are not of a search alone."""
    return [text for text in own if not _begins(text, "search.", "space.")]


def _begins(text: str, *prefixes: str) -> bool:
    return text.lstrip("+~").startswith(prefixes)
