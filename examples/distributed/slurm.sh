#!/bin/bash
#SBATCH --job-name=analog
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --open-mode=append

# Ten minutes before the time is up every process gets SIGTERM: the run saves after its step and
# ends. Submit the same script again, and it goes on from there.
# OUTPUT must lie where all machines see it.
set -euo pipefail
MODEL=${MODEL:?the model} RECIPE=${RECIPE:?the recipe} OUTPUT=${OUTPUT:?the directory to write}
CONFIG=${CONFIG:-examples/distributed/fsdp2.yaml}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MODEL RECIPE OUTPUT CONFIG HEAD
# How long the launcher lets processes save before it kills them; usually half a minute.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540

srun bash -c 'exec accelerate launch --config_file "$CONFIG" \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
    --main_process_ip "$HEAD" --main_process_port 29500 --no_python \
    optimum-cli export analog --model "$MODEL" --recipe "$RECIPE" --resume "$OUTPUT"'
