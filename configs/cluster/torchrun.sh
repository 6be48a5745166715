#!/bin/bash
# On each of two nodes, in a folder that both see (runs/ is there):
# HEAD=node0 configs/cluster/torchrun.sh --config gpt2/124m --config strategy/hsdp \
#   --trainer.accumulate_grad_batches=5 --trainer.val_check_interval=10000
# HEAD is the name of one of them, PORT a free port there (29500), NODES (2) and DEVICES (8) how many
# there are of each.
# A run that fails is started again on all nodes, at most three times, and goes on from its newest
# checkpoint that is whole. SIGTERM, SIGUSR1 or Ctrl-C to this script on any node stops all of them
# with a checkpoint and status 143, 138 or 130; the same command goes on.
NODES=${NODES:-2}
DEVICES=${DEVICES:-8}
RAVINE_STATUS=$(mktemp) # how it ended: torchrun would start again whatever does not end with 0
export RAVINE_STATUS
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or nodes meet where a start before has left its addresses
setsid python -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$DEVICES" \
    --max-restarts=3 --rdzv-backend=c10d --rdzv-id=ravine \
    --rdzv-endpoint="${HEAD:?the name of one node}:${PORT:-29500}" -m ravine.cli.main fit "$@" \
    --trainer.num_nodes="$NODES" --trainer.devices="$DEVICES" --ckpt_path=auto &
agent=$!
for signal in TERM USR1 INT; do # to the ranks: torchrun itself would not wait for the other nodes
    trap "kill -$signal \$(cat /proc/$agent/task/*/children)" "$signal"
done
while kill -0 "$agent" 2> /dev/null; do
    wait "$agent" # a signal ends it early
done
wait "$agent"
status=$?
told=$(cat "$RAVINE_STATUS")
rm "$RAVINE_STATUS"
exit "${told:-$status}"
