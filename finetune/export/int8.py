"""The network with int8 weights, by two engines: an ONNX file for ONNX Runtime, plain tensors for torch.

FOLDER/model.int8.onnx          as model.onnx (onnx_file.py); both factors of a product are uint8, inputs as they come
FOLDER/model.int8.safetensors   state of the network; of every int8 matrix NAME its parts NAME:qdata (int8), NAME:scale
                                and NAME:zero_point, one a row
FOLDER/model.int8.json          {"schema", "sha256": of the file, "config": that of config.json or null, "torchao": its
                                version}
FOLDER/config.json              of a plain ViT, what timm builds it by (timm_folder.py)

The matrices of linear layers only: convolutions, norms and attention stay in float32.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from ...engine.errors import UserError
from ...engine.files import read_json, sha256, write_json
from ...engine.tensors import form_of, read_forms, read_into
from ..peft.base import write_all
from .onnx_file import FILE, needs, onnx_runner, write_onnx
from .parity import Runner, Written
from .source import Source
from .timm_folder import CONFIG, plain, write_timm

Engine = Literal["onnxruntime", "torchao"]
ENGINES: tuple[Engine, ...] = ("onnxruntime", "torchao")
ONNX, TENSORS, CARD = "model.int8.onnx", "model.int8.safetensors", "model.int8.json"
SCHEMA = "miram.int8/1"
WITH_ONNX = """
import onnxruntime
session = onnxruntime.InferenceSession("model.int8.onnx")
(outputs,) = session.run(None, {"images": images})      # float32 (1, channels, height, width), normalised
"""
WITH_TORCH = """
from miram.finetune.export.int8 import load_int8         # model.int8.safetensors; needs miram[compress]
outputs = load_int8("FOLDER")(images)                    # {how}
"""


def write_int8(source: Source, folder: Path, engine: Engine = "onnxruntime") -> Written:
    """Write the network with int8 weights, and read it back.

    Raises:
        UserError: an extra is missing, or the network has no linear layer.
        RunFailed: torch or ONNX cannot express the network.
    """
    if not (share := linear_share(source.module)):
        raise UserError(f"int8 is of linear layers, and this {source.kind} has none; export it with --to onnx")
    return {"onnxruntime": write_quantised_onnx, "torchao": write_quantised_tensors}[engine](source, folder, share)


def linear_share(module: nn.Module) -> float:
    """Share of a network's numbers that are matrices of linear layers."""
    total = sum(tensor.numel() for tensor in module.parameters())
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear)) / max(1, total)


def facts_of(engine: Engine, files: list[Path], source: Source, share: float) -> dict[str, Any]:
    """What export.json says of one engine's files."""
    before = sum(tensor.numel() * tensor.element_size() for tensor in source.module.state_dict().values())
    sizes = {"bytes": sum(path.stat().st_size for path in files), "float32_bytes": before}
    return {f"int8_{engine}": {**sizes, "linear_share": share}}


# ---------------------------------------------------------------------------------------------- ONNX Runtime


def write_quantised_onnx(source: Source, folder: Path, share: float) -> Written:
    """The ONNX file with int8 matrices, one scale a column."""
    path = folder / ONNX
    with TemporaryDirectory(prefix="miram-onnx-") as place:
        large = len(write_onnx(source, Path(place)).files) > 1
        quantise_onnx(Path(place) / FILE, path, large)
    files = [ONNX, *([f"{ONNX}.data"] if large else [])]
    note = (
        f"{ONNX}: ONNX Runtime takes the range of what a layer is given over the whole batch, so that what is said of "
        "an image would depend on those beside it. Give it one image at a time, as it was measured here."
    )
    facts = facts_of("onnxruntime", [folder / name for name in files], source, share)
    return Written(files, one_by_one(onnx_runner(path)), [note], facts, tolerance=None, usage=WITH_ONNX)


def one_by_one(runner: Runner) -> Runner:
    """A runner that never sees two images at once."""
    return lambda images: torch.cat([runner(image[None]) for image in images])


def quantise_onnx(wide: Path, narrow: Path, large: bool) -> None:
    """Make the matrices of a file int8; `large`: the weights lie beside it."""
    with needs("onnx"):
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(wide, load_external_data=False)
    del model.graph.value_info[:]  # the quantiser turns matrices round, and would then find other shapes written there
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")  # folded, as it asks loudly for
    onnx.save(model, wide)
    quantize_dynamic(
        wide,
        narrow,
        op_types_to_quantize=["MatMul"],  # a Gemm is made one first
        per_channel=True,
        weight_type=QuantType.QUInt8,  # sums of products with signed ones are cut off by processors without VNNI
        use_external_data_format=large,
    )


# ---------------------------------------------------------------------------------------------- torchao


def write_quantised_tensors(source: Source, folder: Path, share: float) -> Written:
    """The state with int8 matrices, one scale a row; what they are multiplied with stays in float32."""
    network = plain(source, "int8") if source.vit is not None else deepcopy(source.module)
    network = network.cpu().float().eval()
    built = [CONFIG] if source.vit is not None and write_config(source, folder) else []
    quantise(network)
    write_all(folder / TENSORS, parts(network))
    digests = {"sha256": sha256(folder / TENSORS), "config": sha256(folder / CONFIG) if built else None}
    write_json(folder / CARD, SCHEMA, {**digests, "torchao": version("torchao")})
    loaded = load_int8(folder, None if built else source.module)
    facts = facts_of("torchao", [folder / TENSORS], source, share)
    how = "on the CPU" if built else "on the CPU; network: the float32 one, read_source(RUN).module"
    usage = (WITH_TORCH if built else WITH_TORCH.replace('"FOLDER")', '"FOLDER", network)')).format(how=how)
    return Written([TENSORS, CARD, *built], runner_of(loaded), [], facts, tolerance=None, usage=usage)


def write_config(source: Source, folder: Path) -> bool:
    """Write what timm builds the ViT by; whether timm can."""
    with TemporaryDirectory(prefix="miram-timm-") as place, suppress(UserError):
        write_timm(source, Path(place))
        shutil.copyfile(Path(place) / CONFIG, folder / CONFIG)
        return True
    return False


def runner_of(network: nn.Module) -> Runner:
    """A network on the CPU as a runner."""

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        found: Tensor = network(images.cpu().float())
        return found

    return run


def quantise(network: nn.Module) -> None:
    """Make the matrices of linear layers int8, in place."""
    with needs("compress"):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(network, Int8WeightOnlyConfig())


def parts(network: nn.Module) -> dict[str, Tensor]:
    """The state as plain tensors, the network's own; of a matrix that torchao made, what it is made of."""
    found: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        if hasattr(tensor, "__tensor_flatten__"):
            found |= {f"{name}:{part}": getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]}
        else:
            found[name] = tensor
    return found


def refuse_damaged(path: Path, digest: object) -> None:
    """Refuse a file that is not what was written.

    Raises:
        UserError: it is not there, or is another.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there; export the run again")
    if sha256(path) != digest:
        raise UserError(f"{path} is damaged; export the run again")


def load_int8(folder: str | Path, network: nn.Module | None = None) -> nn.Module:
    """What was written for torch.

    Args:
        folder: the export's.
        network: in float32, as `read_source(RUN).module` has it; it stays as it is. None: a plain ViT, which timm
            builds by the folder's config.json.

    Returns:
        In eval mode, on the CPU: normalised images (B, C, H, W) -> features or logits.

    Raises:
        UserError: the files are damaged, are of another network, or do not tell how to build it.
    """
    folder = Path(folder)
    path = folder / TENSORS
    card = read_json(folder / CARD, SCHEMA)
    refuse_damaged(path, card.get("sha256"))
    if network is None and card.get("config") is None and not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no plain ViT; give load_int8 the network, which is read_source(RUN).module")
    if network is None:
        refuse_damaged(folder / CONFIG, card.get("config"))
    made = timm.create_model(f"local-dir:{folder}") if network is None else deepcopy(network)
    made = made.cpu().float().eval().requires_grad_(False)
    quantise(made)
    wanted = parts(made)
    forms, found = {name: form_of(tensor) for name, tensor in wanted.items()}, read_forms(path)
    if odd := sorted({name for name, _ in forms.items() ^ found.items()}):
        raise UserError(f"{path} is of another network: {', '.join(odd[:4])} differ")
    read_into(path, wanted.items())
    return made
