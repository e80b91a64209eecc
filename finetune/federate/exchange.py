"""What sites and the server say to each other: all of it is in this file.

    site   -> server   Facts     once: how many images of each class, and statistics of the frozen encoder's features
    server -> site     Order     a round: the values of what learns, and constants of it that do not learn
    site   -> server   Update    its values after the round, how many images it has, and its mean loss
    site   -> server   Refusal   that it takes no part, in one of a few fixed clauses
    site   -> server   Figures   at the end: how the federation's model does on its test, beside its own

As bytes, a message is a safetensors file: tensors under FIELD, or FIELD/NAME where the field holds several, and one
entry of metadata, "miram", a JSON object of the fields that are no tensors. The keys are those of the class, and the
only words are a site's name and digests: no path, id or pixel has a place in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...engine.errors import UserError
from ...engine.tensors import Form

Tensors = dict[str, Tensor]

BASE, START, DATA, FAILED, JUDGED = (
    "its encoder is another",
    "its adapter starts otherwise",
    "its data cannot be used, its own screen says why",
    "its training failed, its own screen says why",
    "its test could not be judged, its own screen says why",
)
CLAUSES = (
    BASE,
    START,
    DATA,
    FAILED,
    JUDGED,
)  # all that a site may say of itself: an error's own text could hold a path
MARK = "miram"
BROKEN = (SafetensorError, ValueError, KeyError, TypeError, RecursionError)
MOST = 2**40  # images of a site, so that its weight is a number
LARGEST = 1e15  # number that learns: a product of two is still one
DIGEST = re.compile(r"[0-9a-f]{64}")
WORDS = {
    "site": re.compile(r"[a-z0-9_-]{1,32}"),
    "base": DIGEST,
    "start": DIGEST,
    "reason": re.compile("|".join(map(re.escape, CLAUSES))),
}


class OtherEncoder(UserError):
    """A site has another encoder than the federation; travels as BASE."""


@dataclass(frozen=True, eq=False)
class Facts:
    """A site's first message.

    Attributes:
        site: its name, [a-z0-9_-]{1,32}.
        base: digest of the encoder it has.
        start: sha256 of what learns, as it starts, A of a low rank included where it does not learn.
        examples: n, its training images.
        counts: (k,) int64 images of each class; of a multilabel task positives of each label.
        mean: (D,) float64 of the frozen encoder's features.
        m2: (D,) float64, n times their variance, whatever the number of views they were taken from.
    """

    site: str
    base: str
    start: str
    examples: int
    counts: Tensor
    mean: Tensor
    m2: Tensor


@dataclass(frozen=True, eq=False)
class Order:
    """What a round begins with.

    Attributes:
        round: 1 and on.
        base: digest of the encoder that it is for.
        tensors: what learns, by name.
        fixed: head.mean, head.deviation (D,), class_weights (k,) where classes are weighed, and, with a residual,
            residual.PATH.A (r, in) and residual.PATH.B (out, r): s B A is to be added to the frozen weight.
        mu: of FedProx, (mu / 2) |w - tensors|^2 beside the loss; 0: none.
    """

    round: int
    base: str
    tensors: Tensors
    fixed: Tensors
    mu: float


@dataclass(frozen=True, eq=False)
class Update:
    """What a site makes of an order.

    Attributes:
        site: its name.
        base: digest of its encoder.
        round: the order's.
        tensors: the order's names, shapes and types.
        examples: n, its training images, as in its Facts.
        loss: mean over what it trained on in this round.
    """

    site: str
    base: str
    round: int
    tensors: Tensors
    examples: int
    loss: float


@dataclass(frozen=True, eq=False)
class Figures:
    """What a site says of the model that came of all rounds; nan where there is no figure.

    Attributes:
        site: its name.
        images: of its test.
        patients: likewise.
        value: the figure that leads.
        low: end of its 95 % interval.
        high: likewise.
        local: the same figure of a model that the site trained alone.
        gap_low: end of the interval of value - local.
        gap_high: likewise.
    """

    site: str
    images: int
    patients: int
    value: float
    low: float
    high: float
    local: float
    gap_low: float
    gap_high: float


@dataclass(frozen=True, eq=False)
class Refusal:
    """A site that takes no part in a round, and why: one of CLAUSES when it travels, any clause once it is here."""

    site: str
    reason: str


Message = TypeVar("Message", Facts, Order, Update, Refusal, Figures)
Header = dict[str, str | int | float]


# ---------------------------------------------------------------------------------------------- as bytes


def payload(message: Facts | Order | Update | Refusal | Figures) -> bytes:
    """The message as a safetensors file; its length is what travels."""
    return pack(*apart(message))


def read_payload(content: bytes, kind: type[Message]) -> Message:
    """The message that `payload` made.

    Raises:
        UserError: it is none of this kind; the sender is to be refused.
    """
    try:
        header, tensors = unpack(content)
    except BROKEN as error:
        raise UserError(f"the {kind.__name__} cannot be read ({type(error).__name__}); is its sender miram?") from error
    return together(header, tensors, kind)


def pack(header: Mapping[str, Any], tensors: Tensors) -> bytes:
    """A safetensors file with a JSON object in its metadata; the same bytes for the same content."""
    return save(tensors, {MARK: json.dumps(header)})


def unpack(content: bytes) -> tuple[Any, Tensors]:
    """What `pack` packed.

    Raises:
        BROKEN: it is no such file.
    """
    tensors = load(content)
    size = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + size])["__metadata__"][MARK]), tensors


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, types and bytes: of what learns, as it starts."""
    return hashlib.sha256(save({name: _copied(tensor) for name, tensor in tensors.items()})).hexdigest()


def apart(message: Facts | Order | Update | Refusal | Figures) -> tuple[Header, Tensors]:
    """What is a number or a word of a message, and its tensors, copied, by FIELD or FIELD/NAME."""
    header: Header = {}
    tensors: Tensors = {}
    for field, kind in get_type_hints(type(message)).items():
        value = getattr(message, field)
        if kind is Tensor:
            tensors[field] = value
        elif kind == Tensors:
            tensors |= {f"{field}/{name}": tensor for name, tensor in value.items()}
        else:
            header[field] = value
    assert not (fault := _fault_of_header(header, type(message))), fault
    return header, {name: _copied(tensor) for name, tensor in tensors.items()}


def together(header: Any, tensors: Tensors, kind: type[Message]) -> Message:
    """The message of this kind that `apart` took apart.

    Raises:
        UserError: it is none.
    """
    if fault := _fault_of_header(header, kind):
        raise UserError(f"the {kind.__name__} {fault}; is its sender of this version?")
    fields: dict[str, Any] = dict(header)
    hints = get_type_hints(kind)
    fields |= {field: {} for field, hint in hints.items() if hint == Tensors}
    for name, tensor in tensors.items():
        field, slash, rest = name.partition("/")
        hint = hints.get(field)
        if hint is Tensor and not slash:
            fields[field] = tensor
        elif hint == Tensors and rest:
            fields[field][rest] = tensor
        else:
            raise UserError(f"the {kind.__name__} has a tensor that is none of its own; is its sender of this version?")
    if lacking := sorted(hints.keys() - fields.keys()):
        raise UserError(f"the {kind.__name__} lacks {', '.join(lacking)}; is its sender of this version?")
    return kind(**fields)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # safetensors refuses shared memory


def _fault_of_header(header: Any, kind: type[Any]) -> str:
    wanted = {field: hint for field, hint in get_type_hints(kind).items() if hint in (str, int, float)}
    if not isinstance(header, dict) or header.keys() != wanted.keys():
        return f"does not say just {', '.join(wanted)}"
    for field, hint in wanted.items():
        if type(header[field]) is not hint:
            return f"says {field} as {type(header[field]).__name__}, not {hint.__name__}"
        if hint is str and not WORDS[field].fullmatch(header[field]):
            return f"says what no {field} can be"
    return ""


# ---------------------------------------------------------------------------------------------- what is sound


def _form(tensor: Tensor) -> Form:
    return Form(tensor.dtype, tuple(tensor.shape))  # form_of takes () and (1,) for one


def fault_of(update: Update, order: Order) -> str:
    """Why an update must not be averaged, in one clause; nothing where it may."""
    if update.base != order.base:
        return BASE
    if update.round != order.round:
        return f"it answers round {update.round}, not {order.round}"
    if lacking := sorted(order.tensors.keys() - update.tensors.keys()):
        return f"it lacks {lacking[0]}"
    if unknown := len(update.tensors.keys() - order.tensors.keys()):
        return f"it holds {unknown} that nobody asked for"  # their names are the site's words: not repeated
    for name, asked in order.tensors.items():
        if (form := _form(update.tensors[name])) != _form(asked):
            return f"{name} is {form}, not {_form(asked)}"
        if not (update.tensors[name].abs() <= LARGEST).all():
            return f"{name} is not finite, or beyond {LARGEST:.0e}"
    if not 0 < update.examples < MOST:
        return f"it learnt from {update.examples!s:.20} images"
    return "" if math.isfinite(update.loss) else "its loss is not finite"


def fault_of_facts(facts: Facts, base: str, start: str, classes: int, width: int) -> str:
    """Why a site cannot take part, in one clause; nothing where it can.

    Args:
        facts: of the site.
        base: digest of the encoder that is asked for.
        start: digest of what learns, as it starts.
        classes: k, of the task.
        width: D, of the features.
    """
    if facts.base != base:
        return BASE
    if facts.start != start:
        return START
    if not 0 < facts.examples < MOST:
        return f"it has {facts.examples!s:.20} training images"
    wanted = {"counts": (torch.int64, classes), "mean": (torch.float64, width), "m2": (torch.float64, width)}
    for name, (dtype, size) in wanted.items():
        tensor: Tensor = getattr(facts, name)
        if (form := _form(tensor)) != Form(dtype, (size,)):
            return f"{name} is {form}, not {Form(dtype, (size,))}"
        if not (tensor.abs() <= LARGEST**2 * MOST).all() or (name != "mean" and (tensor < 0).any()):
            return f"{name} is not finite, or negative"
    return f"a class has more than its {facts.examples} images" if facts.counts.max() > facts.examples else ""
