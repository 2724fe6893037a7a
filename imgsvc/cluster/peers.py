"""How members know each other, and what they ask of each other: who asks is said in header fields, and shown by a
signature."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import math
import re
import ssl
import time
from collections.abc import Mapping
from http import HTTPStatus
from urllib.parse import urlsplit

import certifi

from imgsvc.deadline import time_left
from imgsvc.errors import Forbidden, Unavailable
from imgsvc.foreign import read_json
from imgsvc.metadata.mirror import LiveMember
from imgsvc.values import is_name

PEER = "X-Imgsvc-Peer"
TIME = "X-Imgsvc-Time"
SIGNATURE = "X-Imgsvc-Signature"

# Seconds that the clocks of two members may differ, and a request be on its way.
WINDOW = 60
# Seconds after which an order to copy is answered although the copy is still being made; who wants to know asks again.
COPY_WAIT = 10.0

# Seconds before it is asked again, whoever it is that answers faster than that.
_PAUSE = 0.1
_LARGEST_ANSWER = 64 * 1024

_TIME = re.compile(r"[0-9]{1,12}")


class Signatures:
    """HMAC-SHA256 with a secret that all members have. Without one, requests carry no signature and none is asked for.

    A request that somebody overheard can be repeated until its time is too old. What a member does for another one is
    therefore never more than to send bytes, to read its own again, or to take a copy.
    """

    def __init__(self, secret: str, member_id: str) -> None:
        self._secret = secret.encode(errors="surrogateescape")
        self._member_id = member_id

    def fields(self, method: str, path: str) -> dict[str, str]:
        """The header fields that say of a request that this member sends it, now. `path` is the target as it is sent,
        with the query."""
        now = str(int(time.time()))
        fields = {PEER: self._member_id, TIME: now}
        if self._secret:
            fields[SIGNATURE] = self._signature(self._member_id, method, path, now)
        return fields

    def peer(self, headers: Mapping[str, str], method: str, path: str) -> str:
        """The id of the member that sends this request, "" for an ordinary client. `path` is the target as it came.

        Raises Forbidden unless the signature is that of this request and no older or newer than WINDOW seconds.
        """
        peer = headers.get(PEER)
        if peer is None:
            return ""
        if not is_name(peer):
            raise Forbidden(f"{PEER} is no id of a member")
        if self._secret:
            self._check(peer, headers, method, path)
        return peer

    def _check(self, peer: str, headers: Mapping[str, str], method: str, path: str) -> None:
        said, sent = headers.get(SIGNATURE, ""), headers.get(TIME, "")
        if not said:
            raise Forbidden(f"there is no {SIGNATURE}: has member {peer} the cluster.secret?")
        right = self._signature(peer, method, path, sent)
        if not hmac.compare_digest(said.encode(errors="replace"), right.encode()):
            raise Forbidden(f"{SIGNATURE} is wrong: has member {peer} the same cluster.secret?")
        if not _TIME.fullmatch(sent):
            raise Forbidden(f"{TIME} is no time in seconds")
        apart = int(sent) - time.time()
        if abs(apart) > WINDOW:
            direction = "ahead of" if apart > 0 else "behind"
            raise Forbidden(
                f"the request's time is {abs(apart):.0f} seconds {direction} the clock here: the clocks of members must"
                f" agree, to within {WINDOW} seconds"
            )

    def _signature(self, peer: str, method: str, path: str, sent: str) -> str:
        """Lines, for none of these can have an end of line in it. The first says what is signed, so that the secret
        may one day sign something else."""
        signed = f"imgsvc-peer-1\n{peer}\n{method}\n{path}\n{sent}"
        return hmac.new(self._secret, signed.encode(errors="surrogatepass"), hashlib.sha256).hexdigest()


class Peers:
    """Asks other members for something. Every method blocks, and raises Unavailable, naming the member, when that does
    not answer or does not do it."""

    def __init__(self, signatures: Signatures, timeout: float) -> None:
        """`timeout`: seconds without a byte from a member."""
        self._signatures = signatures
        self._timeout = timeout

    def check(self, member: LiveMember, image_id: str) -> None:
        """Has the member read its bytes of the image again, which did not have the right digest here. Returns when it
        has taken that on."""
        self._order(member, f"/peers/check/{image_id}", time_left(self._timeout))

    def copy(self, member: LiveMember, image_id: str, within: float = math.inf) -> None:
        """Returns when the member holds the image, or raises: also after `within` seconds; then it goes on all the
        same."""
        latest = time.monotonic() + within
        while (left := latest - time.monotonic()) > 0:
            # It answers every few seconds whether it is done, so that a dead one is noticed however large the image.
            try:
                done = self._order(member, f"/peers/copy/{image_id}", time_left(min(self._timeout + COPY_WAIT, left)))
            except Unavailable:
                if time.monotonic() < latest:
                    raise
            else:
                if done == HTTPStatus.OK:
                    return
                time.sleep(_PAUSE)
        raise Unavailable(f"{_named(member)} has not copied the image within {within:.0f} seconds")

    def _order(self, member: LiveMember, path: str, timeout: float) -> int:
        """The status that it was answered with: one that is no error."""
        try:
            status, body = self._post(member, path, timeout)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unavailable(f"{_named(member)} does not answer: {error or type(error).__name__}") from error
        if status not in (HTTPStatus.OK, HTTPStatus.ACCEPTED):
            raise Unavailable(f"{_named(member)} answers {status}: {_message(body)}")
        return status

    def _post(self, member: LiveMember, path: str, timeout: float) -> tuple[int, bytes]:
        """Straight to the member: neither proxies nor redirects are heeded. Raises OSError and others."""
        url = urlsplit(member.url)
        if not url.hostname:
            raise ValueError("its URL names no host")
        if url.scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                url.hostname, url.port, timeout=timeout, context=ssl.create_default_context(cafile=certifi.where())
            )
        else:
            connection = http.client.HTTPConnection(url.hostname, url.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request("POST", path, headers={"Connection": "close", **self._signatures.fields("POST", path)})
            with connection.getresponse() as answer:
                return answer.status, answer.read(_LARGEST_ANSWER)


def _named(member: LiveMember) -> str:
    return f"member {member.id} at {member.url}"


def _message(body: bytes) -> str:
    """What our error document says, for a person; whatever else answers is quoted briefly."""
    try:
        return str(read_json(body)["message"])
    except (ValueError, KeyError, TypeError):
        return repr(body[:80].decode(errors="replace"))
