#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the tests of the CUDA device, a training run by the programs on one rank and on two ranks that
# share the card, and the benches with PyTorch beside them. Sums up in one table; logs and tables go to $OUT (target/gpu).
#
#   bash slurm/bundle.sh --tests target/bundle/gpu      where there is a compiler
#   bash tests/gpu.sh [PART..]                          where there is a GPU; parts: tests runs operations decode train sanitizer
#
# Where a command may take ten minutes: first "tests runs", then "operations decode", then "train sanitizer" (PyTorch compiles for minutes).
#
# Takes target/bundle/gpu or unpacks target/bundle/gpu.tar.xz. CUDA's libraries (NVRTC, cuBLASLt) are taken from LD_LIBRARY_PATH, from
# /usr/local/cuda or from the Python packages of the python3 in the path; PyTorch from the same python3, when it has it.
# Exit code 0 only when every part passed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
repository=$PWD
out=${OUT:-target/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)

bundle=target/bundle/gpu
if [ ! -d $bundle ]; then
  [ -f $bundle.tar.xz ] || { echo "no $bundle: make it with slurm/bundle.sh --tests $bundle, where there is a compiler" >&2; exit 2; }
  # Python reads xz where the xz program is missing.
  tar -C target/bundle -xf $bundle.tar.xz 2>/dev/null ||
    python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' $bundle.tar.xz target/bundle || exit 1
fi
bin=$PWD/$bundle/bin
built_in=$(cat $bundle/built_in)
if [ ! -e "$built_in" ]; then mkdir -p "$(dirname "$built_in")" && ln -s "$repository" "$built_in"; fi

cuda=$(python3 -c 'import glob, nvidia
print(":".join(sorted({d for p in nvidia.__path__ for d in glob.glob(p + "/*/lib")})))' 2>/dev/null || true)
for folder in /usr/local/cuda/lib64 /usr/local/nvidia/lib64; do if [ -d $folder ]; then cuda=$cuda${cuda:+:}$folder; fi; done
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$cuda
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_btl_vader_single_copy_mechanism=none
export TRIREME_KERNEL_CACHE=$PWD/target/gpu/kernels TRIREME_NEEDS_GPU=1
if python3 -c 'import torch' 2>/dev/null; then TRIREME_TORCH_PYTHON=$(command -v python3) && export TRIREME_TORCH_PYTHON; fi

names=() outcomes=() seconds=()
part() { # NAME LIMIT_S COMMAND..
  local name=$1 limit=$2 started=$SECONDS outcome=passed code=0
  shift 2
  printf '\n=== %s\n' "$name"
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  case $code in 0) ;; 77) outcome=skipped ;; 124) outcome="over $limit s" ;; *) outcome="failed ($code)" ;; esac
  names+=("$name") outcomes+=("$outcome") seconds+=($((SECONDS - started)))
}

tests() { "$bin/test/gpu" --test-threads 4; }

# The smaller table only: the tool slows kernels a hundredfold.
sanitizer() {
  local tool
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) || { echo "no compute-sanitizer"; return 77; }
  for check in memcheck racecheck; do
    "$tool" --tool $check --error-exitcode 1 --target-processes all "$bin/test/gpu" operations:: --test-threads 1 || return 1
  done
}

# Losses step by step of two runs: equal within a share that only rounding in another order explains.
compare() { # RUN RUN SHARE
  python3 - "$@" <<'PYTHON'
import json, sys
a, b = ([json.loads(line)["loss"] for line in open(run + "/metrics.jsonl")] for run in sys.argv[1:3])
worst = max(abs(x - y) / x for x, y in zip(a, b))
print(f"{sys.argv[1]} and {sys.argv[2]}: {len(a)} and {len(b)} steps, losses {a[0]:.4f} .. {a[-1]:.4f}, apart by {worst:.1e} at most, allowed {sys.argv[3]}")
sys.exit(not (len(a) == len(b) > 0 and worst <= float(sys.argv[3])))
PYTHON
}

runs() {
  set -e -o pipefail
  local work=$repository/target/gpu/runs i
  rm -rf "$work" && mkdir -p "$work/text" "$work/runs/quickstart" && cd "$work"
  for i in $(seq 40); do { echo "$i"; cat "$repository"/README.md "$repository"/src/device/*.rs; } >"text/$i.txt"; done
  "$bin/trireme-train-tokenizer" --input text --vocab-size 2048 --out tokenizer | tail -n 1
  "$bin/trireme-tokenize" --input text --tokenizer tokenizer --out runs/quickstart/tokens --validation-share 0.2 | tail -n 2
  local -a train=("$bin/trireme-pretrain" --recipe "$bin/../recipes/quickstart.toml" --set train.samples=160 --set optimizer.warmup_samples=48
    --set model.vocab_size=2048 --set validation.every_steps=5 --set checkpoint.every_steps=5)
  "${train[@]}" --set parallel.tp=1 --set parallel.sequence_parallel=false --device cpu --out cpu 2>&1 | tail -n 2
  "${train[@]}" --set parallel.tp=1 --set parallel.sequence_parallel=false --device cuda --out gpu 2>&1 | tail -n 2
  "$bin/mpirun" -q -n 2 --bind-to none "${train[@]}" --device cuda --out gpu-tp2 2>&1 | tail -n 2
  "$bin/mpirun" -q -n 2 --bind-to none "${train[@]}" --set parallel.tp=1 --set parallel.sequence_parallel=false --set parallel.pp=2 \
    --device cuda --out gpu-pp2 2>&1 | tail -n 2
  "$bin/mpirun" -q -n 2 --bind-to none "${train[@]}" --set parallel.tp=1 --set parallel.sequence_parallel=false --device cuda --out gpu-dp2 2>&1 | tail -n 2
  for i in gpu gpu-tp2 gpu-pp2 gpu-dp2; do compare cpu $i 2e-4; done
  "${train[@]}" --set parallel.tp=1 --set parallel.sequence_parallel=false --set train.precision=bf16 --device cuda --out gpu-bf16 2>&1 | tail -n 2
  compare cpu gpu-bf16 2e-2
  # In reproducible numerics nothing may differ: one rank, and two that share the card.
  local -a same=("${train[@]}" --set numerics.mode=reproducible --set train.precision=bf16 --device cuda)
  "${same[@]}" --set parallel.tp=1 --set parallel.sequence_parallel=false --out same 2>&1 | tail -n 2
  "$bin/mpirun" -q -n 2 --bind-to none "${same[@]}" --out same-tp2 2>&1 | tail -n 2
  compare same same-tp2 0
  # Scales of rows need Hopper. Tensor cores add 8-bit products in less than f32, the CPU in f32; from then on both round to E4M3, whose
  # errors move a loss by less than 0.1 nats of at least 5 (tests/fp8_training.rs).
  if [ "$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | cut -d. -f1)" -ge 9 ]; then
    for linear in fp8 fp8-tensor; do
      for i in cpu cuda; do
        "${train[@]}" --set parallel.tp=1 --set parallel.sequence_parallel=false --set numerics.linear=$linear --device $i --out $i-$linear 2>&1 | tail -n 2
      done
      compare cpu-$linear cuda-$linear 2e-2
    done
  fi
  echo '{"id": "a", "prompt": "The device", "max_new_tokens": 32}' >requests.jsonl
  "$bin/trireme-generate" --checkpoint gpu --requests requests.jsonl --device cuda --out on-gpu
  "$bin/trireme-generate" --checkpoint gpu --requests requests.jsonl --device cpu --out on-cpu
  cmp <(grep -o '"tokens": *\[[^]]*\]' on-gpu/*.jsonl) <(grep -o '"tokens": *\[[^]]*\]' on-cpu/*.jsonl)
  tail -n 1 on-gpu/*.jsonl
  "$bin/mpirun" -q -n 2 --bind-to none "$bin/trireme-generate" --checkpoint gpu --requests requests.jsonl --tp 2 --device cuda --out on-gpu-tp2
  cmp on-gpu/responses.jsonl on-gpu-tp2/responses.jsonl
}

operations() { "$bin/bench/gpu"; }

decode() { "$bin/bench/decode" cuda && "$bin/bench/decode" cuda fast; }

train() { "$bin/bench/train_step" cuda && "$bin/bench/train_step" cuda 1b fp8; }

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader | tee "$out/machine.log" ||
  { echo "no nvidia-smi: is this a machine with an NVIDIA GPU?" >&2; exit 2; }
export -f tests sanitizer compare runs operations decode train
export bin repository
wanted=" ${*:-tests runs operations decode train sanitizer} "
for name in $wanted; do
  case $name in
    tests) part tests 180 bash -c tests ;;
    sanitizer) part sanitizer 120 bash -c sanitizer ;;
    runs) part runs 240 bash -c runs ;;
    operations) part operations 240 bash -c operations ;;
    decode) part decode 240 bash -c decode ;;
    train) part train 420 bash -c train ;;
    *) echo "no such part: $name (tests sanitizer runs operations decode train)" >&2; exit 2 ;;
  esac
done

printf '\n=== Summary\n'
failed=0
for idx in "${!names[@]}"; do
  printf '%-12s %-14s %4d s\n' "${names[idx]}" "${outcomes[idx]}" "${seconds[idx]}"
  case ${outcomes[idx]} in passed | skipped) ;; *) failed=1 ;; esac
done | tee "$out/summary.log"
grep -qE 'failed|over' "$out/summary.log" && failed=1
exit $failed
