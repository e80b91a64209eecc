import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from vits import VITS, pictures, small

from miram.engine.errors import UserError
from miram.finetune.peft import apply
from miram.finetune.peft.lora_qkv import LoraQkv
from miram.finetune.peft.shape import Shape

KINDS = {
    **VITS,
    "differential": lambda: small(attn_layer="diff"),
    "EVA, fused, biases beside": lambda: small("vit_small_patch16_dinov3_qkvb", init_values=1.0),
    "fewer keys": lambda: small("vit_base_patch16_rope_224", qkv_fused=False, num_kv_heads=1),
}


def stirred(make=small, **options):
    tuned = apply(make(), "lora_qkv", **options).eval()
    generator = torch.Generator().manual_seed(3)
    for tensor in tuned.parameters():
        if tensor.requires_grad:
            tensor.data.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return tuned


def add_by_hand(plain, tuned, scale: float) -> None:
    """W[rows of the slice] += scale B A, by the names in the state dict alone."""
    state = tuned.model.state_dict()
    for name in [name for name in state if ".lora.A." in name]:
        path, letter = name.split(".lora.A.")
        weight, B = plain.get_submodule(path).weight.data, state[name.replace(".A.", ".B.")]
        first = "qkv".index(letter) * len(weight) // 3 if path.endswith(".qkv") else 0
        weight[first : first + len(B)] += scale * B @ state[name]


@pytest.mark.parametrize(("targets", "count"), [("qk", 147_456), ("qv", 147_456), ("qkv", 221_184), ("v", 73_728)])
@pytest.mark.parametrize("name", ["vit_base_patch16_224", "eva02_base_patch14_224"])
def test_counts_on_vit_b_fused_and_apart(name, targets, count):
    with torch.device("meta"):
        vit = timm.create_model(name, num_classes=0).requires_grad_(False)
    method = LoraQkv(targets=targets)
    shape = Shape.of(vit)
    method.attach(vit)
    assert method.expected(shape) == sum(p.numel() for p in vit.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("options", "scale"), [({"targets": "qkv"}, 1.0), ({"targets": "qv", "alpha": 1}, 0.25)])
def test_each_slice_gets_its_own_b_a_on_every_kind_of_attention(kind, options, scale):
    tuned, plain = stirred(KINDS[kind], **options), KINDS[kind]()
    x = pictures(plain)
    untouched = plain(x)
    add_by_hand(plain, tuned, scale)
    torch.testing.assert_close(tuned(x), plain(x), atol=1e-4, rtol=1e-4)
    assert (tuned(x) - untouched).abs().max() > 1e-3
    merged = tuned.merged()
    assert merged.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name])


@pytest.mark.parametrize("targets", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
def test_what_is_not_chosen_stays_bit_by_bit(targets):
    outputs = []
    tuned, plain = stirred(targets=targets), small()
    for vit in (tuned.model, plain):
        vit.blocks[0].attn.qkv.register_forward_hook(lambda _, inputs, output: outputs.append(output))
        vit(pictures(plain))
    changed, frozen = (output.chunk(3, dim=-1) for output in outputs)
    same = [torch.equal(one, other) for one, other in zip(changed, frozen, strict=True)]
    assert same == [letter not in targets for letter in "qkv"]
    weights = (vit.blocks[0].attn.qkv.weight.chunk(3) for vit in (tuned.merged(), plain))
    assert [torch.equal(one, other) for one, other in zip(*weights, strict=True)] == same


def test_the_output_of_qkv_is_not_edited_in_place():
    vit, seen = small(), []
    vit.blocks[0].attn.qkv.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    tuned = apply(vit, "lora_qkv")
    for tensor in tuned.parameters():
        tensor.data.add_(0.1 * tensor.requires_grad)
    tuned(pictures(vit))
    ((x, output),) = seen
    qkv = vit.blocks[0].attn.qkv
    assert torch.equal(output, nn.functional.linear(x, qkv.weight, qkv.bias))


def test_a_starts_kaiming_uniform_and_b_at_zero():
    change = apply(small(embed_dim=192), "lora_qkv", rank=64).model.blocks[1].attn.qkv.lora
    bound = (6 / ((1 + 5) * 192)) ** 0.5
    for letter in "qkv":
        A = change.A[letter]
        assert A.shape == (64, 192)
        assert not change.B[letter].any()
        assert 0.99 * bound < A.abs().max() <= bound
        assert abs(A.std().item() / (bound / 3**0.5) - 1) < 0.02
    assert not torch.equal(change.A["q"], change.A["k"])


def test_dropout_is_of_what_a_reads_and_of_training_only():
    tuned = stirred(dropout=0.5)
    x = pictures(small())
    assert torch.equal(tuned(x), tuned(x))
    assert not torch.equal(tuned.train()(x), tuned(x))
    for name, tensor in tuned.named_parameters():
        if ".lora.B." in name:
            tensor.data.zero_()
    assert torch.equal(tuned.train()(x), small()(x))


def test_bfloat16_encoders_and_autocast_work():
    tuned = stirred()
    x = pictures(small())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(tuned(x), tuned.model.float()(x), atol=0.1, rtol=0.1)
    half = apply(small().bfloat16(), "lora_qkv")
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.merged().blocks[0].attn.qkv.weight.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------- beside peft


@pytest.mark.parametrize("targets", ["qk", "v", "qkv"])
def test_it_equals_peft_on_an_encoder_whose_projections_are_apart(targets):
    def make(fused):
        return small("eva02_base_patch14_224", patch_size=16, qkv_fused=fused)

    tuned, apart = stirred(lambda: make(True), targets=targets, alpha=6), make(False)
    theirs = get_peft_model(apart, LoraConfig(r=4, lora_alpha=6, target_modules=[f"{t}_proj" for t in targets])).eval()
    ours = tuned.model.state_dict()
    with torch.no_grad():
        for name, tensor in [*apart.named_parameters()]:
            if (plain := name.replace(".base_layer", "")) in ours:
                tensor.copy_(ours[plain])
        for i, block in enumerate(apart.blocks):
            path = f"blocks.{i}.attn"
            weights = dict(zip("qkv", ours[f"{path}.qkv.weight"].chunk(3), strict=True))
            for letter, weight in weights.items():
                part = block.attn.get_submodule(f"{letter}_proj")
                part.weight.copy_(weight)
                if letter in "qv":
                    part.bias.copy_(ours[f"{path}.{letter}_bias"])
                if letter in targets:
                    part.lora_A["default"].weight.copy_(ours[f"{path}.qkv.lora.A.{letter}"])
                    part.lora_B["default"].weight.copy_(ours[f"{path}.qkv.lora.B.{letter}"])
    x = pictures(apart)
    torch.testing.assert_close(tuned(x), theirs(x), atol=1e-5, rtol=1e-5)
    assert tuned.trainable == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    "kind", ["class token", "q and k norms", "SwiGLU", "things in parallel", "EVA, fused, biases beside"]
)
@pytest.mark.parametrize("targets", ["qv", "k", "qkv"])
def test_as_peft_it_is_read_by_plain_peft_and_computes_the_same(kind, targets, tmp_path):
    tuned = stirred(KINDS[kind], targets=targets, rank=3, alpha=2).double()
    tuned.method.as_peft(tuned.model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    vit = KINDS[kind]().double()
    for part in vit.modules():
        if hasattr(part, "qkv_bias_separate"):
            part.qkv_bias_separate = True
    x = pictures(vit).double()
    untouched = vit(x)
    theirs = PeftModel.from_pretrained(vit, tmp_path).eval()
    torch.testing.assert_close(theirs(x), tuned(x), atol=1e-12, rtol=1e-12)
    assert (theirs(x) - untouched).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("targets", ["", "kq", "qq", "x", "proj"])
def test_targets_are_a_choice_of_the_letters(targets):
    with pytest.raises(UserError, match="targets"):
        apply(small(), "lora_qkv", targets=targets)


def test_attention_that_is_not_known_is_refused():
    class Other(nn.Module):
        def __init__(self, old):
            super().__init__()
            self.qkv, self.num_heads, self.head_dim = old.qkv, old.num_heads, old.head_dim

    vit = small()
    vit.blocks[0].attn = Other(vit.blocks[0].attn)
    with pytest.raises(UserError, match="where q, k and v lie in the encoder's Other is not known"):
        apply(vit, "lora_qkv")
    with pytest.raises(UserError, match="tuned with lora_qkv already"):
        apply(apply(small(), "lora_qkv").model, "lora_qkv")
    with pytest.raises(UserError, match="ParallelScalingBlocks"):
        apply(small("vit_base_patch16_xp_224"), "lora_qkv")
