"""A real site's part: its own configuration and the plan in, answers out; what it keeps is in its own run folder.

    RUN/rounds/order.json     {"schema", "digest": sha256 of the last order, whose model and figures RUN holds}

Flower starts a process for every message, so everything here is a function of SITE.yaml, the plan and the order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...engine.errors import UserError
from ...engine.files import read_json, write_atomic, write_json
from ...engine.launch import make_accelerator
from ...engine.run import RESULT, Run, open_run
from ...engine.signals import StopSignals
from ...engine.track import Meter
from ...pretrain.weights.loading import encoder_digest
from ..classify.targets import Target
from .exchange import Facts, Figures, Order, OtherEncoder, Update, payload, read_payload
from .figures import LOCAL
from .opening import make_bench
from .parties import divide
from .plan import Plan, read_plan, read_site_config
from .site import Site
from .start import values
from .trial import Trial

NAN = float("nan")
ORDER = "miram.order/1"


@dataclass(frozen=True)
class Member:
    """One site, on a machine of its own."""

    trial: Trial

    @property
    def name(self) -> str:
        """What others call it."""
        return self.site.name

    @cached_property
    def site(self) -> Site:
        """The party that trains."""
        return self.trial.sites[0]

    def facts(self) -> Facts:
        """The first message; said once, since another one by the last bit would be another site's."""
        place = self.trial.run.folder / "rounds" / "facts.safetensors"
        if not place.is_file():
            write_atomic(place, payload(self.site.facts()))
        return read_payload(place.read_bytes(), Facts)

    def train(self, order: Order) -> Update:
        """Some steps; to order 0, what learns as it starts, which all sites have alike and the server has not.

        Raises:
            UserError, RunFailed: as `Site.train`.
        """
        if order.round == 0:
            return Update(self.name, self.site.base, 0, values(self.site.tuned()), len(self.site.images), 0.0)
        update = self.site.train(order)
        print(f"miram: {self.name}: round {order.round}: loss {update.loss:.4f}", flush=True)
        return update

    def finish(self, order: Order) -> Figures:
        """Judge the federation's model on the site's own test, keep it, and say how it does.

        Raises:
            RunFailed: a training failed, or the disk is full.
            UserError: another process is at work in the run folder.
        """
        run, digest = self.trial.run, hashlib.sha256(payload(order)).hexdigest()
        kept = run.folder / "rounds" / "order.json"
        if not (run.finished and kept.is_file() and read_json(kept, ORDER).get("digest") == digest):
            with run.recorded(), Meter("rounds", len(self.trial.others) * self.trial.settings.federate.rounds) as meter:
                self.trial.finish(order, [], meter)
                write_json(kept, ORDER, {"digest": digest})
        return figures_of(self.name, read_json(run.folder / "result.json", RESULT))


def figures_of(site: str, result: Mapping[str, Any]) -> Figures:
    """What a result.json says that may travel."""
    gap: Mapping[str, Any] = next((row for row in result["differences"] if row["name"].endswith(LOCAL)), {})
    local = next((row["value"] for row in result["rows"] if row["name"].startswith(LOCAL)), None)
    low, high = result["interval"] or (NAN, NAN)
    gap_low, gap_high = gap.get("interval") or (NAN, NAN)
    numbers = (result["value"], low, high, local, gap_low, gap_high)
    told = (NAN if number is None else float(number) for number in numbers)
    return Figures(site, result["n_images"], result["n_patients"], *told)


def read_site(path: str, plan: str) -> Member:
    """The site of a SITE.yaml, in a federation.

    Raises:
        UserError: the configuration, its data or its encoder are not usable, or the run folder is another's.
    """
    agreed, own = read_plan(plan), read_site_config(path)
    settings = own.settings(agreed)
    bench = make_bench(settings, make_accelerator(settings.train.deterministic), StopSignals())
    refuse_other_task(agreed, bench.labelled.target)
    parts = divide(bench.labelled, bench.shards, settings.federate, settings.seed)
    trial = Trial(settings, bench, parts, Run(Path(settings.out), "federate"))
    if (here := trial.sites[0].base) != agreed.base:
        raise OtherEncoder(f"{own.encoder} is another encoder ({here[:12]}) than the plan's ({agreed.base[:12]})")
    trial.check()
    inputs = bench.shards.inputs | {"encoder": encoder_digest(own.encoder)}
    open_run(settings, settings.out, "federate", inputs)
    return Member(trial)


def refuse_other_task(plan: Plan, target: Target) -> None:
    """Raises: UserError: the site's labels make another task than the plan's."""
    if target != plan.target.target:
        here, agreed = (f"{t.name}, {t.kind}, of {', '.join(t.classes)}" for t in (target, plan.target.target))
        raise UserError(f"the labels make the task {here}, and the plan's is {agreed}; see data.shards")
