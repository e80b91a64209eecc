"""A user's own films with a segmentation model: the mask of the run in the film's pixels, film by film."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicoms import write_dicom
from numpy.typing import NDArray
from PIL import Image
from tellers import bright, card, seal

from miram.data.archive import SourceOptions
from miram.data.derive import derive
from miram.data.geometry import Geometry, Size
from miram.data.ingest import ingest
from miram.data.phantom import PhantomSettings, render
from miram.data.shards import ShardDataset
from miram.data.sources.folder import read
from miram.engine.errors import RunFailed, UserError
from miram.finetune.films import Images, Taking, taken
from miram.finetune.segment import predict as module
from miram.finetune.segment.locked import Segmenter
from miram.finetune.segment.predict import predict, predict_masks

SETTINGS = PhantomSettings(size=96, seed=7)
TWELVE = Taking(bits=12)


def film(side: str = "L", view: str = "CC", patient: int = 3) -> NDArray[np.uint16]:
    return np.asarray(render(SETTINGS, patient, side, view).pixels)


def save_png(path: Path, pixels: NDArray[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def opened(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def images_of(shards: ShardDataset) -> Images:
    return Images(shards, tuple(shards.rows.column("key")))


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Four films of both sides as PNG, and a data set of them: breast cut out, chest wall left, half as large."""
    folder = tmp_path_factory.mktemp("films")
    for side in "LR":
        for view in ("CC", "MLO"):
            save_png(folder / "films" / f"{side}{view}.png", film(side, view))
    table = folder / "bits.csv"
    table.write_text("file,bits,patient\n" + "".join(f"{s}{v}.png,12,p\n" for s in "LR" for v in ("CC", "MLO")))
    archive = read(folder / "films", SourceOptions(labels=table))
    ingest(archive, folder / "shards", b"secret", workers=1, size=Size(max_size=64))
    return folder / "films", folder / "shards"


@pytest.fixture(scope="module")
def sealed(ingested: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Segmenter]:
    """A run with a model of random weights, whose threshold is about what it says of tissue."""
    run, data = tmp_path_factory.mktemp("run") / "run", ingested[1]
    probed = seal(run, data, thresholds=(0.5,))
    sample = ShardDataset(data)[0]
    said = probed.probabilities(sample)[1][np.asarray(sample.pixels) > 0]
    return run, seal(run, data, thresholds=(float(np.median(said)),))


def by_side(data: Path) -> dict[bool, list[int]]:
    """Rows of a data set by whether they were flipped."""
    shards = ShardDataset(data)
    flipped = [Geometry.from_dict(shards[i].meta["geometry"]).flipped for i in range(len(shards))]
    return {side: [i for i, f in enumerate(flipped) if f is side] for side in (False, True)}


def test_a_film_gets_the_mask_of_its_stored_sample_in_its_own_pixels(
    ingested: tuple[Path, Path], sealed: tuple[Path, Segmenter], tmp_path: Path
) -> None:
    (films, data), (run, segmenter) = ingested, sealed
    predict(run, [str(films)], tmp_path / "masks", taking=TWELVE, out=tmp_path / "found.csv")
    shards = ShardDataset(data)
    wanted = []
    for i in range(len(shards)):
        said = segmenter.mask(segmenter.probabilities(shards[i]))
        geometry = Geometry.from_dict(shards[i].meta["geometry"])
        assert geometry.rows < geometry.box[0]
        wanted.append(255 * geometry.restore(said))
    assert all(by_side(data).values())
    assert len({mask.tobytes() for mask in wanted}) == 4
    for name in ("LCC", "LMLO", "RCC", "RMLO"):
        mask = opened(tmp_path / "masks" / f"{name}-mask.png")
        assert mask.shape == film().shape
        assert 50 < (mask > 0).sum() < mask.size / 2
        assert sum(np.array_equal(mask, other) for other in wanted) == 1
    rows = rows_of((tmp_path / "found.csv").read_text())
    assert [Path(row["file"]).name for row in rows] == ["LCC.png", "LMLO.png", "RCC.png", "RMLO.png"]
    assert {row["model"] for row in rows} == {segmenter.digest}


def test_masks_lie_where_the_film_is_bright(tmp_path: Path) -> None:
    """The whole way through with a model that is right: what is bright comes back pixel by pixel."""
    pixels = np.minimum(film(), 3000)
    rows, columns = (int(np.median(places)) for places in np.nonzero(pixels > 600))
    pixels[rows : rows + 11, columns - 7 : columns + 1] = 4000
    breast = {"breast": True, "spacing_mm": None, "max_size": None}
    for number, one in enumerate((pixels, pixels[:, ::-1])):
        path = save_png(tmp_path / f"{number}.png", one)
        segmenter = bright((0.9,), preprocessing=(breast,))
        with taken([str(path)], segmenter.card, TWELVE, workers=1) as (found, left_out):
            predict_masks(segmenter, found, left_out, tmp_path / "masks")
        assert np.array_equal(opened(tmp_path / "masks" / f"{number}-mask.png"), np.where(one == 4000, 255, 0))


def test_a_row_says_what_the_mask_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.full((64, 70), 10, np.uint8)
    pixels[5:9, 5:9] = pixels[9:11, 9:11] = 140
    pixels[30:40, 30:45] = 250
    paths = [
        str(save_png(tmp_path / "a" / "film.png", pixels)),
        str(save_png(tmp_path / "b" / "film.png", pixels // 9)),
    ]
    segmenter = bright((0.4, 0.9))
    with taken(paths, segmenter.card, Taking(spacing_mm=0.5), workers=1) as (found, left_out):
        predict_masks(segmenter, found, left_out, tmp_path / "masks", ["nifti"])
    one, other = rows_of(capsys.readouterr().out)
    assert (one["file"], one["said"], one["mask"]) == (paths[0], "yes", "film-mask.png")
    assert (one["pixels_class 1"], one["mm2_class 1"], one["components_class 1"]) == ("20", "5.00", "1")
    assert (one["pixels_class 2"], one["mm2_class 2"], one["components_class 2"]) == ("150", "37.50", "1")
    assert float(one["p_class 2"]) > 0.99
    assert (other["said"], other["mask"], other["pixels_class 1"]) == ("no", "film-mask-2.png", "0")
    assert (one["threshold"], one["model"]) == ("", "d" * 64)
    told = json.loads((tmp_path / "masks" / "film-mask.json").read_text())
    assert (told["file"], told["spacing_mm"], told["sop_instance_uid"]) == (paths[0], 0.5, None)
    image = nib.load(tmp_path / "masks" / "film-mask.nii.gz")
    assert np.array_equal(np.asarray(image.dataobj)[..., 0].T, opened(tmp_path / "masks" / "film-mask.png"))
    assert image.header.get_zooms()[:2] == (0.5, 0.5)


def test_a_dicom_file_gets_a_segmentation_of_its_own(tmp_path: Path) -> None:
    hd = pytest.importorskip("highdicom")
    pixels = film()
    path = write_dicom(tmp_path / "film.dcm", pixels, ImageLaterality="L")
    segmenter = bright((0.2,))
    with taken([str(path)], segmenter.card, workers=1) as (found, left_out):
        predict_masks(segmenter, found, left_out, tmp_path / "masks", ["dicom-seg"], tmp_path / "found.csv")
    told = json.loads((tmp_path / "masks" / "film-mask.json").read_text())
    assert told["sop_instance_uid"] == pydicom.dcmread(path).SOPInstanceUID
    assert told["spacing_mm"] == 0.07
    read_back = hd.seg.segread(tmp_path / "masks" / "film-mask.dcm").pixel_array
    assert np.array_equal(255 * read_back, opened(tmp_path / "masks" / "film-mask.png"))
    assert read_back.any()


def test_what_is_impossible_is_refused_before_hours_are_spent(
    ingested: tuple[Path, Path], sealed: tuple[Path, Segmenter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (films, data), (run, _) = ingested, sealed
    monkeypatch.setattr(Segmenter, "probabilities", None)
    for images, how, said in (
        ([films], {"formats": ["dicom-seg"]}, "LCC.png is no DICOM file"),
        ([data], {"formats": ["dicom-seg"]}, "is of a data set"),
        ([films], {"formats": ["dicom"]}, "--format dicom is not known"),
        ([films], {"out": tmp_path / "found.json"}, "must end in .csv"),
    ):
        with pytest.raises(UserError, match=said):
            predict(run, [str(image) for image in images], tmp_path / "masks", taking=TWELVE, **how)
        assert not (tmp_path / "masks").exists()
    save_png(tmp_path / "masks" / "LCC-mask.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(UserError, match=r"LCC-mask\.png is there, and is no mask of .*--masks another folder"):
        predict(run, [str(films)], tmp_path / "masks", taking=TWELVE)


def test_images_of_other_channels_are_refused(ingested: tuple[Path, Path], tmp_path: Path) -> None:
    segmenter = bright(channels=3)
    found, left_out = (
        [module.Images(ShardDataset(ingested[1]), tuple(ShardDataset(ingested[1]).rows.column("key")))],
        {},
    )
    with pytest.raises(UserError, match="1 channels, and the model takes 3"):
        predict_masks(segmenter, found, left_out, tmp_path)


def test_images_without_the_models_resolution_are_left_out_and_the_others_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine = write_dicom(tmp_path / "fine.dcm", film())
    coarse = write_dicom(tmp_path / "coarse.dcm", film("R"), ImagerPixelSpacing=[0.4, 0.4])
    unknown = save_png(tmp_path / "unknown.png", film("R", "MLO"))
    segmenter = bright((0.2,), mm_per_pixel=0.1)
    with taken([str(p) for p in (fine, coarse, unknown)], segmenter.card, TWELVE, workers=1) as (found, left_out):
        predict_masks(segmenter, found, left_out, tmp_path / "masks")
    said = capsys.readouterr()
    assert [Path(row["file"]).name for row in rows_of(said.out)] == ["fine.dcm"]
    assert "coarse.dcm: " in said.err
    assert "say it with --spacing" in said.err
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == ["fine-mask.json", "fine-mask.png", "masks.csv"]
    with (
        taken([str(coarse)], segmenter.card, workers=1) as (found, left_out),
        pytest.raises(RunFailed, match="none of"),
    ):
        predict_masks(segmenter, found, left_out, tmp_path / "others")


def test_a_data_set_keeps_its_films_pixels_and_tells_nothing_of_headers(phantoms: Path, tmp_path: Path) -> None:
    derive(str(phantoms), tmp_path / "small", Size(max_size=48), packed=True, workers=1)
    shards = ShardDataset(tmp_path / "small").subset([0, 1])
    out, pictures = tmp_path / "found.csv", tmp_path / "maps"
    predict_masks(bright((0.2,)), [images_of(shards)], {}, tmp_path / "masks", out=out, pictures=pictures)
    for row in rows_of((tmp_path / "found.csv").read_text()):
        told = json.loads((tmp_path / "masks" / row["mask"]).with_suffix(".json").read_text())
        assert told["file"] == row["file"]
        assert told["sop_instance_uid"] is None
        assert (told["height"], told["width"]) == opened(tmp_path / "masks" / row["mask"]).shape == film().shape
        assert (tmp_path / "maps" / f"{row['file']}-overlay.png").stat().st_size > 5000


def test_pictures_show_the_film_and_what_was_judged_stays_where_they_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[dict[str, Any]] = []

    def note(path: Path, pixels: Any, most: int, truth: Any, said: Any, *_: Any, probabilities: Any) -> None:
        drawn.append({"path": path, "pixels": pixels, "said": said, "probabilities": probabilities})
        if len(drawn) == 2:
            raise ValueError("no picture")

    monkeypatch.setattr(module, "draw_overlay", note)
    paths = [str(save_png(tmp_path / f"{side}.png", film(side))) for side in "LR"]
    how = {"breast": True, "spacing_mm": None, "max_size": 48}
    segmenter = bright((0.2,), preprocessing=(how,))
    with (
        taken(paths, segmenter.card, TWELVE, workers=1) as (found, left_out),
        pytest.raises(ValueError, match="no pict"),
    ):
        predict_masks(segmenter, found, left_out, tmp_path / "masks", out=tmp_path / "a.csv", pictures=tmp_path / "p")
    for one, side in zip(drawn, "LR", strict=True):
        assert np.array_equal(one["pixels"], film(side))
        assert one["probabilities"].shape == (2, *film().shape)
        assert np.array_equal(255 * one["said"], opened(tmp_path / "masks" / f"{side}-mask.png"))
        assert np.array_equal(one["probabilities"].argmax(0), one["said"])
        assert one["path"] == tmp_path / "p" / f"{side}-overlay.png"
    assert len(rows_of((tmp_path / "a.csv").read_text())) == 2


def test_films_are_read_one_by_one(
    ingested: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of a film is held once its mask is written."""
    order: list[str] = []
    usual_read, usual_write = ShardDataset.__getitem__, module.write_mask

    def reads(self: ShardDataset, i: int) -> Any:
        order.append("read")
        return usual_read(self, i)

    def writes(*arguments: Any) -> None:
        order.append("write")
        usual_write(*arguments)

    monkeypatch.setattr(ShardDataset, "__getitem__", reads)
    monkeypatch.setattr(module, "write_mask", writes)
    shards = ShardDataset(ingested[1])
    predict_masks(
        bright(), [module.Images(shards, tuple(shards.rows.column("key")))], {}, tmp_path / "m", out=tmp_path / "o.csv"
    )
    assert order == ["read", "write"] * 4


def test_a_card_says_what_films_must_tell() -> None:
    assert not card().measured
    assert card(mm_per_pixel=0.1).measured


def test_films_that_look_much_larger_than_those_of_training_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "film.png"
    save_png(picture, np.full((90, 60), 99, np.uint8))
    told = []
    for rasters in ((80, 100), (70, 400), (10, 40), (200, 300)):
        segmenter = bright(rasters=rasters)
        with taken([str(picture)], segmenter.card) as (found, left_out):
            predict_masks(segmenter, found, left_out, tmp_path / f"masks-{rasters[0]}", out=tmp_path / "found.csv")
        told.append("of another size" in capsys.readouterr().err)
    assert told == [False, False, True, True]
