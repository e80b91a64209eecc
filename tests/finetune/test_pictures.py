"""Pictures get names of their own, and replace nothing but earlier pictures of the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from miram.engine.errors import UserError
from miram.finetune.pictures import claim, names_for


def test_pictures_are_called_after_the_whole_name_but_for_a_formats_suffix() -> None:
    uids = ["1.2.840.10", "a/1.2.840.11", "b/1.2.840.11", "1.2.840.11.dcm", "Film.PNG", "film.tif"]
    assert names_for(uids) == [
        "1.2.840.10-map.png",
        "1.2.840.11-map.png",
        "1.2.840.11-map-2.png",
        "1.2.840.11-map-3.png",
        "Film-map.png",
        "film-map-2.png",
    ]
    (name,) = names_for(["é" * 120 + ".png"])
    assert len(name.encode()) < 255


def test_an_earlier_picture_of_the_same_file_by_the_same_model_may_be_replaced_and_nothing_else(tmp_path: Path) -> None:
    picture = tmp_path / "film-map.png"
    claim(tmp_path, {picture.name: "a/film.png"}, "model 1", [])
    picture.write_bytes(b"drawn")
    claim(tmp_path, {picture.name: "a/film.png"}, "model 1", [])
    for file, model in (("b/film.png", "model 1"), ("a/film.png", "model 2")):
        with pytest.raises(UserError, match=rf"film-map\.png is there, and is no map of {file} by this model"):
            claim(tmp_path, {picture.name: file}, model, [])
    claim(tmp_path, {"other-map.png": "b/other.png"}, "model 2", [])
    claim(tmp_path, {picture.name: "a/film.png"}, "model 1", [])  # is still known
    (tmp_path / "mine-map.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"mine-map\.png is there"):
        claim(tmp_path, {"mine-map.png": "mine.png"}, "model 1", [])


def test_an_image_is_not_replaced_whatever_leads_to_it(tmp_path: Path) -> None:
    (tmp_path / "films").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "films")
    claim(tmp_path / "films", {"a-map.png": "a.png"}, "model", [])
    film = tmp_path / "films" / "a-map.png"
    film.write_bytes(b"a film")
    with pytest.raises(UserError, match="is one of the images"):
        claim(tmp_path / "link", {"a-map.png": "a.png"}, "model", [film])


def test_a_table_of_the_users_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "maps.csv").write_text("my,own\n")
    with pytest.raises(UserError, match=r"maps\.csv is no list of maps"):
        claim(tmp_path, {"a-map.png": "a.png"}, "model", [])
    assert (tmp_path / "maps.csv").read_text() == "my,own\n"
