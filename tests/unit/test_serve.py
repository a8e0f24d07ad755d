"""The server in this process with a tiny model: what clients get is what the generator makes, waiting requests are done
together, the queue is bounded, and whoever leaves stops the work."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megabagel.inference import FlowSettings, TextSettings, load
from megabagel.runtime import distributed
from megabagel.serving.app import create_app
from megabagel.serving.limits import Limits
from megabagel.serving.service import Service
from megabagel.serving.worker import Reporter
from tools.serving.client import Answer, Sent, ask, post
from tools.serving.hostile import BOUNDARY, CHAT, DRAW, EDIT, form

CASE = Path(__file__).parents[1] / "golden" / "public-basic" / "ckpt"
QUESTION = {"messages": [{"role": "user", "content": "How many lanterns are there?"}], "max_tokens": 9}
PICTURE = {"prompt": "A blue house", "size": "48x32", "num_timesteps": 4, "seed": 5}
FEW_STEPS = FlowSettings(num_timesteps=4)


@pytest.fixture(scope="module")
def bagel():
    yield load(CASE)
    distributed.destroy()


@contextlib.contextmanager
def serving(bagel, limits=None, **access):
    service = Service(bagel, "tiny", limits or Limits(), FlowSettings(num_timesteps=6))
    service.worker.start()
    yield create_app(service, **access), service
    service.waiting.close()
    service.worker.join()


@pytest.fixture(scope="module")
def app(bagel):
    with serving(bagel) as (app, _):
        yield app


def answers(app, *sent: Sent) -> list[Answer]:
    async def all_at_once() -> list[Answer]:
        return await asyncio.gather(*(ask(app, one) for one in sent))

    return asyncio.run(all_at_once())


def opened(coded: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(coded)))
    image.load()
    return image


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def png_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


class Gate:
    """Holds the model's thread before each batch until it is opened; remembers the batches."""

    def __init__(self, bagel, monkeypatch):
        self.opened, self.batches = threading.Event(), []
        for name in ("answers", "pictures"):
            monkeypatch.setattr(bagel, name, self._held(getattr(bagel, name)))

    def _held(self, method):
        def call(prompts, *args, **kwargs):
            self.batches.append(len(prompts))
            assert self.opened.wait(60)
            return method(prompts, *args, **kwargs)

        return call


async def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_an_answer_is_what_the_generator_writes(app, bagel):
    answer, cold = answers(
        app, post(CHAT, QUESTION | {"model": "tiny"}), post(CHAT, QUESTION | {"temperature": 1e-300})
    )
    body = answer.json()
    expected = bagel.answers(["How many lanterns are there?"], TextSettings(max_tokens=9))
    assert [choice["message"]["content"] for choice in body["choices"]] == expected
    assert cold.json()["choices"] == body["choices"]
    assert body["choices"][0]["finish_reason"] == "length" and body["model"] == "tiny"
    prompt_tokens = len(bagel.tokenizer.encode("How many lanterns are there?")) + 2
    assert body["usage"] == {"prompt_tokens": prompt_tokens, "completion_tokens": 9, "total_tokens": prompt_tokens + 9}


def test_a_stream_says_the_same_piece_by_piece(app):
    sampled = QUESTION | {"temperature": 1.0, "seed": 3, "n": 2}
    whole, stream = answers(
        app, post(CHAT, sampled), post(CHAT, sampled | {"stream": True, "stream_options": {"include_usage": True}})
    )
    assert stream.headers["content-type"].startswith("text/event-stream")
    texts, ends = ["", ""], {}
    *chunks, usage = stream.events()
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        ends |= {choice["index"]: choice["finish_reason"]} if choice["finish_reason"] else {}
    assert texts == [choice["message"]["content"] for choice in whole.json()["choices"]] and texts[0] != texts[1]
    assert ends == {0: "length", 1: "length"} and usage["usage"] == whole.json()["usage"]
    assert stream.body.endswith(b"data: [DONE]\n\n")


def test_seeds_decide_and_messages_with_pictures_are_read_in_order(app, bagel):
    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (30, 40), "blue")
    url = "data:image/png;base64," + base64.b64encode(png_of(red)).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    last = "data:image/png;base64," + base64.b64encode(png_of(blue)).decode()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "Red.", "images": [{"type": "image_url", "image_url": {"url": last}}]},
        {"role": "user", "content": "And now?"},
    ]
    request = {"messages": messages, "max_tokens": 6, "temperature": 1.0, "top_p": 0.9}
    first, again, other = answers(app, *(post(CHAT, request | {"seed": seed}) for seed in (7, 7, 8)))
    prompt = ["Be brief.", red, "What is it?", "Red.", blue, "And now?"]
    (expected,) = bagel.answers([prompt], TextSettings(6, 1.0, 0.9), seeds=[7])
    said = [answer.json()["choices"][0]["message"]["content"] for answer in (first, again, other)]
    assert said[0] == said[1] == expected != said[2]


def test_a_text_ends_before_a_stop_sequence(app, bagel):
    (text,) = bagel.answers(["How many lanterns are there?"], TextSettings(max_tokens=9))
    stop = text[4:7]
    for stream in (False, True):
        (answer,) = answers(app, post(CHAT, QUESTION | {"stop": ["\0\0", stop], "stream": stream}))
        if stream:
            said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in answer.events())
        else:
            said = answer.json()["choices"][0]["message"]["content"]
            assert answer.json()["choices"][0]["finish_reason"] == "stop"
        assert said == text[: text.find(stop)]


def test_a_picture_is_what_the_generator_draws_and_says_how(app, bagel):
    (answer,) = answers(app, post(DRAW, PICTURE | {"n": 2}))
    expected = bagel.pictures(["A blue house"] * 2, FEW_STEPS, height=32, width=48, seeds=[5, 6])
    for drawn, one in zip(expected, answer.json()["data"], strict=True):
        image = opened(one["b64_json"])
        assert abs(pixels(image) - pixels(drawn.image)).max() <= 1
        assert image.text["prompt"] == "A blue house" and image.text["seed"] == str(one["seed"])
        assert json.loads(image.text["settings"])["flow"]["num_timesteps"] == 4
    assert answer.json()["size"] == "48x32" and [one["seed"] for one in answer.json()["data"]] == [5, 6]


def test_an_edit_reads_the_picture_and_keeps_its_size(app, bagel):
    source = Image.new("RGB", (64, 32), "green")
    body = form([("image[]", png_of(source)), ("prompt", "Make it red"), ("num_timesteps", "4"), ("seed", "3")])
    kind = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    (answer,) = answers(app, Sent("POST", EDIT, kind, [body]))
    (expected,) = bagel.pictures([[source, "Make it red"]], FEW_STEPS, seeds=[3])
    assert abs(pixels(opened(answer.json()["data"][0]["b64_json"])) - pixels(expected.image)).max() <= 1


def test_a_stream_of_a_picture_counts_its_steps(app):
    plain, stream = answers(app, post(DRAW, PICTURE), post(DRAW, PICTURE | {"stream": True}))
    *steps, completed = stream.events()
    assert [(event["type"], event["step"], event["steps"]) for event in steps] == [
        ("image_generation.progress", step, 3) for step in (1, 2, 3)
    ]
    assert completed["type"] == "image_generation.completed" and completed["seed"] == 5
    drawn = opened(completed["b64_json"]), opened(plain.json()["data"][0]["b64_json"])
    assert abs(pixels(drawn[0]) - pixels(drawn[1])).max() <= 1


def test_chat_draws_where_pictures_are_asked_for(app, bagel):
    request = QUESTION | {"modalities": ["image"], "size": "16x16", "num_timesteps": 3, "seed": 1}
    both, alone = answers(app, post(CHAT, request | {"modalities": ["text", "image"]}), post(CHAT, request))
    text, image = (both.json()["choices"][0]["message"][name] for name in ("content", "images"))
    assert text and image[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert alone.json()["choices"][0]["message"]["content"] is None
    assert opened(alone.json()["choices"][0]["message"]["images"][0]["image_url"]["url"].split(",")[1]).size == (16, 16)
    (thought,) = answers(app, post(DRAW, PICTURE | {"think": True, "max_tokens": 3, "response_format": "url"}))
    assert thought.json()["data"][0]["revised_prompt"]
    assert thought.json()["data"][0]["url"].startswith("data:image/png;base64,")


def test_requests_that_wait_are_done_together_and_get_what_they_get_alone(bagel, monkeypatch):
    asked = [post(CHAT, QUESTION | {"max_tokens": 3 + n, "temperature": 1.0, "seed": n}) for n in range(6)]
    prompt = "How many lanterns are there?"
    alone = [bagel.answers([prompt], TextSettings(3 + n, 1.0), seeds=[n])[0] for n in range(6)]
    gate = Gate(bagel, monkeypatch)

    async def crowd(app, service) -> list[Answer]:
        first = asyncio.create_task(ask(app, asked[0]))
        await until(lambda: gate.batches)
        rest = [asyncio.create_task(ask(app, one)) for one in [*asked[1:], post(DRAW, PICTURE)]]
        await until(lambda: len(service.waiting) == 6)
        gate.opened.set()
        return await asyncio.gather(first, *rest)

    with serving(bagel, Limits(max_batch=4)) as (app, service):
        *texts, picture = asyncio.run(crowd(app, service))
    assert [answer.json()["choices"][0]["message"]["content"] for answer in texts] == alone
    assert picture.status == 200
    assert gate.batches == [1, 4, 1, 1]


def test_beyond_the_queue_is_429_and_nobody_is_lost(bagel, monkeypatch):
    gate = Gate(bagel, monkeypatch)

    async def crowd(app, service) -> tuple[list[Answer], list[Answer]]:
        first = asyncio.create_task(ask(app, post(CHAT, QUESTION)))
        await until(lambda: gate.batches)
        waiting = [asyncio.create_task(ask(app, post(CHAT, QUESTION | {"max_tokens": 2}))) for _ in range(5)]
        await until(lambda: len(service.waiting) == 5)
        refused = await asyncio.gather(*(ask(app, post(CHAT, QUESTION)) for _ in range(20)))
        refused.append(await ask(app, post(CHAT, QUESTION | {"n": 2})))
        gate.opened.set()
        return refused, await asyncio.gather(first, *waiting)

    with serving(bagel, Limits(max_waiting=5)) as (app, service):
        refused, served = asyncio.run(crowd(app, service))
    assert {answer.status for answer in refused} == {429} and {answer.status for answer in served} == {200}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert "the queue is full: 5 of its 5 places are taken" in refused[0].json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path, content", [(CHAT, QUESTION), (DRAW, PICTURE)])
def test_who_leaves_stops_the_work(bagel, monkeypatch, path, content, stream):
    heard = []

    def until_the_client_left(method):
        def call(reporter, new):
            heard.append(new)
            deadline = time.monotonic() + 60
            while not reporter.jobs[0].dropped and time.monotonic() < deadline:
                time.sleep(0.005)
            return method(reporter, new)

        return call

    for name in ("tokens", "step"):
        monkeypatch.setattr(Reporter, name, until_the_client_left(getattr(Reporter, name)))

    async def leaving(app, service) -> Answer:
        leave = asyncio.Event()
        client = asyncio.create_task(ask(app, post(path, content | {"stream": stream}), leave))
        await until(lambda: heard)
        leave.set()
        await client
        await until(lambda: not service.worker.running)
        monkeypatch.undo()
        return await ask(app, post(path, content))

    with serving(bagel) as (app, service):
        after = asyncio.run(leaving(app, service))
    assert len(heard) == 1 and after.status == 200


def test_a_request_that_takes_too_long_is_504_and_its_work_ends(bagel, monkeypatch):
    monkeypatch.setattr("megabagel.inference.text.choose", lambda *_: 5)
    limits = Limits(request_seconds=1, max_tokens=100_000)

    async def patience(app, service) -> Answer:
        answer = await ask(app, post(CHAT, QUESTION | {"max_tokens": 100_000}))
        await until(lambda: not service.worker.running)
        return answer

    with serving(bagel, limits) as (app, service):
        answer = asyncio.run(patience(app, service))
    assert answer.status == 504 and "took more than 1 s" in answer.json()["error"]["message"]


def test_a_failure_of_the_model_is_500_and_the_next_request_is_served(bagel, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("secret details")

    with serving(bagel) as (app, _):
        with monkeypatch.context() as patch:
            patch.setattr(bagel, "answers", broken)
            whole, stream = answers(app, post(CHAT, QUESTION), post(CHAT, QUESTION | {"stream": True}))
        (after,) = answers(app, post(CHAT, QUESTION))
    assert whole.status == 500 and "secret" not in whole.body.decode()
    assert stream.events()[-1]["error"]["type"] == "server_error"
    assert after.status == 200


def test_a_model_that_stopped_is_not_healthy(bagel):
    with serving(bagel) as (app, service):
        (well,) = answers(app, Sent("GET", "/health"))
        service.waiting.close()
        service.worker.join()
        ill, refused = answers(app, Sent("GET", "/health"), post(CHAT, QUESTION))
    assert (well.status, ill.status, refused.status) == (200, 503, 503)


def test_the_key_guards_the_api_and_not_the_page(bagel):
    with serving(bagel, key="s3cret") as (app, _):
        right = {"authorization": "Bearer s3cret"}
        sent = [
            Sent("GET", "/v1/models", right),
            Sent("GET", "/v1/models"),
            Sent("GET", "/v1/models", {"authorization": "Bearer s3creT"}),
            post(CHAT, QUESTION),
            post(CHAT, QUESTION | {"max_tokens": 1}, **right),
            Sent("GET", "/health"),
            Sent("GET", "/"),
        ]
        statuses = [answer.status for answer in answers(app, *sent)]
    assert statuses == [200, 401, 401, 401, 200, 200, 200]


def test_pages_of_other_sites_and_foreign_names_are_refused(app, bagel):
    sent = [
        post(CHAT, QUESTION, origin="https://evil.example"),
        post(CHAT, QUESTION, host="evil.example"),
        post(CHAT, QUESTION | {"max_tokens": 1}, host="localhost:8000", origin="http://localhost:8000"),
        post(CHAT, QUESTION | {"max_tokens": 1}, host="[::1]:8000"),
    ]
    assert [answer.status for answer in answers(app, *sent)] == [403, 403, 200, 200]
    with serving(bagel, hosts=None) as (opened_app, _):
        assert answers(opened_app, Sent("GET", "/health", {"host": "anything.example"}))[0].status == 200


def test_the_page_needs_nothing_from_elsewhere(app):
    page, style, script = answers(app, *(Sent("GET", path) for path in ("/", "/page.css", "/page.js")))
    assert [answer.headers["content-type"].split(";")[0] for answer in (page, style, script)] == [
        "text/html",
        "text/css",
        "text/javascript",
    ]
    for answer in (page, style, script):
        assert b"http://" not in answer.body and b"https://" not in answer.body
        assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_a_body_that_does_not_arrive_is_408_and_frees_its_place(bagel):
    async def slow(app) -> tuple[Answer, Answer]:
        hanging = Sent("POST", CHAT, {"content-type": "application/json"}, [b"{"], leaves=True)
        forever = dataclasses.replace(hanging, leaves=False)
        chunks = iter([{"type": "http.request", "body": b"{", "more_body": True}])

        async def receive():
            for chunk in chunks:
                return chunk
            await asyncio.Event().wait()

        statuses = []

        async def send(message):
            statuses.append(message.get("status"))

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
        await app(scope | {"root_path": ""}, receive, send)
        assert statuses[0] == 408
        await ask(app, hanging)
        return await ask(app, forever), await ask(app, post(CHAT, QUESTION | {"max_tokens": 1}))

    with serving(bagel, Limits(body_seconds=1, max_waiting=1)) as (app, _):
        broken, fine = asyncio.run(slow(app))
    assert broken.status == 400 and fine.status == 200
