"""A timm ViT as the ViT of transformers: what that has no place for, its configuration, its names.

cls_token  pos_embed  patch_embed.proj     embeddings.{cls_token,position_embeddings,patch_embeddings.projection}
blocks.N.norm1  attn.qkv  attn.proj        layers.N.{layernorm_before,attention.{q,k,v}_proj,attention.o_proj}
blocks.N.norm2  mlp.fc1   mlp.fc2          layers.N.{layernorm_after,mlp.fc1,mlp.fc2}
norm                                       layernorm
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ...engine.errors import UserError
from ...pretrain.encoder import Encoder

WEIGHTS = "model.safetensors"
NAMES = (  # by regular expression: our blocks' names, and theirs
    (r"norm1\.", "layernorm_before."),
    (r"norm2\.", "layernorm_after."),
    (r"attn\.proj\.", "attention.o_proj."),
    (r"mlp\.(fc[12])\.", r"mlp.\1."),
)
NO_PLACE = {  # parameters of timm's ViTs that transformers' lacks, by a part of their names
    "ls1.": "LayerScale",
    "reg_token": "register tokens",
    "dist_token": "a distillation token",
    "q_norm.": "norms of queries and keys",
    "norm_pre.": "a norm before the blocks",
    "fc_norm.": "a norm after pooling",
    "attn_pool.": "pooling by attention",
}


def refuse_foreign(vit: Encoder, classifies: bool) -> None:
    """Refuse what transformers' ViT cannot compute, by its name.

    Raises:
        UserError: names what there is no place for.
    """
    if why := "; ".join(dict.fromkeys(misfits(vit, classifies))):
        raise UserError(f"--to hf: the ViT of transformers has no place for {why}; use --to timm or --to onnx")


def misfits(vit: Encoder, classifies: bool) -> Iterator[str]:
    """What a ViT has, or lacks, that transformers' does not know."""
    if not isinstance(vit, VisionTransformer):
        yield "rotary positions"
        return
    if vit.cls_token is None:
        yield "a ViT without a class token"
    told = sum(token is not None for token in (vit.cls_token, getattr(vit, "dist_token", None))) + vit.num_reg_tokens
    if vit.num_prefix_tokens != told:
        yield "other tokens before the patches than a class token"
    for name in vit.state_dict():
        yield from (said for part, said in NO_PLACE.items() if part in name)
    for block in vit.blocks:
        if type(block) is not Block or not hasattr(block.attn, "qkv"):
            yield f"blocks of timm's {type(block).__name__}"
            return
        yield from block_misfits(block)
    if not isinstance(vit.norm, nn.LayerNorm) or not isinstance(vit.norm_pre, nn.Identity):
        yield "other norms than one behind the blocks"
    if classifies and vit.global_pool != "token":
        yield f"a classifier of features pooled by {vit.global_pool or 'nothing'}"


def block_misfits(block: Block) -> Iterator[str]:
    """The same of one block."""
    attention, mlp = cast(Any, block.attn), cast(Any, block.mlp)
    if not all(isinstance(part, nn.Identity) for part in (attention.q_norm, attention.k_norm)):
        yield NO_PLACE["q_norm."]
    if attention.qkv.out_features != 3 * attention.qkv.in_features:
        yield "heads that are not the width's even parts"
    if not isinstance(getattr(mlp, "act", None), nn.GELU) or mlp.act.approximate != "none":
        yield f"the activation {type(getattr(mlp, 'act', None)).__name__}"
    parts = {"attn.norm": getattr(attention, "norm", None), "mlp.norm": getattr(mlp, "norm", None)}
    yield from (f"a norm inside a block ({n})" for n, p in parts.items() if not isinstance(p, nn.Identity | None))
    if not all(isinstance(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2)):
        yield "norms other than LayerNorm"


def shape_of(vit: Encoder) -> dict[str, Any]:
    """What ViTConfig says of the encoder."""
    block: Any = vit.blocks[0]
    size = list(vit.patch_embed.img_size)
    return {
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": cast(Any, vit.norm).eps,
        "image_size": size[0] if size[0] == size[1] else size,
        "patch_size": vit.patch_embed.patch_size[0],
        "num_channels": vit.patch_embed.proj.in_channels,
        "qkv_bias": block.attn.qkv.bias is not None,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def renamed(vit: Encoder) -> Iterator[tuple[str, Tensor]]:
    """The encoder's tensors under transformers' names; what timm leaves out there is zero."""
    state, D = vit.state_dict(), vit.embed_dim
    positions = state["pos_embed"]
    without = vit.patch_embed.num_patches - positions.shape[1] + 1  # a class token may have no position
    yield "embeddings.cls_token", state["cls_token"]
    yield "embeddings.position_embeddings", F.pad(positions, (0, 0, without, 0))
    yield "embeddings.patch_embeddings.projection.weight", state["patch_embed.proj.weight"]
    yield "embeddings.patch_embeddings.projection.bias", state.get("patch_embed.proj.bias", torch.zeros(D))
    yield from ((f"layernorm.{end}", state[f"norm.{end}"]) for end in ("weight", "bias"))
    yield from of_blocks(state, "blocks.", "layers.")


def of_blocks(state: Mapping[str, Tensor], ours: str, theirs: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a stack of timm's blocks under transformers' names."""
    for name, tensor in {**zero_biases(state), **state}.items():
        if not name.startswith(ours):
            continue
        number, _, rest = name.removeprefix(ours).partition(".")
        if rest.startswith("attn.qkv."):
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{theirs}{number}.attention.{part}_proj.{rest.removeprefix('attn.qkv.')}", third.contiguous()
            continue
        for pattern, name_there in NAMES:
            rest = re.sub(f"^{pattern}", name_there, rest)
        yield f"{theirs}{number}.{rest}", tensor


def zero_biases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Biases that transformers always has, where timm may be built without them (proj_bias=False)."""
    layers = ("attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    return {f"{n.removesuffix('weight')}bias": w.new_zeros(len(w)) for n, w in state.items() if n.endswith(layers)}


# ---------------------------------------------------------------------------------------------- files


def save(model: Any, folder: Path) -> None:
    """Write a model of transformers, readable by all."""
    folder.mkdir(exist_ok=True)
    with quietly():
        model.eval().save_pretrained(folder)
    (folder / WEIGHTS).chmod(0o644)  # safetensors keeps its files to their owner; weights are to be shared


def read(kind: Any, folder: Path, **options: Any) -> Any:
    """A model of transformers in eval mode."""
    with quietly():
        return kind.from_pretrained(folder, **options).eval()


@contextmanager
def quietly() -> Iterator[None]:
    """Without the progress bars of transformers."""
    from transformers import utils

    logging: Any = utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
