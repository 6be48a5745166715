#!/bin/bash
# sbatch configs/cluster/slurm.sh --config gpt2/124m --config strategy/hsdp \
#   --trainer.accumulate_grad_batches=5 --trainer.val_check_interval=10000
# From a folder that all nodes see: runs/ is there. Options before the file's name win over its own:
# sbatch --nodes=4 --ntasks-per-node=4 --gpus-per-node=4 --time=12:00:00 configs/...
# One task a GPU: srun starts the ranks, and Lightning reads their places from SLURM's variables.
# Two minutes before the time is over every rank gets SIGUSR1: the run stops at a step's end with a
# checkpoint and status 138, and the job goes back into the queue, where it goes on by itself.
# SIGTERM stops it likewise, with 143, and whoever sent it decides: after scancel the job is over, after
# scontrol requeue or a preemption it goes on. A rank that dies ends the others half a minute later:
# NCCL would wait for it far longer.
#SBATCH --job-name=ravine
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# srun does not take the cores of a task from sbatch, since 22.05
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=30 python -m ravine.cli.main fit "$@" \
    --trainer.num_nodes="$SLURM_NNODES" --trainer.devices="$SLURM_NTASKS_PER_NODE" --ckpt_path=auto
status=$?
if [ "$status" -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
