"""The federate stage: an encoder and several sites' images in, one small model out that none of them could train alone.

    RUN/result.json        every site's test by its own model, the federation's, and one of all images; payloads
    RUN/metrics.jsonl      one line a round
    RUN/model/             the federation's model, as `miram finetune` keeps one (classify/locked.py)
    RUN/rounds/NAME/       the state of each federation; a start that was stopped goes on from its last closed round
    RUN/../features/       frozen features, shared by the runs beside this one

Here all sites are in one process: a simulation. With real ones Flower carries the messages (flower.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...engine.config import load
from ...engine.errors import UserError
from ...engine.files import read_json
from ...engine.launch import make_accelerator
from ...engine.recipe import split_batch
from ...engine.run import RESULT, Run, open_run
from ...engine.signals import StopSignals
from ...engine.track import Meter
from ...pretrain.weights.loading import encoder_digest, read_encoder
from ..classify.telling import say
from .config import FederateConfig
from .figures import FEDERATED
from .flower import write_app
from .opening import make_bench
from .parties import divide
from .plan import make_plan
from .server import write_metrics
from .trial import Trial


def federate(
    config: str, arguments: Sequence[str] = (), *, flower: bool = False, signals: StopSignals | None = None
) -> None:
    """`miram federate CONFIG --a.b=value …`.

    Args:
        flower: write an app for real sites instead of simulating some.
        signals: those that came before this was called.

    Raises:
        UserError: configuration, encoder, data or run folder are not usable.
        Preempted: stopped on a signal; the rounds that are closed are kept.
        RunFailed: no site's training succeeded, or the disk is full.
    """
    settings = load(FederateConfig, config, arguments)
    if flower:
        announce(settings)
    else:
        simulate(settings, signals or StopSignals())


def simulate(settings: FederateConfig, signals: StopSignals) -> Run:
    """All sites in this process.

    Raises:
        UserError, Preempted, RunFailed: as `federate`.
    """
    accelerator = make_accelerator(settings.train.deterministic)
    if accelerator.num_processes > 1:
        raise UserError("miram federate runs in one process; start it without a launcher")
    bench = make_bench(settings, accelerator, signals, complete=True)
    parts = divide(bench.labelled, bench.shards, settings.federate, settings.seed)
    inputs = bench.shards.inputs | {"encoder": encoder_digest(settings.finetune.encoder)}
    run = Run(Path(settings.out), "federate")
    trial = Trial(settings, bench, parts, run)
    trial.check()  # whatever does not fit is found now, and not in a run folder that is then in the way
    if settings.federate.base not in (None, trial.sites[0].base):
        raise UserError(f"federate.base is another encoder's than {settings.finetune.encoder}: {trial.sites[0].base}")
    open_run(settings, settings.out, "federate", inputs)
    if run.finished:
        print(f"{run.folder} is finished; nothing to do")
    else:
        with run.recorded():
            run_through(trial)
    say(read_json(run.folder / "result.json", RESULT))
    return run


def run_through(trial: Trial) -> None:
    """Hold the federation, and tell."""
    with Meter("rounds", (1 + len(trial.others)) * trial.settings.federate.rounds) as meter:
        federation = trial.held(FEDERATED, trial.sites, meter)
        write_metrics(trial.run, federation.records)
        trial.finish(federation.order(), federation.records, meter)


# ---------------------------------------------------------------------------------------------- real sites


def announce(settings: FederateConfig) -> None:
    """Write the app for real sites, and say how everybody starts.

    Raises:
        UserError: the configuration leaves open what sites must agree on, or Flower is not installed.
    """
    sites = settings.federate.sites
    if sites is None:
        raise UserError("federate.sites is not set; say how many sites are to take part, e.g. --federate.sites=3")
    split_batch(settings.train, 1)
    vit, _ = read_encoder(settings.finetune.encoder, settings.finetune.image_size)
    app = write_app(Path(settings.out) / "app", make_plan(settings, vit), sites).parent
    print(
        f"wrote {app}; to try it on one machine:\n"
        "server:  miram flower superlink --insecure\n"
        "a site:  miram flower supernode --insecure --superlink 127.0.0.1:8000 --port 9094 "
        "--node-config \"site='SITE.yaml'\"\n"
        f"then:    miram flower flwr run {app} CONNECTION --stream\n"
        "SITE.yaml (name, encoder, data, out) stays at the site; docs/federate.md has the rest, certificates first."
    )
