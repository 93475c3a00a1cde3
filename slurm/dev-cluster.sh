#!/usr/bin/env bash
# A SLURM cluster of several nodes on one Debian 12 machine, to try job scripts and to test them. Needs root.
#
#   dev-cluster.sh up                install what is missing, start munge, slurmctld and a slurmd per node; again: no-op
#   dev-cluster.sh down              stop all of it and remove its files
#   dev-cluster.sh status            nodes and daemons
#   dev-cluster.sh is-up             exit code 0 when it is up
#   dev-cluster.sh env               what a shell must export to use it:  eval "$(bash slurm/dev-cluster.sh env)"
#   dev-cluster.sh exec n1 COMMAND   run COMMAND on that node (its network, host name and /dev/shm), outside SLURM
#   dev-cluster.sh kill-node n1      as by a power cut: slurmd, job steps and ranks of that node are gone at once
#   dev-cluster.sh start-node n1     switch it on again; it comes back by itself
#   dev-cluster.sh cut n1            as by a pulled cable: nothing reaches the node, its ranks go on
#   dev-cluster.sh heal n1           plug it in again
#   dev-cluster.sh restart-controller   kill slurmctld and start it on its saved state
#
# A node is a network, UTS and mount namespace: a host name (n0, n1, ..), an address on a bridge, a /dev/shm of its own. So
# ranks on two nodes really talk TCP; only the file system is shared, as on a cluster. Where namespaces are forbidden, all
# nodes share the machine's network and name (DEV_CLUSTER_NET=0); ranks then must not use shared memory, which `env` sees to.
#
# DEV_CLUSTER_ROOT    its files (/tmp/trireme-dev-cluster)
# DEV_CLUSTER_NODES   4; DEV_CLUSTER_CPUS 8 and DEV_CLUSTER_MEM 4000 (MB) a node: more than there is, nothing is enforced
# DEV_CLUSTER_GPUS    0; pretend GPUs a node, for --gres and CUDA_VISIBLE_DEVICES
# DEV_CLUSTER_PORT    16917, and those above it
set -euo pipefail

ROOT=${DEV_CLUSTER_ROOT:-/tmp/trireme-dev-cluster}
NODES=${DEV_CLUSTER_NODES:-4}
CPUS=${DEV_CLUSTER_CPUS:-8}
MEM=${DEV_CLUSTER_MEM:-4000}
GPUS=${DEV_CLUSTER_GPUS:-0}
PORT=${DEV_CLUSTER_PORT:-16917}
NET=${DEV_CLUSTER_NET:-1}
if [ -e "$ROOT/etc/net" ]; then NET=$(cat "$ROOT/etc/net"); fi # one that is up stays as it was started
if [ -e "$ROOT/etc/nodes" ]; then NODES=$(cat "$ROOT/etc/nodes"); fi
BRIDGE=trireme0
SUBNET=10.213.79
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export SLURM_CONF=$ROOT/etc/slurm.conf

say() { printf 'dev-cluster: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

check_node() {
  local i
  for ((i = 0; i < NODES; i++)); do [ "$1" != "n$i" ] || return 0; done
  die "no node $1: there are n0 to n$((NODES - 1))"
}

# running PIDFILE PROGRAM: whether that process lives. Where nobody reaps orphans a dead one stays as a zombie.
running() {
  local pid
  pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] || return 1
  [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ] && ! grep -q '^State:.Z' "/proc/$pid/status" 2>/dev/null
}

# ---- Configuration

node_lines() {
  local i host name addr gres=
  host=$(hostname -s)
  if [ "$GPUS" -gt 0 ]; then gres="Gres=gpu:$GPUS"; fi
  for ((i = 0; i < NODES; i++)); do
    name=$host addr=127.0.0.1
    if [ "$NET" = 1 ]; then name=n$i addr=$SUBNET.$((10 + i)); fi
    echo "NodeName=n$i NodeHostname=$name NodeAddr=$addr Port=$((PORT + 100 + i)) CPUs=$CPUS Boards=1 SocketsPerBoard=1" \
      "CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEM $gres State=UNKNOWN"
  done
}

write_gres() {
  local i
  rm -f "$ROOT/etc/gres.conf"
  [ "$GPUS" -gt 0 ] || return 0
  mkdir -p "$ROOT/dev"
  for ((i = 0; i < GPUS; i++)); do
    [ -e "$ROOT/dev/gpu$i" ] || mknod "$ROOT/dev/gpu$i" c 1 3 # SLURM only wants a device file
    echo "NodeName=n[0-$((NODES - 1))] Name=gpu File=$ROOT/dev/gpu$i" >>"$ROOT/etc/gres.conf"
  done
}

# Why some of these stand here:
# cred_expire      a requeued job waits until its old credential has run out: 10 s in place of 2 minutes
# TmpFS            the PMIx plugin makes a directory there, of the same name on every node
# config_overrides believe the CPUs and memory given here
# linuxproc, none  no cgroups in containers; cgroup.conf must stand all the same, slurmd looks at it
# MinJobAge        `scontrol show job` still knows yesterday's jobs; there is no accounting database
write_configuration() {
  mkdir -p "$ROOT"/{etc,run,log,state,spool,tmp}
  chmod 755 "$ROOT" "$ROOT"/*/
  local controller=127.0.0.1 gres_types=
  if [ "$NET" = 1 ]; then controller=$SUBNET.1; fi
  if [ "$GPUS" -gt 0 ]; then gres_types=GresTypes=gpu; fi
  echo "$NET" >"$ROOT/etc/net"
  echo "$NODES" >"$ROOT/etc/nodes"
  echo "CgroupPlugin=cgroup/v1" >"$ROOT/etc/cgroup.conf"
  write_gres
  cat >"$SLURM_CONF" <<CONF
ClusterName=dev
SlurmctldHost=$(hostname -s)($controller)
SlurmctldPort=$PORT
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$ROOT/run/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation=$ROOT/state
SlurmctldPidFile=$ROOT/run/slurmctld.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdPidFile=$ROOT/run/slurmd.%n.pid
SlurmdLogFile=$ROOT/log/slurmd.%n.log
SlurmdSpoolDir=$ROOT/spool/%n
TmpFS=$ROOT/tmp/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=pmix
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,sched_interval=5,bf_interval=2,batch_sched_delay=0
PriorityType=priority/basic
$gres_types
JobRequeue=1
ReturnToService=2
MinJobAge=86400
KillWait=5
SlurmctldTimeout=30
SlurmdTimeout=10
BatchStartTimeout=10
MessageTimeout=20
TCPTimeout=5
UnkillableStepTimeout=30
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$ROOT/log/finished-jobs.log
SlurmctldDebug=info
SlurmdDebug=info
$(node_lines)
PartitionName=batch Nodes=n[0-$((NODES - 1))] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF
}

# ---- Network

may_make_namespaces() {
  ip netns add trireme-probe 2>/dev/null || return 1
  ip netns del trireme-probe
}

write_hosts() {
  local i
  echo "127.0.0.1 localhost"
  echo "$SUBNET.1 $(hostname -s)"
  for ((i = 0; i < NODES; i++)); do echo "$SUBNET.$((10 + i)) n$i"; done
}

start_network() {
  [ "$NET" = 1 ] || return 0
  local i ns
  if ! ip link show $BRIDGE >/dev/null 2>&1; then
    ip link add $BRIDGE type bridge
    ip addr add $SUBNET.1/24 dev $BRIDGE
    ip link set $BRIDGE up
  fi
  write_hosts >"$ROOT/etc/hosts"
  for ((i = 0; i < NODES; i++)); do
    ns=trireme-n$i
    [ ! -e /run/netns/$ns ] || continue
    ip netns add $ns
    ip link add trv-n$i type veth peer name eth0 netns $ns
    ip link set trv-n$i master $BRIDGE up
    ip -n $ns link set lo up
    ip -n $ns addr add $SUBNET.$((10 + i))/24 dev eth0
    ip -n $ns link set eth0 up
  done
}

stop_network() {
  local ns pid
  command -v ip >/dev/null || return 0
  for ns in $(ip netns list 2>/dev/null | awk '/^trireme-n/ { print $1 }'); do
    for pid in $(ip netns pids "$ns" 2>/dev/null); do kill -9 "$pid" 2>/dev/null || true; done
    ip netns del "$ns" || true
    ip link del "trv-${ns#trireme-}" 2>/dev/null || true
  done
  ip link del $BRIDGE 2>/dev/null || true
}

# on_node NODE COMMAND..: in the namespaces of its slurmd, or in new ones where none runs (that is how slurmd is started).
# Not `ip netns exec`: that mounts another /sys, which slurmd does not like.
on_node() {
  local node=$1 pid
  shift
  pid=$(cat "$ROOT/run/slurmd.$node.pid" 2>/dev/null || true)
  if [ "$NET" != 1 ]; then
    "$@"
  elif [ -n "$pid" ] && [ -e "/proc/$pid/ns/net" ]; then
    nsenter --target "$pid" --net --uts --mount --wd="$PWD" "$@"
  else
    nsenter --net=/run/netns/trireme-"$node" unshare --uts --mount --propagation private bash -c '
      set -e
      hostname "$1"
      mount -t tmpfs -o size=50%,mode=1777 tmpfs /dev/shm
      mount --bind "$2" /etc/hosts
      shift 2
      exec "$@"' _ "$node" "$ROOT/etc/hosts" "$@"
  fi
}

# ---- Daemons

start_munge() {
  ! running "$ROOT/run/munged.pid" munged || return 0
  rm -f "$ROOT"/run/munge.socket*
  [ -s "$ROOT/etc/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$ROOT/etc/munge.key")
  munged --force --num-threads=2 --key-file="$ROOT/etc/munge.key" --socket="$ROOT/run/munge.socket" \
    --pid-file="$ROOT/run/munged.pid" --seed-file="$ROOT/run/munged.seed" --log-file="$ROOT/log/munged.log" \
    >"$ROOT/log/munged.out" 2>&1 </dev/null || die "munged: $(tail -n 2 "$ROOT/log/munged.out")"
}

start_controller() {
  ! running "$ROOT/run/slurmctld.pid" slurmctld || return 0
  rm -f "$ROOT/run/slurmctld.pid"
  slurmctld -f "$SLURM_CONF" >>"$ROOT/log/slurmctld.out" 2>&1 </dev/null || die "slurmctld did not start; see $ROOT/log/slurmctld.log"
}

kill_controller() {
  ! running "$ROOT/run/slurmctld.pid" slurmctld || kill -9 "$(cat "$ROOT/run/slurmctld.pid")"
  sleep 0.5 # its port must be free again
}

start_node() {
  ! running "$ROOT/run/slurmd.$1.pid" slurmd || return 0
  rm -f "$ROOT/run/slurmd.$1.pid"
  mkdir -p "$ROOT/spool/$1" "$ROOT/tmp/$1"
  on_node "$1" slurmd -f "$SLURM_CONF" -N "$1" >>"$ROOT/log/slurmd.$1.out" 2>&1 </dev/null ||
    die "slurmd of $1 did not start; see $ROOT/log/slurmd.$1.log"
}

# A node that is back before SlurmdTimeout was never missed, and the controller would wait for its lost ranks for ever: an
# administrator, or here this, must say that it was down.
boot_node() {
  ! running "$ROOT/run/slurmd.$1.pid" slurmd || return 0
  scontrol update NodeName="$1" State=DOWN Reason="was switched off"
  start_node "$1"
}

descendants() {
  local child
  for child in $(pgrep -P "$1" || true); do
    descendants "$child"
    echo "$child"
  done
}

# Without namespaces a node's job steps are told by the log file that they hold open.
steps_of() {
  local pid
  for pid in $(pgrep -x slurmstepd || true); do
    if readlink "/proc/$pid/fd/"* 2>/dev/null | grep -qxF "$ROOT/log/slurmd.$1.log"; then
      echo "$pid"
      descendants "$pid"
    fi
  done
}

kill_node() {
  local pids
  if [ "$NET" = 1 ]; then
    pids=$(ip netns pids "trireme-$1" 2>/dev/null || true)
  else
    pids=$(steps_of "$1")
    if running "$ROOT/run/slurmd.$1.pid" slurmd; then pids+=" $(cat "$ROOT/run/slurmd.$1.pid")"; fi
  fi
  [ -z "$pids" ] || kill -9 $pids 2>/dev/null || true
  # What a boot clears. A PMIx directory of the old life would make the next step of the same job fail.
  rm -rf "$ROOT/run/slurmd.$1.pid" "$ROOT/tmp/$1" "$ROOT/spool/$1"/pmix.* "$ROOT/spool/$1"/stepd.*
}

# ---- Commands

up() {
  [ "$(id -u)" = 0 ] || die "needs root (namespaces, slurmd)"
  bash "$HERE/install.sh" cluster
  if [ "$NET" = 1 ] && ! may_make_namespaces; then
    say "no namespaces here: all nodes share this machine's network and name"
    NET=0
  fi
  write_configuration
  start_network
  start_munge
  start_controller
  local i tries
  for ((i = 0; i < NODES; i++)); do start_node "n$i"; done
  for ((tries = 0; tries < 150; tries++)); do
    if [ "$(sinfo -h -N -o %T 2>/dev/null | grep -cE '^(idle|mixed|allocated|completing)$')" -ge "$NODES" ]; then
      say "$NODES nodes x $CPUS CPUs are up; to use them: eval \"\$(bash $HERE/dev-cluster.sh env)\""
      return 0
    fi
    # A controller on its saved state may still hold nodes of an earlier crash down.
    if [ $((tries % 25)) = 20 ]; then scontrol update "NodeName=n[0-$((NODES - 1))]" State=RESUME >/dev/null 2>&1 || true; fi
    sleep 0.2
  done
  sinfo -N -l >&2 || true
  tail -n 20 "$ROOT/log/slurmctld.log" >&2 || true
  die "the nodes did not come up in 30 s"
}

down() {
  [ -e "$ROOT" ] || return 0
  [ -e "$ROOT/etc/net" ] || die "$ROOT is not the directory of a cluster that this script started"
  local file node program tries
  if [ -e "$SLURM_CONF" ]; then
    timeout 5 scancel --full --user=root >/dev/null 2>&1 || true
    for file in "$ROOT"/run/slurmd.*.pid; do
      [ -e "$file" ] || continue
      node=${file##*/slurmd.}
      kill_node "${node%.pid}"
    done
    for program in slurmctld munged; do
      ! running "$ROOT/run/$program.pid" $program || kill "$(cat "$ROOT/run/$program.pid")"
    done
    for ((tries = 0; tries < 50; tries++)); do
      running "$ROOT/run/slurmctld.pid" slurmctld || break
      sleep 0.1
    done
    kill_controller
  fi
  stop_network
  rm -rf "$ROOT"
  say "down"
}

status() {
  local file
  sinfo -N -o '%N %T %c %m %G %E'
  for file in "$ROOT"/run/*.pid; do
    echo "${file##*/} $(cat "$file") $(cat "/proc/$(cat "$file")/comm" 2>/dev/null || echo dead)"
  done
}

# ob1: no probing for fast networks. yield: more ranks than cores.
print_env() {
  local transports=vader,tcp,self
  if [ "$NET" != 1 ]; then transports=tcp,self; fi
  echo "export SLURM_CONF=$SLURM_CONF OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
  echo "export OMPI_MCA_pml=ob1 OMPI_MCA_btl=$transports OMPI_MCA_mpi_yield_when_idle=1"
}

command=${1:-}
case $command in
  exec | kill-node | start-node | cut | heal) check_node "${2:-}" ;;
esac
case $command in
  up) up ;;
  down) down ;;
  status) status ;;
  is-up) running "$ROOT/run/slurmctld.pid" slurmctld ;;
  env) print_env ;;
  exec) on_node "${@:2}" ;;
  kill-node) kill_node "$2" ;;
  start-node) boot_node "$2" ;;
  cut) ip -n "trireme-$2" link set eth0 down ;;
  heal) ip -n "trireme-$2" link set eth0 up ;;
  restart-controller) kill_controller; start_controller ;;
  *)
    sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac
