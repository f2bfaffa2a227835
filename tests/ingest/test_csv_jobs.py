"""What stray quotes cost a dataset: their lines, all of them counted, and no row beside them."""

from pathlib import Path
from typing import Any

import pytest
from csv_by_hand import by_hand
from ingest_runs import dead_letters_of, refused, rows_by_id, run, values_of
from test_blocks import blocks_of

from features.errors import UserError
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.entries import Lines
from pipeline.dataset.manifest import merge_manifests
from pipeline.dataset.verify import verify
from pipeline.ingest.formats.csv_quotes import Quotes

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]
ROWS = 20_000
MESSAGE = "a quote is not closed within max_row_lines=1000 lines: set quote: null where quotes are plain characters"


def content_for(**source: Any) -> dict[str, Any]:
    return {
        "source": {"files": "log-*.csv", "multiline": True} | source,
        "categorical": {"user": {}, "note": {}},
        "tasks": {"click": {"kind": "binary", "label": "click = '1'"}},
        "split": {"by": "hash", "key": "user", "valid": 0.2, "test": 0.2},
    }


def log(folder: Path, changes: dict[int, str], rows: int = ROWS) -> list[str]:
    """A log whose rows of these numbers, from 1, are others. Returns its lines."""
    lines = [changes.get(i, f"u{i},n{i % 7},{i % 2}") for i in range(1, rows + 1)]
    folder.mkdir()
    (folder / "log-0.csv").write_text("\n".join(["user,note,click", *lines]) + "\n")
    return lines


@pytest.mark.parametrize("stray", [(1200,), (1000, 18_000), (1000, 1500), (ROWS,), (5, 6, 7)])
def test_a_stray_quote_costs_its_line_not_the_file(tmp_path: Path, stray: tuple[int, ...]) -> None:
    log(tmp_path / "in", {i: f'u{i},"5 inch disk,1' for i in stray})
    with blocks_of(1 << 16):
        manifest = run(tmp_path / "in", tmp_path / "out", content_for(), max_bad_fraction=0.001)
    assert manifest.read == {"impressions": ROWS}
    assert sum(manifest.rows.values()) == ROWS - len(stray)
    letters = dead_letters_of(tmp_path / "out")
    assert [(letter["line"], letter["raw"]) for letter in letters] == [(i + 1, f'u{i},"5 inch disk,1') for i in stray]
    assert set(values_of(tmp_path / "out", "note").values()) - {None} <= {f"n{i}" for i in range(7)}
    expected = Lines(physical=ROWS + 1, header=1, blank=0, rows=ROWS - len(stray), dead_letters=len(stray))
    assert manifest.lines == {"impressions": expected}
    said = list(verify(Dataset(tmp_path / "out")))
    assert said[1] == (
        f"lines: 20,001 of impressions = 1 header + 0 blank + {ROWS - len(stray):,} of rows + {len(stray)} of dead letters"
    )
    if stray == (1000, 18_000):
        assert manifest.dead_letters == {MESSAGE: 2}


def test_lines_that_a_bad_row_takes_count_as_bad(tmp_path: Path) -> None:
    log(tmp_path / "in", {10: 'u10,"two\nlines and\n\nmore",1', 20: 'u20,"too\nmany\ncolumns",1,2'}, rows=100)
    manifest = run(tmp_path / "in", tmp_path / "out", content_for(), max_bad_fraction=0.03)
    assert manifest.read == {"impressions": 100}
    assert manifest.dead_letters == {"4 columns instead of 3": 1}
    assert manifest.lines["impressions"] == Lines(physical=106, header=1, blank=0, rows=102, dead_letters=3)
    message = refused(tmp_path / "in", tmp_path / "more", content_for(), max_bad_fraction=0.029)
    assert message.startswith(
        f"3 of 102 lines of impressions are bad, more than max_bad_fraction=0.029; the first: {tmp_path}/in/log-0.csv, line "
        "24: 4 columns instead of 3."
    )
    message = refused(tmp_path / "in", tmp_path / "lines", content_for(multiline=False), max_bad_fraction=0.06)
    assert message.startswith("7 of 105 lines of impressions are bad")
    assert "line 11: a value with line breaks: set multiline: true" in message


@pytest.mark.parametrize("unit_bytes", [50, 1000, 1 << 20])
def test_a_row_of_several_lines_is_one_dead_letter_without_multiline_wherever_units_end(
    tmp_path: Path, unit_bytes: int
) -> None:
    changes = {i: f'u{i},"a\nb,{i},1\nc",1' for i in range(5, 300, 7)}
    lines = log(tmp_path / "in", changes, rows=300)
    sizes = {"unit_bytes": unit_bytes, "max_bad_fraction": 0.5}
    with blocks_of(300):
        manifest = run(tmp_path / "in", tmp_path / "out", content_for(multiline=False), **sizes)
    rows, bad = by_hand("\n".join(lines).encode(), 3)
    assert len(bad) == len(changes)
    assert manifest.dead_letters == {"a value with line breaks: set multiline: true": len(changes)}
    found = [(x["line"] - 1, x["reason"], x["raw"]) for x in dead_letters_of(tmp_path / "out")]
    assert found == [letter[:3] for letter in bad]
    assert len(rows_by_id(tmp_path / "out")) == len(rows) == 300 - len(changes)
    expected = Lines(physical=301 + 2 * len(changes), header=1, blank=0, rows=len(rows), dead_letters=3 * len(changes))
    assert manifest.lines == {"impressions": expected}
    list(verify(Dataset(tmp_path / "out")))


def test_a_carriage_return_outside_quotes_is_counted_under_its_reason(tmp_path: Path) -> None:
    log(tmp_path / "in", {60: "u60,a\rb,1"}, rows=100)
    manifest = run(tmp_path / "in", tmp_path / "out", content_for(), max_bad_fraction=0.1)
    assert manifest.dead_letters == {"a carriage return outside quotes: write line ends as LF or CRLF": 1}


def test_bytes_that_are_no_utf8_cost_their_row_only(tmp_path: Path) -> None:
    log(tmp_path / "in", {}, rows=100)
    data = (tmp_path / "in" / "log-0.csv").read_bytes()
    data = data.replace(b"u7,n0", b'u7,"K\xf6ln\nam Rhein"').replace(b"u9,n2", b'u9,"ok\nok"')
    (tmp_path / "in" / "log-0.csv").write_bytes(data)
    manifest = run(tmp_path / "in", tmp_path / "out", content_for(), max_bad_fraction=0.1)
    assert manifest.dead_letters == {"not UTF-8": 1}
    [letter] = dead_letters_of(tmp_path / "out")
    assert (letter["line"], letter["raw"]) == (8, 'u7,"K�ln\nam Rhein",1')
    assert sum(manifest.rows.values()) == 99


def test_good_rows_are_not_read_byte_by_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f'u{i},"a ""b""\n{i}, c",{i % 2}\n' for i in range(5000))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "log-0.csv").write_text("user,note,click\n" + text)
    calls, row = [], Quotes.row

    def counted(self: Quotes, *given: Any, **more: Any) -> Any:
        calls.append(1)
        return row(self, *given, **more)

    monkeypatch.setattr(Quotes, "row", counted)
    with blocks_of(1 << 14):
        manifest = run(tmp_path / "in", tmp_path / "out", content_for())
    assert sum(manifest.rows.values()) == 5000
    assert len(calls) < 100  # the header, and the last row of each block


def edited(folder: Path, **lines: int) -> str:
    manifest = Dataset(folder).manifest
    changed = manifest.model_copy(
        update={"lines": {"impressions": manifest.lines["impressions"].model_copy(update=lines)}}
    )
    (folder / "manifest.json").write_text(changed.model_dump_json(by_alias=True))
    with pytest.raises(UserError) as caught:
        list(verify(Dataset(folder)))
    (folder / "manifest.json").write_text(manifest.model_dump_json(by_alias=True))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_lines_that_are_not_accounted_for_are_found(tmp_path: Path) -> None:
    log(tmp_path / "in", {3: "u3"}, rows=100)
    run(tmp_path / "in", tmp_path / "out", content_for(multiline=False), max_bad_fraction=0.1)
    out = tmp_path / "out"
    assert "lines of impressions by what they hold are 101, the manifest says 102" in edited(out, physical=102)
    assert "lines of impressions by what they hold are 100" in edited(out, rows=98)
    assert "100 rows of impressions cannot be in 99 lines" in edited(out, rows=98, blank=1)
    assert "101 lines of rows of impressions are not in 100 rows" in edited(out, rows=101, physical=103)


def test_datasets_of_earlier_releases_have_no_lines_and_days_add_theirs(tmp_path: Path) -> None:
    log(tmp_path / "in", {}, rows=100)
    manifest = run(tmp_path / "in", tmp_path / "out", content_for())
    file = tmp_path / "out" / "manifest.json"
    earlier = manifest.model_copy(update={"lines": {}})
    file.write_text(earlier.model_dump_json(by_alias=True, exclude={"lines"}))
    assert not any(line.startswith("lines") for line in verify(Dataset(tmp_path / "out")))
    both = merge_manifests({"1": manifest, "2": manifest})
    assert both.lines == {"impressions": Lines(physical=202, header=2, blank=0, rows=200, dead_letters=0)}
    assert merge_manifests({"1": manifest, "2": earlier}).lines == {}
