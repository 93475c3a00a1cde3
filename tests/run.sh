#!/usr/bin/env bash
# Every test, from a fresh clone, on Debian 12 (or wherever slurm/install.sh finds what is needed): installs what is missing, then
# runs the parts, all of them whatever fails, and sums up. Exit code 0 only when nothing failed.
#
#   bash tests/run.sh                 everything
#   bash tests/run.sh format slurm    these parts only: format scripts build unit slurm bundle real-model clippy (clippy only when named)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=slurm/env.sh
source slurm/env.sh
case ":$PATH:" in *":$HOME/.cargo/bin:"*) ;; *) export PATH=$PATH:$HOME/.cargo/bin ;; esac

SKIPPED=77 # the exit code by which a part says that it could not run here (automake's)
names=() outcomes=() seconds=()

part() { # NAME COMMAND..
  local name=$1 code=0 started=$SECONDS outcome=passed
  shift
  printf '\n=== %s\n' "$name"
  "$@" || code=$?
  if [ $code = $SKIPPED ]; then outcome=skipped; elif [ $code != 0 ]; then outcome=failed; fi
  names+=("$name") outcomes+=("$outcome") seconds+=($((SECONDS - started)))
}

# The oracles of some tests are Python packages, kept apart from the system's, and so are CUDA's compilers (they need no GPU).
install_all() {
  local packages=(numpy h5py safetensors sentencepiece protobuf) log=target/tests/pip.log
  local cuda=(nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cuda-nvrtc)
  packages+=("${cuda[@]/%/==13.0.*}")
  bash slurm/install.sh tests || return 1
  if ! .venv/bin/python -c 'import numpy, h5py, safetensors, sentencepiece, google.protobuf' 2>/dev/null ||
    ! compgen -G '.venv/lib/*/site-packages/nvidia/cu13/bin/nvcc' >/dev/null ||
    ! compgen -G '.venv/lib/*/site-packages/nvidia/cu13/lib/libnvrtc.so.13' >/dev/null; then
    mkdir -p target/tests
    { python3 -m venv --clear .venv && .venv/bin/pip install --quiet "${packages[@]}"; } >$log 2>&1 || { tail -n 5 $log; return 1; }
    echo "installed ${packages[*]} into .venv"
  fi
}

scripts() {
  local file failed=0 n=0
  while IFS= read -r file; do
    n=$((n + 1))
    bash -n "$file" || failed=1
    if command -v shellcheck >/dev/null; then shellcheck -S warning "$file" || failed=1; fi
  done < <(find .ci slurm tests benches -name '*.sh' -o -name '*.sbatch' -o -path .ci/run)
  echo "$n scripts read"
  return $failed
}

# One program of tests, WHAT being cargo's words for it: a line, and what it printed when it failed.
unit_of() { # WHAT..
  local log started=$SECONDS outcome=passed
  log=target/tests/unit/$(echo "$*" | tr -cd 'a-z_').log
  cargo test --release --quiet --no-fail-fast "$@" >"$log" 2>&1 </dev/null || outcome=FAILED
  # Under a lock, so that two reports do not mix.
  {
    flock 9
    printf '%-6s %4d s  %s\n' $outcome $((SECONDS - started)) "$*"
    if [ $outcome = passed ]; then grep -E '^(test result|mpi_ranks|nccl): ' "$log"; else cat "$log"; fi
  } 9>target/tests/unit/report.lock
  [ $outcome = passed ]
}

# Two programs at a time, for many wait: for ranks to start, to hang, to be killed. The longest come first; none hides another's failure.
unit() {
  local longest=(kernels kills nccl mpi_ranks) file name failed=0
  rm -rf target/tests/unit
  mkdir -p target/tests/unit
  cargo test --release --no-run --quiet || return 1
  {
    printf -- '--test %s\n' "${longest[@]}"
    printf -- '%s\n' --lib --bins --doc
    for file in tests/*.rs tests/*/main.rs; do
      name=${file#tests/} name=${name%/main.rs} name=${name%.rs}
      case " ${longest[*]} " in *" $name "*) ;; *) echo "--test $name" ;; esac
    done
  } >target/tests/unit/programs
  export -f unit_of
  # shellcheck disable=SC2016 # the words are those of each line
  xargs -P 2 -L 1 bash -c 'unit_of "$@"' unit <target/tests/unit/programs || failed=1
  # shellcheck disable=SC2016 # awk's variables
  cat target/tests/unit/*.log | awk '/^test result: / { passed += $4; failed += $6 } /^(mpi_ranks|nccl): / { passed += $2; failed += $4 } END { print passed " tests passed, " failed " failed" }'
  return $failed
}

build() { cargo build --release --all-targets; }

slurm() { bash tests/slurm_cluster.sh; }

bundle() { bash tests/bundle.sh; }

real-model() { bash tests/real_model.sh; }

wanted=" ${*:-format scripts build unit slurm bundle real-model} "
for name in $wanted; do
  case $name in
    format | scripts | build | unit | slurm | bundle | real-model | clippy) ;;
    *) echo "no such part: $name (format scripts build unit slurm bundle real-model clippy)" >&2; exit 2 ;;
  esac
done
part install install_all
[ "${outcomes[0]}" = passed ] || exit 1
for name in $wanted; do
  case $name in
    format) part format cargo fmt --check ;;
    clippy) part clippy cargo clippy --release --all-targets -- -D warnings ;;
    *) part "$name" "$name" ;;
  esac
done

printf '\n=== Summary\n'
passed=0 failed=0 skipped=0
for idx in "${!names[@]}"; do
  printf '%-10s %-8s %4d s\n' "${names[idx]}" "${outcomes[idx]}" "${seconds[idx]}"
  ((${outcomes[idx]} += 1))
done
printf 'parts: %d passed, %d failed, %d skipped\n' $passed $failed $skipped
[ $failed = 0 ]
