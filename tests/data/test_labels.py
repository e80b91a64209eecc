"""What a user's table may bring into the clear: names of columns, views, splits, ages, texts."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from miram.data.identifying import identifies
from miram.data.sources.labels import Row, read_table, split, view
from miram.engine.errors import UserError

ROWS = 400


def table(folder: Path, **columns: Callable[[int], str]) -> Path:
    """200 patients with two images each, so that no id differs in every row."""
    path = folder / "l.csv"
    rows = [[f"f{i:03d}.png", *(cell(i) for cell in columns.values())] for i in range(ROWS)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["file", *columns], *rows])
    return path


def mrn(i: int) -> str:
    return f"{1000 + i // 2}"


@pytest.mark.parametrize(
    "column",
    [
        *("subject_id", "subject", "case_id", "pid", "id", "hospital_number", "chart_no", "study_id", "exam_id"),
        *(
            "image_id",
            "referrer",
            "physician",
            "surname",
            "last",
            "tel",
            "path",
            "PatientID",
            "StudyInstanceUID",
            "ID1",
        ),
        *(
            "caseID",
            "Fallnummer",
            "Referring Physician",
            "record no.",
            "ddsm_case",
            "dateofexam",
            "Exam Date",
            "anon_id",
        ),
        *("e-mail", "acc_anon", "zip", "mask_path", "Geburtsdatum", "NHS", "first", "clinic", "accession"),
    ],
)
def test_a_column_that_is_called_like_an_id_is_refused_and_named(tmp_path: Path, column: str) -> None:
    assert identifies(column)
    with pytest.raises(UserError) as told:
        read_table(table(tmp_path, **{column: mrn}))
    assert repr(column) in str(told.value)
    assert all(word in str(told.value) for word in ("`patient`", "`exam`", "drop", "rename"))
    assert "1000" not in str(told.value).replace(str(tmp_path), "")


LABELS = {
    # What our own sources store; the audit must let these pass.
    *("pathology", "binary", "four_class", "mass_shape", "mass_margins", "calc_type", "calc_distribution", "density"),
    *("assessment", "subtlety", "abnormality", "birads", "suspicious", "findings", "cancer", "biopsy", "invasive"),
    *("implant", "difficult_negative_case", "site", "machine", "age", "mass", "calcification", "tissue", "finding"),
    *("severity", "abnormal", "path_severity", "subtype", "class"),
}


@pytest.mark.parametrize(
    "column",
    [
        *sorted(LABELS),
        *("BI-RADS", "Density", "image_type", "Image Type", "scanner_letter", "ddsm_scanner_letter", "abnormality id"),
        *("fibroglandular_frac_of_breast", "augmentation", "lesion_frac", "clinical_stage", "number_of_lesions"),
        *("no_finding", "n_masses", "outcome", "candidate", "validated", "exam_type", "lesion number", "reference"),
        *("width", "phantom", "histories", "source", "notes", "grade", "er_status", "Laterality of mass"),
    ],
)
def test_a_column_that_is_called_like_a_label_is_taken(tmp_path: Path, column: str) -> None:
    assert not identifies(column)
    rows = read_table(table(tmp_path, **{column: lambda i: str(i % 4)}))
    assert rows[2][column] == "2"


@pytest.mark.parametrize(
    ("cell", "complaint"),
    [
        (lambda i: f"S{i // 2}", "200 different texts"),
        (lambda i: f"Smith{i % 41}", "41 different texts"),
        (lambda i: f"7340{i // 2:03d}", "numbers the patients"),
        (lambda i: f"7340{i % 50:03d}", "50 different texts"),
        (mrn, "numbers the patients"),
        (lambda i: "Dr Anna Schmidt" if i else "Prof. Meyer", "a name with a title"),
        (lambda i: "seen by Mrs Smith", "a name with a title"),
        (lambda i: "+49 176 1234567", "a phone number"),
        (lambda i: f"/data/SMITH_ANNA/{i % 3}", "a path"),
        (lambda i: r"C:\films\smith", "a path"),
        (lambda i: "61-03-19", "a date"),
        (lambda i: "2019-03-02T10:11", "a date"),
    ],
)
def test_values_that_tell_are_refused_though_each_patient_has_two_images(
    tmp_path: Path, cell: Callable[[int], str], complaint: str
) -> None:
    with pytest.raises(UserError, match=f"'origin'.*{complaint}") as told:
        read_table(table(tmp_path, patient=lambda i: f"p{i // 2}", origin=cell))
    assert not any(cell(i) in str(told.value).replace(str(tmp_path), "") for i in (0, 1, 7))


@pytest.mark.parametrize(
    "cell",
    [
        *(
            lambda i: f"type {i % 20}",
            lambda i: f"{i // 2 / 7:.4f}",
            lambda i: str(i % 90),
            lambda i: str(i * 31 % 997),
        ),
        *(lambda i: "DR system", lambda i: "mass, calcification", lambda i: "3/4", lambda i: "Miss"),
    ],
)
def test_classes_and_measures_are_taken(tmp_path: Path, cell: Callable[[int], str]) -> None:
    read_table(table(tmp_path, patient=lambda i: f"p{i // 2}", origin=cell))


@pytest.mark.parametrize("column", ["age", "Age", "age_at_diagnosis", "Alter"])
@pytest.mark.parametrize(("oldest", "good"), [("89", True), ("90", False), ("093Y", False), ("101.5", False)])
def test_ages_above_89_are_refused(tmp_path: Path, column: str, oldest: str, good: bool) -> None:
    path = table(tmp_path, **{column: lambda i: "45" if i else oldest})
    if good:
        assert read_table(path)[0][column] == oldest
        return
    with pytest.raises(UserError, match=r"ages above 89.*decades"):
        read_table(path)


def test_decades_and_other_large_numbers_are_no_ages(tmp_path: Path) -> None:
    cells = ["40-49", "80+", "90+", ""]
    read_table(table(tmp_path, age=lambda i: cells[i % 4], stage=lambda i: "120", image_width=lambda i: "2294"))


@pytest.mark.parametrize("text", ["cc", "MLO", "XCCL", "ml", "lateral", ""])
def test_a_view_is_one_of_a_list(text: str) -> None:
    assert view({"view": text}, "a.png") == text.upper()


@pytest.mark.parametrize("text", ["Smith, Anna", "SMITH", "RIGHT_MLO", "123456"])
def test_another_view_is_refused_with_its_row_and_not_repeated(text: str) -> None:
    with pytest.raises(UserError, match=r"a\.png a `view`.* CC, .*MLO.*another name") as told:
        view({"view": text}, "a.png")
    assert text not in str(told.value)


@pytest.mark.parametrize("text", ["Smith, Anna", "x" * 17, "train set", "Jürgen"])
def test_a_split_that_is_no_short_word_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UserError, match=r"a\.png a `split`") as told:
        split({"split": text}, "a.png")
    assert text not in str(told.value)
    assert [split(row, "") for row in ({"split": "train_valid"}, {"split": "fold-3"}, Row())] == [
        "train_valid",
        "fold-3",
        "",
    ]


def test_splits_as_many_as_patients_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'split'.*200 different texts"):
        read_table(table(tmp_path, split=mrn))


def test_paths_as_windows_writes_them_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    path.write_text("file,birads\none\\two\\a.png,1\n")
    assert read_table(path)[0]["file"] == "one/two/a.png"
