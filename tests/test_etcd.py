"""The connection to etcd, against real members that are killed, frozen and started again; failures first."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from imgsvc.errors import ConfigError, NoSpace, Unavailable
from imgsvc.etcd import Compacted, Etcd, LeaseLost
from imgsvc.etcd_messages import put
from tests.etcd_cluster import QUOTA, Certificates, EtcdCluster

PASSWORD = "s3cret-of-the-tests"


@pytest.fixture
def connection(etcd_cluster: EtcdCluster) -> Iterator[Etcd]:
    with closing(Etcd(etcd_cluster.endpoints)) as connection:
        yield connection


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.make(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def guarded_etcd(certificates: Certificates) -> Iterator[EtcdCluster]:
    """One member that wants TLS and a user; tokens end after a second without use."""
    flags = ["--auth-token-ttl=1"]
    with closing(EtcdCluster(certificates=certificates, password=PASSWORD, flags=flags)) as cluster:
        yield cluster


def guarded(cluster: EtcdCluster, certificates: Certificates, password: str = PASSWORD) -> Etcd:
    return Etcd(
        cluster.endpoints,
        cert=certificates.client_cert,
        key=certificates.client_key,
        ca_cert=certificates.ca,
        user="root",
        password=password,
        timeout=4,
    )


def write(connection: Etcd, key: str, value: str = "x") -> None:
    assert connection.transact([], [put(key, value)]).succeeded


def values(connection: Etcd, key: str) -> list[bytes]:
    return [item.value for item in connection.range(key).items]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


class TestSettings:
    @pytest.mark.parametrize(
        ("machines", "tls"),
        [
            ([], False),
            (["127.0.0.1:2379"], False),
            (["http://"], False),
            (["http://[::1"], False),
            (["http://a.example:port"], False),
            (["ftp://a.example:2379"], False),
            (["https://a.example:2379"], False),
            (["http://a.example:2379"], True),
            (["https://a.example:2379", "http://b.example:2379"], True),
        ],
    )
    def test_machines(self, machines: list[str], tls: bool, certificates: Certificates) -> None:
        """Every machine is a URL, https exactly when there are TLS files."""
        files = (certificates.client_cert, certificates.client_key, certificates.ca) if tls else (None, None, None)
        with pytest.raises(ConfigError, match="machines"):
            Etcd(machines, cert=files[0], key=files[1], ca_cert=files[2])

    def test_half_a_set(self, certificates: Certificates) -> None:
        """TLS files come as three or not at all, user and password as two."""
        with pytest.raises(ConfigError, match="caCert"):
            Etcd(["https://a.example"], cert=certificates.client_cert, key=certificates.client_key)
        with pytest.raises(ConfigError, match="password"):
            Etcd(["http://a.example"], user="root")

    def test_a_missing_file(self, certificates: Certificates, tmp_path: Path) -> None:
        """A TLS file that cannot be read is named."""
        missing = tmp_path / "missing.pem"
        with pytest.raises(ConfigError, match=str(missing)):
            Etcd(["https://a.example"], cert=certificates.client_cert, key=missing, ca_cert=certificates.ca)

    def test_no_secret_is_repeated(self) -> None:
        """What a URL says besides host and port is in no message."""
        with closing(Etcd(["http://user:secret@127.0.0.1:1/secret"])) as connection:
            with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1") as unavailable:
                connection.range("x", timeout=0.2)
            assert "secret" not in str(unavailable.value)
        with pytest.raises(ConfigError) as wrong:
            Etcd(["ftp://user:secret@a.example/secret"])
        assert "secret" not in str(wrong.value)

    def test_import_under_any_protobuf(self) -> None:
        """The import works and warns of nothing, whatever protobuf parser the environment asks for."""
        environment = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "upb"}
        subprocess.run([sys.executable, "-W", "error", "-c", "import imgsvc.etcd"], env=environment, check=True)


class TestOutages:
    def test_nobody_listens(self) -> None:
        """Without any member a call ends when its time is over, and names who was asked."""
        connection = Etcd(["http://127.0.0.1:1", "http://localhost:2"], timeout=1)
        with closing(connection), within(3), pytest.raises(Unavailable, match=r"127\.0\.0\.1:1, localhost:2"):
            write(connection, "x")

    def test_a_member_that_never_was(self, etcd_cluster: EtcdCluster, etcd_prefix: str) -> None:
        """A dead address before the living ones costs next to nothing."""
        with closing(Etcd(["http://127.0.0.1:1", *etcd_cluster.endpoints])) as connection, within(2):
            write(connection, etcd_prefix)

    def test_each_member_is_killed_in_turn(self, etcd_cluster: EtcdCluster, connection: Etcd, etcd_prefix: str) -> None:
        """With one of three gone, whichever it is, the leader included, calls go on."""
        for i in range(3):
            etcd_cluster.kill(i)
            with within(6):
                write(connection, etcd_prefix, str(i))
            assert values(connection, etcd_prefix) == [str(i).encode()]
            etcd_cluster.restore()

    def test_each_member_is_frozen_in_turn(self, etcd_cluster: EtcdCluster, etcd_prefix: str) -> None:
        """A frozen member, to which there is a connection, is left after one time-out, and not asked again by the next
        call."""
        for i in range(3):
            with closing(Etcd(etcd_cluster.endpoints[i:] + etcd_cluster.endpoints[:i])) as connection:
                connection.range(etcd_prefix)
                etcd_cluster.stop(i)
                with within(6):
                    write(connection, etcd_prefix, str(i))
                etcd_cluster.wait_healthy()
                with within(1):
                    assert values(connection, etcd_prefix) == [str(i).encode()]
            etcd_cluster.restore()

    def test_no_quorum(self, etcd_cluster: EtcdCluster, connection: Etcd, etcd_prefix: str) -> None:
        """Two of three gone: reads and writes raise within ten seconds; all works again once one is back."""
        write(connection, etcd_prefix)
        etcd_cluster.kill(0)
        etcd_cluster.kill(1)
        with within(10), pytest.raises(Unavailable, match=r"127\.0\.0\.1"):
            write(connection, etcd_prefix, "lost")
        with within(2.5), pytest.raises(Unavailable):
            connection.range(etcd_prefix, timeout=2)
        etcd_cluster.start(0)
        with within(8):
            write(connection, etcd_prefix, "kept")
        assert values(connection, etcd_prefix) == [b"kept"]

    def test_a_restart_of_the_whole_cluster(
        self, etcd_cluster: EtcdCluster, connection: Etcd, etcd_prefix: str
    ) -> None:
        """However long all of etcd was away, a call works within two seconds of its return."""
        for i in range(3):
            etcd_cluster.kill(i)
        with pytest.raises(Unavailable):
            connection.range(etcd_prefix, timeout=4)
        etcd_cluster.restore()
        with within(2):
            write(connection, etcd_prefix)

    def test_close_ends_what_waits(self, etcd_cluster: EtcdCluster) -> None:
        """A call that waits for a frozen cluster ends with the connection, and so does every later one."""
        raised: list[Exception] = []
        patient = Etcd(etcd_cluster.endpoints)
        patient.range("x")

        def wait() -> None:
            try:
                write(patient, "x")
            except Unavailable as error:
                raised.append(error)

        for i in range(3):
            etcd_cluster.stop(i)
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.3)
        with within(1):
            patient.close()
            waiting.join()
        with pytest.raises(Unavailable, match="closed"):
            patient.range("x")
        patient.close()
        assert len(raised) == 1


class TestRefusals:
    def test_a_full_cluster(self) -> None:
        """A write that finds no room raises NoSpace; deleting works."""
        with (
            closing(EtcdCluster(flags=[QUOTA])) as cluster,
            closing(Etcd(cluster.endpoints)) as connection,
        ):
            write(connection, "/some")
            cluster.fill()
            with pytest.raises(NoSpace, match=r"127\.0\.0\.1"):
                write(connection, "/more")
            assert [item.key for item in connection.delete("/some")] == ["/some"]
            assert values(connection, "/some") == []

    def test_a_lost_lease(self, connection: Etcd, etcd_prefix: str) -> None:
        """A lease that has ended raises LeaseLost, wherever it is used."""
        lease = connection.grant(60)
        connection.keep_alive(lease)
        connection.revoke(lease)
        with pytest.raises(LeaseLost):
            connection.keep_alive(lease)
        with pytest.raises(LeaseLost):
            connection.revoke(lease)
        with pytest.raises(LeaseLost):
            connection.transact([], [put(etcd_prefix, "x", lease)])
        assert values(connection, etcd_prefix) == []

    def test_a_compacted_revision(self, etcd_cluster: EtcdCluster, connection: Etcd, etcd_prefix: str) -> None:
        """What etcd has dropped cannot be read or watched from."""
        old = connection.range(etcd_prefix).revision
        for _ in range(3):
            write(connection, etcd_prefix)
        etcd_cluster.call("/v3/kv/compaction", {"revision": connection.range(etcd_prefix).revision})
        with pytest.raises(Compacted):
            connection.range(etcd_prefix, revision=old)
        with pytest.raises(Compacted):
            list(connection.watch(etcd_prefix, "", old))

    def test_a_large_answer(self, connection: Etcd, etcd_prefix: str) -> None:
        """An answer may be larger than the 4 MiB that gRPC takes by itself."""
        for number in range(6):
            write(connection, f"{etcd_prefix}/{number}", "x" * 1_000_000)
        page = connection.range(f"{etcd_prefix}/", f"{etcd_prefix}0")
        assert sum(len(item.value) for item in page.items) == 6_000_000


class TestAccess:
    def test_wrong_password(self, guarded_etcd: EtcdCluster, certificates: Certificates) -> None:
        """A refused password is said at once, and not repeated."""
        connection = guarded(guarded_etcd, certificates, "wrong-pass")
        with closing(connection), within(2), pytest.raises(Unavailable, match="refused") as unavailable:
            connection.range("x")
        assert "wrong-pass" not in str(unavailable.value)

    def test_no_password(self, guarded_etcd: EtcdCluster, certificates: Certificates) -> None:
        """Without a user there is nothing to see."""
        files = (certificates.client_cert, certificates.client_key, certificates.ca)
        connection = Etcd(guarded_etcd.endpoints, cert=files[0], key=files[1], ca_cert=files[2])
        with closing(connection), pytest.raises(Unavailable):
            connection.range("x")

    def test_another_authority(self, guarded_etcd: EtcdCluster, certificates: Certificates, tmp_path: Path) -> None:
        """A server that our CA did not sign is not talked to."""
        other = Certificates.make(tmp_path)
        connection = Etcd(
            guarded_etcd.endpoints,
            cert=certificates.client_cert,
            key=certificates.client_key,
            ca_cert=other.ca,
            user="root",
            password=PASSWORD,
            timeout=1,
        )
        with closing(connection), pytest.raises(Unavailable):
            connection.range("x")

    def test_tls_by_name(self, guarded_etcd: EtcdCluster, certificates: Certificates) -> None:
        """A machine may be named by address or by host name, as its certificate has them."""
        by_name = [url.replace("127.0.0.1", "localhost") for url in guarded_etcd.endpoints]
        for machines in (guarded_etcd.endpoints, by_name):
            connection = Etcd(
                machines,
                cert=certificates.client_cert,
                key=certificates.client_key,
                ca_cert=certificates.ca,
                user="root",
                password=PASSWORD,
            )
            with closing(connection):
                write(connection, "/by-name", machines[0])
                assert values(connection, "/by-name") == [machines[0].encode()]

    def test_an_expired_token(self, guarded_etcd: EtcdCluster, certificates: Certificates) -> None:
        """A token that etcd has dropped is replaced without anybody noticing."""
        with closing(guarded(guarded_etcd, certificates)) as connection:
            write(connection, "/token")
            time.sleep(2.5)
            assert values(connection, "/token") == [b"x"]

    def test_a_restart_of_etcd(self, guarded_etcd: EtcdCluster, certificates: Certificates) -> None:
        """After a restart etcd has forgotten its tokens ; calls go on."""
        with closing(guarded(guarded_etcd, certificates)) as connection:
            write(connection, "/restart", "before")
            guarded_etcd.kill(0)
            guarded_etcd.start(0)
            guarded_etcd.wait_healthy()
            assert values(connection, "/restart") == [b"before"]
            write(connection, "/restart", "after")

    def test_a_user_that_is_not_asked_for_yet(self, certificates: Certificates) -> None:
        """The user may be set up here first and in etcd later."""
        with (
            closing(EtcdCluster(certificates=certificates)) as cluster,
            closing(guarded(cluster, certificates)) as connection,
        ):
            write(connection, "/early")
            cluster.require_password(PASSWORD)
            assert values(connection, "/early") == [b"x"]
