"""`miram export RUN --to FORMAT`: a finished run as a folder that others load without miram.

RUN/export/FORMAT/    the format's files, README.md and export.json (card.py); whole, or not there

    timm    timm_folder.py       encoder, classifier on a plain ViT
    hf      hugging_face.py      the same
    onnx    onnx_file.py         all; also with merged tokens
    int8    int8.py              all; for ONNX Runtime and for torch

What was written is read back and compared with its source before the folder takes its place. An export that computes
something else on purpose (int8, merged tokens) is measured on labelled images, and refused where it lost too much.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ...data.config import DataSection
from ...data.opening import open_shards
from ...data.shards import ShardDataset
from ...data.views import Normalisation
from ...engine.errors import UserError, did_you_mean
from ...engine.files import read_json
from ..sealed import whole_folder
from .card import CARD, EXPORT, release_of, write_card
from .guard import Change, NotMeasured, change_of, refuse_worse
from .hugging_face import write_hf
from .int8 import ENGINES, write_int8
from .licences import forbids, home_of, shards_of
from .onnx_file import write_onnx
from .parity import Parity, Written, inputs_for, parity, refuse_other
from .source import Source, read_source
from .timm_folder import write_timm

FORMATS = ("timm", "hf", "onnx", "int8")


@dataclass(frozen=True)
class Asked:
    """Where a change is measured, and how large it may be."""

    run: Path
    data: Sequence[str] | None
    split: str | None
    task: str | None
    margin: float
    batch_size: int


def export(
    run: str | Path,
    to: str,
    out: Path | None = None,
    *,
    encoder: str | None = None,
    merge_tokens: int | float | None = None,
    margin: float = 0.01,
    data: Sequence[str] | None = None,
    split: str | None = None,
    task: str | None = None,
    batch_size: int = 64,
) -> Path:
    """Write a run's network in another format.

    Args:
        run: of pretrain, distill, finetune, federate or segment; a copied model's folder; what `miram convert` wrote.
        to: timm, hf, onnx or int8.
        out: folder to write; None: RUN/export/FORMAT.
        encoder: where a tuned model's encoder now lies, if no longer where the run found it.
        merge_tokens: of onnx: tokens that every block merges, or the share of them below 1.
        margin: by so much the figure of an int8 or merged network may fall.
        data: labelled images to measure that on; None: those of the run that it did not learn from.
        split: of the data; None: all.
        task: label to judge by; None: the model's own.
        batch_size: images at once, when that is measured.

    Returns:
        The folder.

    Raises:
        UserError: the run, its encoder or the data is not usable, or the format cannot hold the network.
        RunFailed: what was written computes something else, or lost more than the margin; nothing is left of it.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to}: no such format{did_you_mean(to, list(FORMATS))}")
    if merge_tokens is not None and to != "onnx":
        raise UserError("--merge-tokens goes with --to onnx only; leave it out")
    source = read_source(run, encoder)
    form = to if merge_tokens is None else f"{to}-merged-{merge_tokens:g}"
    home = home_of(Path(run))
    folder = out or home / "export" / form
    refuse_taken(folder, source, ours=out is None)
    asked = Asked(Path(run), data, split, task, margin, batch_size)
    shards = shards_of(home) if data is None else open_shards(DataSection(shards=[*data], split=split))
    with whole(folder) as part:
        done = [examined(source, one, shards, asked) for one in written(source, to, part, merge_tokens)]
        finish(part, source, form, done)
    tell(folder, source, done)
    return folder


def merging(text: str | None) -> int | float | None:
    """`8`: tokens a block; `0.1`: their share.

    Raises:
        UserError: it is neither.
    """
    if text is None:
        return None
    try:
        found = int(text) if text.isdecimal() else float(text)
    except ValueError:
        found = -1.0
    if found < 0 or (isinstance(found, float) and found >= 1):
        raise UserError(f"--merge-tokens {text}: give whole tokens a block, as 8, or a share below 1, as 0.1")
    return found


def written(source: Source, to: str, folder: Path, merge_tokens: int | float | None) -> list[Written]:
    """Write the files of a format.

    Raises:
        UserError: it cannot hold the network.
    """
    if to == "int8":
        return [write_int8(source, folder, engine) for engine in ENGINES]
    if to == "onnx":
        return [write_onnx(source, folder, merge_tokens)]
    return [{"timm": write_timm, "hf": write_hf}[to](source, folder)]


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that appears whole; folders that were made for it go with it where it does not."""
    above = [parent for parent in folder.absolute().parents if not parent.exists()]
    try:
        with whole_folder(folder) as part:
            yield part
    except BaseException:
        with suppress(OSError):  # another export may be at work beside this one
            for parent in above:
                parent.rmdir()
        raise


def refuse_taken(folder: Path, source: Source, ours: bool) -> None:
    """Refuse to replace what is no earlier export of the same weights; `ours`: the run's own place for it.

    Raises:
        UserError: says what is there.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / CARD).is_file():
        raise UserError(f"{folder} is there and no export of miram; name another folder with --out")
    digest = read_json(folder / CARD, EXPORT)["source"]["digest"]
    if digest != source.digest and not ours:
        raise UserError(f"{folder} holds the export of other weights ({digest[:12]}); name another folder with --out")


# ---------------------------------------------------------------------------------------------- examining it


@dataclass(frozen=True)
class Done:
    """What was written and what came of looking at it."""

    written: Written
    parity: Parity | None
    change: Change | None
    why_not: str = ""


def examined(source: Source, one: Written, shards: ShardDataset | None, asked: Asked) -> Done:
    """Compare what was written with its source, and measure what a change that is meant does.

    Raises:
        UserError: merged tokens cannot be measured.
        RunFailed: it computes something else, or lost more than the margin.
    """
    found = None
    if one.runner is not None:
        normalise = Normalisation(source.mean, source.std)
        inputs = inputs_for(source.channels, source.image_size, normalise, shards)
        found = parity(one.reference or source.module, one.runner, inputs, one.tolerance)
        refuse_other(found, one.files[0])
    if one.tolerance is not None or one.runner is None:
        return Done(one, found, None)
    try:
        change = change_of(
            source,
            asked.run,
            source.module,
            one.runner,
            asked.data,
            asked.split,
            asked.task,
            batch_size=asked.batch_size,
        )
    except NotMeasured as why:
        if "onnx" in one.facts:
            raise
        return Done(one, found, None, str(why))
    refuse_worse(change, asked.margin, one.files[0])
    return Done(one, found, change)


def finish(folder: Path, source: Source, form: str, done: Sequence[Done]) -> None:
    """Write the cards; of several engines, what leads is the worst."""
    files = [name for one in done for name in one.written.files]
    notes = [note for one in done for note in (*one.written.notes, *unmeasured(one))]
    facts = {key: value for one in done for key, value in one.written.facts.items()}
    if len(done) > 1:
        facts["each"] = {one.written.files[0]: facts_of(one) for one in done}
    first = replace(done[0].written, files=files, notes=notes, facts=facts)
    compared = [one.parity for one in done if one.parity]
    worst = max(compared, key=lambda parity: parity.largest_difference, default=None)
    changes = [one.change for one in done if one.change]
    lost = min(changes, key=lambda change: change.difference.value, default=None)
    said = [f"{one.written.files[0]}: {one.change.sentence}" for one in done if one.change]
    write_card(folder, source, form, first, worst, None if lost is None else lost.facts, said)


def unmeasured(one: Done) -> list[str]:
    """That nobody knows what a change does, and why."""
    # the reason may name places, which are for the screen alone
    return [f"What {one.written.files[0]} changes was not measured on images."] if one.why_not else []


def facts_of(one: Done) -> Mapping[str, object]:
    """One engine's figures for export.json."""
    off = None if one.parity is None else one.parity.largest_difference
    return {"largest_difference": off, "accuracy": None if one.change is None else one.change.facts}


def tell(folder: Path, source: Source, done: Sequence[Done]) -> None:
    """Say on the screen what was written, how far it is from its source, and what must not be done with it."""
    for one in done:
        off = "" if one.parity is None else f", outputs within {one.parity.largest_difference:.3g} of the source's"
        print(f"wrote {folder / one.written.files[0]}: {source.kind}{off}")
        if one.change is not None:
            print(f"miram: {one.change.sentence}")
        elif one.why_not:
            print(f"miram: {one.written.files[0]}: the change was not measured: {one.why_not}")
    if any(map(forbids, source.licences)):
        print(f"miram: {release_of(source)}")
