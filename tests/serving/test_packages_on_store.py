"""Packages on a store: fetched once, compared on the way, and served as from a disk."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import real_package
from s3_server import SECRET

from features.errors import UserError
from pipeline.serving import fetching
from pipeline.serving.fetching import fetched, fetched_all
from pipeline.serving.http.config import ServeConfig
from pipeline.serving.http.metrics import Metrics
from pipeline.serving.http.packages import Packages
from pipeline.serving.manifest import read_manifest
from pipeline.serving.scorer import Scorer
from pipeline.storage.files import copy_file, remove_tree, storage_of
from pipeline.storage.store_path import StorePath

ROWS = [{"age": 31.0, "city": "rome", "recent": ["a", "c"]}, {"age": 62.5, "city": "paris", "recent": []}, {}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(fetching.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(package: Path, target: StorePath) -> StorePath:
    for file in sorted(package.rglob("*"), key=lambda file: file.name == "manifest.json"):
        if file.is_file():
            copy_file(file, target / file.relative_to(package).as_posix())
    return target


@pytest.fixture
def there(package: Path, memory: StorePath) -> StorePath:
    return put(package, memory / "p")


@pytest.mark.integration
def test_a_package_on_s3_scores_as_the_one_on_disk_and_is_fetched_once(package, s3, cache, proxy, monkeypatch):
    from store_fixtures import use_store

    there = put(package, s3 / "p")
    use_store(proxy.env, monkeypatch)
    wanted, found = Scorer.load(package).score(ROWS), Scorer.load(str(there)).score(ROWS)
    assert {task: x_B.tobytes() for task, x_B in found.items()} == {t: x_B.tobytes() for t, x_B in wanted.items()}
    fetched_names = {path.rpartition("/p/")[2] for method, path in proxy.requests if method == "GET"}
    assert {*read_manifest(package).files} <= fetched_names
    proxy.requests.clear()
    assert Scorer.load(there, warm_up=0).score(ROWS)["click"].tobytes() == wanted["click"].tobytes()
    assert {path.rpartition("/p/")[2] for method, path in proxy.requests if method == "GET"} == {"manifest.json"}
    assert SECRET.encode() not in b"".join(file.read_bytes() for file in cache.rglob("*") if file.is_file())


def test_a_file_that_is_not_the_manifests_is_refused_and_nothing_of_it_stays(there, cache):
    content = (there / "dense.pt2").read_bytes()
    (there / "dense.pt2").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"dense.pt2: its checksum is not the manifest's"):
        fetched(there)
    (there / "dense.pt2").write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"dense.pt2 is missing, or is shorter"):
        fetched(there)
    assert [*cache.iterdir()] == []


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: os.truncate(file, 10)], ids=["deleted", "cut off"])
def test_a_damaged_copy_is_fetched_again(there, damage):
    folder = fetched(there)
    damage(folder / "dense.pt2")
    assert fetched(there) == folder
    assert (folder / "dense.pt2").read_bytes() == (there / "dense.pt2").read_bytes()


def test_what_a_killed_fetch_left_is_removed_and_what_another_process_fetches_is_not(there, cache):
    killed, running = (cache / f"{digit * 64}.staging-{digit * 32}" for digit in "ab")
    for folder in (killed, running):
        folder.mkdir(parents=True)
        (folder / "dense.pt2").write_bytes(b"half")
    with storage_of(running).lock(running):
        folder = fetched(there)
        assert {*cache.iterdir()} == {folder, running}


def test_a_package_that_another_process_has_fetched_meanwhile_stays_in_place(there, monkeypatch):
    write, others = fetching.write_json, []

    def write_after_another(*content: object) -> None:
        if not others:
            others.append(None)
            others[0] = fetched(there).stat().st_ino  # all of it, between this fetch's last file and its rename
        write(*content)

    monkeypatch.setattr(fetching, "write_json", write_after_another)
    assert fetched(there).stat().st_ino == others[0]


def test_a_package_for_which_there_is_no_room_is_one_line(there, cache, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match=r"do not fit into the 100 that are free .* TASKFUSE_PACKAGES"):
        fetched(there)
    assert [*cache.iterdir()] == []


def test_the_packages_used_last_are_kept(memory, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(fetching, "MOST_PACKAGES", 2)
    found = []
    for seed in range(3):
        real_package.write(tmp_path / f"{seed}", seed=seed)
        found.append(fetched(put(tmp_path / f"{seed}", memory / f"{seed}")))
        os.utime(found[-1], (time.time() - 10 + seed,) * 2)
        if seed == 1:
            fetched(memory / "0")  # used again
    assert [folder.exists() for folder in found] == [True, False, True]


def test_packages_that_belong_together_are_all_kept_however_many(memory, tmp_path, cache, monkeypatch):
    folders = []
    for seed in range(3):
        real_package.write(tmp_path / f"{seed}", seed=seed)
        folders.append(put(tmp_path / f"{seed}", memory / f"{seed}"))
    before = fetched(folders[0])
    monkeypatch.setattr(fetching, "MOST_PACKAGES", 1)
    found = fetched_all(folders[1:])
    assert [folder.exists() for folder in (before, *found)] == [False, True, True]
    assert [read_manifest(folder) for folder in found] == [read_manifest(folder) for folder in folders[1:]]


def test_a_url_of_no_store_is_one_line():
    with pytest.raises(UserError, match=r"^ftp:// is no storage"):
        Scorer.load("ftp://host/package")


@pytest.fixture
def served(package: Path, memory: StorePath, tmp_path: Path) -> Packages:
    """What serves of two packages, by a pointer; all on a store."""
    put(package, memory / "packages" / "a")
    real_package.write(tmp_path / "b", seed=2)
    put(tmp_path / "b", memory / "packages" / "b")
    point(memory, read_manifest(package).model.checkpoint)
    settings = ServeConfig(packages=str(memory / "packages"), serving=str(memory), poll_s=3600, warm_up=2)
    return Packages(settings, Metrics())


def point(out: StorePath, checkpoint: str) -> None:
    (out / "serving.json").write_text(json.dumps({"version": 1, "checksum": checkpoint}))


def test_the_pointer_of_a_store_moves_what_serves(served, package, memory, monkeypatch):
    served.start()
    served.close()
    assert served.serving().identity["package"] == read_manifest(package).checksum
    point(memory, "checkpoint-2")
    served.poll()
    assert served.problem is None
    click = real_package.expected(ROWS[0], seed=2)[0]
    np.testing.assert_allclose(served.serving().scorer.score(ROWS[:1])["click"], [click], rtol=1e-5)

    listed = []
    find = type(memory.system).find
    monkeypatch.setattr(type(memory.system), "find", lambda *a, **k: listed.append(a) or find(*a, **k))
    served.poll()
    assert listed == []  # the pointer and the package are what they were: two questions a poll
    remove_tree(memory / "packages" / "b")
    served.poll()
    assert "no package of the checkpoint checkpoint-2" in str(served.problem)
    assert served.serving().identity["checkpoint"] == "checkpoint-2"
