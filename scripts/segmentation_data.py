"""Videos with a label for each pixel: the layouts of DAVIS and VSPW, and what a mask may hold.

You need not read this to follow notebook 5. load_videos finds the files, check_masks reads every
mask before a training begins.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import accelerate
import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from prepare_clips import files_below, one_form
from tqdm import tqdm

VOID = 255  # a pixel that nobody judges: in no loss, in no metric but VC
SPLITS = {"train": "train", "val": "validation", "test": "test"}


class Video(NamedTuple):
    """One video: its name, and the files of its frames and masks, in order."""

    name: str
    frames: list[str]
    masks: list[str]


class Videos(NamedTuple):
    """A data set: videos of each split, names of the classes, and what a mask's values mean."""

    splits: dict[str, list[Video]]
    labels: list[str]
    meaning: str  # see read_mask


def load_videos(dataset: str) -> Videos:
    """The videos of a folder in the layout of DAVIS (2016 or 2017) or of VSPW. Decodes nothing.

    DAVIS numbers the objects of each video anew, so that all one can learn is foreground and
    background. A file labels.json in its folder, a list of names, says that the values are classes.
    Raises FileNotFoundError for a missing folder, frame or mask, ValueError for lists that name
    no video.
    """
    folder = Path(dataset).expanduser()
    if any(folder.glob("JPEGImages/[!.]*/")):
        videos = davis_videos(folder)
    elif (folder / "label_num_dic_final.json").is_file():
        videos = vspw_videos(folder)
    else:
        raise FileNotFoundError(
            f"--dataset {folder}: neither DAVIS's JPEGImages/480p/ nor VSPW's "
            "label_num_dic_final.json lies there. Unpack the data set, and name its folder."
        )
    left_out = files_below(folder)[1]
    if left_out:
        print(f"left out, as hidden or side files: {len(left_out)}, such as {left_out[-1]}")
    for name in ("train", "val"):
        if not videos.splits.get(SPLITS[name]):
            raise ValueError(
                f"--dataset {folder}: no {name}.txt names a video; write one, a name on each line, "
                "into ImageSets/2017/ (DAVIS) or beside data/ (VSPW)"
            )
    test = videos.splits.get("test", [])
    if test and not any(os.path.isfile(mask) for video in test for mask in video.masks):
        print(f"{folder}: the test videos have no masks, as VSPW's have not: left out")
        del videos.splits["test"]
    for video in (video for part in videos.splits.values() for video in part):
        for frame, mask in zip(video.frames, video.masks, strict=True):
            if not os.path.isfile(mask):
                raise FileNotFoundError(
                    f"{mask}: missing mask of {frame}; put it there, or take the video off its list"
                )
    return videos


def listed_video(name: str, pictures: Path, masks: Path, listed: Path) -> Video:
    """The video in two folders, which the file `listed` names."""
    files = files_below(pictures)[0] if pictures.is_dir() else []  # in the order of their numbers
    frames = [f for f in files if f.suffix.lower() in (".jpg", ".jpeg") and f.parent == pictures]
    if not frames:
        what = "no frames (.jpg) in it" if pictures.is_dir() else "no such folder"
        raise FileNotFoundError(f"{pictures}: {what}; unpack it, or take {name} off {listed}")
    return Video(name, [*map(str, frames)], [str(masks / f"{f.stem}.png") for f in frames])


def read_json(path: Path):
    """What a JSON file holds. Raises ValueError with the path."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error


def davis_videos(folder: Path) -> Videos:
    """DAVIS: lists of names (2017), or of pairs of files (2016), below ImageSets/."""
    lists = [folder / "ImageSets" / name for name in ("2017", "2016", "480p")]
    lists = next((place for place in lists if place.is_dir()), lists[0])
    sizes = sorted(place.name for place in folder.glob("JPEGImages/[!.]*/"))
    size = "480p" if "480p" in sizes else sizes[0]
    pictures, masks = folder / "JPEGImages" / size, folder / "Annotations" / size
    splits = {}
    for name, split in SPLITS.items():
        listed = lists / f"{name}.txt"
        lines = listed.read_text().split("\n") if listed.is_file() else []
        # A line is a video, or "/JPEGImages/480p/bear/00000.jpg /Annotations/480p/bear/00000.png".
        names = dict.fromkeys(Path(line.split()[0]) for line in lines if line.strip())
        names = dict.fromkeys(p.parent.name if p.suffix == ".jpg" else p.name for p in names)
        found = [listed_video(video, pictures / video, masks / video, listed) for video in names]
        splits |= {split: found} if found else {}
    if (folder / "labels.json").is_file():
        return Videos(splits, one_form(read_json(folder / "labels.json")), "classes")
    return Videos(splits, ["background", "foreground"], "objects")


def vspw_videos(folder: Path) -> Videos:
    """VSPW: lists of names, a folder for each video, names and numbers of the classes."""
    file = folder / "label_num_dic_final.json"
    numbers = read_json(file)
    if all(str(name).isdigit() for name in numbers):  # some copies have it the other way round
        numbers = {name: number for number, name in numbers.items()}
    try:
        classes = {int(number): name for name, number in numbers.items()}
    except ValueError as error:
        raise ValueError(f'{file}: not of the form {{"wall": "1", ...}}: {error}') from error
    labels = [classes.get(i, f"class {i}") for i in range(1, max(set(classes) - {VOID}) + 1)]
    splits = {}
    for name, split in SPLITS.items():
        listed = folder / f"{name}.txt"
        names = dict.fromkeys(listed.read_text().split() if listed.is_file() else [])
        places = [(video, folder / "data" / video) for video in names]
        found = [listed_video(v, place / "origin", place / "mask", listed) for v, place in places]
        splits |= {split: found} if found else {}
    return Videos(splits, one_form(labels), "shifted")


# ---- What a mask says ---------------------------------------------------------------------------


def palette(size: int = 256) -> list[int]:
    """Red, green, blue of each label: the colours of PASCAL VOC, which DAVIS uses too."""
    labels = np.arange(size)
    colours = np.zeros((size, 3), np.uint8)
    for bit in range(8):  # the bits of a label go in turn to red, green and blue, highest first
        for channel in range(3):
            on = labels >> (3 * bit + channel) & 1
            colours[:, channel] += (on << (7 - bit)).astype(np.uint8)
    return colours.ravel().tolist()


def read_mask(path: str, num_labels: int, meaning: str) -> np.ndarray:
    """The label of each pixel, uint8 [height, width]: 0 to num_labels - 1, or VOID.

    `meaning` of the values in the file: "classes" as they are; "objects" of one video, each of
    which is foreground, 1 (DAVIS; in 2016's grey files 255 is the object); "shifted", the class is
    the value less 1, and 0 is void (VSPW), as are values above its classes, which some copies have.
    255 is void. Raises ValueError with the path.
    """
    with Image.open(path) as image:
        if image.mode not in ("P", "L", "1"):
            raise ValueError(
                f"{path}: a mask in mode {image.mode}, whose values are colours; save it as a "
                "palette PNG (mode P), or in grey (L) with the label as the value"
            )
        values = np.array(image).astype(np.uint8)  # of mode 1: 0 and 1
        colours = image.getpalette() if image.mode == "P" else None
    found = np.unique(values)
    if colours and meaning != "shifted":  # an editor may have sorted the palette anew
        for value in found[found < 21]:
            here, davis = (part[3 * value : 3 * value + 3] for part in (colours, PALETTE))
            if np.abs(np.subtract(here, davis)).max() > 1:  # DAVIS has 191 where VOC has 192
                raise ValueError(
                    f"{path}: value {value} has the colour {here}, not DAVIS's {davis}: the values "
                    "may be no labels any more; save it with DAVIS's palette, or in grey (mode L)"
                )
    if meaning == "objects":
        if colours is None and set(found) <= {0, 255}:
            return (values > 0).astype(np.uint8)
        return np.where(values == VOID, VOID, values > 0).astype(np.uint8)
    if meaning == "shifted":
        return np.where((values == 0) | (values > num_labels), VOID, values - 1)
    largest = values[values != VOID].max(initial=0)
    if largest >= num_labels:
        raise ValueError(
            f"{path}: label {largest} is out of range, the data set has {num_labels} labels (see "
            "its labels.json)"
        )
    return values


PALETTE = palette()


def mask_problem(frame: str, mask: str, num_labels: int, meaning: str) -> tuple[str, int]:
    """(why a frame with its mask cannot be used, or ""; pixels that are void for an odd value)."""
    path, odd = frame, 0
    try:
        with Image.open(path) as image:
            size = image.size
        path = mask
        with Image.open(path) as image:
            image.verify()  # checksums, which Pillow passes over when it decodes
        labels = read_mask(path, num_labels, meaning)
        if meaning == "shifted":
            with Image.open(path) as image:
                values = np.array(image)
            odd = int(((values > num_labels) & (values != VOID)).sum())
        height, width = labels.shape
        if size != (width, height):
            return f"{mask}: {width} x {height} pixels, its frame has {size[0]} x {size[1]}", odd
    except Exception as error:  # of a damaged file, Pillow raises SyntaxError and others, too
        return str(error) if path in str(error) else f"{path}: {error}", odd
    return "", odd


def check_masks(videos: Videos, workers: int = 4) -> None:
    """Reads every mask before any training; several processes share them.

    Raises ValueError with a report of the bad ones, or where the training masks hold one label.
    """
    rows = [
        pair
        for part in videos.splits.values()
        for video in part
        for pair in zip(video.frames, video.masks, strict=True)
    ]
    state = accelerate.PartialState()
    mine = rows[state.process_index :: state.num_processes]
    problem = partial(mask_problem, num_labels=len(videos.labels), meaning=videos.meaning)
    pace = 0.1 if sys.stderr.isatty() else 10
    bar = {"mininterval": pace, "delay": pace, "disable": not state.is_main_process}
    with ThreadPoolExecutor(workers) as pool:  # Pillow lets go of the lock while it decodes
        found = pool.map(lambda row: problem(*row), mine)
        found = gather_object([*tqdm(found, "check masks", len(mine), **bar)])
    odd = [pixels for _, pixels in found if pixels]
    if odd:
        print(
            f"{len(odd)} masks have values above {len(videos.labels)}: {sum(odd)} pixels are void"
        )
    if bad := sorted(why for why, _ in found if why):
        report = "\n".join(f"  {why}" for why in bad[:20])
        more = f"\n  and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise ValueError(
            f"{len(bad)} of {len(rows)} masks cannot be used; replace them, or take their videos "
            f"off the lists:\n{report}{more}"
        )
    masks = [mask for video in videos.splits["train"] for mask in video.masks]
    some = masks[:: max(1, len(masks) // 500)]
    labels = {
        int(v) for m in some for v in np.unique(read_mask(m, len(videos.labels), videos.meaning))
    }
    if len(labels - {VOID}) < 2:
        raise ValueError(
            f"{masks[0]}: this mask and the others for training hold no label but "
            f"{sorted(labels - {VOID})}; 255 is void: write 1 where an object is, not 255"
        )


# ---- Frames and masks as files ------------------------------------------------------------------


def read_frame(path: str) -> torch.Tensor:
    """uint8 [channels, height, width], red, green and blue. Raises ValueError with the path."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except OSError as error:
        raise ValueError(f"{path}: a frame that cannot be decoded: {error}") from error


def read_frames(video: Video):
    """Yields the frames of a video, uint8 [channels, height, width]."""
    for path in video.frames:
        yield read_frame(path)


def write_mask(path: Path, labels: np.ndarray) -> None:
    """Writes uint8 [height, width] as a palette PNG, as DAVIS has its results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels, mode="P")
    image.putpalette(PALETTE)
    image.save(path)
