from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vits import VITS, pictures, small

from miram.engine.errors import UserError
from miram.finetune.merging import merge, merge_tokens
from miram.finetune.peft import apply
from miram.finetune.peft.base import learnt

PLAIN = (
    "class token",
    "no class token",
    "registers, LayerScale",
    "average of registers",
    "not square",
    "q and k norms",
)


def features(model: torch.nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


# ---------------------------------------------------------------------------------------------- by hand


def attention_by_hand(attn: Any, x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """One image's (N, D) -> what attention adds, and the keys (N, d); every softmax written out."""
    heads, width = attn.num_heads, attn.head_dim
    parts = attn.qkv(x).reshape(len(x), 3, heads, width)
    out, keys = [], []
    for h in range(heads):
        q, k, v = attn.q_norm(parts[:, 0, h]), attn.k_norm(parts[:, 1, h]), parts[:, 2, h]
        rows = []
        for i in range(len(x)):
            weights = torch.stack([sizes[j] * torch.exp(q[i] @ k[j] / width**0.5) for j in range(len(x))])
            rows.append((weights[:, None] * v).sum(0) / weights.sum())
        out.append(torch.stack(rows))
        keys.append(k)
    return attn.proj(torch.cat(out, 1)), torch.stack(keys).mean(0)


def merge_by_hand(x: Tensor, sizes: Tensor, keys: Tensor, prefix: int, count: int) -> tuple[Tensor, Tensor]:
    """One image's tokens in lists: the `count` odd ones with the best partner join it, an even one."""
    odd, even = range(prefix + 1, len(x), 2), range(prefix, len(x), 2)

    def cosine(i: int, j: int) -> float:
        return float(keys[i] @ keys[j] / (keys[i].norm() * keys[j].norm()))

    best = {i: max(even, key=lambda j: cosine(i, j)) for i in odd}
    gone = sorted(odd, key=lambda i: -cosine(i, best[i]))[:count]
    tokens, weights = [], []
    for j in range(len(x)):
        if j not in gone:
            members = [j, *(i for i in gone if best[i] == j)]
            weights.append(sum(sizes[i] for i in members))
            tokens.append(sum(sizes[i] * x[i] for i in members) / weights[-1])
    return torch.stack(tokens), torch.stack(weights)


def by_hand(vit: Any, image: Tensor, r: int, proportional: bool) -> Tensor:
    """One image (C, H, W) -> (D,)."""
    x = vit._pos_embed(vit.patch_embed(image[None]))[0]
    sizes = torch.ones(len(x), dtype=x.dtype)
    for block in vit.blocks:
        added, keys = attention_by_hand(block.attn, block.norm1(x), sizes if proportional else torch.ones_like(sizes))
        x = x + block.ls1(added)
        x, sizes = merge_by_hand(x, sizes, keys, vit.num_prefix_tokens, r)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = vit.norm(x)
    skip = 0 if vit.pool_include_prefix else vit.num_prefix_tokens
    pooled = x[0] if vit.global_pool == "token" else (sizes[skip:, None] * x[skip:]).sum(0) / sizes[skip:].sum()
    return vit.fc_norm(pooled)


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("kind", PLAIN)
def test_merging_is_what_loops_over_tokens_make_of_its_formulas(kind: str, proportional: bool) -> None:
    vit: Any = VITS[kind]().double()
    images, r = pictures(vit).double(), 2 if kind == "not square" else 5
    found = features(merge_tokens(vit, r, proportional), images)
    with torch.no_grad():
        expected = torch.stack([by_hand(vit, image, r, proportional) for image in images])
    assert torch.allclose(found, expected, atol=1e-10)
    assert (found - features(vit, images)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", PLAIN)
def test_merging_nothing_is_the_vit_bit_by_bit(kind: str) -> None:
    vit = VITS[kind]()
    images = pictures(vit, 3)
    assert torch.equal(features(merge_tokens(vit, 0), images), features(vit, images))
    assert torch.equal(features(merge_tokens(vit, 0.0), images), features(vit, images))


def test_merging_tokens_that_are_the_same_changes_nothing_where_attention_counts_them() -> None:
    vit: Any = small(depth=3).double()
    torch.nn.init.zeros_(vit.pos_embed)
    patches = (
        torch.randn(2, 1, 4, 1, 2, 1, 16, 16).double().expand(-1, -1, -1, -1, -1, 2, -1, -1)
    )  # each twice in a row
    images = patches.permute(0, 1, 2, 3, 6, 4, 5, 7).reshape(2, 1, 64, 64)
    whole = features(vit, images)
    merged = merge_tokens(vit, 8)
    merged.merged = (8, 0, 0)  # the pairs, and nothing after them
    assert torch.allclose(features(merged, images), whole, atol=1e-12)
    merged.proportional = False
    assert (features(merged, images) - whole).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------- which tokens


def test_of_equal_scores_the_first_tokens_merge_and_order_stays() -> None:
    keys = torch.ones(1, 9, 4)
    x = torch.arange(9.0).reshape(1, 9, 1)
    means, sizes, places = merge(x, torch.ones(1, 9), keys, prefix=1, count=2)
    assert means.flatten().tolist() == pytest.approx([0, (1 + 2 + 4) / 3, 3, 5, 6, 7, 8])
    assert sizes.tolist() == [[1, 3, 1, 1, 1, 1, 1]]
    assert places.tolist() == [[0, 1, 1, 2, 1, 3, 4, 5, 6]]


def test_the_map_says_where_every_patch_went_and_sizes_count_them() -> None:
    vit = small("vit_base_patch14_reg4_dinov2", patch_size=16, depth=3)
    merged = merge_tokens(vit, 4)
    with torch.no_grad():
        tokens, sizes, places = merged.forward_features(pictures(vit))
    prefix = vit.num_prefix_tokens
    assert tokens.shape[1] == merged.left[-1] == prefix + 16 - 4 - 4 - 4
    for one, into in zip(sizes, places, strict=True):
        assert into[:prefix].tolist() == list(range(prefix)), "class and registers stay apart"
        assert np.array_equal(np.bincount(into, minlength=len(one)), one.int().numpy())


@pytest.mark.parametrize(
    ("r", "left"), [(3, (14, 11, 8)), (0.25, (13, 10, 8)), (100, (9, 5, 3)), (0.5, (9, 5, 3)), (0.01, (17, 17, 17))]
)
def test_a_block_merges_r_tokens_or_that_share_of_them_and_at_most_half(r: float, left: tuple[int, ...]) -> None:
    vit = small(depth=3)
    merged = merge_tokens(vit, r)
    assert merged.left == left
    with torch.no_grad():
        assert merged.forward_features(pictures(vit))[0].shape[1] == left[-1]


# ---------------------------------------------------------------------------------------------- what it stands on


def test_adapters_that_are_not_merged_count_as_the_merged_encoder_does() -> None:
    for method in ("lora_qkv", "ssf"):
        tuned = apply(small(), method)
        with torch.no_grad():
            for _, tensor in learnt(tuned.model):
                tensor += 0.1 * torch.randn_like(tensor)
        images = pictures(small())
        apart = features(merge_tokens(tuned.eval().model, 3), images)
        assert torch.allclose(apart, features(merge_tokens(tuned.merged(), 3), images), atol=1e-5), method


def test_the_vit_learns_through_it_and_is_left_as_it_was() -> None:
    vit = small(init_values=0.1)
    before = features(vit, pictures(vit))
    merge_tokens(vit, 4)(pictures(vit)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in vit.parameters())
    assert not any(module._forward_hooks for module in vit.modules())
    assert torch.equal(features(vit, pictures(vit)), before)


def test_half_precision_compares_and_counts_in_full() -> None:
    vit = small()
    merged = merge_tokens(vit, 4)
    images = pictures(vit)
    exact = features(merged, images)
    with torch.autocast("cpu", torch.bfloat16):
        _, sizes, _ = merged.forward_features(images)
        assert sizes.dtype == torch.float32
        assert sizes.sum(1).tolist() == [17, 17]
        assert (features(merged, images) - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("kind", sorted(set(VITS) - set(PLAIN)))
def test_encoders_without_a_place_for_it_are_refused_by_name(kind: str) -> None:
    with pytest.raises(UserError, match=r"merge_tokens: .*(Eva|Block|map)"):
        merge_tokens(VITS[kind](), 2)


@pytest.mark.parametrize("r", [-1, 0.6, -0.1, float("nan"), True])
def test_amounts_that_are_none_are_refused(r: float) -> None:
    with pytest.raises(UserError, match="no number of tokens"):
        merge_tokens(small(), r)


@pytest.mark.slow
def test_onnxruntime_says_the_same_of_any_batch(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    vit = small("vit_base_patch14_reg4_dinov2", patch_size=16, global_pool="avg")
    merged, path = merge_tokens(vit, 3).eval(), tmp_path / "merged.onnx"
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program: Any = torch.onnx.export(
        merged, (pictures(vit),), dynamo=True, dynamic_shapes=shapes, input_names=["images"], verbose=False
    )
    program.save(path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        images = pictures(vit, batch, seed=batch)
        found = session.run(None, {"images": images.numpy()})[0]
        assert np.abs(found - features(merged, images).numpy()).max() < 1e-4
