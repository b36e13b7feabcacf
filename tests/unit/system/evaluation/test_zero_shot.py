"""Class names, prompts and the score of zero-shot classification."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError, DataError
from system.evaluation.zero_shot import (
    TEMPLATES,
    ClassList,
    class_embeddings,
    evaluate_zero_shot,
    read_lines,
    read_templates,
)


def encode(texts: list[str]) -> torch.Tensor:
    """A stand-in with the encoder's contract: one unit vector per text, a pure function of the text."""
    vectors = [
        torch.randn(8, generator=torch.Generator().manual_seed(sum(map(ord, text)) + len(text)))
        for text in texts
    ]
    return torch.nn.functional.normalize(torch.stack(vectors), dim=-1)


def test_every_class_name_is_the_class_of_itself():
    names = ["dog", "hot dog", "cat", "New  York"]
    assert ClassList.of(names, "test").labels(names).tolist() == [0, 1, 2, 3]


def test_a_caption_belongs_to_the_longest_name_in_it_as_whole_words():
    classes = ClassList.of(["dog", "hot dog", "cat"], "test")
    captions = ["A hot dog, please", "the DOG: loyal, brown", "a cat and a dog", "catalogue", "", "dog"]
    assert classes.labels(captions).tolist() == [1, 0, 2, -1, -1, 0]


def test_names_are_kept_once_in_their_order():
    assert ClassList.of(["b", "A", "a ", "", "B", "c"], "test").names == ("b", "A", "c")


def test_a_list_without_names_is_an_error():
    with pytest.raises(DataError, match="no class names"):
        ClassList.of(["", "  "], "names.txt")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: str):
    path = tmp_path / "names.txt"
    path.write_text(content)
    with pytest.raises(DataError, match="the file is empty"):
        read_lines(str(path), "class_names")


def test_a_missing_file_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"class_names=.*absent\.txt"):
        read_lines(str(tmp_path / "absent.txt"), "class_names")


def test_templates_of_a_file_need_one_place_for_the_name(tmp_path: Path):
    path = tmp_path / "templates.txt"
    path.write_text("a {}.\n\n{} there\n")
    assert read_templates(str(path)) == ("a {}.", "{} there")
    path.write_text("a {c}.\n")
    assert read_templates(str(path)) == ("a {}.",)
    for wrong in ("no place", "{} and {}", "{} and {c}"):
        path.write_text(f"a {{}}.\n{wrong}\n")
        with pytest.raises(ConfigError, match=f"'{wrong}'.*correct templates"):
            read_templates(str(path))
    assert read_templates(None) == TEMPLATES


@given(batch=st.integers(1, 40), classes=st.integers(1, 12), templates=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_class_weights_are_the_unit_mean_at_any_batch(batch: int, classes: int, templates: int):
    names = [f"name {number}" for number in range(classes)]
    prompts = [f"template {number} of {{}}" for number in range(templates)]
    sizes = []

    def counted(texts: list[str]) -> torch.Tensor:
        sizes.append(len(texts))
        return encode(texts)

    weights = class_embeddings(names, prompts, counted, batch)
    assert max(sizes) <= batch
    for name, weight in zip(names, weights, strict=True):
        mean = encode([prompt.replace("{}", name) for prompt in prompts]).mean(dim=0)
        torch.testing.assert_close(weight, mean / mean.norm())


def test_score_counts_only_images_with_a_class():
    weights = torch.eye(6)
    images = torch.eye(6)[[0, 1, 2, 3]]
    result = evaluate_zero_shot(images, weights, torch.tensor([0, 1, 5, -1]), "names.txt")
    assert (result["images"], result["images_without_class"]) == (3, 1)
    assert result["top1"] == pytest.approx(2 / 3)
    assert result["mean_per_class"] == pytest.approx(2 / 3)
    sixth = pytest.approx(1 / 6)
    assert result["chance"] == {"top1": sixth, "top5": pytest.approx(5 / 6), "mean_per_class": sixth}


def test_images_that_are_their_class_are_all_right():
    labels = torch.arange(40) % 7
    result = evaluate_zero_shot(torch.eye(7)[labels], torch.eye(7), labels, "names.txt")
    assert [result[name] for name in ("top1", "top5", "mean_per_class")] == [1.0, 1.0, 1.0]
    assert result["interval"]["top1"] == [1.0, 1.0]


def test_no_image_with_a_class_is_an_error():
    with pytest.raises(DataError, match=r"names\.txt: none of its class names"):
        evaluate_zero_shot(torch.eye(3), torch.eye(3), torch.tensor([-1, -1, -1]), "names.txt")
