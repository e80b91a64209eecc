import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from vits import VITS, pictures, small

from miram.engine.errors import UserError
from miram.finetune.peft import apply
from miram.finetune.peft.low_rank import Dora, Ia3, Lora, classifier, from_peft
from miram.finetune.peft.shape import Shape

EVA_BIASED = "vit_small_patch16_dinov3_qkvb"  # one qkv without a bias, and the biases of q and v beside it
ALL = ["qkv", "proj", "fc1", "fc2"]


def stir(model: nn.Module, seed: int = 3) -> None:
    """Move everything that learns away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.parameters():
        if tensor.requires_grad:
            tensor.data.add_(0.2 * torch.randn(tensor.shape, generator=generator))


def stirred(method, make=small, **options):
    tuned = apply(make(), method, **options).eval()
    stir(tuned)
    return tuned


def save(tuned, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    tuned.method.write(tuned.model, tuned.method.contents(tuned.model), folder)
    return folder


def load(folder: Path, vit):
    """A folder of peft's, read by what its configuration says."""
    name, method = from_peft(json.loads((folder / "adapter_config.json").read_text()))
    tuned = apply(vit, name, **method.model_dump(mode="json")).eval()
    tuned.method.read(tuned.model, folder)
    return tuned


# ---------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (Lora(), 147_456),
        (Lora(rank=8), 294_912),
        (Lora(rank=8, targets=("qkv", "proj")), 442_368),
        (Lora(rank=8, targets=("qkv", "proj", "fc1", "fc2")), 1_179_648),
        (Dora(rank=8), 322_560),
        (Ia3(), 64_512),
    ],
)
def test_counts_on_vit_b_are_those_measured_with_peft_alone(method, count):
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    shape = Shape.of(vit)
    model = method.attach(vit.requires_grad_(False))
    assert method.expected(shape) == model.get_nb_trainable_parameters()[0] == count


@pytest.mark.parametrize(("method", "count"), [(Lora(), 221_184), (Ia3(), 43_008)])
def test_counts_where_q_k_and_v_are_apart(method, count):
    with torch.device("meta"):
        vit = timm.create_model("eva02_base_patch14_224", num_classes=0)  # SwiGLU: the FFN is 2048 wide
    shape = Shape.of(vit)
    model = method.attach(vit.requires_grad_(False))
    assert method.expected(shape) == model.get_nb_trainable_parameters()[0] == count


@pytest.mark.parametrize("kind", VITS)
@pytest.mark.parametrize("targets", [["qkv"], ["proj", "fc2"], ["fc1"], ALL])
def test_targets_hit_their_projections_and_nothing_else(kind, targets):
    tuned = apply(VITS[kind](), "lora", targets=targets, rank=2)
    names = {"qkv": {"qkv", "q_proj", "k_proj", "v_proj"}, "fc1": {"fc1", "fc1_g", "fc1_x"}}
    wanted = {name for target in targets for name in names.get(target, {target})}
    plain = VITS[kind]().blocks.named_modules(prefix="blocks")
    paths = {path for path, part in plain if isinstance(part, nn.Linear) and path.rpartition(".")[2] in wanted}
    assert set(tuned.model.targeted_module_names) == paths
    assert tuned.trainable == tuned.expected


def test_only_the_adapter_learns_also_with_checkpoints():
    gradients = []
    for checkpointing in (False, True):
        tuned = stirred("lora", targets=ALL)
        tuned.model.set_grad_checkpointing(checkpointing)
        tuned.train()(pictures(small())).square().sum().backward()
        found = {name: tensor.grad for name, tensor in tuned.named_parameters() if tensor.grad is not None}
        assert all("lora_" in name for name in found)
        gradients.append(found)
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


# ---------------------------------------------------------------------------------------------- formulas


def factors(tuned, path):
    module = tuned.model.get_submodule(f"base_model.model.{path}")
    return module.lora_A["default"].weight.data, module.lora_B["default"].weight.data


@pytest.mark.parametrize(
    ("options", "scale"),
    [({"rank": 4}, 1.0), ({"rank": 4, "alpha": 2}, 0.5), ({"rank": 4, "alpha": 2, "rslora": True}, 1.0)],
)
def test_lora_is_a_weight_with_s_b_a_more(options, scale):
    tuned, plain = stirred("lora", targets=ALL, **options), small()
    for path in dict(plain.named_modules()):
        if path.endswith(("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")):
            A, B = factors(tuned, path)
            plain.get_submodule(path).weight.data += scale * B @ A
    x = pictures(plain)
    torch.testing.assert_close(tuned(x), plain(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tuned.forward_features(x), plain.forward_features(x), atol=1e-4, rtol=1e-4)


def test_dora_is_a_weight_whose_rows_have_the_learnt_lengths():
    tuned, plain = stirred("dora"), small()
    for i in range(2):
        A, B = factors(tuned, f"blocks.{i}.attn.qkv")
        length = tuned.model.get_submodule(f"base_model.model.blocks.{i}.attn.qkv").lora_magnitude_vector["default"]
        weight = plain.blocks[i].attn.qkv.weight.data + B @ A
        plain.blocks[i].attn.qkv.weight.data = length.weight.data[:, None] * weight / weight.norm(dim=1, keepdim=True)
    x = pictures(plain)
    torch.testing.assert_close(tuned(x), plain(x), atol=1e-4, rtol=1e-4)


def test_ia3_scales_what_qkv_gives_and_what_fc2_reads():
    tuned, plain = stirred("ia3"), small()
    for i, block in enumerate(plain.blocks):
        part = tuned.model.base_model.model.blocks[i]
        scales = part.attn.qkv.ia3_l["default"].data
        assert scales.shape == (3 * 48, 1)
        block.attn.qkv.weight.data *= scales
        block.attn.qkv.bias.data *= scales[:, 0]
        block.mlp.fc2.weight.data *= part.mlp.fc2.ia3_l["default"].data
    x = pictures(plain)
    torch.testing.assert_close(tuned(x), plain(x), atol=1e-4, rtol=1e-4)


def test_an_adapter_on_eva_with_biases_beside_qkv_is_not_passed_by():
    def make():
        return small(EVA_BIASED, init_values=1.0)

    x = pictures(make())
    for method in ("lora", "dora", "ia3"):
        tuned = stirred(method, make)
        changed = tuned(x)
        assert (changed - make()(x)).abs().max() > 1e-3
        torch.testing.assert_close(tuned.merged()(x), changed, atol=1e-5, rtol=1e-5)
    alone = get_peft_model(make(), LoraConfig(target_modules=["qkv"]))  # the trap, if no one says so to EVA
    stir(alone)
    assert torch.equal(alone(x), make()(x))


@pytest.mark.parametrize("kind", ["class token", "SwiGLU", "things in parallel"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_merged_is_a_plain_timm_encoder_that_computes_the_same(kind, method):
    tuned, plain = stirred(method, VITS[kind]), VITS[kind]()
    x = pictures(plain)
    before = tuned(x)
    merged = tuned.merged()
    assert [(name, type(part)) for name, part in merged.named_modules()] == [
        (name, type(part)) for name, part in plain.named_modules()
    ]
    plain.load_state_dict(merged.state_dict())
    torch.testing.assert_close(merged(x), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain(x), before, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- peft's files

READER = """
import sys, timm, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
folder, *adapters = sys.argv[1:]
features = {}
for adapter in adapters:
    shape = dict(depth=2, embed_dim=48, num_heads=3, img_size=64, in_chans=1)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **shape)
    vit.load_state_dict(load_file(folder + "/vit.safetensors"))
    model = PeftModel.from_pretrained(vit.eval(), adapter)
    with torch.no_grad():
        features[adapter] = model(load_file(folder + "/images.safetensors")["images"]).contiguous()
assert not any(name.startswith("miram") for name in sys.modules)
save_file(features, folder + "/features.safetensors")
"""


def test_plain_peft_in_another_process_gives_bit_for_bit_what_we_do(tmp_path):
    options = {"lora": {"targets": ALL, "rank": 3, "alpha": 2}, "dora": {"dropout": 0.5}, "ia3": {}}
    save_file(small().state_dict(), tmp_path / "vit.safetensors")
    x = pictures(small())
    save_file({"images": x}, tmp_path / "images.safetensors")
    wanted = {}
    for method in options:
        tuned = stirred(method, **options[method])
        wanted[str(save(tuned, tmp_path / method))] = tuned(x)
    subprocess.run([sys.executable, "-c", READER, tmp_path, *wanted], check=True, cwd=tmp_path)
    found = load_file(tmp_path / "features.safetensors")
    assert all(torch.equal(found[folder], wanted[folder]) for folder in wanted)
    assert not torch.equal(found[str(tmp_path / "lora")], small()(x))


FOREIGN = {
    "a regular expression": LoraConfig(r=8, target_modules=r"blocks\.\d+\.attn\.(qkv|proj)"),
    "the last block": LoraConfig(r=2, target_modules=r"blocks\.1\.mlp\.fc1", use_rslora=True, lora_alpha=3),
    "names that hit the patches too": LoraConfig(r=8, lora_alpha=16, target_modules=["qkv", "proj"]),
    "a layer": LoraConfig(r=3, target_modules=["qkv"], layers_to_transform=[0], layers_pattern="blocks"),
    "ranks and scales by name": LoraConfig(
        r=4,
        target_modules=["fc1", "fc2"],
        rank_pattern={"fc2": 2},
        alpha_pattern={"fc2": 7},
        exclude_modules=["blocks.0.mlp.fc1"],
    ),
    "Gaussian start": LoraConfig(r=4, target_modules=["qkv"], init_lora_weights="gaussian", lora_dropout=0.1),
    "all linear": LoraConfig(r=2, target_modules="all-linear"),
    "DoRA": LoraConfig(r=8, target_modules=["fc1"], use_dora=True),
    "IA3": IA3Config(target_modules=["qkv", "fc1", "fc2"], feedforward_modules=["fc1"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_plain_peft_saved_is_read(kind, tmp_path):
    theirs = get_peft_model(small(), FOREIGN[kind]).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path, small())
    x = pictures(small())
    assert torch.equal(ours(x), theirs(x))
    assert not torch.equal(ours(x), small()(x))
    assert ours.trainable == theirs.get_nb_trainable_parameters()[0]
    again = load(save(ours, tmp_path / "again"), small())
    assert torch.equal(again(x), theirs(x))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"targets": ["fc2", "qkv"], "rank": 3, "alpha": 5, "dropout": 0.5, "rslora": True}, "class token"),
        ({"targets": ["qkv"]}, "SwiGLU"),
    ],
)
def test_our_own_configuration_is_recognised(options, kind, tmp_path):
    tuned = apply(VITS[kind](), "lora", **options)
    name, method = from_peft(json.loads((save(tuned, tmp_path) / "adapter_config.json").read_text()))
    assert name == "lora"
    assert method.expected(tuned.shape) == tuned.expected
    assert method.model_dump(exclude={"targets"}) == {"alpha": 4} | tuned.method.model_dump(
        exclude={"targets"}, exclude_none=True
    )
    assert set(method.targets) == set(options["targets"] if kind == "class token" else "qkv")


def test_peft_names_of_qkv_alone_keep_the_closed_form():
    config = LoraConfig(r=8, target_modules=["qkv"]).to_dict()
    assert from_peft(config) == ("lora", Lora(rank=8, alpha=8))
    assert from_peft(config | {"use_dora": True}) == ("dora", Dora(rank=8, alpha=8))
    tuned = apply(small(), "lora", peft={"target_modules": r".*\.1\.attn\.qkv"})
    assert (tuned.trainable, tuned.expected) == (4 * 4 * 48, None)


def test_a_head_that_peft_saved_is_handed_out(tmp_path):
    theirs = get_peft_model(small(num_classes=3), LoraConfig(target_modules=["qkv"], modules_to_save=["head"])).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path, small(num_classes=3))
    ours.set_head(3)
    ours.head.load_state_dict(classifier(tmp_path, 48))
    x = pictures(small())
    assert ours(x).shape == (2, 3)
    assert torch.equal(ours(x), theirs(x))
    assert classifier(save(ours, tmp_path / "ours"), 48) == {}


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_the_files_are_what_peft_itself_would_write(method, tmp_path):
    tuned = stirred(method)
    ours = save(tuned, tmp_path / "ours")
    tuned.model.save_pretrained(tmp_path / "theirs")
    assert sorted(path.name for path in ours.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    texts = [(tmp_path / who / "adapter_config.json").read_text() for who in ("ours", "theirs")]
    assert texts[0] == texts[1]
    assert not any(str(place) in texts[0] for place in (Path.home(), tmp_path, Path.cwd()))
    bytes_of = [(tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("ours", "theirs")]
    assert bytes_of[0] == bytes_of[1]


def test_loading_does_not_change_the_frozen_encoder_and_gives_the_tensors_exactly(tmp_path):
    tuned = stirred("dora", targets=ALL)
    folder = save(tuned, tmp_path)
    again = apply(small(), "dora", targets=ALL)
    again.method.read(again.model, folder)
    pairs = zip(tuned.named_parameters(), again.named_parameters(), strict=True)
    assert all(one == other and torch.equal(a, b) for (one, a), (other, b) in pairs)


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LOHA"}, "LOHA; only LORA"),
        ({"modules_to_save": ["head", "norm"]}, "only \\['head'\\] is taken"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the encoder's own weights"),
        ({"bias": "all"}, "bias='all', which is not taken"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"key_of_another_year": 3}, "key_of_another_year=3"),
        ({"target_modules": None}, "no target_modules"),
        ({"r": "many"}, "rank"),
    ],
)
def test_a_configuration_that_means_something_else_is_refused(change, words):
    config = json.loads(json.dumps(LoraConfig(r=8).to_dict())) | {"target_modules": ["qkv"]}
    from_peft(config)
    with pytest.raises(UserError, match=words):
        from_peft(config | change)


def test_adapters_of_another_rank_or_encoder_and_pickles_are_refused(tmp_path):
    folder = save(stirred("lora"), tmp_path)
    for vit, options in ((small(), {"rank": 3}), (small(depth=3), {}), (small(), {"targets": ["qkv", "fc1"]})):
        other = apply(vit, "lora", **options)
        with pytest.raises(UserError, match="does not fit this encoder and these options: base_model"):
            other.method.read(other.model, folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="can run code"):
        other.method.read(other.model, folder)


def test_encoders_without_the_projection_are_refused():
    with pytest.raises(UserError, match="no projection q; it has qkv, proj, fc1, fc2; lora_qkv"):
        apply(small(), "lora", targets=["q"])
    with pytest.raises(UserError, match="ParallelScalingBlocks with no projections of their own"):
        apply(small("vit_base_patch16_xp_224"), "lora")
    tuned = apply(small(), "lora", targets=["qkv", "proj", "fc1", "fc2"])
    with pytest.raises(UserError, match="tuned with lora already"):
        apply(tuned.model.get_base_model(), "dora")
    with pytest.raises(UserError, match=r"peft cannot take .*nowhere"):
        apply(small(), "lora", peft={"target_modules": "nowhere"})
    with pytest.raises(UserError, match="peft cannot take"):
        apply(small(), "lora", peft={"target_modules": "(", "feedforward_modules": "fc1"})
    with pytest.raises(UserError, match="targets"):
        apply(small(), "lora", targets=["patch_embed"])


def test_projections_that_are_apart_can_be_named_one_by_one():
    tuned = apply(VITS["SwiGLU"](), "lora", targets=["q", "v"])
    assert tuned.trainable == tuned.expected == 2 * 2 * 2 * 4 * 48


def test_fewer_keys_than_queries_have_no_closed_form_but_work():
    def make():
        return small("vit_base_patch16_rope_224", qkv_fused=False, num_kv_heads=1)

    tuned = stirred("lora", make)
    x = pictures(make())
    before = tuned(x)
    assert (tuned.expected, tuned.trainable) == (None, 2 * 4 * (48 + 48 + 2 * (48 + 16)))
    assert apply(make(), "lora", targets=["q", "fc1"]).expected == 2 * 4 * (96 + 240)
    assert apply(make(), "ia3").expected is None
    torch.testing.assert_close(tuned.merged()(x), before, atol=1e-5, rtol=1e-5)
