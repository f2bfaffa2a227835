import pytest
from job_calls import assert_one_line

from features.errors import UserError, did_you_mean
from features.schema.schema import Schema

SCHEMA = {
    "source": {"files": "x.csv", "columns": ["user", "label"]},
    "categorical": {"user": {}},
    "tasks": {"click": {"kind": "binary", "label": "label"}},
    "split": {"by": "hash", "key": "user", "valid": 0.1, "test": 0.1},
}


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("train.batchsize=3", "train.batch_size"),  # of the same section
        ("batch_size=3", "train.batch_size"),  # of another one
        ("trian.lanes=3", "train"),
        ("model=adat", "model=adatt"),
        ("interaction=cros", "interaction=cross"),
    ],
)
def test_a_mistyped_setting_suggests_the_nearest_one(word: str, nearest: str, call) -> None:
    assert_one_line(call("train", "dataset=x", "run=y", word), f"(did you mean {nearest}?)")


@pytest.mark.parametrize("word", ["model.tower={a:[3]}", "model.fusion=[3]"])
def test_a_list_in_the_place_of_a_mapping_and_the_reverse_are_answered_with_what_to_type(word: str, call) -> None:
    key, _, value = word.partition("=")
    typed = f"'~{key}' '+{key}=VALUE'"
    assert_one_line(call("train", "dataset=x", "run=y", word), f"{key}: a list and a mapping cannot be merged", typed)
    assert "merged" not in call("train", "dataset=x", "run=y", f"~{key}", f"+{key}={value}")


def test_a_setting_that_resembles_none_suggests_none(call) -> None:
    said = call("train", "dataset=x", "run=y", "train.qqqqq=3")
    assert_one_line(said, "train.qqqqq: no such setting.", "--help")


def test_settings_of_hydra_are_not_suggested(call) -> None:
    said = call("train", "dataset=x", "run=y", "verbose=3")
    assert_one_line(said, "verbose: no such setting")
    assert "hydra" not in said


@pytest.mark.parametrize("key", ["train.weighting.temperature", "model.given.name", "train.sharding.user"])
def test_an_option_that_its_file_does_not_list_is_answered_with_how_to_add_it(key: str, call) -> None:
    assert_one_line(
        call("train", "dataset=x", "run=y", f"{key}=1"), "no such setting", "+KEY=VALUE adds a key that a file lacks"
    )


def test_only_some_sections_take_keys_that_their_files_lack(call) -> None:
    hint = "+KEY=VALUE adds a key that a file lacks"
    assert hint not in call("preprocess", "data=demo", "out=x", "encoder.from=x")
    assert hint not in call("train", "dataset=x", "run=y", "train.lane=8")
    word = "data.schema.source.missing=[]"
    assert hint in call("preprocess", "data=demo", "out=x", word)
    assert "Extra inputs are not permitted" in call("preprocess", "data=demo", "out=x", "+encoder.from=x")
    assert "no such setting" not in call("preprocess", "data=demo", "out=x", "data.input=nowhere", f"+{word}")


@pytest.mark.parametrize(
    ("words", "key"), [(["run=y"], "dataset"), (["dataset=x", "run=y", "model=emm"], "model.from")]
)
def test_a_setting_that_must_be_given_is_named_with_what_to_type(words: list[str], key: str, call) -> None:
    assert_one_line(call("train", *words), f"{key} is missing: add {key}=VALUE")


def test_an_added_setting_that_a_job_does_not_have_suggests_the_nearest_one(call) -> None:
    assert_one_line(call("preprocess", "data=demo", "out=x", "+overwrit=true"), "overwrit", "(did you mean overwrite?)")


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [("source", "delimeter", "delimiter"), ("tasks", "lable", "label"), ("categorical", "vocabulry", "vocabulary")],
)
def test_a_mistyped_key_of_a_schema_suggests_the_nearest_one(section: str, key: str, nearest: str) -> None:
    entry = next(iter(SCHEMA[section]))
    part = {**SCHEMA[section], key: 1} if section == "source" else {entry: {**SCHEMA[section][entry], key: 1}}
    with pytest.raises(UserError, match=rf"{key}: unknown key \(did you mean {nearest}\?\), allowed are "):
        Schema.parse({**SCHEMA, section: part}, where="mine.yaml")


def test_a_column_that_is_not_listed_suggests_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"column usr is used, .* does not list it \(did you mean user\?\)"):
        Schema.parse({**SCHEMA, "categorical": {"usr": {}}}, where="mine.yaml")


def test_the_nearest_name_is_printed_without_its_controls_and_bounded() -> None:
    assert did_you_mean("ab\x1bcd", ["ab\x1bce"]) == " (did you mean ab\\x1bce?)"
    assert len(did_you_mean("a" * 100_000, ["a" * 100_000])) < 300
    assert did_you_mean("KEY", ["key"]) == " (did you mean key?)"
    assert did_you_mean("key", []) == ""
