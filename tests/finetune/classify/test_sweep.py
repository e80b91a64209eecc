"""The sweep, with made-up runs whose figures are known: its grid, what it takes up again, its numbers, its tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_judged import judge as judged
from made_up_judged import population
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_auc_score

from miram.engine.config import check
from miram.engine.errors import Preempted, RunFailed, UserError
from miram.engine.files import read_json
from miram.engine.metrics import headline
from miram.engine.report import write_report
from miram.engine.run import RESULT, Run, open_run
from miram.engine.seeding import generator
from miram.finetune.cells import folder_of
from miram.finetune.classify.bootstrap import Draws
from miram.finetune.classify.comparison import read_run, seed_draws, standings, two_sided
from miram.finetune.classify.config import FinetuneConfig, ReadoutSection
from miram.finetune.classify.predictions import write_predictions
from miram.finetune.classify.sweep import grid, sweep

PATIENTS, FOLDS, SAMPLES = 40, 2, 40
SIGNAL = {"linear": 0.5, "lora": 1.0, "full": 0.0}


def settings(out: Path, **section: Any) -> FinetuneConfig:
    tree = {
        "out": str(out),
        "data": {"shards": "made-up", "task": "mass"},
        "finetune": {"encoder": "random", "replicates": SAMPLES},
        "train": {"steps": 10},
        "sweep": {"methods": ["linear", "lora"], "seeds": [0, 1], "fractions": [1.0]} | section,
    }
    return check(FinetuneConfig, tree, "test")


def judge(one: FinetuneConfig, repeats: int = 2) -> list[list[Any]]:
    """Two images of each patient with a signal that the method gives, noise that patients share over methods."""
    truth = np.arange(PATIENTS) % 2
    shared = np.random.default_rng(0).normal(size=PATIENTS)
    own = generator("own", one.finetune.method, one.seed, str(one.finetune.fraction)).normal(size=PATIENTS)
    strength = SIGNAL.get(one.finetune.method, 0.7) * one.finetune.fraction
    logit = 2 * strength * truth + shared + 0.5 * own
    fold = generator("fold", one.seed).permutation(np.arange(PATIENTS) % FOLDS)
    rows = []
    for patient, view in ((p, v) for p in range(PATIENTS) for v in range(repeats)):
        p = float(1 / (1 + np.exp(-logit[patient] - 0.1 * view - 3 * fold[patient])))
        who = [f"k{patient}-{view}", f"d/{patient}", f"d/{patient}/L", ("no", "yes")[truth[patient]], fold[patient]]
        rows.append([*who, 1 - p, p, float(np.log(p / (1 - p))), "no"])
    return rows


COST = {"trainable": 147_456, "head": 770, "adapter_bytes": 590_848, "peak_memory_bytes": 10**9, "trainings": 8}


def write_run(one: FinetuneConfig, rows: list[list[Any]], **more: Any) -> Run:
    """What the finetune stage leaves behind, as far as a sweep reads it."""
    run = open_run(one, one.out, "finetune")
    with run.recorded(), (run.folder / "predictions.csv").open("w", newline="") as file:
        header = ["key", "patient", "breast", "truth", "fold", "p_no", "p_yes", "logit_0", "decision"]
        csv.writer(file).writerows([header, *rows])
        said = {"task": "mass", "kind": "binary", "level": one.finetune.headline, "metric": "AUC", "value": 0.5}
        cost = COST | {"images_per_s": 10.0 * (1 + one.seed), "seconds": 60.0 + one.seed}
        run.result(said | {"n_images": len(rows), "n_patients": PATIENTS, "cost": cost} | more)
    return run


class Fake:
    """Makes runs, and keeps an account of which."""

    def __init__(self, trouble: Callable[[FinetuneConfig], None] = lambda _: None) -> None:
        self.trouble = trouble
        self.made: list[str] = []

    def __call__(self, one: FinetuneConfig) -> Run:
        self.made.append(f"{one.finetune.method} {one.finetune.fraction:g} {one.seed}")
        self.trouble(one)
        return write_run(one, judge(one))


def result(folder: Path) -> dict[str, Any]:
    return read_json(folder / "result.json", RESULT)


# ---------------------------------------------------------------------------------------------- the grid


def test_every_method_fraction_and_seed_is_a_run_of_its_own(tmp_path: Path) -> None:
    lora = {"method": "lora", "options": {"rank": 8}, "augment": {"flip": False}}
    config = settings(tmp_path, methods=["linear", lora], fractions=[0.1, 1.0], seeds=[0, 7])
    cells = list(grid(config))
    assert [str(Path(cell.settings.out).relative_to(tmp_path / "cells")) for cell in cells] == [
        f"{method}/fraction-{fraction}/seed-{seed}"
        for fraction in ("0.1", "1")
        for method in ("linear", "lora-rank-8-augment.flip-False")
        for seed in (0, 7)
    ]
    last = cells[-1].settings
    assert (last.seed, last.finetune.fraction, last.finetune.method, last.finetune.options) == (
        7,
        1,
        "lora",
        {"rank": 8},
    )
    assert not last.finetune.augment.flip
    assert last.finetune.augment.model_copy(update={"flip": True}) == config.finetune.augment
    assert last.finetune.search == config.finetune.search
    assert last.train == config.train
    assert cells[0].settings.finetune == config.finetune.model_copy(update={"method": "linear", "fraction": 0.1})


def test_options_go_with_their_method(tmp_path: Path) -> None:
    config = settings(tmp_path, methods=["linear", "lora", {"method": "lora", "options": {"rank": 2}}], seeds=[0])
    options = {"method": "lora", "options": {"rank": 8, "alpha": 4}}
    config = config.model_copy(update={"finetune": config.finetune.model_copy(update=options)})
    assert [c.settings.finetune.options for c in grid(config)] == [{}, {"rank": 8, "alpha": 4}, {"rank": 2}]


@pytest.mark.parametrize(
    ("method", "folder"),
    [("probe:linear", "probe-linear"), ("../..", "method"), ("lora (rank 8)", "lora-rank-8"), ("/etc/x", "etc-x")],
)
def test_a_folder_is_safe_whatever_the_method_is_called(method: str, folder: str) -> None:
    assert folder_of(method) == folder
    long = folder_of(method + "x" * 300), folder_of(method + "x" * 301)
    assert len(long[0]) == len(long[1]) == 80
    assert long[0] != long[1]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"against": "liner"}, "sweep.against=liner is none of sweep.methods; did you mean 'linear'?"),
        ({"seeds": [1, 1]}, "named twice"),
        ({"methods": ["linear", "linear"]}, "named twice"),
        ({"methods": ["linear", "a:b", "a/b"]}, "named twice"),
        ({"fractions": [0.5, 0.5]}, "named twice"),
        ({"methods": ["linear", {"methd": "lora"}]}, "finetune.methd is not a known key; did you mean"),
        ({"methods": ["linear", {"method": "lora", "augment": {"zoom": 3}}]}, "finetune.augment.zoom"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_anything_runs(
    tmp_path: Path, section: dict[str, Any], said: str
) -> None:
    fake = Fake()
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        sweep(settings(tmp_path / "out", **section), fake)
    assert not fake.made
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- running it


def test_a_finished_sweep_and_finished_runs_are_not_run_again(tmp_path: Path) -> None:
    config, fake = settings(tmp_path / "out"), Fake()
    assert sweep(config, fake).finished
    assert fake.made == ["linear 1 0", "linear 1 1", "lora 1 0", "lora 1 1"]
    before = (tmp_path / "out" / "result.json").read_bytes()
    assert sweep(config, fake).finished
    (tmp_path / "out" / "state.json").unlink()
    assert sweep(config, fake).finished
    assert len(fake.made) == 4
    assert (tmp_path / "out" / "result.json").read_bytes() == before


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    def stop(one: FinetuneConfig) -> None:
        if one.finetune.method == "lora":
            raise Preempted("SIGTERM came")

    config, fake = settings(tmp_path / "out"), Fake(stop)
    with pytest.raises(Preempted):
        sweep(config, fake)
    assert json.loads((tmp_path / "out" / "state.json").read_text())["status"] == "preempted"
    assert not (tmp_path / "out" / "result.json").exists()
    going_on = Fake()
    assert sweep(config, going_on).finished
    assert going_on.made == ["lora 1 0", "lora 1 1"]


@pytest.mark.parametrize(
    "error", [UserError("class 'yes' has 2 patients"), RunFailed("loss is nan"), torch.OutOfMemoryError("no memory")]
)
def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path, error: Exception) -> None:
    def trouble(one: FinetuneConfig) -> None:
        if one.finetune.method == "full" and one.seed == 0:
            raise error

    config, fake = settings(tmp_path / "out", methods=["full", "linear"], fractions=[0.5, 1.0]), Fake(trouble)
    with pytest.raises(RunFailed, match=f"2 of 8 runs .* the first: full, 50 % of the labels, seed 0: {error}"):
        sweep(config, fake)
    assert len(fake.made) == 8
    *tables, failed = result(tmp_path / "out")["tables"]
    assert failed["rows"] == [["full", 0.5, 0, str(error)], ["full", 1.0, 0, str(error)]]
    assert [[row[0] for row in table["rows"]] for table in tables] == [["full", "linear"]] * 2
    assert tables[0]["rows"][0][-1].endswith("(1 of 2 seeds)")
    again = Fake()
    assert sweep(config, again).finished
    assert again.made == ["full 0.5 0", "full 1 0"]
    assert len(result(tmp_path / "out")["tables"]) == 2


def test_what_is_nobodys_mistake_is_not_hidden(tmp_path: Path) -> None:
    def trouble(_: FinetuneConfig) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sweep(settings(tmp_path / "out"), Fake(trouble))


def test_a_sweep_of_which_nothing_came_says_why(tmp_path: Path) -> None:
    def trouble(_: FinetuneConfig) -> None:
        raise UserError("there is no such task")

    with pytest.raises(RunFailed, match="4 of 4 runs"):
        sweep(settings(tmp_path / "out"), Fake(trouble))
    (table,) = result(tmp_path / "out")["tables"]
    assert {row[-1] for row in table["rows"]} == {"there is no such task"}
    write_report([tmp_path / "out"], tmp_path / "page.html")


@pytest.mark.parametrize("damage", ["task", "cases", "file"])
def test_runs_that_cannot_be_compared_are_named(tmp_path: Path, damage: str) -> None:
    def one(cell: FinetuneConfig) -> Run:
        rows, odd = judge(cell), cell.finetune.method == "lora"
        if not odd:
            return write_run(cell, rows)
        more = {"task": "calc"} if damage == "task" else {}
        run = write_run(cell, rows[: -2 if damage == "cases" else None], **more)
        if damage == "file":
            (run.folder / "predictions.csv").write_text("key,patient\n1\n")
        return run

    with pytest.raises(RunFailed, match="2 of 4 runs"):
        sweep(settings(tmp_path / "out"), one)
    said = {"task": "'calc'", "cases": "other cases", "file": "damaged"}[damage]
    assert said in result(tmp_path / "out")["tables"][-1]["rows"][0][-1]


# ---------------------------------------------------------------------------------------------- its numbers


def within_folds(rows: Iterable[list[Any]], times: NDArray[Any] | None = None) -> float:
    """AUC within folds, by scikit-learn: each fold weighted by its pairs."""
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    truth, fold, p = columns[3] == "yes", columns[4].astype(int), columns[6].astype(float)
    patients = np.array([int(name.removeprefix("d/")) for name in columns[1]])
    weights = np.ones(len(p)) if times is None else times[patients]
    total = pairs = 0.0
    for number in np.unique(fold):
        here = fold == number
        if weights[here & truth].sum() and weights[here & ~truth].sum():
            n = weights[here & truth].sum() * weights[here & ~truth].sum()
            total += n * float(roc_auc_score(truth[here], p[here], sample_weight=weights[here]))
            pairs += n
    return total / pairs


def test_figures_are_means_over_seeds_and_intervals_draw_patients_and_seeds(tmp_path: Path) -> None:
    config = settings(tmp_path / "out", seeds=[0, 1, 2])
    sweep(config, Fake())
    rows = {(c.method, c.seed): judge(c.settings) for c in grid(config)}
    names = np.array([f"d/{i}" for i in range(PATIENTS)])
    draws, drawn_seeds = Draws.of(np.arange(PATIENTS) % 2, names, SAMPLES, 0), seed_draws(3, SAMPLES, 0)
    place = [int(name.removeprefix("d/")) for name in draws.patients]
    samples = {method: np.zeros(SAMPLES) for method in ("linear", "lora")}
    for r in range(SAMPLES):
        times = np.zeros(PATIENTS)
        times[place] = draws.times[r]
        for method in samples:
            each = [within_folds(rows[method, seed], times) for seed in range(3)]
            samples[method][r] = np.average(each, weights=drawn_seeds[r])
    (table,) = result(tmp_path / "out")["tables"]
    linear, lora = table["rows"]
    value = {m: np.mean([within_folds(rows[m, seed]) for seed in range(3)]) for m in samples}
    for row, method in ((linear, "linear"), (lora, "lora")):
        assert row[1]["value"] == pytest.approx(value[method])
        assert row[1]["interval"] == pytest.approx(np.percentile(samples[method], [2.5, 97.5]))
    ahead = samples["lora"] - samples["linear"]
    assert linear[2] is linear[3] is None
    assert lora[2]["value"] == pytest.approx(value["lora"] - value["linear"])
    assert lora[2]["interval"] == pytest.approx(np.percentile(ahead, [2.5, 97.5]))
    assert lora[3] == pytest.approx(2 * (1 + min((ahead <= 0).sum(), (ahead >= 0).sum())) / (SAMPLES + 1))


def told(folder: Path, method: str, seed: int, rows: list[list[Any]] | None = None, **section: Any) -> Any:
    config = settings(folder).model_copy(update={"out": str(folder / f"{method}-{seed}"), "seed": seed})
    finetune = config.finetune.model_copy(update={"method": method, **section})
    config = config.model_copy(update={"finetune": finetune})
    write_run(config, judge(config) if rows is None else rows)
    return read_run(Path(config.out), ReadoutSection())


def width(of: Any) -> float:
    return float(of.value.interval[1] - of.value.interval[0])


def test_pairs_take_what_patients_share_out_of_a_difference(tmp_path: Path) -> None:
    """Both methods see the same hard patients: the difference is far better known than its parts."""
    of = {m: {s: told(tmp_path, m, s) for s in range(3)} for m in ("linear", "lora")}
    found = standings(of, range(3), "linear", 500, 0)
    gap = found["lora"].difference
    assert gap is not None
    assert gap.interval[1] - gap.interval[0] < 0.8 * np.hypot(width(found["linear"]), width(found["lora"]))
    same = standings({"a": of["lora"], "b": of["lora"]}, range(3), "a", 500, 0)["b"]
    assert same.difference is not None
    assert (same.difference.value, same.difference.interval, same.p) == (0, (0, 0), 1)


def test_more_images_of_the_same_patients_do_not_shorten_an_interval(tmp_path: Path) -> None:
    def copies(repeats: int) -> float:
        of: dict[str, dict[int, Any]] = {"a": {}}
        for seed in range(2):
            rows = [[f"{row[0]}/{i}", *row[1:]] for row in judge(settings(tmp_path), 1) for i in range(repeats)]
            of["a"][seed] = told(tmp_path / str(repeats), "linear", seed, rows)
        return width(standings(of, range(2), "a", 400, 0)["a"])

    assert copies(8) == pytest.approx(copies(1), rel=1e-6)


def test_seeds_that_disagree_widen_an_interval(tmp_path: Path) -> None:
    """Perfect with one seed and worthless with the other: between these, whatever the patients are."""
    perfect = [
        [*row[:5], *((0.1, 0.9) if row[3] == "yes" else (0.9, 0.1)), *row[7:]] for row in judge(settings(tmp_path))
    ]
    worst = [[*row[:5], row[6], row[5], *row[7:]] for row in perfect]
    of = {"a": {0: told(tmp_path, "a", 0, perfect), 1: told(tmp_path, "a", 1, worst)}}
    both, alone = standings(of, (0, 1), "a", 500, 0)["a"], standings({"a": {0: of["a"][0]}}, (0,), "a", 500, 0)["a"]
    assert both.value.value == pytest.approx(0.5)
    assert both.value.interval == pytest.approx((0, 1))
    assert width(alone) == 0


def test_a_difference_is_of_the_seeds_that_both_have(tmp_path: Path) -> None:
    of = {"linear": {s: told(tmp_path, "linear", s) for s in (0, 1)}, "lora": {1: told(tmp_path, "lora", 1)}}
    found = standings(of, (0, 1, 2), "linear", 300, 0)["lora"]
    assert found.difference is not None
    assert found.difference.value == pytest.approx(of["lora"][1].value - of["linear"][1].value)
    assert np.isfinite(found.difference.interval).all()
    assert standings(of, (0, 1, 2), "full", 300, 0)["lora"].difference is None


def test_p_is_twice_the_rarer_side_and_never_nothing() -> None:
    assert two_sided(np.linspace(-1, 99, 1000)) == pytest.approx(2 * 11 / 1001)
    assert two_sided(np.ones(1000)) == pytest.approx(2 / 1001)
    assert two_sided(np.zeros(1000)) == 1
    assert two_sided(-np.linspace(-1, 99, 1000)) == two_sided(np.linspace(-1, 99, 1000))
    assert two_sided(np.r_[np.ones(400), np.full(600, np.nan)]) is None
    assert two_sided(np.r_[np.ones(600), np.full(400, np.nan)]) == pytest.approx(2 / 601)


def test_no_difference_is_found_where_there_is_none() -> None:
    """200 times two methods that differ by noise of patients alone: p is below 0.05 about as rarely as it says."""
    rng, low = np.random.default_rng(0), 0
    for _ in range(200):
        patients = rng.normal(size=60)
        drawn = patients[rng.integers(60, size=(400, 60))].mean(1)
        p = two_sided(drawn)
        assert p is not None
        low += p < 0.05
    assert 2 <= low <= 22


def test_the_level_that_leads_is_what_is_compared(tmp_path: Path) -> None:
    """By patient: the largest over breasts of the mean over views."""
    rows = judge(settings(tmp_path))
    found = told(tmp_path, "linear", 0, rows, headline="patient")
    assert len(found.cases) == PATIENTS
    means = [[*one[:6], (one[6] + two[6]) / 2, *one[7:]] for one, two in zip(rows[::2], rows[1::2], strict=True)]
    assert found.value == pytest.approx(within_folds(means))


def test_labels_are_read_by_the_separator_that_they_were_written_with(tmp_path: Path) -> None:
    config = settings(tmp_path / "out", seeds=[0])
    config = config.model_copy(
        update={"finetune": config.finetune.model_copy(update={"separator": ";", "kind": "multilabel"})}
    )
    of, logits = population("multilabel", 12, 0)

    def one(cell: FinetuneConfig) -> Run:
        more = {"kind": "multilabel", "metric": headline("multilabel")}
        run = write_run(cell, [], **more)
        write_predictions(run.folder / "predictions.csv", judged(of, logits), cell.finetune.separator)
        return run

    sweep(config, one)
    assert result(tmp_path / "out")["value"] == pytest.approx(roc_auc_score(of.truth, logits, average="macro"))


# ---------------------------------------------------------------------------------------------- what it writes


def test_the_report_shows_a_table_a_fraction_with_what_each_method_costs(tmp_path: Path) -> None:
    methods = ["linear", {"method": "lora", "options": {"rank": 8}}, "full"]
    run = sweep(settings(tmp_path / "out", methods=methods, fractions=[0.1, 1.0]), Fake())
    page = write_report([run.folder], tmp_path / "page.html").read_text()
    assert page.count('<table class="grid">') == 2
    assert page.count("lora (rank 8)") >= 4
    for words in (
        "10 % of the training patients&#39; labels",
        "147,456",
        "peak memory, MB",
        '<td class="n">1,000</td>',
    ):
        assert words in page
    found = result(run.folder)
    first, last = found["tables"]
    assert found["value"] == last["rows"][0][1]["value"] == found["rows"][0]["value"]
    assert [row["name"] for row in found["rows"]] == ["linear", "lora (rank 8)", "full", "majority class"]
    assert [row["name"] for row in found["differences"]] == ["lora (rank 8) − linear", "full − linear"]  # noqa: RUF001
    assert first["columns"][4:] == ["trainable", "adapter, kB", "peak memory, MB", "images/s", "s a run", "by seed"]
    assert first["rows"][0][4:-1] == [147_456, 591, 1000, 15.0, 60.5]
    assert "small dots are the seeds" in page
    with Image.open(run.folder / "figures" / "sweep.png") as picture:
        assert picture.width > 600


def test_the_csv_holds_the_same_numbers_in_full(tmp_path: Path) -> None:
    run = sweep(settings(tmp_path / "out", fractions=[0.1, 1.0]), Fake())
    with (run.folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["fraction"], row["method"], row["seeds"]) for row in rows] == [
        (fraction, method, "2") for fraction in ("0.1", "1.0") for method in ("linear", "lora")
    ]
    shown = result(run.folder)["tables"][1]["rows"][1]
    assert float(rows[3]["value"]) == shown[1]["value"]
    assert [float(rows[3][key]) for key in ("low", "high")] == shown[1]["interval"]
    assert float(rows[3]["difference"]) == shown[2]["value"]
    assert (rows[2]["difference"], rows[2]["p"], rows[3]["against"]) == ("", "", "linear")
    assert (rows[3]["adapter_bytes"], rows[3]["head"]) == ("590848", "770")


@pytest.mark.parametrize(
    "entry",
    [
        {"method": "full", "search": {"trials": 9}},
        {"method": "full", "search": {"folds": 5}},
        {"method": "full", "search": {"lrs": [1e-3]}},
        {"method": "full", "readout": {"views": "max"}},
        {"method": "full", "classes": ["1", "0"]},
    ],
)
def test_a_method_that_would_get_more_or_be_asked_something_else_is_refused(
    entry: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"sweep.methods: full.* differs in finetune\.\w+.*which all methods share"):
        list(grid(settings(tmp_path, methods=["linear", entry])))


def test_other_learning_rates_of_the_same_number_are_a_methods_own_affair(tmp_path: Path) -> None:
    entry = {"method": "full", "search": {"lrs": [1e-6, 1e-5, 1e-4]}}
    assert len(list(grid(settings(tmp_path, methods=["linear", entry])))) == 4
