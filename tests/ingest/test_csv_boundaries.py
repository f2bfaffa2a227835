"""CSV and JSON lines cut at every byte: units and blocks of any size give what one read of the whole file gives."""

import pytest
from csv_by_hand import by_hand
from examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_blocks import blocks_of, read

from features.source import Format

PIECES = st.sampled_from(
    [b"a", b"b", b",", b",", b'"', b'"', b"\n", b"\n", b"\r", b"\r\n", b" ", b"\xff", b'""', b'"\n', b',"', b'",',
     b'x,"y\nz"\n', b'"p",q\n', b"r,s\n", b"\n\n", b'"a""b,c\n', "é".encode()]
)  # fmt: skip


@settings(max_examples=examples(400), deadline=None)
@given(
    data=st.lists(PIECES, max_size=40).map(b"".join),
    columns=st.integers(1, 3),
    multiline=st.booleans(),
    limits=st.tuples(st.integers(1, 5), st.integers(1, 60)),
    unit_bytes=st.integers(1, 60),
    block_bytes=st.integers(1, 60),
)
@example(data=b'a,"b\nc"\nd,e\n', columns=2, multiline=False, limits=(1, 60), unit_bytes=5, block_bytes=5)
def test_rows_and_faults_are_those_of_a_reading_character_by_character(
    tmp_path_factory: pytest.TempPathFactory,
    data: bytes,
    columns: int,
    multiline: bool,
    limits: tuple[int, int],
    unit_bytes: int,
    block_bytes: int,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "random.csv").write_bytes(data)
    names = ["a", "b", "c"][:columns]
    format = Format(columns=names, multiline=multiline, max_row_lines=limits[0], max_line_bytes=limits[1])
    expected = by_hand(data, columns, '"', multiline, limits)
    types = dict.fromkeys(names, "string")
    assert read(folder, "random.csv", format, types, spans=True) == expected
    with blocks_of(block_bytes):
        assert read(folder, "random.csv", format, types, unit_bytes, spans=True) == expected
