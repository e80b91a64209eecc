"""WebDataset tars of other people as a data set of ours: an index and a manifest, while the tars stay where they are.

    DIR/cat_07.png  DIR/cat_07.json     one sample: what comes before the first dot of the name is its key
    DIR/cat_07.jpg, .jpeg, .npy         other images that are taken
    DIR/cat_07.mask.png                 a mask
    DIR/cat_07.cls                      its content is the label `cls`
    anything else                       not read: some of it (pkl, pyd, pth) runs code in other readers

Only headers are read: of the tars, and of the images in them; and JSON. Of JSON only what is listed in `described`
comes into the index, and labels that the user names. Pixels are decoded of a few samples, for their mean and spread.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...engine.errors import UserError, did_you_mean
from ...engine.files import sha256, write_json
from ...engine.track import progress_bar
from ..identifying import identifies
from ..image import decode_image
from ..index import read_index
from ..layout import IMAGES, MANIFEST, Moments, columns, write_index
from ..packed import PackedPixels
from ..record import Film, Pixels
from ..store.local import Store, open_store
from ..store.places import check_scheme, display, is_remote, local_path
from ..table import Row
from ..writer import Outcome
from .tar import Scan, Wanted, scan

MOST_SHARDS = 100_000
THREADS = 8
SAMPLED = 32  # images decoded for the statistics
KEY_LENGTH = 100


@dataclass
class Survey:
    """What is in foreign tars: the index's columns and rows, what the manifest says, what the user should know."""

    columns: list[str]
    table: list[dict[str, Any]]
    facts: dict[str, Any]
    skipped: dict[str, str] = field(default_factory=dict)  # sample to reason
    notes: list[str] = field(default_factory=list)


def adopt(
    source: str, out: Path, *, labels: Sequence[str], dataset: str | None, patient: str | None, secret: bytes
) -> Outcome:
    """Index foreign tars, as `survey`, into the folder `out`.

    Raises:
        UserError: as `survey`; `out` holds something.
    """
    from ..ingest import write_skipped  # imports the readers of DICOM, which are slow to start

    holds = {path.name for path in out.iterdir()} if out.is_dir() else {"a file"} if out.exists() else set()
    if holds - {"index.csv", "manifest.json"}:
        raise UserError(f"{out} is there already and not empty; name another folder for the index")
    found = survey(source, labels=labels, dataset=dataset, patient=patient, secret=secret)
    if "manifest.json" in holds:
        if read_index(out) != as_read(found):
            raise UserError(f"{out} already holds another data set; name another folder for the index")
        return Outcome(samples=len(found.table), skipped=found.skipped, unchanged=True)
    for note in found.notes:
        print(f"miram: {note}", file=sys.stderr)
    write_survey(out, found)
    write_skipped(out, found.skipped)
    return Outcome(samples=len(found.table), skipped=found.skipped)


def as_read(found: Survey) -> list[Row]:
    """The rows of the index as reading it gives them."""
    return [{column: str(row.get(column, "")) for column in found.columns} for row in found.table]


def write_survey(out: Path, found: Survey) -> None:
    """Write index.csv, and then the manifest that makes the folder a data set."""
    out.mkdir(parents=True, exist_ok=True)
    write_index(out / "index.csv", found.columns, found.table)
    index = {"samples": len(found.table), "sha256": sha256(out / "index.csv")}
    write_json(out / "manifest.json", MANIFEST, {**found.facts, "records": index["sha256"], "index": index})


def survey(
    source: str, *, labels: Sequence[str] = (), dataset: str | None = None, patient: str | None = None, secret: bytes
) -> Survey:
    """What is in the tars of a folder, a pattern, a path or a URL.

    Args:
        labels: fields of the JSON that become labels.
        dataset: the name; default: after the source.
        patient: field of the JSON that tells the patient; hashed under `secret`.

    Raises:
        UserError: there is no tar, a tar is damaged or not WebDataset, no sample has an image, a field is not there.
    """
    if telling := [label for label in labels if identifies(label)]:
        raise UserError(
            f"--label {telling[0]} looks as if it names a patient, and labels are stored in the clear: leave it out"
        )
    shards = shards_of(source)
    name = dataset or name_of(source)
    wanted = Wanted(dataset=name, labels=tuple(labels), patient=patient, secret=secret)
    scans = scan_all(shards, wanted)
    samples = [sample for one in scans for sample in one.samples]
    skipped = {label: reason for one in scans for label, reason in one.skipped.items()}
    if not samples:
        reason = next(iter(skipped.values()), "they hold no png, jpg or npy")
        raise UserError(f"{display(source)}: no sample of {len(shards)} shards can be used: {reason}")
    if len({sample.channels for sample in samples}) > 1:
        raise UserError(f"{display(source)} mixes grayscale and colour; index tars of one kind at a time")
    refuse_unknown_fields(wanted, scans)
    table = rows(scans)
    pixels, above = statistics(table)
    facts = {
        "dataset": name,
        "licence": "unknown",
        "channels": samples[0].channels,
        "adopted": True,
        "skipped": len(skipped),
        "pixels": pixels,
        "shards": [one.fact() for one in scans],
    }
    told = list(notes(scans, wanted))
    if above:
        told.append(
            f"{above} of {min(SAMPLED, len(table))} images hold more than the `bits` or `max_value` of their JSON"
        )
    return Survey(columns(table), table, facts, skipped, told)


# ---------------------------------------------------------------------------------------------- which tars


def shards_of(source: str) -> list[str]:
    """The tars that a folder, a path, a URL or a pattern such as `a-{000..012}.tar` stands for, absolute.

    Raises:
        UserError: none, one of them is missing, or a URL that the index must not keep.
    """
    check_scheme(source)
    if is_remote(source):
        return _remote_shards(source)
    path = Path(local_path(source)).absolute()
    if path.is_dir():
        found = [str(tar) for tar in sorted(path.glob("*.tar"))]
        if not found:
            raise UserError(f"{source} holds no .tar; name the folder that does (compressed tars are not read)")
    else:
        found = [str(path)] if path.exists() else expand(str(path))
    for name in found:
        if not Path(name).is_file():
            raise UserError(f"{name} is not there; name a folder of tars, a tar, or a pattern: a-{{000..012}}.tar")
        if not name.isprintable():
            raise UserError(f"{name!r} has a name that no index can hold; rename it")
    return found


def _remote_shards(source: str) -> list[str]:
    parts = urlsplit(source)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"the URL {display(source)} must come without password, query and fragment, as the index would keep them; "
            "give credentials by the environment (~/.netrc, AWS_…)"
        )
    if not parts.path.endswith(".tar"):
        raise UserError(f"{source} is a folder and cannot be listed; name its tars by a pattern: a-{{000..012}}.tar")
    return expand(source)


def expand(pattern: str) -> list[str]:
    """Every name of a pattern with ranges `{000..012}` and lists `{a,b}`, without nesting.

    Raises:
        UserError: it stands for more than 100,000 names.
    """
    choices = [_choices(part) for part in re.split(r"(\{[^{}]*\})", pattern)]
    if prod(map(len, choices)) > MOST_SHARDS:
        raise UserError(f"{display(pattern)} stands for more than {MOST_SHARDS} shards; is a number too long?")
    return list(dict.fromkeys("".join(choice) for choice in product(*map(list, choices))))


def _choices(part: str) -> Sequence[str]:
    bounds = re.fullmatch(r"\{(\d{1,15})\.\.(\d{1,15})\}", part, re.ASCII)
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        width = len(bounds[1]) if bounds[1].startswith("0") else 0
        return [f"{i:0{width}d}" for i in range(first, min(last, first + MOST_SHARDS) + 1)]
    if part.startswith("{") and "," in part:
        return part[1:-1].split(",")
    return [part]


def name_of(source: str) -> str:
    """A data set's name after its source: of the folder, or of the tars without what varies."""
    last = re.split(r"[/\\]", re.sub(r"\{[^{}]*\}", "", source).rstrip("/"))[-1]
    if not is_remote(source) and Path(source).is_dir():
        last = Path(source).absolute().name
    return re.sub(r"[^0-9a-z]+", "-", last.lower().removesuffix(".tar")).strip("-") or "adopted"


def scan_all(shards: Sequence[str], wanted: Wanted) -> list[Scan]:
    """The scans of all shards, several at a time."""
    with progress_bar() as bar, ThreadPoolExecutor(min(THREADS, len(shards))) as pool:
        task = bar.add_task("shards", total=len(shards), note="")
        try:
            return list(bar.track(pool.map(partial(_scan, wanted=wanted), shards), total=len(shards), task_id=task))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _scan(shard: str, *, wanted: Wanted) -> Scan:
    store = open_store(shard, 0)
    try:
        return scan(store, shard, wanted)
    finally:
        store.close()


# ---------------------------------------------------------------------------------------------- what comes of them


def rows(scans: Sequence[Scan]) -> list[dict[str, Any]]:
    """The index's rows, in the order of the shards, under keys that are unique and of our alphabet."""
    every = [(one.shard, sample) for one in scans for sample in one.samples]
    plain = [ascii_key(sample.key) for _, sample in every]
    if len({sample.key for _, sample in every}) < len(every):  # the same key in several shards
        plain = [ascii_key(f"{stem(shard)}-{sample.key}") for shard, sample in every]
    keys = unique(plain)
    return [{"key": key, "shard": shard, **s.row} for key, (shard, s) in zip(keys, every, strict=True)]


def stem(shard: str) -> str:
    """A shard's name without folder and ending."""
    return shard.rstrip("/").rpartition("/")[2].removesuffix(".tar")


def ascii_key(key: str) -> str:
    """A key in the alphabet of ours: lower case, anything odd a dash."""
    return re.sub(r"[^0-9a-z_-]", "-", key.lower())[-KEY_LENGTH:] or "-"


def unique(keys: Sequence[str]) -> list[str]:
    """The same keys; those that came before get a number."""
    taken, counts, result = set(keys), Counter[str](), []
    for key in keys:
        counts[key] += 1
        name = key
        while counts[key] > 1 and name in taken:
            name = f"{key}-{counts[key]}"
            counts[key] += name in taken
        taken.add(name)
        result.append(name)
    return result


def statistics(table: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], int]:
    """Count, mean and standard deviation of the pixels of a few samples, evenly spread over the set.

    Also how many of those hold values above the largest that their JSON tells.
    """
    moments, above, store = Moments(), 0, open_store(table[0]["shard"], 0)
    for row in table[:: -(-len(table) // SAMPLED)]:
        with suppress(UserError):  # one that cannot be decoded is found by `miram data verify`
            pixels = pixels_of(store, row)
            moments += Moments.of(Film(pixels=pixels, max_value=row["max_value"]))
            above += int(pixels.max() > row["max_value"])
    store.close()
    return moments.statistics(), above


def pixels_of(store: Store, row: Mapping[str, Any]) -> Pixels:
    """The pixels of a row's image.

    Raises:
        UserError: they cannot be decoded.
    """
    kind = next(kind for kind in IMAGES if f"{kind}_size" in row)
    content = store.read(row["shard"], row[f"{kind}_offset"], row[f"{kind}_size"])
    if kind != "npy":
        return decode_image(content, row["key"])
    pixels: Pixels = PackedPixels(lambda offset, size: content[offset : offset + size], len(content))[:]
    return pixels


def refuse_unknown_fields(wanted: Wanted, scans: Sequence[Scan]) -> None:
    """Raise where a field that the user named is in no sample's JSON."""
    known = sorted({name for one in scans for name in one.fields})
    for name in (*wanted.labels, *([wanted.patient] if wanted.patient else ())):
        if name not in known:
            hint = did_you_mean(name, known) if known else "; there is no JSON in these tars"
            raise UserError(f"no sample's JSON has a field {name!r}{hint}")


def notes(scans: Sequence[Scan], wanted: Wanted) -> Iterable[str]:
    """What the user should know before trusting the set."""
    ignored = sum((one.ignored for one in scans), Counter[str]())
    if ignored:
        listed = ", ".join(f"{kind} {n}" for kind, n in ignored.most_common(6))
        yield f"ignored {ignored.total()} members: {listed}{', …' if len(ignored) > 6 else ''}"
    for what, n in sum((one.remarks for one in scans), Counter[str]()).most_common():
        yield f"{n} samples: {what}"
    if not wanted.patient:
        yield "nothing tells the patients, so a split cannot be checked for them; --patient FIELD names the JSON field"
    if any(is_remote(one.shard) for one in scans):
        yield "remote shards are checked by their size, not by their sha256"
