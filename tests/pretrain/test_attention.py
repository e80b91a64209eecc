"""What holds for every attention variant: shapes, independence, precision, recomputation, compilation, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miram.pretrain.attention import ATTENTIONS, build_attention

DIM, HEADS, GRID = 32, 4, (6, 5)
SMALL: dict[str, dict[str, object]] = {
    "nystrom": {"num_landmarks": 6},
    "agent": {"num_agents": 6},
    "window": {"window": 3, "shift": True},
    "performer": {"num_features": 16},
    "linformer": {"num_projected": 6},
}


def build(name: str, prefix: int = 1, dim: int = DIM, heads: int = HEADS, grid: tuple[int, int] = GRID) -> nn.Module:
    torch.manual_seed(0)
    return build_attention(name, dim, heads, grid, prefix, **SMALL.get(name, {}))


def tokens(prefix: int = 1, batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, prefix + 30, DIM, generator=torch.Generator().manual_seed(seed))


def gradients(module: nn.Module, x: Tensor, run: object = None) -> list[Tensor]:
    """Output, and what a fixed weighing of it gives as gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    out = (module if run is None else run)(x)  # type: ignore[operator]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return [out, *torch.autograd.grad((out.float() * weights).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_tokens_in_tokens_out_and_every_weight_is_trained(name: str, prefix: int) -> None:
    module, x = build(name, prefix), tokens(prefix)
    out, *grads = gradients(module, x)
    assert out.shape == x.shape
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_token_has_a_say(name: str, prefix: int) -> None:
    """Each input token reaches an output, and each output token hears of one."""
    module, x = build(name, prefix).double(), tokens(prefix, batch=1).double()
    jacobian = torch.autograd.functional.jacobian(lambda one: module(one).sum(-1)[0], x)[:, 0].abs().sum(-1)
    assert jacobian.sum(0).min() > 1e-9
    assert jacobian.sum(1).min() > 1e-9


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_sample_never_depends_on_its_batch(name: str) -> None:
    module, x = build(name).eval(), tokens()
    loud = x.clone()
    loud[1] *= 6
    torch.testing.assert_close(module(loud)[0], module(x)[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(module(x[:1])[0], module(x)[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "softmax"])
def test_weights_of_softmax_load_into_every_variant(name: str) -> None:
    softmax, module = build("softmax"), build(name)
    with torch.no_grad():
        for weight in softmax.parameters():
            weight.add_(1)
    missing, unexpected = module.load_state_dict(softmax.state_dict(), strict=False)
    assert unexpected == []
    assert not [key for key in missing if key.startswith(("qkv", "proj"))]
    assert torch.equal(module.qkv.weight, softmax.qkv.weight)
    assert torch.equal(module.proj.bias, softmax.proj.bias)


@pytest.mark.parametrize("name", ["nystrom", "agent"])
def test_the_depthwise_branch_is_called_conv(name: str) -> None:
    extra = set(build(name).state_dict()) - set(build("softmax").state_dict())
    assert extra == {"conv.weight"}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_bf16_autocast_stays_within_two_percent_and_its_gradients_within_four(name: str) -> None:
    """bf16 rounds to 0.4 %; a handful of roundings in a row, and twice as many on the way back."""
    module = build(name)

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    exact, rounded = gradients(module, tokens()), gradients(module, tokens(), autocast)
    assert rounded[0].dtype == torch.bfloat16
    for bound, a, b in zip([0.02] + [0.04] * 20, exact, rounded, strict=False):
        assert (a - b.float()).norm() < bound * a.norm()


@pytest.mark.parametrize("name", ATTENTIONS)
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    module = build(name)
    kept = gradients(module, tokens())
    again = gradients(module, tokens(), lambda x: checkpoint(module, x, use_reentrant=False))
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def compiled_agrees(name: str, backend: str) -> None:
    torch.compiler.reset()
    module = build(name)
    compiled = gradients(module, tokens(), torch.compile(module, backend=backend))
    for a, b in zip(gradients(module, tokens()), compiled, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_torch_compile_traces_it(name: str) -> None:
    compiled_agrees(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTIONS)
def test_torch_compile_compiles_it(name: str) -> None:
    compiled_agrees(name, "inductor")


@pytest.mark.parametrize("grid", [(3, 4), (5, 2)])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_gradients_are_those_of_finite_differences(name: str, grid: tuple[int, int]) -> None:
    module = build(name, 1, dim=4, heads=2, grid=grid).double()
    x = torch.randn(2, 1 + grid[0] * grid[1], 4, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    assert torch.autograd.gradcheck(module, (x.requires_grad_(),), atol=1e-6, fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda weight: torch.func.functional_call(module, {"qkv.weight": weight}, (x.detach(),)),
        (module.qkv.weight,),
        atol=1e-6,
        fast_mode=True,
    )


@pytest.mark.parametrize("name", ATTENTIONS)
def test_backward_keeps_hardly_more_than_its_inputs(name: str) -> None:
    """x, Q, K, V and what `proj` reads are five numbers a channel and token; the landmarks come on top."""
    module, side = build_attention(name, 32, 2, (48, 48), 1, **SMALL.get(name, {})), 48
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return saved

    x = torch.randn(1, 1 + side * side, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        out = module(x)
    assert out.requires_grad
    assert sum(storage.nbytes() for storage in kept.values()) < 5.2 * x.nbytes


def test_unknown_name_and_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="softmax"):
        build_attention("sofmax", DIM, HEADS, GRID)
    for name in ATTENTIONS:
        with pytest.raises(ValueError, match="multiple of 5"):
            build_attention(name, DIM, 5, GRID)
