"""Where a source may be: no denied network, however it is written or reached, and nobody without a trusted name."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path

import certifi
import pytest

from imgsvc.errors import FetchFailed
from tests import source as http
from tests.etcd_cluster import Certificates
from tests.raw_peer import Answer, RawPeer, read

BODY = b"a secret"
LOOPBACK = ("127.0.0.0/8",)


@pytest.fixture(scope="module")
def shared_source() -> Iterator[http.Source]:
    with http.Source() as source:
        source.serve("/image", BODY)
        yield source


@pytest.fixture
def source(shared_source: http.Source) -> http.Source:
    """One that nobody has asked yet."""
    shared_source.exchanges.clear()
    return shared_source


def refused(url: str, networks: tuple[str, ...]) -> str:
    with pytest.raises(FetchFailed) as caught:
        read(url, deny_networks=tuple(map(ip_network, networks)))
    return str(caught.value)


class TestNetworks:
    @pytest.mark.parametrize(
        "host",
        [
            "127.0.0.1",
            "127.1",
            "2130706433",
            "0x7f000001",
            "0x7f.1",
            "017700000001",
            "0177.0.0.1",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "0.0.0.0",
            "0",
            "[::]",
            "[::ffff:0.0.0.0]",
            "user:password@127.0.0.1",
        ],
    )
    def test_every_spelling(self, source: http.Source, host: str) -> None:
        """The address that a connection would go to counts; what reaches it when it is allowed is refused when it is
        not, and the source hears nothing."""
        url = f"http://{host}:{source.port}/image"
        if host != "[::]":  # which reaches a source that listens on IPv6
            assert read(url).body == BODY
        source.exchanges.clear()
        assert "fetch.denyNetworks" in refused(url, (*LOOPBACK, "::1/128"))
        assert source.exchanges == []

    def test_a_name(self, source: http.Source) -> None:
        """A name is refused for what it resolves to; every address of it is looked at."""
        assert "fetch.denyNetworks" in refused(f"http://localhost:{source.port}/image", (*LOOPBACK, "::1/128"))
        assert source.exchanges == []

    def test_one_address_of_two(self, source: http.Source) -> None:
        """A name with an address that is allowed is fetched from there."""
        assert read(f"http://localhost:{source.port}/image", deny_networks=(ip_network("::1/128"),)).body == BODY

    def test_a_redirect(self, source: http.Source) -> None:
        """Each hop is looked at."""
        url = source.serve("/elsewhere", http.Resource.redirect(f"http://127.0.0.2:{source.port}/image"))
        assert "127.0.0.2" in refused(url, ("127.0.0.2/32",))
        assert [exchange.path for exchange in source.exchanges] == ["/elsewhere"]

    def test_others_are_allowed(self, source: http.Source) -> None:
        """A denied network denies nothing but itself."""
        assert read(source.url + "/image", deny_networks=(ip_network("127.0.0.2/32"),)).body == BODY

    def test_only_the_last_hop_is_blamed(self, source: http.Source) -> None:
        """An address that was refused on the way to a redirect is not the reason for what fails behind it."""
        source.serve("/elsewhere", http.Resource.redirect("http://127.0.0.1:9/"))
        with pytest.raises(FetchFailed, match="could not be fetched"):
            read(f"http://localhost:{source.port}/elsewhere", deny_networks=(ip_network("::1/128"),))

    @pytest.mark.parametrize("variable", ["http_proxy", "all_proxy", "ALL_PROXY"])
    def test_no_proxy(self, source: http.Source, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """One would connect to whatever it is told, where nobody looks."""
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
        assert read(source.url + "/image").body == BODY

    @pytest.mark.parametrize("scheme", ["file", "ftp", "gopher", "dict", "telnet", "ldap"])
    def test_no_other_protocol(self, source: http.Source, scheme: str) -> None:
        """Whoever calls checks it too; curl could do all of these."""
        with pytest.raises(FetchFailed):
            read(f"{scheme}://127.0.0.1:{source.port}/etc/passwd")
        assert source.exchanges == []


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.make(tmp_path_factory.mktemp("certificates"))


def trust(authority: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if certifi had it."""
    monkeypatch.setattr(certifi, "where", lambda: str(authority))


class TestTls:
    @pytest.fixture
    def server_side(self, certificates: Certificates) -> ssl.SSLContext:
        """With a certificate for 127.0.0.1."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates.server_cert, certificates.server_key)
        return context

    @pytest.fixture
    def peer(self, server_side: ssl.SSLContext) -> Iterator[RawPeer]:
        with RawPeer(server_side) as peer:
            peer.answer(Answer(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n" + BODY))
            yield peer

    def test_trusted(self, peer: RawPeer, certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
        """A certificate that certifi's authorities vouch for is taken."""
        trust(certificates.ca, monkeypatch)
        assert read(peer.url).body == BODY

    def test_not_trusted(self, peer: RawPeer) -> None:
        """One that nobody vouches for is refused, and the request is not sent."""
        with pytest.raises(FetchFailed, match="certificate"):
            read(peer.url)
        assert peer.requests == []

    def test_another_name(
        self, server_side: ssl.SSLContext, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One that is vouched for, but for another host, is refused as well."""
        trust(certificates.ca, monkeypatch)
        with RawPeer(server_side, host="127.0.0.2") as peer, pytest.raises(FetchFailed, match="certificate"):
            read(peer.url)
        assert peer.requests == []

    def test_no_tls(self, source: http.Source) -> None:
        """A server that speaks none is not asked without it."""
        with pytest.raises(FetchFailed):
            read(f"https://127.0.0.1:{source.port}/image", connect_timeout=0.3)
        assert source.exchanges == []
