"""Tables of judged images: read is what was written, and what is damaged is refused in one sentence."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from random_cases import random_cases

from miram.engine.errors import UserError
from miram.finetune.segment.casefile import read_cases, write_cases
from miram.finetune.segment.cases import Case, score_case

CLASSES = ("background", "mass, or so", 'calc "fine"')


def written(folder: Path, cases: list[Case] | None = None) -> list[Case]:
    """Cases in a folder."""
    cases = random_cases(12, seed=0, classes=2) if cases is None else cases
    write_cases(folder, cases, CLASSES)
    return cases


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    cases = written(tmp_path / "made")
    cases[3] = replace(cases[3], key="odd, 'key'\nof two lines", spacing_mm=None, fold=-1)
    cases[4] = replace(cases[4], spacing_mm=0.1 + 0.2)
    assert any(lesion.missed for case in cases for lesion in case.lesions)
    assert repr(read_cases(tmp_path / "made")) != repr(cases)
    write_cases(tmp_path / "made", cases, CLASSES)
    assert repr(read_cases(tmp_path / "made")) == repr(cases)  # nan equals no nan, its repr does


def test_no_case_at_all_is_read_as_none(tmp_path: Path) -> None:
    written(tmp_path, [])
    assert read_cases(tmp_path) == []


def test_an_image_that_was_scored_survives(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet((3, 1, 1), (20, 30)).transpose(2, 0, 1).astype(np.float32)
    truth = rng.integers(0, 3, (20, 30)).astype(np.uint8)
    case = score_case(
        "a", "p", 0, 0.07, truth, truth.astype(np.int32), probabilities.argmax(0).astype(np.uint8), probabilities
    )
    written(tmp_path, [case])
    assert repr(read_cases(tmp_path)) == repr([case])


def test_other_programs_can_read_the_tables(tmp_path: Path) -> None:
    cases = written(tmp_path)
    with (tmp_path / "lesions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lesions = [(case, lesion) for case in cases for lesion in case.lesions]
    assert [row["key"] for row in rows] == [case.key for case, _ in lesions]
    assert [row["class"] for row in rows] == [CLASSES[lesion.cls] for _, lesion in lesions]
    assert [row["hd95"] == "" for row in rows] == [lesion.missed for _, lesion in lesions]
    with (tmp_path / "cases.csv").open(newline="") as file:
        assert [int(row["both:mass, or so"]) for row in csv.DictReader(file)] == [
            case.overlaps[0].both for case in cases
        ]


@pytest.mark.parametrize("name", ["cases.csv", "lesions.csv", "candidates.csv"])
def test_a_missing_table_is_named(tmp_path: Path, name: str) -> None:
    written(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is not there"):
        read_cases(tmp_path)


@pytest.mark.parametrize("name", ["cases.csv", "lesions.csv", "candidates.csv"])
@pytest.mark.parametrize("damage", ["column", "short", "twice", "number", "negative", "endless", "empty", "binary"])
def test_a_damaged_table_is_refused_in_one_sentence(tmp_path: Path, name: str, damage: str) -> None:
    written(tmp_path)
    path = tmp_path / name
    lines = path.read_text().splitlines()
    count, number = {"cases.csv": (5, 3), "lesions.csv": (3, 4), "candidates.csv": (3, 2)}[name]  # columns
    cells = next(csv.reader([lines[1]]))
    spoiled = {"number": "many", "negative": "-3", "endless": "inf"}
    if damage in spoiled:
        cells[count if damage == "negative" else number] = spoiled[damage]
        lines[1] = ",".join(f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in cells)
    content = {
        "column": [lines[0] + ",more", *(line + ",1" for line in lines[1:])],
        "short": [lines[0], lines[1].rsplit(",", 1)[0]],
        "twice": [*lines, lines[1] if name == "cases.csv" else lines[1].replace("key-", "other-")],
        "empty": [],
        "binary": [],
    }.get(damage, lines)
    path.write_bytes(b"\xff\xfe\x00" if damage == "binary" else "\n".join(content).encode())
    with pytest.raises(UserError, match=rf"{name} is damaged or of another version \(.+\); run what wrote it again"):
        read_cases(tmp_path)
