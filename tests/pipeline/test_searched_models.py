"""What jobs.compare trains of a model that is searched, and of random search: commands, order, budget and reruns."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from features.errors import UserError
from pipeline.run.run import Run
from pipeline.search import compare
from pipeline.search.compare_config import RANDOM, SEARCHED, CompareConfig
from pipeline.search.trained import Trainings
from pipeline.storage.files import append_line, write_json

HOURS = {"search-automtl": 3.0, "automtl": 1.0, "automtl_random": 1.5}  # of a run, by the begin of its name


class FakeJobs:
    """Writes what the jobs write, and keeps their words. The job of the folder `fails` does."""

    def __init__(self, hours: dict[str, float]) -> None:
        self.hours, self.calls, self.lock = hours, [], threading.Lock()
        self.fails: str | None = None

    def run(self, module: str, *arguments: str, log: Path | None = None) -> None:
        words = dict(word.split("=", 1) for word in arguments)
        run = Run(Path(words["run"]))
        with self.lock:
            self.calls.append((module, run.path.name, arguments))
        assert log == run.path / "log.txt"
        if run.path.name == self.fails:
            raise UserError(f"{module} failed")
        if module == "jobs.search":
            (run.path / "architecture.yaml").write_text("experts: []")
            if words.get("search.method") == "random":
                return
        else:
            assert Path(words["model.architecture"]).exists()
        run.train_metrics.parent.mkdir(exist_ok=True)
        [hours] = [value for name, value in self.hours.items() if run.path.name.startswith(f"{name}-")]
        append_line(run.train_metrics, {"step": 1, "rows": 3600, "rows_per_s": 1 / hours})
        write_json(run.path / "status.json", {"state": "finished", "step": 1, "steps": 1, "time": 0.0})

    def names(self) -> list[str]:
        return [name for _, name, _ in self.calls]


def trainings(folder: Path, hours: dict[str, float] | None = None, **more: Any) -> tuple[Trainings, FakeJobs]:
    given = {"models": [SEARCHED, RANDOM], "recipe_name": "mine"} | more
    jobs = FakeJobs(hours or HOURS)
    dataset = SimpleNamespace(path=folder / "data", schema=SimpleNamespace(tasks={"click": None}))
    return Trainings(CompareConfig(folder=folder, **given), jobs, dataset), jobs  # type: ignore[arg-type]


def test_a_model_of_automtl_is_searched_then_trained_with_what_was_found(tmp_path: Path) -> None:
    more = {
        "overrides": ["train.epochs=40", "model.tower=[8]", "++train.dense.lr=0.1", "tasks=[click]", "interaction=dot"],
        "search_overrides": ["train.epochs=2", "search.order=2", "space.experts=4"],
        "model_overrides": {"automtl": ["model=automtl", "model.dropout=0.1", "space.experts=3"]},
    }
    made, jobs = trainings(tmp_path, **more)
    trained = made.of(SEARCHED, 7)
    (searching, first, search), (training, second, train) = jobs.calls
    assert (searching, first, training, second) == ("jobs.search", "search-automtl-7", "jobs.train", "automtl-7")
    both = [f"dataset={tmp_path}/data", "train.seed=7", "train.threads=1", "recipe=mine", "tasks=[click]"]
    own = ["space.experts=3", "train.epochs=2", "search.order=2", "space.experts=4"]
    assert sorted(search) == sorted([*both, f"run={tmp_path}/search-automtl-7", *own])
    assert search.index("space.experts=4") < search.index("space.experts=3")  # the model's own counts
    of_train = [*more["overrides"][:3], "interaction=dot", "model=automtl", "model.dropout=0.1"]
    found = [f"model.architecture={tmp_path}/search-automtl-7/architecture.yaml"]
    at = [f"train.checkpoint_at={[1 / 7, 3 / 7]}"]
    assert sorted(train) == sorted([*both, f"run={tmp_path}/automtl-7", *of_train, *found, *at])
    assert trained.hours() == pytest.approx(4.0, rel=1e-12)
    assert trained.search_hours() == pytest.approx(3.0, rel=1e-12)
    assert made.of(SEARCHED, 7) == trained
    assert len(jobs.calls) == 2


def test_what_several_searches_of_a_seed_found_are_candidates_and_random_search_has_the_time_of_all(
    tmp_path: Path,
) -> None:
    made, jobs = trainings(tmp_path, HOURS | {RANDOM: 1.99}, searches=3)
    trained = made.of(SEARCHED, 2)
    names = ["automtl-2", "automtl-2-1", "automtl-2-2"]
    assert [path.name for path in trained.candidates] == names
    assert jobs.names() == [name for run in names for name in (f"search-{run}", run)]
    for number, (search, train) in enumerate(zip(jobs.calls[::2], jobs.calls[1::2], strict=True)):
        assert f"train.seed={2 + 1000 * number}" in search[2]
        assert {"train.seed=2", f"model.architecture={tmp_path}/{search[1]}/architecture.yaml"} < {*train[2]}
    assert trained.search_hours() == pytest.approx(9.0)
    assert trained.hours() == pytest.approx(12.0)
    assert len(made.of(RANDOM, 2).candidates) == 6
    assert made.of(SEARCHED, 2) == trained


def test_an_architecture_of_its_own_is_not_searched(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").touch()
    own = ["model=automtl", f"model.architecture={tmp_path}/a.yaml"]
    made, jobs = trainings(tmp_path, {"mine": 1.0}, models=["mine"], model_overrides={"mine": own})
    trained = made.of("mine", 0)
    assert jobs.names() == ["mine-0"]
    assert (trained.search_hours(), trained.hours()) == (None, pytest.approx(1.0))


@pytest.mark.parametrize(("hours", "draws"), [(1.5, 2), (1.0, 4), (0.7, 5), (9.0, 1)])
def test_random_search_trains_what_fits_in_the_time_of_search_and_training(
    tmp_path: Path, hours: float, draws: int
) -> None:
    more = {"search_overrides": ["+search.budget={flops: 0.5, model: adatt}", "space.experts=3", "search.order=2"]}
    own = {SEARCHED: ["model.dropout=0.1"]}
    made, jobs = trainings(tmp_path, HOURS | {RANDOM: hours * (1 - 1e-9)}, model_overrides=own, **more)
    trained = made.of(RANDOM, 3)
    expected = [f"automtl_random-3-{number}" for number in range(draws)]
    assert [path.name for path in trained.candidates] == expected
    assert trained.hours() == pytest.approx(hours * draws)
    assert trained.search_hours() is None
    assert jobs.names()[:2] == ["search-automtl-3", "automtl-3"]
    assert jobs.names()[2:] == [name for run in expected for name in (f"search-{run}", run)]
    for number, (search, train) in enumerate(zip(jobs.calls[2::2], jobs.calls[3::2], strict=True)):
        own = [*more["search_overrides"][:2], "search.method=random", f"train.seed={3000 + number}"]
        assert {*own} < {*search[2]}
        assert not any("search.order" in word for word in search[2])  # how a search learns
        drawn = f"model.architecture={tmp_path}/search-automtl_random-3-{number}/architecture.yaml"
        assert {"train.seed=3", "model=automtl", "model.dropout=0.1", drawn} < {*train[2]}
    kept = json.loads((tmp_path / "automtl_random-3.json").read_text())
    assert kept == {"hours": pytest.approx(4.0), "number": draws}


def test_a_rerun_has_the_same_draws_whatever_they_took_and_one_that_was_ended_goes_on(tmp_path: Path) -> None:
    made, jobs = trainings(tmp_path)
    jobs.fails = "automtl_random-0-1"
    with pytest.raises(UserError, match=r"jobs\.train failed"):
        made.of(RANDOM, 0)
    made, jobs = trainings(tmp_path)
    trained = made.of(RANDOM, 0)
    assert jobs.names() == ["automtl_random-0-1"]  # its draw is there, and automtl is not asked again
    for path in trained.candidates:
        append_line(Run(path).train_metrics, {"step": 2, "rows": 3601, "rows_per_s": 1e-9})
    made, jobs = trainings(tmp_path)
    assert made.of(RANDOM, 0) == trained
    assert jobs.calls == []


def test_a_search_that_was_ended_before_it_wrote_its_architecture_is_run_again(tmp_path: Path) -> None:
    trainings(tmp_path)[0].of(SEARCHED, 0)
    (tmp_path / "search-automtl-0" / "architecture.yaml").unlink()
    (tmp_path / "automtl-0" / "status.json").unlink()
    made, jobs = trainings(tmp_path)
    made.of(SEARCHED, 0)
    assert jobs.names() == ["search-automtl-0", "automtl-0"]


def test_other_settings_of_a_search_are_refused_in_its_folder(tmp_path: Path) -> None:
    trainings(tmp_path)[0].of(SEARCHED, 0)
    made, jobs = trainings(tmp_path, search_overrides=["search.order=2"])
    with pytest.raises(UserError, match="search-automtl-0 was made with another recipe or overrides"):
        made.of(SEARCHED, 0)
    assert jobs.calls == []


def test_a_damaged_budget_is_named(tmp_path: Path) -> None:
    (tmp_path / "automtl_random-0.json").write_text('{"hours": 1.0, "number": 0}')
    with pytest.raises(UserError, match=r"automtl_random-0\.json: number: "):
        trainings(tmp_path)[0].of(RANDOM, 0)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("models", [(SEARCHED, RANDOM), (RANDOM, SEARCHED)])
def test_threads_that_need_the_same_search_share_it(tmp_path: Path, workers: int, models: tuple[str, str]) -> None:
    made, jobs = trainings(tmp_path)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(made.of, name, seed) for name in models for seed in range(3)]
        assert all(future.result(timeout=30).candidates for future in futures)
    assert len({*jobs.names()}) == len(jobs.names()) == 3 * (2 + 2 * 2)


@pytest.mark.parametrize(
    ("models", "overrides", "says"),
    [
        (
            ["ple", RANDOM],
            {},
            r"models: automtl_random takes as long as automtl did, which is not among ple, automtl_random",
        ),
        ([SEARCHED, RANDOM], {SEARCHED: ["model.architecture=a.yaml"]}, r"model_overrides\.automtl: "),
        ([SEARCHED, RANDOM], {RANDOM: ["model=ple"]}, r"model_overrides\.automtl_random: "),
    ],
)
def test_random_search_without_a_search_is_one_line_before_any_work(
    tmp_path: Path, models: list[str], overrides: dict, says: str
) -> None:
    config = CompareConfig(folder=tmp_path / "out", models=models, model_overrides=overrides)
    with pytest.raises(UserError, match=rf"^{says}[^\n]*$"):
        compare.compare(config, FakeJobs({}))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_the_cost_of_a_model_that_is_searched_is_the_mean_of_its_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").touch()
    dataset = SimpleNamespace(path=tmp_path / "data", schema=SimpleNamespace(tasks={"click": SimpleNamespace(kind="")}))
    monkeypatch.setattr(compare, "Dataset", lambda _: dataset)
    monkeypatch.setattr(compare.Runs, "run", lambda _, name, seed: ({"run": f"{name}-{seed}", "epoch": 1}, tmp_path))
    monkeypatch.setattr(compare, "_cost", lambda path, _: {"flops_per_row": 10 ** int(path.name[-1])})
    config = CompareConfig(folder=tmp_path, models=["ple", SEARCHED, RANDOM], trees=[])
    entries, _ = compare.compare(config, FakeJobs({}))  # type: ignore[arg-type]
    assert {entry.name: entry.cost["flops_per_row"] for entry in entries} == {"ple": 1, SEARCHED: 37, RANDOM: 37}
