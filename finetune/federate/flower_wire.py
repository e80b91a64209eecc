"""Flower between the server and real sites: it carries the messages of exchange.py, as bytes, and nothing else of ours.

    RecordDict {KIND: ArrayRecord {"payload": Array, uint8 (bytes of `payload`,)}}    KIND: a class of exchange.py

    server -> node   "query.facts"   an empty RecordDict              node -> server   Facts, or a Refusal
    server -> node   "train"         an Order                         node -> server   Update, or a Refusal
    server -> node   "evaluate"      the last Order                   node -> server   Figures, or a Refusal

Flower starts a process at the site for every message, so a site keeps nothing between rounds but what it wrote to its
own disk. What goes wrong there is said on its own screen: an error's text would travel, and could hold a path.
Only Flower's processes import this: it needs flwr (`pip install 'miram[federated]'`).
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from ...engine.errors import RunFailed, UserError, one_line
from .exchange import (
    BASE,
    DATA,
    FAILED,
    JUDGED,
    Facts,
    Figures,
    Order,
    OtherEncoder,
    Refusal,
    Update,
    payload,
    read_payload,
)
from .rounds import Member
from .server import digest_of_facts

FACTS, TRAIN, JUDGE = (
    "query.facts",
    "train",
    "evaluate",
)  # Flower's types of messages: what it does, and which of our functions
FORMAT = "safetensors"
PAUSE = 0.5  # seconds between looks for an answer
Answer = TypeVar("Answer", Facts, Update, Figures)
Read = TypeVar("Read", Facts, Order, Update, Refusal, Figures)
Said = Facts | Update | Figures


def record(message: Said | Order | Refusal) -> RecordDict:
    """The message as Flower's content."""
    content = payload(message)
    array = Array("uint8", (len(content),), FORMAT, content)
    return RecordDict({type(message).__name__: ArrayRecord({"payload": array})})


def read_record(content: RecordDict, kind: type[Read]) -> Read:
    """The message that `record` made.

    Raises:
        UserError: it is none of this kind.
    """
    found = content.get(kind.__name__)
    if len(content) != 1 or not isinstance(found, ArrayRecord) or list(found) != ["payload"]:
        raise UserError(f"the {kind.__name__} is not one payload; is its sender of this version of miram?")
    return read_payload(found["payload"].data, kind)


# ---------------------------------------------------------------------------------------------- at a site

ReadSite = Callable[[str, str], Member]  # path of the site's own YAML, text of the plan


def client_app(read_site: ReadSite) -> ClientApp:
    """What every node runs: `flower-supernode … --node-config "site='SITE.yaml'"` says which site it is."""
    app = ClientApp()

    @app.query("facts")
    def facts(message: Message, context: Context) -> Message:
        return answer(message, context, read_site, DATA, lambda site: site.facts())

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, context, read_site, FAILED, lambda site: site.train(read_record(message.content, Order)))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(
            message, context, read_site, JUDGED, lambda site: site.finish(read_record(message.content, Order))
        )

    return app


def answer(
    message: Message, context: Context, read_site: ReadSite, clause: str, act: Callable[[Member], Said]
) -> Message:
    """A site's answer, or the clause that says why there is none; no exception leaves this: Flower sends its text."""
    name = f"node-{context.node_id}"
    try:
        site = read_site(place(context), str(context.run_config["plan"]))
        name = site.name
        content = record(act(site))
    except OtherEncoder as error:
        print(f"miram: {name}: {error}", flush=True)
        content = record(Refusal(name, BASE))
    except (UserError, RunFailed) as error:
        print(f"miram: {name}: {one_line(str(error))}", flush=True)
        content = record(Refusal(name, clause))
    except Exception:
        traceback.print_exc()
        content = record(Refusal(name, clause))
    return Message(content, reply_to=message)


def place(context: Context) -> str:
    """Path of the site's own YAML, which no one else is told.

    Raises:
        UserError: the node was started without one.
    """
    path = context.node_config.get("site")
    if not isinstance(path, str):
        raise UserError("this node does not know its site; start it with --node-config \"site='SITE.yaml'\"")
    return path


# ---------------------------------------------------------------------------------------------- at the server


@dataclass
class Nodes:
    """The sites, as the server reaches them.

    A node says at the first contact which site it speaks for. One that is started anew has another number: it may speak
    for the same site if it says the very same of its data.

    Attributes:
        grid: Flower's hand to the nodes.
        expected: sites to wait for.
        wait: seconds to wait for them.
        patience: seconds to wait for an answer.
        sites: whom a node speaks for.
        said: sha256 of what a site said of its data, now or before the server was stopped.
        met: nodes that were asked who they are.
    """

    grid: Grid
    expected: int
    wait: float
    patience: float
    sites: dict[int, str] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)
    met: set[int] = field(default_factory=set)

    def facts(self) -> list[Facts | Refusal]:
        """What every site says of its data.

        Raises:
            RunFailed: not all sites came.
        """
        return self.introduced(self.gathered(self.expected))

    def updates(self, order: Order, sites: Collection[str]) -> list[Update | Refusal]:
        """What these sites make of an order; one whose node is gone says nothing.

        Raises:
            RunFailed: no node is there.
        """
        return self.answers(order, sites, TRAIN, Update)

    def figures(self, order: Order, sites: Collection[str]) -> list[Figures | Refusal]:
        """How these sites' tests find the model of the last order.

        Raises:
            RunFailed: no node is there.
        """
        return self.answers(order, sites, JUDGE, Figures)

    def answers(self, order: Order, sites: Collection[str], asking: str, kind: type[Answer]) -> list[Answer | Refusal]:
        """What these sites answer to an order."""
        there = self.gathered(1) if not self.sites else set(self.grid.get_node_ids())
        self.introduced(there - self.met)
        asked = {node: record(order) for node in sorted(there) if self.sites.get(node) in sites}
        return [self.heard(node, reply, kind) for node, reply in self.ask(asked, asking, order.round).items()]

    # ------------------------------------------------------------------------------------------ who is there

    def gathered(self, least: int) -> set[int]:
        """The nodes that are there, once all are or the wait is over.

        Raises:
            RunFailed: fewer than so many.
        """
        end = time.monotonic() + self.wait
        while len(there := set(self.grid.get_node_ids())) < self.expected and time.monotonic() < end:
            time.sleep(PAUSE)
        if len(there) < least:
            raise RunFailed(
                f"{len(there)} of {self.expected} sites are connected after {self.wait:g} s; start their "
                "flower-supernode, then this run again"
            )
        return there

    def introduced(self, nodes: Iterable[int]) -> list[Facts | Refusal]:
        """Ask nodes who they are."""
        replies = self.ask({node: RecordDict() for node in sorted(nodes)}, FACTS, 0)
        self.met |= replies.keys()
        told = {node: self.heard(node, reply, Facts) for node, reply in replies.items()}
        for node, facts in told.items():
            if isinstance(facts, Facts):
                self.bind(node, facts)
        return [*told.values()]

    def bind(self, node: int, facts: Facts) -> None:
        """Let a node speak for a site, in the place of one that did, unless what it says of the data is new."""
        digest = digest_of_facts(facts)
        if self.said.setdefault(facts.site, digest) != digest:
            print(f"miram: node {node} says it is {facts.site}, with other data; it is not asked", flush=True)
            return
        self.sites = {other: site for other, site in self.sites.items() if site != facts.site} | {node: facts.site}

    # ------------------------------------------------------------------------------------------ what they say

    def ask(self, contents: Mapping[int, RecordDict], kind: str, round: int) -> dict[int, Message | None]:
        """The nodes' replies; None of one that did not answer in time."""
        messages = [
            Message(content, node, kind, ttl=self.patience, group_id=str(round)) for node, content in contents.items()
        ]
        numbers = self.grid.push_messages(messages) if messages else []
        sent = {number: node for number, node in zip(numbers, contents, strict=False) if number}
        replies: dict[int, Message | None] = dict.fromkeys(contents)
        end = time.monotonic() + self.patience
        while sent:
            for reply in self.grid.pull_messages(list(sent)):
                replies[sent.pop(reply.metadata.reply_to_message_id)] = reply
            if time.monotonic() > end:
                break
            time.sleep(PAUSE if sent else 0)
        return replies

    def heard(self, node: int, reply: Message | None, kind: type[Answer]) -> Answer | Refusal:
        """The message in a reply, or why there is none."""
        site = self.sites.get(node)
        name = site or f"node-{node}"
        if reply is None:
            return Refusal(name, f"no answer came in {self.patience:g} s")
        if reply.has_error():
            return Refusal(name, f"its node failed (Flower's error {reply.error.code}), its own screen says why")
        try:
            if Refusal.__name__ in reply.content:
                refusal = read_record(reply.content, Refusal)
                return Refusal(site or refusal.site, refusal.reason)
            said = read_record(reply.content, kind)
        except UserError:
            return Refusal(name, "its answer cannot be read")
        return said if site in (None, said.site) else Refusal(name, "it answered for another site")


Serve = Callable[[str, Nodes], object]  # text of the plan, the sites


def server_app(serve: Serve) -> ServerApp:
    """What the server runs; sites, wait and patience are in the app's configuration (`flwr run --run-config`)."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = context.run_config
        serve(str(config["plan"]), Nodes(grid, int(config["sites"]), float(config["wait"]), float(config["patience"])))

    return app
