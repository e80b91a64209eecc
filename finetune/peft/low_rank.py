"""LoRA, DoRA and IA3 through the peft library, in its own files.

FOLDER/adapter_config.json         {"peft_type": "LORA" or "IA3", "r", "lora_alpha", "target_modules", …}
FOLDER/adapter_model.safetensors   base_model.model.PATH.lora_A.weight (r, in), .lora_B.weight (out, r), of DoRA
                                   .lora_magnitude_vector (out,); of IA3 .ia3_l (out, 1), or (1, in) of an FFN

`peft.PeftModel.from_pretrained(vit, FOLDER)` reads them. Of an EVA whose q, k and v are one projection, set
`qkv_bias_separate` of every attention first, or the adapter is passed by without a word (see `blocks.linears`).

peft takes seconds to import, so functions import it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, PositiveFloat
from safetensors.torch import save_file
from torch import Tensor, nn

from ...engine.config import check
from ...engine.errors import UserError, one_line
from ...engine.tensors import read_tensors
from ...pretrain.encoder import Encoder
from .base import Method, Size
from .blocks import ROLES, linears
from .shape import Shape

Role = Literal["qkv", "q", "k", "v", "proj", "fc1", "fc2"]
Fraction = Annotated[float, Field(ge=0, lt=1)]

PEFT_WEIGHTS, PICKLED, PREFIX = "adapter_model.safetensors", "adapter_model.bin", "base_model.model."
CLASSIFIER = PREFIX + "head."  # timm's, which peft saves where it is among modules_to_save
IN_BLOCKS = r"blocks\..+\.(?:attn|mlp)\."

# Keys of peft's configuration: those our options stand for, those passed on as they are, those that change nothing.
OPTIONS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora"}
Key = Literal[
    "target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern",
]  # fmt: skip
PASSED: tuple[Key, ...] = Key.__args__  # type: ignore[attr-defined]
SILENT = {
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "init_ia3_weights", "eva_config", "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config",
}  # fmt: skip
STARTS = (True, False, "gaussian", "eva", "orthogonal")  # the other ways to start change the encoder's own weights


class PeftMethod(Method):
    """A method of the peft library on the projections of the blocks."""

    merges: ClassVar[bool] = True

    peft: dict[Key, Any] = {}
    """keys of peft's own configuration that overrule the other options, e.g. {"target_modules": REGEX}; with any of
    them there is no closed form"""

    def roles(self, fused: bool) -> set[str]:
        """The projections that change, where q, k and v are one projection or three."""
        raise NotImplementedError

    def config(self, roles: set[str]) -> Any:
        """peft's configuration."""
        raise NotImplementedError

    def numbers(self, role: str, inputs: int, outputs: int) -> int:
        """How many learn for one projection."""
        raise NotImplementedError

    def attach(self, vit: Encoder) -> nn.Module:
        """Put peft's layers in the place of the projections."""
        from peft import get_peft_model

        found = linears(vit)
        roles = self.roles("qkv" in found.values())
        if "target_modules" not in self.peft:
            require(vit, found, roles)
        try:
            model = get_peft_model(cast(Any, vit), self.config(roles))
        except (ValueError, TypeError, AttributeError, re.error) as error:  # of what the user says in `peft`
            raise UserError(f"peft cannot take {self.peft} on this encoder: {one_line(str(error))[:300]}") from error
        hit = set(model.base_model.targeted_module_names)
        assert self.peft or hit == {path for path, role in found.items() if role in roles}
        return cast(nn.Module, model)

    def expected(self, shape: Shape) -> int | None:
        """L branches times the numbers of each projection; the gated FFN's fc1 are two, or one of twice the width."""
        roles = self.roles(shape.fused)
        if self.peft or (shape.grouped and roles & {"k", "v"}):
            return None
        count = {"fc1": 1 if shape.joined else shape.gates}
        return shape.L * shape.branches * sum(count.get(r, 1) * self.numbers(r, *shape.linear(r)) for r in roles)

    def merged(self, model: nn.Module) -> Encoder:
        """The encoder with the change in its projections, which are timm's own again."""
        return cast(Encoder, cast(Any, model).merge_and_unload().requires_grad_(False))

    def contents(self, model: nn.Module) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(cast(Any, model), save_embedding_layers=False))

    def write(self, model: nn.Module, contents: Mapping[str, Tensor], folder: Path) -> None:
        """Write peft's two files."""
        peft = cast(Any, model)
        write_files(peft.peft_config["default"], contents, peft.get_base_model(), folder)

    def read(self, model: nn.Module, folder: Path) -> None:
        """Read what `write`, or peft, wrote; a head in it is left to `classifier`.

        Raises:
            UserError: the names or shapes are not those of this model, or the file is no safetensors.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        tensors = {name: tensor for name, tensor in _tensors(folder).items() if not name.startswith(CLASSIFIER)}
        wanted = get_peft_model_state_dict(cast(Any, model), save_embedding_layers=False)
        here, there = ({(name, tensor.shape) for name, tensor in each.items()} for each in (wanted, tensors))
        if odd := sorted({name for name, _ in here ^ there}):
            raise UserError(
                f"{folder / PEFT_WEIGHTS} does not fit this encoder and these options: {', '.join(odd[:4])} differ"
            )
        set_peft_model_state_dict(cast(Any, model), tensors)


class Lora(PeftMethod):
    """Low-rank adaptation: W x + s B A x, s = alpha / rank (Hu et al. 2021, arXiv 2106.09685).

    B starts at 0, so the first step is the encoder's; A is Kaiming-uniform with a = sqrt 5. rank (in + out) numbers for
    each projection: of a fused qkv 4 rank D a block, as many as q and v apart would have (147,456 of ViT-B at rank 4),
    since q, k and v then share one A; `lora_qkv` keeps them apart.

    Public code: MeLo's s is alpha // rank, 0 where alpha < rank; V-PETL Bench starts v with A = B = 0, so that v never
    learns; SAViT's start overwrites B = 0. Names like "proj", given to peft, hit patch_embed.proj too.
    """

    rank: Size = 4
    """inner width of the change"""
    alpha: PositiveFloat | None = None
    """the change is scaled by alpha / rank; null: as rank"""
    dropout: Fraction = 0.0
    """of what A reads, in training"""
    targets: Annotated[tuple[Role, ...], Field(min_length=1)] = ("qkv",)
    """projections that change: qkv (all three, one projection or not), proj, fc1, fc2; q, k, v where they are apart"""
    rslora: bool = False
    """scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv 2312.03732)"""

    dora: ClassVar[bool] = False

    def roles(self, fused: bool) -> set[str]:
        """The targets, qkv being q, k and v where they are apart."""
        targets: set[str] = {*self.targets}
        return targets if fused or "qkv" not in targets else targets - {"qkv"} | {"q", "k", "v"}

    def config(self, roles: set[str]) -> Any:
        """A LoraConfig."""
        from peft import LoraConfig

        return LoraConfig(**(self.keys(roles) | self.peft))

    def keys(self, roles: set[str]) -> dict[str, Any]:
        """Our options as a LoraConfig has them."""
        alpha = self.alpha or self.rank
        return {
            "r": self.rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "target_modules": pattern(roles),
        }

    def numbers(self, role: str, inputs: int, outputs: int) -> int:
        """rank (in + out), and out more of DoRA."""
        return self.rank * (inputs + outputs) + outputs * self.dora


class Dora(Lora):
    """LoRA with a learnt length of every row: m (W + s B A) / |W + s B A| (Liu et al. 2024, arXiv 2402.09353).

    m starts as the length of the row of W and B at 0: the encoder's own first step, to rounding. rank (in + out) + out
    numbers for each projection: 322,560 of ViT-B at rank 8 on qkv. Every step forms the whole B A, which takes time.
    """

    dora: ClassVar[bool] = True


class Ia3(PeftMethod):
    """Learnt scales of keys, values and the FFN's hidden features (Liu et al. 2022, arXiv 2205.05638).

    k and v are scaled behind their projections, biases included where these are the projections' own, and the hidden
    features before fc2. All scales start at 1: the encoder's own first step. 2A + H numbers a block where q, k and v
    are apart; a fused qkv is scaled whole, q too: 3A + H, 64,512 of ViT-B (as peft does; k and v alone: 55,296).
    """

    def roles(self, fused: bool) -> set[str]:
        """k, v and the FFN; qkv where it is fused."""
        return {"qkv", "fc2"} if fused else {"k", "v", "fc2"}

    def config(self, roles: set[str]) -> Any:
        """An IA3Config."""
        from peft import IA3Config

        return IA3Config(**(self.keys(roles) | self.peft))

    def keys(self, roles: set[str]) -> dict[str, Any]:
        """Our choice as an IA3Config has it."""
        return {"target_modules": pattern(roles), "feedforward_modules": pattern({"fc2"})}

    def numbers(self, role: str, inputs: int, outputs: int) -> int:
        """A scale of each output, of fc2 of each input."""
        return inputs if role == "fc2" else outputs


# ---------------------------------------------------------------------------------------------- which projections


def pattern(roles: set[str]) -> str:
    """The regular expression of the paths of these projections, and of nothing outside the blocks.

    No list: peft shortens long ones to endings, which fit other encoders in other ways, and writes them in an order
    that changes from run to run.
    """
    return rf"{IN_BLOCKS}({'|'.join(name for name, role in ROLES.items() if role in roles)})"


def roles_of(targets: Any) -> set[str] | None:
    """The roles that peft's target_modules mean: of our own expression, or of names that only attention has."""
    if isinstance(targets, str):
        match = re.fullmatch(re.escape(IN_BLOCKS) + r"\(([\w|]+)\)", targets)
        roles = {ROLES.get(name, "") for name in match[1].split("|")} if match else set()
        return roles if roles and pattern(roles) == targets else None
    roles = {ROLES.get(str(name), "") for name in targets or ()}
    return roles if roles and roles <= {"qkv", "q", "k", "v"} else None


def require(vit: Encoder, found: dict[str, str], roles: set[str]) -> None:
    """Refuse an encoder that lacks a projection.

    Raises:
        UserError: which it lacks, and which it has.
    """
    if not found:
        raise UserError(
            f"the encoder's blocks are {type(vit.blocks[0]).__name__}s with no projections of their own, or these are "
            "adapted already; take an encoder with plain blocks as it was loaded, or use bitfit, ln, vpt_deep or full"
        )
    if lacking := sorted(roles - set(found.values())):
        has = ", ".join(dict.fromkeys(found.values()))
        hint = "; lora_qkv changes parts of a fused qkv" if "qkv" in found.values() else ""
        raise UserError(f"targets: the encoder has no projection {', '.join(lacking)}; it has {has}{hint}")


# ---------------------------------------------------------------------------------------------- peft's files


def write_files(config: Any, tensors: Mapping[str, Tensor], vit: nn.Module, folder: Path) -> None:
    """Write peft's two files, as its save_pretrained does but for the README.

    Args:
        config: peft's, of the adapter.
        tensors: by peft's names.
        vit: the encoder, of which only the class is told.
        folder: where; it exists.
    """
    config = copy.copy(config)
    config.inference_mode = True
    made_for = {"base_model_class": type(vit).__name__, "parent_library": type(vit).__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=made_for)
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}  # peft wants "format"
    save_file(contents, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    (folder / PEFT_WEIGHTS).chmod(0o644)  # safetensors keeps its files to their owner; adapters are to be shared


def from_peft(config: dict[str, Any]) -> tuple[str, Method]:
    """The name of the method, and the method, that an adapter_config.json of peft means.

    Raises:
        UserError: it is none of LoRA, DoRA and IA3, or has a key that ours do not know.
    """
    kind = config.get("peft_type")
    if kind not in ("LORA", "IA3"):
        raise UserError(f"adapter_config.json is of peft's {kind}; only LORA (with or without DoRA) and IA3 are taken")
    _refuse(config)
    config = {"r": 8, "lora_alpha": 8} | config  # peft's defaults
    passed = {key: config[key] for key in PASSED if config.get(key) not in (None, [], {})}
    if kind == "IA3":
        usual = [Ia3().keys(Ia3().roles(fused)) for fused in (True, False)]
        return "ia3", Ia3(peft={} if passed in usual else passed)
    options = {ours: config[theirs] for theirs, ours in OPTIONS.items() if theirs in config}
    roles = roles_of(passed["target_modules"])
    options |= {"targets": sorted(roles)} if roles and len(passed) == 1 else {"peft": passed}
    name, method = ("dora", Dora) if config.get("use_dora") else ("lora", Lora)
    return name, check(method, options, "adapter_config.json")


def _refuse(config: dict[str, Any]) -> None:
    """Refuse what we do not take of peft's LoRA and IA3."""
    file = "adapter_config.json"
    known = SILENT | {*OPTIONS, *PASSED, "use_dora", "modules_to_save", "init_lora_weights"}
    if not config.get("target_modules"):
        raise UserError(f"{file} has no target_modules, so which projections it changes is not known")
    if config.get("modules_to_save") not in (None, [], ["head"]):
        raise UserError(
            f"{file} has modules_to_save {config['modules_to_save']}; only ['head'] is taken, since nothing "
            "else of the encoder may differ but by the adapter"
        )
    if (start := config.get("init_lora_weights", True)) not in STARTS:
        raise UserError(
            f"{file} has init_lora_weights {start!r}, which changes the encoder's own weights; save it again with "
            "peft's path_initial_model_for_weight_conversion"
        )
    if odd := [key for key in sorted(config.keys() - known) if config[key] not in (None, False, [], {}, "none")]:
        raise UserError(
            f"{file} has {odd[0]}={config[odd[0]]!r}, which is not taken; merge the adapter with peft instead"
        )


def classifier(folder: Path, width: int) -> dict[str, Tensor]:
    """weight (classes, D) and bias (classes,) of the head in a folder that peft wrote; nothing if it has none.

    Raises:
        UserError: the file cannot be read, or its head is no linear one on features of this width.
    """
    tensors = _tensors(folder).items()
    head = {name.removeprefix(CLASSIFIER): part for name, part in tensors if name.startswith(CLASSIFIER)}
    if not head:
        return {}
    shapes = {name: tuple(part.shape) for name, part in head.items()}
    classes = next(iter(shapes.get("weight", (0,))), 0)
    if not classes or shapes not in ({"weight": (classes, width)}, {"weight": (classes, width), "bias": (classes,)}):
        raise UserError(f"{folder / PEFT_WEIGHTS} has a head of {shapes}, which is no linear one on {width} features")
    return {"bias": torch.zeros(classes), **head}


def _tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / PICKLED).exists() and not (folder / PEFT_WEIGHTS).exists():
        raise UserError(
            f"{folder / PICKLED} can run code and is not read; save the adapter again with "
            "peft's save_pretrained(safe_serialization=True)"
        )
    return read_tensors(folder / PEFT_WEIGHTS)
