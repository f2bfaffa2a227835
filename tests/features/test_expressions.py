"""Which expressions a schema may hold, against what they compute: the value of a row must not change with its neighbours."""

from datetime import datetime

import polars as pl
import pytest

from features.schema.expressions import columns_of

ROWS = pl.DataFrame(
    {
        "x": [3.0, 1.0, 2.0, 5.0],
        "y": [1, 2, 3, 9],
        "s": ["b", "a", "c", "z"],
        "at": [datetime(2020, 1, day) for day in (1, 2, 3, 4)],
        "list": [[1, 2], [3], [4], [1]],
        "sum": [1, 2, 3, 4],
    }
)


def values(expression: str, rows: pl.DataFrame) -> list:
    """What polars computes; one value for all rows is that of each."""
    found = rows.select(pl.sql_expr(expression).alias("value")).to_series().to_list()
    return found * rows.height if len(found) == 1 else found


def depends_on_other_rows(expression: str) -> bool:
    alone = [values(expression, row) for row in ROWS.iter_slices(1)]
    return str(alone) != str([[value] for value in values(expression, ROWS)])


# The aggregates and window functions of polars, under all their names, and what else changes the number of rows.
OF_SEVERAL_ROWS = [
    "APPROX_QUANTILE(x, 0.5)", "AVG(x)", "CORR(x, y)", "COUNT(*)", "COUNT()", "COUNT(DISTINCT x)", "COVAR(x, y)",
    "COVAR_POP(x, y)", "COVAR_SAMP(x, y)", "FIRST(x)", "FIRST_VALUE(x)", "LAST(x)", "MAX(x)", "MEDIAN(x)", "MIN(x)",
    "QUANTILE_CONT(x, 0.5)", "QUANTILE_DISC(x, 0.5)", "STDDEV(x)", "STDDEV_SAMP(x)", "STDEV(x)", "STDEV_SAMP(x)",
    "STRING_AGG(s, ',')", "LISTAGG(s)", "GROUP_CONCAT(s)", "ARRAY_AGG(x)", "SUM(x)", "TOTAL(x)", "VAR(x)",
    "VAR_SAMP(x)", "VARIANCE(x)", "SUM(x) FILTER (WHERE x > 1)", "ROW_NUMBER()", "ROW_NUMBER() OVER (ORDER BY x)",
    "RANK() OVER (ORDER BY x)", "DENSE_RANK() OVER (ORDER BY x)", "PERCENT_RANK() OVER (ORDER BY x)",
    "CUME_DIST() OVER (ORDER BY x)", "NTILE(2) OVER (ORDER BY x)", "LAG(x) OVER (ORDER BY y)",
    "LEAD(x) OVER (ORDER BY y)", "NTH_VALUE(x, 2) OVER (ORDER BY y)", "SUM(x) OVER (ORDER BY y)",
    "FIRST_VALUE(x) OVER (ORDER BY y)", "LAST_VALUE(x) OVER (PARTITION BY s IS NULL)", "x > ANY (y)", "x > ALL(y)",
    "x > SOME (y)", "UNNEST(list)", "CAST(SUM(x) AS INT)", "x / sum (x)",
    '"sum"(x)', "`max` (x)", '"row_number"()', "$$ ' $$ || SUM(x) || $$ ' $$", "sum\n(x)",
]  # fmt: skip


@pytest.mark.parametrize("expression", OF_SEVERAL_ROWS)
def test_what_depends_on_other_rows_is_refused(expression: str) -> None:
    assert depends_on_other_rows(expression)
    with pytest.raises(ValueError, match=r" uses .+: an expression may only use columns of its row"):
        columns_of(expression)


@pytest.mark.parametrize(
    "expression",
    [
        *("x = NOW()", "CURRENT_TIMESTAMP", "LOCALTIMESTAMP", "current_date", "LOCALTIME", '"now"()', "CURRENT_DATE()"),
        *(
            "at > DATE '2020-01-01' AND at < NOW()",
            "at + INTERVAL '1 day' > NOW()",
            "COALESCE(at, CURRENT_DATE)",
            "s = 'date ' AND at = NOW()",
        ),
    ],
)
def test_what_depends_on_the_clock_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="uses the clock: "):
        columns_of(expression)


# Names that a list of forbidden names would have to know.
UNLISTED = {
    "GROUPING(x)": "Alias",
    "PRIOR x": "Alias",
    "ARRAY_UNIQUE(list)": "Eval",
    "ARRAY_REVERSE(list)": "Eval",
    "x + ROW_NUMBER()": r"Range.IntRange, COUNT\(\*\)",
    "x = ANY(ARRAY[1, 2])": "Alias",
    "CASE WHEN x > 1 THEN COUNT(*) END": r"COUNT\(\*\)",
    "CASE WHEN MAX(x) > 1 THEN 1 END": "MAX over rows",
    "SUM(x) > 1": "COUNT over rows, SUM over rows",
    "COALESCE(x, FIRST(x))": "FIRST over rows",
    "UPPER(STRING_AGG(s))": ".* over rows",
    "UNNEST(list) IN (1, 2)": "UNNEST",
    "DATE(s) > at": "a date without a format, .*",
    "TIMESTAMP(s)": "a date without a format, .*",
    "LAG(x) OVER (ORDER BY y) IS NULL": "OVER",
}


@pytest.mark.parametrize("expression", UNLISTED)
def test_what_no_list_allows_is_refused_by_its_name_wherever_it_stands(expression: str) -> None:
    with pytest.raises(ValueError, match=f" uses {UNLISTED[expression]}: "):
        columns_of(expression)


A_QUERY = [
    "x IN (SELECT 1)", "x = (FROM read_csv('x.csv'))", "EXISTS (select 1)", "x IN (VALUES (1))", "x IN (values\n(1))",
    "x IN (VALUES ROW(1))", "EXISTS (VALUES (1))", "q'[ ' ]' || (FROM read_csv('x.csv')) || q'[ ' ]'",
    "x IN (WITH a AS (VALUES (1)) SELECT 1)",
]  # fmt: skip


@pytest.mark.parametrize("expression", A_QUERY)
def test_a_query_is_refused_before_polars_may_read_what_it_names(expression: str, monkeypatch) -> None:
    monkeypatch.setattr(pl, "sql_expr", lambda _: pytest.fail("parsed"))
    with pytest.raises(ValueError, match="holds a query"):
        columns_of(expression)


def test_the_columns_are_a_list_of_the_callers_own() -> None:
    columns_of("x + y").append("z")
    assert columns_of("x + y") == ["x", "y"]


OF_ONE_ROW = [
    "ABS(x) + SQRT(x) - LN(x) * POW(x, 2) / 3 % 7", "ROUND(x, 2)", "x IN (1, 2)", "x IN (y, y + 1)", "s LIKE 'a%'",
    "x BETWEEN 1 AND 2", "CASE WHEN x > 1 THEN 2 ELSE x END", "COALESCE(x, y)", "GREATEST(x, y)", "LEAST(x, y)",
    "IF(x > 1, 1, 2)", "NULLIF(x, 1)", "UPPER(s) || 'sum(x)'", "CONCAT_WS('-', s, s)", "CAST(x AS DECIMAL(10, 2))",
    "DATE_PART('hour', at)", "STRFTIME(at, '%Y')", "SUBSTR(s, 1, 2)", "REGEXP_LIKE(s, '^(a|max(imum)?)$')",
    "SPLIT_PART(s, ',', 1)", "ARRAY_SUM(list)", "ARRAY_LENGTH(list)", "list[1]", "BIT_AND(y, 3)", "STRPOS(s, 'a')",
    '"sum" + 1', "sum", "CASE WHEN sum IN (1, 2) THEN (x) END", "x * -1 - - 2", "s IN ('it''s', 'a -- b', '/* c')",
    "at >= DATE '2020-01-02'", "s = 'date ' OR s = 'x'", "s = 'a date ''x'",
    "at + INTERVAL '1 day' > TIMESTAMP '2020-01-02 00:00:00'", "LEFT(s, y)", "x IS NOT NULL",
    "s ILIKE 'A%' OR s NOT LIKE '_'", "LPAD(s, 3, '0')", "TRIM(s) || RTRIM(s)", "LOG2(x) + LOG10(x) + LOG(x, 3) + SIGN(x)",
    "x = ANY(list)", "DATE_PART('epoch', at) // 3600 % 24", "TRUNC(CEIL(x) / EXP(y))", "NOT (x > 1 AND y < 3)",
]  # fmt: skip


@pytest.mark.parametrize("expression", OF_ONE_ROW)
def test_what_depends_on_its_row_alone_is_allowed(expression: str) -> None:
    assert not depends_on_other_rows(expression)
    read = [name for name in ROWS.columns if name in columns_of(expression)]
    assert values(expression, ROWS.select(read)) == values(expression, ROWS)


@pytest.mark.parametrize("expression", ["x--1", "x /* of the user */", "/* ' */ SUM(x) /* ' */", "SUM/**/(x)"])
def test_comments_are_refused_as_they_hide_what_is_computed(expression: str) -> None:
    with pytest.raises(ValueError, match=r"holds a comment \((--|/\*)\): remove it"):
        columns_of(expression)
