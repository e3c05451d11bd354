"""Small videos of every kind, written with PyAV, and their frames as decoded one by one."""

import os
import struct
import sys
from fractions import Fraction

import av
import numpy as np


def numbered(frames, height=64, width=100):
    """uint8 [frames, height, width, 3]: eight columns spell each frame's number, black on white."""
    clip = np.full((frames, height, width, 3), (230, 200, 180), np.uint8)
    for i in range(frames):
        for bit in range(8):
            if i >> bit & 1:
                clip[i, :, bit * width // 8 : (bit + 1) * width // 8] = (20, 30, 60)
    return clip


def number(frame):
    """The number that a frame spells."""
    columns = np.array_split(frame.mean(axis=(0, 2)), 8)
    return sum(1 << bit for bit, column in enumerate(columns) if column.mean() < 120)


def interlaced(clip, order="tff"):
    """The same with each frame's second field of the time of the next frame, as camcorders film.

    order: "tff" where the even rows, the top field, are shown first, else "bff".
    """
    woven, second = clip.copy(), np.s_[1::2] if order == "tff" else np.s_[::2]
    woven[:-1, second] = clip[1:, second]
    return woven


def fields_first(frame, order, rate):
    """The frame, said to be interlaced with that order of fields ("tff" or "bff")."""
    graph = av.filter.Graph()
    size = {"width": frame.width, "height": frame.height, "format": frame.format}
    source = graph.add_buffer(**size, time_base=1 / Fraction(rate))
    graph.link_nodes(
        source, graph.add("setfield", f"mode={order}"), graph.add("buffersink")
    ).configure()
    graph.push(frame)
    return graph.pull()


def write_video(
    path, frames, codec="libx264", rate=12, pix_fmt="yuv420p", ms=None, fields="", muxer=(),
    **options,
):  # fmt: skip
    """uint8 [frames, height, width, 3] as a video file, with times in `ms` if given.

    fields: the order of the fields ("tff" or "bff") of interlaced frames; muxer: options of the
    container.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if fields:
        options = {"flags": "+ildct+ilme"} | options
    with av.open(str(path), "w", options=dict(muxer)) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if fields:
                frame = fields_first(frame.reformat(format=pix_fmt), fields, rate)
            if ms is not None:
                frame.pts, frame.time_base = int(ms[i]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if codec == "libsvtav1" and sys.platform == "linux":
        # For root it made this thread a real-time one: what that starts would starve all else.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


def write_sound(path):
    """A file that holds a second of silence and no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))


def every_frame(path):
    """uint8 [frames, height, width, 3], decoded from the start, one after the other."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def noise(frames, height=64, width=64):
    return np.random.default_rng(0).integers(0, 255, (frames, height, width, 3), np.uint8)


def cut_without_encoding(source, target, seconds):
    """What `ffmpeg -ss SECONDS -i source -c copy target` makes."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        offset = int(seconds / stream.time_base)
        old.seek(offset, stream=stream)
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                packet.pts, packet.dts = packet.pts - offset, packet.dts - offset
                new.mux(packet)


def turn(source, target):
    """The same MP4 with a note to show it turned by a quarter, as telephones write it."""
    data = bytearray(source.read_bytes())
    matrix = data.find(b"tkhd") + 4 + 4 + (32 if data[data.find(b"tkhd") + 4] else 20) + 16
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
