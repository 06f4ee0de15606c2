"""Checks URLs before they are requested, and whether IP addresses are public."""

import ipaddress
import re
import string
import urllib.parse
from typing import NamedTuple

_HOST = re.compile(r"[a-z0-9_][a-z0-9._-]*")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_6TO4 = ipaddress.ip_network("2002::/16")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Accepted by `is_global` in some versions of Python: IETF assignments, the host of Azure machines.
_NOT_PUBLIC = (ipaddress.ip_network("192.0.0.0/24"), ipaddress.ip_network("168.63.129.16/32"))


class Target(NamedTuple):
    """The parts of a URL that may be requested.

    Attributes:
      secure: Whether the scheme is https.
      host: Name or address in lower-case ASCII; IPv6 addresses without brackets.
      port: Port, the default of the scheme if the URL has none.
      path: Path and query.
    """

    secure: bool
    host: str
    port: int
    path: str

    @property
    def request(self) -> bytes:
        """The HTTP request for the URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.port != (443 if self.secure else 80):
            host += f":{self.port}"
        lines = (
            f"GET {self.path} HTTP/1.1",
            f"Host: {host}",
            "User-Agent: vixml_jax",
            "Accept: image/*, */*;q=0.5",
            "Accept-Encoding: identity",
            "Connection: close",
        )
        return "".join(line + "\r\n" for line in (*lines, "")).encode("ascii")


def parse(url: str) -> Target:
    """The parts of a URL.

    Raises:
      ValueError: If the URL is invalid or must not be requested.
    """
    if " " in url or not url.isprintable():
        raise ValueError("the URL contains a space or a control character")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").removesuffix(".")
        if len(host) > 253:  # The limit of DNS; longer names are slow to convert to ASCII.
            raise ValueError
        if ":" in host:
            ipaddress.IPv6Address(host)
        else:
            host = host.encode("idna").decode("ascii").lower()
    except ValueError:
        raise ValueError("not a valid URL") from None
    if parts.scheme not in ("http", "https"):
        scheme = parts.scheme[:20] or "no scheme"
        raise ValueError(f"expected http or https, found {scheme}")
    if "@" in parts.netloc:
        raise ValueError("the URL contains a user name or a password")
    if not host:
        raise ValueError("the URL has no host")
    if "%" in host or port == 0 or not (":" in host or _HOST.fullmatch(host)):
        raise ValueError("not a valid URL: its host name or port is invalid")
    secure = parts.scheme == "https"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    path = urllib.parse.quote(path, safe=string.punctuation)
    return Target(secure, host, port or (443 if secure else 80), path)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        if ip.ipv4_mapped is None and ip not in _NAT64:
            return ip in _GLOBAL_UNICAST and ip not in _6TO4 and ip.is_global
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)  # Where packets are sent.
    return ip.is_global and not ip.is_multicast and not any(ip in net for net in _NOT_PUBLIC)
