"""One HTML page from run folders. It knows no stage: it shows what a folder holds and says what it lacks."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .errors import UserError
from .files import write_atomic
from .result import Estimate, Result, parse_result, why

T = TypeVar("T")
Point = tuple[float, float]

# Colours read on the white card that charts keep in both themes; dashes tell an eighth run from the first.
COLOURS = ("#0f6e6e", "#c8561b", "#5a5fc0", "#a3790a", "#a83279", "#4d8032", "#5b6670")
STYLES = [(colour, dash) for dash in ("", "5 2", "1.5 1.5") for colour in COLOURS]
CHART_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), "#57606a"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    **{"axes.edgecolor": "#c9ced4", "axes.grid": True, "axes.axisbelow": True, "grid.color": "#eceef0"},
    **{"font.family": "sans-serif", "font.size": 8, "axes.formatter.limits": (-3, 6), "ytick.major.size": 0},
    **{"svg.fonttype": "path", "svg.hashsalt": "miram"},  # the same runs give the same bytes
}

WIDE, TALL, SMALL = (5.0, 2.6), (2.3, 2.6), (2.3, 1.6)  # inches; a tall chart fits beside a wide one

# The machine's paths, but neither "s3://bucket/key" nor "images/s" nor "runs/demo".
ABSOLUTE_PATH = re.compile(r"""(?:file://|(?<![\w/.<~…-]))/(?:[^\s/'",;\])}]+/)*([^\s/'",;\])}]+)""")


@dataclass(frozen=True)
class Axis:
    """The common scale of a table's dots and whiskers."""

    ticks: list[float]

    @classmethod
    def over(cls, estimates: Iterable[Estimate], *also: float) -> Axis:
        """A round scale that holds every value, every interval and the numbers in `also`."""
        found = [number for e in estimates for number in (e.value, *(e.interval or ())) if number is not None]
        numbers = [*found, *also] or [0.0, 1.0]
        locator = MaxNLocator(5, steps=[1, 2, 5, 10])
        return cls([float(tick) for tick in locator.tick_values(min(numbers), max(numbers))])

    def at(self, value: float) -> str:
        """Where a value stands, in percent of the width; the margin is for the outer tick labels."""
        low, high = self.ticks[0], self.ticks[-1]
        return f"{5 + 90 * (value - low) / (high - low):.2f}%"


@dataclass(frozen=True)
class Chart:
    """A drawn chart; its legend stays HTML, so that names are escaped and wrap on a phone."""

    image: Markup
    legend: list[tuple[str, tuple[str, str]]]
    wide: bool


@dataclass
class Run:
    """What one run folder holds, read leniently: `missing` and `notes` say what is not shown."""

    folder: Path
    name: str
    config: str = ""
    state: dict[str, Any] = field(default_factory=lambda: {"status": "", "reason": ""})
    log: list[dict[str, float]] = field(default_factory=list)
    result: Result | None = None
    card: dict[str, Any] | None = None
    pictures: list[tuple[str, Markup]] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        """The stage by the run's own account."""
        return str(self.state.get("stage") or (self.result.stage if self.result else ""))

    def points(self, key: str, x: str = "step") -> list[Point]:
        """A logged field over another."""
        return [(row[x], row[key]) for row in self.log if key in row and x in row]

    def read(self, name: str, parse: Callable[[str], T]) -> T | None:
        """Parse one optional file, or take down why not."""
        try:
            return parse((self.folder / name).read_text(encoding="utf-8", errors="replace"))
        except FileNotFoundError:
            self.missing.append(name)
        except (OSError, ValueError, RecursionError) as problem:
            self.notes.append(f"{name} could not be read: {why(problem)}")
        return None


def write_report(
    runs: Sequence[Path], out: Path, *, title: str = "miram report", names: Sequence[str] | None = None
) -> Path:
    """Write one self-contained page about the run folders to `out`, whole or not at all.

    They are called by `names`, or as their folders are.

    Raises:
        UserError: no run is named, or a folder is missing or is no run.
    """
    if not runs:
        raise UserError("no run folder given; name at least one, as in `miram report runs/demo`")
    names = list(names or (run.resolve().name for run in runs))
    earlier = [names[:place].count(name) for place, name in enumerate(names)]
    shown = [f"{name} ({n + 1})" if n else name for name, n in zip(names, earlier, strict=True)]
    read = [_read_run(run, name) for run, name in zip(runs, shown, strict=True)]
    page = _environment(read).get_template("report.html")
    write_atomic(out, page.render(title=title, runs=read, comparisons=_comparisons(read)))
    return out


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise UserError(f"run folder {folder} is not there; check the path, or start the run first")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run: it holds no config.yaml; name the folder a run got as --out")
    run = Run(folder, name)
    run.config = run.read("config.yaml", str) or ""
    run.state |= run.read("state.json", _parse_object) or {}
    run.log = run.read("metrics.jsonl", lambda text: _parse_log(text, run.notes)) or []
    run.result = run.read("result.json", lambda text: parse_result(text, run.notes))
    run.card = run.read("encoder.json", _parse_object)
    run.pictures = _pictures(run)
    run.charts = _charts(run)
    return run


def _parse_object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    return {key: value for key, value in found.items() if key != "schema"}


def _parse_log(text: str, notes: list[str]) -> list[dict[str, float]]:
    rows = [_log_row(line) for line in text.split("\n") if line.strip()]
    # A kill may cut the last line short; that is how runs end, not damage.
    if damaged := rows[:-1].count(None):
        notes.append(f"metrics.jsonl: {damaged} of {len(rows)} lines could not be read and are left out")
    return [row for row in rows if row is not None]


def _log_row(line: str) -> dict[str, float] | None:
    """The numbers of one log line; None where it is no log line."""
    try:
        found = _parse_object(line)
        numbers = {key: float(value) for key, value in found.items() if type(value) in (int, float)}
    except (ValueError, OverflowError, RecursionError):
        return None
    return numbers if "step" in numbers else None


def _pictures(run: Run) -> list[tuple[str, Markup]]:
    paths = sorted((run.folder / "figures").glob("*.png"))
    if not paths:
        run.missing.append("figures")
        return []
    captions = run.read("figures/captions.json", _parse_object) or {}
    embedded = [(path, _png(path, run.notes)) for path in paths]
    return [(str(captions.get(p.name, p.stem.replace("_", " "))), image) for p, image in embedded if image]


def _png(path: Path, notes: list[str]) -> Markup | None:
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    if data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82"):
        return _data_uri("image/png", data)
    notes.append(f"figures/{path.name} is no whole PNG and is left out")
    return None


def _charts(run: Run) -> list[Chart]:
    """Losses on one panel, then a small panel for each other field the run logged, learning rate first."""
    keys = list(dict.fromkeys(key for row in run.log for key in row))
    losses = {key: run.points(key) for key in keys if key == "loss" or key.startswith("loss/")}
    hidden = {*losses, "step", "epoch", "samples", "peak_memory_bytes"}
    others = sorted((key for key in keys if key not in hidden), key=lambda key: key != "lr")
    wide = [_chart(losses, WIDE)] if losses else []
    small = [_chart({key: run.points(key)}, TALL if key == "lr" else SMALL) for key in others]
    return wide + small


def _comparisons(runs: list[Run]) -> dict[str, Chart]:
    """Overlaid losses, for each stage of which more than one run logged a loss."""
    logged = [run for run in runs if run.points("loss")]
    stages = {run.stage: [other for other in logged if other.stage == run.stage] for run in logged}
    return {stage: _overlay(group) for stage, group in stages.items() if len(group) > 1}


def _overlay(runs: list[Run]) -> Chart:
    # Images seen is the fairer axis where batch sizes differ.
    x = "samples" if all(run.points("loss", "samples") for run in runs) else "step"
    curves = {run.name: run.points("loss", x) for run in runs}
    return _chart(curves, WIDE, "images seen" if x == "samples" else "step")


def _chart(curves: dict[str, list[Point]], size: tuple[float, float], x_label: str = "step") -> Chart:
    with mpl.rc_context(CHART_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot(xlabel=x_label)
        for points, (colour, dash) in zip(curves.values(), cycle(STYLES), strict=False):
            pattern = (0, tuple(map(float, dash.split()))) if dash else "-"
            marker = "o" if len(points) <= 12 else ""
            axes.plot(*np.array(points).T, color=colour, ls=pattern, lw=1.3, marker=marker, ms=3)
        axes.xaxis.set_major_locator(MaxNLocator(6 if size == WIDE else 3, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_locator(MaxNLocator(4 if size == SMALL else 6))
        drawn = BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    legend = list(zip(curves, cycle(STYLES), strict=False))
    return Chart(_data_uri("image/svg+xml", drawn.getvalue()), legend, size == WIDE)


def _data_uri(kind: str, data: bytes) -> Markup:
    return Markup(f"data:{kind};base64,{b64encode(data).decode('ascii')}")


def _environment(runs: list[Run]) -> Environment:
    folders = {str(run.folder.resolve().parent) for run in runs} | {str(Path.home())}
    private = sorted(folders - {"/"}, key=len, reverse=True)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.undefined = StrictUndefined
    environment.finalize = lambda value: _without_paths(value, private)
    environment.filters |= {"axis": Axis.over, "middle": median, "flat": _flat, "number": _number}
    return environment


def _without_paths(value: Any, private: Iterable[str]) -> Any:
    """Text with absolute paths cut to their last part: pages travel, and paths tell who and where."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    for folder in private:
        value = value.replace(f"{folder}/", "…/")
    return ABSOLUTE_PATH.sub(r"…/\1", value)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_flat, value))
    return f"{value:,}" if type(value) is int else str(value)


def _number(value: float) -> str:
    """A number of a table: counts whole, fractions to three digits, what they would hide in powers of ten."""
    size = abs(value)
    if not np.isfinite(value):
        return "\N{EM DASH}"
    fraction = ".0e" if 0 < size < 0.0005 else ".3f" if size < 10 else ",.1f" if size < 1000 else ",.0f"
    return f"{value:{',d' if type(value) is int else fraction}}".replace("-", "\N{MINUS SIGN}")
