"""What can go wrong in serving: one exception family, each with the canonical code that the protocols share.

ServingError
├── CancelledError
├── InvalidArgumentError
├── DeadlineExceededError
├── NotFoundError
├── AlreadyExistsError
├── PermissionDeniedError
├── ResourceExhaustedError
├── FailedPreconditionError
├── AbortedError
├── OutOfRangeError
├── UnimplementedError
├── InternalError
├── UnavailableError
├── DataLossError
└── UnauthenticatedError
"""

import enum

NO_MEMORY = "What the request needs does not fit into memory."


class Code(enum.IntEnum):
    """The canonical codes, numbered as gRPC numbers them."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class ServingError(Exception):
    """An answer that is not a result: a canonical code and a message for the person who asked.

    Args:
        message: What is wrong, in words that may leave the server.
        code: The canonical code, where it differs from the class's own.
    """

    code = Code.UNKNOWN

    def __init__(self, message: str, code: Code | None = None):
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"


class CancelledError(ServingError):
    """The caller or the server gave the request up."""

    code = Code.CANCELLED


class InvalidArgumentError(ServingError):
    """The request itself is wrong."""

    code = Code.INVALID_ARGUMENT


class DeadlineExceededError(ServingError):
    """The answer was not ready in time."""

    code = Code.DEADLINE_EXCEEDED


class NotFoundError(ServingError):
    """No such model, version or file."""

    code = Code.NOT_FOUND


class AlreadyExistsError(ServingError):
    """What should be made is there already."""

    code = Code.ALREADY_EXISTS


class PermissionDeniedError(ServingError):
    """The caller may not do that."""

    code = Code.PERMISSION_DENIED


class ResourceExhaustedError(ServingError):
    """A limit of the server is reached."""

    code = Code.RESOURCE_EXHAUSTED


class FailedPreconditionError(ServingError):
    """The request is well formed but the model is not in a state, or not of a kind, to answer it."""

    code = Code.FAILED_PRECONDITION


class AbortedError(ServingError):
    """Another call came in between."""

    code = Code.ABORTED


class OutOfRangeError(ServingError):
    """Something beyond the end was asked for."""

    code = Code.OUT_OF_RANGE


class UnimplementedError(ServingError):
    """The protocol has it and the server has not."""

    code = Code.UNIMPLEMENTED


class InternalError(ServingError):
    """The server is at fault."""

    code = Code.INTERNAL


class UnavailableError(ServingError):
    """Not now: asking again later may help."""

    code = Code.UNAVAILABLE


class DataLossError(ServingError):
    """What was kept cannot be read any more."""

    code = Code.DATA_LOSS


class UnauthenticatedError(ServingError):
    """The caller has not said who it is."""

    code = Code.UNAUTHENTICATED


_CLASSES = {kind.code: kind for kind in ServingError.__subclasses__()}


def error_of(code: Code, message: str) -> ServingError:
    """Returns the error whose class stands for a code."""
    return _CLASSES.get(code, ServingError)(message, code)
