"""Learning curves and their table, of runs whose evaluations are written by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from curves import Key, draw, read, table

from features.errors import UserError

ROWS = (1000, 2000, 4000)
LABELS = {"before": "start zero", "after": "start base rate"}


def write_run(path: Path, ne: tuple[float | None, ...], split: str = "test", dataset: str = "/x/census/data") -> Path:
    """A run whose NE of click is given by evaluation; NRMSE of dwell is twice as high."""
    (path / "metrics").mkdir(parents=True)
    lines = []
    for step, (rows, value) in enumerate(zip(ROWS, ne, strict=False), 1):
        metrics = {"click": {"ne": value, "auc": 0.5}, "dwell": {"nrmse": value and 2 * value, "r2": 0.1}}
        lines.append({"step": step, "rows": rows, "split": split, "dataset": dataset, "metrics": metrics})
    (path / "metrics" / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def groups(tmp_path: Path) -> dict[str, list[Path]]:
    return {
        "before": [
            write_run(tmp_path / "old" / "adatt-0", (3.5, 0.9, 0.8)), write_run(tmp_path / "old" / "adatt-1", (3.7, 1.0, 0.84)),
            write_run(tmp_path / "old" / "ple", (3.4, 0.95, 0.85)),
        ],
        "after": [
            write_run(tmp_path / "new" / "adatt-0", (0.9, 0.82, 0.78)), write_run(tmp_path / "new" / "ple", (0.97, 0.9, 0.86)),
        ],
    }  # fmt: skip


def test_seeds_are_averaged_and_models_of_both_configs_share_a_name(groups: dict[str, list[Path]]) -> None:
    [(name, (curves, metrics))] = read(groups, "test").items()
    assert name == "census"
    assert metrics == {"click": "ne", "dwell": "nrmse"}
    assert curves["click"][Key("before", "adatt")] == pytest.approx({1000: 3.6, 2000: 0.95, 4000: 0.82})
    assert curves["dwell"][Key("after", "ple")] == pytest.approx({1000: 1.94, 2000: 1.8, 4000: 1.72})
    assert len(curves["click"]) == 4


def test_rows_that_not_every_seed_has_other_splits_and_undefined_values_are_left_out(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a-0", (0.9, None, 0.7)), write_run(tmp_path / "a-1", (0.8, 0.7))]
    with (runs[0] / "metrics" / "eval.jsonl").open("a") as file:
        again = {"ne": 0.5, "auc": 0.5}
        line = {"step": 1, "rows": 1000, "split": "test", "dataset": "/x/census/data", "metrics": {"click": again}}
        file.write(json.dumps(line) + "\n" + json.dumps(line | {"split": "valid", "step": 2, "rows": 2000}) + "\n")
    curves, _ = read({"before": runs, "after": runs}, "test")["census"]
    assert curves["click"][Key("before", "a")] == pytest.approx({1000: 0.65})


def test_data_sets_have_a_picture_each(tmp_path: Path) -> None:
    other = write_run(tmp_path / "b" / "ple", (1.0, 0.9), dataset="/x/demo/data 2026-11-01..2026-11-03")
    found = read({"before": [write_run(tmp_path / "a" / "ple", (1.0, 0.9)), other], "after": [other]}, "test")
    assert list(found) == ["census", "demo"]
    assert list(found["demo"][0]["click"]) == [Key("before", "ple"), Key("after", "ple")]


def test_a_colour_is_a_model_and_a_style_a_config(groups: dict[str, list[Path]]) -> None:
    curves, metrics = read(groups, "test")["census"]
    figure = draw(curves, metrics, LABELS, "census")
    panels = [axes for axes in figure.axes if axes.lines]
    assert [axes.get_title() for axes in panels] == ["click", "dwell"]
    assert [axes.get_ylabel() for axes in panels] == ["NE", "NRMSE"]
    lines = dict(zip(curves["click"], panels[0].lines, strict=True))
    for (group, model), line in lines.items():
        assert line.get_linestyle() == {"before": "--", "after": "-"}[group]
        assert line.get_color() == lines[Key("before", model)].get_color()
        assert dict(zip(line.get_xdata() * 1e6, line.get_ydata(), strict=True)) == pytest.approx(
            curves["click"][Key(group, model)]
        )
    assert len({line.get_color() for line in lines.values()}) == 2
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["adatt", "ple", *LABELS.values()]
    low, high = panels[0].get_ylim()
    assert 0.9 < high < 1.2, "the first values of 3.5 would flatten the rest"
    assert low < 0.78
    assert [text.get_text() for text in panels[0].texts] == ["first values up to 3.60"]
    assert figure.get_size_inches()[0] * 100 <= 1200


def test_the_table_says_what_the_second_config_changes_and_how_soon(groups: dict[str, list[Path]]) -> None:
    curves, metrics = read(groups, "test")["census"]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(curves, metrics, LABELS).splitlines()]
    assert lines[0] == ["model", "task", "start zero", "start base rate", "change, %", "rows to start zero's last"]
    cells = {(line[0], line[1]): line[2:] for line in lines[2:]}
    assert cells["adatt", "NE click"] == [".8200", ".7800", "-4.88", "50%"]
    assert cells["ple", "NRMSE dwell"] == ["1.7000", "1.7200", "+1.18", "not"]


def test_a_run_without_an_evaluation_of_the_split_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "ple", (1.0,), split="valid")
    with pytest.raises(UserError, match=r"ple/metrics/eval.jsonl: no evaluation of split test. Run jobs.evaluate run="):
        read({"before": [run], "after": [run]}, "test")


def test_the_script_writes_picture_and_table(groups: dict[str, list[Path]], tmp_path: Path) -> None:
    script = Path(__file__).with_name("curves.py")
    command = [sys.executable, str(script), "--out", str(tmp_path / "out"), "--labels", *LABELS.values()]
    for group, runs in groups.items():
        command += [f"--{group}", *map(str, runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "curves-census.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "curves-census.md").read_text().strip() in done.stdout
