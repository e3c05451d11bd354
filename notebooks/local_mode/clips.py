"""Draws the clips of the local mode: one person who raises a hand, or does something else.

The label `raising_hand` needs the movement: a clip that starts with the arm down may go on as
idling or pointing, one that ends with the arm up may have been held up all the time. No single
frame gives the answer, so a model that reaches a high accuracy has looked at the whole clip.

    python notebooks/local_mode/clips.py data/clips --height 96 --train 320 --test 120

writes real H.264 files in the layout that `datasets.load_dataset("videofolder")` reads:
`<folder>/<split>/<label>/<name>.mp4`.
"""

import argparse
import colorsys
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

POSITIVE, NEGATIVE = LABELS = ("raising_hand", "not_raising_hand")
# Shares of the negatives: 53 % start with the arm up, as no positive does, and 57 % end with it
# down. Whoever sees the first or the last frame only is right in 78 of 100 clips, at best.
NEGATIVE_ACTIONS = {
    "held_up": 0.23, "wave_high": 0.20, "lowering": 0.10, "idle": 0.16,
    "point": 0.11, "wave_low": 0.11, "walk": 0.06, "scratch": 0.03,
}  # fmt: skip
OTHER_ACTIONS = ("half_raise", "half_lower", "both_wave", "clap", "crouch")  # for pretrain.py
ACTIONS = (POSITIVE, *NEGATIVE_ACTIONS, *OTHER_ACTIONS)

ASPECTS = (4 / 3, 1, 3 / 4, 16 / 9)  # width / height
RATES = (12, 15, 24, 25, 30)  # frames per second
SECONDS = (1.5, 4.0)  # 12 fps * 1.5 s = 18 frames: a clip is always longer than a model's 16
CLIPS_PER_PERSON = 4
RECORD = "clips.json"
LISTS = ("labels.json", *(f"ImageSets/2017/{split}.txt" for split in ("train", "val", "test")))
SCALE = 2  # drawn this much larger, then averaged: smooth edges

SKIN = np.array([(250, 214, 184), (232, 186, 150), (198, 138, 100), (145, 92, 62), (94, 60, 44)])
HAIR = np.array([(34, 26, 24), (78, 50, 32), (150, 104, 58), (206, 172, 108), (128, 126, 130)])
# Numbers of the parts in the drawing; a part of a raised arm has RAISED added.
TROUSERS, SHOES, SHIRT, ARM, FOREARM, SKIN_PART, HAIR_PART, FACE = range(1, 9)
RAISED = 10
MASK_LABELS = ["background", "body", "raised_arm"]
MASK_COLOURS = [0, 0, 0, 128, 0, 0, 0, 128, 0]  # as DAVIS has them: black, red, green


class Person(NamedTuple):
    """What a person looks like: RGB colours (0 to 255) and whether the sleeves are long."""

    skin: tuple
    hair: tuple
    shirt: tuple
    legs: tuple
    sleeve: bool


def colour(rng, saturation, value):
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return tuple(int(255 * c) for c in rgb)


def appearance(seed, split, number):
    """The person with this number in the pool of a split. Each split has a pool of its own."""
    rng = np.random.default_rng([seed, crc32(split.encode()), number])
    skin, hair = (p[rng.integers(5)] + rng.integers(-12, 13) for p in (SKIN, HAIR))
    return Person(
        skin=tuple(skin.clip(0, 255).tolist()),
        hair=tuple(hair.clip(0, 255).tolist()),
        shirt=colour(rng, (0.35, 0.95), (0.3, 0.75)),
        legs=colour(rng, (0.1, 0.7), (0.15, 0.4)),
        sleeve=bool(rng.random() < 0.65),
    )


def ramp(t, start, duration):
    """0 before `start`, 1 after `start + duration`, smooth in between."""
    u = np.clip((t - start) / duration, 0, 1)
    return u * u * (3 - 2 * u)


def movement(action, t, rng):
    """Angles in degrees over t in [0, 1]: (shoulder, elbow) of the acting and of the other arm.

    Shoulder: 0 hangs down, 90 is level, 180 is straight up. Elbow: 0 is straight. The third value
    is when an action with a beginning and an end, such as raising the hand, takes place: (t, t).
    """
    swing = np.sin(2 * np.pi * (rng.uniform(1.5, 3.5) * t + rng.random()))
    low, high = rng.uniform(4, 24), rng.uniform(122, 170)
    low_bend = rng.uniform(0, 25) if rng.random() < 0.65 else rng.uniform(45, 105)
    high_bend = rng.uniform(0, 55)
    other = rng.uniform(4, 20) + 2 * swing, rng.uniform(5, 40) + 0 * t
    duration = rng.uniform(0.3, 0.6)
    start = rng.uniform(-0.05 * duration, 1 - 0.95 * duration)  # all but complete in the clip
    up, bulge = ramp(t, start, duration), 50 * rng.random()
    there_and_back = np.sin(np.pi * np.clip((t - 0.6 * start) / (1.4 * duration), 0, 1)) ** 2
    part = rng.uniform(0.35, 0.75) * there_and_back
    if action == "lowering":
        up = 1 - up
    if action in ("half_raise", "half_lower"):
        up = part if action == "half_raise" else 1 - part
    if action in (POSITIVE, "lowering", "half_raise", "half_lower"):
        shoulder = low + (high - low) * up + 3 * swing
        elbow = low_bend + (high_bend - low_bend) * up + bulge * np.sin(np.pi * up)
        return (shoulder, elbow), other, (start, start + duration)
    arm = {
        "held_up": (high + 3 * swing, high_bend + 4 * swing),
        "wave_high": (high - 4 + 8 * swing, 30 + 26 * swing),
        "both_wave": (high - 4 + 8 * swing, 30 + 26 * swing),
        "scratch": (rng.uniform(85, 112) + 5 * swing, 126 + 9 * swing),
        "wave_low": (low + 6 + 4 * swing, 75 + 30 * swing),
        "point": (low + rng.uniform(45, 80) * up, low_bend * (1 - up) + 8 * up),
        "clap": (24 + 5 * swing, -95 + 22 * swing),
        "walk": (low + 12 * swing, low_bend + 5 * swing),
    }.get(action, (low + 2 * swing, low_bend + 3 * swing))  # idle, crouch
    if action in ("both_wave", "clap"):
        other = arm
    other = (low - 12 * swing, other[1]) if action == "walk" else other
    return arm, other, (start, start + duration)


def draw_background(rng, width, height):
    """A blurred room: wall, windows and furniture, floor. Returns a PIL image."""
    top, bottom = (np.array(colour(rng, (0, 0.3), (0.72, 1))) for _ in range(2))
    fall = np.linspace(0, 1, height)[:, None, None]
    wall = np.broadcast_to(top * (1 - fall) + bottom * fall, (height, width, 3))
    room = Image.fromarray(wall.astype(np.uint8))
    draw, side = ImageDraw.Draw(room), min(width, height)
    for _ in range(rng.integers(2, 8)):
        x, y = rng.uniform(-0.1, 0.9) * width, rng.uniform(-0.1, 0.8) * height
        w, h = rng.uniform(0.1, 0.45, 2) * side
        shape = draw.rectangle if rng.random() < 0.8 else draw.ellipse
        shape([x, y, x + w, y + h], fill=colour(rng, (0, 0.4), (0.58, 0.95)))
    if rng.random() < 0.7:
        floor = rng.uniform(0.75, 0.92) * height
        draw.rectangle([0, floor, width, height], fill=colour(rng, (0.1, 0.45), (0.45, 0.7)))
    return room.filter(ImageFilter.GaussianBlur(rng.uniform(0.002, 0.015) * side))


def polar(point, degrees, length, side=1):
    """The point at `length` from `point`; 0 degrees is down, 90 is towards `side`, 180 is up."""
    angle = np.deg2rad(degrees)
    return point + length * np.array([side * np.sin(angle), np.cos(angle)])


def draw_person(draw, waist, k, arms, lean, stride, crouch):
    """Draw the numbered parts of a person whose trunk is about `k` pixels tall.

    arms: {side: (shoulder degrees, elbow degrees)}, drawn in this order; side is -1 or 1.
    stride: degrees between each leg and the vertical; crouch: 0 upright to 1.
    """

    def limb(points, width, part):
        draw.line([tuple(p) for p in points], fill=part, width=max(1, round(width * k)))
        for p in points:
            disc(p, width / 2, part)

    def disc(centre, radius, part):
        (x, y), r = centre, radius * k
        draw.ellipse([x - r, y - r, x + r, y + r], fill=part)

    neck = polar(waist, 180 + lean, 0.52 * k)
    shoulders = {s: neck + k * np.array([s * 0.22, 0.06]) for s in (-1, 1)}
    hips = {s: waist + k * np.array([s * 0.12, 0.26]) for s in (-1, 1)}
    for s in (-1, 1):
        knee = polar(hips[s], s * stride + s * 50 * crouch, 0.46 * k)
        foot = polar(knee, s * stride - 0.4 * abs(stride) - s * 40 * crouch, 0.44 * k)
        limb([hips[s], knee, foot], 0.17, TROUSERS)
        limb([foot, foot + k * np.array([s * 0.07, 0.02])], 0.12, SHOES)
    hem = [hips[1] + [0.06 * k, 0], hips[-1] - [0.06 * k, 0]]
    draw.polygon([tuple(p) for p in (shoulders[-1], shoulders[1], *hem)], fill=SHIRT)
    limb([shoulders[-1], shoulders[1]], 0.16, SHIRT)
    limb([neck, neck - [0, 0.14 * k]], 0.12, SKIN_PART)
    head = neck - [0, 0.27 * k]
    disc(head - [0, 0.03 * k], 0.165, HAIR_PART)
    disc(head + [0, 0.03 * k], 0.142, SKIN_PART)
    for s in (-1, 1):
        disc(head + k * np.array([s * 0.055, 0.02]), 0.018, FACE)
    limb([head + k * np.array([s * 0.025, 0.105]) for s in (-1, 1)], 0.015, FACE)
    for s, (shoulder, bend) in arms.items():
        elbow = polar(shoulders[s], shoulder, 0.31 * k, s)
        hand = polar(elbow, shoulder + bend, 0.29 * k, s)
        raised = RAISED if hand[1] < shoulders[s][1] - 0.05 * k else 0
        limb([elbow, hand], 0.12, raised + FOREARM)
        limb([shoulders[s], elbow], 0.15, raised + ARM)
        limb([hand, polar(hand, shoulder + bend, 0.06 * k, s)], 0.135, raised + SKIN_PART)


def draw_clip(action, seed, width, height, frames, person=None):
    """Draw one clip of one action.

    action: one of ACTIONS. seed: an int, or a list of ints. width, height: pixels, any aspect
    ratio; the person is inside the central square. frames: 1 or more; the movement fills the
    clip, whatever their number. person: a Person, or None for one that the seed chooses.

    Returns the video, uint8 [frames, height, width, 3], RGB, and the mask, uint8
    [frames, height, width]: 0 background, 1 body, 2 an arm whose hand is above its shoulder.
    Raises ValueError if the action is unknown, or a size or the number of frames is too small.
    """
    if action not in ACTIONS:
        raise ValueError(f"unknown action {action!r}: choose one of {', '.join(ACTIONS)}")
    if min(width, height) < 16 or frames < 1:
        raise ValueError(f"a clip of {frames} frames, {width}x{height}: need 1 frame, 16x16 pixels")
    rng = np.random.default_rng(seed)
    if person is None:
        person = appearance(int(rng.integers(2**31)), "drawn", 0)
    t = np.linspace(0, 1, frames)
    crouch = np.sin(np.pi * ramp(t, 0.1, 0.8)) if action == "crouch" else 0 * t
    arms = partial(movement, action, t)
    pictures = draw_scene(rng, person, width, height, t, arms, t - 0.5, action == "walk", crouch)
    video, mask = (np.stack(part) for part in zip(*pictures, strict=True))
    return video, mask


def draw_scene(rng, person, width, height, t, movement, across, walks, crouch):
    """Yields one (frame, mask), as draw_clip describes them, for each moment in `t` [frames].

    Everything random comes from `rng`, in this order: the room, movement(rng), the rest. `t` runs
    from 0 to 1 in the time of a clip, and may run on. `movement(rng)` returns as movement does.
    `across` [frames], -0.5 to 0.5: the way of a person who walks, as some do even if not `walks`.
    `crouch` [frames]: 0 upright to 1.
    """
    frames = len(t)
    wide, high = width * SCALE, height * SCALE
    square = min(wide, high)
    margin = int(0.06 * square)
    room = draw_background(rng, wide + 2 * margin, high + 2 * margin)

    side, (*arms, _) = rng.choice([-1, 1]), movement(rng)
    k = square * rng.uniform(0.35, 0.52)  # from the full figure to the waist up
    walking = walks or rng.random() < 0.15
    freedom = max(0.04 * square, 0.48 * square - 0.9 * k)  # sideways, with the arm in the square
    path = rng.uniform(-1, 1) * (across if walking else 0 * t)
    x = wide / 2 + freedom * (0.6 * rng.uniform(-1, 1) + 0.8 * path)
    y = (high - square) / 2 + 1.2 * k + square * rng.uniform(0.01, 0.1) + 0.3 * k * crouch
    steps = np.sin(2 * np.pi * (rng.uniform(1, 2.5) * t + rng.random()))
    stride = 2 + (20 if walking else 1) * steps
    lean = rng.normal(0, 3)
    speed, phase = rng.uniform(0.3, 2, (2, 2, 1)), rng.random((2, 2, 1))
    shake = np.sin(2 * np.pi * (speed * t + phase)).sum(0)  # [2, frames]: a camera held by hand
    shake = np.rint(shake * rng.uniform(0, margin / 2.5)).astype(int).clip(-margin, margin)

    arm = tuple(min(255, int(1.15 * c) + 8) for c in person.shirt)  # stands out from the trunk
    forearm = arm if person.sleeve else person.skin
    parts = [person.legs, (40, 36, 36), person.shirt, arm, forearm, person.skin, person.hair]
    colours = [(0, 0, 0), *parts, (60, 34, 30), (0, 0, 0)]  # by number, 0 to RAISED - 1
    palette = np.array(colours + colours, np.uint8).ravel().tolist()
    gain, grain = rng.uniform(0.8, 1.1), rng.uniform(1, 6)
    noise = rng.normal(0, grain, (height + 16, width + 16, 3)).astype(np.float32)
    shifts = rng.integers(0, 17, (frames, 2))

    for i in range(frames):
        dx, dy = shake[:, i]
        figure = Image.new("L", (wide, high))
        (shoulder, elbow), (other_shoulder, other_elbow) = arms
        pose = {-side: (other_shoulder[i], other_elbow[i]), side: (shoulder[i], elbow[i])}
        draw_person(ImageDraw.Draw(figure), np.array([x[i] - dx, y[i] - dy]), k, pose, lean,
                    stride[i], crouch[i])  # fmt: skip
        numbers = np.asarray(figure)[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE]
        mask = (numbers > 0).astype(np.uint8) + (numbers > RAISED)
        frame = room.crop((margin + dx, margin + dy, margin + dx + wide, margin + dy + high))
        stencil = figure.point([0] + [255] * 255)
        figure.putpalette(palette)
        frame.paste(figure.convert("RGB"), mask=stencil)
        row, column = shifts[i]
        light = np.asarray(frame.reduce(SCALE), np.float32) * gain
        light += noise[row : row + height, column : column + width]
        yield light.clip(0, 255).astype(np.uint8), mask


# Without mbtree=0, x264 gives small frames other bits from run to run.
H264 = {"crf": "20", "preset": "superfast", "x264-params": "mbtree=0"}


def write_video(path, video, rate, codec="libx264", options=H264):
    """Write uint8 [frames, height, width, 3], even sizes, as H.264 at `rate` frames per second.

    video: an array, or any iterable of frames, which are written as they come.
    """
    video = iter(video)
    first = next(video)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in chain([first], video):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


# A long video: what may come after what. A hand that is up comes down again. Nobody scratches: in
# no clip does an arm go there, so that a model cannot know what the way there is called.
FOLLOWERS = {
    "idle": (POSITIVE, POSITIVE, "wave_low", "point"), "wave_low": (POSITIVE, "idle"),
    "point": ("idle",), POSITIVE: ("held_up", "wave_high", "lowering"),
    "held_up": ("wave_high", "lowering"), "wave_high": ("held_up", "lowering"),
    "lowering": ("idle", "wave_low", "point"),
}  # fmt: skip
JOIN = 0.5  # seconds in which the arms go over from one action to the next


def script(seconds, rng):
    """What happens in a long video: [(action, start, end)] in seconds, from 0 to beyond its end."""
    action, end, scenes = "idle", 0.0, []
    while end < seconds:
        start, end = end, end + rng.uniform(*SECONDS)
        scenes.append((action, start, end))
        action = str(rng.choice(FOLLOWERS[action]))
    return scenes


def movements(scenes, t, rng):
    """As movement, for a script: each action as in a clip, each going over into the next.

    The third value is a list: when each action takes place, in seconds; `t` is in seconds too.
    """
    angles, spans, before = 0, [], 0
    for action, start, end in scenes:
        length = end - start
        *arms, span = movement(action, ((t - start) / length).clip(0, 1), rng)
        arms = np.stack([np.broadcast_to(angle, t.shape) for arm in arms for angle in arm])
        blend = ramp(t, start - JOIN / 2, JOIN) if spans else 1
        angles, before = angles + blend * (arms - before), arms
        spans.append(tuple(start + length * float(np.clip(moment, 0, 1)) for moment in span))
    return angles[:2], angles[2:], spans


def draw_long_video(path, seed, seconds=60, width=150, height=112, rate=25, person=None):
    """Draw one person who goes from action to action without a break, and write the video.

    The room, the camera and the person stay the same; the actions are those of the clips, as fast
    and as long as there. Frames are written as they are drawn: memory does not grow with them.

    Returns when the hand is being raised: a list of (start, end) in seconds, from the moment when
    the arm begins to move upwards until it is up. Raises ValueError if there is no frame to draw,
    or a side is odd (H.264) or too small.
    """
    if seconds * rate < 1 or width % 2 or height % 2 or min(width, height) < 16:
        size = f"{seconds} s of {width}x{height} at {rate} frames per second"
        raise ValueError(f"a video of {size}: need 1 frame, even sides from 16 pixels")
    rng = np.random.default_rng(seed)
    person = person or appearance(int(rng.integers(2**31)), "drawn", 0)
    t = np.arange(round(seconds * rate)) / rate
    scenes = script(seconds, rng)
    *arms, spans = movements(scenes, t, rng)
    clip = t / np.mean(SECONDS)  # time in clips
    pictures = draw_scene(rng, person, width, height, clip, lambda _: (*arms, spans),
                          0.5 * np.sin(clip), False, 0 * t)  # fmt: skip
    write_video(path, (picture for picture, _ in pictures), rate)
    raised = [s for (action, *_), s in zip(scenes, spans, strict=True) if action == POSITIVE]
    return [(start, min(end, seconds)) for start, end in raised if start < seconds]


def unreadable(width):
    """Whether decord (which pads rows of pixels to 32) or decord2 (to 64) fails at that width."""
    padded = [-(-width // unit) * unit for unit in (32, 64)]  # 48, 72, 96 and a few more
    return any(row != width and row * 3 % width == 0 for row in padded)


def plan(clips, height, seed):
    """One dict for each clip: file, action, person, width, height, frames, rate, seed."""
    rows = []
    for split, count in clips.items():
        key = crc32(split.encode())
        rng = np.random.default_rng([seed, key])
        positives = count // 2
        places = (np.arange(count - positives) + 0.5) / max(1, count - positives)
        shares = np.cumsum(list(NEGATIVE_ACTIONS.values()))
        negatives = np.array(list(NEGATIVE_ACTIONS))[np.searchsorted(shares, places)]
        actions = [POSITIVE] * positives + negatives.tolist()
        people = rng.permutation(count) // CLIPS_PER_PERSON
        for name, i in enumerate(rng.permutation(count)):  # so that no name tells the label
            label = POSITIVE if actions[i] == POSITIVE else NEGATIVE
            rate = int(rng.choice(RATES))
            width = 2 * round(height * ASPECTS[rng.integers(4)] / 2)
            while unreadable(width):
                width += 2
            rows.append({
                "file": f"{split}/{label}/clip_{name:04d}.mp4", "action": actions[i],
                "person": [seed, split, int(people[i])], "seed": [seed, key, name],
                "width": width, "height": height,
                "frames": round(rate * rng.uniform(*SECONDS)), "rate": rate,
            })  # fmt: skip
    return rows


def drawn(row):
    """The video and the masks of a row of plan, as draw_clip returns them."""
    size = row["width"], row["height"], row["frames"]
    return draw_clip(row["action"], row["seed"], *size, appearance(*row["person"]))


def write_clip(folder, row):
    write_video(Path(folder, row["file"]), drawn(row)[0], row["rate"])


def video_name(row):
    """The name of a row's folder in the layout of DAVIS: split, action and number."""
    return f"{row['file'].split('/')[0]}_{row['action']}_{row['seed'][-1]:04d}"


def frame_files(row):
    """The files of the frames, then those of the masks, of a row in the layout of DAVIS."""
    kinds = ("JPEGImages", "jpg"), ("Annotations", "png")
    numbers = range(row["frames"])
    return [f"{k}/480p/{video_name(row)}/{i:05d}.{end}" for k, end in kinds for i in numbers]


def write_frames(folder, row):
    """Write each frame of a row as JPEG and each mask as a PNG with the colours of DAVIS."""
    video, masks = drawn(row)
    files = [Path(folder, file) for file in frame_files(row)]
    for file, frame in zip(files[: len(video)], video, strict=True):
        Image.fromarray(frame).save(file, quality=92, subsampling=0)
    for file, mask in zip(files[len(video) :], masks, strict=True):
        picture = Image.fromarray(mask, mode="P")
        picture.putpalette(MASK_COLOURS)
        picture.save(file)


def write_clips(folder, clips=None, height=240, seed=0):
    """Write a video folder of drawn clips: `<folder>/<split>/<label>/<name>.mp4`.

    clips: {split: number of clips}, by default 320 train, 80 validation, 120 test; half of each
    are `raising_hand`. height: pixels, even. Widths, frame rates and lengths vary. No person of
    one split is in another. The same arguments give the same files. `clips.json` beside the
    splits records the arguments and what each clip shows; data loaders ignore it.

    A complete folder with the same arguments is kept. One that an earlier call left unfinished,
    or made with other arguments, is drawn anew. Returns the folder as a Path.
    Raises FileExistsError if the folder holds files that this function did not write.
    """
    clips = clips or {"train": 320, "validation": 80, "test": 120}
    rows = plan(clips, height, seed)
    settings = {"clips": clips, "height": height, "seed": seed}
    return write_all(folder, settings, rows, write_clip, lambda row: [row["file"]])


def write_davis(folder, videos=None, height=64, frames=24, seed=0):
    """Write drawn videos with the label of each pixel, in the layout of DAVIS 2017.

    `JPEGImages/480p/<video>/*.jpg`, `Annotations/480p/<video>/*.png` (palette PNGs with the labels
    of draw_clip), `ImageSets/2017/{train,val,test}.txt`, and `labels.json`, the labels' names,
    which DAVIS has not, because its values number the objects of each video.

    videos: {split: number of videos}; the actions are those of write_clips, each video has a person
    of its own.
    height: pixels, even; frames: of each video, or {split: of each}; a movement fills them. As
    write_clips in all else.
    """
    videos = videos or {"train": 160, "val": 40, "test": 40}
    frames = frames if isinstance(frames, dict) else dict.fromkeys(videos, frames)
    rows = []
    for row in plan(videos, height, seed):
        _, split, _ = row["person"]
        # A person of its own in each: a model must not learn the colours of a few shirts.
        own = {"frames": frames[split], "person": [seed, split, row["seed"][-1]]}
        rows.append(row | own)
    settings = {"videos": videos, "height": height, "frames": frames, "seed": seed}
    folder = write_all(folder, settings, rows, write_frames, frame_files)
    (folder / "ImageSets" / "2017").mkdir(parents=True, exist_ok=True)
    for split in videos:
        names = [video_name(row) for row in rows if row["file"].startswith(f"{split}/")]
        (folder / "ImageSets" / "2017" / f"{split}.txt").write_text("\n".join(sorted(names)) + "\n")
    (folder / "labels.json").write_text(json.dumps(MASK_LABELS))
    return folder


def write_all(folder, settings, rows, write, files_of):
    """Call write(folder, row) for each row, unless a complete folder with these settings is there.

    files_of(row): the files that it writes, relative to `folder`. See write_clips for the rest.
    """
    folder, counts = Path(folder), settings.get("clips") or settings["videos"]
    height = settings["height"]
    if height < 32 or height % 2 or not all(count >= 2 for count in counts.values()):
        raise ValueError(f"height {height} must be even, at least 32; counts {counts} at least 2")
    record = folder / RECORD
    settings = {"made_by": "local_mode/clips.py", "version": 2} | settings
    old = json.loads(record.read_text()) if record.is_file() else {}
    if old.get("complete") and old["settings"] == settings:
        if all((folder / file).is_file() for row in rows for file in files_of(row)):
            return folder
    lists = LISTS if "videos" in old.get("settings", {}) else ()  # else they are the reader's
    known = {record, *(folder / file for file in lists)}
    known |= {folder / file for row in old.get("rows", []) for file in files_of(row)}
    strange = [p for p in folder.rglob("*") if p.is_file() and p not in known]
    if strange:
        raise FileExistsError(
            f"{folder} holds {len(strange)} files that {write.__name__} did not make, for example "
            f"{strange[0]}. Name another folder, or move them away."
        )
    for path in known:
        path.unlink(missing_ok=True)
    for file in (file for row in rows for file in files_of(row)):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
    result = {"settings": settings, "complete": False, "rows": rows}
    record.write_text(json.dumps(result))
    jobs = {"max_workers": os.cpu_count(), "mp_context": multiprocessing.get_context("spawn")}
    with ProcessPoolExecutor(**jobs) as pool:
        done = pool.map(write, [folder] * len(rows), rows, chunksize=4)
        for _ in tqdm(done, total=len(rows), desc="drawing clips", unit="clip"):
            pass
    record.write_text(json.dumps(result | {"complete": True}, indent=1))
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="where the clips go")
    parser.add_argument("--height", type=int, default=240, help="of a frame, in pixels")
    parser.add_argument("--seed", type=int, default=0)
    counts = {"train": 320, "validation": 80, "test": 120}
    for split, count in counts.items():
        parser.add_argument(f"--{split}", type=int, default=count, help="number of clips")
    args = parser.parse_args()
    write_clips(args.folder, {s: getattr(args, s) for s in counts}, args.height, args.seed)


if __name__ == "__main__":
    main()
