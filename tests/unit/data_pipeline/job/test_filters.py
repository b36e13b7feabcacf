"""Filters: what is dropped, by which reason, at which limit; and lists that fit 100 million entries."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError, DataError
from cluster.store import open_store
from data_pipeline.image.header import ImageHeader, read_header
from data_pipeline.ingest.sources import REASONS as SOURCE_REASONS
from data_pipeline.ingest.sources import SourceConfig
from data_pipeline.ingest.table_source import TableConfig
from data_pipeline.job.filters import (
    REASONS,
    FilterConfig,
    MetadataRule,
    RowFilter,
    check_columns,
    check_header,
)
from data_pipeline.job.lists import ListConfig, canonical_url, lists_digest, load_list, write_list
from data_pipeline.records import Reject, SourceRow
from system.recipe import validate
from tests.support.paths import ROOT
from tests.support.raw_input import encode, noise


def row(caption: str = "a caption", url: str | None = "https://example.org/a.jpg", **meta: Any) -> SourceRow:
    return SourceRow(0, 0, "key", "t#0", caption, meta, b"image", url)


def header(width: int, height: int) -> ImageHeader:
    return ImageHeader(format="jpeg", width=width, height=height, components=3, bits=8)


def reason(reject: Reject | None) -> str | None:
    assert reject is None or reject.reason in REASONS
    return reject and reject.reason


def of_row(one: SourceRow, **config: Any) -> str | None:
    return reason(RowFilter(FilterConfig(**config))(one))


def test_by_default_every_row_and_every_sane_image_is_kept() -> None:
    for one in (row(""), row("a " * 5000), row("x", None), row("x", "no address", similarity=None)):
        assert of_row(one) is None
    config = FilterConfig()
    assert check_header(row(), header(1, 5000), config) is None
    assert reason(check_header(row(), header(14_000, 14_000), config)) == "too_many_pixels"


@pytest.mark.parametrize(
    ("config", "caption", "wanted"),
    [
        ({"caption_min_chars": 5}, "abcd", "caption_too_short"),
        ({"caption_min_chars": 5}, " ab \n cd ", None),  # "ab cd"
        ({"caption_min_words": 3}, "two words", "caption_too_short"),
        ({"caption_min_words": 3}, "three whole words", None),
        ({"caption_max_chars": 5}, "abcdef", "caption_too_long"),
        ({"caption_max_chars": 5}, "  abcde  ", None),
        ({"max_word_share": 0.5}, "buy buy buy buy shoes now", "repetitive_caption"),
        ({"max_word_share": 0.5}, "buy buy buy shoes right now", None),
        ({"max_word_share": 0.5}, "dog dog dog", None),  # too short to be judged
        ({"max_repeated_runs": 0.3}, "red shoes sale red shoes sale red shoes sale", "repetitive_caption"),
        ({"max_repeated_runs": 0.3}, "red shoes on sale in the town of red shoes", None),
        ({"caption_languages": ("en",)}, "Un chien dans la rue", "wrong_language"),
        ({"caption_languages": ("en", "fr")}, "Un chien dans la rue", None),
        ({"caption_languages": ("en",)}, "happy birthday card with balloons", None),
        ({"caption_languages": ("en",)}, "IMG_2034", None),  # the detector is not sure
        ({"caption_languages": ("en",), "language_unsure": "drop"}, "IMG_2034", "wrong_language"),
        ({"caption_languages": ("en",), "language_confidence": 0.999}, "Un chien dans la rue", None),
    ],
)
def test_captions_are_dropped_beyond_the_limit_and_kept_at_it(
    config: dict, caption: str, wanted: str | None
) -> None:
    assert of_row(row(caption), **config) == wanted


@pytest.mark.parametrize(
    ("rule", "value", "wanted"),
    [
        ({"min": 0.28}, 0.28, None),
        ({"min": 0.28}, 0.27, "metadata_refused"),
        ({"max": 0.5}, 0.5, None),
        ({"max": 0.5}, 0.51, "metadata_refused"),
        ({"min": 0, "max": 1}, "0.5", None),  # csv has text
        ({"min": 0, "max": 1}, " 2 ", "metadata_refused"),
        ({"min": 0, "max": 1}, True, None),
        ({"max": 1}, 10**400, "metadata_missing"),
        ({"min": 0.28}, "high", "metadata_missing"),
        ({"min": 0.28}, "nan", "metadata_missing"),
        ({"min": 0.28}, float("nan"), "metadata_missing"),
        ({"min": 0.28}, None, "metadata_missing"),
        ({"min": 0.28}, "", "metadata_missing"),
        ({"min": 0.28}, [1], "metadata_missing"),
        ({"min": 0.28, "missing": "keep"}, None, None),
        ({"min": 0.28, "missing": "keep"}, 0.1, "metadata_refused"),
        ({"values": ("UNLIKELY", "UNSURE")}, "UNSURE", None),
        ({"values": ("UNLIKELY", "UNSURE")}, "NSFW", "metadata_refused"),
        ({"values": ("UNLIKELY",)}, None, "metadata_missing"),
        ({"values": ("0",)}, 0, None),
    ],
)
def test_metadata_rules_hold_for_numbers_text_and_what_is_missing(
    rule: dict, value: object, wanted: str | None
) -> None:
    metadata = {"field": MetadataRule(**rule)}
    assert of_row(row(field=value), metadata=metadata) == wanted
    absent = None if rule.get("missing") == "keep" else "metadata_missing"
    assert of_row(row(), metadata=metadata) == absent


def test_a_reject_keeps_where_the_row_came_from_and_says_what_was_wrong() -> None:
    metadata = {"similarity": MetadataRule(min=0.28)}
    one = row(similarity=0.2)
    reject = RowFilter(FilterConfig(metadata=metadata))(one)
    assert reject is not None
    assert (reject.source, reject.url, reject.retriable) == (one.source, one.url, False)
    assert reject.detail == "similarity: 0.2 is below 0.28"


@pytest.mark.parametrize(
    ("config", "size", "wanted"),
    [
        ({"min_side": 100}, (100, 300), None),
        ({"min_side": 100}, (300, 99), "too_small"),
        ({"min_pixels": 10_000}, (100, 100), None),
        ({"min_pixels": 10_000}, (100, 99), "too_small"),
        ({"max_side": 300}, (300, 1), None),
        ({"max_side": 300}, (1, 301), "side_too_long"),
        ({"max_aspect": 3.0}, (100, 300), None),
        ({"max_aspect": 3.0}, (301, 100), "too_elongated"),
        ({"max_pixels": 10_000}, (100, 100), None),
        ({"max_pixels": 10_000}, (100, 101), "too_many_pixels"),
        ({"max_bytes": 5}, (1, 1), None),
        ({"max_bytes": 4}, (1, 1), "too_many_bytes"),
    ],
)
def test_images_are_dropped_beyond_the_limit_and_kept_at_it(
    config: dict, size: tuple[int, int], wanted: str | None
) -> None:
    assert reason(check_header(row(), header(*size), FilterConfig(**config))) == wanted


def test_the_header_of_a_real_image_is_what_is_tested() -> None:
    image = encode(noise(96, 64))
    one = SourceRow(0, 0, "k", "s", "c", {}, image)
    assert check_header(one, read_header(image), FilterConfig(min_side=64, max_side=96)) is None
    reject = check_header(one, read_header(image), FilterConfig(min_side=65))
    assert reject is not None
    assert reject.detail == "96 x 64, a side is below 65"


@pytest.fixture
def listed(tmp_path: Path) -> Callable[..., tuple[str, ...]]:
    def write(*lines: str, name: str = "list.txt") -> tuple[str, ...]:
        data = "".join(f"{line}\n" for line in lines).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return (str(tmp_path / name),)

    return write


Listed = Callable[..., tuple[str, ...]]


def test_deny_and_allow_lists_of_addresses_domains_and_keys(listed: Listed) -> None:
    urls = ListConfig(urls=listed("# a comment", "", "HTTPS://Example.org:443/a.jpg#part", name="urls.txt"))
    assert of_row(row(), deny=urls) == "denied"
    assert of_row(row(url="https://example.org/A.jpg"), deny=urls) is None
    assert of_row(row(), allow=urls) is None
    assert of_row(row(url="https://example.org/b.jpg"), allow=urls) == "not_allowed"
    assert of_row(row(url=None), allow=urls) == "not_allowed"
    assert of_row(row(url=None), deny=urls) is None

    domains = ListConfig(domains=listed("example.org", "*.bücher.example", name="domains.txt.gz"))
    for url, inside in [
        ("https://example.org/x", True),
        ("http://a.b.EXAMPLE.org.:8080/x", True),
        ("https://user@images.example.org", True),
        ("https://notexample.org/x", False),
        ("https://example.org.evil.test/x", False),
        ("https://x.test/example.org", False),
        ("https://bilder.xn--bcher-kva.example/x", True),
        ("https://bücher.example/x", True),
        ("http://[::1", False),
        ("", False),
    ]:
        assert of_row(row(url=url), deny=domains) == ("denied" if inside else None), url
        assert of_row(row(url=url), allow=domains) == (None if inside else "not_allowed"), url

    keys = ListConfig(keys=listed("key", name="keys.txt"))
    assert of_row(row(), deny=keys) == "denied"
    assert of_row(row(), allow=keys) is None
    assert of_row(row(), allow=keys, deny=domains) == "denied"  # deny wins, whatever is allowed
    assert of_row(row(), allow=keys, deny=keys) == "denied"


def test_lists_of_hashes_are_tested_when_the_bytes_are_there(listed: Listed) -> None:
    image = hashlib.sha256(b"image").hexdigest()
    there = ListConfig(sha256=listed(image.upper()))
    config = FilterConfig(deny=there)
    assert RowFilter(config)(row()) is None
    assert reason(check_header(row(), header(9, 9), config)) == "denied"
    assert check_header(row(), header(9, 9), FilterConfig(allow=there)) is None
    other = SourceRow(0, 0, "k", "s", "c", {}, b"other")
    assert check_header(other, header(9, 9), config) is None
    assert reason(check_header(other, header(9, 9), FilterConfig(allow=there))) == "not_allowed"


def test_a_mapped_list_is_the_list(listed: Listed, tmp_path: Path) -> None:
    lines = [f"https://example.org/{i}" for i in range(5000)]
    (text,) = listed(*lines, lines[0])
    assert write_list("urls", text, tmp_path / "list.npy") == 5000
    mapped = load_list("urls", (str(tmp_path / "list.npy"),))
    assert isinstance(mapped._arrays[0], np.memmap)
    assert (tmp_path / "list.npy").stat().st_size < 5000 * 8 + 200
    both = load_list("urls", (text, str(tmp_path / "list.npy")))
    assert all(mapped.has(line) and both.has(line) for line in lines)
    assert not any(mapped.has(f"{line}x") or both.has(f"{line}x") for line in lines)


ENTRY = st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), min_size=1)


@settings(max_examples=50, deadline=None)
@given(st.sets(ENTRY.filter(lambda entry: not entry.startswith("#"))))
def test_a_list_holds_its_entries_and_no_others(entries: set[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.txt"
        path.write_text("".join(f"{entry}\n" for entry in entries), "utf-8", newline="\n")
        one = load_list("keys", (str(path),))
    assert all(one.has(entry) for entry in entries)
    assert not any(one.has(f"{entry}+") for entry in entries if f"{entry}+" not in entries)


def test_a_list_that_grew_is_read_again_and_has_another_digest(listed: Listed) -> None:
    deny = ListConfig(keys=listed("other"))
    before = lists_digest(deny)
    assert of_row(row(), deny=deny) is None
    listed("other", "key")
    assert of_row(row(), deny=deny) == "denied"
    assert lists_digest(deny) != before
    assert lists_digest(deny, ListConfig()) != lists_digest(ListConfig(), deny)


def test_lists_are_read_from_an_object_store(listed: Listed, s3_env: str, tmp_path: Path) -> None:
    (text,) = listed("key")
    write_list("keys", text, tmp_path / "list.npy")
    for name in ("list.txt", "list.npy"):
        open_store(s3_env).put_file(f"lists/{name}", tmp_path / name)
        deny = ListConfig(keys=(f"{s3_env}/lists/{name}",))
        assert of_row(row(), deny=deny) == "denied"
        assert lists_digest(deny) == lists_digest(ListConfig(keys=(str(tmp_path / name),)))


def test_lists_that_cannot_be_read_are_errors_by_name(listed: Listed, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.txt: no such file: .*filters\.deny\.urls"):
        RowFilter(FilterConfig(deny=ListConfig(urls=(f"{tmp_path}/none.txt",))))
    with pytest.raises(DataError, match=r"list\.txt: line 2: 'abc' is not a sha256"):
        RowFilter(FilterConfig(deny=ListConfig(sha256=listed("a" * 64, "abc"))))
    np.save(tmp_path / "wrong.npy", np.array([3, 2], dtype=np.uint64))
    with pytest.raises(DataError, match=r"wrong\.npy: not a list of hashes in order"):
        RowFilter(FilterConfig(deny=ListConfig(urls=(f"{tmp_path}/wrong.npy",))))
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(DataError, match=r"text\.npy: not a list"):
        RowFilter(FilterConfig(deny=ListConfig(urls=(f"{tmp_path}/text.npy",))))


def test_addresses_are_compared_in_one_form() -> None:
    assert canonical_url("HTTP://User:Pw@EXAMPLE.org:80") == "http://User:Pw@example.org/"
    assert canonical_url("https://example.org:8443/A?b=C#d") == "https://example.org:8443/A?b=C"
    assert canonical_url("http://[2001:DB8::1]:80/") == "http://[2001:db8::1]/"
    assert canonical_url("https://a.example") == canonical_url("https://a.example/?") == "https://a.example/"
    for odd in ("", "no address", "http://[::1", "http://x:port/", "mailto:a@b"):
        assert canonical_url(odd) == odd


@given(st.text("aZ09.-_~%é日/?#&=: \t", max_size=20))
@example(" ?")
def test_the_case_of_scheme_and_host_never_counts_and_the_form_is_final(rest: str) -> None:
    plain = canonical_url(f"https://example.org/{rest}")
    assert canonical_url(f"HTTPS://Example.ORG:443/{rest}") == plain
    assert canonical_url(plain) == plain


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"min_side": 0}, "filters.min_side"),
        ({"max_bytes": -1}, "filters.max_bytes"),
        ({"max_aspect": 0.5}, "filters.max_aspect"),
        ({"min_side": 5, "max_side": 4}, "filters.min_side"),
        ({"min_pixels": 60_000_000}, "filters.min_pixels"),
        ({"caption_min_chars": 5, "caption_max_chars": 4}, "filters.caption_min_chars"),
        ({"max_word_share": 1.5}, "filters.max_word_share"),
        ({"language_confidence": 0.0}, "filters.language_confidence"),
    ],
)
def test_an_impossible_limit_is_an_error_that_names_its_key(config: dict, key: str) -> None:
    with pytest.raises(ValueError, match=re.escape(key)):
        FilterConfig(**config)


def test_impossible_rules_are_errors() -> None:
    with pytest.raises(ValueError, match=r"tests nothing: set its min, max or values"):
        MetadataRule()
    with pytest.raises(ValueError, match=r"min 2 is above max 1: change filters\.metadata"):
        MetadataRule(min=2, max=1)


def test_a_rule_for_a_column_that_the_table_does_not_give_is_an_error() -> None:
    def source(meta: Any) -> SourceConfig:
        table = TableConfig(url_column="u", caption_columns=("c",), meta_columns=meta)
        return SourceConfig(uri="x", kind="table", table=table)

    filters = FilterConfig(metadata={"similarity": MetadataRule(min=0.28)})
    check_columns(source(("similarity",)), filters)
    check_columns(source("all"), filters)
    check_columns(SourceConfig(uri="x"), filters)
    with pytest.raises(ConfigError, match=r"tests similarity, .*source\.table\.meta_columns"):
        check_columns(source(("punsafe",)), filters)


def test_every_reason_is_in_the_documentation() -> None:
    page = ROOT / "docs/sources.md"
    lines = page.read_text("utf-8").splitlines()
    for stage, reasons in (("source", SOURCE_REASONS), ("filters", REASONS)):
        assert [line for line in lines if f"| {stage} |" in line] == [
            f"| `{reason}` | {stage} | {meaning} |" for reason, meaning in reasons.items()
        ]
        assert all(re.fullmatch("[a-z_]+", reason) for reason in reasons)


def test_a_recipe_makes_filters() -> None:
    values = {
        "min_side": 64,
        "caption_languages": ["en"],
        "metadata": {"similarity": {"min": 0.28}, "NSFW": {"values": ["UNLIKELY"], "missing": "keep"}},
        "deny": {"domains": ["lists/deny.txt"]},
    }
    config = validate(FilterConfig, json.loads(json.dumps(values)), "recipe.yaml")
    assert config.metadata["similarity"] == MetadataRule(min=0.28)
    assert config.deny == ListConfig(domains=("lists/deny.txt",))
    with pytest.raises(ConfigError, match=r"metadata\.similarity\.mn: unknown key"):
        validate(FilterConfig, {"metadata": {"similarity": {"mn": 1}}}, "recipe.yaml")
