"""Examples of a retrieval as pictures: queries evenly spread over the set, with their best answers.

Shapes: N images, P captions, U distinct texts, E embedding.
"""

import base64
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from data_pipeline.image.augment import eval_view
from system.evaluation.data import EvalSet
from system.evaluation.retrieval import CaptionGroups, best_matches, pair_ranks

ANSWERS = 5
PICTURE_SIDE, PICTURE_QUALITY = 96, 80


def picture(data: bytes) -> str:
    """A small JPEG of an encoded image as the model sees it, in base64."""
    file = io.BytesIO()
    Image.fromarray(eval_view(data, PICTURE_SIDE)).save(file, "JPEG", quality=PICTURE_QUALITY)
    return base64.b64encode(file.getvalue()).decode()


def retrieval_examples(
    number: int, image_NE: torch.Tensor, text_UE: torch.Tensor, groups: CaptionGroups, images: EvalSet
) -> dict:
    """`number` queries, half of them images and half texts (nothing is chosen by its result).

    A text's picture is the first that carries it, an image's caption its first.

    Returns:
        examples (image_to_text and text_to_image, best answers first) and pictures (position -> JPEG).
    """
    image_P, text_P = torch.from_numpy(images.image_P), groups.group_N
    first_of_text, first_of_image = _first(text_P), _first(image_P)
    pairs = set(zip(image_P.tolist(), text_P.tolist(), strict=True))
    device = image_NE.device
    image_P, text_P = image_P.to(device), text_P.to(device)

    def caption(image: int) -> str:
        place = first_of_image.get(image)
        return "" if place is None else images.captions[place]

    def text_picture(text: int) -> int:
        return int(images.image_P[first_of_text[text]])

    image_ranks = pair_ranks(image_NE, text_UE, image_P, text_P)
    text_ranks = pair_ranks(text_UE, image_NE, text_P, image_P)
    examples: dict[str, list[dict]] = {"image_to_text": [], "text_to_image": []}
    asked = _spread(number - number // 2, sorted(first_of_image))
    for image, scores, found in _found(asked, image_NE, text_UE):
        answers = [
            {
                "picture": text_picture(text),
                "caption": groups.texts[text],
                "score": score,
                "right": (image, text) in pairs,
            }
            for text, score in zip(found, scores, strict=True)
        ]
        rank = int(image_ranks[image]) + 1
        examples["image_to_text"].append(
            {"picture": image, "caption": caption(image), "rank": rank, "answers": answers}
        )
    asked = _spread(number // 2, range(len(groups.texts)))
    for text, scores, found in _found(asked, text_UE, image_NE):
        answers = [
            {"picture": image, "caption": caption(image), "score": score, "right": (image, text) in pairs}
            for image, score in zip(found, scores, strict=True)
        ]
        rank = int(text_ranks[text]) + 1
        examples["text_to_image"].append({"caption": groups.texts[text], "rank": rank, "answers": answers})
    shown = {
        item["picture"]
        for listed in examples.values()
        for example in listed
        for item in (example, *example["answers"])
        if "picture" in item
    }
    places = sorted(shown)
    read = zip(places, images.files(places), strict=True)
    return {"examples": examples, "pictures": {str(place): picture(data) for place, (_, data) in read}}


def _first(number_P: torch.Tensor) -> dict[int, int]:
    """First place of every number."""
    numbers, places = np.unique(number_P.numpy(), return_index=True)
    return dict(zip(numbers.tolist(), places.tolist(), strict=True))


def _spread(number: int, choices: Sequence[int]) -> list[int]:
    """`number` (at most all) of the choices at equal distances."""
    number = min(number, len(choices))
    return [choices[k * len(choices) // number] for k in range(number)]


def _found(
    asked: list[int], query_QE: torch.Tensor, gallery_GE: torch.Tensor
) -> list[tuple[int, list[float], list[int]]]:
    """Each query with the scores and the places of its best matches."""
    if not asked:
        return []
    scores, found = best_matches(query_QE[asked], gallery_GE, ANSWERS)
    return list(zip(asked, scores.tolist(), found.tolist(), strict=True))
