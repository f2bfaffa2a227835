"""EMM's tables from hand-made records, and the commands that they are made of."""

from pathlib import Path

import emm_tables
import pytest
from emm_tables import ablation, comparison, measured
from hydra import compose, initialize_config_dir

from models.emm import EMMSettings
from models.ranker import ModelConfig

CONF = Path(__file__).parents[2] / "jobs" / "conf"
RECORDS = {
    "census": {
        "TM-1": [[0.93, 0.992], [0.91, 0.992]],  # two seeds: .92, .992
        "TM-2": [[0.90, 0.99], [0.90, 0.99]],
        "SB": [[0.92, 0.993], [0.93, 0.993]],
        "baseline": [[0.94, 0.995], [0.94, 0.995]],
        "baseline+MTM": [[0.93, 0.994], [0.93, 0.994]],
        "baseline+p": [[0.92, 0.996], [0.92, 0.996]],
        "EMM": [[0.95, 0.9925], [0.95, 0.9925]],
    }
}


def cells(table: str) -> dict[str, list[str]]:
    """Of a Markdown table: the cells of each row by its first one, the header among them."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_table_1_has_gains_over_the_mean_of_the_trained_models_and_marks_the_best_of_the_others():
    found = cells(comparison(RECORDS))
    assert found["Model"] == ["census T1-AUC", "census T2-AUC", "census T1 gain", "census T2 gain"]
    assert found["TM-1"] == ["0.92000", "0.99200", "-", "-"]
    assert found["TM-2"] == ["0.90000", "0.99000", "-", "-"]
    assert found["SB"] == ["_0.92500_", "**0.99300**", "+0.01500", "+0.00200"]
    assert found["EMM"] == ["**0.95000**", "_0.99250_", "+0.04000", "+0.00150"]
    assert len(found) == 6


def test_table_2_has_gains_over_the_baseline():
    found = cells(ablation(RECORDS))
    assert found["baseline"] == ["_0.94000_", "_0.99500_", "-", "-"]
    assert found["baseline+MTM"] == ["0.93000", "0.99400", "-0.01000", "-0.00100"]
    assert found["baseline+p"] == ["0.92000", "**0.99600**", "-0.02000", "+0.00100"]
    assert found["EMM"] == ["**0.95000**", "0.99250", "+0.01000", "-0.00250"]
    assert len(found) == 6


def test_datasets_stand_side_by_side():
    both = comparison({**RECORDS, "demo": RECORDS["census"]})
    assert [len(row) for row in cells(both).values()] == [8] * 6


@pytest.mark.parametrize("published", [False, True])
def test_every_command_is_one_that_jobs_train_takes(monkeypatch, tmp_path, published):
    commands = []
    monkeypatch.setattr(emm_tables, "run", commands.append)
    tasks = [task for log in emm_tables.LOGS.values() for task in log.tasks]
    metrics = {task: {"auc": 0.5 + number / 10} for number, task in enumerate(tasks)}
    monkeypatch.setattr(emm_tables, "read_lines", lambda _: [{"metrics": metrics}])
    records = measured(tmp_path, 1, published)
    assert records["census"]["EMM"] == [[0.5, 0.6]]
    assert records["demo"]["TM-2"] == [[0.7, 0.8]]
    trained, evaluated = ([c[2:] for c in commands if c[1] == f"jobs.{job}"] for job in ("train", "evaluate"))
    runs = {next(word for word in command if word.startswith("run=")) for command in trained}
    assert len(runs) == len(trained) == len(evaluated) == 2 * (4 + 1 + 4)
    few = [command for command in trained if "model=emm" in command] + ([] if published else trained[:4])
    with initialize_config_dir(str(CONF), version_base=None):  # composing all of them would take a while
        configs = [compose("train", command) for command in few]
        compose("evaluate", evaluated[0])
    fused = [config for config in configs if config.model.fusion.name == "emm"]
    choices = {(config.model.fusion.trained, config.model.fusion.merge) for config in fused}
    assert choices == {(trained, merge) for trained in (False, True) for merge in (False, True)}
    for config in fused:
        assert {f"run={source}" for source in config.model["from"]} < runs
        settings = EMMSettings.of(ModelConfig.model_validate(dict(config.model)))
        assert (settings.tables, settings.projection) == (("new", "linear") if published else ("frozen", "relu"))
