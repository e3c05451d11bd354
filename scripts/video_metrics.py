"""How good are the masks of a whole video: DAVIS's J and F, VSPW's VC.

All functions take arrays [frames, height, width] and need no model.
"""

import math

import numpy as np
from scipy import ndimage
from segmentation_data import VOID


def region_similarity(predicted: np.ndarray, true: np.ndarray, void=None) -> np.ndarray:
    """DAVIS's J: the IoU of an object in each frame, float [frames]; 1 where it is in neither.

    bool arrays [frames, height, width]; `void` marks pixels that nobody judges. Perazzi et al.,
    "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation", CVPR 2016.
    """
    judged = True if void is None else ~void
    overlap = (predicted & true & judged).sum((1, 2))
    union = ((predicted | true) & judged).sum((1, 2))
    return np.where(union > 0, overlap / np.maximum(union, 1), 1.0)


def contour(mask: np.ndarray) -> np.ndarray:
    """The pixels of bool [height, width] that differ from their neighbour right, below, or both."""
    edge = np.pad(mask, ((0, 1), (0, 1)), "edge")
    return (mask != edge[:-1, 1:]) | (mask != edge[1:, :-1]) | (mask != edge[1:, 1:])


def contour_accuracy(predicted: np.ndarray, true: np.ndarray, void=None) -> np.ndarray:
    """DAVIS's F: the F-measure of an object's contour in each frame, float [frames].

    A contour pixel is right if the other contour is within 0.8 % of the image's diagonal. 1 where
    there is no contour in either. Arguments and source: region_similarity.
    """
    reach = math.ceil(0.008 * math.hypot(*true.shape[1:]))
    scores = []
    for i in range(len(true)):
        judged = True if void is None else ~void[i]
        ours, theirs = contour(predicted[i] & judged), contour(true[i] & judged)
        if not ours.any() or not theirs.any():
            scores.append(float(ours.any() == theirs.any()))
            continue
        near_ours, near_theirs = (
            ndimage.distance_transform_edt(~line) <= reach for line in (ours, theirs)
        )
        precision = (ours & near_theirs).sum() / ours.sum()
        recall = (theirs & near_ours).sum() / theirs.sum()
        scores.append(2 * precision * recall / max(precision + recall, 1e-9))
    return np.array(scores)


def video_consistency(predicted: np.ndarray, true: np.ndarray, length: int) -> np.ndarray:
    """VSPW's VC: of the pixels whose true label stays in `length` frames, the share whose
    predicted label stays too; one number for each window, as many as frames less `length`.

    integer arrays [frames, height, width]. Miao et al., "VSPW: A Large-scale Dataset for Video
    Scene Parsing in the Wild", CVPR 2021, and the authors' code, which ends one window early and
    takes void for a label like another.
    """
    scores = []
    for start in range(len(true) - length):
        still, still_predicted = (
            (part[start : start + length] == part[start]).all(0) for part in (true, predicted)
        )
        scores.append(
            (still & still_predicted).sum() / max(1, still.sum()) if still.any() else np.nan
        )
    return np.array(scores)


def video_scores(predicted, true, objects: list[int]) -> dict[str, list[float]]:
    """J and F of each label of `objects` that the video shows, VC8 and VC16 of each window.

    uint8 arrays [frames, height, width].
    """
    void = true == VOID
    scores = {"J": [], "F": []}
    for label in objects:
        if (true == label).any():
            masks = predicted == label, true == label, void
            scores["J"].append(region_similarity(*masks).mean())
            scores["F"].append(contour_accuracy(*masks).mean())
    for length in (8, 16):
        scores[f"VC{length}"] = video_consistency(predicted, true, length).tolist()
    return scores
