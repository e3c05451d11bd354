#!/usr/bin/env python3
"""Check every clip of a data set once and transcode it, so that training is fast and exact.

    my_clips/<split>/<label>/<any video>  ->  my_clips_prepared/<split>/<label>/*.mp4

a.mp4 keeps its name, and any other clip gets .mp4 appended to its own: b.avi becomes b.avi.mp4. A
metadata.csv is copied with the names in its column file_name changed alike.

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
import multiprocessing
import os
import shutil
import sys
import time
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
FULL = (errno.ENOSPC, errno.EDQUOT)


# ---- One clip: its times and its size -----------------------------------------------------------


def open_clip(path: Path):
    """(container, video stream) of a file, not yet decoded. Raises ValueError with the reason."""
    if not path.stat().st_size:
        raise ValueError("empty file (0 bytes)")
    container = av.open(str(path))
    cover = av.stream.Disposition.attached_pic  # the picture of an audio file is no video
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        raise ValueError("no video stream" + " (audio only)" * bool(container.streams.audio))
    if streams[0].codec_context is None:
        raise ValueError("a codec that FFmpeg cannot decode")
    if streams[0].width * streams[0].height > 8192 * 4320:
        raise ValueError(f"absurd frame size ({streams[0].width} x {streams[0].height} pixels)")
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


# ---- All clips ----------------------------------------------------------------------------------


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
    began, source, output = time.time(), Path(args.input), Path(args.output)
    report_name, alone = machine(args.resource_config)
    report = output / report_name
    if alone and not source.is_dir():
        sys.exit(f"{source}: no such folder")
    if output.resolve().is_relative_to(source.resolve()):
        sys.exit(f"{output} is inside {source}: choose an output folder elsewhere")
    walk = os.walk(source, followlinks=True)
    files = sorted(Path(at, name).relative_to(source) for at, _, names in walk for name in names)
    files = [file for file in files if not any(part.startswith(".") for part in file.parts)]
    outputs = {file: output_name(file) for file in files if file.suffix.lower() in FORMATS}
    if alone and not outputs:  # else this machine's share is empty
        sys.exit(f"{source} holds no videos ({' '.join(FORMATS)})")
    bad, made = {}, {}
    # Fresh processes: a fork would copy locks that threads of this one hold.
    pool = ProcessPool(args.workers, context=multiprocessing.get_context("spawn"))
    try:
        for file in files:
            (output / file).parent.mkdir(parents=True, exist_ok=True)
            if file not in outputs and file != Path(report_name):
                copy(source / file, output / file)
        futures = {}
        for video, name in outputs.items():
            job = (source / video, output / name, args.short_side, args.gop)
            futures[pool.schedule(prepare_clip, job, timeout=args.timeout)] = video
        pace = 0.1 if sys.stderr.isatty() else 10  # seconds; a log wants few lines, none if short
        done = as_completed(futures)
        for future in tqdm(done, "prepare clips", len(futures), mininterval=pace, delay=pace):
            video = futures[future]
            try:
                made[video] = future.result()
            except TimeoutError:
                bad[str(video)] = f"not done after {args.timeout:g} s (--timeout)"
            except ProcessExpired as error:
                bad[str(video)] = f"crashed the process that read it (exit code {error.exitcode})"
            except Exception as error:
                if getattr(error, "errno", None) in FULL:
                    raise
                bad[str(video)] = str(error)
        bad = dict(sorted(bad.items()))
        report.write_text(json.dumps(bad, indent=2)) if bad else report.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in FULL:
            sys.exit(f"{output}: the disk is full. Free some space and run the same command again.")
        raise
    finally:
        pool.stop()
        pool.join()
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
    parser.add_argument("input", help="Folder with clips, at any depth; it is not changed.")
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
