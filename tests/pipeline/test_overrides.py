from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from pipeline.overrides import setting

PARSER = OverridesParser.create()


@given(st.text("ab1[]{}()'\"\\ ,=:*?~#\t/.-é", min_size=1, max_size=12).filter(lambda text: not text.isdigit()))
def test_a_value_is_read_as_it_was_given(value: str) -> None:
    assert str(PARSER.parse_override(setting("out", f"x{value}")).value()) == f"x{value}"


def test_usual_values_stay_as_they_are() -> None:
    assert setting("out", "runs/demo-1/data_2.x") == "out=runs/demo-1/data_2.x"
    assert setting("out", "runs/[x]") == "out='runs/[x]'"
