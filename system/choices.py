"""The words that settings of evaluations and exports use; apart, as the configuration waits for no torch."""

from typing import Literal

Layout = Literal["auto", "dataset", "folder", "webdataset", "segmentation"]
Task = Literal["retrieval", "zero_shot", "knn", "linear_probe", "masked", "segmentation"]
Tower = Literal["student", "teacher"]
Dense = Literal["value", "plain"]
