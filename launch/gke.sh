#!/usr/bin/env bash
# A run on TPUs of a GKE cluster, as a JobSet (https://jobset.sigs.k8s.io must be installed in the cluster):
#
#   launch/gke.sh [flags]          DRY_RUN=1 prints what would be applied
#
# The image has this repository in /detclipv2_jax, installed with `pip install -e '.[tpu]'`.
set -euo pipefail

NAME="${NAME:-detclip}"
IMAGE="${IMAGE:?image with this code, e.g. us-docker.pkg.dev/PROJECT/detclip/detclip:1}"
ACCELERATOR="${ACCELERATOR:-tpu-v5-lite-podslice}"
TOPOLOGY="${TOPOLOGY:-4x8}"
NUM_HOSTS="${NUM_HOSTS:-8}"
CHIPS_PER_HOST="${CHIPS_PER_HOST:-4}"
CLAIM="${CLAIM:-detclip}"              # ReadWriteMany volume (Filestore) with data/, weights/ and runs/
CONFIG="${CONFIG:-configs/swin_t.py}"
WORKDIR="${WORKDIR:-/share/runs/$NAME}"
MAX_RESTARTS="${MAX_RESTARTS:-100}"
DRY_RUN="${DRY_RUN:-}"

again=75 # exit status of a run that was preempted and has saved: not 0, or its pods would count as complete

apply() { if [[ -n "$DRY_RUN" ]]; then cat; else kubectl apply -f -; fi; }

# a text of YAML, which is one of JSON
text() {
  local text="${1//\\/\\\\}"
  text="${text//\"/\\\"}"
  text="${text//$'\n'/\\n}"
  printf '"%s"' "${text//$'\t'/\\t}"
}
argument() { text "${1//\$/\$\$}"; } # of a container, where $(NAME) would be a variable
for name in NUM_HOSTS CHIPS_PER_HOST MAX_RESTARTS; do
  [[ "${!name}" =~ ^[0-9]+$ ]] || { echo "error: $name is '${!name}'; it takes a number" >&2 && exit 2; }
done
flags=""
for flag in "$@"; do
  flags+="
                    - $(argument "$flag")"
done

apply <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(text "$NAME")
spec:
  failurePolicy:
    maxRestarts: $MAX_RESTARTS # all pods start again when one ends with an error
  replicatedJobs:
    - name: run
      replicas: 1
      template:
        spec:
          parallelism: $NUM_HOSTS
          completions: $NUM_HOSTS
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300 # SIGTERM, a checkpoint, the end
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
                    limits: {google.com/tpu: $CHIPS_PER_HOST}
                  volumeMounts:
                    - {name: share, mountPath: /share}
                    - {name: share, mountPath: /detclipv2_jax/data, subPath: data}
                    - {name: share, mountPath: /detclipv2_jax/weights, subPath: weights}
              volumes:
                - name: share
                  persistentVolumeClaim: {claimName: $(text "$CLAIM")}
YAML
