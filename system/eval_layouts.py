"""The words that settings of evaluations use; apart, because the configuration shall not wait for torch."""

from typing import Literal

Layout = Literal["auto", "dataset", "folder", "webdataset", "segmentation"]
Task = Literal["retrieval", "zero_shot", "knn", "linear_probe", "masked", "segmentation"]
Tower = Literal["student", "teacher"]
Dense = Literal["value", "plain"]
