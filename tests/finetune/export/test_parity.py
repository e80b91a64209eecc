"""Whether what was written computes the same: no difference is overlooked, and choices of merging are counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from miram.engine.errors import RunFailed
from miram.finetune.export.parity import agreement, difference, parity


def test_parity_is_the_largest_difference_of_any_batch() -> None:
    inputs = {"a": torch.zeros(2, 1, 4, 4), "b": torch.ones(3, 1, 4, 4)}
    found = parity(lambda x: x * 3, lambda x: x * 3.25, inputs, 1e-4)
    assert (found.largest_difference, found.largest_output, found.inputs) == (0.25, 3.0, {"a": 2, "b": 3})
    assert found.tolerance == pytest.approx(3e-4)
    assert not found.holds
    assert parity(lambda x: x, lambda x: x + 5e-5, inputs, 1e-4).holds
    assert parity(lambda x: x, lambda x: x + 1, inputs, None).holds


@pytest.mark.parametrize("bad", [lambda x: x / 0, lambda x: x * float("nan")])
def test_what_is_not_finite_never_holds(bad: Callable[[Tensor], Tensor]) -> None:
    inputs = {"a": torch.ones(2, 1, 4, 4)}
    assert difference(inputs["a"], bad(inputs["a"])) == float("inf")
    assert not parity(lambda x: x, bad, inputs, 1e-4).holds
    assert not parity(bad, bad, inputs, 1e-4).holds
    assert not parity(bad, bad, inputs, None).holds


def test_outputs_of_another_shape_never_hold() -> None:
    assert not parity(lambda x: x, lambda x: x[:, :, :2], {"a": torch.ones(2, 1, 4, 4)}, None).holds


def test_images_on_which_merging_chose_otherwise_are_counted_and_a_file_that_never_agrees_is_refused() -> None:
    inputs = {"a": torch.ones(3, 1, 4, 4), "b": torch.full((2, 1, 4, 4), 2.0)}

    def other(images: Tensor) -> Tensor:  # of one image in five
        return images + 0.5 * (torch.arange(len(images)) == 2)[:, None, None, None] + 1e-6

    found = agreement(lambda x: x, other, inputs)
    assert (found.images, found.apart, found.tolerance) == (5, 1, pytest.approx(2e-4))
    assert found.largest_difference == pytest.approx(1e-6, rel=0.2)
    assert found.largest_apart == pytest.approx(0.5, abs=1e-5)
    assert "on 4 of 5 images" in found.sentence
    assert "nearly alike" in found.sentence
    assert "nearly alike" not in agreement(lambda x: x, lambda x: x, inputs).sentence
    with pytest.raises(RunFailed, match=r"differs from the same merging in torch on 5 of 5 images, by up to 0\.1"):
        agreement(lambda x: x, lambda x: x + 0.1, inputs)
    with pytest.raises(RunFailed):
        agreement(lambda x: x, lambda x: x / (torch.arange(len(x)) != 2)[:, None, None, None], inputs)  # one image
