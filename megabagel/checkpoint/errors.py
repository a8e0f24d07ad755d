"""The errors of this package."""


class CheckpointError(ValueError):
    """A checkpoint or weights folder that is damaged or does not fit; the message is one sentence for the user."""


class UnreadableError(CheckpointError):
    """A file of a checkpoint that cannot be read, on this rank at least: another checkpoint may do."""
