#!/bin/bash
# A recipe under SLURM, until it is complete:  sbatch docs/how-to/slurm.sh RUN_DIR MODULE [FLAGS]
#   sbatch docs/how-to/slurm.sh runs/gan/long recipes.gan --preset fashion-mnist --data_root data --steps 200000
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-node=2
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

run_dir=$1
shift

# The same line starts a run and goes on with it.
srun python -m "$@" --run_dir "$run_dir"

# srun's own status says little: a run that was told to stop, saved and left has status 0.
state=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["state"])' "$run_dir/status.json")
case $state in
    complete) ;;
    stopped) scontrol requeue "$SLURM_JOB_ID" ;;
    *) echo "$run_dir: $state; not put back into the queue" >&2; exit 1 ;;
esac
