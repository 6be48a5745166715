#!/bin/bash
# sbatch configs/cluster/slurm.sh --config gpt2/124m --config strategy/hsdp
# One task a GPU: srun starts the ranks, and Lightning reads their places from SLURM's variables.
# Two minutes before the time is over every rank gets SIGTERM: the run stops at a step's end with a
# checkpoint and status 143, and the job is put back into the queue, where it goes on by itself.
# A rank that dies ends the others half a minute later: NCCL would wait for it far longer.
#SBATCH --job-name=ravine
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
srun --kill-on-bad-exit=0 --wait=30 lightning fit "$@" --trainer.num_nodes="$SLURM_NNODES" \
    --trainer.devices="$SLURM_NTASKS_PER_NODE" --ckpt_path=auto
status=$?
if [ "$status" -eq 143 ] || [ "$status" -eq 138 ]; then # stopped by a signal, with a checkpoint
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
