"""Requests as they come from strangers: malformed, oversized or lying. Every one of them must be refused."""

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable

from PIL import Image

from megabagel.serving.limits import Limits
from tools.serving.client import Sent

CHAT, DRAW, EDIT = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"
# small, so that requests beyond them are cheap to make
LIMITS = Limits(max_body_bytes=1 << 20, max_pixels=1 << 20, max_prompt_tokens=2000, max_pictures=3)
BOUNDARY = "frontier"
ANYTHING = [None, True, -1, 0, 2**70, 1e308, 0.5, "", "x", "5", [], {}, [None], ["a", 3], {"a": {}}, "\0" * 3]
WRONG = {  # of each field, what is no value of it
    "messages": [*ANYTHING, [[]], [{"role": "user"}], [{"content": "x"}], [{"role": "tool", "content": "x"}]],
    "n": [0, -1, 10**9, 2**70, "1", 1.5, [], True],
    "seed": [-1, 2**63, 2**70, "1", 0.5, {}],
    "temperature": [-1, 3, 1e308, "hot", [], float("nan"), float("inf")],
    "top_p": [-0.1, 1.1, "x", float("nan"), [1]],
    "max_tokens": [0, -5, 10**9, "7", 1.5, {}],
    "max_completion_tokens": [0, 2**80, "7"],
    "stop": [0, ["a"] * 5, [3], {}, "", "x" * 5000, ["", "b"]],
    "stream": ["yes", 1, [], {}],
    "modalities": [[], ["audio"], "text", ["text"] * 5, [None]],
    "stream_options": [True, {"include_usage": "x"}, {"other": 1}, [1]],
    "logprobs": [True, 5, "x"],
    "frequency_penalty": [1, -1, "x"],
    "response_format": [{"type": "json_object"}, "text", {}, [1]],
    "size": [5, "", "x", "32x", "0x0", "33x32", "32x1000000", "-16x16", "16 x 16", "1e2x16", "\u0661\u0666x16", [16]],
    "num_timesteps": [0, 1, -3, 10**9, "9", 2.5],
    "timestep_shift": [0, -1, 1e9, "x", float("nan")],
    "cfg_text_scale": [-1, 1e9, "x", float("inf")],
    "cfg_interval": [[], [0.4], [0, 2], [-1, 1], ["a", "b"], 0.4, [float("nan"), 1]],
    "cfg_renorm": ["none", 1, [], ""],
    "cfg_renorm_min": [-1, 2, "x"],
    "think": ["x", 2, [], {}],
    "model": ["other", 5, "", "../../etc/passwd", "x" * 9999, {}],
    "tools": [[], [{"type": "function"}], 1],
}
OF_CHAT = [
    "messages", "n", "seed", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "stream",
    "modalities", "stream_options", "logprobs", "frequency_penalty", "response_format", "think", "model", "tools",
]  # fmt: skip
OF_PICTURES = [
    "n", "seed", "stream", "size", "num_timesteps", "timestep_shift", "cfg_text_scale", "cfg_interval", "cfg_renorm",
    "cfg_renorm_min", "think", "max_tokens", "model", "tools",
]  # fmt: skip


def request(draw: random.Random) -> Sent:
    """One that nobody should serve."""
    return draw.choice(KINDS)(draw)


def png(width: int = 8, height: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, format="PNG")
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims so many pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 99))]
    parts = [
        struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in [*chunks, (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _good(path: str) -> dict:
    if path == CHAT:
        return {"messages": [{"role": "user", "content": "How many?"}], "max_tokens": 2}
    return {"prompt": "A house", "num_timesteps": 2, "size": "16x16"}


def _json(path: str, content: object, **headers: str) -> Sent:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Sent("POST", path, {"content-type": "application/json"} | headers, [body])


def _wrong_value(draw: random.Random) -> Sent:
    path = draw.choice([CHAT, DRAW])
    field = draw.choice(OF_CHAT if path == CHAT else OF_PICTURES)
    return _json(path, _good(path) | {field: draw.choice(WRONG[field])})


def _missing(draw: random.Random) -> Sent:
    path = draw.choice([CHAT, DRAW])
    content = _good(path)
    del content["messages" if path == CHAT else "prompt"]
    return _json(path, content)


def _unknown(draw: random.Random) -> Sent:
    path = draw.choice([CHAT, DRAW])
    name = draw.choice(["__class__", "\u202e", "x" * 3000, "", "mask", "logit_bias", "constructor", "a.b.c", "n "])
    return _json(path, _good(path) | {name: draw.choice(ANYTHING)})


def _no_json(draw: random.Random) -> Sent:
    path = draw.choice([CHAT, DRAW])
    good = json.dumps(_good(path)).encode()
    return _json(
        path,
        draw.choice(
            [
                lambda: draw.randbytes(draw.randrange(200)),
                lambda: good[: draw.randrange(len(good))],
                lambda: good.replace(b"H", b"\xff").replace(b"A", b"\xc3\x28"),
                lambda: b"[" * draw.randrange(1, 200_000),
                lambda: b'{"a":' * draw.randrange(1, 100_000),
                lambda: good + good,
                lambda: good.replace(b'"H', b'"\\ud800').replace(b'"A', b'"\\udfff'),
                lambda: b"9" * draw.randrange(1, 100_000),
                lambda: json.dumps(draw.choice(ANYTHING)).encode(),
            ]
        )(),
    )


def _oversized(draw: random.Random) -> Sent:
    path, most = draw.choice([CHAT, DRAW, EDIT]), LIMITS.max_body_bytes
    kind = "multipart/form-data; boundary=x" if path == EDIT else "application/json"
    declared = draw.choice([str(most + 1), str(2**70), "9" * 5000, "-1", "1e3", "\u00b2", " 7", ""])
    lies = Sent("POST", path, {"content-type": kind, "content-length": declared}, [b"{}"])
    return draw.choice([lies, Sent("POST", path, {"content-type": kind}, [b" " * (most // 4)] * 5)])


def _long_prompt(draw: random.Random) -> Sent:
    most = LIMITS.max_prompt_tokens
    text = draw.choice(
        [
            "<|im_end|>" * draw.randrange(most, 5 * most),  # framed, so two tokens more
            "x 1 " * draw.randrange(most, 20 * most),
            "\U0001f600 \u202e" * draw.randrange(most, 5 * most),
            "a" * (most * 128 + draw.randrange(1, 1000)),
        ]
    )
    message = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
    return _json(*draw.choice([(CHAT, message), (DRAW, {"prompt": text, "size": "16x16", "num_timesteps": 2})]))


def _bad_picture(draw: random.Random) -> bytes:
    good = png()
    return draw.choice(
        [
            lambda: draw.randbytes(draw.randrange(1, 400)),
            lambda: good[: draw.randrange(1, len(good) - 20)],
            lambda: bomb(draw.choice([2**16, 2**31 - 1]), draw.choice([2**16, 2**30])),
            lambda: bomb(0, 5),
            lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
            lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit",
            lambda: b"GIF89a" + draw.randbytes(30),
            lambda: b"II*\0" + draw.randbytes(60),
        ]
    )()


def _picture_url(draw: random.Random) -> Sent:
    coded = base64.b64encode(_bad_picture(draw)).decode()
    url = draw.choice(
        [
            f"data:image/png;base64,{coded}",
            f"data:image/png;base64,{coded[:-1]}!",
            "data:image/png;base64,",
            "data:text/html;base64,AAAA",
            "data:image/png,abc",
            "data:" * 1000,
            "file:///etc/passwd",
            "/etc/passwd",
            "http://169.254.169.254/latest/meta-data",
            "https://x.invalid/a.png",
            "ftp://x.invalid/a.png",
            "javascript:alert(1)",
            "",
            5,
            None,
        ]
    )
    parts = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": url}}]
    if draw.random() < 0.2:
        fine = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png()).decode()}"}}
        parts += [fine] * (LIMITS.max_pictures + 1)
    return _json(CHAT, {"messages": [{"role": "user", "content": parts}], "max_tokens": 2})


def _bad_part(draw: random.Random) -> Sent:
    part = draw.choice([*ANYTHING, {"type": "input_audio"}, {"type": "text"}, {"type": ["text"]}, {"text": "x"}])
    fine = {"type": "text", "text": "x"}
    message = {"role": draw.choice(["user", "system", "assistant"]), "content": [fine, part]}
    return _json(CHAT, {"messages": [message], "max_tokens": 2})


def form(fields: list[tuple[str, str | bytes]], boundary: str = BOUNDARY) -> bytes:
    """A form; bytes are files."""
    parts = []
    for name, value in fields:
        file = '; filename="a.png"' if isinstance(value, bytes) else ""
        content = value if isinstance(value, bytes) else value.encode("utf-8", "replace")
        parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content)
    return b"\r\n".join([*parts, f"--{boundary}--\r\n".encode()])


def _edit(draw: random.Random) -> Sent:
    small = [("num_timesteps", "2"), ("size", "16x16")]
    good = [("image", png()), ("prompt", "Red"), *small]
    field = draw.choice([name for name in OF_PICTURES if name not in ("cfg_renorm_min", "think", "tools")])
    texts = [value for value in WRONG[field] if isinstance(value, str) and not value.isdigit() and value != "yes"]
    bodies: list[Callable[[], bytes]] = [
        lambda: form([("image", _bad_picture(draw)), *good[1:]]),
        lambda: form([("image", "text"), *good[1:]]),
        lambda: form(good[1:]),
        lambda: form([good[0], *small]),
        lambda: form([*good, ("mask", png())]),
        lambda: form([*good, ("prompt", "twice")]),
        lambda: form([*good, ("n", draw.choice(["0", "99", "x", "-1", "1e9"]))]),
        lambda: form([*good, (draw.choice(["a", "x" * 3000, "tools"]), "?")]),
        lambda: form([*good, ("a", png())]),
        lambda: form([good[0]] * 5 + good[1:]),
        lambda: form([*good, *[(f"f{n}", "x") for n in range(200)]]),
        lambda: form(good, "elsewhere"),
        lambda: form(good)[: draw.randrange(len(form(good)) // 2)],
        lambda: draw.randbytes(draw.randrange(300)),
        lambda: b"--frontier\r\n" + draw.randbytes(300) + b"\r\n--frontier--\r\n",
        lambda: b"--frontier\r\n" + b"x: y\r\n" * 10_000,
    ]
    if texts:
        bodies.append(lambda: form([pair for pair in good if pair[0] != field] + [(field, draw.choice(texts))]))
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    if draw.random() < 0.1:
        kind = draw.choice(
            ["multipart/form-data", "multipart/form-data; boundary=", "application/json", "multipart/mixed"]
        )
    return Sent("POST", EDIT, {"content-type": kind}, [draw.choice(bodies)()])


def _elsewhere(draw: random.Random) -> Sent:
    path = draw.choice([CHAT, DRAW])
    good = _json(path, _good(path))
    headers = draw.choice(
        [
            {"content-type": "text/plain"},
            {"content-type": "application/x-www-form-urlencoded"},
            {"content-type": ""},
            {"host": "evil.example"},
            {"host": "localhost.evil.example:8000"},
            {"host": ""},
            {"host": "[::"},
            {"origin": "https://evil.example"},
            {"origin": "null"},
            {"origin": "http://[::"},
        ]
    )
    paths = ["/v1", "/v1/models/other", "/../etc/passwd", "/page/../../setup.py", "/docs", "/openapi.json", "/\u202e"]
    return draw.choice(
        [
            Sent("POST", path, good.headers | headers, good.chunks),
            Sent(draw.choice(["GET", "PUT", "DELETE", "PATCH", "TRACE", "X" * 99]), path, good.headers, good.chunks),
            Sent("GET", draw.choice(paths)),
        ]
    )


KINDS: list[Callable[[random.Random], Sent]] = [
    _wrong_value, _wrong_value, _wrong_value, _missing, _unknown, _no_json, _oversized, _long_prompt, _picture_url,
    _bad_part, _edit, _edit, _elsewhere,
]  # fmt: skip
