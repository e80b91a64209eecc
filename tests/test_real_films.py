"""Real images, where `MIRAM_REAL_DATA` names a folder that holds them."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from miram.data.archive import SourceOptions
from miram.data.dicom.reader import DicomOptions
from miram.data.geometry import Geometry
from miram.data.ingest import ingest, sample_key
from miram.data.shards import ShardDataset
from miram.data.sources import read_archive
from miram.data.verify import verify
from miram.engine.run import read_metrics
from miram.finetune.task import read_task
from miram.pretrain.stage import pretrain

REAL = Path(os.environ.get("MIRAM_REAL_DATA", "nowhere"))
FILMS = REAL / "mini_mias" / "all-mias"
SECRET = b"a secret of the test"
pytestmark = pytest.mark.skipif(not FILMS.is_dir(), reason="MIRAM_REAL_DATA names no folder with mini_mias/all-mias")


@pytest.fixture(scope="module")
def mias(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "mias"
    ingest(read_archive("mias", FILMS), out, SECRET)
    return out


def test_a_hundred_films_of_fifty_patients_are_counted_right(mias: Path) -> None:
    with (mias / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert (len(rows), len({row["patient"] for row in rows})) == (100, 50)
    assert not list(verify(mias))
    task = read_task(ShardDataset(mias), "tissue")
    assert dict(zip(task.classes, np.bincount(task.truth).tolist(), strict=True)) == {"D": 32, "F": 28, "G": 40}


def test_marked_circles_are_brighter_than_what_surrounds_them(mias: Path) -> None:
    """Facts say lesions stand out by some 23 grey levels in the median; a y counted from the top would lose that."""
    shards, contrast, mirrored = ShardDataset(mias), [], []
    for i in range(len(shards)):
        sample = shards[i]
        for circle in sample.meta["circles"]:
            contrast.append(stands_out(sample.pixels, circle, circle["y"]))
            mirrored.append(stands_out(sample.pixels, circle, sample.pixels.shape[0] - 1 - circle["y"]))
    assert len(contrast) >= 30
    assert np.nanmedian(contrast) > 10
    assert np.nanmedian(contrast) > np.nanmedian(mirrored)


def stands_out(pixels: np.ndarray, circle: dict[str, float], y: float) -> float:
    """Mean of the disc minus mean of the ring around it, tissue only; NaN where there is none."""
    rows, columns = np.ogrid[: pixels.shape[0], : pixels.shape[1]]
    distance = np.hypot(rows - y, columns - circle["x"])
    disc = (distance < circle["radius"]) & (pixels > 0)
    ring = (distance > 1.2 * circle["radius"]) & (distance < 2 * circle["radius"]) & (pixels > 0)
    return float(pixels[disc].mean() - pixels[ring].mean()) if disc.any() and ring.any() else float("nan")


def table(name: str, path: Path, *columns: tuple[str, str]) -> Path:
    """A label file out of some columns of a set's own labels.csv, renamed."""
    with (REAL / name / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [",".join(new for new, _ in columns), *(",".join(row[old] for _, old in columns) for row in rows)]
    path.write_text("\n".join(lines))
    return path


def test_lesion_masks_of_real_films_come_back_to_them(tmp_path: Path) -> None:
    columns = (("file", "image"), ("patient", "patient"), ("laterality", "laterality"))
    labels = table("cdd_cesm_seg512", tmp_path / "l.csv", *columns)
    options = SourceOptions(labels=labels, masks=REAL / "cdd_cesm_seg512" / "masks")
    archive = read_archive("folder", REAL / "cdd_cesm_seg512", options)
    masks = {sample_key(record, "folder", SECRET): record.read().mask for record in archive.records}
    ingest(archive, tmp_path / "set", SECRET)
    shards = ShardDataset(tmp_path / "set")
    assert len(shards) == 63
    for i in range(len(shards)):
        sample = shards[i]
        assert sample.mask is not None
        back = Geometry.from_dict(sample.meta["geometry"]).restore(sample.mask)
        np.testing.assert_array_equal(back, masks[sample.key])


def test_classes_of_real_films_keep_their_numbers(tmp_path: Path) -> None:
    labels = table(
        "ddsm_tissue_seg", tmp_path / "l.csv", ("file", "image"), ("patient", "ddsm_case"), ("split", "split")
    )
    folder = REAL / "ddsm_tissue_seg"
    ingest(
        read_archive("folder", folder, SourceOptions(labels=labels, masks=folder, mask_kind="classes")),
        tmp_path / "set",
        SECRET,
    )
    shards = ShardDataset(tmp_path / "set")
    masks = [shards[i].mask for i in range(len(shards))]
    assert len(masks) == 44
    assert set().union(*(set(np.unique(mask).tolist()) for mask in masks if mask is not None)) <= {64, 128, 192, 255}


def test_real_dicom_is_read_or_named(tmp_path: Path) -> None:
    archive = read_archive("folder", REAL / "mg_dicom", SourceOptions(dicom=DicomOptions(any_modality=True)))
    outcome = ingest(archive, tmp_path / "set", SECRET)
    assert (outcome.samples, list(outcome.skipped)) == (2, ["MG1_JPLY"])
    assert "1.2.840.10008.1.2.4.51" in outcome.skipped["MG1_JPLY"]


def test_twelve_bits_in_files_of_sixteen_are_noticed(tmp_path: Path) -> None:
    archive = read_archive("folder", REAL / "nyu_gmic_samples" / "images", SourceOptions())
    assert any("12 bits" in note for note in archive.notes)
    (tmp_path / "l.csv").write_text(
        "file,patient,bits\n" + "".join(f"0_{v}.png,0,12\n" for v in ("L-CC", "L-MLO", "R-CC", "R-MLO"))
    )
    archive = read_archive("folder", REAL / "nyu_gmic_samples" / "images", SourceOptions(labels=tmp_path / "l.csv"))
    ingest(archive, tmp_path / "set", SECRET)
    shards = ShardDataset(tmp_path / "set")
    assert {row["max_value"] for row in shards.rows} == {"4095"}
    assert shards[0].pixels.max() > 2000


def test_the_loss_falls_on_real_films(mias: Path, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    out = tmp_path / "run"
    short = ["--train.steps=12", "--train.warmup_steps=2", "--train.log_every=2", "--data.workers=0"]
    pretrain("pretrain/mias_small", [f"--data.shards={mias}", f"--out={out}", *short])
    losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl")]
    assert losses[-1] < 0.9 * losses[0]
    assert (out / "figures" / "reconstructions.png").stat().st_size > 10_000
