#!/bin/bash
# A search over the nodes of one Slurm job, started again until it is done.
#
#   sbatch [SBATCH OPTIONS] cluster/slurm.sh DIR [RUN_SEARCH OPTIONS OF THE LAUNCH]
#
# DIR is the run folder, on a disk that every node sees. Two minutes before the time limit the
# search writes its checkpoint and exits with 3; the job goes back into the queue and resumes it.
#
#SBATCH --job-name=prunevolve
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
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

# A random token for this start alone: it reaches the nodes in the environment of their steps.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token

# This script runs on the first node. The address is the one that Slurm itself has for it.
host=$(scontrol getaddrs "$SLURMD_NODENAME" | sed -E 's/^[^:]+: (.*):[0-9]+$/\1/')
address=$host:6379
node=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}"
    --disable-usage-stats --log-color=false)

ray start --head --node-ip-address="$host" --port=6379 --include-dashboard=false "${node[@]}"
trap 'ray stop --force' EXIT
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks-per-node=1 --exclude="$SLURMD_NODENAME" \
        --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        ray start --address="$address" --block "${node[@]}" &
fi

cluster/search.sh "$folder" "$address" "$@" &
search=$!
trap 'hand_on "$search"' TERM
wait "$search"
code=$?
if kill -0 "$search" 2>/dev/null; then # the signal ended the wait, not the search
    wait "$search"
    code=$?
fi

echo "the search ended with exit code $code"
# A job that scancel ends is not running any more, and stays away.
if [ "$code" -eq "$resumable" ] && [ "$(state)" = RUNNING ] &&
    [ "${SLURM_RESTART_COUNT:-0}" -lt "$most_restarts" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
