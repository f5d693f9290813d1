#!/bin/bash
# Prunes with all nodes of a Slurm job. How to use it: docs/cluster.md.
#
#     sbatch --nodes=4 --cpus-per-task=16 --time=8:00:00 cluster/deploy/slurm.sh MODEL -o OUT [options of billhook prune]
#
# When time is nearly up, the block in progress is finished and the job queued again; it goes on where it was. `billhook`
# must be on the PATH of the job, and the folder that sbatch is called in seen by all nodes.
#SBATCH --job-name=billhook
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180

set -euo pipefail

cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
gpus=${SLURM_GPUS_ON_NODE:-0}
workers=$((SLURM_JOB_NUM_NODES * (gpus > 0 ? gpus : cpus)))
grace_seconds=150 # of the 180 above

# The address by which the other nodes know this one; set HEAD_INTERFACE for that of another interface.
head=$SLURMD_NODENAME
if [[ ${HEAD_INTERFACE:-} ]]; then
    address=$(ip -4 -o address show dev "$HEAD_INTERFACE" | awk '{ split($4, parts, "/"); print parts[1]; exit }')
else
    address=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    address=$(getent ahostsv4 "$address" | awk 'NR == 1 { print $1 }')
fi
if [[ ! $address || ($address == 127.* && $SLURM_JOB_NUM_NODES -gt 1) ]]; then
    echo "the address of $head is '$address': set HEAD_INTERFACE to an interface that the other nodes reach" >&2
    exit 2
fi

# A token for this job alone, which only its user can read.
private=$(mktemp -d "$PWD/.billhook-$SLURM_JOB_ID-XXXXXX")
(umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32), end="")' > "$private/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$private/token RAY_USAGE_STATS_ENABLED=0
export RAY_TMPDIR=/tmp/billhook-$SLURM_JOB_ID

ports=(--node-manager-port=6380 --object-manager-port=6381 --runtime-env-agent-port=6382
    --dashboard-agent-grpc-port=6383 --dashboard-agent-listen-port=6384 --metrics-export-port=6385
    --min-worker-port=6400 --max-worker-port=6899 --disable-usage-stats --block)
# Ray's store holds what is under way between workers: by default it would take a third of the memory.
store=$(((200 + 64 * (gpus > 0 ? gpus : cpus)) << 20))
resources=(--num-cpus="$cpus" --num-gpus="$gpus" --object-store-memory="$store")
# --overlap: steps share the job's resources; --cpus-per-task: srun takes one by default, whatever sbatch was told.
on_each=(srun --overlap --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=0)

# Ray itself ends with the job: a step that is asked to end takes half a minute, which a job out of time has not.
# shellcheck disable=SC2317 # it is called, by the trap
clean_up() {
    if [[ ${code:-1} -eq 1 ]]; then # what the workers and Ray wrote may tell why
        # shellcheck disable=SC2016 # it is for the other shell
        "${on_each[@]}" bash -c 'mkdir -p "$0/$SLURMD_NODENAME" && cp -r "$RAY_TMPDIR"/ray/session_2*/logs/. "$0/$SLURMD_NODENAME"' \
            "billhook-$SLURM_JOB_ID-logs" || true
    fi
    rm -rf "$private"
    "${on_each[@]}" rm -rf "$RAY_TMPDIR" || true
}
trap clean_up EXIT
# For this user alone: Ray opens what it makes in it to everybody.
# shellcheck disable=SC2016
"${on_each[@]}" bash -c 'mkdir -m 700 "$RAY_TMPDIR" 2> /dev/null ||
    { [[ -O $RAY_TMPDIR && ! -L $RAY_TMPDIR ]] && chmod 700 "$RAY_TMPDIR"; }'

"${on_each[@]}" --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --node-ip-address="$address" --port=6379 --dashboard-host=127.0.0.1 \
    "${ports[@]}" "${resources[@]}" > /dev/null &
head_step=$!
for ((tries = 0; ; tries++)); do
    (: < "/dev/tcp/$address/6379") 2> /dev/null && break
    if ((tries == 120)) || ! kill -0 $head_step 2> /dev/null; then
        echo "the head of the Ray cluster did not start at $address:6379" >&2
        exit 1
    fi
    sleep 1
done
if [[ $SLURM_JOB_NUM_NODES -gt 1 ]]; then
    "${on_each[@]}" --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
        ray start --address="$address:6379" "${ports[@]}" "${resources[@]}" > /dev/null &
fi

billhook prune --address "$address:6379" --workers "$workers" --grace "$grace_seconds" "$@" &
billhook=$!
out_of_time=
trap 'out_of_time=yes; kill -USR1 $billhook' USR1
trap 'kill -TERM $billhook' TERM INT
while kill -0 $billhook 2> /dev/null; do
    wait $billhook || true # ends early when a signal comes
done
code=0
wait $billhook || code=$?

if [[ $out_of_time && ($code -eq 130 || $code -eq 138) ]]; then # 138: the signal came before it listens, or after
    clean_up
    trap - EXIT
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
