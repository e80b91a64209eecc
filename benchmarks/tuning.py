"""Every tuning method on one encoder: what learns, what a step keeps in memory, what it costs, how big its file is.

python benchmarks/tuning.py [--encoder vit_base_patch16_224] [--batch 4] [--device cpu | cuda] [--precision fp32 | bf16]
python benchmarks/tuning.py --out benchmarks/results/tuning_cpu.txt

Each method is measured in a process of its own, on random images: one step of AdamW to warm up, then three.
  trainable   numbers that learn, and their closed form beside them: a difference fails the run
  kept        bytes that the forward pass keeps for the backward pass, each storage once, parameters left out
  peak        the highest level of memory (a GPU's allocator; on a processor the process's resident pages) less what it
              was when the model was there and no step had been made: activations, gradients, moments
  step        the median time of forward, backward and update
  file        what `save` writes, without a head
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor

from miram.finetune.peft import METHODS, Tuned, apply, save
from miram.pretrain.encoder import Encoder

MB = 2**20
STEPS = 3
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("linear", {}),
    ("bitfit", {}),
    ("ln", {}),
    ("lora", {}),
    ("lora_qkv", {"targets": "qk"}),
    ("lora_qkv", {"targets": "qkv"}),
    ("dora", {}),
    ("ia3", {}),
    ("houlsby", {}),
    ("adaptformer", {}),
    ("ssf", {}),
    ("vpt_shallow", {"num_prompts": 50}),
    ("vpt_deep", {"num_prompts": 50}),
    ("vpt_gated", {"num_prompts": 50}),
    ("mpl", {}),
    ("dvpt", {"share_every": 3}),
    ("dvpt", {"share_every": 1}),
    ("savit", {}),
]


def main() -> None:
    """Measure all, print a table, say whether every count is its closed form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_base_patch16_224", help="timm's name; weights are random")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2, help="of a processor")
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # JSON of one variant: what a child measures
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        print(json.dumps(measure(args, *json.loads(args.only))))
        return
    assert {name for name, _ in VARIANTS} == METHODS.keys(), "a method is not measured"
    lines = []
    for line in table(args):
        lines.append(line)
        print(line, flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    sys.exit("FAIL" in lines[-1])


def table(args: argparse.Namespace) -> Any:
    """The lines, one a variant, each from a process of its own."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {args.threads} threads"
    yield f"{args.encoder}, batch {args.batch}, {args.precision}, {device}, torch {torch.__version__}"
    yield f"{'method':<34}{'trainable':>12}{'closed form':>13}{'kept MB':>9}{'peak MB':>9}{'step s':>8}{'file MB':>9}"
    wrong = []
    for name, options in VARIANTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", json.dumps([name, options])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr}")
        m = json.loads(done.stdout.splitlines()[-1])
        wrong += [name] if m["trainable"] != m["expected"] else []
        title = name + "".join(f" {key}={value}" for key, value in options.items())
        yield (
            f"{title:<34}{m['trainable']:>12,}{m['expected']:>13,}{m['kept'] / MB:>9.1f}{m['peak'] / MB:>9.0f}"
            f"{m['step']:>8.3f}{m['file'] / MB:>9.2f}"
        )
    yield f"FAIL: counts of {', '.join(wrong)}" if wrong else "PASS: every count is its closed form"


def measure(args: argparse.Namespace, name: str, options: dict[str, Any]) -> dict[str, float | int | None]:
    """One variant, in this process."""
    torch.manual_seed(0)
    encoder = cast(Encoder, timm.create_model(args.encoder, num_classes=0))
    tuned = apply(encoder, name, **options).to(args.device)
    tuned.set_head(2)
    tuned.train()
    images = torch.randn(args.batch, *tuned_input(tuned), device=args.device)
    truth = torch.arange(args.batch, device=args.device) % 2
    learning = [tensor for tensor in tuned.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4)
    before = level(args.device)
    times = [step(tuned, optimizer, images, truth, args) for _ in range(1 + STEPS)][1:]
    peak = level(args.device) - before
    return {
        "trainable": tuned.trainable,
        "expected": tuned.expected,
        "kept": kept(tuned, images, args),
        "peak": peak,
        "step": statistics.median(times),
        "file": size_on_disk(tuned),
    }


def tuned_input(tuned: Tuned) -> tuple[int, int, int]:
    """Channels, height and width of the encoder's images."""
    height, width = tuned.base["image_size"]
    return tuned.base["channels"], height, width


def step(
    tuned: Tuned, optimizer: torch.optim.Optimizer, images: Tensor, truth: Tensor, args: argparse.Namespace
) -> float:
    """Seconds of one step."""
    begin = time.perf_counter()
    optimizer.zero_grad()
    with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
        loss = torch.nn.functional.cross_entropy(tuned(images), truth)
    loss.backward()
    optimizer.step()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def level(device: str) -> int:
    """The highest level of memory so far, in bytes; on a GPU, counted anew from now on."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    highest = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return highest


def kept(tuned: Tuned, images: Tensor, args: argparse.Namespace) -> int:
    """Bytes that a forward pass keeps for its backward pass."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*tuned.parameters(), *tuned.buffers())}
    storages: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"),
    ):
        tuned(images)
    return sum(storages.values())


def size_on_disk(tuned: Tuned) -> int:
    """Bytes of the adapter's folder."""
    with tempfile.TemporaryDirectory() as folder:
        save(copy.deepcopy(tuned), Path(folder) / "adapter")
        return sum(path.stat().st_size for path in (Path(folder) / "adapter").iterdir())


if __name__ == "__main__":
    main()
