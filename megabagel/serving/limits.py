"""What the server takes from its clients at most, and what a refusal says.

The numbers bound the server's memory: nothing that a client sends is kept beyond them.
"""

from dataclasses import dataclass, fields

from megabagel.config.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Every number is at least 1."""

    max_waiting: int = 128  # answers and pictures in the queue; a request waits with as many as it asks for
    max_batch: int = 8  # waiting requests that the model works on together
    max_body_bytes: int = 16 << 20
    max_pictures: int = 8  # in one request
    max_pixels: int = 16 << 20  # of one picture
    max_prompt_tokens: int = 16384  # text and pictures
    max_tokens: int = 2048  # of one answer
    max_n: int = 8  # answers or pictures for one request
    max_timesteps: int = 100
    request_seconds: int = 600  # waiting and working
    body_seconds: int = 30  # until a request has arrived

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(f"{field.name} {getattr(self, field.name)} must be at least 1.")


class ApiError(Exception):
    """A request that is refused or has failed: the HTTP status, one sentence, and the field that is at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, wait: int = 0):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.wait = wait  # seconds after which to come again; 0: not said

    def body(self) -> dict:
        """The form that OpenAI gives errors."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Those that the answer carries beside its body."""
        return {"Retry-After": str(self.wait)} if self.wait else {}
