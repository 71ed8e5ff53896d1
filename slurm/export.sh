#!/usr/bin/env bash
# Write a finished run as a bundle: sbatch slurm/export.sh RUN --format timm --out DIR
#
#SBATCH --job-name=export
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail

# Slurm runs a copy of this file, and shows where it came from followed by its arguments.
shown=$(scontrol show job "${SLURM_JOB_ID:?submit this script by sbatch}" | sed -n 's/^ *Command=//p')
# shellcheck source=slurm/env.sh
source "$(dirname "${shown%" $*"}")/env.sh"
exec python -m launcher export "$@"
