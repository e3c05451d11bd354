"""The notebooks' figures, by what a reader sees in them; model sizes, and folders of clips."""

import json
import shutil
from types import SimpleNamespace

import av
import numpy as np
import prepare_clips
import pytest
import torch
import train
from conftest import ROOT
from local_mode import clips as drawn
from PIL import Image
from transformers import VideoMAEConfig
from tutorial import account, clip_folder, model_size, pictures

LABELS = ["not_raising_hand", "raising_hand"]


@pytest.fixture(scope="module")
def clips(clips_folder):
    return prepare_clips.load_clips(str(clips_folder))


def left_titles(figure):
    return [t for t in (axis.get_title(loc="left") for axis in figure.axes) if t]


def numbered_video(path, count=40, rate=20, width=64, height=48):
    """Frame i is grey, of brightness 5 i + 10."""
    frames = (np.full((height, width, 3), 5 * i + 10, np.uint8) for i in range(count))
    drawn.write_video(path, frames, rate)
    return path


# ---- Figures ------------------------------------------------------------------------------------
def test_a_figure_is_saved_where_the_notebooks_look(tmp_path, clips):
    figure = pictures.moments([clips["train"][0]["video"]["path"]], lambda times: [0])
    assert pictures.save(account.read_run(tmp_path), figure, "one") is figure
    pictures.save(tmp_path / "new", figure, "two")  # a folder will do
    for path in (tmp_path / "pictures" / "one.png", tmp_path / "new" / "pictures" / "two.png"):
        assert Image.open(path).width == round(figure.get_figwidth() * 80)


def test_contact_sheet_shows_labels_times_and_pictures(clips):
    figure = pictures.contact_sheet(clips["test"], clips_per_label=2, frames_per_clip=5)
    assert len(figure.axes) == 4 * 5
    assert left_titles(figure) == [LABELS[0]] * 2 + [LABELS[1]] * 2
    times = [axis.texts[0].get_text() for axis in figure.axes[:5]]
    seconds = [float(text.removesuffix(" s")) for text in times]
    assert seconds == sorted(seconds) and seconds[-1] > 1 and seconds[0] > 0
    assert np.ptp(figure.axes[0].images[0].get_array()) > 100
    figure.canvas.draw()
    first = pictures.contact_sheet(clips["test"], clips_per_label=2, labels=1)
    assert left_titles(first) == [LABELS[0]] * 2


def test_contact_sheet_names_what_is_wrong(clips, tmp_path):
    with pytest.raises(ValueError, match="no clips"):
        pictures.contact_sheet(clips["train"].select([]))
    bad = tmp_path / "train" / "dancing" / "bad.mp4"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"not a video at all")
    with pytest.raises(ValueError, match="cannot decode .*bad.mp4"):
        pictures.read_frames(bad, 3)
    with pytest.raises(ValueError, match="cannot decode .*bad.mp4"):
        pictures.frames_at(bad, [0.1])


def test_frames_are_those_of_their_time(tmp_path):
    path = numbered_video(tmp_path / "v.mp4")  # 2 seconds
    times, frames = zip(*pictures.read_frames(path, 4), strict=True)
    assert times == pytest.approx([0.25, 0.75, 1.25, 1.75])
    assert [round((f.mean() - 10) / 5) for f in frames] == [5, 15, 25, 35]
    found = pictures.frames_at(path, [1.75, 0.0, 1.02])  # in any order; the next frame at most
    assert [round((f.mean() - 10) / 5) for f in found] == [35, 0, 20]


def test_a_phone_held_upright_is_shown_upright(tmp_path):
    path = tmp_path / "turned.mp4"
    video = np.zeros((20, 48, 64, 3), np.uint8)
    video[:, :, :32] = 255  # the left half is white
    drawn.write_video(tmp_path / "plain.mp4", video, 10)
    with av.open(str(tmp_path / "plain.mp4")) as plain:
        turned = [pictures.upright(f) for f in plain.decode(video=0)]
    assert turned[0].shape == (48, 64, 3)
    frame = SimpleNamespace(rotation=-90, to_ndarray=lambda format: video[0])
    assert pictures.upright(frame).shape == (64, 48, 3)
    assert pictures.upright(frame)[:32].mean() == 255  # turned by a quarter, clockwise
    assert not path.exists()


def test_strips_show_the_whole_clip_in_order():
    ramp = torch.arange(16, dtype=torch.uint8)[:, None, None, None].expand(16, 3, 8, 8)
    figure = pictures.strips([ramp, ramp.permute(0, 2, 3, 1)], ["one", "two"], columns=8)
    for row in (figure.axes[:8], figure.axes[8:]):
        assert [int(axis.images[0].get_array().max()) for axis in row] == [*range(1, 16, 2)]
    assert left_titles(figure) == ["one", "two"]
    short = pictures.strips([ramp[:3]], ["short"], columns=8)  # no frame twice
    assert sum(len(axis.images) for axis in short.axes) == 3


def test_predictions_are_labelled_and_coloured():
    clips = torch.zeros(3, 16, 3, 8, 8, dtype=torch.uint8)
    shares = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8]])
    figure = pictures.predictions(clips, [0, 1, 0], shares, LABELS)
    assert left_titles(figure) == [
        "not_raising_hand  90%  (right)",
        "raising_hand  70%  (right)",
        "raising_hand  80%  (wrong, it is not_raising_hand)",
    ]
    colours = [axis._left_title.get_color() for axis in figure.axes[::8]]
    assert colours == [pictures.RIGHT, pictures.RIGHT, pictures.WRONG]


def test_moments_of_a_video_say_what_the_model_says_there(tmp_path):
    path = numbered_video(tmp_path / "lesson.mp4")
    smoothed = [[0.9, 0.1], [0.25, 0.75]]
    answer = {"labels": LABELS, "duration": 2.0, "times": [0.5, 1.5], "smoothed": smoothed}
    figure = pictures.moments_of_video(path, answer, columns=4)
    texts = [axis.texts[0].get_text() for axis in figure.axes]
    assert texts[0] == "0.2 s\n90%\nnot raising\nhand" and texts[3] == "1.8 s\n75%\nraising hand"
    assert "lesson.mp4" in figure._suptitle.get_text()


def test_moments_are_the_chosen_frames_at_their_times(tmp_path):
    path = numbered_video(tmp_path / "v.mp4")
    figure = pictures.moments([path], lambda times: train.frame_indices(times, 4, 0, 0.5))
    every, chosen = figure.axes[0].lines
    assert len(every.get_xdata()) == 40
    assert chosen.get_xdata() == pytest.approx([t / 0.0195 for t in (0.25, 0.75, 1.25, 1.75)])
    assert figure.axes[0].get_yticklabels()[0].get_text() == "2.0 s, 20 frames a second"


def test_learning_rates_fall_from_head_to_patches():
    groups = [{"lr": 0.1 * 0.5**i} for i in (0, 0, 1, 1, 2, 2, 3)]
    figure = pictures.learning_rates(groups)
    axis = figure.axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["head", "block 2", "block 1", "patches"]
    assert list(axis.lines[0].get_xdata()) == pytest.approx([0.1, 0.05, 0.025, 0.0125])
    assert pictures.learning_rates([{"lr": 1.0}]).axes[0].get_yticklabels()[0].get_text() == "all"


def test_curves_are_those_of_the_history():
    history = [
        {"epoch": 0.5, "loss": 0.7}, {"epoch": 1.0, "loss": 0.6},
        {"epoch": 1.0, "eval_loss": 0.65, "eval_accuracy": 0.75}, {"epoch": 1.0, "train_loss": 0.6},
    ]  # fmt: skip
    left, right = pictures.curves(history).axes
    drawn_lines = {line.get_label(): [*line.get_ydata()] for line in left.lines}
    assert drawn_lines == {"training": [0.7, 0.6], "validation": [0.65]}
    assert [*right.lines[0].get_ydata()] == [0.75]
    pictures.curves([])  # a run without an evaluation


# ---- Model size ---------------------------------------------------------------------------------
def test_gflop_of_vit_b_is_what_a_calculator_gives():
    """1,568 tokens: 12 blocks of 1568 * 12 * 768^2 + 2 * 1568^2 * 768 multiply-adds."""
    assert model_size.gflop(VideoMAEConfig()) == pytest.approx(357, abs=0.5)


def test_gflop_agrees_with_what_torch_counts(native_checkpoint):
    from torch.utils.flop_counter import FlopCounterMode

    model, _ = train.load_model(str(native_checkpoint), LABELS)
    config = model.config
    model.config._attn_implementation = "eager"  # which the counter can see
    clip = torch.zeros(1, config.num_frames, 3, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=clip)
    patches = config.num_channels * config.tubelet_size * config.patch_size**2  # left out of ours
    tokens = (
        config.num_frames // config.tubelet_size * (config.image_size // config.patch_size) ** 2
    )
    embedding = 2 * tokens * patches * config.hidden_size
    head = 2 * config.hidden_size * len(LABELS)
    counted = counter.get_total_flops() - embedding - head
    assert model_size.gflop(config) * 1e9 == pytest.approx(counted, rel=0.001)


# ---- Folders of clips ---------------------------------------------------------------------------
def test_a_readers_clips_are_prepared_once(clips_folder, tmp_path, capfd):
    mine = tmp_path / "my clips"
    for split in ("train", "validation"):
        for path in sorted(clips_folder.glob(f"{split}/*/*.mp4"))[::3]:
            place = mine / path.relative_to(clips_folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    before = sorted(path.stat().st_mtime_ns for path in mine.rglob("*.mp4"))
    folder = clip_folder.prepared(mine, tmp_path / "prepared")
    names = {path.relative_to(mine) for path in mine.rglob("*.mp4")}
    assert names <= {path.relative_to(folder) for path in folder.rglob("*.mp4")}
    assert sorted(path.stat().st_mtime_ns for path in mine.rglob("*.mp4")) == before
    assert clip_folder.prepared(folder, tmp_path / "again") == folder  # as it is
    assert not (tmp_path / "again").exists()

    # A label is corrected, and a clip deleted: neither stays under its old label.
    a, b, *_ = sorted(mine.glob("train/raising_hand/*.mp4"))
    a.rename(mine / "train" / "not_raising_hand" / "moved.mp4")
    b.unlink()
    assert clip_folder.prepared(mine, tmp_path / "prepared") == folder
    names = {path.relative_to(mine) for path in mine.rglob("*.mp4")}
    assert names == {path.relative_to(folder) for path in folder.rglob("*.mp4")}
    other = shutil.copytree(mine, tmp_path / "other")
    assert clip_folder.prepared(other, tmp_path / "prepared") != folder  # none is mixed in


def test_clips_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(
        ValueError, match="s3://mine/clips: .*bring_your_own_clips.ipynb.*notebook 3"
    ):
        clip_folder.prepared("s3://mine/clips", tmp_path / "out")
    for label in ("a", "b"):
        for number in range(3):
            path = tmp_path / "mine" / "train" / label / f"{number}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"not a video")
    with pytest.raises(ValueError, match="(?s)bad clips.*train/a/0.mp4") as error:
        clip_folder.prepared(tmp_path / "mine", tmp_path / "out")
    assert "%|" not in str(error.value)  # no progress bar


def test_a_sample_has_so_many_clips_of_each_split_and_label(clips, tmp_path):
    folder = clip_folder.sample(clips, tmp_path / "few", 3)
    counts = {s: [part["label"].count(i) for i in (0, 1)] for s, part in clips.items()}
    again = prepare_clips.load_clips(str(folder))
    for split, part in again.items():
        assert [part["label"].count(i) for i in (0, 1)] == [min(3, n) for n in counts[split]]
    clip_folder.sample(clips, tmp_path / "few", 1)  # what was there is gone
    assert len([*folder.rglob("*.mp4")]) == 2 * len(clips)


def test_clips_of_one_name_are_all_in_the_sample(tmp_path, clips):
    two = [tmp_path / place / "clip.mp4" for place in ("monday", "tuesday")]
    for path, clip in zip(two, clips["train"]["video"], strict=False):
        path.parent.mkdir()
        shutil.copy(clip["path"], path)
    rows = clips["train"].select([0, 1]).remove_columns("video")
    rows = rows.add_column("video", [{"path": str(path), "bytes": None} for path in two])
    same = rows.map(lambda row: {"label": 0}, features=rows.features)
    clip_folder.sample({"train": same}, tmp_path / "few", 2)
    assert len([*(tmp_path / "few").rglob("*.mp4")]) == 2


def test_clips_of_the_run_or_the_notebook_to_run(clips_folder, tmp_path):
    here = account.read_run(tmp_path)
    with pytest.raises(RuntimeError, match="run 02_local_smoke_train.ipynb first"):
        clip_folder.of_run(here)
    here.remember(dataset=str(clips_folder))
    assert len(clip_folder.of_run(account.read_run(tmp_path))["train"]) == 16
    here.remember(dataset="s3://mine/clips")
    with pytest.raises(RuntimeError, match="no clips on this computer"):
        clip_folder.of_run(here)


def test_the_tiny_model_is_that_of_the_tutorial():
    """What notebook 2 writes for notebook 3's estimate, with the local parameters."""
    config = json.loads((ROOT / "notebooks/local_mode/tiny_videomae_v2/config.json").read_text())
    size = config["model_config"]
    tiny = SimpleNamespace(
        hidden_size=size["embed_dim"], intermediate_size=4 * size["embed_dim"], num_frames=16,
        tubelet_size=2, image_size=size["img_size"], patch_size=size["patch_size"],
        num_hidden_layers=size["depth"],
    )  # fmt: skip
    assert 0.3 < model_size.gflop(tiny) < 1
