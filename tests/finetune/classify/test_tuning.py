"""One training of a tuned encoder: what it changes, what it leaves, and that a stop changes nothing."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benches import bench, images
from ranks import on_ranks
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from vits import small

from miram.engine.errors import Preempted, UserError
from miram.engine.signals import StopSignals
from miram.finetune.classify.bench import Bench
from miram.finetune.classify.objective import Classify, set_drop_path
from miram.finetune.classify.probing import Probing
from miram.finetune.classify.scores import headline_score
from miram.finetune.classify.search import inner_folds
from miram.finetune.classify.targets import Target
from miram.finetune.classify.tuning import Tuning
from miram.finetune.peft import apply


def tuning(phantoms: Path, out: Path, train: dict[str, Any] | None = None, **finetune: Any) -> Tuning:
    made = bench(phantoms, out, train, **finetune)
    return Tuning(made, Probing(made))


@pytest.mark.parametrize("method", ["linear", "lora", "full", "vpt_deep"])
def test_a_training_that_is_stopped_again_and_again_ends_in_the_same_bits(
    method: str, phantoms: Path, tmp_path: Path
) -> None:
    whole = tuning(phantoms, tmp_path / "a", method=method)
    fit = images(whole.bench, "train")
    once = whole.make(fit, 1e-3, tmp_path / "once", seed=5)
    told = StopSignals()
    told.received = "SIGTERM"  # from the start: each start takes one step, saves and leaves
    stopped = Tuning(Bench(**{**vars(whole.bench), "signals": told}), whole.probing)
    starts = 0
    while True:
        starts += 1
        try:
            other = stopped.make(fit, 1e-3, tmp_path / "stopped", seed=5)
        except Preempted:
            continue
        break
    assert starts == 4
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in once.state_dict().items())
    assert not (tmp_path / "stopped" / "checkpoints").exists()


def test_what_is_frozen_stays_as_it_was_to_the_bit_and_the_bench_keeps_its_encoder(
    phantoms: Path, tmp_path: Path
) -> None:
    one = tuning(phantoms, tmp_path, method="lora")
    before = {name: value.clone() for name, value in one.bench.encoder.state_dict().items()}
    tuned = one.make(images(one.bench, "train"), 1e-2, tmp_path / "one", seed=1)
    assert all(torch.equal(value, before[name]) for name, value in one.bench.encoder.state_dict().items())
    frozen = {name: p for name, p in tuned.model.named_parameters() if not p.requires_grad}
    bare = {name.removeprefix("base_model.model.").replace("base_layer.", ""): value for name, value in frozen.items()}
    assert len(bare) == len(before)
    assert all(torch.equal(value, before[name]) for name, value in bare.items())


def test_before_the_first_step_lora_says_what_its_head_says_of_the_frozen_encoder(
    phantoms: Path, tmp_path: Path
) -> None:
    one = tuning(phantoms, tmp_path, method="lora", search={"lrs": [1e-9]}, train={"weight_decay": 0.0})
    fit, rest = images(one.bench, "train"), images(one.bench, "test")
    tuned = one.make(fit, 1e-9, tmp_path / "one", seed=1)
    start = one.probing.start(fit)
    expected = start(torch.from_numpy(one.probing.features[rest])).detach().numpy()
    assert np.abs(one.logits(tuned, rest) - expected).max() < 1e-4


def test_the_probes_head_on_the_encoder_says_what_it_says_on_the_cached_features(
    phantoms: Path, tmp_path: Path
) -> None:
    one = tuning(phantoms, tmp_path)
    fit, rest = images(one.bench, "train"), images(one.bench, "test")
    probe = one.probing.make(fit, 1.0, tmp_path, seed=1)
    assert np.abs(one.logits(probe, rest) - one.probing.logits(probe, rest)).max() < 1e-4


def test_the_head_knows_the_statistics_of_training_images_alone(phantoms: Path, tmp_path: Path) -> None:
    one = tuning(phantoms, tmp_path, start="zero")
    fit = images(one.bench, "train")
    before = one.head(fit)
    one.probing.features[images(one.bench, "test")] += 100.0
    one.probing.augmented[images(one.bench, "test")] += 100.0
    assert torch.equal(one.head(fit).mean, before.mean)
    assert torch.equal(one.head(fit).deviation, before.deviation)


def test_the_best_look_is_what_is_kept(phantoms: Path, tmp_path: Path) -> None:
    one = tuning(
        phantoms, tmp_path, {"steps": 20, "log_every": 1}, method="full", keep="best", search={"folds": 1}, start="zero"
    )
    fit = images(one.bench, "train")
    known, held = fit[: len(fit) // 2], fit[len(fit) // 2 :]
    tuned = one.make(known, 3e-3, tmp_path / "one", seed=2, held=held)
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    looks = [line["held_out"] for line in lines if "held_out" in line]
    assert len(looks) == 10
    assert max(looks) > looks[-1], "the last look is the best: this shows nothing"
    assert headline_score(one.bench.labelled, held, one.logits(tuned, held)) == pytest.approx(max(looks))


def test_a_balanced_sampler_and_weights_pull_the_same_way(phantoms: Path, tmp_path: Path) -> None:
    """Few positives: without balance nearly everything is called negative."""
    said = {}
    for balance in ("none", "weights", "sampler"):
        one = tuning(
            phantoms, tmp_path / balance, {"steps": 60}, method="linear", balance=balance, start="zero", task="calc"
        )
        fit = images(one.bench, "train")
        positive = one.bench.labelled.truth[fit] == 1
        fit = np.concatenate([fit[~positive], fit[positive][:1]])
        tuned = one.make(fit, 1e-1, tmp_path / balance / "one", seed=2)
        said[balance] = one.bench.labelled.target.probabilities(one.logits(tuned, fit))[:, 1].mean()
    assert said["none"] + 0.1 < min(said["weights"], said["sampler"])


def test_mixup_of_an_image_with_itself_is_the_image(phantoms: Path) -> None:
    tuned = apply(small(), "linear")
    tuned.set_head(2)
    target = Target("made up", "binary", ("no", "yes"))
    plain, mixed = Classify(tuned, target), Classify(deepcopy(tuned), target, mixup=0.4)
    image = torch.randn(1, 1, 64, 64).repeat(4, 1, 1, 1)
    batch = {"image": image, "truth": torch.tensor([1, 1, 1, 1])}
    assert torch.allclose(plain(batch), mixed(batch), atol=1e-5)


def test_mixup_is_the_loss_of_a_mixed_image_under_both_labels() -> None:
    tuned = apply(small(), "linear")
    tuned.set_head(2)
    torch.nn.init.normal_(tuned.head.weight)  # type: ignore[arg-type]
    target = Target("made up", "binary", ("no", "yes"))
    images_, truth = torch.randn(2, 1, 64, 64), torch.tensor([0, 1])
    torch.manual_seed(3)
    found = Classify(tuned, target, mixup=0.7)({"image": images_, "truth": truth})
    torch.manual_seed(3)
    share = torch.distributions.Beta(0.7, 0.7).sample()
    expected = 0.0
    for i, j in ((0, 1), (1, 0)):
        logits = tuned((share * images_[i] + (1 - share) * images_[j])[None])
        log = logits.log_softmax(-1)[0]
        expected += (-share * log[truth[i]] - (1 - share) * log[truth[j]]).item()
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_stochastic_depth_grows_with_the_block() -> None:
    vit = small(depth=3)
    set_drop_path(vit, 0.2)
    found = [getattr(block.drop_path1, "drop_prob", 0.0) for block in vit.blocks]
    assert found == [0.0, 0.1, 0.2]


def test_layer_decay_reaches_the_encoder(phantoms: Path, tmp_path: Path) -> None:
    one = tuning(phantoms, tmp_path, {"layer_decay": 0.5}, method="full")
    found = one.objective(images(one.bench, "train"), seed=0).distances()
    assert found["tuned.model.patch_embed.proj.weight"] == 3
    assert found["tuned.model.blocks.0.mlp.fc1.weight"] == 2


def test_few_images_make_a_small_batch_at_the_same_rate(phantoms: Path, tmp_path: Path) -> None:
    one = tuning(phantoms, tmp_path)
    small_batch = one.recipe(1e-3, 5)
    assert small_batch.batch_size == 5
    assert small_batch.blr * 5 / 256 == pytest.approx(1e-3)
    with pytest.raises(UserError, match="0 training images do not fill a batch"):
        one.recipe(1e-3, 0)


def test_a_view_moves_features_and_the_start_knows_by_how_much(phantoms: Path, tmp_path: Path) -> None:
    one = tuning(phantoms, tmp_path, start="zero")
    still = tuning(
        phantoms,
        tmp_path / "still",
        augment={"flip": False, "upside_down": False, "rotation": 0, "zoom": (1, 1), "shift": 0, "gamma": 0}
        | {"contrast": 0, "brightness": 0, "blur": 0, "noise": 0},
    )
    assert np.abs(still.probing.augmented - still.probing.features).max() < 1e-4
    assert np.abs(one.probing.augmented - one.probing.features).max() > 1e-3
    fit = images(one.bench, "train")
    both = np.concatenate([one.probing.features[fit], one.probing.augmented[fit]])
    assert np.abs(one.head(fit).deviation.numpy() - both.std(0)).max() < 1e-9


def test_every_method_gets_as_many_candidates(phantoms: Path, tmp_path: Path) -> None:
    for method in ("linear", "lora", "full", "savit"):
        one = tuning(phantoms, tmp_path, method=method, search={"trials": 4})
        assert len(set(one.values)) == 4
        assert list(one.values) == sorted(one.values)
    two = tuning(phantoms, tmp_path, search={"lrs": [1e-2, 1e-4]})
    assert two.values == (1e-4, 1e-2)
    assert len(two.probing.values) == 5


def test_the_head_starts_at_the_strength_that_scikit_learn_would_choose(phantoms: Path, tmp_path: Path) -> None:
    one = tuning(phantoms, tmp_path, task="density", kind="multiclass", search={"folds": 2})
    fit = images(one.bench, "train")
    one.probing.start(fit)
    labelled, x = one.bench.labelled, one.probing.features
    pairs, _ = inner_folds(one.bench, fit)
    means = []
    for c in one.probing.values:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, class_weight="balanced", max_iter=5000))
        scores = []
        for known, held in pairs:
            both = np.concatenate([x[known], one.probing.augmented[known]])
            found = model.fit(both, np.tile(labelled.truth[known], 2)).predict(x[held])
            scores.append(balanced_accuracy_score(labelled.truth[held], found))
        means.append(np.mean(scores))
    assert one.probing._best[fit.tobytes()] == one.probing.values[int(np.argmax(means))]


@pytest.mark.parametrize("options", [{}, {"keep": "best", "search": {"folds": 1}}])
@pytest.mark.parametrize("train", [{}, {"ema": 0.5}])
def test_two_ranks_learn_and_say_what_one_does(
    train: dict[str, Any], options: dict[str, Any], phantoms: Path, tmp_path: Path
) -> None:
    def work(out: Path) -> np.ndarray[Any, Any]:
        one = tuning(phantoms, out, {"weight_decay": 0.0, **train}, method="adaptformer", **options)
        fit, rest = images(one.bench, "train"), images(one.bench, "test")
        tuned = one.make(fit[:16], 3e-3, out / "one", seed=1, held=fit[16:] if options else None)
        return one.logits(tuned, rest)

    alone = work(tmp_path / "alone")
    both = on_ranks(2, lambda: work(tmp_path / "both"))
    assert all(isinstance(found, np.ndarray) for found in both), both
    assert np.array_equal(both[0], both[1]), "ranks say different things"
    assert np.abs(both[0] - alone).max() < 2e-3 * np.abs(alone).max()
