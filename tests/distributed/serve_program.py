"""Run on every rank: rank 0 asks the server, which all ranks hold together, and prints the answers as JSON."""

import asyncio
import base64
import io
import json
import threading
from pathlib import Path

import numpy as np
import torch.distributed as dist
from PIL import Image

from megabagel.inference import FlowSettings, load
from megabagel.runtime import distributed, failure
from megabagel.serving.app import create_app
from megabagel.serving.limits import Limits
from megabagel.serving.service import Service
from megabagel.serving.worker import Reporter, follow
from tools.serving.client import Answer, ask, post
from tools.serving.hostile import CHAT, DRAW

CASE = Path(__file__).parents[1] / "golden" / "public-basic" / "ckpt"
QUESTION = {"messages": [{"role": "user", "content": "How many lanterns are there?"}], "max_tokens": 6}
PICTURE = {"prompt": "A blue house", "size": "32x32", "num_timesteps": 4, "seed": 5}


def main() -> None:
    bagel = load(CASE)
    if dist.get_rank() == 0:
        service = Service(bagel, "tiny", Limits(), FlowSettings())
        app = create_app(service)
        service.worker.start()
        print("answers", json.dumps(asyncio.run(talk(app, service))), flush=True)
        service.waiting.close()
        service.worker.join()
        assert service.worker.failure is None
    else:
        follow(bagel)
    distributed.destroy()


async def talk(app, service: Service) -> dict:
    """Two texts in one batch, a picture, and a text whose client leaves after a token."""
    texts = await asyncio.gather(
        *(
            ask(app, post(CHAT, QUESTION | {"temperature": 1.0, "seed": seed, "max_tokens": 4 + seed}))
            for seed in (1, 2)
        )
    )
    drawn = await ask(app, post(DRAW, PICTURE))
    heard = await leave(app)
    after = await ask(app, post(CHAT, QUESTION))
    return {"texts": [said(answer) for answer in texts], "picture": mean(drawn), "heard": heard, "after": said(after)}


async def leave(app) -> int:
    """Tokens that the model wrote before it noticed."""
    heard, leaving, gone = [], asyncio.Event(), threading.Event()
    loop, tokens = asyncio.get_running_loop(), Reporter.tokens

    def hear(reporter: Reporter, new: list) -> list[int]:
        heard.append(new)
        loop.call_soon_threadsafe(leaving.set)
        assert gone.wait(60)
        return tokens(reporter, new)

    Reporter.tokens = hear
    await ask(app, post(CHAT, QUESTION | {"max_tokens": 2000}), leaving)
    Reporter.tokens = tokens
    gone.set()
    return len(heard)


def said(answer: Answer) -> str:
    return answer.json()["choices"][0]["message"]["content"]


def mean(answer: Answer) -> list[float]:
    """Of every fourth row of pixels."""
    image = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    return np.asarray(image).astype(float)[::4].mean((1, 2)).tolist()


if __name__ == "__main__":
    with failure.guard():
        main()
