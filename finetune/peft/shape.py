"""The letters of the closed forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from timm.layers.mlp import GluMlp, SwiGLU
from timm.layers.patch_embed import PatchEmbed
from torch import nn

from ...engine.errors import UserError
from ...pretrain.encoder import Encoder


@dataclass(frozen=True)
class Shape:
    """What the closed forms are made of, read off an encoder before it is changed: its settings, never its counts."""

    D: int  # width
    L: int  # blocks
    A: int  # width of all heads together: D but in a few
    H: int  # hidden width of the FFN
    d: int  # width of a head
    p: int  # side of a patch, in pixels
    C: int  # input channels
    N: int  # patches
    prefix: int  # class and register tokens
    positions: int  # tokens that have an absolute position
    fused: bool = True  # q, k and v are one projection
    grouped: bool = False  # some blocks have fewer keys and values than queries
    branches: int = 1  # attention halves, and FFN halves, of a block
    gates: int = 1  # H-wide projections in an FFN: 2 in a gated one
    joined: bool = False  # the gated FFN's two projections are one
    patch_bias: bool = True
    qkv_biases: int = 3  # how many of q, k and v have a bias
    outer_norms: int = 1  # norms of tokens outside the blocks
    qk_norms: int = 0  # norms of q and k, of width d
    ffn_norms: int = 0  # norms within the FFN, of width H
    scaled: bool = False  # LayerScale
    plain: bool = True  # nothing in it that these letters do not tell

    @classmethod
    def of(cls, vit: Encoder) -> Shape:
        """Of a ViT; of blocks that make attention and FFN in one step, A, d and H are those of the step.

        Raises:
            UserError: it is a hybrid of another make, and these letters mean nothing in it.
        """
        block = cast(Any, vit.blocks[0])
        attention, mlp = _first(block, "num_heads"), _first(block, "fc2")
        if not isinstance(vit.patch_embed.proj, nn.Conv2d) or not (mlp or hasattr(block, "in_proj")):
            name = cast(Any, vit).pretrained_cfg.get("architecture", "it")
            raise UserError(f"{name} is no plain ViT: its patches or FFNs are made otherwise; choose another encoder")
        head_dim = attention.head_dim
        norms = [part for name in ("norm_pre", "norm", "fc_norm") for part in [getattr(vit, name)] if _learns(part)]
        return cls(
            D=vit.embed_dim,
            L=len(vit.blocks),
            A=attention.num_heads * head_dim * (1 + hasattr(attention, "lambda_init")),  # differential: two of d a head
            H=mlp.fc2.in_features if mlp else block.in_proj.out_features - 3 * vit.embed_dim,
            d=head_dim,
            p=vit.patch_embed.patch_size[0],
            C=vit.patch_embed.proj.in_channels,
            N=vit.patch_embed.num_patches,
            prefix=vit.num_prefix_tokens,
            positions=0 if vit.pos_embed is None else vit.pos_embed.shape[1],
            fused=getattr(attention, "qkv", None) is not None,
            grouped=_grouped(vit),
            branches=len(getattr(block, "attns", [0])),
            gates=2 if isinstance(mlp, GluMlp | SwiGLU) else 1,
            joined=isinstance(mlp, GluMlp),
            patch_bias=vit.patch_embed.proj.bias is not None,
            qkv_biases=_qkv_biases(attention),
            outer_norms=len(norms),
            qk_norms=sum(_learns(getattr(attention, name, None)) for name in ("q_norm", "k_norm")),
            ffn_norms=int(mlp is not None and _learns(mlp.norm)),
            scaled=any(name.endswith(("ls1.gamma", "gamma_1", "ls.gamma")) for name, _ in block.named_parameters()),
            plain=_plain(vit, block, attention, mlp, norms),
        )

    def linear(self, role: str) -> tuple[int, int]:
        """Inputs and outputs of the projection of a role: q, k, v, qkv, proj, fc1 or fc2."""
        D, A, H = self.D, self.A, self.H
        outputs = {"q": A, "k": A, "v": A, "qkv": 3 * A, "fc1": 2 * H if self.joined else H, "proj": D, "fc2": D}
        return {"proj": A, "fc2": H}.get(role, D), outputs[role]


def _first(module: nn.Module, attribute: str) -> Any:
    return next((part for part in module.modules() if hasattr(part, attribute)), None)


def _grouped(vit: Encoder) -> bool:
    return any(getattr(part, "num_kv_groups", 1) > 1 for part in vit.modules())


def _learns(module: Any) -> bool:
    return isinstance(module, nn.Module) and any(True for _ in module.parameters())


def _qkv_biases(attention: Any) -> int:
    """Of a fused projection all or none; EVA's keys have none, be they fused or apart."""
    if getattr(attention, "q_bias", None) is not None:
        return 2
    parts = [getattr(attention, name, None) for name in ("qkv", "q_proj", "k_proj", "v_proj")]
    return sum(3 if part is parts[0] else 1 for part in parts if part is not None and part.bias is not None)


def _plain(vit: Encoder, block: nn.Module, attention: Any, mlp: Any, norms: list[nn.Module]) -> bool:
    """Whether the letters tell every tensor: no map pooling, stem, learnt rotation or gate, as many keys as queries."""
    unusual = (
        mlp is None,
        _grouped(vit),
        type(vit.patch_embed) is not PatchEmbed or _learns(vit.patch_embed.norm),
        _learns(getattr(vit, "attn_pool", None)) or _learns(getattr(vit, "rope", None)),
        hasattr(attention, "lambda_q1") or getattr(attention, "gate", None) is not None,
        _learns(getattr(attention, "norm", None)),
        any(not isinstance(norm, nn.LayerNorm) or norm.bias is None for norm in norms),
        any(part.bias is None for part in (getattr(attention, "proj", None), getattr(mlp, "fc2", None)) if part),
    )
    return not any(unusual)
