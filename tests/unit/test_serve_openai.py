"""OpenAI's own Python client against the server on a socket: answers whole and streamed, pictures, edits, errors."""

import base64
import io
import threading
from pathlib import Path

import openai
import pytest
import uvicorn
from PIL import Image

from megabagel.inference import FlowSettings, TextSettings, load
from megabagel.runtime import distributed
from megabagel.serving.app import create_app
from megabagel.serving.limits import Limits
from megabagel.serving.service import Service
from tools.serve import listen

CASE = Path(__file__).parents[1] / "golden" / "public-basic" / "ckpt"
MESSAGES = [{"role": "user", "content": "How many lanterns are there?"}]


@pytest.fixture(scope="module")
def bagel():
    yield load(CASE)
    distributed.destroy()


@pytest.fixture(scope="module")
def client(bagel):
    service = Service(bagel, "tiny", Limits(), FlowSettings(num_timesteps=4))
    server = uvicorn.Server(uvicorn.Config(create_app(service, key="s3cret"), log_level="warning"))
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="s3cret", max_retries=0, timeout=120)
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive() and not service.worker.is_alive()


def test_answers_whole_and_streamed(client, bagel):
    expected = bagel.answers(["How many lanterns are there?"], TextSettings(max_tokens=9))[0]
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=9)
    assert whole.choices[0].message.content == expected and whole.usage.completion_tokens == 9
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected


def test_pictures_and_edits(client):
    drawn = client.images.generate(prompt="A blue house", size="32x32", n=2, extra_body={"seed": 3})
    images = [Image.open(io.BytesIO(base64.b64decode(one.b64_json))) for one in drawn.data]
    assert [image.size for image in images] == [(32, 32)] * 2 and drawn.size == "32x32"
    file = io.BytesIO()
    images[0].save(file, format="PNG")
    edited = client.images.edit(image=("a.png", file.getvalue()), prompt="Make it red", extra_body={"seed": 3})
    assert Image.open(io.BytesIO(base64.b64decode(edited.data[0].b64_json))).size == (128, 128)
    events = list(client.images.generate(prompt="A blue house", size="32x32", stream=True))
    assert [event.type for event in events] == ["image_generation.progress"] * 3 + ["image_generation.completed"]


def test_models_and_errors(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError, match="`temperature` is wrong") as refused:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=5)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="`model` must be tiny"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.AuthenticationError, match="the key is missing or wrong"):
        client.with_options(api_key="x").models.list()
