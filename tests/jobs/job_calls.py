"""What tests of command lines share, besides the fixture `call` of conftest.py."""

from collections.abc import Callable

Call = Callable[..., str]


def assert_one_line(said: str, *words: str) -> None:
    assert said.startswith("error: "), said
    assert "\n" not in said
    assert [word for word in words if word not in said] == [], said
