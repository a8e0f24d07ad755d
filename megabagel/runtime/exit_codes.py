"""With which code a training process, and `examples/run_finetune.sh` with it, ends: what a scheduler may go by."""

DONE = 0  # all steps, or all data
FAILED = 1  # an error; starting again may help
STOPPED = 75  # asked to stop (signal, time limit): saved, and the same command continues. EX_TEMPFAIL of sysexits.h
GIVE_UP = 78  # starting again would end the same way: wrong settings, too many faults or restarts without progress
