"""SAViT as a tuning method: the blocks of a ViT or Swin go over regions of the image one after the other.

         ViT                                     Swin
tokens   patches with their positions            the stages before the last, over the whole image, and the merging
blocks   all but the last, over K x K regions    the last stage's all but the last, over K x K regions
MixPool  the last block                          the last block
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

from pydantic import Field
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, get_relative_position_index
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ...engine.errors import UserError
from ...pretrain.encoder import Encoder, embed, rotations, run
from ..savit import MixPool, Regions, SharedPrior
from .base import Method, Size
from .blocks import attention_halves
from .lora_qkv import LoraQkv
from .shape import Shape

Stage = tuple[int, int, int]
"""Width, width of all heads together, and blocks of a stage; a ViT has one."""


@dataclass(frozen=True)
class Staged(Shape):
    """The letters of an encoder whose width may change on the way."""

    stages: tuple[Stage, ...] = ()
    norm: int = 2  # numbers a channel of the blocks' norms: weight and bias, or weight
    final: int = 2  # of the last norm


class Savit(Method):
    """SAViT (Liu et al., IEEE TMI 2025) on a pretrained encoder: SPA, MixPool, and low-rank q and k.

    Not additive: the image is cut into K x K regions, which attend within themselves. Each is told of those before it
    by a running prompt, (Z_i + AP_i) / 2, without parameters or a gate (`SharedPrior`); the regions put back together
    go through three pools and the encoder's last block (`MixPool`). Class and register tokens are dropped, as is the
    encoder's own pooling; positions, absolute or rotary, stay. `forward_features` gives the tokens of the regions.

    What learns: q and k of every block by W x + B A x, A Kaiming-uniform, B = 0, so that the frozen projections are
    those of the encoder at the first step; the norm before each attention; the norms of SPA and MixPool, new ones, and
    the encoder's last. With rank r, L blocks and width D

        4 r D L  +  2 D L  +  6 D          147,456 + 18,432 + 4,608 = 170,496 on ViT-B at r = 4

    and on a Swin, summed over its stages, 4 r D_s L_s + 2 D_s L_s, and 2 D_1 of the patches' norm, 8 D_s of the norms
    that merge, 6 D: 192,512 + 24,064 + 13,568 = 230,144 on Swin-B. A region of a Swin that is smaller than the window
    has the part of the relative positions that it needs, and nothing is padded.

    The released code is not this: it draws B anew after setting it to 0, adds a frozen random projection of 14 M
    numbers to q and k, and its MixPool is a constant multiple of the mean.
    """

    encoders: ClassVar[tuple[type[nn.Module], ...]] = (VisionTransformer, Eva, SwinTransformer)
    additive: ClassVar[bool] = False

    rank: Size = 4
    """inner width of the changes of q and k"""
    regions: int = Field(default=2, ge=2)
    """K: the grid of tokens is cut into K x K regions"""
    train_norm1: bool = True
    """the norm of every attention learns; without it, 152,064 numbers on ViT-B"""

    def shape(self, vit: Any) -> Shape:
        """What `expected` is computed from; no token but those of patches comes out."""
        return swin_shape(vit) if isinstance(vit, SwinTransformer) else vit_shape(vit)

    def attach(self, vit: Encoder) -> nn.Module:
        """Wrap the encoder.

        Raises:
            UserError: it has one block only, fewer rows of tokens than regions, no attention apart, no fixed grid.
        """
        model: OverRegions
        low_rank = LoraQkv(rank=self.rank, targets="qk")
        if isinstance(cast(nn.Module, vit), SwinTransformer):
            model = SwinOverRegions(vit, self.regions)
            for block in swin_blocks(vit):
                low_rank.hang(block.attn.qkv, "qkv")
        else:
            model = VitOverRegions(vit, self.regions)
            low_rank.attach(vit)
        for norm in [*model.outer_norms(), *(model.attention_norms() if self.train_norm1 else ())]:
            norm.requires_grad_(True)
        return model

    def expected(self, shape: Shape) -> int | None:
        """The sum over stages of the low rank and of the norms, and the norms between and after them."""
        assert isinstance(shape, Staged)
        if shape.grouped:
            return None
        low_rank = sum(L * 2 * self.rank * (D + A) for D, A, L in shape.stages)
        norms = sum(L * shape.norm * D for D, _, L in shape.stages) if self.train_norm1 else 0
        widths = [D for D, _, _ in shape.stages]
        between = 2 * widths[0] + sum(2 * 4 * D for D in widths[:-1]) if len(widths) > 1 else 0
        return shape.branches * (low_rank + norms) + between + (2 + 2 + shape.final) * shape.D


class OverRegions(nn.Module):
    """An encoder whose blocks are SPA's, the last MixPool's: images (B, C, H, W) -> (B, D)."""

    num_prefix_tokens = 0

    def __init__(self, encoder: Any, K: int):
        super().__init__()
        self.encoder, self.num_features = encoder, encoder.num_features
        self.prior, self.mixpool = SharedPrior(self.num_features, K), MixPool(self.num_features, K)
        self.to(next(encoder.parameters()))

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, H, W, D) before the blocks that go over regions, and their rotations if there are any."""
        raise NotImplementedError

    def through(self, which: slice, rope: Tensor | None, x: Tensor, places: Tensor) -> Tensor:
        """Some of the blocks over a region (B, h, w, D) of the grid."""
        raise NotImplementedError

    def last_norm(self) -> nn.Module:
        """The encoder's last norm."""
        norm: nn.Module = self.encoder.norm
        return norm

    def outer_norms(self) -> list[nn.Module]:
        """Norms outside the blocks."""
        return [self.prior.norm, self.mixpool.norm, self.last_norm()]

    def attention_norms(self) -> list[nn.Module]:
        """The norm of every attention."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass."""
        self.encoder.set_grad_checkpointing(enable)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D), the regions put back together, before MixPool."""
        return self._regions(*self.embed(images)).flatten(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D)."""
        x, rope = self.embed(images)
        pooled = self.mixpool(self._regions(x, rope), partial(self.through, slice(-1, None), rope))
        out: Tensor = self.last_norm()(pooled)
        return out

    def _regions(self, x: Tensor, rope: Tensor | None) -> Tensor:
        out: Tensor = self.prior(x, partial(self.through, slice(-1), rope))
        return out


class VitOverRegions(OverRegions):
    """A ViT over regions; a rotary one with each token's rotation on the whole grid."""

    def __init__(self, vit: Encoder, K: int):
        super().__init__(vit, K)
        self._check(vit, K)
        for block in vit.blocks:
            for half in attention_halves(block):
                cast(Any, half.core).num_prefix_tokens = 0  # rotary attention spares so many tokens
        if final_norm(vit) is None:
            vit.norm = nn.LayerNorm(vit.embed_dim, eps=1e-6).to(vit.patch_embed.proj.weight)

    @staticmethod
    def _check(vit: Encoder, K: int) -> None:
        if len(vit.blocks) < 2:
            raise UserError("savit needs two blocks, one for the regions and one for MixPool; this encoder has one")
        if getattr(vit.patch_drop, "prob", 0) > 0:
            raise UserError(
                "savit needs the whole grid, and this encoder drops patches in training: set patch_drop_rate 0"
            )
        Regions(vit.patch_embed.grid_size, K)

    def last_norm(self) -> nn.Module:
        """Of the tokens, or of what was pooled, whichever the encoder has."""
        norm = final_norm(self.encoder)
        assert norm is not None
        return norm

    def attention_norms(self) -> list[nn.Module]:
        """norm1 of every block, or the norm of each of its attentions in parallel."""
        return [norm for block in self.encoder.blocks for norm in block_norms(block)]

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Patches with their positions, without class and register tokens."""
        tokens, rope = embed(self.encoder, images)
        patches = self.encoder.norm_pre(tokens[:, self.encoder.num_prefix_tokens :])
        return patches.unflatten(1, self.encoder.patch_embed.dynamic_feat_size(images.shape[-2:])), rope

    def through(self, which: slice, rope: Tensor | None, x: Tensor, places: Tensor) -> Tensor:
        """(B, h, w, D) -> the same."""
        tokens, recompute = x.flatten(1, 2), self.encoder.grad_checkpointing
        for block, angles in zip(self.encoder.blocks[which], rotations(self.encoder, rope, places)[which], strict=True):
            rotated: dict[str, Any] = {} if angles is None else {"rope": angles}
            tokens = run(block, tokens, recompute, **rotated)
        return tokens.view(x.shape)


class SwinOverRegions(OverRegions):
    """A Swin whose last stage goes over regions."""

    def __init__(self, swin: Any, K: int):
        super().__init__(swin, K)
        last = swin.layers[-1]
        if len(last.blocks) < 2:
            raise UserError("savit needs two blocks in the last stage, one of them for MixPool; this encoder has one")
        if swin.dynamic_img_size:
            raise UserError("savit fits a Swin's windows to regions of one image size: build it with strict_img_size")
        region = Regions(tuple(last.output_resolution), K).size
        for block in last.blocks:
            fit_window(block, region)

    def outer_norms(self) -> list[nn.Module]:
        """Also of the patches, and of those that merge tokens."""
        merging = [stage.downsample.norm for stage in self.encoder.layers[1:]]
        return [self.encoder.patch_embed.norm, *merging, *super().outer_norms()]

    def attention_norms(self) -> list[nn.Module]:
        """norm1 of every block."""
        return [block.norm1 for block in swin_blocks(self.encoder)]

    def embed(self, images: Tensor) -> tuple[Tensor, None]:
        """Tokens of the last stage, before its blocks."""
        x = self.encoder.patch_embed(images)
        for stage in self.encoder.layers[:-1]:
            x = stage(x)
        return self.encoder.layers[-1].downsample(x), None

    def through(self, which: slice, rope: Tensor | None, x: Tensor, places: Tensor) -> Tensor:
        """(B, h, w, D) -> the same."""
        stage = self.encoder.layers[-1]
        for block in stage.blocks[which]:
            x = run(block, x, stage.grad_checkpointing)
        return x


def fit_window(block: SwinTransformerBlock, region: tuple[int, int]) -> None:
    """Make a Swin block take a grid of a region's size.

    By Swin's own rule a window is no larger than the grid and one that covers it does not shift; timm then pads or
    interpolates. Here the smaller window keeps the table of relative positions and takes from it what it has.
    """
    whole, attention = block.window_size, cast(Any, block.attn)
    block.input_resolution, block.always_partition = region, False
    block.window_size, block.shift_size = block._calc_window_shift(whole)
    (h, w), index = block.window_size, get_relative_position_index(*whole)
    part = index.view(*whole, *whole)[:h, :w, :h, :w].reshape(h * w, h * w).contiguous()
    attention.relative_position_index = part.to(attention.relative_position_index.device)
    attention.window_size, attention.window_area = (h, w), h * w
    block.window_area = h * w
    block._init_buffers()


def swin_blocks(swin: Any) -> list[Any]:
    """Blocks of all stages."""
    return [block for stage in swin.layers for block in stage.blocks]


def block_norms(block: Any) -> list[nn.Module]:
    """The norms of a ViT block's attentions."""
    return [one.norm for one in block.attns.children()] if hasattr(block, "attns") else [block.norm1]


def final_norm(vit: Any) -> nn.Module | None:
    """The norm of tokens or of what is pooled; None if there is none that learns."""
    return next((norm for norm in (vit.norm, vit.fc_norm) if any(True for _ in norm.parameters())), None)


def numbers_a_channel(norm: nn.Module | None) -> int:
    """Numbers a channel of a norm; of one that has to be made, 2."""
    return 2 if norm is None else sum(1 for _ in norm.parameters())


def vit_shape(vit: Encoder) -> Staged:
    """Of a ViT: one stage."""
    shape, block = Shape.of(vit), vit.blocks[0]
    norm = numbers_a_channel(block_norms(block)[0]) if hasattr(block, "norm1") or hasattr(block, "attns") else 2
    own = {"prefix": 0, "stages": ((shape.D, shape.A, shape.L),)}
    return Staged(**(vars(shape) | own), norm=norm, final=numbers_a_channel(final_norm(vit)))


def swin_shape(swin: Any) -> Staged:
    """Of a Swin; D, A, H, d and N are the last stage's."""
    stages = tuple((b.dim, b.attn.qkv.out_features // 3, len(s.blocks)) for s in swin.layers for b in s.blocks[:1])
    last, embedding = swin.layers[-1], swin.patch_embed
    height, width = last.output_resolution
    D, A, _ = stages[-1]
    return Staged(
        D=D,
        L=sum(L for _, _, L in stages),
        A=A,
        H=last.blocks[0].mlp.fc2.in_features,
        d=A // last.blocks[0].attn.num_heads,
        p=embedding.patch_size[0],
        C=embedding.proj.in_channels,
        N=height * width,
        prefix=0,
        positions=0,
        stages=stages,
    )
