#!/usr/bin/env bash
# Trains. Without arguments: the demo (prepares its data, trains a small model from scratch, draws the loss curves).
#
#   bash examples/run_finetune.sh                                        the demo
#   bash examples/run_finetune.sh --training.train_steps 100             the demo, with a setting changed
#   bash examples/run_finetune.sh --config my.yaml --optimizer.lr 1e-5   your own run; no demo data is prepared
#   TP=1 DP=2 bash examples/run_finetune.sh                              another layout: TP, PP, DP
#   sbatch --nodes 2 --gpus-per-node 8 --wrap "bash examples/run_finetune.sh --config my.yaml"
#
# Processes: all GPUs of the machine (or of the SLURM job), else TP x CP x PP x DP processes on the CPU.
set -euo pipefail
# Under sbatch this file is a copy in a spool folder: the repository is where the job was submitted then.
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[[ -e "$HERE/lib/environment.sh" ]] || HERE="${SLURM_SUBMIT_DIR:-$PWD}/examples"
[[ -e "$HERE/lib/environment.sh" ]] || { echo "error: start this from the repository's folder." >&2; exit 1; }
source "$HERE/lib/environment.sh"
prepare_environment
cd "$REPOSITORY"

is_demo=true
for argument in "$@"; do
    case "$argument" in
        --help | -h) exec "$PYTHON" -m megabagel.train --help ;;
        --config | --config=*) is_demo=false ;;
    esac
done

# What is there: nodes of a SLURM job or this machine alone, and GPUs on each.
nodes=1
if [[ -n "${SLURM_JOB_ID:-}" ]] && command -v srun >/dev/null; then nodes="${SLURM_NNODES:-1}"; else unset SLURM_JOB_ID; fi
gpus="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
if [[ "$gpus" -eq 0 ]]; then
    # Several processes share few cores; without this each of them starts a thread per core and all become slower.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
else
    # One queue of kernels: communication then starts in the order in which tensor parallelism issued it.
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
fi

overrides=("$@")
if $is_demo; then
    # Two replicas keep two cores busy; one with layers split over both would wait for the other core all the time.
    if ((gpus == 0)) && [[ -z "${TP:-}${PP:-}" ]]; then DP="${DP:-2}"; fi
    overrides=(--config demo "$@")
fi
[[ -z "${TP:-}" ]] || overrides+=(--parallel.tensor_model_parallel_size "$TP")
[[ -z "${PP:-}" ]] || overrides+=(--parallel.pipeline_model_parallel_size "$PP")

# Sets processes (per node), global_batch, steps and run_dir, or ends with what is wrong in the configuration.
plan() { "$PYTHON" examples/lib/launch_plan.py "$1" "$gpus" "$nodes" "${DP:-0}" "$is_demo" "${overrides[@]}"; }
if $is_demo; then
    settings="$(plan parse)"
    say "Preparing the demo's data in data/demo (once)"
    "$PYTHON" tools/prepare_demo.py --out data/demo
fi
settings="$(plan check)"
eval "$settings"
if $is_demo; then overrides+=(--training.global_batch_size "$global_batch"); fi

say "Training on $nodes x $processes processes; the run is written to $run_dir"
launch=("$PYTHON" -m torch.distributed.run --nproc_per_node "$processes")
if [[ -n "${SLURM_JOB_ID:-}" ]]; then
    head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    address="$(scontrol show node "$head" | grep -oP 'NodeAddr=\K\S+')"
    launch+=(--nnodes "$nodes" --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d
        --rdzv_endpoint "$address:$((29500 + SLURM_JOB_ID % 1000))")
    launch=(srun --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1
        --cpus-per-task "${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}" "${launch[@]}")
else
    launch+=(--standalone)
fi
"${launch[@]}" -m megabagel.train "${overrides[@]}"

say "Done"
curves="$("$PYTHON" tools/plot_losses.py "$run_dir")"
latest="$run_dir/latest_checkpointed_iteration.txt"
if [[ -e "$latest" ]]; then checkpoint="$(printf '%s/iter_%07d' "$run_dir" "$((10#$(<"$latest")))")"; else checkpoint="none was written (checkpoint.save_interval is 0)"; fi
echo "loss curves   $curves"
echo "checkpoint    $checkpoint"
echo "metrics       $run_dir/metrics.jsonl"
echo "TensorBoard   $run_dir/tensorboard"
echo "configuration $run_dir/config.yaml"
echo
echo "What you may want next:"
echo "  $PYTHON -m tensorboard.main --logdir $run_dir/tensorboard"
echo "  bash examples/run_finetune.sh --config $run_dir/config.yaml --training.train_steps $((steps * 2))   # train on from the newest checkpoint"
if $is_demo; then
    echo "  bash examples/run_finetune.sh --config my.yaml   # your own data and model: see README.md"
else
    echo "  $PYTHON tools/plot_losses.py $run_dir   # draw the curves again"
fi
