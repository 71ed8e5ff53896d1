#!/usr/bin/env bash
# Pretrain TransNeXt-Base: sbatch [--nodes=N] slurm/pretrain_base.sh [--optim.lr 2e-3 ...]
#
# The run is the folder runs/transnext_base where sbatch is typed, or --run-dir. The same line again
# continues it, on any number of nodes; until it is complete the job queues itself again after time
# limits, preemption and dead nodes. touch RUN/stop ends it. More: docs/operations.md.
#
#SBATCH --job-name=transnext_base
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

# Slurm runs a copy of this file, and shows where it came from followed by its arguments.
shown=$(scontrol show job "${SLURM_JOB_ID:?submit this script by sbatch}" | sed -n 's/^ *Command=//p')
# shellcheck source=slurm/env.sh
source "$(dirname "${shown%" $*"}")/env.sh"
exec python -m launcher.job transnext_base "$@"
