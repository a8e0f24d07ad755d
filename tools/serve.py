"""Serve a model for trying it out: OpenAI's API for chat and images, and a page to chat, draw and edit in.

    pip install --no-build-isolation -e '.[serve]'
    python tools/serve.py --model runs/mine                      then open http://127.0.0.1:8000
    python tools/serve.py --model BAGEL-7B-MoT --num-timesteps 30 --port 9000
    torchrun --standalone --nproc_per_node 4 tools/serve.py --model BAGEL-7B-MoT   (split over four processes)

Only this machine can reach it unless --host says otherwise; then a key is needed, in a file or in MEGABAGEL_API_KEY.
The API, the limits and what to know before others may use it: docs/serving.md.
"""

import argparse
import importlib.util
import os
import signal
import socket
import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT),) if path not in sys.path]

import torch.distributed as dist  # noqa: E402

from megabagel.checkpoint.errors import CheckpointError  # noqa: E402
from megabagel.config.errors import ConfigError  # noqa: E402
from megabagel.data.faults import DataError  # noqa: E402
from megabagel.inference import Generator, load  # noqa: E402
from megabagel.inference.options import (  # noqa: E402
    Help,
    add_flow_options,
    add_model_options,
    flow_settings,
    model_settings,
)
from megabagel.models.autoencoder import AutoencoderError  # noqa: E402
from megabagel.runtime import distributed, failure  # noqa: E402
from megabagel.serving.limits import Limits  # noqa: E402

NEEDED = ("fastapi", "multipart", "uvicorn")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY_VARIABLE = "MEGABAGEL_API_KEY"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser("tools/serve.py", description=__doc__, formatter_class=Help)
    add = result.add_argument
    add("--model", required=True, help="BAGEL folder, run folder or iter_... folder")
    add("--name", help="of the model, as clients ask for it; default: the folder's name")
    add("--host", default="127.0.0.1", help="address to listen at")
    add("--port", type=int, default=8000, help="0: any that is free")
    add("--api-key-file", type=Path, help=f"file with the key that clients must send; or set {KEY_VARIABLE}")
    add("--open", action="store_true", help="allow another --host than this machine without a key")
    add("--allowed-hosts", nargs="+", help="names in the Host header that are answered; * for all")
    add("--remote-image-hosts", nargs="+", default=[], help="hosts that pictures in messages may be fetched from")
    add_flow_options(result)
    for field in fields(Limits):
        add(f"--{field.name.replace('_', '-')}", type=int, default=field.default, help="see docs/serving.md")
    add_model_options(result)
    return result


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    with failure.guard(ConfigError, DataError, CheckpointError, AutoencoderError):
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"{', '.join(missing)} cannot be imported: pip install --no-build-isolation -e '.[serve]'."
            )
        limits = Limits(**{field.name: getattr(options, field.name) for field in fields(Limits)})
        key, hosts = read_key(options), allowed_hosts(options)
        flow_settings(options)
        bagel = load(options.model, **model_settings(options))
        if dist.get_rank() == 0:
            serve(bagel, limits, key, hosts, options)
        else:
            from megabagel.serving.worker import follow

            for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 is told too, and ends the others
                signal.signal(number, signal.SIG_IGN)
            follow(bagel)
        distributed.destroy()


def read_key(options: argparse.Namespace) -> str | None:
    """Raises ConfigError where the network could come in without one."""
    key = os.environ.get(KEY_VARIABLE)
    if options.api_key_file is not None:
        try:
            key = options.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"--api-key-file {options.api_key_file} cannot be read: {error}.") from None
        if not key:
            raise ConfigError(f"--api-key-file {options.api_key_file} is empty; it holds the key.")
    if not key and options.host not in LOOPBACK and not options.open:
        raise ConfigError(
            f"--host {options.host} lets others in: give --api-key-file or {KEY_VARIABLE}, or --open to need no key."
        )
    return key or None


def allowed_hosts(options: argparse.Namespace) -> list[str] | None:
    """Names that the server answers to; None: all."""
    given = options.allowed_hosts or []
    if "*" in given or (not given and options.host not in LOOPBACK):
        return None
    return [*LOOPBACK, *(name.lower() for name in given)]


def serve(
    bagel: Generator, limits: Limits, key: str | None, hosts: list[str] | None, options: argparse.Namespace
) -> None:
    """Until SIGINT or SIGTERM, or until the model cannot be used any more."""
    import uvicorn

    from megabagel.serving.app import create_app
    from megabagel.serving.fetch import fetcher
    from megabagel.serving.service import Service

    def stop() -> None:
        server.should_exit = True

    fetch = fetcher([host.lower() for host in options.remote_image_hosts], limits.max_body_bytes)
    service = Service(
        bagel,
        options.name or Path(options.model).resolve().name,
        limits,
        flow_settings(options),
        fetch if options.remote_image_hosts else None,
        stop,
    )
    config = uvicorn.Config(
        create_app(service, key, hosts),
        host=options.host,
        port=options.port,
        limit_concurrency=4 * limits.max_waiting,
        timeout_graceful_shutdown=10,
        server_header=False,
        log_level="warning",
    )
    server = uvicorn.Server(config)
    listener = listen(options.host, options.port)
    print(f"{service.name} is served at http://{options.host}:{listener.getsockname()[1]} (stop: Ctrl-C)", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn ends well on them, and then raises them again
        signal.signal(number, signal.SIG_IGN)
    server.run([listener])
    if service.worker.failure is not None:
        raise service.worker.failure


def listen(host: str, port: int) -> socket.socket:
    """Raises ConfigError where that cannot be."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {host} --port {port} cannot be listened at: {error}.") from None


if __name__ == "__main__":
    main()
