"""Tables of labelled times in long recordings, and splits. To use prepare_clips.py, skip this file.

prepare_clips.py --cut imports it. Nothing here opens a video. A *row* is a dict:

    row             where it stands: "row 12" (as a spreadsheet counts: the header is row 1),
                    "track 3, shape 1" (CVAT), "task 5, region 2" (Label Studio)
    file            the recording as written; "" where an annotation tool does not name it
    label           its class
    split, group    "" where not given
    start, end      seconds from the first frame (float); or instead, from tools that count frames:
    start_frame, end_frame    0-based, end exclusive (int)

Further columns of a CSV table are kept under their names.
"""

import codecs
import csv
import io
import json
import re
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

import numpy as np

SPLITS = {"": "", "train": "train", "validation": "validation", "val": "validation", "test": "test"}
ROUNDING = 0.05  # seconds: tables round times, so an end may lie a little beyond the recording


def seconds_of(text: str) -> float:
    """Seconds from "12.5", "1:02.5" or "01:02:03.250"; a decimal comma will do.

    Raises ValueError with one sentence for anything else, such as 61 minutes or a negative time.
    """
    pattern = r"(?:(?:(\d+):)?(\d+):)?(\d+(?:[.,]\d*)?)"
    found = re.fullmatch(pattern, text.strip(), re.ASCII)
    if not found:
        raise ValueError(f"'{text}' is not a time such as 12.5, 1:02.5 or 01:02:03.250")
    hours, minutes, seconds = found.groups()
    value = float(seconds.replace(",", "."))
    if (minutes and value >= 60) or (hours and int(minutes) >= 60):
        raise ValueError(f"'{text}' is not a time: 60 or more seconds or minutes beside a colon")
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + value


# ---- Reading ------------------------------------------------------------------------------------


def read_table(path: Path, encoding: str | None = None) -> tuple[list[dict], list[str]]:
    """(rows, problems: one line each, which starts with the row) of any table named above.

    .xml is read as CVAT's, .json as Label Studio's, anything else as text: a table with a header,
    or the tab-delimited text of ELAN. Raises ValueError where nothing of the file can be used.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".xml":
            return cvat_rows(ElementTree.fromstring(path.read_bytes()))
        text = text_of(path.read_bytes(), encoding)
        if path.suffix.lower() == ".json":
            return label_studio_rows(json.loads(text))
        return text_rows(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path.name}: damaged XML ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: damaged JSON ({error})") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path.name}: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name}: not as its tool exports it ({error!r})") from error


def text_of(content: bytes, encoding: str | None) -> str:
    """The text of a file: in the encoding given; else UTF-8, or UTF-16 with a byte order mark."""
    if not encoding:
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        encoding = "utf-16" if utf16 else "utf-8-sig"
    try:
        return content.decode(encoding)
    except LookupError:
        raise ValueError(f"--encoding {encoding}: Python knows no such encoding") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line} is not {encoding} text. Save the table as UTF-8, or name its encoding: "
            "--encoding big5 (Traditional Chinese), --encoding cp1252 (Western Europe)"
        ) from error


def text_rows(text: str) -> tuple[list[dict], list[str]]:
    """The rows of a table in text: with our header, or as ELAN exports it."""
    lines = re.split("\r\n|\r|\n", text)
    content = [line for line in lines if line.strip() and not line.startswith(("#", '"#'))]
    if not content:
        raise ValueError("the table is empty")
    names = [name.strip().strip('"').lower() for name in re.split("[,;\t]", content[0])]
    ours = {"file", "start", "end", "label"}.intersection(names)
    elan_header = any(name.startswith("begin time - ") for name in names)
    if elan_header or (not ours and elan_times(re.split("[,\t]", content[0]))):
        return elan_rows(lines)
    return csv_rows(text)


def csv_rows(text: str) -> tuple[list[dict], list[str]]:
    """A table with the columns file, start, end, label and perhaps split, group, and others.

    The delimiter is the comma, semicolon or tab that stands in the header most often.
    """
    header = next(line for line in text.splitlines() if line.strip())
    delimiter = max(",;\t", key=header.count)
    names, rows, problems = [], [], []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    number = 0  # of the row in a spreadsheet, where a quoted line break begins no row
    for cells in reader:
        number += 1
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            continue
        if not names:
            names = column_names(cells)
            continue
        while len(cells) > len(names) and not cells[-1]:
            cells.pop()  # spreadsheets end some rows with empty cells
        if len(cells) != len(names):
            problem = f"row {number}: {len(cells)} cells, but the header names {len(names)} columns"
            if delimiter == "," and len(cells) > len(names):
                problem += '. A cell with a comma, such as the time 1,5, needs quotes: "1,5"'
            problems.append(problem)
            continue
        row = {"split": "", "group": ""} | dict(zip(names, cells, strict=True))
        add_row(row | {"row": f"row {number}"}, rows, problems)
    return rows, problems


def column_names(cells: list[str]) -> list[str]:
    """The names of a header, the known ones in lower case. Raises ValueError for missing ones."""
    known = ("file", "start", "end", "label", "split", "group")
    names = [cell.lower() if cell.lower() in known else cell for cell in cells]
    while names and not names[-1]:
        names.pop()
    missing = [name for name in known[:4] if name not in names]
    if missing:
        raise ValueError(
            f"no column {', '.join(missing)}. The columns found are: {', '.join(names)}. A table "
            "begins with the header file,start,end,label"
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"two columns have the name '{twice[0]}'")
    return names


def add_row(row: dict, rows: list[dict], problems: list[str]) -> None:
    """Appends a row whose times are text to `rows`, or what is wrong with it to `problems`."""
    try:
        row["start"], row["end"] = seconds_of(row["start"]), seconds_of(row["end"])
    except ValueError as error:
        problems.append(f"{row['row']}: {error}")
        return
    if row["split"].lower() not in SPLITS:
        names = "train, validation and test"
        problems.append(f"{row['row']}: the split '{row['split']}' is none of {names}")
        return
    row["split"] = SPLITS[row["split"].lower()]
    rows.append(row)


# ---- ELAN ---------------------------------------------------------------------------------------

TIMES = {  # the ways in which ELAN writes a time; of its SMPTE time codes, nothing is read
    "hh:mm:ss.ms": r"\d+:\d\d:\d\d\.\d{3}",
    "ss.msec": r"\d+\.\d+(E-?\d+)?",
    "msec": r"\d+",
    "smpte": r"\d\d:\d\d:\d\d[:;]\d\d",
}


def elan_time(text: str, kind: str) -> float:
    """Seconds from one time as ELAN writes it."""
    if kind == "msec":
        return int(text) / 1000
    return float(text) if kind == "ss.msec" else seconds_of(text)


def elan_times(cells: list[str]) -> tuple[float, float, int] | None:
    """(start, end, column of the annotation) of a line without header; None if it is no such line.

    Tier and participant may come first, then begin, end and perhaps duration, each in one to four
    kinds, then the annotation. Where one kind gives two times, these are begin and end.
    """
    kinds = []
    for cell in cells:
        names = [name for name, form in TIMES.items() if re.fullmatch(form, cell.strip('" '))]
        kinds.append(names[0] if names else "")
    first = next((i for i in range(min(3, len(kinds))) if kinds[i]), None)
    if first is None or kinds[first] not in kinds[first + 1 :]:
        return None
    width = kinds.index(kinds[first], first + 1) - first  # columns for each of begin, end, duration
    best = min(range(width), key=lambda i: list(TIMES).index(kinds[first + i] or "smpte"))
    kind = kinds[first + best]
    if kind in ("", "smpte") or kinds[first : first + width] != kinds[first + width :][:width]:
        return None
    times = [elan_time(cell.strip('" '), kind) for cell in cells[first + best :: width][:2]]
    after = first + 2 * width
    if kinds[after : after + width] == kinds[first : first + width]:
        length = elan_time(cells[after + best].strip('" '), kind)
        if abs(times[0] + length - times[1]) < 0.002:  # else it is a label such as 3
            after += width
    return (*times, after) if after < len(cells) else None


def elan_header(cells: list[str]) -> tuple[int, int, str, list[int]] | None:
    """(column of begin, of end, kind of both, columns of tiers) of a header; None if it is none."""
    names = [cell.strip('" ') for cell in cells]
    for kind in ("hh:mm:ss.ms", "ss.msec", "msec"):
        begin, end = f"Begin Time - {kind}", f"End Time - {kind}"
        if begin in names and end in names:
            others = re.compile(r"(Begin Time|End Time|Duration) - |File Name$|File Path$")
            tiers = [i for i, name in enumerate(names) if name and not others.match(name)]
            return names.index(begin), names.index(end), kind, tiers
    return None


def elan_rows(lines: list[str]) -> tuple[list[dict], list[str]]:
    """File > Export As > Tab-delimited Text of ELAN (.txt, or .csv with commas and quotes).

    One line an annotation, without a header: tier, participant, times, annotation, .eaf file. Or,
    with "separate column for each tier", a header such as Begin Time - ss.msec, then the tiers, and
    one annotation in each cell. The label is the annotation. Lines "#file:///a.mp4 -- offset: 0"
    name the recordings; without them, "file" is "", and "eaf" has the name of the .eaf if written.

    Built from ELAN's source (Transcription2TabDelimitedText.java) and manual, English headers only;
    not checked on an export.
    """
    rows, problems, header, media, above = [], [], None, "", ""
    for number, line in enumerate(lines, 1):
        where = f"row {number}"
        quoting = csv.QUOTE_NONE if "\t" in line else csv.QUOTE_MINIMAL
        cells = next(csv.reader([line], delimiter="\t" if "\t" in line else ",", quoting=quoting))
        named = re.fullmatch(r'"?#(\S.*?) -- offset: (-?\d+).*', line)
        if named:
            # several recordings belong to one document: the first video is the main one
            if not above.startswith(("#", '"#')) or media.lower().endswith((".wav", ".mp3")):
                media = unquote(re.split(r"[/\\]", named[1])[-1])
            if int(named[2]):
                problems.append(
                    f"{where}: ELAN shifts {media} by {named[2]} ms. Export with 'Add master media "
                    "time offset' and without the header lines"
                )
        elif header is None and elan_header(cells):
            header = elan_header(cells)
        elif line.strip() and not line.startswith(("#", '"#')):
            found = elan_labels(cells, header)
            if not found:
                problems.append(f"{where}: no begin time, end time and annotation found")
            eaf = [re.split(r"[/\\]", cell)[-1] for cell in cells if cell.lower().endswith(".eaf")]
            for start, end, label in found:
                row = {"row": where, "file": media, "label": label, "split": "", "group": ""}
                row |= {"eaf": eaf[0]} if eaf else {}
                rows.append(row | {"start": start, "end": end})
        above = line
    return rows, problems


def elan_labels(cells: list[str], header) -> list[tuple[float, float, str]]:
    """(start, end, label) of each annotation in a line; `header` is what elan_header returned."""
    if header is None:
        found = elan_times(cells)
        return [(found[0], found[1], cells[found[2]].strip())] if found else []
    begin, end, kind, tiers = header
    if len(cells) <= max(begin, end):
        return []
    try:
        times = elan_time(cells[begin].strip(), kind), elan_time(cells[end].strip(), kind)
    except ValueError:
        return []
    labels = [cells[i].strip() for i in tiers if i < len(cells)]
    return [(*times, label) for label in labels if label]


# ---- CVAT ---------------------------------------------------------------------------------------


def cvat_rows(root: ElementTree.Element) -> tuple[list[dict], list[str]]:
    """CVAT's "CVAT for video 1.1" and, for tags, "CVAT for images 1.1" (annotations.xml).

    <track label=> holds <box frame= outside=>, or a polygon and so on: one row for each run of
    frames in which it is not outside. <image id=> holds <tag label=>: one row for each run of
    frames with that tag. The video export has no tags. Frames are counted from 0. The recording is
    <source> or else the <name> of the task; the export of a job names none.

    Built from CVAT's source (cvat/apps/dataset_manager/formats/cvat.py) and its documentation
    (docs.cvat.ai, XML annotation format); tracks compared with part of a published export.
    """
    if root.tag != "annotations" or root.find("meta") is None:
        raise ValueError("this XML is not of CVAT: export 'CVAT for video 1.1'")
    files, steps = {}, {}
    for task in [root.find("meta"), *root.iter("task")]:
        names = [task.findtext(".//source"), task.findtext("name"), task.findtext("task/name")]
        files[task.findtext("id")] = next((name for name in names if name), "")
        step = re.search(r"step\s*=\s*(\d+)", task.findtext(".//frame_filter") or "")
        steps[task.findtext("id")] = int(step[1]) if step else 1
    rows = []
    for count, track in enumerate(root.iter("track"), 1):
        task = track.get("task_id")
        runs = shape_runs(track, steps.get(task, 1))
        rows += frame_rows(f"track {count}", files.get(task, ""), track.get("label"), runs)
    tags = defaultdict(list)
    for image in root.iter("image"):
        for tag in image.iter("tag"):
            tags[image.get("task_id"), tag.get("label")].append(int(image.get("id")))
    for count, ((task, label), frames) in enumerate(tags.items(), 1):
        runs = []
        for frame in sorted(set(frames)):
            extend(runs, frame, frame + steps.get(task, 1))
        rows += frame_rows(f"tag {count}", files.get(task, ""), label, runs)
    if not rows:
        raise ValueError("no track and no tag in this export of CVAT")
    return rows, []


def shape_runs(track: ElementTree.Element, step: int) -> list[list[int]]:
    """[start, end) in frames of each run in which a track is not outside."""
    shapes = []
    for shape in track:
        if shape.get("frame") is not None:
            parts = [shape] if shape.get("outside") else list(shape)  # a skeleton has only parts
            outside = bool(parts) and all(part.get("outside") == "1" for part in parts)
            shapes.append((int(shape.get("frame")), outside))
    shapes.sort()
    runs = []
    for place, (frame, outside) in enumerate(shapes):
        after = shapes[place + 1][0] if place + 1 < len(shapes) else frame + step
        if not outside:
            extend(runs, frame, after)
    return runs


def extend(runs: list[list[int]], start: int, end: int) -> None:
    """Adds frames [start, end) to the last run if they follow it, else as a new one."""
    if runs and runs[-1][1] == start:
        runs[-1][1] = end
    else:
        runs.append([start, end])


def frame_rows(where: str, file: str, label: str, runs) -> list[dict]:
    """One row for each run of frames [start, end)."""
    rows = []
    for count, (start, end) in enumerate(runs, 1):
        row = {"row": f"{where}, shape {count}", "file": file, "label": label or ""}
        rows.append(row | {"split": "", "group": "", "start_frame": start, "end_frame": end})
    return rows


# ---- Label Studio -------------------------------------------------------------------------------


def label_studio_rows(tasks) -> tuple[list[dict], list[str]]:
    """Label Studio's exports JSON and JSON-MIN: labels on the timeline, of boxes, of seconds.

    JSON: [{"id", "data": {"video"}, "annotations": [{"was_cancelled", "result": [{"value"}]}]}].
    JSON-MIN: [{"id", "video", "<name of the control>": [value]}], one for each annotation. A value
    has "ranges" of frames, or a "sequence" of boxes, or "start" and "end" in seconds. An uploaded
    recording has a prefix of 8 hex digits: "file_alternative" is its name without.

    Built from its documentation (TimelineLabels tag) and source (TimelineRegion.js; utils of the
    YOLO example in label-studio-ml-backend); not checked on an export.
    """
    tasks = [tasks] if isinstance(tasks, dict) else tasks
    if not isinstance(tasks, list) or not all(isinstance(t, dict) and "id" in t for t in tasks):
        raise ValueError("this JSON is not of Label Studio: export JSON or JSON-MIN")
    values, files = defaultdict(list), {}  # for each task: the values of each annotation
    for task in tasks:
        data = task.get("data", task)
        texts = [data.get("video"), *data.values()]
        videos = [t for t in texts if isinstance(t, str) and PurePosixPath(t.split("?")[0]).suffix]
        local = [t for t in texts if isinstance(t, str) and "local-files" in t]
        files[task["id"]] = last_part((local or videos or [""])[0])
        if "annotations" in task:
            done = [a for a in task["annotations"] if not a.get("was_cancelled")]
            found = [[result.get("value", {}) for result in a.get("result", [])] for a in done]
        else:
            lists = [content for content in task.values() if isinstance(content, list)]
            found = [[v for content in lists for v in content if isinstance(v, dict)]]
        values[task["id"]] += found
    rows, problems = [], []
    for task, annotations in values.items():
        if len(annotations) > 1:
            problems.append(f"task {task}: {len(annotations)} annotations, keep one of them")
            continue
        for count, value in enumerate((annotations or [[]])[0], 1):
            found = value_rows(value, f"task {task}, region {count}", files[task])
            rows += [row for row in found if row["label"]]
            problems += [f"{row['row']}: no label" for row in found if not row["label"]]
    return rows, problems


def last_part(address: str) -> str:
    """The name of the file in a path or URL: /data/local-files/?d=day1/a.mp4 gives a.mp4."""
    parts = urlsplit(address)
    path = parse_qs(parts.query).get("d", [parts.path])[0]
    return re.split(r"[/\\]", unquote(path))[-1]


def value_rows(value: dict, where: str, file: str) -> list[dict]:
    """The rows of one value; none where it has no times. Label Studio counts frames from 1, and
    "end" is the last frame of a range (a box with "enabled": false the last of its run)."""
    if "ranges" in value:
        spans = [(int(part["start"]) - 1, int(part["end"])) for part in value["ranges"]]
    elif "sequence" in value:
        spans, begin, frame = [], None, 0
        for box in sorted(value["sequence"], key=lambda box: box["frame"]):
            frame = int(box["frame"])
            begin = frame - 1 if begin is None else begin
            if not box.get("enabled", True):
                spans.append((begin, frame))
                begin = None
        if begin is not None:
            spans.append((begin, int(value.get("framesCount") or frame)))
    else:
        spans = [(float(value["start"]), float(value["end"]))] if "start" in value else []
    keys = ("start_frame", "end_frame") if {"ranges", "sequence"} & set(value) else ("start", "end")
    same = {"row": where, "file": file, "split": "", "group": ""}
    if re.match("[0-9a-f]{8}-.", file):
        same["file_alternative"] = file[9:]
    frames, length = value.get("framesCount"), value.get("duration")
    if "start_frame" in keys and frames and length:  # its own frames, by which it counts
        keys, rate = ("start", "end"), frames / length
        spans = [(start / rate, end / rate) for start, end in spans]
    labels = value.get("timelinelabels") or value.get("labels") or [""]
    rows = [
        same | {"label": lab} | dict(zip(keys, s, strict=True)) for s in spans for lab in labels
    ]
    for count, row in enumerate(rows, 1):
        row["row"] += f", span {count}" if len(rows) > 1 else ""
    return rows


# ---- Checking -----------------------------------------------------------------------------------


def check_rows(rows: list[dict], seconds: dict[str, float]) -> tuple[list[dict], list[str]]:
    """(good rows, problems: one line each, which starts with the row).

    `rows` need start and end in seconds; `seconds` has the length of each recording by "file".
    Good rows are copies: labels in NFC without blanks around them, ends within the recording. An
    end up to 0.05 s beyond it is taken for rounding. Of two rows that overlap, neither is good.
    """
    rows = [row | {"label": unicodedata.normalize("NFC", row["label"]).strip()} for row in rows]
    found = defaultdict(list)  # place of a row: what is wrong with it
    for place, row in enumerate(rows):
        found[place] = [*time_problems(row, seconds), *label_problems(row["label"])]
    for place, other in spellings(rows).items():
        found[place].append(f"label '{rows[place]['label']}' looks the same as '{other}'")
    by_file = defaultdict(list)
    for place, row in enumerate(rows):
        if row["file"] in seconds and row["start"] < row["end"]:
            by_file[row["file"]].append(place)
    for places in by_file.values():
        places.sort(key=lambda place: rows[place]["start"])
        for i, place in enumerate(places):
            for later in places[i + 1 :]:
                if rows[later]["start"] >= rows[place]["end"] - ROUNDING:
                    break
                found[later].append(f"{times(rows[later])} overlaps {named(rows[place])}")
                found[place].append("")  # named in the other's line
    lines = [f"{row['row']}: {text}" for i, row in enumerate(rows) for text in found[i] if text]
    splits = defaultdict(set)
    for row in rows:
        splits[row["group"]].add(row["split"])
    for group, names in splits.items():
        if group and len(names - {""}) > 1:
            places = [i for i, row in enumerate(rows) if row["group"] == group]
            where = ", ".join(rows[i]["row"] for i in places)
            lines.append(f"{where}: group '{group}' is in {' and '.join(sorted(names - {''}))}")
            for place in places:
                found[place].append("")
    good = [row for place, row in enumerate(rows) if not found[place]]
    return [row | {"end": min(row["end"], seconds[row["file"]])} for row in good], lines


def times(row: dict) -> str:
    return f"{row['start']:g} to {row['end']:g} s"


def named(row: dict) -> str:
    return f"{row['row']} ({times(row)})"


def time_problems(row: dict, seconds: dict[str, float]) -> list[str]:
    """What is wrong with the file or the times of one row."""
    problems = []
    if row["start"] >= row["end"]:
        problems.append(f"{times(row)}: the start must be before the end")
    if row["file"] not in seconds:
        near = [name for name in seconds if name.casefold() == row["file"].casefold()]
        stem = PurePosixPath(row["file"]).stem.casefold()
        near += [name for name in seconds if PurePosixPath(name).stem.casefold() == stem]
        hint = f"; there is {near[0]}" if near else ""
        return [*problems, f"no recording '{row['file']}'{hint}"]
    length = seconds[row["file"]]
    if row["start"] >= length or row["end"] > length + ROUNDING:
        problems.append(f"{times(row)}: {row['file']} has only {length:g} s")
    return problems


def label_problems(label: str) -> list[str]:
    """What keeps a label from being the name of a folder, also on Windows."""
    if not label or label.startswith("."):
        return [f"label '{label}' is empty or begins with a dot"]
    odd = [c for c in label if c in '/\\<>:"|?*' or unicodedata.category(c) == "Cc"]
    return [f"label {label!r} contains {odd[0]!r}"] if odd else []


def spellings(rows: list[dict]) -> dict[int, str]:
    """{place of a row: the more frequent label that looks the same as the row's}."""
    counts = Counter(row["label"] for row in rows)
    same = defaultdict(list)
    for label in counts:
        same[unicodedata.normalize("NFKC", label).casefold()].append(label)
    usual = {}
    for labels in same.values():
        best = max(sorted(labels), key=counts.get)
        usual |= {label: best for label in labels if label != best}
    return {i: usual[row["label"]] for i, row in enumerate(rows) if row["label"] in usual}


# ---- Background and splits ----------------------------------------------------------------------


def background_rows(
    rows: list[dict],
    seconds: dict[str, float],
    count: int,
    label: str,
    seed: int,
    taken: list[dict] | None = None,
) -> list[dict]:
    """Up to `count` rows of each recording that has rows, from where nothing is marked.

    Each is as long as the median of that recording's rows, and none overlaps another; there are
    fewer where there is no room. Drawn for each recording by itself, in order of time. taken: all
    rows that mark something, also those that something is wrong with; else `rows`.
    """
    background = []
    for file in sorted({row["file"] for row in rows}):
        marked = [row for row in rows if row["file"] == file]
        length = float(np.median([row["end"] - row["start"] for row in marked]))
        spans = [(r["start"], r["end"]) for r in taken or rows if r["file"] == file]
        gaps, begin = [], 0.0
        for start, end in sorted((min(span), max(span)) for span in spans):
            gaps.append((begin, min(start, seconds[file])))
            begin = max(begin, end)
        gaps.append((begin, seconds[file]))
        rng = np.random.default_rng([seed, zlib.crc32(file.encode())])  # of this file alone
        same = {}
        for key in ("split", "group"):
            values = {row[key] for row in marked}
            same[key] = values.pop() if len(values) == 1 else ""
        spans = sorted(draw_spans(gaps, length, count, rng))
        for number, (start, end) in enumerate(spans, 1):
            row = {"row": f"background {number} of {file}", "file": file, "label": label}
            background.append(row | same | {"start": start, "end": end})
    return background


def draw_spans(gaps, length: float, count: int, rng) -> list[tuple[float, float]]:
    """Up to `count` spans of `length` seconds within the gaps, none over another."""
    spans = []
    for _ in range(count):
        gaps = [(begin, end) for begin, end in gaps if end - begin >= length]
        if not gaps:
            break
        slack = np.array([end - begin - length for begin, end in gaps])
        chances = slack / slack.sum() if slack.sum() else None  # every start is as likely
        begin, end = gaps.pop(rng.choice(len(gaps), p=chances))
        start = float(rng.uniform(begin, end - length))
        stop = min(start + length, end)
        spans.append((start, stop))
        gaps += [(begin, start), (stop, end)]
    return spans


def draw_splits(
    rows: list[dict], shares: dict[str, float], seed: int, known: dict[str, str] | None = None
) -> list[str]:
    """The split of each row, such that no group is in two and every label stays in train.

    shares: of the clips, such as {"validation": 0.15, "test": 0.15}; a split that some row has
    already is not drawn. known: {group: split} of an earlier run. A group keeps the split that a
    row of it has, or else the known one; the others are drawn. What is not drawn is train.
    The order of the rows does not matter. Raises ValueError for a group with two given splits.
    """
    split_of = {}
    for row in rows:
        if row["split"] and split_of.setdefault(row["group"], row["split"]) != row["split"]:
            raise ValueError(f"group '{row['group']}' is in two splits")
    given = set(split_of.values())
    split_of = (known or {}) | split_of
    fresh = [row for row in rows if row["group"] not in split_of]
    fresh.sort(key=lambda row: (row["group"], row["label"]))
    wanted = {row["label"] for row in fresh}
    for name, share in shares.items():
        if name not in given and name != "train":
            trained = [r for r in rows if split_of.get(r["group"], "train") == "train"]
            left = [row for row in fresh if row["group"] not in split_of]
            target = {label: share * n for label, n in Counter(label_list(fresh)).items()}
            for group in draw_groups(left, trained, wanted, target, seed):
                split_of[group] = name
    return [split_of.get(row["group"], "train") for row in rows]


def label_list(rows: list[dict]) -> list[str]:
    return [row["label"] for row in rows]


def draw_groups(
    left: list[dict], trained: list[dict], wanted: set[str], target: dict[str, float], seed: int
) -> set[str]:
    """Groups of `left` with about `target` clips of each label; none where there are too few.

    `trained` are all rows that would be train, and keep a clip of each label in `wanted`.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    groups_of = defaultdict(set)
    for row in trained:
        groups_of[row["label"]].add(row["group"])
    only = {next(iter(groups)) for groups in groups_of.values() if len(groups) == 1}
    free = [row for row in left if row["group"] not in only]
    names, labels = [row["group"] for row in free], label_list(free)
    most = max(Counter(labels).values(), default=0)
    if len(set(names)) < 2 or most < 2 or not sum(target.values()):
        return set()
    folds = max(2, round(len(free) / sum(target.values())))
    folds = min(folds, len(set(names)), most)  # sklearn refuses more than clips of a label
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    best, least = set(), float("inf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a label with fewer clips than folds
        parts = list(splitter.split(names, labels, names))
    for _, part in parts:
        chosen = {names[i] for i in part}
        counts = Counter(labels[i] for i in part)
        distance = sum(abs(counts[label] - number) for label, number in target.items())
        kept = {row["label"] for row in trained if row["group"] not in chosen}
        if chosen and wanted <= kept and distance < least:
            best, least = chosen, distance
    return best
