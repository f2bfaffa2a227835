"""features/regular_files.py, features/printable.py: what a handed folder may lead to, and text that controls no terminal."""

import os
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from features.errors import UserError
from features.printable import has_controls, printable
from features.regular_files import RelativePath, lstat_regular, read_regular


@pytest.mark.parametrize("name", ["a", "train/part-0.parquet", "..a", "a..b/c", ".metadata"])
def test_a_plain_relative_path_is_taken_as_it_is(name: str) -> None:
    assert TypeAdapter(RelativePath).validate_python(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "/", "/etc/passwd", "../a", "a/../../b", "a/./b", ".", "..", "a//b", "a/", "./a", "//a", "//", "a\x1b", "a\0"],
)
def test_another_path_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="plain relative path"):
        TypeAdapter(RelativePath).validate_python(name)


@given(st.text("./ab\\~", max_size=12))
def test_a_path_that_passes_stays_below_its_folder(name: str) -> None:
    try:
        TypeAdapter(RelativePath).validate_python(name)
    except ValidationError:
        return
    assert os.path.normpath(f"/folder/{name}").startswith("/folder/")


def test_a_regular_file_is_read_up_to_its_limit_also_below_a_linked_folder(tmp_path: Path) -> None:
    (tmp_path / "real" / "part").mkdir(parents=True)
    (tmp_path / "real" / "part" / "file").write_bytes(b"12345")
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    assert read_regular(tmp_path / "folder", "part/file", limit=5) == b"12345"
    assert lstat_regular(tmp_path / "folder", "part/none") is None
    with pytest.raises(UserError, match="5 bytes, more than the 4"):
        read_regular(tmp_path / "folder", "part/file", limit=4)
    with pytest.raises(FileNotFoundError, match="none"):
        read_regular(tmp_path / "folder", "none", limit=5)


@pytest.mark.parametrize(("name", "says"), [
    ("link", "a link"), ("pipe", "a pipe"), ("linked/file", "a link"), ("loop", "a link"), ("folder", "a folder"),
])  # fmt: skip
def test_what_is_no_regular_file_is_refused_without_being_opened(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"secret")
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    (tmp_path / "linked").symlink_to(tmp_path / "folder")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for read in (lstat_regular, partial(read_regular, limit=5)):
        with pytest.raises(UserError, match=says):
            read(tmp_path, name)


def test_text_of_data_is_shown_with_its_controls_as_escapes() -> None:
    assert (
        printable("\x1b]0;title\x07 a\tb\nc\x9b\u202eé\ud800") == "\\x1b]0;title\\x07 a\\x09b\\x0ac\\x9b\\u202eé\\ud800"
    )
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


CONTROLS = ["\0", "\b", "\r", "\x1b", "\x7f", "\x80", "\x9b", "\x9f", "\u061c", "\u200e", "\u2028", "\u202e", "\u2066"]
CONTROLS += ["\u206a", "\ufeff", "\ufff9", "\ud800", "\udfff"]


@pytest.mark.parametrize("character", CONTROLS)
def test_what_moves_a_cursor_or_turns_text_is_a_control(character: str) -> None:
    assert has_controls(f"a{character}b")
    assert printable(character).isascii()


@pytest.mark.parametrize(
    "text", ["é", "漢字", "👩\u200d👩\u200d👧 🇫🇷", "عربى", "می\u200cخواهم", "हिन्दी", "e\u0301", "\xa0", "C:\\x1b"]
)
def test_text_of_any_language_is_shown_as_it_is(text: str) -> None:
    assert not has_controls(text)
    assert printable(text) == text


@given(st.text())
def test_printable_text_has_no_controls_and_text_without_them_is_unchanged(text: str) -> None:
    shown = printable(text)
    assert not has_controls(shown)
    assert shown.isprintable() or not text.isprintable()
    assert (shown == text) is not has_controls(text)
