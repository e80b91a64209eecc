"""Weights that were trained elsewhere: their key names become timm's (encoder) and ours (decoder).

timm, facebookresearch/mae   cls_token  pos_embed  patch_embed.proj.*  blocks.N.{norm1,attn.qkv,attn.proj,norm2,mlp.*}.*
                             norm.*; with a decoder: mask_token  decoder_embed.*  decoder_pos_embed  decoder_blocks.N.*
                             decoder_norm.*  decoder_pred.*; with a classifier: head.*
transformers                 [vit.]embeddings.{cls_token,position_embeddings,patch_embeddings.projection.*}
                             [vit.]encoder.layer.N.{layernorm_before,attention.attention.{query,key,value},…}, in files
                             of version 5 also layers.N.{attention.{q,k,v}_proj,…}; [vit.]layernorm.*
                             with a decoder: decoder.{mask_token,decoder_embed.*,decoder_layers.N.*,…}
ours, of one scale           encoder.*  mask_token  decoder_embed.*  decoders.1.{blocks.N.*,norm.*,head.*}
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Literal

import torch
from torch import Tensor

from ...engine.errors import UserError
from ..encoder import sincos_positions

DECODER = "decoders.1."  # of Miram, at the scale that MAE has
AXES = {  # of tensors whose shapes are looked at before a model is there to compare them with
    "patch_embed.proj.weight": 4,
    **dict.fromkeys(("cls_token", "reg_token", "pos_embed", "decoder_pos_embed"), 3),
}

RULES = [
    (r"^module\.", ""),
    (r"^(?:vit|dinov2\w*)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^(?:embeddings\.)?register_tokens$", "reg_token"),
    (r"^(?:encoder\.layer|layers)\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"^(?:decoder\.decoder_encoder\.layer|decoder\.decoder_layers|decoder_blocks)\.", DECODER + "blocks."),
    (r"^decoder\.", ""),
    (r"^decoder_norm\.", DECODER + "norm."),
    (r"^decoder_pred\.", DECODER + "head."),
    (r"\.attention\.(?:attention\.)?(q|k|v)(?:_proj|uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
]


@dataclass(frozen=True)
class Fate:
    """What became of one tensor of a file."""

    key: str  # in the file
    verdict: Literal["taken", "adapted", "dropped"]
    how: str = ""
    target: str = ""  # in the encoder or decoder


@dataclass(frozen=True)
class Weights:
    """A file's tensors under timm's names and ours, and what became of each."""

    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor]  # mask_token, decoder_embed.*, decoders.1.*; empty if there is none
    fates: list[Fate]

    @property
    def is_mae(self) -> bool:
        """Whether these come from MAE: a decoder, or its fixed positions."""
        positions = self.encoder.get("pos_embed")
        return bool(self.decoder) or (positions is not None and is_sincos(positions))


def translate(state: Mapping[str, Tensor]) -> Weights:
    """A file's state under timm's names; every key has a fate.

    Raises:
        UserError: queries, keys and values are not complete, two keys mean the same, or a tensor cannot be used.
    """
    check_axes(state)
    no_decoder = why_no_decoder(state)
    named: dict[str, Tensor] = {}
    fates = []
    for key, tensor in state.items():
        target = rename(key)
        if why := superfluous(target, no_decoder):
            fates.append(Fate(key, "dropped", why))
        else:
            refuse_unusable(key, tensor)
            if target in named:
                raise UserError(f"two of the weights would be {target}, one of them {key}; which is meant?")
            named[target] = tensor
            fates.append(Fate(key, "taken", "" if key == target else f"as {target}", target))
    fates = joined_qkv(named, fates)
    fates = registers_apart(named, fates)
    decoder = {key: named.pop(key) for key in sorted(named) if key.startswith(("mask_token", "decoder"))}
    return Weights(named, decoder, fates)


def check_axes(state: Mapping[str, Tensor]) -> None:
    """Refuse tensors of too few or too many axes.

    Raises:
        UserError: names the first of them.
    """
    for key, tensor in state.items():
        if tensor.dim() != (axes := AXES.get(rename(key), tensor.dim())):
            raise UserError(f"{key} is of shape {tuple(tensor.shape)}, where {axes} axes should be")


def refuse_unusable(key: str, tensor: Tensor) -> None:
    """Refuse what is not made of finite real numbers.

    Raises:
        UserError: it names the tensor.
    """
    if not tensor.is_floating_point():
        raise UserError(f"{key} holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers")
    if not tensor.isfinite().all():
        raise UserError(f"{key} is not finite everywhere; the training it comes from has diverged")


def rename(key: str) -> str:
    """A key of any of the layouts under the name it has here."""
    for pattern, name in RULES:
        key = re.sub(pattern, name, key)
    return key


def why_no_decoder(state: Mapping[str, Tensor]) -> str:
    """Why a file's decoder cannot be used; empty if it can."""
    by_name = {rename(key): tensor for key, tensor in state.items()}
    if "decoder_embed.weight" not in by_name:
        return "without its decoder it has no use"
    positions = by_name.get("decoder_pos_embed")
    fixed = positions is None or is_sincos(positions)
    return "" if fixed else "the decoder's positions are not MAE's fixed ones, which ours has"


def superfluous(target: str, no_decoder: str) -> str:
    """Why a tensor is not needed; empty if it is."""
    if no_decoder and target.startswith(("mask_token", "decoder")):
        return no_decoder
    if target == "decoder_pos_embed":
        return "computed here, to the same values"
    if re.search(r"\brope\.(?!freqs)", target):
        return "angles are computed here"
    if re.match(r"(head|head_dist|classifier|pooler|fc_norm|attn_pool)\b", target):
        return "what follows the tokens is no part of an encoder"
    return ""


def is_sincos(positions: Tensor) -> bool:
    """Whether (1, 1 + N, D) positions are MAE's fixed ones of a square grid."""
    side = isqrt(positions.shape[1] - 1)
    if side * side != positions.shape[1] - 1 or positions.shape[2] % 4:
        return False
    fixed = sincos_positions((side, side), positions.shape[2])
    return torch.allclose(positions[:, 1:].float(), fixed, atol=1e-2)  # bfloat16 rounds by up to 4e-3


def joined_qkv(named: dict[str, Tensor], fates: list[Fate]) -> list[Fate]:
    """Queries, keys and values become one tensor, in place.

    Raises:
        UserError: one of the three is missing.
    """
    for query in [key for key in named if ".attn.q." in key]:
        whole = query.replace(".q.", ".qkv.")
        parts = [query.replace(".q.", f".{part}.") for part in "qkv"]
        if missing := set(parts) - named.keys():
            raise UserError(f"the weights lack {', '.join(sorted(missing))}; is the file whole?")
        named[whole] = torch.cat([named.pop(part) for part in parts])
        fates = [
            replace(f, verdict="adapted", how=f"joined into {whole}", target=whole) if f.target in parts else f
            for f in fates
        ]
    return fates


def registers_apart(named: dict[str, Tensor], fates: list[Fate]) -> list[Fate]:
    """DINOv2's layout with registers gives the class token a position; timm's has it added to the token, in place."""
    positions = named.get("pos_embed")
    if "reg_token" not in named or positions is None or isqrt(positions.shape[1] - 1) ** 2 != positions.shape[1] - 1:
        return fates
    named["cls_token"], named["pos_embed"] = named["cls_token"] + positions[:, :1], positions[:, 1:]
    how = {"cls_token": "its position added", "pos_embed": "the class token's went into cls_token"}
    return [replace(f, verdict="adapted", how=how[f.target]) if f.target in how else f for f in fates]


def miram_state(weights: Weights) -> dict[str, Tensor]:
    """The state of a Miram of one scale; decoder positions are computed, not stored."""
    return {f"encoder.{key}": tensor for key, tensor in weights.encoder.items()} | weights.decoder


def with_adaptations(fates: Iterable[Fate], adapted: Mapping[str, str]) -> list[Fate]:
    """The fates once the encoder's tensors named in `adapted` were changed in that way."""
    return [
        replace(f, verdict="adapted", how=f"{f.how}, {adapted[f.target]}".lstrip(", ")) if f.target in adapted else f
        for f in fates
    ]


def report(fates: Iterable[Fate]) -> list[str]:
    """Lines that name every key; those of the blocks stand together as N."""

    def pattern(text: str) -> str:
        return re.sub(r"(?<!decoders)\.\d+\.", ".N.", text)

    groups = Counter((fate.verdict, pattern(fate.key), pattern(fate.how)) for fate in fates)
    return [
        f"{verdict:8} {key}{f' ({count} x)' if count > 1 else ''}{f': {how}' if how else ''}"
        for (verdict, key, how), count in groups.items()
    ]
