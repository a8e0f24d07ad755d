"""A thousand hostile requests get refusals of one sentence and keep no place; `tools/check_server.py` sends more."""

import asyncio
from pathlib import Path

import pytest

from megabagel.inference import FlowSettings, load
from megabagel.runtime import distributed
from megabagel.serving.app import create_app
from megabagel.serving.service import Service
from tools.check_server import attack, crowd, fault_of
from tools.serving.client import Answer, ask, post
from tools.serving.hostile import CHAT, LIMITS

CASE = Path(__file__).parents[1] / "golden" / "public-basic" / "ckpt"
GOOD = post(CHAT, {"messages": [{"role": "user", "content": "How many?"}], "max_tokens": 2})


@pytest.fixture(scope="module")
def service():
    service = Service(load(CASE), "tiny", LIMITS, FlowSettings())
    service.worker.start()
    yield service
    service.waiting.close()
    service.worker.join()
    distributed.destroy()


def test_hostile_requests_are_refused_in_one_sentence(service):
    app = create_app(service)
    statuses, faults, _ = asyncio.run(attack(app, 1000, seed=1))
    assert not faults
    assert set(statuses) >= {400, 403, 404, 405, 413, 415}
    service.waiting.reserve(LIMITS.max_waiting)  # nobody has kept a place
    service.waiting.release(LIMITS.max_waiting)
    good = asyncio.run(ask(app, GOOD))
    assert good.status == 200 and fault_of(good) == "status 200"


def test_what_is_no_refusal_is_noticed():
    assert fault_of(Answer(400, {}, b"{}")) == "no error in OpenAI's form"
    assert fault_of(Answer(400, {}, b'{"error": {"message": "Bad"}}')).startswith("no sentence")
    assert fault_of(Answer(400, {}, b'{"error": {"message": "`n` is wrong."}}')) is None


def test_of_many_at_once_none_is_lost_and_the_queue_stays_bounded(service):
    statuses, most = asyncio.run(crowd(create_app(service), service, 200))
    assert set(statuses) <= {200, 429} and statuses.total() == 200
    assert statuses[200] >= LIMITS.max_waiting >= most
