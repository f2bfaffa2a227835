"""Hostile expressions of a schema: none crashes, hangs, reads a file or needs much memory. Each beside one that works."""

import json
import subprocess
import sys
import textwrap

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from features.errors import UserError
from features.parse import compute, raw
from features.schema.expressions import MAX_BRACKETS, MAX_LENGTH, MAX_WORDS, columns_of, memory_of
from features.schema.schema import Schema

FRAME = pl.DataFrame(
    {"x": [1.0, None, -2.5], "y": [1, 2**62, None], "s": ["a", "b,c", None], "list": [["1", "2"], None, []]},
    schema_overrides={"y": pl.Int64},
)


def alone(code: str) -> str:
    """What a program prints that runs with 4 GiB of memory and 20 seconds; a crash of it fails the test, and no more."""
    limits = "import resource as r\nr.setrlimit(r.RLIMIT_CORE, (0, 0))\nr.setrlimit(r.RLIMIT_CPU, (20, 20))\n"
    limits += "r.setrlimit(r.RLIMIT_AS, (4 << 30, 4 << 30))\n"
    command = [sys.executable, "-c", limits + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    return done.stdout


TOO_DEEP = {
    "many terms": ("+".join(["x"] * 20_000), "+".join(f"c{i}" for i in range(140))),
    "terms within the length": ("+".join(["x"] * 4_000), "x" + "*x" * 140),
    "brackets": ("(" * 400 + "x" + ")" * 400, "(" * 12 + "x" + ")" * 12),
    "unclosed brackets, which double the time of parsing": ("CAST(" * 60 + "x", "CAST(" * 9 + "x" + " AS INT)" * 9),
    "intervals of intervals": ("INTERVAL ABS(" * 15 + "x" + ")" * 15, "ABS(" * 9 + "x" + ")" * 9),
    "concatenations": ("||".join(["s"] * 1_200), "||".join(f"c{i}" for i in range(70))),
    "conditions": ("CASE " + "WHEN x=1 THEN 2 " * 600 + "END", "CASE " + "WHEN x=1 THEN 2 " * 120 + "END"),
    "values": ("x IN (x" + ",1" * 4_000 + ")", "x IN (1" + ",1" * 2_000 + ")"),
    "IS NULL of IS NULL": ("x" + " IS NULL" * 1_100, "x" + " IS NULL" * 40),
    "a tree that doubles with each BETWEEN": ("x" + " BETWEEN 1 AND 2" * 60, "x BETWEEN 1 AND 2"),
    "a tree that doubles with each NULLIF": ("NULLIF(" * 16 + "x" + ",1)" * 16, "NULLIF(" * 3 + "x" + ",1)" * 3),
    "a tree that doubles with each IN": ("(" * 16 + "x" + " IN (y,y))" * 15 + ")", "(x IN (y,y)) IN (y,y)"),
}


def test_expressions_that_would_crash_or_fill_memory_as_they_are_parsed_are_refused_in_a_thread_too() -> None:
    attacks, twins = ([pair[side] for pair in TOO_DEEP.values()] for side in (0, 1))
    found = alone(
        f"""
        import json, threading
        from features.schema.expressions import columns_of
        def refused(text):
            try:
                return bool(columns_of(text)) and False
            except ValueError as error:
                return len(str(error)) < 600 and chr(10) not in str(error)
        found = []
        def check():
            found.append([refused(text) for text in {attacks!r}])
            found.append([bool(columns_of(text)) for text in {twins!r}])
        check()
        threading.stack_size(2 << 20)
        thread = threading.Thread(target=check)
        thread.start()
        thread.join()
        print(json.dumps(found))
        """
    )
    for results in json.loads(found):
        assert dict(zip(TOO_DEEP, results, strict=True)) == dict.fromkeys(TOO_DEEP, True)


def test_expressions_at_the_limits_of_their_depth_can_be_computed() -> None:
    wide = "||".join(f"c{i}" for i in range(70))
    alone(
        f"""
        import polars as pl
        from features.parse import compute, raw
        frame = pl.DataFrame({{f"c{{i}}": ["ab", None] for i in range(70)}} | {{"x": [1.0, 2.0]}})
        for text in [{wide!r}, "x" + "+1" * 140, "CASE " + "WHEN x=1 THEN 2 " * 120 + "END", "x" + " IS NULL" * 40]:
            assert compute.evaluate(frame, "weight", text, "v").len() == 2
        """
    )


@pytest.mark.parametrize(
    ("attack", "message", "twin"),
    [
        ("x" + " " * MAX_LENGTH, "has 10,001 characters: allowed are 10,000", "x" + " " * (MAX_LENGTH - 1)),
        (
            "COALESCE(" + ",".join(["x"] * MAX_WORDS) + ")",
            "has 501 words and signs",
            "COALESCE(" + ",".join(["x"] * 400) + ")",
        ),
        (
            "(" * (MAX_BRACKETS + 1),
            "more than 16 brackets within each other",
            "x IN (1) AND y IN (2) " + "AND x IN (3) " * 30,
        ),
        ("INTERVAL x", "an INTERVAL without a literal", "y = 1 OR s = 'interval'"),
        ("NOT " * 400 + "x > 1", "is not a SQL expression", "NOT NOT x > 1"),
    ],
)
def test_a_text_that_is_too_long_or_too_deep_is_refused_and_its_twin_is_not(
    attack: str, message: str, twin: str
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        columns_of(attack)
    assert len(str(refusal.value)) < 500
    assert columns_of(twin)


BOMBS = {
    "LPAD(s, 1000000000, '0')": ("may need 8,000,000,\\d+ bytes of each row", "LPAD(s, 30, '0')"),
    "RPAD(s, 9223372036854775807, 'é')": ("bytes of each row", "RPAD(s, 30, 'é')"),
    "LPAD(s, y, '0')": ("pads to a length that is computed", "LEFT(s, y)"),
    "LPAD(s, 10 * 100000000, '0')": ("pads to a length that is computed", "LPAD(s, 10, '0')"),
    "REPLACE(s, '', s)": ("replaces by a text that is computed", "REPLACE(s, '', '-')"),
    "REPLACE(REPLACE(REPLACE(s, 'a', '{a}'), 'a', '{a}'), 'a', '{a}')".format(a="a" * 40): (
        "may need 65,\\d+ times the bytes of a column: allowed are 1,000 times",
        "REPLACE(REPLACE(REPLACE(s, 'ä', 'ae'), 'ö', 'oe'), '&', '&amp;')",
    ),
    "REGEXP_REPLACE(REGEXP_REPLACE(s, '.*', '{0}'), '.*', '{0}')".format("$0" * 200): (
        "times the bytes",
        "REGEXP_REPLACE(s, '(a+)b', '$1')",
    ),
    "||".join(["s"] * 60): ("times the bytes of a column", "s || '-' || s || '-' || s"),
    "UPPER(" * 8 + "s" + ")" * 8: ("times the bytes", "UPPER(LOWER(s))"),
    "ARRAY_TO_STRING(list, s)": ("joins a list with a text that is computed", "ARRAY_TO_STRING(list, ', ')"),
    "s RLIKE s": ("has a regular expression that is computed", "s RLIKE '^a+$'"),
    "GENERATE_SERIES(1, 1000000000)": ("uses Range", "ARRAY_LENGTH(list) + 1"),
    "RANGE(1, y)": ("uses Range", "y + 1"),
    "UNNEST(list)": ("uses UNNEST", "list[1]"),
}


@pytest.mark.parametrize("attack", BOMBS, ids=lambda text: text[:30])
def test_what_would_need_much_memory_is_refused_and_its_twin_is_computed(attack: str) -> None:
    message, twin = BOMBS[attack]
    with pytest.raises(ValueError, match=message):
        columns_of(attack)
    assert compute.evaluate(FRAME, "weight", twin, "v").len() == FRAME.height


@pytest.mark.parametrize(
    ("attack", "named", "twin"),
    [
        ("CAST(s AS BLOB)", "a cast to Binary", "CAST(s AS VARCHAR)"),
        ("CAST(x AS HUGEINT)", "a cast to Int128", "CAST(x AS BIGINT)"),
        ("CAST(x AS DECIMAL(39, 2))", "a cast to Decimal|is not a SQL expression", "CAST(x AS DECIMAL(38, 2))"),
        ("CAST(x AS DECIMAL(5, 9))", "a cast to Decimal|is not a SQL expression", "CAST(x AS DECIMAL(9, 5))"),
        ("CAST(list AS INT[][])", "a cast to List", "CAST(list AS INT[])"),
        ("CAST(x AS STRUCT<a INT>)", "a cast to Struct", "CAST(x AS DOUBLE)"),
        ("CAST(s AS JSON)", "StringExpr.JsonDecode", "TRY_CAST(s AS INT)"),
        ("x'ff'", "a literal of type Binary", "'ff'"),
        ("NULL = ANY(9223372036854775807)", "ANY of one value", "s = ANY(list)"),
        ("COLUMNS('x')", "several columns", '"x"'),
        ('"^.*$"', "several columns", "`x`"),
    ],
)
def test_types_and_parts_that_no_column_has_are_refused(attack: str, named: str, twin: str) -> None:
    with pytest.raises(ValueError, match=named):
        columns_of(attack)
    assert compute.evaluate(FRAME, "weight", twin, "v").len() == FRAME.height


def test_a_message_shows_the_beginning_of_a_long_expression_and_no_control_characters() -> None:
    with pytest.raises(ValueError, match="x x x") as refusal:
        columns_of("\x1b]0;owned\x07 " + "x " * 2_000)
    assert len(str(refusal.value)) < 900
    assert str(refusal.value).isprintable()
    with pytest.raises(UserError, match="cannot be computed") as failure:
        compute.evaluate(pl.DataFrame({"s": ["\x1b[31m\nx"]}), "weight", "CAST(s AS INT)", "v")
    assert str(failure.value).isprintable()


def test_a_panic_of_polars_is_an_error_of_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def panic(_: str) -> pl.Expr:
        raise pl.exceptions.PanicException("index out of bounds\nbacktrace")

    assert compute.evaluate(FRAME, "weight", "x + 12345", "v").len() == FRAME.height
    monkeypatch.setattr(pl, "sql_expr", panic)
    with pytest.raises(ValueError, match=r"is not a SQL expression: index out of bounds$"):
        columns_of("x + 123456")
    with pytest.raises(UserError, match=r"weight: 'x \+ 12345' cannot be computed: index out of bounds$"):
        compute.evaluate(FRAME, "weight", "x + 12345", "v")


def test_slices_of_a_block_give_what_the_block_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pl.DataFrame({"s": [None if i % 7 == 0 else "a" * (i % 50) for i in range(500)], "x": range(500)})
    for text in ["LPAD(s, 20, '0') || x", "'always'", "STRING_TO_ARRAY(s, 'a')", "x % 3", "NULL"]:
        whole = compute.evaluate(frame, "weight", text, "v")
        monkeypatch.setattr(compute, "SLICE_BYTES", 5_000)
        assert len(list(compute._slices(frame, memory_of(text)))) > 5
        assert compute.evaluate(frame, "weight", text, "v").equals(whole)
        monkeypatch.undo()


def table(**columns: list) -> pa.Table:
    count = len(next(iter(columns.values())))
    return pa.table(columns | {raw.LINE: range(count), raw.ROW: range(count)})


def schema(**derived: str) -> Schema:
    content = {
        "source": {"files": "x", "derived": derived, "types": {"y": "int", "z": "int"}},
        "categorical": {name: {} for name in derived},
        "tasks": {"t": {"kind": "regression", "label": "z"}},
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }
    return Schema.parse(content, "mine.yaml")


def test_texts_of_all_derived_columns_of_a_block_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(s=["abc"] * 100, z=[1] * 100)
    mine = schema(a="LPAD(s, 40, '0')", b="LPAD(s, 50, '0')")
    assert raw.parse(mine, rows, 0).rows.num_rows == 100
    monkeypatch.setattr(compute, "DERIVED_BYTES", 8_000)
    with pytest.raises(UserError, match=r"^source.derived.b: .* makes texts of more than .* make them shorter$"):
        raw.parse(mine, rows, 0)


@pytest.mark.parametrize(
    ("attack", "twin"),
    [
        ("INTERVAL '1 day'", "'1 day'"),
        ("CAST(y AS DATE)", "CAST(y % 1000 AS DATE)"),
        ("CAST(y AS TIMESTAMP)", "CAST(y % 1000 AS TIMESTAMP)"),
    ],
)
def test_a_derived_column_of_a_type_that_cannot_be_stored_is_an_error_of_one_line(attack: str, twin: str) -> None:
    rows = table(y=[2**62, 1], z=[1, 2])
    with pytest.raises(UserError, match=r"^source.derived.d: .*(cast it|cannot be computed: .*)$"):
        raw.parse(schema(d=attack), rows, 0)
    assert raw.parse(schema(d=twin), rows, 0).rows.num_rows == 2


def test_a_row_id_that_no_int64_holds_is_an_error_of_one_line() -> None:
    content = schema(d="CAST(y AS BIGINT UNSIGNED) + CAST(y AS BIGINT UNSIGNED)").model_dump(exclude_unset=True)
    content["source"]["row_id"] = "d"
    with pytest.raises(UserError, match=r"^source.row_id: .*u64"):
        raw.parse(Schema.parse(content, "mine.yaml"), table(y=[2**62 + 5], z=[1]), 0)
    assert raw.parse(Schema.parse(content, "mine.yaml"), table(y=[5], z=[1]), 0).rows["row_id"].to_pylist() == [10]


WORDS: str = (
    "x y s list 1 0 -1 2.5 1e400 9223372036854775808 'a' '' '%Y' NULL TRUE ( ) [ ] { } , . ; : ' \" ` $$ \\ + - * / % // || "
    "= <> < AND OR NOT IS IN ( BETWEEN CASE WHEN THEN ELSE END CAST( TRY_CAST( AS INT DOUBLE VARCHAR DECIMAL(10,2) DATE "
    "TIMESTAMP INTERVAL :: LIKE ILIKE RLIKE ~ -> ANY( ABS( COALESCE( CONCAT( LPAD( REPLACE( SPLIT_PART( SUBSTR( ROUND( "
    "STRFTIME( STRPTIME( ARRAY_LENGTH( STRING_TO_ARRAY( GENERATE_SERIES( UNNEST( SUM( OVER VALUES SELECT FROM EXTRACT( "
    "-- /* q'[ E' x' DISTINCT \x00 \x1b \u202e é"
)


@settings(max_examples=150, deadline=10_000)
@given(st.lists(st.sampled_from(WORDS.split(" ")), max_size=40), st.sampled_from(["", " "]))
@example(["DATE", "`", "`"], "")
def test_any_text_is_refused_in_one_line_or_computed(words: list[str], between: str) -> None:
    text = between.join(words)
    message = ""
    try:
        columns_of(text)
        compute.truth(FRAME, "weight", text)
    except (ValueError, UserError) as error:
        message = str(error)
    assert message == "" or message.isprintable()
