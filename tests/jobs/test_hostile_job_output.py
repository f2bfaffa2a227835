"""jobs.inspect, errors and --help on data, names and arguments that would control a terminal or a page."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from dataset_by_hand import draw_rows, write_dataset
from hostile_text import HOSTILE, ORDINARY, Page, assert_tame

from features.errors import UserError
from features.printable import printable
from jobs.inspect import main
from pipeline.dataset.card.card import read_card

STORED = [text for text in HOSTILE if text != "\ud800"]  # which no Arrow array holds


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its most frequent city takes the terminal over, others are markup or ordinary; so are reasons of dead letters."""
    folder = tmp_path_factory.mktemp("inspect") / "mine<b>\x1b[31m"
    rows = draw_rows(500)
    values = [STORED[0]] * 200 + ([*STORED, *ORDINARY] * 20)[:300]
    cities = pa.array(values, pa.large_string()).dictionary_encode()
    write_dataset(folder, rows.set_column(rows.column_names.index("city"), "city", cities))
    manifest = json.loads((folder / "manifest.json").read_text())
    bad = sum(manifest["dead_letters"].values())
    manifest["dead_letters"] = {"\x1b[2J: wrong value\nread  999": bad - 1, "é <img src=x>": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_values_and_reasons_are_shown_as_text_in_tables_and_on_the_page(dataset: Path, capsys: pytest.CaptureFixture):
    main([str(dataset), "--verify"])
    shown = capsys.readouterr()
    assert_tame(shown.out + shown.err)
    assert "\\x1b]0;owned\\x07 (" in shown.out
    assert "\n\\x1b[2J: wrong value\\x0aread  999 " in shown.out
    assert "\né <img src=x> " in shown.out
    text = dataset.with_name(f"{dataset.name}.card.html").read_text(encoding="utf-8")
    page = Page(text)
    assert_tame(text)
    assert not {"script", "b", "img", "iframe", "a", "link"} & page.tags
    assert not {"src", "href", "onerror", "onload"} & {name for name, _ in page.attributes}
    assert "default-src 'none'" in text
    listed = {printable(value) for value in STORED} & set(page.texts)
    assert len(listed) >= 6  # of the twelve most frequent values
    assert "mine<b>\\x1b[31m" in page.texts


def test_ordinary_values_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture):
    rows = draw_rows(500)
    cities = pa.array(["漢字 é 🙂 عربى"] * 260 + ["<b>"] * 240, pa.large_string()).dictionary_encode()
    write_dataset(tmp_path / "é", rows.set_column(rows.column_names.index("city"), "city", cities))
    main([str(tmp_path / "é")])
    assert "漢字 é 🙂 عربى (" in capsys.readouterr().out
    page = Page((tmp_path / "é.card.html").read_text(encoding="utf-8"))
    assert {"漢字 é 🙂 عربى", "<b>", "é"} <= set(page.texts)


def drifted(**changes: Any) -> list[dict[str, Any]]:
    line = {"feature": "city", "psi": 0.3, "chance": 0.0, "verdict": "shifted", "missing": 0.1, "missing_before": 0.1}
    return [line | {"unknown": None, "unknown_before": None} | changes]


FORGED: list[Any] = [
    lambda card: card["ids"]["city"]["top"].insert(0, ["x", "1; background: url(http://127.0.0.1/)"]),
    lambda card: card["ids"]["city"]["top"].insert(0, [["x"], 1]),
    lambda card: card["ids"]["city"].update(missing="0"),
    lambda card: card["ids"]["city"].pop("top"),
    lambda card: card["ids"]["user"]["groups"].append('"><script>'),
    lambda card: card["numbers"]["price"]["histogram"]["counts"].append(1),
    lambda card: card["numbers"]["price"].update(quantiles=[1]),
    lambda card: card["tasks"].update(more={}),
    lambda card: card["correlations"].pop(),
    lambda card: card.update(rows="\x1b[31m"),
    lambda card: card.update(drift=drifted(verdict='x"><script>')),
    lambda card: card.update(drift=drifted(psi="1")),
]


@pytest.mark.parametrize("forge", FORGED)
def test_a_forged_card_is_one_line(dataset: Path, tmp_path: Path, forge: Any):
    card = json.loads((dataset / "statistics.json").read_text())
    forge(card)
    (tmp_path / "statistics.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=r"statistics.json: .*\. Run jobs.preprocess again"):
        read_card(tmp_path)


def test_a_card_is_read_as_it_was_written(dataset: Path, tmp_path: Path):
    card = json.loads((dataset / "statistics.json").read_text()) | {"drift": drifted()}
    (tmp_path / "statistics.json").write_text(json.dumps(card))
    assert json.loads(json.dumps(read_card(tmp_path))) == card


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "\x9b31m", "\u202e", "a\rb", "\udcff"])
def test_an_argument_is_quoted_without_its_controls(text: str, capsys: pytest.CaptureFixture, tmp_path: Path):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / text)])
    assert_tame(str(stopped.value))
    fault = " is not UTF-8" if text == "\udcff" else ": no dataset"
    assert f"{printable(text)}{fault}" in str(stopped.value).replace(printable(" ".join(text.split())), printable(text))
    with pytest.raises(SystemExit):
        main(["data", f"--{text}"])
    printed = capsys.readouterr().err
    assert_tame(printed)
    assert printable(text) in printed


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "\x9b31m", "\u202e", "é漢字"])
@pytest.mark.parametrize("argument", ["dataset={}", "+x{}=1", "model={}", "train.{}=1", "--{}", "data={}"])
def test_an_argument_of_a_job_is_quoted_without_its_controls(
    argument: str, text: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    arguments = [f"run={tmp_path / 'run'}", "dataset=none", argument.format(text)]
    monkeypatch.setattr(sys, "argv", ["jobs.train", *arguments])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("jobs.train").main()
    printed = capsys.readouterr()
    assert_tame(f"{stopped.value}\n{printed.out}{printed.err}")
    assert printable(text) in f"{stopped.value}{printed.err}"
