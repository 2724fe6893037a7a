"""The one table that maps errors to HTTP status, and the document that every error is answered with."""

from __future__ import annotations

import json
import traceback
from http import HTTPStatus

from tornado.web import HTTPError

from imgsvc import errors

# From the tus protocol, and in no other list.
CHECKSUM_MISMATCH = 460

REASONS = {CHECKSUM_MISMATCH: "Checksum Mismatch"}

# Seconds after which a client may ask again for what cannot be answered now: an election in etcd and a service that
# starts take no longer when all is well, and else the answer itself takes its time.
_RETRY_AFTER = 1

# The first class that fits counts, so a subclass stands before its parent.
_STATUS: tuple[tuple[type[errors.ImgsvcError], int], ...] = (
    (errors.Invalid, HTTPStatus.BAD_REQUEST),
    (errors.TooLarge, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (errors.Forbidden, HTTPStatus.FORBIDDEN),
    (errors.Gone, HTTPStatus.GONE),
    (errors.NotFound, HTTPStatus.NOT_FOUND),
    (errors.Conflict, HTTPStatus.CONFLICT),
    (errors.Locked, HTTPStatus.LOCKED),
    (errors.WrongChecksum, CHECKSUM_MISMATCH),
    (errors.WrongDigest, HTTPStatus.UNPROCESSABLE_ENTITY),
    (errors.NoSpace, HTTPStatus.INSUFFICIENT_STORAGE),
    (errors.Unavailable, HTTPStatus.SERVICE_UNAVAILABLE),
    (errors.Stopping, HTTPStatus.SERVICE_UNAVAILABLE),
    (errors.IdleTimeout, HTTPStatus.REQUEST_TIMEOUT),
    (errors.Incomplete, HTTPStatus.BAD_REQUEST),
)


# What clients know by heart; other errors speak for themselves.
_MESSAGE: dict[type[errors.ImgsvcError], str] = {
    errors.NotFound: "image not found",
    errors.NotComplete: "incomplete image",
}


def status_of(error: BaseException) -> int:
    """What an error is answered with; a programming mistake is an internal error."""
    if isinstance(error, HTTPError):
        return error.status_code
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return status
    return HTTPStatus.INTERNAL_SERVER_ERROR


def fields_of(error: BaseException) -> dict[str, str]:
    """The header fields that say more of an error, by name."""
    if status_of(error) == HTTPStatus.SERVICE_UNAVAILABLE:
        return {"Retry-After": str(_RETRY_AFTER)}
    return {}


def message_of(error: BaseException) -> str:
    """What a client may read: our own sentences, and nothing of an unexpected exception."""
    if isinstance(error, errors.ImgsvcError):
        return _MESSAGE.get(type(error), str(error))
    if isinstance(error, HTTPError):
        return error.log_message or error.reason or HTTPStatus(error.status_code).phrase.lower()
    return "internal error"


def error_document(error: BaseException, *, expose_stack: bool) -> str:
    """The wire contract's error JSON; `stack` is empty unless the operator exposes it."""
    stack = [line.strip() for line in traceback.format_exception(error)] if expose_stack else []
    document = {"message": message_of(error), "code": status_of(error), "stack": stack}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n"
