#!/bin/bash
# Several ranks on one machine: do they learn what one does, go on at any size, survive, and how fast are they?
#   benchmarks/multi_gpu.sh [--cpu] [--ranks N] [--out DIR]
# Needs at least two GPUs (NCCL); --cpu does the very same on gloo with a tiny model, so that the script itself is known
# to work. --ranks: the most to be timed (default: all GPUs; 2 with --cpu). --out keeps the runs. Prints PASS or FAIL a
# line, figures with it, and leaves with 1 if anything failed. All that is compared is fp32; speed is measured in bf16.
set -uo pipefail
export PYTHONUNBUFFERED=1 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # the latter for --max-restarts, see docs/cluster.md
CPU="" RANKS="" OUT=""
while [ $# -gt 0 ]; do
    case $1 in
        --cpu) CPU=1 ;;
        --ranks) RANKS=${2:?a number}; shift ;;
        --out) OUT=${2:?a folder}; shift ;;
        *) sed -n '2,6s/^# //p' "$0"; exit 2 ;;
    esac
    shift
done
if [ -n "$OUT" ]; then mkdir -p "$OUT"; else OUT=$(mktemp -d) && trap 'rm -rf "$OUT"' EXIT; fi
python -c 'import miram, torch' || { echo "activate the environment that miram is installed in" >&2; exit 2; }
FAILED=0 STEPS=24 STRUCK=8
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
PRESETS=$(python -c 'import miram, pathlib; print(pathlib.Path(miram.__file__).parent / "configs" / "accelerate")')
RANKS=${RANKS:-${CPU:+2}}
RANKS=${RANKS:-$GPUS}
if [ -n "$CPU" ]; then
    export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=""
    PATIENTS=12 SIZE=96 BATCH=8 EACH=8 LOSSES=1e-5 WEIGHTS=1e-3 SPEED_PRECISION=fp32 SPEED_STEPS=20
    MODEL=("--model.encoder_options={depth: 2, embed_dim: 32, num_heads: 2}" --model.image_size=32
        "--model.scales=[{scale: 1, depth: 1, width: 32, heads: 2}, {scale: 2, attention: nystrom, depth: 1, width: 16, heads: 2, options: {num_landmarks: 4}}]"
        --train.blr=0.03 --train.warmup_steps=2 --data.workers=0)
elif [ "$GPUS" -ge 2 ]; then
    PATIENTS=64 SIZE=1200 BATCH=32 EACH=32 LOSSES=1e-3 WEIGHTS=5e-2 SPEED_PRECISION=bf16 SPEED_STEPS=60
    MODEL=(--model.encoder=vit_base_patch16_224 '--model.encoder_options={}' --model.image_size=448 --data.workers=4
        "--model.scales=[{scale: 1, depth: 4, width: 384, heads: 12}, {scale: 2, attention: nystrom, depth: 4, width: 384, heads: 12, options: {num_landmarks: 64}}]"
        --train.blr=1.5e-4 --train.warmup_steps=4)
else
    echo "needs two GPUs, $GPUS found; --cpu tries the script itself" >&2; exit 2
fi

why() { grep -E 'miram: |Error' "$OUT/$1.log" | tail -n 1 | cut -c -200; }
say() { # say NAME 0|1 FIGURES: a verdict
    if [ "$2" = 0 ]; then echo "PASS  $1: $3"; else echo "FAIL  $1: $3"; FAILED=1; fi
}
ARGUMENTS=(pretrain/demo "--data.shards=$OUT/packed" "${MODEL[@]}" --data.split=null)
EXACT=("--train.batch_size=$BATCH" "--train.steps=$STEPS" --train.precision=fp32 --train.log_every=1 --train.checkpoint_every=5)
launch() { # launch NAME RANKS [torchrun's own …] -- [miram's own …]: replaces this process by the launcher
    local name=$1 ranks=$2 own=(); shift 2
    while [ "$1" != -- ]; do own+=("$1"); shift; done; shift
    local miram=(-m miram.pretrain "${ARGUMENTS[@]}" "--out=$OUT/$name" "$@")
    if [ "$ranks" = 1 ]; then exec python "${miram[@]}"; fi
    exec python -m torch.distributed.run --standalone "--nproc-per-node=$ranks" \
        --signals-to-handle=SIGTERM,SIGUSR1,SIGINT "${own[@]}" "${miram[@]}"
}
whole() { # whole NAME RANKS …: to the end
    (launch "$@") >"$OUT/$1.log" 2>&1 || { say "$1" 1 "ended with $?: $(why "$1")"; return 1; }
}
part() { # part NAME LINES RANKS …: a SIGTERM to the launcher when metrics.jsonl has so many lines
    local name=$1 lines=$2; shift 2
    (launch "$name" "$@") >>"$OUT/$name.log" 2>&1 &
    reach "$name" "$lines" $! && kill -TERM $!
    wait $!
    grep -q '"preempted"' "$OUT/$name/state.json" || { say "$name" 1 "SIGTERM left $(grep status "$OUT/$name/state.json")"; return 1; }
}
reach() { # reach NAME LINES PID: wait for the line; 1 if the process ends before
    until [ "$(wc -l 2>/dev/null <"$OUT/$1/metrics.jsonl" || echo 0)" -ge "$2" ]; do
        kill -0 "$3" 2>/dev/null || { say "$1" 1 "ended before line $2: $(why "$1")"; return 1; }
        sleep 0.1
    done
}
same() { # same VERDICT A B: losses of all steps and the encoder's matrices agree
    local found
    found=$(python - "$OUT/$2" "$OUT/$3" "$LOSSES" "$WEIGHTS" <<'P'
import json, sys
from pathlib import Path
from safetensors.torch import load_file
a, b, most_loss, most_weight = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (a, b)]
assert [x["step"] for x in lines[0]] == [x["step"] for x in lines[1]], "other steps"
loss = max(abs(x["loss"] - y["loss"]) / abs(y["loss"]) for x, y in zip(*lines))
one, two = (load_file(run / "encoder.safetensors") for run in (a, b))
assert one.keys() == two.keys(), "other tensors"
# Vectors are left out: the keys' bias has no gradient but rounding, which Adam blows up to full steps.
weight = max(float((one[k] - two[k]).norm() / (two[k].norm() + 1e-9)) for k in one if one[k].ndim > 1)
same = (a / "encoder.safetensors").read_bytes() == (b / "encoder.safetensors").read_bytes()
print(f"losses within {loss:.1e} (at most {most_loss:.0e}), matrices within {weight:.1e} (at most {most_weight:.0e})" + ", same bytes" * same)
sys.exit(not (loss <= most_loss and weight <= most_weight))
P
    ) 2>"$OUT/compared.log"
    say "$1" $? "${found:-$(tail -n 1 "$OUT/compared.log")}"
}
speed() { # speed RANKS STRATEGY: images a second, the median of the logged windows after the first
    local name=speed-$2-$1
    whole "$name" "$1" -- "--train.batch_size=$((EACH * $1))" "--train.steps=$SPEED_STEPS" --train.log_every=5 \
        --train.checkpoint_every=1000000 "--train.precision=$SPEED_PRECISION" "--train.parallel=$2" || return
    python - "$OUT/$name/metrics.jsonl" "$1" "$2" "$OUT/speed-ddp-1/metrics.jsonl" <<'P'
import json, statistics, sys
def rate(path):
    return statistics.median(json.loads(line)["images_per_s"] for line in open(path).read().splitlines()[1:])
ranks, own, one = int(sys.argv[2]), rate(sys.argv[1]), rate(sys.argv[4])
print(f"      {ranks} ranks, {sys.argv[3]}: {own:.1f} images/s, {own / one / ranks:.0%} of {ranks} x one rank")
P
}

echo "torch $(python -c 'import torch; print(torch.__version__)'), $GPUS GPUs$([ -n "$CPU" ] && echo ', CPU and gloo asked for') $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)"
{
    python -m miram data phantom "$OUT/phantoms" --patients $PATIENTS --size $SIZE || exit 2
    python -m miram data pack "$OUT/phantoms" "$OUT/packed" || exit 2
} >"$OUT/data.log" 2>&1

# Each strategy learns what one rank learns.
whole one 1 -- "${EXACT[@]}" || exit 1
whole ddp 2 -- "${EXACT[@]}" && same "DDP, 2 ranks, as one rank" ddp one
whole fsdp2 2 -- "${EXACT[@]}" --train.parallel=fsdp2 && same "FSDP2, 2 ranks, as one rank" fsdp2 one
for preset in ddp fsdp2; do
    if python -m accelerate.commands.launch --config_file "$PRESETS/$preset.yaml" --num_processes 2 -m miram.pretrain \
        "${ARGUMENTS[@]}" "${EXACT[@]}" "--out=$OUT/accelerate-$preset" >"$OUT/accelerate-$preset.log" 2>&1; then
        same "accelerate launch, $preset.yaml, as torchrun" "accelerate-$preset" $preset
    else
        say "accelerate launch, $preset.yaml" 1 "$(why "accelerate-$preset")"
    fi
done

# Stopped by SIGTERM and taken up by another number of ranks, or another strategy.
part resized $STRUCK 1 -- "${EXACT[@]}" && part resized $((2 * STRUCK)) 2 -- "${EXACT[@]}" && whole resized 1 -- "${EXACT[@]}" &&
    same "SIGTERM twice, 1 -> 2 -> 1 ranks, as undisturbed" resized one
part changed $STRUCK 2 -- "${EXACT[@]}" && part changed $((2 * STRUCK)) 2 -- "${EXACT[@]}" --train.parallel=fsdp2 && whole changed 1 -- "${EXACT[@]}" &&
    same "SIGTERM twice, DDP -> FSDP2 -> one rank, as undisturbed" changed one

# A rank dies; torchrun starts all of them again.
(launch killed 2 --max-restarts=2 -- "${EXACT[@]}") >"$OUT/killed.log" 2>&1 &
AGENT=$! STRUCK_PID=""
if reach killed $STRUCK $AGENT; then
    for pid in $(pgrep -P $AGENT); do
        grep -qz '^RANK=1$' "/proc/$pid/environ" && kill -KILL "$pid" && STRUCK_PID=$pid
    done
    if [ -n "$STRUCK_PID" ] && wait $AGENT; then
        same "SIGKILL of rank 1, torchrun --max-restarts, as undisturbed" killed ddp
    else
        say "SIGKILL of rank 1 (process ${STRUCK_PID:-none})" 1 "$(why killed)"
    fi
fi

echo "      $EACH images a rank, $SPEED_PRECISION:"
for ((ranks = 1; ranks <= RANKS; ranks *= 2)); do
    speed $ranks ddp
    [ $ranks -gt 1 ] && speed $ranks fsdp2
done
exit $FAILED
