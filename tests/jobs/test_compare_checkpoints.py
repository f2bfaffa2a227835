"""jobs.evaluate compare=[RUN,RUN@STEP] on the command line."""

from pathlib import Path

import pytest
from job_calls import assert_one_line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["compare=[a,b]", "run=c"], "compare names both of its runs: leave run out"),
        (["compare=[a]"], "compare: List should have at least 2 items"),
        (["compare=a"], "compare: Input should be a valid list"),
        (["compare=[a,b@3]", "compare_slices=-1"], "compare_slices"),
        (["compare=[a,b@3]"], "a: no run (config.yaml is missing)"),
    ],
)
def test_a_comparison_that_cannot_be_is_one_line(words: list[str], says: str, call, tmp_path: Path) -> None:
    assert_one_line(call("evaluate", *words), says)
