"""Counts of methods that add nothing, against published numbers, and against the tensors of every kind of ViT."""

from __future__ import annotations

import pytest
import timm
import torch
from vits import VITS, pictures, small

from miram.engine.errors import UserError
from miram.finetune.peft import apply


@pytest.mark.parametrize(
    ("name", "method", "count"),
    [
        ("vit_tiny_patch16_224", "full", 5_524_416),
        ("vit_small_patch16_224", "full", 21_665_664),
        ("vit_base_patch16_224", "full", 85_798_656),
        ("vit_large_patch16_224", "full", 303_301_632),
        ("vit_base_patch16_224", "bitfit", 102_912),
        ("vit_base_patch16_224", "ln", 38_400),
        ("vit_base_patch16_224", "linear", 0),
        ("vit_base_patch16_clip_224", "full", 85_799_424),  # no bias of the patches, a norm before the blocks
        ("vit_base_patch16_dinov3", "bitfit", 75_264),  # no biases of q, k and v
        ("eva02_base_patch14_224", "ln", 87_552),  # norms within the FFN
    ],
)
def test_counts_are_the_published_ones_and_the_closed_form(name: str, method: str, count: int) -> None:
    with torch.device("meta"):
        vit = timm.create_model(name, num_classes=0)
    expected = apply_counts(vit, method)
    assert expected == (count, count)


def apply_counts(vit: torch.nn.Module, method: str) -> tuple[int, int | None]:
    from miram.finetune.peft import METHODS

    chosen = METHODS[method]()
    shape = chosen.shape(vit)
    model = chosen.attach(vit.requires_grad_(False))
    return sum(p.numel() for p in model.parameters() if p.requires_grad), chosen.expected(shape)


@pytest.mark.parametrize("kind", VITS)
@pytest.mark.parametrize("method", ["full", "bitfit", "ln"])
def test_the_closed_form_holds_on_every_kind_or_there_is_none(kind: str, method: str) -> None:
    tuned = apply(VITS[kind](), method)
    assert tuned.expected == tuned.trainable or (tuned.expected is None and kind == "map pooling")


def test_ln_trains_norms_and_nothing_else() -> None:
    tuned = apply(small(qk_norm=True), "ln")
    names = {name for name, tensor in tuned.model.named_parameters() if tensor.requires_grad}
    assert names == {name for name, _ in tuned.model.named_parameters() if "norm" in name}


def test_positions_that_pretraining_fixed_learn_in_full_tuning() -> None:
    vit = small()
    vit.pos_embed.requires_grad_(False)
    assert apply(vit, "full").model.pos_embed.requires_grad


def test_a_classifier_is_taken_off() -> None:
    vit = small(num_classes=7)
    tuned = apply(vit, "linear")
    assert tuned(pictures(vit)).shape == (2, 48)


def test_a_head_is_counted_apart() -> None:
    tuned = apply(small(), "linear")
    tuned.set_head(5)
    assert (tuned.trainable, tuned.head_parameters) == (0, 48 * 5 + 5)
    assert tuned(pictures(tuned.model)).shape == (2, 5)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("lroa", {}, "did you mean 'lora'"),
        ("lora", {"rnak": 4}, "rnak is not a known key"),
        ("lora", {"rank": 0}, "options of lora: rank"),
        ("lora", {"rank": "4"}, "options of lora: rank"),
    ],
)
def test_a_method_or_option_that_is_not_there_is_named(method: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        apply(small(), method, **options)


def test_what_is_no_vit_is_refused() -> None:
    with pytest.raises(UserError, match=r"not timm.*ResNet"):
        apply(timm.create_model("resnet18"), "bitfit")
