"""From index columns to tasks: as the sources write them, and as users get them wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from miram.data.image import encode_png
from miram.data.layout import Encoded, finished, seal, write_tar
from miram.data.shards import ShardDataset
from miram.engine.errors import UserError
from miram.finetune.classify.labels import Labelled, read_labels
from miram.finetune.task import outer_folds

Index = Callable[..., ShardDataset]
Row = Mapping[str, str]


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Writes a set of tiny images whose index has these labels; four images a patient, or as said."""

    def make(rows: Sequence[Row], name: str = "made", **columns: Sequence[str]) -> ShardDataset:
        folder = tmp_path / name
        folder.mkdir()
        content = {"png": encode_png(np.ones((4, 4), np.uint8)), "json": json.dumps({}).encode()}
        described = {
            "patient": [f"p{i // 4:02d}" for i in range(len(rows))],
            "laterality": ["LLRR"[i % 4] for i in range(len(rows))],
            "split": [""] * len(rows),
        } | columns
        samples = [
            Encoded(
                f"{name}-{i:04d}",
                {"dataset": name, "max_value": 255}
                | {column: values[i] for column, values in described.items()}
                | {f"label_{task}": value for task, value in row.items()},
                content,
            )
            for i, row in enumerate(rows)
        ]
        path = folder / "shard-000000.tar"
        seal(folder, [finished(path, *write_tar(path, samples))], {"dataset": name, "licence": "none", "records": name})
        return ShardDataset(folder)

    return make


def column(task: str, values: Sequence[str]) -> list[Row]:
    return [{task: value} for value in values]


def told(labelled: Labelled) -> dict[str, str | set[str]]:
    """The class of every image by its key's number, or the set of its classes."""
    names, numbers = labelled.target.classes, [key.rpartition("-")[2] for key in labelled.keys]
    if labelled.target.kind == "multilabel":
        return {k: {names[c] for c in np.flatnonzero(row)} for k, row in zip(numbers, labelled.truth, strict=True)}
    return {k: names[c] for k, c in zip(numbers, labelled.truth, strict=True)}


# ---------------------------------------------------------------------------------------------- one column


def test_phantoms_have_a_task_of_four_densities_and_two_of_yes_and_no(phantoms: Path) -> None:
    shards = ShardDataset(phantoms)
    density, mass = read_labels(shards, "density"), read_labels(shards, "mass")
    assert (density.target.kind, density.target.classes) == ("multiclass", ("a", "b", "c", "d"))
    assert (mass.target.kind, mass.target.classes) == ("binary", ("0", "1"))
    rows = list(shards.rows)
    assert [density.target.classes[c] for c in density.truth] == [row["label_density"] for row in rows]
    assert density.patients.tolist() == [f"phantom/{row['patient']}" for row in rows]
    assert density.breasts.tolist() == [f"phantom/{row['patient']}/{row['laterality']}" for row in rows]
    assert density.keys.tolist() == [row["key"] for row in rows]
    assert density.splits.tolist() == [row["split"] for row in rows]
    assert density.rows.tolist() == list(range(len(rows)))
    assert density.left_out == {}


def test_images_without_a_label_are_no_part_of_the_task(index: Index) -> None:
    labelled = read_labels(index(column("birads", ["2", "", "1", "", "2", "1"])), "birads")
    assert labelled.rows.tolist() == [0, 2, 4, 5]
    assert labelled.truth.tolist() == [1, 0, 1, 0]
    assert labelled.patients.tolist() == ["made/p00", "made/p00", "made/p01", "made/p01"]
    assert labelled.left_out == {}


@pytest.mark.parametrize("kind", ["auto", "ordinal"])
def test_values_that_are_numbers_are_in_the_order_of_numbers(index: Index, kind: str) -> None:
    values = ["10", "2", "-1", "0.5", "2"]
    assert read_labels(index(column("score", values)), "score", kind).target.classes == ("-1", "0.5", "2", "10")  # type: ignore[arg-type]
    mixed = index(column("score", ["10", "2", "4a", "2"]), name="mixed")
    assert read_labels(mixed, "score", kind).target.classes == ("10", "2", "4a")  # type: ignore[arg-type]


def test_classes_are_in_the_order_given_and_the_others_left_out_and_counted(index: Index) -> None:
    shards = index(column("pathology", ["M", "B", "N", "N", "M", "", "B", "X"]))
    labelled = read_labels(shards, "pathology", classes=("B", "M"))
    assert (labelled.target.kind, labelled.target.classes) == ("binary", ("B", "M"))
    assert told(labelled) == {"0000": "M", "0001": "B", "0004": "M", "0006": "B"}
    assert labelled.left_out == {"N": 2, "X": 1}


def test_a_mapping_joins_labels_and_a_star_takes_all_others(index: Index) -> None:
    shards = index(column("birads", ["1", "2", "3", "4", "5", "6", "0", ""]))
    three = read_labels(
        shards, "birads", "ordinal", {"benign": ("1", "2"), "probably": ("3",), "suspicious": ("4", "5")}
    )
    assert (three.target.kind, three.target.width) == ("ordinal", 2)
    assert three.truth.tolist() == [0, 0, 1, 2, 2]
    assert three.left_out == {"6": 1, "0": 1}
    rest = read_labels(shards, "birads", classes={"other": ("*",), "recalled": ("0",)})
    assert rest.target.kind == "binary"
    assert rest.truth.tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert rest.left_out == {}


def test_the_joined_findings_of_mini_mias_are_values_of_their_own(index: Index) -> None:
    """`CALC+CIRC` is one value of the column `finding`, not two columns."""
    values = ["NORM", "CALC", "CALC+CIRC", "NORM"]
    rows = [{"finding": v, "tissue": t, "abnormal": str(int(v != "NORM"))} for v, t in zip(values, "FGDF", strict=True)]
    shards = index(rows)
    assert read_labels(shards, "finding").target.classes == ("CALC", "CALC+CIRC", "NORM")
    assert read_labels(shards, "tissue").truth.tolist() == [1, 2, 0, 1]
    assert read_labels(shards, "abnormal").truth.tolist() == [0, 1, 1, 0]
    sets = read_labels(shards, "finding", "multilabel", ("CALC", "CIRC"), separator="+")
    assert told(sets) == {"0000": set(), "0001": {"CALC"}, "0002": {"CALC", "CIRC"}, "0003": set()}
    assert sets.left_out == {"NORM": 2}


# ---------------------------------------------------------------------------------------------- several columns


def test_columns_are_joined_by_a_plus(index: Index) -> None:
    rows = [
        {"binary": b, "kind": k} for b, k in (("benign", "mass"), ("malignant", "calc"), ("benign", "calc"), ("", "x"))
    ]
    labelled = read_labels(index(rows), "binary+kind")
    assert labelled.target.classes == ("benign calc", "benign mass", "malignant calc")
    assert labelled.truth.tolist() == [1, 2, 0]
    assert labelled.left_out == {"binary unknown": 1}
    pair = read_labels(index(rows, name="again"), "binary+kind", classes=("benign mass", "malignant calc"))
    assert pair.target.kind == "binary"


def test_columns_of_yes_and_no_are_a_task_of_several_labels(phantoms: Path) -> None:
    shards = ShardDataset(phantoms)
    labelled = read_labels(shards, "mass, calc")
    assert (labelled.target.kind, labelled.target.classes) == ("multilabel", ("mass", "calc"))
    expected = [[int(row["label_mass"]), int(row["label_calc"])] for row in shards.rows]
    assert labelled.truth.tolist() == expected
    assert read_labels(shards, "mass,calc", classes=("calc", "mass")).truth[:, ::-1].tolist() == expected
    either = read_labels(shards, "mass,calc", classes={"lesion": ("mass", "calc")})
    assert either.truth.tolist() == [[int(any(row))] for row in expected]


def test_an_image_of_which_one_answer_is_missing_is_left_out_and_counted(index: Index) -> None:
    rows = [{"mass": m, "calc": c} for m, c in (("0", "1"), ("1", ""), ("1", "0"), ("", ""), ("", "1"), ("1", "1"))]
    labelled = read_labels(index(rows), "mass,calc")
    assert told(labelled) == {"0000": {"calc"}, "0002": {"mass"}, "0005": {"mass", "calc"}}
    assert labelled.left_out == {"calc unknown": 1, "mass unknown": 1}


def test_the_terms_of_cbis_are_sets(index: Index) -> None:
    values = ["SPICULATED|OBSCURED", "OBSCURED", "", "SPICULATED", "CIRCUMSCRIBED|OBSCURED"]
    shards = index(column("margins", values))
    labelled = read_labels(shards, "margins", "multilabel")
    assert labelled.target.classes == ("CIRCUMSCRIBED", "OBSCURED", "SPICULATED")
    assert labelled.rows.tolist() == [0, 1, 3, 4]
    assert labelled.truth.tolist() == [[0, 1, 1], [0, 1, 0], [0, 0, 1], [1, 1, 0]]
    some = read_labels(
        shards, "margins", "multilabel", {"ill": ("SPICULATED", "OBSCURED"), "well": ("*",)}, complete=False
    )
    assert some.truth.tolist() == [[1, 0], [1, 0], [1, 0], [1, 1]]
    assert read_labels(shards, "margins", classes=("OBSCURED", "SPICULATED")).target.kind == "binary"


# ---------------------------------------------------------------------------------------------- whose they are


def test_an_image_of_unknown_side_is_a_breast_of_its_own(index: Index) -> None:
    labelled = read_labels(index(column("t", "abab"), laterality=["L", "", "", "L"]), "t")
    assert labelled.breasts.tolist() == ["made/p00/L", "made-0001", "made-0002", "made/p00/L"]


def test_strata_are_classes_or_the_rarest_label_an_image_has(index: Index) -> None:
    plain = read_labels(index(column("t", "abba")), "t")
    assert plain.strata.classes == plain.target.classes
    np.testing.assert_array_equal(plain.strata.truth, plain.truth)
    values = ["a|b|c", "a|b", "a", "other", "a", "other", "a|b"]
    several = read_labels(index(column("t", values), name="several"), "t", "multilabel", ("a", "b", "c"))
    strata = several.strata
    assert [strata.classes[c] for c in strata.truth] == ["c", "b", "a", "none", "a", "none", "b"]
    np.testing.assert_array_equal(strata.chosen, several.rows)
    np.testing.assert_array_equal(strata.patients, several.patients)


def test_a_label_that_is_nobodys_rarest_is_no_stratum_that_folds_would_miss(index: Index) -> None:
    """Who has b has a, and neither is rarer: of the two only a stratifies."""
    labelled = read_labels(index(column("t", ["a|b", "a|b", "a|b", "x"] * 12)), "t", "multilabel", ("a", "b"))
    assert labelled.strata.classes == ("a", "none")
    splits, _ = outer_folds(labelled.strata, 3, seed=0)
    assert len(splits) == 3


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        (None, {}, r"data\.task is not set"),
        ("denstiy", {}, r"no label 'denstiy'.*calc, density, mass"),
        ("mass,clac", {}, r"no label 'clac'"),
        ("mass+clac", {}, r"no label 'clac'"),
        ("density", {"classes": ("a", "B")}, r"finetune\.classes: no image of data\.task=density has the label 'B'"),
        ("density", {"classes": {"x": ("a", "bb"), "y": ("*",)}}, r"'bb'; did you mean 'b'\?"),
        ("density", {"classes": ("a", "b", "a")}, r"finetune\.classes: 'a' is given twice"),
        ("density", {"classes": {"x": ("a", "b"), "y": ("b",)}}, r"finetune\.classes: 'b' is given twice"),
        ("density", {"classes": {"x": ("*",), "y": ("*",)}}, r"finetune\.classes: '\*' is given twice"),
        (
            "density",
            {"classes": {"x": ("a", "b", "c", "d"), "y": ("*",)}},
            r"no labelled image is 'y'.*finetune\.classes",
        ),
        ("density", {"classes": ("a",)}, r"every labelled image is 'a'.*nothing to tell apart"),
        ("density", {"kind": "binary"}, r"finetune\.kind=binary.*4 classes \(a, b, c, d\).*finetune\.classes"),
        ("mass,calc", {"kind": "binary"}, r"multilabel task, not finetune\.kind=binary"),
        ("mass+calc", {"kind": "multilabel"}, r"one joined label.*write mass,calc"),
        ("mass,density", {}, r"density is 'a' somewhere; several columns must be 0 or 1"),
        ("mass,calc", {"classes": ("mass", "clac")}, r"'clac'; did you mean 'calc'\?"),
    ],
)
def test_a_task_that_cannot_be_is_refused_with_what_to_mend(
    phantoms: Path, name: str | None, options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        read_labels(ShardDataset(phantoms), name, **options)  # type: ignore[arg-type]


def test_labels_that_tell_nothing_apart_are_refused(index: Index) -> None:
    with pytest.raises(UserError, match=r"data\.task=t: every labelled image is 'x'"):
        read_labels(index(column("t", ["x", "x", ""])), "t")
    with pytest.raises(UserError, match=r"data\.task=t: no image has this label"):
        read_labels(index(column("t", ["", ""]), name="blank"), "t")
    flat = index([{"mass": "1", "calc": c, "cyst": "0"} for c in "0110"], name="flat")
    with pytest.raises(UserError, match=r"every labelled image is 'mass'"):
        read_labels(flat, "mass,calc")
    with pytest.raises(UserError, match=r"no labelled image is 'cyst'"):
        read_labels(flat, "cyst,calc")


def test_an_image_of_nobody_is_refused_where_it_has_a_label(index: Index) -> None:
    shards = index(column("t", ["a", "b", "a", "b", ""]), patient=["p", "p", "q", "", ""])
    with pytest.raises(UserError, match=r"data\.task=t: 1 labelled images name no patient"):
        read_labels(shards, "t")
    assert len(read_labels(index(column("t", ["a", "b", ""]), name="b", patient=["p", "q", ""]), "t").rows) == 2


# ---------------------------------------------------------------------------------------------- another set


def test_a_locked_models_classes_may_be_missing_from_another_set(index: Index) -> None:
    shards = index(column("birads", ["2", "4", "2", "6"]))
    labelled = read_labels(shards, "birads", "multiclass", ("1", "2", "4"), complete=False)
    assert labelled.target.classes == ("1", "2", "4")
    assert labelled.truth.tolist() == [1, 2, 1]
    assert labelled.left_out == {"6": 1}
    with pytest.raises(UserError, match=r"no image has a label that the model knows \(a, b\)"):
        read_labels(shards, "birads", "multiclass", ("a", "b"), complete=False)
