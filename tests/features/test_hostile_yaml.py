"""YAML that was handed over: only UserError comes out, soon, and what is no attack is read as yaml.safe_load reads it."""

import datetime
import os
import time
from pathlib import Path

import pytest
import yaml
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import UserError
from features.schema.schema import Schema
from features.yaml_text import MAX_BYTES, MAX_DEPTH, MAX_VALUES, parse_yaml, read_yaml, yaml_of

ROOT = Path(__file__).parents[2]
CONF = sorted((ROOT / "jobs" / "conf").rglob("*.yaml"))
SCHEMA = yaml.safe_dump(yaml.safe_load((ROOT / "jobs" / "conf" / "data" / "demo.yaml").read_text())["schema"])
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))
MERGES = "a0: &a0 {k0: 0}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], k{n}: 0}}\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "line 1, column 5: anchors and aliases"),
        (MERGES, "anchors and aliases"),
        ("a: *nothing", "anchors and aliases"),
        ("a: {<<: {b: 1}}", "line 1, column 5: merge keys"),
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1: the key a stands there twice"),
        ("1: a\ntrue: b\n", "stands there twice"),
        ("a: " + "[" * 5000 + "]" * 5000, f"nested more than {MAX_DEPTH} deep"),
        ("- " * 5000 + "a", f"nested more than {MAX_DEPTH} deep"),
        ("{a: " * 500 + "}" * 500, f"nested more than {MAX_DEPTH} deep"),
        (
            "a: !!python/object/apply:os.system [true]",
            "the tag tag:yaml.org,2002:python/object/apply:os.system is not read",
        ),
        ("a: !!set {x}", "is not read"),
        ("a: !" + "x" * 5000 + " 1", "is not read"),
        ("a: " + "9" * 5000, "a number of more than 100 characters"),
        ("a: 1" + ":59" * 5000, "a number of more than 100 characters"),
        ("a: 2026-13-45", "2026-13-45: month must be in"),
        ("a: !!int x", "invalid literal"),
        ('a: "\\ud800"', "surrogate"),
        ("? [a]\n: b", "not YAML"),
        ("a: [b", "line 1, column 6: not YAML"),
        ("a: \x00", "not YAML"),
        ("--- a\n--- b", "not YAML"),
        (b"a: 1\nb: \xff", "line 2 is not UTF-8"),
        ("a: b".encode("utf-16"), "is not UTF-8"),
        (b"#" * (MAX_BYTES + 1), "bytes, more than"),
    ],
)
def test_what_would_run_code_or_grow_or_never_end_is_one_line(text: str | bytes, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(text if isinstance(text, bytes) else text.encode(), "handed.yaml")
    assert str(caught.value).startswith("handed.yaml")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_more_values_than_any_schema_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.yaml_text.MAX_VALUES", 1000)
    assert MAX_VALUES >= 20 * 5000, "features of a schema have about five keys and values each"
    assert len(parse_yaml(b"[" + b"1," * 999 + b"]", "x")) == 999
    with pytest.raises(UserError, match="more than 1,000 keys and values"):
        parse_yaml(b"[" + b"1," * 1000 + b"]", "x")


@pytest.mark.parametrize("path", CONF, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_files_of_jobs_conf_are_read_as_before(path: Path) -> None:
    assert parse_yaml(path.read_bytes(), "x") == yaml.safe_load(path.read_text())


def test_numbers_times_and_words_are_those_of_safe_load() -> None:
    text = "{a: 017, b: 0o17, c: 1e5, d: 1.5e+3, e: 1:30, f: yes, g: 2026-11-07, h: ~, i: '1', j: 0x10, k: 1_000, l: !!str 5}"
    found = parse_yaml(text.encode(), "x")
    assert found == yaml.safe_load(text)
    assert (found["a"], found["c"], found["g"]) == (15, "1e5", datetime.date(2026, 11, 7))
    assert parse_yaml(b"", "x") is None


def test_what_is_written_has_no_aliases_and_is_read_again() -> None:
    shared = ["x"]
    content = {"b": shared, "a": shared, "d": "2026-11-07"}
    assert parse_yaml(yaml_of(content).encode(), "x") == content
    assert list(parse_yaml(yaml_of(content).encode(), "x")) == ["b", "a", "d"]
    assert yaml_of({"b": [1], "a": {"c": None}}) == yaml.safe_dump({"b": [1], "a": {"c": None}}, sort_keys=False)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text("a: 1")
    assert read_yaml(tmp_path / "plain.yaml") == {"a": 1}
    (tmp_path / "link.yaml").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("link", "pipe"):
        with pytest.raises(UserError, match=r"is (a link|not a regular file)"):
            read_yaml(tmp_path / f"{name}.yaml")
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["", "- a", "5", "null", "a: " + "[" * 100, BOMB, "tasks: 5", "source: {files: 5}"])
def test_a_schema_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text(text)
    with pytest.raises(UserError, match=r"schema\.yaml") as caught:
        Schema.load(tmp_path / "schema.yaml")
    assert "\n" not in str(caught.value)


def test_thousands_of_faults_are_not_one_endless_line(tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text("".join(f"key{n}: 1\n" for n in range(5000)))
    with pytest.raises(UserError, match=r"; and 4,98\d more") as caught:
        Schema.load(tmp_path / "schema.yaml")
    assert len(str(caught.value)) < 10_000


def outcome(path: Path, text: str) -> None:
    """Reads a schema, which may fail in one way only, and soon."""
    begin, said = time.process_time(), ""
    path.write_text(text, encoding="utf-8")
    try:
        Schema.load(path)
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert time.process_time() - begin < 5


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(codec="utf-8"), max_size=20), st.dates(),
    st.sampled_from(["${oc.env:HOME}", "<<", "*a", "click", "hash", "user_id", "[" * 50, "../x", "\x1b[2J", "ge", "1e400"]),
)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text("abcdef_<.", max_size=4), below, max_size=4),
    max_leaves=20,
)


@settings(max_examples=examples(60), deadline=None)
@given(data=st.data())
def test_a_schema_with_any_value_in_any_place_is_read_or_refused(data: st.DataObject, tmp_path_factory) -> None:
    content = yaml.safe_load(SCHEMA)
    for _ in range(data.draw(st.integers(1, 3))):
        place = content
        while isinstance(place, dict) and place:
            key = data.draw(st.sampled_from(sorted(place)))
            if not isinstance(place[key], dict) or data.draw(st.booleans()):
                place[key] = data.draw(TREES)
                break
            place = place[key]
    outcome(tmp_path_factory.getbasetemp() / "any_value.yaml", yaml.safe_dump(content))


PIECES = st.sampled_from(
    [*"[]{}:,-?&*!|>'\"%@`#\n ", "&a ", "*a", "<<: ", "!!int ", ": ", "\n  ", "- ", "---\n", "\\ud800", "9" * 60]
)


@settings(max_examples=examples(60), deadline=None)
@given(
    cuts=st.lists(st.tuples(st.integers(0, len(SCHEMA)), st.integers(0, 40), st.lists(PIECES, max_size=4)), max_size=4)
)
def test_a_schema_with_pieces_cut_out_and_put_in_is_read_or_refused(cuts, tmp_path_factory) -> None:
    text = SCHEMA
    for start, length, pieces in cuts:
        text = text[:start] + "".join(pieces) + text[start + length :]
    outcome(tmp_path_factory.getbasetemp() / "cut.yaml", text)


@settings(max_examples=examples(300), deadline=None)
@given(content=st.binary(max_size=200) | st.lists(PIECES, max_size=60).map(lambda found: "".join(found).encode()))
def test_any_bytes_are_read_as_safe_load_does_or_refused(content: bytes) -> None:
    try:
        found = parse_yaml(content, "x")
    except UserError as error:
        said = str(error)
    else:
        said = ""
        assert repr(found) == repr(yaml.safe_load(content.decode()))
    assert "\n" not in said
