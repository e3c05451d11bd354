#!/usr/bin/env python3
"""From recordings, or clips in folders, to a data set that train.py reads fast and rightly.

Prepare:  python prepare_clips.py my_clips my_clips_prepared
    my_clips/<split>/<label>/<any video>  ->  my_clips_prepared/<split>/<label>/*.mp4
Cut:      python prepare_clips.py recordings my_clips --cut table.csv [--background 3]
Check:    python prepare_clips.py my_clips --check_only       (changes nothing)

**Clips** are found in <split>/<label>/, in a metadata.csv or metadata.jsonl (file_name, label, and
maybe split and group), in lists `path label` (train.txt, val.csv), and, with --frame_rate 25, in
folders of numbered pictures. The input may be an archive, or owner/name of a data set on the Hub.
a.mp4 keeps its name, and any other clip gets .mp4 appended to its own: b.avi becomes b.avi.mp4.

**A table to cut by** has the columns file, start, end, label, and maybe split and group. Times are
seconds or hh:mm:ss.mmm. The frame shown at start is the first, and the first one at end is left
out. Exports of ELAN (tab-delimited text), CVAT (XML for video or images 1.1) and Label Studio
(JSON) are read as they are: see clip_tables.py. --background 3 adds clips of each recording from
where nothing is marked.

**Splits**: where there is no validation or test split, whole groups are drawn: the column group,
else the recording, else the clip. clips_report.json keeps what was drawn: the next run into the
same folder draws the same.

**Bad clips** are named in one report and in bad_clips.json (of several instances:
bad_clips_<host>.json); all good ones are prepared all the same. --on_bad_clip skip goes on past
them; keep_whole_part saves what comes before the damage. Run the same line again after an
interruption: it goes on where it stopped.

SageMaker: a Processing job, on as many instances as you like, with the arguments
    /opt/ml/processing/input/clips /opt/ml/processing/output --on_bad_clip skip
    --resource_config /opt/ml/config/resourceconfig.json
  With the input distributed ShardedByS3Key, each instance prepares its share of the clips, and all
  upload to one prefix; no split is drawn. Of a failed job, count on no output at all: skip there.

clip_files.py and clip_tables.py must lie beside this file. Beside train.py, it finds the clips
(load_clips) and opens each of them before training (check_clips): every file is read from start to
end, also where SageMaker fetches a file only when it is read (FastFile), and every frame of a clip
that this script has not prepared is decoded.
"""

import argparse
import csv
import hashlib
import io
import json
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
from collections import Counter
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path

import clip_tables
import numpy as np
from clip_files import (
    FORMATS,
    FULL,
    PICTURES,
    PREPARED,
    Timing,
    clip_problem,
    clip_times,
    decode,
    frames_of,
    natural,
    pictures_timing,
    prepare_clip,
    settings_of,
    unreadable_width,
)
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")


# ---- A data set: its files ----------------------------------------------------------------------

# The one walk of a tree: for training, preparing, uploading and segmentation.
CLUTTER = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini")  # of macOS and Windows


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
    if found and any(f.name in TABLES or split_of_list(f) for f in place.glob("[!.]*.*")):
        return place
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
TABLES = ("metadata.csv", "metadata.jsonl")  # as the videofolder of `datasets` reads them
TITLE = "prepare clips"
COLUMNS = ("split", "label", "clips", "groups", "minutes")  # of the report
OUR_COLUMNS = ("file_name", "label", "split", "group")  # how the header of our own table begins
OWN = ("clips_report.json", "bad_clips")  # how the names begin of what this script writes


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


@dataclass
class Found:
    """The clips of a data set, and what else is there.

    rows: dicts of `video` (a file, or a folder of numbered pictures), `label`, `split`, `group`
    (what must stay in one split) and what else a table says of the clip.
    """

    rows: list[dict] = field(default_factory=list)
    labels: set[str] = field(default_factory=set)  # of train, with those that have no clips
    problems: list[str] = field(default_factory=list)  # one line each
    left_out: list[Path] = field(default_factory=list)
    named_by: set[Path] = field(default_factory=set)  # the tables and lists that were read


def find_clips(root: Path, pictures: bool = False) -> Found:
    """Finds the clips of a data set in the layouts that people have; none is opened.

    Clips below a folder with a table (metadata.csv or .jsonl) are those that the table names; lists
    `path label` (train.txt, val.csv, ...) name clips where no folder is a split; all others lie in
    <split>/<label>/. With `pictures`, a folder of numbered pictures is a clip.
    Raises ValueError for labels that look the same, or two tables in one folder.
    """
    files, left_out = files_below(root)
    found = Found(left_out=left_out)
    folders = frame_folders(files) if pictures else {}
    clips = [*videos_of(files), *folders]
    read = [(file, table_rows(file)) for file in files if file.name in TABLES]
    tables = {table.parent: rows for table, rows in read if rows}
    if len(tables) < sum(bool(rows) for _, rows in read):
        raise ValueError(f"{root}: a folder has metadata.csv and metadata.jsonl; keep one")
    found.named_by |= {file for file, rows in read if rows}
    lists = [file for file in files if file.parent == root and split_of_list(file)]
    for folder, rows in tables.items():
        add_table(found, root, folder, rows, {*tables} - {folder, *folder.parents})
    inside = [clip for clip in clips if not tables.keys() & {*clip.parents}]
    if lists and not any(clip.relative_to(root).parts[0] in SPLITS for clip in clips):
        found.named_by |= {*lists}
        for file in lists:
            add_list(found, root, file)
    else:
        add_folders(found, root, inside, {*tables})
    named = {row["video"] for row in found.rows} | {f for fs in folders.values() for f in fs}
    own = [f for f in files if f.name in TABLES or f.name.startswith(OWN) or f in lists]
    found.left_out += [file for file in files if file not in named and file not in own]
    return found


def frame_folders(files: list[Path]) -> dict[Path, list[Path]]:
    """{folder: its pictures} where these are numbered, two or more, with no video beside."""
    inside = {}
    for file in files:
        inside.setdefault(file.parent, []).append(file)
    found = {}
    for folder, those in inside.items():
        pictures = [file for file in those if file.suffix.lower() in PICTURES]
        numbered = len(pictures) > 1 and all(re.search("[0-9]", file.stem) for file in pictures)
        if numbered and not videos_of(those):
            found[folder] = pictures
    return found


def table_rows(table: Path) -> list[dict]:
    """The rows of a metadata.csv or metadata.jsonl that name a file. Raises ValueError."""
    try:
        text = table.read_text("utf-8-sig")
        if table.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [row | {"file_name": str(row["file_name"])} for row in rows if row.get("file_name")]
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, AttributeError) as error:
        raise ValueError(f"{table}: not UTF-8, or no table ({error})") from None


def add_table(found: Found, root: Path, folder: Path, rows: list[dict], inner_tables: set) -> None:
    """Adds the clips that the table in `folder` names, but for those below `inner_tables`, folders
    with a table of their own."""
    seen = set()
    known_bad = bad_clips_of(root)
    for place, row in enumerate(rows, 1):
        where = f"{folder}/metadata, clip {place}"
        video = as_on_disk(folder / row["file_name"])
        inner = Path(os.path.relpath(video, root)).parts
        if inner_tables & {*video.parents}:
            continue
        label = row.get("label")
        if label is None and len(inner) > 2 and inner[0] in SPLITS:
            label = inner[1]
        split = row.get("split") or (inner[0] if inner[0] in SPLITS else "train")
        label = unicodedata.normalize("NFC", str("" if label is None else label)).strip()
        if "/".join(inner) in known_bad and not video.exists():
            found.left_out.append(video)
        elif video.is_file() and not videos_of([video]):
            found.left_out.append(video)
        elif not video.exists():
            found.problems.append(f"{where}: no such file: {video}")
        elif video in seen:
            found.problems.append(f"{where}: {video} is there twice")
        elif not label:
            found.problems.append(f"{where}: {video} has no label")
        elif split not in SPLITS:
            found.problems.append(f"{where}: a split is one of {', '.join(SPLITS)}, not {split}")
        else:
            more = {"video": video, "label": label, "split": SPLITS[split]}
            found.rows.append(row | more | {"group": str(row.get("group") or "/".join(inner))})
        seen.add(video)
    found.labels |= {row["label"] for row in found.rows if row["split"] == "train"}


def as_on_disk(path: Path) -> Path:
    """The path with accents in the form in which the file has them, if there is one."""
    forms = [Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD")]
    return next((form for form in [path, *forms] if form.exists()), path)


def bad_clips_of(root: Path) -> set[str]:
    """The clips that are not there, since prepare_clips.py found them bad: below `root`."""
    reports = [json.loads(file.read_text()) for file in root.glob("bad_clips*.json")]
    return {output_name(Path(video)).as_posix() for report in reports for video in report}


def split_of_list(file: Path) -> str:
    """The split that a list is named after (train.csv, ucf101_val_split_1_videos.txt), or ""."""
    if file.suffix.lower() not in (".txt", ".csv", ".list") or file.name in TABLES:
        return ""
    found = re.findall("(?:^|[_-])(train|validation|val|test)(?=[_-]|$)", file.stem.lower())
    return SPLITS[found[0]] if found else ""


def add_list(found: Found, root: Path, file: Path) -> None:
    """Adds the clips of a list with a line `path label` for each, or `path frames label`.

    VideoMAE has such lists (train.csv), and mmaction (train_list.txt, for folders of pictures too).
    Paths are taken as below `root`, or below a folder in it.
    """
    places = [root, *sorted(place for place in root.glob("[!.]*/"))]
    for number, line in enumerate(file.read_text("utf-8-sig").splitlines(), 1):
        parts = re.fullmatch(r"(.+?)[ ,\t]+(\S+)", line.strip())
        if not parts:
            if line.strip():
                found.problems.append(f"{file}, line {number}: not `path label`: {line.strip()}")
            continue
        name, label = parts[1], unicodedata.normalize("NFC", parts[2])
        shorter = re.sub(r"[ ,\t]+[0-9]+$", "", name)  # without the number of its pictures
        tried = (as_on_disk(p / n) for n in (name, shorter) for p in places if n)
        clip, group = next((path for path in tried if path.exists()), None), name
        if clip is None:
            found.problems.append(f"{file}, line {number}: no such clip below {root}: {name}")
            continue
        if clip.absolute().is_relative_to(root.absolute()):
            group = clip.absolute().relative_to(root.absolute()).as_posix()
            clip = root / group
        row = {"video": clip, "label": label, "split": split_of_list(file), "group": group}
        found.rows.append(row)
    found.labels |= {row["label"] for row in found.rows if row["split"] == "train"}


def add_folders(found: Found, root: Path, clips: list[Path], tables: set[Path]) -> None:
    """Adds the clips that lie in <split>/<label>/, at any depth; not in folders with `tables`."""
    label_of = {}  # {(folder of the split, folder of the label): label}
    for name in SPLITS:
        places = [p for p in sorted(root.glob(f"{name}/[!.]*/")) if not tables & {p, *p.parents}]
        folders = [place.name for place in places if place.name.lower() not in CLUTTER]
        keys = [(name, folder) for folder in folders]
        label_of |= zip(keys, one_form(folders, f"{root}/{name}"), strict=True)
    found.labels |= {label for (name, _), label in label_of.items() if name == "train"}
    for clip in clips:
        name, *inner = clip.relative_to(root).parts
        if name in SPLITS and len(inner) < 2:
            found.problems.append(f"{clip}: a clip without a label; it goes into {name}/<label>/")
        elif name in SPLITS:
            label, group = label_of[name, inner[0]], clip.relative_to(root).as_posix()
            row = {"video": clip, "label": label, "split": SPLITS[name], "group": group}
            found.rows.append(row)


def in_order(found: Found) -> list[str]:
    """Labels as the model numbers them: by the alphabet; numbers in lists and tables by size."""
    labels = sorted(found.labels)
    by_size = found.named_by and all(label.isdecimal() for label in labels)
    return sorted(labels, key=int) if by_size else labels


def load_clips(dataset: str, seed: int = 42):
    """The clips that train.py trains on, as a datasets.DatasetDict; none is decoded.

    Columns: `video` {"path", "bytes"} and `label`. See fetch for `dataset`, find_clips for layouts.
    Without a validation split, a seventh of the training clips becomes one, in whole groups. Raises
    ValueError for a clip without a label, a label that train/ does not have, or a label in train/
    without clips.
    """
    import datasets

    root = fetch(dataset)
    where = f"--dataset {root}"
    found = find_clips(root)
    inside = [r["video"].relative_to(root) for r in found.rows if r["video"].is_relative_to(root)]
    if {"val", "validation"} <= {path.parts[0] for path in inside}:
        raise ValueError(f"{where}: val and validation are the same split; keep one")
    labels, rows, problems = in_order(found), found.rows, found.problems
    if len(labels) < 2 and not problems:
        raise ValueError(
            f"{where}: a classifier needs two classes or more, found {labels}. "
            "Put the clips into train/<label>/, one folder per label."
        )
    one_form(labels, where)
    for row in rows:
        if row["label"] not in labels:
            unknown = f"split {row['split']} has a label that train has not: {ascii(row['label'])}"
            problems.append(f"{row['video']}: {unknown}")
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise ValueError("\n".join(problems[:20] + more))
    say_what_is_left_out(root, found)
    missing = sorted({*labels} - {row["label"] for row in rows if row["split"] == "train"})
    if missing:
        raise ValueError(f"{where}: split train has no clips of {missing}")
    if not any(row["split"] == "validation" for row in rows):
        draw_validation(rows, where, seed)
    types = {"video": datasets.Video(decode=False), "label": datasets.ClassLabel(names=labels)}
    clips = datasets.DatasetDict()
    for split in [name for name in SPLITS if any(row["split"] == name for row in rows)]:
        part = [row for row in rows if row["split"] == split]
        lacking = sorted({*labels} - {row["label"] for row in part})
        if lacking:
            say(f"warning: {where}: split {split} has no clips of {lacking}")
        columns = {"video": [str(r["video"]) for r in part], "label": [r["label"] for r in part]}
        clips[split] = datasets.Dataset.from_dict(columns, datasets.Features(types))
    return clips


def say_what_is_left_out(root: Path, found: Found) -> None:
    """Says how many files are not taken, and which folders are no splits."""
    below = [f for f in found.left_out if f.parent != root and f.is_relative_to(root)]
    top = {f: f.relative_to(root).parts[0] for f in below}
    no_split = (name for name in top.values() if name not in SPLITS and name[0] != ".")
    strays = sorted({name for name in no_split if name.lower() not in CLUTTER})
    inside = [file for file in found.left_out if top.get(file) not in strays]
    if inside:
        say(f"ignored, as hidden, no video or in no table: {len(inside)}, such as {inside[-1]}")
    if strays:
        say(f"{root}: folders that are no split are left out: {strays}")


def draw(rows: list[dict], shares: dict[str, float], seed: int, known=None) -> list[str]:
    """The split of each row, see clip_tables.draw_splits; of rows in train, some are drawn.

    A group that the data set itself has in train and elsewhere is not drawn from.
    """
    splits = {}
    for row in rows:
        splits.setdefault(row["group"], set()).add(row["split"])
    torn = {group for group, names in splits.items() if len(names) > 1}
    free = [row for row in rows if row["group"] not in torn]
    free = [row | {"split": row["split"].replace("train", "")} for row in free]
    drawn = iter(clip_tables.draw_splits(free, shares, seed, known))
    return [row["split"] if row["group"] in torn else next(drawn) for row in rows]


def draw_validation(rows: list[dict], where: str, seed: int) -> None:
    """Makes whole groups of training clips the validation split. Raises ValueError."""
    drawn = draw(rows, {"validation": 1 / 7}, seed)
    for row, split in zip(rows, drawn, strict=True):
        row["split"] = split
    share = drawn.count("validation")
    counts = Counter(row["label"] for row in rows if row["split"] != "test")
    single = sorted(label for label, count in counts.items() if count < 2)
    if single:
        raise ValueError(f"{where}: too few clips for a validation split, one only of {single}")
    if not share:
        raise ValueError(f"{where}: too few groups of clips to draw a validation split")
    gone = {row["label"] for row in rows} - {r["label"] for r in rows if r["split"] == "validation"}
    lacking = f"; none of {sorted(gone)}" if gone else ""
    say(f"no validation split: {share} training clips become one{lacking}")


def say(text: str) -> None:
    """Prints; of several processes, only the first one does."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


# ---- All clips: each in a process of its own ----------------------------------------------------


def in_processes(
    function, jobs: dict, workers: int, timeout, title: str, method="spawn", quiet=False
) -> tuple[dict, dict]:
    """({key: what function(*job) returns}, {key: the exception instead of it}) of {key: job}.

    `workers` jobs at a time; one that hangs or crashes costs no other. `timeout`: seconds, one
    number for all or {key: number}. `method` starts processes: "fork" or "spawn". `quiet`: no
    progress bar. Raises OSError where the disk is full.
    """
    done, failed, locks = {}, {}, []
    context = type(multiprocessing.get_context(method))()  # one of our own
    new_lock = context.RLock
    # Kept until the end: join() drops them first, and a worker that still starts would then print a
    # traceback (FileNotFoundError).
    context.RLock = lambda: locks.append(new_lock()) or locks[-1]
    pool = ProcessPool(max(1, min(workers, len(jobs))), context=context)
    pace = 0.1 if sys.stderr.isatty() else 10  # seconds; a log wants few lines, and none if short
    bar = {"mininterval": pace, "delay": pace, "disable": quiet}
    try:
        limits = timeout if isinstance(timeout, dict) else dict.fromkeys(jobs, timeout)
        futures = {
            pool.schedule(function, job, timeout=limits[key]): key for key, job in jobs.items()
        }
        for future in tqdm(as_completed(futures), title, len(futures), **bar):
            key = futures[future]
            try:
                done[key] = future.result()
            except TimeoutError:
                failed[key] = TimeoutError(f"not done after {limits[key]:g} s")
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


DECODE_SECONDS = 60  # a damaged file can hang a decoder for ever; this bounds it


def check_clips(clips, num_frames: int, on_bad_clip: str = "error", workers: int = 0):
    """Opens every clip before any training, see clip_problem: (the good clips, {path: reason}).

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
    sizes = {path: os.path.getsize(path) if os.path.exists(path) else 0 for path in jobs}
    limits = {path: 2 * DECODE_SECONDS + size // 10**6 for path, size in sizes.items()}
    done, failed = in_processes(clip_problem, jobs, workers, limits, "check clips", method, quiet)
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


# ---- All clips: which are to be made ------------------------------------------------------------


@dataclass
class Plan:
    """What is to be made: jobs {what the report calls it: arguments of prepare_clip}, rows for the
    table of the result, {what: why not}, and files that are copied."""

    jobs: dict[str, tuple] = field(default_factory=dict)
    rows: dict[str, dict] = field(default_factory=dict)  # by the names in jobs
    bad: dict[str, str] = field(default_factory=dict)
    others: list[Path] = field(default_factory=list)

    names: dict[Path, str] = field(default_factory=dict)  # of the jobs, by what they write

    def add(self, name: str, job: tuple) -> bool:
        """Adds a job, or names it as bad where another one writes the same clip."""
        if job[1] in self.names or name in self.jobs:
            other = self.names.get(job[1], name)
            self.bad[name] = f"its clip would have the name of that of {other}"
            return False
        self.jobs[name], self.names[job[1]] = job, name
        return True


def output_name(video: Path) -> Path:
    """a.mp4 -> a.mp4, any other name -> that name and .mp4; two videos never get the same.

    The name alone decides: each of several machines sees no more than its share of the clips.
    """
    kept = video.suffix == ".mp4" and Path(video.stem).suffix.lower() not in FORMATS
    return video if kept else video.with_name(f"{video.name}.mp4")


def sources(source: Path, args: argparse.Namespace, alone: bool) -> tuple[dict, list[Path]]:
    """({clip: its Timing, for a folder of pictures}, other files) below `source`.

    Raises ValueError where folders of numbered pictures are to be clips and there are none.
    """
    files, left_out = files_below(source)
    if left_out:
        print(f"{len(left_out)} hidden files or folders are left out: {min(left_out)}", flush=True)
    folders = frame_folders(files)
    in_splits = any(video.relative_to(source).parts[0] in SPLITS for video in videos_of(files))
    lists = [file for file in files if file.parent == source and split_of_list(file)]
    if not alone and (args.frame_rate or lists and not in_splits):
        raise ValueError("folders of pictures and lists of clips need a single machine")
    if args.frame_rate and not folders:
        raise ValueError(f"--frame_rate: {source} has no folder of numbered pictures")
    if folders and not args.frame_rate:
        print(f"{len(folders)} folders of pictures are no clips without --frame_rate", flush=True)
    clips, taken = {video: None for video in videos_of(files)}, set()
    if args.frame_rate:
        clips |= {f: pictures_timing(len(p), args.frame_rate) for f, p in folders.items()}
        taken = {file for pictures in folders.values() for file in pictures}
    return clips, [file for file in files if file not in clips and file not in taken]


def labelled(source: Path, clips: dict, plan: Plan, args: argparse.Namespace, alone: bool):
    """({clip: its row}, the tables and lists that name them); what is wrong goes into the plan.

    Raises ValueError for a table that cannot be read.
    """
    for table in [file for file in plan.others if file.name in TABLES]:
        table_rows(table)
    try:
        found = find_clips(source, bool(args.frame_rate))
    except ValueError as error:
        found = Found(problems=[str(error)])
    rows = {row["video"]: row for row in found.rows if row["video"] in clips}
    if alone and found.named_by and found.rows:
        plan.bad |= {where: why for where, _, why in (p.partition(": ") for p in found.problems)}
        outside = "not prepared: neither a video below the input nor, with --frame_rate, pictures"
        plan.bad |= {str(row["video"]): outside for row in found.rows if row["video"] not in clips}
    elif found.problems and alone:
        problems = "\n".join(found.problems[:20])
        print(f"train.py would refuse this data set:\n{problems}", flush=True)
        rows = {}
    return rows, found.named_by


def plan_clips(source: Path, output: Path, args: argparse.Namespace, alone: bool) -> Plan:
    """Each clip below `source`, in the same folders; in those of the drawn split where one lacks.

    Raises ValueError: see sources and labelled.
    """
    plan, whole_part = Plan(), args.on_bad_clip == "keep_whole_part"
    clips, plan.others = sources(source, args, alone)
    rows, named_by = labelled(source, clips, plan, args, alone)
    drawn = draw_missing(rows, output, args) if alone else {}
    # Names, labels and splits go into a table of our own where the one given will not do.
    lists = any(file.name not in TABLES for file in named_by)
    anew = drawn or args.frame_rate or lists or plan.bad or is_ours(output / "metadata.csv")
    anew = bool(anew and rows and alone)
    tables = named_by if anew else set()
    for table in [output / table.relative_to(source) for table in tables]:
        if table != output / "metadata.csv":
            table.unlink(missing_ok=True)  # copied by an earlier run
    plan.others = [file for file in plan.others if file not in tables]
    for clip, timing in clips.items():
        inner = clip.relative_to(source)
        target = inner
        if clip in drawn and inner.parts[0] in SPLITS and rows[clip]["split"] != drawn[clip]:
            target = Path(drawn[clip], *inner.parts[1:])
        target = output_name(target)
        job = (clip, output / target, args.short_side, args.gop, timing, whole_part)
        if not plan.add(str(inner), job):
            continue
        if clip in rows and anew:
            row = {k: v for k, v in rows[clip].items() if k not in ("video", "file_name")}
            split = drawn.get(clip, row["split"])
            plan.rows[str(inner)] = {"file_name": target.as_posix()} | row | {"split": split}
        elif clip in rows:
            plan.rows[str(inner)] = rows[clip] | {"file_name": ""}
    return plan


def draw_missing(rows: dict, output: Path, args: argparse.Namespace) -> dict[Path, str]:
    """{clip: its split} where a validation or test split lacks and whole groups were drawn for it.

    What an earlier run drew, and wrote down in the clips_report.json of `output`, stays as it is;
    groups that come later are drawn among themselves, so that a single one joins train.
    """
    shares = {"validation": args.validation_share, "test": args.test_share}
    given = {row["split"] for row in rows.values()}
    shares = {split: share for split, share in shares.items() if split not in given and share > 0}
    count, labels = len(rows), {row["label"] for row in rows.values()}
    if not rows:
        return {}
    groups = {row["group"] for row in rows.values()}
    known = {group: split for group, split in written_down(output).items() if group in groups}
    known = {group: split for group, split in known.items() if split in ("train", *shares)}
    lacking = {split: n for split, n in shares.items() if split not in known.values()}
    for split in [split for split, share in lacking.items() if share * count < len(labels)]:
        print(f"no {split} split, and too few clips ({count}) to draw one", flush=True)
        del shares[split], lacking[split]
    if not shares:
        return {}
    if lacking:  # it is drawn from what was left for training
        known = {group: split for group, split in known.items() if split != "train"}
    drawn = draw([*rows.values()], lacking or shares, args.seed, known)
    for split in shares:
        there = {r["label"] for r, name in zip(rows.values(), drawn, strict=True) if name == split}
        count = drawn.count(split)
        what = f": {count} clips become one, in whole groups" if count else ", and too few groups"
        gone = f"; none of {sorted(labels - there)}" if count and labels - there else ""
        print(f"no {split} split{what}{gone}", flush=True)
    return dict(zip(rows, drawn, strict=True))


def rows_to_cut(source: Path, args: argparse.Namespace, plan: Plan) -> tuple[list, dict, dict]:
    """(good rows of the table and of the background, {recording: its file}, {recording: Timing}).

    What is wrong with other rows goes into the plan. Raises ValueError for a table that cannot be
    read.
    """
    try:
        rows, problems = clip_tables.read_table(Path(args.cut).expanduser(), args.encoding)
    except OSError as error:
        raise ValueError(f"--cut {args.cut}: {error.strerror}") from None
    folder = source.parent if source.is_file() else source
    videos = videos_of([source] if source.is_file() else files_below(source)[0])
    if not videos:
        what = f"holds no videos ({' '.join(FORMATS)})" if source.exists() else "does not exist"
        raise ValueError(f"{source} {what}: the recordings that {args.cut} names are needed there")
    recordings = {video.relative_to(folder).as_posix(): video for video in videos}
    for row in rows:
        row["file"] = recording_of(row, [*recordings])
    used = {name: (recordings[name],) for name in sorted({r["file"] for r in rows} & {*recordings})}
    limit = (args.workers, args.timeout, "read recordings")
    timings, failed = in_processes(clip_times, used, *limit)
    for name, error in failed.items():
        why = getattr(error, "strerror", None)  # of FFmpeg, whose whole text is long
        plan.bad[name] = f"not a video, or damaged ({why})" if why else str(error) or repr(error)
    rows = [row for row in rows if row["file"] not in failed]
    if any("start_frame" in row for row in rows) and not args.label_frame_rate:
        print(
            "the table counts in frames, taken as the recording's own; Label Studio counts by the "
            "frameRate of its labelling configuration: if it is another, name --label_frame_rate",
            flush=True,
        )
    rows = [in_seconds(row, timings, args.label_frame_rate) for row in rows]
    seconds = {name: timing.seconds() for name, timing in timings.items()}
    readable = [name for name in recordings if name not in failed]
    for row in rows:
        row["group"] = row["group"] or row["file"]
    good, more = clip_tables.check_rows(rows, dict.fromkeys(readable, 0.0) | seconds)
    for line in problems + more:
        where, _, why = line.partition(": ")
        plan.bad[where] = f"{plan.bad[where]}; {why}" if where in plan.bad else why
    if args.background and problems:
        plan.bad["--background"] = "not drawn while rows of the table cannot be read"
    elif args.background:
        good += background(good, rows, seconds, args)
    return good, recordings, timings


def plan_cuts(source: Path, output: Path, args: argparse.Namespace) -> Plan:
    """A clip for each row of the table `args.cut`, and `args.background` more of each recording.

    Raises ValueError for a table that cannot be read.
    """
    plan = Plan()
    good, recordings, timings = rows_to_cut(source, args, plan)
    for row in good:
        row["group"] = row["group"] or row["file"]
    given = {row["group"]: row["split"] for row in good if row["split"]}
    for row in good:
        row["split"] = given.get(row["group"], "")
    keyed = {i: row | {"split": row["split"] or "train"} for i, row in enumerate(good)}
    drawn = draw_missing(keyed, output, args)
    for place, row in keyed.items():
        timing = timings[row["file"]]
        first, stop = frames_of(timing, row["start"], row["end"])
        split = drawn.get(place, row["split"])
        span = f"{row['start']:.3f}-{row['end']:.3f}"
        target = Path(split, row["label"], f"{row['file']}_{span}.mp4")
        part = timing.part(first, stop)
        job = (recordings[row["file"]], output / target, args.short_side, args.gop, part, False)
        if not plan.add(row["row"], job):
            continue
        kept = {k: v for k, v in row.items() if k not in ("row", "file_alternative", "eaf")}
        plan.rows[row["row"]] = {"file_name": target.as_posix()} | kept | {"split": split}
    return plan


def background(good: list[dict], rows: list[dict], seconds: dict, args) -> list[dict]:
    """Rows where none of `rows` is, as long as those of `good`. Raises ValueError for the label."""
    label = args.background_label
    if clip_tables.label_problems(label):
        raise ValueError(f"--background_label {label}: no name of a folder")
    labels = {row["label"] for row in good} - {label}
    one_form([*labels, label], "--background_label and labels")
    return clip_tables.background_rows(good, seconds, args.background, label, args.seed, rows)


def recording_of(row: dict, names: list[str]) -> str:
    """The one of `names` (paths below the input folder) that a row of a table means."""
    parts = {name: Path(unicodedata.normalize("NFC", name)).parts for name in names}
    for given in (row["file"], row.get("file_alternative") or row["file"]):
        wanted = Path(unicodedata.normalize("NFC", given.replace("\\", "/"))).parts
        same = [name for name in names if wanted == parts[name]]
        for name in [] if same or not wanted else names:  # one may say more of the folders above
            length = min(len(wanted), len(parts[name]))
            same += [name] * (wanted[-length:] == parts[name][-length:])
        if len(same) == 1:
            return same[0]
    return names[0] if not row["file"] and len(names) == 1 else row["file"]


def in_seconds(row: dict, timings: dict[str, Timing], label_frame_rate: float | None) -> dict:
    """The row with `start` and `end` in seconds, also where a tool counts in frames: in those of
    the recording, or by a clock of its own of `label_frame_rate`."""
    if "start" in row:
        return row
    if label_frame_rate or row["file"] not in timings:
        rate = label_frame_rate or 25
        return row | {"start": row["start_frame"] / rate, "end": row["end_frame"] / rate}
    timing = timings[row["file"]]
    shown, tick = timing.times - timing.times[0], 1 / float(timing.rate)
    ends = [*shown, timing.seconds()]
    places = row["start_frame"], row["end_frame"]
    start, end = (
        ends[p] if p < len(ends) else timing.seconds() + (p - len(shown)) * tick for p in places
    )
    rest = {k: v for k, v in row.items() if k not in ("start_frame", "end_frame")}
    return rest | {"start": float(start), "end": float(end)}


# ---- All clips: prepare them --------------------------------------------------------------------


def with_output_names(table: Path, folder: Path | None = None) -> str:
    """The text of a metadata table, with the names of the prepared clips as file_name; without the
    rows of clips that are not in `folder`, if given."""
    text = table.read_text("utf-8-sig")

    def is_video(name: str) -> bool:
        return Path(name).suffix.lower() in FORMATS

    def there(name: str) -> bool:
        return not folder or not is_video(name) or (folder / name).exists()

    def rename(name: str) -> str:
        return output_name(Path(name)).as_posix()

    if table.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        for row in rows:
            if is_video(str(row.get("file_name", ""))):
                row["file_name"] = rename(row["file_name"])
        rows = [row for row in rows if there(str(row.get("file_name", "")))]
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    rows = list(csv.reader(io.StringIO(text)))
    if not rows or "file_name" not in rows[0]:
        return text
    column = rows[0].index("file_name")
    for row in rows[1:]:
        if len(row) > column and is_video(row[column]):
            row[column] = rename(row[column])
    rows[1:] = [row for row in rows[1:] if len(row) <= column or there(row[column])]
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(rows)
    return lines.getvalue()


def copy(source: Path, target: Path, alone: bool) -> None:
    """Copies a file that is no video, unless it is there already; never half of it. A table names
    only clips that are there, where this machine is the only one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    table = source.name in TABLES
    if target.exists() and target.stat().st_mtime >= source.stat().st_mtime and not table:
        return
    part = target.with_name(f".{target.name}.part")
    if table:
        part.write_text(with_output_names(source, target.parent if alone else None), "utf-8")
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
    began, source = time.time(), Path(args.input).expanduser()
    output = Path(args.output).expanduser()
    report_name, alone = machine(args.resource_config)
    report = output / report_name
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        sys.exit(f"{output} is inside {source}: choose an output folder elsewhere")
    try:
        if args.cut:
            if source.suffix.lower() not in FORMATS and not source.is_dir():
                source = where_clips_are(source, args)
            plan = plan_cuts(source, output, args)
        else:
            source = where_clips_are(source, args) if alone else source
            plan = plan_clips(source, output, args, alone)
        for job in plan.jobs.values():
            job[1].parent.mkdir(parents=True, exist_ok=True)
        made, failed = in_processes(prepare_clip, plan.jobs, args.workers, args.timeout, TITLE)
        for file in plan.others:
            if not file.name.startswith(OWN):
                copy(file, output / file.relative_to(source), alone)
        for name in failed:
            hint = " (--timeout)" if isinstance(failed[name], TimeoutError) else ""
            plan.bad[name] = (str(failed[name]) or repr(failed[name])) + hint
        bad = {name: plan.bad[name] for name in sorted(plan.bad, key=natural)}
        output.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(bad, indent=2)) if bad else report.unlink(missing_ok=True)
        rows = {name: row for name, row in plan.rows.items() if name in made}
        if alone:
            write_table(output, [row for row in rows.values() if row["file_name"]])
            remove_moved(output, plan, 2 if args.cut else 1, args.mirror)
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error).removeprefix("--dataset "))
    except OSError as error:
        if error.errno in FULL:
            sys.exit(f"{output}: the disk is full. Free some space and run the same command again.")
        if isinstance(error, (FileNotFoundError, PermissionError)):
            sys.exit(str(error).removeprefix("--dataset "))
        raise
    finally:
        for part in output.rglob(".*.part"):  # of a clip that hung, or a run that was killed
            part.unlink(missing_ok=True)
    tell_all(plan, made, len(bad), output if alone else None, time.time() - began)
    return bad, report


def where_clips_are(source: Path, args: argparse.Namespace) -> Path:
    """The folder with the clips of args.input, which may be an archive or on the Hub."""
    files, _ = files_below(source)
    loose = [v for v in videos_of(files) if not any(p.suffix == ".unpacked" for p in v.parents)]
    if loose or args.frame_rate and source.is_dir():
        return source
    source = fetch(args.input)
    files, _ = files_below(source)
    if not videos_of(files):
        hint = ". Are its pictures frames of clips? Then say --frame_rate" * bool(
            frame_folders(files)
        )
        raise ValueError(f"{source} holds no videos ({' '.join(FORMATS)}){hint}")
    return source


def write_table(output: Path, rows: list[dict]) -> None:
    """Writes metadata.csv: the clips that are there, with label, split and group; whole or not."""
    if not rows:
        return
    names = dict.fromkeys(OUR_COLUMNS)
    names |= dict.fromkeys(name for row in rows for name in row if name)
    part = output / ".metadata.csv.part"
    with open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*names], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: natural(row["file_name"])))
    os.replace(part, output / "metadata.csv")


def is_ours(table: Path) -> bool:
    """Whether write_table wrote it."""
    return table.exists() and table.read_bytes().startswith(",".join(OUR_COLUMNS).encode())


def written_down(output: Path) -> dict[str, str]:
    """{group: its split} of the last run into `output`."""
    report = output / "clips_report.json"
    return json.loads(report.read_text("utf-8")).get("split_of", {}) if report.exists() else {}


def remove_moved(output: Path, plan: Plan, depth: int, mirror: bool = False) -> None:
    """Deletes what the last run wrote of the same clip into the folder of another split, or, with
    `depth` 2, label: else a clip would be in training and in test. With `mirror`, deletes all that
    was prepared and is not of this run. Says what else is not of today."""
    known, targets = written_down(output), {job[1] for job in plan.jobs.values()}
    ours = [plan.jobs[name][1] for name, row in plan.rows.items() if row["group"] in known]
    inner = {target.relative_to(output).parts[depth:] for target in ours}
    old = [clip for clip in videos_of(files_below(output)[0]) if clip not in targets]
    old = [clip for clip in old if clip.relative_to(output).parts[0] in SPLITS]
    moved = [clip for clip in old if mirror or clip.relative_to(output).parts[depth:] in inner]
    moved = [clip for clip in moved if settings_of(clip).startswith(PREPARED)]
    for clip in moved:
        clip.unlink()
    if moved:
        print(f"{len(moved)} clips deleted: they have another split or label now, or are gone")
    if left := len(old) - len(moved):
        print(f"{left} clips in {output} are not of this run: delete them if nobody needs them")


def tell_all(plan: Plan, made: dict, bad: int, output: Path | None, seconds: float) -> None:
    """Prints the summary of a run, and its report, which goes into `output` too, if given."""
    sources = {job[0] for name, job in plan.jobs.items() if name in made and job[0].is_file()}
    before = sum(file.stat().st_size for file in sources) / 1e6
    after = sum(plan.jobs[name][1].stat().st_size for name in made) / 1e6
    new = sum(result["new"] for result in made.values())
    print(
        f"{new} clips prepared, {len(made) - new} already there, "
        f"{bad} bad: {before:.1f} MB -> {after:.1f} MB in {seconds:.0f} s"
    )
    lost = {name: result["lost"] for name, result in made.items() if result["lost"]}
    for name, what in lost.items():
        print(f"  {name}: {what}")
    rows = {name: row for name, row in plan.rows.items() if name in made}
    if output and rows:
        lengths = [made[name]["seconds"] for name in rows]
        split_of = {row["group"]: row["split"] for row in plan.rows.values()}
        found = tell([*rows.values()], lengths) | {"kept_whole_part": lost, "split_of": split_of}
        text = json.dumps(found, indent=2, ensure_ascii=False)
        (output / "clips_report.json").write_text(text, "utf-8")


def tell(rows: list[dict], seconds: list[float]) -> dict:
    """Prints clips, groups and minutes of each label and split, and warnings; returns them.
    `seconds` has the length of each row's clip."""
    cells = {}
    for row, length in zip(rows, seconds, strict=True):
        cells.setdefault((row["split"], row["label"]), []).append((row["group"], length))
    order = [*dict.fromkeys(SPLITS.values())]
    table, warnings = [], []
    print(f"{'split':<12}{'label':<24}{'clips':>7}{'groups':>8}{'minutes':>9}")
    for split, label in sorted(cells, key=lambda cell: (order.index(cell[0]), cell[1])):
        those = cells[split, label]
        groups, minutes = len({group for group, _ in those}), sum(s for _, s in those) / 60
        table.append(dict(zip(COLUMNS, (split, label, len(those), groups, minutes), strict=True)))
        print(f"{split:<12}{label:<24}{len(those):>7}{groups:>8}{minutes:>9.2f}")
    for label in dict.fromkeys(row["label"] for row in rows):
        those = [row for row in rows if row["label"] == label]
        if len(those) < 10:
            warnings.append(f"label {label} has {len(those)} clips: fewer than ten")
        if len({row["group"] for row in those}) == 1:
            warnings.append(f"label {label} comes from a single group: {those[0]['group']}")
    splits_of = {}
    for row in rows:
        splits_of.setdefault(row["group"], set()).add(row["split"])
    for group, splits in splits_of.items():
        if len(splits) > 1:
            warnings.append(f"group {group} is in {' and '.join(sorted(splits))}: leakage")
    print("\n".join(f"warning: {text}" for text in warnings[:20]), end="\n" * bool(warnings))
    return {"clips": table, "warnings": warnings}


# ---- All clips: check them, and change nothing --------------------------------------------------


def inspect_clip(path: Path, num_frames: int) -> dict:
    """What a file is, and `problem`: why training cannot read it, or ""."""
    facts = {"frames": 0, "rate": 0.0, "seconds": 0.0, "width": 0, "height": 0, "codec": ""}
    facts |= {"constant_rate": True, "rotation": 0}
    try:
        timing = clip_times(path)
        facts["width"], facts["height"] = timing.size
        facts |= {"frames": len(timing.times), "rate": round(float(timing.rate), 3)}
        facts |= {"seconds": round(timing.seconds(), 3), "codec": timing.codec}
        facts["constant_rate"] = not timing.end
        facts["rotation"] = round(next(decode(path)).rotation)
    except Exception as error:  # clip_problem has the words for it
        facts["problem"] = repr(error)
    problem = clip_problem(str(path), num_frames)[1]
    return facts | {"problem": problem or ""}


def duplicates(files: list[Path]) -> list[list[Path]]:
    """Files with the same content, by SHA-256; those of a size of their own are not read."""
    sizes, same = {}, {}
    for file in files:
        if file.is_file():
            sizes.setdefault(file.stat().st_size, []).append(file)
    for file in [file for those in sizes.values() if len(those) > 1 for file in those]:
        with open(file, "rb") as content:
            same.setdefault(hashlib.file_digest(content, "sha256").digest(), []).append(file)
    return [those for those in same.values() if len(those) > 1]


def check_only(args: argparse.Namespace) -> dict[str, str]:
    """Prints a table of all clips and what is odd about them; writes it as JSON to args.output.

    Nothing else is written. Returns {clip: reason} of those that training cannot read.
    """
    source = where_clips_are(Path(args.input).expanduser(), args)
    target = Path(args.output or "clips_check.json").expanduser()
    if target.is_dir() or target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target}: name a JSON file outside of the data set for the report")
    found = find_clips(source)
    row_of = {row["video"]: row for row in found.rows}
    videos = videos_of(files_below(source)[0])
    names = {video: video.relative_to(source).as_posix() for video in videos}
    jobs = {video: (video, args.num_frames) for video in videos}
    done, failed = in_processes(inspect_clip, jobs, args.workers, args.timeout, "check clips")
    clips = []
    for video in videos:
        facts = done.get(video) or {"problem": str(failed[video]) or repr(failed[video])}
        row = {key: row_of.get(video, {}).get(key, "") for key in ("split", "label", "group")}
        clips.append({"file": names[video]} | row | facts)
    warnings = list(found.problems)
    middle = float(np.median([clip.get("seconds", 0) for clip in clips]))
    for clip in clips:
        if unreadable_width(clip.get("width") or 100):
            warnings.append(f"{clip['file']}: some decoders cannot read a width of {clip['width']}")
        if clip.get("seconds", 0) > 5 * middle:
            long = f"{clip['file']}: {clip['seconds']:.1f} s, over five times the median"
            warnings.append(f"{long} ({middle:.1f} s)")
    for those in duplicates(videos):
        splits = {row_of[video]["split"] for video in those if video in row_of}
        where = f", in {' and '.join(sorted(splits))}: leakage" if len(splits) > 1 else ""
        warnings.append(f"the same content{where}: {', '.join(names[video] for video in those)}")
    print(f"{'frames':>7} {'rate':>7} {'seconds':>8} {'size':>10} {'turned':>6} {'codec':<8} file")
    for clip in [clip for clip in clips if clip.get("frames")]:
        size, rate = f"{clip['width']}x{clip['height']}", f"{clip['rate']:g}"
        rate += "" if clip["constant_rate"] else "~"  # varies
        print(
            f"{clip['frames']:>7} {rate:>7} {clip['seconds']:>8.2f} {size:>10} "
            f"{clip['rotation']:>6} {clip['codec']:<8} {clip['file']}"
        )
    print("\n".join(f"warning: {text}" for text in warnings), end="\n" * bool(warnings))
    text = json.dumps({"clips": clips, "warnings": warnings}, indent=2, ensure_ascii=False)
    target.write_text(text, "utf-8")
    bad = {clip["file"]: clip["problem"] for clip in clips if clip["problem"]}
    print(f"{len(clips)} clips, {len(bad)} bad, {len(warnings)} warnings; all in {target}")
    return bad


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags of the script. Exits with 2 where they do not go together."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("input", help="Folder with clips or recordings, not changed; or an archive; owner/name.")
    add("output", nargs="?", help="Folder for the prepared clips; with --check_only, a JSON file.")
    add("--cut", metavar="TABLE", help="Cut clips out of recordings: see above.")
    add("--encoding", help="Of the table; UTF-8 and UTF-16 are recognised.")
    add(
        "--background", type=int, default=0, help="Clips of each recording where nothing is marked."
    )
    add("--label_frame_rate", type=float, help="Of a table in frames, if not the recordings' own.")
    add("--background_label", default="background", help="Their label.")
    add("--validation_share", type=float, default=0.15, help="Drawn where there is none; 0: no.")
    add("--test_share", type=float, default=0.15, help="Drawn where there is none; 0: no.")
    add("--seed", type=int, default=42, help="Of what is drawn.")
    add("--frame_rate", type=float, help="Folders of numbered pictures are clips of that rate.")
    add("--check_only", action="store_true", help="Report on the clips, and change nothing.")
    add("--num_frames", type=int, default=16, help="That --check_only reads at a time.")
    add("--short_side", type=int, default=256, help="Pixels; never enlarged.")
    add("--gop", type=int, default=12, help="Frames from key frame to key frame.")
    add("--workers", type=int, default=os.cpu_count(), help="Clips at a time.")
    add("--mirror", action="store_true", help="Delete prepared clips that INPUT has no more.")
    add("--timeout", type=float, default=600, help="Seconds a clip may take.")
    add("--on_bad_clip", choices=["error", "skip", "keep_whole_part"], default="error")
    add("--resource_config", help="On SageMaker: its resourceconfig.json.")
    args = parser.parse_args(argv)
    if not args.output and not args.check_only:
        parser.error("the output folder is missing")
    if args.frame_rate is not None and not 0 < args.frame_rate <= 1000:
        parser.error("--frame_rate: frames per second, above 0")
    if args.frame_rate and args.check_only:
        parser.error("--check_only reads videos; folders of pictures are prepared first")
    if args.workers < 1:
        parser.error("--workers: clips at a time, 1 or more")
    shares = args.validation_share, args.test_share
    if not all(0 <= share < 1 for share in shares) or sum(shares) >= 1:
        parser.error("--validation_share and --test_share: from 0 to below 1, also together")
    if args.cut and (args.check_only or args.frame_rate or args.resource_config):
        parser.error("--cut goes with neither --check_only, --frame_rate nor --resource_config")
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs the script; exits with 1 where clips are bad, unless they are to be skipped."""
    args = parse_arguments(argv)
    if args.check_only:
        try:
            bad, report = check_only(args), args.output or "clips_check.json"
        except (OSError, RuntimeError, ValueError) as error:
            sys.exit(str(error).removeprefix("--dataset "))
    else:
        bad, report = prepare(args)
    if bad:
        print(f"{len(bad)} bad clips, also in {report}:", file=sys.stderr)
        print("\n".join(f"  {video}: {reason}" for video, reason in bad.items()), file=sys.stderr)
    if bad and args.on_bad_clip != "skip":
        sys.exit(1)


if __name__ == "__main__":
    main()
