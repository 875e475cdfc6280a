#!/usr/bin/env bash
# A SLURM cluster of one node on this machine: `cluster.sh start FOLDER`, `cluster.sh stop FOLDER`.
#
# Configuration, key, state and logs are in FOLDER, a path without spaces, so a SLURM that this machine may already have
# is left alone. Clients need SLURM_CONF=FOLDER/slurm.conf. `start` installs Debian's packages if they are missing, and
# starts what is not running. `stop` also cancels all jobs.
# Exit code 77: the packages cannot be installed here, and the last line says why.
set -eu
export PATH="$PATH:/usr/sbin:/sbin"
case $#-${1-} in
  2-start | 2-stop) action=$1 folder=$2 ;;
  *) echo "usage: cluster.sh start|stop FOLDER"; exit 2 ;;
esac
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export SLURM_CONF=$folder/slurm.conf

cannot() { echo "SLURM was not tested, because it cannot be installed here: $*"; exit 77; }

fail() { tail -n 20 "$folder"/*.log; echo "SLURM does not start: $*"; exit 1; }

alive() { pid=$(cat "$folder/$1.pid" 2>/dev/null) && kill -0 "$pid" 2>/dev/null; }

install_packages() {
  missing=
  for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || missing=$program
  done
  [ "$missing" ] || return 0
  command -v apt-get >/dev/null || cannot "there is no $missing and no apt-get."
  [ "$(id -u)" = 0 ] || cannot "there is no $missing, and only root can install it."
  export DEBIAN_FRONTEND=noninteractive
  # Without a network, give up soon; the lists of packages may still be good.
  set -- -qq -o Acquire::Retries=0 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=120
  apt-get "$@" update >"$folder/apt.log" 2>&1 || true
  apt-get "$@" install -y --no-install-recommends munge slurmctld slurmd slurm-client >>"$folder/apt.log" 2>&1 ||
    cannot "apt-get says '$(tail -n 1 "$folder/apt.log")'."
}

configure() {
  host=$(uname -n) host=${host%%.*} cpus=$(nproc)
  port=$((20000 + $$ % 6000))  # so that two clusters can run at once
  [ -s "$folder/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
  cat >"$SLURM_CONF" <<EOF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 6000))
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
# Containers often have no cgroups.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# Two jobs have to run at once, even on one CPU.
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=$((cpus > 2 ? cpus : 2)) RealMemory=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
EOF
}

start() {
  install_packages
  alive slurmctld || configure
  mkdir -p "$folder/state" "$folder/spool"
  # --force: others may be able to write to the parents of FOLDER, which is fine for a test.
  alive munged || munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" \
    >"$folder/start.log" 2>&1 || fail munged
  alive slurmctld || slurmctld >>"$folder/start.log" 2>&1 || fail slurmctld
  alive slurmd || slurmd >>"$folder/start.log" 2>&1 || fail slurmd
  wait_for idle || fail "after 30 s its node is $(sinfo -h -o '%T (%E)' 2>&1)"
}

# Wait up to 30 s for a command to succeed.
wait_for() {
  for _ in $(seq 60); do
    ! "$@" || return 0
    sleep 0.5
  done
  return 1
}

idle() { [ "$(sinfo -h -o %T 2>/dev/null)" = idle ]; }

no_jobs() { [ -z "$(squeue -h 2>/dev/null)" ]; }

dead() { ! alive "$1"; }

stop() {
  if alive slurmctld; then
    scancel --user="$(id -un)" || true
    wait_for no_jobs || true
  fi
  for daemon in slurmd slurmctld munged; do
    ! alive $daemon || kill "$pid" || true
    wait_for dead $daemon || true
  done
}

"$action"
