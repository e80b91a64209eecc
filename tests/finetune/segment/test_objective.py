"""The loss of segmentation, against its formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from miram.data.findings import IGNORED
from miram.finetune.segment.objective import SMOOTH, Segment


class Given(nn.Module):
    """Logits that are learnt themselves."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[: len(images)]


def batch(mask: Tensor) -> dict[str, Tensor]:
    return {"image": torch.zeros(len(mask), 1, *mask.shape[1:]), "mask": mask}


def random(images: int = 4, classes: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    mask = torch.randint(classes, (images, 8, 6), generator=g)
    mask[:, :2] = IGNORED
    return torch.randn(images, classes, 8, 6, generator=g), mask


def by_hand(logits: Tensor, mask: Tensor, loss: str) -> list[tuple[float, float]]:
    """(pixels, Dice) of each image, pixel by pixel."""
    found = []
    for said, truth in zip(logits, mask, strict=True):
        p = said.softmax(0)
        places = [(y, x) for y in range(truth.shape[0]) for x in range(truth.shape[1]) if truth[y, x] != IGNORED]
        right = torch.stack([p[truth[y, x], y, x] for y, x in places])
        weight = (1 - right) ** 2 if loss == "focal" else torch.ones_like(right)
        each = -(weight * right.log()).mean()
        dice = []
        for c in range(1, len(said)):
            on = torch.tensor([float(truth[y, x] == c) for y, x in places])
            claimed = torch.stack([p[c, y, x] for y, x in places])
            dice.append(1 - (2 * (on * claimed).sum() + SMOOTH) / (on.sum() + claimed.sum() + SMOOTH))
        found.append((float(each), float(torch.stack(dice).mean())))
    return found


@pytest.mark.parametrize("loss", ["ce", "focal"])
def test_the_losses_are_the_formulas_image_by_image(loss: str) -> None:
    logits, mask = random()
    objective = Segment(Given(logits), loss)  # type: ignore[arg-type]
    assert torch.allclose(objective.losses(logits, mask).T, torch.tensor(by_hand(logits, mask, loss)), atol=1e-5)
    assert torch.allclose(objective(batch(mask)), objective.losses(logits, mask).sum(1))
    assert objective.counts(batch(mask)).tolist() == [4, 4]
    assert Segment(Given(logits), dice=0.3).loss_weights == (1.0, 0.3)


def test_an_all_empty_batch_teaches_silence() -> None:
    """Dice alone would have next to no gradient there; beside it the loss of pixels has, and it points down."""
    logits = torch.zeros(2, 2, 64, 64)
    mask = torch.zeros(2, 64, 64, dtype=torch.long)
    given = Given(logits)
    pixels, dice = Segment(given)(batch(mask))
    (of_dice,) = torch.autograd.grad(dice, given.logits, retain_graph=True)
    (of_pixels,) = torch.autograd.grad(pixels, given.logits)
    assert (of_pixels[:, 1] > 0).all()
    assert of_pixels.abs().sum() == pytest.approx(2.0, rel=1e-4)
    assert of_dice.abs().sum() < 0.02 * of_pixels.abs().sum()
    for _ in range(30):
        optimizer = torch.optim.SGD(given.parameters(), lr=5000)
        optimizer.zero_grad()
        Segment(given)(batch(mask)).sum().backward()
        optimizer.step()
    assert given.logits.softmax(1)[:, 1].max() < 0.05


def test_silence_on_an_empty_image_costs_nothing() -> None:
    logits = torch.zeros(1, 2, 16, 16)
    logits[:, 0] = 30
    assert Segment(Given(logits))(batch(torch.zeros(1, 16, 16, dtype=torch.long))).abs().max() < 1e-6


def test_a_large_lesion_does_not_hide_a_small_one_that_is_missed() -> None:
    mask = torch.zeros(2, 64, 64, dtype=torch.long)
    mask[0, :48] = 1
    mask[1, 30:34, 30:34] = 1
    logits = torch.full((2, 2, 64, 64), 0.0)
    logits[:, 0] = 20
    logits[0, 1, :48] = 40  # the large one is found, the small one is not
    dice = Segment(Given(logits)).losses(logits, mask)[1]
    assert dice[0] < 0.01
    assert dice[1] > 0.9


def test_pixels_that_count_for_nothing_have_no_gradient() -> None:
    logits, mask = random()
    given = Given(logits)
    Segment(given)(batch(mask)).sum().backward()
    assert given.logits.grad is not None
    assert not given.logits.grad[:, :, :2].any()
    assert given.logits.grad[:, :, 2:].abs().min() > 0
    empty = Given(logits)
    Segment(empty)(batch(torch.full_like(mask, IGNORED))).sum().backward()
    assert empty.logits.grad is not None
    assert torch.isfinite(empty.logits.grad).all()
