#!/usr/bin/env bash
# Fine-tune a classifier at 384 pixels: sbatch slurm/finetune_classify.sh runs/transnext_base
#
# The argument is a run, a checkpoint, a bundle or a file of weights; settings may follow, as those
# of foveate pretrain. The run is the folder runs/NAME_384, or --run-dir, and the job is as those of
# the pretraining scripts: the same line again continues it, and it queues itself again.
#
#SBATCH --job-name=finetune_classify
#SBATCH --nodes=1
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
source=${1:?which weights? sbatch slurm/finetune_classify.sh SOURCE [--SECTION.SETTING VALUE ...]}
exec python -m launcher.job "classify:$source" "${@:2}"
