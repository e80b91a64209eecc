"""`miram data …` and `python -m miram.data …`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

if not __package__:
    sys.exit("start this with `python -m miram.data …`, not by its file name")

import typer
from rich.console import Console

from ..engine.errors import UserError, exit_code
from .ingest import Archive, Outcome, ingest
from .keys import read_secret

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Archives to shards, and what is in them.",
)
console = Console()

Out = Annotated[Path, typer.Argument(help="Folder to write; it must be new, empty, or hold the same data set.")]
Folder = Annotated[Path, typer.Argument(help="A data set: the folder with manifest.json.")]
Workers = Annotated[int | None, typer.Option(help="Processes; default: one a core.")]


@app.command()
def phantom(
    out: Out,
    patients: Annotated[int, typer.Option(min=1, help="Patients, four images each.")] = 100,
    size: Annotated[int, typer.Option(min=64, help="Height of a film in pixels.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other patients.")] = 0,
    contrast: Annotated[float, typer.Option(min=0, help="Of the lesions; lower is harder.")] = 1.0,
    workers: Workers = None,
) -> None:
    """Make synthetic mammograms with labels and masks, split by patient into train and test."""
    from .phantom import PhantomSettings
    from .sources.phantom import make_phantoms

    settings = PhantomSettings(size=size, seed=seed, contrast=contrast)
    report(out, make_phantoms(out, patients, settings, workers))


@app.command("ingest")
def ingest_command(
    source: Annotated[str, typer.Argument(help="mias, or folder.")],
    src: Annotated[Path, typer.Argument(help="Folder that holds the archive's files.")],
    out: Out,
    labels: Annotated[Path | None, typer.Option(help="CSV with a column `file` and what is known of each.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the data set; keeps two archives' equal names apart.")] = None,
    breast: Annotated[bool | None, typer.Option(help="Isolate the breast; default: as the source says.")] = None,
    key: Annotated[Path | None, typer.Option(help="File with the secret that hides ids; default: your own.")] = None,
    workers: Workers = None,
) -> None:
    """Turn an archive into shards: breast isolated, ids hashed, grey levels kept."""
    from dataclasses import replace

    from .sources import read_archive

    archive = read_archive(source, src, labels)
    archive = replace(archive, dataset=name or archive.dataset, breast=archive.breast if breast is None else breast)
    report(out, ingest(archive, out, read_secret(key), workers), archive)


@app.command("verify")
def verify_command(folder: Folder) -> None:
    """Check every shard against the manifest."""
    from .shards import read_manifest, verify

    faults = list(verify(folder))
    if faults:
        raise UserError(f"{folder}: {'; '.join(faults)}")
    manifest = read_manifest(folder)
    console.print(f"{folder} is sound: {manifest['index']['samples']} images in {len(manifest['shards'])} shards")


@app.command()
def stats(folder: Folder) -> None:
    """Count images, patients, labels; show sizes and grey levels."""
    from .summary import summary

    console.print(summary(folder))


@app.command()
def show(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("contact-sheet.png"),
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Images on the sheet.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other images.")] = 0,
) -> None:
    """Draw a contact sheet with findings marked."""
    from .gallery import contact_sheet
    from .shards import ShardDataset

    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} must end in .png")
    contact_sheet(ShardDataset(folder), out, count, seed=seed)
    console.print(f"wrote {out}")


def report(out: Path, outcome: Outcome, archive: Archive | None = None) -> None:
    """Say what an ingest did; name what it left out."""
    for note in archive.notes if archive else ():
        print(f"miram: {note}", file=sys.stderr)
    for name, reason in outcome.skipped.items():
        print(f"miram: left out {name}: {reason}", file=sys.stderr)
    said = "already holds this data set:" if outcome.unchanged else "holds"
    left_out = f", {len(outcome.skipped)} left out" if outcome.skipped else ""
    print(f"{out} {said} {outcome.samples} images{left_out}")


if __name__ == "__main__":
    sys.exit(exit_code(app))
