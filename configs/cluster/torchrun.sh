#!/bin/bash
# Run this on each of two nodes, in a folder on a file system that both share:
# HEAD=node0 configs/cluster/torchrun.sh --config gpt2/124m --config strategy/hsdp \
#   --trainer.accumulate_grad_batches=5 --trainer.val_check_interval=10000
# Machine: NODES nodes (default 2) with DEVICES devices each (default 8). HEAD is the name of one
# node, and PORT is a free port on it (default 29500).
# Time: that of the config. Expect: a run folder below runs/ of the current folder.
# If a run fails, torchrun restarts it on all nodes, at most three times. It resumes from the newest
# valid checkpoint. SIGTERM, SIGUSR1 or Ctrl-C to this script on one node stops the run on all nodes
# with a checkpoint and status 143, 138 or 130. The same command resumes it.
NODES=${NODES:-2}
DEVICES=${DEVICES:-8}
# The run writes exit statuses after which torchrun must not restart it to this file, and exits with 0.
RAVINE_STATUS=$(mktemp)
export RAVINE_STATUS
# If a collective of NCCL ends by its timeout, each rank writes its last 2000 collectives to
# flight_recorder/: `torchfrtrace flight_recorder --prefix rank_` names the ranks that did not join.
mkdir -p flight_recorder
export TORCH_FR_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_FR_DUMP_TEMP_FILE="$PWD/flight_recorder/rank_"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # otherwise a restart reads stale addresses in the store
setsid python -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$DEVICES" \
    --max-restarts=3 --rdzv-backend=c10d --rdzv-id=ravine \
    --rdzv-endpoint="${HEAD:?the name of one node}:${PORT:-29500}" -m ravine.cli.main fit "$@" \
    --trainer.num_nodes="$NODES" --trainer.devices="$DEVICES" --ckpt_path=auto &
agent=$!
for signal in TERM USR1 INT; do # to the ranks: torchrun does not wait for the other nodes
    trap "kill -$signal \$(cat /proc/$agent/task/*/children)" "$signal"
done
while kill -0 "$agent" 2> /dev/null; do
    wait "$agent" # a signal interrupts `wait`
done
wait "$agent"
status=$?
run_status=$(cat "$RAVINE_STATUS")
rm "$RAVINE_STATUS"
exit "${run_status:-$status}"
