"""The curve of how_to/train_with_few_clips: its draws, its runs, its intervals and its pictures."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import train
from conftest import TINY
from tutorial import few_clips

RATE = 4e-4  # of the tiny model, for all weights


@pytest.fixture(scope="module")
def start():
    torch.manual_seed(0)
    return few_clips.load(str(TINY), ["a", "b"])


@pytest.fixture(scope="module")
def rows(clips_folder):
    return train.load_clips(str(clips_folder))


@pytest.fixture(scope="module")
def learn(rows, start):
    return few_clips.read(rows["train"], start, mirror=True)


def weights(model):
    return {name: value.clone() for name, value in model.named_parameters()}


def test_draws_are_nested_balanced_and_differ(capsys):
    truth = torch.tensor([0] * 12 + [1] * 9)
    small, large = (few_clips.draw(truth, [size] * 2, 3) for size in (4, 8))
    assert {*small} < {*large} and np.bincount(truth[large]).tolist() == [8, 8]
    assert few_clips.draw(truth, [4, 4], 3) == small != few_clips.draw(truth, [4, 4], 4)
    assert np.bincount(truth[few_clips.draw(truth, [9, 2], 0)]).tolist() == [9, 2]
    with pytest.raises(ValueError, match="label 1 has 9 training clips, not 10"):
        few_clips.draw(truth, [10, 10], 0)
    assert few_clips.possible({5: 1, 9: 2, 20: 3}, truth) == {5: 1, 9: 2}
    assert "rarest label has 9 training clips. Left out: [20]" in capsys.readouterr().out
    with pytest.raises(ValueError, match="name a smaller size"):
        few_clips.possible({20: 3}, truth)


def test_batches_use_all_clips_before_one_comes_again():
    seen = torch.cat([*few_clips.batches(10, 4, steps=6)])
    assert len(seen) == 20  # 4 + 4 + 2, twice
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == [*range(10)]


def test_clips_are_those_of_evaluation_and_their_mirror_images(rows, start, learn):
    clip = train.read_clip(rows["train"][3]["video"]["path"], 16, 64)
    assert torch.equal(learn.pixels[3, 0], clip) and torch.equal(learn.pixels[3, 1], clip.flip(-1))
    assert learn.features.shape == (16, 2, 64)
    some = few_clips.read(rows["test"], start, most=3)
    assert some.pixels.shape == (6, 1, 16, 3, 64, 64)
    assert np.bincount(some.truth).tolist() == [3, 3]


def test_features_give_the_logits_of_the_whole_model(start, learn):
    """The quick way of the linear probe, against the model as train.py calls it."""
    args = few_clips.arguments("linear probe", RATE)
    with torch.no_grad():
        own = few_clips.logits_of(start.model, start, args, None, learn.features[:4, 1])
        whole = start.model(train.normalised(learn.pixels[:4, 1], start.processor)).logits
    assert torch.allclose(own, whole, atol=1e-5)


@pytest.mark.parametrize(
    "method, moved",
    [
        ("linear probe", r"fc_norm|classifier"),
        ("last block", r"layer\.2\.|fc_norm|classifier"),
        ("LoRA", r"lora_|modules_to_save"),
        ("all weights", r""),
    ],
)
def test_a_method_moves_the_weights_that_its_flags_name(start, learn, method, moved):
    args = few_clips.arguments(method, RATE)
    before = weights(start.model)
    one, losses = few_clips.fit(start, args, learn.some([0, 1, 2, 3]), steps=2, seed=5)
    assert len(losses) == 2 and not one.training
    assert all(torch.equal(value, before[name]) for name, value in weights(start.model).items())
    learning = {name for name, value in one.named_parameters() if value.requires_grad}
    expected = {
        name for name, _ in one.named_parameters() if pd.Series([name]).str.contains(moved)[0]
    }
    assert learning == expected
    again, same = few_clips.fit(start, args, learn.some([0, 1, 2, 3]), steps=2, seed=5)
    assert same == losses
    other, _ = few_clips.fit(start, args, learn.some([0, 1, 2, 3]), steps=2, seed=6)
    assert not torch.equal(weights(one)[max(learning)], weights(other)[max(learning)])


def test_the_rate_is_that_of_the_method_times_that_of_the_reader():
    args = few_clips.arguments("LoRA", 1e-3, "--class_weights=balanced")
    assert args.learning_rate == pytest.approx(1e-3 * few_clips.METHODS["LoRA"].rate)
    assert (args.lora_rank, args.class_weights, args.per_device_train_batch_size) == (
        8,
        "balanced",
        8,
    )


def test_the_first_step_is_that_of_train_py(start, learn, tmp_path):
    """Loss and step of ClipTrainer, with class weights and label smoothing, on the same clips."""
    flags = "--class_weights=balanced", "--warmup_steps=0", f"--output_dir={tmp_path}"
    flags += "--eval_strategy=no", "--load_best_model_at_end=false"
    args = few_clips.arguments("all weights", RATE, *flags)
    clips = learn.some([0, 1, 2, 3, 4])
    clips = clips._replace(pixels=clips.pixels[:, :1], truth=torch.tensor([0, 0, 0, 1, 0]))
    model, losses = few_clips.fit(start, args, clips, steps=1, seed=1)
    torch.manual_seed(1)
    theirs, _ = train.load_model(str(TINY), ["a", "b"])
    theirs.classifier.load_state_dict(start.model.classifier.state_dict())
    torch.manual_seed(1)
    torch.nn.init.normal_(theirs.classifier.weight, std=theirs.config.initializer_range)
    trainer = train.ClipTrainer(theirs, args, processing_class=start.processor)
    trainer.class_weights = torch.tensor([5 / 4 / 2, 5 / 1 / 2])
    inputs = {"pixel_values": clips.pixels[:, 0], "labels": clips.truth}
    loss = trainer.compute_loss(theirs.train(), inputs)
    assert losses[0] == pytest.approx(loss.item(), abs=1e-5)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), args.max_grad_norm)
    torch.optim.AdamW(train.parameter_groups(theirs, args)).step()
    for name, value in theirs.named_parameters():
        assert torch.allclose(value, weights(model)[name], atol=RATE / 10), name


def test_the_curve_has_each_run_and_learns(start, rows, learn, capsys):
    test = few_clips.read(rows["test"], start)
    methods = ["linear probe", "last block"]
    few_clips.expect(start, learn, test, methods, {2: 3, 4: 3}, 2)
    assert "The curve takes about" in capsys.readouterr().out
    runs = few_clips.curve(start, learn, test, methods, {2: 5, 8: 20}, 2, learning_rate=RATE)
    assert len(runs) == 8 and all(len(right) == 12 for right in runs.right)
    table = few_clips.summary(runs)
    assert table.columns.tolist() == ["method", "clips", "accuracy", "low", "high"]
    assert (table.low <= table.accuracy).all() and (table.accuracy <= table.high).all()
    assert (
        table[table.clips == 8].accuracy.min() > 0.5
    )  # half of the test clips are right by chance
    wide = few_clips.side_by_side(table)
    assert wide.columns.tolist() == methods and wide.index.tolist() == [2, 8]
    assert wide.loc[8, "last block"].startswith(f"{table.accuracy.iloc[-1]:.2f} (")
    figure = few_clips.curve_figure(table, chance=0.5)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert [*lines] == [*methods, "always one label"]
    assert lines["last block"].get_xdata().tolist() == [2, 8]


def test_the_interval_knows_draws_and_test_clips():
    """Draws that are alike: binomial in the clips. Draws that differ make it wider."""
    clips = np.arange(400) % 2 == 0
    value, low, high = few_clips.interval(np.stack([clips] * 4))
    assert (value, low, high) == pytest.approx((0.5, 0.451, 0.549), abs=0.006)
    differ = np.zeros((4, 400), bool)
    differ[:2] = True  # two draws are always right, two never
    value, low, high = few_clips.interval(differ)
    assert value == 0.5 and low <= 0.05 and high >= 0.95


def test_weights_find_the_rare_class(start, rows, learn):
    """16 clips, 8 of label 0 and 1 of label 1."""
    test = few_clips.read(rows["test"], start)
    table = few_clips.rare_class(start, learn, test, [8, 1], 2, steps=30, learning_rate=RATE)
    recall = table.recall.unstack()
    assert table["training clips"].tolist() == [8, 1, 8, 1]
    assert recall.loc["balanced", "b"] > recall.loc["none", "b"]


def test_pictures_of_losses_and_of_varied_and_blended_clips(rows):
    figure = few_clips.loss_figure({"good": [0.7, 0.3], "slow": [0.7, 0.69]}, classes=2)
    dashed = figure.axes[0].lines[-1]
    assert dashed.get_ydata()[0] == pytest.approx(math.log(2)) and "0.69" in dashed.get_label()
    figure = few_clips.varied(rows["train"][0]["video"]["path"], zoom=0.3, mirror=True, size=32)
    images = [axis.images[0].get_array() for axis in figure.axes]
    assert len(images) == 5 * 8 and not np.array_equal(images[0], images[8])
    figure = few_clips.blended(rows["train"], size=32)
    first, second, mixup, cutmix = (figure.axes[8 * n].images[0].get_array() for n in range(4))
    inside = (mixup >= np.minimum(first, second) - 1) & (mixup <= np.maximum(first, second) + 1)
    assert inside.all() and not np.array_equal(mixup, first)
    same = (cutmix == first).all(-1)
    assert (cutmix[~same] == second[~same]).all() and 0 < same.mean() < 1
