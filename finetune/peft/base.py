"""What every tuning method is: options that know how to attach themselves to an encoder, and how much then learns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

from pydantic import Field
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...engine.config import Section
from ...engine.errors import UserError
from ...engine.tensors import form_of, in_file_order, read_forms, read_into, write_tensors
from ...pretrain.encoder import Encoder
from .shape import Shape

TENSORS = "adapter.safetensors"
MARK = "tuned_with"  # attribute of an encoder that carries a method


Size = Annotated[int, Field(ge=1, le=65_536)]  # of a rank, a bottleneck, a number of prompts


class Method(Section):
    """A tuning method: its fields are its options."""

    encoders: ClassVar[tuple[type[nn.Module], ...]] = (VisionTransformer, Eva)
    additive: ClassVar[bool] = True  # at the first step the model computes what the encoder does
    merges: ClassVar[bool] = False  # what was learnt can be folded into a plain timm encoder
    rates: ClassVar[tuple[float, float]] = (1e-4, 1e-2)  # least and greatest learning rate of Adam worth trying

    def shape(self, vit: Any) -> Shape:
        """What `expected` is computed from."""
        return Shape.of(vit)

    def attach(self, vit: Encoder) -> nn.Module:
        """Change a frozen encoder in place, or wrap it; what learns requires grad afterwards.

        Returns:
            A module: images (B, C, H, W) -> features (B, D), with `forward_features`: images -> (B, prefix + N, D).

        Raises:
            UserError: the method cannot stand on this encoder.
        """
        raise NotImplementedError

    def expected(self, shape: Shape) -> int | None:
        """How many numbers learn, by the closed form; None where there is none for such an encoder."""
        raise NotImplementedError

    def merged(self, model: nn.Module) -> Encoder:
        """The plain timm encoder that computes the same.

        Raises:
            UserError: there is none.
        """
        raise NotImplementedError

    def contents(self, model: nn.Module) -> dict[str, Tensor]:
        """What learns, by the names that `write` gives it."""
        return dict(learnt(model))

    def write(self, model: nn.Module, contents: Mapping[str, Tensor], folder: Path) -> None:
        """Write the contents, gathered from all ranks, into a folder."""
        write_all(folder / TENSORS, contents)

    def read(self, model: nn.Module, folder: Path) -> None:
        """Read what `write` wrote into a model that was attached in the same way.

        Raises:
            UserError: the names or shapes are not those of this model.
        """
        wanted, path = dict(learnt(model)), folder / TENSORS
        forms, found = {name: form_of(tensor) for name, tensor in wanted.items()}, read_forms(path)
        if odd := sorted({name for name, _ in forms.items() ^ found.items()}):
            raise UserError(f"{path} does not fit this encoder and these options: {', '.join(odd[:4])} differ")
        read_into(path, wanted.items())


def write_all(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, readable by all, and flush it to disk."""
    forms = {name: form_of(tensors[name]) for name in in_file_order(tensors)}
    write_tensors(path, forms, (tensors[name] for name in forms))


def learnt(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and tensors that learn, shared ones once."""
    return ((name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad)


class Tuned(nn.Module):
    """An encoder with a tuning method on it, and a head: images (B, C, H, W) -> head(features (B, D)).

    Attributes:
        model: images -> features; the encoder itself where the method changes it in place.
        head: nothing at first; set_head puts a linear one there. It is counted apart.
        trainable: how many numbers of the model learn.
        frozen: how many do not.
        expected: what `trainable` is by the method's closed form; None where there is none.
    """

    def __init__(self, name: str, method: Method, model: nn.Module, shape: Shape, base: dict[str, Any]):
        super().__init__()
        self.name, self.method, self.shape, self.base = name, method, shape, base
        self.model = model
        self.head: nn.Module = nn.Identity()
        self.expected = method.expected(shape)
        self.used_up = False

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D), or what the head makes of it."""
        out: Tensor = self.head(self.model(images))
        return out

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, prefix + N, D) tokens, no prompts among them."""
        tokens: Tensor = cast(Any, self.model).forward_features(images)
        return tokens

    @property
    def trainable(self) -> int:
        """How many numbers learn, the head not counted."""
        return sum(tensor.numel() for _, tensor in learnt(self.model))

    @property
    def frozen(self) -> int:
        """How many numbers of the model do not learn."""
        return sum(tensor.numel() for tensor in self.model.parameters()) - self.trainable

    @property
    def head_parameters(self) -> int:
        """How many numbers the head has."""
        return sum(tensor.numel() for tensor in self.head.parameters())

    def summary(self) -> str:
        """One line: what learns, with and without the head, beside the closed form."""
        learns, head = self.trainable, self.head_parameters
        form = "no closed form" if self.expected is None else f"closed form {self.expected:,}"
        share = learns / (learns + self.frozen)
        return f"{self.name}: {learns:,} learn ({form}), {learns + head:,} with the head, {share:.3%} of the model"

    def set_head(self, classes: int) -> None:
        """A new linear head on the features; small weights, so that the first logits are near zero."""
        head = nn.Linear(self.shape.D, classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        self.head = head.to(next(self.model.parameters()))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks again in the backward pass instead of keeping what they made."""
        for module in self.model.modules():
            if hasattr(module, "grad_checkpointing"):
                cast(Any, module).grad_checkpointing = enable

    def train(self, mode: bool = True) -> Tuned:
        """As every module, but that batch norms (of a hybrid's stem) keep their statistics, which no file holds."""
        super().train(mode)
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def merged(self) -> Encoder:
        """The plain timm encoder that computes the same features; the model is used up.

        Raises:
            UserError: the method cannot be merged, or has been.
        """
        self.refuse_if_used_up()
        if not self.method.merges:
            raise UserError(f"{self.name} does not merge: it adds what a plain ViT has no place for")
        vit = self.method.merged(self.model)
        self.used_up = True
        delattr(vit, MARK)
        return vit

    def refuse_if_used_up(self) -> None:
        """Raises: UserError: the model was merged, and nothing of the method is left in it."""
        if self.used_up:
            raise UserError(f"this {self.name} was merged already; take a deep copy before merging")
