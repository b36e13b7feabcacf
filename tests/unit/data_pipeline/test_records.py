"""Ids and names."""

from __future__ import annotations

import hashlib

from data_pipeline.records import INDEX_SCHEMA, sample_id, shard_names


def test_an_id_is_the_first_63_bits_of_the_sha256_of_the_source() -> None:
    bits = bin(int(hashlib.sha256("tar/ключ".encode()).hexdigest(), 16))[2:].zfill(256)
    assert sample_id("tar/ключ") == int(bits[:63], 2)


def test_ids_fit_the_index_and_differ() -> None:
    ids = [sample_id(f"00000.tar/{i:09d}") for i in range(10_000)]
    assert len(set(ids)) == len(ids)
    assert min(ids) >= 0
    assert max(ids) < 2**63
    assert str(INDEX_SCHEMA.field("id").type) == "int64"


def test_shard_names_sort_as_their_numbers() -> None:
    names = [shard_names(i, "tar")[0] for i in (0, 9, 10, 999_999)]
    assert names == sorted(names)
    assert shard_names(7, "tar") == ("shard-000007.tar", "shard-000007.arrow")
    assert shard_names(7, "arrow") == ("shard-000007.arrow", "shard-000007.arrow")
