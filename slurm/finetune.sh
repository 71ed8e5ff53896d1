# shellcheck shell=bash
# What the scripts of fine-tuning share: the environment, and going on after an interruption.

# shellcheck source=slurm/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# Run a task of fine-tuning on all tasks of the job. Workers that saved and stopped because a signal
# asked them to exit with 75: the job then queues itself again, to go on where it was.
finetune() {
    local code=0
    # All end together; one that dies alone leaves the others a minute.
    srun --kill-on-bad-exit=0 --wait=60 python -m trainer.finetune "$@" || code=$?
    if [ "$code" = 75 ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}
