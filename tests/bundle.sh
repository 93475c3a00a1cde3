#!/usr/bin/env bash
# slurm/bundle.sh: unpacked elsewhere, with the system's copies of every library and of the MPI's plugins made unreadable, the programs
# still train on two ranks and generate. A library that was left out, or a path of the build machine, fails here.
#
#   bash tests/bundle.sh          exit code 77: this machine does not let us hide files
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! unshare --mount true 2>/dev/null; then
  echo "skipped: unshare --mount is not allowed here"
  exit 77
fi
rm -rf target/tests/bundle
mkdir -p target/tests/bundle/elsewhere
bash slurm/bundle.sh target/tests/bundle/trireme
tar -xf target/tests/bundle/trireme.tar.xz -C target/tests/bundle/elsewhere
rm -rf target/tests/bundle/trireme
cp README.md slurm/recipes/quickstart.toml target/tests/bundle/

# In a mount namespace of its own: hide, then run with an empty environment.
hide_and_run() {
  local place name
  for name in elsewhere/trireme/lib/*; do
    for place in /usr/lib/x86_64-linux-gnu /usr/lib64 /usr/local/lib; do
      if [ -e "$place/$(basename "$name")" ]; then mount --bind /dev/null "$(readlink -f "$place/$(basename "$name")")"; fi
    done
  done
  for place in /usr/lib/x86_64-linux-gnu/{openmpi,pmix2,ucx} /usr/share/openmpi /etc/openmpi; do
    if [ -d "$place" ]; then mount -t tmpfs tmpfs "$place"; fi
  done
  if mpirun --version >/dev/null 2>&1; then echo "bundle: the system's mpirun still runs, so nothing was hidden" >&2; return 1; fi
  env -i PATH=/usr/bin:/bin HOME="$HOME" OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
    bash -euo pipefail -c "$(declare -f train_and_generate); train_and_generate"
}
train_and_generate() {
  local bin program i
  bin=$PWD/elsewhere/trireme/bin
  for program in "$bin"/trireme-*; do "$program" --help >/dev/null; done
  mkdir text; for i in $(seq 16); do { echo $i; cat README.md; } >text/$i.md; done
  "$bin"/trireme-train-tokenizer --input text --vocab-size 600 --out tokenizer
  mkdir -p runs/quickstart
  "$bin"/trireme-tokenize --input text --tokenizer tokenizer --out runs/quickstart/tokens --validation-share 0.4
  "$bin"/mpirun -q -n 2 --bind-to none "$bin"/trireme-pretrain --recipe quickstart.toml --out run --set train.samples=32 \
    --set optimizer.warmup_samples=16 --set model.vocab_size=600 --set model.n_layers=1 --set validation.samples=8
  echo '{"id": "a", "prompt": "Every stage", "max_new_tokens": 4}' >requests.jsonl
  "$bin"/trireme-generate --checkpoint run --requests requests.jsonl --out answers
  "$bin"/trireme-inspect run >/dev/null
  ls answers/*.jsonl run/checkpoints
}
export -f hide_and_run train_and_generate
cd target/tests/bundle
if ! unshare --mount --propagation private bash -euo pipefail -c hide_and_run >run.log 2>&1; then
  tail -n 20 run.log
  exit 1
fi
tail -n 3 run.log
rm -rf elsewhere
