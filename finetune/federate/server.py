"""The server's part: it pools what sites say of their data, gives orders, and closes rounds. It sees no image.

FOLDER/federation.safetensors     written whole after every closed round: a stopped federation goes on from there
    tensors/NAME, fixed/NAME      as in an order
    metadata "miram"              {"schema": "miram.federation/1", "terms": {…}, "sites": {NAME: images},
                                   "said": {NAME: sha256 of its Facts}, "digest": of the tensors,
                                   "records": [{"round": 0, …}, {"round": 1, …}, …]}

Legend: K sites, n_k images of site k, D features, k classes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ...engine.errors import RunFailed, UserError
from ...engine.files import write_atomic
from ...engine.run import MetricsFile, Run
from ...engine.tensors import Form, form_of
from ..classify.head import CONSTANT
from .averaging import Residual, as_fixed, average, combine, from_fixed, residual_of
from .config import Mode
from .exchange import (
    BROKEN,
    Facts,
    Order,
    Refusal,
    Tensors,
    Update,
    digest_of,
    fault_of,
    fault_of_facts,
    pack,
    payload,
    unpack,
)

SCHEMA, STATE = "miram.federation/1", "federation.safetensors"
PARTS = ("tensors", "fixed")
SILENT = "no answer came"
Weigh = Callable[[Tensor, int], Tensor]  # (k,) counts of all sites, and how many images -> (k,) weights of the classes
Answer = TypeVar("Answer", Facts, Update)


@dataclass(frozen=True)
class Terms:
    """What all must agree on.

    Attributes:
        base: digest of the encoder.
        start: digest of what learns, as it starts.
        classes: k, of the task.
        width: D, of the encoder's features.
        mode: how low-rank changes are averaged.
        mu: of FedProx (Li et al. 2020, arXiv 1812.06127); 0 is FedAvg (McMahan et al. 2017, arXiv 1602.05629).
        weighting: sites count by their images, or alike.
    """

    base: str
    start: str
    classes: int
    width: int
    mode: Mode = "freeze_a"
    mu: float = 0.0
    weighting: Literal["examples", "equal"] = "examples"


@dataclass(frozen=True)
class RoundRecord:
    """What became of a round; 0 is the one in which sites say what they have.

    Attributes:
        round: its number.
        sites: those that counted, in order.
        refused: why, by the others' names.
        examples: images of those that counted.
        loss: mean of their losses, as they count; None of round 0.
        bytes_up: of the messages that counted, together.
        bytes_down: of the order, to all sites together.
        moved: L2 norm of the change of what learns.
    """

    round: int
    sites: list[str]
    refused: dict[str, str]
    examples: int
    loss: float | None
    bytes_up: int
    bytes_down: int
    moved: float


class Federation:
    """Rounds of orders and updates, by the same steps whoever carries the messages.

    Attributes:
        terms: what all agree on.
        tensors: what learns, as it stands.
        fixed: an order's other tensors; none before `open`.
        sites: images, by the name of every site that was sound at the start.
        said: sha256 of what each of these said of its data: who says other things later is not that site.
        records: of the rounds that were closed, the opening first.
    """

    def __init__(self, terms: Terms, tensors: Tensors, weigh: Weigh | None = None):
        self.terms, self.weigh = terms, weigh
        self.tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        self.fixed: Tensors = {}
        self.sites: dict[str, int] = {}
        self.said: dict[str, str] = {}
        self.records: list[RoundRecord] = []

    @property
    def closed(self) -> int:
        """How many rounds are."""
        return self.records[-1].round if self.records else 0

    @property
    def residual(self) -> Residual:
        """What the frozen weights have been given, by pair; none but in mode residual."""
        return from_fixed(self.fixed)

    def open(self, facts: Sequence[Facts | Refusal]) -> RoundRecord:
        """Pool what sites say of their data; who is not sound takes no part from now on.

        Raises:
            RunFailed: none is sound.
        """
        assert not self.records, "it is open already"
        terms = self.terms
        sound, refused = sift(facts, lambda f: fault_of_facts(f, terms.base, terms.start, terms.classes, terms.width))
        if not sound:
            raise RunFailed(f"the federation cannot begin, no site can take part: {told(refused)}")
        self.sites = {each.site: each.examples for each in sound}
        self.said = {each.site: digest_of_facts(each) for each in sound}
        self.fixed = pooled(sound, self.weigh)
        up = sum(len(payload(each)) for each in sound)
        return self._note(RoundRecord(0, list(self.sites), refused, sum(self.sites.values()), None, up, 0, 0.0))

    def order(self) -> Order:
        """What the next round begins with."""
        assert self.records, "open it first"
        return Order(self.closed + 1, self.terms.base, dict(self.tensors), dict(self.fixed), self.terms.mu)

    def close(self, updates: Sequence[Update | Refusal]) -> RoundRecord:
        """Average the sound updates; the others are refused by name, for this round.

        Args:
            updates: of the last order, in any order: the result does not depend on it.

        Raises:
            RunFailed: none is sound; the federation stands where it stood.
        """
        order = self.order()
        sound, refused = sift(updates, lambda update: self._fault(update, order))
        refused |= dict.fromkeys(self.sites.keys() - {each.site for each in updates}, SILENT)
        if not sound:
            raise RunFailed(
                f"round {order.round}: no site's update was sound: {told(refused)}; what was averaged before is kept"
            )
        weights = self._weights(sound)
        moved = self._average([update.tensors for update in sound], weights)
        record = RoundRecord(
            order.round,
            [update.site for update in sound],
            dict(sorted(refused.items())),
            sum(update.examples for update in sound),
            sum(weight * update.loss for weight, update in zip(weights, sound, strict=True)),
            sum(len(payload(update)) for update in sound),
            len(payload(order)) * len(self.sites),
            moved,
        )
        return self._note(record)

    # ------------------------------------------------------------------------------------------ a round

    def _fault(self, update: Update, order: Order) -> str:
        if update.site not in self.sites:
            return "it was not there at the start"
        if fault := fault_of(update, order):
            return fault
        then, now = self.sites[update.site], update.examples
        return "" if then == now else f"it had {then} images at the start and now {now}"

    def _weights(self, sound: Sequence[Update]) -> list[float]:
        sizes = [update.examples if self.terms.weighting == "examples" else 1 for update in sound]
        return [size / sum(sizes) for size in sizes]

    def _average(self, updates: Sequence[Tensors], weights: Sequence[float]) -> float:
        """Take the mean for what stands; how far that is from what stood."""
        if self.terms.mode == "residual":
            self.fixed |= as_fixed(combine(self.residual, residual_of(updates, weights)))
        before, self.tensors = self.tensors, average(updates, weights)
        return sum(float((self.tensors[n].double() - before[n].double()).square().sum()) for n in sorted(before)) ** 0.5

    def _note(self, record: RoundRecord) -> RoundRecord:
        self.records.append(record)
        return record

    # ------------------------------------------------------------------------------------------ on disk

    def save(self, folder: Path) -> None:
        """Write all of it, whole or not at all."""
        tensors = {f"{part}/{name}": each for part in PARTS for name, each in getattr(self, part).items()}
        header = {"schema": SCHEMA, "terms": asdict(self.terms), "sites": self.sites, "said": self.said}
        records = list(map(asdict, self.records))
        write_atomic(folder / STATE, pack({**header, "digest": digest_of(tensors), "records": records}, tensors))

    def load(self, folder: Path) -> bool:
        """Go on from what `save` wrote; whether there was anything.

        Raises:
            UserError: it cannot be read, or is of other terms.
        """
        path = folder / STATE
        if not path.is_file():
            return False
        header, tensors = read_state(path)
        schema, terms = header["schema"], header["terms"]
        stood, fixed = (within(tensors, part) for part in PARTS)
        odd = [key for key, value in asdict(self.terms).items() if terms.get(key) != value]
        if schema != SCHEMA or odd or {n: form_of(t) for n, t in stood.items()} != self._forms:
            said = ", ".join(odd) or "schema, or something else that learns"
            raise UserError(f"{path} is of a federation with another {said}; name another folder with --out")
        self.tensors, self.fixed, self.records = stood, fixed, header["records"]
        self.sites, self.said = header["sites"], header["said"]
        return True

    @property
    def _forms(self) -> dict[str, Form]:
        return {name: form_of(tensor) for name, tensor in self.tensors.items()}


def read_state(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Header and tensors of a state.

    Raises:
        UserError: it cannot be read.
    """
    try:
        header, tensors = unpack(path.read_bytes())
        found = {key: header[key] for key in ("schema", "terms", "sites", "said")}
        if header["digest"] != digest_of(tensors):
            raise ValueError
        return found | {"records": [RoundRecord(**record) for record in header["records"]]}, tensors
    except (*BROKEN, OSError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); remove {path.parent} to begin again") from error


def said_at_opening(folder: Path) -> dict[str, str]:
    """sha256 of what each site said of its data, by name; nothing where no federation was begun.

    Raises:
        UserError: the state cannot be read.
    """
    path = folder / STATE
    return dict(read_state(path)[0]["said"]) if path.is_file() else {}


def digest_of_facts(facts: Facts) -> str:
    """sha256 of all that a site says of its data."""
    return hashlib.sha256(payload(facts)).hexdigest()


def sift(answers: Sequence[Answer | Refusal], fault: Callable[[Answer], str]) -> tuple[list[Answer], dict[str, str]]:
    """Those that are sound, by their site's name, and why each other site is not among them."""
    times = Counter(answer.site for answer in answers)
    sound: list[Answer] = []
    refused: dict[str, str] = {}
    for answer in sorted(answers, key=lambda answer: answer.site):
        if times[answer.site] > 1:
            refused[answer.site] = f"{times[answer.site]} answers came under its name"
        elif isinstance(answer, Refusal):
            refused[answer.site] = answer.reason
        elif reason := fault(answer):
            refused[answer.site] = reason
        else:
            sound.append(answer)
    return sound, refused


def within(tensors: Mapping[str, Tensor], part: str) -> Tensors:
    """Those of PART/NAME, by NAME."""
    return {name.removeprefix(f"{part}/"): each for name, each in tensors.items() if name.startswith(f"{part}/")}


def told(refused: Mapping[str, str]) -> str:
    """Who was refused and why, in one line."""
    return "; ".join(f"{site}: {reason}" for site, reason in sorted(refused.items())) or "none answered"


def pooled(facts: Sequence[Facts], weigh: Weigh | None) -> Tensors:
    """The statistics of all images together, exactly (Chan, Golub, LeVeque 1983, equation 2.1), as a head needs them.

    Returns:
        head.mean, head.deviation (D,) float64; class_weights (k,) if asked for.
    """
    n = sum(each.examples for each in facts)
    mean = sum((each.examples / n * each.mean for each in facts), torch.zeros_like(facts[0].mean))
    m2 = sum((each.m2 + each.examples * (each.mean - mean) ** 2 for each in facts), torch.zeros_like(mean))
    deviation = (m2 / n).sqrt()
    fixed = {"head.mean": mean, "head.deviation": deviation.where(deviation > CONSTANT, 1.0)}
    if weigh is not None:
        fixed["class_weights"] = weigh(torch.stack([each.counts for each in facts]).sum(0), n)
    return fixed


def write_metrics(run: Run, records: Sequence[RoundRecord]) -> None:
    """RUN/metrics.jsonl, a line a round."""
    with MetricsFile(run.folder / "metrics.jsonl", 0) as lines:
        for record in records[1:]:
            said = {name: getattr(record, name) for name in ("loss", "bytes_up", "bytes_down", "moved")}
            lines.append({"step": record.round, **said})
