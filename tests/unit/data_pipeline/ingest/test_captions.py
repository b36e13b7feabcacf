"""Captions: the draw is a function of the id alone, repetition is a share, languages are told apart."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError
from data_pipeline.ingest.captions import (
    check_languages,
    choose_caption,
    detect_language,
    repeated_runs,
    visible,
    word_share,
)

TEXTS = st.lists(st.one_of(st.none(), st.sampled_from(["", " ", "\n\t", "a", "b c", "d"])), max_size=5)


@settings(deadline=None)
@given(TEXTS, st.integers(0, 2**63 - 1), st.integers(0, 100))
def test_a_choice_is_one_of_the_texts_and_never_a_blank_one(
    texts: list[str | None], sample_id: int, seed: int
) -> None:
    filled = [text for text in texts if text and text.strip()]
    assert choose_caption(texts, "first", sample_id, seed) == (filled[0] if filled else "")
    assert choose_caption(texts, "join", sample_id, seed) == " ".join(filled)
    drawn = choose_caption(texts, "draw", sample_id, seed)
    assert drawn in filled if filled else drawn == ""
    assert drawn == choose_caption(texts, "draw", sample_id, seed)


def test_draws_are_even_over_the_ids_and_differ_by_seed() -> None:
    texts = ["a", " ", "b", None, "c"]
    draws = {seed: [choose_caption(texts, "draw", i, seed) for i in range(3000)] for seed in (0, 1)}
    for drawn in draws.values():
        assert all(900 <= count <= 1100 for count in Counter(drawn).values())
    assert 900 <= sum(a == b for a, b in zip(draws[0], draws[1], strict=True)) <= 1100


def test_repetition_is_the_share_of_a_word_and_of_runs_that_stood_before() -> None:
    assert word_share(["Buy", "buy", "BUY", "now"]) == 0.75
    assert word_share(["a"]) == 1
    assert repeated_runs(["a", "b", "c", "d", "e", "f"]) == 0
    assert repeated_runs(["a", "b"]) == 0
    assert repeated_runs(["a", "b", "c"] * 3) == pytest.approx(4 / 7)  # 3 of 7 runs are new
    assert repeated_runs(["A", "b", "c", "a", "B", "C"]) == 0.25


@pytest.mark.parametrize(
    ("language", "caption"),
    [
        ("en", "happy birthday card with balloons"),
        ("en", "Portrait of a young woman smiling"),
        ("de", "Ein Hund auf der Wiese"),
        ("fr", "Un chien dans la rue"),
        ("es", "Perro corriendo por la playa"),
        ("ja", "浜辺の犬"),
        ("zh", "海滩上的狗"),
        ("ko", "해변의 개"),
        ("pl", "Czerwona sukienka damska"),
    ],
)
def test_a_caption_of_some_words_has_a_language(language: str, caption: str) -> None:
    found, probability = detect_language(caption)
    assert found == language
    assert probability > 0.3


@pytest.mark.parametrize("caption", ["a dog", "IMG_2034.jpg", "", "12345", "!!!", "iPhone 7 Plus 128GB"])
def test_of_a_few_words_the_detector_is_not_sure(caption: str) -> None:
    assert detect_language(caption)[1] < 0.2


def test_a_language_that_the_detector_does_not_know_is_named() -> None:
    check_languages(("en", "zh"))
    with pytest.raises(ConfigError, match=r"no language detector for klingon; .*filters\.caption_languages"):
        check_languages(("en", "klingon"))


UNSEEN = ["", " \n", "\ufeff", "\u200b\u200d", "\u2060 \u00ad", "\x00\x07", "\ufe0f"]


@pytest.mark.parametrize("text", UNSEEN)
def test_characters_that_cannot_be_seen_are_no_caption(text: str) -> None:
    assert not visible(text)
    assert choose_caption([text, None, "a"], "first", 1, 0) == "a"
    assert choose_caption([text], "join", 1, 0) == ""


@pytest.mark.parametrize("text", ["a", "\ufeffa", "浜", "👩\u200d🚀", "!", "e\u0301"])
def test_one_character_that_can_be_seen_is_a_caption(text: str) -> None:
    assert visible(text)
    assert choose_caption([text], "first", 1, 0) == text
