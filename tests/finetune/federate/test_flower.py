"""Flower as the carrier: the same bits as without it, nothing of a site in what travels, and no site stops a round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("flwr")

from flower_makers import Fake, federation, held, here, read_site
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.task_identity import TaskIdentity
from loopback import Wire, run_on_loopback

from miram.engine.errors import RunFailed, UserError
from miram.finetune.federate import flower
from miram.finetune.federate.exchange import BASE, DATA, FAILED, Order
from miram.finetune.federate.flower_wire import Nodes, client_app, read_record, record
from miram.finetune.federate.server import STATE

PLAN = "rounds: 2\n"


@pytest.fixture
def wired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Nodes]:
    """Nodes numbered from 1 on for these sites."""
    monkeypatch.setattr("miram.finetune.federate.flower_wire.PAUSE", 0.001)
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)

    def make(*sites: Fake, wait: float = 5.0, patience: float = 5.0) -> Nodes:
        places = {number: write_site(tmp_path, site) for number, site in enumerate(sites, 1)}
        return Nodes(Wire(places, PLAN, read_site), len(sites), wait, patience)  # type: ignore[arg-type]

    return make


def write_site(folder: Path, site: Fake) -> str:
    path = folder / f"{site.name}-{site.seed}-{site.trouble}.yaml"
    path.write_text(yaml.safe_dump(vars(site)))
    return str(path)


# ---------------------------------------------------------------------------------------------- the wire


@pytest.mark.parametrize("trouble", ["", "base", "nan", "shape", "user error", "bug"])
def test_flower_gives_the_bits_that_sites_in_this_process_give(trouble: str, wired: Any, tmp_path: Path) -> None:
    sites = [Fake("north", 1), Fake("south", 7, trouble), Fake("east", 4)]
    made = held(wired(*sites), 3, tmp_path)
    sites[1] = replace(sites[1], trouble=trouble.replace("bug", "user error"))
    assert here(sites, 3, tmp_path / "here") == (tmp_path / STATE).read_bytes()
    clause = {"": {}, "base": {"south": BASE}}.get(trouble)
    if clause is not None:
        assert made.records[0].refused == clause
    else:
        assert made.records[1].sites == ["east", "north"]
        assert made.records[1].refused.keys() == {"south"}


def test_what_fails_at_a_site_is_told_there_and_its_text_stays_there(wired: Any, capfd: Any, tmp_path: Path) -> None:
    nodes = wired(Fake("north", 1), Fake("south", 7, "user error"), Fake("east", 4, "bug"))
    made = held(nodes, 1, tmp_path)
    assert made.records[1].refused == {"south": FAILED, "east": FAILED}
    said = capfd.readouterr()
    assert "/hospital/patients/Jane Doe.dcm: cannot be read" in said.out
    assert "FileNotFoundError" in said.err
    assert b"hospital" not in nodes.grid.bytes
    assert b"Error" not in nodes.grid.bytes


def test_a_site_that_cannot_begin_takes_no_part(wired: Any, tmp_path: Path) -> None:
    nodes = wired(Fake("north", 1), Fake("south", 7, "bug", since=0))
    made = held(nodes, 1, tmp_path)
    assert made.records[0].refused == {"south": DATA}
    assert made.records[1].refused == {}


def test_all_that_travels_is_flowers_frame_and_the_payload(wired: Any, tmp_path: Path) -> None:
    nodes = wired(Fake("north", 1), Fake("south", 7))
    held(nodes, 2, tmp_path)
    words = [str(tmp_path), "north-1-", ".yaml", "Jane", "seed", "rounds", os.uname().nodename]
    assert [word for word in words if word.encode() in nodes.grid.bytes] == []
    assert b"north" in nodes.grid.bytes  # so that the search can find


def test_a_node_without_a_site_says_what_to_do_and_takes_no_part(wired: Any, capsys: Any, tmp_path: Path) -> None:
    nodes = wired(Fake("north", 1), Fake("south", 7))
    nodes.grid.forged[2] = lambda message: client_app(read_site)(
        message, Context(1, 2, {}, RecordDict(), {"plan": PLAN})
    )
    assert held(nodes, 1, tmp_path).records[0].refused == {"node-2": DATA}
    assert "--node-config \"site='SITE.yaml'\"" in capsys.readouterr().out


def test_a_node_that_crashes_or_is_silent_is_left_out_and_the_round_goes_on(wired: Any) -> None:
    nodes = wired(Fake("north", 1), Fake("south", 7), Fake("east", 4), patience=0.05)
    made = federation()
    made.open(nodes.facts())
    nodes.grid.gone = {3}
    nodes.grid.forged[2] = lambda message: Message(Error(8, "at /hospital"), reply_to=message)
    record = made.close(nodes.updates(made.order(), made.sites))
    assert record.sites == ["north"]
    assert record.refused == {
        "east": "no answer came in 0.05 s",
        "south": "its node failed (Flower's error 8), its own screen says why",
    }


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"Update": ConfigRecord({"payload": b"x"})}),
        RecordDict({"Update": ArrayRecord({"payload": Array("uint8", (3,), "safetensors", b"abc")})}),
        RecordDict({"Update": ArrayRecord({"other": Array("uint8", (3,), "safetensors", b"abc")})}),
    ],
)
def test_an_answer_that_is_no_message_of_ours_is_refused_by_name(content: RecordDict, wired: Any) -> None:
    nodes = wired(Fake("north", 1), Fake("south", 7))
    made = federation()
    made.open(nodes.facts())
    nodes.grid.forged[1] = lambda message: Message(content, reply_to=message)
    record = made.close(nodes.updates(made.order(), made.sites))
    assert (record.sites, record.refused) == (["south"], {"north": "its answer cannot be read"})


def test_a_node_cannot_answer_for_another_site(wired: Any) -> None:
    nodes = wired(Fake("north", 1), Fake("south", 7))
    made = federation()
    made.open(nodes.facts())
    nodes.grid.forged[1] = lambda message: Message(
        record(Fake("south", 7).train(read_record(message.content, Order))), reply_to=message
    )
    closed = made.close(nodes.updates(made.order(), made.sites))
    assert closed.refused == {"north": "it answered for another site"}
    assert closed.sites == ["south"]


def test_two_nodes_of_one_name_are_refused_at_the_start(wired: Any, tmp_path: Path) -> None:
    nodes = wired(Fake("north", 1), Fake("south", 7), Fake("south", 9))
    assert held(nodes, 1, tmp_path).records[0].refused == {"south": "2 answers came under its name"}


def test_a_site_whose_node_was_started_anew_goes_on_and_another_does_not_take_its_name(
    wired: Any, capsys: Any, tmp_path: Path
) -> None:
    nodes = wired(Fake("north", 1), Fake("south", 7))
    made = federation()
    made.open(nodes.facts())
    nodes.grid.gone = {2}  # Flower takes a while to notice
    nodes.grid.sites |= {8: write_site(tmp_path, Fake("south", 7)), 9: write_site(tmp_path, Fake("north", 3))}
    record = made.close(nodes.updates(made.order(), made.sites))
    assert (record.sites, record.refused) == (["north", "south"], {})
    assert nodes.sites == {1: "north", 8: "south"}
    assert "node 9 says it is north, with other data" in capsys.readouterr().out


def test_a_server_that_was_stopped_finds_its_sites_again(wired: Any, tmp_path: Path) -> None:
    sites = [Fake("north", 1), Fake("south", 7)]
    held(wired(*sites), 1, tmp_path)
    held(wired(*sites), 2, tmp_path)
    assert here(sites, 2, tmp_path / "here") == (tmp_path / STATE).read_bytes()


def test_a_federation_does_not_begin_without_all_its_sites(wired: Any) -> None:
    nodes = wired(Fake("north", 1), Fake("south", 7), wait=0.05)
    del nodes.grid.sites[2]
    with pytest.raises(RunFailed, match=r"1 of 2 sites are connected after 0\.05 s; start their flower-supernode"):
        nodes.facts()


# ---------------------------------------------------------------------------------------------- the app, the programs


def test_the_bundle_that_sites_get_is_the_plan_and_names_of_the_code(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    for other in ("site.yaml", "notes.md", "run.py"):
        (tmp_path / "app" / other).write_text("patients: /hospital\n")
    flower.write_app(tmp_path / "app", PLAN, 2)
    bundle = zipfile.ZipFile(BytesIO(build_fab_from_disk(tmp_path / "app")))
    assert set(bundle.namelist()) == {"pyproject.toml", ".info/CONTENT"}
    content = b"".join(bundle.read(name) for name in bundle.namelist())
    assert b"hospital" not in content
    assert str(tmp_path).encode() not in content
    assert b"miram.finetune.federate.flower_app:client" in content


@pytest.mark.parametrize("place", ["/data/shards", "~/shards", "C:\\shards", "\\\\host\\shards"])
def test_a_plan_with_a_place_on_this_machine_is_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a place on this machine"):
        flower.write_app(tmp_path, yaml.safe_dump({"data": {"shards": [place]}}), 2)


def test_flower_sends_no_telemetry_unless_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in flower.QUIET:
        monkeypatch.delenv(name, raising=False)
    asked = "from flwr.supercore import telemetry; print(telemetry.FLWR_TELEMETRY_ENABLED)"
    command = [sys.executable, "-c", asked]
    assert subprocess.run(command, env=flower.environment(), capture_output=True, text=True).stdout == "0\n"
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    assert flower.environment()["FLWR_TELEMETRY_ENABLED"] == "1"


def test_a_program_that_is_none_of_flowers_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'superlink'"):
        flower.launch(["superlnk"])


# ---------------------------------------------------------------------------------------------- real processes


@pytest.mark.slow
def test_a_server_and_two_clients_on_loopback_give_the_bits_of_one_process(tmp_path: Path) -> None:
    sites = [Fake("north", 1), Fake("south", 7, "bug", since=2)]
    flower.write_app(tmp_path / "app", PLAN, 2, {"serverapp": "fake_app:server", "clientapp": "fake_app:client"})
    places = {site.name: write_site(tmp_path, site) for site in sites}
    run_on_loopback(tmp_path, places, FLOWER_TEST=str(tmp_path), PYTHONPATH=str(Path(__file__).parent))
    sites[1] = replace(sites[1], trouble="user error")
    assert (tmp_path / STATE).read_bytes() == here(sites, 2, tmp_path / "here")
    assert "FileNotFoundError: /hospital/patients/Jane Doe.dcm" in (tmp_path / "south.log").read_text()
    assert "hospital" not in (tmp_path / "link.log").read_text()
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert {name: seen[name] for name in flower.QUIET} == flower.QUIET


def test_the_order_that_travels_is_the_order(wired: Any) -> None:
    made = federation()
    made.open([Fake("north", 1).facts()])
    there = read_record(record(made.order()), Order)
    assert (there.round, there.base, there.mu) == (1, made.terms.base, 0.0)
    assert there.tensors["w"].equal(made.tensors["w"])
