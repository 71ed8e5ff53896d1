#!/usr/bin/env bash
# Probe frozen features, linearly and by nearest neighbours:
#   sbatch slurm/finetune_probe.sh --backbone runs/transnext_base --out runs/probe
#
# Every setting of `foveate finetune probe` may follow. The same line again uses the features that are
# in OUT already.
#
#SBATCH --job-name=finetune_probe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail

# Slurm runs a copy of this file, and shows where it came from followed by its arguments.
shown=$(scontrol show job "${SLURM_JOB_ID:?submit this script by sbatch}" | sed -n 's/^ *Command=//p')
# shellcheck source=slurm/finetune.sh
source "$(dirname "${shown%" $*"}")/finetune.sh"
finetune probe "$@"
