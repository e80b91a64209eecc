"""Ingest: all or nothing, the same whoever does it, and nobody's name in what is written."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from miram.data import writer
from miram.data.archive import Archive
from miram.data.geometry import Size
from miram.data.image import encode_png, read_film, stamp
from miram.data.index import read_manifest
from miram.data.ingest import ingest, skipped_file
from miram.data.layout import Moments
from miram.data.phantom import PhantomSettings, records
from miram.data.record import Film, Record
from miram.data.shards import ShardDataset
from miram.data.verify import verify
from miram.engine.errors import UserError

SECRET = b"sixteen bytes or more"
PATIENTS = ("Doe^Jane-19480211", "Roe^Joan-19501130")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def archive(tmp_path: Path, breast_film: Film) -> Archive:
    """Four images of two patients in files with telling names."""
    folder = tmp_path / "hospital-of-springfield"
    folder.mkdir()
    found = []
    for i in range(4):
        path = folder / f"jane-doe-{i}.png"
        path.write_bytes(encode_png(breast_film.pixels + np.uint16(i) * (breast_film.pixels > 0)))
        found.append(
            Record(
                read=partial(read_film, path),
                name=path.name,
                image_id=f"1.2.840.99999.{i}",
                patient_id=PATIENTS[i // 2],
                exam_id=f"accession-{i // 2}",
                laterality="LR"[i % 2],
                view="CC",
                split="train",
                labels={"mass": i % 2},
            )
        )
    return Archive(dataset="test", licence="none", records=found)


@pytest.fixture
def phantom_archive() -> Archive:
    return Archive(dataset="phantom", licence="none", records=records(8, PhantomSettings(size=96)))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "set"


def spoil(archive: Archive, count: int) -> None:
    """Cut the first file in half, make text of the next ones."""
    paths = sorted(record.read.args[0] for record in archive.records)  # type: ignore[attr-defined]
    for path in paths[:count]:
        path.write_text("no image at all")
    whole = encode_png(np.arange(65536, dtype=np.uint16).reshape(256, 256))
    paths[0].write_bytes(whole[: len(whole) // 2])


# ---------------------------------------------------------------------------------------------- whole or not at all


def test_what_cannot_be_read_is_named_and_the_rest_written(archive: Archive, out: Path) -> None:
    spoil(archive, 2)
    outcome = ingest(archive, out, SECRET, workers=1)
    assert (outcome.samples, outcome.unchanged) == (2, False)
    assert list(outcome.skipped) == ["jane-doe-0.png", "jane-doe-1.png"]
    assert "cut short" in outcome.skipped["jane-doe-0.png"]
    assert len(ShardDataset(out)) == 2
    assert read_manifest(out)["skipped"] == 2
    assert not list(verify(out))


def test_an_image_without_a_breast_is_left_out(archive: Archive, out: Path) -> None:
    black = Film(pixels=np.zeros((90, 90), np.uint16), max_value=4095)
    empty = replace(archive.records[0], read=lambda: black, name="empty", image_id="empty")
    outcome = ingest(replace(archive, records=[empty, *archive.records]), out, SECRET, workers=1)
    assert outcome.samples == 4
    assert "breast" in outcome.skipped["empty"]


def test_where_nothing_can_be_read_nothing_is_left(archive: Archive, out: Path) -> None:
    spoil(archive, 4)
    out.parent.mkdir()
    with pytest.raises(UserError, match=r"none of 4 .*jane-doe-0\.png"):
        ingest(archive, out, SECRET, workers=1)
    assert list(out.parent.iterdir()) == []


def test_what_is_left_out_is_listed_beside_the_set_and_not_in_it(archive: Archive, out: Path) -> None:
    spoil(archive, 2)
    ingest(archive, out, SECRET, workers=1)
    rows = list(csv.DictReader(skipped_file(out).read_text().splitlines()))
    assert [row["file"] for row in rows] == ["jane-doe-0.png", "jane-doe-1.png"]
    assert all(row["reason"] for row in rows)
    assert out not in skipped_file(out).parents


def test_images_of_one_id_are_refused_by_name(archive: Archive, out: Path) -> None:
    twin = replace(archive.records[1], image_id=archive.records[3].image_id)
    with pytest.raises(UserError, match=r"jane-doe-3\.png and jane-doe-1\.png"):
        ingest(replace(archive, records=[archive.records[0], twin, *archive.records[2:]]), out, SECRET, workers=1)


def test_no_records_is_an_error(archive: Archive, out: Path) -> None:
    with pytest.raises(UserError, match="no image"):
        ingest(replace(archive, records=[]), out, SECRET)


def test_a_crash_leaves_no_half_set(archive: Archive, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        assert any(out.with_name(".set.miram-partial").glob("set/*.tar"))
        raise RuntimeError("power cut")

    monkeypatch.setattr(writer, "seal", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        ingest(archive, out, SECRET, workers=1)
    assert not out.exists()
    monkeypatch.undo()
    assert ingest(archive, out, SECRET, workers=1).samples == 4
    assert list(out.parent.iterdir()) == [out]


def test_what_a_killed_run_left_is_swept_away(archive: Archive, out: Path) -> None:
    left = out.with_name(".set.miram-partial")
    left.mkdir(parents=True)
    (left / "shard-000007.tar").write_bytes(b"half")
    ingest(archive, out, SECRET, workers=1)
    assert sorted(content(out)) == ["index.csv", "manifest.json", "shard-000000.tar"]
    assert list(out.parent.iterdir()) == [out]


# ---------------------------------------------------------------------------------------------- what is there already


def test_the_same_again_changes_nothing(archive: Archive, out: Path) -> None:
    ingest(archive, out, SECRET, workers=1)
    before = content(out)
    again = ingest(archive, out, SECRET, workers=1)
    assert (again.unchanged, again.samples) == (True, 4)
    assert content(out) == before


@pytest.mark.parametrize("change", ["name", "fewer", "breast", "settings", "secret", "label"])
def test_another_data_set_is_refused_and_left_alone(archive: Archive, out: Path, change: str) -> None:
    ingest(archive, out, SECRET, workers=1)
    before = content(out)
    other = {
        "name": replace(archive, dataset="other"),
        "fewer": replace(archive, records=archive.records[:3]),
        "breast": replace(archive, breast=False),
        "settings": replace(archive, settings={"a": 1}),
        "secret": archive,
        "label": replace(archive, records=[replace(r, labels={"mass": 0}) for r in archive.records]),
    }[change]
    with pytest.raises(UserError, match="another data set"):
        ingest(other, out, SECRET[::-1] if change == "secret" else SECRET, workers=1)
    assert content(out) == before


@pytest.mark.parametrize("field", ["laterality", "view", "exam_id"])
def test_a_corrected_table_is_another_data_set(archive: Archive, out: Path, field: str) -> None:
    ingest(archive, out, SECRET, workers=1)
    corrected = replace(archive, records=[replace(r, **{field: "X"}) for r in archive.records])
    with pytest.raises(UserError, match="another data set"):
        ingest(corrected, out, SECRET, workers=1)


def test_an_image_that_was_repaired_is_not_passed_over(archive: Archive, out: Path) -> None:
    def stamped() -> Archive:
        return replace(archive, records=[replace(r, stamp=stamp(r.read.args[0])) for r in archive.records])  # type: ignore[attr-defined]

    path = archive.records[0].read.args[0]  # type: ignore[attr-defined]
    sound = path.read_bytes()
    path.write_text("no image")
    ingest(stamped(), out, SECRET, workers=1)
    assert ingest(stamped(), out, SECRET, workers=1).unchanged
    path.write_bytes(sound)
    with pytest.raises(UserError, match="another data set"):
        ingest(stamped(), out, SECRET, workers=1)


def test_the_same_images_with_another_option_are_told_from_other_images(archive: Archive, out: Path) -> None:
    ingest(archive, out, SECRET, workers=1)
    with pytest.raises(UserError, match="of the same images; it differs in preprocessing"):
        ingest(archive, out, SECRET, workers=1, size=Size(max_size=32))


def test_a_folder_with_something_else_is_refused(archive: Archive, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        ingest(archive, out, SECRET, workers=1)
    assert content(out) == {"thesis.txt": b"years of work"}


def test_a_file_is_refused_and_an_empty_folder_taken(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="is a file"):
        ingest(archive, tmp_path / "file", SECRET, workers=1)
    assert (tmp_path / "file").read_text() == "text"
    (tmp_path / "empty").mkdir()
    assert ingest(archive, tmp_path / "empty", SECRET, workers=1).samples == 4
    assert not list(verify(tmp_path / "empty"))


def test_the_working_folder_can_be_named_by_a_dot(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert ingest(archive, Path(), SECRET, workers=1).samples == 4


# ---------------------------------------------------------------------------------------------- the same bytes


def test_several_processes_write_what_one_does(phantom_archive: Archive, tmp_path: Path) -> None:
    assert len(phantom_archive.records) == 32
    ingest(phantom_archive, tmp_path / "serial", SECRET, workers=1)
    ingest(phantom_archive, tmp_path / "parallel", SECRET, workers=2)
    assert content(tmp_path / "serial") == content(tmp_path / "parallel")


def test_twelve_bits_stay_twelve_bits(phantom_archive: Archive, out: Path) -> None:
    few = replace(phantom_archive, records=phantom_archive.records[:2])
    ingest(few, out, SECRET, workers=1)
    shards = ShardDataset(out)
    assert {(row["bits"], row["max_value"]) for row in shards.rows} == {("12", "4095")}
    assert 255 < shards[0].pixels.max() <= 4095 == shards[0].max_value


def test_without_breast_steps_an_image_stays_whole(archive: Archive, out: Path) -> None:
    ingest(replace(archive, breast=False), out, SECRET, workers=1)
    shards = ShardDataset(out)
    for i, record in enumerate(archive.records):
        np.testing.assert_array_equal(shards[i].pixels, record.read().pixels)
        assert shards[i].meta["geometry"]["flipped"] is False


def test_moments_are_those_of_all_pixels() -> None:
    rng = np.random.default_rng(0)
    films = [Film(pixels=rng.integers(0, 4096, (9, 7 + i), dtype=np.uint16), max_value=4095) for i in range(5)]
    moments = sum(map(Moments.of, films), Moments())
    x = np.concatenate([film.pixels.ravel() / 4095 for film in films])
    assert moments.statistics() == pytest.approx({"n": x.size, "mean": x.mean(), "std": x.std()}, rel=1e-12)


# ---------------------------------------------------------------------------------------------- privacy


def test_nothing_written_names_anybody(archive: Archive, out: Path) -> None:
    spoil(archive, 1)
    ingest(archive, out, SECRET, workers=1)
    telling = (*PATIENTS, "Doe", "1.2.840", "accession", "jane-doe", "springfield", str(out.parent), SECRET.decode())
    for name, raw in content(out).items():
        for text in telling:
            assert text.lower().encode() not in (name.encode() + raw).lower(), f"{text} in {name}"


def test_keys_have_no_dot_and_no_capital(archive: Archive, out: Path) -> None:
    ingest(replace(archive, dataset="My.Data Set/2"), out, SECRET, workers=1)
    keys = [row["key"] for row in ShardDataset(out).rows]
    assert all(re.fullmatch(r"[0-9a-z_-]+", key) for key in keys)
    assert len(set(keys)) == 4


def test_the_images_of_a_patient_share_a_hash_that_the_secret_decides(archive: Archive, tmp_path: Path) -> None:
    seen = {}
    for secret in (SECRET, SECRET[::-1]):
        ingest(archive, tmp_path / secret.hex(), secret, workers=1)
        rows = ShardDataset(tmp_path / secret.hex()).rows
        patients, exams = [row["patient"] for row in rows], [row["exam"] for row in rows]
        assert patients[0] == patients[1] != patients[2] == patients[3]
        assert exams[0] == exams[1] != exams[2] == exams[3]
        seen[secret] = {
            *patients,
            *exams,
            *(row["key"] for row in rows),
            read_manifest(tmp_path / secret.hex())["records"],
        }
    assert not seen[SECRET] & seen[SECRET[::-1]]
