"""The error of a run that must not be started again. Errors that a new start may cure are of other types."""


class GiveUp(Exception):
    """Starting again would end the same way: the message says why and what to change. Raised on all ranks together."""
