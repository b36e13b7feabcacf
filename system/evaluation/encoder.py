"""Features of images and texts, each rank its share of whole batches.

Batches are cut from the whole set, not from a rank's part: every image and text stands in the same batch at
any number of ranks, so its features are the same to the bit.

Shapes: N images of the set, n of this rank's, E shared space, D width of the image tower.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from data_pipeline.loading.tokenizer import Tokenizer
from model.objective import MaskClip
from model.vision import VisionTower
from system.evaluation.data import EvalSet

Report = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


@dataclass(frozen=True)
class Share:
    """What one of `size` ranks encodes of anything that is cut into batches."""

    rank: int = 0
    size: int = 1

    def part(self, total: int, batch: int) -> range:
        """The positions of this rank: a run of whole batches (the last of all may be shorter)."""
        batches = -(-total // batch)
        first, last = (batches * rank // self.size for rank in (self.rank, self.rank + 1))
        return range(first * batch, min(last * batch, total))


def no_report(done: int, total: int) -> None:
    """For who does not want to hear."""


@dataclass
class Encoder:
    """The encoders of a model, on `device`."""

    model: MaskClip
    vision: VisionTower
    """The image tower: the model's own, or the teacher's."""
    device: torch.device
    batch: int
    share: Share

    def __post_init__(self) -> None:
        self._tokenizer = Tokenizer()

    def images(self, images: EvalSet, report: Report = no_report) -> torch.Tensor:
        """fp32 [n, E + D]: unit embeddings, and beside them the class tokens of the tower."""
        part = self.share.part(images.num_images, self.batch)
        side = self.model.config.vision.image_size
        found = []
        for batch_BCHW in images.views(part.start, part.stop, side, self.batch):
            with torch.no_grad():
                class_BD = self.vision(batch_BCHW.to(self.device))[:, 0]
                embedding_BE = self.model.embed_tokens(class_BD)
                found.append(torch.cat([embedding_BE, class_BD.float()], dim=1))
            report(sum(map(len, found)), len(part))
        width = self.model.config.embed_dim + self.model.config.vision.width
        return torch.cat(found) if found else torch.zeros(0, width, device=self.device)

    def texts(self, texts: Sequence[str], report: Report = no_report) -> torch.Tensor:
        """fp32 [n, E] unit embeddings of this rank's part of `texts`."""
        part = self.share.part(len(texts), self.batch)
        found = []
        for start in range(part.start, part.stop, self.batch):
            stop = min(start + self.batch, part.stop)
            found.append(self.encode(texts[start:stop]))
            report(stop - part.start, len(part))
        return torch.cat(found) if found else torch.zeros(0, self.model.config.embed_dim, device=self.device)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """fp32 [len(texts), E] unit embeddings, in one batch."""
        tokens = self._tokenizer.encode(texts, self.model.config.text.context_length)
        return self.model.encode_text(torch.from_numpy(tokens).to(self.device))
