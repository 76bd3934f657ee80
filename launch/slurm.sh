#!/usr/bin/env bash
# A run on a Slurm cluster, one process a GPU:
#
#   sbatch [--nodes=4] launch/slurm.sh [flags]          DRY_RUN=1 bash launch/slurm.sh [flags] prints the command
#
#SBATCH --job-name=detclip
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# --ntasks-per-node: as many as GPUs; jax gives each process the GPU of its number, so every task must see all of them.
# --signal: 300 s before the time is up all processes are told; they save the same step and end, and the job queues up
# again. A preempting partition does the same within its GraceTime.
set -euo pipefail

CODE="${CODE:-$PWD}" # this repository, on a file system that all nodes share
CDPATH='' cd -- "$CODE"
PYTHON="${PYTHON:-$PWD/.venv/bin/python}" # pip install -e '.[cuda13]'
CONFIG="${CONFIG:-configs/swin_t.py}"
WORKDIR="${WORKDIR:-runs/${SLURM_JOB_NAME:-detclip}}" # shared as well
DRY_RUN="${DRY_RUN:-}"

again=75 # exit status of a run that was preempted and has saved

run() { if [[ -n "$DRY_RUN" ]]; then printf '%q ' "$@" && echo; else "$@"; fi; }

trap : TERM # a cluster may send the signal to this shell as well, which must live to queue the job up again
# where the run says that it has saved: srun reports 143 or 137 if it ends tasks before their own status is known
word="$WORKDIR/preempted"
[[ -n "$DRY_RUN" ]] || rm -f -- "$word"
status=0
# one process that fails takes the others along; each line of the log says whose it is
run srun --kill-on-bad-exit=1 --label "$PYTHON" -m detclipv2_jax.main --distributed=on --preempted_status=$again \
  --config="$CONFIG" --workdir="$WORKDIR" "$@" || status=$?
if ((status == again)) || { ((status != 0)) && [[ -e "$word" ]]; }; then
  run scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
