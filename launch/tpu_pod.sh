#!/usr/bin/env bash
# A run on a TPU VM pod, asked for as a queued resource.
#
#   launch/tpu_pod.sh create            ask for the machines, unless they are there, and wait until they are
#   launch/tpu_pod.sh install           install on every host, and mount SHARE where there is one
#   launch/tpu_pod.sh run [flags]       the same command on every host; its output also goes to WORKDIR/logs
#   launch/tpu_pod.sh keep [flags]      all of it, again after every preemption until the run is done
#   launch/tpu_pod.sh delete            give the machines back
#
# DRY_RUN=1 prints the commands instead. Start `keep` where it outlives your laptop, in tmux on a small machine.
set -euo pipefail

NAME="${NAME:-detclip}"
PROJECT="${PROJECT:?the project that pays}"
ZONE="${ZONE:-us-west4-a}"
ACCELERATOR="${ACCELERATOR:-v5litepod-32}" # 8 hosts with 4 chips of 16 GB
RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}"  # image of the hosts
PYTHON_VERSION="${PYTHON_VERSION:-3.12}"   # brought along: the image's own may be too old
SPOT="${SPOT:-1}"                          # 1: cheap and preemptible
REPOSITORY="${REPOSITORY:?git URL of this code}"
REVISION="${REVISION:-main}" # the same code on all hosts
SHARE="${SHARE:-}"           # NFS share with data, weights and runs, e.g. 10.0.0.2:/detclip (Filestore); "": none
BUCKET="${BUCKET:-}"         # gs://… where the run goes, if there is no share
CONFIG="${CONFIG:-configs/swin_t.py}"
WORKDIR="${WORKDIR:-${BUCKET:+$BUCKET/}runs/$NAME}" # all hosts write their part of a checkpoint
DRY_RUN="${DRY_RUN:-}"

again=75 # exit status of a run that was preempted and has saved

fail() { echo "error: $1" >&2 && exit "${2:-1}"; }
[[ -n "$SHARE$BUCKET" ]] || fail "BUCKET=gs://… or SHARE=ip:/folder must say where all hosts can write"
run() { if [[ -n "$DRY_RUN" ]]; then printf '%q ' "$@" && echo; else "$@"; fi; }
tpu() { run gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }
quoted() { printf '%q' "$1"; } # for the shell of a host
on_all_hosts() { tpu tpu-vm ssh "$NAME" --worker=all --command="set -euo pipefail; $1"; }

# ABSENT where there are no such machines; fails where nobody can say, as after a login that expired
state() {
  local said
  if said="$(tpu queued-resources describe "$NAME" --format='value(state.state)' 2>&1)"; then
    echo "${said##*$'\n'}"
  elif grep -qi 'not[ _]found' <<<"$said"; then
    echo ABSENT
  else
    echo "$said" >&2 && return 1
  fi
}

ask() {
  local options=(--node-id="$NAME" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME")
  [[ "$SPOT" != 1 ]] || options+=(--spot)
  tpu queued-resources create "$NAME" "${options[@]}"
}

# 0: the machines are there; 1: there are none; 2: nobody can say
create() {
  local now unknown=0
  [[ -z "$DRY_RUN" ]] || { ask && return; }
  while true; do
    if now="$(state)"; then
      unknown=0
      case "$now" in
        ACTIVE) return ;;
        ABSENT) ask || return 1 ;;
        FAILED | SUSPENDED) echo "$NAME is $now" >&2 && return 1 ;;
      esac
    elif ((++unknown == 5)); then
      echo "error: gcloud does not say what became of $NAME; has its login expired (gcloud auth login)?" >&2 && return 2
    fi
    sleep 30
  done
}

install() {
  local place=""
  [[ -z "$SHARE" ]] || place="sudo apt-get install -y -q nfs-common
    sudo mkdir -p /mnt/share && (mountpoint -q /mnt/share || sudo mount -t nfs $(quoted "$SHARE") /mnt/share)
    ln -s /mnt/share/data /mnt/share/weights /mnt/share/runs ."
  on_all_hosts "sudo apt-get install -y -q python3-venv git
    rm -rf detclipv2_jax && git clone -q -- $(quoted "$REPOSITORY") detclipv2_jax
    cd detclipv2_jax && git checkout -q $(quoted "$REVISION")
    $place
    python3 -m venv .uv && .uv/bin/pip install -q uv
    .uv/bin/uv venv -q --python $(quoted "$PYTHON_VERSION") .venv
    .uv/bin/uv pip install -q --python .venv/bin/python -e '.[tpu]'"
}

# not the shell that is told to start it, whose command holds its name as well
program='^[^ ]*python[^ ]* -m detclipv2_jax[.]main'
running() { [[ -n "$DRY_RUN" ]] || on_all_hosts "pgrep -f '$program' >/dev/null && echo RUNNING || true" | grep -m1 RUNNING; }

start() {
  local flags="" log copy="" workdir
  workdir="$(quoted "$WORKDIR")"
  (($# == 0)) || flags="$(printf ' %q' "$@")"
  log="$workdir/logs/\$(hostname).log"
  if [[ "$WORKDIR" == *://* ]]; then # it gets its log when the run ends
    log="logs/\$(hostname)-\$(date +%Y%m%d-%H%M%S).log"
    copy="gcloud storage cp -q -- \"\$log\" $workdir/logs/ || true"
  fi
  # a process that is left over from before holds the chips: it may save its step, then it must go
  on_all_hosts "cd detclipv2_jax && log=$log && mkdir -p -- \"\$(dirname -- \"\$log\")\"
    for _ in {1..60}; do pkill -TERM -f '$program' || break; sleep 5; done; pkill -KILL -f '$program' && sleep 10 || true
    status=0
    .venv/bin/python -m detclipv2_jax.main --distributed=on --preempted_status=$again --config=$(quoted "$CONFIG") \
      --workdir=$workdir$flags 2>&1 | tee -a -- \"\$log\" || status=\$?
    $copy
    exit \$status"
}

delete() { tpu queued-resources delete "$NAME" --force --quiet; }

keep() {
  local status failures=0 since=0 first=1
  while true; do
    status=0 && create || status=$?
    ((status != 2)) || exit 1 # the machines may be well: nothing is deleted
    if ((status == 0)); then
      ((!first)) || [[ -z "$(running)" ]] || fail "a run goes on on $NAME, and nothing was changed; \`run\` would replace it" 3
      install && start "$@" && return
    fi
    first=0
    # Preempted, or a host is broken: fresh machines, then the newest checkpoint. An error of the run itself comes back
    # at once and would cost machines for nothing: three failures within ten minutes each end the loop.
    if ((SECONDS - since < 600)); then failures=$((failures + 1)); else failures=0; fi
    since=$SECONDS
    ((failures < 3)) || fail "the run fails again and again; see $WORKDIR/logs"
    status="$(state)" || continue # which `create` will say
    # what is as it was, after an error or a lost connection, is used once more
    [[ "$status" == ABSENT || ("$status" == ACTIVE && "$failures" -lt 2) ]] || delete || true
  done
}

command="${1:-}"
shift || true
case "$command" in
  create | install | delete) "$command" ;;
  run) start "$@" ;;
  keep) keep "$@" ;;
  *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
