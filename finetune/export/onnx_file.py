"""The network as an ONNX file, which ONNX Runtime and others run without miram or torch.

FOLDER/model.onnx         "images" (batch, C, H, W) float32, normalised -> "features" (batch, D) or "logits" (batch, …)
FOLDER/model.onnx.data    the weights, where they take more than LIMIT: a protobuf file ends at 2 GiB

The batch is free. `metadata_props` of the file hold, each as JSON, what it takes to use it: kind, image_size, channels,
mean, std, classes, kind_of_task, temperature, thresholds, source (the digest of the weights).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...engine.errors import RunFailed, UserError, one_line
from ..merging import merge_tokens as merging
from .parity import Runner, Written
from .source import Source

if TYPE_CHECKING:
    import onnx_ir

FILE = "model.onnx"
SCHEMA = "miram.onnx/1"
EXTRAS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "compress": ("torchao",)}
LIMIT = 1_800_000_000  # bytes of weights inside the file
INPUT = "images"
SAID = ("kind", "image_size", "channels", "mean", "std", "classes", "kind_of_task", "temperature", "thresholds")
USAGE = """
import onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
(outputs,) = session.run(None, {"images": images})      # float32 (batch, channels, height, width), normalised
session.get_modelmeta().custom_metadata_map             # classes, mean, std, temperature, thresholds, as JSON
"""


def write_onnx(
    source: Source, folder: Path, merge_tokens: int | float | None = None, *, external: bool | None = None
) -> Written:
    """Write the network as ONNX, and read it back.

    Args:
        source: what is exported.
        folder: where the files go.
        merge_tokens: of a plain ViT, tokens (or the share of them) that every block merges; None: none.
        external: weights in a file beside; None: where they are too large for one file.

    Raises:
        UserError: an extra is missing, or the network has no tokens to merge.
        RunFailed: torch or ONNX cannot express the network.
    """
    network = networked(source, merge_tokens)
    with needs("onnx"):
        model = exported(network, source)
        opset = model.opset_imports[""]
        files = saved(model, folder, external)
        checked(folder / FILE)
        runner = onnx_runner(folder / FILE)
    facts = {"opset": opset, "input": INPUT, "output": output_of(source), "external_data": len(files) > 1}
    if merge_tokens is None:
        return Written(files, runner, facts={"onnx": facts}, usage=USAGE)
    facts |= {"merge_tokens": merge_tokens}
    note = (
        f"Every block merges {told(merge_tokens)} into those most like them (Bolya et al. 2023). What that changed is "
        "measured on images; a finding smaller than a few patches is what may be merged away."
    )
    return Written(files, runner, [note], {"onnx": facts}, tolerance=None, twin=network, usage=USAGE)


def networked(source: Source, merge_tokens: int | float | None) -> nn.Module:
    """What is written: the source's network on the CPU, with or without merging.

    Raises:
        UserError: it has no tokens to merge.
    """
    if merge_tokens is None:
        return deepcopy(source.module).cpu().float().eval()
    if source.vit is None or source.kind == "segmenter":
        why = (
            "every patch of it is answered for" if source.kind == "segmenter" else "its method does not merge into one"
        )
        raise UserError(f"--merge-tokens takes a plain ViT, and this {source.kind} is none ({why}); leave it out")
    # of an encoder attention is not proportional, as the paper has it after masked pretraining
    tuned = source.kind == "classifier"
    merged = merging(deepcopy(source.vit).cpu().float().eval(), merge_tokens, proportional=tuned)
    return nn.Sequential(merged, deepcopy(source.head or nn.Identity()).cpu().float()).eval()


def told(merge_tokens: int | float) -> str:
    """How much is merged, in words."""
    return f"{merge_tokens:.0%} of its tokens" if isinstance(merge_tokens, float) else f"{merge_tokens} tokens"


def output_of(source: Source) -> str:
    """The name of what comes out."""
    return "features" if source.kind == "encoder" else "logits"


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Name the extra that is missing.

    Raises:
        UserError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"this export needs {error.name}, which is not here: pip install 'miram[{extra}]'") from error


def refuse_lacking(*extras: str) -> None:
    """Name all that is missing of several extras at once.

    Raises:
        UserError: a package is not installed.
    """
    gone = {extra: [name for name in EXTRAS[extra] if lacking(name)] for extra in extras}
    if names := [name for of in gone.values() for name in of]:
        wanted, verb = ",".join(extra for extra, of in gone.items() if of), "is" if len(names) == 1 else "are"
        raise UserError(f"this export needs {', '.join(names)}, which {verb} not here: pip install 'miram[{wanted}]'")


def lacking(package: str) -> bool:
    """Whether a package is not installed."""
    try:
        import_module(package)
    except ModuleNotFoundError:
        return True
    return False


# ---------------------------------------------------------------------------------------------- making it


def exported(network: nn.Module, source: Source) -> onnx_ir.Model:
    """The graph, with what it takes to use it, and nothing of this machine.

    Raises:
        RunFailed: torch cannot express the network.
    """
    import onnxscript  # noqa: F401  (said to be missing by its name, before torch says it otherwise)

    # of one image torch would make a batch of one for ever
    example = torch.zeros(2, source.channels, *source.image_size)
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT],
                output_names=[output_of(source)],
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise RunFailed(f"torch.onnx cannot express this {source.kind}: {one_line(str(root(error)))[:300]}") from error
    assert program is not None
    model = program.model
    if isinstance((model.graph.inputs[0].shape or [0])[0], int):  # torch goes on where a forward needs the number
        raise RunFailed(
            f"this {source.kind} cannot be written for any batch: its forward turns the batch into a number"
        )
    strip(model)
    model.metadata_props.update({name: json.dumps(value) for name, value in said(source).items()})
    return model


def root(error: BaseException) -> BaseException:
    """What an error began with: torch wraps it in pages of advice."""
    return root(error.__cause__) if error.__cause__ else error


def said(source: Source) -> dict[str, Any]:
    """What goes with the graph."""
    return {"schema": SCHEMA, **{name: getattr(source, name) for name in SAID}, "source": source.digest}


def strip(model: onnx_ir.Model) -> None:
    """Take out what torch wrote for debugging: stack traces with the paths of this machine."""
    from onnx_ir.traversal import RecursiveGraphIterator

    parts: list[onnx_ir.Graph | onnx_ir.Function] = [model.graph, *model.functions.values()]
    for part in parts:
        blank(part)
        for node in RecursiveGraphIterator(part):
            for one in (node, *node.outputs, *([node.graph] if node.graph else [])):
                blank(one)
        for value in part.inputs:
            blank(value)
    for value in model.graph.initializers.values():
        blank(value)


def blank(one: Any) -> None:
    """Empty what is said of a node, a value or a graph."""
    one.metadata_props.clear()
    one.doc_string = None


def saved(model: onnx_ir.Model, folder: Path, external: bool | None) -> list[str]:
    """Write the file, and the weights beside it where they are too large; the names."""
    import onnx_ir

    weights = (value.const_value for value in model.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in weights if tensor is not None)
    beside = f"{FILE}.data" if external or (external is None and size > LIMIT) else None
    onnx_ir.save(model, folder / FILE, external_data=beside)
    return [FILE, beside] if beside else [FILE]


def checked(path: Path) -> None:
    """Hold the file against the format.

    Raises:
        RunFailed: it is not what the format says.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RunFailed(f"{path.name} is no valid ONNX: {one_line(str(error))[:300]}") from error


# ---------------------------------------------------------------------------------------------- running it


def onnx_runner(path: Path) -> Runner:
    """The file, run by ONNX Runtime on the CPU with as many threads as torch has.

    Raises:
        RunFailed: the runtime cannot run it.
    """
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, NotImplemented

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (Fail, InvalidGraph, NotImplemented) as error:
        raise RunFailed(f"ONNX Runtime does not run {path.name}: {one_line(str(error))[:300]}") from error

    def run(images: Tensor) -> Tensor:
        (found,) = session.run(None, {INPUT: images.detach().cpu().float().contiguous().numpy()})
        return torch.from_numpy(found)

    return run
