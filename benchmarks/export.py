"""What exports of an encoder are worth: time an image takes, and how far its features move.

python benchmarks/export.py --device cuda [--out benchmarks/results/export_h100.txt]
python benchmarks/export.py --device cpu --sides 224 --rounds 3     fewer and smaller, for a slow machine

A ViT-S with random weights (nothing is downloaded) at every side, and with --run what a finished run holds, at its own
size, on images of noise over smooth ground. A row is a network, a size and a batch: milliseconds an image (median of
several batches), the time of torch in float32 over that, each pair of batches measured in turn as a machine has moods,
and cosine and largest change of the outputs against it. What int8 and merged tokens cost a task is told by its metric
(`miram export --to int8`); with random weights the change says little. On a GPU, ONNX Runtime is measured where it has
a CUDA provider, and its int8 file never, as that is for processors. The last line says whether what should be the same
is: float32 within 1e-4 of outputs up to 1, in proportion above; merged tokens as `export` counts them.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import onnxruntime
import timm
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from miram.finetune.export.int8 import ONNX, load_int8, write_int8
from miram.finetune.export.onnx_file import FILE, write_onnx
from miram.finetune.export.parity import TOLERANCE, Runner, agreement, parity
from miram.finetune.export.source import Source, read_source
from miram.finetune.export.timm_folder import CONFIG
from miram.pretrain.encoder import Encoder

SHARES = (0.05, 0.1)
CUDA = "CUDAExecutionProvider"


def vit_s(side: int) -> Source:
    """A ViT-S for grey images of this side."""
    torch.manual_seed(0)
    made = timm.create_model("vit_small_patch16_224", in_chans=1, num_classes=0, img_size=side).eval()
    vit = cast(Encoder, made.requires_grad_(False))
    size, mean, std = (side, side), (0.3,), (0.2,)
    return Source(kind="encoder", module=vit, vit=vit, head=None, image_size=size, channels=1, mean=mean, std=std)


def pictures(batch: int, source: Source) -> Tensor:
    """Large soft shapes under some noise; no patch is like another, as those of air would be."""
    made = torch.Generator().manual_seed(1)
    soft = interpolate(torch.randn(batch, source.channels, 8, 8, generator=made), source.image_size, mode="bicubic")
    return soft + 0.05 * torch.randn(soft.shape, generator=made)


def session(path: Path, device: str) -> Runner | None:
    """A file in ONNX Runtime on the device; None: it has no provider for it."""
    provider = CUDA if device == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    opened = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    return lambda images: torch.from_numpy(opened.run(None, {"images": images.cpu().numpy()})[0])


def networks(source: Source, folder: Path, device: str) -> Iterator[tuple[str, Runner | None, str]]:
    """Name, what runs it, and whether it computes what it should; "": another output is meant."""
    checks = {"noise": pictures(5, source)}
    plain = write_onnx(source, folder)
    assert plain.runner is not None
    found = parity(source.module, plain.runner, checks, TOLERANCE)
    yield "onnx float32", session(folder / FILE, device), "PASS" if found.holds else "FAIL"
    write_int8(source, folder, "onnxruntime")
    yield "onnx int8", session(folder / ONNX, device) if device == "cpu" else None, ""
    write_int8(source, folder, "torchao")
    network = None if (folder / CONFIG).is_file() else source.module
    yield "torch int8", load_int8(folder, network).to(device), ""
    for share in SHARES if source.vit is not None and source.kind != "segmenter" else ():
        merged = write_onnx(source, folder, share)
        assert merged.runner is not None
        assert merged.twin is not None
        said = agreement(merged.twin, merged.runner, checks)  # raises where they differ on most
        yield f"onnx merged {share:g}", session(folder / FILE, device), f"{said.sentence} PASS"


def seconds(run: Runner, images: Tensor) -> float:
    """One batch."""
    began = time.perf_counter()
    run(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def rows(name: str, source: Source, arguments: argparse.Namespace) -> Iterator[str]:
    """Lines about one encoder at one size."""
    with TemporaryDirectory(prefix="miram-export-") as folder:
        for how, run, same in networks(source, Path(folder), arguments.device):
            source.module.to(arguments.device)  # files are written on the processor
            for batch in map(int, arguments.batches.split(",")):
                head = f"{name:10} {source.image_size[0]:5} px  batch {batch:2}  {how:16}"
                yield head + (" not on this device" if run is None else measured(source, run, batch, arguments))
            source.module.cpu()
            if same:
                yield f"{name:10} {source.image_size[0]:5} px  {how}: {same}"


def measured(source: Source, run: Runner, batch: int, arguments: argparse.Namespace) -> str:
    """Time and change of one network, beside the source's own."""
    images = pictures(batch, source).to(arguments.device)
    wanted, found = (one(images).float().cpu().flatten(1) for one in (source.module, run))
    pairs = [(seconds(source.module, images), seconds(run, images)) for _ in range(arguments.rounds + 1)][1:]
    own, took = (1e3 * statistics.median(pair[i] for pair in pairs) / batch for i in (0, 1))
    gain = statistics.median(torch_took / this_took for torch_took, this_took in pairs)
    alike, apart = cosine_similarity(wanted, found).min(), (wanted - found).abs().max()
    return (
        f"{took:9.2f} ms an image, torch {own:9.2f}, x{gain:.2f}  cosine {alike:.4f}  change {apart:.1e} of "
        f"{wanted.abs().max():.2f}"
    )


def main() -> None:
    """Print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--run", help="a finished run, measured too")
    parser.add_argument("--sides", default="224,448")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--machine", help="what to call this one, if not by its name")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    where = arguments.machine or (torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine())
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    lines = [f"{where}, {time.strftime('%Y-%m-%d')}, {versions}, threads: {torch.get_num_threads()}"]
    print(lines[0])
    sources = [("ViT-S", vit_s(side)) for side in map(int, arguments.sides.split(","))]
    if arguments.run:
        sources.append(("run", read_source(arguments.run)))
    with torch.inference_mode():
        for name, source in sources:
            for line in rows(name, source, arguments):
                print(line, flush=True)
                lines.append(line)
    failed = sum(line.endswith("FAIL") for line in lines)
    lines.append(f"{'FAIL' if failed else 'PASS'}: parity to {TOLERANCE:g}, {failed} failed")
    print(lines[-1])
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
