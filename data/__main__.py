"""`miram data …` and `python -m miram.data …`."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

if not __package__:
    sys.exit("start this with `python -m miram.data …`, not by its file name")

import typer
from rich.console import Console

from ..engine.errors import UserError, exit_code
from .writer import Outcome

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Archives to shards, and what is in them.",
)
console = Console()

Out = Annotated[Path, typer.Argument(help="Folder to write; it must be new, empty, or hold the same data set.")]
Place = Annotated[str, typer.Argument(help="A data set: the folder or URL with manifest.json.")]
Places = Annotated[list[str], typer.Argument(help="Data sets, as folders or URLs.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")]
Key = Annotated[Path | None, typer.Option(help="File with the secret that hides ids; default: your own.")]
Name = Annotated[str | None, typer.Option(help="Of the data set; keeps two archives' equal names apart.")]
Spacing = Annotated[float | None, typer.Option(min=0.001, help="Millimetres a pixel to shrink to; never enlarges.")]
MaxSize = Annotated[int | None, typer.Option(min=16, help="Longest side in pixels to shrink to; never enlarges.")]


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
    source: Annotated[
        str, typer.Argument(help="cbis-ddsm, vindr-mammo, rsna, inbreast, mias, embed, cmmd, busi, or folder.")
    ],
    src: Annotated[Path, typer.Argument(help="Folder that holds the archive's files.")],
    out: Out,
    labels: Annotated[Path | None, typer.Option(help="CSV with a column `file`, or where the tables lie.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of masks named like their images.")] = None,
    mask_kind: Annotated[
        Literal["instances", "classes"], typer.Option(help="What the masks' values number.")
    ] = "instances",
    channels: Annotated[int, typer.Option(help="3 keeps colour.")] = 1,
    level: Annotated[Literal["image", "roi"], typer.Option(help="roi: a square around each finding.")] = "image",
    margin: Annotated[float, typer.Option(min=0, help="Added to each side of such a square, in its sides.")] = 0.0,
    disjoint: Annotated[bool, typer.Option("--disjoint", help="Patients in both official splits go to test.")] = False,
    spacing: Spacing = None,
    max_size: MaxSize = None,
    name: Name = None,
    breast: Annotated[bool | None, typer.Option(help="Isolate the breast; default: as the source says.")] = None,
    for_processing: Annotated[
        bool, typer.Option("--for-processing", help="Take raw FOR PROCESSING images, too.", rich_help_panel="DICOM")
    ] = False,
    any_modality: Annotated[
        bool, typer.Option("--any-modality", help="Take other modalities than MG.", rich_help_panel="DICOM")
    ] = False,
    implants: Annotated[bool, typer.Option(help="Take breasts with implants.", rich_help_panel="DICOM")] = True,
    voi: Annotated[
        Literal["auto", "window", "none"],
        typer.Option(help="auto: LUT, else window; none: grey levels as stored.", rich_help_panel="DICOM"),
    ] = "auto",
    voi_index: Annotated[
        int, typer.Option(min=0, help="Which of several LUTs or windows.", rich_help_panel="DICOM")
    ] = 0,
    burned_in: Annotated[bool, typer.Option("--burned-in", help="Take images with text on the breast.")] = False,
    key: Key = None,
    workers: Workers = None,
    partition: Annotated[str | None, typer.Option(help="i/n: the i-th of n parts; `merge` joins them.")] = None,
) -> None:
    """Turn an archive into shards: breast isolated, ids hashed, grey levels kept. Killed, it goes on where it was."""
    from .archive import SourceOptions
    from .arguments import parse_partition
    from .dicom.reader import DicomOptions
    from .geometry import Size
    from .ingest import ingest
    from .keys import read_secret
    from .sources import read_archive

    if channels not in (1, 3):
        raise UserError(f"--channels {channels}: give 1 or 3")
    dicom = DicomOptions(
        for_processing=for_processing,
        any_modality=any_modality,
        implants=implants,
        burned_in=burned_in,
        voi=voi,
        voi_index=voi_index,
    )
    options = SourceOptions(
        labels=labels,
        masks=masks,
        mask_kind=mask_kind,
        channels=3 if channels == 3 else 1,
        level=level,
        margin=margin,
        disjoint=disjoint,
        dicom=dicom,
    )
    part = parse_partition(partition)
    archive = read_archive(source, src, options)
    breast = archive.breast if breast is None else breast
    archive = replace(archive, dataset=name or archive.dataset, breast=breast, quarantine=not burned_in)
    size = Size(spacing_mm=spacing, max_size=max_size)
    for note in (*archive.notes, *archive.leaks()):
        print(f"miram: {note}", file=sys.stderr)
    report(out, ingest(archive, out, read_secret(key), workers, size=size, part=part))


@app.command("index")
def index_command(
    src: Annotated[str, typer.Argument(help="Folder, tar, URL or a{000..012}.tar: WebDataset shards of others.")],
    out: Out,
    label: Annotated[list[str] | None, typer.Option(help="JSON field to take as a label; may be repeated.")] = None,
    patient: Annotated[str | None, typer.Option(help="JSON field that tells the patient; it is hashed.")] = None,
    name: Name = None,
    key: Key = None,
) -> None:
    """Adopt WebDataset tars without copying them: an index and a manifest beside them."""
    from .foreign.adopt import adopt
    from .keys import read_secret

    outcome = adopt(src, out, labels=tuple(label or ()), dataset=name, patient=patient, secret=read_secret(key))
    report(out, outcome)


@app.command()
def pack(folder: Place, out: Out, spacing: Spacing = None, max_size: MaxSize = None, workers: Workers = None) -> None:
    """Write a data set again with raw pixels: crops are then read row by row, for training at speed."""
    from .derive import derive
    from .geometry import Size

    report(out, derive(folder, out, Size(spacing_mm=spacing, max_size=max_size), packed=True, workers=workers))


@app.command()
def resize(folder: Place, out: Out, spacing: Spacing = None, max_size: MaxSize = None, workers: Workers = None) -> None:
    """Write a data set again with smaller images; masks and marks follow, and the way back is kept."""
    from .derive import derive
    from .geometry import Size

    if (spacing is None) == (max_size is None):
        raise UserError("resize needs one of --spacing and --max-size")
    report(out, derive(folder, out, Size(spacing_mm=spacing, max_size=max_size), packed=False, workers=workers))


@app.command("merge")
def merge_command(
    parts: Annotated[list[Path], typer.Argument(help="The parts that `ingest --partition i/n` wrote, all of them.")],
    out: Out,
) -> None:
    """Join the parts of an array job: the same bytes as one job would have written."""
    from .derive import merge

    report(out, merge(parts, out))


@app.command("verify")
def verify_command(
    folder: Place, samples: Annotated[bool, typer.Option("--samples", help="Decode every sample, too.")] = False
) -> None:
    """Check every shard against the manifest."""
    from .index import read_manifest
    from .verify import verify, verify_samples

    faults = list(verify(folder)) or (list(verify_samples(folder)) if samples else [])
    if faults:
        raise UserError(f"{folder}: {'; '.join(faults)}")
    manifest = read_manifest(folder)
    console.print(f"{folder} is sound: {manifest['index']['samples']} images in {len(manifest['shards'])} shards")


@app.command()
def stats(folder: Place) -> None:
    """Count images, patients, labels; show sizes and grey levels."""
    from .summary import summary

    console.print(summary(folder))


@app.command()
def show(
    folder: Place,
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


@app.command()
def split(
    folders: Places,
    out: Annotated[Path, typer.Option(help="JSON to write; stages take it as data.split_file.")] = Path("split.json"),
    task: Annotated[str | None, typer.Option(help="Label whose classes are divided evenly.")] = None,
    test: Annotated[float, typer.Option(help="Part of the patients for test.")] = 0.2,
    val: Annotated[float, typer.Option(help="Part of the patients for val.")] = 0.0,
    folds: Annotated[int, typer.Option(help="Parts that train is dealt into, for data.fold.")] = 0,
    fractions: Annotated[str, typer.Option(help="Label fractions of train, such as 0.1,0.25.")] = "",
    keep_official: Annotated[
        bool, typer.Option("--keep-official", help="Keep the archive's own test patients.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other patients.")] = 0,
) -> None:
    """Divide patients into train, val and test, into folds and label fractions, and write it down."""
    from .arguments import parse_fractions
    from .divide import describe, make_split, shortages
    from .shards import ShardDataset
    from .splits import read_split

    shards = ShardDataset(folders)
    made = make_split(
        shards.rows,
        task=task,
        seed=seed,
        test=test,
        val=val,
        folds=folds,
        fractions=parse_fractions(fractions),
        keep_official=keep_official,
    )
    if out.exists() and read_split(out) != replace(made, data=shards.population):
        raise UserError(f"{out} is there already and divides otherwise; name another --out, or remove it")
    made.write(out, shards.population)
    console.print(describe(made, shards.rows))
    for sentence in shortages(made, shards.rows):
        print(f"miram: {sentence}", file=sys.stderr)
    console.print(f"wrote {out}")


@app.command()
def duplicates(
    folders: Places,
    threshold: Annotated[int, typer.Option(min=0, max=128, help="Bits of 256 in which a pair may differ.")] = 64,
    split_file: Annotated[Path | None, typer.Option(help="Of `miram data split`; default: the archive's own.")] = None,
) -> None:
    """Find images that look alike across data sets, splits or patients, mirrored ones too."""
    from .duplicates import near_duplicates, summary, table
    from .index import read_index
    from .splits import read_split

    rows = [row for folder in folders for row in read_index(folder)]
    sides = read_split(split_file).sides(rows) if split_file else None
    pairs = near_duplicates(rows, threshold, sides)
    for line in summary(rows, pairs, threshold):
        console.print(line)
    if pairs:
        console.print(table(rows, pairs))


@app.command("nnunet")
def nnunet_command(
    folders: Places,
    out: Annotated[Path, typer.Argument(help="The folder that nnU-Net calls nnUNet_raw.")],
    number: Annotated[int, typer.Option("--id", min=1, max=999, help="Of the data set there.")] = 501,
    name: Annotated[str, typer.Option(help="Of the data set there.")] = "Lesions",
    classes: Annotated[
        str | None, typer.Option(help="Of masks of classes: background=0,fat=128,gland=192+255,ignored=64.")
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Parts of the patients to validate on in turn.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other folds.")] = 0,
    split_file: Annotated[Path | None, typer.Option(help="Of `miram data split`; default: the archive's own.")] = None,
) -> None:
    """Write images and masks for nnU-Net v2, with folds of whole patients."""
    from .arguments import parse_classes
    from .nnunet import export

    named = parse_classes(classes)
    done = export(folders, out, number=number, name=name, classes=named, folds=folds, seed=seed, split_file=split_file)
    for note in done.notes:
        print(f"miram: {note}", file=sys.stderr)
    print(done.summary())


@app.command("audit")
def audit_command(
    folder: Annotated[Path, typer.Argument(help="A data set, a run, or a folder of such.")],
    source: Annotated[Path | None, typer.Option(help="The archive it was made of: search for its values.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="Text that is no finding; may be repeated.")] = None,
) -> None:
    """Search everything written, decompressed, for what could tell whose images these are."""
    from .audit.look import Searched, audit

    searched = Searched()
    findings = list(audit(folder, source, allow or (), searched))
    for finding in findings[:100]:
        print(finding, file=sys.stderr)
    if findings:
        raise UserError(f"{folder} holds {len(findings)} things that may tell whose images these are; do not share it")
    console.print(f"{folder}: {searched}")


def report(out: Path, outcome: Outcome) -> None:
    """Say what was written, and what was left out and why."""
    from .ingest import skipped_file

    few = len(outcome.skipped) <= 5
    for name, reason in outcome.skipped.items() if few else ():
        print(f"miram: left out {name}: {reason}", file=sys.stderr)
    for reason, n in Counter(outcome.skipped.values()).most_common(0 if few else 10):
        print(f"miram: left out {n}: {reason}", file=sys.stderr)
    for remark, n in Counter(outcome.remarks.values()).most_common():
        print(f"miram: {n} images are in, but {remark}", file=sys.stderr)
    if outcome.skipped or outcome.remarks:
        print(f"miram: all of them: {skipped_file(out)} (it names your files; keep it)", file=sys.stderr)
    said = "already holds this data set:" if outcome.unchanged else "holds"
    left_out = f", {len(outcome.skipped)} left out" if outcome.skipped else ""
    print(f"{out} {said} {outcome.samples} images{left_out}")


if __name__ == "__main__":
    sys.exit(exit_code(app))
