"""The bodies of requests as OpenAI defines them, with the model's own settings beside. Only shape and range are checked
here; the server's limits and the model's abilities are checked in `prompts.py`.

Fields that ask for what the model cannot do are refused, never ignored.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from megabagel.inference.guidance import Renorm
from megabagel.serving.limits import ApiError

MAX_SEED = 2**63 - 1
Nothing = Annotated[Any, Field(default=None)]  # a field without influence on the result
Zero = Annotated[float, Field(ge=0, le=0)]
Scale = Annotated[float, Field(ge=0, le=100)]
Unit = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """A number is a number, not a text with digits; NaN and infinity are no numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    """A text in a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """A picture: a data: URL, or an address where the server allows it."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Strict):
    """A picture in a message; answers have such in `images`."""

    type: Literal["image_url"]
    image_url: ImageUrl
    seed: Nothing


def _kind(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return f"<{kind}>"


def _shape(content: Any) -> str:
    return "<list>" if isinstance(content, list) else "<text>"


# tags in angle brackets are left out where an error names its place
ContentPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    Discriminator(_kind, "part_type", "a part has the `type` text or image_url"),
]
Content = Annotated[Annotated[str, Tag("<text>")] | Annotated[list[ContentPart], Tag("<list>")], Discriminator(_shape)]


class Message(Strict):
    """One turn. What OpenAI's client adds to an answer that is sent back may be there, but must be empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    images: list[ImagePart] | None = None
    name: Nothing
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None
    annotations: None = None


class FlowFields(Strict):
    """How pictures are made; None: as the server was started."""

    size: str | None = None  # WIDTHxHEIGHT or auto
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    think: bool = False
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # of a text, also of what is thought before a picture
    num_timesteps: Annotated[int, Field(ge=2)] | None = None
    timestep_shift: Annotated[float, Field(gt=0, le=100)] | None = None
    cfg_text_scale: Scale | None = None
    cfg_img_scale: Scale | None = None
    cfg_interval: Annotated[list[Unit], Field(min_length=2, max_length=2)] | None = None
    cfg_renorm: Renorm | None = None
    cfg_renorm_min: Unit | None = None
    model: str | None = None
    user: Nothing


class StreamOptions(Strict):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(Strict):
    """Only plain text."""

    type: Literal["text"]


class ChatRequest(FlowFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1, max_length=2)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Unit | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None
    metadata: Nothing
    store: Nothing
    service_tier: Nothing
    safety_identifier: Nothing
    prompt_cache_key: Nothing


class ImageRequest(FlowFields):
    """POST /v1/images/generations; edits are this and `image`, sent as a form."""

    prompt: Annotated[str, Field(min_length=1)]
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    partial_images: Annotated[int, Field(ge=0, le=0)] | None = None
    quality: Nothing
    style: Nothing
    moderation: Nothing
    input_fidelity: Nothing


Request = TypeVar("Request", bound=BaseModel)


def read_json(kind: type[Request], body: bytes) -> Request:
    """The request in `body`. Raises ApiError."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _sentence(error) from None


def read_form(kind: type[Request], fields: dict[str, str]) -> Request:
    """The same from the texts of a form, in which numbers are texts."""
    try:
        return kind.model_validate(fields, strict=False)
    except ValidationError as error:
        raise _sentence(error) from None


def _sentence(error: ValidationError) -> ApiError:
    """The first fault; what was sent is not repeated."""
    (first, *_) = error.errors(include_url=False, include_input=False, include_context=False)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON in UTF-8: {first['msg'].removeprefix('Invalid JSON: ')}.")
    place = ".".join(str(part) for part in first["loc"] if not str(part).startswith("<"))[:80]
    text = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"`{place}` is not a field that this server knows or can serve; leave it out.", place)
    return ApiError(400, f"`{place or 'the body'}` is wrong: {text}.", place or None)
