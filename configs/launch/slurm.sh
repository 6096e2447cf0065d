#!/bin/bash
# Several machines, one launcher on each: sbatch configs/launch/slurm.sh --config configs/llama-3.3-70b.yaml --out /shared/runs/mine
# All of them must see --out. A job that ran out of time goes on when the same command is given again. $LAUNCH is the launch
# file; DeepSpeed shards by itself: LAUNCH=configs/launch/zero2.yaml sbatch configs/launch/slurm.sh ... --train.shard false
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

export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun does not ask for them by itself

# What stands in single quotes is filled in on each machine. Processes share its cores, of which accelerate would give each one.
# A launcher that fails ends the others, which would wait for it for a day.
srun --kill-on-bad-exit=1 bash -c 'threads=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
exec accelerate launch --config_file "$LAUNCH" \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_ADDRESS" --main_process_port "${MAIN_PORT:-29500}" \
    -m slipstream.cli train "$@"' train "$@"
