"""Nothing that an archive tells of its patients comes out of an ingest: canaries in every tag, searched for twice.

The search here knows nothing of the audit's: it decompresses everything and asks whether the bytes are in it. Names of
files may be on the user's own screen and in OUT.skipped.csv, beside the data set; values of headers are nowhere.
"""

from __future__ import annotations

import csv
import io
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from miram.data.audit.look import Searched, audit
from miram.data.shards import ShardDataset

from .dicoms import SOUGHT_FROM, SYNTAXES, mammogram, plant, save

FILES = 300
FEW = 48  # of these are read once more, without the steps for breasts
BURNED_IN, CUT = 40, 41  # these two are left out


@dataclass(frozen=True)
class Planted:
    """An archive, its label files, and what must not come out of it."""

    source: Path
    masks: Path
    labels: dict[str, Path]  # of all files, and of the first few
    values: set[str]  # of headers and of the table: nowhere
    names: set[str]  # of files and folders: not in the data set


def film(number: int) -> NDArray[np.uint16]:
    """12 bits: half an ellipse on the left, black beside it, different for each number."""
    y, x = np.mgrid[:96, :72]
    radius = np.hypot((y - 48) / 40, x / (44 + number % 16))
    light = np.where(radius < 1, 700 + number + 2900 * np.sqrt(np.clip(1 - radius, 0, 1)), 0)
    return light.astype(np.uint16)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """300 mammograms of 75 patients in twelve transfer syntaxes, with ids of their own, telling names and a table."""
    base = tmp_path_factory.mktemp("planted")
    values, names, rows = set(), set(), []
    for turn, syntax in enumerate(SYNTAXES):
        for number in range(turn, FILES, len(SYNTAXES)):
            pixels = film(number) if syntax != "jpeg" else (film(number) >> 4).astype(np.uint8)
            header = mammogram(pixels, syntax=syntax, ViewPosition="CC" if number % 2 else "MLO")
            if number == turn:
                tags = plant(header)
                values |= set(tags.values())
                pattern = header
            for element in pattern:
                if element.keyword in tags or element.tag.is_private or element.tag.group in (0x5000, 0x6000, 0x6002):
                    header[element.tag] = element
            header.preamble = pattern.preamble
            own = {
                "PatientID": f"MRN-{80000 + number // 4}-X",
                "PatientName": f"Quincy{number // 4:03d}^Wilhelmina",
                "SOPInstanceUID": f"1.2.840.99999.7.{number}.{number * 31}.4711",
                "AccessionNumber": f"ACC{number * 7919:08d}",
            }
            for keyword, value in own.items():
                setattr(header, keyword, value)
            header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
            header.BurnedInAnnotation = "YES" if number == BURNED_IN else "NO"
            values |= set(own.values()) | {f"quincy{number // 4:03d}"}
            path = base / "source" / f"wilma-quincy-{number // 4:03d}" / f"lobato_{number:04d}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            save(path, header)
            if number == CUT:
                path.write_bytes(path.read_bytes()[:-2000])
            names |= {path.stem, path.parent.name}
            if number % 3 == 0:
                word = f"Thessaly{number:04d}"  # a patient's name where a finding may stand
                mask = base / "masks" / f"lobato_{number:04d}_{word}{'_benign' if number % 2 else ''}.png"
                mask.parent.mkdir(exist_ok=True)
                Image.fromarray(255 * (film(number) > 3000).astype(np.uint8)).save(mask)
                names |= {mask.stem, word}
            rows.append([path.relative_to(base / "source").as_posix(), own["PatientID"], number % 3])
    rows.sort()
    labels = {"breast": base / "all.csv", "no-breast": base / "few.csv"}
    for kind, count in (("breast", FILES), ("no-breast", FEW)):
        with labels[kind].open("w", newline="") as file:
            csv.writer(file).writerows([["file", "patient", "birads"], *rows[:count]])
    sought = {value for value in values if len(value) >= SOUGHT_FROM}
    assert len(sought) > 1000
    return Planted(base / "source", base / "masks", labels, sought, names)


@dataclass(frozen=True)
class Ingested:
    """What an ingest wrote and said."""

    folder: Path
    files: int
    done: CompletedProcess[str]


@pytest.fixture(scope="module", params=["breast", pytest.param("no-breast", marks=pytest.mark.slow)])
def ingested(
    request: pytest.FixtureRequest,
    planted: Planted,
    tmp_path_factory: pytest.TempPathFactory,
    miram: Callable[..., CompletedProcess[str]],
) -> Ingested:
    base = tmp_path_factory.mktemp(request.param)
    (base / "key").write_text("0123456789abcdef")
    options = ("--labels", planted.labels[request.param], "--masks", planted.masks, f"--{request.param}")
    options = (*options, "--key", base / "key", "--workers", 2)
    done = miram("data", "ingest", "folder", planted.source, base / "set", *options)
    assert done.returncode == 0, done.stderr
    return Ingested(base / "set", FILES if request.param == "breast" else FEW, done)


def contents(folder: Path) -> Iterator[bytes]:
    """Everything in a folder, once as it lies there and once decompressed, with all names."""
    for path in folder.rglob("*"):
        yield path.relative_to(folder).as_posix().encode()
        if path.is_file():
            yield path.read_bytes()
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                for member in tar:
                    content = tar.extractfile(member).read()  # type: ignore[union-attr]
                    yield member.name.encode()
                    if member.name.endswith(".png"):
                        pixels = np.asarray(Image.open(io.BytesIO(content)))
                        yield pixels.tobytes()
                        yield pixels.byteswap().tobytes()
                    else:
                        yield content


def recovered(values: set[str], content: bytes) -> set[str]:
    lower = content.lower()
    return {value for value in values if value.lower().encode() in lower}


def test_the_search_finds_what_is_there(planted: Planted) -> None:
    one = planted.source / "wilma-quincy-000" / "lobato_0001.dcm"
    found = recovered(planted.values, one.read_bytes())
    assert len(found) > 300
    assert {"MRN-80000-X", "Quincy000^Wilhelmina", "1.2.840.99999.7.1.31.4711"} <= found


def test_all_but_two_were_read(planted: Planted, ingested: Ingested) -> None:
    shards = ShardDataset(ingested.folder)
    assert len(shards) == ingested.files - 2
    assert len(set(shards.rows.column("patient"))) == ingested.files // 4


def test_known_words_of_masks_became_labels(ingested: Ingested) -> None:
    shards = ShardDataset(ingested.folder)
    assert {*shards.rows.column("label_finding")} == {"", "benign"}
    assert sum(shards[i].mask is not None for i in range(8)) > 1


def test_no_canary_comes_out(planted: Planted, ingested: Ingested) -> None:
    everything = b"\0".join(contents(ingested.folder))
    assert len(everything) > 1_000_000
    assert recovered(planted.values | planted.names, everything) == set()


def test_what_is_said_on_the_way_quotes_no_header(planted: Planted, ingested: Ingested) -> None:
    skipped = ingested.folder.with_name("set.skipped.csv")
    beside = {path.name for path in ingested.folder.parent.iterdir()}
    assert beside == {"key", "set", "set.skipped.csv"}
    said = ingested.done.stdout + ingested.done.stderr + skipped.read_text()
    assert recovered(planted.values, said.encode()) == set()
    rows = list(csv.reader(skipped.open()))
    assert sorted(Path(row[0]).stem for row in rows if row[0].endswith(".dcm")) == ["lobato_0040", "lobato_0041"]


def test_the_audit_agrees(planted: Planted, ingested: Ingested) -> None:
    searched = Searched()
    assert list(audit(ingested.folder, planted.source, searched=searched)) == []
    assert searched.values > 1000


# ---------------------------------------------------------------------------------------------- in the user's table

ODD = (
    "subject_id",
    "case",
    "chart no",
    "referring physician",
    "last",
    "tel",
    "folder",
    "hospital",
    "exam date",
    "origin",
)


@pytest.mark.parametrize("column", [*ODD, "view", "split"])
def test_a_table_with_canaries_is_refused_without_a_word_of_them(
    column: str, planted: Planted, tmp_path: Path, say: Callable[..., tuple[int, str, str]]
) -> None:
    """Two images of a patient repeat its name, so that it differs from row to row no more than a label does."""
    canary = [f"Wilhelmina Quincy{number // 8:03d}" for number in range(FILES)]
    with planted.labels["breast"].open() as file:
        rows = list(csv.DictReader(file))
    labels = tmp_path / "l.csv"
    with labels.open("w", newline="") as file:
        csv.writer(file).writerows([["file", column], *([row["file"], canary[i]] for i, row in enumerate(rows))])
    code, out, err = say("data", "ingest", "folder", planted.source, tmp_path / "set", "--labels", labels)
    assert (code, out) == (2, "")
    assert column in err
    assert "Wilhelmina" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l.csv"]


def test_a_split_or_label_that_is_a_folders_name_is_said_by_the_audit(
    planted: Planted, ingested: Ingested, tmp_path: Path
) -> None:
    """Class folders are called like their labels; folders of patients would be, too, and the user is told how many."""
    index = shutil.copytree(ingested.folder, tmp_path / "set") / "index.csv"
    text = index.read_text()
    index.write_text(text.replace(",MLO,", ",wilma-quincy-001,", 1))
    searched = Searched()
    assert list(audit(index.parent, planted.source, searched=searched)) == []
    assert "1 that is a value of view" in str(searched)


# ---------------------------------------------------------------------------------------------- planted afterwards

HIDDEN = "Quincy001^Wilhelmina"


def into_json(folder: Path) -> None:
    in_shard(folder, "json", lambda info, content: content.replace(b'"view": "', b'"view": "' + HIDDEN.encode()))


def into_png(folder: Path) -> None:
    def change(info: tarfile.TarInfo, content: bytes) -> bytes:
        text, buffer = PngInfo(), io.BytesIO()
        text.add_text("Comment", HIDDEN)
        Image.open(io.BytesIO(content)).save(buffer, "png", pnginfo=text)
        return buffer.getvalue()

    in_shard(folder, "png", change)


def into_compressed_text(folder: Path) -> None:
    def change(info: tarfile.TarInfo, content: bytes) -> bytes:
        text, buffer = PngInfo(), io.BytesIO()
        text.add_text("Comment", HIDDEN, zip=True)
        Image.open(io.BytesIO(content)).save(buffer, "png", pnginfo=text)
        return buffer.getvalue()

    in_shard(folder, "png", change)


def into_pixels(folder: Path) -> None:
    def change(info: tarfile.TarInfo, content: bytes) -> bytes:
        pixels, buffer = np.array(Image.open(io.BytesIO(content))), io.BytesIO()
        pixels[5, 3 : 3 + len(HIDDEN) // 2] = np.frombuffer(HIDDEN.encode(), np.uint16)
        Image.fromarray(pixels).save(buffer, "png")
        return buffer.getvalue()

    in_shard(folder, "png", change)


def into_tar_header(folder: Path) -> None:
    def change(info: tarfile.TarInfo, content: bytes) -> bytes:
        info.uname = HIDDEN
        return content

    in_shard(folder, "json", change)


def into_index(folder: Path) -> None:
    text = (folder / "index.csv").read_text()
    (folder / "index.csv").write_text(text.replace(",MLO,", f",{HIDDEN},", 1))


def into_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"unknown"', f'"{HIDDEN.upper()}"', 1))


def into_log(folder: Path) -> None:
    (folder / "job.log").write_text(f"read 300 images\nleft out {HIDDEN.lower()}\n")


def into_file_name(folder: Path) -> None:
    (folder / f"{HIDDEN}.txt").write_text("")


def in_shard(folder: Path, kind: str, change: Callable[[tarfile.TarInfo, bytes], bytes]) -> None:
    """Change the first member of a kind, and write the shard anew."""
    shard = folder / "shard-000000.tar"
    with tarfile.open(shard) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    first = next(i for i, (info, _) in enumerate(members) if info.name.partition(".")[2] == kind)
    members[first] = (members[first][0], change(*members[first]))
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


PLANTS = {
    into_json: ("shard-000000.tar, member", "PatientName"),
    into_png: ("shard-000000.tar, member", "chunk tEXt"),
    into_compressed_text: ("shard-000000.tar, member", "chunk zTXt"),
    into_pixels: ("shard-000000.tar, member", "PatientName"),
    into_tar_header: ("shard-000000.tar, header of member", "user or group"),
    into_index: ("index.csv, line", "PatientName"),
    into_manifest: ("manifest.json, line", "PatientName"),
    into_log: ("job.log, line 2", "PatientName"),
    into_file_name: ("… (entry", "PatientName"),
}


@pytest.mark.parametrize("plant_into", PLANTS, ids=lambda change: change.__name__)
def test_what_is_planted_afterwards_is_found(
    plant_into: Callable[[Path], None], planted: Planted, ingested: Ingested, tmp_path: Path
) -> None:
    few = planted.source / "wilma-quincy-001"
    copy = Path(shutil.copytree(ingested.folder, tmp_path / "copy"))
    for shard in sorted(copy.glob("*.tar"))[1:]:
        shard.unlink()
    assert list(audit(copy, few)) == []
    plant_into(copy)
    said = [str(finding) for finding in audit(copy, few)]
    place, what = PLANTS[plant_into]
    assert any(line.startswith(place) and what in line for line in said), said
    assert not any("quincy" in line.lower() for line in said)
