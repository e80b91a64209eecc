"""The sweep of segmenters: its grid, what it takes up again, its numbers by brute force, its tables and its page."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pictured import case
from PIL import Image
from segments import config, encoder_at, result
from segments import run as run_segment

from miram.engine.errors import FAILED, Preempted, RunFailed, UserError, exit_code
from miram.engine.report import write_report
from miram.engine.result import Figure, parse_result
from miram.engine.run import Run, open_run
from miram.engine.seeding import generator
from miram.finetune.classify.bootstrap import Draws
from miram.finetune.classify.comparison import seed_draws
from miram.finetune.classify.sweep_table import caveats
from miram.finetune.segment import stage
from miram.finetune.segment.casefile import write_cases
from miram.finetune.segment.cases import Case
from miram.finetune.segment.config import SegmentConfig
from miram.finetune.segment.fits import rules_of
from miram.finetune.segment.judging import figures_of
from miram.finetune.segment.sweep import grid, sweep

CLASSES = ("background", "lesion")
SIGNAL = {"light": 0.2, "linear": 0.0, "unet": -0.2}
COST = {"trainable": 1234, "parameters": 56_789, "peak_memory_bytes": 10**9, "trainings": 5}
ODD = "light, misspelt"
MODELS = {"light": {}, "linear": {"model": "linear"}, ODD: {"model_options": {"widht": 3}}}
MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_at(tmp_path_factory.mktemp("sweep") / "encoder")


@pytest.fixture(scope="module")
def real(phantoms: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A sweep as a user starts it, with a model that cannot be made, and its exit code; pictures of the first run."""
    out, draw, drawn = tmp_path_factory.mktemp("runs") / "sweep", stage.draw_figures, list[Path]()

    def once(folder: Path, *arguments: Any) -> dict[str, str]:
        drawn.append(folder)
        return draw(folder, *arguments) if len(drawn) == 1 else {}

    changes = {"sweep": {"models": MODELS, "seeds": [0, 1]}, "train": {"steps": 2}, "sweeps": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "draw_figures", once)
        return out, exit_code(lambda: run_segment(phantoms, out, encoder, **changes))


def settings(out: Path, *, models: Mapping[str, Any] | None = None, **changes: Any) -> SegmentConfig:
    """Of a sweep whose runs are made up."""
    section = {"models": models or {"light": {}, "linear": {"model": "linear"}}, "seeds": changes.pop("seeds", [0, 1])}
    against = {"against": changes.pop("against")} if "against" in changes else {}
    size = {"image_size": [64, 32]} | changes
    return config(Path("made-up"), out, Path("encoder"), sweep=section | against, seed=3, **size)


def judge(one: SegmentConfig, patients: int = 14) -> list[Case]:
    """Three images a patient, one with nothing on it; patients are as hard for all models, and a model has its own."""
    shared = np.random.default_rng(0).normal(size=patients)
    own = generator("own", one.segment.model, one.seed).normal(size=patients)
    dice = np.clip(0.5 + SIGNAL[one.segment.model] + 0.15 * shared + 0.1 * own, 0.0, 1.0)
    return [
        case(f"k{p}-{v}", None if v == 2 else float(dice[p]) * (1 - 0.3 * v), 7 * ((p + v) % 3), f"d/{p}")
        for p in range(patients)
        for v in range(3)
    ]


def write_run(one: SegmentConfig, cases: Sequence[Case], **more: Any) -> Run:
    """What the stage leaves behind, as far as a sweep reads it."""
    run, section = open_run(one, one.out, "segment"), one.segment
    with run.recorded():
        write_cases(run.folder, cases, CLASSES)
        content = figures_of(cases, CLASSES, rules_of(section), 5, one.seed)
        cost = COST | {"images_per_s": 10.0 * (1 + one.seed), "seconds": 60.0 + one.seed}
        run.result(content | {"split": "made up", "cost": cost, "rules": asdict(rules_of(section))} | more)
    return run


class Fake:
    """Makes runs, and keeps an account of which."""

    def __init__(self, trouble: Callable[[SegmentConfig], None] = lambda _: None) -> None:
        self.trouble = trouble
        self.made: list[tuple[str, int]] = []

    def __call__(self, one: SegmentConfig) -> Run:
        self.made.append((one.segment.model, one.seed))
        self.trouble(one)
        return write_run(one, judge(one))


EVERY = [("light", 0), ("light", 1), ("linear", 0), ("linear", 1)]


def content(folder: Path) -> dict[str, Any]:
    return dict(result(Run(folder, "sweep")))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------- the grid


def test_every_model_and_seed_is_a_run_of_its_own(tmp_path: Path) -> None:
    cells = list(grid(settings(tmp_path, models={"light": {}, "a/b, c": {"flip_average": False}}, seeds=[0, 7])))
    assert [str(Path(cell.settings.out).relative_to(tmp_path / "cells")) for cell in cells] == [
        "light/seed-0",
        "light/seed-7",
        "a-b-c/seed-0",
        "a-b-c/seed-7",
    ]
    common, (first, *_, last) = settings(tmp_path), cells
    assert first.settings.segment == common.segment
    assert last.settings.segment == common.segment.model_copy(update={"flip_average": False})
    assert (first.settings.seed, last.settings.seed) == (0, 7)
    assert all(cell.settings.train == common.train for cell in cells)
    assert all(cell.settings.data == common.data for cell in cells)


def test_what_a_model_does_not_name_is_as_for_all(tmp_path: Path) -> None:
    ours = {"augment": {"upside_down": False}}
    (one,) = grid(settings(tmp_path, models={"light": {"augment": {"flip": False}}}, seeds=[0], **ours))
    usual = settings(tmp_path).segment.augment
    assert usual.flip
    assert usual.upside_down
    assert one.settings.segment.augment == usual.model_copy(update={"flip": False, "upside_down": False})


def test_options_of_another_model_or_method_do_not_leak_in(tmp_path: Path) -> None:
    models: dict[str, Any] = {
        "light": {},
        "again": {"model": "light"},
        "layers": {"model_options": {"layers": [0, 0, 1, 1]}},
        "linear": {"model": "linear"},
        "unet": {"model": "unet", "encoder": None},
        "full": {"method": "full"},
        "rank 2": {"method": "lora", "options": {"rank": 2}},
    }
    ours: dict[str, Any] = {"method": "lora", "options": {"rank": 8, "alpha": 4}, "control": "zeroed"}
    found = {cell.model: cell.settings.segment for cell in grid(settings(tmp_path, models=models, seeds=[0], **ours))}
    wide, lora = {"width": 16}, {"rank": 8, "alpha": 4}
    assert {name: (one.model_options, one.options, one.control) for name, one in found.items()} == {
        "light": (wide, lora, "zeroed"),
        "again": (wide, lora, "zeroed"),
        "layers": ({"layers": [0, 0, 1, 1]}, lora, "zeroed"),
        "linear": ({}, lora, None),
        "unet": ({}, {}, None),
        "full": (wide, {}, "zeroed"),
        "rank 2": (wide, {"rank": 2}, "zeroed"),
    }


def test_the_shipped_models_are_fifteen_runs(tmp_path: Path) -> None:
    cells = list(grid(config(Path("made-up"), tmp_path, Path("encoder"), image_size=[64, 32])))
    assert len({cell.settings.out for cell in cells}) == len(cells) == 15
    of = {cell.model: (cell.settings.segment.model, cell.settings.segment.control) for cell in cells}
    assert of == {
        "light": ("light", None),
        "light, untrained encoder": ("light", "untrained"),
        "light, no encoder": ("light", "zeroed"),
        "mdsa_unet": ("mdsa_unet", None),
        "unet": ("unet", None),
    }


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"against": "lihgt"}, r"sweep\.against=lihgt is none of sweep\.models; did you mean 'light'\?"),
        ({"models": {"linear": {}}}, r"sweep\.against=light is none of sweep\.models"),
        ({"seeds": [1, 1]}, "named twice"),
        ({"models": {"light": {}, "a b": {}, "a/b": {}}}, "a/b at seed 0 is named twice, or much like another"),
        ({"models": {"light": {"modle": "unet"}}}, r"sweep\.models, light: .*modle.*did you mean"),
        ({"models": {"light": {"train": {"steps": 9}}}}, r"sweep\.models, light: .*train is not a known key"),
    ],
)
def test_what_cannot_be_a_sweep_is_said_before_anything_is_written(
    section: dict[str, Any], said: str, tmp_path: Path
) -> None:
    fake = Fake()
    with pytest.raises(UserError, match=said):
        sweep(settings(tmp_path / "out", **section), fake)
    assert not fake.made
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": {"none": [0], "some": [1]}},
        {"task": "tissues"},
        {"lesion": "part"},
        {"unmasked": "left_out"},
        {"folds": 3},
        {"holdout": 0.3},
        {"threshold": 0.5},
        {"hit_iou": 0.5},
        {"tolerance_mm": 2.0},
        {"tolerance_px": 2.0},
    ],
)
def test_a_model_that_would_be_judged_otherwise_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    models = {"light": {}, "other": changes}
    with pytest.raises(UserError, match=rf"other differs in segment\.{next(iter(changes))}, which all models share"):
        list(grid(settings(tmp_path, models=models)))


def test_networks_without_an_encoder_see_tiles_of_its_size(phantoms: Path, encoder: Path, tmp_path: Path) -> None:
    models = {"light": {}, "unet": {"model": "unet", "encoder": None}}
    asked = config(phantoms, tmp_path, encoder, sweep={"models": models, "seeds": [0]}, drop_path=0.1)
    light, unet = (cell.settings.segment for cell in grid(asked))
    assert light.image_size == unet.image_size == (64, 32)
    assert (light.drop_path, unet.drop_path) == (0.1, 0.0)


def test_a_control_of_a_network_without_an_encoder_is_refused(phantoms: Path, tmp_path: Path) -> None:
    """Else it would be the network itself, called a control."""
    narrow = {"model": "unet", "model_options": {"channels": [8, 8, 16, 16, 16]}, "image_size": [64, 32]}
    for control in ("untrained", "zeroed"):
        with pytest.raises(UserError, match=r"control"):
            run_segment(phantoms, tmp_path / control, None, **narrow, control=control, train={"steps": 1})
        assert not (tmp_path / control).exists()


# ---------------------------------------------------------------------------------------------- running it


def test_a_run_that_cannot_be_is_named_and_the_others_go_on(real: tuple[Path, int]) -> None:
    out, code = real
    assert code == FAILED
    state = json.loads((out / "state.json").read_text())
    assert state["status"] == "failed"
    assert re.search(r"2 of 6 runs of the sweep failed.*the first: light, misspelt, seed 0: .*widht", state["reason"])
    *tables, failed = content(out)["tables"]
    assert failed["title"] == "Runs that failed"
    assert [row[:2] for row in failed["rows"]] == [[ODD, 0], [ODD, 1]]
    assert all("did you mean 'width'?" in row[2] for row in failed["rows"])
    assert [[row[0] for row in table["rows"]] for table in tables] == [["light", "linear"]] * 7
    assert not (out / "cells" / "light-misspelt").exists()
    assert all(Run(out / "cells" / name / f"seed-{seed}", "").finished for name in ("light", "linear") for seed in "01")


def test_a_second_start_reads_the_finished_runs_and_tries_the_others_again(
    real: tuple[Path, int], phantoms: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, tried = shutil.copytree(real[0], tmp_path / "sweep"), []

    def again(one: SegmentConfig, **_: Any) -> Run:
        tried.append((one.segment.model_options, one.seed))
        raise UserError("tried again")

    monkeypatch.setattr(stage, "run_one", again)
    changes = {"sweep": {"models": MODELS, "seeds": [0, 1]}, "train": {"steps": 2}, "sweeps": True}
    with pytest.raises(RunFailed, match="tried again"):
        run_segment(phantoms, out, encoder, **changes)
    assert tried == [({"widht": 3}, 0), ({"widht": 3}, 1)]
    assert (out / "table.csv").read_bytes() == (real[0] / "table.csv").read_bytes()
    assert content(out)["tables"][:-1] == content(real[0])["tables"][:-1]


def test_a_finished_sweep_and_finished_runs_are_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, fake = settings(tmp_path / "out"), Fake()
    assert sweep(one, fake).finished
    assert fake.made == EVERY
    before = (tmp_path / "out" / "result.json").read_bytes()
    assert sweep(one, fake).finished
    assert "is finished; nothing to do" in capsys.readouterr().out
    (tmp_path / "out" / "state.json").unlink()
    assert sweep(one, fake).finished
    assert fake.made == EVERY
    assert (tmp_path / "out" / "result.json").read_bytes() == before


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    def stop(one: SegmentConfig) -> None:
        if one.segment.model == "linear":
            raise Preempted("SIGTERM came")

    with pytest.raises(Preempted):
        sweep(settings(tmp_path / "out"), Fake(stop))
    assert json.loads((tmp_path / "out" / "state.json").read_text())["status"] == "preempted"
    assert not (tmp_path / "out" / "result.json").exists()
    rest = Fake()
    assert sweep(settings(tmp_path / "out"), rest).finished
    assert rest.made == EVERY[2:]


@pytest.mark.parametrize("error", [RunFailed("loss is nan"), torch.OutOfMemoryError("no memory")])
def test_a_seed_that_fails_is_left_out_and_its_model_says_so(tmp_path: Path, error: Exception) -> None:
    def trouble(one: SegmentConfig) -> None:
        if (one.segment.model, one.seed) == ("linear", 1):
            raise error

    fake = Fake(trouble)
    with pytest.raises(RunFailed, match=f"1 of 4 runs .* the first: linear, seed 1: {error}"):
        sweep(settings(tmp_path / "out"), fake)
    assert fake.made == EVERY
    first, *_, failed = content(tmp_path / "out")["tables"]
    assert failed["rows"] == [["linear", 1, str(error)]]
    assert not first["rows"][0][-1].endswith("seeds)")
    assert first["rows"][1][-1].endswith("(1 of 2 seeds)")
    assert [row["seeds"] for row in rows_of(tmp_path / "out" / "table.csv")[:2]] == ["2", "1"]
    assert sweep(settings(tmp_path / "out"), Fake()).finished
    assert "Runs that failed" not in [table["title"] for table in content(tmp_path / "out")["tables"]]


def test_a_sweep_of_which_nothing_came_says_why(tmp_path: Path) -> None:
    def trouble(_: SegmentConfig) -> None:
        raise UserError("there are no masks")

    with pytest.raises(RunFailed, match="4 of 4 runs"):
        sweep(settings(tmp_path / "out"), Fake(trouble))
    (table,) = content(tmp_path / "out")["tables"]
    assert {row[-1] for row in table["rows"]} == {"there are no masks"}
    assert "there are no masks" in write_report([tmp_path / "out"], tmp_path / "page.html").read_text()


def test_what_is_nobodys_mistake_is_not_hidden(tmp_path: Path) -> None:
    def trouble(_: SegmentConfig) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sweep(settings(tmp_path / "out"), Fake(trouble))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"task": "fat, dense"}, "its task is 'fat, dense', that of the others 'lesion'"),
        ({"split": "5 folds"}, "its split is '5 folds'"),
        ({"rules": {"iou": 0.5}}, "its rules is"),
        ("images", "judged other images"),
        ("file", r"cases\.csv is damaged"),
        ("missing", r"result\.json is not there"),
    ],
)
def test_runs_that_cannot_be_compared_are_named(tmp_path: Path, damage: Any, said: str) -> None:
    def one(cell: SegmentConfig) -> Run:
        cases, odd = judge(cell), cell.segment.model == "linear"
        if not odd:
            return write_run(cell, cases)
        run = write_run(
            cell, cases[: -1 if damage == "images" else None], **(damage if isinstance(damage, dict) else {})
        )
        if damage == "file":
            (run.folder / "cases.csv").write_text("key,patient\n1\n")
        if damage == "missing":
            (run.folder / "result.json").unlink()
        return run

    with pytest.raises(RunFailed, match="2 of 4 runs"):
        sweep(settings(tmp_path / "out"), one)
    first, *_, failed = content(tmp_path / "out")["tables"]
    assert [row[:2] for row in failed["rows"]] == [["linear", 0], ["linear", 1]]
    assert re.search(said, failed["rows"][0][-1])
    assert [row[0] for row in first["rows"]] == ["light"]


# ---------------------------------------------------------------------------------------------- its numbers


def dice_of(rows: Sequence[Mapping[str, str]], patients: Sequence[str]) -> float:
    """Mean over the images that have truth, of patients as often as they are named; one image after the other."""
    values = []
    for patient in patients:
        for row in rows:
            truth, said, both = (int(row[f"{name}:lesion"]) for name in ("truth", "said", "both"))
            if row["patient"] == patient and truth:
                values.append(2 * both / (truth + said))
    return sum(values) / len(values)


def brute(one: SegmentConfig) -> dict[str, NDArray[Any]]:
    """Of each finished model, (1 + R,) the mean over seeds of the mean Dice: as judged, and of each bootstrap sample.

    From the runs' cases.csv. Only how often patients and seeds are drawn comes from the package.
    """
    seeds, count = one.sweep.seeds, one.segment.replicates
    tables = {
        (cell.model, cell.seed): rows_of(cell.run.folder / "cases.csv") for cell in grid(one) if cell.run.finished
    }
    some = next(iter(tables.values()))
    truth = np.array([int(row["truth:lesion"]) > 0 for row in some], np.int64)
    draws = Draws.of(truth, np.array([row["patient"] for row in some]), count, one.seed)
    drawn_seeds = seed_draws(len(seeds), count, one.seed)
    found = {}
    for model in dict.fromkeys(model for model, _ in tables):
        samples = [np.mean([dice_of(tables[model, seed], draws.patients.tolist()) for seed in seeds])]
        for times, often in zip(draws.times, drawn_seeds, strict=True):
            patients = [name for name, n in zip(draws.patients.tolist(), times.tolist(), strict=True) for _ in range(n)]
            of = [
                dice_of(tables[model, seed], patients) for seed, n in zip(seeds, often, strict=True) for _ in range(n)
            ]
            samples.append(np.mean(of))
        found[model] = np.array(samples)
    return found


def check_table(one: SegmentConfig, table: Mapping[str, Any]) -> None:
    """Values, intervals, paired differences and p of the first table."""
    samples, rows = brute(one), {row[0]: row for row in table["rows"]}
    assert rows.keys() == samples.keys()
    for model, of in samples.items():
        assert rows[model][1]["value"] == pytest.approx(of[0])
        assert rows[model][1]["interval"] == pytest.approx(np.percentile(of[1:], [2.5, 97.5]))
    ahead = samples["linear"] - samples["light"]
    assert rows["light"][2] is rows["light"][3] is None
    difference, p = rows["linear"][2:4]
    assert difference["signed"] is True
    assert difference["value"] == pytest.approx(ahead[0])
    assert difference["interval"] == pytest.approx(np.percentile(ahead[1:], [2.5, 97.5]))
    rarer = min((ahead[1:] <= 0).sum(), (ahead[1:] >= 0).sum())
    assert p == pytest.approx(min(1, 2 * (1 + rarer) / len(ahead)))


def test_figures_of_a_real_sweep_are_means_over_seeds_with_intervals_over_patients_and_seeds(
    real: tuple[Path, int], phantoms: Path, encoder: Path
) -> None:
    one = config(phantoms, real[0], encoder, sweep={"models": MODELS, "seeds": [0, 1]}, train={"steps": 2})
    check_table(one, content(real[0])["tables"][0])


def test_a_paired_difference_is_better_known_than_its_parts(tmp_path: Path) -> None:
    one = settings(tmp_path / "out", seeds=[0, 1, 2])
    sweep(one, Fake())
    table = content(tmp_path / "out")["tables"][0]
    check_table(one, table)
    light, linear = table["rows"]
    low, high = linear[2]["interval"]
    parts = [np.ptp(row[1]["interval"]) for row in (light, linear)]
    assert high < 0
    assert high - low < 0.7 * np.hypot(*parts)


def test_the_seeds_are_told_one_by_one_as_their_own_runs_have_them(real: tuple[Path, int]) -> None:
    told = content(real[0])
    for row, lead in zip(told["tables"][0]["rows"], told["rows"], strict=True):
        runs = [content(real[0] / "cells" / row[0] / f"seed-{seed}") for seed in (0, 1)]
        assert row[-1] == ", ".join(f"{of['value']:.3f}" for of in runs)
        assert lead["detail"] == f"seeds {row[-1]}"
        assert lead["value"] == row[1]["value"] == pytest.approx(np.mean([of["value"] for of in runs]))


def test_costs_are_the_largest_of_sizes_and_the_mean_of_times(tmp_path: Path) -> None:
    sweep(settings(tmp_path / "out"), Fake())
    first, second, *_ = content(tmp_path / "out")["tables"]
    assert first["columns"] == [
        *("model", "mean Dice", f"{MINUS} light", "p"),
        *("trainable", "of", "peak memory, MB", "crops/s", "s a run", "by seed"),
    ]
    assert first["rows"][0][4:-1] == [1234, 56_789, 1000, 15.0, 60.5]
    assert second["columns"] == ["model", "pooled Dice", f"{MINUS} light", "p", "by seed"]


# ---------------------------------------------------------------------------------------------- what it writes


@pytest.fixture(params=["real", "made up"])
def swept(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a sweep, of models that were trained, and of figures that were made up."""
    if request.param == "real":
        folder: Path = request.getfixturevalue("real")[0]
        return folder
    return sweep(settings(tmp_path / "out"), Fake()).folder


def shown(of: Mapping[str, Any] | None) -> list[float | None]:
    """Value and interval of a cell."""
    return [None, None, None] if of is None else [of["value"], *(of["interval"] or (None, None))]


def test_the_csv_and_the_result_hold_the_same_numbers(swept: Path) -> None:
    rows = rows_of(swept / "table.csv")
    tables = [table for table in content(swept)["tables"] if table["title"] != "Runs that failed"]
    told = [(table["title"], row) for table in tables for row in table["rows"]]
    assert [(row["figure"], row["model"]) for row in rows] == [(figure, row[0]) for figure, row in told]
    names = ("value", "low", "high", "difference", "difference_low", "difference_high", "p")
    for row, (_, cells) in zip(rows, told, strict=True):
        there = [float(row[name]) if row[name] else None for name in names]
        assert there == [*shown(cells[1]), *shown(cells[2]), cells[3]]
        assert row["against"] == ("" if row["model"] == "light" else "light")
        assert row["seeds"] == "2"
    assert content(swept)["value"] == float(rows[0]["value"])
    assert content(swept)["metric"] == rows[0]["figure"] == "mean Dice"
    (difference,) = content(swept)["differences"]
    assert difference["name"] == f"linear {MINUS} light"
    assert difference["value"] == float(rows[1]["difference"])


def refuse(constant: str) -> float:
    """NaN and infinities, which Python reads and JSON does not know."""
    raise ValueError(f"{constant} is no JSON")


def test_a_result_is_read_back_without_damage(swept: Path) -> None:
    """Of the sweep and of a run."""
    for folder in (swept, swept / "cells" / "light" / "seed-0"):
        damage: list[str] = []
        found, raw = parse_result((folder / "result.json").read_text(), damage), content(folder)
        assert damage == []
        assert (found.value, found.metric, found.split) == (raw["value"], "mean Dice", raw["split"])
        assert (found.n_images, found.n_patients) == (raw["n_images"], raw["n_patients"])
        assert [table.title for table in found.tables] == [table["title"] for table in raw["tables"]]
        assert any(isinstance(cell, Figure) for row in found.tables[0].rows for cell in row)
    assert json.loads((swept / "result.json").read_text(), parse_constant=refuse)["stage"] == "sweep"


def test_the_notes_say_what_the_figures_are_and_keep_no_interval_of_a_single_run(swept: Path) -> None:
    notes = " ".join(content(swept)["notes"])
    for words in (
        "a mean over 2 seeds",
        "40 bootstrap samples, each of patients and of seeds",
        "Whole stored images are judged",
        "found nothing counts as 0",
        "A lesion is found by the IoU rule",
    ):
        assert words in notes
    assert "trained models and thresholds fixed" not in notes
    assert "parameters learnt" not in notes


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        ([0, 1], ("Of 2 seeds a bootstrap shows about 50% of their variance.", "With few seeds it is too bold")),
        ([0], ("With one seed, how much another would change is not in them.", "It tells these trained models apart")),
    ],
)
def test_the_notes_warn_of_few_patients_and_few_seeds_and_say_how_low_p_can_be(
    tmp_path: Path, seeds: list[int], words: Sequence[str]
) -> None:
    one = settings(tmp_path / "out", seeds=seeds)
    notes = " ".join(content(sweep(one, Fake()).folder)["notes"])
    for said in (
        *words,
        "With 14 patients they are too short",
        "of samples on the rarer side of zero",
        "at least 0.049,",
    ):
        assert said in notes
    for said in caveats("methods", len(seeds), 40, 14):
        assert said.replace("methods", "configurations") in notes


def test_many_patients_are_not_called_few(tmp_path: Path) -> None:
    one = settings(tmp_path / "out")
    notes = " ".join(content(sweep(one, lambda cell: write_run(cell, judge(cell, 60))).folder)["notes"])
    assert "too short" not in notes


def captions(page: str) -> Iterator[tuple[str, str]]:
    """Kind of image, and caption, of every picture."""
    yield from re.findall(r'<img src="data:([\w/+]+);base64,[^"]+" alt="([^"]*)"></div><figcaption>', page)


def test_a_report_shows_the_pictures_and_tables_of_a_run_and_of_a_sweep(real: tuple[Path, int], tmp_path: Path) -> None:
    out, run = real[0], real[0] / "cells" / "light" / "seed-0"
    for folder in (out, run):
        page = write_report([folder], tmp_path / "page.html").read_text()
        told = json.loads((folder / "figures" / "captions.json").read_text())
        files = sorted(path.name for path in (folder / "figures").glob("*.png"))
        assert files == sorted(told.keys() - {"schema"})
        assert [*captions(page)] == [("image/png", escape(told[name]).replace("&#x27;", "&#39;")) for name in files]
        assert not re.search("could not be read|is left out|damaged", page)
        for table in content(folder)["tables"]:
            assert f"<h3>{escape(table['title'])}</h3>" in page
        assert page.count('<table class="grid">') == len(content(folder)["tables"])
        for note in content(folder)["notes"]:
            assert note.split("'")[0][:60].split("/")[0] in page
    assert [*told][1:] == [
        *("dice.png", "froc.png", "lesions-by-size.png"),
        *(name for name in told if name.startswith("overlay-")),
    ]
    assert any(name.startswith("overlay-2-median") for name in told)
    with Image.open(out / "figures" / "sweep.png") as picture:
        assert picture.width > 600


def test_a_page_of_a_sweep_names_what_failed_and_what_each_model_costs(real: tuple[Path, int], tmp_path: Path) -> None:
    page = write_report([real[0]], tmp_path / "page.html").read_text()
    assert "did you mean &#39;width&#39;?" in page
    assert "small dots are the seeds" in page
    assert f"linear {MINUS} light" in page
    (cost,) = (row[4:6] for row in content(real[0])["tables"][0]["rows"] if row[0] == "light")
    for number in cost:
        assert f'<td class="n">{number:,}</td>' in page
