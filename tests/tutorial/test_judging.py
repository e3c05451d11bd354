"""How far a model can be trusted: the functions of the guide judge_a_model, on known answers."""

import base64
import json
import math
from types import SimpleNamespace

import inference
import numpy as np
import pytest
import torch
import train
from conftest import TINY
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from torchmetrics.functional.classification import multiclass_calibration_error
from tutorial import judging, results

# ---- Differences ---------------------------------------------------------------------------------


def test_the_difference_is_paired():
    """One clip of a hundred differs; unpaired, the interval would reach below -0.1."""
    ours = np.arange(100) % 2.0
    theirs = ours.copy()
    theirs[1] = 0
    value, low, high = judging.difference(ours, theirs)
    assert value == pytest.approx(0.01) and 0 <= low and high <= 0.04


def test_the_difference_by_hand():
    """100 clips of 400: the mean is 0.25, its deviation sqrt(0.25 x 0.75 / 400) = 0.0217."""
    ours = torch.arange(400) < 100  # bool tensors too
    found = judging.difference(ours, torch.zeros(400, dtype=torch.bool))
    assert found == pytest.approx((0.25, 0.25 - 0.0424, 0.25 + 0.0424), abs=0.006)
    value, low, high = judging.difference([1, 1, 1], [0, 0, 0])
    assert value == 1 and math.isnan(low) and math.isnan(high)  # the draws cannot differ


def test_the_table_of_baselines_compares_the_same_clips():
    rows = {"all frames": (0.9, 0.8, 0.95, 80), "one frame only": (0.5, 0.3, 0.7, 4)}
    table = results.table(rows, "accuracy")
    longer = judging.same_clips(table, torch.tensor([True, True, True, False]))
    assert list(longer.index) == ["all frames", "all frames, the same 4 clips", "one frame only"]
    assert list(longer.iloc[1]) == [0.75, *results.share(3, 4)[1:], 4]
    assert list(longer.clips) == [80, 4, 4]
    assert judging.same_clips(table, torch.ones(80)) is table


def test_the_judgement_answers_by_its_interval():
    given = {
        "above": (0.3, 0.1, 0.5), "below": (-0.3, -0.5, -0.1), "around": (0.1, -0.1, 0.3),
        "touches": (0.1, 0.0, 0.3), "none": (1.0, math.nan, math.nan),
    }  # fmt: skip
    table = judging.judgement(given)
    assert list(table.answer) == ["yes", "no, the reverse", *["not clear"] * 3]
    assert table.loc["above"].tolist() == ["yes", 0.3, 0.1, 0.5]
    (axis,) = judging.judgement_figure(table).axes
    bars = [line.get_xdata() for line in axis.lines if len(line.get_xdata()) == 2]
    assert [0.1, 0.5] in [list(bar) for bar in bars]
    assert [text.get_text() for text in axis.get_yticklabels()][0] == "above\nyes"
    top, bottom = axis.get_ylim()
    assert top > bottom  # the first question stands at the top


def test_figures_are_added_to_those_of_notebook_4(tmp_path):
    here = SimpleNamespace(output=tmp_path)
    table = judging.judgement({"better?": (1.0, math.nan, math.nan)})
    assert judging.save(here, clips=3)["clips"] == 3  # without notebook 4
    (tmp_path / "results.json").write_text(json.dumps({"threshold": 0.7, "clips": 80}))
    figures = judging.save(here, clips=4, judgement=table)
    assert figures == results.saved(here)
    assert (figures["threshold"], figures["clips"]) == (0.7, 4)
    row = {"answer": "not clear", "difference": 1.0, "low": None, "high": None}
    assert figures["judgement"] == {"better?": row}  # no NaN, which is no JSON


def test_the_page_is_one_file_with_table_and_pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").write_bytes(b"picture")
    table = judging.judgement({"is 1 < 2?": (0.12345, 0.1, 0.2)})
    file = judging.page(SimpleNamespace(output=tmp_path), "On 9 clips", table, ["one"])
    text = file.read_text()
    assert file == tmp_path / "judgement.html"
    assert (
        "<h1>On 9 clips</h1>" in text
        and "is 1 &lt; 2?" in text
        and "0.123<" in text
        and ">question<" in text
    )
    assert base64.b64encode(b"picture").decode() in text
    with pytest.raises(FileNotFoundError, match=r"two\.png"):
        judging.page(SimpleNamespace(output=tmp_path), "", table, ["two"])


# ---- Calibration ---------------------------------------------------------------------------------


def test_calibration_by_hand():
    """Ten clips at 0.75, all right, and ten at 0.95, five right: 0.5 x 0.25 + 0.5 x 0.45."""
    confidence = torch.tensor([0.75] * 10 + [0.95] * 10)
    hits = torch.tensor([True] * 15 + [False] * 5)
    table = judging.calibration(confidence, hits)
    assert list(table.clips) == [10, 10] and list(table.right) == [1, 0.5]
    assert ((table.right - table.confidence).abs() * table.clips).sum() / 20 == pytest.approx(0.35)
    assert tuple(table.loc[1, ["right", "low", "high"]]) == results.share(5, 10)
    axis, counts = judging.calibration_figure(table, 0.35, (0.04, 0.2)).axes
    first, second = axis.get_title().split("\n")
    assert first == "20 clips: mean probability 0.85, share of right ones 0.75"
    assert second == "Calibration error 0.35, honest model: 0.04 to 0.20"
    assert [bar.get_height() for bar in counts.patches] == [10, 10]


def test_calibration_is_that_of_the_libraries():
    """The points are scikit-learn's, and their mean distance from the line is torchmetrics'."""
    dice = np.random.default_rng(0)
    sure = dice.uniform(0.5, 1, 300)
    hits = dice.uniform(size=300) < sure**2
    table = judging.calibration(sure, hits)
    right, promised = calibration_curve(hits, sure, n_bins=10)
    np.testing.assert_allclose(table.right, right)
    np.testing.assert_allclose(table.confidence, promised)
    error = ((table.right - table.confidence).abs() * table.clips).sum() / 300
    probabilities = torch.tensor(np.stack([sure, 1 - sure], 1))
    truth = torch.tensor(~hits).long()  # label 0 is predicted throughout
    theirs = multiclass_calibration_error(probabilities, truth, 2, n_bins=10)
    assert error == pytest.approx(theirs.item(), abs=1e-6)


def test_the_calibration_error_of_an_honest_model():
    """One bin of 400 clips at 0.8: the error is |hits / 400 - 0.8|, whose deviation is 0.02."""
    low, high = judging.chance_error(torch.full((400,), 0.8))
    assert 0 <= low < 0.003 and high == pytest.approx(2.24 * 0.02, abs=0.003)
    assert judging.chance_error(np.ones(50)) == (0, 0)  # sure, and so right
    dice, errors = np.random.default_rng(1), []
    sure = dice.uniform(0.5, 1, 80)
    probabilities = torch.tensor(np.stack([sure, 1 - sure], 1))
    for _ in range(200):  # beside the error that the guide prints
        truth = torch.tensor(dice.random(80) > sure).long()
        errors.append(multiclass_calibration_error(probabilities, truth, 2, n_bins=10).item())
    low, high = judging.chance_error(sure)
    assert np.mean((low <= np.array(errors)) & (np.array(errors) <= high)) > 0.9


# ---- Several views -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, clips_folder):
    """An untrained tiny model and drawn clips: (trainer of 3 views x 3 crops, its test rows)."""
    folder = tmp_path_factory.mktemp("views")
    args = train.parse_arguments(
        ["--dataset", str(clips_folder), "--output_dir", str(folder), "--eval_views", "3"]
        + ["--eval_crops", "3", "--dataloader_num_workers", "0", "--precision", "fp32"]
    )
    rows = train.load_clips(str(clips_folder))
    model, processor = train.load_model(str(TINY), rows["train"].features["label"].names)
    return train.make_trainer(args, rows, model, processor), rows["test"].select(range(4))


def test_views_are_judged_as_the_training_script_judges_them(trained):
    trainer, rows = trained
    wanted = trainer.predict(train.Clips(rows, trainer.args, training=False)).predictions
    model, processor = trainer.model.eval(), trainer.processing_class
    labels = [model.config.id2label[i] for i in range(2)]
    sizes = model.config.num_frames, model.config.image_size, 0
    classifier = inference.Classifier(model, processor, labels, *sizes)
    files, truth = [row["path"] for row in rows["video"]], torch.tensor(rows["label"])
    clips = [results.Clip(file, label) for file, label in zip(files, rows["label"], strict=True)]
    seen = judging.views(clips, classifier, parts=3, crops=3)
    ours, theirs = seen.mean((1, 2)).softmax(-1), torch.tensor(wanted).softmax(-1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    pixels = results.read(clips[:2], classifier)
    one = judging.views(clips[:2], classifier, parts=1, crops=1)  # the clip of the tutorial
    assert one.shape == (2, 1, 1, 2)
    torch.testing.assert_close(one[:, 0, 0].exp(), results.predict(pixels, classifier))
    table = judging.views_table(truth == 0, seen, truth)
    assert list(table.index) == ["1 view", "3 parts of time", "3 parts x 3 squares"]
    assert table.accuracy.iloc[2] == (theirs.argmax(-1) == truth).float().mean()


def test_the_table_of_views_by_hand():
    """Two clips; only the second square of the third part makes both of them right."""
    seen = torch.zeros(2, 3, 3, 2)
    seen[..., 0] = 1  # label 0 by a little in all views
    seen[:, 2, 0, 1] = 20  # and label 1 by much in one view that is not of the central square
    table = judging.views_table([True, True], seen, torch.tensor([1, 1]))
    assert list(table.accuracy) == [1, 0, 1] and list(table.clips) == [2, 2, 2]


# ---- Saliency ------------------------------------------------------------------------------------


class Shape(torch.nn.Module):
    """A video model whose logit for label 1 is the mean of one block of the clip."""

    config = SimpleNamespace(num_frames=8, image_size=16)
    device = torch.device("cpu")

    def forward(self, pixel_values):
        block = pixel_values[:, 2:4, :, 8:12, 4:8].mean((1, 2, 3, 4))
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(block), 9 * block], 1))


NUMBER = 1 * 16 + 2 * 4 + 1  # of the block of Shape: time 1, row 2, column 1
PROCESSOR = SimpleNamespace(image_mean=[0.0] * 3, image_std=[1.0] * 3)
CLASSIFIER = SimpleNamespace(model=Shape(), processor=PROCESSOR)


def bright() -> torch.Tensor:
    """A dark clip whose block of Shape is bright: uint8 [8, 3, 16, 16]."""
    clip = torch.full((8, 3, 16, 16), 10, dtype=torch.uint8)
    clip[2:4, :, 8:12, 4:8] = 255
    return clip


def test_occlusion_finds_the_block_and_nothing_else():
    pixels = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = judging.occlusion(Shape(), pixels, 1, torch.zeros_like(pixels))
    expected = torch.zeros(4, 4, 4)
    expected[1, 2, 1] = 9 * pixels[2:4, :, 8:12, 4:8].mean()  # the whole of the log-odds
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    against = judging.occlusion(Shape(), pixels, 0, torch.zeros_like(pixels))
    torch.testing.assert_close(against, -expected, atol=1e-4, rtol=1e-4)


def test_the_passes_of_question_5_are_counted(monkeypatch):
    """A model that counts the clips that it is asked about."""
    asked = []

    class Counts(Shape):
        def forward(self, pixel_values):
            asked.append(len(pixel_values))
            return super().forward(pixel_values)

    monkeypatch.setattr(
        judging, "AutoModelForVideoClassification", SimpleNamespace(from_config=lambda _: Counts())
    )
    classifier = SimpleNamespace(model=Counts(), processor=PROCESSOR)
    clips, labels = torch.stack([bright()] * 3), [1] * 3
    maps = judging.saliency(clips, labels, classifier)
    judging.without_blocks(clips, maps, labels, classifier)
    judging.ranks(clips[:2], maps[:2], labels[:2], classifier)
    assert sum(asked) == judging.passes(3)


def test_blocks_cover_clips_that_they_do_not_divide():
    numbers = judging.blocks((5, 3, 7, 10), (2, 3, 4))
    assert numbers.shape == (5, 1, 7, 10) and numbers.unique().tolist() == list(range(24))
    assert numbers[0, 0, 0, 0] == 0 and numbers[-1, 0, -1, -1] == 23
    assert (numbers[2:].unique() >= 12).any() and (numbers[:2] < 12).all()  # time comes first


def test_what_is_hidden_is_what_the_map_names():
    pixels = torch.ones(8, 3, 16, 16)
    painted = judging.hidden(pixels, torch.zeros_like(pixels), [NUMBER])
    assert painted.sum() == pixels.numel() - 2 * 3 * 4 * 4
    assert Shape()(pixel_values=painted[None]).logits[0, 1] == 0
    assert judging.blurred(pixels).shape == pixels.shape
    assert judging.mean_colour(bright().float())[0, :, 0, 0].std() == 0


def test_the_map_of_a_clip_and_its_picture():
    clip = bright()
    (fall,) = judging.saliency(clip[None], [1], CLASSIFIER)
    assert fall.argmax() == NUMBER and fall.flatten().topk(2).values[1] < 0.1 * fall.max()
    shown = judging.painted(clip, fall)
    assert shown.shape == (8, 16, 16, 3) and shown.dtype == np.uint8
    red, _, blue = shown[2, 9, 5].astype(int)
    assert red > blue + 50  # orange, where the block lies
    red, _, blue = judging.painted(clip, -fall)[2, 9, 5].astype(int)
    assert blue > red  # purple: it speaks against
    probabilities = torch.tensor([[0.1, 0.9]])
    figure = judging.saliency_figure(clip[None], [fall], torch.tensor([0]), probabilities, "ab")
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert isinstance(figure, Figure) and "b  90%  (wrong, it is a)" in titles


def test_hiding_the_important_blocks_lowers_the_probability_most():
    clip = bright()
    maps = judging.saliency(clip[None], [1], CLASSIFIER)
    table = judging.without_blocks(clip[None], maps, [1], CLASSIFIER)
    assert table.whole[0] > 0.99 and table["top hidden"][0] < 0.9
    assert table["random hidden"][0] > table["top hidden"][0]
    flat = judging.without_blocks(clip[None], [-maps[0]], [1], CLASSIFIER)  # a map that is wrong
    assert flat["top hidden"][0] == pytest.approx(flat.whole[0], abs=1e-3)


def test_random_weights_lose_the_order_of_the_blocks(monkeypatch):
    """The untrained model here answers with noise; the trained one by its block, painted or not."""

    class Noise(Shape):
        def forward(self, pixel_values):
            logits = torch.sin(1e3 * pixel_values.double().sum((1, 2, 3, 4))).float()
            return SimpleNamespace(logits=torch.stack([0 * logits, logits], 1))

    monkeypatch.setattr(
        judging, "AutoModelForVideoClassification", SimpleNamespace(from_config=lambda _: Noise())
    )
    clip = torch.randint(
        0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    clip[2:4, :, 8:12, 4:8] = 255
    maps = judging.saliency(clip[None], [1], CLASSIFIER)
    before = torch.random.get_rng_state()
    table = judging.ranks(clip[None], maps, [1], CLASSIFIER)
    assert list(table) == ["blurred", "random weights"] and len(table) == 1
    assert table.blurred[0] > abs(table["random weights"][0])
    assert (torch.random.get_rng_state() == before).all()


def test_the_clips_of_the_maps_are_spread_from_unsure_to_sure():
    truth = torch.tensor([1] * 9 + [0])
    sure = torch.linspace(0.1, 0.95, 10)  # the first four are wrong
    probabilities = torch.stack([1 - sure, sure], 1)
    assert judging.spread(probabilities, truth, 1, 3) == [5, 7, 8]
    assert judging.spread(probabilities, truth, 1, 50) == [5, 6, 7, 8]
    assert judging.spread(probabilities, truth, 0, 2) == [5, 8]  # no right one: other labels
    wrong = judging.spread(probabilities[5:9], 1 - truth[5:9], 1, 2)
    assert wrong == [3, 0]  # no right clip at all: wrong ones
