"""From a federation's last order to what a run keeps: the model, and how it does beside what it is compared with.

Legend: j judged images, w outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from ...engine.metrics import Floats, Ints
from ...engine.recipe import split_batch
from ...engine.run import Run
from ...engine.track import Meter
from ...pretrain.encoder import normalisation
from ..classify.bench import Bench
from ..classify.bootstrap import Draws
from ..classify.cards import card_for
from ..classify.judging import what_intervals_hold
from ..classify.locked import write_locked
from ..classify.units import LEVELS
from ..peft.registry import describe
from ..seen import seen
from .config import FederateConfig
from .exchange import Order
from .figures import CENTRALISED, FEDERATED, LOCAL, Judges, content
from .parties import Part
from .rounds import Together, hold
from .server import Federation, RoundRecord, Terms
from .site import Site
from .start import start_digest, values

OTHERS = (
    "The kept model learnt from the other sites' patients, too. Nobody here knows them, so that its card names this "
    "site's alone, and `miram evaluate` cannot refuse the others'."
)


@dataclass(frozen=True)
class Trial:
    """The sites of this process, and what the federation is compared with: one site alone, and all as one."""

    settings: FederateConfig
    bench: Bench
    parts: Mapping[str, Part]
    run: Run

    # ------------------------------------------------------------------------------------------ training

    @cached_property
    def sites(self) -> list[Site]:
        """Of the federation."""
        return [self.site(FEDERATED, name, part.fit) for name, part in self.parts.items()]

    @cached_property
    def others(self) -> dict[str, Site]:
        """Those that train without anybody else, by what their model is called."""
        compare, found = self.settings.federate.compare, {}
        if "local" in compare:
            for name, part in self.parts.items():
                found[f"{LOCAL}-{name}"] = self.site(f"{LOCAL}-{name}", name, part.fit)
        if "centralised" in compare and len(self.parts) > 1:
            found[CENTRALISED] = self.site(CENTRALISED, CENTRALISED, self.everybody)
        return found

    @property
    def everybody(self) -> Ints:
        """All training images."""
        return np.sort(np.concatenate([part.fit for part in self.parts.values()]))

    def site(self, federation: str, name: str, images: Ints) -> Site:
        """One party of a federation."""
        return Site(name, self.bench, self.settings.federate, images, self.place(federation) / name)

    def place(self, federation: str) -> Path:
        """Of a federation's state."""
        return self.run.folder / "rounds" / federation

    def held(self, name: str, sites: Sequence[Site], meter: Meter) -> Federation:
        """A federation after its last round."""
        target, section = self.bench.labelled.target, self.settings.federate
        start = sites[0].tuned()
        terms = Terms(
            base=sites[0].base,
            start=start_digest(start),
            classes=len(target.classes),
            width=start.shape.D,
            mode=section.average,
            mu=section.mu,
            weighting=section.weighting,
        )
        federation = Federation(terms, values(start), target.weights_of)

        def after(record: RoundRecord) -> None:
            if record.round:  # the opening is none
                meter.advance()

        hold(federation, Together(sites), section.rounds, self.place(name), after)
        return federation

    # ------------------------------------------------------------------------------------------ telling

    def finish(self, order: Order, records: Sequence[RoundRecord], meter: Meter) -> None:
        """Train what it is compared with, judge, and write model and figures."""
        orders = {FEDERATED: order} | {n: self.held(n, [site], meter).order() for n, site in self.others.items()}
        self.keep(order)
        bench = self.bench
        judges = Judges(bench.labelled, bench.section, self.parts, self.settings.seed)
        draws = judges.draws()
        scored = {name: judges.scored(self.said(name, of, judges.images), draws) for name, of in orders.items()}
        passes = "steps" if self.settings.train.steps else "passes over its images"
        told = content(judges, scored, records, passes)
        self.run.result(told | {"split": self.split, "notes": self.notes(judges, draws, alone=not records)})

    def said(self, name: str, order: Order, images: Ints) -> Floats:
        """(j, w) of all tests by a model."""
        return self.others.get(name, self.sites[0]).logits(order, images)

    def keep(self, order: Order) -> None:
        """Write the federation's model; nothing was held out to choose a temperature or thresholds by."""
        bench = self.bench
        tuned = self.sites[0].final(order)
        section = bench.section.model_copy(update={"options": tuned.method.model_dump(mode="json", exclude_unset=True)})
        base, normalise = describe(bench.encoder), normalisation(bench.encoder)
        thresholds = dict.fromkeys(LEVELS, (0.5,) * bench.labelled.target.thresholds)
        card = card_for(section, bench.labelled, self.everybody, bench.shards, base, normalise, 1.0, thresholds)
        write_locked(self.run.folder / "model", card, tuned)

    @property
    def split(self) -> str:
        """How the tests came about."""
        rest = [part for part in self.parts.values() if not part.official]
        if not rest:
            return "official train and test"
        held, every = (self.patients(rest, which) for which in (("test",), ("fit", "test")))
        told = f"{held} of {every} patients held out, of every site some"
        return told if len(rest) == len(self.parts) else f"official where there is one; at {len(rest)} sites {told}"

    def patients(self, parts: Sequence[Part], which: Sequence[Literal["fit", "test"]]) -> int:
        """How many have images in these."""
        images = np.concatenate([getattr(part, name) for part in parts for name in which])
        return len(np.unique(self.bench.labelled.patients[images]))

    def check(self) -> None:
        """Raises: UserError: some site has too few images for a batch, or batches do not divide."""
        for site in (*self.sites, *self.others.values()):
            split_batch(site.recipe(1), self.bench.accelerator.num_processes)
        self.sites[0].tuned()

    def notes(self, judges: Judges, draws: Draws, *, alone: bool) -> list[str]:
        """What the figures hold."""
        settings, bench = self.settings, self.bench
        rows = [int(row) for row in bench.rows(judges.images)]
        return [
            seen(bench.shards, settings.data, settings.finetune.encoder, rows),
            "Nothing was searched, and no model saw a judged image or another one of its patient at the site that "
            "judges. The kept model decides at 0.5, at temperature 1: nothing was held out to choose them by.",
            what_intervals_hold(draws, bench.section.replicates),
            *([OTHERS] if alone else []),
        ]
