"""A site's part: what it sends, what a round does to it, and what must be equal to one computation on all images."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benches import bench, images
from torch import nn

from miram.engine.errors import UserError
from miram.finetune.federate.averaging import pairs
from miram.finetune.federate.config import FederateSection
from miram.finetune.federate.exchange import Order, Update, payload
from miram.finetune.federate.rounds import Together, hold
from miram.finetune.federate.server import Federation, Terms
from miram.finetune.federate.site import Site
from miram.finetune.federate.start import start_digest, values
from miram.finetune.peft.base import learnt

SGD = {"optimizer": "sgd", "weight_decay": 0.0, "steps": 1, "batch_size": 4096, "schedule": "constant"}


def party(
    shards: Path, out: Path, which: slice, name: str, train: dict[str, Any] | None = None, **options: Any
) -> Site:
    """A site with some of the training images of the phantoms, whole patients of them."""
    section = FederateSection.model_validate({"rounds": 2, "lr": 0.1} | options.pop("federate", {}))
    options = {"method": "lora_qkv", "start": "zero", "classes": ("0", "1")} | options
    made = bench(shards, out, train or SGD, **options)
    fit = images(made, "train")
    patients = np.unique(made.labelled.patients[fit])[which]
    return Site(name, made, section, fit[np.isin(made.labelled.patients[fit], patients)], out / name)


def federation(site: Site) -> Federation:
    """Of sites like this one."""
    start, target, section = site.tuned(), site.bench.labelled.target, site.section
    terms = Terms(site.base, start_digest(start), len(target.classes), start.shape.D, section.average, section.mu)
    return Federation(terms, values(start), target.weights_of)


def held(sites: list[Site], place: Path, rounds: int = 1) -> Federation:
    """After some rounds."""
    server = federation(sites[0])
    hold(server, Together(sites), rounds, place, lambda _: None)
    return server


# ---------------------------------------------------------------------------------------------- what must be equal


@pytest.mark.parametrize("method", ["lora_qkv", "vpt_shallow", "linear"])
def test_one_step_of_gradient_descent_at_two_sites_is_one_step_on_all_images(
    phantoms: Path, tmp_path: Path, method: str
) -> None:
    some, rest = (
        party(phantoms, tmp_path / "two", part, name, method=method)
        for part, name in ((slice(0, 2), "a"), (slice(2, None), "b"))
    )
    everybody = party(phantoms, tmp_path / "one", slice(None), "all", method=method)
    assert len(some.images) != len(rest.images)  # or weights would not show
    two, one = held([some, rest], tmp_path / "x"), held([everybody], tmp_path / "y")
    start = values(everybody.tuned())
    assert any(not torch.equal(one.tensors[name], start[name]) for name in start)
    for name in start:
        moved = one.tensors[name] - start[name]
        torch.testing.assert_close(
            two.tensors[name] - start[name], moved, rtol=1e-4, atol=1e-6 * float(moved.abs().max()) + 1e-9
        )


def test_the_pooled_statistics_are_those_of_all_images(phantoms: Path, tmp_path: Path) -> None:
    some, rest = (party(phantoms, tmp_path, part, name) for part, name in ((slice(0, 2), "a"), (slice(2, None), "b")))
    server = federation(some)
    server.open([some.facts(), rest.facts()])
    x = np.concatenate([some.seen, rest.seen])
    np.testing.assert_allclose(server.fixed["head.mean"], x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(server.fixed["head.deviation"], x.std(0), rtol=1e-9)
    truth = some.bench.labelled.truth[np.concatenate([some.images, rest.images])]
    torch.testing.assert_close(server.fixed["class_weights"], some.bench.labelled.target.class_weights(truth))


@pytest.mark.parametrize("average", ["freeze_a", "residual"])
@pytest.mark.parametrize("method", ["lora_qkv", "lora"])
def test_the_model_after_a_round_has_the_mean_of_what_sites_changed_in_the_weights(
    phantoms: Path, tmp_path: Path, method: str, average: str
) -> None:
    options = {"method": method, "federate": {"average": average}, "train": {"steps": 3, "batch_size": 8}}
    sites = [
        party(phantoms, tmp_path, part, name, **deepcopy(options))
        for part, name in ((slice(0, 2), "a"), (slice(2, None), "b"))
    ]
    updates: list[Update] = []
    for site in sites:
        own, train = site, site.train
        object.__setattr__(own, "train", lambda order, train=train: updates.append(train(order)) or updates[-1])
    server = held(sites, tmp_path / "x")
    order = server.order()
    base = deepcopy(sites[0].bench.encoder).state_dict()

    def merged(tensors: dict[str, torch.Tensor], order: Order) -> dict[str, torch.Tensor]:
        tuned = sites[0].final(replace(order, tensors=tensors))
        return tuned.merged().state_dict()

    plain = {name: tensor for name, tensor in order.fixed.items() if not name.startswith("residual")}
    alone = [merged(update.tensors, replace(order, fixed=plain)) for update in updates]
    n = [update.examples for update in updates]
    found = merged(order.tensors, order)
    changed = 0.0
    for name, weight in base.items():
        mean = sum(k * (one[name].double() - weight.double()) for k, one in zip(n, alone, strict=True)) / sum(n)
        torch.testing.assert_close(found[name].double() - weight.double(), mean, rtol=0, atol=1e-6)
        changed += float(mean.abs().sum())
    assert changed > 1e-3
    assert (average == "residual") == any(name.startswith("residual") for name in order.fixed)


def test_the_pull_of_fedprox_is_the_gradient_of_its_formula(phantoms: Path, tmp_path: Path) -> None:
    train = SGD | {"steps": 2}
    free, held_back = (
        party(phantoms, tmp_path / str(mu), slice(None), "a", train, federate={"mu": mu, "lr": 0.05})
        for mu in (0.0, 4.0)
    )
    once = party(phantoms, tmp_path / "once", slice(None), "a", SGD, federate={"lr": 0.05})
    orders = []
    for site in (free, held_back, once):
        server = federation(site)
        server.open([site.facts()])
        orders.append(server.order())
    start = orders[0].tensors
    first = once.train(orders[2]).tensors
    without, pulled = free.train(orders[0]).tensors, held_back.train(orders[1]).tensors
    for name, origin in start.items():  # the first step is at the start, where nothing pulls; the second is pulled back
        expected = without[name] - 0.05 * 4.0 * (first[name] - origin)
        torch.testing.assert_close(pulled[name], expected, rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------------------------------------- who is refused


def test_a_poisoned_site_is_refused_by_name_and_the_round_is_that_of_the_others(phantoms: Path, tmp_path: Path) -> None:
    good, bad = (
        party(phantoms, tmp_path, part, name) for part, name in ((slice(0, 2), "good"), (slice(2, None), "bad"))
    )
    train = bad.train

    def poisoned(order: Order) -> Update:
        update = train(order)
        first = next(iter(update.tensors))
        return replace(update, tensors=update.tensors | {first: update.tensors[first] * float("nan")})

    object.__setattr__(bad, "train", poisoned)
    server = federation(good)
    hold(server, Together([good, bad]), 1, tmp_path / "x", lambda _: None)
    assert server.records[1].sites == ["good"]
    assert list(server.records[1].refused) == ["bad"]
    assert "not finite" in server.records[1].refused["bad"]
    alone = federation(good)
    alone.open([good.facts(), bad.facts()])
    order = alone.order()
    expected = good.train(order).tensors
    assert all(torch.equal(server.tensors[name], expected[name]) for name in expected)


def test_a_site_with_another_encoder_takes_no_part(phantoms: Path, tmp_path: Path) -> None:
    good, other = (party(phantoms, tmp_path, slice(0, 2), "good"), party(phantoms, tmp_path, slice(2, None), "other"))
    nn.init.zeros_(other.bench.encoder.norm.weight)
    server = federation(good)
    hold(server, Together([good, other]), 1, tmp_path / "x", lambda _: None)
    assert server.records[0].refused == {"other": "its encoder is another"}
    assert server.records[1].sites == ["good"]
    with pytest.raises(UserError, match="another encoder"):
        other.train(server.order())


# ---------------------------------------------------------------------------------------------- what travels


def test_nothing_of_images_patients_or_paths_is_in_a_message(phantoms: Path, tmp_path: Path) -> None:
    site = party(
        phantoms, tmp_path / "secret-place", slice(None), "north", {"steps": 2, "batch_size": 8}, start="probe"
    )
    server = federation(site)
    facts = site.facts()
    server.open([facts])
    order = server.order()
    update = site.train(order)
    rows = site.bench.shards.rows
    words = {str(value) for name in ("key", "patient", "exam", "shard") for value in rows.column(name)}
    words |= {"secret-place", str(tmp_path), str(phantoms), str(Path.cwd()), str(Path.home())}
    contents = [payload(message) for message in (facts, order, update)]
    for content in contents:
        assert not [word for word in words if len(word) > 3 and word.encode() in content]
    shapes = dict(learnt(site.tuned()))
    assert {name: tensor.shape for name, tensor in update.tensors.items()} == {n: p.shape for n, p in shapes.items()}
    pixels = 64 * 32
    assert all(tensor.numel() < pixels * len(site.images) for tensor in [facts.mean, facts.m2, facts.counts])
    numbers = facts.mean.numel() + facts.m2.numel() + facts.counts.numel()
    assert len(contents[0]) < 8 * numbers + 1000  # statistics and a header, and no room for anything else


def test_with_frozen_a_only_b_and_the_head_travel(phantoms: Path, tmp_path: Path) -> None:
    site = party(phantoms, tmp_path, slice(None), "a")
    names = set(dict(learnt(site.tuned())))
    every = dict(site.tuned().named_parameters())
    assert pairs(every)
    assert names == {b for _, b in pairs(every).values()} | {"head.weight", "head.bias"}


# ---------------------------------------------------------------------------------------------- stopped


def test_a_federation_that_is_stopped_goes_on_to_the_same_bytes(phantoms: Path, tmp_path: Path) -> None:
    train = {"steps": 2, "batch_size": 8}

    def sites(where: str) -> list[Site]:
        parts = ((slice(0, 2), "a"), (slice(2, None), "b"))
        return [party(phantoms, tmp_path / where, part, name, train) for part, name in parts]

    whole = held(sites("whole"), tmp_path / "x", rounds=2)
    first, second = sites("stopped")
    answer = second.train

    def stopped(order: Order) -> Update:
        if order.round == 2:
            raise KeyboardInterrupt
        return answer(order)

    object.__setattr__(second, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        held([first, second], tmp_path / "y", rounds=2)
    again = held(sites("stopped"), tmp_path / "y", rounds=2)
    assert again.records == whole.records
    assert all(torch.equal(again.tensors[name], whole.tensors[name]) for name in whole.tensors)
    assert (tmp_path / "x" / "federation.safetensors").read_bytes() == (
        tmp_path / "y" / "federation.safetensors"
    ).read_bytes()
