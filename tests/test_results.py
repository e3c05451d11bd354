"""Notebook 4's figures and pictures, on data whose right answer is known."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train
from cells import run_cell
from sklearn.metrics import f1_score

NB = "04_results"


@pytest.fixture(scope="module")
def tools():
    """What the cells of section 4 know by then."""
    import pandas as pd

    return run_cell(NB, "intervals", math=math, pd=pd)


def scores(tools, true, pred, labels="ab"):
    given = dict(tools, truth=torch.tensor(true), predicted=torch.tensor(pred), labels=list(labels))
    return run_cell(NB, "scores", **given)


def test_wilson_by_hand(tools):
    """Wilson (1927): centre (p + z^2/2n) / (1 + z^2/n), for 8 of 10."""
    z, n, p = 1.959964, 10, 0.8
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert tools["share"](8, 10) == pytest.approx((0.8, centre - half, centre + half), abs=1e-6)
    assert tools["share"](10, 10)[1:] == pytest.approx((0.722467, 1), abs=1e-6)
    assert all(map(math.isnan, tools["share"](0, 0)))


def test_bootstrap_of_a_mean_is_the_binomial_one(tools):
    """The mean of 400 clips, half of them right: 0.5 -+ 1.96 x 0.025."""
    right = np.arange(400) % 2.0
    value, low, high = tools["bootstrap"](lambda x, axis: x.mean(axis), right)
    assert (value, low, high) == pytest.approx((0.5, 0.451, 0.549), abs=0.005)


def test_the_difference_is_paired(tools):
    """One clip of a hundred differs; unpaired, the interval would reach below -0.1."""
    video = np.arange(100) % 2.0
    still = video.copy()
    still[1] = 0
    hits = dict.fromkeys([0], still)
    cell = run_cell(
        NB,
        "against",
        **tools | {
            "value": SimpleNamespace(idxmax=lambda: 0), "truth": torch.ones(100, dtype=int),
            "labels": ["a", "b"], "majority": "b", "some": torch.arange(100), "count": 100,
            "video_hits": video, "still_hits": hits,
        },
    )  # fmt: skip
    value, low, high = cell["against"].loc["all frames - best still"]
    assert value == pytest.approx(0.01) and 0 <= low and high <= 0.04
    assert cell["against"].value["always b"] == 1


def test_scores_by_hand(tools):
    """Class a: 3 clips, 2 found, 1 wrongly called so; class b: 4 clips, 3 found."""
    table = scores(tools, [0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1, 1])["scores"]
    assert table.value["accuracy"] == pytest.approx(5 / 7)
    assert table.value["a: recall"] == table.value["a: precision"] == pytest.approx(2 / 3)
    assert table.value["b: recall"] == table.value["b: precision"] == pytest.approx(3 / 4)
    assert table.value["macro F1"] == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert list(table.clips) == [7, 7, 3, 3, 4, 4]
    assert (table.low <= table.value).all() and (table.value <= table.high).all()


@pytest.mark.parametrize("labels", ["ab", "abcd"])
def test_macro_f1_is_scikit_learn_s(tools, labels):
    dice = np.random.default_rng(0)
    true, pred = dice.integers(0, len(labels), (2, 60))
    cell = scores(tools, true, pred, labels)
    assert cell["scores"].value["macro F1"] == pytest.approx(f1_score(true, pred, average="macro"))
    both = cell["macro_f1"](np.stack([true, pred]), np.stack([pred, pred]))
    assert both == pytest.approx([f1_score(true, pred, average="macro"), 1])


def test_perfect_constant_absent_and_alone(tools):
    perfect = scores(tools, [0, 1, 0, 1], [0, 1, 0, 1])["scores"]
    assert (perfect.value == 1).all() and perfect.low["accuracy"] < 0.6 < perfect.high["accuracy"]
    constant = scores(tools, [0, 1, 0, 1], [0, 0, 0, 0])["scores"]
    assert (constant.value["b: recall"], constant.clips["b: precision"]) == (0, 0)
    assert math.isnan(constant.value["b: precision"])
    assert constant.value["macro F1"] == pytest.approx(1 / 3)
    absent = scores(tools, [0, 0, 1], [0, 0, 1], "abc")["scores"]
    assert math.isnan(absent.value["c: recall"]) and absent.value["macro F1"] == 1
    alone = scores(tools, [0], [0])["scores"]
    assert alone.value["macro F1"] == 1 and math.isnan(alone.low["macro F1"])


def test_calibration_by_hand(tools):
    """Ten clips at 0.75, all right, and ten at 0.95, five right: 0.5 x 0.25 + 0.5 x 0.45."""
    sure = torch.tensor([0.75] * 10 + [0.95] * 10)
    probabilities = torch.stack([sure, 1 - sure], 1)
    truth = torch.tensor([0] * 15 + [1] * 5)
    cell = run_cell(
        NB, "calibration", **tools | {
            "probabilities": probabilities, "truth": truth, "labels": ["a", "b"],
            "y_true": truth.numpy(), "y_pred": np.zeros(20, int),
        },
    )  # fmt: skip
    table = cell["reliability"]
    assert cell["ece"] == pytest.approx(0.35, abs=1e-6)
    assert list(table.clips) == [10, 10] and list(table.right) == [1, 0.5]
    assert ((table.right - table.confidence).abs() * table.clips).sum() / 20 == pytest.approx(0.35)


def test_the_file_has_what_the_series_reads_and_no_nan(tools, tmp_path):
    table = scores(tools, [0, 0, 1], [0, 0, 1], "abc")["scores"]
    run_cell(
        NB, "figures", json=json, output=tmp_path, scores=table, against=table, several=table,
        reliability=table, value=table.value, ece=0.1, truth=[0, 0, 1],
    )  # fmt: skip
    text = (tmp_path / "results.json").read_text()
    figures = json.loads(text)
    assert (figures["accuracy"], figures["best_single_frame"], figures["clips"]) == (1, 1, 3)
    assert figures["scores"]["c: recall"]["value"] is None and "NaN" not in text


def test_the_sources_of_the_curves_are_compared_to_the_printed_digits():
    history = [{"eval_loss": 0.43416}, {"eval_loss": 0.5, "eval_f1": 0.8}]
    given = {"state": {"log_history": history}, "best": {"eval_loss": min, "eval_f1": max}}
    for published, agree in [(0.4342, True), (0.435, False)]:
        cell = run_cell(
            NB, "agreement", **given, published={"eval_loss": [0.6, published], "eval_f1": []}
        )
        assert cell["rows"]["min eval_loss"] == [0.43416, published, agree]
        assert cell["rows"]["max eval_f1"][2] is False  # nothing has come yet
    given["best"] = {"loss": min}  # a run that ended before its first line
    assert run_cell(NB, "agreement", **given, published={"loss": []})["rows"] == {}


class Shape(torch.nn.Module):
    """A video model whose logit for label 1 is the mean of one block of the clip."""

    config = SimpleNamespace(num_frames=8, image_size=16)

    def forward(self, pixel_values):
        block = pixel_values[:, 2:4, :, 8:12, 4:8].mean((1, 2, 3, 4))
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(block), 9 * block], 1))


def test_occlusion_finds_the_block_and_nothing_else():
    model = Shape()
    tools = run_cell(NB, "saliency", torch=torch, config=model.config, saliency_grid=[4, 4])
    pixels = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = tools["saliency"](model, pixels, 1, torch.zeros_like(pixels))
    assert found.shape == (4, 4, 4)
    expected = torch.zeros(4, 4, 4)
    expected[1, 2, 1] = 9 * pixels[2:4, :, 8:12, 4:8].mean()  # the whole of the log-odds
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    against = tools["saliency"](model, pixels, 0, torch.zeros_like(pixels))
    torch.testing.assert_close(against, -expected, atol=1e-4, rtol=1e-4)


def test_what_is_painted_over_is_what_the_map_names():
    model = Shape()
    auto = SimpleNamespace(from_config=lambda config: model)
    given = {"torch": torch, "config": model.config, "device": "cpu", "window": (2, 3, 4, 4)}
    tools = run_cell(NB, "saliency-check", **given, AutoModelForVideoClassification=auto)
    pixels = torch.ones(8, 3, 16, 16)
    number = 1 * 16 + 2 * 4 + 1  # time 1, row 2, column 1
    grid = torch.Size([4, 4, 4])
    painted = tools["hidden"](pixels, torch.zeros_like(pixels), torch.tensor([number]), grid)
    assert painted.sum() == pixels.numel() - 2 * 3 * 4 * 4
    assert model(pixel_values=painted[None]).logits[0, 1] == 0
    assert tools["blur"](pixels).shape == pixels.shape


@pytest.fixture(scope="module")
def trained(tmp_path_factory, clips_folder):
    """An untrained tiny model and drawn clips: (trainer of 3 views x 3 crops, its test rows)."""
    from conftest import TINY

    folder = tmp_path_factory.mktemp("views")
    args = train.parse_arguments(
        ["--dataset", str(clips_folder), "--output_dir", str(folder), "--eval_views", "3"]
        + ["--eval_crops", "3", "--dataloader_num_workers", "0", "--precision", "fp32"]
    )
    rows = train.load_clips(str(clips_folder))
    model, processor = train.load_model(str(TINY), rows["train"].features["label"].names)
    return train.make_trainer(args, rows, model, processor), rows["test"]


def test_views_are_judged_as_the_training_script_judges_them(tools, trained, tmp_path):
    trainer, rows = trained
    wanted = trainer.predict(train.Clips(rows, trainer.args, training=False)).predictions
    model, processor = trainer.model.eval(), trainer.processing_class
    files = [row["path"] for row in rows["video"]]
    given = {"torch": torch, "train": train, "config": model.config, "model": model}
    given |= {"processor": processor, "device": "cpu", "sampling_rate": 0, "output": tmp_path}
    given |= {"files": files, "keys": [f"{'ab'[label]}/x.mp4" for label in rows["label"]]}
    given |= {"split": "test", "tqdm": lambda items, _: items}
    judged = run_cell(NB, "predict", **given | {"labels": ["a", "b"]})
    cell = run_cell(
        NB, "views", **tools | judged | {
            "views": 3, "crops": 3, "views_clips": 5, "some": torch.arange(len(files)).flip(0),
        },
    )  # fmt: skip
    ours = cell["answers"][3, 3].softmax(-1)
    theirs = torch.tensor(wanted).softmax(-1).flip(0)[:5]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert list(cell["several"]["passes for each"]) == [1, 3, 9]
    with pytest.raises(ValueError, match=r"test/ has clips of \['b'\]; the model knows \['a', 'c'"):
        run_cell(NB, "predict", **given | {"labels": ["a", "c"]})


def gallery(truth, predicted, tmp_path):
    """The clips that the gallery shows, of a hand-made split."""
    import matplotlib.pyplot as plt

    (tmp_path / "pictures").mkdir()
    count = len(truth)
    sure = torch.linspace(0.6, 0.9, count)
    columns = torch.arange(2).expand(count, 2)
    right = torch.tensor(predicted)[:, None]
    cell = run_cell(
        NB, "gallery", torch=torch, plt=plt, output=tmp_path, labels=["a", "b"],
        probabilities=torch.where(columns == right, sure[:, None], 1 - sure[:, None]),
        truth=torch.tensor(truth), predicted=torch.tensor(predicted), confidence=sure.numpy(),
        clips=torch.zeros(count, 4, 3, 8, 8, dtype=torch.uint8),
        config=SimpleNamespace(num_frames=4),
    )  # fmt: skip
    plt.close("all")
    return cell


def test_the_gallery_begins_with_the_surest_error(tmp_path):
    cell = gallery([0, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 1], tmp_path)
    assert cell["chosen"][:2] == [3, 0] and cell["errors"] == [3, 0]
    assert not set(cell["chosen"][2:]) & {0, 3}


@pytest.mark.parametrize("truth, predicted", [([0], [0]), ([0], [1])])
def test_a_gallery_of_one_clip(tmp_path, truth, predicted):
    assert gallery(truth, predicted, tmp_path)["chosen"] == [0]


# ---- Intervals in a long video


@pytest.mark.parametrize(
    "other, expected",
    [
        ((2, 6), 1), ((2, 4), 0.5), ((0, 8), 0.5), ((4, 8), 1 / 3),
        ((6, 9), 0), ((8, 9), 0), ((0, 2), 0),
    ],
)  # fmt: skip
def test_overlap_by_hand(other, expected):
    overlap = run_cell(NB, "segments")["overlap"]
    assert overlap((2, 6), other) == overlap(other, (2, 6)) == pytest.approx(expected)


ONE, TWO = (2.0, 6.0), (10.0, 14.0)


@pytest.mark.parametrize(
    "found, true, hits",
    [
        ([(*TWO, 0.6), (*ONE, 0.9)], [ONE, TWO], 2),  # exact, in any order
        ([(2, 4, 0.9)], [ONE], 1),  # an IoU of 0.5 is enough
        ([(2, 3.99, 0.9)], [ONE], 0),
        ([(0, 8.01, 0.9)], [ONE], 0),  # too long is as wrong as too short
        ([(2, 5, 0.7), (2, 6, 0.9)], [ONE], 1),  # a true one counts once
        ([], [ONE], 0),
        ([(*ONE, 0.9)], [], 0),
        ([], [], 0),
        # The better score takes the one that fits it best, and leaves the other no partner.
        ([(2, 6, 0.7), (3, 7, 0.9)], [(2, 6), (4.5, 9)], 1),
        ([(2, 6, 0.9), (3, 7, 0.7)], [(2, 6), (4, 9)], 2),
    ],
)  # fmt: skip
def test_right_intervals_by_hand(found, true, hits):
    right_intervals = run_cell(NB, "segments")["right_intervals"]
    before = list(true)
    found = [{"start": start, "end": end, "score": score} for start, end, score in found]
    assert right_intervals(found, true) == hits
    assert true == before  # the next cell reads it again
