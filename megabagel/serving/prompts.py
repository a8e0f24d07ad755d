"""From a request to works: what the model reads, its settings, and every check against the server's limits.

Runs in a thread of its own pool: pictures are decoded here once to see that they can be.
"""

import base64
import binascii
import dataclasses
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megabagel.config.errors import ConfigError
from megabagel.data.faults import DataFault
from megabagel.data.images import decode, target_size
from megabagel.inference import FlowSettings, Generator
from megabagel.inference.guidance import Guidance
from megabagel.serving.limits import ApiError, Limits
from megabagel.serving.requests import ChatRequest, FlowFields, ImageRequest, Message
from megabagel.serving.work import Call, Work

_TOKENS = 512  # of a text, if the request does not say
_COLD = 1e-4  # temperatures below choose the likeliest token, and dividing by them could overflow
_LONGEST_TOKEN = 128  # characters; a text with more of them than this allows has too many tokens, uncounted
_DATA_URL = re.compile(r"data:image/[\w.+-]{1,40};base64,")
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


@dataclass(frozen=True)
class Asked:
    """A request that can be served."""

    works: list[Work]
    stops: tuple[str, ...]
    text_tokens: int  # of the prompt
    picture_tokens: int

    @property
    def usage(self) -> tuple[int, int]:
        """Tokens of the prompt: text, pictures."""
        return self.text_tokens, self.picture_tokens


class Prompts:
    """Reads requests for `bagel`. `fetch`: bytes at an address, None where addresses are not allowed."""

    def __init__(
        self, bagel: Generator, limits: Limits, defaults: FlowSettings, fetch: Callable[[str], bytes] | None = None
    ):
        self.limits, self.defaults, self.fetch = limits, defaults, fetch
        self.tokenizer, self.sizes = bagel.tokenizer, bagel.sizes
        self.draws, self.sees = bagel.autoencoder is not None, bagel.network.stage.vision is not None

    def chat(self, request: ChatRequest) -> Asked:
        """Messages are read in order; BAGEL has no roles. Raises ApiError."""
        modalities = request.modalities or ["text"]
        kind = " and ".join(name for name, of in (("text", "text"), ("picture", "image")) if of in modalities)
        most = self._max_tokens(request.max_completion_tokens or request.max_tokens)
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        if any(not 1 <= len(stop) <= 200 for stop in stops):
            raise ApiError(400, "`stop` is wrong: a stop sequence has 1 to 200 characters.", "stop")
        parts = [part for message in request.messages for part in self._message(message)]
        temperature = request.temperature or 0.0
        if temperature < _COLD:
            temperature = 0.0
        return self._asked(request, kind, parts, most, tuple(stops), temperature, request.top_p)

    def image(self, request: ImageRequest, shown: Sequence[bytes] = ()) -> Asked:
        """A picture, after the pictures `shown`. Raises ApiError."""
        return self._asked(request, "picture", [*shown, request.prompt], self._max_tokens(request.max_tokens))

    def _max_tokens(self, asked: int | None) -> int:
        _at_most("max_tokens", asked or 1, self.limits.max_tokens)
        return asked or min(_TOKENS, self.limits.max_tokens)

    def _message(self, message: Message) -> list[str | bytes]:
        content = message.content or []
        parts: list[str | bytes] = [content] if isinstance(content, str) else []
        for part in [] if isinstance(content, str) else content:
            parts.append(part.text if part.type == "text" else self._picture(part.image_url.url))
        return parts + [self._picture(part.image_url.url) for part in message.images or []]

    def _picture(self, url: str) -> bytes:
        if url.startswith(("http://", "https://")):
            if self.fetch is None:
                raise ApiError(400, "this server fetches no pictures from addresses: send a data: URL.", "image_url")
            return self.fetch(url)
        start = _DATA_URL.match(url)
        if start is None:
            message = "an image_url is `data:image/TYPE;base64,` and the picture's bytes in base64."
            raise ApiError(400, message, "image_url")
        try:
            return base64.b64decode(url[start.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise ApiError(400, "an image_url has bytes that are no base64.", "image_url") from None

    def _asked(
        self,
        request: FlowFields,
        kind: str,
        parts: list[str | bytes],
        max_tokens: int,
        stops: tuple[str, ...] = (),
        temperature: float = 0.0,
        top_p: float | None = None,
    ) -> Asked:
        draws = kind != "text"
        count, limits = request.n or 1, self.limits
        _at_most("n", count, min(limits.max_n, limits.max_waiting))
        if not parts:
            raise ApiError(400, "`messages` is wrong: no message has any content.", "messages")
        if draws and not self.draws:
            raise ApiError(400, "this model makes no pictures: it was trained without them.")
        tokens = self._tokens(parts, draws)
        flow = self._flow(request)
        height, width = self._size(request.size) if draws else (None, None)
        call = Call(kind, temperature, 1.0 if top_p is None else top_p, request.think, flow, height, width)
        seed = secrets.randbelow(2**31) if request.seed is None else request.seed
        works = [Work(call, tuple(parts), seed + n, max_tokens, limits.max_pixels) for n in range(count)]
        return Asked(works, stops, *tokens)

    def _tokens(self, parts: Sequence[str | bytes], draws: bool) -> tuple[int, int]:
        """Of texts and of pictures."""
        limits = self.limits
        shown = [part for part in parts if isinstance(part, bytes)]
        texts = [part for part in parts if isinstance(part, str)]
        if len(shown) > limits.max_pictures:
            raise ApiError(400, f"the request has {len(shown)} pictures; at most {limits.max_pictures} are allowed.")
        if shown and not (self.sees or draws):
            raise ApiError(400, "this model sees no pictures: it was trained without them.")
        length = sum(map(len, texts))
        if length > limits.max_prompt_tokens * _LONGEST_TOKEN:
            raise _too_long(f"{length} characters", limits)
        text_tokens = sum(len(self.tokenizer.encode(text)) + 2 for text in texts)
        picture_tokens = 0
        if text_tokens <= limits.max_prompt_tokens:
            picture_tokens = sum(self._picture_tokens(content, draws) for content in shown)
        if text_tokens + picture_tokens > limits.max_prompt_tokens:
            raise _too_long(f"{text_tokens + picture_tokens} tokens", limits)
        return text_tokens, picture_tokens

    def _picture_tokens(self, content: bytes, draws: bool) -> int:
        try:
            size = decode(content, self.limits.max_pixels).size
        except DataFault as fault:
            status = 413 if fault.kind == "image_bomb" else 400
            sentence = str(fault).replace("data.max_image_pixels", "this server's limit")
            raise ApiError(status, f"a picture cannot be used: {sentence[:200]}.", code=fault.kind) from None
        tables = [self.sizes.vit] * self.sees + [self.sizes.latent] * draws
        grids = [(target_size(*size, table), table.image_stride) for table in tables]
        return sum((width // stride) * (height // stride) + 2 for (width, height), stride in grids)

    def _flow(self, request: FlowFields) -> FlowSettings:
        _at_most("num_timesteps", request.num_timesteps or 2, self.limits.max_timesteps)
        of_guidance = {
            "text_scale": request.cfg_text_scale,
            "image_scale": request.cfg_img_scale,
            "interval": None if request.cfg_interval is None else tuple(request.cfg_interval),
            "renorm": request.cfg_renorm,
            "renorm_min": request.cfg_renorm_min,
        }
        own = {"num_timesteps": request.num_timesteps, "timestep_shift": request.timestep_shift}
        guidance: Guidance = dataclasses.replace(self.defaults.guidance, **_given(of_guidance))
        return dataclasses.replace(self.defaults, guidance=guidance, **_given(own))

    def _size(self, size: str | None) -> tuple[int | None, int | None]:
        """Height and width, None where the model chooses."""
        if size in (None, "auto"):
            return None, None
        sides = _SIZE.fullmatch(size)
        if sides is None:
            raise ApiError(400, "`size` is wrong: it is WIDTHxHEIGHT in pixels, or auto.", "size")
        width, height = int(sides[1]), int(sides[2])
        try:
            self.sizes.grid(height, width, None)
        except ConfigError as error:
            raise ApiError(400, f"`size` is wrong: {error}", "size") from None
        return height, width


def _given(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if value is not None}


def _at_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise ApiError(400, f"`{name}` is {value}, but this server allows at most {most}.", name)


def _too_long(length: str, limits: Limits) -> ApiError:
    message = f"the prompt has {length}; this server allows {limits.max_prompt_tokens} tokens, pictures included."
    return ApiError(400, message, "messages", "context_length_exceeded")
