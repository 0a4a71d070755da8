"""Errors as OpenAI's clients read them: `{"error": {message, type, param, code}}`."""

from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from nearest.errors import FolderError, NearestError, RemoteError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer other than the one asked for.

    Attributes:
        status: the HTTP status.
        message: what is wrong, why, and how to mend it.
        param: the request's field at fault.
        code: a word that programs can compare.
        headers: sent with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The JSON that clients read."""
        kind = _TYPES.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {
            "message": _encodable(self.message),
            "type": kind,
            "param": None if self.param is None else _encodable(self.param),
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def _encodable(text: str) -> str:
    """Without lone surrogates, which a client may have sent and no encoding has."""
    return text.encode("utf-8", "replace").decode()


def of_error(error: Exception) -> ApiError:
    """Of any exception: what the user can mend is said, the rest is left to the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RemoteError | FolderError):  # of a memory elsewhere, or of a disk
        return ApiError(503, str(error), headers={"Retry-After": "1"})
    if isinstance(error, NearestError):
        return ApiError(400, str(error))
    return ApiError(500, "the server failed at this request; its log says why")


def of_http(error: HTTPException) -> ApiError:
    """Of an error that the framework raises, such as an unknown path."""
    return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))


def of_validation(error: RequestValidationError) -> ApiError:
    """Of a body that does not fit the request's model; names the field.

    A body that is no JSON at all, a field that is unknown and a value that is out of range all
    give 400, as OpenAI's server does.
    """
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no valid JSON: {first['ctx']['error']}")
    if not path and first["type"] in ("missing", "model_attributes_type", "dict_type"):
        return ApiError(400, "send a JSON object, with Content-Type: application/json")
    if first["type"] == "extra_forbidden":
        unknown = ".".join([*_fields(path[:-1]), path[-1]])
        return ApiError(
            400,
            f"{unknown!r} is not supported by this server: leave it out",
            param=unknown,
            code="unsupported_parameter",
        )
    field = ".".join(_fields(path)) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{field}: {message}" if field else message, param=field)


def _fields(path: list[str]) -> list[str]:
    """Of an error's place, the fields and indexes, without the names of a union's branches."""
    types = ("str", "int", "float", "bool")
    return [
        part for part in path if (part.isidentifier() or part.isdecimal()) and part not in types
    ]
