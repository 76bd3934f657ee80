#!/usr/bin/env bash
# Runs one command as several JAX processes on this machine: how code for pods is tried out before a machine is rented.
#
#   [NUM_PROCESSES=2] [DEVICES_PER_PROCESS=4] [DRY_RUN=1] launch/local_multiprocess.sh --config=configs/demo.py [flags]
set -euo pipefail

NUM_PROCESSES="${NUM_PROCESSES:-2}"
DEVICES_PER_PROCESS="${DEVICES_PER_PROCESS:-4}" # simulated CPU devices of each process
PORT="${PORT:-12355}"                           # where process 0 waits for the others
PYTHON="${PYTHON:-python}"
PROGRAM="${PROGRAM:-detclipv2_jax.main}" # module that runs
DRY_RUN="${DRY_RUN:-}"                   # not empty: only print what would run

for name in NUM_PROCESSES DEVICES_PER_PROCESS PORT; do
  [[ "${!name}" =~ ^[1-9][0-9]{0,4}$ ]] || { echo "error: $name is '${!name}'; it takes a number above 0" >&2 && exit 2; }
done

processes=()
for ((i = 0; i < NUM_PROCESSES; i++)); do
  variables=(JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
    "XLA_FLAGS=${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES_PER_PROCESS"
    "JAX_COORDINATOR_ADDRESS=localhost:$PORT" "JAX_NUM_PROCESSES=$NUM_PROCESSES" "JAX_PROCESS_ID=$i")
  if [[ -n "$DRY_RUN" ]]; then
    printf '%s\n' "$(printf '%q ' env "${variables[@]}" "$PYTHON" -m "$PROGRAM" "$@")"
  else # not by `env`, to which a path with "=" is a variable
    (export "${variables[@]}" && exec "$PYTHON" -m "$PROGRAM" "$@") &
    processes+=($!)
  fi
done

# what a scheduler does to a job, a terminal to a command: the signal goes to all, and all save the same step
trap 'kill -TERM "${processes[@]}" 2>/dev/null || true' TERM INT
status=0
for process in "${processes[@]}"; do
  while true; do
    code=0
    wait "$process" || code=$?
    # a trapped signal ends `wait` early, with a status above 128 while the process still runs
    if ((code <= 128)) || ! kill -0 "$process" 2>/dev/null; then break; fi
  done
  ((code == 0)) || status=$code
done
exit "$status"
