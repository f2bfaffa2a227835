"""What a comparison trains for a model and a seed: its run, and what is behind it: a search, draws or sources."""

import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from pydantic import BaseModel, FiniteFloat, PositiveInt

from features.errors import UserError
from features.plain_json import read_json, validated
from features.regular_files import lstat_regular
from pipeline.dataset.dataset import Dataset
from pipeline.overrides import setting
from pipeline.run.core_hours import core_hours
from pipeline.run.run import Run
from pipeline.search.compare_config import (
    RANDOM,
    SEARCHED,
    CompareConfig,
    is_searched,
    of_search,
    of_space,
    of_training,
)
from pipeline.search.comparison import SHARES
from pipeline.storage.files import appending, make_folder, write_json
from pipeline.training.architecture_file import FILE

MAX_JSON_BYTES = 1 << 20  # of made.json and of a budget
MOST_DRAWS = 1000  # of a seed, whose draws have the seeds from 1000 * seed on
MOST_SEEDS = 1000  # seed 2's further searches have 1002, 2002, …


@dataclass(frozen=True)
class Jobs:
    """Runs jobs as processes of this Python.

    Attributes:
        data: arguments of jobs.preprocess that choose and change its data group.
        config_dirs: --config-dir= arguments for every job: files of the user's own.
    """

    data: Sequence[str]
    config_dirs: Sequence[str] = ()

    def run(self, module: str, *arguments: str, log: Path | None = None) -> None:
        """Runs one to its end, its output to `log` (None: stderr). Raises UserError where it fails."""
        command = [sys.executable, "-m", module, *self.config_dirs, *arguments]
        with appending(log) if log else nullcontext(sys.stderr) as output:
            code = subprocess.call(command, stdout=output, stderr=output)
        if code:
            where = f": see {log}" if log else ""
            raise UserError(f"{module} {' '.join(arguments)} ended with exit code {code}{where}")


class Trained(NamedTuple):
    """The finished runs of a model on a seed.

    Attributes:
        candidates: of these the best on the validation split is the model's.
        searches: that found their architectures. sources: that it is fused from.
    """

    candidates: Sequence[Path]
    searches: Sequence[Path] = ()
    sources: Sequence[Path] = ()

    def hours(self) -> float:
        """Core-hours of all training that it took."""
        return sum(core_hours(Run(path)) for path in (*self.candidates, *self.searches, *self.sources))

    def search_hours(self) -> float | None:
        """Those of its searches; None without one."""
        return sum(core_hours(Run(path)) for path in self.searches) if self.searches else None


class Budget(BaseModel):
    """automtl_random-SEED.json: how long automtl of the seed has searched and trained, and how many draws have fitted in it.

    Attributes:
        hours: core-hours. number: None until all are trained.
    """

    hours: FiniteFloat
    number: PositiveInt | None = None


class Trainings:
    """The runs below a comparison's folder, each trained by a process on one core, once."""

    def __init__(self, config: CompareConfig, jobs: Jobs, dataset: Dataset) -> None:
        self.config, self.jobs, self.dataset = config, jobs, dataset
        # By what is trained and its seed. Whoever holds one waits for none of another model's but automtl's and emm's sources,
        # which wait for none: threads cannot wait for each other.
        self.locks: defaultdict[tuple[str, int], Lock] = defaultdict(Lock)

    def of(self, name: str, seed: int) -> Trained:
        """Trains a model, or resumes it, with all that it needs before. Raises UserError."""
        with self.locks[name, seed]:  # automtl_random waits for automtl, or trains it
            if name == RANDOM:
                return self._random(seed)
            path, own = self.config.folder / f"{name}-{seed}", self.config.own(name)
            if is_searched(own):
                more = [path.with_name(f"{path.name}-{number}") for number in range(1, self.config.searches)]
                return self._searched([path, *more], seed, own)
            sources = self._emm_sources(seed) if "model=emm" in own else []
            if sources:
                own.append(f"model.from={[str(source) for source in sources]}")
            self._train(path, seed, [*own, f"train.checkpoint_at={list(SHARES)}"])
            return Trained([path], sources=sources)

    def _searched(self, paths: Sequence[Path], seed: int, own: list[str]) -> Trained:
        """Searches and trains what was found for each path, with seeds of a search that no other seed's have."""
        searches = [path.with_name(f"search-{path.name}") for path in paths]
        for number, (path, search) in enumerate(zip(paths, searches, strict=True)):
            self._search(search, seed + MOST_SEEDS * number, own)
            self._train_found(path, seed, own, search)
        return Trained(paths, searches)

    def _random(self, seed: int) -> Trained:
        """Draws architectures and trains each in full, as long as another one fits in the time that automtl took.

        How long another one takes is the mean of those before it. The first is trained whatever it takes.
        """
        file = self.config.folder / f"{RANDOM}-{seed}.json"
        if lstat_regular(self.config.folder, file.name):
            budget = validated(Budget, read_json(self.config.folder, file.name, MAX_JSON_BYTES), file)
        else:
            budget = Budget(hours=self.of(SEARCHED, seed).hours())
            write_json(file, budget.model_dump())
        paths, spent = [self._draw(seed, 0)], 0.0
        for number in range(1, budget.number or MOST_DRAWS):
            spent += core_hours(Run(paths[-1]))
            if budget.number is None and spent + spent / number > budget.hours:
                break
            paths.append(self._draw(seed, number))
        write_json(file, Budget(hours=budget.hours, number=len(paths)).model_dump())
        return Trained(paths)

    def _draw(self, seed: int, number: int) -> Path:
        """The run of one drawn architecture."""
        own, path = self.config.own(RANDOM), self.config.folder / f"{RANDOM}-{seed}-{number}"
        drawn = self.config.folder / f"search-{path.name}"
        self._search(drawn, MOST_DRAWS * seed + number, own, is_drawn=True)
        self._train_found(path, seed, own, drawn)
        return path

    def _emm_sources(self, seed: int) -> list[Path]:
        """Trains the runs that emm is fused from: one of each kind for each task."""
        paths = []
        with self.locks["emm's sources", seed]:  # two models may be fused from the same
            for task in self.dataset.schema.tasks:
                for kind, own in self.config.emm_sources.items():
                    paths.append(self.config.folder / f"{kind}-{task}-{seed}")
                    self._train(paths[-1], seed, [*own, f"tasks=[{task}]"])
        return paths

    def _search(self, path: Path, seed: int, own: list[str], is_drawn: bool = False) -> None:
        """Finds an architecture on the train and validation splits, or draws one; its file is the last that a search writes."""
        config = self.config
        settings = [*of_search(config.overrides), *config.search_overrides, *of_search(own)]  # the last of a key counts
        if is_drawn:
            settings = [*of_space(settings), "search.method=random"]
        is_made = lstat_regular(path, FILE) is not None and (is_drawn or _is_finished(path))
        self._make("jobs.search", path, seed, settings, is_made)

    def _train_found(self, path: Path, seed: int, own: list[str], search: Path) -> None:
        """Trains the architecture of a search from scratch."""
        architecture = setting("model.architecture", search / FILE)
        self._train(path, seed, [*of_training(own), architecture, f"train.checkpoint_at={list(SHARES)}"])

    def _train(self, path: Path, seed: int, own: list[str]) -> None:
        self._make("jobs.train", path, seed, [*self.config.overrides, *own], _is_finished(path))

    def _make(self, module: str, path: Path, seed: int, own: list[str], is_made: bool) -> None:
        """Makes a run, or resumes it, unless it is made. Raises UserError for one that was made with other settings."""
        make_folder(path)
        recipe = [f"recipe={self.config.recipe_name}"] if self.config.recipe_name else []
        settings, earlier = [*recipe, *own], path / "made.json"
        if lstat_regular(path, earlier.name) and read_json(path, earlier.name, MAX_JSON_BYTES) != settings:
            raise UserError(f"{path} was made with another recipe or overrides. Choose another folder=, or remove it.")
        write_json(earlier, settings)
        if is_made:
            return
        fixed = [setting("dataset", self.dataset.path), setting("run", path), f"train.seed={seed}", "train.threads=1"]
        self.jobs.run(module, *fixed, *settings, log=path / "log.txt")


def _is_finished(path: Path) -> bool:
    return (status := Run(path).status()) is not None and status.state == "finished"
