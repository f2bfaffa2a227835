"""Which package serves: a folder, or what the pointer of nightly names; another one is loaded beside it and then takes over."""

import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from features.errors import UserError, one_line
from features.plain_json import read_json, validated
from features.regular_files import mounted, refuse_link
from pipeline.serving.deltas import bases_of
from pipeline.serving.fetching import fetched_all
from pipeline.serving.http.config import ServeConfig
from pipeline.serving.http.metrics import Metrics
from pipeline.serving.manifest import FILE, Manifest, check_files, read_manifest
from pipeline.serving.scorer import Scorer
from pipeline.storage.staging import is_staging
from pipeline.storage.versions import version, versions_below

POINTER = "serving.json"
MAX_POINTER_BYTES = 1 << 20
MAX_PACKAGES = 10_000  # folders below `packages`: the last ones by name, which the newest of dated names are
RETRY_S = 30.0  # until a package that could not be loaded is tried again

FileState = tuple[object, ...]  # inode, mtime in ns, bytes; on a store what it says of an object's version

logger = logging.getLogger(__name__)


class Pointer(BaseModel):
    """What is read of OUT/serving.json (pipeline.release.serving): the checkpoint that serves."""

    model_config = ConfigDict(extra="ignore")

    version: Annotated[int, Field(ge=1, le=1)]
    checksum: Annotated[str, Field(max_length=4096)]


class Wanted(NamedTuple):
    """A package that should serve.

    Attributes:
        checksum: of the whole package, of a delta the one that it makes.
        bases: of a delta the whole package and the deltas that it changes, in their order.
    """

    folder: Path
    manifest: Manifest
    checksum: str
    bases: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """A package in memory, and what answers say of it."""

    scorer: Scorer
    folder: Path

    @property
    def identity(self) -> dict[str, Any]:
        """Run, step and checksum of the checkpoint, and the checksum of the package's manifest."""
        manifest = self.scorer.manifest
        model = manifest.model
        return {"run": model.run, "step": model.step, "checkpoint": model.checkpoint, "package": manifest.checksum}


class Manifests:
    """Manifests of packages, each read again only once its file is another one: a server looks every second."""

    def __init__(self) -> None:
        self.known: dict[Path, tuple[FileState, Wanted]] = {}

    def read(self, folder: Path, state: FileState | None = None) -> Wanted:
        """A package, without its bases. Raises UserError, OSError.

        Args:
            state: of its manifest, where it is known.
        """
        state = state or state_of(folder / FILE)
        if folder not in self.known or self.known[folder][0] != state:
            manifest = read_manifest(folder)
            self.known[folder] = (
                state,
                Wanted(folder, manifest, (manifest.whole() if manifest.base else manifest).checksum),
            )
        return self.known[folder][1]

    def keep(self, folders: Sequence[Path]) -> None:
        """Forgets those of other folders."""
        self.known = {folder: self.known[folder] for folder in folders if folder in self.known}


def state_of(file: Path) -> FileState:
    """What changes with a file that another one replaces. Raises OSError."""
    if not mounted(file):
        if (found := version(file)) is None:
            raise FileNotFoundError(2, "No such file or directory", str(file))
        return found
    status = file.lstat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def of_folder(named: Path) -> Callable[[], Wanted]:
    """The package of one folder; a delta has no base there.

    Args:
        named: the folder, or a link to it. It is followed once each time, so that every file is of one folder.
    """
    manifests = Manifests()

    def find() -> Wanted:
        folder = named.resolve()
        manifests.keep([folder])
        try:
            return manifests.read(folder)
        except FileNotFoundError:
            read_manifest(folder)  # says what is missing
            raise

    return find


def of_pointer(packages: Path, out: Path) -> Callable[[], Wanted]:
    """The package below `packages` whose checkpoint the pointer of `out` names; a whole one before a delta, then by name."""

    manifests = Manifests()
    # On a store what was found last, and the states of the pointer and of its manifest: a listing of all takes longer.
    last: tuple[list[FileState], Wanted] | None = None

    def find() -> Wanted:
        nonlocal last
        if last and last[0] == _states_of(out / POINTER, last[1].folder / FILE):
            return last[1]
        last = None
        try:
            before = [] if mounted(packages) else [state_of(out / POINTER)]
            pointer = validated(Pointer, read_json(out, POINTER, MAX_POINTER_BYTES), out / POINTER)
        except FileNotFoundError:
            raise UserError(
                f"{out / POINTER} is missing: nothing serves yet. Bless a checkpoint with jobs.nightly."
            ) from None
        found, damaged = {}, []
        there = _packages_in(packages)
        folders = sorted(there)[-MAX_PACKAGES:]
        manifests.keep(folders)
        for folder in folders:
            try:
                found[folder] = manifests.read(refuse_link(folder), there[folder])
            except (UserError, OSError) as error:
                damaged.append(one_line(error))
        wanted = [
            (each.manifest.base is not None, folder)
            for folder, each in found.items()
            if each.manifest.model.checkpoint == pointer.checksum
        ]
        known, makes = {f: each.manifest for f, each in found.items()}, {f: each.checksum for f, each in found.items()}
        for _, folder in sorted(wanted):
            if (bases := bases_of(folder, known, makes)) is not None:
                chosen = found[folder]._replace(bases=bases)
                last = ([*before, state], chosen) if before and (state := there[folder]) else None
                return chosen
        why = "its delta's base is not there" if wanted else damaged[0] if damaged else f"{len(found)} others are"
        raise UserError(
            f"{packages}: no package of the checkpoint {pointer.checksum[:16]} that {out / POINTER} names ({why}). "
            f"Export it: jobs.export run=RUN step=STEP out={packages}/NAME"
        )

    return find


def _packages_in(packages: Path) -> dict[Path, FileState | None]:
    """The folders of packages in a folder; on a store, by one listing, with the states of their manifests."""
    if mounted(packages):
        found: dict[Path, FileState | None] = {path.parent: None for path in packages.glob(f"*/{FILE}")}
    else:
        listed = versions_below(packages)
        found = {path.parent: listed[path] for path in listed if path.name == FILE and path.parents[1] == packages}
    return {folder: state for folder, state in found.items() if not is_staging(folder)}


def _states_of(*files: Path) -> list[FileState]:
    """The state of each file; of none where one is missing, or cannot be asked for."""
    try:
        return [state_of(file) for file in files]
    except OSError:
        return []


def states(folder: Path, manifest: Manifest) -> dict[str, FileState] | None:
    """The state of every file of a package; None where one is missing."""
    try:
        return {name: state_of(folder / name) for name in (FILE, *manifest.files)}
    except OSError:
        return None


def source(settings: ServeConfig) -> Callable[[], Wanted]:
    """What finds the package that should serve."""
    if settings.package is not None:
        return of_folder(settings.package)
    assert settings.packages is not None
    assert settings.serving is not None
    return of_pointer(settings.packages, settings.serving)


class Packages:
    """The package that serves, and a thread that looks for another one.

    Attributes:
        current: what serves, replaced as a whole; None before `start`.
        problem: why what should serve does not; None where it does.
        replaced: whether what served before may still be in memory.
        compared: folders whose files were compared with their manifests, and the state that all of them had.
    """

    def __init__(self, settings: ServeConfig, metrics: Metrics, find: Callable[[], Wanted] | None = None) -> None:
        self.settings, self.metrics, self.find = settings, metrics, find or source(settings)
        self.current: Loaded | None = None
        self.problem: str | None = None
        self.failed: tuple[Path, str, float] | None = None  # a package's folder and checksum, and when it was tried
        self.replaced = False
        self.compared: dict[Path, dict[str, FileState]] = {}
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="packages", daemon=True)

    def start(self) -> None:
        """Loads the first package, then looks for others. Raises UserError where it cannot be loaded."""
        self.take_over(self.load(self.find()))
        self.thread.start()

    def close(self) -> None:
        """Ends the thread. A load that is on its way is not waited for."""
        self.ended.set()

    def serving(self) -> Loaded:
        """What serves."""
        assert self.current, "a server begins to listen once `start` has loaded a package"
        return self.current

    def load(self, wanted: Wanted) -> Loaded:
        """A package in memory, with its first answer given. Raises UserError, OSError."""
        settings, started = self.settings, time.perf_counter()
        folders = fetched_all([*wanted.bases, wanted.folder])
        if settings.check:
            self._compare(folders)
        scorer = Scorer.load(folders[-1], settings.compiled, False, settings.warm_up, folders[:-1])
        if scorer.manifest.checksum != wanted.checksum:
            raise UserError(f"{wanted.folder} was replaced by another package while it was loaded. It is tried again.")
        logger.info("%s loaded in %.2f s", wanted.folder, time.perf_counter() - started)
        return Loaded(scorer, wanted.folder)

    def _compare(self, folders: Sequence[Path]) -> None:
        """Compares every file of packages with their manifests, unless it was done and they are still the same files."""
        compared = {}
        for folder in folders:
            manifest = read_manifest(folder)
            if (state := states(folder, manifest)) is None or self.compared.get(folder) != state:
                check_files(folder, manifest)
            if state is not None:
                compared[folder] = state
        self.compared = compared

    def poll(self) -> None:
        """Loads what should serve, where that is something else, and lets it take over. Never raises."""
        if self.replaced:
            gc.collect()  # a package has cycles; the batches that it scored have ended by now
            self.replaced = False
        try:
            wanted = self.find()
            if self.current and wanted.checksum == self.current.scorer.manifest.checksum:
                return self._report(None)
            tried = (wanted.folder, wanted.checksum)
            if self.failed and self.failed[:2] == tried and time.monotonic() - self.failed[2] < RETRY_S:
                return None
        except (UserError, OSError) as error:
            return self._report(one_line(error))
        try:
            loaded = self.load(wanted)
        except Exception as error:  # whatever a damaged package may cause: the one that serves goes on
            if not isinstance(error, (UserError, OSError)):
                logger.exception("%s cannot be loaded", wanted.folder)
            self.failed = (*tried, time.monotonic())
            self.metrics.failures.inc()
            return self._report(one_line(error))
        self.take_over(loaded)
        return None

    def _watch(self) -> None:
        while not self.ended.wait(self.settings.poll_s):
            self.poll()

    def take_over(self, loaded: Loaded) -> None:
        """Lets a package serve from the next batch of requests on."""
        earlier, self.current = self.current, loaded
        model = loaded.scorer.manifest.model
        self.metrics.step.set(model.step)
        self.metrics.loaded.set(time.time())
        self.metrics.model.info({name: str(value) for name, value in loaded.identity.items()})
        self.failed = None
        self._report(None)
        if earlier:
            self.replaced = True
            self.metrics.swaps.inc()
        logger.info("%s serves: %s, step %s", loaded.folder, model.run, f"{model.step:,}")

    def _report(self, problem: str | None) -> None:
        """Logs a problem once, and when it is over."""
        self.metrics.stale.set(problem is not None)
        if problem != self.problem and problem:
            logger.error("%s. The package that serves goes on.", problem)
        self.problem = problem
