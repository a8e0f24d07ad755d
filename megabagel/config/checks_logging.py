"""Rules about `config.logging`: numbers, and packages that what is asked for needs."""

import importlib.util
from collections.abc import Iterator

from megabagel.config.schema import Config


def logging_faults(config: Config) -> Iterator[str]:
    """Faults in order of importance."""
    logging = config.logging
    if logging.histogram_interval < 0:
        yield f"logging.histogram_interval is {logging.histogram_interval}, but must not be negative; 0 draws none."
    if logging.wandb_project == "":
        yield "logging.wandb_project is empty; give a project's name, or null to turn Weights & Biases off."
    if (port := logging.prometheus_port) is not None and not 0 <= port < 2**16:
        yield f"logging.prometheus_port is {port}, but a port lies in 0 .. 65535; null turns it off."
    for name, package, extra in (
        ("wandb_project", "wandb", "wandb"),
        ("prometheus_port", "prometheus_client", "prometheus"),
    ):
        if getattr(logging, name) is not None and importlib.util.find_spec(package) is None:
            yield (
                f"logging.{name} is set, but the package {package} is not installed; install the extra with "
                f'pip install "megabagel[{extra}]", or set it to null.'
            )
