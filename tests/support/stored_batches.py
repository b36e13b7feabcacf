"""A data set read plainly, in stored order: what other ways of reading are compared with."""

from collections.abc import Generator
from tempfile import TemporaryDirectory

import numpy as np

from cluster.store import open_store
from data_pipeline.catalog import load_dataset
from data_pipeline.image.augment import eval_view
from data_pipeline.image.decode import UndecodableImage
from data_pipeline.loading.batch_maker import Batch, collate, undecodable
from data_pipeline.loading.tokenizer import Tokenizer
from data_pipeline.shards.dataset_reader import DatasetReader
from data_pipeline.upkeep.takedown import load_tombstones


def eval_batches(dataset_uri: str, image_size: int, batch: int) -> Generator[Batch, None, None]:
    """Every sample once, in stored order: the centre of each image, weight 1, epoch 0.

    A sample with a tombstone is black, without words and of weight 0. The last batch may be smaller. Runs in
    this process. Shards of a remote data set are held in a temporary folder, two at a time. Raises as
    `Loader`.
    """
    dataset = load_dataset(dataset_uri)
    removed = load_tombstones(open_store(dataset_uri))
    tokenizer = Tokenizer()
    starts = np.cumsum([0] + [shard.num_samples for shard in dataset.shards])
    largest = max(
        sum(dataset.files[name].size for name in {shard.name, shard.index_name}) for shard in dataset.shards
    )
    with TemporaryDirectory(prefix="maskclip-eval-") as folder:
        reader = DatasetReader(dataset, folder, 2 * largest)
        try:
            for first in range(0, dataset.num_samples, batch):
                slots = np.arange(first, min(first + batch, dataset.num_samples))
                shards = np.searchsorted(starts, slots, side="right") - 1
                images = np.zeros((len(slots), image_size, image_size, 3), np.uint8)
                captions, ids = [""] * len(slots), np.empty(len(slots), np.int64)
                for k, sample in reader.samples(shards, slots - starts[shards]):
                    ids[k] = sample.id
                    if not np.isin(sample.id, removed):
                        captions[k] = sample.caption
                        try:
                            images[k] = eval_view(bytes(sample.image), image_size)
                        except UndecodableImage as error:
                            raise undecodable(sample, error) from error
                weights = (~np.isin(ids, removed)).astype(np.float32)
                yield collate(images, captions, tokenizer, ids, np.zeros_like(slots), slots, weights)
        finally:
            reader.close()
