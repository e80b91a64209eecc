"""Configuration: YAML 1.2, overrides, strict types, and faults that say where they are and what was meant."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import PositiveInt, model_validator

from miram.engine.config import Section, check, dump_yaml, keys, load, parse_overrides, parse_yaml, presets
from miram.engine.errors import UserError
from miram.finetune.classify.config import FinetuneConfig
from miram.finetune.config import ProbeConfig
from miram.finetune.distill.config import DistillConfig
from miram.finetune.federate.config import FederateConfig
from miram.finetune.segment.config import SegmentConfig
from miram.paper.config import PaperConfig
from miram.pretrain.config import PretrainConfig

STAGES: dict[str, type[Section]] = {
    "pretrain": PretrainConfig,
    "probe": ProbeConfig,
    "finetune": FinetuneConfig,
    "segment": SegmentConfig,
    "distill": DistillConfig,
    "federate": FederateConfig,
    "paper": PaperConfig,
}


def schema_of(preset: str) -> type[Section]:
    """Of a preset; recipes of the paper are fine-tunings."""
    recipe = preset in ("paper/authors", "paper/ours")
    return FinetuneConfig if recipe else STAGES[preset.partition("/")[0]]


DEMO = "pretrain/demo"


class Inner(Section):
    """A part."""

    text: str = "default"
    """some text"""
    number: int = 1


class Outer(Section):
    """A whole."""

    inner: Inner = Inner()
    flag: bool = False
    ratio: float | None = 0.5
    items: tuple[Inner, ...] = ()
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = 8
    options: dict[str, Any] = {}


def fault(schema: type[Section], config: str, *arguments: str) -> str:
    with pytest.raises(UserError) as raised:
        load(schema, config, arguments)
    return str(raised.value)


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(text: str | bytes) -> str:
        path = tmp_path / "my.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


# ---------------------------------------------------------------------------------------------- faults in keys


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--train.batch_siez=3", "--train.batch_siez is not a known key; did you mean 'train.batch_size'?"),
        ("--model.scales.1.dept=4", "--model.scales.1.dept is not a known key; did you mean 'model.scales.1.depth'?"),
        ("--sed=1", "--sed is not a known key; did you mean 'seed'?"),
        (
            "--data.qqq=1",
            "--data.qqq is not a known key; known: cache_mb, fold, on_damage, shards, split, split_file, ",
        ),
        ("--train.int=3", "--train.int is not a known key"),
        ("--model.scales.1={scale: 2, dept: 4}", "--model.scales.1.dept is not"),
        ("--model={encodr: x}", "--model.encodr is not"),
    ],
)
def test_unknown_key_of_an_override_is_named_in_full_with_the_nearest(argument: str, said: str) -> None:
    assert fault(PretrainConfig, DEMO, argument).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("inner: {txt: a}", "inner.txt is not a known key; did you mean 'inner.text'?"),
        ("items: [{}, {nmber: 1}]", "items.1.nmber is not a known key; did you mean 'items.1.number'?"),
        ("iner: {}", "iner is not a known key; did you mean 'inner'?"),
    ],
)
def test_unknown_key_of_a_file_is_named_with_the_file(written: Any, text: str, said: str) -> None:
    path = written(text)
    assert fault(Outer, path) == f"{path}: {said}"


def test_options_are_checked_by_the_attention_that_takes_them() -> None:
    unknown = fault(PretrainConfig, DEMO, "--model.scales.1.options={num_landmark: 3}")
    assert "num_landmark is not a known key; did you mean 'num_landmarks'?" in unknown
    assert "attention nystrom" in unknown
    wrong = fault(PretrainConfig, DEMO, "--model.scales.1.options.num_landmarks=many")
    assert "num_landmarks: should be a valid integer (got 'many')" in wrong
    assert "--model.scales.1" in wrong


# ---------------------------------------------------------------------------------------------- faults in values


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--train.batch_size=1.5", "--train.batch_size: should be a valid integer (got 1.5)"),
        ("--train.batch_size=3.0", "--train.batch_size: should be a valid integer (got 3.0)"),
        ("--train.batch_size=true", "--train.batch_size: should be a valid integer (got True)"),
        ("--train.batch_size='3'", "--train.batch_size: should be a valid integer (got '3')"),
        ("--train.compile=1", "--train.compile: should be a valid boolean (got 1)"),
        ("--train.compile=off", "--train.compile: should be a valid boolean (got 'off')"),
        ("--train.blr=false", "--train.blr: should be a valid number (got False)"),
        ("--out=7", "--out: should be a valid string (got 7)"),
        ("--train.batch_size=0", "--train.batch_size: should be greater than 0 (got 0)"),
        ("--train.precision=fp17", "--train.precision: should be 'bf16', 'fp16' or 'fp32' (got 'fp17')"),
        ("--model.scales.0.width=130", "--model.scales.0: width 130 must be a multiple of heads (4) and of 4"),
        ("--model.scales.1.scale=1", "--model.scales: one decoder a scale"),
        ("--seed.x=3", "--seed: should be a valid integer"),
        ("--model.image_size=big", "--model.image_size: should be"),
        ("--model.image_size=[448, 2.5]", "--model.image_size"),
    ],
)
def test_wrong_value_is_one_line_that_names_key_and_value(argument: str, said: str) -> None:
    message = fault(PretrainConfig, DEMO, argument)
    assert message.startswith(said)
    assert "\n" not in message


@pytest.mark.parametrize("value", ["a\\nb", "a\\r\\nb"])
def test_value_with_line_breaks_keeps_the_fault_on_one_line(value: str) -> None:
    assert len(fault(PretrainConfig, DEMO, f'--train.precision="{value}"').splitlines()) == 1


def test_file_is_named_for_its_own_faults_and_the_override_for_its(written: Any) -> None:
    path = written("inner: {text: 3, number: x}\nsurplus: 1\n")
    message = fault(Outer, path, "--flag=maybe", "--ratio=x")
    parts = {part.partition(" should")[0].partition(" is")[0] for part in message.split("; ")}
    assert {f"{path}: inner.text:", f"{path}: inner.number:", f"{path}: surplus", "--flag:", "--ratio:"} <= parts
    assert "\n" not in message


def test_missing_key_is_named_with_both_ways_to_set_it(written: Any) -> None:
    path = written("train: {steps: 3}\ndata: {workers: 0}")
    assert fault(PretrainConfig, path) == (
        f"{path}: data.shards is missing; set it in the file or with --data.shards=…"
    )


class Pair(Section):
    low: int = 0
    high: int = 9

    @model_validator(mode="after")
    def _ordered(self) -> Pair:
        if self.low > self.high:
            raise ValueError("low must not exceed high")
        return self


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        ("low: 10", (), "{path}: low must not exceed high"),
        ("low: 1", ("--high=0",), "{path}: low must not exceed high"),
    ],
)
def test_fault_of_the_whole_is_put_to_the_file(written: Any, text: str, arguments: tuple[str, ...], said: str) -> None:
    path = written(text)
    assert fault(Pair, path, *arguments) == said.format(path=path)


# ---------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-1.", -1.0),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("0o17", 15),
        ("0x1F", 31),
        ("017", 17),
        ("+3", 3),
        ("-3", -3),
        ("off", "off"),
        ("on", "on"),
        ("yes", "yes"),
        ("no", "no"),
        ("y", "y"),
        ("10:20", "10:20"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("1e", "1e"),
        ("<<", "<<"),
        ("=", "="),
        ("true", True),
        ("False", False),
        ("tRUE", "tRUE"),
        ("~", None),
        ("null", None),
        ("", None),
        ("[1, off, {a: ~}]", [1, "off", {"a": None}]),
        ("'1e-4'", "1e-4"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = parse_yaml(text, "test")
    assert (found, type(found)) == (value, type(value))


def test_not_a_number_is_a_float() -> None:
    assert math.isnan(parse_yaml(".nan", "test"))


@pytest.mark.parametrize(
    "text", ["seed: 1\nseed: 2", "inner: {text: a, text: a}", "items: [{number: 1, number: 2}]", "a: 1\n'a': 2"]
)
def test_repeated_key_is_refused(written: Any, text: str) -> None:
    path = written(text)
    message = fault(Outer, path)
    assert message.startswith(path)
    assert "is given twice" in message


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: b: c",
        "\ta: 1",
        "a: \0",
        "a: !!python/object:os.system x",
        "- 1",
        "text",
        "",
        "? [1, 2]\n: 3",
        "options: {a: !!timestamp 2020-01-01}",
        "options: {a: !!binary aGk=}",
        "options: {a: !!set {x}}",
        "options: &a {b: *a}",
        "options: " + "[" * 3000,
        "inner: {number: " + "1" * 5000 + "}",
        b"inner: {text: caf\xe9}",
    ],
    ids=lambda text: str(text[:20]),
)
def test_what_is_no_yaml_mapping_is_refused_with_the_file(written: Any, text: str | bytes) -> None:
    path = written(text)
    assert fault(Outer, path).startswith(path)


@pytest.mark.parametrize(("config", "said"), [("pretrain/dmeo", "did you mean 'pretrain/demo'"), ("zzz", "probe/demo")])
def test_unknown_preset_suggests_the_nearest(config: str, said: str) -> None:
    message = fault(PretrainConfig, config)
    assert repr(config) in message
    assert said in message


# ---------------------------------------------------------------------------------------------- overrides


def test_override_beats_file_beats_default(written: Any) -> None:
    path = written("inner: {text: file, number: 2}\nflag: true")
    loaded = load(Outer, path, ["--inner.text=argument"])
    assert loaded == Outer(inner=Inner(text="argument", number=2), flag=True, ratio=0.5)


def test_later_of_two_overrides_of_one_key_wins(written: Any) -> None:
    assert load(Outer, written("{}"), ["--inner.number=2", "--inner.number=3"]).inner.number == 3


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        (["--a.b=1e-4"], {("a", "b"): 1e-4}),
        (["--a.b", "1e-4"], {("a", "b"): 1e-4}),
        (["--a", "-3", "--b=x"], {("a",): -3, ("b",): "x"}),
        (["--a=k=v"], {("a",): "k=v"}),
        (["--a=--b"], {("a",): "--b"}),
        (["--a="], {("a",): None}),
        (["--a=[1, {b: off}]"], {("a",): [1, {"b": "off"}]}),
        ([], {}),
    ],
)
def test_overrides_are_read_with_and_without_the_equals_sign(
    arguments: list[str], overrides: dict[tuple[str, ...], Any]
) -> None:
    assert parse_overrides(arguments) == overrides


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--a"], "--a has no value"),
        (["--a", "--b=1"], "--a has no value"),
        (["a=1"], "unexpected argument 'a=1'"),
        (["--a=1", "2"], "unexpected argument '2'"),
        (["--a=["], "--a cannot be read"),
    ],
)
def test_argument_of_another_form_is_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_overrides(arguments)
    assert str(raised.value).startswith(said)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--items.2.number=1", "--items.2.number: '2' is not an item of a list of 2"),
        ("--items.x.number=1", "--items.x.number: 'x' is not an item of a list of 2"),
        ("--items.-1.number=1", "--items.-1.number: '-1' is not an item of a list of 2"),
        ("--inner.text.more=1", "--inner.text.more: text is a single value"),
        ("--items.0.number.x=1", "--items.0.number.x: number is a single value"),
        ("--items.².number=1", "--items.².number"),
    ],
)
def test_override_that_leads_nowhere_is_refused(written: Any, argument: str, said: str) -> None:
    path = written("inner: {text: a}\nitems: [{number: 1}, {number: 2}]")
    assert fault(Outer, path, argument).startswith(said)


def test_list_items_are_reached_by_number_and_sections_are_made(written: Any) -> None:
    loaded = load(Outer, written("items: [{}, {}]\ninner:"), ["--items.1.text=b", "--inner.number=5"])
    assert [item.text for item in loaded.items] == ["default", "b"]
    assert loaded.inner.number == 5


LENGTHS = "data: {{shards: x}}\ntrain: {{{}}}"


@pytest.mark.parametrize(
    ("text", "argument", "steps", "epochs"),
    [
        ("steps: 5", "--train.epochs=2.5", None, 2.5),
        ("epochs: 5", "--train.steps=2", 2, None),
        ("steps: 5", "--train.steps=2", 2, None),
        ("steps: 5, epochs: 5", "--train.steps=2", 2, None),
        ("", "--train.epochs=2", None, 2.0),
    ],
)
def test_length_on_the_command_line_replaces_the_files(
    written: Any, text: str, argument: str, steps: int | None, epochs: float | None
) -> None:
    train = load(PretrainConfig, written(LENGTHS.format(text)), [argument]).train
    assert (train.steps, train.epochs) == (steps, epochs)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("steps: 5, epochs: 5", ()),
        ("batch_size: 8", ()),
        ("steps: 5", ("--train.steps=null",)),
        ("steps: 5", ("--train.steps=2", "--train.epochs=3")),
    ],
)
def test_both_lengths_or_neither_are_refused(written: Any, text: str, arguments: tuple[str, ...]) -> None:
    try:
        load(PretrainConfig, written(LENGTHS.format(text)), arguments)
    except UserError as error:
        message = str(error)
    else:
        message = "accepted"
    assert "exactly one of steps and epochs" in message


def test_length_override_of_a_list_is_a_user_error(written: Any) -> None:
    assert "train" in fault(PretrainConfig, written("data: {shards: x}\ntrain: []"), "--train.steps=2")


# ---------------------------------------------------------------------------------------------- written back


@pytest.mark.parametrize("preset", presets())
def test_preset_is_valid_for_its_stage_and_reads_back_equal(preset: str) -> None:
    schema = schema_of(preset)
    config = load(schema, preset)
    assert check(schema, parse_yaml(dump_yaml(config), preset), preset) == config


class Notes(Section):
    text: str
    texts: tuple[str, ...]
    number: float
    count: int
    options: dict[str, Any]


ODD = ["1e-4", "off", "null", "~", "0x1f", "0o17", "", " a", "a\n", "1\n", "- a", "a: b", "# a", "'", '"', "<<", ".inf"]
TEXTS = st.one_of(
    st.sampled_from(ODD), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85"), max_size=30)
)


@given(
    text=TEXTS,
    texts=st.lists(TEXTS, max_size=3),
    number=st.floats(allow_nan=False, allow_infinity=False),
    count=st.integers(),
)
@example(text="\r\u2028\ufeff\x7f\0", texts=ODD, number=1e-7, count=-(2**70))
def test_any_value_reads_back_equal_and_of_its_type(text: str, texts: list[str], number: float, count: int) -> None:
    options = {text: [count, text, None, True, 1.0]}
    notes = Notes(text=text, texts=tuple(texts), number=number, count=count, options=options)
    again = check(Notes, parse_yaml(dump_yaml(notes), "test"), "test")
    assert again == notes
    assert [type(value) for value in again.options[text]] == [int, str, type(None), bool, float]


def test_next_line_character_reads_back() -> None:
    inner = Inner(text="a\x85b")
    assert check(Inner, parse_yaml(dump_yaml(inner), "test"), "test") == inner


def test_infinite_option_reads_back() -> None:
    outer = Outer(options={"limit": math.inf})
    assert check(Outer, parse_yaml(dump_yaml(outer), "test"), "test") == outer


def leaves(section: Section, prefix: str = "") -> Iterator[str]:
    for name, value in section:
        if isinstance(value, Section):
            yield from leaves(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            yield from leaves(value[0], f"{prefix}{name}.0.")
        else:
            yield f"{prefix}{name}"


@pytest.mark.parametrize("preset", ["pretrain/demo", "probe/demo"])
def test_help_lists_every_leaf_and_nothing_else(preset: str) -> None:
    config = load(schema_of(preset), preset)
    listed = list(keys(type(config)))
    assert [key for key, *_ in listed] == list(leaves(config))
    assert all(meaning for *_, meaning in listed)


def test_help_tells_type_default_and_meaning() -> None:
    listed = {key: rest for key, *rest in keys(Outer)}
    assert listed["inner.text"] == ["str", '"default"', "some text"]
    assert listed["ratio"] == ["float | null", "0.5", ""]
    assert listed["options"][1] == "{}"
    assert {key: default for key, _, default, _ in keys(PretrainConfig)}["data.shards"] == "required"


def test_help_has_no_python_internals() -> None:
    kinds = [kind for schema in STAGES.values() for _, kind, _, _ in keys(schema)]
    assert not [kind for kind in kinds if "typing." in kind or "Annotated" in kind]
