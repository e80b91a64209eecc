"""The rounds of a federation, whoever carries the messages; and carrying them within this process.

Within this process messages go through the same bytes as between machines, so that what works here works there, and
what is counted is what would travel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...engine.errors import RunFailed, UserError
from .exchange import BASE, DATA, FAILED, Facts, Figures, Order, OtherEncoder, Refusal, Update, payload, read_payload
from .server import Federation, RoundRecord


class Party(Protocol):
    """Whoever takes part."""

    @property
    def name(self) -> str:
        """What others call it."""

    def facts(self) -> Facts:
        """Its first message."""

    def train(self, order: Order) -> Update:
        """Its answer to a round."""


class Member(Party, Protocol):
    """A party that judges by itself what came of all rounds."""

    def finish(self, order: Order) -> Figures:
        """Its last message."""


class Carrier(Protocol):
    """Between the server and all parties."""

    def facts(self) -> Sequence[Facts | Refusal]:
        """Everybody's first message."""

    def updates(self, order: Order, sites: Collection[str]) -> Sequence[Update | Refusal]:
        """What these sites make of an order."""


def hold(
    federation: Federation, carrier: Carrier, rounds: int, place: Path, after: Callable[[RoundRecord], object]
) -> None:
    """Every round that is not closed yet, from wherever the folder has got to.

    Args:
        federation: the server.
        carrier: to the sites.
        rounds: of the whole federation.
        place: folder of its state.
        after: called with what came of the opening, and of each round.

    Raises:
        RunFailed: nobody's update could be used.
        Preempted: stopped on a signal; the rounds that are closed are kept.
    """
    if not federation.load(place):
        opening = federation.open(carrier.facts())
        federation.save(place)
        after(opening)
    while federation.closed < rounds:
        record = federation.close(carrier.updates(federation.order(), federation.sites))
        federation.save(place)
        after(record)


@dataclass(frozen=True)
class Together:
    """All parties in this process."""

    parties: Sequence[Party]

    def facts(self) -> list[Facts | Refusal]:
        """Everybody's first message."""
        return [facts_of(party) for party in self.parties]

    def updates(self, order: Order, sites: Collection[str]) -> list[Update | Refusal]:
        """What these sites make of an order."""
        order = read_payload(payload(order), Order)
        return [answer_of(party, order) for party in self.parties if party.name in sites]


def facts_of(party: Party) -> Facts | Refusal:
    """A site's first message, or why there is none."""
    try:
        return read_payload(payload(party.facts()), Facts)
    except (UserError, RunFailed) as error:
        return refusal(party, DATA, error)


def answer_of(party: Party, order: Order) -> Update | Refusal:
    """A site's answer, or why there is none: what goes wrong at one site ends its round, not everybody's."""
    try:
        return read_payload(payload(party.train(order)), Update)
    except OtherEncoder as error:
        return refusal(party, BASE, error)
    except (UserError, RunFailed) as error:
        return refusal(party, FAILED, error)


def refusal(party: Party, clause: str, error: Exception) -> Refusal:
    """One of the clauses that may travel; what really happened is said here."""
    print(f"miram: site {party.name}: {error}", flush=True)
    return Refusal(party.name, clause)
