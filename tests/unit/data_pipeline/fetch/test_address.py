"""Only public addresses are reached, however they are written, and only the address that was judged."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.fetch.address import (
    AddressPolicy,
    AddressRefused,
    CheckedResolver,
    embedded,
    kind,
    literal,
    parse_url,
)
from data_pipeline.fetch.download_config import WEB_SCHEMES, DownloadConfig, Refused
from tests.support.web_server import WebServer, page

IPV4 = st.integers(0, 2**32 - 1).map(IPv4Address)
SPECIAL = st.sampled_from(
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "172.31.0.1",
        "192.168.1.1",
        "224.0.0.1",
    ]
).map(IPv4Address)
PUBLIC = ["1.1.1.1", "8.8.8.8", "172.32.0.1", "100.128.0.1", "192.169.0.1", "2606:4700::1111", "2a00:1450::1"]


def policy(**settings) -> AddressPolicy:
    return AddressPolicy(DownloadConfig(**settings))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("0.0.0.0", "unspecified"),
        ("::", "unspecified"),
        ("127.0.0.1", "loopback"),
        ("127.255.255.255", "loopback"),
        ("::1", "loopback"),
        ("10.0.0.0", "private"),
        ("172.16.0.1", "private"),
        ("192.168.255.255", "private"),
        ("fd12::1", "private"),
        ("100.64.0.1", "shared"),
        ("169.254.0.1", "link-local"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("169.254.169.254", "metadata"),
        ("168.63.129.16", "metadata"),
        ("100.100.100.200", "metadata"),
        ("fd00:ec2::254", "metadata"),
        ("224.0.0.1", "multicast"),
        ("ff02::1", "multicast"),
        ("255.255.255.255", "reserved"),
        ("192.0.2.1", "reserved"),
        ("198.19.0.1", "reserved"),
        ("2001:db8::1", "reserved"),
        ("2001::1", "reserved"),  # Teredo
        ("64:ff9b:1::1", "reserved"),  # local NAT64
        ("::ffff:0:127.0.0.1", "reserved"),  # SIIT
        ("4000::1", "reserved"),
        ("::ffff:10.0.0.1", "private"),
        ("64:ff9b::169.254.169.254", "metadata"),
        ("2002:7f00:1::", "loopback"),
        ("2606:4700::5efe:10.0.0.1", "private"),
        *((address, "public") for address in PUBLIC),
    ],
)
def test_kinds(address: str, expected: str):
    assert kind(ip_address(address)) == expected


@given(IPV4)
@settings(deadline=None)
def test_what_the_standard_library_calls_local_is_not_public(ip: IPv4Address):
    if ip.is_private or ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_reserved:
        assert kind(ip) != "public"


@given(st.one_of(IPV4, SPECIAL))
@settings(deadline=None)
def test_an_ipv4_address_inside_an_ipv6_one_is_judged(ip: IPv4Address):
    forms = [
        IPv6Address(f"::ffff:{ip}"),
        IPv6Address(f"64:ff9b::{ip}"),
        IPv6Address((0x2002 << 112) | (int(ip) << 80) | 7),
        IPv6Address(f"2606:4700::5efe:{ip}"),
        IPv6Address(f"2606:4700::200:5efe:{ip}"),
    ]
    for form in forms:
        assert embedded(form) == ip
        assert kind(form) == kind(ip)
        assert policy(allowed_networks=(f"{ip}/32",)).refusal(form) is None


@given(st.one_of(IPV4, SPECIAL))
@settings(deadline=None)
def test_every_form_of_an_address_is_read(ip: IPv4Address):
    a, b, c, d = ip.packed
    odd = [
        str(int(ip)),
        hex(int(ip)),
        f"0{int(ip):o}",
        f"0x{a:x}.0x{b:x}.{c}.{d}",
        f"{a}.{(b << 16) | (c << 8) | d}",
        f"0{a:o}.0{b:o}.0{c:o}.0{d:o}",
        f"{ip}.",
    ]
    assert literal(str(ip)) == (ip, True)
    for form in odd:
        # the C library reads it so as well: what is judged is what would be connected to
        assert literal(form) == (IPv4Address(socket.inet_aton(form.removesuffix("."))), False)
        assert literal(form) == (ip, False)


@pytest.mark.parametrize("host", ["example.com", "a.b.", "x1", "1.example", "0xg", "dead.beef"])
def test_names_are_no_addresses(host: str):
    assert literal(host) == (None, True)


@pytest.mark.parametrize("host", ["1.2.3.4.5", "256.1.1.1", "a.1", "example.0x1", "99999999999"])
def test_a_host_that_ends_in_a_number_is_no_name(host: str):
    assert literal(host) == (None, False)


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("http://127.0.0.1/", "private_address"),
        ("http://2130706433/", "private_address"),
        ("http://0x7f000001/", "private_address"),
        ("http://0177.0.0.1/", "private_address"),
        ("http://127.1/", "private_address"),
        ("http://127.0.0.1./", "private_address"),
        ("http://\uff11\uff12\uff17.0.0.1/", "private_address"),
        ("http://[::1]/", "private_address"),
        ("http://[::ffff:7f00:1]/", "private_address"),
        ("http://[fe80::1%25eth0]/", "private_address"),
        ("http://169.254.169.254/latest/meta-data", "private_address"),
        ("http://134744072/", "bad_url"),  # 8.8.8.8
        ("http://8.8/", "bad_url"),
        ("http://example.com@127.0.0.1/", "bad_url"),
        ("http://user:secret@example.com/", "bad_url"),
        ("http://example.com\\@127.0.0.1/", "bad_url"),
        ("http://exa mple.com/", "bad_url"),
        ("http://example.com:99999/", "bad_url"),
        ("http:///path", "bad_url"),
        ("http://[::1/", "bad_url"),
        ("http://a\r\nHost: b/", "bad_url"),
        ("http://" + "a" * 9000, "bad_url"),
        ("", "bad_url"),
        ("   ", "bad_url"),
        ("//example.com/", "scheme_refused"),
        ("example.com/a.jpg", "scheme_refused"),
        ("file:///etc/hostname", "scheme_refused"),
        ("ftp://example.com/", "scheme_refused"),
        ("gopher://example.com/", "scheme_refused"),
        ("data:image/png;base64,AAAA", "scheme_refused"),
    ],
)
def test_urls_that_are_refused(url: str, word: str):
    with pytest.raises(Refused) as refused:
        policy().check_url(parse_url(url), WEB_SCHEMES)
    assert refused.value.word == word


@pytest.mark.parametrize(
    "url",
    ["http://example.com", " HTTPS://Example.com./a b?ü=%zz#x ", "http://8.8.8.8:8080/", "http://bücher.de/"],
)
def test_urls_that_may_be_asked_for(url: str):
    policy().check_url(parse_url(url), WEB_SCHEMES)


def test_schemes_are_those_of_the_recipe():
    with pytest.raises(Refused, match="http is not one of https"):
        policy().check_url(parse_url("http://example.com"), ("https",))


def test_only_what_the_recipe_names_is_allowed():
    some = policy(allowed_networks=("127.0.0.2/32", "fd00::/8"))
    assert some.refusal("127.0.0.2") is None
    assert some.refusal("::ffff:127.0.0.2") is None
    assert some.refusal("fd00::7") is None
    assert some.refusal("127.0.0.1") == "loopback"
    assert some.refusal("10.0.0.1") == "private"


def test_private_addresses_may_be_allowed_but_not_metadata():
    most = policy(allow_private_addresses=True)
    assert [most.refusal(a) for a in ("127.0.0.1", "10.0.0.1", "100.64.0.1", "::1", "fd00::1")] == [None] * 5
    assert most.refusal("169.254.169.254") == "metadata"
    assert most.refusal("fd00:ec2::254") == "metadata"
    assert most.refusal("169.254.1.1") == "link-local"
    assert most.refusal("224.0.0.1") == "multicast"
    named = policy(allow_private_addresses=True, allowed_networks=("169.254.169.254/32",))
    assert named.refusal("169.254.169.254") is None


def test_a_name_that_resolves_to_a_private_address_is_refused():
    async def resolve(allowed: tuple[str, ...]) -> list[str]:
        resolver = CheckedResolver(policy(allowed_networks=allowed).refusal)
        return [r["host"] for r in await resolver.resolve("localhost", 80, socket.AF_UNSPEC)]

    with pytest.raises(AddressRefused, match="which is loopback"):
        asyncio.run(resolve(()))
    assert set(asyncio.run(resolve(("127.0.0.0/8",)))) == {"127.0.0.1"}


@pytest.mark.parametrize("name", ["a..b", "x" * 64 + ".org", "no-such-name.invalid"])
def test_a_name_that_is_none(name: str):
    async def resolve() -> None:
        await CheckedResolver(policy().refusal).resolve(name, 80)

    with pytest.raises(socket.gaierror):
        asyncio.run(resolve())


class Liar(AbstractResolver):
    """A name service whose answer, at the time of use, is not the one that was judged."""

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET):
        flags = socket.AI_NUMERICHOST
        return [
            ResolveResult(
                hostname=host, host="127.0.0.1", port=port, family=socket.AF_INET, proto=0, flags=flags
            )
        ]

    async def close(self) -> None:
        pass


def test_no_socket_is_made_to_an_address_that_is_refused():
    async def get(url: str, allowed: tuple[str, ...]) -> bytes:
        connector = aiohttp.TCPConnector(
            resolver=Liar(), socket_factory=policy(allowed_networks=allowed).open_socket
        )
        async with aiohttp.ClientSession(connector=connector) as session, session.get(url) as response:
            return await response.read()

    with WebServer({"/": page(b"secret")}) as server:
        for host in ("public.example", "127.0.0.1"):
            url = f"http://{host}:{server.port}/"
            with pytest.raises(aiohttp.ClientConnectorError) as failed:
                asyncio.run(get(url, ()))
            assert isinstance(failed.value.os_error, AddressRefused)
            assert server.connections == 0
        assert asyncio.run(get(f"http://public.example:{server.port}/", ("127.0.0.1/32",))) == b"secret"
