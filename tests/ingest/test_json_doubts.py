"""JSON lines that the reader accepts and that are no rows, against json.loads."""

import json
from pathlib import Path
from typing import Any

import pytest
from examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ingest_runs import dead_letters_of, no_beam, rows_by_id, run, values_of

from pipeline.ingest.formats import json_doubts
from pipeline.ingest.formats.jsonl import JsonParser
from pipeline.ingest.formats.lines import LineRows
from pipeline.ingest.formats.text import WholeLines
from pipeline.ingest.formats.text_blocks import Parsed

HALF = json_doubts.HALF_CHARACTER
TYPES: dict[str, Any] = {"a": "string", "tags": "string", "free": "string"}  # the last one is no id
TEXT = st.sampled_from(
    ["x", "[x]", '["x"]', "{x", '{"x": 1}', "", "ü", "😀", "\ud800", "\udc00", "\ud800\ud83d\ude00", "\\ud800", "\n"]
)
VALUE: st.SearchStrategy[Any] = TEXT | st.none() | st.integers(-3, 3) | st.booleans()
NESTED = st.lists(VALUE, max_size=2) | st.dictionaries(st.sampled_from(["a", "k"]), VALUE, max_size=2)
KEYS = st.sampled_from(["a", "tags", "free", "other", "\ud83d"])
PAIRS = st.lists(
    st.tuples(KEYS, st.one_of(VALUE, VALUE, VALUE, NESTED, st.lists(VALUE | NESTED, max_size=2))), max_size=4
)


def line_of(pairs: list[tuple[str, Any]], ascii_: bool) -> bytes:
    """An object with the pairs in their order, keys twice among them."""
    text = "{" + ", ".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=True)}" for key, value in pairs) + "}"
    return text.encode() if ascii_ else text.replace("\\ud83d\\ude00", "😀").encode()


def has_half(value: Any) -> bool:
    if isinstance(value, str):
        return any(0xD800 <= ord(character) < 0xE000 for character in value)
    if isinstance(value, dict):
        return any(map(has_half, [*value, *value.values()]))
    return isinstance(value, list) and any(map(has_half, value))


def plain_fault(line: bytes) -> str | None:
    """Why a line is no row, by Python's reader of JSON."""
    seen: list[str] = []
    found = json.loads(
        line, object_pairs_hook=lambda pairs: seen.__setitem__(slice(None), [key for key, _ in pairs]) or dict(pairs)
    )
    if has_half(json.loads(line)):
        return HALF
    for key in seen:  # of the outermost object, which is the last one
        if seen.count(key) > 1 and key in TYPES:
            return f"key {key} stands twice"
    for key in ("a", "tags"):
        items = found.get(key) if key == "tags" and isinstance(found.get(key), list) else [found.get(key)]
        for item in items:
            if isinstance(item, (list, dict)):
                what = "a list" if isinstance(item, list) else "an object"
                return f"{key} holds {what} where one value is needed" + (
                    " in a list" if items is found.get(key) else ""
                )
    return None


def plain_text(value: Any) -> str | None:
    """A value as the text that is read of it."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


def parse(data: bytes, parser: JsonParser) -> Parsed:
    return LineRows(parser).parse(WholeLines(data, []), None)


def test_a_list_under_a_key_that_is_written_with_escapes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_doubts, "SEARCHED_BYTES", 0)  # of a large block the first line alone is searched
    found = parse(
        rb"""{"\u0061": "[x"}
{"\u0061": ["x"]}
""",
        JsonParser(TYPES, {}, {"a"}),
    )
    assert [(bad.line, bad.reason) for bad in found.bad] == [(1, "a holds a list where one value is needed")]
    assert found.columns["a"].to_pylist() == ["[x"]


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(st.tuples(PAIRS, st.booleans()), max_size=6), st.booleans())
@example([([("a", "x"), ("a", "y")], True), ([("a", "\\ud800")], True)], True)
@example([([("tags", '["x"]')], True)], True)
def test_lines_are_rows_or_dead_letters_as_json_loads_has_them(log: list[Any], together: bool) -> None:
    lines = [line_of(*each) for each in log]
    for part in [lines] if together else [[line] for line in lines]:
        parser = JsonParser(TYPES, {"tags": "|"}, {"a", "tags"})
        found = parse(b"".join(line + b"\n" for line in part), parser)
        faults = [plain_fault(line) for line in part]
        assert [(bad.line, bad.reason) for bad in found.bad] == [(i, fault) for i, fault in enumerate(faults) if fault]
        good = [json.loads(line) for line, fault in zip(part, faults, strict=True) if not fault]
        assert [plain_text(row.get("a")) for row in good] == found.columns["a"].to_pylist()
        for row, tags in zip(good, found.columns["tags"].to_pylist(), strict=True):
            expected = row.get("tags")
            if expected == '["x"]':  # text that is JSON of an array is read as the array
                expected = json.loads(expected)
            if isinstance(expected, list):
                assert tags == [plain_text(item) for item in expected]
            else:
                text = plain_text(expected)
                assert tags in (text, None if text is None else text.split("|"))


def test_of_a_large_block_a_sample_is_searched_and_every_line_once_a_key_stood_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(json_doubts, "SEARCHED_BYTES", 100)
    plain = [b'{"a": "%d", "z": 1}\n' % i for i in range(2000)]
    twice = b'{"a": "x", "a": "y"}\n'
    parser = JsonParser({"a": "string"}, {}, {"a"})
    calls = 0
    fault = json_doubts.DoubtfulLines.fault

    def counted(self: json_doubts.DoubtfulLines, line: bytes) -> str | None:
        nonlocal calls
        calls += 1
        return fault(self, line)

    monkeypatch.setattr(json_doubts.DoubtfulLines, "fault", counted)
    assert parse(b"".join(plain), parser).columns.num_rows == 2000
    assert 0 < calls <= 2000 / json_doubts.SAMPLED_PART + 1
    everywhere = b"".join(line.replace(b'"z"', b'"a"') if i % 2 else line for i, line in enumerate(plain))
    assert len(parse(everywhere, parser).bad) == 1000
    assert [bad.line for bad in parse(b"".join([*plain[:7], twice, *plain[8:]]), parser).bad] == [7]


@pytest.mark.parametrize("half", [rb"\ud83d", rb"\uD83D", rb"\ude00", rb"\uDE00", rb"\uDE00\uD83D", rb"\uD83Dx\uDE00"])
def test_half_a_character_is_found_in_every_line_of_a_large_block(half: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_doubts, "SEARCHED_BYTES", 100)
    lines = [rb'{"free": "\ud83D\uDE00 \uD83d\ude00"}' + b"\n"] * 999
    lines[500] = b'{"free": "%s"}\n' % half
    found = parse(b"".join(lines), JsonParser(TYPES, {"tags": "|"}, {"a", "tags"}))
    assert [(bad.line, bad.reason) for bad in found.bad] == [(500, HALF)]


def test_a_list_in_a_list_is_found_in_every_line_of_a_large_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_doubts, "SEARCHED_BYTES", 100)
    lines = [b'{"tags": ["x", "y", "z"]}\n'] * 999
    lines[500] = b'{"tags": ["x", ["y"]]}\n'
    found = parse(b"".join(lines), JsonParser(TYPES, {"tags": "|"}, {"a", "tags"}))
    assert [bad.line for bad in found.bad] == [500]


@pytest.mark.integration
def test_lists_half_characters_and_keys_that_stand_twice_are_dead_letters_of_the_dataset_also_in_keys(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    lines = ['{"imp": "k1", "item": "a"}', '{"imp": "k2", "item": ["a", "b"]}', '{"imp": "\\ud800", "item": "a"}',
             '{"imp": "k3", "item": "b", "imp": "k4"}', '{"imp": 5.0, "item": "[b]", "note": [1]}']  # fmt: skip
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "buy.jsonl").write_text('{"of": "k1"}\n{"of": ["k1"]}\n{"of": "\\uDC00"}\n{"of": "5.0"}\n')
    content: dict[str, Any] = {
        "source": {"files": "log.jsonl", "format": "jsonl", "key": "imp",
                   "outcomes": {"buy": {"files": "buy.jsonl", "key": "of"}}},
        "categorical": {"item": {}},
        "tasks": {"buy": {"kind": "binary", "label": "buy"}},
        "weight": "CASE WHEN note IS NULL THEN 1 ELSE LENGTH(note) END",
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }  # fmt: skip
    with no_beam():
        manifest = run(folder, tmp_path / "out", content, max_bad_fraction=0.6)
    assert manifest.dead_letters == {
        "item holds a list where one value is needed": 1, HALF: 2, "key imp stands twice": 1,
        "of holds a list where one value is needed": 1,
    }  # fmt: skip
    assert [(x["stream"], x["line"]) for x in dead_letters_of(tmp_path / "out")] == [
        ("buy", 2), ("buy", 3), ("impressions", 2), ("impressions", 3), ("impressions", 4),
    ]  # fmt: skip
    words = values_of(tmp_path / "out", "item")
    found = [(words[row["item"]], row["label.buy"], row["weight"]) for row in rows_by_id(tmp_path / "out")]
    assert found == [("a", 1.0, 1.0), ("[b]", 1.0, 3.0)]


@pytest.mark.integration
def test_lines_that_are_no_json_are_counted_together_whatever_is_wrong_with_them(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"item": "a"}\n{"item": "a"\n{"item": "a"}{"item": "b"}\n')
    content: dict[str, Any] = {
        "source": {"files": "log.jsonl", "format": "jsonl"},
        "categorical": {"item": {}},
        "tasks": {"y": {"kind": "binary", "label": "1"}},
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }
    with no_beam():
        manifest = run(folder, tmp_path / "out", content, max_bad_fraction=0.9)
    assert manifest.dead_letters == {"not JSON": 2}
