"""One foreign WebDataset tar: its samples, as far as headers and JSON tell; whatever would mislead is refused."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...engine.errors import UserError
from ...engine.files import sha256
from ..image import UnreadableImage
from ..keys import hashed
from ..layout import LABEL
from ..store.local import Store
from ..store.places import display, is_remote
from .heads import Head, image_head
from .walk import Member, Window, members

ALIASES = {"jpeg": "jpg"}
ACCEPTED = ("png", "jpg", "npy", "json", "mask.png", "cls")
FIRST_IMAGE = ("png", "jpg", "npy")  # which one counts where a sample has several
JSON_LIMIT = 2**20
CLS_LIMIT = 64
MOST_FIELDS = 1000  # names of JSON fields kept for a message
SIDES = {"l": "L", "left": "L", "r": "R", "right": "R"}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the user asks of the JSON: labels by field, the patient's field."""

    dataset: str
    labels: tuple[str, ...]
    patient: str | None
    secret: bytes


@dataclass
class Sample:
    """A sample that can be used: its key in the tar, its row of the index without key and shard."""

    key: str
    channels: int
    row: dict[str, Any]


@dataclass
class Found:
    """The members of one key, in the order of the tar."""

    key: str
    places: dict[str, Member] = field(default_factory=dict)
    heads: dict[str, Head] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)  # why its images cannot be used
    dotted: str = ""  # a member that is an image, if it were not for the dots in its name
    meta: Mapping[str, Any] | None = None
    cls: str | None = None


class Names(NamedTuple):
    """What the checks of a tar's names need of a sample."""

    key: str
    dotted: str
    has_image: bool


@dataclass
class Scan:
    """What a shard holds."""

    shard: str
    size: int
    samples: list[Sample] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)  # members by kind
    remarks: Counter[str] = field(default_factory=Counter)  # samples by what is odd about them
    fields: set[str] = field(default_factory=set)  # of the JSON
    sha256: str | None = None  # None where that would fetch the whole shard

    def fact(self) -> dict[str, Any]:
        """Its entry in the manifest."""
        return {"name": self.shard, "samples": len(self.samples), "bytes": self.size, "sha256": self.sha256}


def scan(store: Store, shard: str, wanted: Wanted) -> Scan:
    """What is in a tar.

    Raises:
        UserError: it is damaged, its samples are not together or collapse into one.
    """
    tar = Window(store, shard)
    result = Scan(shard, tar.size)
    names: list[Names] = []
    without_json = 0
    for found in collect(tar, result):
        names.append(Names(found.key, found.dotted, bool(found.heads)))
        if fault := unusable(found):
            result.skipped[f"{display(shard)}: {shown(found.key)}"] = fault
            continue
        without_json += found.meta is None
        result.samples.append(describe(found, wanted, result))
    refuse_dotted(names, shard)
    refuse_scattered(names, shard)
    if 0 < without_json < len(result.samples):
        result.remarks["no usable JSON, which others have"] += without_json
    if not is_remote(shard):
        result.sha256 = sha256(Path(shard))
    return result


# ---------------------------------------------------------------------------------------------- members to samples


def collect(tar: Window, result: Scan) -> Iterator[Found]:
    """The samples of a tar, each with what its members' heads tell; counts what is ignored."""
    current: Found | None = None
    for member in members(tar):
        key, kind = split_name(member.name)
        if not key or not member.plain:
            result.ignored["hidden or without a dot" if member.plain else "links"] += 1
            continue
        if current is None or key != current.key:
            if current is not None:
                yield current
            current = Found(key)
        if kind in ACCEPTED:
            take(tar, current, kind, member, result)
        else:
            ending = kind.rpartition(".")[2]
            result.ignored[re.sub(r"[^0-9a-z]", "?", ending)[:12]] += 1
            if "." in kind and ALIASES.get(ending, ending) in FIRST_IMAGE:
                current.dotted = current.dotted or member.name
    if current is not None:
        yield current


def split_name(name: str) -> tuple[str, str]:
    """(key, kind) of a member: `./a/b.Mask.PNG` is (a/b, mask.png); no key where WebDataset sees none."""
    while name.startswith("./"):
        name = name[2:]
    folder, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    if not stem or not kind or (stem.startswith("__") and stem.endswith("__")):
        return "", ""
    kind = kind.lower()
    return folder + slash + stem, ALIASES.get(kind, kind)


def take(tar: Window, sample: Found, kind: str, member: Member, result: Scan) -> None:
    """Put a member to its sample, with what its head or its content tells."""
    if kind in sample.places:
        raise UserError(
            f"the shard {display(tar.shard)} holds {shown(member.name)} twice (again at byte {member.offset}); "
            "write the tar again with each sample once"
        )
    sample.places[kind] = member
    if kind == "json":
        sample.meta = read_json(tar, member)
        result.fields |= set(list(sample.meta or ())[:MOST_FIELDS]) if len(result.fields) < MOST_FIELDS else set()
    elif kind == "cls":
        content = tar.read(member.offset, min(member.size, CLS_LIMIT + 1))
        sample.cls = text(content.decode("utf-8", "replace").strip())
    else:
        try:
            sample.heads[kind] = head_of(tar, kind, member)
        except UnreadableImage as error:
            sample.faults += [str(error)] if kind != "mask.png" else []


def head_of(tar: Window, kind: str, member: Member) -> Head:
    """The head of an image in a tar."""

    def read(offset: int, size: int) -> bytes:
        return tar.read(member.offset + offset, max(0, min(size, member.size - offset)))

    return image_head("png" if kind == "mask.png" else kind, read, member.size)


def read_json(tar: Window, member: Member) -> Mapping[str, Any] | None:
    """A sample's JSON, None if it is no object, damaged or too long."""
    if member.size > JSON_LIMIT:
        return None
    try:
        content = json.loads(tar.read(member.offset, member.size))
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def unusable(sample: Found) -> str:
    """Why a sample is left out, or nothing."""
    if any(kind in sample.heads for kind in FIRST_IMAGE):
        return ""
    return sample.faults[0] if sample.faults else "it has no png, jpg or npy"


def refuse_dotted(names: Sequence[Names], shard: str) -> None:
    """Raise where dots within names make one sample of many: `1.2.840.png` is the member `2.840.png` of sample 1."""
    dotted = [one for one in names if one.dotted and not one.has_image]
    if dotted and len(dotted) >= sum(one.has_image for one in names):
        raise UserError(
            f"the shard {display(shard)} has dots in its names, such as {shown(dotted[0].dotted)}: in WebDataset a key "
            f"ends at the first dot, so all of {shown(dotted[0].key)} is one sample; write it again with other names"
        )


def refuse_scattered(names: Sequence[Names], shard: str) -> None:
    """Raise where the members of a sample do not lie together."""
    seen = set[str]()
    for one in names:
        if one.key in seen:
            raise UserError(
                f"the shard {display(shard)} does not hold the members of {shown(one.key)} together; "
                "write it again in the order of the names (tar --sort=name)"
            )
        seen.add(one.key)


def shown(name: str) -> str:
    """A name out of a tar, for a message."""
    return ascii(name if len(name) <= 80 else name[:77] + "...")


# ---------------------------------------------------------------------------------------------- what the index says


def describe(sample: Found, wanted: Wanted, result: Scan) -> Sample:
    """The sample's row: places of its members, the image's facts, what the JSON says in closed forms, labels."""
    images = [kind for kind in FIRST_IMAGE if kind in sample.heads]
    head = sample.heads[images[0]]
    if len(images) > 1:
        result.remarks[f"of several images the {images[0]} is taken"] += 1
    meta = sample.meta or {}
    kept = [images[0], *(["json"] if sample.meta is not None else []), *mask_of(sample, head, result)]
    row: dict[str, Any] = {}
    for kind in kept:
        row |= {f"{kind}_offset": sample.places[kind].offset, f"{kind}_size": sample.places[kind].size}
    largest = max_value(meta, head.max_value)
    row |= {"dataset": wanted.dataset, "height": head.height, "width": head.width}
    row |= {"bits": largest.bit_length(), "max_value": largest}
    row |= {"patient": patient(meta, wanted, sample.key, result), **described(meta), **labels(sample, wanted, result)}
    return Sample(sample.key, head.channels, row)


def mask_of(sample: Found, head: Head, result: Scan) -> list[str]:
    """The mask, if it is one for this image: 8 bits, one channel, of the image's size."""
    if "mask.png" not in sample.places:
        return []
    mask = sample.heads.get("mask.png")
    if mask == Head(head.height, head.width, 1, 255):
        return ["mask.png"]
    result.remarks["the mask is left out, as it is no 8-bit grayscale PNG of the image's size"] += 1
    return []


def max_value(meta: Mapping[str, Any], allowed: int) -> int:
    """The largest value by the JSON's `max_value` or `bits`, if the format can hold it; else the format's."""
    told, bits = meta.get("max_value"), meta.get("bits")
    if told is None and type(bits) is int and 0 < bits <= 16:
        told = 2**bits - 1
    return told if type(told) is int and 0 < told <= allowed else allowed


def described(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What the index takes from any JSON: side, view, split, spacing; nothing that is not in their form."""
    side, view, split, spacing = (meta.get(name) for name in ("laterality", "view", "split", "spacing_mm"))
    number = type(spacing) in (int, float)
    return {
        "laterality": SIDES.get(str(side).lower(), ""),
        "view": view if isinstance(view, str) and re.fullmatch(r"[A-Z]{1,5}", view) else "",
        "split": split if isinstance(split, str) and re.fullmatch(r"[a-z0-9_-]{1,24}", split) else "",
        "spacing_mm": spacing if number and math.isfinite(spacing) and 0 < spacing <= 10 else "",  # type: ignore[arg-type, operator]
    }


def patient(meta: Mapping[str, Any], wanted: Wanted, key: str, result: Scan) -> str:
    """The patient's keyed hash, as `ingest` writes it; a patient of its own where nobody tells."""
    told = meta.get(wanted.patient) if wanted.patient else None
    if type(told) in (str, int) and str(told).strip().isprintable() and str(told).strip():
        return hashed(wanted.secret, wanted.dataset, "patient", str(told).strip())
    result.remarks["no patient is told: each image counts as one of its own, which leaks if that is wrong"] += 1
    return hashed(wanted.secret, wanted.dataset, "image", result.shard.rpartition("/")[2], key)


def labels(sample: Found, wanted: Wanted, result: Scan) -> dict[str, str]:
    """Labels by column: of the JSON's fields that the user named, and of `cls`."""
    meta = sample.meta or {}
    row = {} if sample.cls is None else {f"{LABEL}cls": sample.cls}
    for name in wanted.labels:
        value = text(meta.get(name))
        row[LABEL + name.removeprefix(LABEL)] = value
        if meta.get(name) not in (None, "") and not value:
            result.remarks[f"{name!r} is no short text or number"] += 1
    return row


def text(value: object) -> str:
    """A label's value as text, empty where it is none."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int | float | str) and not (isinstance(value, float) and not math.isfinite(value)):
        try:
            told = str(value)
        except ValueError:  # an integer of more digits than Python prints
            return ""
        return told if len(told) <= CLS_LIMIT and told.isprintable() else ""
    return ""
