"""The server against what one computation over all images gives; sites are a few lines of linear regression."""

import hashlib
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from miram.engine.errors import RunFailed, UserError
from miram.finetune.federate.averaging import pairs
from miram.finetune.federate.exchange import DATA, Facts, Refusal, Update, payload
from miram.finetune.federate.server import STATE, Federation, Terms, said_at_opening

BASE, START = "ab" * 32, "cd" * 32
TERMS = Terms(BASE, START, classes=2, width=5)
SIZES = {"north": 11, "south": 40, "west": 7}


class Party:
    """Features X (n, 5), targets y; `steps` full-batch steps of SGD on the mean squared error a round."""

    def __init__(self, name: str, steps: int = 1, rate: float = 0.05):
        generator = torch.Generator().manual_seed(len(name) + SIZES[name])
        self.name, self.steps, self.rate = name, steps, rate
        self.X = 3 + torch.randn(SIZES[name], 5, generator=generator, dtype=torch.float64)
        self.y = torch.randn(SIZES[name], generator=generator, dtype=torch.float64)
        self.X[:, 4] = 7.0

    def facts(self) -> Facts:
        n, mean = len(self.X), self.X.mean(0)
        counts = torch.tensor([n - 3, 3])
        return Facts(self.name, BASE, START, n, counts, mean, ((self.X - mean) ** 2).sum(0))

    def train(self, order) -> Update:
        w = order.tensors["head.weight"].clone()
        for _ in range(self.steps):
            gradient = descent(self.X, self.y, w) + order.mu * (w - order.tensors["head.weight"])
            w -= self.rate * gradient
        loss = float((self.X @ w - self.y).square().mean())
        return Update(self.name, BASE, order.round, {"head.weight": w}, len(self.X), loss)


def descent(X, y, w):
    return 2 * X.mT @ (X @ w - y) / len(X)


def parties(**options) -> list[Party]:
    return [Party(name, **options) for name in SIZES]


def begun(terms: Terms = TERMS, who=None) -> Federation:
    federation = Federation(terms, {"head.weight": torch.zeros(5, dtype=torch.float64)})
    federation.open([party.facts() for party in who or parties()])
    return federation


def answers(federation, who=None) -> list[Update]:
    order = federation.order()
    return [party.train(order) for party in who or parties()]


# ---------------------------------------------------------------------------------------------- against one computation


def test_rounds_of_one_step_are_one_training_on_all_images():
    federation, all_of = begun(), parties()
    X, y = torch.cat([party.X for party in all_of]), torch.cat([party.y for party in all_of])
    w = torch.zeros(5, dtype=torch.float64)
    for _ in range(30):
        federation.close(answers(federation, [Party(name, rate=0.003) for name in SIZES]))
        w -= 0.003 * descent(X, y, w)
    torch.testing.assert_close(federation.tensors["head.weight"], w, atol=1e-12, rtol=0)
    assert w.norm() > 0.02


def test_sites_count_by_their_images_or_alike():
    for weighting, weights in [("examples", np.array([11, 40, 7]) / 58), ("equal", np.full(3, 1 / 3))]:
        federation = begun(replace(TERMS, weighting=weighting))
        updates = answers(federation)
        record = federation.close(updates)
        wanted = sum(weight * update.tensors["head.weight"] for weight, update in zip(weights, updates, strict=True))
        torch.testing.assert_close(federation.tensors["head.weight"], wanted, atol=1e-15, rtol=1e-15)
        assert record.loss == pytest.approx(sum(w * u.loss for w, u in zip(weights, updates, strict=True)))


def test_the_statistics_are_those_of_all_features_together():
    federation = begun()
    X = torch.cat([party.X for party in parties()]).numpy()
    np.testing.assert_allclose(federation.fixed["head.mean"], X.mean(0), rtol=1e-14)
    np.testing.assert_allclose(federation.fixed["head.deviation"][:4], X[:, :4].std(0), rtol=1e-13)
    assert federation.fixed["head.deviation"][4] == 1  # a feature that does not vary is not divided by
    assert federation.fixed.keys() == {"head.mean", "head.deviation"}


def test_statistics_far_from_zero_do_not_cancel():
    generator = torch.Generator().manual_seed(0)
    X = 1e7 + torch.randn(900, 5, generator=generator, dtype=torch.float64)
    facts = []
    for number, part in enumerate(X.split([1, 99, 800])):
        mean = part.mean(0)
        counts = torch.tensor([len(part), 0])
        facts.append(Facts(f"s{number}", BASE, START, len(part), counts, mean, ((part - mean) ** 2).sum(0)))
    federation = Federation(TERMS, {})
    federation.open(facts)
    np.testing.assert_allclose(federation.fixed["head.deviation"], X.numpy().std(0), rtol=1e-9)


def test_classes_are_weighed_by_the_counts_of_all_sites():
    seen = []

    def weigh(counts, n):
        seen.append((counts.tolist(), n))
        return torch.tensor([1.0, 4.0])

    federation = Federation(TERMS, {}, weigh)
    federation.open([party.facts() for party in parties()])
    assert seen == [([58 - 9, 9], 58)]
    assert federation.order().fixed["class_weights"].tolist() == [1, 4]


def test_the_order_of_arrival_changes_no_bit():
    results = set()
    for names in itertools.permutations(SIZES):
        who = [Party(name) for name in names]
        federation = begun(who=who)
        for _ in range(3):
            federation.close(answers(federation, who))
        results.add(payload(federation.order()))
    assert len(results) == 1


def test_prox_pulls_sites_back_to_where_the_round_began():
    moved = []
    for mu in (0.0, 1.0, 100.0):
        federation = begun(replace(TERMS, mu=mu))
        assert federation.order().mu == mu
        moved.append(federation.close(answers(federation, parties(steps=50, rate=0.003))).moved)
    assert moved[0] > moved[1] > moved[2] > 0


def test_a_residual_keeps_the_average_of_products_exact_over_rounds():
    A, B = "blocks.0.attn.qkv.lora.A.q", "blocks.0.attn.qkv.lora.B.q"
    federation = Federation(replace(TERMS, mode="residual"), {A: torch.randn(2, 9), B: torch.zeros(8, 2)})
    federation.open([party.facts() for party in parties()])
    product = torch.zeros(8, 9, dtype=torch.float64)  # what the sites' mean would be, kept dense
    for _ in range(3):
        order = federation.order()
        carried = sum(b.double() @ a.double() for a, b in federation.residual.values()) + torch.zeros(8, 9)
        updates = []
        for name, n in SIZES.items():
            tensors = {key: tensor + 0.3 * torch.randn_like(tensor) for key, tensor in order.tensors.items()}
            updates.append(Update(name, BASE, order.round, tensors, n, 0.0))
        product = sum(u.examples / 58 * (carried + u.tensors[B].double() @ u.tensors[A].double()) for u in updates)
        federation.close(updates)
        now = sum(b.double() @ a.double() for a, b in federation.residual.values())
        now = now + federation.tensors[B].double() @ federation.tensors[A].double()
        torch.testing.assert_close(now, product, atol=1e-6, rtol=0)
    assert pairs(federation.tensors).keys() == federation.residual.keys()
    assert {name for name in federation.order().fixed if "residual" in name} == {
        "residual.blocks.0.attn.qkv.lora.q.A",
        "residual.blocks.0.attn.qkv.lora.q.B",
    }


# ---------------------------------------------------------------------------------------------- who is not sound


def spoilt(update: Update, how: str) -> list:
    poison = update.tensors["head.weight"].clone()
    poison[2] = math.nan
    return {
        "NaN": [replace(update, tensors={"head.weight": poison})],
        "a wrong shape": [replace(update, tensors={"head.weight": poison[:4]})],
        "another base": [replace(update, base="ff" * 32)],
        "an old round": [replace(update, round=0)],
        "more images than it had": [replace(update, examples=10_000)],
        "two answers": [update, update],
        "a refusal": [Refusal(update.site, DATA)],
        "silence": [],
    }[how]


REASONS = {
    "NaN": "head.weight is not finite",
    "a wrong shape": "head.weight is float64 [4]",
    "another base": "encoder is another",
    "an old round": "answers round 0, not 1",
    "more images than it had": "had 40 images at the start and now 10000",
    "two answers": "2 answers came under its name",
    "a refusal": DATA,
    "silence": "no answer came",
}


@pytest.mark.parametrize("how", REASONS)
def test_a_site_whose_update_is_not_sound_is_named_and_the_round_is_that_of_the_others(how):
    federation, without = begun(), begun(who=[Party("north"), Party("west")])
    north, south, west = answers(federation)
    record = federation.close([north, *spoilt(south, how), west])
    assert record.sites == ["north", "west"]
    assert REASONS[how] in record.refused["south"]
    without.close([north, west])
    assert torch.equal(federation.tensors["head.weight"], without.tensors["head.weight"])
    assert federation.close(answers(federation)).sites == ["north", "south", "west"]  # it may come back


def test_a_site_that_was_not_there_at_the_start_does_not_count():
    federation = begun(who=[Party("north")])
    record = federation.close(answers(federation))
    assert record.sites == ["north"]
    assert record.refused == dict.fromkeys(["south", "west"], "it was not there at the start")


def test_a_round_without_a_sound_update_fails_and_leaves_everything_as_it_was():
    federation = begun()
    before, records = payload(federation.order()), list(federation.records)
    updates = [replace(update, base="ff" * 32) for update in answers(federation)]
    with pytest.raises(RunFailed, match=r"round 1.*north: its encoder is another; south"):
        federation.close(updates)
    with pytest.raises(RunFailed, match="no answer came"):
        federation.close([])
    assert (payload(federation.order()), federation.records) == (before, records)


def test_a_federation_opens_with_those_that_fit_and_not_without_any():
    north, south, _ = (party.facts() for party in parties())
    federation = Federation(TERMS, {})
    record = federation.open([replace(north, base="ff" * 32), south, Refusal("west", DATA)])
    assert record.refused == {"north": "its encoder is another", "west": DATA}
    assert federation.sites == {"south": 40}
    assert torch.equal(federation.fixed["head.mean"], south.mean)
    with pytest.raises(RunFailed, match=r"cannot begin.*north: its adapter starts otherwise"):
        Federation(TERMS, {}).open([replace(north, start=BASE)])
    with pytest.raises(RunFailed, match="none answered"):
        Federation(TERMS, {}).open([])


# ---------------------------------------------------------------------------------------------- what is kept


def test_a_record_counts_what_travels_and_how_far_the_model_went():
    federation = begun()
    order, updates = federation.order(), answers(federation)
    record = federation.close(updates)
    assert (record.round, record.examples, federation.closed) == (1, 58, 1)
    assert record.bytes_up == sum(len(payload(update)) for update in updates)
    assert record.bytes_down == 3 * len(payload(order))
    assert record.moved == pytest.approx(float(federation.tensors["head.weight"].norm()))
    assert federation.records[0].bytes_up == sum(len(payload(party.facts())) for party in parties())


@pytest.mark.parametrize("stop", range(4))
def test_a_stopped_federation_goes_on_as_if_it_had_not_been(stop, tmp_path):
    whole, part = begun(), begun()
    for _ in range(4):
        whole.close(answers(whole))
    for _ in range(stop):
        part.close(answers(part))
    part.save(tmp_path)
    part.close(answers(part))  # a round that is lost
    again = Federation(TERMS, {"head.weight": torch.zeros(5, dtype=torch.float64)})
    assert again.load(tmp_path)
    assert (again.closed, again.sites) == (stop, SIZES)
    assert again.said == {p.name: hashlib.sha256(payload(p.facts())).hexdigest() for p in parties()}
    while again.closed < 4:
        again.close(answers(again))
    assert payload(again.order()) == payload(whole.order())
    assert again.records == whole.records


def test_there_may_be_nothing_to_go_on_from(tmp_path):
    assert not Federation(TERMS, {}).load(tmp_path)
    assert said_at_opening(tmp_path) == {}


def test_the_residual_is_kept_too(tmp_path):
    names = ("a.lora.A.q", "a.lora.B.q")
    start = {names[0]: torch.randn(2, 4), names[1]: torch.randn(3, 2)}
    federation = Federation(replace(TERMS, mode="residual"), start)
    federation.open([party.facts() for party in parties()])
    tensors = [{name: tensor + torch.randn_like(tensor) for name, tensor in start.items()} for _ in SIZES]
    updates = [Update(s, BASE, 1, t, n, 0.0) for (s, n), t in zip(SIZES.items(), tensors, strict=True)]
    federation.close(updates)
    federation.save(tmp_path)
    again = Federation(federation.terms, start)
    again.load(tmp_path)
    assert payload(again.order()) == payload(federation.order())
    assert again.residual.keys() == {"a.lora.q"}


@pytest.mark.parametrize("harm", ["cut", "flipped", "text", "other terms", "other tensors"])
def test_a_state_that_is_damaged_or_of_another_federation_is_refused(harm, tmp_path):
    federation = begun()
    federation.save(tmp_path)
    path, terms, tensors = tmp_path / STATE, TERMS, dict(federation.tensors)
    content = bytearray(path.read_bytes())
    if harm == "cut":
        path.write_bytes(content[:-9])
    elif harm == "flipped":
        content[-3] ^= 1
        path.write_bytes(content)
    elif harm == "text":
        path.write_text("{}")
    elif harm == "other terms":
        terms = replace(TERMS, mu=0.5)
    else:
        tensors["head.bias"] = torch.zeros(1)
    said = {"other terms": "another mu;", "other tensors": "something else that learns"}.get(harm, "is damaged")
    with pytest.raises(UserError, match=said):
        Federation(terms, tensors).load(tmp_path)
