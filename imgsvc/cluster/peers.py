"""How members know each other: who asks is said in header fields, and shown by a signature."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Mapping

from imgsvc.errors import Forbidden
from imgsvc.values import is_name

PEER = "X-Imgsvc-Peer"
TIME = "X-Imgsvc-Time"
SIGNATURE = "X-Imgsvc-Signature"

# Seconds that the clocks of two members may differ, and a request be on its way.
WINDOW = 60

_TIME = re.compile(r"[0-9]{1,12}")


class Signatures:
    """HMAC-SHA256 with a secret that all members have. Without one, requests carry no signature and none is asked for.

    A request that somebody overheard can be repeated until its time is too old. What a member does for another one is
    therefore never more than reading bytes, or looking at its own.
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
