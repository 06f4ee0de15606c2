"""Which servers downloads connect to: redirects, private addresses, URLs and certificates."""

import errno
import pathlib
import shutil
import socket
import ssl
import subprocess

import pytest

from tests.data.images.fake_server import LOCAL, PUBLIC, fault_of
from vixml_jax.data.images import download, url_safety
from vixml_jax.data.images.download import DownloadSettings

# Redirects.


def redirect(to, status=302):
    return lambda handler: handler.reply(status, Location=to)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_between_hosts_of_the_urls(server, network, tmp_path, status):
    network.names = {"a.example": [[PUBLIC]], "b.example": [[PUBLIC]]}
    server.routes = {
        "/a": redirect(server.url("/dir/b", "b.example"), status),
        "/dir/b": redirect("ü c", status),
        "/dir/%C3%BC%20c": b"found",
        "/x": b"x",
    }
    server.routes["/dir/b"] = lambda handler: handler.wfile.write(
        b"HTTP/1.1 %d Go\r\nLocation: \xc3\xbc c\r\n\r\n" % status
    )
    urls = [server.url("/a", "a.example"), server.url("/x", "b.example")]
    paths, faults = download.download(urls, str(tmp_path))
    assert faults == {}
    assert pathlib.Path(paths[urls[0]]).read_bytes() == b"found"
    hosts = {path: headers["Host"].partition(":")[0] for path, headers, _ in server.seen}
    assert hosts["/a"] == "a.example" and hosts["/dir/%C3%BC%20c"] == "b.example"


def test_redirect_to_another_host_is_refused(server, network, tmp_path):
    network.names = {"a.example": [[PUBLIC]], "b.example": [[PUBLIC]]}
    server.routes = {"/a": redirect(server.url("/b", "b.example")), "/b": b"b"}
    fault = fault_of(server.url("/a", "a.example"), tmp_path, DownloadSettings())
    assert fault == "redirected to b.example, a host of none of the URLs"
    assert network.lookups["b.example"] == 0 and server.count("/b") == 0
    # Another process downloads from that host.
    url = server.url("/a", "a.example")
    paths, _ = download.download(
        [url], str(tmp_path), others=[server.url("/x", "b.example"), "http://["]
    )
    assert pathlib.Path(paths[url]).read_bytes() == b"b" and server.count("/x") == 0


def test_redirect_to_a_private_address_is_refused(server, network, tmp_path):
    """A host with a private address is refused also if a public host redirects to it."""
    network.names = {"a.example": [[PUBLIC]], "inside.example": [["10.0.0.7"]]}
    server.routes = {"/a": redirect(server.url("/b", "inside.example")), "/b": b"b"}
    urls = [server.url("/a", "a.example"), server.url("/b", "inside.example")]
    paths, faults = download.download(urls, str(tmp_path))
    assert paths == {}
    assert set(faults.values()) == {
        "refused: inside.example has the address 10.0.0.7, which is not public"
    }
    assert server.count("/b") == 0


@pytest.mark.parametrize("to,fault", [
    ("file:///etc/passwd", "redirected to 'file:///etc/passwd': expected http or https, found"),
    ("ftp://127.0.0.1/x", "redirected to 'ftp://127.0.0.1/x': expected http or https, found ftp"),
    ("http://me:pw@127.0.0.1/", "redirected to 'http://me:pw@127.0.0.1/': the URL contains a user"),
    ("http://[::1/", "redirected to 'http://[::1/': "),
    ("http://127.0.0.1:99999/", "redirected to 'http://127.0.0.1:99999/': not a valid URL"),
    ("", "redirected without a location"),
    (None, "redirected without a location"),
])  # fmt: skip
def test_invalid_redirects_are_not_followed(server, tmp_path, to, fault):
    server.routes["/a"] = redirect(to)
    assert fault_of(server.url("/a"), tmp_path).startswith(fault)
    assert len(server.seen) == 1


def test_number_of_redirects_is_limited(server, tmp_path):
    server.routes = {f"/{i}": redirect(f"/{i + 1}") for i in range(6)}
    server.routes |= {"/6": b"x", "/loop": redirect("/loop")}
    assert fault_of(server.url("/loop"), tmp_path) == "more than 5 redirects"
    assert server.count("/loop") == 6
    paths, faults = download.download(
        [server.url("/0"), server.url("/1")], str(tmp_path), settings=LOCAL
    )
    assert list(faults) == [server.url("/0")] and list(paths) == [server.url("/1")]


# Addresses.


@pytest.mark.parametrize("host", [
    "127.0.0.1", "localhost", "localhost.", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433",
    "0x7f000001", "0x7f.1", "127.1", "0177.0.0.1", "\uff11\uff12\uff17.0.0.1",
])  # fmt: skip
def test_loopback_addresses_are_refused_by_default(server, tmp_path, host):
    server.routes["/x"] = b"secret"
    fault = fault_of(server.url("/x", host), tmp_path, DownloadSettings(timeout=1.0, retries=0))
    assert fault.startswith("refused: ") and fault.endswith(", which is not public")
    assert server.seen == []


@pytest.mark.parametrize("host", [
    "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200", "224.0.0.1",
    "240.0.0.1", "255.255.255.255", "192.0.0.192", "168.63.129.16", "198.18.0.1",
    "[fe80::1]", "[fd00:ec2::254]", "[ff02::1]", "[fec0::1]", "[::]", "[::7f00:1]",
    "[2002:7f00:1::]", "[64:ff9b::7f00:1]", "[64:ff9b::a00:1]", "[64:ff9b:1::808:808]",
    "[2001:0:1::1]", "[2001:db8::1]", "[::ffff:10.0.0.1]",
])  # fmt: skip
def test_private_addresses_are_refused_by_default(tmp_path, monkeypatch, host):
    def connect(self, address):
        raise AssertionError(f"connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    fault = fault_of(f"http://{host}/x", tmp_path, DownloadSettings())
    assert fault.startswith("refused: ") and fault.endswith(", which is not public")


@pytest.mark.parametrize("address", [
    PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808",
])  # fmt: skip
def test_public_addresses(address):
    assert url_safety.is_public(address)


def test_public_hosts_are_allowed(server, network, tmp_path):
    network.names["a.example"] = [[PUBLIC]]
    server.routes["/x"] = b"x"
    url = server.url("/x", "A.Example.")
    paths, faults = download.download([url], str(tmp_path))
    assert faults == {} and pathlib.Path(paths[url]).read_bytes() == b"x"
    assert network.connected == [(PUBLIC, server.server_port)]
    assert server.seen[0][1]["Host"] == f"a.example:{server.server_port}"


def test_host_names_with_private_addresses_are_refused(server, network, tmp_path):
    network.names["a.example"] = [["192.168.0.1"]]
    fault = fault_of(server.url("/x", "a.example"), tmp_path, DownloadSettings())
    assert fault == "refused: a.example has the address 192.168.0.1, which is not public"
    assert network.connected == []


@pytest.mark.parametrize("addresses", [[PUBLIC, "10.0.0.1"], ["10.0.0.1", PUBLIC]])
def test_one_private_address_is_enough_to_refuse(server, network, tmp_path, addresses):
    network.names["a.example"] = [addresses]
    fault = fault_of(server.url("/x", "a.example"), tmp_path, DownloadSettings())
    assert "10.0.0.1" in fault and network.connected == []


def test_names_are_resolved_once_per_try(server, network, tmp_path):
    """A name with a public address when checked, and a private one at the next lookup."""
    network.names["a.example"] = [[PUBLIC], ["127.0.0.1"]]
    server.routes["/x"] = b"x"
    _, faults = download.download([server.url("/x", "a.example")], str(tmp_path))
    assert faults == {}
    assert network.lookups["a.example"] == 1
    assert network.connected == [(PUBLIC, server.server_port)]


def test_every_try_checks_the_address(server, network, tmp_path):
    network.names["a.example"] = [[PUBLIC], ["127.0.0.1"]]
    server.routes["/x"] = lambda handler: handler.reply(503)
    fault = fault_of(server.url("/x", "a.example"), tmp_path, DownloadSettings())
    assert fault == "refused: a.example has the address 127.0.0.1, which is not public"
    assert network.connected == [(PUBLIC, server.server_port)]


def test_next_address_is_tried_if_one_is_unreachable(server, network, tmp_path, monkeypatch):
    network.names["a.example"] = [["8.8.8.8", PUBLIC]]
    server.routes["/x"] = b"x"
    rerouted = socket.socket.connect

    def connect(self, address):
        if address[0] == "8.8.8.8":
            raise OSError(errno.ENETUNREACH, "Network is unreachable")
        return rerouted(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    _, faults = download.download([server.url("/x", "a.example")], str(tmp_path))
    assert faults == {} and server.count("/x") == 1


def test_proxy_variables_are_ignored(server, tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    server.routes["/x"] = b"x"
    _, faults = download.download([server.url("/x")], str(tmp_path), settings=LOCAL)
    assert faults == {}


@pytest.mark.parametrize("url,fault", [
    ("http://me:pw@a.example/x", "the URL contains a user name or a password"),
    ("http://me@a.example/x", "the URL contains a user name or a password"),
    ("ftp://a.example/x", "expected http or https, found ftp"),
    ("file:///etc/passwd", "expected http or https, found file"),
    ("images/1.jpg", "expected http or https, found no scheme"),
    ("", "expected http or https, found no scheme"),
    ("http:///x", "the URL has no host"),
    ("http://", "the URL has no host"),
    ("http://a.example/a b", "the URL contains a space or a control character"),
    (" http://a.example/", "the URL contains a space or a control character"),
    ("http://a.example/\r\nHost: b", "the URL contains a space or a control character"),
    ("http://a.example/\x00", "the URL contains a space or a control character"),
    ("http://a.example/\ud800", "the URL contains a space or a control character"),
    ("http://a.example\\@b.example/", "the URL contains a user name or a password"),
    ("http://a.example\\.b.example/", "not a valid URL: its host name or port is invalid"),
    ("http://%31%32%37.0.0.1/", "not a valid URL: its host name or port is invalid"),
    ("http://[fe80::1%25eth0]/", "not a valid URL: its host name or port is invalid"),
    ("http://a.example:0/", "not a valid URL: its host name or port is invalid"),
    ("http://a.example:x/", "not a valid URL"),
    ("http://a..example/", "not a valid URL"),
    ("http://[::1/", "not a valid URL"),
    (f"http://{'a.' * 200}example/", "not a valid URL"),
])  # fmt: skip
def test_urls_that_are_refused(tmp_path, monkeypatch, url, fault):
    def getaddrinfo(*names, **unused):
        raise AssertionError(f"lookup of {names}")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert fault_of(url, tmp_path) == fault


# Certificates.


@pytest.fixture
def secure(server, network, tmp_path_factory, monkeypatch):
    """The server with a certificate for images.example; `server.names` are the requested names."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    directory = tmp_path_factory.mktemp("certificate")
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "2", "-subj", "/CN=test", "-addext",
         "subjectAltName=DNS:images.example", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.names = []
    context.sni_callback = lambda _, name, __: server.names.append(name)
    accept = server.get_request

    def get_request():
        connection, address = accept()
        # The handshake is done by the handler; here it would block other connections.
        return context.wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False
        ), address

    monkeypatch.setattr(server, "get_request", get_request)
    network.names = {"images.example": [[PUBLIC]], "other.example": [[PUBLIC]]}
    server.certificate = str(certificate)
    server.routes["/x"] = b"secret"
    return server


def test_certificate_must_match_the_host_name(secure, network, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", secure.certificate)
    urls = [secure.url("/x", host, "https") for host in ("images.example", "other.example")]
    paths, faults = download.download(urls, str(tmp_path))
    assert list(paths) == urls[:1]
    assert pathlib.Path(paths[urls[0]]).read_bytes() == b"secret"
    assert "Hostname mismatch" in faults[urls[1]] and "other.example" in faults[urls[1]]
    assert sorted(secure.names) == ["images.example", "other.example"]  # No retries.
    assert len(secure.seen) == 1
    assert secure.seen[0][1]["Host"] == f"images.example:{secure.server_port}"
    assert {address for address, _ in network.connected} == {PUBLIC}


def test_self_signed_certificates_are_refused(secure, tmp_path):
    fault = fault_of(secure.url("/x", "images.example", "https"), tmp_path, DownloadSettings())
    assert fault.startswith("certificate: self")
    assert secure.seen == []


def test_server_without_tls(server, tmp_path):
    server.routes["/x"] = b"x"
    assert fault_of(server.url("/x", scheme="https"), tmp_path).startswith("TLS: ")


def test_tls_checks_certificate_and_host_name(server, network, tmp_path, monkeypatch):
    """The same without openssl: the name is passed to a context that checks it."""
    network.names["a.example"] = [[PUBLIC]]
    calls = []

    def wrap_socket(self, connection, **settings):
        calls.append((self.check_hostname, self.verify_mode, settings))
        return connection

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap_socket)
    server.routes["/x"] = b"x"
    _, faults = download.download([server.url("/x", "a.example", "https")], str(tmp_path))
    assert faults == {}
    assert calls == [(True, ssl.CERT_REQUIRED, {"server_hostname": "a.example"})]
