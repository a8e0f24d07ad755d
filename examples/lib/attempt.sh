# One attempt of a run: its steps, requests to stop while they go on, and what follows from its end. Sourced, not run.
#
# USR1 (SLURM sends it before the time limit, see the head of run_finetune.sh): stop, save, start again. TERM (scancel),
# HUP, Ctrl-C: stop, save. A second Ctrl-C leaves at once.
# MAX_REQUEUES: how often in a row a job that failed may start again without a new checkpoint (default 3).

STOPPED=75 # of megabagel/runtime/exit_codes.py
START_AGAIN=100 # of examples/lib/verdict.py
asked="" # USR1, TERM or INT
process=""
since="$(date +%s)"
REPEAT_SECONDS=15

trap 'asked=${asked:-USR1}' USR1
trap 'asked=TERM' TERM HUP
trap 'interrupt' INT

interrupt() {
    if [[ -z "$process" ]]; then exit 130; fi
    if [[ "$asked" == INT ]]; then
        kill -USR2 "$process"
        return
    fi
    asked=INT
    echo "Stopping after this step, with a checkpoint; Ctrl-C again leaves at once."
}

# Runs a command in the background and waits for it, so that this shell hears signals meanwhile; returns its code.
run_step() {
    local code=0 pause
    if [[ -n "$asked" ]]; then return "$STOPPED"; fi
    "$@" &
    process=$!
    while kill -0 "$process" 2>/dev/null; do
        if [[ -z "$asked" ]]; then
            wait "$process" && code=0 || code=$?
        else # more than once: a worker that is just starting does not listen yet
            kill -USR1 "$process" 2>/dev/null || true
            sleep "$REPEAT_SECONDS" &
            pause=$!
            wait -n "$process" "$pause" && code=0 || code=$?
            kill "$pause" 2>/dev/null || true
        fi
    done
    process=""
    return "$code"
}

# Checks the nodes before training; returns the exit code of what was found.
preflight() {
    local report="$run_dir/preflight.json"
    say "Checking $nodes x $processes processes before training (PREFLIGHT=0 leaves this out)"
    rm -f "$report"
    on_all_nodes "${logs:+$logs/preflight}" 1000 --nproc_per_node "$processes" tools/preflight.py --report "$report" "${overrides[@]}"
    run_step "${step[@]}" || true
    if [[ -n "$asked" ]]; then return "$STOPPED"; fi
    if [[ ! -e "$report" ]]; then
        echo "error: the check ended without a result: a node could not start its processes or reach the first node." >&2
        return 1
    fi
    return "$(grep -oP '"code": \K\d+' "$report")"
}

# Whether SLURM can start this job again: a batch job that was not submitted with --no-requeue.
can_requeue() {
    [[ -n "${SLURM_JOB_ID:-}" ]] && [[ "$(job_field BatchFlag)" != 0 ]] && [[ "$(job_field Requeue)" == 1 ]]
}

# Returns when the attempt has done its work. Otherwise ends this script with the attempt's exit code, after having
# requeued the job where that makes sense. CODE: that of the pre-flight check; empty: the run's events tell.
finish_attempt() {
    local code=0 requeue=false
    if can_requeue; then requeue=true; fi
    once "$PYTHON" examples/lib/verdict.py "$run_dir" --code "$1" --since "$since" --asked "$asked" \
        --can-requeue "$requeue" --limit "${MAX_REQUEUES:-3}" --logs "$logs" || code=$?
    if [[ "$code" -eq "$START_AGAIN" ]]; then
        scontrol requeue "$SLURM_JOB_ID" # SLURM ends this shell
        sleep 60
        code="$STOPPED"
    fi
    if [[ "$code" -ne 0 ]]; then exit "$code"; fi
}
