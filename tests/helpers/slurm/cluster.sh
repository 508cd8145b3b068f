#!/usr/bin/env bash
# A real Slurm of one node on this machine, for tests: Debian's slurm-wlm and munge, without systemd or cgroups.
#
#   tests/helpers/slurm/cluster.sh up [FOLDER]     installs what is missing (as root), starts the daemons, prints how to use them
#   tests/helpers/slurm/cluster.sh down [FOLDER]   cancels every job, stops the daemons, removes FOLDER
#
# FOLDER (default /tmp/pattern_bench_slurm; short, it holds a socket) has configuration, state, logs and process ids;
# nothing is written elsewhere, and a Slurm of the machine's own is left alone.
set -euo pipefail

folder=$(realpath -m "${2:-/tmp/pattern_bench_slurm}")
export SLURM_CONF=$folder/slurm.conf

fail() {
    echo "cluster.sh: $*" >&2
    exit 1
}

install() {
    local missing=()
    for program in munged slurmctld slurmd srun; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    [[ ${#missing[@]} -eq 0 ]] && return
    command -v apt-get >/dev/null || fail "${missing[*]} missing: install Slurm and MUNGE"
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends slurm-wlm munge; } \
        >"$folder/install.log" 2>&1 || fail "slurm-wlm and munge cannot be installed: see $folder/install.log"
}

configure() {
    local node cpus memory
    node=$(hostname -s)
    cpus=$(nproc)
    memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    # Two partitions: a job in "urgent" preempts those in "sweep", which get SIGTERM, 5 seconds, SIGKILL, and a requeue.
    # cred_expire is also how long a requeued job waits; its default of two minutes would be the length of the tests.
    cat >"$SLURM_CONF" <<EOF
ClusterName=pattern_bench
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
EnforcePartLimits=ALL
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
JobRequeue=1
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$node NodeAddr=127.0.0.1 CPUs=$((cpus > 2 ? cpus : 2)) RealMemory=$memory
PartitionName=sweep Nodes=$node Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=urgent Nodes=$node PriorityTier=10 PreemptMode=OFF
EOF
}

start() {
    dd if=/dev/urandom of="$folder/munge.key" bs=1 count=1024 status=none
    chmod 400 "$folder/munge.key"
    munged --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" || fail "munged does not start"
    slurmctld || fail "slurmctld does not start: see $folder/slurmctld.log"
    slurmd || fail "slurmd does not start: see $folder/slurmd.log"
    for _ in $(seq 60); do
        [[ $(sinfo --noheader --format=%t --partition=sweep 2>/dev/null) == idle ]] && return
        sleep 0.5
    done
    fail "the node is not ready after 30 seconds: see $folder/slurmctld.log and $folder/slurmd.log"
}

stop() {
    if scontrol ping &>/dev/null; then
        scancel --state=PENDING --user="$(id -un)" || true
        scancel --signal=KILL --user="$(id -un)" --full || true
        for _ in $(seq 30); do
            [[ -z $(squeue --noheader) ]] && break
            sleep 0.5
        done
    fi
    for daemon in slurmd slurmctld munged; do
        [[ -f $folder/$daemon.pid ]] || continue
        local id
        id=$(<"$folder/$daemon.pid")
        # the id could have been given away since
        [[ $(ps -o comm= -p "$id") == "$daemon" ]] || continue
        kill "$id"
        for _ in $(seq 30); do
            kill -0 "$id" 2>/dev/null || break
            sleep 0.5
        done
    done
}

case "${1:-}" in
up)
    [[ $(uname -s) == Linux ]] || fail "a Slurm cluster needs Linux"
    [[ $(id -u) -eq 0 ]] || fail "run it as root: Slurm's daemons start jobs for other users"
    [[ ! -e $folder ]] || fail "$folder exists: tests/helpers/slurm/cluster.sh down $folder"
    mkdir -p "$folder"/{state,spool}
    chmod 755 "$folder"
    trap 'code=$?; [[ $code -eq 0 ]] || stop' EXIT
    install
    configure
    start
    echo "export SLURM_CONF=$SLURM_CONF"
    ;;
down)
    [[ -f $SLURM_CONF ]] || fail "no cluster in $folder"
    stop
    rm -rf "$folder"
    ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
