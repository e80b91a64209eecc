"""What a student keeps of its teacher's figure, and what it saves: PASS or FAIL against a stated share.

miram data phantom runs/distill/shards --patients 600 --size 480 --seed 7
miram pretrain pretrain/phantom_teacher
miram distill distill/phantoms
miram pretrain pretrain/phantom_teacher --model.encoder_options='{depth: 4, embed_dim: 96, num_heads: 3}' \
    --train.steps=1000 --train.blr=1.6e-2 --out=runs/distill/scratch
miram probe probe/distill
python benchmarks/distill.py runs/distill/probe --share 0.9 --above-chance --faster 4 --smaller 7

Every encoder of the probe, the teacher first, is given the same random images of its input size: images a second are
the median of rounds in which all encoders take turns, as a machine has moods. MACs are counted by torch as an image
passes. The share is judged by the lower end of its interval, size and speed as they were found. A share alone says
little: compare it with that of weights that learnt nothing and of the student's shape without a teacher.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from miram.pretrain.encoder import Encoder
from miram.pretrain.weights.loading import load_encoder

Result = dict[str, Any]


def main() -> None:
    """Print, write where asked, and say by the exit status whether all that was stated holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="of miram probe, with encoders beside the first")
    parser.add_argument("--student", type=int, default=1, help="which of those beside the teacher is judged")
    parser.add_argument("--share", type=float, required=True, help="of the teacher's figure that it keeps at least")
    parser.add_argument("--above-chance", action="store_true", help="the share is of what lies above chance")
    parser.add_argument("--smaller", type=float, default=1.0, help="how many times fewer parameters at least")
    parser.add_argument("--faster", type=float, default=1.0, help="how many times more images a second at least")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a processor")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the lines there too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = []
    for line in report(arguments, json.loads((arguments.run / "result.json").read_text())):
        print(line, flush=True)
        lines.append(line)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")
    sys.exit(any(line.startswith("FAIL") for line in lines))


def report(arguments: argparse.Namespace, result: Result) -> Iterator[str]:
    """Shares, then what each encoder costs, then the verdicts."""
    shares = result["tables"][0]
    yield f"{result['metric']} of {result['task']}, {result['n_images']} images of {result['n_patients']} patients"
    yield f"{'encoder':<18}" + "".join(f"{name:<26}" for name in shares["columns"][2:])
    for name, _, *cells in shares["rows"]:
        yield f"{name:<18}" + "".join(f"{shown(cell):<26}" for cell in cells)
    untrained = [row for row in result["rows"] if "random" in row["name"]]
    yield from (f"{row['name']:<18}{shown(row):<26}{row['value'] / result['value']:.3f}" for row in untrained)
    yield from (f"{row['name']:<44}{shown(row)}" for row in result["differences"])
    encoders = [load_encoder(e["encoder"]).to(arguments.device) for e in result["encoders"]]
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{platform.machine()}, "
    yield f"{where}{arguments.threads} threads, batch {arguments.batch}, fp32, torch {torch.__version__}"
    sizes = [sum(p.numel() for p in vit.parameters()) for vit in encoders]
    speeds = images_a_second(encoders, arguments)
    for entry, vit, size, speed in zip(result["encoders"], encoders, sizes, speeds, strict=True):
        yield f"{entry['name']:<18}{size:>10,} parameters  {macs(vit) / 1e6:8.2f} M MACs  {speed:8.1f} images/s"
    which = arguments.student
    yield from verdicts(arguments, shares["rows"][which], sizes[0] / sizes[which], speeds[which] / speeds[0])


def verdicts(arguments: argparse.Namespace, row: list[Any], smaller: float, faster: float) -> Iterator[str]:
    """A line for each thing that was stated."""
    name, _, _, share, above = row
    kept, of = (above, "figure above chance") if arguments.above_chance else (share, "figure")
    low = kept["interval"][0]
    yield f"{said(low >= arguments.share)}: {name} keeps {shown(kept)} of the teacher's {of}; stated {arguments.share}"
    yield f"{said(smaller >= arguments.smaller)}: {smaller:.2f} times fewer parameters; stated {arguments.smaller}"
    yield f"{said(faster >= arguments.faster)}: {faster:.2f} times as many images a second; stated {arguments.faster}"


def said(holds: bool) -> str:
    """The verdict's first word."""
    return "PASS" if holds else "FAIL"


def shown(cell: dict[str, Any]) -> str:
    """A figure with its interval."""
    return f"{cell['value']:.3f} [{cell['interval'][0]:.3f}, {cell['interval'][1]:.3f}]"


def noise(vit: Encoder, batch: int) -> Tensor:
    """(batch, C, H, W) of the encoder's input."""
    shape = vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size
    return torch.randn(batch, *shape, device=next(vit.parameters()).device)


@torch.inference_mode()
def images_a_second(encoders: list[Encoder], arguments: argparse.Namespace) -> list[float]:
    """The median of each encoder's features of a batch; the first round warms up."""
    inputs = [noise(vit, arguments.batch) for vit in encoders]
    rounds = [[seconds(vit, x) for vit, x in zip(encoders, inputs, strict=True)] for _ in range(arguments.rounds + 1)]
    return [arguments.batch / statistics.median(of) for of in zip(*rounds[1:], strict=True)]


def seconds(vit: Encoder, images: Tensor) -> float:
    """One batch, as a probe takes features: the mean of the patch tokens."""
    begin = time.perf_counter()
    vit.forward_features(images)[:, vit.num_prefix_tokens :].mean(1)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@torch.no_grad()
def macs(vit: Encoder) -> float:
    """Multiplications with an addition for one image."""
    with FlopCounterMode(display=False) as counter:
        vit.forward_features(noise(vit, 1))
    return counter.get_total_flops() / 2


if __name__ == "__main__":
    main()
