#!/usr/bin/env bash
# A run on a TPU VM pod.
#
#   launch/tpu_pod.sh create            ask for the machines and wait until they are there
#   launch/tpu_pod.sh install           mount the share, install on every host
#   launch/tpu_pod.sh run [flags]       the same command on every host; its output also goes to WORKDIR/logs
#   launch/tpu_pod.sh keep [flags]      all of it, again after every preemption until the run is done
#   launch/tpu_pod.sh delete            give the machines back
#
# DRY_RUN=1 prints the commands instead. Start `keep` where it outlives your laptop, in tmux on a small machine.
set -euo pipefail

NAME="${NAME:-detclip}"
PROJECT="${PROJECT:?the project that pays}"
ZONE="${ZONE:-us-west4-a}"
ACCELERATOR="${ACCELERATOR:-v5litepod-32}"      # 8 hosts with 4 chips of 16 GB
RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}"       # image of the hosts
SPOT="${SPOT:-1}"                               # 1: cheap and preemptible
REPOSITORY="${REPOSITORY:?git URL of this code}"
REVISION="${REVISION:-main}"                    # the same code on all hosts
SHARE="${SHARE:?NFS share with data, weights and runs, e.g. 10.0.0.2:/detclip (Filestore)}"
CONFIG="${CONFIG:-configs/swin_t.py}"
WORKDIR="${WORKDIR:-runs/$NAME}"                # on the share: all hosts write their part of a checkpoint
DRY_RUN="${DRY_RUN:-}"

again=75 # exit status of a run that was preempted and has saved

run() { if [[ -n "$DRY_RUN" ]]; then printf '%q ' "$@" && echo; else "$@"; fi; }
tpu() { run gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }
quoted() { printf '%q' "$1"; } # for the shell of a host
on_all_hosts() { tpu tpu-vm ssh "$NAME" --worker=all --command="set -euo pipefail; $1"; }
state() { if [[ -n "$DRY_RUN" ]]; then echo ACTIVE; else tpu queued-resources describe "$NAME" --format='value(state.state)'; fi; }

create() {
  local options=(--node-id="$NAME" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME")
  [[ "$SPOT" != 1 ]] || options+=(--spot)
  tpu queued-resources create "$NAME" "${options[@]}" || return 1
  while true; do
    case "$(state)" in ACTIVE) return ;; FAILED | SUSPENDED) return 1 ;; *) sleep 30 ;; esac
  done
}

install() {
  on_all_hosts "sudo apt-get install -y -q nfs-common python3-venv git
    sudo mkdir -p /mnt/share && (mountpoint -q /mnt/share || sudo mount -t nfs $(quoted "$SHARE") /mnt/share)
    rm -rf detclipv2_jax && git clone -q -- $(quoted "$REPOSITORY") detclipv2_jax
    cd detclipv2_jax && git checkout -q $(quoted "$REVISION")
    ln -s /mnt/share/data /mnt/share/weights /mnt/share/runs .
    python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
}

start() {
  local flags="" workdir
  workdir="$(quoted "$WORKDIR")"
  (($# == 0)) || flags="$(printf ' %q' "$@")"
  # a process that is left over from before holds the chips; the brackets keep pkill from finding itself
  on_all_hosts "cd detclipv2_jax && mkdir -p -- $workdir/logs && (pkill -f '[d]etclipv2_jax.main' && sleep 10 || true)
    .venv/bin/python -m detclipv2_jax.main --distributed=on --preempted_status=$again --config=$(quoted "$CONFIG") \
      --workdir=$workdir$flags 2>&1 | tee -a -- $workdir/logs/\$(hostname).log"
}

delete() { tpu queued-resources delete "$NAME" --force --quiet; }

keep() {
  until create && install && start "$@"; do
    # Preempted, or a host is broken: fresh machines, then the newest checkpoint. An error of the run itself comes back
    # at once and would cost machines for nothing: three failures within ten minutes each end the loop.
    if ((SECONDS - since < 600)); then failures=$((failures + 1)); else failures=0; fi
    since=$SECONDS
    ((failures < 3)) || { echo "error: the run fails again and again; see $WORKDIR/logs" >&2 && exit 1; }
    delete || true
  done
}

since=0 failures=0
command="${1:-}"
shift || true
case "$command" in
  create | install | delete) "$command" ;;
  run) start "$@" ;;
  keep) keep "$@" ;;
  *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
