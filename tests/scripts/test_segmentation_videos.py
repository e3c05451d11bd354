"""scripts/train_segmentation.py: folders of frames and masks, and what becomes of a clip."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import segmentation_data as sd
import torch
import train
import train_segmentation as ts
from local_mode import clips
from PIL import Image
from scipy import ndimage

HEIGHT, WIDTH, FRAMES = 16, 20, 3
COLOURS = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]  # of labels 0 to 3, as DAVIS has them
COLOURS += 252 * 3 * [224]  # a short palette would make Pillow write 2 bits for each pixel
ROWS = np.arange(HEIGHT)[:, None] + np.zeros((1, WIDTH), int)


def save(path, values, colours=None):
    """Writes an array as a picture; with `colours`, red, green, blue in turn, as a palette PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if colours:
        image.putpalette(colours)
    image.save(path)


def write_video(frames, masks, values, colours=None, first=0):
    """FRAMES frames in the folder `frames`, as many masks of the same `values` in `masks`."""
    for i in range(first, first + FRAMES):
        digits = 8 if first else 5
        save(frames / f"{i:0{digits}}.jpg", np.full((HEIGHT, WIDTH, 3), 60 * i))
        save(masks / f"{i:0{digits}}.png", values, colours)


def write_lists(folder, **names):
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in names.items():
        (folder / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines))


OBJECTS = np.select([ROWS < 4, ROWS < 8, ROWS < 12, ROWS < 14], [0, 1, 2, 3], 255)


def davis(folder, values=OBJECTS, colours=COLOURS, resolution="480p"):
    """DAVIS 2017: bear and camel for training, dog for validation."""
    for name in ("bear", "camel", "dog"):
        places = (folder / kind / resolution / name for kind in ("JPEGImages", "Annotations"))
        write_video(*places, values, colours)
    write_lists(folder / "ImageSets" / "2017", train=["bear", "camel"], val=["dog"])
    return folder


def vspw(folder, values, labels=3):
    """VSPW: one video for training, one for validation."""
    for name in ("1_a", "2_b"):
        write_video(folder / "data" / name / "origin", folder / "data" / name / "mask", values,
                    first=1)  # fmt: skip
    write_lists(folder, train=["1_a", "1_a"], val=["2_b"])
    names = ["others", "wall", "ceiling", "door", "stair"][: labels + 1]
    numbers = {name: str(i) for i, name in enumerate(names)} | {"void": "255"}
    (folder / "label_num_dic_final.json").write_text(json.dumps(numbers))
    return folder


def masks_of(videos):
    """The labels of the first mask of the first training video."""
    first = videos.splits["train"][0].masks[0]
    return sd.read_mask(first, len(videos.labels), videos.meaning)


# ---- The layouts


def test_davis_2017_numbers_objects_so_that_foreground_is_what_one_can_learn(tmp_path):
    videos = sd.load_videos(davis(tmp_path))
    names = {split: [video.name for video in part] for split, part in videos.splits.items()}
    assert names == {"train": ["bear", "camel"], "validation": ["dog"]}
    assert videos.labels == ["background", "foreground"]
    (dog,) = videos.splits["validation"]
    assert dog.frames == [
        str(tmp_path / "JPEGImages" / "480p" / "dog" / f"0000{i}.jpg") for i in range(FRAMES)
    ]
    assert dog.masks == [
        str(tmp_path / "Annotations" / "480p" / "dog" / f"0000{i}.png") for i in range(FRAMES)
    ]
    expected = np.select([ROWS < 4, ROWS < 14], [0, 1], sd.VOID)
    assert (masks_of(videos) == expected).all()
    sd.check_masks(videos)


@pytest.mark.parametrize("end", [" 1", ""])
def test_davis_2016_lists_files_and_has_grey_masks_in_which_255_is_the_object(tmp_path, end):
    davis(tmp_path, np.where(ROWS < 8, 0, 255), None)
    for file in (tmp_path / "ImageSets" / "2017").iterdir():
        file.unlink()
    (tmp_path / "ImageSets" / "2017").rmdir()
    lines = {
        name: [
            f"/JPEGImages/480p/{name}/0000{i}.jpg /Annotations/480p/{name}/0000{i}.png{end}"
            for i in range(FRAMES)
        ]
        for name in ("bear", "camel", "dog")
    }
    write_lists(tmp_path / "ImageSets" / "480p", train=lines["bear"], val=lines["dog"])
    videos = sd.load_videos(tmp_path)
    names = {split: [video.name for video in part] for split, part in videos.splits.items()}
    assert names == {"train": ["bear"], "validation": ["dog"]}  # each once, not once for each line
    assert (masks_of(videos) == (ROWS >= 8)).all()


def test_the_lists_of_2017_win_and_so_does_480p(tmp_path):
    davis(tmp_path, resolution="Full-Resolution")
    davis(tmp_path, resolution="1080p")
    davis(tmp_path)
    write_lists(tmp_path / "ImageSets" / "2016", train=["camel"], val=["bear"])
    videos = sd.load_videos(tmp_path)
    assert [video.name for video in videos.splits["train"]] == ["bear", "camel"]
    for file in videos.splits["train"][0].frames + videos.splits["train"][0].masks:
        assert "480p" in file
    for file in (tmp_path / "ImageSets" / "2017").iterdir():
        file.unlink()
    (tmp_path / "ImageSets" / "2017").rmdir()
    assert [video.name for video in sd.load_videos(tmp_path).splits["train"]] == ["camel"]


def test_another_resolution_is_taken_where_it_is_the_only_one(tmp_path):
    videos = sd.load_videos(davis(tmp_path, resolution="1080p"))
    assert "1080p" in videos.splits["train"][0].masks[0]


def test_labels_json_makes_the_values_of_the_davis_layout_classes(tmp_path):
    davis(tmp_path)
    (tmp_path / "labels.json").write_text('["background", "body", "arm", "leg"]')
    videos = sd.load_videos(tmp_path)
    assert videos.labels == ["background", "body", "arm", "leg"]
    assert (masks_of(videos) == OBJECTS).all()


def test_vspw_shifts_its_classes_and_both_0_and_255_are_void(tmp_path):
    raw = np.select([ROWS < 4, ROWS < 8, ROWS < 12], [0, 1, 3], 255)
    videos = sd.load_videos(vspw(tmp_path, raw))
    assert videos.labels == ["wall", "ceiling", "door"]
    names = {split: [video.name for video in part] for split, part in videos.splits.items()}
    assert names == {"train": ["1_a"], "validation": ["2_b"]}
    assert videos.splits["train"][0].masks[0].endswith("1_a/mask/00000001.png")
    expected = np.select([ROWS < 4, ROWS < 8, ROWS < 12], [255, 0, 2], 255)
    assert (masks_of(videos) == expected).all()
    # The rule as the authors wrote it, for each of the 256 values.
    values = np.arange(256, dtype=np.uint8)[None]
    save(tmp_path / "all.png", values)
    values[values == 0] = 255
    values = values - 1
    values[values == 254] = 255
    assert (sd.read_mask(str(tmp_path / "all.png"), 254, "shifted") == values).all()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_each_list_becomes_a_split(tmp_path, split):
    davis(tmp_path)
    write_lists(tmp_path / "ImageSets" / "2017", **{split: ["dog", "", "dog"]})
    videos = sd.load_videos(tmp_path)
    found = videos.splits["validation" if split == "val" else split]
    assert [video.name for video in found] == ["dog"]  # no empty line, and no video twice


# ---- Bad folders: one error that names the file and what to do


def edit(path, act):
    """A change of a DAVIS folder: act(the path in it)."""
    return lambda folder: act(folder / path)


def emptied(folder):
    for file in folder.iterdir():
        file.unlink()


def gone(folder):
    emptied(folder)
    folder.rmdir()


BAD_FOLDERS = {
    "no layout": (lambda f: (f / "JPEGImages").rename(f / "Pictures"), "JPEGImages.*[Uu]npack"),
    "no pictures": (lambda f: (f / "JPEGImages" / "480p").rename(f / "x"), "JPEGImages.*[Uu]npack"),
    "no lists": (lambda f: (f / "ImageSets").rename(f / "Lists"), "train.txt"),
    "empty list": (edit("ImageSets/2017/val.txt", lambda p: p.write_text("\n")), "val.txt"),
    "missing mask": (
        edit("Annotations/480p/camel/00001.png", lambda p: p.unlink()),
        "Annotations/480p/camel/00001.png.*JPEGImages/480p/camel/00001.jpg.*list",
    ),
    "no frames": (edit("JPEGImages/480p/camel", emptied), "480p/camel.*no frames.*train.txt"),
    "no folder": (edit("JPEGImages/480p/dog", gone), "480p/dog.*no such folder.*val.txt"),
    "bad labels": (edit("labels.json", lambda p: p.write_text("[body")), "labels.json"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_gives_one_error_with_the_file_and_the_remedy(tmp_path, name):
    damage, message = BAD_FOLDERS[name]
    damage(davis(tmp_path))
    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        sd.load_videos(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*JPEGImages.*label_num_dic_final.json"):
        sd.load_videos(tmp_path / "nowhere")


def test_a_list_of_vspw_that_names_a_video_without_a_folder_is_refused(tmp_path):
    write_lists(vspw(tmp_path, ROWS % 3), val=["2_b", "3_c"])
    with pytest.raises(FileNotFoundError, match="3_c.*no such folder.*val.txt"):
        sd.load_videos(tmp_path)


# ---- Bad masks


def truncated(path):
    path.write_bytes(path.read_bytes()[:-30])


def recoloured(path):
    """As an editor sorts a palette: the picture looks the same, the values are others."""
    save(path, OBJECTS % 4, COLOURS[3:6] + COLOURS[:3] + COLOURS[6:])


BAD_MASKS = {
    "colours": (lambda p: save(p, np.zeros((HEIGHT, WIDTH, 3))), "mode RGB.*palette PNG.*grey"),
    "another palette": (recoloured, "DAVIS's.*save it"),
    "another size": (
        lambda p: save(p, OBJECTS[:-1], COLOURS),
        f"{WIDTH} x {HEIGHT - 1} pixels, its frame has {WIDTH} x {HEIGHT}$",
    ),
    "truncated": (truncated, "480p/dog/00001.png: .*([Tt]runcated|broken)"),
    "empty": (lambda p: p.write_bytes(b""), "cannot identify"),
    "no picture": (lambda p: p.write_bytes(b"no picture at all"), "cannot identify"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_a_bad_mask_is_named_with_the_reason(tmp_path, name):
    damage, message = BAD_MASKS[name]
    videos = sd.load_videos(davis(tmp_path))
    bad = tmp_path / "Annotations" / "480p" / "dog" / "00001.png"
    damage(bad)
    with pytest.raises(ValueError, match=f"^1 of 9 masks .*replace.*\n .*{message}") as error:
        sd.check_masks(videos)
    assert str(bad) in str(error.value) and str(error.value).count("\n") == 1


@pytest.mark.parametrize("layout, label, file", [(davis, 3, "labels")])
def test_a_label_out_of_range_is_named_as_the_file_has_it(tmp_path, layout, label, file):
    values = np.where(ROWS < 3, 1, label)
    folder = layout(tmp_path, values)
    (tmp_path / "labels.json").write_text('["background", "body", "arm"]')
    with pytest.raises(ValueError, match=f"label {label} is out of range.* 3 .*{file}"):
        sd.check_masks(sd.load_videos(folder))


def test_a_bad_frame_is_named(tmp_path):
    videos = sd.load_videos(davis(tmp_path))
    frame = tmp_path / "JPEGImages" / "480p" / "dog" / "00001.jpg"
    whole = frame.read_bytes()
    frame.write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 9 .*\n .*dog/00001.jpg"):
        sd.check_masks(videos)
    frame.write_bytes(whole[:-40])  # its header is in order: found when it is read
    with pytest.raises(ValueError, match="dog/00001.jpg.*cannot be decoded.*[Tt]runcated"):
        sd.read_frame(str(frame))


def test_all_bad_masks_are_reported_at_once_and_counted(tmp_path):
    videos = sd.load_videos(davis(tmp_path))
    for name in ("bear", "dog"):
        (tmp_path / "Annotations" / "480p" / name / "00002.png").write_bytes(b"")
    with pytest.raises(ValueError, match="^2 of 9 masks") as error:
        sd.check_masks(videos)
    assert all(f"{name}/00002.png" in str(error.value) for name in ("bear", "dog"))
    many = videos._replace(splits={"train": videos.splits["train"] * 20})
    for path in (tmp_path / "Annotations").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="^120 of 120 masks[^$]*and 100 more$") as error:
        sd.check_masks(many)
    assert str(error.value).count("\n") == 21


def test_no_damaged_png_passes_for_another_mask(tmp_path):
    """Cut off anywhere, or with a byte changed: a reason in one line, or the very same labels."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, (HEIGHT, WIDTH))
    file, frame = tmp_path / "mask.png", tmp_path / "frame.jpg"
    save(file, values, COLOURS)
    save(frame, np.zeros((HEIGHT, WIDTH, 3)))
    whole, reasons = file.read_bytes(), 0
    cut = [whole[:length] for length in range(len(whole))]
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        cut.append(bytes(data))
    for data in cut:
        file.write_bytes(data)
        reason, odd = sd.mask_problem(str(frame), str(file), 4, "classes")
        reasons += bool(reason)
        assert odd == 0
        if not reason:
            assert (sd.read_mask(str(file), 4, "classes") == values).all()
        else:
            assert str(file) in reason and "\n" not in reason
    assert reasons > 0.9 * len(cut)


# ---- Colours of masks


def test_the_palette_is_that_of_davis():
    assert sd.PALETTE[:12] == COLOURS[:12] and len(sd.PALETTE) == 768
    assert clips.MASK_COLOURS == sd.PALETTE[: len(clips.MASK_COLOURS)]


def test_the_colours_in_the_files_of_davis_itself_are_taken(tmp_path):
    """They have 191 where PASCAL VOC has 192: an object with the number 9 must not be refused."""
    own = [191 if colour == 192 else colour for colour in sd.PALETTE[: 21 * 3]]
    assert own[27:30] == [191, 0, 0]
    save(tmp_path / "a.png", np.arange(21)[None], own)
    assert sd.read_mask(str(tmp_path / "a.png"), 2, "objects").tolist() == [[0] + [1] * 20]


def test_a_written_mask_has_its_values_in_the_palette_of_davis(tmp_path):
    labels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    sd.write_mask(tmp_path / "video" / "00000.png", labels)
    with Image.open(tmp_path / "video" / "00000.png") as image:
        assert image.mode == "P" and image.getpalette()[:12] == COLOURS[:12]
        assert (np.array(image) == labels).all()


# ---- The drawn data set


VIDEOS = {"train": 4, "val": 2, "test": 2}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return clips.write_davis(tmp_path_factory.mktemp("davis") / "d", VIDEOS, 32, frames=5, seed=3)


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_masks_on_disk_are_those_that_were_drawn(drawn):
    videos = sd.load_videos(drawn)
    assert videos.labels == clips.MASK_LABELS
    counts = {split: len(part) for split, part in videos.splits.items()}
    assert counts == {"train": 4, "validation": 2, "test": 2}
    sd.check_masks(videos)
    files = {video.name: video for part in videos.splits.values() for video in part}
    rows = json.loads((drawn / "clips.json").read_text())["rows"]
    assert {clips.video_name(row) for row in rows} == set(files)
    for row in rows:
        (split,) = {row["person"][1], row["file"].split("/")[0]}  # each split has its own people
        listed = (drawn / "ImageSets" / "2017" / f"{split}.txt").read_text().split()
        assert clips.video_name(row) in listed
        frames, masks = clips.drawn(row)
        video = files[clips.video_name(row)]
        found = np.stack([sd.read_mask(mask, 3, videos.meaning) for mask in video.masks])
        assert (found == masks).all()
        shown = torch.stack([sd.read_frame(frame) for frame in video.frames]).permute(0, 2, 3, 1)
        assert np.abs(shown.numpy().astype(int) - frames).mean() < 6  # JPEG


def test_a_finished_folder_is_kept_and_an_interrupted_one_drawn_anew(drawn, tmp_path):
    arguments = {"videos": {"train": 2, "val": 2}, "height": 32, "frames": 3}
    folder = clips.write_davis(tmp_path / "d", **arguments)
    before, pictures = files_of(folder), [*folder.rglob("*.jpg"), *folder.rglob("*.png")]
    assert len(pictures) == 4 * 3 * 2
    stamps = [path.stat().st_mtime_ns for path in pictures]
    clips.write_davis(folder, **arguments)
    assert [path.stat().st_mtime_ns for path in pictures] == stamps
    record = json.loads((folder / "clips.json").read_text())
    (folder / "clips.json").write_text(json.dumps(record | {"complete": False}))
    pictures[-1].write_bytes(b"half a mask")  # as an interrupted run leaves it
    (folder / "labels.json").unlink()
    clips.write_davis(folder, **arguments)
    assert files_of(folder) == before  # and the same arguments give the same files
    clips.write_davis(folder, **arguments | {"seed": 1})
    frames = {data for path, data in before.items() if path.suffix == ".jpg"}
    assert not frames & set(files_of(folder).values())


@pytest.mark.parametrize("name", ["JPEGImages/480p/bear/00000.jpg", "labels.json"])
def test_files_of_the_reader_are_never_deleted(tmp_path, name):
    mine = tmp_path / "DAVIS" / name
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"precious")
    for write in (clips.write_davis, clips.write_clips):
        with pytest.raises(FileExistsError, match=f"{mine.name}.*another folder"):
            write(tmp_path / "DAVIS", {"train": 2, "val": 2}, 32)
    assert mine.read_bytes() == b"precious"


# ---- Clips: frames and masks are changed alike

# Corners of a regular tetrahedron: a mix of them is nearest to the one that weighs most.
PAINT = torch.tensor([(0, 0, 0), (255, 255, 0), (255, 0, 255), (0, 255, 255)], dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 2, sd.VOID], dtype=torch.uint8)


def painted(seed, frames=3, height=48, width=64, block=8):
    """(frames, masks): blocks of random labels and void, each painted in its label's colour."""
    draw = torch.Generator().manual_seed(seed)
    shape = frames, height // block, width // block
    index = torch.randint(4, shape, generator=draw)
    index = index.repeat_interleave(block, 1).repeat_interleave(block, 2)
    return PAINT[index].permute(0, 3, 1, 2), LABELS[index]


def recovered(frames):
    """The label of each pixel, by the nearest of the colours."""
    distance = (frames.float()[:, None] - PAINT.float()[:, :, None, None]).pow(2).sum(2)
    return LABELS[distance.argmin(1)]


def at_border(masks):
    """Pixels with another label, or the end of the picture, among their eight neighbours."""
    around = {"size": (1, 3, 3), "mode": "constant", "cval": 99}
    most = ndimage.maximum_filter(masks.numpy(), **around)
    return torch.from_numpy(most != ndimage.minimum_filter(masks.numpy(), **around))


@pytest.mark.parametrize("short_side", [33, 48, 70])
def test_the_frames_show_what_their_masks_say(short_side):
    """After any scale, place and mirroring, for many draws.

    Catches a flip, a crop or a scale that frames or masks miss, or that they draw each for
    themselves: then pixels far from a border are wrong. And masks scaled by "nearest", which lie
    half a pixel beside the frames: then 10 to 16 % of the pixels at borders are wrong, not 3 to 5.
    """
    wrong_at_border = border = mirrored = 0
    for seed in range(40):
        frames, masks = painted(seed)
        draw = np.random.default_rng(seed)
        options = {"zoom": 0.5, "flip": True, "draw": draw}
        clip, labels = ts.transformed(frames, masks, 32, short_side, **options)
        assert clip.shape == (3, 3, 32, 32) and labels.shape == (3, 32, 32)
        assert clip.dtype == labels.dtype == torch.uint8
        assert set(labels.unique().tolist()) <= {0, 1, 2, sd.VOID}  # no label between two others
        wrong, edge = recovered(clip) != labels, at_border(labels)
        assert not (wrong & ~edge).any()
        wrong_at_border, border = wrong_at_border + wrong.sum(), border + edge.sum()
        draw = np.random.default_rng(seed)
        options |= {"flip": False, "draw": draw}
        still, _ = ts.transformed(frames, masks, 32, short_side, **options)
        assert (clip == still).all() or (clip == still.flip(-1)).all()
        mirrored += (clip != still).any().item()
    assert wrong_at_border < 0.07 * border
    assert 8 < mirrored < 32


def test_without_scaling_frames_and_masks_agree_in_every_pixel():
    places = set()
    for seed in range(20):
        frames, masks = painted(seed)
        draw = np.random.default_rng(seed)
        clip, labels = ts.transformed(frames, masks, 32, 48, draw, zoom=0.0, flip=True)
        assert (recovered(clip) == labels).all()
        window = frames.unfold(2, 32, 1).unfold(3, 32, 1)  # [frames, channels, y, x, 32, 32]
        same = (window == clip[:, :, None, None]).all((0, 1, 4, 5))
        mirrored = (window == clip.flip(-1)[:, :, None, None]).all((0, 1, 4, 5))
        places |= {tuple(place) for place in (same | mirrored).nonzero().tolist()}
    assert len(places) > 12  # the square is cut out of many places


def test_evaluation_takes_the_centre():
    frames, masks = painted(0)
    clip, labels = ts.transformed(frames, masks, 32, 48)
    assert (clip == frames[..., 8:40, 16:48]).all() and (labels == masks[:, 8:40, 16:48]).all()


def test_all_frames_of_a_clip_are_changed_alike():
    frames, masks = painted(0, frames=1)
    for seed in range(10):
        draw = np.random.default_rng(seed)
        changed = ts.transformed(frames.repeat(4, 1, 1, 1), masks.repeat(4, 1, 1), 32, 40, draw,
                                 zoom=0.5, flip=True)  # fmt: skip
        assert all((part == part[:1]).all() for part in changed)


# ---- The data set


ARGS = SimpleNamespace(
    clips_per_video=3, short_side=0, zoom=0.5, horizontal_flip=True, max_stride=1
)


def made(videos, split="train", seed=7, length=4, **changes):
    args = SimpleNamespace(**vars(ARGS) | changes)
    return ts.VideoClips(videos, split, seed, args, size=32, length=length)


def same(one, other):
    return all((one[key] == other[key]).all() for key in ("pixel_values", "labels"))


def test_seed_and_position_decide_a_clip(drawn):
    videos = sd.load_videos(drawn)
    data, again, other = made(videos), made(videos), made(videos, seed=8)
    assert len(data) == 4 * 3
    assert all(same(data[i], again[i]) for i in (0, 5, 11, 40))
    assert not same(data[0], other[0])
    assert not same(data[0], data[4]) and not same(data[0], data[12])  # the next one, next epoch
    item = data[0]
    assert item["pixel_values"].shape == (4, 3, 32, 32) and item["labels"].shape == (4, 32, 32)


def test_an_epoch_shows_each_video_as_often_as_asked(drawn, monkeypatch):
    videos, seen = sd.load_videos(drawn), []
    monkeypatch.setattr(ts, "read_window", lambda video, *_: seen.append(video.name) or painted(0))
    data = made(videos)
    args, state = SimpleNamespace(seed=0), SimpleNamespace(epoch=2)
    trainer = SimpleNamespace(train_dataset=data, args=args, state=state)
    for position in train.EpochSampler(trainer):
        data[position]
    assert {name: seen.count(name) for name in seen} == {v.name: 3 for v in videos.splits["train"]}


def test_training_clips_start_anywhere_and_evaluation_in_the_middle(drawn, monkeypatch):
    videos, found = sd.load_videos(drawn), []
    monkeypatch.setattr(ts, "read_window", lambda v, i, *_: found.append(tuple(i)) or painted(0))
    rows = {(0, 1, 2), (1, 2, 3), (2, 3, 4)}  # 5 frames hold 3 windows of 3 in a row
    for stride, expected in (1, rows), (2, rows | {(0, 2, 4)}), (9, rows | {(0, 2, 4)}):
        found.clear()
        data = made(videos, length=3, max_stride=stride)
        for position in range(80):
            data[position]
        assert set(found) == expected
    held_out = made(videos, "validation", seed=None, length=3, max_stride=2)
    assert len(held_out) == 2
    found.clear()
    assert same(held_out[0], held_out[0]) and found == 2 * [(1, 2, 3)]


def test_a_video_shorter_than_a_clip_repeats_its_last_frame(drawn):
    videos = sd.load_videos(drawn)
    video = videos.splits["train"][0]
    frames, masks = ts.read_window(video, range(3, 9), 3, "classes")
    assert (frames[0] != frames[1]).any()
    assert (frames[1:] == sd.read_frame(video.frames[4])).all()
    assert (masks[1:] == masks[1:2]).all() and len(frames) == len(masks) == 6


# ---- What people really have: reported values ---------------------------------------------------


def test_frames_with_unpadded_numbers_are_in_the_order_of_time(tmp_path):
    """frame0 to frame11, as `ffmpeg frame%d.jpg` leaves them: not 0, 1, 10, 11, 2."""
    davis(tmp_path)
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        place = tmp_path / kind / "480p" / "bear"
        emptied(place)
        for i in range(12):
            values = np.full((HEIGHT, WIDTH, 3), i) if suffix == "jpg" else OBJECTS
            save(place / f"frame{i}.{suffix}", values, COLOURS if suffix == "png" else None)
    video = sd.load_videos(tmp_path).splits["train"][0]
    assert [Path(f).name for f in video.frames] == [f"frame{i}.jpg" for i in range(12)]
    assert [Path(m).name for m in video.masks] == [f"frame{i}.png" for i in range(12)]


def test_what_macos_puts_beside_frames_is_left_out_and_counted(tmp_path, capsys):
    davis(tmp_path)
    for kind, name in (("JPEGImages", "._00000.jpg"), ("Annotations", "._00000.png")):
        (tmp_path / kind / "480p" / "bear" / name).write_bytes(b"Mac OS X")
    (tmp_path / "JPEGImages" / "480p" / "dog" / "Thumbs.db").write_bytes(b"Windows")
    videos = sd.load_videos(tmp_path)
    sd.check_masks(videos)
    assert all(len(v.frames) == FRAMES for part in videos.splits.values() for v in part)
    assert "left out, as hidden or side files: 3, such as" in capsys.readouterr().out


def test_masks_of_vspw_with_odd_values_are_void_there_and_counted(tmp_path, capsys):
    """Reported: the value 252 in a mask of a data set with fewer classes."""
    videos = sd.load_videos(vspw(tmp_path, np.select([ROWS < 3, ROWS < 5], [252, 1], 2)))
    sd.check_masks(videos)
    odd = 3 * WIDTH * 2 * FRAMES
    assert (
        f"{2 * FRAMES} masks have values above 3: {odd} pixels are void" in capsys.readouterr().out
    )
    assert (masks_of(videos) == np.select([ROWS < 3, ROWS < 5], [255, 0], 1)).all()


def test_the_list_of_vspw_the_other_way_round(tmp_path):
    file = vspw(tmp_path, ROWS % 3) / "label_num_dic_final.json"
    numbers = json.loads(file.read_text())
    file.write_text(json.dumps({number: name for name, number in numbers.items()}))
    assert sd.load_videos(tmp_path).labels == ["wall", "ceiling", "door"]
    file.write_text('{"wall": "one"}')
    with pytest.raises(ValueError, match="label_num_dic_final.json: not of the form"):
        sd.load_videos(tmp_path)


def test_black_and_white_masks_of_davis(tmp_path):
    """PNGs of one bit: they have no colours, and 0 and 1 only."""
    davis(tmp_path)
    for mask in tmp_path.glob("Annotations/480p/*/*.png"):
        Image.fromarray(OBJECTS == 2).save(mask)
    videos = sd.load_videos(tmp_path)
    sd.check_masks(videos)
    assert (masks_of(videos) == (OBJECTS == 2)).all()


def test_class_names_that_look_the_same_are_refused(tmp_path):
    davis(tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps(["caf\u00e9", "cafe\u0301"]))
    with pytest.raises(ValueError, match=r"look the same.*caf.*xe9.*u0301"):
        sd.load_videos(tmp_path)


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    davis(tmp_path / "DAVIS")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(sd.load_videos("~/DAVIS").splits["train"]) == 2
