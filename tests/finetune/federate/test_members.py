"""Real sites: from SITE.yaml, the plan and an order to an answer; and Flower with them is one process without it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from safetensors.numpy import load_file

pytest.importorskip("flwr")

from benches import encoder
from flwr.supercore.task_identity import TaskIdentity
from loopback import Wire, run_on_loopback

from miram.data.phantom import PhantomSettings
from miram.data.shards import ShardDataset
from miram.data.sources.phantom import make_phantoms
from miram.engine.config import dump_yaml
from miram.engine.errors import RunFailed, UserError
from miram.engine.files import read_json
from miram.engine.run import RESULT, open_run
from miram.finetune.classify.locked import read_locked
from miram.finetune.classify.targets import Target
from miram.finetune.federate import coordinator, flower
from miram.finetune.federate.config import FederateConfig
from miram.finetune.federate.exchange import Facts, Order, Refusal, Tensors, Update
from miram.finetune.federate.flower_wire import Nodes
from miram.finetune.federate.member import Member, read_site, refuse_other_task
from miram.finetune.federate.plan import Plan, make_plan, read_plan
from miram.finetune.federate.rounds import Together, hold
from miram.finetune.federate.server import STATE, Federation, said_at_opening
from miram.finetune.federate.start import started, values
from miram.finetune.federate.trial import Trial
from miram.pretrain.encoder import EncoderCard, save_encoder
from miram.pretrain.weights.loading import read_encoder

ROUNDS = 2


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDER/north and south: shards of other patients; FOLDER/encoder; north.yaml and south.yaml."""
    folder = tmp_path_factory.mktemp("hospitals")
    vit = encoder()
    kwargs = {"in_chans": 1, "num_classes": 0, "img_size": [64, 32], "depth": 2, "embed_dim": 48, "num_heads": 4}
    (folder / "encoder").mkdir()
    save_encoder(folder / "encoder", vit, EncoderCard(architecture="vit_tiny_patch16_224", kwargs=kwargs))
    for seed, name in enumerate(("north", "south"), 1):
        make_phantoms(folder / name, 10 + seed, PhantomSettings(size=96, seed=seed), workers=1)
        site(folder, name)
    return folder


def site(folder: Path, which: str, **changes: Any) -> str:
    """A site's YAML file."""
    tree = {
        "name": which,
        "encoder": str(folder / "encoder"),
        "data": {"shards": str(folder / which), "split": None, "workers": 0},
        "out": str(folder / f"{which}-run"),
    }
    path = folder / f"{which}{'-'.join(changes)}.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return str(path)


def settings(folder: Path, **options: Any) -> FederateConfig:
    """The coordinator's: it has the encoder, and no images."""
    tree = {
        "data": {"shards": "none", "task": "mass"},
        "finetune": {
            "encoder": str(folder / "encoder"), "method": "lora_qkv", "classes": ["0", "1"], "replicates": 50
        },
        "train": {"steps": 2, "batch_size": 8, "precision": "fp32", "betas": [0.9, 0.999]},
        "federate": {"sites": 2, "rounds": ROUNDS, "lr": 1e-3},
    }  # fmt: skip
    for section, changes in options.items():
        tree[section] |= changes
    return FederateConfig.model_validate_json(json.dumps(tree))


@pytest.fixture(scope="module")
def plan(hospitals: Path) -> str:
    return make_plan(settings(hospitals), read_encoder(str(hospitals / "encoder"))[0])


@pytest.fixture
def wired(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Nodes]:
    """Nodes for these YAML files, without Flower's processes."""
    monkeypatch.setattr("miram.finetune.federate.flower_wire.PAUSE", 0.001)
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)

    def make(plan: str, *places: str) -> Nodes:
        wire = Wire(dict(enumerate(places, 1)), plan, read_site)
        return Nodes(wire, len(places), 5.0, 600.0)  # type: ignore[arg-type]

    return make


def here(folder: Path, plan: str, *places: str) -> Federation:
    """The federation of sites that are all in this process."""
    members = [read_site(place, plan) for place in places]
    agreed = read_plan(plan)
    federation = Federation(agreed.terms, values(members[0].site.tuned()), agreed.target.target.weights_of)
    hold(federation, Together(members), ROUNDS, folder, lambda _: None)
    return federation


def without_runs(folder: Path, run: str, *names: str) -> list[str]:
    """YAML files of the same sites with run folders of their own."""
    return [site(folder, name, out=str(folder / f"{name}-{run}")) for name in names]


# ---------------------------------------------------------------------------------------------- the same as one process


def test_two_flower_clients_end_in_the_bits_of_two_sites_in_one_process(
    hospitals: Path, plan: str, wired: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(coordinator.FOLDER, str(tmp_path / "server"))
    nodes = wired(plan, *without_runs(hospitals, "flower", "north", "south"))
    coordinator.serve(plan, nodes)
    here(tmp_path / "here", plan, *without_runs(hospitals, "alone", "north", "south"))
    assert (tmp_path / "server" / STATE).read_bytes() == (tmp_path / "here" / STATE).read_bytes()
    check_server(tmp_path / "server", hospitals)
    check_sites(hospitals, "flower")
    travelled = nodes.grid.bytes
    for name in ("north", "south"):
        rows = ShardDataset(hospitals / name).rows
        words = {str(value) for column in ("key", "patient") for value in rows.column(column)}
        assert not [word for word in {*words, str(hospitals)} if word.encode() in travelled]


def check_server(folder: Path, hospitals: Path) -> None:
    """Every site's figure is in the server's result, and no place or patient."""
    result = json.loads((folder / "result.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["north", "south"]
    for row in result["rows"]:
        own = json.loads((hospitals / f"{row['name']}-flower" / "result.json").read_text())
        assert row["value"] == own["value"]
    assert result["value"] == pytest.approx(np.mean([row["value"] for row in result["rows"]]))
    assert json.loads((folder / "state.json").read_text())["status"] == "finished"
    assert str(hospitals) not in "".join(path.read_text() for path in folder.glob("*.json"))


def check_sites(hospitals: Path, run: str) -> None:
    """Each has the model, and it says what the federation's last order says."""
    adapters = {name: hospitals / f"{name}-{run}" / "model" / "adapter" for name in ("north", "south")}
    one, other = ((folder / "adapter.safetensors").read_bytes() for folder in adapters.values())
    assert one == other
    for name in adapters:
        shards = ShardDataset(hospitals / name)
        locked = read_locked(hospitals / f"{name}-{run}")
        assert np.isfinite(locked.probabilities(shards, np.arange(4))).all()


@pytest.mark.slow
def test_flowers_own_programs_end_in_the_bits_of_one_process(hospitals: Path, tmp_path: Path) -> None:
    config = settings(hospitals)
    flower.write_app(tmp_path / "app", made := make_plan(config, read_encoder(str(hospitals / "encoder"))[0]), 2)
    places = without_runs(hospitals, "flower", "north", "south")
    run_on_loopback(tmp_path, dict(zip(("north", "south"), places, strict=True)))
    server = tmp_path / "link" / "federation"
    here(tmp_path / "here", made, *without_runs(hospitals, "alone", "north", "south"))
    assert (server / STATE).read_bytes() == (tmp_path / "here" / STATE).read_bytes()
    check_server(server, hospitals)
    check_sites(hospitals, "flower")
    assert str(hospitals) not in (tmp_path / "link.log").read_text()


# ---------------------------------------------------------------------------------------------- begun again


class Said(Nodes):
    """Nodes that a test tells what sites answer, without a wire."""

    def __init__(self, facts: list[Facts], answers: dict[str, Tensors]):
        super().__init__(None, len(facts), 0.0, 0.0)  # type: ignore[arg-type]
        self.told, self.starts = facts, answers

    def facts(self) -> list[Facts | Refusal]:
        return [*self.told]

    def updates(self, order: Order, sites: Collection[str]) -> list[Update | Refusal]:
        return [Update(site, order.base, order.round, self.starts[site], 9, 0.0) for site in sites]


def facts_for(plan: Plan, site: str) -> Facts:
    return Facts(site, plan.base, plan.start, 9, torch.tensor([5, 4]), torch.zeros(48), torch.ones(48))


FORGED: dict[str, Callable[[Tensors], Tensors]] = {
    "other values": lambda start: start | {"head.bias": start["head.bias"] + 1e-3},
    "another name": lambda start: start | {"extra": torch.zeros(1)},
    "another type": lambda start: start | {"head.bias": start["head.bias"].double()},
    "a type without finite numbers": lambda start: start | {"head.bias": torch.zeros(2).to(torch.float8_e4m3fnuz)},
    "nothing": lambda start: {},
}


@pytest.mark.parametrize("how", FORGED)
def test_the_start_is_only_believed_of_a_site_that_says_what_the_plan_expects(
    hospitals: Path, plan: str, how: str
) -> None:
    agreed = read_plan(plan)
    vit, settled = read_encoder(str(hospitals / "encoder"))[0], settings(hospitals)
    start = values(started(vit, settled.finetune, agreed.target.target, settled.federate.average, settled.seed))
    forged = FORGED[how](start)
    facts = [facts_for(agreed, site) for site in ("east", "west")]
    found = coordinator.start_of(agreed, Said(facts, {"east": forged, "west": start}))
    assert found.keys() == start.keys()
    assert all(torch.equal(found[name], start[name]) for name in start)
    with pytest.raises(RunFailed, match="none of 2 sites"):
        coordinator.start_of(agreed, Said(facts, {"east": forged, "west": forged}))


def test_a_site_judges_again_where_the_last_order_is_another(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = make_plan(settings(hospitals, federate={"compare": []}), read_encoder(str(hospitals / "encoder"))[0])
    member = read_site(site(hospitals, "north", out=str(tmp_path / "run")), text)
    agreed = read_plan(text)
    federation = Federation(agreed.terms, values(member.site.tuned()), agreed.target.target.weights_of)
    federation.open([member.facts()])
    one = federation.order()
    other = replace(one, round=2, tensors={n: tensor + 0.1 * (n == "head.bias") for n, tensor in one.tensors.items()})
    heads = [judged_head(member, order) for order in (one, other)]
    np.testing.assert_allclose(heads[1] - heads[0], 0.1, atol=1e-6)
    monkeypatch.setattr(Trial, "finish", lambda *_: pytest.fail("it is judged already"))
    assert np.array_equal(judged_head(member, other), heads[1])


def judged_head(member: Member, order: Order) -> NDArray[np.float32]:
    """The bias that the kept model ends with."""
    assert member.finish(order).images == read_json(member.trial.run.folder / "result.json", RESULT)["n_images"]
    tensors = load_file(member.trial.run.folder / "model" / "adapter" / "head.safetensors")
    return tensors["bias"]


def test_after_a_restart_another_one_with_other_data_does_not_speak_for_a_site(
    hospitals: Path, plan: str, wired: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    agreed = read_plan(plan)
    monkeypatch.setenv(coordinator.FOLDER, str(tmp_path))
    open_run(agreed, str(tmp_path), "federate")
    (north,) = without_runs(hospitals, "restart", "north")
    member = read_site(north, plan)
    federation = Federation(agreed.terms, values(member.site.tuned()))
    federation.open([member.facts()])
    federation.save(tmp_path)
    thief = site(hospitals, "south", name="north", out=str(tmp_path / "thief"))
    with pytest.raises(RunFailed, match="the data it began with"):
        coordinator.serve(plan, wired(plan, thief))
    assert "node 1 says it is north, with other data; it is not asked" in capsys.readouterr().out
    nodes = wired(plan, north, thief)
    nodes.said = said_at_opening(tmp_path)
    coordinator.start_of(agreed, nodes)
    assert nodes.sites == {1: "north"}


# ---------------------------------------------------------------------------------------------- the plan


def test_a_plan_holds_nothing_of_the_coordinators_machine(hospitals: Path, plan: str, tmp_path: Path) -> None:
    assert str(hospitals) not in plan
    assert "encoder" not in read_plan(plan).finetune
    flower.write_app(tmp_path / "app", plan, 2)
    assert dump_yaml(read_plan(plan)) == plan


def test_order_zero_is_answered_by_what_learns_as_it_starts(hospitals: Path, plan: str) -> None:
    members = [read_site(place, plan) for place in without_runs(hospitals, "zero", "north", "south")]
    order = Order(0, read_plan(plan).base, {}, {}, 0.0)
    one, other = (member.train(order).tensors for member in members)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert members[0].facts().start == members[1].facts().start == read_plan(plan).start


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"task": None}}, "data.task is not set"),
        ({"finetune": {"classes": None}}, "finetune.classes is not set"),
        ({"federate": {"base": "0" * 64}}, "federate.base is 0000"),
        ({"finetune": {"classes": ["0"]}}, "finetune.classes names 1; there is nothing to tell apart, name 2 or more"),
        ({"finetune": {"classes": []}}, "finetune.classes names 0"),
        ({"finetune": {"classes": [], "kind": "multilabel"}}, "finetune.classes names 0; .* name 1 or more"),
        ({"finetune": {"classes": ["0", "1", "0"]}}, "'0' is given twice"),
        ({"finetune": {"classes": {"no": ["0"], "yes": ["1", "0"]}}}, "'0' is given twice"),
        ({"finetune": {"classes": ["0", "1", "2"], "kind": "binary"}}, "finetune.kind=binary, but .* has 3 classes"),
        (
            {"data": {"task": "mass,calc"}, "finetune": {"classes": ["mass", "calc"], "kind": "ordinal"}},
            "several columns are a multilabel task, not finetune.kind=ordinal",
        ),
    ],
)
def test_what_sites_could_not_know_is_asked_of_the_coordinator(
    hospitals: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        make_plan(settings(hospitals, **changes), read_encoder(str(hospitals / "encoder"))[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "North"}, "name"),
        ({"encoder": "/nowhere"}, "there is no encoder"),
        ({"data": {"shards": "/nowhere"}}, "/nowhere"),
        ({"lr": 1.0}, "lr is not a known key"),
        ({"data": {"shards": "/nowhere", "task": "density"}}, "data.task is density here, and mass in the plan"),
    ],
)
def test_what_is_wrong_at_a_site_is_said_there(hospitals: Path, plan: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_site(site(hospitals, "north", **changes), plan)


@pytest.mark.parametrize(
    ("here", "said"),
    [
        (Target("density", "binary", ("0", "1")), "density, binary, of 0, 1, and the plan's is mass, binary, of 0, 1"),
        (Target("mass", "multilabel", ("0", "1")), "mass, multilabel, of 0, 1"),
        (Target("mass", "binary", ("1", "0")), "mass, binary, of 1, 0"),
    ],
)
def test_a_site_whose_labels_make_another_task_is_refused(plan: str, here: Target, said: str) -> None:
    refuse_other_task(read_plan(plan), Target("mass", "binary", ("0", "1")))
    with pytest.raises(UserError, match=said):
        refuse_other_task(read_plan(plan), here)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"average": "by heart"}, "federate.average"), ({"rounds": "ten"}, "federate.rounds"), ({"most": 1}, "most")],
)
def test_a_plan_that_says_how_to_average_in_other_words_is_refused(
    plan: str, changes: dict[str, Any], said: str
) -> None:
    tree = yaml.safe_load(plan)
    with pytest.raises(UserError, match=said):
        read_plan(yaml.safe_dump(tree | {"federate": tree["federate"] | changes}))


def test_a_plan_without_a_key_is_read_with_its_default_by_everybody(plan: str) -> None:
    tree = yaml.safe_load(plan)
    del tree["federate"]["weighting"], tree["federate"]["mu"]
    assert read_plan(yaml.safe_dump(tree)).terms == read_plan(plan).terms
