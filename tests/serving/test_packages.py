"""Which package serves: a folder's, or the pointer's; another one takes over as a whole, or the one that serves goes on."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from asgi import post, running
from fake_package import click, fake, manifest_of

from features.errors import UserError
from pipeline.serving.http import packages as module
from pipeline.serving.http.app import Service, create_app
from pipeline.serving.http.config import ServeConfig
from pipeline.serving.http.metrics import Metrics
from pipeline.serving.http.packages import Loaded, Packages, Wanted
from pipeline.serving.manifest import Base, Manifest, write_manifest


def write_package(folder: Path, step: int, base: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    manifest = manifest_of(step)
    if base is not None:
        manifest = manifest.model_copy(update={"base": Base(step=1, checkpoint="checkpoint-1", package=base)})
    write_manifest(folder, manifest, [])
    return folder


def point(out: Path, step: int) -> None:
    """As pipeline.release.serving writes it, with what is not read."""
    out.mkdir(exist_ok=True)
    content = {"version": 1, "run": "run", "step": step, "checksum": f"checkpoint-{step}", "night": "n", "earlier": []}
    (out / "new").write_text(json.dumps(content))
    (out / "new").rename(out / "serving.json")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Wanted]:
    """What was loaded; of step 9 nothing can be."""
    found: list[Wanted] = []

    def load(_: Packages, wanted: Wanted) -> Loaded:
        found.append(wanted)
        if wanted.manifest.model.step == 9:
            raise UserError("tables/dim-00016.bin: its checksum is not the manifest's.")
        return fake(wanted.manifest.model.step)

    monkeypatch.setattr(Packages, "load", load)
    return found


def pointed(tmp_path: Path) -> Packages:
    return Packages(ServeConfig(packages=tmp_path / "packages", serving=tmp_path / "out", poll_s=3600), Metrics())


def step_of(packages: Packages) -> int:
    return packages.serving().scorer.manifest.model.step


def test_the_pointer_moves_what_serves_and_what_cannot_be_loaded_leaves_it(tmp_path: Path, loads: list[Wanted]) -> None:
    packages = pointed(tmp_path)
    with pytest.raises(UserError, match=r"serving.json is missing: nothing serves yet"):
        packages.start()
    write_package(tmp_path / "packages" / "a", 1)
    (tmp_path / "packages" / "damaged").mkdir()
    (tmp_path / "packages" / "damaged" / "manifest.json").write_text("{")
    point(tmp_path / "out", 1)
    packages.start()
    packages.poll()
    assert (step_of(packages), packages.problem, len(loads)) == (1, None, 1)

    point(tmp_path / "out", 2)
    packages.poll()
    assert step_of(packages) == 1
    assert "no package of the checkpoint checkpoint-2" in str(packages.problem)
    assert packages.metrics.registry.get_sample_value("taskfuse_serve_stale") == 1
    write_package(tmp_path / "packages" / f"b.staging-{'0' * 32}", 2)  # an export that is under way
    packages.poll()
    assert step_of(packages) == 1
    write_package(tmp_path / "packages" / "b", 2)
    packages.poll()
    assert (step_of(packages), packages.problem) == (2, None)
    assert packages.metrics.registry.get_sample_value("taskfuse_serve_stale") == 0

    write_package(tmp_path / "packages" / "c", 9)
    point(tmp_path / "out", 9)
    for _ in range(3):
        packages.poll()
    assert step_of(packages) == 2
    assert "its checksum is not" in str(packages.problem)
    assert len(loads) == 3, "a package that cannot be loaded is not tried every second"
    for name, value in (("swaps", 1), ("load_failures", 1)):
        assert packages.metrics.registry.get_sample_value(f"taskfuse_serve_{name}_total") == value
    (tmp_path / "out" / "serving.json").write_text("[]")
    packages.poll()
    assert step_of(packages) == 2
    packages.close()


def test_a_package_that_could_not_be_loaded_is_tried_again_later(
    tmp_path: Path, loads: list[Wanted], monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = Packages(ServeConfig(package=write_package(tmp_path / "p", 1), poll_s=3600), Metrics())
    packages.start()
    write_package(tmp_path / "p", 9)
    packages.poll()
    monkeypatch.setattr(module, "RETRY_S", 0)
    packages.poll()
    assert [wanted.manifest.model.step for wanted in loads] == [1, 9, 9]
    write_package(tmp_path / "p", 3)
    packages.poll()
    assert step_of(packages) == 3
    packages.close()


def test_a_delta_is_loaded_with_the_package_that_it_changes_and_a_whole_one_is_preferred(
    tmp_path: Path, loads: list[Wanted]
) -> None:
    packages, folder = pointed(tmp_path), tmp_path / "packages"
    base = manifest_of(1)
    write_package(folder / "delta", 2, base=base.checksum)
    point(tmp_path / "out", 2)
    with pytest.raises(UserError, match="its delta's base is not there"):
        packages.start()
    write_package(folder / "base", 1)
    packages.start()
    assert (loads[-1].folder, loads[-1].bases) == (folder / "delta", (folder / "base",))
    write_package(folder / "next", 3, base=manifest_of(2).checksum)
    point(tmp_path / "out", 3)
    packages.poll()
    assert (loads[-1].folder, loads[-1].bases) == (folder / "next", (folder / "base", folder / "delta"))
    point(tmp_path / "out", 2)
    packages.poll()
    write_package(folder / "whole", 2)
    packages.poll()
    assert len(loads) == 3, "the whole package is what the delta has made already"
    packages.close()


def test_polls_of_a_long_chain_work_out_nothing_again(
    tmp_path: Path, loads: list[Wanted], monkeypatch: pytest.MonkeyPatch
) -> None:
    packages, folder = pointed(tmp_path), tmp_path / "packages"
    write_package(folder / "1", 1)
    for step in range(2, 6):
        write_package(folder / f"{step}", step, base=manifest_of(step - 1).checksum)
    point(tmp_path / "out", 5)
    packages.start()
    assert [base.name for base in loads[-1].bases] == ["1", "2", "3", "4"]
    monkeypatch.setattr(Manifest, "sealed", None)
    packages.poll()
    assert packages.problem is None
    packages.close()


def test_files_are_compared_once_and_again_where_they_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    monkeypatch.setattr(module, "check_files", lambda folder, _: compared.append(folder.name))
    monkeypatch.setattr(module.Scorer, "load", lambda folder, *_: fake(int(folder.name)).scorer)
    packages = pointed(tmp_path)
    one, two, three = (write_package(tmp_path / str(step), step) for step in (1, 2, 3))

    def load(folder: Path, *bases: Path) -> list[str]:
        compared.clear()
        manifest = manifest_of(int(folder.name))
        packages.load(Wanted(folder, manifest, manifest.checksum, bases))
        return compared

    assert load(one) == ["1"]
    assert load(two, one) == ["2"]
    assert load(three, one, two) == ["3"]
    write_package(one, 1)
    assert load(three, one, two) == ["1"]
    with pytest.raises(UserError, match="was replaced by another package while it was loaded"):
        packages.load(Wanted(three, manifest_of(2), manifest_of(2).checksum))


def test_a_link_may_name_a_package_but_none_below_a_folder_of_packages(tmp_path: Path, loads: list[Wanted]) -> None:
    link = tmp_path / "current"
    link.symlink_to(write_package(tmp_path / "one", 1))
    packages = Packages(ServeConfig(package=link, poll_s=3600), Metrics())
    packages.start()
    (tmp_path / "next").symlink_to(write_package(tmp_path / "two", 2))
    (tmp_path / "next").rename(link)
    packages.poll()
    assert [wanted.folder for wanted in loads] == [tmp_path / "one", tmp_path / "two"]
    assert step_of(packages) == 2
    packages.close()

    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "a").symlink_to(tmp_path / "one")
    point(tmp_path / "out", 1)
    with pytest.raises(UserError, match="packages/a is a link"):
        pointed(tmp_path).start()


def test_of_too_many_packages_the_last_ones_by_name_are_read(
    tmp_path: Path, loads: list[Wanted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PACKAGES", 2)
    for step in (1, 2, 3):
        write_package(tmp_path / "packages" / f"2026-01-0{step}", step)
    point(tmp_path / "out", 3)
    packages = pointed(tmp_path)
    packages.start()
    assert step_of(packages) == 3
    packages.close()


def test_answers_while_packages_swap_are_of_the_package_they_name() -> None:
    metrics = Metrics()
    config = ServeConfig(package="unused", max_batch_rows=8)
    packages = Packages(config, metrics)
    both = [fake(1), fake(2)]
    packages.take_over(both[0])
    ended = threading.Event()

    def swap() -> None:
        number = 0
        while not ended.is_set():
            packages.take_over(both[(number := number + 1) % 2])

    async def run() -> list[Any]:
        async with running(app := create_app(Service(packages, config, metrics))):
            return [
                reply
                for _ in range(10)
                for reply in await asyncio.gather(*(post(app, {"candidates": [{"x": n / 10}] * 3}) for n in range(20)))
            ]

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        replies = asyncio.run(run())
    finally:
        ended.set()
        swapper.join()
    for number, reply in enumerate(replies):
        step = reply.json["model"]["step"]
        assert reply.json["scores"]["click"] == pytest.approx([click(step, number % 20 / 10)] * 3, abs=1e-6)
        assert reply.json["model"]["checkpoint"] == f"checkpoint-{step}"
    assert {reply.json["model"]["step"] for reply in replies} == {1, 2}
