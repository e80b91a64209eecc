"""The `miram` command: one sub-command a stage."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

if not __package__:
    sys.exit("start this with `miram …` or `python -m miram …`, not by its file name")

import typer

from .data.__main__ import app as data_app
from .engine.command import run_stage
from .engine.errors import UserError, exit_code
from .version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="High-resolution self-supervised pretraining for mammography on the hardware people have.",
)
app.add_typer(data_app, name="data")

# A stage reads its own arguments, --help among them: its keys are those of its configuration.
STAGE = {"allow_extra_args": True, "ignore_unknown_options": True}


def show_version(asked: bool) -> None:
    """Print the version and stop."""
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    asked: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """What may come before the sub-command."""


@app.command(context_settings=STAGE, add_help_option=False)
def pretrain(context: typer.Context) -> None:
    """Train an encoder: CONFIG --section.key=value …; --dry-run takes one step; --help lists the keys."""
    from .pretrain.__main__ import start

    start("miram pretrain", context.args)


@app.command(context_settings=STAGE, add_help_option=False)
def probe(context: typer.Context) -> None:
    """Probe a frozen encoder: CONFIG --section.key=value …; --help lists the keys."""
    from .finetune.config import ProbeConfig
    from .finetune.probe import probe as stage

    run_stage("miram probe", ProbeConfig, stage, context.args)


@app.command(context_settings=STAGE, add_help_option=False)
def finetune(context: typer.Context) -> None:
    """Tune an encoder for classification: CONFIG --section.key=value …; --sweep compares methods; --help lists keys."""
    from .finetune.__main__ import start

    start("miram finetune", context.args)


@app.command(context_settings=STAGE, add_help_option=False)
def segment(context: typer.Context) -> None:
    """Train and judge a segmentation: CONFIG --section.key=value …; --sweep compares models; --help lists keys."""
    from .finetune.segment.__main__ import start

    start("miram segment", context.args)


@app.command(context_settings=STAGE, add_help_option=False)
def distill(context: typer.Context) -> None:
    """Train a small model to do as a large one does: CONFIG --section.key=value …; --help lists keys."""
    from .finetune.distill.__main__ import start

    start("miram distill", context.args)


@app.command(context_settings=STAGE, add_help_option=False)
def federate(context: typer.Context) -> None:
    """Tune on sites whose images stay where they are: CONFIG --section.key=value …; --flower for real sites."""
    from .finetune.federate.__main__ import start

    start("miram federate", context.args)


@app.command(context_settings=STAGE | {"help_option_names": []})
def flower(
    context: typer.Context, program: Annotated[str, typer.Argument(help="superlink, supernode or flwr.")] = ""
) -> None:
    """Flower's own programs, without telemetry: superlink (server), supernode (site), flwr (run, ls, log, stop)."""
    from .finetune.federate.flower import launch

    if program in ("-h", "--help"):
        print(context.get_help())
    else:
        launch([program, *context.args])


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run of `miram finetune` or `miram segment`.")],
    images: Annotated[list[str], typer.Argument(help="DICOM files or pictures, folders of them, data sets.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write, .csv (or .json, not of masks); default: print CSV.")
    ] = None,
    explain: Annotated[
        Path | None, typer.Option(help="Folder for pictures: what decisions rest on, or outlines of what is found.")
    ] = None,
    masks: Annotated[Path | None, typer.Option(help="Of a segmentation: folder for the masks.")] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="Of masks, beside PNG and JSON: nifti, dicom-seg.")
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="Where the encoder lies, if it was moved.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images judged at once (64), or tiles of a segmentation (8).")
    ] = None,
    bits: Annotated[int | None, typer.Option(min=1, max=16, help="That 16-bit pictures really hold.")] = None,
    spacing: Annotated[
        float | None,
        typer.Option(min=0.001, help="Millimetres a pixel of pictures, and of DICOM files that do not say it."),
    ] = None,
    any_modality: Annotated[bool, typer.Option("--any-modality", help="Take other modalities than MG.")] = False,
    for_processing: Annotated[bool, typer.Option("--for-processing", help="Take raw images, too.")] = False,
    burned_in: Annotated[bool, typer.Option("--burned-in", help="Take images with text on the breast.")] = False,
) -> None:
    """Judge your own images with a tuned model: probability, decision, threshold, model; or masks of what it finds."""
    from .finetune.films import Taking
    from .finetune.sealed import stage_of

    taking = Taking(
        bits=bits, spacing_mm=spacing, any_modality=any_modality, for_processing=for_processing, burned_in=burned_in
    )
    if stage_of(run) == "segment":
        from .finetune.segment.predict import predict as segment

        if masks is None:
            raise UserError(f"{run} is a segmentation: say with --masks which folder its masks go to")
        segment(run, images, masks, formats or (), out, explain, encoder, batch_size or 8, taking)
    elif stage_of(run) == "finetune" and (masks is not None or formats):
        raise UserError(f"{run} makes no masks; leave out --masks and --format, or name a run of `miram segment`")
    else:
        from .finetune.predict import predict as judge

        judge(run, images, out, explain, encoder, batch_size or 64, taking)


@app.command(context_settings=STAGE, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """A tuned model, locked, on another set: RUN --data.shards=OTHER …; --help lists the keys."""
    from .finetune.evaluate import evaluate as stage
    from .finetune.evaluate import usage

    if "--help" in context.args or "-h" in context.args:
        print(usage())
    elif not context.args or context.args[0].startswith("-"):
        raise UserError("name a run first: miram evaluate RUN --data.shards=OTHER …")
    else:
        stage(context.args[0], context.args[1:])


@app.command(context_settings=STAGE, add_help_option=False)
def plan(
    context: typer.Context,
    no_time: Annotated[bool, typer.Option("--no-time", help="Time nothing.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    """What a pretraining costs, before it starts: CONFIG --section.key=value …; --no-time, --json FILE."""
    from functools import partial

    from .pretrain.config import PretrainConfig
    from .pretrain.plan import plan as stage

    if json is not None and str(json).startswith("-"):
        raise UserError(f"--json: name a file for the figures; {str(json)!r} came after it")
    about = [
        "Says what a pretraining with this configuration would cost: operations, memory, and every attention's share.",
        "It starts no training and opens no data.",
        "",
        "  --no-time    time no attention on this machine, only count",
        "  --json FILE  write the figures there, too",
    ]
    run_stage("miram plan", PretrainConfig, partial(stage, timed=not no_time, json=json), context.args, about)


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="Weights: .pth, .safetensors, or a folder of the Hugging Face hub.")],
    out: Annotated[Path, typer.Argument(help="Folder for encoder.safetensors and encoder.json.")],
    image_size: Annotated[
        str | None, typer.Option(help="448, or 512x256 for height and width; default: its own.")
    ] = None,
    channels: Annotated[
        int, typer.Option(min=1, help="1: colours are summed so that grey pictures give the same.")
    ] = 1,
    architecture: Annotated[str | None, typer.Option(help="timm's name, where shapes do not tell it.")] = None,
) -> None:
    """Foreign weights to an encoder of ours, with a report of every key."""
    from .pretrain.weights.convert import convert as run

    print("\n".join(run(file, out, image_size, channels, architecture)))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run of any stage that trains, its model's folder, or an encoder.")],
    to: Annotated[str, typer.Option(help="timm, hf, onnx or int8.")],
    out: Annotated[Path | None, typer.Option(help="Folder to make; default: RUN/export/FORMAT.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Where the encoder lies, if it was moved.")] = None,
    merge_tokens: Annotated[
        str | None, typer.Option(help="Of onnx: tokens merged a block (8), or their share, up to 0.5 (0.1).")
    ] = None,
    margin: Annotated[
        float, typer.Option(min=0, help="Most that the leading figure may fall by, for int8 and merged tokens.")
    ] = 0.01,
    data: Annotated[
        list[str] | None, typer.Option(help="Labelled data set to measure it on; default: the run's own test.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of that data set.")] = None,
    task: Annotated[str | None, typer.Option(help="Label of it; of an encoder, what a probe predicts.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images judged at once.")] = 64,
) -> None:
    """A finished model in another format, checked against itself, with a card: timm, hf, onnx or int8."""
    from .finetune.export.stage import export as stage
    from .finetune.export.stage import merging

    stage(
        run, to, out, encoder=encoder, merge_tokens=merging(merge_tokens), margin=margin, data=data, split=split,
        task=task, batch_size=batch_size,
    )  # fmt: skip


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path | None, typer.Option(help="Page to write; default: report.html in the first run.")] = None,
) -> None:
    """One HTML page: figures with intervals, curves, pictures."""
    from .engine.report import write_report

    print(f"wrote {write_report(runs, out or runs[0] / 'report.html')}")


@app.command(context_settings=STAGE)
def config(
    context: typer.Context, stage: Annotated[str, typer.Argument(help="Preset or YAML file of a stage.")]
) -> None:
    """Print a configuration as a run would resolve it: CONFIG --section.key=value …"""
    from .engine.config import Section, dump_yaml, load, read_tree
    from .finetune.classify.config import FinetuneConfig
    from .finetune.config import ProbeConfig
    from .finetune.distill.config import DistillConfig
    from .finetune.federate.config import FederateConfig
    from .finetune.segment.config import SegmentConfig
    from .paper.config import PaperConfig
    from .pretrain.config import PretrainConfig

    kinds: dict[str, type[Section]] = {
        "pretrain": PaperConfig,
        "probe": ProbeConfig,
        "distill": DistillConfig,
        "federate": FederateConfig,
        "finetune": FinetuneConfig,
        "segment": SegmentConfig,
    }
    tree = read_tree(stage)
    schema = next((kind for section, kind in kinds.items() if section in tree), PretrainConfig)
    print(dump_yaml(load(schema, stage, context.args)), end="")


@app.command()
def demo(
    data: Annotated[
        Path | None, typer.Option(help="A data set of your own; default: phantoms made on the spot.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Label to probe; default: the first that fits.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for all of it; default: runs/demo[-DATA][-TASK].")] = None,
) -> None:
    """Phantoms, shards, pretraining, probe, report: the whole path in minutes."""
    from .demo import default_out, run_demo

    run_demo(data, task, out or default_out(data, task))


@app.command(context_settings=STAGE, add_help_option=False)
def paper(context: typer.Context) -> None:
    """The paper's experiment, every pretraining and fine-tuning in one table: CONFIG --section.key=value …"""
    from functools import partial

    from .engine.signals import StopSignals

    with StopSignals() as signals:
        from .paper.config import PaperConfig
        from .paper.stage import ABOUT
        from .paper.stage import paper as stage

        run_stage("miram paper", PaperConfig, partial(stage, signals=signals), context.args, ABOUT)


def main() -> None:
    """Run the command; its exit code says how it ended."""
    sys.exit(exit_code(app))


if __name__ == "__main__":
    main()
