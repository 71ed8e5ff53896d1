#!/usr/bin/env bash
# Train a detector on pretrained weights:
#   sbatch slurm/finetune_detect.sh --head mask_rcnn --backbone runs/transnext_base --out runs/mask_rcnn
#
# Every setting of `foveate finetune detect` may follow. The same line again continues the run; the
# job queues itself again after its time limit and preemption. touch OUT/stop ends it.
#
#SBATCH --job-name=finetune_detect
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

# Slurm runs a copy of this file, and shows where it came from followed by its arguments.
shown=$(scontrol show job "${SLURM_JOB_ID:?submit this script by sbatch}" | sed -n 's/^ *Command=//p')
# shellcheck source=slurm/finetune.sh
source "$(dirname "${shown%" $*"}")/finetune.sh"
finetune detect "$@"
