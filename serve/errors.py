"""Refusals of the endpoint; `api` turns them into RFC 9457 problems."""

from orchard.errors import OrchardError


class ApiError(OrchardError):
    """A request that is not answered, and why. The detail names no path and no code."""

    status = 400
    title = "The request cannot be answered"
    kind = "refused"
    retry_after_s: float | None = None


class UnknownNameError(ApiError):
    """A filter, user, item or version that does not exist."""

    status, title, kind = 404, "There is no such thing", "unknown"


class UnprocessableError(ApiError):
    """A request that this catalog or policy cannot satisfy as written."""

    status, title, kind = 422, "The request does not fit", "unsuitable"


class ConflictError(ApiError):
    """The state has changed since the caller looked."""

    status, title, kind = 409, "The state has changed", "conflict"


class UnauthorisedError(ApiError):
    """A missing or wrong token."""

    status, title, kind = 401, "A bearer token is needed", "unauthorised"


class OverloadedError(ApiError):
    """The queue is full."""

    status, title, kind = 429, "Too many requests wait", "overloaded"

    def __init__(self, detail: str, retry_after_s: float) -> None:
        """`retry_after_s` is when the queue should have drained."""
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class UnavailableError(ApiError):
    """Not ready, or nothing can answer in time."""

    status, title, kind = 503, "The service cannot answer now", "unavailable"

    def __init__(self, detail: str, retry_after_s: float = 1.0) -> None:
        """`retry_after_s` is when to try again."""
        super().__init__(detail)
        self.retry_after_s = retry_after_s
