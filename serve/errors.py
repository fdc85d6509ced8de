"""API errors; `serve.http` returns them as RFC 9457 problem responses."""

from orchard.errors import OrchardError


class ApiError(OrchardError):
    """Base of the errors returned to clients. Messages contain no file paths and no code."""

    status = 400
    title = "The request cannot be answered"
    kind = "refused"
    retry_after_s: float | None = None


class UnknownNameError(ApiError):
    """Error for a filter, user, item or version that does not exist."""

    status, title, kind = 404, "Not found", "unknown"


class UnprocessableError(ApiError):
    """Error for a valid request that this catalog or policy cannot satisfy."""

    status, title, kind = 422, "The request does not fit", "unsuitable"


class ConflictError(ApiError):
    """Error for a change based on an outdated state."""

    status, title, kind = 409, "The state has changed", "conflict"


class UnauthorizedError(ApiError):
    """Error for a missing or wrong token."""

    status, title, kind = 401, "A bearer token is needed", "unauthorised"


class UnsupportedMediaError(ApiError):
    """Error for a body that is not declared as JSON."""

    status, title, kind = 415, "The body must be JSON", "unsupported-media"


class OverloadedError(ApiError):
    """Error for a full queue."""

    status, title, kind = 429, "Too many requests wait", "overloaded"

    def __init__(self, detail: str, retry_after_s: float) -> None:
        """Create the error; `retry_after_s` is the expected time until the queue has drained."""
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class UnavailableError(ApiError):
    """Error for a service that is not ready or cannot answer in time."""

    status, title, kind = 503, "The service cannot answer now", "unavailable"

    def __init__(self, detail: str, retry_after_s: float = 1.0) -> None:
        """Create the error; `retry_after_s` is the time to wait before a retry."""
        super().__init__(detail)
        self.retry_after_s = retry_after_s
