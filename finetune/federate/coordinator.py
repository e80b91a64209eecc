"""The server's part with real sites: it needs neither images, nor the encoder, nor a GPU.

    PLACE/config.yaml                 the plan
    PLACE/federation.safetensors      the state after every closed round (server.py)
    PLACE/metrics.jsonl               one line a round
    PLACE/result.json                 what every site says of its test
    PLACE/state.json                  as every run's

PLACE is `federation` in the folder where the superlink was started, or what MIRAM_FEDERATION names. The model is at the
sites: each keeps it in its own run folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...engine.errors import RunFailed
from ...engine.metrics import headline
from ...engine.run import Run, open_run
from .exchange import BROKEN, Facts, Figures, Order, Refusal, Tensors, Update, digest_of
from .figures import rounds_table
from .flower_wire import Nodes
from .plan import Plan, read_plan
from .rounds import hold
from .server import Federation, RoundRecord, said_at_opening, write_metrics

FOLDER = "MIRAM_FEDERATION"


def serve(text: str, nodes: Nodes) -> None:
    """Hold the rounds of a plan.

    Args:
        text: the plan.
        nodes: the sites.

    Raises:
        RunFailed: no site can take part, or nobody's update could be used.
        UserError: the folder holds the state of another plan.
    """
    plan = read_plan(text)
    run = open_run(plan, os.environ.get(FOLDER, "federation"), "federate")
    if run.finished:
        print(f"miram: {run.folder} is finished; nothing to do (rename it to begin anew)", flush=True)
        return
    with run.recorded():
        nodes.said |= said_at_opening(run.folder)
        federation = Federation(plan.terms, start_of(plan, nodes), plan.target.target.weights_of)
        hold(
            federation,
            nodes,
            plan.federate.rounds,
            run.folder,
            lambda record: tell(run, federation, record, nodes.expected),
        )
        told = nodes.figures(federation.order(), federation.sites)
        run.result(content(plan, told, federation.records))
    print(f"miram: figures of all sites: {run.folder / 'result.json'}", flush=True)


def start_of(plan: Plan, nodes: Nodes) -> Tensors:
    """What learns, as it starts: all sites have it alike, and the first that says what the plan expects is believed.

    Raises:
        RunFailed: none of those that are there has the plan's encoder and start, and the data it began with.
    """
    facts = nodes.facts()
    sound = sorted(f.site for f in facts if isinstance(f, Facts) and (f.base, f.start) == (plan.base, plan.start))
    for site in sound:
        for answer in nodes.updates(Order(0, plan.base, {}, {}, 0.0), [site]):
            if isinstance(answer, Update) and digest(answer.tensors) == plan.values:
                return answer.tensors
    raise RunFailed(
        f"none of {len(facts)} sites has the plan's encoder, starts as the plan says and has the data it began with; "
        "see their screens"
    )


def digest(tensors: Tensors) -> str:
    """Of what a site sent; nothing where that cannot be said, of tensors that safetensors reads and does not write."""
    try:
        return digest_of(tensors)
    except (*BROKEN, RuntimeError):
        return ""


def tell(run: Run, federation: Federation, record: RoundRecord, expected: int) -> None:
    """A line for the opening, and for each round, on the screen and on disk."""
    write_metrics(run, federation.records)
    refused = "".join(f"; refused {site}: {reason}" for site, reason in record.refused.items())
    what = f"opening, {len(record.sites)} of {expected} sites" if record.loss is None else f"loss {record.loss:.4f}"
    print(f"miram: round {record.round}: {what}: {', '.join(record.sites)}{refused}", flush=True)


def content(plan: Plan, told: Sequence[Figures | Refusal], records: Sequence[RoundRecord]) -> dict[str, Any]:
    """What result.json says: the mean of the sites leads, without an interval, for which one site's patients would have
    to be known to the server."""
    figures = [each for each in told if isinstance(each, Figures)]
    values = [each.value for each in figures if np.isfinite(each.value)]
    return {
        "task": plan.target.name,
        "kind": plan.target.kind,
        "metric": headline(plan.target.kind),
        "value": float(np.mean(values)) if values else None,
        "interval": None,
        "n_images": sum(each.images for each in figures),
        "n_patients": sum(each.patients for each in figures),
        "rows": [{"name": each.site, "value": number(each.value), **interval(each.low, each.high)} for each in figures],
        "differences": [
            {"name": f"{each.site}: federated - local", "value": number(each.value - each.local)}
            | interval(each.gap_low, each.gap_high)
            for each in figures
        ],
        "tables": [rounds_table(records)],
        "notes": ["Every site judged its own test on its own machine, and sent figures alone."]
        + [f"{each.site} sent no figures: {each.reason}." for each in told if isinstance(each, Refusal)],
    }


def number(value: float) -> float | None:
    """JSON knows no nan."""
    return value if np.isfinite(value) else None


def interval(low: float, high: float) -> dict[str, Any]:
    """The interval, if it is one."""
    return {"interval": [low, high] if np.isfinite([low, high]).all() else None}
