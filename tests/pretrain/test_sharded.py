"""Every objective learns the same on one rank, on two with copies of it (DDP), and on two with shards of it (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from forked import finish, killed_at, last_checkpoint, metrics, order, start
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import miram
from miram.engine import restore
from miram.engine.loop import Trainer

WAYS = ("ddp", "fsdp2")
STEPS = 6
COMMON = [
    f"--train.steps={STEPS}",
    "--train.checkpoint_every=2",
    "--train.ema=0.9",
    "--train.clip_grad=0.7",
    "--monitor.every=2",
    "--monitor.images=8",
    "--monitor.pictures=2",
]
ENCODER = "depth: 2, embed_dim: 32, num_heads: 2, drop_path_rate: 0.3"
MIRAM = [
    f"--model.encoder_options={{{ENCODER}}}",
    "--model.scales.0.attention=performer",
    "--model.scales.0.options={num_features: 16, redraw_every: 3}",
]


def lying(way: str) -> Callable[[int], None]:
    """Before and after training, see on every rank that the model is what `way` says: shards, or a whole copy."""
    sharded = way == "fsdp2"

    def look(trainer: Trainer) -> None:
        assert isinstance(trainer.learner.model, DistributedDataParallel) is not sharded
        for name, parameter in trainer.objective.named_parameters():
            assert isinstance(parameter, DTensor) is sharded, name
        for name, average in trainer.learner.averages.items():
            assert isinstance(average, DTensor) is sharded, name

    def spoil(rank: int) -> None:
        original = Trainer.fit

        def fit(self: Trainer) -> None:
            look(self)
            original(self)
            look(self)

        Trainer.fit = fit  # type: ignore[method-assign]

    return spoil


def run(folder: Path, way: str, arguments: list[str], **how: object) -> None:
    """On two ranks, to the end."""
    finish(folder, [*arguments, f"--train.parallel={way}"], world=2, spoil=lying(way), **how)
import sys
def measure(a, b):
    assert order(a)==order(b)
    worst={}
    for x,y in zip(metrics(a),metrics(b),strict=True):
        assert list(x)==list(y),(x,y)
        for k in x: worst[k]=max(worst.get(k,0),abs(x[k]-y[k])/(abs(y[k])+1e-12))
    print({k:v for k,v in worst.items() if v},file=sys.stderr)
    one,two=load_file(a/"run/encoder.safetensors"),load_file(b/"run/encoder.safetensors")
    w={k:((one[k].float()-two[k].float()).norm()/(two[k].float().norm()+1e-12)).item() for k in two}
    print("mat",max(v for k,v in w.items() if two[k].ndim>1),"vec",sorted(((v,k) for k,v in w.items() if two[k].ndim<=1))[-6:],file=sys.stderr)
    s=torch.Generator().manual_seed(0); x=torch.rand(4,1,32,32,generator=s)
    e,f=miram.load_encoder(a/"run"),miram.load_encoder(b/"run")
    print("feat",(e.forward_features(x)-f.forward_features(x)).abs().max().item(),file=sys.stderr)
    for part in ("model","ema","optimizer"):
        p,q=(restore.load_tensors(last_checkpoint(z),part) for z in (a,b))
        print(part,max(((p[k].float()-q[k].float()).norm()/(q[k].float().norm()+1e-12)).item() for k in p if p[k].ndim>1 or 'running' in k),file=sys.stderr)

C={
 "miram":MIRAM,
 "moco": ["--objective=moco_v3",f"--model.encoder_options={{{ENCODER}, global_pool: token}}","--moco.hidden=32","--moco.dim=16"],
 "lin":[MIRAM[0],"--model.scales.1.attention=linformer","--model.scales.1.options={num_projected: 16}"],
 "fp16":[*MIRAM,"--train.precision=fp16"],
 "bf16":[*MIRAM,"--train.precision=bf16"],
 "moco16":["--objective=moco_v3",f"--model.encoder_options={{{ENCODER}, global_pool: token}}","--moco.hidden=32","--moco.dim=16","--train.precision=bf16"],
 "ckpt":[*MIRAM,"--model.checkpointing=true","--model.scales.0.checkpointing=true","--model.scales.1.checkpointing=true","--train.micro_batch=2"],
 "tiles":[*MIRAM,"--model.image_size=64","--model.scales.1.decode_fraction=0.5","--model.tissue_loss=1","--model.scales.0.loss_on=masked","--model.scales.1.loss_on=masked"],
}
@pytest.mark.parametrize("c",C)
def test_m(c,tiny,tmp_path):
    import time
    a=[*tiny,*COMMON,*C[c]]
    t=time.time(); finish(tmp_path/"one",a); print(c,"one",time.time()-t,file=sys.stderr)
    for w in WAYS:
        t=time.time(); run(tmp_path/w,w,a); print(c,w,time.time()-t,file=sys.stderr)
        measure(tmp_path/w,tmp_path/"one")
