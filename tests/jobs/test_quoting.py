import re
import shlex
import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import example, given
from hypothesis import strategies as st
from job_calls import assert_one_line

from features.errors import UserError
from jobs import command_line
from jobs.quoting import quoted, refused, typed

PARSER = OverridesParser.create()


def value_of(word: str) -> object:
    return PARSER.parse_override(word).value()


def text_of(word: str) -> str:
    """The text that a setting is, for one that Hydra reads as a text."""
    found = value_of(word)
    return found if isinstance(found, str) else found.text  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "value",
    ["/x/year=2026/d", "click = 1", "100%", "a@b", "a#b", "#", " in spaces ", "c42 = '50000+.'", "it's", "imp-{date}.csv",
     "価格", "~/logs", "f(1)", "a = \"b\"", "x'y\\", "a;b&c|d<e>"],
)  # fmt: skip
def test_plain_text_is_read_as_it_is(value: str) -> None:
    (word,) = quoted([f"out={value}"])
    assert text_of(word) == value


PLAIN = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\\"), min_size=1, max_size=12)


@given(PLAIN)
@example("a=b'c")
@example("1,2=3")
@example("x = choice(1")
def test_whatever_hydra_does_not_read_is_text(value: str) -> None:
    word = f"a.b={value}"
    try:
        before: object = PARSER.parse_override(word)
    except HydraException:
        before = None
    try:
        (now,) = quoted([word])
    except UserError:
        assert "," in value or "(" in value  # a sweep
        return
    if before is None and value.lstrip()[:1] not in ("[", "{", "'", '"') and "${" not in value:
        assert text_of(now) == value
    elif before is not None and not isinstance(value_of(word), str):
        assert now == word  # numbers, booleans, null, lists, texts in quotes
    elif before is not None:
        assert text_of(now) == value


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("a=1", 1), ("a=1e3", 1000.0), ("a=true", True), ("a=null", None), ("a=[1,x]", [1, "x"]), ("a={b:2}", {"b": 2}),
        ("a='x y'", "x y"), ('a="1"', "1"), ("a=b c", "b c"),
        ("a=b\\,c", "b,c"),
    ],
)  # fmt: skip
def test_what_hydra_reads_keeps_its_type(word: str, value: object) -> None:
    assert quoted([word]) == [word]
    assert value_of(word) == value


@pytest.mark.parametrize(
    "words",
    [["data=a b=c"], ["+data=x=/y"], ["hydra.run.dir=a=b"], ["~a.b=c=d"], ["--config-dir", "my=conf d"],
     ["--config-dir", "my=x=y"], ["--cfg", "job"], ["--multirun", "a=1,2"], ["a=1,2", "-m"], ["a=[x"], ["a='x"], ["a=${b}=1"]],
)  # fmt: skip
def test_groups_flags_and_what_is_written_for_hydra_stay_as_they_are(words: list[str]) -> None:
    assert quoted(words) == words


def test_what_is_refused_before_is_refused_still() -> None:
    for word in ("hydra.searchpath=[a=b]", "data@x=a=b", "data=../a=b", f"a={'[' * 50}"):
        with pytest.raises(UserError):
            command_line.check([word])
        with pytest.raises(UserError):
            command_line.check(quoted([word])) if word.count("[") < 2 else command_line.check([word])


@pytest.mark.parametrize("value", ["[x", "c = 'd", 'say "x"', "$HOME[", "a`b`'\"\\"])
def test_the_form_to_type_passes_a_shell_and_hydra(value: str) -> None:
    said = subprocess.run(["sh", "-c", f"printf %s {typed('out', value)}"], capture_output=True, text=True, check=True)
    assert text_of(said.stdout) == value
    assert shlex.split(typed("out", value)) == [said.stdout]


def test_values_with_signs_reach_a_job(call, tmp_path) -> None:
    out = tmp_path / "year=2026" / "100% #1 a@b"
    said = call("generate", f"out={out}", "impressions=20", "days=2", "users=9", "items=60")
    assert said.startswith(str(out))
    assert len(list(out.glob("impressions-*.csv"))) == 2


def test_what_cannot_be_told_from_a_list_is_answered_with_the_form_to_type(call) -> None:
    assert_one_line(call("generate", "out=/x/a,b"), "'out=\"/x/a,b\"'", "'out=[/x/a,b]'")
    assert_one_line(call("generate", "out=[x"), "'out=\"[x\"'")
    assert_one_line(call("generate", "out"), "not KEY=VALUE")
    assert_one_line(
        call("draft", "input=x", "label=c4", "=", "1", "out=y"), "label=c4 = 1: is split", "'label=\"c4 = 1\"'"
    )


@pytest.mark.parametrize("text", ["label=c4 = 1 out=y", "out=/my logs", "a=1 + b --cfg job"])
def test_a_setting_that_a_shell_has_split_is_answered_with_the_form_to_type(text: str) -> None:
    with pytest.raises(UserError) as caught:
        quoted(text.split())
    words = shlex.split(str(caught.value).partition("Type ")[2].removesuffix("."))
    assert [text_of(word) for word in words] == [re.split(r" out=| --cfg", text.partition("=")[2])[0]]


@pytest.mark.parametrize(
    "text", ["data=mine out = /x seed=1", "data=mine out =/x", "data=mine out= /x", "out = /x data=mine"]
)
def test_of_two_settings_the_one_that_a_shell_has_split_is_named(text: str) -> None:
    with pytest.raises(UserError, match=r"^out ?= ?/x: is split at its spaces\. Type 'out=/x'\.$"):
        quoted(text.split())


def test_a_list_that_a_shell_has_split_stays_one() -> None:
    with pytest.raises(UserError, match=r"Type 'a=\[x, y\]'\.$"):
        quoted(["a=[x,", "y]", "b=1"])


def first_form(message: str) -> str | None:
    """The first form that a message says to type, as a shell passes it on; None where it says another thing."""
    before, found, form = message.partition("ype ")
    if not found or not before.endswith((" T", " t")):
        return None
    lexer = shlex.shlex(form, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    return re.sub(r"[.,]$", "", next(lexer))


def refusal(words: list[str]) -> str | None:
    """What a job says of words that it refuses; None where they are read."""
    try:
        found = quoted(words)
    except UserError as error:
        return str(error)
    for word in found:
        try:
            PARSER.parse_override(word)
        except HydraException as error:
            return str(refused(word, str(error).splitlines()[0]))
    return None


PIECES = st.sampled_from(
    ["x", "out", "data", "a.b", "+", "++", "~", " ", " ", "=", "=", "y = 1", "{", "}", "[", "]", ",", ": ", "'", '"', "(", ")",
     "choice(", "1", "$", "é", "\\", "#", "/l", "null"]
)  # fmt: skip


@given(st.lists(st.lists(PIECES, min_size=1, max_size=7).map("".join), min_size=1, max_size=3))
@example(["out =x"])
@example(["+ data.schema.weight = price + 1"])
@example(["x={z: y = 1}"])
@example(["x=[a=1,", "b]"])
@example(["~x =a=b"])
@example(["out", "=", "x"])
@example(["a=choice(1,2=3)"])
def test_whatever_is_advised_is_accepted_when_it_is_typed(words: list[str]) -> None:
    words = [word for word in words if not word.startswith("-")]
    if (message := refusal(words)) and (form := first_form(message)):
        assert (form, refusal([form])) == (form, None), message


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("out =x", "out =x: a key has no spaces around it. Type 'out=x'."),
        (" + out = a b", "Type '+out=a b'."),
        ("data.schema.source.derived.a b=x", "a b=x: a key on a command line has ASCII letters, digits, _, -, $ and dots"),
        ("hydra.a b=1", "no spaces. Correct it, or where it is a name of your own, write it into a YAML file"),
        ("x={z: y = 1}", "Type 'x={z: \"y = 1\"}', or if all of it is one text 'x=\"{z: y = 1}\"'."),
        ("x=[a=1,b c]", "Type 'x=[\"a=1\",b c]', or if all of it is one text"),
        ("x=[y", "If it is a text, type 'x=\"[y\"'."),
        ("+=x", "+=x: not KEY=VALUE. See --help."),
        ("=x", "=x: not KEY=VALUE. See --help."),
    ],
)  # fmt: skip
def test_what_hydra_cannot_read_is_answered_by_what_is_wrong_with_it(word: str, says: str) -> None:
    assert says in str(refusal([word]))


def test_a_job_prints_what_to_type_for_words_that_cannot_be_read(call) -> None:
    assert_one_line(call("generate", "out =x"), "Type 'out=x'.")
    assert_one_line(call("preprocess", "data=demo", "out=x", "+data.schema.source.derived.a b=price"), "YAML file")
    assert_one_line(
        call("preprocess", "data=demo", "out=x", "+data.schema.source.derived={z: price = item_id}"),
        '{z: "price = item_id"}',
    )
    typed_word = '+data.schema.source.derived={z: "price = item_id"}'
    assert_one_line(call("preprocess", "data=demo", "out=x", typed_word, "input=/nowhere"), "/nowhere/", "no such file")
