"""The report: figures stand with interval and n, damage costs a note, and no file reaches the page raw."""

import json
import os
import re
from base64 import b64decode
from collections.abc import Iterator
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from miram.engine.errors import UserError
from miram.engine.report import write_report

VOID = {"meta", "img", "link", "br", "hr", "input"}
SVG_SHAPES = {"line", "circle"}
HOSTILE = "<script>alert(1)</script>"

RESULT: dict[str, Any] = {
    "schema": "miram.result/1",
    "stage": "probe",
    "task": "density",
    "split": "5 folds by patient of split test",
    "metric": "balanced accuracy",
    "value": 0.71,
    "interval": [0.66, 0.76],
    "n_images": 1480,
    "n_patients": 121,
    "classes": {"a": 371, "b": 372, "c": 373, "d": 364},
    "rows": [
        {"name": "pretrained encoder", "value": 0.71, "interval": [0.66, 0.76], "detail": "C = 0.1"},
        {"name": "random weights (seed 0)", "value": 0.603, "interval": [0.552, 0.655]},
        {"name": "majority class", "value": 0.25, "interval": None},
    ],
    "differences": [
        {"name": "pretrained \N{MINUS SIGN} mean of 3 random", "value": 0.11, "interval": [0.06, 0.15]},
        {"name": "random \N{MINUS SIGN} statistics", "value": -0.012, "interval": [-0.05, 0.03]},
    ],
    "notes": ["Intervals by bootstrap over patients."],
}


class Page(HTMLParser):
    """A parsed page: the visible text, every tag with its attributes, and whether tags balance."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.feed(self.source)
        self.close()
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG_SHAPES, f"<{tag}/> closes itself only inside an SVG"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.pieces.append(data)

    def images(self, kind: str) -> list[bytes]:
        """The embedded images of a media type, decoded."""
        sources = [attrs["src"] or "" for tag, attrs in self.tags if tag == "img"]
        head = f"data:{kind};base64,"
        return [b64decode(source.removeprefix(head)) for source in sources if source.startswith(head)]

    def notes(self) -> list[str]:
        """What the page flags as damaged."""
        return re.findall(r'<p class="quiet flag">(.*?)</p>', self.source)


def make_run(folder: Path, **files: Any) -> Path:
    """A run folder; `state="…"` writes state.json, objects as JSON and text as it is."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"out: {folder}\nseed: 7\n")
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / (name + (".jsonl" if name == "metrics" else ".json"))).write_text(text)
    return folder


def log(steps: int, **more: float) -> str:
    """A training log of so many lines, ten steps apart, as a run writes it."""
    rows = [
        {
            "step": 10 * n,
            "samples": 640 * n,
            "loss": 1 / n,
            "loss/1": 0.5 / n,
            "lr": 1e-4,
            "images_per_s": {1: 3.0, 2: 990.0}.get(n, 812.0),  # the first step pays for the start
            "peak_memory_bytes": 2**30 * (3 if n == 2 else 1),
        }
        for n in range(1, steps + 1)
    ]
    return "".join(json.dumps(row | more) + "\n" for row in rows)


def png(path: Path, colour: int) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("L", (8, 6), colour).save(path)


def cells(page: Page) -> Iterator[list[str]]:
    """The rows of the table of runs, tags removed."""
    table = page.source.partition('<table class="runs">')[2].partition("</table>")[0]
    for row in table.partition("<tbody>")[2].split("</tr>")[:-1]:
        found = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        yield [" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in found]


def test_every_number_stands_with_its_interval_and_n(tmp_path: Path) -> None:
    run = make_run(tmp_path / "probe", result=RESULT)
    page = Page(write_report([run], tmp_path / "report.html", title="July"))
    assert page.open == []
    assert page.text.count("July") == 2  # title and heading
    basis = "balanced accuracy · density · 1,480 images, 121 patients"
    assert page.text.count(basis) == 3  # headline, table of runs, section
    assert page.text.count("0.710 [0.660, 0.760]") == 4  # and its row
    for expected in (
        f"0.710 [0.660, 0.760] {basis} · 5 folds by patient of split test",
        "a 371 · b 372 · c 373 · d 364",
        "pretrained encoder C = 0.1 0.710 [0.660, 0.760]",
        "random weights (seed 0) 0.603 [0.552, 0.655]",
        "majority class 0.250 —",
        "pretrained \N{MINUS SIGN} mean of 3 random +0.110 [+0.060, +0.150]",
        "random \N{MINUS SIGN} statistics \N{MINUS SIGN}0.012 [\N{MINUS SIGN}0.050, +0.030]",
        "Intervals by bootstrap over patients.",
    ):
        assert expected in page.text


def test_forest_plot_has_one_scale_and_marks_zero(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "probe", result=RESULT)], tmp_path / "report.html"))
    dots = [float(str(attrs["cx"])[:-1]) for tag, attrs in page.tags if tag == "circle"]
    lines = [attrs for tag, attrs in page.tags if tag == "line"]
    whiskers = [(float(str(a["x1"])[:-1]), float(str(a["x2"])[:-1])) for a in lines if a["class"] == "whisker"]
    zeros = {float(str(a["x1"])[:-1]) for a in lines if a["class"] == "zero"}
    assert len(dots) == 5
    assert len(whiskers) == 4  # the majority class has no interval
    pretrained, random_weights, majority, better, worse = dots
    assert 0 < majority < random_weights < pretrained < 100
    slope = (pretrained - majority) / (0.71 - 0.25)
    assert random_weights == pytest.approx(majority + slope * (0.603 - 0.25), abs=0.02)
    assert whiskers[0] == pytest.approx((pretrained - slope * 0.05, pretrained + slope * 0.05), abs=0.02)
    assert len(zeros) == 1
    assert worse < zeros.pop() < whiskers[2][0] < better


def test_zero_stays_in_sight_of_differences_far_from_it(tmp_path: Path) -> None:
    result = RESULT | {"differences": [{"name": "far", "value": 0.4, "interval": [0.38, 0.42]}]}
    page = Page(write_report([make_run(tmp_path / "probe", result=result)], tmp_path / "report.html"))
    (zero,) = (attrs for tag, attrs in page.tags if tag == "line" and attrs["class"] == "zero")
    assert 0 < float(str(zero["x1"])[:-1]) < 100


def test_result_without_rows_or_interval_is_shown_and_says_what_is_unstated(tmp_path: Path) -> None:
    result = '{"schema": "miram.result/1", "task": "tissue", "metric": "AUC", "value": NaN, "n_images": 9}'
    page = Page(write_report([make_run(tmp_path / "run", result=result)], tmp_path / "report.html"))
    assert "— — AUC · tissue · 9 images, patients unstated" in page.text
    assert page.notes() == []


def test_table_of_runs_reads_the_log_and_ignores_a_cut_last_line(tmp_path: Path) -> None:
    state = {"schema": "miram.state/1", "stage": "pretrain", "status": "preempted", "reason": "SIGTERM came"}
    run = make_run(tmp_path / "cut", state=state, metrics=log(200) + '{"step": 2010, "lo')
    page = Page(write_report([run], tmp_path / "report.html"))
    assert list(cells(page)) == [["cut", "pretrain", "preempted", "2,000", "0.005", "812", "3.0 GiB", ""]]
    assert "200 logged steps" in page.text
    assert "SIGTERM came" in page.text
    assert page.notes() == []


def test_damaged_log_line_in_the_middle_is_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics=log(3) + "garbage\n[1]\n" + log(4) + "\n")
    page = Page(write_report([run], tmp_path / "report.html"))
    assert page.notes() == ["metrics.jsonl: 2 of 9 lines could not be read and are left out"]
    assert "7 logged steps" in page.text


@pytest.mark.parametrize("loss", ["NaN", "Infinity", "1e999"])
def test_log_of_a_diverged_run_is_drawn(tmp_path: Path, loss: str) -> None:
    lines = f'{{"step": 1, "loss": {loss}}}\n{{"step": 2, "loss": {loss}}}\n'
    page = Page(write_report([make_run(tmp_path / "run", metrics=lines)], tmp_path / "report.html"))
    assert len(page.images("image/svg+xml")) == 1
    assert next(cells(page))[4] in {"nan", "inf"}


TABLES: list[dict[str, Any]] = [
    {
        "title": "10 % of the labels",
        "columns": ["method", "AUC", "against linear", "p", "trainable", "why"],
        "rows": [
            ["linear", {"value": 0.8116, "interval": [0.754, 0.861]}, None, None, 770, ""],
            ["lora", {"value": 0.5}, {"value": 0.02, "interval": [-0.031, 0.0714], "signed": True}, 0.41, 1470456, "b"],
            ["full", {"value": None}, None, 0.0001, -3, "out of memory"],
        ],
        "note": "Patients and seeds are resampled.",
    },
    {"columns": ["speed"], "rows": [[float("nan")], [1234.5], [88.24], [0.0]]},
]


def grids(page: Page) -> Iterator[list[list[tuple[bool, str]]]]:
    """The tables of a result: rows of (right-aligned, text)."""
    for table in page.source.split('<table class="grid">')[1:]:
        rows = table.partition("</table>")[0].split("</tr>")[:-1]
        cells = [re.findall(r"<t[hd]( [^>]*)?>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
        yield [[('class="n"' in how, " ".join(text.split())) for how, text in row] for row in cells]


def test_tables_hold_figures_counts_and_text(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "run", result=RESULT | {"tables": TABLES})], tmp_path / "r.html"))
    first, second = grids(page)
    assert [[text for _, text in row] for row in first] == [
        ["method", "AUC", "against linear", "p", "trainable", "why"],
        ["linear", "0.812 [0.754, 0.861]", "—", "—", "770", ""],
        ["lora", "0.500", "+0.020 [\N{MINUS SIGN}0.031, +0.071]", "0.410", "1,470,456", "b"],
        ["full", "—", "—", "1e\N{MINUS SIGN}04", "\N{MINUS SIGN}3", "out of memory"],
    ]
    assert [right for right, _ in first[0]] == [right for right, _ in first[1]] == [False, *[True] * 4, False]
    assert [text for row in second for _, text in row] == ["speed", "—", "1,234", "88.2", "0.000"]
    assert "10 % of the labels" in page.text
    assert "Patients and seeds are resampled." in page.text
    assert page.open == page.notes() == []


def test_a_wide_table_scrolls_by_itself_and_stays_a_table_on_a_phone(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "run", result=RESULT | {"tables": TABLES})], tmp_path / "r.html"))
    assert page.source.count('<div class="scroll"') == 2
    assert re.search(r"\.scroll {[^}]*overflow-x: auto", page.source)
    phone = page.source.partition("@media (max-width")[2].partition("@media print")[0]
    assert phone.index("table, tbody") < phone.index(".grid { display: table;")
    assert ".grid tbody { display: table-row-group; }" in phone


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"columns": ["a", "b"], "rows": [[1]]}, "row 1 has 1 cells under 2 columns"),
        ({"columns": ["a"], "rows": [[{"interval": [0, 1]}]]}, "Field required"),
        ({"rows": [[1]]}, "columns: Field required"),
        ({"columns": ["a"], "rows": [[True]]}, "rows.0.0"),
        ("table", "valid dictionary"),
    ],
)
def test_a_damaged_table_is_left_out_with_a_note(tmp_path: Path, damage: Any, said: str) -> None:
    result = RESULT | {"tables": [TABLES[0], damage, TABLES[1]]}
    page = Page(write_report([make_run(tmp_path / "run", result=result)], tmp_path / "report.html"))
    assert len(list(grids(page))) == 2
    (note,) = page.notes()
    assert note.startswith("result.json: table 2 could not be read and is left out: ")
    assert said in note
    assert "random weights (seed 0) 0.603" in page.text


def test_tables_that_are_no_list_cost_a_note(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "run", result=RESULT | {"tables": {}})], tmp_path / "report.html"))
    assert page.notes() == ["result.json: tables is no list and is left out"]


def test_curves_of_one_stage_are_overlaid(tmp_path: Path) -> None:
    stages = {"one": "pretrain", "two": "pretrain", "other": "distill", "quiet": "pretrain"}
    for name, stage in stages.items():
        metrics = {} if name == "quiet" else {"metrics": log(20, rankme=3.0)}
        make_run(tmp_path / name, state={"schema": "miram.state/1", "stage": stage, "status": "running"}, **metrics)
    page = Page(write_report([tmp_path / name for name in stages], tmp_path / "report.html"))
    # each logged run: losses, lr, images_per_s, rankme; and one comparison
    assert len(page.images("image/svg+xml")) == 3 * 4 + 1
    compared = page.source.partition('<div class="charts solo">')[2].partition("</div>")[0]
    assert re.findall(r"</svg>(\w+)</span>", compared) == ["one", "two"]
    assert "Loss of the pretrain runs" in page.text
    assert "Loss of the distill runs" not in page.text


def test_figures_are_embedded_in_name_order_with_captions(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name, colour in (("b.png", 20), ("a_first.png", 10), ("c.png", 30)):
        png(run / "figures" / name, colour)
    captions = {"schema": "miram.captions/1", "b.png": "Breast & <b>mask</b>", "gone.png": "never drawn"}
    (run / "figures" / "captions.json").write_text(json.dumps(captions))
    page = Page(write_report([run], tmp_path / "report.html"))
    colours = [Image.open(BytesIO(data)).getpixel((0, 0)) for data in page.images("image/png")]
    assert colours == [10, 20, 30]
    found = re.findall(r"<figcaption>(.*?)</figcaption>", page.source)
    assert found == ["a first", "Breast &amp; &lt;b&gt;mask&lt;/b&gt;", "c"]
    assert "never drawn" not in page.text


def test_broken_pictures_and_captions_cost_a_note_each(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    png(run / "figures" / "good.png", 1)
    whole = (run / "figures" / "good.png").read_bytes()
    (run / "figures" / "cut.png").write_bytes(whole[:-4])
    (run / "figures" / "folder.png").mkdir()
    (run / "figures" / "captions.json").write_text("[]")
    page = Page(write_report([run], tmp_path / "report.html"))
    assert page.images("image/png") == [whole]
    flagged = " ".join(page.notes())
    assert all(name in flagged for name in ("figures/captions.json", "figures/cut.png", "figures/folder.png"))


@pytest.mark.parametrize(
    "damage",
    [
        '{"schema": "miram.resu',
        "[]",
        "null",
        '{"schema": "miram.result/9", "value": 1}',
        '{"value": "high"}',
        "[" * 9999,
    ],
)
def test_damaged_result_costs_a_note_and_nothing_else(tmp_path: Path, damage: str) -> None:
    damaged = make_run(tmp_path / "damaged", result=damage, metrics=log(20))
    whole = make_run(tmp_path / "whole", result=RESULT)
    page = Page(write_report([damaged, whole], tmp_path / "report.html"))
    (note,) = page.notes()
    assert note.startswith("result.json could not be read: ")
    assert [row[0] for row in cells(page)] == ["damaged", "whole"]
    assert "20 logged steps" in page.text
    assert "random weights (seed 0) 0.603" in page.text


def test_damage_in_every_other_file_is_noted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", state='{"sta', encoder="[" * 100_000, metrics="")
    (run / "config.yaml").write_bytes(b"note: \xff\xfe caf\xc3\xa9\n")
    page = Page(write_report([run], tmp_path / "report.html"))
    assert [note.partition(" ")[0] for note in page.notes()] == ["state.json", "encoder.json"]
    assert next(cells(page))[2] == "unknown"
    assert "café" in page.text


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "bare")], tmp_path / "report.html"))
    assert "Not in this folder: state.json, metrics.jsonl, result.json, encoder.json, figures." in page.text
    assert "seed: 7" in page.text


def test_encoder_card_is_shown(tmp_path: Path) -> None:
    card = {"schema": "miram.encoder/1", "image_size": [448, 224], "parameters": 21_493_632, "made": {"by": "run"}}
    page = Page(write_report([make_run(tmp_path / "run", encoder=card)], tmp_path / "report.html"))
    assert "image size 448, 224 parameters 21,493,632 made by run" in page.text


def test_hostile_text_is_escaped_everywhere(tmp_path: Path) -> None:
    texts = ("stage", "task", "split", "metric")
    result = RESULT | {key: f"{key} {HOSTILE}" for key in texts} | {"notes": [HOSTILE], "classes": {HOSTILE: 3}}
    result["rows"] = [{"name": HOSTILE, "value": 1, "detail": HOSTILE}]
    result["tables"] = [{"title": HOSTILE, "columns": [HOSTILE], "rows": [[HOSTILE]], "note": HOSTILE}]
    result["tables"] += [{"title": '" onclick="alert(1)', "columns": [], "rows": []}]
    state = {"schema": "miram.state/1", "stage": HOSTILE, "status": HOSTILE, "reason": HOSTILE}
    card = {HOSTILE: {HOSTILE: [HOSTILE]}}
    metrics = log(3, **{HOSTILE: 1.0, "loss/" + HOSTILE: 2.0, '"onload="alert(1)': 1.0, "$\\bad$": 1.0})
    runs = [tmp_path / name / "<script>alert(1)" for name in ("x", "y")]
    for run in runs:
        make_run(run, state=state, result=result, encoder=card, metrics=metrics)
        png(run / "figures" / "a.png", 1)
        (run / "figures" / "captions.json").write_text(json.dumps({"a.png": '"><script>'}))
        (run / "config.yaml").write_text(f"name: {HOSTILE}</pre>\n")
    page = Page(write_report(runs, tmp_path / "report.html", title=HOSTILE))
    assert page.open == []
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "link"})
    assert "<script" not in page.source
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert page.text.count(HOSTILE) > 20


def test_page_is_self_contained_and_names_no_path_of_the_machine(tmp_path: Path) -> None:
    folder = tmp_path / "Jane Doe"
    state = {"schema": "miram.state/1", "stage": "x", "status": "failed", "reason": "no file:///srv/films/a.dcm"}
    metrics = log(20)
    run = make_run(folder / "run", state=state, metrics=metrics, encoder={"from": [f"{folder}/run", "and/or"]})
    (run / "config.yaml").write_text(f"out: {folder}/run\nshards: [/srv/films, 's3://bucket/key', runs/demo]\n")
    (run / "result.json").mkdir()
    png(run / "figures" / "a.png", 1)
    page = Page(write_report([run], folder / "report.html"))
    for private in (str(tmp_path), str(folder), "Jane", "/srv"):
        assert private not in page.source
    assert "out: …/run shards: […/films, 's3://bucket/key', runs/demo]" in page.text
    assert "no …/a.dcm" in page.text
    assert "from …/run, and/or" in page.text
    assert "http://" not in page.source
    assert "https://" not in page.source
    references = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "srcset") if name in attrs]
    assert references
    assert all(str(reference).startswith(("data:image/", "#run-")) for reference in references)
    assert not re.search(r"@import|url\(", page.source)


def test_links_lead_to_sections_and_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / parent / "demo") for parent in ("a", "b", "c")]
    page = Page(write_report(runs, tmp_path / "report.html"))
    assert [row[0] for row in cells(page)] == ["demo", "demo (2)", "demo (3)"]
    anchors = [f"#{attrs['id']}" for _, attrs in page.tags if "id" in attrs]
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"] == anchors
    assert len(set(anchors)) == 3


def test_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics=log(30), result=RESULT)
    first = write_report([run], tmp_path / "a.html").read_bytes()
    assert write_report([run], tmp_path / "new" / "b.html").read_bytes() == first


def test_folder_that_is_not_there_or_no_run_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    good = make_run(tmp_path / "good")
    out = tmp_path / "report.html"
    with pytest.raises(UserError, match=r"run folder .*absent is not there"):
        write_report([good, tmp_path / "absent"], out)
    with pytest.raises(UserError, match=r"empty is no run: it holds no config\.yaml"):
        write_report([good, tmp_path / "empty"], out)
    with pytest.raises(UserError, match="no run folder given"):
        write_report([], out)
    assert not out.exists()


def test_interrupted_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    out = tmp_path / "report.html"
    out.write_text("old")

    def power_cut(*_: Any, **__: Any) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", power_cut)
    with pytest.raises(OSError, match="power cut"):
        write_report([run], out)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


def test_a_figure_of_breasts_is_not_passed_off_as_one_of_images(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("out: run\n")
    told = {"schema": "miram.result/1", "metric": "AUC", "level": "breast", "task": "mass", "value": 0.7, "n_images": 4}
    (run / "result.json").write_text(json.dumps(told))
    assert "AUC by breast" in write_report([run], tmp_path / "page.html").read_text()
