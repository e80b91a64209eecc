import json
import math
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from miram.engine.errors import UserError
from miram.finetune.federate.exchange import (
    CLAUSES,
    DATA,
    Facts,
    Order,
    Refusal,
    Update,
    apart,
    digest_of,
    fault_of,
    fault_of_facts,
    payload,
    read_payload,
    together,
)

BASE, OTHER = "0f" * 32, "e1" * 32
TENSORS = {
    "model.blocks.0.attn.qkv.lora.B.q": torch.randn(6, 2),
    "head.bias": torch.randn(3),
    "gate": torch.tensor(0.5),
}


def order(**changes):
    return replace(Order(2, BASE, TENSORS, {"head.mean": torch.zeros(6, dtype=torch.float64)}, 0.1), **changes)


def update(**changes):
    tensors = {name: tensor + 1 for name, tensor in TENSORS.items()}
    return replace(Update("site-a", BASE, 2, tensors, 40, 0.7), **changes)


def facts(**changes):
    sizes = torch.tensor([30, 10]), torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    return replace(Facts("site-a", BASE, OTHER, 40, *sizes), **changes)


def same(one, other) -> bool:
    (header, tensors), (header2, tensors2) = apart(one), apart(other)
    return (
        header == header2
        and tensors.keys() == tensors2.keys()
        and all(
            torch.equal(tensors[name], tensors2[name]) and tensors[name].dtype == tensors2[name].dtype
            for name in tensors
        )
    )


@pytest.mark.parametrize("message", [order(), update(), facts(), Refusal("b_2", DATA), order(tensors={}, fixed={})])
def test_a_message_comes_back_as_it_went_and_its_bytes_repeat(message):
    content = payload(message)
    assert same(read_payload(content, type(message)), message)
    assert content == payload(message)


def test_views_of_one_memory_and_other_strides_travel_as_values():
    whole = torch.arange(6.0).reshape(2, 3)
    sent = read_payload(payload(update(tensors={"a": whole.mT, "b": whole[1]})), Update).tensors
    assert torch.equal(sent["a"], whole.mT)
    assert torch.equal(sent["b"], whole[1])


def test_the_safetensors_library_reads_a_payload_and_finds_no_more_than_the_closed_set_of_keys():
    content = payload(update())
    assert load(content).keys() == {f"tensors/{name}" for name in TENSORS}
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    assert metadata.keys() == {"miram"}
    assert json.loads(metadata["miram"]) == {"site": "site-a", "base": BASE, "round": 2, "examples": 40, "loss": 0.7}


@pytest.mark.parametrize(
    "message",
    [
        update(site="/data/hospital/MRN-00123"),
        update(site="UPPER"),
        update(site="x" * 33),
        update(base="/home/me/encoder.safetensors"),
        facts(start="patient 7"),
        Refusal("b", "/data/hospital/shards is not there"),
        update(examples=True),
        update(loss="0.7"),
    ],
)
def test_a_path_or_an_id_or_another_type_is_never_sent(message):
    with pytest.raises(AssertionError):
        payload(message)


def resealed(message, **header):
    """The payload with another header, as somebody else may send it."""
    said, tensors = apart(message)
    return save(
        tensors, {"miram": json.dumps({key: value for key, value in (said | header).items() if value is not None})}
    )


def parts(**tensors):
    return save(
        {name.replace("__", "/"): tensor for name, tensor in tensors.items()}, {"miram": json.dumps(apart(update())[0])}
    )


HOSTILE = {
    "empty": b"",
    "no safetensors": b"\xff" * 64,
    "a pickle": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04harm\x85R.",
    "cut": payload(update())[:-3],
    "no metadata": save({"tensors/a": torch.ones(2)}),
    "other metadata": save({"tensors/a": torch.ones(2)}, {"format": "pt"}),
    "metadata that is no JSON": save({}, {"miram": "{"}),
    "deep JSON": save({}, {"miram": "[" * 100_000}),
    "a list": save({}, {"miram": "[]"}),
    "one key more": resealed(update(), patient="7"),
    "one key less": resealed(update(), examples=None),
    "a number as text": resealed(update(), examples="40"),
    "a path for a name": resealed(update(), site="../../etc"),
    "a foreign tensor": parts(pixels=torch.ones(2)),
    "a foreign group": parts(fixed__a=torch.ones(2)),
    "a group without a name": parts(tensors__=torch.ones(2)),
    "a field for a group": parts(tensors=torch.ones(2)),
    "another kind": payload(facts()),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_message_is_refused_in_one_sentence(kind):
    with pytest.raises(UserError, match="Update"):
        read_payload(HOSTILE[kind], Update)


def test_a_message_that_lacks_a_tensor_is_refused():
    header, tensors = apart(facts())
    del tensors["m2"]
    with pytest.raises(UserError, match="lacks m2"):
        together(header, tensors, Facts)


@pytest.mark.parametrize("clause", CLAUSES)
def test_every_clause_travels(clause):
    assert read_payload(payload(Refusal("a", clause)), Refusal).reason == clause


def changed(name, tensor):
    return {**update().tensors, name: tensor}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (update(base=OTHER), "encoder is another"),
        (update(round=1), "round 1, not 2"),
        (update(tensors={"gate": torch.tensor(1.0)}), "lacks head.bias"),
        (update(tensors=changed("spy", torch.ones(1))), "holds 1 that nobody asked for"),
        (update(tensors=changed("head.bias", torch.ones(2))), r"head.bias is float32 \[2\], not float32 \[3\]"),
        (update(tensors=changed("head.bias", torch.ones(3).double())), "head.bias is float64"),
        (update(tensors=changed("gate", torch.ones(1))), r"gate is float32 \[1\], not float32 \[\]"),
        (update(tensors=changed("head.bias", torch.tensor([0, math.nan, 0]))), "head.bias is not finite"),
        (update(tensors=changed("gate", torch.tensor(-math.inf))), "gate is not finite"),
        (update(tensors=changed("gate", torch.tensor(1e30))), "gate is not finite, or beyond 1e[+]15"),
        (update(examples=0), "learnt from 0 images"),
        (update(examples=10**30), "learnt from 1000000"),
        (update(loss=math.nan), "loss is not finite"),
    ],
)
def test_an_update_that_must_not_be_averaged_is_told_why(bad, reason):
    assert fault_of(update(), order()) == ""
    assert re.search(reason, fault_of(read_payload(payload(bad), Update), order()))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (facts(base=OTHER), "encoder is another"),
        (facts(start=BASE), "adapter starts otherwise"),
        (facts(examples=0), "has 0 training images"),
        (facts(counts=torch.tensor([30, 10, 1])), "counts is int64 [3], not int64 [2]"),
        (facts(counts=torch.tensor([30.0, 10.0])), "counts is float32"),
        (facts(counts=torch.tensor([41, -1])), "counts is not finite, or negative"),
        (facts(counts=torch.tensor([41, 0])), "more than its 40 images"),
        (facts(mean=torch.zeros(6)), "mean is float32"),
        (facts(mean=torch.full((6,), math.nan, dtype=torch.float64)), "mean is not finite"),
        (facts(m2=torch.full((6,), -1.0, dtype=torch.float64)), "m2 is not finite, or negative"),
        (facts(m2=torch.full((6,), 1e200, dtype=torch.float64)), "m2 is not finite"),
    ],
)
def test_facts_that_cannot_be_pooled_are_told_why(bad, reason):
    assert fault_of_facts(facts(), BASE, OTHER, 2, 6) == ""
    assert reason in fault_of_facts(bad, BASE, OTHER, 2, 6)


def test_the_digest_sees_values_names_shapes_and_types():
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(2)}
    others = [
        {**tensors, "b": torch.tensor([0.0, -0.0])},
        {"a": tensors["a"], "c": tensors["b"]},
        {**tensors, "a": torch.ones(3, 2)},
        {**tensors, "b": torch.zeros(2, dtype=torch.int32)},
    ]
    assert digest_of(dict(reversed(tensors.items()))) == digest_of(tensors)
    assert len({digest_of(each) for each in [tensors, *others]}) == 5
