"""Everything that can go wrong on purpose.

No HTTP here: `api/errors.py` has the one table that maps these to a status. A foreign exception (OSError,
sqlite3.Error, grpc.RpcError, pycurl.error) becomes one of these at the call that raised it, with `from`, and its
text is a sentence for a person.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imgsvc.metadata.image import Image


class ImgsvcError(Exception):
    """The root: catching it catches what is ours and no programming mistake."""


class ConfigError(ImgsvcError):
    """A setting is wrong, or what it names cannot be used; the service does not start."""


class Invalid(ImgsvcError):
    """The caller's input is wrong, and says which part of it."""


class TooLarge(ImgsvcError):
    """More bytes than the settings allow."""


class NotFound(ImgsvcError):
    """There is no such image, or none that may be read."""


class NotComplete(NotFound):
    """There is such an image, and it may not be read: its bytes are not all there."""


class Gone(NotFound):
    """There was such an upload; the text says what became of it."""


class Conflict(ImgsvcError):
    """The record has changed since it was read; nothing was written."""


class SourceTaken(Conflict):
    """Another image was made from this source; `image` is that one, as it was stored at that moment."""

    def __init__(self, image: Image) -> None:
        super().__init__(f"image {image.id} has this source")
        self.image = image


class NoSpace(ImgsvcError):
    """The disk, a quota or the reserve leaves no room."""


class Unavailable(ImgsvcError):
    """A store, or another member, cannot answer now; the same call may work later. After a write, its outcome is not
    known."""


class Unreadable(Unavailable):
    """The disk does not give back what was written to it; asking again is not likely to help."""


class Elsewhere(Unavailable):
    """The image is whole, and its bytes are on another member."""


class PeerFailed(Unavailable):
    """Another member did not give the bytes that it was asked for; the text says why."""


class Incomplete(ImgsvcError):
    """The sender ended before the announced length, went away, or sent more than it announced."""


class IdleTimeout(Incomplete):
    """The other side was silent for too long."""


class WrongDigest(ImgsvcError):
    """The bytes are not those that the sender said they would be."""


class WrongChecksum(ImgsvcError):
    """The bytes of one request are not those that it said they would be; they were dropped, and may be sent again."""


class Forbidden(ImgsvcError):
    """The request is for members of the cluster, and does not show that one of them sent it."""


class Locked(ImgsvcError):
    """Another request has the upload."""


class FetchFailed(ImgsvcError):
    """The source could not be fetched; the text says why."""


class Interrupted(FetchFailed):
    """The source broke off in a way that it may get over; `retry_after` is what it said to wait, in seconds."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Stopping(ImgsvcError):
    """The service is shutting down; what was going on is left for the next start."""
