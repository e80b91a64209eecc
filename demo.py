"""The whole path in minutes: phantoms, shards, pretraining, probe, report. The one place that calls every stage."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from .data.phantom import PhantomSettings
from .data.shards import ShardDataset
from .data.sources.phantom import make_phantoms
from .engine.config import load
from .engine.errors import UserError
from .engine.report import write_report
from .engine.run import Run
from .engine.track import console
from .finetune.config import ProbeConfig
from .finetune.probe import probe
from .finetune.task import outer_folds, read_task
from .pretrain.config import PretrainConfig
from .pretrain.stage import pretrain

PATIENTS, SIZE = 200, 480  # half of the patients to pretrain on, half to probe
SEED = 2026  # other phantoms than the preset was tuned on


def run_demo(data: Path | None, task: str | None, out: Path) -> None:
    """Run every stage into `out`, on phantoms or on a data set of the user's; what is finished is not run again.

    Raises:
        UserError: the data set is not usable.
    """
    shards = data or phantoms(out / "shards")
    if data is not None:
        task = task or choose_task(ShardDataset(shards))
    pretrained = pretrain_on(shards, out / "pretrain")
    probed = [probe_on(shards, pretrained, task, out / "probe", own=data is not None)] if task or data is None else []
    page = write_report([run.folder for run in (*probed, pretrained)], out / "report.html", title="miram demo")
    console.print("[bold]4/4[/bold] report")
    if not probed:
        print("No label of the data has two classes and enough patients of each to probe; --task NAME says why.")
    print(f"report: {page}")


def default_out(data: Path | None, task: str | None) -> Path:
    """A folder of its own for every data set and task, so that one demo does not stand in another's way."""
    parts = ["demo", *([data.resolve().name] if data else []), *([task] if task else [])]
    return Path("runs") / "-".join(parts)


def phantoms(out: Path) -> Path:
    """The demo's data set."""
    console.print(f"[bold]1/4[/bold] phantoms of {PATIENTS} patients")
    make_phantoms(out, PATIENTS, PhantomSettings(size=SIZE, seed=SEED))
    return out


def pretrain_on(shards: Path, out: Path) -> Run:
    """Pretrain with the demo's preset; a small data set gets a small batch."""
    console.print("[bold]2/4[/bold] pretraining: masked patches, reconstructed at two scales")
    arguments = [f"--data.shards={shards}", f"--out={out}"]
    wanted = load(PretrainConfig, "pretrain/demo").train.batch_size
    available = len(ShardDataset(shards, "train"))
    return pretrain("pretrain/demo", [*arguments, f"--train.batch_size={min(wanted, available)}"])


def probe_on(shards: Path, pretrained: Run, task: str | None, out: Path, own: bool) -> Run:
    """Probe with the demo's preset; of the user's own data all labelled images, by their official split if any."""
    console.print("[bold]3/4[/bold] linear probe of frozen features, against random weights")
    arguments = [f"--data.shards={shards}", f"--probe.encoder={pretrained.folder}", f"--out={out}"]
    arguments += [f"--data.task={task}"] if task else []
    return probe("probe/demo", [*arguments, *(["--data.split=null"] if own else [])])


def choose_task(shards: ShardDataset) -> str | None:
    """The first label that the probe would take."""
    folds = load(ProbeConfig, "probe/demo").probe.folds
    for name in shards.tasks:
        with suppress(UserError):
            outer_folds(read_task(shards, name), folds, seed=0)
            return name
    return None
