"""A federation small enough to start in every process: linear regression, with sites that can go wrong."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from miram.engine.errors import UserError
from miram.finetune.federate.exchange import Facts, Order, Update, digest_of
from miram.finetune.federate.flower_wire import Nodes
from miram.finetune.federate.rounds import Carrier, Together, hold
from miram.finetune.federate.server import STATE, Federation, Terms

BASE, OTHER = "a" * 64, "b" * 64
WIDTH = 5


@dataclass(frozen=True)
class Fake:
    """A site whose images are a seed; `trouble` is what goes wrong with it, in rounds from `since` on."""

    name: str
    seed: int
    trouble: str = ""
    since: int = 1
    secret: str = "/hospital/patients/Jane Doe.dcm"

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(20 + self.seed, WIDTH, generator=generator) + self.seed
        return x, x @ torch.arange(WIDTH).float()

    def facts(self) -> Facts:
        self.fail(0)
        x = self.data()[0].double()
        n, base = len(x), OTHER if self.trouble == "base" else BASE
        spread = ((x - x.mean(0)) ** 2).sum(0)
        return Facts(self.name, base, digest_of(start()), n, torch.tensor([n - 3, 3]), x.mean(0), spread)

    def train(self, order: Order) -> Update:
        self.fail(order.round)
        x, y = self.data()
        x = ((x - order.fixed["head.mean"]) / order.fixed["head.deviation"]).float()
        w = order.tensors["w"].clone().requires_grad_()
        optimizer = torch.optim.SGD([w], lr=0.01)
        for _ in range(5):
            loss = ((x @ w - y) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        learnt = {"nan": w.detach() * torch.nan, "shape": w.detach()[:-1]}
        w = learnt.get(self.trouble, w.detach()) if order.round >= self.since else w.detach()
        return Update(self.name, BASE, order.round, {"w": w}, len(x), loss.item())

    def fail(self, round: int) -> None:
        if round < self.since and self.since > 0:
            return
        if self.trouble == "user error":
            raise UserError(f"{self.secret}: cannot be read")
        if self.trouble == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "bug":
            raise FileNotFoundError(self.secret)


def start() -> dict[str, torch.Tensor]:
    """What learns, as it starts."""
    return {"w": torch.zeros(WIDTH)}


def federation() -> Federation:
    """A server of such sites."""
    return Federation(Terms(BASE, digest_of(start()), 2, WIDTH), start())


def held(carrier: Carrier, rounds: int, folder: Path) -> Federation:
    """A federation after so many rounds, and its state in the folder; it goes on from what is there."""
    made = federation()
    hold(made, carrier, rounds, folder, lambda _: None)
    return made


def here(sites: Sequence[Fake], rounds: int, folder: Path) -> bytes:
    """The state after rounds whose sites are in this process."""
    held(Together(sites), rounds, folder)
    return (folder / STATE).read_bytes()


# ---------------------------------------------------------------------------------------------- in Flower's processes


def read_site(path: str, plan: str) -> Fake:
    """A site of a YAML file."""
    assert yaml.safe_load(plan)["rounds"]
    return Fake(**yaml.safe_load(Path(path).read_text()))


def serve(plan: str, nodes: Nodes) -> None:
    """Hold the plan's rounds; state and environment are written where the latter says."""
    folder = Path(os.environ["FLOWER_TEST"])
    held(nodes, yaml.safe_load(plan)["rounds"], folder)
    (folder / "seen.json").write_text(json.dumps({name: os.environ.get(name) for name in os.environ if "FLWR" in name}))
