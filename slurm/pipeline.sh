#!/usr/bin/env bash
# Submits the whole chain: train_tokenizer -> tokenize -> pretrain -> generate. Each job starts when the one before it has
# succeeded; when one fails, SLURM cancels those behind it. Submitted again, finished stages end at once.
#
#   INPUT="/data/text" RECIPE=my.toml REQUESTS=requests.jsonl OUT=/data/chain bash slurm/pipeline.sh
#
# INPUT            files and folders of text, separated by blanks
# VOCAB_SIZE       pieces of the tokenizer; model.vocab_size of the recipe must say the same (256000)
# RECIPE           of trireme-pretrain, with a [validation]; its data.train.0.shards and validation.shards are set to OUT/tokens
# REQUESTS         of trireme-generate
# OUT              gets tokenizer/, tokens/, run/, responses/ and logs/
# OPTIONS_ALL, OPTIONS_TRAIN_TOKENIZER, OPTIONS_TOKENIZE, OPTIONS_PRETRAIN, OPTIONS_GENERATE
#                  sbatch options of all stages and of one, e.g. OPTIONS_PRETRAIN="--nodes=16 --ntasks-per-node=8"
# ARGS_TRAIN_TOKENIZER, ARGS_TOKENIZE, ARGS_PRETRAIN, ARGS_GENERATE
#                  further arguments of one stage's binary
#
# Prints one line a job: its number and its stage.
set -euo pipefail
: "${INPUT:?}" "${RECIPE:?}" "${REQUESTS:?}" "${OUT:?}"
TRIREME_HOME=${TRIREME_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
export TRIREME_HOME INPUT VOCAB_SIZE=${VOCAB_SIZE:-256000} RECIPE REQUESTS
root=$OUT
mkdir -p "$root/logs"
previous=

# submit STAGE OUT [ARGUMENT..]
submit() {
  local stage=$1 out=$2 options=OPTIONS_${1^^} args=ARGS_${1^^} dependency=()
  shift 2
  if [ -n "$previous" ]; then dependency=(--dependency="afterok:$previous" --kill-on-invalid-dep=yes); fi
  previous=$(OUT=$out ARGS="$* ${!args:-}" sbatch --parsable --output="$root/logs/%x-%j.log" "${dependency[@]}" \
    ${OPTIONS_ALL:-} ${!options:-} "$TRIREME_HOME/slurm/$stage.sbatch")
  previous=${previous%%;*} # a cluster name follows where there are several
  echo "$previous $stage"
}

export TOKENIZER=$root/tokenizer CHECKPOINT=$root/run
submit train_tokenizer "$root/tokenizer"
submit tokenize "$root/tokens"
submit pretrain "$root/run" --set "data.train.0.shards=$root/tokens" --set "validation.shards=$root/tokens"
submit generate "$root/responses"
