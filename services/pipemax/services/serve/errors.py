"""What goes wrong with a request, as OpenAI's clients know it: an object `error` and a status."""

from typing import Any

from pipemax.client import Completion
from pipemax.proto.errors import RequestError
from pipemax.services.batch.openai_bodies import LineError
from pipemax.services.batch.tally import status_of

RETRY_AFTER_S = 1
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
_STATUS_OF_CODE = {"not_running": 503, "credits": 429, "no_credit": 429, "too_large": 413}
"""HTTP's word for what only happens here, beside that for what happens to batch lines too."""


class ApiError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("Retry-After", str(RETRY_AFTER_S))

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    @classmethod
    def of(cls, error: RequestError) -> "ApiError":
        """Of a request that this process or the system refuses."""
        if isinstance(error, LineError):
            return cls(error.status, error.code, str(error))
        return cls(_status_of(error.code), error.code, str(error))

    @classmethod
    def of_completion(cls, completion: Completion) -> "ApiError":
        """Of a request that got no result."""
        code = completion.error_code or "failed"
        return cls(_status_of(code), code, completion.error or "failed")


def _status_of(code: str) -> int:
    return _STATUS_OF_CODE.get(code) or status_of(code)
