"""Token merging: each block of a ViT joins the patches that are most alike, so that later blocks see fewer of them.

    x = x + attention(x, + log s)        s: patches that a token stands for; not added before the first merging
    x, s = merge(x, s, keys, r)          r of the odd patches, each into the even patch that is most alike
    x = x + ffn(x)

Bolya et al. 2023, Token Merging: Your ViT But Faster, arXiv 2210.09461, section 3: two sets of alternating tokens,
cosines of the keys' means over heads, the r best edges, averages weighted by size, attention proportional to size.
Class and register tokens take no part. Different from the released code: timm's own modules are called, so that
LayerScale, norms of q and k, gates and adapters work and attention stays SDPA; tokens keep their order; of equal scores
the first wins. Of scores that only rounding tells apart, as of patches of air, another runtime may let another win, and
no order of comparison cures that: features of such an image then differ by more than rounding.

Legend: B images, P prefix tokens, N tokens with them, h heads, d width of a head, D width, r merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, cast

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..engine.errors import UserError


class MergedViT(nn.Module):
    """A ViT that merges tokens on its way; it holds the ViT itself, unchanged, and no weights of its own.

    Args:
        vit: a plain timm ViT.
        r: patches that each block merges away, or as a fraction the share of those it sees; at most half of them go.
        proportional: attention counts a token as often as the patches it stands for. The paper switches it off for
            encoders of masked pretraining that were not tuned since.

    Attributes:
        merged: patches that each block merges away.
        left: tokens behind each block, class and registers among them.

    Raises:
        UserError: the ViT is of another kind, or r is no such number.
    """

    def __init__(self, vit: VisionTransformer, r: int | float, proportional: bool = True):
        super().__init__()
        refuse_kind(vit)
        refuse_amount(r)
        self.vit, self.r, self.proportional = vit, r, proportional
        patches = vit.patch_embed.num_patches
        self.merged = tuple(schedule(patches, r, len(vit.blocks)))
        self.left = tuple(vit.num_prefix_tokens + patches - gone for gone in accumulate(self.merged))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> what vit(images) gives; an average over patches is one over what the tokens stand for."""
        x, sizes, _ = self.forward_features(images)
        vit = self.vit
        if vit.global_pool == "avg":
            skip = 0 if vit.pool_include_prefix else vit.num_prefix_tokens
            share = sizes[:, skip:] / sizes[:, skip:].sum(1, keepdim=True)
            pooled = (share[..., None] * x[:, skip:]).sum(1).to(x.dtype)
        else:
            pooled = vit.pool(x)
        out: Tensor = vit.head(vit.head_drop(vit.fc_norm(pooled)))
        return out

    def forward_features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> tokens that are left (B, n, D), patches that each stands for (B, n), and the token that each
        of the N at first went into (B, N)."""
        vit = cast(Any, self.vit)
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        sizes = torch.ones(x.shape[:2], device=x.device)
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        for i, (block, count) in enumerate(zip(vit.blocks, self.merged, strict=True)):
            bias = sizes.log().to(x.dtype)[:, None, None] if self.proportional and any(self.merged[:i]) else None
            with keys_of(block.attn) as keys:
                x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=bias)))
            if count:
                x, sizes, moved = merge(x, sizes, keys[0].mean(1), vit.num_prefix_tokens, count)
                places = moved.gather(1, places)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return vit.norm(x), sizes, places


def merge_tokens(vit: nn.Module, r: int | float, proportional: bool = True) -> MergedViT:
    """The same ViT with fewer tokens from block to block; see `MergedViT`.

    Raises:
        UserError: it is no plain timm ViT, or r is no number of tokens or share of them.
    """
    return MergedViT(cast(VisionTransformer, vit), r, proportional)


def merge(x: Tensor, sizes: Tensor, keys: Tensor, prefix: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge `count` of the odd patches, counted from 0 behind the prefix, each into an even one.

    Sums are taken by `scatter_add`, whose order is free on a GPU: torch.use_deterministic_algorithms fixes it.

    Args:
        x: (B, N, D) tokens.
        sizes: (B, N) patches that each stands for.
        keys: (B, N, d) what they are compared by.
        prefix: tokens at the front that stay as they are.
        count: at most half of the patches.

    Returns:
        x (B, N - count, D) and sizes (B, N - count) in their order, and for each of the N its new place (B, N).
    """
    batch, n, width = x.shape
    even, odd = (torch.arange(first, n, 2, device=x.device) for first in (prefix, prefix + 1))
    alike, nearest = similarity(keys[:, odd], keys[:, even]).max(-1)
    chosen = largest(alike, count)
    source, target = odd[chosen], even[nearest.gather(1, chosen)]

    def gathered(values: Tensor) -> Tensor:
        """(B, N, w) -> (B, N, w), sums in the places of those that are merged into."""
        from_, to = (index[..., None].expand(-1, -1, values.shape[-1]) for index in (source, target))
        return values.scatter_add(1, to, values.gather(1, from_))

    sums, totals = gathered(x * sizes[..., None]), gathered(sizes[..., None])
    stays = torch.ones(batch, n, dtype=torch.int64, device=x.device).scatter(1, source, 0)
    kept = largest(stays, n - count)
    into = torch.arange(n, device=x.device).expand(batch, n).scatter(1, source, target)
    means = (sums / totals).to(x.dtype).gather(1, kept[..., None].expand(-1, -1, width))
    return means, totals[..., 0].gather(1, kept), (stays.cumsum(1) - 1).gather(1, into)


def similarity(left: Tensor, right: Tensor) -> Tensor:
    """(B, n, d) and (B, m, d) -> (B, n, m) cosines, in fp32 or finer: half precision would make many alike."""
    with torch.no_grad(), torch.autocast(left.device.type, enabled=False):
        fine = torch.promote_types(left.dtype, torch.float32)
        return normalize(left.to(fine), dim=-1) @ normalize(right.to(fine), dim=-1).transpose(1, 2)


def largest(values: Tensor, count: int) -> Tensor:
    """(B, n) -> (B, count) indices, falling by value; of equal values the first, which topk does not promise."""
    later = torch.arange(values.shape[1], device=values.device, dtype=torch.float64)
    return (values.double() - 1e-12 * later).topk(count, dim=1).indices


def schedule(patches: int, r: int | float, blocks: int) -> Iterator[int]:
    """How many patches each block merges away."""
    for _ in range(blocks):
        count = min(int(r * patches) if isinstance(r, float) else r, patches // 2)
        yield count
        patches -= count


@contextmanager
def keys_of(attention: nn.Module) -> Iterator[list[Tensor]]:
    """The keys (B, h, N, d) of the calls within, as attention uses them."""
    seen: list[Tensor] = []
    hook = attention.get_submodule("k_norm").register_forward_hook(lambda _, inputs, keys: seen.append(keys))
    try:
        yield seen
    finally:
        hook.remove()


def refuse_amount(r: int | float) -> None:
    """Refuse what is no number of tokens and no share of them.

    Raises:
        UserError: it is not.
    """
    if isinstance(r, bool) or not (0 <= r <= 0.5 if isinstance(r, float) else r >= 0):
        raise UserError(f"merge_tokens: {r} is no number of tokens that a block merges, nor a share from 0.0 to 0.5")


def refuse_kind(vit: Any) -> None:
    """Refuse an encoder whose blocks or pooling have no place for merging.

    Raises:
        UserError: what is in the way.
    """
    if not isinstance(vit, VisionTransformer):
        kind = type(vit).__name__
        raise UserError(f"merge_tokens: {kind} has no place for it; it needs a plain ViT of timm's, adapters merged")
    plain: Any = vit
    for block in plain.blocks:
        if type(block) is not Block:
            raise UserError(
                f"merge_tokens: {type(block).__name__}s have no place for it; it needs a ViT of plain blocks"
            )
        if type(block.attn) is not Attention:
            kind = type(block.attn).__name__
            raise UserError(f"merge_tokens: {kind} has no place for it; it needs timm's plain Attention")
        if block._forward_hooks or block._forward_pre_hooks:
            raise UserError("merge_tokens: a tuning method stands around the blocks; use one that merges, or full")
    if plain.attn_pool is not None or plain.global_pool not in ("token", "avg"):
        pool = "map" if plain.attn_pool is not None else plain.global_pool or "none"
        raise UserError(f"merge_tokens: pooling {pool!r} is none of merged tokens; it needs 'token' or 'avg'")
