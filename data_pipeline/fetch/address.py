"""Which addresses may be reached: checked where a name is resolved and again where the socket is made.

A downloader that fetches whatever a table says is a way into the network that it runs in. The name is
resolved once, every address is judged, and the connection goes to an address that was judged, so that a name
which changes its mind between check and use gains nothing.

The ranges are those of the IANA registries of special-purpose addresses (RFC 6890 and its successors). They
are written out because `ipaddress` knows different ones in different releases of Python. Not from the paper.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from aiohttp import ThreadedResolver
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from data_pipeline.fetch.download_config import DownloadConfig, Refused

MOST_URL_CHARACTERS = 8192

# The first that contains an address names it. Metadata services tell the machine's secrets to whoever asks.
_SPECIAL: tuple[tuple[str, tuple[IPv4Network | IPv6Network, ...]], ...] = tuple(
    (kind, tuple(ip_network(network) for network in networks.split()))
    for kind, networks in (
        ("metadata", "169.254.169.254 169.254.170.2 168.63.129.16 100.100.100.200 192.0.0.192 fd00:ec2::254"),
        ("unspecified", "0.0.0.0/8 ::"),
        ("loopback", "127.0.0.0/8 ::1"),
        ("private", "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7"),
        ("shared", "100.64.0.0/10"),
        ("link-local", "169.254.0.0/16 fe80::/10 fec0::/10"),
        ("multicast", "224.0.0.0/4 ff00::/8"),
        ("reserved", "192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24"),
        ("reserved", "240.0.0.0/4 2001::/23 2001:db8::/32 3fff::/20"),
    )
)
_GLOBAL_V6 = IPv6Network("2000::/3")
_MAY_BE_ALLOWED = ("loopback", "private", "shared")
# Addresses that carry an IPv4 address in their last 32 bits: mapped, compatible, and NAT64 (RFC 6052).
_LAST_32_BITS = tuple(IPv6Network(prefix) for prefix in ("::ffff:0:0/96", "::/96", "64:ff9b::/96"))
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_HOST = re.compile(r"[A-Za-z0-9._:%-]+")
_ISATAP = 0x00005EFE  # RFC 5214: bits 32 to 63, but for the bit "universal"


class AddressRefused(OSError):
    """A host has no address that may be reached. An OSError, because aiohttp passes these on."""


class AddressPolicy:
    """Judges addresses by what the recipe allows."""

    def __init__(self, config: DownloadConfig) -> None:
        self._networks = config.networks
        self._refused = set(_MAY_BE_ALLOWED) if not config.allow_private_addresses else set()

    def refusal(self, address: str | IPv4Address | IPv6Address) -> str | None:
        """What is wrong with `address`, such as "loopback"; None when it may be reached."""
        ip = ip_address(address)
        inner = embedded(ip)
        if any(ip in network or (inner is not None and inner in network) for network in self._networks):
            return None
        found = kind(ip)
        if found == "public" or (found in _MAY_BE_ALLOWED and found not in self._refused):
            return None
        return found

    def check_url(self, url: URL, schemes: tuple[str, ...]) -> None:
        """Raise Refused unless `url` may be asked for. Names are judged later, when they are resolved."""
        if url.scheme not in schemes:
            raise Refused("scheme_refused", f"{url.scheme or 'no scheme'} is not one of {', '.join(schemes)}")
        host = url.raw_host
        if not host or not _HOST.fullmatch(host):
            raise Refused("bad_url", "the address has no host, or one with odd characters")
        if url.raw_user is not None or url.raw_password is not None:
            raise Refused("bad_url", "the address has a user name or password")
        found, canonical = literal(host)
        wrong = None if found is None else self.refusal(found)
        if wrong is not None:
            raise Refused("private_address", f"{host} is {wrong}")
        if not canonical:
            raise Refused("bad_url", f"{host} is a number but not of the form 1.2.3.4")

    def open_socket(self, info: tuple[Any, ...]) -> socket.socket:
        """Make the socket for an address of getaddrinfo's form: no connection comes about without this."""
        family, kind_of_socket, protocol, _, where = info
        wrong = self.refusal(where[0])
        if wrong is not None:
            raise AddressRefused(errno.EACCES, f"{where[0]} is {wrong}")
        return socket.socket(family, kind_of_socket, protocol)


class CheckedResolver(AbstractResolver):
    """Resolves names by the system and returns the addresses that may be reached.

    Raises AddressRefused when there are only others, socket.gaierror when there are none.
    """

    def __init__(self, refusal: Callable[[str], str | None]) -> None:
        self._refusal = refusal
        self._system = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        try:
            found = await self._system.resolve(host, port, family)
        except UnicodeError:  # an empty label or one over 63 characters
            raise socket.gaierror(socket.EAI_NONAME, "no host name") from None
        wrong = [self._refusal(result["host"]) for result in found]
        if found and None not in wrong:
            # The smallest, so that the message does not depend on the order of the answer.
            address, why = min((result["host"], str(word)) for result, word in zip(found, wrong, strict=True))
            raise AddressRefused(errno.EACCES, f"{host} is {address}, which is {why}")
        return [result for result, word in zip(found, wrong, strict=True) if word is None]

    async def close(self) -> None:
        await self._system.close()


def kind(ip: IPv4Address | IPv6Address) -> str:
    """What is special about an address, or "public"; one with an IPv4 address inside is what that one is."""
    for name, networks in _SPECIAL:
        if any(ip in network for network in networks):
            return name
    inner = embedded(ip)
    if inner is not None and (kind(inner) != "public" or ip not in _GLOBAL_V6):
        return kind(inner)
    return "public" if isinstance(ip, IPv4Address) or ip in _GLOBAL_V6 else "reserved"


def embedded(ip: IPv4Address | IPv6Address) -> IPv4Address | None:
    """The IPv4 address that packets to `ip` might reach: mapped, compatible, NAT64, 6to4 or ISATAP."""
    if isinstance(ip, IPv4Address):
        return None
    last = int(ip) & 0xFFFFFFFF
    if any(ip in network for network in _LAST_32_BITS):
        return IPv4Address(last) if int(ip) > 1 else None  # :: and ::1 are themselves
    if (int(ip) >> 32) & 0xFFFFFFFF & ~(1 << 25) == _ISATAP:
        return IPv4Address(last)
    return ip.sixtofour


def literal(host: str) -> tuple[IPv4Address | IPv6Address | None, bool]:
    """The address that `host` itself is, None for a name; and whether it is written in the usual form.

    The C library reads 2130706433, 0x7f.1, 0177.0.0.1 and 127.1 as 127.0.0.1. A name never ends in a number
    (as in the WHATWG URL standard), so a host that does and cannot be read is (None, False).
    """
    try:
        return ip_address(host), True
    except ValueError:
        pass
    last = host.lower().removesuffix(".").rpartition(".")[2]
    if not (last.isdecimal() or (last.startswith("0x") and all(c in "0123456789abcdef" for c in last[2:]))):
        return None, True
    try:
        return IPv4Address(socket.inet_aton(host.removesuffix("."))), False
    except (OSError, UnicodeError):
        return None, False


def parse_url(text: str, base: URL | None = None) -> URL:
    """Read an address, relative to `base`, without its fragment. Raises Refused "bad_url"."""
    text = text.strip()
    if not text or len(text) > MOST_URL_CHARACTERS or _CONTROL.search(text):
        raise Refused("bad_url", "the address is empty, too long, or has control characters")
    try:
        url = URL(text) if base is None else base.join(URL(text))
        return url.with_fragment(None)
    except (ValueError, UnicodeError) as error:
        raise Refused("bad_url", f"the address cannot be read: {error}"[:200]) from None
