"""A user's own files: the same film gives what it gave in training, and whatever is wrong is said of each."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from dicoms import mammogram, save, write_dicom
from lockables import lock, write_encoder
from PIL import Image
from respaced import changed

from miram.data.phantom import PhantomSettings, render
from miram.data.shards import ShardDataset
from miram.engine.errors import RunFailed, UserError
from miram.finetune.classify.locked import Locked, read_locked
from miram.finetune.explain import explain
from miram.finetune.films import Taking
from miram.finetune.predict import predict

SETTINGS = PhantomSettings(size=96, seed=7)  # of the fixture `phantoms`
TWELVE = Taking(bits=12)


@pytest.fixture(scope="module")
def run(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    lock(folder / "run", phantoms, write_encoder(folder / "encoder"), thresholds=dict.fromkeys(LEVELS, (0.84,)))
    return folder / "run"


LEVELS = ("image", "breast", "patient")


def save_png(path: Path, patient: int, side: str, view: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render(SETTINGS, patient, side, view).pixels).save(path)
    return path


def save_dicom(path: Path, patient: int, side: str, view: str, **tags: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {"PatientID": f"P{patient}", "ImageLaterality": side, "ViewPosition": view}
    return write_dicom(path, render(SETTINGS, patient, side, view).pixels, **(known | tags))


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def trained_as(run: Path, phantoms: Path) -> dict[tuple[str, ...], float]:
    """What the model says of the phantoms as `miram data phantom` stored them, by side, view and density."""
    shards = ShardDataset(phantoms)
    found = read_locked(run).probabilities(shards, np.arange(len(shards)))[:, 1]
    return {(row["exam"], row["laterality"], row["view"]): p for row, p in zip(shards.rows, found, strict=True)}


def test_a_film_from_a_png_or_dicom_file_gives_what_it_gave_in_training(
    run: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = sorted(trained_as(run, phantoms).values())
    for side, view in (("L", "CC"), ("R", "MLO")):
        save_png(tmp_path / f"{side}{view}.png", 3, side, view)
        save_dicom(tmp_path / f"{side}{view}.dcm", 3, side, view)
    predict(run, [str(tmp_path)], taking=TWELVE)
    rows = rows_of(capsys.readouterr().out)
    assert [Path(row["file"]).name for row in rows] == ["LCC.dcm", "LCC.png", "RMLO.dcm", "RMLO.png"]
    for dicom, png in (rows[:2], rows[2:]):
        assert float(dicom["p_1"]) == pytest.approx(float(png["p_1"]), abs=2e-6)
        assert min(abs(float(png["p_1"]) - p) for p in stored) < 2e-6


def test_csv_says_what_the_decision_rests_on(run: Path, tmp_path: Path) -> None:
    save_png(tmp_path / "films" / "one.png", 0, "L", "CC")
    predict(run, [str(tmp_path / "films")], tmp_path / "out" / "found.csv", taking=TWELVE)
    (row,) = rows_of((tmp_path / "out" / "found.csv").read_text())
    assert float(row["p_0"]) + float(row["p_1"]) == pytest.approx(1, abs=2e-6)
    assert row["decision"] == str(int(float(row["p_1"]) >= 0.84))
    assert (row["threshold"], row["temperature"]) == ("0.84", "1.7")
    assert row["model"] == read_locked(run).digest
    assert not list((tmp_path / "out").glob(".*"))


def test_files_folders_and_data_sets_mix_and_equal_names_stay_apart(
    run: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = save_png(tmp_path / "a" / "film.png", 0, "L", "CC"), save_png(tmp_path / "b" / "film.png", 1, "L", "CC")
    names = [str(a), str(tmp_path / "b"), str(tmp_path / "b"), str(phantoms)]
    predict(run, names, tmp_path / "found.json", taking=TWELVE)
    found = json.loads((tmp_path / "found.json").read_text())
    files = [image["file"] for image in found["images"]]
    assert files[:2] == [str(a), str(b)]
    assert files[2:] == ShardDataset(phantoms).rows.column("key")
    predict(run, [str(b)], taking=TWELVE)
    (alone,) = rows_of(capsys.readouterr().out)
    assert float(alone["p_1"]) == pytest.approx(found["images"][1]["probabilities"]["1"], abs=2e-6)


def test_every_film_gets_a_picture_of_its_own(run: Path, tmp_path: Path) -> None:
    names = [save_png(tmp_path / folder / "film.png", 0, "L", "CC") for folder in "ab"]
    names.append(save_dicom(tmp_path / "c" / "film-2.dcm", 1, "R", "CC"))
    predict(run, [str(name) for name in names], tmp_path / "found.json", tmp_path / "maps", taking=TWELVE)
    images = json.loads((tmp_path / "found.json").read_text())["images"]
    pictures = {image["file"]: image["picture"] for image in images}
    assert list(pictures) == [str(name) for name in names]
    assert len(set(pictures.values())) == 3
    assert pictures[str(names[0])] == "film-map.png"
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {*pictures.values(), "maps.csv"}
    listed = {row["picture"]: row["file"] for row in rows_of((tmp_path / "maps" / "maps.csv").read_text())}
    assert listed == {picture: file for file, picture in pictures.items()}


def test_films_stay_as_they_are_when_pictures_go_into_their_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = save_png(tmp_path / "film.png", 0, "L", "CC")
    content = film.read_bytes()
    for _ in range(2):
        predict(run, [str(film)], tmp_path / "found.csv", tmp_path, taking=TWELVE)
    assert film.read_bytes() == content
    save_png(tmp_path / "film-map.png", 1, "L", "CC")
    monkeypatch.setattr(Locked, "probabilities", None)  # what is refused, is before hours of judging
    with pytest.raises(UserError, match=r"film-map\.png is one of the images"):
        predict(run, [str(tmp_path)], tmp_path / "found.csv", tmp_path, taking=TWELVE)


def test_figures_are_written_before_pictures_which_may_fail(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("no picture")

    monkeypatch.setattr("miram.finetune.predict.explain", broken)
    film = save_png(tmp_path / "x_$y$_z.png", 0, "L", "CC")
    with pytest.raises(ValueError, match="no picture"):
        predict(run, [str(film)], tmp_path / "found.csv", tmp_path / "maps", taking=TWELVE)
    assert len(rows_of((tmp_path / "found.csv").read_text())) == 1


def test_breasts_and_patients_are_told_where_headers_know_them(run: Path, tmp_path: Path) -> None:
    films = tmp_path / "films"
    for side, view in (("L", "CC"), ("L", "MLO"), ("R", "CC")):
        save_dicom(films / f"{side}{view}.dcm", 2, side, view)
    save_dicom(films / "nobody.dcm", 4, "L", "CC", PatientID="anonymous")
    save_png(films / "picture.png", 5, "L", "CC")
    predict(run, [str(films)], tmp_path / "found.json", taking=TWELVE)
    text = (tmp_path / "found.json").read_text()
    found = json.loads(text)
    p = {Path(image["file"]).stem: image["probabilities"]["1"] for image in found["images"]}
    assert [image["patient"] for image in found["images"]] == [1, 1, 1, None, None]
    breasts = {breast["laterality"]: breast for breast in found["breasts"]}
    assert breasts["L"]["probabilities"]["1"] == pytest.approx((p["LCC"] + p["LMLO"]) / 2, abs=2e-6)
    assert breasts["R"]["files"] == [str(films / "RCC.dcm")]
    (patient,) = found["patients"]
    assert patient["probabilities"]["1"] == pytest.approx(max((p["LCC"] + p["LMLO"]) / 2, p["RCC"]), abs=2e-6)
    assert "P2" not in text
    assert found["model"] == read_locked(run).digest


def test_unreadable_files_are_listed_with_their_reason_and_the_others_judged(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    films = tmp_path / "films"
    save_png(films / "good.png", 0, "L", "CC")
    (films / "text.png").write_text("no image")
    (films / "colour.png").write_bytes(b"")
    colour = np.zeros((64, 64, 3), np.uint8)
    colour[8:50, 8:50, 0] = 200
    Image.fromarray(colour).save(films / "colour.png")
    without = mammogram(render(SETTINGS, 0, "L", "CC").pixels)
    del without.PixelData
    save(films / "empty.dcm", without)
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(films / "black.png")
    (films / "garbage.dcm").write_bytes(bytes(128) + b"DICM" + b"garbage " * 40)
    (films / "notes.txt").write_text("not even meant to be one")
    predict(run, [str(films)], tmp_path / "found.json", taking=TWELVE)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [Path(image["file"]).name for image in found["images"]] == ["good.png"]
    reasons = {Path(one["file"]).name: one["reason"] for one in found["left_out"]}
    assert set(reasons) == {"text.png", "colour.png", "empty.dcm", "black.png", "garbage.dcm"}
    assert "modality" not in reasons["garbage.dcm"]
    assert "get it again" in reasons["garbage.dcm"]
    assert "colour" in reasons["colour.png"]
    assert "--channels" not in reasons["colour.png"]
    errors = capsys.readouterr().err
    assert all(name in errors for name in reasons)


def test_a_file_that_was_named_is_tried_whatever_it_is_called(run: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(RunFailed, match="none of the 1 images"):
        predict(run, [str(tmp_path / "notes.txt")])
    Image.fromarray(render(SETTINGS, 0, "L", "CC").pixels).save(tmp_path / "film", format="png")
    predict(run, [str(tmp_path / "film")], tmp_path / "found.csv", taking=TWELVE)


def test_what_is_not_there_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for names, said in (
        ([], "at least one"),
        ([str(tmp_path / "x.png")], "there is no"),
        ([str(tmp_path / "empty")], "no image"),
    ):
        with pytest.raises(UserError, match=said):
            predict(run, names)
    film = save_png(tmp_path / "film.png", 0, "L", "CC")
    with pytest.raises(UserError, match=r"\.csv or \.json"):
        predict(run, [str(film)], tmp_path / "found.txt")


def test_a_range_that_is_not_used_up_is_pointed_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = save_png(tmp_path / "film.png", 0, "L", "CC")
    predict(run, [str(film)])
    assert "--bits" in capsys.readouterr().err
    predict(run, [str(film)], taking=TWELVE)
    assert "--bits" not in capsys.readouterr().err


def test_raw_images_are_left_out_unless_they_are_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = save_dicom(tmp_path / "raw.dcm", 0, "L", "CC", PresentationIntentType="FOR PROCESSING")
    with pytest.raises(RunFailed):
        predict(run, [str(raw)])
    assert "--for-processing takes it" in capsys.readouterr().err
    predict(run, [str(raw)], taking=Taking(for_processing=True))


def test_nothing_of_the_films_stays_behind(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    film = save_dicom(tmp_path / "film.dcm", 0, "L", "CC")
    predict(run, [str(film)], tmp_path / "found.json")
    assert not list(place.iterdir())
    assert not (tmp_path / "config").exists()


def test_films_are_brought_to_the_training_sets_size(phantoms: Path, tmp_path: Path, run: Path) -> None:
    from miram.data.derive import derive
    from miram.data.geometry import Size

    derive(str(phantoms), tmp_path / "small", Size(max_size=48), packed=False, workers=1)
    lock(tmp_path / "run", tmp_path / "small", run.with_name("encoder"))
    stored = trained_as(tmp_path / "run", tmp_path / "small").values()
    film = save_png(tmp_path / "film.png", 3, "R", "CC")
    predict(tmp_path / "run", [str(film)], tmp_path / "found.json", taking=TWELVE)
    (image,) = json.loads((tmp_path / "found.json").read_text())["images"]
    assert min(abs(image["probabilities"]["1"] - p) for p in stored) < 2e-6


def test_several_labels_and_several_classes_are_decided_by_name(phantoms: Path, tmp_path: Path, run: Path) -> None:
    encoder, film = run.with_name("encoder"), save_png(tmp_path / "film.png", 0, "L", "CC")
    both = dict.fromkeys(LEVELS, (0.0, 0.0))
    lock(tmp_path / "labels", phantoms, encoder, task="mass,calc", thresholds=both)
    predict(tmp_path / "labels", [str(film)], tmp_path / "labels.csv", taking=TWELVE)
    (row,) = rows_of((tmp_path / "labels.csv").read_text())
    assert (row["decision"], row["threshold"]) == ("mass|calc", "0|0")
    lock(tmp_path / "classes", phantoms, encoder, task="density")
    predict(tmp_path / "classes", [str(film)], tmp_path / "classes.csv", taking=TWELVE)
    (row,) = rows_of((tmp_path / "classes.csv").read_text())
    assert row["decision"] == max("abcd", key=lambda name: float(row[f"p_{name}"]))
    assert row["threshold"] == ""


def test_tiles_want_a_resolution_and_say_so_of_each_film(
    phantoms: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiles = {"mm_per_pixel": 2.5}
    lock(tmp_path / "run", phantoms, run.with_name("encoder"), input="tiles", method="linear", tiles=tiles)
    film = save_png(tmp_path / "films" / "film.png", 3, "L", "CC")
    with pytest.raises(RunFailed):
        predict(tmp_path / "run", [str(film)], taking=TWELVE)
    assert "say it with --spacing" in capsys.readouterr().err
    found = tmp_path / "found.json"
    predict(tmp_path / "run", [str(film)], found, tmp_path / "maps", taking=Taking(bits=12, spacing_mm=2.5))
    assert len(json.loads(found.read_text())["images"]) == 1
    assert (tmp_path / "maps" / "film-map.png").stat().st_size > 5000


def test_films_do_not_take_the_spacing_that_was_stated_of_the_training_data(
    phantoms: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiles = {"mm_per_pixel": 2.5, "spacing_mm": 2.5}
    lock(tmp_path / "run", phantoms, run.with_name("encoder"), input="tiles", method="linear", tiles=tiles)
    films = [save_png(tmp_path / "film.png", 3, "L", "CC")]
    films.append(save_dicom(tmp_path / "film.dcm", 3, "L", "CC", ImagerPixelSpacing=None))
    with pytest.raises(RunFailed, match="none of the 2"):
        predict(tmp_path / "run", [str(film) for film in films], taking=TWELVE)
    assert capsys.readouterr().err.count("say it with --spacing") == 2
    predict(tmp_path / "run", [str(film) for film in films], taking=Taking(bits=12, spacing_mm=2.5))
    said = capsys.readouterr()
    png, dicom = rows_of(said.out)
    assert float(png["p_1"]) == pytest.approx(float(dicom["p_1"]), abs=2e-6)
    assert "1 of 2 images do not say whose breast they show" in said.err


def test_a_data_set_is_judged_without_images_of_unknown_spacing_and_the_map_is_of_those_that_were(
    phantoms: Path, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = {"mm_per_pixel": 2.5, "spacing_mm": 2.5}
    lock(tmp_path / "run", phantoms, run.with_name("encoder"), input="tiles", method="linear", tiles=tiles)
    foreign = changed(phantoms, tmp_path / "foreign", {1: "", 4: "2.7"}, "foreign")
    asked = []

    def counted(*arguments: object, rows: np.ndarray) -> str:
        asked.append((arguments[2], rows.tolist()))
        return explain(*arguments, rows=rows) if arguments[2] == 0 else ""  # type: ignore[arg-type]

    monkeypatch.setattr("miram.finetune.predict.explain", counted)
    predict(tmp_path / "run", [str(tmp_path / "foreign")], tmp_path / "found.json", tmp_path / "maps")
    found, judged = json.loads((tmp_path / "found.json").read_text()), [*range(48)]
    judged = [row for row in judged if row not in (1, 4)]
    keys = foreign.rows.column("key")
    assert [image["file"] for image in found["images"]] == [keys[row] for row in judged]
    reasons = {one["file"]: one["reason"] for one in found["left_out"]}
    assert "--spacing" not in reasons[keys[1]]
    assert "ingest it again with its spacing" in reasons[keys[1]]
    assert "2.7 mm a pixel, coarser" in reasons[keys[4]]
    assert asked == [(row, judged) for row in judged]


def test_films_that_are_to_be_brought_to_a_spacing_need_one(
    phantoms: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from miram.data.derive import derive
    from miram.data.geometry import Size

    derive(str(phantoms), tmp_path / "coarse", Size(spacing_mm=5.0), packed=False, workers=1)
    lock(tmp_path / "run", tmp_path / "coarse", run.with_name("encoder"))
    stored = trained_as(tmp_path / "run", tmp_path / "coarse").values()
    films = [save_png(tmp_path / "film.png", 3, "R", "CC")]
    films.append(save_dicom(tmp_path / "film.dcm", 3, "R", "CC", ImagerPixelSpacing=None))
    with pytest.raises(RunFailed):
        predict(tmp_path / "run", [str(film) for film in films], taking=TWELVE)
    assert capsys.readouterr().err.count("its spacing is unknown, and the model wants one; say it with --spacing") == 2
    predict(tmp_path / "run", [str(film) for film in films], taking=Taking(bits=12, spacing_mm=2.5))
    for row in rows_of(capsys.readouterr().out):
        assert min(abs(float(row["p_1"]) - p) for p in stored) < 2e-6
