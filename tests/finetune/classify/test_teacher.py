"""Learning from a tuned model: the loss, what the teacher sees, who may teach, and that the student stands alone."""

from __future__ import annotations

import json
import math
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benches import TRAIN, bench, images
from lockables import lock, write_encoder
from PIL import Image
from sklearn.metrics import roc_auc_score
from vits import small

from miram.data.frames import frames
from miram.data.phantom import PhantomSettings
from miram.data.shards import ShardDataset
from miram.data.sources.phantom import make_phantoms
from miram.data.views import Normalisation
from miram.engine.config import dump_yaml
from miram.engine.errors import Preempted, UserError
from miram.engine.signals import StopSignals
from miram.finetune.classify.account import taught as told_of
from miram.finetune.classify.bench import Bench
from miram.finetune.classify.config import FinetuneConfig
from miram.finetune.classify.judged import Judged
from miram.finetune.classify.locked import Locked, read_locked
from miram.finetune.classify.objective import Classify
from miram.finetune.classify.probing import Probing
from miram.finetune.classify.stage import finetune
from miram.finetune.classify.targets import Target
from miram.finetune.classify.teacher import Teacher, divergence
from miram.finetune.classify.tuning import Tuning
from miram.finetune.evaluate import evaluate
from miram.finetune.peft import apply


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder for 32 x 32 pixels, mean 0.2 and deviation 0.3."""
    folder = tmp_path_factory.mktemp("teacher")
    write_encoder(folder / "encoder")
    return folder


@pytest.fixture(scope="module")
def taught(home: Path, phantoms: Path) -> Locked:
    """A locked model of the official training patients, in home/teacher."""
    return lock(home / "teacher", phantoms, home / "encoder", method="bitfit")[0]


def listened(locked: Locked, weight: float = 0.5, temperature: float = 2.0) -> Teacher:
    return Teacher(locked, weight, temperature, Normalisation(0.5, 0.5))


# ---------------------------------------------------------------------------------------------- the loss


def softmax(row: Any) -> list[float]:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("kind", ["binary", "multiclass", "ordinal", "multilabel"])
def test_the_loss_is_what_loops_over_images_and_questions_make_of_it(kind: Any) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 2 if kind == "binary" else 3).double()
    for t in (1.0, 3.0):
        expected = []
        for s, z in zip(student.tolist(), teacher.tolist(), strict=True):
            if kind in ("binary", "multiclass"):
                expected.append(t * t * kl(softmax([v / t for v in z]), softmax([v / t for v in s])))
            else:  # yes or no, each question by itself
                each = [kl(softmax([a / t, 0]), softmax([b / t, 0])) for a, b in zip(z, s, strict=True)]
                expected.append(t * t * sum(each) / len(each))
        assert divergence(kind, student, teacher, t).tolist() == pytest.approx(expected, rel=1e-9)
    assert divergence(kind, teacher, teacher, 3.0).abs().max() == 0


def test_an_objective_has_two_losses_of_which_the_teacher_has_its_share(taught: Locked) -> None:
    tuned = apply(small(image=32), "full")
    tuned.set_head(2)
    target, views = Target("mass", "binary", ("0", "1")), torch.randn(3, 1, 32, 32)
    batch = {"image": views, "truth": torch.tensor([0, 1, 1])}
    objective = Classify(tuned, target, teacher=listened(taught, 0.3)).eval()
    assert objective.loss_weights == pytest.approx((0.7, 0.3))
    assert objective.counts(batch).tolist() == [3, 3]
    with torch.no_grad():
        hard, soft = objective(batch)
        shown = (0.5 * views + 0.5 - 0.2) / 0.3  # the teacher's own mean and deviation
        own = divergence("binary", tuned(views), taught.model(shown), 2.0)
        assert torch.allclose(hard, Classify(tuned, target)(batch)[0])
    assert torch.allclose(soft, own.sum(), rtol=1e-5)


def test_the_teacher_is_in_no_checkpoint_and_no_optimiser_and_is_not_copied(taught: Locked) -> None:
    tuned = apply(small(image=32), "full")
    tuned.set_head(2)
    target = Target("mass", "binary", ("0", "1"))
    plain, objective = Classify(tuned, target), Classify(tuned, target, teacher=listened(taught))
    assert objective.state_dict().keys() == plain.state_dict().keys()
    assert len(list(objective.parameters())) == len(list(plain.parameters()))
    assert deepcopy(objective).teacher is objective.teacher


def test_the_teacher_sees_the_students_view_as_it_would_have_been_shown_it(taught: Locked, phantoms: Path) -> None:
    sample, teacher = ShardDataset(phantoms)[0], listened(taught)
    same = teacher.views(frames(sample, (32, 32), Normalisation(0.5, 0.5), "whole"))
    assert torch.allclose(same, frames(sample, (32, 32), Normalisation(0.2, 0.3), "whole"), atol=1e-5)
    large = frames(sample, (96, 96), Normalisation(0.0, 1.0), "whole")
    reduced = Image.fromarray(large[0, 0].numpy()).resize((32, 32), Image.Resampling.BILINEAR)  # Pillow averages
    expected = (np.asarray(reduced) - 0.2) / 0.3
    assert np.abs(teacher.views((large - 0.5) / 0.5)[0, 0].numpy() - expected).max() < 1e-4


# ---------------------------------------------------------------------------------------------- training


def tuning(phantoms: Path, out: Path, locked: Locked, weight: float = 1.0, **finetune_: Any) -> Tuning:
    made = bench(phantoms, out, **finetune_)
    student = small(image=32)
    student.pretrained_cfg = {**student.pretrained_cfg, "mean": (0.5,), "std": (0.5,)}
    made = Bench(**{**vars(made), "encoder": student, "teacher": listened(locked, weight)})
    return Tuning(made, Probing(made))


def test_who_listens_to_the_teacher_alone_learns_nothing_of_the_labels(
    taught: Locked, phantoms: Path, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in taught.model.state_dict().items()}
    made = []
    for turn in (0, 1):
        one = tuning(phantoms, tmp_path / f"{turn}", taught, method="full", start="zero", balance="none")
        labelled = replace(one.bench.labelled, truth=np.abs(one.bench.labelled.truth - turn))  # every label turned
        one = Tuning(Bench(**{**vars(one.bench), "labelled": labelled}), one.probing)
        made.append(one.make(images(one.bench, "train"), 1e-2, tmp_path / f"{turn}/made", seed=1).state_dict())
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())
    assert all(torch.equal(value, before[name]) for name, value in taught.model.state_dict().items())


def test_a_student_comes_to_say_what_its_teacher_says(taught: Locked, phantoms: Path, tmp_path: Path) -> None:
    plain = {"rotation": 0, "zoom": [1, 1], "shift": 0, "gamma": 0, "contrast": 0, "brightness": 0, "noise": 0}
    settings = {"method": "full", "start": "zero", "augment": {**plain, "flip": False, "upside_down": False, "blur": 0}}
    one = tuning(phantoms, tmp_path, taught, train={"steps": 60}, **settings)
    fit = images(one.bench, "train")
    student = one.make(fit, 3e-3, tmp_path / "made", seed=1)
    said, told = one.logits(student, fit), taught.logits(one.bench.shards, one.bench.rows(fit))
    apart = [float(divergence("binary", torch.tensor(x), torch.tensor(told), 1.0).mean()) for x in (said, 0 * said)]
    assert apart[0] < 0.5 * apart[1]


def test_a_training_under_a_teacher_that_is_stopped_ends_in_the_same_bits(
    taught: Locked, phantoms: Path, tmp_path: Path
) -> None:
    whole = tuning(phantoms, tmp_path, taught, 0.5, method="full", mixup=0.3)
    fit = images(whole.bench, "train")
    once = whole.make(fit, 1e-2, tmp_path / "once", seed=5)
    told = StopSignals()
    told.received = "SIGTERM"
    stopped = Tuning(Bench(**{**vars(whole.bench), "signals": told}), whole.probing)
    for _ in range(3):
        with pytest.raises(Preempted):
            stopped.make(fit, 1e-2, tmp_path / "stopped", seed=5)
    other = stopped.make(fit, 1e-2, tmp_path / "stopped", seed=5)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in once.state_dict().items())


# ---------------------------------------------------------------------------------------------- as a user runs it


def settings(home: Path, data: Path, teacher: Path, **changed: Any) -> FinetuneConfig:
    """A linear head on the encoder of 32 x 32 pixels."""
    weight = changed.pop("weight", 0.6)
    tree: dict[str, Any] = {
        "out": str(home / "unnamed"),
        "data": {"shards": str(data), "split": changed.pop("split", None), "task": changed.pop("task", "mass")},
        "finetune": {
            **{"encoder": str(home / "encoder"), "method": "linear", "replicates": 40, "explain": 0},
            **{"search": {"trials": 1, "folds": 2}, "teacher": {"run": str(teacher), "weight": weight}},
            **changed,
        },
        "train": {**TRAIN, "betas": [0.9, 0.999]},
    }
    tree["data"]["workers"] = 0
    return FinetuneConfig.model_validate_json(json.dumps(tree), strict=True)


def run(out: Path, made: FinetuneConfig) -> Any:
    path = out.with_suffix(".yaml")
    path.write_text(dump_yaml(made))
    return finetune(str(path), [f"--out={out}"])


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other patients."""
    out = tmp_path_factory.mktemp("others") / "others"
    make_phantoms(out, 6, PhantomSettings(size=96, seed=11), workers=1)
    return out


def test_a_student_names_its_teacher_stands_without_it_and_knows_whom_it_knew(
    home: Path, phantoms: Path, others: Path, tmp_path: Path
) -> None:
    _, card = lock(tmp_path / "teacher", others, home / "encoder", split=None)
    made = run(tmp_path / "student", settings(home, phantoms, tmp_path / "teacher"))
    assert json.loads((made.folder / "inputs.json").read_text())["teacher"] == card.digest
    (told,) = [n for n in json.loads((made.folder / "result.json").read_text())["notes"] if card.digest[:16] in n]
    assert "weight 0.6" in told
    assert "AUC by image 0." in told
    lock(tmp_path / "teacher", others, home / "encoder", split=None, temperature=1.1)
    with pytest.raises(UserError, match="teacher"):
        run(tmp_path / "student", settings(home, phantoms, tmp_path / "teacher"))
    shutil.rmtree(tmp_path / "teacher")
    student = read_locked(made.folder)
    assert np.isfinite(student.logits(ShardDataset(others), np.arange(3))).all()
    assert set(card.trained_on.of) < set(student.card.trained_on.of)
    with pytest.raises(UserError, match="trained on"):
        evaluate(str(made.folder), [f"--data.shards={others}", "--replicates=20", "--explain=0"])


def test_a_teacher_of_the_same_training_patients_is_told_of(home: Path, taught: Locked, phantoms: Path) -> None:
    one = tuning(phantoms, home / "same", taught)
    fit, rest = images(one.bench, "train"), images(one.bench, "test")
    levels = dict.fromkeys(("image", "breast", "patient"), (0.5,))
    judged = Judged(one.bench.labelled, rest, np.zeros((len(rest), 2)), 0 * rest, {0: 1.0}, {0: levels})
    known = len(taught.card.trained_on.of)
    for part, used in ((fit, known), (np.concatenate([fit, rest]), 12)):
        notes = list(told_of(one.bench, judged, [part]))
        assert f"The teacher learnt from {known} of the {used} patients whose labels were used" in notes[1]
    truth = one.bench.labelled.truth[rest]
    logits = taught.logits(one.bench.shards, one.bench.rows(rest))
    assert f"AUC by image {roc_auc_score(truth, logits[:, 1] - logits[:, 0]):.3f} [" in notes[0]


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"split": "train", "folds": 2}, r"it learnt from \d+ of the \d+ patients who will be judged"),
        ({"task": "density"}, "answers 'mass' .* the task is 'density'"),
        ({"task": "mass,calc"}, "the task is"),
        ({"classes": {"1": ("0",), "0": ("1",)}}, "with these classes in this order"),
        ({"input": "windows"}, "reads whole, the student windows"),
        ({"image_size": (64, 32)}, r"set finetune.image_size=\[32,32\]"),
    ],
)
def test_who_may_not_teach_is_refused_before_anything_is_written(
    home: Path, taught: Locked, phantoms: Path, tmp_path: Path, changed: dict[str, Any], match: str
) -> None:
    with pytest.raises(UserError, match=match):
        run(tmp_path / "student", settings(home, phantoms, home / "teacher", **changed))
    assert not (tmp_path / "student").exists()


def test_runs_that_hold_no_teacher_are_refused(home: Path, phantoms: Path, tmp_path: Path) -> None:
    lock(tmp_path / "stopped", phantoms, home / "encoder", status="stopped")
    with pytest.raises(UserError, match="is not finished"):
        run(tmp_path / "a", settings(home, phantoms, tmp_path / "stopped"))
    lock(tmp_path / "tiles", phantoms, home / "encoder", method="attention_mil", input="tiles")
    with pytest.raises(UserError, match="reads tiles, the student whole"):
        run(tmp_path / "a", settings(home, phantoms, tmp_path / "tiles"))
    with pytest.raises(UserError, match="is not there"):
        run(tmp_path / "a", settings(home, phantoms, tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="probe learns from labels alone"):
        settings(home, phantoms, tmp_path / "stopped", method="probe")
