#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the tests of the CUDA device, training and generation by the programs on one rank and on two ranks
# that share the card, and the benches with PyTorch beside them. Sums up in one table; logs and tables go to $OUT (target/gpu).
#
#   bash slurm/bundle.sh --gpu target/bundle/gpu        where there is a compiler
#   bash tests/gpu.sh [PART..]                          where there is a GPU; parts: first tests runs operations decode train sanitizer
#
# `first`, in five minutes at most: does the device answer, the train step, decode steps and the operations of the 1B model, with what took
# the time call by call. All parts together end by LIMIT_S seconds (3000), and what has been measured is summed up after each, so that
# what is cut off has told what it had. Where a command may take ten minutes, with LIMIT_S=570: "first tests", "operations decode",
# "train", "runs sanitizer" (PyTorch compiles for minutes).
#
# A kernel that faults or hangs takes its process with it, so every test, run and bench is a process of its own with a limit of time, and the
# others go on after it. What fails shows its last lines; whole logs of the tests are in $OUT/cases.log, of the runs in $OUT/programs.log.
#
# Takes target/bundle/gpu or unpacks target/bundle/gpu.tar.xz. CUDA's libraries (NVRTC, cuBLASLt) are taken from LD_LIBRARY_PATH, from
# the Python packages of the python3 in the path or from /usr/local/cuda, else from where they are found ($OUT/machine.log says where);
# PyTorch from the same python3, when it has it.
# Exit code 0 only when every part passed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
repository=$PWD
out=${OUT:-target/gpu}
mkdir -p "$out" target/gpu
out=$(cd "$out" && pwd)

wanted=${*:-first tests runs operations decode train sanitizer}
limit_s=${LIMIT_S:-3000}
for name in $wanted; do
  case $name in
    first | tests | runs | operations | decode | train | sanitizer) ;;
    *) echo "no such part: $name (first tests runs operations decode train sanitizer)" >&2; exit 2 ;;
  esac
done

bundle=target/bundle/gpu
if [ ! -d $bundle ]; then
  [ -f $bundle.tar.xz ] || { echo "no $bundle: make it with slurm/bundle.sh --gpu $bundle, where there is a compiler" >&2; exit 2; }
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
# Where a library lies: in the folders above, else where the linker looks, else, of those that must be there, wherever there is one.
library() { # NAME
  local folder
  for folder in ${LD_LIBRARY_PATH//:/ } ${cuda//:/ }; do if [ -e "$folder/$1" ]; then echo "$folder/$1" && return; fi; done
  ldconfig -p 2>/dev/null | sed -n "s|^[[:space:]]*$1 .* => ||p" | head -n 1 | grep . && return
  case $1 in libnccl*) ;; *) find / \( -path /proc -o -path /sys \) -prune -o -name "$1" -print -quit 2>/dev/null ;; esac
}
LD_LIBRARY_PATH=${LD_LIBRARY_PATH-}
for name in libnvrtc.so.13 libcublasLt.so.13 libnccl.so.2; do
  path=$(library $name)
  if [ -n "$path" ]; then echo "$name: $(readlink -f "$path")"; else echo "$name: not found"; fi
  case :$LD_LIBRARY_PATH:$cuda: in *":$(dirname "$path"):"*) ;; *) if [ -n "$path" ]; then cuda=${cuda:+$cuda:}$(dirname "$path"); fi ;; esac
done >"$out/machine.log"
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$cuda
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_btl_vader_single_copy_mechanism=none
export TRIREME_KERNEL_CACHE=$PWD/target/gpu/kernels TRIREME_NEEDS_GPU=1 RUST_BACKTRACE=0
if python3 -c 'import torch' 2>/dev/null; then TRIREME_TORCH_PYTHON=$(command -v python3) && export TRIREME_TORCH_PYTHON; fi

names=() outcomes=() seconds=()
outcome_of() { # CODE LIMIT_S
  case $1 in 0) echo passed ;; 77) echo skipped ;; 124 | 137) echo "over $2 s" ;; *) echo "failed ($1)" ;; esac
}
# In a session of its own, which ends with it: what it started may have groups of processes of their own.
part() { # NAME LIMIT_S: the function of that name
  local name=$1 limit=$2 started=$SECONDS code
  # Some seconds are for the summary.
  if [ "$limit" -gt $((limit_s - SECONDS - 5)) ]; then limit=$((limit_s - SECONDS - 5)); fi
  if [ "$limit" -lt 10 ]; then
    names+=("$name") outcomes+=("not begun") seconds+=(0)
    return
  fi
  printf '\n=== %s\n' "$name"
  # shellcheck disable=SC2016
  setsid -w bash -c 'echo $$ >"$1"; exec timeout -k 10 "$2" bash -c "$3"' - "$session" "$limit" "$name" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  end_session
  # What was cut off has said something too.
  local begun
  for begun in "$repository/target/gpu/$name"/*.begun; do
    case $name in first | operations | decode | train) if [ -e "$begun" ]; then tail -n 100 "${begun%.begun}.log" | cut -c1-600 | sed 's/^/    /'; fi ;; esac
  done | tee -a "$out/$name.log"
  names+=("$name") outcomes+=("$(outcome_of "$code" "$limit")") seconds+=($((SECONDS - started)))
  numbers | tee "$out/numbers.log"
}

# What was measured so far, of all that is wanted of a GPU the lines that say how near it comes.
numbers() {
  local logs=() log
  for log in "$repository"/target/gpu/{first,operations,decode,train}/*.log; do if [ -e "$log" ]; then logs+=("$log"); fi; done
  if [ ${#logs[@]} = 0 ]; then return; fi
  printf '\n=== Numbers so far\n'
  grep -hE '^ *(1b|1b-d192) bf16(, [^:]*)?: |^ *PyTorch, compiled' "${logs[@]}" | sed 's/^ */train step, /' | awk '!seen[$0]++'
  awk -F' *[|] *' '
    # model, operation, shape, rate, ceiling, share, of gemm
    /[|] TFLOP\/s [|] ceiling/ { of_flops = 1 }
    /[|] GB\/s [|] ceiling/ { of_flops = 0 }
    /(Fast|Reproducible) order of sums/ { order = (/Fast/ ? "fast" : "reproducible") (/one after another/ ? ", kernels one after another" : "") }
    NF == 9 && $5 + 0 > 0 && $6 + 0 > 0 && $7 + 0 > 0 {
      key = $2 " " $3 " " $4
      if (key in seen) next
      seen[key] = 1
      if (of_flops && $6 + 0 > ceiling) ceiling = $6 + 0
      if (of_flops && $3 ~ /^attention/) attention[++n_attention] = sprintf("%s: %s TFLOP/s, %s of the GEMM ceiling", key, $5, $7)
      if (of_flops && $3 == "gemm") { n_gemm++; sum += $7; if (least == "" || $7 + 0 < least) { least = $7 + 0; worst = key } }
      if (!of_flops && $3 !~ /gemm/) { n_bytes++; if ($7 + 0 >= 0.85) n_good++; else slow[++n_slow] = sprintf("%s: %s of copying", key, $7) }
      if (!of_flops && $3 ~ /^gemm(_activation)?$/) few[++n_few] = sprintf("%s: %s GB/s, %s of copying", key, $5, $7)
    }
    # model, weights, sequences, ms a step, tokens/s, GB/s, of reading, and three more
    NF == 12 && $4 ~ /^[0-9]+$/ && $5 ~ /^[0-9.]+$/ {
      line = sprintf("decode %s, %s, %s sequences: %s ms a step, %s of reading", $2, order, $4, $5, $8)
      if (!(line in seen)) decode[++n_decode] = line
      seen[line] = 1
    }
    END {
      for (i = 1; i <= n_decode; i++) print decode[i]
      if (ceiling) printf "GEMM ceiling %.0f TFLOP/s; products by the fastest: mean %.2f of it over %d shapes, least %s (%s)\n", ceiling, n_gemm ? sum / n_gemm : 0, n_gemm, least, worst
      for (i = 1; i <= n_attention; i++) print attention[i]
      for (i = 1; i <= n_few; i++) print few[i]
      if (n_bytes) printf "limited by memory: %d of %d operations at 0.85 of copying or more\n", n_good, n_bytes
      for (i = 1; i <= n_slow; i++) print "  below: " slow[i]
    }' "${logs[@]}"
}
session=$repository/target/gpu/session.$$
# Ends all processes of the part's session. By /proc: a bare machine may have no pkill.
end_session() {
  local id of rest
  if [ ! -e "$session" ]; then return; fi
  id=$(cat "$session")
  for of in /proc/[0-9]*; do
    # Behind the name, in parentheses: state, parent, group, session.
    rest=$(cat "$of/stat" 2>/dev/null) && rest=${rest##*) }
    # shellcheck disable=SC2086
    set -- $rest
    if [ "${4:-}" = "$id" ]; then kill -KILL "${of#/proc/}" 2>/dev/null; fi
  done
  rm -f "$session"
}
trap 'end_session; exit 130' INT TERM

# One command of a part, and how it went, in a line; its last lines where it failed or LINES are asked for. Whole log to $work/NAME.log.
step() { # NAME LIMIT_S LINES COMMAND..
  local name=$1 limit=$2 lines=$3 started=$SECONDS code=0
  shift 3
  touch "$work/$name.begun"
  # Waited for, so that a part that is cut off can still say what it had.
  timeout -k 5 "$limit" "$@" >"$work/$name.log" 2>&1 </dev/null &
  wait $! || code=$?
  rm -f "$work/$name.begun"
  printf '%-60s %-12s %3d s\n' "$name" "$(outcome_of $code "$limit")" $((SECONDS - started))
  if [ $code != 0 ] && [ $code != 77 ] && [ "$lines" -lt 12 ]; then lines=12; fi
  if [ "$lines" != 0 ]; then tail -n "$lines" "$work/$name.log" | cut -c1-600 | sed 's/^/    /'; fi
  case $code in 0 | 77) return 0 ;; *) touch "$work/failed" && return 1 ;; esac
}
begin() { # PART: an empty folder for its logs
  work=$repository/target/gpu/$1
  rm -rf "$work" && mkdir -p "$work" && cd "$work" || exit 1
  export work
}
all_logs() { # FILE: all logs of a part in one, however it ends; what was not through, with its last line
  # shellcheck disable=SC2064
  trap "end_logs '$1'" EXIT
  # What cuts a part off says so twice, to it and to its group: the second must not cut off the first.
  trap "trap '' TERM; exit 124" TERM
}
end_logs() {
  local log
  for log in "$work"/*.log; do printf '\n=== %s\n' "$(basename "$log" .log)"; cat "$log"; done >"$out/$1"
  for log in "$work"/*.begun; do
    if [ -e "$log" ]; then printf '%-60s not through: %s\n' "$(basename "$log" .begun)" "$(tail -n 1 "${log%.begun}.log" | cut -c1-300)"; fi
  done
  test ! -e "$work/failed"
  exit $?
}

# A train step, and with the kernels for every GPU where Hopper's own gave no number.
train_step() { # NAME LIMIT_S LIMIT_S ARGUMENT..
  local name=$1 limit=$2 other=$3
  shift 3
  step "$name" "$limit" 140 "$bin/bench/train_step" cuda "$@" || grep -q 'tokens/s, ' "$work/$name.log" ||
    step "$name-portable" "$other" 140 env TRIREME_HOPPER_KERNELS=0 "$bin/bench/train_step" cuda "$@"
}

# The smallest that says most.
first() {
  begin first
  step answers 60 3 "$bin/test/gpu" --exact operations::the_device_answers --nocapture || exit 1
  train_step 1b 130 90 1b alone
  step decode 70 100 "$bin/bench/decode" cuda fast 1b 1 kernels ||
    step decode-one-by-one 50 100 env TRIREME_DEPENDENT_LAUNCH=0 "$bin/bench/decode" cuda fast 1b 1 kernels
  step operations 120 1000 "$bin/bench/gpu" 1B
  [ ! -e "$work/failed" ]
}

# The device first: without it the others would each say the same. Then the simplest first, four at a time.
one_test() { step "$1" 120 0 "$bin/test/gpu" --exact "$1" --nocapture --test-threads 1; grep -h '^worst of' "$work/$1.log" | sed 's/^/    /'; }
tests() {
  begin tests && all_logs cases.log
  step operations::the_device_answers 90 3 "$bin/test/gpu" --exact operations::the_device_answers --nocapture || exit 1
  "$bin/test/gpu" --list --format terse | sed -n 's/: test$//p' | grep -v the_device_answers >all
  { for word in copies row_ fp8 portable_attention attention_ products canonical::sums same_bits tokens recorded nccl ''; do grep -e "$word" all; done; } |
    awk '!seen[$0]++' | xargs -P 4 -I{} bash -c 'said=$(one_test {}); echo "$said"'
}

# The smaller tables only: the tool slows kernels a hundredfold. What is not through in its time has shown nothing so far.
sanitized() { # CHECK TEST
  local code=0 log="$work/$1 $2.log"
  timeout -k 5 100 "$tool" --tool "$1" --error-exitcode 86 --target-processes all "$bin/test/gpu" --exact "$2" --nocapture >"$log" 2>&1 || code=$?
  printf '%-10s %-60s %s\n' "$1" "$2" "$(outcome_of $code 100)"
  grep -hE 'ERROR SUMMARY|RACECHECK SUMMARY|Invalid|hazard' "$log" | head -n 4 | sed 's/^/    /'
  case $code in 0 | 124 | 137) ;; *) touch "$work/failed" ;; esac
}
sanitizer() {
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) || { echo "no compute-sanitizer"; exit 77; }
  export tool
  begin sanitizer && all_logs sanitizer-cases.log
  for check in memcheck racecheck; do
    "$bin/test/gpu" --list --format terse | sed -n 's/: test$//p' | grep -E 'operations::(.*attention|row|rounding|tokens)' | sed "s/^/$check /"
  done | xargs -P 4 -L 1 bash -c 'said=$(sanitized "$0" "$1"); echo "$said"'
}

# Losses step by step of two runs: equal within a share that only rounding in another order explains.
compare() { # RUN RUN SHARE
  python3 - "$@" <<'PYTHON'
import json, os, sys
for run in sys.argv[1:3]:
    if not os.path.exists(run + "/metrics.jsonl"):
        sys.exit(f"{run} has no metrics")
# A line is of a step or, where a job begins, of the job.
steps = lambda run: [row["loss"] for row in map(json.loads, open(run + "/metrics.jsonl")) if "step" in row]
a, b = map(steps, sys.argv[1:3])
worst = max((abs(x - y) / x for x, y in zip(a, b)), default=float("inf"))
print(f"{len(a)} and {len(b)} steps, losses {a[:1]} .. {a[-1:]}, apart by {worst:.1e} at most, allowed {sys.argv[3]}")
sys.exit(not (len(a) == len(b) > 0 and worst <= float(sys.argv[3])))
PYTHON
}
tokens() { grep -ho '"tokens": *\[[^]]*\]' "$1"/*.jsonl; }
same_tokens() { cmp <(tokens "$1") <(tokens "$2"); }

runs() {
  begin runs && all_logs programs.log
  mkdir -p text runs/quickstart
  local i linear
  for i in $(seq 40); do { echo "$i"; cat "$repository"/README.md "$repository"/src/device/*.rs; } >"text/$i.txt"; done
  step tokenizer 60 0 "$bin/trireme-train-tokenizer" --input text --vocab-size 2048 --out tokenizer || exit 1
  step tokens 60 0 "$bin/trireme-tokenize" --input text --tokenizer tokenizer --out runs/quickstart/tokens --validation-share 0.2 || exit 1
  local -a train=("$bin/trireme-pretrain" --recipe "$bin/../recipes/quickstart.toml" --set train.samples=160 --set optimizer.warmup_samples=48
    --set model.vocab_size=2048 --set validation.every_steps=5 --set checkpoint.every_steps=5)
  local -a one=(--set parallel.tp=1 --set parallel.sequence_parallel=false) two=("$bin/mpirun" -q -n 2 --bind-to none)
  step cpu 120 1 "${train[@]}" "${one[@]}" --device cpu --out cpu
  step gpu 90 1 "${train[@]}" "${one[@]}" --device cuda --out gpu
  step gpu-tp2 60 1 "${two[@]}" "${train[@]}" --device cuda --out gpu-tp2
  step gpu-pp2 60 1 "${two[@]}" "${train[@]}" "${one[@]}" --set parallel.pp=2 --device cuda --out gpu-pp2
  step gpu-dp2 60 1 "${two[@]}" "${train[@]}" "${one[@]}" --device cuda --out gpu-dp2
  for i in gpu gpu-tp2 gpu-pp2 gpu-dp2; do step "cpu and $i" 20 1 bash -c "compare cpu $i 2e-4"; done
  step gpu-bf16 60 1 "${train[@]}" "${one[@]}" --set train.precision=bf16 --device cuda --out gpu-bf16
  step "cpu and gpu-bf16" 20 1 bash -c "compare cpu gpu-bf16 2e-2"
  # In reproducible numerics nothing may differ: one rank, and two that share the card.
  local -a same=("${train[@]}" --set numerics.mode=reproducible --set train.precision=bf16 --device cuda)
  step same 60 1 "${same[@]}" "${one[@]}" --out same
  step same-tp2 60 1 "${two[@]}" "${same[@]}" --out same-tp2
  step "same and same-tp2" 20 1 bash -c "compare same same-tp2 0"
  echo '{"id": "a", "prompt": "The device", "max_new_tokens": 32}' >requests.jsonl
  local -a generate=("$bin/trireme-generate" --checkpoint gpu --requests requests.jsonl)
  step generate-gpu 60 1 "${generate[@]}" --device cuda --out on-gpu
  step generate-cpu 60 1 "${generate[@]}" --device cpu --out on-cpu
  step "tokens of gpu and cpu" 20 1 bash -c "same_tokens on-gpu on-cpu"
  step generate-gpu-tp2 60 1 "${two[@]}" "${generate[@]}" --tp 2 --device cuda --out on-gpu-tp2
  step "responses of gpu and gpu-tp2" 20 1 cmp on-gpu/responses.jsonl on-gpu-tp2/responses.jsonl
  # Scales of rows need Hopper. Tensor cores add 8-bit products in less than f32, the CPU in f32; from then on both round to E4M3, whose
  # errors move a loss by less than 0.1 nats of at least 5 (tests/fp8_training.rs).
  if [ "$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)" = 9.0 ]; then
    for linear in fp8-tensor fp8; do
      for i in cpu cuda; do step $i-$linear 90 1 "${train[@]}" "${one[@]}" --set numerics.linear=$linear --device $i --out $i-$linear; done
      step "cpu-$linear and cuda-$linear" 20 1 bash -c "compare cpu-$linear cuda-$linear 2e-2"
    done
  fi
}

# The simplest kernels first.
operations() {
  begin operations
  step memory 120 1000 "$bin/bench/gpu" but gemm attention
  step products 120 1000 "$bin/bench/gpu" gemm
  step attention 120 1000 "$bin/bench/gpu" attention
  [ ! -e "$work/failed" ]
}

decode() {
  begin decode
  step fast 110 200 "$bin/bench/decode" cuda fast kernels
  # Without programmatic dependent launch.
  step one-by-one 40 20 env TRIREME_DEPENDENT_LAUNCH=0 "$bin/bench/decode" cuda fast 1b 1
  step reproducible 90 100 "$bin/bench/decode" cuda
  [ ! -e "$work/failed" ]
}

train() {
  begin train
  train_step 1b 200 90 1b
  train_step 1b-d192 200 90 1b-d192
  train_step 1b-fp8 80 80 1b fp8 alone
  [ ! -e "$work/failed" ]
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader | tee -a "$out/machine.log" ||
  { echo "no nvidia-smi: is this a machine with an NVIDIA GPU?" >&2; exit 2; }
export -f outcome_of step begin all_logs end_logs one_test train_step first tests sanitized sanitizer compare tokens same_tokens runs operations decode train
export bin repository out
for name in $wanted; do
  case $name in
    first) part first 300 ;;
    tests) part tests 330 ;;
    runs) part runs 400 ;;
    operations) part operations 370 ;;
    decode) part decode 245 ;;
    train) part train 400 ;;
    sanitizer) part sanitizer 180 ;;
  esac
done

printf '\n=== Summary\n'
failed=0
for idx in "${!names[@]}"; do
  printf '%-12s %-14s %4d s\n' "${names[idx]}" "${outcomes[idx]}" "${seconds[idx]}"
  case ${outcomes[idx]} in passed | skipped) ;; *) failed=1 ;; esac
done >"$out/summary.log"
cat "$out/summary.log"
# Of the rate of the fastest at the same shapes, from the last column of the tables of operations.
if [ -e "$out/operations.log" ]; then
  for kind in "" ", portable"; do
    grep -E "^ *\| [^,|]*$kind \| gemm_in_" "$out/operations.log" | awk -F'|' '$8 + 0 > 0 {print $8 + 0}' | sort -n |
      awk -v kind="$kind" '{x[NR] = $1} END {if (NR) printf "canonical products%s over the fastest: median %.2f, least %.2f, %d shapes\n", kind, x[int((NR + 1) / 2)], x[1], NR}'
  done
fi
exit $failed
