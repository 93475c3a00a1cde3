# shellcheck shell=bash
# Environment of every job: sourced by the sbatch scripts, the quick start and the tests. No output, safe to source twice.
#
# TRIREME_HOME    the repository (default: where this file lies)
# TRIREME_BIN     the binaries (default: TRIREME_HOME/target/release)
# MAX_RESTARTS    how often a job may send itself back to the queue (default 100)
# MAX_FAILED_NODES   how many nodes may fail under a job that has nothing new to show before it is taken for the job's own fault (default 5)
# TRIREME_MACHINE_FAULTS   where ranks tell which machine has failed under them (a GPU whose memory has lost bits, ..), for the job to go on
#                 without it; the nodes of a job must see it (default: beside the job's log)

TRIREME_HOME=${TRIREME_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
TRIREME_BIN=${TRIREME_BIN:-${CARGO_TARGET_DIR:-$TRIREME_HOME/target}/release}
export TRIREME_HOME TRIREME_BIN

# --- Site: what the binaries were built with must be loaded when they run. Uncomment and adapt.
# module purge
# module load gcc openmpi hdf5
# export SLURM_MPI_TYPE=pmix     # what Open MPI speaks with srun; `srun --mpi=list` shows what the site has
# export TMPDIR=/local/$SLURM_JOB_ID

# --- Open MPI
# Containers and the one-machine cluster run as root, which Open MPI refuses unless told twice.
if [ "$(id -u)" = 0 ]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
# Containers usually forbid the system call behind single-copy messages; Open MPI only finds out message by message.
if [ -e /.dockerenv ] || [ -e /run/.containerenv ]; then export OMPI_MCA_btl_vader_single_copy_mechanism=none; fi
# A waiting rank that spins takes the core from the one that it waits for.
if [ "${SLURM_NTASKS_PER_NODE:-${SLURM_NTASKS:-1}}" -gt "$(nproc)" ] 2>/dev/null; then export OMPI_MCA_mpi_yield_when_idle=1; fi

# --- SLURM
# Since SLURM 22.05 srun does not take --cpus-per-task over from sbatch by itself.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
# A rank that fails ends the job itself; one that is killed cannot, and the others would wait for it for ever: SLURM gives them
# this many seconds. Not --kill-on-bad-exit: of ranks that leave together with 75 the first would have the others killed, and
# the job would end as killed.
export SLURM_WAIT=${SLURM_WAIT:-60} SLURM_KILL_BAD_EXIT=0

if [ -n "${SLURM_JOB_ID:-}" ]; then
  export TRIREME_MACHINE_FAULTS=${TRIREME_MACHINE_FAULTS:-$SLURM_SUBMIT_DIR/machine-faults-$SLURM_JOB_ID.log}
fi
# machine_faults: lines of "NODE what was wrong", of all lives of the job.
machine_faults() { cat "${TRIREME_MACHINE_FAULTS:-/dev/null}" 2>/dev/null || true; }
machine_faults_before=$(machine_faults | wc -l)

# Finished artifacts in the marked directory.
finished_in() { ls -d "$1"/*/manifest.json 2>/dev/null || true; }

# mark_progress DIR: remembers which artifacts DIR holds now; requeue_or_fail compares.
mark_progress() {
  progress_dir=$1
  progress_before=$(finished_in "$1")
}

# requeue_elsewhere: the job goes back to the queue and stays away from the nodes that failed, and from those it stayed away from before.
# That can be asked of a waiting job alone: so it is held until it was, and stays held where SLURM refuses. What fails on one node
# after another without anything new in the marked directory is no machine's fault.
requeue_elsewhere() {
  local excluded failed try restarts=${SLURM_RESTART_COUNT:-0}
  failed=$(machine_faults | cut -d' ' -f1 | sort -u)
  if [ "$(wc -w <<<"$failed")" -gt "${MAX_FAILED_NODES:-5}" ] &&
    { [ -z "${progress_dir:-}" ] || [ "$(finished_in "$progress_dir")" = "$progress_before" ]; }; then
    echo "job $SLURM_JOB_ID: not requeued: it failed on ${failed//$'\n'/, } (MAX_FAILED_NODES): see $TRIREME_MACHINE_FAULTS" >&2
    exit 71
  fi
  if [ "$restarts" -ge "${MAX_RESTARTS:-100}" ]; then
    echo "job $SLURM_JOB_ID: not requeued: restarted $restarts times already (MAX_RESTARTS)" >&2
    exit 71
  fi
  excluded=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o ' ExcNodeList=[^ ]*' | cut -d= -f2 | sed 's/^(null)$//' || true)
  excluded=${excluded:+$excluded,}$(paste -sd, <<<"$failed")
  trap '' TERM # with which SLURM ends this script
  if ! scontrol requeuehold "$SLURM_JOB_ID"; then
    echo "job $SLURM_JOB_ID: not requeued: SLURM refuses; a machine has failed, submit it again with --exclude=$excluded" >&2
    exit 71
  fi
  for try in 1 2 3 4 5; do
    if scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded"; then
      scontrol release "$SLURM_JOB_ID"
      echo "job $SLURM_JOB_ID: requeued without $excluded, where a machine has failed: see $TRIREME_MACHINE_FAULTS" >&2
      sleep 60
      exit 71
    fi
    sleep "$try"
  done
  echo "job $SLURM_JOB_ID: held: SLURM does not keep it away from $excluded, where a machine has failed; scontrol release $SLURM_JOB_ID" >&2
  exit 71
}

# requeue_or_fail CODE: for `srun ... || requeue_or_fail $?`. When a machine has failed under the job, it goes back to the queue and on
# to others. Code 75 means "saved, run me again": it goes back too, unless this life added nothing to the marked directory (then the
# next one would not either). Neither more than MAX_RESTARTS times. Every other code is the job's own.
requeue_or_fail() {
  local code=$1 restarts=${SLURM_RESTART_COUNT:-0}
  if [ "$(machine_faults | wc -l)" -gt "$machine_faults_before" ]; then requeue_elsewhere; fi
  if [ "$code" != 75 ]; then exit "$code"; fi
  if [ "$restarts" -ge "${MAX_RESTARTS:-100}" ]; then
    echo "job $SLURM_JOB_ID: not requeued: restarted $restarts times already (MAX_RESTARTS)" >&2
  elif [ -n "${progress_dir:-}" ] && [ "$(finished_in "$progress_dir")" = "$progress_before" ]; then
    echo "job $SLURM_JOB_ID: not requeued: nothing new in $progress_dir; give the job more time" >&2
  else
    echo "job $SLURM_JOB_ID: saved and requeued (restart $((restarts + 1)))" >&2
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # SLURM ends this script; returning would end the job instead
  fi
  exit 75
}
