"""Imports without garbage collection."""

import gc
import importlib
import sys
from pathlib import Path

import pytest

from pipeline.quick_imports import quick_imports


def test_nothing_is_collected_while_a_module_is_imported_and_what_it_made_is_not_gone_over_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_for_this_test.py").write_text(
        "import gc\ncollects, made = gc.isenabled(), [[] for _ in range(9)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with quick_imports():
        module = importlib.import_module("made_for_this_test")
    monkeypatch.delitem(sys.modules, "made_for_this_test")
    assert not module.collects
    assert gc.isenabled()
    assert not any(item is module.made for item in gc.get_objects()), "frozen objects are in no generation"


def test_where_nothing_is_imported_no_garbage_is_kept_and_an_error_leaves_the_collector_on() -> None:
    held: list[list] = [[]]
    with pytest.raises(KeyError), quick_imports():
        raise KeyError
    assert gc.isenabled()
    assert any(item is held for item in gc.get_objects())


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
