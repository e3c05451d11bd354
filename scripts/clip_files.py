"""One video file: when its frames are shown, its frames, a prepared copy, whether decord reads it.

You need not read this file to use prepare_clips.py. It knows what cameras and web pages write, and
where a decoder returns other frames without an error. PyAV decodes in sequence, which is always
right; decord reads at random places, as training does, and is compared with it.
"""

import errno
import itertools
import math
import os
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import decord
import numpy as np
from av.video.reformatter import VideoReformatter

decord.logging.set_level(decord.logging.QUIET)  # our own report is shorter
av.logging.set_skip_repeated(False)  # else the second damaged file looks sound

FORMATS = tuple(
    ".mp4 .mov .m4v .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .3gp .ogv .gif".split()
)
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FULL = (errno.ENOSPC, errno.EDQUOT)


def natural(path) -> list:
    """Sorting key: frame2 comes before frame10."""
    parts = re.split("([0-9]+)", str(path))
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


# ---- One clip: open it, its times and its size --------------------------------------------------

MAX_PIXELS = 8192 * 4320  # of a frame; a wrong header can ask for far more than there is memory
COUNTED = ("avi", "mpeg")  # containers whose times are guessed: their frames are counted
NEAR = 1e-4  # seconds: times that a decoder and a demuxer tell of one frame
ROUNDED = 0.0015  # seconds: tables and containers (Matroska, FLV) round or cut times to 0.001
PREPARED = "prepare_clips"  # how the comment in a prepared clip begins


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
        sound = container.streams.audio  # FFmpeg sees a format in one of 300 files of noise
        raise ValueError("no video stream (audio only)" if sound else "not a video, or damaged")
    if streams[0].codec_context is None:
        raise ValueError("damaged, or in a codec that FFmpeg cannot decode")
    width, height = streams[0].width, streams[0].height
    if width * height > MAX_PIXELS:
        raise ValueError(f"frames of {width} x {height} pixels: scale it down")
    return container, streams[0]


@dataclass(frozen=True)
class Timing:
    """When the frames of a clip are shown, as the packets of its file tell; nothing is decoded."""

    rate: Fraction  # frames per second of the prepared clip
    times: np.ndarray  # float64 [frames], rising: when each frame is shown, in seconds
    end: float  # seconds from the first frame; 0 if the rate is constant: each frame is kept, once
    counted: bool  # whether a frame is known by its place, since the file's times are guessed
    first: int | None = None  # of a part of a recording: the place of its first frame
    codec: str = "pictures"
    container: str = "folder"
    size: tuple[int, int] = (0, 0)  # width and height of the frames, in pixels, as stored
    said: float = 0  # seconds that the file says it has
    damage: str = ""  # what is wrong with the file
    prepared: str = ""  # what a prepared clip remembers (see settings)
    hard_to_seek: bool = False  # a key frame is followed by frames shown before it, or never

    def seconds(self) -> float:
        """The length of the clip."""
        return self.end or len(self.times) / float(self.rate)

    def part(self, first: int, stop: int) -> "Timing":
        """The frames from `first` to the one before `stop`."""
        times, end = self.times[first:stop], 0
        if self.end:
            end = self.times[stop] if stop < len(self.times) else self.times[0] + self.end
            end = float(end - times[0])
        return replace(self, times=times, end=end, first=first)


class Packet(NamedTuple):
    """What one packet of a video stream says of its frame."""

    stamp: int | None  # when it is shown, in ticks of the stream
    duration: int
    key: bool
    discarded: bool  # by an edit list: what a cut without re-encoding left before its start
    corrupt: bool
    guessed: bool  # whether the stamp is that of decoding


def read_packets(path: Path) -> tuple[list[Packet], dict, Fraction, Fraction, str]:
    """(packets, facts for the Timing, seconds of a tick, average rate, what is wrong) of a file."""
    av.logging.set_level(av.logging.ERROR)  # over damage, a demuxer only logs and goes on
    with av.logging.Capture() as log:
        container, stream = open_clip(path)
        with container:
            name, step = container.format.name, stream.time_base
            average = stream.average_rate or stream.guessed_rate or Fraction(25)
            said = float((stream.duration or 0) * step)
            facts = {
                "codec": stream.codec_context.codec.canonical_name,
                "container": name.split(",")[0],
                "size": (stream.width, stream.height),
                "said": said or (container.duration or 0) / 1e6,
                "prepared": container.metadata.get("comment", ""),
            }
            packets = [
                Packet(
                    p.dts if p.pts is None else p.pts, p.duration or 0, p.is_keyframe,
                    p.is_discard, p.is_corrupt, p.pts is None,
                )
                for p in container.demux(stream) if p.size
            ]  # fmt: skip
    av.logging.set_level(None)
    logged = [text.split("\n")[0] for _, logger, text in log if logger == name]
    stamps = [packet.stamp for packet in packets if packet.stamp is not None]
    last = max((packet.duration for packet in packets), default=0)
    here = float((max(stamps) - min(stamps) + last) * step) if stamps else 0
    damage = ""
    if logged:
        damage = logged[0]
    elif any(packet.corrupt for packet in packets):
        damage = "a partial frame"
    elif name.startswith("mov") and here < 0.9 * said - 0.5:  # cut off between two frames
        damage = f"ends after {here:.1f} of {said:.1f} s"
    elif name == "mpegts" and all(path.stat().st_size % size for size in (188, 192, 204)):
        damage = "ends within a packet"
    return packets, facts, step, average, damage


def clip_times(path: Path, whole_part: bool = False) -> Timing:
    """The Timing of a file, of what comes before the first damage where `whole_part` is True.

    Raises ValueError or av.FFmpegError where there is no video, or no frame.
    """
    packets, facts, step, average, damage = read_packets(path)
    corrupt = [place for place, packet in enumerate(packets) if packet.corrupt]
    if corrupt and whole_part:  # frames are stored in another order than they are shown
        after = [p.stamp for p in packets[corrupt[0] :] if p.stamp is not None]
        late = min(after, default=math.inf)
        packets = [p for p in packets[: corrupt[0]] if p.stamp is None or p.stamp < late]
    stamps = [packet.stamp for packet in packets if not packet.discarded]
    if not {*stamps} - {None}:
        raise ValueError(f"no frames{damage and f' ({damage})'}")
    hard, key = False, -math.inf
    for packet in packets:
        hard = hard or packet.discarded or packet.guessed or packet.stamp < key
        key = packet.stamp if packet.key and not hard else key
    facts |= {"damage": damage, "hard_to_seek": hard}
    if len({*stamps} - {None}) < len(stamps):  # some are lacking, or two frames have the same
        return Timing(average, np.arange(len(stamps)) / float(average), 0, True, **facts)
    times, counted = np.array(sorted(stamps)) * float(step), facts["container"] in COUNTED
    span, last = times[-1] - times[0], float(packets[-1].duration * step)
    mean = Fraction((len(times) - 1) / span).limit_denominator(1001) if span else Fraction(25)
    for rate in (average, mean):
        if rate and np.abs((times - times[0]) * float(rate) - np.arange(len(times))).max() < 0.25:
            return Timing(rate, times, 0, counted, **facts)
    rate = min(max(mean, Fraction(1)), Fraction(60))
    return Timing(rate, times, span + last, counted, **facts)


def pictures_timing(count: int, frame_rate: float) -> Timing:
    """The Timing of a folder of `count` numbered pictures."""
    rate = Fraction(frame_rate).limit_denominator(1001)
    return Timing(rate, np.arange(count) / float(rate), 0, True, first=0)


def frames_of(timing: Timing, start: float, end: float) -> tuple[int, int]:
    """(first, stop): the frame shown at `start` seconds, and the first one at `end` or after."""
    shown = timing.times - timing.times[0]
    first = max(0, int(np.searchsorted(shown, start + ROUNDED, "right")) - 1)
    return first, max(first + 1, int(np.searchsorted(shown, end - ROUNDED)))


def unreadable_width(width: int) -> bool:
    """Whether a decoder takes a row of that many pixels, padded to 32 (decord) or 64 (decord2), for
    a row of more channels: 32, 48, 72, 96, 144 and some below."""
    padded = [-(-width // unit) * unit for unit in (32, 64)]
    return any(row != width and row * 3 % width == 0 for row in padded)


def clip_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Even (width, height) in pixels with that short side; not enlarged, but for a few columns."""
    small = min(width, height)
    width, height = (max(2, s * min(small, short_side) // small // 2 * 2) for s in (width, height))
    while unreadable_width(width):
        width += 2
    return width, height


# ---- One clip: its frames -----------------------------------------------------------------------


def decode(path: Path, start: float | None = None, whole_part: bool = False):
    """Yields each frame, one after the other; from a key frame before `start` seconds, if given.

    Raises ValueError or av.FFmpegError where the file is damaged, or ends there, if `whole_part`.
    """
    reader, video = open_clip(path)
    with reader:
        video.codec_context.thread_count = 1
        if start is not None:
            reader.seek(int(start / video.time_base), stream=video)
        place = 0
        try:
            for packet in reader.demux(video):
                if packet.is_corrupt and whole_part:
                    return
                for frame in packet.decode():
                    # Patched up by the decoder; a seek breaks frames right after it.
                    if frame.is_corrupt and (start is None or (frame.time or 0) > start + 0.9):
                        raise ValueError(f"damaged at frame {place}")
                    yield frame
                    place += 1
        except (ValueError, av.FFmpegError):
            if not whole_part or not place:
                raise


def pictures_of(folder: Path) -> list[Path]:
    """The pictures of a folder of numbered frames, in natural order."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in PICTURES]
    return sorted((file for file in files if not file.name.startswith(".")), key=natural)


def numbered_frames(folder: Path):
    """Yields the frames of a folder of numbered pictures.

    Raises ValueError where a number is lacking or a picture has another size.
    """
    files = pictures_of(folder)
    numbers = [int(re.findall("[0-9]+", file.stem)[-1]) for file in files]
    steps = np.diff(numbers)
    if len(steps) and steps.min() != steps.max():
        before, after = files[np.argmax(steps != np.median(steps)) :][:2]
        raise ValueError(f"pictures are lacking between {before.name} and {after.name}")
    size = None
    for file in files:
        try:
            with av.open(str(file)) as picture:
                frame = next(picture.decode(video=0))
        except (av.FFmpegError, IndexError, StopIteration):
            raise ValueError(f"{file.name}: no picture, or damaged") from None
        size = size or (frame.width, frame.height)
        if (frame.width, frame.height) != size:
            raise ValueError(f"{file.name} has {frame.width} x {frame.height} pixels, not {size}")
        yield frame


def progressive(frames):
    """Yields the frames; those of interlaced video (camcorders) with both fields of one time."""
    graph = None
    for frame in frames:
        if graph is None and frame.interlaced_frame:
            graph = av.filter.Graph()
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format,
                time_base=frame.time_base,
            )  # fmt: skip
            graph.link_nodes(
                source, graph.add("bwdif", "mode=send_frame:deint=interlaced"),
                graph.add("buffersink"),
            ).configure()  # fmt: skip
        if graph is None:
            yield frame
        else:
            graph.push(frame)
            yield from pulled(graph)
    if graph:
        graph.push(None)
        yield from pulled(graph)


def pulled(graph):
    """Yields the frames that a filter has ready."""
    while True:
        try:
            yield graph.pull()
        except (BlockingIOError, EOFError):
            return


def shown_frames(path: Path, timing: Timing, whole_part: bool = False):
    """Yields (frame, when it is shown in seconds): all of a clip, or the part that `timing` names.

    Raises ValueError or av.FFmpegError where the file is damaged, or lacks a frame of the part.
    """
    if path.is_dir():
        yield from zip(numbered_frames(path), timing.times, strict=True)
        return
    times, first, tick = timing.times, timing.first, float(1 / timing.rate)
    # After a seek, FFmpeg may leave out the B-frames of interlaced MPEG-4.
    lossy = timing.codec == "mpeg4" and timing.hard_to_seek
    seek = times[0] - 1 if first and not timing.counted and not lossy else None
    frames = progressive(decode(path, seek, whole_part))
    if seek is not None:
        try:
            frame = next(frames, None)
        except PermissionError:  # FFmpeg's word for a seek that fails: in GIF, and often in FLV
            frame = None
        early = frame is not None and frame.time is not None and frame.time <= times[0] + NEAR
        if not early:
            frames.close()
        frames = itertools.chain([frame], frames) if early else progressive(decode(path))
    shown, found = times[0], 0
    for place, frame in enumerate(frames):
        here = place - (first or 0)
        if timing.counted and 0 <= here < len(times):
            shown = times[here]
        elif timing.counted or frame.pts is None:
            shown += tick if here >= 0 else 0
        else:
            shown = frame.time
        if first is not None:  # of a recording
            outside = here < 0 if timing.counted else shown < times[0] - NEAR
            if outside:
                continue
            if found == len(times):
                break
            if not timing.counted and abs(shown - times[found]) > tick / 2:
                raise ValueError(f"the frame at {times[found]:.3f} s cannot be decoded")
        found += 1
        yield frame, shown
    if first is not None and found < len(times):
        raise ValueError(f"{found} of {len(times)} frames of this part can be decoded")


# ---- One clip: transcode and check --------------------------------------------------------------


def turn(frame: av.VideoFrame, quarters: int) -> av.VideoFrame:
    """A yuv420p frame turned counterclockwise by quarter turns, plane by plane: nothing is lost."""
    width, height = frame.width, frame.height
    planes = np.split(frame.to_ndarray().ravel(), [width * height, width * height * 5 // 4])
    shapes = (height, width), (height // 2, width // 2), (height // 2, width // 2)
    planes = [np.rot90(p.reshape(s), quarters) for p, s in zip(planes, shapes, strict=True)]
    packed = np.concatenate([p.ravel() for p in planes]).reshape(-1, planes[0].shape[1])
    return av.VideoFrame.from_ndarray(packed, format="yuv420p")


def thumbnail(frame: av.VideoFrame, side: int = 16, scaler=None) -> np.ndarray:
    """A frame as gray levels, uint8 [side, side]: enough to tell it from its neighbours.

    `scaler`: a VideoReformatter, which is fast where it gets frames of one kind one after another.
    """
    if frame.interlaced_frame:  # it would be made small field by field, which decord does not do
        frame = av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"))
    scaler = scaler or VideoReformatter()
    small = scaler.reformat(
        frame, side, side, "rgb24", interpolation="AREA", threads=1
    ).to_ndarray()
    return small.mean(axis=2).round().astype(np.uint8)


class Writer:
    """Writes one H.264 clip with a constant frame rate, frame by frame."""

    def __init__(self, container, rate: Fraction, short_side: int, gop: int):
        # Without B-frames there is no reordering and no edit list for a reader to get wrong; tuned
        # for it, the clip decodes in little more than half the time and is a tenth larger.
        # Measured on film: half the CPU time of "veryfast" at crf 20, closer, and a third larger.
        options = {"crf": "24", "preset": "superfast", "tune": "fastdecode", "threads": "1"}
        options |= {"g": str(gop), "bf": "0"}
        self.container, self.rate, self.short_side = container, rate, short_side
        self.stream = container.add_stream("libx264", rate=rate, options=options)
        self.stream.pix_fmt = "yuv420p"
        self.scaler, self.shrinker = VideoReformatter(), VideoReformatter()
        self.written, self.thumbnails = 0, bytearray()  # in one piece: see wrong_frames

    def write(self, frame: av.VideoFrame, until: int) -> None:
        """Writes the frame, as often as it takes to have `until` frames."""
        stream = self.stream
        quarters = round(frame.rotation / 90) % 4  # PyAV leaves phone clips lying on their side
        across = -1 if quarters % 2 else 1
        if not self.written:
            upright = (frame.width, frame.height)[::across]
            stream.width, stream.height = clip_size(*upright, self.short_side)
        # One colour space for all, the one that readers assume.
        colours = {"dst_colorspace": "ITU601", "dst_color_range": "MPEG"}
        size = (stream.width, stream.height)[::across]
        how = {"interpolation": "AREA", "threads": 1} | colours
        frame = self.scaler.reformat(frame, *size, "yuv420p", **how)
        frame = turn(frame, quarters) if quarters else frame
        frame.pict_type = 0  # else x264 repeats the source's key frames
        frame.time_base = 1 / self.rate
        small = thumbnail(frame, 16, self.shrinker).tobytes()
        for pts in range(self.written, until):
            frame.pts = pts
            self.container.mux(stream.encode(frame))
            self.thumbnails += small
        self.written = max(self.written, until)


def transcode(
    source: Path,
    target: Path,
    short_side: int,
    gop: int,
    timing: Timing | None = None,
    whole_part: bool = False,
) -> np.ndarray:
    """Writes `target`: H.264, constant frame rate. One full frame at a time is in memory.

    `timing` names the part of a recording, or is None for all of it. Returns the thumbnails of the
    frames written, uint8 [frames, 16, 16]. Raises ValueError or av.FFmpegError where the source is
    damaged, unless what comes before the damage is wanted (`whole_part`).
    """  # fmt: skip
    timing = timing or clip_times(source, whole_part)
    if timing.damage and timing.first is None and not whole_part:
        raise ValueError(f"truncated or damaged ({timing.damage})")
    rate = float(timing.rate)
    with av.open(str(target), "w", "mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = settings(short_side, gop, timing, whole_part)
        writer = Writer(container, timing.rate, short_side, gop)
        before, start, whole = None, None, True
        for frame, shown in shown_frames(source, timing, whole_part):  # in sequence: always right
            start = shown if start is None else start
            # Each tick gets the last frame shown then; a quarter tick allows for rounded times.
            tick = int(np.ceil((shown - start) * rate - 0.25))
            if whole_part and not timing.end and tick > writer.written + 1:
                whole = False  # frames between these two came after the damage
                break
            if before is not None and tick > writer.written:
                writer.write(before, tick)
            before = frame
        if before is None:
            raise ValueError("no frame can be decoded")
        whole = whole and not (whole_part and timing.damage)
        until = int(np.ceil(timing.end * rate - 0.25)) if whole else 0
        writer.write(before, max(writer.written + 1, until))
        container.mux(writer.stream.encode(None))
    return np.frombuffer(writer.thumbnails, np.uint8).reshape(-1, 16, 16)


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
    scaler = VideoReformatter()
    for place, frame in zip(places, frames, strict=True):
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        small = thumbnail(picture, 16, scaler).astype(np.int16)
        distance = np.abs(thumbnails - small).mean(axis=(1, 2))  # in levels of 255
        if distance[place] > min(distance.min() + 0.5, 8):  # half a level: a still scene
            raise ValueError(f"decord reads another frame than frame {place} of the prepared clip")


def settings(short_side: int, gop: int, timing: Timing | None, whole_part: bool) -> str:
    """What a prepared clip remembers, so that a run with other flags makes it anew."""
    text = f"{PREPARED} short_side={short_side} gop={gop}"
    if timing and timing.first is not None:
        text += f" frames={timing.first}+{len(timing.times)} rate={timing.rate}"
    return text + " whole_part" * whole_part


def settings_of(target: Path) -> str:
    """The settings that a prepared clip remembers; "" of a file that cannot be read."""
    try:
        return clip_times(target).prepared
    except (ValueError, av.FFmpegError):
        return ""


def prepare_clip(
    source: Path,
    target: Path,
    short_side: int,
    gop: int,
    timing: Timing | None = None,
    whole_part: bool = False,
) -> dict:
    """Makes `target`, complete and checked or not at all. `source`: a file, or a folder of frames.

    Returns {"new": whether it was made now, "frames", "seconds", "lost": what a damaged file lacks,
    in words}. Raises ValueError with the reason of a bad clip, OSError where the disk is full.
    """  # fmt: skip
    # With a process id: a worker that outlives a killed run must not write into the next run's.
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    wanted = settings(short_side, gop, timing, whole_part)
    try:
        fresh = target.exists() and target.stat().st_mtime >= source.stat().st_mtime
        new = not fresh or settings_of(target) != wanted
        if new:
            target.unlink(missing_ok=True)  # whatever comes, nothing out of date is delivered
            check(part, transcode(source, part, short_side, gop, timing, whole_part))
            os.replace(part, target)
        made = clip_times(target)
        result = {"new": new, "frames": len(made.times), "seconds": made.seconds(), "lost": ""}
        if whole_part and timing is None:
            known = clip_times(source)
            expected = max(known.said, known.seconds())
            short = len(made.times) < len(known.times)
            if known.end:  # frames were repeated or left out
                short = made.seconds() < known.seconds() - 2 / float(made.rate)
            if known.damage or short:
                what = known.damage or "damaged"
                result["lost"] = f"{what}: {made.seconds():.2f} of {expected:.2f} s are kept"
        return result
    except (av.FFmpegError, OSError) as error:
        if error.errno in FULL:
            raise OSError(error.errno, "disk full") from None
        raise ValueError(f"not a video, or damaged ({error.strerror})") from None
    finally:
        part.unlink(missing_ok=True)


# ---- One clip, as it is: whether training can read it, and reads it rightly ---------------------

REMEDY = "try: prepare_clips.py, or ffmpeg -i IN -c:v libx264 -pix_fmt yuv420p OUT.mp4"


def clip_problem(path: str, num_frames: int) -> tuple[int, str | None]:
    """(number of frames, None) of a clip that can be read, else (0, the reason in one line).

    Reads as training does, by random access, and compares with a decode of every frame from the
    start; of a prepared clip, which was compared when it was made, it reads a sample only. Either
    way the file is read from start to end. It may hang or crash: see check_clips.
    """
    codec, width = "unknown codec", 0
    try:  # FFmpeg first: decord's messages name neither codec nor remedy
        timing = clip_times(Path(path))
        codec, width = timing.codec, timing.size[0]
        if timing.damage:
            return 0, f"truncated or damaged ({timing.damage})"
        reader = open_reader(path)
        total = len(reader)
        if timing.prepared.startswith(PREPARED):
            reader.get_batch(spread(total, num_frames, 0.5))
            wrong = total != len(timing.times)
        else:
            wrong = wrong_frames(path, reader, num_frames, 12 if timing.hard_to_seek else 1)
        if wrong:
            where = f"{timing.container} file ({codec})"
            return 0, f"decord mixes up the frames of this {where}; {REMEDY}"
        return total, None
    except av.FFmpegError as error:
        return 0, f"not a video, or damaged ({error.strerror})"
    except (decord.DECORDError, RuntimeError):
        why = f"damaged, or a codec that decord cannot decode ({codec})"
        if width and unreadable_width(width):
            why = f"decord cannot read frames that are {width} pixels wide"
        return 0, f"{why}; {REMEDY}"
    except Exception as error:  # damaged files make PyAV raise what they will
        return 0, " ".join(str(error).split()) or repr(error)


def open_reader(path: str):
    """A decord.VideoReader as training opens it."""
    return decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)


def spread(total: int, num_frames: int, place: float) -> list[int]:
    """One frame in each of `num_frames` equal parts of a clip, at `place` in [0, 1) of the part."""
    return [int((i + place) * total / num_frames) for i in range(num_frames)]


def mixed_up(path: str, doubts: dict[int, tuple[int, np.ndarray]]) -> bool:
    """Whether one of decord's frames, {index: (near, uint8 [height, width, 3])}, is `near` instead.

    The last word: thumbnails of decord's frames differ from PyAV's by one level of 255 or so.
    """
    away = {}
    for place, frame in enumerate(decode(Path(path))):
        for index, (near, pixels) in doubts.items():
            if place in (index, near):
                whole = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                if whole.shape != pixels.shape:  # the size changes within the file
                    return True
                away[index, place] = np.abs(whole.astype(np.int16) - pixels).mean()
    return any(away[i, i] > away[i, near] + 0.1 for i, (near, _) in doubts.items())


def wrong_frames(path: str, reader, num_frames: int, draws: int) -> bool:
    """Whether decord's frames are others than those of a decode of every frame, from the start.

    They are, without an error, where frames before a key frame depend on it (open GOPs: x265's
    default, old XviD files), in cuts made without re-encoding, and where a container keeps no times
    (AVI, MPEG and WMV). Judged by thumbnails at `draws` times `num_frames` random places, at
    `num_frames` places all over the clip, and at the last one.
    """
    pixels, scaler = bytearray(), VideoReformatter()  # small arrays would take 46 KB each
    for frame in decode(Path(path)):
        pixels += np.rot90(thumbnail(frame, 32, scaler), round(frame.rotation / 90)).tobytes()
    total, scaler = len(reader), VideoReformatter()
    every, draw = np.frombuffer(pixels, np.uint8).reshape(-1, 32, 32), np.random.default_rng(0)
    if total != len(every):
        return True
    size = min(num_frames, total)
    places = [np.sort(draw.choice(total, size, replace=False)).tolist() for _ in range(draws)]
    if total > num_frames:  # of a short last GOP (in FLV, or open) decord may return another frame
        places.append([total - 1])
    for indices in [spread(total, num_frames, 0.5), *places]:
        frames, doubts = reader.get_batch(indices).asnumpy(), {}
        for index, frame in zip(indices, frames, strict=True):
            small = thumbnail(av.VideoFrame.from_ndarray(frame, format="rgb24"), 32, scaler)
            first = max(0, index - 500)
            away = np.abs(every[first : index + 500].astype(np.int16) - small).mean((1, 2))
            # In a still scene any frame will do; below 0.1 of 255 levels is rounding.
            if away[index - first] > away.min() + 0.1:
                doubts[index] = first + int(away.argmin()), frame
        if doubts and mixed_up(path, doubts):
            return True
        reader = open_reader(path)  # as training: a new one for each draw
    return False
