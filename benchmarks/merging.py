"""Token merging on a device: how much faster a ViT is, and how far its features move.

python benchmarks/merging.py --device cuda --precision bf16 [--out benchmarks/results/merging_h100.txt]
python benchmarks/merging.py --device cpu --sides 224,448 --rounds 3     fewer and smaller, for a slow machine

Square images of noise on smooth ground, through a ViT-S of patches of 16 pixels, or with --encoder one of yours: 224,
448 and 896 pixels make 197, 785 and 3137 tokens. A row tells which share of its patches every block merges, the tokens
behind the last one, images a second (median of several batches), that over the ViT's own, and cosine and largest
change of the features against the ViT's. With random weights the change says little; what merging costs a task is told
by its metric (`miram export --merge-tokens`).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate

from miram.finetune.merging import merge_tokens
from miram.pretrain.weights.loading import load_encoder

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2)


def encoder(name: str | None, side: int) -> nn.Module:
    """A ViT-S with random weights, or the encoder that is named, for images of this side."""
    torch.manual_seed(0)
    if name:
        return load_encoder(name, side).eval()
    return timm.create_model("vit_small_patch16_224", in_chans=1, num_classes=0, img_size=side).eval()


def pictures(batch: int, side: int, device: torch.device) -> Tensor:
    """Large soft shapes, half of each image even ground, under some noise."""
    made = torch.Generator().manual_seed(1)
    soft = interpolate(torch.randn(batch, 1, 8, 8, generator=made), (side, side), mode="bicubic")
    soft[..., side // 2 :] = 0
    return (soft + 0.05 * torch.randn(batch, 1, side, side, generator=made)).to(device)


def seconds(model: nn.Module, images: Tensor) -> float:
    """One batch."""
    began = time.perf_counter()
    model(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def rows(arguments: argparse.Namespace, side: int) -> Iterator[str]:
    """Lines about one size of image; the ViT is timed anew beside each share, in turn, as a machine has moods."""
    device = torch.device(arguments.device)
    vit, images = encoder(arguments.encoder, side).to(device), pictures(arguments.batch, side, device)
    whole = vit(images).float()
    for share in SHARES:
        merged = merge_tokens(vit, share)
        found = merged(images).float()
        pairs = [(seconds(vit, images), seconds(merged, images)) for _ in range(arguments.rounds + 1)][1:]
        took, gain = statistics.median(m for _, m in pairs), statistics.median(v / m for v, m in pairs)
        alike, apart = cosine_similarity(found, whole).mean(), (found - whole).abs().max()
        yield (
            f"{side:5} px  share {share:4.2f}  {merged.left[-1]:5} tokens left  {arguments.batch / took:8.2f} images/s"
            f"  x{gain:.2f}  cosine {alike:.4f}  change {apart:.3f} of {whole.abs().max():.3f}"
        )


def main() -> None:
    """Print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--encoder", help="a run, an encoder.safetensors or timm:NAME")
    parser.add_argument("--sides", default="224,448,896")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
    lines = [f"{where}, torch {torch.__version__}, {arguments.precision}, {torch.get_num_threads()} threads"]
    print(lines[0])
    half = arguments.precision == "bf16"
    with torch.inference_mode(), torch.autocast(arguments.device, torch.bfloat16, enabled=half):
        for side in map(int, arguments.sides.split(",")):
            for line in rows(arguments, side):
                print(line, flush=True)
                lines.append(line)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
