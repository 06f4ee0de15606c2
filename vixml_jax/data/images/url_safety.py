"""Urls in their parts, those fit to be asked for; and which IP addresses are public."""

import ipaddress
import re
import string
import urllib.parse
from typing import NamedTuple

_HOST = re.compile(r"[a-z0-9_][a-z0-9._-]*")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_6TO4 = ipaddress.ip_network("2002::/16")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# What `is_global` lets pass, some Pythons only: IETF assignments and the host of Azure's machines.
_NOT_PUBLIC = (ipaddress.ip_network("192.0.0.0/24"), ipaddress.ip_network("168.63.129.16/32"))


class Target(NamedTuple):
    """A url in its parts, fit to be asked for."""

    secure: bool
    host: str  # In lower case and ASCII; IPv6 addresses without brackets.
    port: int
    path: str  # With the query.

    @property
    def request(self) -> bytes:
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
    """The parts of a url.

    Raises:
      ValueError: If it is not one that may be asked for.
    """
    if " " in url or not url.isprintable():
        raise ValueError("a space or a control character in the url")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").removesuffix(".")
        if len(host) > 253:  # None has more; and they are slow to turn into ASCII.
            raise ValueError
        if ":" in host:
            ipaddress.IPv6Address(host)
        else:
            host = host.encode("idna").decode("ascii").lower()
    except ValueError:
        raise ValueError("not a url") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"neither http nor https, but {parts.scheme[:20] or 'no scheme'}")
    if "@" in parts.netloc:
        raise ValueError("user name or password in the url")
    if not host:
        raise ValueError("no host in the url")
    if "%" in host or port == 0 or not (":" in host or _HOST.fullmatch(host)):
        raise ValueError("not a url: its host is none")
    secure = parts.scheme == "https"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    path = urllib.parse.quote(path, safe=string.punctuation)
    return Target(secure, host, port or (443 if secure else 80), path)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet's."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        if ip.ipv4_mapped is None and ip not in _NAT64:
            return ip in _GLOBAL_UNICAST and ip not in _6TO4 and ip.is_global
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)  # The packets go there.
    return ip.is_global and not ip.is_multicast and not any(ip in net for net in _NOT_PUBLIC)
