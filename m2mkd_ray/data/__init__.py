"""Images and labels: where they are found, how they are stored, imported, augmented and fed."""

from m2mkd_ray.data.augment import IMAGENET, Augmentation
from m2mkd_ray.data.catalog import DATASETS, Dataset
from m2mkd_ray.data.corruptions import CORRUPTIONS, corrupt
from m2mkd_ray.data.draft import Drafts, undrawable
from m2mkd_ray.data.eval_feed import EvalBatches
from m2mkd_ray.data.feed import Batch, Batches, FeedConfig
from m2mkd_ray.data.finish import OnDevice
from m2mkd_ray.data.importers import IMPORTERS, Importer, guess_importer, import_data
from m2mkd_ray.data.index import ClassName, DatasetFolder, Index, Split, find, rows_of_an_epoch
from m2mkd_ray.data.logit_formats import LogitsFormat, error_of
from m2mkd_ray.data.logits import Logits, LogitsAbout, LogitsWriter
from m2mkd_ray.data.shards import Row, Rows, Shard, ShardWriter
from m2mkd_ray.data.shared import BatchMaker, SharedBatches, SharedDrafts, from_arrays, stream_key

__all__ = [
    "CORRUPTIONS",
    "DATASETS",
    "IMAGENET",
    "IMPORTERS",
    "Augmentation",
    "Batch",
    "BatchMaker",
    "Batches",
    "ClassName",
    "Dataset",
    "DatasetFolder",
    "Drafts",
    "EvalBatches",
    "FeedConfig",
    "Importer",
    "Index",
    "Logits",
    "LogitsAbout",
    "LogitsFormat",
    "LogitsWriter",
    "OnDevice",
    "Row",
    "Rows",
    "Shard",
    "ShardWriter",
    "SharedBatches",
    "SharedDrafts",
    "Split",
    "corrupt",
    "error_of",
    "find",
    "from_arrays",
    "guess_importer",
    "import_data",
    "rows_of_an_epoch",
    "stream_key",
    "undrawable",
]
