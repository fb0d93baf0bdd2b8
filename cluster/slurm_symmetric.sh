#!/bin/bash
# The same as slurm.sh by `ray symmetric-run`: one step starts Ray on all nodes and stops it. The
# signal comes earlier: the other nodes look for the lost head for a minute before they end.
#
#   sbatch [SBATCH OPTIONS] cluster/slurm_symmetric.sh DIR [RUN_SEARCH OPTIONS OF THE LAUNCH]
#
#SBATCH --job-name=prunevolve
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@240
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

folder=$1
shift
resumable=3
most_restarts=100

state() {
    squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T
}

# Hands SIGTERM to the search, for which a second one is the end without a checkpoint: scancel
# signals every process of the job, and sets its state before that.
hand_on() {
    trap '' TERM
    case $(state) in
        COMPLETING | CANCELLED) ;;
        *) kill -TERM "$1" ;;
    esac
}

RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
host=$(scontrol getaddrs "$SLURMD_NODENAME" | sed -E 's/^[^:]+: (.*):[0-9]+$/\1/')
address=$host:6379

# symmetric-run passes no signal on. So the search, which runs on the first node as this script
# does, leaves its process id for the trap.
process=$(mktemp)
# shellcheck disable=SC2016  # expanded by the inner shell
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 \
    ray symmetric-run --address="$address" --num-cpus="$SLURM_CPUS_PER_TASK" \
    --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats --log-color=false -- \
    bash -c 'echo $$ > "$0"; exec cluster/search.sh "$@"' \
    "$process" "$folder" "$address" "$@" &
step=$!
trap 'hand_on "$(cat "$process")"' TERM
wait "$step"
code=$? # the highest of the nodes': the search's
if kill -0 "$step" 2>/dev/null; then # the signal ended the wait, not the step
    wait "$step"
    code=$?
fi
rm -f "$process"

echo "the search ended with exit code $code"
# A job that scancel ends is not running any more, and stays away.
if [ "$code" -eq "$resumable" ] && [ "$(state)" = RUNNING ] &&
    [ "${SLURM_RESTART_COUNT:-0}" -lt "$most_restarts" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
