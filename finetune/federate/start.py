"""What a federation begins with: the method and a head on the encoder, the same wherever it is made.

Legend: D features, w outputs of the head.
"""

from __future__ import annotations

from copy import deepcopy

import torch

from ...engine.seeding import stable_seed
from ...pretrain.encoder import Encoder
from ..classify.config import FinetuneSection
from ..classify.head import StandardisedLinear
from ..classify.objective import set_drop_path
from ..classify.targets import Target
from ..peft import apply
from ..peft.base import Tuned, learnt
from ..peft.registry import read_method
from .averaging import pairs, refuse_mode
from .config import Mode
from .exchange import Tensors, digest_of


def started(encoder: Encoder, section: FinetuneSection, target: Target, average: Mode, seed: int) -> Tuned:
    """A copy of the encoder with the method and a head of zeros; with `freeze_a` the A of every low rank is frozen.

    Raises:
        UserError: the method cannot stand on this encoder, or not be averaged in this way.
    """
    refuse_mode(read_method(section.method, section.options), average)
    vit = deepcopy(encoder)
    if section.drop_path:
        set_drop_path(vit, section.drop_path)
    with torch.random.fork_rng():
        torch.manual_seed(stable_seed(seed, "federation") % 2**63)
        tuned = apply(vit, section.method, **section.options).train()
    tuned.head = StandardisedLinear(torch.zeros(tuned.shape.D), torch.ones(tuned.shape.D), target.width)
    if average == "freeze_a":
        for tensor in lowered(tuned):
            tensor.requires_grad_(False)
    return tuned


def lowered(tuned: Tuned) -> list[torch.nn.Parameter]:
    """The A of every low rank."""
    parameters = dict(tuned.named_parameters())
    return [parameters[a] for a, _ in pairs(parameters).values()]


def values(tuned: Tuned) -> Tensors:
    """What learns, by name, copied to the host."""
    return {name: tensor.detach().cpu().clone() for name, tensor in learnt(tuned)}


def start_digest(tuned: Tuned) -> str:
    """sha256 of everything that the method and the head added or may change, frozen A among it."""
    return digest_of(values(tuned) | {f"A{number}": a.detach().cpu() for number, a in enumerate(lowered(tuned))})
