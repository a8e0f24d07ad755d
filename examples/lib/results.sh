# What is shown after a run has ended well: its curves, its files, what one may want next. Sourced, not run.

show_results() {
    local curves latest checkpoint replicas=""
    say "Done"
    curves="$(once "$PYTHON" tools/plot_losses.py "$run_dir")"
    latest="$run_dir/latest_checkpointed_iteration.txt"
    checkpoint="none was written (checkpoint.save_interval is 0)"
    if [[ -e "$latest" ]]; then checkpoint="$(printf '%s/iter_%07d' "$run_dir" "$((10#$(<"$latest")))")"; fi
    echo "loss curves   $curves"
    echo "checkpoint    $checkpoint"
    echo "metrics       $run_dir/metrics.jsonl"
    echo "TensorBoard   $run_dir/tensorboard"
    echo "configuration $run_dir/config.yaml"
    if $is_demo && [[ -e "$latest" ]]; then
        say "Looking at what it learned (about a minute)"
        once "$PYTHON" tools/demo_results.py "$run_dir"
    fi
    echo
    echo "What you may want next:"
    echo "  $PYTHON -m tensorboard.main --logdir $run_dir/tensorboard"
    # The saved configuration names every other size of the layout; how many replicas there are is up to the start.
    [[ -z "${DP:-}" ]] || replicas="DP=$DP "
    echo "  ${replicas}bash examples/run_finetune.sh --config $run_dir/config.yaml --training.train_steps $((steps * 2))   # train on from the newest checkpoint"
    if $is_demo; then
        echo "  bash examples/run_finetune.sh --config my.yaml   # your own data and model: see README.md"
    else
        echo "  $PYTHON tools/plot_losses.py $run_dir   # draw the curves again"
    fi
}
