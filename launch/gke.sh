#!/usr/bin/env bash
# A run on TPUs of a GKE cluster, as a JobSet (https://jobset.sigs.k8s.io, 0.6 or newer, must be installed there):
#
#   launch/gke.sh [flags]          DRY_RUN=1 prints what would be applied
#
# BUILD=1 builds IMAGE first, from the Dockerfile of this repository, and pushes it.
set -euo pipefail

NAME="${NAME:-detclip}"
IMAGE="${IMAGE:?image with this code, e.g. us-docker.pkg.dev/PROJECT/detclip/detclip:1}"
BUILD="${BUILD:-}"
ACCELERATOR="${ACCELERATOR:-tpu-v5-lite-podslice}"
TOPOLOGY="${TOPOLOGY:-4x8}"
NUM_HOSTS="${NUM_HOSTS:-8}"
CHIPS_PER_HOST="${CHIPS_PER_HOST:-4}"
BUCKET="${BUCKET:-}" # gs://… where the run goes, if there is no volume; the pods' service account may write there
CLAIM="${CLAIM:-}"   # ReadWriteMany volume (Filestore) with data/, weights/ and runs/; "": none
ACCOUNT="${ACCOUNT:-default}" # service account of the pods
CONFIG="${CONFIG:-configs/swin_t.py}"
WORKDIR="${WORKDIR:-${BUCKET:-/share}/runs/$NAME}"
MAX_RESTARTS="${MAX_RESTARTS:-3}" # after errors; preemptions are not counted
DRY_RUN="${DRY_RUN:-}"

again=75 # exit status of a run that was preempted and has saved: not 0, or its pods would count as complete

fail() { echo "error: $1" >&2 && exit 2; }
[[ -n "$CLAIM$BUCKET" ]] || fail "BUCKET=gs://… or CLAIM=NAME must say where all hosts can write"
apply() { if [[ -n "$DRY_RUN" ]]; then cat; else kubectl apply -f -; fi; }
run() { if [[ -n "$DRY_RUN" ]]; then printf '# %s\n' "$(printf '%q ' "$@")"; else "$@"; fi; }

# a text of YAML, which is one of JSON
text() {
  local text="${1//\\/\\\\}" code sign
  text="${text//\"/\\\"}"
  for code in {1..31} 127; do # control characters, of which YAML takes none as it is
    printf -v code '%02x' "$code" && printf -v sign '%b' "\\x$code"
    text="${text//"$sign"/\\u00$code}"
  done
  text="${text//$'\xc2\x85'/\\u0085}" # ends of lines in YAML
  text="${text//$'\xe2\x80\xa8'/\\u2028}"
  printf '"%s"' "${text//$'\xe2\x80\xa9'/\\u2029}"
}
argument() { text "${1//\$/\$\$}"; } # of a container, where $(NAME) would be a variable
for name in NUM_HOSTS CHIPS_PER_HOST MAX_RESTARTS; do
  [[ "${!name}" =~ ^(0|[1-9][0-9]*)$ ]] || fail "$name is '${!name}'; it takes a number"
done
flags=""
for flag in "$@"; do
  flags+="
                    - $(argument "$flag")"
done
mounts="" volumes=""
if [[ -n "$CLAIM" ]]; then
  mounts="
                  volumeMounts:
                    - {name: share, mountPath: /share}
                    - {name: share, mountPath: /detclipv2_jax/data, subPath: data}
                    - {name: share, mountPath: /detclipv2_jax/weights, subPath: weights}"
  volumes="
              volumes:
                - name: share
                  persistentVolumeClaim: {claimName: $(text "$CLAIM")}"
fi

if [[ -n "$BUILD" ]]; then
  run docker build --build-arg EXTRA=tpu --tag "$IMAGE" "$(dirname -- "$0")/.."
  run docker push "$IMAGE"
fi
apply <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(text "$NAME")
  annotations:
    # one slice: its pods are not spread over two node pools of the same topology
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $MAX_RESTARTS # all pods start again when one ends with an error
    rules:
      - action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy] # a preemption, see below
  replicatedJobs:
    - name: run
      replicas: 1
      template:
        spec:
          parallelism: $NUM_HOSTS
          completions: $NUM_HOSTS
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob # it has saved
                onExitCodes: {containerName: run, operator: In, values: [$again]}
              - action: FailJob # its machine was taken
                onPodConditions: [{type: DisruptionTarget, status: "True"}]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300 # SIGTERM, a checkpoint, the end
              serviceAccountName: $(text "$ACCOUNT")
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(text "$ACCELERATOR")
                cloud.google.com/gke-tpu-topology: $(text "$TOPOLOGY")
              containers:
                - name: run
                  image: $(text "$IMAGE")
                  workingDir: /detclipv2_jax
                  # no shell: the signal must reach Python
                  command: [python, -m, detclipv2_jax.main]
                  args:
                    - --distributed=on
                    - --preempted_status=$again
                    - $(argument "--config=$CONFIG")
                    - $(argument "--workdir=$WORKDIR")$flags
                  resources:
                    requests: {google.com/tpu: $CHIPS_PER_HOST}
                    limits: {google.com/tpu: $CHIPS_PER_HOST}$mounts$volumes
YAML
