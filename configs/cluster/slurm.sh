#!/bin/bash
# sbatch configs/cluster/slurm.sh --config gpt2/124m --config strategy/hsdp \
#   --trainer.accumulate_grad_batches=5 --trainer.val_check_interval=10000
# Machine: two nodes with eight GPUs each. Time: at most that of --time; the job requeues itself.
# Expect: a run folder below runs/ of the current folder, which must be on a file system that all
# nodes share.
# Options of sbatch override those of this file:
# sbatch --nodes=4 --ntasks-per-node=4 --gpus-per-node=4 --time=12:00:00 configs/...
# srun starts one task per GPU. Lightning reads the ranks from SLURM's environment variables.
# Two minutes before the time limit, each rank gets SIGUSR1. The run stops after the current
# optimizer step, writes a checkpoint and exits with status 138. The script then requeues the job,
# which resumes from the checkpoint.
# SIGTERM also stops the run with a checkpoint, with status 143. After scancel the job is over.
# After scontrol requeue or a preemption, SLURM starts the job again and it resumes.
# If a rank exits, srun ends the other ranks 30 s later (--wait=30). NCCL alone waits much longer.
#SBATCH --job-name=ravine
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# If a collective of NCCL ends by its timeout, each rank writes its last 2000 collectives to
# flight_recorder/: `torchfrtrace flight_recorder --prefix rank_` names the ranks that did not join.
mkdir -p flight_recorder
export TORCH_FR_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_FR_DUMP_TEMP_FILE="$PWD/flight_recorder/rank_"
# since SLURM 22.05, srun does not inherit --cpus-per-task from sbatch
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=30 python -m ravine.cli.main fit "$@" \
    --trainer.num_nodes="$SLURM_NNODES" --trainer.devices="$SLURM_NTASKS_PER_NODE" --ckpt_path=auto
status=$?
if [ "$status" -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
