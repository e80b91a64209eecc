"""Maps of what counted: they point at the one thing a made-up model looks at, wherever the film had it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lockables import lock, write_encoder
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from torch import Tensor, nn

from miram.data.geometry import Geometry
from miram.data.record import Region
from miram.data.shards import Sample, ShardDataset
from miram.data.tiles import tiles
from miram.data.views import Normalisation
from miram.engine.metrics import Kind
from miram.finetune.classify.locked import Locked, read_locked
from miram.finetune.classify.targets import Target
from miram.finetune.explain import explain
from miram.finetune.films import Taking, taken
from miram.finetune.said import Said, said_of
from miram.finetune.saliency import occlusion as hiding
from miram.finetune.saliency.attention import attended, rastered
from miram.finetune.saliency.occlusion import AS_STORED, log_odds, occlusion, places, surroundings
from miram.finetune.saliency.picture import draw, painted
from miram.finetune.saliency.worth import Map

SAID = Said(1, "mass = 1", 0.9, 0.5, "1", "mass = 1")


class Brightest(nn.Module):
    """The surer of class 1 the brighter the brightest place of a frame; patches of 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Module()
        self.embed.grid_size, self.embed.patch_size = (8, 8), (8, 8)

    def forward(self, images: Tensor) -> Tensor:
        grey = images * 0.3 + 0.2
        hottest = nn.functional.avg_pool2d(grey, 3, 1).amax((1, 2, 3))
        return torch.stack([torch.zeros_like(hottest), 20 * (hottest - 0.7).relu()], 1)


@pytest.fixture(scope="module")
def run(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    lock(folder / "run", phantoms, write_encoder(folder / "encoder"))
    return folder / "run"


@pytest.fixture(scope="module")
def brightest(run: Path) -> Locked:
    card = read_locked(run).card.model_copy(update={"image_size": (128, 128), "temperature": 1.0})
    return Locked(card, Brightest())  # type: ignore[arg-type]


def spotted(shape: tuple[int, int], spot: tuple[int, int]) -> Sample:
    """Half grey, with a bright spot; air on the right fifth."""
    pixels = np.full(shape, 2000, np.uint16)
    pixels[:, shape[1] * 4 // 5 :] = 0
    reach = max(shape) // 40
    pixels[spot[0] - reach : spot[0] + reach, spot[1] - reach : spot[1] + reach] = 4095
    return Sample("spotted", pixels, 4095, {"geometry": Geometry.whole(*shape).as_dict()})


@pytest.mark.parametrize("input", ["whole", "windows"])
@pytest.mark.parametrize(("shape", "spot"), [((200, 120), (150, 30)), ((90, 140), (20, 80))])
def test_hiding_the_bright_spot_is_what_counts(
    brightest: Locked, input: str, shape: tuple[int, int], spot: tuple[int, int]
) -> None:
    locked = replace(brightest, card=brightest.card.model_copy(update={"input": input}))
    found = occlusion(locked, spotted(shape, spot))
    assert (found.said.answer, found.said.short) == ("mass = 1", "1")
    row, column = np.unravel_index(found.values.argmax(), found.values.shape)
    cell = np.array(shape) / found.values.shape
    assert np.abs((np.array([row, column]) + 0.5) * cell - spot).max() < 1.01 * cell.max()
    assert found.values.max() > 1
    far = np.abs((np.indices(found.values.shape) + 0.5) * cell[:, None, None] - np.array(spot)[:, None, None]).max(0)
    assert np.abs(found.values[far > 3 * cell.max()]).max() < 0.02


def test_places_are_those_that_frames_show() -> None:
    rows, columns = np.ogrid[:150, :90]
    smooth = np.sin(rows / 30) + np.cos(columns / 20)
    pixels = (1 + 4000 * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.uint16)
    sample = Sample("smooth", pixels, 4095, {})
    for input in ("whole", "windows"):
        y, x, inside = places(sample, (64, 48), input)
        seen = hiding.frames(sample, (64, 48), AS_STORED, input).numpy()[:, 0] * 4095
        looked_up = pixels[np.rint(y).astype(int).clip(0, 149), np.rint(x).astype(int).clip(0, 89)]
        there = inside > 0
        assert np.corrcoef(seen[there], looked_up[there])[0, 1] > 0.999
        assert there.all() or (seen[~there] == 0).mean() > 0.85  # but for pixels that the image's edge runs through


def test_what_is_put_in_a_hidden_place_is_the_tissue_around_it_and_no_air() -> None:
    raw = np.zeros((1, 1, 40, 40), np.float32)
    raw[..., :20] = 0.5
    filling, tissue = surroundings(raw, 12)
    assert np.allclose(filling[0, 0, :, :20], 0.5, atol=1e-5)
    assert tissue[0].sum() == 40 * 20


def test_nothing_is_asked_of_air(brightest: Locked, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(model: nn.Module, pictures: object, n: int, batch_size: int) -> np.ndarray:
        asked.append(n)
        return np.zeros((n, 2))

    monkeypatch.setattr(hiding, "mean_logits", counted)
    whole = spotted((128, 128), (60, 40))
    half = replace(whole, pixels=np.where(np.arange(128) < 40, whole.pixels, np.uint16(0)))
    occlusion(brightest, whole)
    found = occlusion(brightest, half)
    assert asked[1] < asked[0] / 1.5
    assert (found.values[:, -1] == 0).all()


def test_the_map_lies_on_the_film_where_the_breast_was(
    run: Path, brightest: Locked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, object] = {}

    def caught(path: Path, pixels: np.ndarray, found: Map, title: str, stored: object, geometry: Geometry) -> None:
        drawn.update(pixels=pixels, found=found, geometry=geometry)

    monkeypatch.setattr("miram.finetune.explain.draw", caught)
    film = np.full((240, 200), 3, np.uint8)
    rows, columns = np.ogrid[:240, :200]
    breast = ((rows - 120) / 90) ** 2 + ((columns - 199) / 110) ** 2 < 1  # chest wall on the right: it is flipped
    film[breast] = 130
    film[150:162, 120:132] = 255
    Image.fromarray(film).save(tmp_path / "film.png")
    with taken([str(tmp_path / "film.png")], brightest.card, Taking()) as (found, _):
        explain(brightest, found[0].shards, 0, tmp_path / "x.png", "film", found[0].film(0))
    geometry, values = drawn["geometry"], drawn["found"].values
    assert isinstance(geometry, Geometry)
    assert geometry.flipped
    assert np.array_equal(drawn["pixels"], film)
    row, column = np.unravel_index(values.argmax(), values.shape)
    stored = (column + 0.5) * geometry.columns / values.shape[1], (row + 0.5) * geometry.rows / values.shape[0]
    x, y = geometry.back(stored)
    cell = geometry.rows / values.shape[0]
    assert abs(x - 126) < 1.5 * cell
    assert abs(y - 156) < 1.5 * cell


def test_pictures_show_image_and_map_side_by_side(brightest: Locked, tmp_path: Path) -> None:
    sample = spotted((300, 200), (220, 60))
    found = occlusion(brightest, sample)
    draw(tmp_path / "map.png", sample.pixels, found, "spotted", sample.pixels)
    picture = np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).astype(int)
    left, right = picture[:, : picture.shape[1] * 2 // 5], picture[:, picture.shape[1] // 2 : picture.shape[1] * 4 // 5]
    orange = [(part[..., 0] - part[..., 2] > 40).sum() for part in (left, right)]
    assert orange[0] == 0
    assert orange[1] > 500


def test_a_map_of_a_mirrored_crop_is_drawn_mirrored_and_in_its_place(tmp_path: Path) -> None:
    film, values = np.arange(40_000, dtype=np.uint16).reshape(200, 200) % 256, np.zeros((4, 4))
    values[3, 0] = 0.5  # at the chest wall, low: on the film at the right edge of the box
    found, stored = Map(values, SAID, "worth", 0.02, ""), np.ones((100, 100), np.uint16)
    box = {
        "height": 200,
        "width": 200,
        "top": 100,
        "bottom": 200,
        "left": 100,
        "right": 200,
        "rows": 100,
        "columns": 100,
    }
    draw(tmp_path / "map.png", film, found, "film", stored, Geometry(**box, flipped=True))
    draw(tmp_path / "plain.png", film, found, "film", stored, Geometry(**box, flipped=False))
    places = []
    for name in ("map.png", "plain.png"):
        picture = np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int)
        picture = picture[:, picture.shape[1] * 2 // 5 : picture.shape[1] * 9 // 10]  # without the colour bar
        orange = np.argwhere(picture[..., 0] - picture[..., 2] > 30)
        assert len(orange) > 100
        places.append((orange.mean(0) / picture.shape[:2]).tolist())
    assert places[0][0] == pytest.approx(places[1][0], abs=0.02)
    assert places[0][0] > 0.6  # low, as on the stored image
    assert places[0][1] > places[1][1] + 0.1


def test_colours_are_clear_where_nothing_changes() -> None:
    colours = painted(np.array([[0.0, 0.2], [-0.1, 0.0]]), 0.2, np.ones((40, 40), np.uint16))
    assert colours[0, 0, 3] == 0
    assert colours[0, -1, 3] == pytest.approx(0.75)
    assert colours[0, -1, 0] > colours[0, -1, 2]
    assert colours[-1, 0, 2] > colours[-1, 0, 0]


def test_air_is_not_coloured_however_much_the_squares_reach_into_it() -> None:
    stored = np.zeros((100, 60), np.uint16)
    stored[:, :30] = 9
    for pixels in (stored, np.stack([stored] * 3, axis=2)):
        alpha = painted(np.full((5, 3), 0.4), 0.4, pixels)[..., 3]
        middle = alpha.shape[1] // 2
        assert alpha[:, : middle - 1].min() == pytest.approx(0.75)
        assert alpha[:, middle + 1 :].max() == 0


def test_a_map_without_worth_leaves_the_image_as_it_is(tmp_path: Path) -> None:
    film, box = (
        np.full((100, 80), 100, np.uint16),
        Geometry.crop((100, 80), Region(top=20, left=20, bottom=80, right=60)),
    )
    found = Map(np.full((4, 3), 0.01), SAID, "worth", 0.02, "How.")
    draw(tmp_path / "map.png", film, found, "film", np.ones((60, 40), np.uint16), box)
    picture = np.asarray(Image.open(tmp_path / "map.png").convert("L"))
    right = picture[picture.shape[0] // 2, picture.shape[1] // 2 : picture.shape[1] * 7 // 10]
    assert len(np.unique(right[right < 255])) <= 2  # one grey, and its edge
    assert found.caption.endswith("No place reaches 0.02, so nothing is coloured.")
    assert "coloured" not in replace(found, values=np.full((4, 3), -0.03)).caption


# ---------------------------------------------------------------------------------------------- what is said


def test_the_map_does_not_fade_with_the_temperature(brightest: Locked) -> None:
    shy = replace(brightest, card=brightest.card.model_copy(update={"temperature": 200.0}))
    sample = spotted((128, 128), (60, 40))
    one, other = occlusion(brightest, sample), occlusion(shy, sample)
    np.testing.assert_array_equal(one.values, other.values)
    assert not other.empty
    assert one.said.probability > other.said.probability


def test_log_odds_are_those_of_the_probabilities() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 4))
    for kind in ("binary", "multiclass", "multilabel", "ordinal"):
        target = Target("task", kind, ("a", "b") if kind == "binary" else ("a", "b", "c", "d"))
        given = logits[:, : target.width]
        for number in range(len(target.classes)):
            p = target.probabilities(given)[:, number]
            np.testing.assert_allclose(log_odds(target, given, number), np.log(p / (1 - p)), atol=1e-9)
    assert log_odds(Target("task", "binary", ("0", "1")), np.array([[0.0, 900.0]]), 1) == [900]


def said_by(locked: Locked, kind: Kind, classes: tuple[str, ...], cut: tuple[float, ...], logits: list[float]) -> Said:
    target = locked.card.target.model_copy(update={"name": "task", "kind": kind, "classes": classes})
    update = {"target": target, "temperature": 1.0, "thresholds": {"image": cut}}
    return said_of(replace(locked, card=locked.card.model_copy(update=update)), np.array([logits]))


@pytest.mark.parametrize(
    ("kind", "classes", "cut", "logits", "title", "verdict"),
    [
        ("binary", "01", (0.492,), [0.02, 0.0], "task = 1: 0.495 (threshold 0.492), decided 1", "task = 1"),
        ("binary", "01", (0.9,), [0.0, 1.0], "task = 1: 0.731 (threshold 0.900), decided 0", "task = 0"),
        ("binary", "01", (0.50001,), [0.0, 0.0], "task = 1: 0.500000 (threshold 0.500010), decided 0", "task = 0"),
        ("multiclass", "abc", (), [0.0, 1.0, 0.0], "task = b: 0.576, decided b", "task = b"),
        ("ordinal", "123", (), [9.0, -9.0], "task = 2: 1.000, decided 2 (the median)", "task = 2"),
        ("multilabel", "abc", (0.5, 0.5, 0.5), [1.0, 2.0, -1.0], "b: 0.881 (threshold 0.500), decided yes", "a|b"),
        ("multilabel", "ab", (0.9, 0.7), [-1.0, 0.0], "b: 0.500 (threshold 0.700), decided no", "none"),
    ],
)
def test_a_title_shows_what_was_decided_by_what(
    brightest: Locked, kind: Kind, classes: str, cut: tuple[float, ...], logits: list[float], title: str, verdict: str
) -> None:
    said = said_by(brightest, kind, tuple(classes), cut, logits)
    assert (said.title, said.verdict) == (title, verdict)
    assert said.sentence.endswith(f"; decided: {verdict}.")


# ---------------------------------------------------------------------------------------------- text in pictures


def test_dollars_and_long_names_are_written_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Text, Bbox]] = []
    saved = Figure.savefig

    def measured(figure: Figure, path: Path, **how: Any) -> None:
        saved(figure, path, **how)
        figure.draw_without_rendering()  # at its own resolution again
        texts = [text for axis in figure.axes for text in (axis.title, axis.yaxis.label) if text.get_text()]
        told.extend((text, text.get_window_extent()) for text in texts)
        told.append((Text(0, 0, "figure"), figure.bbox))

    monkeypatch.setattr(Figure, "savefig", measured)
    names = ["a$_b$\\frac{.png", "W" * 120, "a_study_with_a_name " * 6]
    for name, (height, width) in zip(names, ((80, 300), (300, 80), (100, 100)), strict=True):
        told.clear()
        film = np.ones((height, width), np.uint16)
        said = replace(SAID, answer=f"{name} = 1")
        found = Map(np.ones((4, 4)), said, "what hiding it takes off the log-odds", 0.02, "")
        draw(tmp_path / "map.png", film, found, name, film)
        whole = told.pop()[1]
        left, right = (box for text, box in told if text.get_text()[:1] == name[:1])
        assert left.x1 < right.x0
        for _, box in told:
            assert whole.x0 <= box.x0
            assert box.x1 <= whole.x1
            assert whole.y0 <= box.y0
            assert box.y1 <= whole.y1


# ---------------------------------------------------------------------------------------------- tiles


def test_attention_lies_where_its_tiles_are(run: Path, phantoms: Path, tmp_path: Path) -> None:
    lock(
        tmp_path / "run",
        phantoms,
        run.with_name("encoder"),
        input="tiles",
        method="linear",
        tiles={"mm_per_pixel": 2.5},
    )
    locked, shards = read_locked(tmp_path / "run"), ShardDataset(phantoms)
    found, other = (attended(locked, shards, row) for row in (0, 1))
    sample, how = shards[0], locked.card.tiles
    spacing = float(shards.rows[0]["spacing_mm"])
    boxes, _ = tiles(sample, (32, 32), 2.5, spacing, how.overlap, how.tissue, Normalisation(0.0, 1.0))
    height, width = sample.pixels.shape[:2]
    y, x = (np.arange(found.values.shape[0]) + 0.5) * height, (np.arange(found.values.shape[1]) + 0.5) * width
    y, x = y[:, None] / found.values.shape[0], x[None] / found.values.shape[1]
    covered = np.zeros(found.values.shape, bool)
    for top, left, tall, wide in boxes:
        covered |= (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)
    assert (found.values[~covered] == 0).all()
    assert (found.values[covered] > 0).all()
    assert 0 < found.values.max() < 1
    assert 0 < other.values.max() < 1


def test_a_bag_holds_the_judged_rows_alone(run: Path, phantoms: Path, tmp_path: Path) -> None:
    tiles_of = {"mm_per_pixel": 2.5, "bag": "breast"}
    lock(tmp_path / "run", phantoms, run.with_name("encoder"), input="tiles", method="linear", tiles=tiles_of)
    locked, shards = read_locked(tmp_path / "run"), ShardDataset(phantoms)
    whose = [(row["patient"], row["laterality"]) for row in map(shards.rows.__getitem__, range(len(shards)))]
    row = next(i for i, name in enumerate(whose) if whose.count(name) > 1)
    sibling = next(i for i, name in enumerate(whose) if name == whose[row] and i != row)
    others = np.array([i for i in range(len(shards)) if i != sibling])
    for rows in (others, others[::-1], np.arange(len(shards)), None):
        found = attended(locked, shards, row, rows=rows)
        judged = np.arange(len(shards)) if rows is None else rows
        told = locked.probabilities(shards, judged)[judged == row]
        assert found.said.probability == pytest.approx(float(told[0, 1]), abs=1e-6)
    alone, together = (attended(locked, shards, row, rows=rows).values.sum() for rows in (others, None))
    assert together < 0.99 * alone
    explain(locked, shards, row, tmp_path / "map.png", "film", rows=others)


def test_overlapping_boxes_share_a_mean() -> None:
    boxes = np.array([[0.0, 0, 8, 8], [4, 0, 8, 8]])
    found = rastered(np.array([0.6, 0.2]), boxes, (12, 8))
    assert found.shape == (12, 8)
    assert np.allclose(found[:4], 0.6)
    assert np.allclose(found[4:8], 0.4)
    assert np.allclose(found[8:], 0.2)
