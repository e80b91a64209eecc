"""What the closed forms are told of encoders that are not plain, and of those that nothing can be told of."""

from __future__ import annotations

import pytest
import timm
import torch
from vits import small

from miram.engine.errors import UserError
from miram.finetune.peft import METHODS, apply
from miram.finetune.peft.shape import Shape


@pytest.mark.parametrize("name", ["vitamin_small_224", "vit_base_mci_224"])
def test_a_hybrid_of_another_make_is_refused(name: str) -> None:
    with torch.device("meta"):
        vit = timm.create_model(name, num_classes=0)
    with pytest.raises(UserError, match="no plain ViT"):
        Shape.of(vit)


@pytest.mark.parametrize("name", ["vit_pwee_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256"])
def test_blocks_of_one_step_are_bare_to_methods_that_need_two(name: str) -> None:
    for method in ("houlsby", "adaptformer", "ssf", "dvpt", "lora", "lora_qkv"):
        with pytest.raises(UserError, match=r"use|take"):
            apply(timm.create_model(name, depth=2, num_classes=0), method)
    assert apply(timm.create_model(name, depth=2, num_classes=0), "vpt_deep").trainable == 2 * 10 * 256


def test_fewer_keys_than_queries_have_no_closed_form() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_large_patch16_sapiens2", num_classes=0)
    shape = Shape.of(vit)
    assert (shape.grouped, shape.plain) == (True, False)
    assert METHODS["ssf"]().expected(shape) is None


def test_two_methods_do_not_stand_on_one_encoder_unless_the_first_is_merged() -> None:
    vit = small()
    tuned = apply(vit, "lora")
    with pytest.raises(UserError, match="tuned with lora already"):
        apply(vit, "bitfit")
    assert apply(tuned.merged(), "bitfit").trainable == 1152
