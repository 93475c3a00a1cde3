#!/usr/bin/env bash
# From real text to a trained model, in one command, on one machine:
#
#   bash slurm/quickstart.sh           the text is what every Rust machine has: documentation and source of this build's crates
#   bash slurm/quickstart.sh PATH      or yours: JSONL, JSONL.gz, JSONL.zst, a plain file, or a folder of such
#
# It installs what is missing (Debian 12), builds, trains a tokenizer, tokenizes, pretrains a small Nemotron-shaped model on two MPI
# ranks, stops in the middle and resumes, and generates from it. Run again, every step finds its work done.
#
# QUICKSTART_OUT      where everything goes (runs/quickstart)
# QUICKSTART_BYTES    at most so much text (12000000)
# QUICKSTART_STEPS    optimizer steps (as in slurm/recipes/quickstart.toml)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/env.sh

OUT=${QUICKSTART_OUT:-runs/quickstart}
BUDGET_BYTES=${QUICKSTART_BYTES:-12000000}
RECIPE=slurm/recipes/quickstart.toml
BATCH=$(sed -n 's/^global = //p' $RECIPE)
STEPS=${QUICKSTART_STEPS:-$(awk -v batch="$BATCH" '/^\[/ { at = $1 } at == "[train]" && $1 == "samples" { print $3 / batch }' $RECIPE)}
VOCAB_SIZE=$(sed -n 's/^vocab_size = //p' $RECIPE)
RANKS=2
# Where the processor multiplies bfloat16 itself that is the faster form; elsewhere it would only be converted.
PRECISION=f32
if grep -qw avx512_bf16 /proc/cpuinfo 2>/dev/null; then PRECISION=bf16; fi
N_STEPS=10
LOGS=$OUT/logs
step_idx=0

# ---- Output

begin() { # WHAT: the headline of a step
  step_idx=$((step_idx + 1))
  step_started=$(date +%s.%N)
  printf '\n[%2d/%d] %s\n' $step_idx $N_STEPS "$1"
}

end() { # [WHAT]: how it went and how long it took
  printf '        %s (%.1f s)\n' "${1:-done}" "$(echo "$(date +%s.%N) $step_started" | awk '{ print $1 - $2 }')"
}

die() {
  printf '\nquickstart: %s\n' "$*" >&2
  exit 1
}

# Of the lines of a step: all but nine tenths of the training steps, indented.
brief() {
  awk -v every=$(((STEPS + 9) / 10)) '
    match($0, /step +[0-9]+\//) {
      split(substr($0, RSTART + 4), n, "/")
      if (n[1] % every != 0 && !/held-out/) next
    }
    { print "        " $0; fflush() }'
}

# logged NAME COMMAND..: runs it, its output into LOGS/NAME.log and in brief onto the screen.
logged() {
  local log=$LOGS/$1.log
  shift
  "$@" 2>&1 | tee -a "$log" | brief || die "this step failed; its output is in $log"
}

# Something else may use the cores too; a rank that spins while it waits would keep its partner from its work.
export OMPI_MCA_mpi_yield_when_idle=1

mpi() {
  local more=()
  if [ "$(nproc)" -lt $RANKS ]; then more=(--oversubscribe); fi
  mpirun -q -n $RANKS --bind-to none "${more[@]}" "$@"
}

# ---- Building

# cargo's output goes to a log; here only how far it is.
build() {
  local log=$LOGS/build.log total started=$SECONDS pid line_s=15 next=15 line
  total=$(grep -c '^name = ' Cargo.lock)
  cargo build --release --color never >"$log" 2>&1 &
  pid=$!
  trap 'kill $pid 2>/dev/null || true' EXIT
  while kill -0 $pid 2>/dev/null; do
    line="compiling: $(grep -c '^ *Compiling' "$log" || true) of at most $total crates, $((SECONDS - started)) s"
    if [ -t 1 ]; then
      printf '\r        %s ' "$line"
    elif [ $((SECONDS - started)) -ge $next ]; then
      printf '        %s\n' "$line"
      next=$((next + line_s))
    fi
    sleep 0.5
  done
  if [ -t 1 ]; then printf '\r%70s\r' ''; fi
  trap - EXIT
  wait $pid || { tail -n 20 "$log" >&2; die "the build failed; the whole log is $log"; }
}

# ---- Text

# take BYTES FROM TO: copies files out of folder FROM, whose "size<TAB>path" lines come in, in an order that is random but
# always the same, until they are BYTES together.
take() {
  local bytes=$1 from=$2 to=$3
  mkdir -p "$to"
  sort -k2 | shuf --random-source=<(yes) |
    awk -F'\t' -v budget="$bytes" '{ taken += $1 } taken <= budget { printf "%s%c", $2, 0 }' |
    (cd "$from" && xargs -0 -r cp --parents --target-directory="$to")
}

# Documentation and source of the crates that the build downloaded; generated tables and bindings of operating systems aside.
crate_files() { # NAME-PATTERN
  find . -type f -name "$1" -size -120k -size +1k -not -path '*/tests/*' -not -path '*/windows*' -not -path '*/wasi*' \
    -not -path '*/libc-*' -not -path '*/linux-raw-sys*' -not -path '*/winapi*' -not -iname '*license*' -not -iname '*changelog*' \
    -printf '%s\t%P\n'
}

machine_docs() {
  find . -type f -size -60k -size +1k \( -iname 'readme*' -o -name '*.txt*' -o -name '*.md*' -o -name '*.rst*' \
    -o -iname '*faq*' -o -name '*.[ch]' -o -name '*.py' -o -name '*.pl' -o -name '*.sh' \) \
    -not -iname '*changelog*' -not -iname '*copyright*' -not -iname '*license*' -not -name '*.zst' -printf '%s\t%P\n'
}

gather_default() { # TO
  local crates=${CARGO_HOME:-$HOME/.cargo}/registry/src
  [ -d "$crates" ] || die "no downloaded crates in $crates; give a path to your text"
  # A third prose of the crates, a sixth documentation of the machine, half source code.
  (cd "$crates" && crate_files '*.md') | take $((BUDGET_BYTES * 2 / 6)) "$crates" "$1/crate-docs"
  (cd /usr/share/doc && machine_docs) | take $((BUDGET_BYTES / 6)) /usr/share/doc "$1/machine-docs"
  (cd "$crates" && crate_files '*.rs') | take $((BUDGET_BYTES * 3 / 6)) "$crates" "$1/crate-source"
}

# Copies a named file, at most BUDGET_BYTES of it after unpacking, in whole lines. A plain file is one document to the reader,
# and one document cannot be trained on and held out: it becomes many.
take_file() { # FILE TO
  local name unpack=cat all
  name=$(basename "$1")
  case $name in
    *.gz) unpack="gzip -dc" name=${name%.gz} ;;
    *.zst)
      command -v zstd >/dev/null || die "$1: to unpack it takes zstd: apt-get install zstd"
      unpack="zstd -dc" name=${name%.zst}
      ;;
  esac
  all=$2/$name
  # head closes the pipe early; what the other side says about that is no error.
  ($unpack "$1" 2>/dev/null || true) | head -c "$BUDGET_BYTES" >"$all"
  if [ "$(stat -c %s "$all")" -eq "$BUDGET_BYTES" ]; then sed -i '$d' "$all"; fi
  [ -s "$all" ] || die "$1: no whole line in its first $BUDGET_BYTES bytes"
  case $name in
    *.jsonl) ;;
    *) split --line-bytes=20000 --suffix-length=5 "$all" "$all." && rm "$all" ;;
  esac
}

gather_from() { # PATH TO
  mkdir -p "$2"
  if [ -f "$1" ]; then
    take_file "$1" "$2"
  else
    (cd "$1" && find . -type f -not -path '*/.*' -printf '%s\t%P\n') | take "$BUDGET_BYTES" "$1" "$2"
    [ -n "$(find "$2" -type f -print -quit)" ] || die "$1: no file of at most $BUDGET_BYTES bytes in it; raise QUICKSTART_BYTES"
  fi
}

# The text is copied once, so that later runs see the same whatever happens to its source.
gather() { # [PATH]
  local source=${1:-default} text=$OUT/text tmp=$OUT/text.tmp
  if [ -e "$text" ]; then
    [ "$(cat "$OUT/text.source")" = "$source" ] ||
      die "$OUT holds a run on other text ($(cat "$OUT/text.source")); set QUICKSTART_OUT to another directory, or remove $OUT"
    return 0
  fi
  rm -rf "$tmp"
  mkdir -p "$tmp"
  if [ "$source" = default ]; then gather_default "$(realpath "$tmp")"; else gather_from "$source" "$(realpath "$tmp")"; fi
  echo "$source" >"$OUT/text.source"
  mv "$tmp" "$text"
}

# ---- Results

# last FIELD: its value in the newest metrics row that has one.
last() { grep -o "\"$1\":[-0-9.eE+]*" "$OUT/run/metrics.jsonl" | tail -n 1 | cut -d: -f2; }

# median FIELD, over all rows.
median() {
  grep -o "\"$1\":[-0-9.eE+]*" "$OUT/run/metrics.jsonl" | cut -d: -f2 | sort -g | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'
}

PROMPTS=("The function" "This crate provides" "# How to")

write_requests() {
  local idx
  [ ! -e "$OUT/requests.jsonl" ] || return 0
  for idx in "${!PROMPTS[@]}"; do
    printf '{"id": "sample-%d", "prompt": "%s", "max_new_tokens": 80, "temperature": 0.7, "top_p": 0.95, "seed": %d}\n' \
      $((idx + 1)) "${PROMPTS[idx]}" $((idx + 1))
  done >"$OUT/requests.jsonl"
}

# The text of a response is a JSON string, close enough to what printf %b takes; \u escapes are control characters here.
show_samples() {
  local idx=0 text
  while IFS= read -r text; do
    printf '\n        "%s" ...\n' "${PROMPTS[idx]}"
    printf '%b\n' "$(sed 's/\\"/"/g; s/\\u[0-9a-f]\{4\}/?/g' <<<"$text")" | cat -s | fold -s -w 100 | sed 's/^/          | /'
    idx=$((idx + 1))
  done < <(sed -n 's/.*"text": *"\(\([^"\\]\|\\.\)*\)".*/\1/p' "$OUT/samples/responses.jsonl")
}

summary() {
  printf '\nSummary\n'
  printf '  held-out loss       %.3f nats a token = %.3f bits a byte of text\n' "$(last validation_loss)" "$(last validation_bits_per_byte)"
  printf '  training speed      %.0f tokens/s on %d ranks (median step)\n' "$(median tokens_per_s)" $RANKS
  printf '  share of ceiling    %.0f %% of the matrix-product rate that the same ranks reached when measured at start\n' \
    "$(median share_of_gemm_ceiling | awk '{ print 100 * $1 }')"
  printf '\nWhere it lies\n'
  local line
  while IFS='|' read -r path what; do printf '  %-42s %s\n' "$OUT/$path" "$what"; done <<LIST
text/|the text, as read
tokenizer/|tokenizer.model, for SentencePiece too
tokens/|token shards, Megatron's .bin and .idx
run/metrics.jsonl|loss, rate and more of every step
run/checkpoints/|HDF5; index.h5 shows whole tensors
loss.svg|the loss curve
samples/responses.jsonl|the samples
logs/|everything that was printed
LIST
  printf '\n  Look at any of them: %s/trireme-inspect PATH [--lineage]\n' "$(realpath --relative-to=. "$TRIREME_BIN")"
}

# ---- The job

input=${1:-}
if [ -n "$input" ]; then
  [ -e "$input" ] || die "$input: no such file or folder"
  input=$(realpath "$input")
fi
mkdir -p "$LOGS"
all_started=$SECONDS
echo "Trireme quick start: text -> tokenizer -> tokens -> pretraining on $RANKS MPI ranks -> samples. Everything goes to $OUT."

begin "Install what is missing (compiler, Open MPI, HDF5, libclang)"
bash slurm/install.sh
end

begin "Build in release mode (the first time takes some minutes)"
build
built=$SECONDS
end

begin "Gather at most $((BUDGET_BYTES / 1000000)) MB of text from ${input:-the documentation and source of the downloaded crates and of this machine}"
gather "$input"
end "$(find "$OUT/text" -type f | wc -l) files, $(du -sb --apparent-size "$OUT/text" | awk '{ printf "%.1f", $1 / 1e6 }') MB in $OUT/text"

begin "Train a tokenizer of $VOCAB_SIZE pieces on it (byte-pair encoding)"
logged tokenizer "$TRIREME_BIN/trireme-train-tokenizer" --input "$OUT/text" --vocab-size "$VOCAB_SIZE" --out "$OUT/tokenizer"
end

begin "Turn the text into tokens on $RANKS ranks, a share of it held out"
logged tokenize mpi "$TRIREME_BIN/trireme-tokenize" --input "$OUT/text" --tokenizer "$OUT/tokenizer" --out "$OUT/tokens" --validation-share 0.02
end

pretrain() {
  mpi "$TRIREME_BIN/trireme-pretrain" --recipe $RECIPE --set train.samples=$((STEPS * BATCH)) \
    --set optimizer.warmup_samples=$((STEPS / 10 * BATCH)) \
    --set train.precision=$PRECISION \
    --set data.train.0.shards="$OUT/tokens" --set validation.shards="$OUT/tokens" --out "$OUT/run" "$@"
}
begin "Pretrain on $RANKS ranks, and stop after half of the $STEPS steps with a checkpoint"
logged pretrain pretrain --stop-after $((STEPS / 2))
end

begin "Resume from that checkpoint and finish"
logged pretrain pretrain
end

begin "Generate three samples"
write_requests
logged generate mpi "$TRIREME_BIN/trireme-generate" --checkpoint "$OUT/run" --requests "$OUT/requests.jsonl" --out "$OUT/samples" \
  --tp $RANKS --dtype $PRECISION
show_samples
end

begin "Draw the loss curve"
"$TRIREME_BIN/trireme-inspect" plot "$OUT/run" --svg "$OUT/loss.svg"
end

begin "Look at the lineage of the samples, down to the text"
"$TRIREME_BIN/trireme-inspect" "$OUT/samples" --lineage | sed 's/^/        /'
end

summary
printf '\nAll of it took %d s, %d s of them after the build.\n' $((SECONDS - all_started)) $((SECONDS - built))
