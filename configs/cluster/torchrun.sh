#!/bin/bash
# On each of two nodes: HEAD=node0 configs/cluster/torchrun.sh --config gpt2/124m --config strategy/hsdp
# HEAD is the name of one of the nodes. A run that fails is started again, at most three times, and
# goes on from its newest checkpoint that is whole.
set -e
NODES=${NODES:-2}
DEVICES=${DEVICES:-8}
exec torchrun --nnodes="$NODES" --nproc-per-node="$DEVICES" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="${HEAD:?the name of one node}:29500" \
    --rdzv-id=ravine -m ravine.cli.main fit "$@" \
    --trainer.num_nodes="$NODES" --trainer.devices="$DEVICES" --ckpt_path=auto
