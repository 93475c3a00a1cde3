#!/usr/bin/env bash
# The job scripts on a real SLURM cluster of two nodes (slurm/dev-cluster.sh), with real binaries and a little real text:
#
# - the chain text -> tokenizer -> tokens -> pretraining on both nodes -> responses, by afterok dependencies, ends well and
#   leaves finished artifacts; submitted again, it finds everything done;
# - a job that gets USR1 saves, leaves with 75, is requeued, goes on where it was and counts every step exactly once;
# - a wrong recipe ends a job with 2, a damaged shard with 3, and the job that depends on it never runs;
# - when one rank of two is killed, the job ends instead of waiting for ever;
# - when the machine of a rank fails, the job is requeued, stays away from it, and goes on on the other node; one that has failed on too many ends;
# - a job whose environment does not say when its time is up asks squeue, and leaves with 75 before;
# - a proof of the recipe on both nodes against one rank ends well;
# - scores of given text are made on both nodes; an evaluation that gets USR1 leaves with 75, is requeued, goes on with what it had and
#   ends in the bytes of one that nobody disturbed.
#
# Needs root on Debian (and namespaces; without, the nodes share the machine's network); else says so and leaves with 77.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/env.sh

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "skipped: a SLURM cluster on one machine takes root on Debian (this is $(id -un) on $(uname -sr))"
  exit 77
fi
for name in train-tokenizer tokenize pretrain generate checkpoint prove score evaluate; do
  [ -x "$TRIREME_BIN/trireme-$name" ] || { echo "no $TRIREME_BIN/trireme-$name: run cargo build --release first" >&2; exit 1; }
done

WORK=$(mktemp -d /tmp/trireme-slurm-test.XXXXXX)
export DEV_CLUSTER_NODES=2
failed=0
was_up= # a cluster that somebody uses is used too, and left up

clean_up() {
  local code=$?
  if [ -z "$was_up" ]; then bash slurm/dev-cluster.sh down; fi
  if [ $code = 0 ]; then rm -rf "$WORK"; else echo "what the jobs printed is in $WORK" >&2; fi
}

# ---- Asking

check() { # WHAT COMMAND..
  local what=$1
  shift
  if "$@"; then echo "ok      $what"; else echo "FAILED  $what"; failed=1; fi
}

# field JOB NAME: from scontrol, e.g. JobState, ExitCode, Restarts.
field() { scontrol --oneliner show job "$1" | grep -o " $2=[^ ]*" | head -n 1 | cut -d= -f2; }

is() { # FOUND EXPECTED
  [ "$1" = "$2" ] || { echo "        found $1, expected $2"; return 1; }
}

ended_as() { is "$(field "$1" JobState) $(field "$1" ExitCode)" "$2"; } # JOB "STATE CODE:SIGNAL"

# wait_for SECONDS COMMAND..: until it succeeds.
wait_for() {
  local until=$((SECONDS + $1))
  shift
  until "$@"; do
    if [ $SECONDS -ge $until ]; then echo "        waited in vain for: $*"; return 1; fi
    sleep 0.2
  done
}

is_over() { case $(field "$1" JobState) in PENDING | RUNNING | COMPLETING | REQUEUED) false ;; *) true ;; esac; }
rows() { if [ -e "$1" ]; then wc -l <"$1"; else echo 0; fi; }
has_rows() { [ "$(rows "$1")" -ge "$2" ]; }
restarted() { [ "$(field "$1" Restarts)" -ge 1 ] && [ "$(field "$1" JobState)" != PENDING ]; }
contains() { grep -q -- "$2" "$1" || { echo "        not in $1: $2"; return 1; }; } # FILE TEXT
is_artifact() { # DIR KIND
  [ -e "$1/manifest.json" ] && grep -q "\"kind\": *\"$2\"" "$1/manifest.json"
}
is_whole() { "$TRIREME_BIN/trireme-checkpoint" verify "$1" >/dev/null; } # CHECKPOINT
# A step whose held-out loss was left to the next job has a second row with it, and the same loss.
steps_once_each() { # METRICS STEPS
  local steps
  steps=$(grep -o '"step":[0-9]*,"consumed_tokens":[0-9]*,"loss":[^,]*' "$1" | uniq | cut -d: -f2 | cut -d, -f1)
  is "$(md5sum <<<"$steps")" "$(seq "$2" | md5sum)"
}

# ---- Submitting

write_recipe() {
  cat >"$WORK/recipe.toml" <<TOML
[model]
n_layers = 2
hidden = 32
n_heads = 4
n_kv_heads = 2
head_dim = 8
ffn_hidden = 64
vocab_size = 512
vocab_divisor = 16
max_tokens = 64
norm = "layernorm1p"
norm_eps = 1e-5
activation = "squared_relu"
rotary_fraction = 0.5
rope_base = 10000.0
tied_embeddings = false
head = "vocabulary"
init_std = 0.02
[parallel]
tp = 1
pp = 1
vp = 1
schedule = "1f1b"
sequence_parallel = false
[batch]
seq_len = 32
micro = 2
global = 8
[train]
samples = 96
seed = 1
precision = "f32"
clip_grad_norm = 1.0
[optimizer]
lr = 1e-3
min_lr = 1e-4
warmup_samples = 16
decay = "cosine"
beta1 = 0.9
beta2 = 0.95
eps = 1e-8
weight_decay = 0.1
[data]
seed = 1
[[data.train]]
shards = "$WORK/chain/tokens"
weight = 1.0
[validation]
shards = "$WORK/chain/tokens"
every_steps = 6
samples = 8
[checkpoint]
every_steps = 1000000
TOML
}

# All jobs have 20 minutes: ten before their end the scripts ask for USR1, which a test of a minute must not meet by itself.
# Two nodes, one rank each: what they say to one another goes over the network.
SPREAD="--nodes=2 --ntasks-per-node=1 --cpus-per-task=1"

submit_chain() {
  INPUT="src slurm" VOCAB_SIZE=512 RECIPE=$WORK/recipe.toml REQUESTS=$WORK/requests.jsonl OUT=$WORK/chain \
    OPTIONS_ALL="--cpus-per-task=1 --time=20" OPTIONS_TOKENIZE="$SPREAD" OPTIONS_PRETRAIN="$SPREAD" OPTIONS_GENERATE="$SPREAD" \
    ARGS_TOKENIZE="--validation-share 0.1" bash slurm/pipeline.sh
}

# pretrain NAME ARGUMENT..: a job with its own run directory; prints its number.
pretrain() {
  local name=$1
  shift
  RECIPE=$WORK/recipe.toml OUT=$WORK/$name ARGS="$*" sbatch --parsable $SPREAD --time=20 --output="$WORK/$name.log" slurm/pretrain.sbatch
}

# ---- The tests

chain() {
  local jobs job stage
  jobs=$(submit_chain)
  while read -r job stage; do
    wait_for 90 is_over "$job" || true
    check "$stage succeeds in the chain" ended_as "$job" "COMPLETED 0:0"
  done <<<"$jobs"
  check "the tokenizer is an artifact" is_artifact "$WORK/chain/tokenizer" tokenizer
  check "the tokens are an artifact" is_artifact "$WORK/chain/tokens" token-shards
  check "the run is an artifact" is_artifact "$WORK/chain/run" run
  check "its last checkpoint is whole" is_whole "$WORK/chain/run/checkpoints/step-00000012"
  check "its metrics have each step once" steps_once_each "$WORK/chain/run/metrics.jsonl" 12
  check "each request has a response" is "$(rows "$WORK/chain/responses/responses.jsonl")" "$(rows "$WORK/requests.jsonl")"
  "$TRIREME_BIN/trireme-inspect" "$WORK/chain/responses" --lineage >"$WORK/lineage.txt"
  check "the responses' lineage reaches the text" contains "$WORK/lineage.txt" "corpus: .*slurm"
  check "and nothing in it has changed" is "$(grep -c "has changed\|is missing" "$WORK/lineage.txt")" 0
  job=$(grep pretrain <<<"$jobs" | cut -d' ' -f1)
  check "pretraining ran on both nodes" is "$(field "$job" NodeList)" "n[0-1]"
}

chain_again() {
  local job stage before
  before=$(cat "$WORK"/chain/*/manifest.json | md5sum)
  while read -r job stage; do
    wait_for 60 is_over "$job" || true
    check "$stage, submitted again, finds its work done" ended_as "$job" "COMPLETED 0:0"
  done < <(submit_chain)
  check "and changes nothing" is "$(cat "$WORK"/chain/*/manifest.json | md5sum)" "$before"
}

# Started first, looked at last: SLURM lets a requeued job wait for some seconds.
requeue_begin() {
  # Steps of a millisecond: enough of them that the signal comes before the last.
  requeued=$(pretrain requeued --set train.samples=24000)
  wait_for 30 has_rows "$WORK/requeued/metrics.jsonl" 3 || true
  scancel --signal=USR1 "$requeued"
}

requeue_end() {
  check "a job that gets USR1 is requeued and starts again" wait_for 60 restarted "$requeued"
  wait_for 60 is_over "$requeued" || true
  check "and finishes" ended_as "$requeued" "COMPLETED 0:0"
  check "having left with 75" contains "$WORK/requeued.log" "saved and requeued (restart 1)"
  check "and resumed from its checkpoint" contains "$WORK/requeued.log" "resumed from"
  check "its metrics have each step once" steps_once_each "$WORK/requeued/metrics.jsonl" 3000
}

wrong_input() {
  local recipe shards behind
  cp -r "$WORK/chain/tokens" "$WORK/damaged"
  # One bit of one token: only a checksum sees it.
  printf '\x01' | dd of="$WORK/damaged/train.bin" bs=1 seek=1000 count=1 conv=notrunc status=none
  cmp -s "$WORK/damaged/train.bin" "$WORK/chain/tokens/train.bin" &&
    printf '\x02' | dd of="$WORK/damaged/train.bin" bs=1 seek=1000 count=1 conv=notrunc status=none
  recipe=$(pretrain wrong-recipe --set model.n_layer=3)
  shards=$(pretrain wrong-shards --set data.train.0.shards="$WORK/damaged")
  behind=$(CHECKPOINT=$WORK/wrong-shards REQUESTS=$WORK/requests.jsonl OUT=$WORK/never sbatch --parsable $SPREAD --time=20 \
    --output="$WORK/never.log" --dependency="afterok:$shards" --kill-on-invalid-dep=yes slurm/generate.sbatch)
  wait_for 60 is_over "$recipe" || true
  wait_for 60 is_over "$shards" || true
  wait_for 60 is_over "$behind" || true
  check "an unknown recipe key ends a job with 2" ended_as "$recipe" "FAILED 2:0"
  check "and its log names the key and the nearest one" contains "$WORK/wrong-recipe.log" "n_layer.*n_layers"
  check "a damaged shard ends a job with 3" ended_as "$shards" "FAILED 3:0"
  check "and its log names the file" contains "$WORK/wrong-shards.log" "damaged/train.bin"
  check "the job behind it is cancelled" is "$(field "$behind" JobState)" CANCELLED
}

rank_killed() {
  local job pid
  job=$(SLURM_WAIT=5 pretrain killed --set train.samples=8000000)
  wait_for 30 has_rows "$WORK/killed/metrics.jsonl" 3 || true
  # The last rank's process: its environment says which.
  for pid in $(pgrep -x trireme-pretrai || true); do
    if grep -qzx "SLURM_JOB_ID=$job" "/proc/$pid/environ" && grep -qzx SLURM_PROCID=1 "/proc/$pid/environ"; then
      kill -9 "$pid"
    fi
  done
  wait_for 40 is_over "$job" || scancel "$job"
  check "a job one of whose ranks is killed ends as killed, in seconds" ended_as "$job" "FAILED 137:0"
}

failing_job() { # NAME
  RECIPE=$WORK/recipe.toml OUT=$WORK/$1 ARGS="--set checkpoint.every_steps=2" TRIREME_MACHINE_FAULTS=$WORK/$1-faults.log \
    sbatch --parsable --requeue --open-mode=append --nodes=1 --ntasks-per-node=2 --cpus-per-task=1 --time=20 \
    --output="$WORK/$1.log" "$WORK/failing.sbatch"
}

# Both ranks on one node, the first time alone on a machine that fails at the third save.
machine_begin() {
  printf '%s\n' '#!/usr/bin/env bash' '[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || export TRIREME_FAULT="machine rank=1 at=$FAULT_AT"' \
    'source slurm/pretrain.sbatch' >"$WORK/failing.sbatch"
  failing=$(FAULT_AT="save.begin n=3" failing_job failing)
  # Another that fails on more nodes than it may, here on one.
  hopeless=$(FAULT_AT=init MAX_FAILED_NODES=0 failing_job hopeless)
}

machine_end() {
  local node other
  wait_for 60 is_over "$hopeless" || scancel "$hopeless"
  check "a job that has failed on too many nodes ends with 71" ended_as "$hopeless" "FAILED 71:0"
  check "and says on which" contains "$WORK/hopeless.log" "not requeued: it failed on $(cut -d' ' -f1 "$WORK/hopeless-faults.log")"
  check "a job whose machine fails is requeued and starts again" wait_for 60 restarted "$failing"
  wait_for 60 is_over "$failing" || scancel "$failing"
  check "and finishes" ended_as "$failing" "COMPLETED 0:0"
  node=$(cut -d' ' -f1 "$WORK/failing-faults.log" | sort -u)
  case $node in n0) other=n1 ;; *) other=n0 ;; esac
  check "it was told which one" contains "$WORK/failing.log" "requeued without $node, where a machine has failed"
  check "and went on on the other" is "$(field "$failing" NodeList) $(field "$failing" ExcNodeList)" "$other $node"
  check "from what was saved" contains "$WORK/failing.log" "resumed from .*step"
  check "what it did again gave the same" is "$(grep -o '"step":[0-9]*,"consumed_tokens":[0-9]*,"loss":[^,]*' \
    "$WORK/failing/metrics.jsonl" | sort -u | wc -l)" 12
}

# An older SLURM tells a job's end to squeue only. Started early, looked at late: the job has a minute and leaves 45 s before its end.
squeue_begin() {
  local command="source slurm/env.sh; unset SLURM_JOB_END_TIME; srun \$TRIREME_BIN/trireme-pretrain --recipe $WORK/recipe.toml"
  command+=" --out $WORK/asked --set train.samples=8000000 --set checkpoint.margin_s=45"
  # shellcheck disable=SC2086
  asked=$(sbatch --parsable $SPREAD --time=1 --output="$WORK/asked.log" --wrap "$command")
}

squeue_end() {
  wait_for 60 is_over "$asked" || scancel "$asked"
  check "a job that squeue tells its time leaves before it is up, with 75" ended_as "$asked" "FAILED 75:0"
  check "and knew how much was left" contains "$WORK/asked.log" "walltime    \(60\|[45][0-9]\) s left"
  check "and saved" contains "$WORK/asked.log" "the time is nearly up.*saved at step"
}

prove_begin() {
  # shellcheck disable=SC2086
  prove=$(RECIPE=$WORK/recipe.toml ARGS="--set numerics.mode=reproducible" sbatch --parsable $SPREAD --time=20 --output="$WORK/prove.log" \
    slurm/prove.sbatch)
}

prove_end() {
  wait_for 60 is_over "$prove" || scancel "$prove"
  check "a proof on two nodes succeeds" ended_as "$prove" "COMPLETED 0:0"
  check "and says what it compared" contains "$WORK/prove.log" "tp 1 x pp 1 x dp 2, vp 1, against one rank: 1 layers, 3 steps"
}

score_begin() {
  printf '{"id": "%s", "text": "fn main() { return %s; }"}\n' 1 1 2 22 3 333 >"$WORK/texts.jsonl"
  # shellcheck disable=SC2086
  scored=$(CHECKPOINT=$WORK/chain/run INPUT=$WORK/texts.jsonl OUT=$WORK/scores sbatch --parsable $SPREAD --time=20 \
    --output="$WORK/scores.log" slurm/score.sbatch)
}

score_end() {
  wait_for 60 is_over "$scored" || scancel "$scored"
  check "scoring succeeds" ended_as "$scored" "COMPLETED 0:0"
  check "the scores are an artifact" is_artifact "$WORK/scores" scores
  check "each text has its log-probabilities" is "$(rows "$WORK/scores/logprobs.jsonl")" 3
}

# Enough items that the signal comes in the middle: 8000 choices, one a pass.
evaluate_begin() {
  mkdir -p "$WORK/benchmarks/winogrande"
  seq 4000 | sed 's/.*/{"qID": "&", "sentence": "fn a& and b: the _ is &", "option1": "fn", "option2": "let", "answer": "1"}/' \
    >"$WORK/benchmarks/winogrande/dev.jsonl"
  # shellcheck disable=SC2086
  evaluated=$(CHECKPOINT=$WORK/chain/run DATA=$WORK/benchmarks TASKS=winogrande OUT=$WORK/evaluated ARGS="--batch-tokens 1" \
    sbatch --parsable $SPREAD --time=20 --output="$WORK/evaluated.log" slurm/evaluate.sbatch)
  wait_for 30 has_answers 200 || true
  scancel --signal=USR1 "$evaluated"
}

has_answers() { [ "$(cat "$WORK"/evaluated.tmp-*/journal/*.lines 2>/dev/null | wc -l)" -ge "$1" ]; }

evaluate_end() {
  check "an evaluation that gets USR1 is requeued and starts again" wait_for 60 restarted "$evaluated"
  wait_for 60 is_over "$evaluated" || scancel "$evaluated"
  check "and finishes" ended_as "$evaluated" "COMPLETED 0:0"
  check "having left with 75" contains "$WORK/evaluated.log" "saved and requeued (restart 1)"
  check "and gone on with what it had" contains "$WORK/evaluated.log" "[0-9]* of 8000 sequences are scored already"
  "$TRIREME_BIN/trireme-evaluate" run --checkpoint "$WORK/chain/run" --data "$WORK/benchmarks" --task winogrande \
    --out "$WORK/undisturbed" >"$WORK/undisturbed.log" 2>&1 || true
  check "its scores are those of an undisturbed one" cmp "$WORK/evaluated/scores.json" "$WORK/undisturbed/scores.json"
  check "and so is its evidence" cmp "$WORK/evaluated/winogrande.jsonl" "$WORK/undisturbed/winogrande.jsonl"
}

trap clean_up EXIT
started=$SECONDS
if bash slurm/dev-cluster.sh is-up; then was_up=1; fi
bash slurm/dev-cluster.sh up
eval "$(bash slurm/dev-cluster.sh env)"
write_recipe
printf '%s\n' '{"id": "a", "prompt": "fn ", "max_new_tokens": 8}' '{"id": "b", "prompt": "The ", "max_new_tokens": 8}' \
  '{"id": "c", "prompt": "# ", "max_new_tokens": 8}' >"$WORK/requests.jsonl"
chain
squeue_begin
requeue_begin
machine_begin
evaluate_begin
score_begin
wrong_input
prove_begin
rank_killed
prove_end
score_end
requeue_end
machine_end
evaluate_end
chain_again
squeue_end
echo "SLURM: $((SECONDS - started)) s"
exit $failed
