"""What the federation is compared with, and how a round of a site begins: whose images, what rate, which head."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benches import bench, images

from miram.engine.run import Run
from miram.engine.schedule import scaled_lr
from miram.finetune.classify.bench import Bench
from miram.finetune.federate.config import FederateConfig, FederateSection
from miram.finetune.federate.exchange import Order, Tensors
from miram.finetune.federate.parties import divide, sites_of
from miram.finetune.federate.proximal import Proximal
from miram.finetune.federate.site import Site
from miram.finetune.federate.start import values
from miram.finetune.federate.trial import Trial

MADE = {"method": "lora_qkv", "classes": ("0", "1")}


# ---------------------------------------------------------------------------------------------- whose images


@pytest.fixture(scope="module")
def made(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A bench on which nothing is trained here."""
    return bench(phantoms, tmp_path_factory.mktemp("bench"), start="probe", **MADE)


def trial(made: Bench, out: Path, sites: int, **federate: Any) -> Trial:
    """Of so many sites with the official tests."""
    settings = made.settings
    section = FederateSection(sites=sites, **federate)
    config = FederateConfig(
        out=str(out), data=settings.data, finetune=settings.finetune, train=settings.train, federate=section
    )
    return Trial(config, made, divide(made.labelled, made.shards, section, 0), Run(out, "federate"))


def test_a_site_alone_trains_on_its_own_training_images_and_centralised_on_those_of_all(
    made: Bench, tmp_path: Path
) -> None:
    it, labelled = trial(made, tmp_path, 3), made.labelled
    whose = sites_of(labelled, made.shards, it.settings.federate, 0)
    fit = {name: np.flatnonzero((whose == name) & (labelled.splits != "test")).tolist() for name in it.parts}
    assert all(fit.values())
    known = {name: sorted(site.images.tolist()) for name, site in it.others.items()}
    alone = {f"local-{name}": own for name, own in fit.items()}
    assert known == alone | {"centralised": np.flatnonzero(labelled.splits != "test").tolist()}
    tests = set(labelled.patients[labelled.splits == "test"])
    assert tests
    assert not any(tests & set(labelled.patients[site.images]) for site in it.others.values())
    assert {site.name: sorted(site.images.tolist()) for site in it.sites} == fit
    places = [site.place for site in (*it.sites, *it.others.values())]
    assert len(set(places)) == len(places)  # nobody goes on from another's steps


@pytest.mark.parametrize(
    ("sites", "compare", "names"),
    [
        (2, ("local",), ["local-site-1", "local-site-2"]),
        (2, ("centralised",), ["centralised"]),
        (2, (), []),
        (1, ("local", "centralised"), ["local-site-1"]),
    ],
)
def test_only_what_was_asked_for_is_compared(
    made: Bench, tmp_path: Path, sites: int, compare: tuple[str, ...], names: list[str]
) -> None:
    assert list(trial(made, tmp_path, sites, compare=compare).others) == names


# ---------------------------------------------------------------------------------------------- at what rate


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"schedule": "cosine"}, [0.5 * (1 + cos(pi * done / 5)) for done in range(5)]),
        ({"schedule": "cosine", "lr_floor": 0.2}, [0.2 + 0.4 * (1 + cos(pi * done / 5)) for done in range(5)]),
        ({"schedule": "constant", "cooldown": 0.0}, [1, 1, 1, 1, 1]),
        ({"schedule": "constant", "cooldown": 0.6}, [1, 1, 1, 2 / 3, 1 / 3]),
    ],
)
def test_the_rate_falls_from_round_to_round_and_is_one_within_a_round(
    phantoms: Path, tmp_path: Path, train: dict[str, Any], expected: list[float]
) -> None:
    made = bench(phantoms, tmp_path, train | {"warmup_steps": 3}, **MADE)
    site = Site("a", made, FederateSection(rounds=5, lr=0.03), images(made, "train"), tmp_path)
    recipes = [site.recipe(round) for round in range(1, 6)]
    assert [scaled_lr(r.blr, r.batch_size) for r in recipes] == pytest.approx([0.03 * share for share in expected])
    for recipe in recipes:
        assert (recipe.schedule, recipe.cooldown, recipe.warmup_steps, recipe.warmup_epochs) == ("constant", 0, 0, None)


# ---------------------------------------------------------------------------------------------- from where


class Seen(Site):
    """A site whose frozen features are read once for all tests."""

    @cached_property
    def order(self) -> Order:
        """Of a federation that stands somewhere, on statistics that are not this site's."""
        draw = torch.Generator().manual_seed(0)

        def like(tensor: torch.Tensor) -> torch.Tensor:
            return torch.randn(tensor.shape, generator=draw) * 0.05

        start = values(self.tuned())
        x = torch.from_numpy(self.seen)
        deviation = x.std(0, correction=0)
        shifted = {"head.mean": x.mean(0) + 0.3 * deviation, "head.deviation": 1.7 * deviation}
        fixed: Tensors = shifted | {"class_weights": torch.tensor([0.8, 1.2])}
        return Order(1, self.base, {name: like(tensor) for name, tensor in start.items()}, fixed, mu=0.5)


@pytest.fixture(scope="module")
def site(made: Bench, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """With half of the training images."""
    place = tmp_path_factory.mktemp("site")
    patients, fit = made.labelled.patients, images(made, "train")
    mine = fit[np.isin(patients[fit], np.unique(patients[fit])[::2])]
    assert 0 < len(mine) < len(fit)
    return Seen("a", made, FederateSection(rounds=3, lr=0.03), mine, place)


def learning(site: Seen, round: int) -> tuple[Proximal, Tensors]:
    """What learns in a round, and its values before the first step."""
    objective = site.objective(replace(site.order, round=round))
    assert isinstance(objective, Proximal)
    return objective, values(objective.tuned)


def test_the_first_round_begins_with_logistic_regression_on_the_sites_own_features(site: Seen) -> None:
    objective, begun = learning(site, 1)
    probing = site.tuning.probing
    x = torch.from_numpy(probing.features)
    with torch.no_grad():
        expected = probing.start(site.images).plain().double()(x)
        found = objective.tuned.head.double()(x)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for name, tensor in begun.items():
        assert torch.equal(tensor, site.order.tensors[name]) == (not name.startswith("head."))


def test_every_later_round_begins_where_the_federation_stands(site: Seen) -> None:
    for round in (2, 3):
        objective, begun = learning(site, round)
        assert begun.keys() == site.order.tensors.keys()
        assert all(torch.equal(begun[name], tensor) for name, tensor in site.order.tensors.items())
        assert objective.distance().item() == 0


@pytest.mark.parametrize("round", [1, 2])
def test_fedprox_pulls_towards_the_order_and_not_towards_a_head_of_the_sites_own(site: Seen, round: int) -> None:
    objective, begun = learning(site, round)
    gap = {name: begun[name].double() - tensor.double() for name, tensor in site.order.tensors.items()}
    half = sum(float(moved.square().sum()) for moved in gap.values()) / 2
    assert (half > 1e-3) == (round == 1)
    assert objective.distance().item() == pytest.approx(half, rel=1e-5)
    assert objective.loss_weights[-1] == 0.5
    objective.distance().backward()
    for name, tensor in objective.tuned.named_parameters():
        if name in gap:
            torch.testing.assert_close(tensor.grad, gap[name].float(), rtol=1e-4, atol=1e-6)
