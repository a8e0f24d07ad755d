"""Rules about what a run does when steps go wrong, and about runs that must be repeatable to the bit."""

from collections.abc import Iterator

from megabagel.config.schema import Config


def faults_faults(config: Config) -> Iterator[str]:
    """Faults in order of importance."""
    checkpoint = config.checkpoint
    if config.faults.spike_action != "rollback":
        return
    if checkpoint.save_interval == 0:
        yield (
            "faults.spike_action is rollback, but checkpoint.save_interval 0 means that there is no checkpoint to go "
            "back to; set the interval in steps, or spike_action to log."
        )
    if not checkpoint.auto_resume:
        yield (
            "faults.spike_action is rollback, which goes back to the newest checkpoint of checkpoint.run_dir, but "
            "checkpoint.auto_resume is false, so that it may be another run's; set auto_resume to true."
        )
