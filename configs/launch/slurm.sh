#!/bin/bash
# Several machines, one launcher on each: sbatch configs/launch/slurm.sh --config configs/llama-3.3-70b.yaml --out /shared/runs/mine
# All of them must see --out. A job that ran out of time goes on when the same command is given again. $LAUNCH is the launch
# file: LAUNCH=configs/launch/zero2.yaml sbatch configs/launch/slurm.sh ...
#SBATCH --job-name=slipstream
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail

export LAUNCH=${LAUNCH:-configs/launch/ddp.yaml}
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN_ADDRESS=${HOSTS%%$'\n'*} # the first; head would close the pipe on scontrol, which pipefail takes for a failure

# What stands in single quotes is filled in on each machine.
srun bash -c 'exec accelerate launch --config_file "$LAUNCH" \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_ADDRESS" --main_process_port "${MAIN_PORT:-29500}" \
    -m slipstream.cli train "$@"' train "$@"
