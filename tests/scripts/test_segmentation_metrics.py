"""The metrics of scripts/train_segmentation.py: by hand, and against an independent package."""

import math

import numpy as np
import pytest
import segmentation_data as sd
import torch
import train_segmentation as ts
import video_metrics as vm
from PIL import Image
from scipy import ndimage

V = sd.VOID
NAMES = ["sky", "road", "tree", "car"]


def scores(*batches, names=NAMES):
    """pixel_scores of pairs (predicted, true)."""
    metric = ts.pixel_metric(len(names))
    for pair in batches:
        metric.update(*(torch.tensor(part) for part in pair))
    return ts.pixel_scores(metric, names)


# ---- Pixels

PREDICTED = [[0, 0, 0, 1, 1, 3, 2, 0]]
TRUE = [[0, 0, 1, 1, 1, 0, V, V]]  # sky 3 pixels, road 3, tree and car in none


def test_scores_by_hand():
    """sky: 2 right of 2 + 1 + 1; road: 2 of 3; car: predicted, but in no truth."""
    found = scores((PREDICTED, TRUE))
    assert found == pytest.approx(
        {
            "miou": (2 / 4 + 2 / 3) / 2,  # not over tree and car
            "fwiou": 3 / 6 * 2 / 4 + 3 / 6 * 2 / 3,
            "accuracy": 4 / 6,
            "iou_sky": 2 / 4,
            "iou_road": 2 / 3,
        }
    )


def test_what_is_predicted_where_the_truth_is_void_changes_nothing():
    other = [[*PREDICTED[0][:6], 1, 3]]
    assert scores((other, TRUE)) == scores((PREDICTED, TRUE))
    assert scores((PREDICTED, TRUE), ([[1, 2]], [[V, V]])) == scores((PREDICTED, TRUE))


def test_batches_add_up_to_their_pixels():
    draw = torch.Generator().manual_seed(0)
    predicted = torch.randint(4, (6, 3, 5, 7), generator=draw)
    true = torch.randint(4, predicted.shape, generator=draw)
    true[torch.rand(true.shape, generator=draw) < 0.2] = V
    true[:2][true[:2] == 3] = V  # no car in the first batch
    whole = scores((predicted.tolist(), true.tolist()))
    parts = [
        (p.tolist(), t.tolist()) for p, t in zip(predicted.split(2), true.split(2), strict=True)
    ]
    assert scores(*parts) == pytest.approx(whole)
    # And not the mean over the batches.
    assert np.mean([scores(part)["miou"] for part in parts]) != pytest.approx(whole["miou"])


def test_fwiou_is_the_sum_of_frequency_times_iou():
    """As VSPW has it, from a confusion matrix made here."""
    rng = np.random.default_rng(0)
    true = rng.choice([0, 1, 2, V], 500, p=[0.7, 0.2, 0.05, 0.05])
    predicted = np.where(
        rng.random(500) < 0.6, np.where(true == V, 3, true), rng.integers(0, 4, 500)
    )
    found = scores((predicted.tolist(), true.tolist()))
    judged = true != V
    iou = {}
    for label in range(3):
        ours, theirs = (predicted == label) & judged, true == label
        iou[label] = (ours & theirs).sum() / (ours | theirs).sum()
        assert found[f"iou_{NAMES[label]}"] == pytest.approx(iou[label])
    expected = sum((true == label).sum() / judged.sum() * value for label, value in iou.items())
    assert found["fwiou"] == pytest.approx(expected)
    assert found["miou"] == pytest.approx(np.mean([*iou.values()]))


def test_all_right_is_1_and_all_wrong_is_0():
    assert set(scores(([[0, 2]], [[0, 2]])).values()) == {1}
    assert set(scores(([[2, 0]], [[0, 2]])).values()) == {0}


def test_a_metric_that_was_reset_starts_anew():
    metric = ts.pixel_metric(4)
    metric.update(torch.tensor([[3, 3]]), torch.tensor([[0, 1]]))
    ts.pixel_scores(metric, NAMES)
    metric.reset()
    metric.update(torch.tensor(PREDICTED), torch.tensor(TRUE))
    assert ts.pixel_scores(metric, NAMES) == scores((PREDICTED, TRUE))


def test_many_labels_are_not_listed_one_by_one():
    names = [f"class {i}" for i in range(30)]
    labels = [[*range(25)]]
    assert {*scores((labels, labels), names=names)} == {"miou", "fwiou", "accuracy"}


# ---- J


def squares(*places, size=(20, 20), side=4):
    """bool [frames, height, width]: a square at (row, column), or nothing where None stands."""
    masks = np.zeros((len(places), *size), bool)
    for mask, place in zip(masks, places, strict=True):
        if place:
            mask[place[0] : place[0] + side, place[1] : place[1] + side] = True
    return masks


def test_region_similarity_by_hand():
    true = squares((4, 4), (4, 4), (4, 4), None, None)
    predicted = squares((4, 4), (4, 6), None, (4, 4), None)
    # Half of each square is shared in frame 1: 8 of 24 pixels.
    assert vm.region_similarity(predicted, true).tolist() == [1, 8 / 24, 0, 0, 1]


def test_void_is_no_part_of_region_similarity():
    true, predicted = squares((4, 4), None, (4, 4)), squares((4, 6), (4, 6), (4, 6))
    # Void is what the prediction has beside the object, then all of the prediction.
    void = squares((4, 8), (4, 6), (4, 6))
    assert vm.region_similarity(predicted, true, void).tolist() == [8 / 16, 1, 0]


# ---- F


def test_the_contour_lies_half_a_pixel_towards_the_origin():
    mask = np.zeros((5, 5), bool)
    mask[2:4, 2:4] = True
    expected = np.zeros((5, 5), bool)
    expected[1, 1:4] = expected[3, 1:4] = expected[1:4, 1] = expected[1:4, 3] = True
    assert (vm.contour(mask) == expected).all()
    assert not vm.contour(np.ones((5, 5), bool)).any()  # the picture's border is no contour


def test_contour_accuracy_by_hand():
    """20 x 20 pixels: the tolerance is ceil(0.008 * 28.3) = 1 pixel."""
    true = squares((4, 4), (4, 4), (4, 4), (4, 4), None, None)
    predicted = squares((4, 4), (4, 5), (14, 14), None, (4, 4), None)
    assert vm.contour_accuracy(predicted, true).tolist() == [1, 1, 0, 0, 0, 1]


def test_the_tolerance_grows_with_the_picture():
    """A horizontal edge, so that each contour pixel is as far away as the shift says."""
    for height, width, reach in ((20, 20, 1), (120, 160, 2), (480, 854, 8)):
        assert reach == math.ceil(0.008 * math.hypot(height, width))
        true = np.zeros((1, height, width), bool)
        true[:, : height // 2] = True
        for shift, expected in ((reach, 1), (reach + 1, 0)):
            assert vm.contour_accuracy(np.roll(true, shift, 1) | true, true).tolist() == [expected]


def test_contour_accuracy_weighs_precision_and_recall():
    """A second square that is not there: half of the predicted contour is wrong."""
    true = squares((2, 2))
    predicted = true | squares((12, 12))
    assert vm.contour_accuracy(predicted, true) == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert vm.contour_accuracy(true, predicted) == pytest.approx(2 * 0.5 * 1 / 1.5)


def test_void_is_no_part_of_contour_accuracy():
    true, wrong = squares((2, 2)), squares((12, 12))
    assert vm.contour_accuracy(true | wrong, true, void=wrong).tolist() == [1]
    assert vm.contour_accuracy(wrong, true & False, void=wrong).tolist() == [1]


# ---- J and F against vos-benchmark, whose F is that of DAVIS's own code


@pytest.fixture(scope="module")
def vos():
    """vos-benchmark without opencv-python, whose wheel needs libGL: the headless one does too."""
    reason = (
        "needs: pip install --no-deps vos-benchmark==0.1.0 opencv-python-headless==5.0.0.93 "
        "scikit-image==0.26.0 lazy-loader==0.6"
    )
    for name in ("cv2", "skimage", "lazy_loader"):
        pytest.importorskip(name, reason=reason)
    pytest.importorskip("vos_benchmark", reason=reason)
    from vos_benchmark import benchmark

    return benchmark


def blobs(rng, height, width, labels, share):
    """Random labels in smooth regions, which touch the borders too; some are missing."""
    noise = ndimage.gaussian_filter(rng.random((labels, height, width)), (0, 2, 2))
    mask = noise.argmax(0)
    mask[ndimage.gaussian_filter(rng.random((height, width)), 3) < np.quantile(noise, share)] = 0
    return mask.astype(np.uint8)


def test_j_and_f_of_single_frames_are_those_of_vos_benchmark(vos):
    """It has no void, and no entry for an object before its first frame."""
    compared = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        height, width = rng.integers(16, 150, 2)
        true = blobs(rng, height, width, 3, rng.choice([0.2, 0.5, 0.8]))
        near = ndimage.shift(true, rng.integers(-4, 5, 2), order=0)
        predicted = near if seed % 2 else blobs(rng, height, width, 3, 0.5)
        if seed % 7 == 0:
            predicted = np.where(predicted == 1, 0, predicted)  # an object that is missed
        evaluator = vos.Evaluator()
        evaluator.feed_frame(predicted, true)
        for label in {1, 2} & {*np.unique(true), *np.unique(predicted)}:
            pair = (predicted == label)[None], (true == label)[None]
            (j,), (f,) = evaluator.object_iou[label], evaluator.boundary_f[label]
            assert vm.region_similarity(*pair).tolist() == pytest.approx([j])
            assert vm.contour_accuracy(*pair).tolist() == pytest.approx([f])
            compared += 0 < f < 1
    assert compared > 60


def test_j_and_f_of_whole_videos_are_those_it_reads_from_our_files(vos, tmp_path):
    """write_mask's files, over all frames. An object that comes later counts here from frame 0."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        first = blobs(rng, 40, 60, 4, 0.2)
        true = np.stack([ndimage.shift(first, (0, i), order=0) for i in range(5)])
        predicted = np.stack([ndimage.shift(t, rng.integers(-2, 3, 2), order=0) for t in true])
        for kind, masks in (("true", true), ("ours", predicted)):
            for i, mask in enumerate(masks):
                sd.write_mask(tmp_path / kind / str(seed) / f"{i:05d}.png", mask)
        read = vos.VideoEvaluator(tmp_path / "true", tmp_path / "ours", skip_first_and_last=False)
        _, j, f = read(str(seed))
        found = vm.video_scores(predicted, true, range(1, 4))
        labels = [label for label in range(1, 4) if (true == label).any()]
        assert labels and sorted(j) == labels == np.unique(first)[1:].tolist()
        assert found["J"] == pytest.approx([j[label] / 100 for label in labels])
        assert found["F"] == pytest.approx([f[label] / 100 for label in labels])
        assert 0.1 < np.mean(found["F"]) < 1


def test_a_reader_of_davis_gets_the_same_values_back(tmp_path):
    labels = np.random.default_rng(0).integers(0, 256, (30, 40)).astype(np.uint8)
    sd.write_mask(tmp_path / "new" / "00000.png", labels)
    with Image.open(tmp_path / "new" / "00000.png") as image:
        assert image.mode == "P" and image.format == "PNG"
        assert (np.array(image) == labels).all()
        colours = np.array(image.convert("RGB"))
    assert (colours == np.array(sd.PALETTE).reshape(-1, 3)[labels]).all()


# ---- VC


def test_video_consistency_by_hand():
    """Pixels over time, one below the other; windows of 3 frames in 5: two, as VSPW's code ends."""
    true = np.array([[0, 1, 2, 0], [0, 1, 2, 1], [0, 1, 2, 1], [0, 1, 3, 1], [0, 0, 3, 1]])
    predicted = np.array([[0, 1, 2, 2], [0, 1, 1, 2], [0, 1, 2, 2], [1, 1, 3, 2], [1, 1, 3, 2]])
    # Window 0: pixels 0, 1 and 2 stay, predicted 0 and 1 do. Window 1: 0, 1 and 3 stay, predicted
    # 1 and 3 do, for it does not matter whether the label that stays is the right one.
    found = vm.video_consistency(predicted[:, None], true[:, None], 3)
    assert found.tolist() == pytest.approx([2 / 3, 2 / 3])


@pytest.mark.parametrize("length, windows", [(8, 2), (9, 1), (10, 0), (16, 0)])
def test_there_are_as_many_windows_as_frames_less_their_length(length, windows):
    still = np.zeros((10, 4, 4), np.uint8)
    assert vm.video_consistency(still, still, length).tolist() == [1] * windows


def test_a_prediction_that_stays_is_1_and_one_that_flickers_is_less():
    rng = np.random.default_rng(0)
    true = np.repeat(rng.integers(0, 3, (1, 12, 12)), 12, 0)
    assert vm.video_consistency(np.full_like(true, 2), true, 8).tolist() == [1] * 4
    flicker = np.where(rng.random(true.shape) < 0.02, 1, true)
    found = vm.video_consistency(flicker, true, 8)
    assert ((0.5 < found) & (found < 1)).all()
    assert (vm.video_consistency(flicker, true, 4)[:4] >= found).all()  # shorter is easier


def test_where_the_truth_moves_nobody_is_judged():
    true = np.arange(10)[:, None, None] % 2 + np.zeros((1, 4, 4), int)
    assert np.isnan(vm.video_consistency(true, true, 8)).all()
    true[:, 0, 0] = 1  # one pixel stays
    predicted = np.arange(10)[:, None, None] + np.zeros((1, 4, 4), int)
    predicted[:, 0, 0] = 0
    assert vm.video_consistency(predicted, true, 8).tolist() == [1, 1]


def test_void_is_a_label_like_another_for_video_consistency_as_in_vspws_code():
    true = np.full((4, 1, 2), V)
    true[:, 0, 1] = 1
    predicted = np.array([[[0, 1]], [[1, 1]], [[0, 1]], [[1, 1]]])
    assert vm.video_consistency(predicted, true, 2).tolist() == [0.5, 0.5]


# ---- A whole video


def test_video_scores_are_those_of_the_labels_that_the_video_shows():
    true = np.zeros((10, 20, 20), np.uint8)
    true[squares(*[(4, 4)] * 10)] = 2
    true[:, 15:] = V
    predicted = np.where(true == V, 1, true).astype(np.uint8)  # wrong where nobody judges
    found = vm.video_scores(predicted, true, range(1, 4))
    assert found == {"J": [1], "F": [1], "VC8": [1, 1], "VC16": []}
    predicted[5:] = 0
    assert vm.video_scores(predicted, true, range(1, 4))["J"] == [0.5]
