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

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...data.config import DataSection
from ...data.opening import open_shards
from ...data.shards import ShardDataset
from ...data.views import Normalisation
from ...engine.errors import RunFailed, UserError, did_you_mean
from ...engine.files import read_json
from ..sealed import whole_folder
from .card import CARD, EXPORT, README, release_of, write_card
from .guard import Change, Guard, NotMeasured, refuse_worse
from .hugging_face import write_hf
from .int8 import ENGINES, write_int8
from .licences import forbids, home_of, shards_of
from .onnx_file import refuse_lacking, write_onnx
from .parity import Agreement, Parity, Written, agreement, inputs_for, parity, refuse_other
from .source import Source, read_source
from .timm_folder import write_timm

FORMATS = ("timm", "hf", "onnx", "int8")


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
        merge_tokens: of onnx: tokens that every block merges, or the share of them up to 0.5.
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
    if not 0 <= margin < math.inf:
        raise UserError(f"--margin {margin:g}: give a number from 0 up, as 0.01")
    if to not in FORMATS:
        raise UserError(f"--to {to}: no such format{did_you_mean(to, list(FORMATS))}")
    if merge_tokens is not None and to != "onnx":
        raise UserError("--merge-tokens goes with --to onnx only; leave it out")
    source = read_source(run, encoder)
    form = to if merge_tokens is None else f"{to}-merged-{merge_tokens:g}"
    home = home_of(Path(run))
    folder = home / "export" / form if out is None else out.absolute()
    refuse_place(folder)
    refuse_taken(folder, source, ours=out is None)
    shards = shards_of(home) if data is None else open_shards(DataSection(shards=[*data], split=split))
    guard = Guard(source, run, data, split, task, batch_size=batch_size)
    with whole(folder) as part:
        done = [examined(source, one, shards, guard) for one in written(source, to, part, merge_tokens)]
        kept = within_margin(part, done, margin)
        finish(part, source, form, kept, [one for one in done if one not in kept])
    tell(folder, source, done, kept)
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
    if not (0 <= found <= 0.5 if isinstance(found, float) else found >= 0):
        raise UserError(f"--merge-tokens {text}: give whole tokens a block, as 8, or a share up to 0.5, as 0.1")
    return found


def written(source: Source, to: str, folder: Path, merge_tokens: int | float | None) -> list[Written]:
    """Write the files of a format.

    Raises:
        UserError: it cannot hold the network.
    """
    if to == "int8":
        refuse_lacking("onnx", "compress")
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


def refuse_place(folder: Path) -> None:
    """Refuse what cannot be a folder of the export's own: it is renamed into its place.

    Raises:
        UserError: it is a link, or the working folder is inside it.
    """
    if folder.is_symlink():
        raise UserError(f"{folder} is a link; name the folder itself with --out")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(f"{folder} is the folder you are in, or above it; name one to make with --out")


def refuse_taken(folder: Path, source: Source, ours: bool) -> None:
    """Refuse to replace what is no earlier export of the same weights; `ours`: the run's own place for it.

    Raises:
        UserError: says what is there.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    earlier = earlier_export(folder)
    if earlier is None:
        raise UserError(f"{folder} is there and no export of miram; name another folder with --out")
    digest, files = earlier
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
    if others := sorted(there - {*files, CARD, README}):
        raise UserError(
            f"{folder} holds what no export of miram wrote ({', '.join(others[:4])}); move it, or name another folder "
            "with --out"
        )
    if digest != source.digest and not ours:
        raise UserError(f"{folder} holds the export of other weights ({digest[:12]}); name another folder with --out")


def earlier_export(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Digest of the weights that an export is of, and its files; None where its card does not say."""
    try:
        content = read_json(folder / CARD, EXPORT)
    except UserError:
        return None
    source, files = content.get("source"), content.get("files")
    digest = source.get("digest") if isinstance(source, dict) else None
    return (digest, files) if isinstance(digest, str) and isinstance(files, dict) else None


# ---------------------------------------------------------------------------------------------- examining it


@dataclass(frozen=True)
class Done:
    """What one exporter wrote, and what came of looking at it.

    Attributes:
        written: the files.
        parity: with the source; None where nothing here can run them.
        agreement: of merged tokens, with the same merging in torch.
        change: of the task's figure, where one is meant and could be measured.
        why_not: why it could not.
    """

    written: Written
    parity: Parity | None = None
    agreement: Agreement | None = None
    change: Change | None = None
    why_not: str = ""

    @property
    def name(self) -> str:
        """The file that leads."""
        return self.written.files[0]

    @property
    def sentences(self) -> list[str]:
        """For the card."""
        found = [] if self.agreement is None else [f"{self.name}: {self.agreement.sentence}"]
        if self.why_not:  # the reason may name places, which are for the screen alone
            return [*found, f"{self.name}: what it changes was not measured on labelled images."]
        return found if self.change is None else [*found, f"{self.name}: {self.change.sentence}"]

    @property
    def facts(self) -> dict[str, object]:
        """For export.json."""
        found = {"largest_difference": None if self.parity is None else self.parity.largest_difference}
        change = {"accuracy": None if self.change is None else self.change.facts}
        return found | change | ({} if self.agreement is None else {"same_merging_in_torch": asdict(self.agreement)})


def examined(source: Source, one: Written, shards: ShardDataset | None, guard: Guard) -> Done:
    """Compare what was written with its source, and measure what a change that is meant does.

    Raises:
        UserError: merged tokens cannot be measured.
        RunFailed: it computes something else.
    """
    if one.runner is None:
        return Done(one)
    inputs = inputs_for(source.channels, source.image_size, Normalisation(source.mean, source.std), shards)
    found = parity(one.reference or source.module, one.runner, inputs, one.tolerance)
    refuse_other(found, one.files[0])
    if one.tolerance is not None:
        return Done(one, found)
    same = None if one.twin is None else agreement(one.twin, one.runner, inputs)
    try:
        return Done(one, found, same, guard.change(one.runner))
    except NotMeasured as why:
        if one.twin is not None:
            raise
        return Done(one, found, why_not=str(why))


def within_margin(folder: Path, done: Sequence[Done], margin: float) -> list[Done]:
    """Those that lost no more than they may; the files of the others are removed.

    Raises:
        RunFailed: there are none.
    """
    kept, refused = [], None
    for one in done:
        try:
            if one.change is not None:
                refuse_worse(one.change, margin, one.name)
            kept.append(one)
        except RunFailed as error:
            refused = error
            for name in one.written.files:
                (folder / name).unlink()
    if refused is not None and not kept:
        raise refused
    return kept


def finish(folder: Path, source: Source, form: str, done: Sequence[Done], refused: Sequence[Done]) -> None:
    """Write the cards; of several engines, what leads is the worst."""
    first = replace(
        done[0].written,
        files=[name for one in done for name in one.written.files],
        notes=[note for one in done for note in one.written.notes] + [left_out(one) for one in refused],
        facts={key: value for one in done for key, value in one.written.facts.items()}
        | {"each": {one.name: one.facts for one in done}},
        usage="\n".join(one.written.usage.strip() for one in done),
    )
    worst = max((one.parity for one in done if one.parity), key=lambda of: of.largest_difference, default=None)
    lost = min((one.change for one in done if one.change), key=lambda of: of.difference.value, default=None)
    said = [sentence for one in done for sentence in one.sentences]
    write_card(folder, source, form, first, worst, None if lost is None else lost.facts, said)


def left_out(one: Done) -> str:
    """That a file lost too much."""
    assert one.change is not None
    return f"{one.name} was made and left out, as it lost more than it may: {one.change.sentence}"


def tell(folder: Path, source: Source, done: Sequence[Done], kept: Sequence[Done]) -> None:
    """Say on the screen what was written, how far it is from its source, and what must not be done with it."""
    print(f"wrote {folder}: {source.kind}, {sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.1f} MB")
    for one in done:
        if one not in kept:
            print(f"miram: {left_out(one)}")
            continue
        if one.parity is not None:
            print(f"miram: {one.name}: {off_by(one.parity)}")
        if one.agreement is not None:
            print(f"miram: {one.agreement.sentence}")
        if one.change is not None:
            print(f"miram: {one.change.sentence}")
        elif one.why_not:
            print(f"miram: {one.name}: the change was not measured: {one.why_not}")
    if any(map(forbids, source.licences)):
        print(f"miram: {release_of(source)}")


def off_by(found: Parity) -> str:
    """How far outputs are from the source's, in words."""
    far = f"by up to {found.largest_difference:.3g}, which is meant"
    near = f"by {found.largest_difference:.3g} at most, of {found.tolerance or 0:.3g} that rounding may do"
    return f"outputs up to {found.largest_output:.3g} differ {far if found.tolerance is None else near}"
