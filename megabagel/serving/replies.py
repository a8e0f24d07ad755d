"""Answers in OpenAI's shapes: whole ones, and the events of streams."""

import base64
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

from anyio import to_thread

from megabagel.inference.png import png_bytes
from megabagel.serving.limits import ApiError
from megabagel.serving.prompts import Asked
from megabagel.serving.requests import ChatRequest, ImageRequest
from megabagel.serving.session import Session
from megabagel.serving.work import Work
from megabagel.serving.worker import Delta, Done, Step


async def chat(session: Session, model: str) -> dict:
    """A chat.completion."""
    choices, tokens = [], 0
    for number, (text, done) in enumerate(await session.results()):
        message = {"role": "assistant", "content": text or ("" if done.image is None else None), "refusal": None}
        if done.image is not None:
            message["images"] = [await _image_part(session.asked.works[number], done)]
        choices.append({"index": number, "message": message, "finish_reason": done.finish, "logprobs": None})
        tokens += done.tokens
    reply = _head("chat.completion", model)
    return reply | {"choices": choices, "usage": _chat_usage(session.asked, tokens)}


async def chat_stream(request: ChatRequest, session: Session, model: str) -> AsyncIterator[str]:
    """Server-sent events: chat.completion.chunk after chunk."""
    head, tokens = _head("chat.completion.chunk", model), 0

    def chunk(number: int, delta: dict, finish: str | None = None) -> str:
        return _event(
            head | {"choices": [{"index": number, "delta": delta, "finish_reason": finish, "logprobs": None}]}
        )

    for number in range(len(session.asked.works)):
        yield chunk(number, {"role": "assistant", "content": ""})
    try:
        async with aclosing(session.events()) as events:
            async for number, event in events:
                if isinstance(event, Delta):
                    yield chunk(number, {"content": event.text})
                elif isinstance(event, Done):
                    tokens += event.tokens
                    if event.image is not None:
                        yield chunk(number, {"images": [await _image_part(session.asked.works[number], event)]})
                    yield chunk(number, {}, event.finish)
    except ApiError as error:
        yield _event(error.body())
        return
    if request.stream_options is not None and request.stream_options.include_usage:
        yield _event(head | {"choices": [], "usage": _chat_usage(session.asked, tokens)})
    yield "data: [DONE]\n\n"


async def images(request: ImageRequest, session: Session, model: str) -> dict:
    """An images response; `revised_prompt` is what the model thought before it drew."""
    data, drawn = [], []
    for work, (text, done) in zip(session.asked.works, await session.results(), strict=True):
        encoded = await _encoded(work, done)
        field = (
            {"url": f"data:image/png;base64,{encoded}"} if request.response_format == "url" else {"b64_json": encoded}
        )
        data.append(field | {"revised_prompt": text or None, "seed": work.seed})
        drawn.append(done)
    reply = {"created": int(time.time()), "data": data, "model": model, "output_format": "png"}
    return reply | {"size": _size(drawn[0]), "usage": _image_usage(session.asked, drawn)}


async def image_stream(session: Session, name: str) -> AsyncIterator[str]:
    """Server-sent events: NAME.progress after each flow step, NAME.completed with each picture."""
    texts = [""] * len(session.asked.works)
    try:
        async with aclosing(session.events()) as events:
            async for number, event in events:
                work = session.asked.works[number]
                if isinstance(event, Delta):
                    texts[number] += event.text
                elif isinstance(event, Step):
                    steps = {"index": number, "step": event.number, "steps": work.call.flow.num_timesteps - 1}
                    yield _event({"type": f"{name}.progress"} | steps, f"{name}.progress")
                else:
                    made = {"b64_json": await _encoded(work, event), "output_format": "png", "size": _size(event)}
                    made |= {"index": number, "seed": work.seed, "revised_prompt": texts[number] or None}
                    made |= {"created_at": int(time.time()), "usage": _image_usage(session.asked, [event])}
                    yield _event({"type": f"{name}.completed"} | made, f"{name}.completed")
    except ApiError as error:
        yield _event(error.body())


def _head(kind: str, model: str) -> dict:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": None,
    }


def _event(content: dict, name: str | None = None) -> str:
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(content)}\n\n"


async def _encoded(work: Work, done: Done) -> str:
    prompt = "\n".join(part for part in work.parts if isinstance(part, str))
    settings = dataclasses.asdict(work.call)
    png = await to_thread.run_sync(png_bytes, done.image, prompt, work.seed, settings)
    return base64.b64encode(png).decode()


async def _image_part(work: Work, done: Done) -> dict:
    url = f"data:image/png;base64,{await _encoded(work, done)}"
    return {"type": "image_url", "image_url": {"url": url}, "seed": work.seed}


def _size(done: Done) -> str:
    return f"{done.image.width}x{done.image.height}"


def _chat_usage(asked: Asked, tokens: int) -> dict:
    prompt = asked.text_tokens + asked.picture_tokens
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def _image_usage(asked: Asked, drawn: list[Done]) -> dict:
    """Output: the tokens of thoughts; a picture is no tokens that anybody could count on."""
    given, output = asked.text_tokens + asked.picture_tokens, sum(done.tokens for done in drawn)
    details = {"text_tokens": asked.text_tokens, "image_tokens": asked.picture_tokens}
    usage = {"input_tokens": given, "input_tokens_details": details, "output_tokens": output}
    return usage | {"total_tokens": given + output}
