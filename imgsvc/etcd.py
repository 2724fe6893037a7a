"""One connection to an etcd cluster: addresses, TLS, user, failover, time-outs, and etcd's errors as ours.

The failover is our own and not gRPC's, which stays with an endpoint whose connection is open although it answers
nothing, and which takes several addresses only as numbers, not as the names that TLS certificates are made out to.
"""

from __future__ import annotations

import queue
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc

from imgsvc.deadline import time_left
from imgsvc.errors import ConfigError, ImgsvcError, NoSpace, Unavailable
from imgsvc.etcd_messages import (
    Changes,
    Comparison,
    Etcd3Client,
    KeyValue,
    Operation,
    Outcome,
    Page,
    changes_by,
    etcdrpc,
    found_by,
    key_values,
    raw,
)
from imgsvc.etcd_wire import page

_T = TypeVar("_T")

_DEFAULT_PORT = 2379
# Between two rounds in which no endpoint answered.
_PAUSE_SECONDS = 0.2
_OPTIONS = (
    # A page of large records may be larger than the 4 MiB that gRPC takes by itself.
    ("grpc.max_receive_message_length", -1),
    # Back within seconds at an endpoint that is back. The least of these is also what a connection attempt may take.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1500),
    # A host that lost its power closes no connection; etcd forbids to ask more often than every 5 s, or without a call.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3000),
    # A proxy for the web is no way to a cluster of etcd.
    ("grpc.enable_http_proxy", 0),
)
# The endpoint is at fault, or its network, or it has lost its cluster: another one may do better.
_TRY_ANOTHER = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
}
# A token that expired or is from before etcd's restart; one from before a change of users; none where one is asked for
# since, which counts as a user without rights when we have a certificate.
_TOKEN_REFUSED = {
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
}
# etcd knows this request since 3.4, and etcd3 does not. Its answer is of no watch.
_PROGRESS = etcdrpc.WatchRequest.FromString(b"\x1a\x00")
_PROGRESS_ID = -1


class Compacted(Unavailable):
    """etcd no longer has the revision that was asked for."""


class LeaseLost(Unavailable):
    """etcd has no such lease, or no longer."""


class _Endpoint:
    """One machine: its channel, and the token that it gave us."""

    def __init__(self, host: str, port: int, files: Sequence[Path | None]) -> None:
        cert, key, ca_cert = (None if path is None else str(path) for path in files)
        self.address = f"{host}:{port}"
        try:
            self.client = Etcd3Client(
                host=host, port=port, cert_cert=cert, cert_key=key, ca_cert=ca_cert, grpc_options=_OPTIONS
            )
        except OSError as error:
            raise ConfigError(f"etcd: {error.filename} cannot be read: {error.strerror}") from error
        self.range: Callable[..., Page] = self.client.channel.unary_unary(
            "/etcdserverpb.KV/Range",
            request_serializer=etcdrpc.RangeRequest.SerializeToString,
            response_deserializer=page,
        )
        self.auth = etcdrpc.AuthStub(self.client.channel)
        self.watch = etcdrpc.WatchStub(self.client.channel)
        self.token: str | None = None


class Etcd:
    """Any thread may call; make it after a fork. Each call goes to the endpoint that worked last, and on to the next
    when that one fails or is silent for `attempt_timeout`. After `timeout` (both in seconds) it raises Unavailable;
    so does whatever else etcd refuses, except that a write that finds no room raises NoSpace.
    """

    def __init__(
        self,
        machines: Sequence[str],
        *,
        cert: Path | None = None,
        key: Path | None = None,
        ca_cert: Path | None = None,
        user: str = "",
        password: str = "",
        timeout: float = 8.0,
        attempt_timeout: float = 2.0,
    ) -> None:
        """`machines` are URLs: all https when the three TLS files are given, else all http. Raises ConfigError."""
        files = (cert, key, ca_cert)
        if any(files) != all(files):
            raise ConfigError("etcd: cert, key and caCert go together: all three or none")
        if bool(user) != bool(password):
            raise ConfigError("etcd: user and password go together")
        if not machines:
            raise ConfigError("etcd: machines is empty")
        addresses = [_address(machine, "https" if all(files) else "http") for machine in machines]
        self._user, self._password = user, password
        self._timeout, self._attempt_timeout = timeout, attempt_timeout
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._current = 0
        self._endpoints = [_Endpoint(host, port, files) for host, port in addresses]

    def __str__(self) -> str:
        return "etcd at " + ", ".join(endpoint.address for endpoint in self._endpoints)

    def range(
        self,
        key: str,
        end: str = "",
        *,
        limit: int = 0,
        revision: int = 0,
        keys_only: bool = False,
        timeout: float | None = None,
    ) -> Page:
        """The key, or those from it up to `end`: as a majority of the cluster has them now, or as they were at
        `revision`, which may be Compacted."""
        request = etcdrpc.RangeRequest(
            key=raw(key), range_end=raw(end), limit=limit, revision=revision, keys_only=keys_only
        )
        answer: Page = self._call(lambda endpoint, **options: endpoint.range(request, **options), timeout)
        return answer

    def transact(
        self,
        comparisons: Sequence[Comparison],
        success: Sequence[Operation],
        failure: Sequence[Operation] = (),
        *,
        timeout: float | None = None,
    ) -> Outcome:
        """Runs one of the two branches, in one step. Raises LeaseLost when a put names a lease that is gone."""
        request = etcdrpc.TxnRequest(compare=comparisons, success=success, failure=failure)
        attempts = 0

        def attempt(endpoint: _Endpoint, **options: Any) -> Any:
            nonlocal attempts
            attempts += 1
            return endpoint.client.kvstub.Txn(request, **options)

        answer = self._call(attempt, timeout)
        found = [found_by(response) for response in answer.responses]
        return Outcome(answer.succeeded, answer.header.revision, found, repeated=attempts > 1)

    def delete(self, key: str, end: str = "") -> Sequence[KeyValue]:
        """Deletes the key, or all from it up to `end`, and returns what they were. A full cluster takes this, where
        some releases of etcd refuse a transaction that only deletes."""
        request = etcdrpc.DeleteRangeRequest(key=raw(key), range_end=raw(end), prev_kv=True)
        answer = self._call(
            lambda endpoint, **options: endpoint.client.kvstub.DeleteRange(request, **options), timeout=None
        )
        return key_values(answer.prev_kvs)

    def grant(self, ttl: int, timeout: float | None = None) -> int:
        """The id of a new lease of `ttl` seconds."""
        request = etcdrpc.LeaseGrantRequest(TTL=ttl)
        answer = self._call(
            lambda endpoint, **options: endpoint.client.leasestub.LeaseGrant(request, **options), timeout
        )
        return int(answer.ID)

    def keep_alive(self, lease: int, timeout: float | None = None) -> None:
        """Gives the lease its full time again. Raises LeaseLost."""
        request = etcdrpc.LeaseKeepAliveRequest(ID=lease)

        def attempt(endpoint: _Endpoint, **options: Any) -> int:
            return sum(answer.TTL for answer in endpoint.client.leasestub.LeaseKeepAlive(iter([request]), **options))

        if self._call(attempt, timeout) <= 0:
            raise LeaseLost(f"{self} has no lease {lease:x}")

    def revoke(self, lease: int, timeout: float | None = None) -> None:
        """Ends the lease, and with it its keys. Raises LeaseLost when it had ended."""
        request = etcdrpc.LeaseRevokeRequest(ID=lease)
        self._call(lambda endpoint, **options: endpoint.client.leasestub.LeaseRevoke(request, **options), timeout)

    def watch(self, key: str, end: str, revision: int) -> Watch:
        """What changes from `key` up to `end`, from `revision` on. To be closed."""
        endpoint = self._endpoint()
        return Watch(self, endpoint, raw(key), raw(end), revision)

    def close(self) -> None:
        """Ends what is under way as Unavailable; may be called twice."""
        self._closed.set()
        for endpoint in self._endpoints:
            endpoint.client.close()

    def _call(self, attempt: Callable[..., _T], timeout: float | None) -> _T:
        total = time_left(self._timeout if timeout is None else timeout)
        deadline = time.monotonic() + total
        # Half of a short time-out is left for another endpoint.
        longest = min(self._attempt_timeout, total / 2)
        failures = 0
        while True:
            endpoint = self._endpoint()
            try:
                return self._authenticated(endpoint, attempt, min(longest, max(deadline - time.monotonic(), 0.1)))
            except grpc.RpcError as error:
                if error.code() not in _TRY_ANOTHER or time.monotonic() >= deadline:
                    raise self._translated(error) from error
            self.move_on(endpoint)
            failures += 1
            if failures % len(self._endpoints) == 0:
                self._closed.wait(_PAUSE_SECONDS)

    def _authenticated(self, endpoint: _Endpoint, attempt: Callable[..., _T], timeout: float) -> _T:
        try:
            return attempt(endpoint, timeout=timeout, metadata=self._metadata(endpoint, timeout))
        except grpc.RpcError as error:
            if endpoint.token is None or error.code() not in _TOKEN_REFUSED:
                raise
        except ValueError as error:
            # gRPC's way to say that another thread has closed the channel.
            if not self._closed.is_set():
                raise
            raise Unavailable(f"the connection to {self} is closed") from error
        endpoint.token = None
        return attempt(endpoint, timeout=timeout, metadata=self._metadata(endpoint, timeout))

    def _metadata(self, endpoint: _Endpoint, timeout: float) -> Any:
        if not self._user:
            return None
        token = endpoint.token
        if token is None:
            token = endpoint.token = self._authenticate(endpoint, timeout)
        return (("token", token),) if token else None

    def _authenticate(self, endpoint: _Endpoint, timeout: float) -> str:
        request = etcdrpc.AuthenticateRequest(name=self._user, password=self._password)
        try:
            return str(endpoint.auth.Authenticate(request, timeout=timeout).token)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                return ""  # etcd asks for no user yet; when it begins to, it refuses the call, and we are here again
            raise

    def _endpoint(self) -> _Endpoint:
        if self._closed.is_set():
            raise Unavailable(f"the connection to {self} is closed")
        with self._lock:
            return self._endpoints[self._current]

    def move_on(self, failed: _Endpoint) -> None:
        """Only from the one that failed: another thread may have moved on from it before."""
        with self._lock:
            if self._endpoints[self._current] is failed:
                self._current = (self._current + 1) % len(self._endpoints)

    def is_current(self, endpoint: _Endpoint) -> bool:
        with self._lock:
            return self._endpoints[self._current] is endpoint

    def metadata(self, endpoint: _Endpoint) -> Any:
        """What a stream to this endpoint begins with. Raises Unavailable."""
        try:
            return self._metadata(endpoint, self._attempt_timeout)
        except grpc.RpcError as error:
            self.move_on(endpoint)
            raise self._translated(error) from error

    def _translated(self, error: grpc.RpcError) -> ImgsvcError:
        code = error.code()
        said = f"{self} {'gave no answer' if code in _TRY_ANOTHER else 'refused'}: {error.details()} ({code.name})"
        if code is grpc.StatusCode.OUT_OF_RANGE:
            return Compacted(said)
        if code is grpc.StatusCode.NOT_FOUND:
            return LeaseLost(said)
        # etcd has no code of its own for its full database, and uses this one also for too many requests.
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "space" in (error.details() or ""):
            return NoSpace(said)
        return Unavailable(said)


class Watch:
    """One stream of changes from one endpoint. All but the iteration may be called by any thread."""

    def __init__(self, etcd: Etcd, endpoint: _Endpoint, key: bytes, end: bytes, revision: int) -> None:
        self._etcd = etcd
        self._endpoint = endpoint
        self._revision = revision
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        create = etcdrpc.WatchCreateRequest(key=key, range_end=end, start_revision=revision)
        self._requests.put(etcdrpc.WatchRequest(create_request=create))
        self._closed = False
        metadata = etcd.metadata(endpoint)
        self._stream = endpoint.watch.Watch(iter(self._requests.get, None), metadata=metadata)

    @property
    def in_use(self) -> bool:
        """Whether its endpoint is the one that calls go to."""
        return self._etcd.is_current(self._endpoint)

    def __iter__(self) -> Iterator[Changes]:
        """Until `close`. Raises Compacted when etcd no longer has the first revision, and Unavailable when the endpoint
        fails; what is asked next then goes to another one. One that freezes says nothing."""
        try:
            for answer in self._stream:
                if answer.compact_revision:
                    raise Compacted(f"{self._etcd} has compacted revision {self._revision}")
                if answer.canceled:
                    raise self._failed(answer.cancel_reason)
                if answer.events or answer.watch_id == _PROGRESS_ID:
                    yield changes_by(answer)
        except grpc.RpcError as error:
            if not self._closed:
                raise self._failed(error.details() or "") from error
        if not self._closed:
            raise self._failed("it has ended")

    def ask_progress(self) -> None:
        """Has `Changes` told soon, although there be none, with the revision up to which all were told."""
        self._requests.put(_PROGRESS)

    def fail(self) -> None:
        """It is no good: `close`, and what is asked next goes to another endpoint."""
        self._etcd.move_on(self._endpoint)
        self.close()

    def close(self) -> None:
        """Ends the iteration; may be called twice."""
        self._closed = True
        self._requests.put(None)
        self._stream.cancel()

    def _failed(self, reason: str) -> Unavailable:
        self._etcd.move_on(self._endpoint)
        return Unavailable(f"{self._endpoint.address} has ended a watch: {reason}")


def _address(machine: str, scheme: str) -> tuple[str, int]:
    """Host and port of a machine's URL, the host as gRPC wants it. What else the URL has is not repeated in errors."""
    try:
        url = urllib.parse.urlsplit(machine)
        host, port = url.hostname, url.port or _DEFAULT_PORT
    except ValueError as error:
        raise ConfigError(f"etcd: machines has something that is no URL: {error}") from error
    if not host or url.scheme != scheme:
        tls = "with" if scheme == "https" else "without"
        raise ConfigError(f"etcd: machines must be {scheme}:// URLs {tls} cert, key and caCert, unlike {url.hostname}")
    return (f"[{host}]" if ":" in host else host), port
