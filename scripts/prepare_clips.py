#!/usr/bin/env python3
"""Check every clip of a data set once and transcode it, so that training is fast and exact.

    my_clips/<split>/<label>/<any video>  ->  my_clips_prepared/<split>/<label>/*.mp4

a.mp4 keeps its name, and any other clip gets .mp4 appended to its own: b.avi becomes b.avi.mp4. A
metadata.csv is copied with the names in its column file_name changed alike. Instead of a folder,
the input may be an archive (clips.zip, clips.tar.gz) or owner/name of a data set on the Hub.

Where this file lies beside train.py, train.py calls two functions of it: load_clips finds the clips
and their labels (in a folder, an archive, or on the Hub), and check_clips opens each clip before
training, prepared or not, and reports those that training cannot read or would read wrongly.

Laptop:          python prepare_clips.py my_clips my_clips_prepared
Smaller, faster: python prepare_clips.py my_clips my_clips_prepared --short_side 224
Go on past bad:  python prepare_clips.py my_clips my_clips_prepared --on_bad_clip skip
SageMaker:       as a Processing job, on as many instances as you like, with the arguments
    /opt/ml/processing/input/clips /opt/ml/processing/output --on_bad_clip skip
    --resource_config /opt/ml/config/resourceconfig.json
  With the input distributed ShardedByS3Key, each instance prepares its share of the clips, and all
  upload to one prefix. Skip bad clips there: of a failed job, count on no output at all.

Run it again after an interruption: it goes on where it stopped. Bad clips are named in one report
and in bad_clips.json (of several instances: bad_clips_<host>.json); all good ones are prepared all
the same.
"""

import argparse
import csv
import errno
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
import unicodedata
import zipfile
from concurrent.futures import as_completed
from fractions import Fraction
from pathlib import Path

import av
import decord
import numpy as np
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

decord.logging.set_level(decord.logging.QUIET)  # our own report is shorter
av.logging.set_skip_repeated(False)  # else the second damaged file looks sound

FORMATS = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".mpeg", ".m4v", ".wmv")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
FULL = (errno.ENOSPC, errno.EDQUOT)


# ---- A data set: its files ----------------------------------------------------------------------

# The one walk of a tree: for training, preparing, uploading and segmentation.
CLUTTER = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini")  # of macOS and Windows


def natural(path) -> list:
    """Sorting key: frame2 comes before frame10."""
    parts = re.split("([0-9]+)", str(path))
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def files_below(folder) -> tuple[list[Path], list[Path]]:
    """(files, what is left out) at any depth below `folder`, in natural order; links are followed.

    Left out are hidden files and folders, and those that macOS and Windows put beside others.
    Raises PermissionError for a folder that cannot be read.
    """

    def unreadable(error: OSError):
        if isinstance(error, PermissionError):
            raise error

    kept, left_out = [], []
    for place, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        here = Path(place)
        clutter = {n for n in folders + names if n.startswith(".") or n.lower() in CLUTTER}
        left_out += [here / name for name in sorted(clutter)]
        kept += [here / name for name in names if name not in clutter]
        above = {path.resolve() for path in (here, *here.parents)}  # a link may lead back up
        folders[:] = [n for n in folders if n not in clutter and (here / n).resolve() not in above]
    return sorted(sorted(kept), key=natural), left_out


def videos_of(files: list[Path]) -> list[Path]:
    """Those of the files whose names end as videos do."""
    return [file for file in files if file.suffix.lower() in FORMATS]


# ---- A data set: from the Hub, out of an archive ------------------------------------------------


def fetch(dataset: str) -> Path:
    """The local folder of a data set: the one that holds train/, if there is one.

    `dataset` is a folder (train/ may be one level down, as in data/train), an archive, a folder
    with archives in it and no train/, or owner/name on the Hugging Face Hub. ~ is the home folder.
    Raises FileNotFoundError, RuntimeError or ValueError with the reason in one sentence.
    """
    place = Path(dataset).expanduser()
    if not place.exists():
        place = from_hub(dataset)
    if (place / "train").is_dir():
        return place
    found = with_clips(place) if place.is_dir() else []
    found = [p for p in found if p.parent == place and p.suffix != ".unpacked"]
    archives = [place] if place.is_file() else sorted(place.glob("[!.]*"))
    archives = [f for f in archives if f.name.lower().endswith(ARCHIVES) and f.is_file()]
    if place.is_file() and not archives:
        raise ValueError(f"--dataset {place}: neither a folder nor one of {' '.join(ARCHIVES)}")
    if not found:
        found = [folder for archive in archives for folder in with_clips(unpack(archive))]
    if len(found) > 1:  # parts of one data set, or several ones: who can tell
        raise ValueError(
            f"--dataset {dataset}: there are clips in {', '.join(map(str, found))}. Name the one "
            "that holds train/, or put them into one folder."
        )
    return found[0] if found else place


def with_clips(folder: Path) -> list[Path]:
    """The folders at any depth that hold train/ with videos; else `folder`, if it has videos."""
    videos = [video.relative_to(folder).parts for video in videos_of(files_below(folder)[0])]
    inside = [parts for parts in videos if "train" in parts]
    found = {folder.joinpath(*parts[: parts.index("train")]) for parts in inside}
    return sorted(found) or [folder] * bool(videos)


def from_hub(dataset: str) -> Path:
    """The folder into which a data set on the Hugging Face Hub is downloaded."""
    if dataset.count("/") != 1 or dataset.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"--dataset {dataset}: no such folder. It holds train/<label>/*.mp4, and the same "
            "under validation/ and test/; or name a data set on the Hub as owner/name."
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(dataset, repo_type="dataset"))
    except Exception as error:
        raise RuntimeError(
            f"--dataset {dataset}: no such folder, and the Hub did not give it "
            f"({type(error).__name__}). Check the spelling and the network; a gated or private "
            f"repository needs its licence accepted on huggingface.co/{dataset} and HF_TOKEN set."
        ) from error


def unpack(archive: Path) -> Path:
    """Unpacks clips.zip into clips.zip.unpacked beside it, whole or not at all, and only once.

    Several processes may do so at once. Raises RuntimeError with the archive's name.
    """
    target = archive.with_name(f"{archive.name}.unpacked")
    if target.is_dir():
        if target.stat().st_mtime_ns < archive.stat().st_mtime_ns:
            raise RuntimeError(f"--dataset {archive}: newer than {target}; delete that folder")
        return target
    print(f"unpacking {archive} into {target}", flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".unpacking_", dir=archive.parent) as part:
            whole = Path(part, "whole")
            whole.mkdir()
            if archive.suffix.lower() == ".zip":
                unzip(archive, whole)
            else:
                with tarfile.open(archive) as tar:
                    tar.extractall(whole, filter="data")  # refuses what would leave the folder
            time_of = archive.stat()  # to notice when there is a newer archive of that name
            os.utime(whole, ns=(time_of.st_atime_ns, time_of.st_mtime_ns))
            os.rename(whole, target)
    except Exception as error:
        if not target.is_dir():  # else another process was faster
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RuntimeError(
                f"--dataset {archive}: cannot be unpacked beside itself ({reason}). Unpack it "
                "elsewhere and name the folder."
            ) from error
    return target


def unzip(archive: Path, folder: Path) -> None:
    """Unpacks a zip file. Raises ValueError where a member would leave the folder."""
    try:
        content = zipfile.ZipFile(archive, metadata_encoding="utf-8")  # macOS does not say so
    except UnicodeDecodeError:
        content = zipfile.ZipFile(archive)
    with content:
        for name in content.namelist():
            if name.startswith("/") or ".." in Path(name).parts:
                raise ValueError(f"{name} would leave the folder")
        content.extractall(folder)


# ---- A data set: its splits and labels ----------------------------------------------------------

SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
READ = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".mpeg")  # what training reads as it is


def one_form(names, where: str = "labels") -> list[str]:
    """Labels in one Unicode form, without blanks around them: composed and decomposed accents are
    the same. Raises ValueError if two of them look the same."""
    names = list(names)
    labels = [unicodedata.normalize("NFC", name).strip() for name in names]
    looks = [unicodedata.normalize("NFKC", label).casefold() for label in labels]
    alike = [ascii(name) for name, look in zip(names, looks, strict=True) if looks.count(look) > 1]
    if alike:
        raise ValueError(f"{where}: these look the same: {', '.join(alike)}; rename or join them")
    return labels


def load_clips(dataset: str, seed: int = 42):
    """The clips that train.py trains on, as a datasets.DatasetDict; none is decoded.

    Columns: `video` {"path", "bytes"} and `label`. Labels are the names of the folders in train/,
    splits the folders train, validation (or val) and test; see fetch for `dataset`. Without a
    validation split, a seventh of the training clips becomes one. Raises ValueError for a clip
    without a label, a label that train/ does not have, or a label in train/ without clips.
    """
    import datasets

    root = fetch(dataset)
    where = f"--dataset {root}"
    if (root / "val").is_dir() and (root / "validation").is_dir():
        raise ValueError(f"{where}: val and validation are the same split; keep one")
    label_of = {}  # {(folder of the split, folder of the label): label}
    for name in SPLITS:
        folders = [place.name for place in sorted(root.glob(f"{name}/[!.]*/"))]
        folders = [folder for folder in folders if folder.lower() not in CLUTTER]
        keys = [(name, folder) for folder in folders]
        label_of |= zip(keys, one_form(folders, f"{where}/{name}"), strict=True)
    labels = sorted(label for (name, _), label in label_of.items() if name == "train")
    if len(labels) < 2:
        raise ValueError(
            f"{where}: a classifier needs two classes or more, found {labels}. "
            "Put the clips into train/<label>/, one folder per label."
        )
    rows = clip_rows(root, label_of, labels)
    types = {"video": datasets.Video(decode=False), "label": datasets.ClassLabel(names=labels)}
    clips = datasets.DatasetDict()
    for split, found in rows.items():
        lacking = sorted(set(labels) - {label for _, label in found})
        message = f"{where}: split {split} has no clips ({' '.join(READ)}) of {lacking}"
        if lacking and split == "train":
            raise ValueError(message)
        if lacking:
            say(f"warning: {message}")
        columns = {"video": [path for path, _ in found], "label": [label for _, label in found]}
        clips[split] = datasets.Dataset.from_dict(columns, datasets.Features(types))
    return clips if "validation" in clips else with_validation(clips, labels, where, seed)


def clip_rows(root: Path, label_of: dict, labels: list[str]) -> dict[str, list]:
    """{split: [(path, label)]} of the clips below `root`; says how much else is left out."""
    files, left_out = files_below(root)
    rows, strays = {"train": [], "validation": [], "test": []}, set()
    for file in files:
        name, *inner = file.relative_to(root).parts
        if name not in SPLITS and inner:
            strays.add(name)
        elif name not in SPLITS or file.suffix.lower() not in READ:
            left_out.append(file)
        elif len(inner) < 2:
            raise ValueError(f"{file}: a clip without a label; it goes into {name}/<label>/")
        elif label_of[name, inner[0]] not in labels:
            unknown = ascii(label_of[name, inner[0]])
            raise ValueError(f"{file}: split {name} has a label that train has not: {unknown}")
        else:
            rows[SPLITS[name]].append((str(file), label_of[name, inner[0]]))
    if left_out:
        say(f"left out, as hidden or not {' '.join(READ)}: {len(left_out)}, such as {left_out[-1]}")
    if strays:
        say(f"{root}: folders that are no split are left out: {sorted(strays)}")
    return {split: found for split, found in rows.items() if found or split == "train"}


def with_validation(clips, labels: list[str], where: str, seed: int):
    """The DatasetDict, with a seventh of its training clips as validation split."""
    counts = np.bincount(clips["train"]["label"], minlength=len(labels))
    single = [label for label, count in zip(labels, counts, strict=True) if count < 2]
    if single:
        raise ValueError(f"{where}: too few clips for a validation split, one only of {single}")
    share = max(len(labels), len(clips["train"]) // 7)
    parts = clips["train"].train_test_split(share, stratify_by_column="label", seed=seed)
    clips["train"], clips["validation"] = parts["train"], parts["test"]
    gone = {*clips["train"]["label"]} - {*clips["validation"]["label"]}
    lacking = f"; none of {[labels[i] for i in sorted(gone)]}" if gone else ""
    say(f"no validation split: {share} training clips become one{lacking}")
    return clips


def say(text: str) -> None:
    """Prints; of several processes, only the first one does."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


# ---- One clip: open it, its times and its size --------------------------------------------------

MAX_PIXELS = 8192 * 4320  # of a frame; a wrong header can ask for far more than there is memory


def open_clip(path: Path):
    """(container, video stream) of a file, not yet decoded.

    Raises ValueError or av.FFmpegError with the reason where there is no video that FFmpeg decodes.
    """
    if not path.is_file():
        raise ValueError("no such file (a broken link?)")
    if not path.stat().st_size:
        raise ValueError("empty file (0 bytes)")
    container = av.open(str(path))
    cover = av.stream.Disposition.attached_pic  # the picture of an audio file is no video
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        raise ValueError("no video stream" + " (audio only)" * bool(container.streams.audio))
    if streams[0].codec_context is None:
        raise ValueError("damaged, or in a codec that FFmpeg cannot decode")
    width, height = streams[0].width, streams[0].height
    if width * height > MAX_PIXELS:
        raise ValueError(f"frames of {width} x {height} pixels: scale it down")
    return container, streams[0]


def clip_times(path: Path) -> tuple[Fraction, float, np.ndarray]:
    """(frames per second of the prepared clip, its end in seconds, when each frame is shown).

    Nothing is decoded: packets tell. The end counts from the first frame; it is 0 if the frame rate
    is constant, since then each frame is kept, once. Times: float64 [frames], rising, in seconds.
    Raises ValueError where the file is damaged or ends early.
    """
    av.logging.set_level(av.logging.ERROR)  # over damage, a demuxer only logs and goes on
    with av.logging.Capture() as log:
        container, stream = open_clip(path)
        with container:
            # An edit list discards what a cut without re-encoding left before its start.
            shown = (p for p in container.demux(stream) if p.size and not p.is_discard)
            packets = [(p.dts if p.pts is None else p.pts, p.duration, p.is_corrupt) for p in shown]
            name, step, average = container.format.name, stream.time_base, stream.average_rate
    av.logging.set_level(None)
    damage = [text.split("\n")[0] for _, logger, text in log if logger == name]
    if damage or any(corrupt for *_, corrupt in packets):
        raise ValueError(f"truncated or damaged ({', '.join(damage[:1]) or 'a partial frame'})")
    stamps = {stamp for stamp, *_ in packets} - {None}
    if not stamps:
        raise ValueError("no frames")
    times = np.array(sorted(stamps)) * float(step)
    span, last = times[-1] - times[0], float((packets[-1][1] or 0) * step)
    mean = Fraction((len(times) - 1) / span).limit_denominator(1001) if span else Fraction(25)
    for rate in (average, mean):
        if rate and np.abs((times - times[0]) * float(rate) - np.arange(len(times))).max() < 0.25:
            return rate, 0, times
    return min(max(mean, Fraction(1)), Fraction(60)), span + last, times


def clip_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Even (width, height) in pixels with that short side; not enlarged, but for a few columns."""
    small = min(width, height)
    width, height = (max(2, s * min(small, short_side) // small // 2 * 2) for s in (width, height))
    # decord takes a row padded to 32 pixels for one of more channels, if the width divides it.
    while width % 32 and -(-width // 32) * 32 * 3 % width == 0:  # 48, 72 and some below 32
        width += 2
    return width, height


# ---- One clip: transcode and check --------------------------------------------------------------


def turn(frame: av.VideoFrame, quarters: int) -> av.VideoFrame:
    """A yuv420p frame turned counterclockwise by quarter turns, plane by plane: nothing is lost."""
    width, height = frame.width, frame.height
    planes = np.split(frame.to_ndarray().ravel(), [width * height, width * height * 5 // 4])
    shapes = (height, width), (height // 2, width // 2), (height // 2, width // 2)
    planes = [np.rot90(p.reshape(s), quarters) for p, s in zip(planes, shapes, strict=True)]
    packed = np.concatenate([p.ravel() for p in planes]).reshape(-1, planes[0].shape[1])
    return av.VideoFrame.from_ndarray(packed, format="yuv420p")


def thumbnail(frame: av.VideoFrame) -> np.ndarray:
    """A frame as gray levels, uint8 [16, 16]: enough to tell it from its neighbours."""
    small = frame.reformat(16, 16, "rgb24", interpolation="AREA", threads=1).to_ndarray()
    return small.mean(axis=2).round().astype(np.uint8)


def transcode(source: Path, target: Path, short_side: int, gop: int) -> np.ndarray:
    """Writes `target`: H.264, constant frame rate. One full frame at a time is in memory.

    Returns the thumbnails of the frames written, uint8 [frames, 16, 16]. Raises ValueError or
    av.FFmpegError where the source is damaged.
    """
    rate, end, times = clip_times(source)
    # Without B-frames there is no reordering and no edit list for a reader to get wrong; tuned for
    # it, the clip decodes in little more than half the time and is a tenth larger.
    options = {"crf": "20", "preset": "veryfast", "tune": "fastdecode", "threads": "1"}
    options |= {"g": str(gop), "bf": "0"}
    thumbnails = []
    reader, video = open_clip(source)
    with reader, av.open(str(target), "w", "mp4", options={"movflags": "+faststart"}) as writer:
        writer.metadata["comment"] = settings(short_side, gop)
        video.codec_context.thread_count = 1
        stream = writer.add_stream("libx264", rate=rate, options=options)
        stream.pix_fmt = "yuv420p"

        def write(frame: av.VideoFrame, until: int) -> None:
            quarters = round(frame.rotation / 90) % 4  # PyAV leaves phone clips lying on their side
            across = -1 if quarters % 2 else 1
            if not thumbnails:
                upright = (frame.width, frame.height)[::across]
                stream.width, stream.height = clip_size(*upright, short_side)
            # One colour space for all, the one that readers assume.
            colours = {"dst_colorspace": "ITU601", "dst_color_range": "MPEG"}
            size = (stream.width, stream.height)[::across]
            frame = frame.reformat(*size, "yuv420p", interpolation="AREA", threads=1, **colours)
            frame = turn(frame, quarters) if quarters else frame
            frame.pict_type = 0  # else x264 repeats the source's key frames
            frame.time_base = 1 / rate
            small = thumbnail(frame)
            for pts in range(len(thumbnails), until):
                frame.pts = pts
                writer.mux(stream.encode(frame))
                thumbnails.append(small)

        before, start, shown = None, None, 0.0
        for place, frame in enumerate(reader.decode(video)):  # in sequence: always right
            if frame.is_corrupt:  # patched up by the decoder
                raise ValueError(f"damaged at frame {place}")
            if reader.format.name == "avi" and place < len(times):  # its times are of another order
                shown = times[place]
            else:
                shown = frame.time if frame.pts is not None else shown + float(1 / rate)
            start = shown if start is None else start
            # Each tick gets the last frame shown then; a quarter tick allows for rounded times.
            tick = int(np.ceil((shown - start) * float(rate) - 0.25))
            if before is not None and tick > len(thumbnails):
                write(before, tick)
            before = frame
        if before is None:
            raise ValueError("no frame can be decoded")
        write(before, max(len(thumbnails) + 1, int(np.ceil(end * float(rate) - 0.25))))
        writer.mux(stream.encode(None))
    return np.stack(thumbnails)


def check(path: Path, thumbnails: np.ndarray) -> None:
    """Reads 16 frames as training does, by random access. Raises ValueError if one is wrong."""
    places = np.unique(np.linspace(0, len(thumbnails) - 1, 16).astype(int))
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        frames = reader.get_batch(places[::-1].tolist()).asnumpy()[::-1]  # backwards: all seeks
    except (decord.DECORDError, RuntimeError) as error:
        raise ValueError("decord cannot read the prepared clip") from error
    if len(reader) != len(thumbnails):
        raise ValueError(f"decord sees {len(reader)} of {len(thumbnails)} prepared frames")
    for place, frame in zip(places, frames, strict=True):
        small = thumbnail(av.VideoFrame.from_ndarray(frame, format="rgb24")).astype(np.int16)
        distance = np.abs(thumbnails - small).mean(axis=(1, 2))  # in levels of 255
        if distance[place] > min(distance.min() + 0.5, 8):  # half a level: a still scene
            raise ValueError(f"decord reads another frame than frame {place} of the prepared clip")


def settings(short_side: int, gop: int) -> str:
    """What a prepared clip remembers, so that a run with other flags makes it anew."""
    return f"prepare_clips short_side={short_side} gop={gop}"


def prepare_clip(source: Path, target: Path, short_side: int, gop: int) -> bool:
    """Makes `target`, complete and checked or not at all. Returns False if it was there already.

    Raises ValueError with the reason of a bad clip, OSError where the disk is full.
    """
    # With a process id: a worker that outlives a killed run must not write into the next run's.
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        if target.exists() and target.stat().st_mtime >= source.stat().st_mtime:
            with av.open(str(target)) as container:
                if container.metadata.get("comment") == settings(short_side, gop):
                    return False
        target.unlink(missing_ok=True)  # whatever comes, nothing out of date is delivered
        check(part, transcode(source, part, short_side, gop))
        os.replace(part, target)
        return True
    except (av.FFmpegError, OSError) as error:
        if error.errno in FULL:
            raise OSError(error.errno, "disk full") from None
        raise ValueError(f"not a video, or damaged ({error.strerror})") from None
    finally:
        part.unlink(missing_ok=True)


# ---- One clip, as it is: whether training can read it, and reads it rightly ---------------------

DECODE_SECONDS = 60  # a damaged file can hang a decoder for ever; this bounds it
REMEDY = "try: prepare_clips.py, or ffmpeg -i IN -c:v libx264 -pix_fmt yuv420p OUT.mp4"
EXACT = ("mov", "matroska", "avi")  # containers (.mp4 is a "mov") in which decord finds its frames
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green, blue (ITU-R BT.601)


def clip_problem(path: str, num_frames: int) -> tuple[int, str | None]:
    """(number of frames, None) of a clip that can be read, else (0, the reason in one line).

    Decodes the frames that uniform sampling takes. It may hang or crash: see check_clips.
    """
    codec = "unknown codec"
    try:  # FFmpeg first: decord's messages name neither codec nor remedy
        container, stream = open_clip(Path(path))
        with container:
            coder, kind = stream.codec_context, container.format.name.split(",")[0]
            codec = coder.codec.canonical_name
            packets = [packet for packet in container.demux(stream) if packet.size]
            mixed = kind not in EXACT or kind == "avi" and coder.has_b_frames
            risky = mixed or hard_to_seek(packets)
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        reader.get_batch(spread(len(reader), num_frames, 0.5))
        if risky and wrong_frames(path, num_frames):
            return 0, f"decord mixes up the frames of this {kind} file ({codec}); {REMEDY}"
        return len(packets), None
    except av.FFmpegError as error:
        return 0, f"not a video, or damaged ({error.strerror})"
    except (decord.DECORDError, RuntimeError):
        return 0, f"damaged, or a codec that decord cannot decode ({codec}); {REMEDY}"
    except Exception as error:  # damaged files make PyAV raise what they will
        return 0, " ".join(str(error).split()) or repr(error)


def spread(total: int, num_frames: int, place: float) -> list[int]:
    """One frame in each of `num_frames` equal parts of a clip, at `place` in [0, 1) of the part."""
    return [int((i + place) * total / num_frames) for i in range(num_frames)]


def hard_to_seek(packets: list[av.Packet]) -> bool:
    """Whether a key frame is followed by frames that are shown before it, or never shown."""
    key = -math.inf
    for packet in packets:
        if packet.is_discard or packet.pts is None or packet.pts < key:
            return True
        key = packet.pts if packet.is_keyframe else key
    return False


def wrong_frames(path: str, num_frames: int) -> bool:
    """Whether decord's frames are others than those of a decode of every frame, from the start.

    They are, without an error, where frames before a key frame depend on it (open GOPs: x265's
    default, old XviD files), where B-frames meet AVI, in cuts made without re-encoding, and in
    .mpg and .wmv files. Judged by grey thumbnails of frames all over the clip.
    """
    every = []
    container, stream = open_clip(Path(path))
    with container:
        for frame in container.decode(stream):
            grey = frame.reformat(32, 32, "gray", threads=1).to_ndarray()
            every.append(np.rot90(grey, frame.rotation // 90))
    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1, width=32, height=32)
    if len(reader) != len(every):
        return True
    every = np.stack(every).astype(np.float32)
    for place in (0.5, 0, 0.999):
        indices = spread(len(every), num_frames, place)
        for index, frame in zip(indices, reader.get_batch(indices).asnumpy(), strict=True):
            distance = np.abs(every - frame @ GREY).mean((1, 2))
            # In a still scene any frame will do; below 0.1 of 255 levels is rounding.
            if distance[index] > distance.min() + 0.1:
                return True
    return False


# ---- All clips: each in a process of its own ----------------------------------------------------


def in_processes(
    function, jobs: dict, workers: int, timeout: float, title: str, method="spawn", quiet=False
) -> tuple[dict, dict]:
    """({key: what function(*job) returns}, {key: the exception instead of it}) of {key: job}.

    `workers` jobs at a time; one that hangs or crashes costs no other. `method` starts processes:
    "fork" or "spawn". `quiet`: no progress bar. Raises OSError where the disk is full.
    """
    done, failed = {}, {}
    pool = ProcessPool(workers, context=multiprocessing.get_context(method))
    pace = 0.1 if sys.stderr.isatty() else 10  # seconds; a log wants few lines, and none if short
    bar = {"mininterval": pace, "delay": pace, "disable": quiet}
    try:
        futures = {pool.schedule(function, job, timeout=timeout): key for key, job in jobs.items()}
        for future in tqdm(as_completed(futures), title, len(futures), **bar):
            key = futures[future]
            try:
                done[key] = future.result()
            except TimeoutError:
                failed[key] = TimeoutError(f"not done after {timeout:g} s")
            except ProcessExpired as error:
                reason = f"crashed the process that read it (exit code {error.exitcode})"
                failed[key] = RuntimeError(reason)
            except Exception as error:
                if getattr(error, "errno", None) in FULL:
                    raise
                failed[key] = error
    finally:
        pool.stop()
        pool.join()
    return done, failed


# ---- All clips, as they are: a report of the bad ones, before training --------------------------


def check_clips(clips, num_frames: int, on_bad_clip: str = "error", workers: int = 0):
    """Decodes a sample of every clip before any training: (the good clips, {path: reason}).

    `workers` processes at a time; 0 is as many as this rank has cores.

    `clips` is a datasets.DatasetDict with columns `video` {"path", "bytes"} and `label`, and so are
    the good ones. Each clip is opened in a process of its own, so that one that hangs or crashes a
    decoder is reported as the others are. Several ranks share the work. Raises ValueError with a
    report of all bad clips, or with `on_bad_clip` "skip", where a class has none left.
    """
    import accelerate
    import datasets

    state = accelerate.PartialState()
    workers = workers or max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    paths = [video["path"] for part in clips.values() for video in part["video"]]
    say(f"opening {len(paths)} clips, to be sure of them")
    jobs = {path: (path, num_frames) for path in paths[state.process_index :: state.num_processes]}
    # Forks, as torch's own DataLoader makes them of the same process: a fresh process would import
    # all that train.py does first, 11 s instead of 0.2. On macOS a fork can crash.
    method, quiet = "fork" if sys.platform == "linux" else "spawn", not state.is_main_process
    limit = 2 * DECODE_SECONDS
    done, failed = in_processes(clip_problem, jobs, workers, limit, "check clips", method, quiet)
    found = [(path, total, why) for path, (total, why) in done.items()]
    found += [(path, 0, str(error) or repr(error)) for path, error in failed.items()]
    found = sorted(accelerate.utils.gather_object(found))
    short = [path for path, total, why in found if total < num_frames and not why]
    if short:
        say(f"{len(short)} clips have fewer than {num_frames} frames and repeat some: {short[0]}")
    bad = {path: why for path, _, why in found if why}
    report = "\n".join(f"  {path}: {why}" for path, why in bad.items())
    report = f"{len(bad)} of {len(paths)} clips cannot be read:\n{report}"
    if bad and on_bad_clip == "error":
        raise ValueError(f"{report}\nor leave them out: --on_bad_clip skip")
    if not bad:
        return clips, bad
    say(f"{report}\nthey are left out, as --on_bad_clip skip says")
    good = datasets.DatasetDict()
    for split, part in clips.items():
        places = [i for i, video in enumerate(part["video"]) if video["path"] not in bad]
        good[split] = part.select(places)
        if gone := {*part["label"]} - {*good[split]["label"]}:
            names = [part.features["label"].names[i] for i in sorted(gone)]
            if split == "train" or not places:
                raise ValueError(f"split {split} has no clip left of {names}")
            say(f"warning: split {split} has no clip left of {names}")
    return good, bad


# ---- All clips: prepare them --------------------------------------------------------------------


def output_name(video: Path) -> Path:
    """a.mp4 -> a.mp4, any other name -> that name and .mp4; two clips never get the same.

    The name alone decides: each of several machines sees no more than its share of the clips.
    """
    kept = video.suffix == ".mp4" and Path(video.stem).suffix.lower() not in FORMATS
    return video if kept else video.with_name(f"{video.name}.mp4")


def with_output_names(table: str) -> str:
    """The text of a metadata.csv, with the names of the prepared clips in its column file_name."""
    rows = list(csv.reader(io.StringIO(table)))
    if not rows or "file_name" not in rows[0]:
        return table
    column = rows[0].index("file_name")
    for row in rows[1:]:
        if len(row) > column and Path(row[column]).suffix.lower() in FORMATS:
            row[column] = output_name(Path(row[column])).as_posix()
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def copy(source: Path, target: Path) -> None:
    """Copies a file that is no video, unless it is there already; never half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and target.stat().st_mtime >= source.stat().st_mtime:
        return
    part = target.with_name(f".{target.name}.part")
    if source.name == "metadata.csv":
        part.write_text(with_output_names(source.read_text("utf-8-sig")), "utf-8")
    else:
        shutil.copy2(source, part)
    os.replace(part, target)


def machine(resource_config: str | None) -> tuple[str, bool]:
    """(name of this machine's report of bad clips, whether it is the only machine).

    `resource_config` is the file in which SageMaker tells each instance its name and the others'.
    """
    if not resource_config:
        return "bad_clips.json", True
    if not Path(resource_config).is_file():
        sys.exit(f"{resource_config}: no such file. Leave --resource_config out on a laptop.")
    config = json.loads(Path(resource_config).read_text())
    alone = len(config["hosts"]) == 1
    return "bad_clips.json" if alone else f"bad_clips_{config['current_host']}.json", alone


def prepare(args: argparse.Namespace) -> tuple[dict[str, str], Path]:
    """Prepares all clips, prints a summary, and returns ({path of a bad clip: reason}, report)."""
    began, source, output = (
        time.time(),
        Path(args.input).expanduser(),
        Path(args.output).expanduser(),
    )
    report_name, alone = machine(args.resource_config)
    report = output / report_name
    if output.resolve().is_relative_to(source.resolve()):
        sys.exit(f"{output} is inside {source}: choose an output folder elsewhere")
    files, left_out = files_below(source)
    loose = [v for v in videos_of(files) if not any(p.suffix == ".unpacked" for p in v.parents)]
    if alone and not loose:  # of several machines, one's share may be empty
        try:
            source = fetch(args.input)
        except (OSError, RuntimeError, ValueError) as error:
            sys.exit(str(error).removeprefix("--dataset "))
        files, left_out = files_below(source)
        if not videos_of(files):
            sys.exit(f"{source} holds no videos ({' '.join(FORMATS)})")
    if left_out:
        print(f"{len(left_out)} hidden files or folders are left out: {min(left_out)}", flush=True)
    files = [file.relative_to(source) for file in files]
    outputs = {video: output_name(video) for video in videos_of(files)}
    try:
        for file in files:
            (output / file).parent.mkdir(parents=True, exist_ok=True)
            if file not in outputs and file != Path(report_name):
                copy(source / file, output / file)
        jobs = {
            video: (source / video, output / name, args.short_side, args.gop)
            for video, name in outputs.items()
        }
        made, failed = in_processes(prepare_clip, jobs, args.workers, args.timeout, "prepare clips")
        bad = {}
        for video in sorted(failed, key=str):
            hint = " (--timeout)" if isinstance(failed[video], TimeoutError) else ""
            bad[str(video)] = (str(failed[video]) or repr(failed[video])) + hint
        report.write_text(json.dumps(bad, indent=2)) if bad else report.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in FULL:
            sys.exit(f"{output}: the disk is full. Free some space and run the same command again.")
        raise
    finally:
        for part in output.rglob(".*.part"):  # of a clip that hung, or a run that was killed
            part.unlink(missing_ok=True)
    before = sum((source / video).stat().st_size for video in made) / 1e6
    after = sum((output / outputs[video]).stat().st_size for video in made) / 1e6
    print(
        f"{sum(made.values())} clips prepared, {len(made) - sum(made.values())} already there, "
        f"{len(bad)} bad: {before:.1f} MB -> {after:.1f} MB in {time.time() - began:.0f} s"
    )
    return bad, report


def main(argv: list[str] | None = None) -> None:
    """Runs the script; exits with 1 where clips are bad, unless they are to be skipped."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    clips = "Folder with clips, at any depth, not changed; or an archive; or owner/name on the Hub."
    parser.add_argument("input", help=clips)
    parser.add_argument("output", help="Folder for the prepared clips, in the same folders.")
    parser.add_argument("--short_side", type=int, default=256, help="Pixels; never enlarged.")
    parser.add_argument("--gop", type=int, default=12, help="Frames from key frame to key frame.")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Clips at a time.")
    parser.add_argument("--timeout", type=float, default=600, help="Seconds a clip may take.")
    parser.add_argument("--on_bad_clip", choices=["error", "skip"], default="error")
    parser.add_argument("--resource_config", help="On SageMaker: its resourceconfig.json.")
    args = parser.parse_args(argv)
    bad, report = prepare(args)
    if bad:
        print(f"{len(bad)} bad clips, also in {report}:", file=sys.stderr)
        print("\n".join(f"  {video}: {reason}" for video, reason in bad.items()), file=sys.stderr)
    if bad and args.on_bad_clip == "error":
        sys.exit(1)


if __name__ == "__main__":
    main()
