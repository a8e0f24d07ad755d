"""Try the server in this process: hostile requests, which it must refuse, then many small ones at once, of which none
may be lost.

    python tools/check_server.py --model runs/mine
    python tools/check_server.py --model tests/golden/public-basic/ckpt --hostile 10000 --concurrent 200 --places 64

The last line is JSON: statuses of both, memory of the process before and after, what was answered wrongly. Ends
with 1 if anything was.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT),) if path not in sys.path]

import psutil  # noqa: E402
from starlette.types import ASGIApp  # noqa: E402

from megabagel.inference import FlowSettings, load  # noqa: E402
from megabagel.runtime import distributed  # noqa: E402
from megabagel.serving.app import create_app  # noqa: E402
from megabagel.serving.service import Service  # noqa: E402
from tools.serving.client import Answer, Sent, ask, post  # noqa: E402
from tools.serving.hostile import CHAT, DRAW, LIMITS, request  # noqa: E402


def fault_of(answer: Answer) -> str | None:
    """What is wrong with the answer to a hostile request; None: it is a refusal in one sentence."""
    if not 400 <= answer.status < 500:
        return f"status {answer.status}"
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return "no error in OpenAI's form"
    one_sentence = isinstance(message, str) and message.endswith(".") and "\n" not in message and len(message) < 400
    return None if one_sentence else f"no sentence: {message!r}"


async def attack(app: ASGIApp, requests: int, seed: int) -> tuple[Counter, list[str], list[float]]:
    """Statuses, faults, and the process's memory in MiB after each tenth."""
    draw, statuses, faults, memory = random.Random(seed), Counter(), [], []
    for number in range(requests):
        sent = request(draw)
        answer = await ask(app, sent)
        statuses[answer.status] += 1
        fault = fault_of(answer)
        if fault is not None:
            faults.append(f"{fault}: {sent.method} {sent.path[:60]} {sent.headers} {bytes(sent.chunks[0][:300])!r}")
        if number % max(requests // 10, 1) == 0:
            memory.append(psutil.Process().memory_info().rss / 2**20)
    return statuses, faults, memory


def small(number: int) -> Sent:
    """A request that takes moments: every third one is a picture."""
    if number % 3 == 0:
        return post(DRAW, {"prompt": f"House {number}", "size": "16x16", "num_timesteps": 2, "seed": number})
    return post(CHAT, {"messages": [{"role": "user", "content": f"Question {number}"}], "max_tokens": 4})


async def crowd(app: ASGIApp, service: Service, requests: int) -> tuple[Counter, int]:
    """All at once. -> their statuses, and the most that ever waited."""
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, len(service.waiting))
            await asyncio.sleep(0.002)

    watching = asyncio.create_task(watch())
    answers = await asyncio.gather(*(ask(app, small(number)) for number in range(requests)))
    watching.cancel()
    return Counter(answer.status for answer in answers), most


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tools/check_server.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="BAGEL folder, run folder or iter_... folder")
    parser.add_argument("--hostile", type=int, default=10_000)
    parser.add_argument("--concurrent", type=int, default=200)
    parser.add_argument("--places", type=int, default=LIMITS.max_waiting, help="of the queue")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    limits = type(LIMITS)(**(vars(LIMITS) | {"max_waiting": options.places}))
    service = Service(load(options.model), "tiny", limits, FlowSettings())
    app = create_app(service)
    service.worker.start()
    began = time.monotonic()
    statuses, faults, memory = asyncio.run(attack(app, options.hostile, options.seed))
    seconds = time.monotonic() - began
    for fault in faults[:20]:
        print(fault)
    crowded, most = asyncio.run(crowd(app, service, options.concurrent))
    service.waiting.close()
    service.worker.join()
    distributed.destroy()
    lost = options.concurrent - crowded[200] - crowded[429]
    units = {"hostile": "requests by status", "memory_mib": "after each tenth", "concurrent": "requests by status"}
    print(
        json.dumps(
            {
                "check": "server",
                "hostile": dict(sorted(statuses.items())),
                "faults": len(faults),
                "seconds": round(seconds, 1),
                "memory_mib": [round(size) for size in memory],
                "concurrent": dict(crowded),
                "lost": lost,
                "most_waiting": most,
                "units": units,
            }
        )
    )
    return 1 if faults or lost or most > options.places else 0


if __name__ == "__main__":
    sys.exit(main())
