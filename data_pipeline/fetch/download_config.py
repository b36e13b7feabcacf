"""What the download may do, and the words for why a row was not fetched. Not from the paper."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from ipaddress import IPv4Network, IPv6Network, ip_network

WEB_SCHEMES = ("http", "https")
OPT_OUT_TAGS = ("noai", "noimageai", "noindex", "noimageindex")
PASSING_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Reason:
    """Why a row was not fetched."""

    meaning: str
    again: bool = False
    """Tried again in the same run, up to `download.retries` times."""
    retriable: bool = False
    """Stored with the reject: a later run may try the row again."""


REASONS: dict[str, Reason] = {
    "bad_url": Reason("the address cannot be read, has a user name, or is a number written in an odd form"),
    "scheme_refused": Reason("the scheme is not in download.schemes, at the start or after a redirect"),
    "private_address": Reason("the host is, or resolves to, an address that is not public"),
    "unknown_host": Reason("the name service says that there is no such name"),
    "dns_failed": Reason("the name service did not answer", again=True, retriable=True),
    "connection_failed": Reason("refused, reset, or closed before an answer", again=True, retriable=True),
    "tls_failed": Reason("the certificate is not valid, or no common TLS version"),
    "timeout": Reason("longer than connect, read or total timeout", again=True, retriable=True),
    "truncated": Reason("the body ended before its end", again=True, retriable=True),
    # Again, because it may be the surplus of the answer before it on the same connection.
    "bad_response": Reason("the answer is not HTTP, or its headers are too long", again=True),
    "too_many_redirects": Reason("more than download.max_redirects redirects, or a loop"),
    "too_large": Reason("more than download.max_bytes bytes, packed or unpacked"),
    "empty_body": Reason("status 200 with no bytes"),
    "encoding_refused": Reason("the body is packed in another way than gzip, though identity was asked for"),
    "robots_disallowed": Reason("robots.txt of the host forbids it, or is too complicated to be read"),
    "robots_unreachable": Reason("robots.txt could not be had, which counts as no", retriable=True),
    "host_busy": Reason("the host asked, by Retry-After, for a longer pause than we wait", retriable=True),
    "tag_*": Reason("X-Robots-Tag has the word, such as tag_noai: the owner opts out"),
    "http_*": Reason("any other status than 200, such as http_404"),
    "http_408, 425, 429, 500, 502, 503, 504": Reason("the server is busy", again=True, retriable=True),
}
"""Every reason that `fetch_rows` gives; `reason` looks one up."""
_BUSY = REASONS["http_408, 425, 429, 500, 502, 503, 504"]


def reason(word: str) -> Reason:
    """What is known of the reason `word` of a reject. KeyError for a word that is none."""
    if word.startswith("http_"):
        return _BUSY if int(word.removeprefix("http_")) in PASSING_STATUSES else REASONS["http_*"]
    return REASONS["tag_*" if word.startswith("tag_") else word]


class Refused(Exception):
    """A fetch ended without an image. `word` is one of REASONS; `retry_after` is what the server asked for,
    in seconds."""

    def __init__(self, word: str, detail: str, retry_after: float | None = None) -> None:
        super().__init__(f"{word}: {detail}" if detail else word)
        self.word = word
        self.detail = detail
        self.retry_after = retry_after


def _release() -> str:
    try:
        return version("maskclip")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Limits, manners and safety of the download."""

    concurrency: int = 64
    """Requests in flight in one process."""
    per_host: int = 8
    """Requests in flight to one host name."""
    per_host_rate: float | None = 10.0
    """Requests per second to one host, from one process; null: no limit."""
    look_ahead: int = 8
    """Rows that may be in work or wait for a slower one before them, as a multiple of concurrency."""
    buffer_bytes: int = 512 * 2**20
    """No new row is begun while this many bytes of images wait to be taken."""
    retries: int = 2
    """Further attempts after one that failed for a cause that may pass."""
    backoff_base: float = 0.5
    """Seconds before the second attempt; doubles each time, times a factor from 0.5 to 1 keyed by the row."""
    backoff_cap: float = 20.0
    """Most seconds between two attempts, where the server did not ask for more."""
    retry_after_cap: float = 30.0
    """Retry-After up to this many seconds is waited for. A host that asks for more gets no further request in
    that time: its rows end as retriable."""
    connect_timeout: float = 10.0
    """Seconds for name, connection and TLS."""
    read_timeout: float = 10.0
    """Seconds without a byte."""
    total_timeout: float = 30.0
    """Seconds for one attempt with all its redirects, without the time that it waits for its turn."""
    max_bytes: int = 20 * 2**20
    """Largest image, in bytes."""
    max_redirects: int = 5
    """Each of them is checked like the first address."""
    schemes: tuple[str, ...] = WEB_SCHEMES
    """Which of http and https may be used."""
    allow_private_addresses: bool = False
    """Reach loopback, private and shared (RFC 6598) addresses. Link-local and metadata addresses, multicast
    and reserved ones stay refused unless allowed_networks names them."""
    allowed_networks: tuple[str, ...] = ()
    """Networks that may be reached although they are not public: 10.1.2.0/24, fd00::/8."""
    respect_robots_txt: bool = True
    """Fetch nothing that the host's robots.txt forbids."""
    robots_cache_size: int = 1024
    """Hosts whose robots.txt is kept in memory."""
    crawl_delay_cap: float = 10.0
    """Most seconds between two requests that a robots.txt can ask for with Crawl-delay or Request-rate."""
    respect_x_robots_tag: bool = True
    """Keep nothing whose X-Robots-Tag header has one of x_robots_tags."""
    x_robots_tags: tuple[str, ...] = OPT_OUT_TAGS
    """Words that opt out; `none` counts as noindex."""
    user_agent: str = "maskclip"
    """Our name, as robots.txt and X-Robots-Tag would call us: letters, digits, - and _."""
    contact: str = ""
    """Address of a page or mailbox, sent with every request, where the owner of a host can ask us to stop."""

    def __post_init__(self) -> None:
        for name in (
            "concurrency",
            "per_host",
            "look_ahead",
            "buffer_bytes",
            "max_bytes",
            "robots_cache_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"download.{name} is {getattr(self, name)}: set download.{name} to 1 or more"
                )
        for name in ("connect_timeout", "read_timeout", "total_timeout", "backoff_base"):
            if getattr(self, name) <= 0:
                raise ValueError(f"download.{name} is {getattr(self, name)}: set download.{name} above 0 s")
        for name in ("retries", "max_redirects", "backoff_cap", "retry_after_cap", "crawl_delay_cap"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"download.{name} is {getattr(self, name)}: set download.{name} to 0 or more"
                )
        if self.per_host_rate is not None and self.per_host_rate <= 0:
            raise ValueError("download.per_host_rate must be above 0: set download.per_host_rate, or null")
        if not self.schemes or not set(self.schemes) <= set(WEB_SCHEMES):
            raise ValueError(
                f"download.schemes {list(self.schemes)}: set download.schemes to http, https or both"
            )
        if not self.user_agent or not all(
            c.isascii() and (c.isalnum() or c in "-_") for c in self.user_agent
        ):
            raise ValueError(
                f"download.user_agent '{self.user_agent}' is not one word of letters, digits, - and _: set "
                "download.user_agent to a name, and download.contact to an address"
            )
        if not self.contact.isprintable() or not self.contact.isascii() or set(self.contact) & set("() "):
            raise ValueError("download.contact is no web or mail address: set download.contact")
        if any(not tag or set(tag) & set(" ,:") for tag in self.x_robots_tags):
            raise ValueError(
                f"download.x_robots_tags {list(self.x_robots_tags)} are not single words: "
                "set download.x_robots_tags to words like noai"
            )
        try:
            _ = self.networks
        except ValueError as error:
            raise ValueError(f"{error}: set download.allowed_networks to networks like 10.1.2.0/24") from None

    @property
    def networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """allowed_networks, read."""
        return tuple(ip_network(network) for network in self.allowed_networks)

    @property
    def agent(self) -> str:
        """Value of the User-Agent header."""
        where = f" (+{self.contact})" if self.contact else ""
        return f"{self.user_agent}/{_release()}{where}"
