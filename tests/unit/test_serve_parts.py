"""The parts of the server without a model: pieces of text, the queue, addresses to fetch from, the tool's options."""

import http.server
import random
import threading
from contextlib import contextmanager

import pytest

from megabagel.config.errors import ConfigError
from megabagel.serving.fetch import fetcher
from megabagel.serving.limits import ApiError, Limits
from megabagel.serving.texts import TextStream
from megabagel.serving.waiting import Job, Waiting
from megabagel.serving.work import Call, Work
from tools import serve


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def said(text: str | bytes, stops: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    stream, pieces = TextStream(Bytes(), stops), []
    for token in text if isinstance(text, bytes) else text.encode():
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return "".join([*pieces, stream.close()]), pieces


def test_characters_are_released_whole():
    text, pieces = said("a\u00e4\U0001f600b")
    assert text == "a\u00e4\U0001f600b" and pieces == ["a", "", "\u00e4", "", "", "", "\U0001f600", "b"]


def test_broken_bytes_do_not_hold_the_text_back_forever():
    text, pieces = said(b"\xff" * 20 + b"ab")
    assert text.endswith("ab") and any(pieces[:-2])


def test_texts_end_before_the_first_stop_sequence_however_they_are_cut():
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices("abc", k=draw.randrange(20)))
        stops = tuple("".join(draw.choices("abc", k=draw.randrange(1, 4))) for _ in range(draw.randrange(3)))
        # the earliest place at which any stop is complete decides, as the text comes
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        found, _ = said(text, stops)
        first_complete = min(ends)[0] if ends else None
        expected = text if not ends else text[: min(start for end, start in ends if end == first_complete)]
        assert found == expected, (text, stops)


def job(call: Call, heard: list | None = None) -> Job:
    return Job(Work(call, ("x",), 0, 5, 100), (), (heard if heard is not None else []).append)


def test_jobs_that_fit_the_first_go_along_and_the_others_keep_their_order():
    waiting = Waiting(10, 3)
    texts, pictures = [job(Call("text")) for _ in range(5)], [job(Call("picture")) for _ in range(2)]
    waiting.put([texts[0], pictures[0], *texts[1:], pictures[1]])
    waiting.drop([texts[1]])
    assert waiting.take(0) == [texts[0], texts[2], texts[3]]
    assert waiting.take(0) == pictures
    assert waiting.take(0) == [texts[4]]
    assert waiting.take(0) == []


def test_places_are_bounded_and_given_back():
    waiting = Waiting(3, 2)
    waiting.reserve(2)
    waiting.put([job(Call("text"))])
    with pytest.raises(ApiError, match="3 of its 3 places") as refusal:
        waiting.reserve()
    assert refusal.value.status == 429 and refusal.value.wait >= 1
    waiting.release(2)
    waiting.reserve(2)
    with pytest.raises(ApiError):
        waiting.reserve()


def test_those_who_wait_are_told_that_the_server_ends():
    heard: list = []
    waiting = Waiting(3, 2)
    waiting.put([job(Call("text"), heard)])
    waiting.close()
    assert [error.status for error in heard] == [503] and waiting.take(0) is None
    with pytest.raises(ApiError, match="shutting down"):
        waiting.reserve()


@contextmanager
def site():
    """Says its path; /away redirects."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302 if self.path == "/away" else 200)
            self.send_header("Location", "/here")
            self.end_headers()
            self.wfile.write(self.path.encode() * (1000 if self.path == "/long" else 1))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_pictures_are_fetched_from_named_hosts_only():
    with site() as host:
        fetch = fetcher([host], 100)
        assert fetch(f"http://{host}/a") == b"/a"
        for address, message in (
            ("http://127.0.0.1:1/a", "not .*from that host|no pictures from that host"),
            (f"http://user@{host}/a", "no pictures from that host"),
            (f"http://{host}@evil.example/a", "no pictures from that host"),
            (f"http://{host}/away", "status 302"),
            (f"http://{host}/long", "more than 100 bytes"),
            ("http://[::", "no pictures from that host"),
        ):
            with pytest.raises(ApiError, match=message):
                fetch(address)


def options(*arguments: object):
    return serve.parser().parse_args(["--model", "x", *map(str, arguments)])


def test_other_machines_need_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    assert serve.read_key(options()) is None
    assert serve.read_key(options("--host", "0.0.0.0", "--open")) is None
    with pytest.raises(ConfigError, match="--host 0.0.0.0 lets others in: give --api-key-file"):
        serve.read_key(options("--host", "0.0.0.0"))
    key = tmp_path / "key"
    with pytest.raises(ConfigError, match="cannot be read"):
        serve.read_key(options("--api-key-file", key))
    key.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        serve.read_key(options("--api-key-file", key))
    key.write_text("s3cret\n")
    assert serve.read_key(options("--host", "0.0.0.0", "--api-key-file", key)) == "s3cret"
    monkeypatch.setenv(serve.KEY_VARIABLE, "other")
    assert serve.read_key(options("--host", "0.0.0.0")) == "other"


def test_names_that_are_answered():
    assert serve.allowed_hosts(options()) == list(serve.LOOPBACK)
    assert serve.allowed_hosts(options("--allowed-hosts", "Box")) == [*serve.LOOPBACK, "box"]
    assert serve.allowed_hosts(options("--allowed-hosts", "*")) is None
    assert serve.allowed_hosts(options("--host", "0.0.0.0")) is None


def test_settings_that_make_no_sense_are_one_sentence(capsys):
    with pytest.raises(ConfigError, match="max_batch 0 must be at least 1"):
        Limits(max_batch=0)
    with pytest.raises(ConfigError, match="--port 70000 cannot be listened at"):
        serve.listen("127.0.0.1", 70000)
