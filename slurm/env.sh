# shellcheck shell=bash
# What the job scripts set, each with its reason. What the environment of sbatch has set already
# wins, so that a site's own values go there: NCCL_SOCKET_IFNAME, NCCL_IB_HCA, MASTER_ADDR and so on.

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The environment that has torch: the one `make setup` made, or another one.
: "${FOVEATE_VENV:=$checkout/.venv}"
if ! [ -x "$FOVEATE_VENV/bin/python" ]; then
    echo "error: $FOVEATE_VENV is no Python environment: make setup, or set FOVEATE_VENV" >&2
    exit 2
fi
export PATH="$FOVEATE_VENV/bin:$PATH"

# The packages of this checkout, whatever else is installed, and never those of the current folder.
export PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1

# A container for the workers: an Apptainer file (.sif), or an image for Slurm's Pyxis plugin. It
# needs python3 with what setup.cfg lists; the code comes from the run folder.
export FOVEATE_CONTAINER="${FOVEATE_CONTAINER:-}"

# srun gives each task the CPUs that the job asked for; since Slurm 22.05 it does not by itself.
export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}"

# Images are decoded in threads of our own (data.num_workers): OpenMP's would only get in their way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# What NCCL says of a network that fails; by default it says nothing.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# A worker that crashes outside of Python leaves its stack in its log.
export PYTHONFAULTHANDLER=1
