"""The one error of this package."""


class CheckpointError(ValueError):
    """A checkpoint or weights folder that is damaged or does not fit; the message is one sentence for the user."""
