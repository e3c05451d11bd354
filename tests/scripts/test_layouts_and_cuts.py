"""scripts/prepare_clips.py: clips cut out of recordings, splits, the layouts that people have."""

import csv
import json
import os
import shutil
import time
from collections import Counter, defaultdict
from pathlib import Path

import av
import clip_files
import numpy as np
import prepare_clips
import pytest
from test_prepare_clips import patched, run
from videos import cut_without_encoding, every_frame, number, numbered, turn, write_video

B_FRAMES = {"bf": "3", "g": "20"}


@pytest.fixture
def inline(monkeypatch):
    """All jobs in this process, one after the other: no second spent on starting another."""

    def in_turn(function, jobs, *_):
        done, failed = {}, {}
        for key, job in jobs.items():
            try:
                done[key] = function(*job)
            except Exception as error:
                if getattr(error, "errno", None) in clip_files.FULL:
                    raise
                failed[key] = error
        return done, failed

    monkeypatch.setattr(prepare_clips, "in_processes", in_turn)


def main(*args):
    """The exit code of the script, or the sentence with which it ends."""
    try:
        prepare_clips.main([*map(str, args), "--workers", "1"])
    except SystemExit as end:
        return end.code
    return 0


def cut(folder, rows, *flags, header="file,start,end,label", source="long", out="out"):
    """Cuts what `rows` say out of folder/long into folder/out; returns what main returns."""
    table = folder / "table.csv"
    if rows is not None:
        table.write_text("\n".join([header, *rows, ""]), "utf-8")
    return main(folder / source, folder / out, "--cut", table, *flags)


def numbers(path):
    return [number(frame) for frame in every_frame(path)]


def table_of(folder):
    """The rows of the metadata.csv in a prepared folder."""
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def bad_of(folder):
    file = folder / "bad_clips.json"
    return json.loads(file.read_text()) if file.exists() else {}


def report_of(folder):
    return json.loads((folder / "clips_report.json").read_text("utf-8"))


def files(folder):
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())


def videos(folder):
    return [name for name in files(folder) if Path(name).suffix in clip_files.FORMATS]


def loaded(folder):
    """{name below the folder: (split, label)} as train.py sees them."""
    import train

    clips = train.load_clips(str(folder))
    return {
        os.path.relpath(row["video"]["path"], folder): (split, part.features["label"].names[label])
        for split, part in clips.items()
        for row, label in zip(part, part["label"], strict=True)
    }


def clip_numbers(folder):
    """{(file, start, end) as the table of the result has them: the numbers of the frames}."""
    rows = table_of(folder)
    return {(r["file"], float(r["start"])): numbers(folder / r["file_name"]) for r in rows}


# ---- Cuts: the frames that the table names

RECORDINGS = {
    "long_gop.mp4": {"bf": "3", "g": "250"},
    "short_gop.mp4": B_FRAMES,
    "no_b.m4v": {"bf": "0", "g": "20"},
    "hevc.mp4": {"codec": "libx265", "x265-params": "log-level=error:keyint=20"},
    "mpeg4_b.mov": {"codec": "mpeg4", "bf": "2", "g": "30"},
    "b.mkv": B_FRAMES,
    "vp9.webm": {"codec": "libvpx-vp9", "cpu-used": "8", "g": "20"},
    "b.ts": B_FRAMES,
    "long_gop.mts": {"bf": "3", "g": "250"},
    "mpeg2.m2ts": {"codec": "mpeg2video", "rate": 25, "bf": "2"},
    "b.avi": {"codec": "mpeg4", "bf": "2", "g": "60"},
    "h264_b.avi": B_FRAMES,
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25, "bf": "2"},
    "old.wmv": {"codec": "wmv2"},
    "b.flv": B_FRAMES,
}


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_clip_begins_and_ends_at_the_frames_that_the_table_names(tmp_path, inline, name):
    write_video(tmp_path / "long" / name, numbered(120), **RECORDINGS[name])
    rate = RECORDINGS[name].get("rate", 12)
    spans = [(0, 7), (37, 52), (52, 53), (60, 75), (97, 120)]
    times = [(first / rate, stop / rate) for first, stop in spans[:3]]
    # Between two frames: the one shown at `start`, and the last that begins before `end`.
    times += [((60 + 0.4) / rate, (75 - 0.5) / rate), ((97 + 0.9) / rate, 120 / rate)]
    rows = [f"{name},{start:.3f},{end:.3f},wave" for start, end in times]
    assert cut(tmp_path, rows) == 0
    found = sorted(clip_numbers(tmp_path / "out").items())
    assert [each for _, each in found] == [list(range(*span)) for span in spans]
    for row in table_of(tmp_path / "out"):
        with av.open(str(tmp_path / "out" / row["file_name"])) as clip:
            assert clip.streams.video[0].average_rate == rate


def test_a_cut_out_of_a_variable_frame_rate(tmp_path, inline):
    steps = np.r_[np.full(45, 33), np.full(15, 200), np.full(40, 50)]
    ms = np.cumsum(steps) - steps[0]
    write_video(tmp_path / "long/a.mp4", numbered(100), rate=1000, ms=ms, bf="3", g="30")
    spans = [(10, 40), (47, 58), (70, 100)]
    ends = [*ms, ms[-1] + 50]
    rows = [f"a.mp4,{ms[i] / 1000},{ends[j] / 1000},x" for i, j in spans]
    assert cut(tmp_path, rows) == 0
    found = sorted(clip_numbers(tmp_path / "out").items())
    for (i, j), (_, each) in zip(spans, found, strict=True):
        assert each[0] == i and j - 2 <= each[-1] < j and sorted(each) == each
        rate = 1000 / np.mean(np.diff(ms))
        assert abs(len(each) / rate - (ends[j] - ends[i]) / 1000) < 2 / rate
        for place, found_number in enumerate(each):
            at = ms[i] + 1000 * np.array([place - 1, place + 1]) / rate
            low, high = np.searchsorted(ms, at, "right") - 1
            assert low <= found_number <= high


def test_a_cut_out_of_a_cut_without_re_encoding(tmp_path, inline):
    write_video(tmp_path / "whole.mp4", numbered(120), bf="3", g="30", sc_threshold="0")
    (tmp_path / "long").mkdir()
    cut_without_encoding(tmp_path / "whole.mp4", tmp_path / "long/a.mp4", 48 / 12)
    assert numbers(tmp_path / "long/a.mp4") == list(range(48, 120))  # from an edit list
    assert cut(tmp_path, ["a.mp4,0,1,wave", "a.mp4,2,2.5,wave", "a.mp4,5,6,wave"]) == 0
    assert [*clip_numbers(tmp_path / "out").values()] == [
        [*range(48, 60)], [*range(72, 78)], [*range(108, 120)]
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["a.ts", "a.mkv"])
def test_a_cut_out_of_interlaced_video(tmp_path, inline, name):
    still = np.repeat(numbered(100), 1, axis=0)
    write_video(tmp_path / "long" / name, still, rate=25, flags="+ildct+ilme", bf="3", g="25")
    with av.open(str(tmp_path / "long" / name)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    assert cut(tmp_path, [f"{name},0,0.4,x", f"{name},2,3,x", f"{name},3.6,4,x"]) == 0
    assert [*clip_numbers(tmp_path / "out").values()] == [
        [*range(10)], [*range(50, 75)], [*range(90, 100)]
    ]  # fmt: skip


def test_a_turned_recording_gives_upright_clips(tmp_path, inline):
    write_video(tmp_path / "upright.mp4", numbered(60))
    (tmp_path / "long").mkdir()
    turn(tmp_path / "upright.mp4", tmp_path / "long/a.mp4")
    assert cut(tmp_path, ["a.mp4,1,2,wave"]) == 0
    (row,) = table_of(tmp_path / "out")
    frames = np.rot90(every_frame(tmp_path / "out" / row["file_name"]), 1, axes=(1, 2))
    other = np.rot90(frames, 2, axes=(1, 2))
    assert [*range(12, 24)] in ([number(f) for f in frames], [number(f) for f in other])


def test_a_cut_out_of_what_is_whole_of_a_recording(tmp_path, inline):
    write_truncated(tmp_path / "long/a.mkv", bf="3", g="30")
    rows = ["a.mkv,0,1,wave", "a.mkv,3,4,wave", "a.mkv,8,9,wave"]
    assert cut(tmp_path, rows) == 1
    assert list(bad_of(tmp_path / "out")) == ["row 4"]
    assert [*clip_numbers(tmp_path / "out").values()] == [[*range(12)], [*range(36, 48)]]


def test_times_folders_and_base_names(tmp_path, inline):
    for name in ("day 1/a.mp4", "day 1/b.mp4", "day 2/b.mp4"):
        write_video(tmp_path / "long" / name, numbered(60), rate=10, **B_FRAMES)
    rows = [
        "a.mp4,00:00:01.200,0:03,wave",  # its name alone will do: there is one
        'day 2/b.mp4,1.2,"3,0",wave',
        "day 1\\b.mp4,0:04.0,5,sit",
        "b.mp4,0,1,sit",  # which of the two?
    ]
    assert cut(tmp_path, rows) == 1
    assert clip_numbers(tmp_path / "out") == {
        ("day 1/a.mp4", 1.2): list(range(12, 30)),
        ("day 2/b.mp4", 1.2): list(range(12, 30)),
        ("day 1/b.mp4", 4.0): list(range(40, 50)),
    }
    assert list(bad_of(tmp_path / "out")) == ["row 5"]
    assert "no recording 'b.mp4'" in bad_of(tmp_path / "out")["row 5"]
    rows = table_of(tmp_path / "out")
    assert {"file_name", "label", "split", "group", "file", "start", "end"} <= {*rows[0]}
    for row in rows:
        split, label, *_ = Path(row["file_name"]).parts
        assert (split, label) == (row["split"], row["label"]) and row["group"] == row["file"]
    # One recording may be the input itself.
    single = tmp_path / "long/day 2/b.mp4"
    assert cut(tmp_path, ["b.mp4,1.2,3,wave"], source=single, out="one") == 0
    assert clip_numbers(tmp_path / "one") == {("b.mp4", 1.2): list(range(12, 30))}


def test_names_that_differ_in_a_folder_alone_do_not_meet(tmp_path, inline):
    write_video(tmp_path / "long/a/b.mp4", numbered(30), rate=10)
    write_video(tmp_path / "long/a_b.mp4", numbered(60)[30:], rate=10)
    assert cut(tmp_path, ["a/b.mp4,1,2,wave", "a_b.mp4,1,2,wave"]) == 0
    assert clip_numbers(tmp_path / "out") == {
        ("a/b.mp4", 1.0): list(range(10, 20)),
        ("a_b.mp4", 1.0): list(range(40, 50)),
    }


def many_recordings(folder, count=8):
    """Recordings of 3 s, and rows of two clips of each label out of each."""
    made = write_video(folder / "long/0.mp4", numbered(36), bf="2", g="12")
    for i in range(1, count):
        shutil.copy(made, folder / f"long/{i}.mp4")
    return recording_rows(range(count))


def recording_rows(which):
    times = ((0, 0.5, "wave"), (0.5, 1, "sit"), (1, 1.5, "wave"), (2, 2.5, "sit"))
    return [f"{i}.mp4,{start},{end},{label}" for i in which for start, end, label in times]


DRAW = ("--validation_share", 0.25, "--test_share", 0.25)


def splits_of(folder):
    """{group: its split}; fails where a group is torn."""
    found = defaultdict(set)
    for row in table_of(folder):
        found[row["group"]].add(row["split"])
        assert row["file_name"].startswith(f"{row['split']}/{row['label']}/")
    assert {len(splits) for splits in found.values()} == {1}
    return {group: splits.pop() for group, splits in found.items()}


def test_drawn_splits_hold_whole_recordings_and_stay(tmp_path, inline, capsys):
    rows = many_recordings(tmp_path)
    assert cut(tmp_path, rows, *DRAW) == 0
    out = tmp_path / "out"
    said = capsys.readouterr().out
    assert "no validation split: 8 clips become one, in whole groups" in said
    assert "no test split: 8 clips become one, in whole groups" in said
    first = splits_of(out)
    assert Counter(first.values()) == {"train": 4, "validation": 2, "test": 2}
    names = {row["file_name"]: (row["split"], row["label"]) for row in table_of(out)}
    assert loaded(out) == names and len(names) == 32 and videos(out) == sorted(names)
    found = of_videofolder(out, tmp_path / "cache").items()  # labels are 0 and 1
    assert {name: (split, ("sit", "wave")[row["label"]]) for name, (split, row) in found} == names
    made = {name: (out / name).stat().st_mtime_ns for name in names}

    assert cut(tmp_path, rows, *DRAW) == 0
    assert "0 clips prepared, 32 already there, 0 bad" in capsys.readouterr().out
    assert splits_of(out) == first
    assert {name: (out / name).stat().st_mtime_ns for name in names} == made

    for new in ("more", "0a"):  # whatever the order of their names
        shutil.copy(tmp_path / "long/0.mp4", tmp_path / f"long/{new}.mp4")
    rows = [*recording_rows(["more", "0a"]), *rows]
    assert cut(tmp_path, rows, *DRAW, "--seed", 7) == 0
    assert "8 clips prepared, 32 already there" in capsys.readouterr().out
    assert splits_of(out).items() > first.items() and len(splits_of(out)) == 10

    rows[0] = "more.mp4,0,0.75,wave"
    rows[1] = "more.mp4,0.75,1,sit"
    assert cut(tmp_path, rows, *DRAW) == 0
    assert "2 clips prepared, 38 already there" in capsys.readouterr().out
    assert clip_numbers(out)["more.mp4", 0.75] == list(range(9, 12))
    assert len(loaded(out)) == 40  # what the rows said before is no clip any more


def test_a_split_that_is_wanted_later_leaves_the_others_as_they_are(tmp_path, inline):
    rows = many_recordings(tmp_path)
    assert cut(tmp_path, rows, "--validation_share", 0.25, "--test_share", 0) == 0
    first = splits_of(tmp_path / "out")
    assert Counter(first.values()) == {"train": 6, "validation": 2}
    assert cut(tmp_path, rows) == 0
    second = splits_of(tmp_path / "out")
    assert {*second.values()} == {"train", "validation", "test"}
    assert all(second[group] == "validation" for group in first if first[group] != "train")
    # Shares that would be too small for so few clips undo nothing.
    assert cut(tmp_path, rows, "--validation_share", 0.01, "--test_share", 0.01) == 0
    assert splits_of(tmp_path / "out") == second


def test_given_splits_and_groups_of_a_table(tmp_path, inline):
    many_recordings(tmp_path, 4)
    rows = [
        "0.mp4,0,1,wave,,ann", "1.mp4,0,1,wave,,ann", "2.mp4,0,1,wave,val,bob",
        "0.mp4,1,2,sit,train,ann", "2.mp4,1,2,sit,validation,bob", "3.mp4,0,1,sit,test,",
    ]  # fmt: skip
    header = "file,start,end,label,split,group"
    assert cut(tmp_path, rows, header=header) == 0
    assert splits_of(tmp_path / "out") == {"ann": "train", "bob": "validation", "3.mp4": "test"}
    rows.append("3.mp4,1,2,wave,train,bob")
    assert cut(tmp_path, rows, header=header) == 1
    bad = bad_of(tmp_path / "out")
    assert list(bad) == ["row 4, row 6, row 8"] and "bob" in [*bad.values()][0]


def test_an_interrupted_run_goes_on(tmp_path, inline, monkeypatch, capsys):
    rows, right, made = many_recordings(tmp_path), clip_files.prepare_clip, []

    def interrupted(*args):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(args[1])
        return right(*args)

    monkeypatch.setattr(prepare_clips, "prepare_clip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cut(tmp_path, rows, *DRAW)
    monkeypatch.setattr(prepare_clips, "prepare_clip", right)
    times = {path: path.stat().st_mtime_ns for path in made}
    assert cut(tmp_path, rows, *DRAW) == 0
    assert "27 clips prepared, 5 already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in made} == times


# ---- Cuts: what is wrong with a table


def test_all_problems_are_in_one_report_and_good_rows_are_cut(tmp_path, inline, monkeypatch):
    long = tmp_path / "long"
    for name in ("a.mp4", "day/b.mkv", "gone.mp4"):
        write_video(long / name, numbered(60), rate=10)
    (long / "damaged.mp4").write_bytes(b"no video" * 50)
    rows = [
        "a.mp4,0,1,wave",  # 2: good
        "a.mp4,2,1,wave",  # 3: reversed
        "a.mp4,5,7,wave",  # 4: beyond the end
        "c.mp4,0,1,wave",  # 5: unknown
        "b.mkv,1,2,wave",  # 6, 7: overlap
        "b.mkv,1.5,3,sit",
        "b.mkv,3,4,sit/down",  # 8: no name of a folder
        "damaged.mp4,0,1,wave",
        "gone.mp4,0,1,wave",  # 10
        "a.mp4,0:61,70,wave",  # 11: no time
        "b.mkv,4,5,sit",  # 12: good
        "a.mp4,3,4,",  # 13: no label
        "a.mp4,4,5,Sit",  # 14: looks like the label sit
        "a.mp4,4,5",  # 15: a cell is lacking
    ]
    right = clip_files.clip_times

    def vanishing(path, *args):
        found = right(path, *args)
        if path.name == "gone.mp4":
            path.unlink()
        return found

    monkeypatch.setattr(prepare_clips, "clip_times", vanishing)
    for flags, code in (((), 1), (("--on_bad_clip", "skip"), 0)):
        assert cut(tmp_path, rows, "--background", 1, *flags) == code
        bad = bad_of(tmp_path / "out")
        reasons = {
            "row 3": "2 to 1 s: the start must be before the end",
            "row 4": "5 to 7 s: a.mp4 has only 6 s",
            "row 5": "no recording 'c.mp4'",
            "row 7": "1.5 to 3 s overlaps row 6 (1 to 2 s)",
            "row 8": "label 'sit/down' contains '/'",
            "row 11": "'0:61' is not a time",
            "row 13": "label '' is empty",
            "row 14": "label 'Sit' looks the same as 'sit'",
            "row 15": "3 cells, but the header names 4 columns",
            "damaged.mp4": "not a video, or damaged",
        }
        reasons["row 10"] = "no recording 'gone.mp4'" if flags else "no such file"
        for key, reason in reasons.items():
            assert reason in bad[key] and "\n" not in bad[key], key
        assert [key for key in bad if "background" not in key] == [
            "damaged.mp4", *sorted(reasons.keys() - {"damaged.mp4"}, key=clip_files.natural)
        ]  # fmt: skip
        rows_made = [row for row in table_of(tmp_path / "out") if row["label"] != "background"]
        made = sorted((row["file"], row["start"]) for row in rows_made)
        assert made == [("a.mp4", "0.0"), ("day/b.mkv", "4.0")]
        assert not [name for name in files(tmp_path / "out") if name.endswith(".part")]
        assert {row["file_name"] for row in table_of(tmp_path / "out")} == {
            *videos(tmp_path / "out")
        }


@pytest.mark.parametrize(
    "content, flags",
    [
        ("\ufefffile;start;end;label\r\na.mp4;0,5;1,25;揮手\r\n".encode(), ()),
        ("file;start;end;label\na.mp4;0,5;1,25;揮手\n".encode("utf-16"), ()),
        ("file,start,end,label\na.mp4,0.5,1.25,揮手\n".encode("big5"), ("--encoding", "big5")),
        ("file\tstart\tend\tlabel\na.mp4\t0:0.5\t0:1.25\t揮手\n".encode(), ()),
    ],
)
def test_a_table_as_spreadsheets_write_it(tmp_path, inline, content, flags):
    write_video(tmp_path / "long/a.mp4", numbered(30))
    (tmp_path / "table.csv").write_bytes(content)
    assert cut(tmp_path, None, *flags) == 0
    assert clip_numbers(tmp_path / "out") == {("a.mp4", 0.5): list(range(6, 15))}
    assert [row["label"] for row in table_of(tmp_path / "out")] == ["揮手"]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("t.csv", "file,start,end,label\na.mp4,0,1,揮手\n".encode("big5"), "--encoding big5"),
        ("t.csv", b"", "t.csv: the table is empty"),
        ("t.csv", b"file,from,to,label\na.mp4,0,1,x\n", "no column start, end"),
        ("t.csv", b"\x00\x01\x02\xff", "t.csv"),
        ("t.json", b"{", "damaged JSON"),
        ("t.xml", b"<annotations>", "damaged XML"),
        ("t.xlsx", b"PK\x03\x04\x14\x00\x06\x00\xff\xfe", "t.xlsx"),
        ("nothing.csv", None, "nothing.csv"),
        ("folder.csv", "folder", "folder.csv"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_sentence(tmp_path, inline, name, content, words):
    write_video(tmp_path / "long/a.mp4", numbered(12))
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    message = main(tmp_path / "long", tmp_path / "out", "--cut", tmp_path / name)
    assert isinstance(message, str) and words in message and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_a_folder_without_recordings_or_none_at_all_is_one_sentence(tmp_path, inline):
    (tmp_path / "long").mkdir()
    for source in ("long", "nowhere"):
        message = cut(tmp_path, ["a.mp4,0,1,x"], source=source)
        assert isinstance(message, str) and str(tmp_path / source) in message
        assert not (tmp_path / "out").exists()


def test_flags_that_do_not_go_together():
    for flags in (("--check_only",), ("--frame_rate", 5), ("--resource_config", "x")):
        assert main("long", "out", "--cut", "table.csv", *flags) == 2
    assert main("clips") == 2


# ---- Cuts: background


def test_background_is_where_nothing_is_marked(tmp_path, inline):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_video(tmp_path / "long" / name, numbered(120), rate=10)
    rows = [
        "a.mp4,2,3,wave,", "a.mp4,6,7,sit,", "a.mp4,9,8,sit,", "a.mp4,10.5,11.5,in/valid,",
        "b.mp4,0,6,wave,test", "b.mp4,6,12,sit,test",  # no room
        "gone.mp4,0,1,wave,",
    ]  # fmt: skip
    flags = ("--background", 3, "--background_label", "nothing")
    for _ in range(2):
        assert cut(tmp_path, rows, *flags, header="file,start,end,label,split") == 1
        assert len(bad_of(tmp_path / "out")) == 3
        made = [row for row in table_of(tmp_path / "out") if row["label"] == "nothing"]
        assert len(made) == 3 and {row["file"] for row in made} == {"a.mp4"}
        marked = [(20, 30), (60, 70), (80, 90), (105, 115)]
        taken = Counter()
        for row in made:
            assert row["group"] == "a.mp4" and row["split"] == "train"
            assert row["file_name"].startswith("train/nothing/")
            shown = numbers(tmp_path / "out" / row["file_name"])
            assert len(shown) in (10, 11)  # it may begin and end within a frame
            taken.update(shown[1:-1])
            for first, stop in marked:
                assert not {*range(first, stop)} & {*shown[1:-1]}
        assert taken.most_common(1)[0][1] == 1
    assert {row["split"] for row in table_of(tmp_path / "out") if row["file"] == "b.mp4"} == {
        "test"
    }


def test_background_goes_where_its_recording_goes(tmp_path, inline):
    rows = many_recordings(tmp_path)
    assert cut(tmp_path, rows, "--background", 1, *DRAW) == 0
    assert len(splits_of(tmp_path / "out")) == 8
    count = Counter(row["label"] for row in table_of(tmp_path / "out"))
    assert count == {"wave": 16, "sit": 16, "background": 8}


def test_a_label_that_background_would_join_is_named(tmp_path, inline):
    write_video(tmp_path / "long/a.mp4", numbered(120), rate=10)
    rows = ["a.mp4,1,2,wave", "a.mp4,3,4,Background"]
    message = cut(tmp_path, rows, "--background", 1)
    assert isinstance(message, str) and "--background_label" in message
    assert "--background_label" in cut(tmp_path, rows, "--background", 1, "--background_label", "/")


# ---- Cuts: tools that count frames


def test_frames_that_cvat_counts(tmp_path, inline):
    write_video(tmp_path / "long/a.mp4", numbered(60), rate=10, **B_FRAMES)
    steps = np.r_[np.full(30, 40), np.full(30, 100)]
    ms = np.cumsum(steps) - 40
    write_video(tmp_path / "long/vfr.mkv", numbered(60), rate=1000, ms=ms)
    for name in ("a.mp4", "vfr.mkv"):
        boxes = "".join(f'<box frame="{i}" outside="0"/>' for i in range(17, 23))
        last = '<box frame="59" outside="0"/>'
        beyond = '<box frame="65" outside="0"/><box frame="66" outside="1"/>'
        (tmp_path / "annotations.xml").write_text(
            f"<annotations><meta><task><id>1</id><name>t</name><source>{name}</source></task>"
            f'</meta><track label="wave">{boxes}<box frame="23" outside="1"/></track>'
            f'<track label="sit">{last}</track><track label="sit">{beyond}</track></annotations>'
        )
        out = tmp_path / f"out {name}"
        assert main(tmp_path / "long", out, "--cut", tmp_path / "annotations.xml") == 1
        assert list(bad_of(out)) == ["track 3, shape 1"]
        first, second = (each for _, each in sorted(clip_numbers(out).items()))
        assert (first[0], first[-1]) == (17, 22) and {*second} == {59}
        if name == "a.mp4":
            assert first == [*range(17, 23)] and second == [59]


def test_frames_that_label_studio_counts(tmp_path, inline):
    write_video(tmp_path / "long/day 1.mp4", numbered(60), rate=10, **B_FRAMES)
    ranges = [{"start": 13, "end": 30}]  # counted from 1, and the last one is in it
    value = {"ranges": ranges, "timelinelabels": ["wave"]}
    task = {"id": 5, "data": {"video": "/data/upload/1/ab12cd34-day%201.mp4"}}
    task["annotations"] = [{"result": [{"value": value}]}]
    (tmp_path / "export.json").write_text(json.dumps([task]))
    assert main(tmp_path / "long", tmp_path / "out", "--cut", tmp_path / "export.json") == 0
    assert [*clip_numbers(tmp_path / "out").values()] == [[*range(12, 30)]]
    (row,) = table_of(tmp_path / "out")
    assert row["file"] == row["group"] == "day 1.mp4"


# ---- Cuts: a full disk, a crash


def test_a_full_disk_while_cutting(tmp_path):
    rows = [*many_recordings(tmp_path, 2), "damaged.mp4,0,1,wave"]
    (tmp_path / "long/damaged.mp4").write_text("no video")
    (tmp_path / "table.csv").write_text("\n".join(["file,start,end,label", *rows]))
    script = patched(
        tmp_path,
        "import errno\n"
        "right = os.replace\n"
        "def replace(part, target):\n"
        "    if '1.mp4_1.000' in target.name: raise OSError(errno.ENOSPC, 'No space left')\n"
        "    right(part, target)\n"
        "prepare_clips.os.replace = replace",
    )
    args = (tmp_path / "long", tmp_path / "out", "--cut", tmp_path / "table.csv", "--workers", 1)
    code, out, err = run(*args, script=script)
    assert code == 1  # a worker that is ended inside decord may say so: the last line is ours
    message = "out: the disk is full. Free some space and run the same command again."
    assert err.splitlines()[-1].endswith(message)
    kept = videos(tmp_path / "out")
    assert 6 <= len(kept) < 8 and files(tmp_path / "out") == kept  # nothing half-written
    code, out, _ = run(*args)
    damaged = "not a video, or damaged (Invalid data found when processing input)"
    assert code == 1 and bad_of(tmp_path / "out") == {"damaged.mp4": damaged}
    assert f"{8 - len(kept)} clips prepared, {len(kept)} already there" in out


# ---- Splits of a data set that lacks some


def small_clips(folder, names):
    """Clips of 12 frames, each with a number of its own in the first frame."""
    for i, name in enumerate(names):
        write_video(folder / name, np.roll(numbered(12), -i, axis=0))
    return folder


def test_a_folder_with_train_alone_gets_splits_that_stay(tmp_path, inline, capsys):
    source, out = tmp_path / "clips", tmp_path / "out"
    small_clips(source, [f"train/{label}/{i}.avi" for label in ("a", "b") for i in range(8)])
    assert main(source, out, *DRAW) == 0
    said = capsys.readouterr().out
    assert "no validation split: 4 clips become one, in whole groups" in said
    count = Counter((row["split"], row["label"]) for row in table_of(out))
    assert count == {("train", x): 4 for x in "ab"} | {
        (split, x): 2 for split in ("validation", "test") for x in "ab"
    }
    first = splits_of(out)
    assert loaded(out) == {r["file_name"]: (r["split"], r["label"]) for r in table_of(out)}
    assert videos(out) == sorted(row["file_name"] for row in table_of(out))
    report = report_of(out)
    assert report["clips"][0] == {
        "split": "train", "label": "a", "clips": 4, "groups": 4, "minutes": pytest.approx(4 / 60)
    }  # fmt: skip
    assert report["warnings"] == [f"label {x} has 8 clips: fewer than ten" for x in "ab"] and all(
        f"warning: {text}" in said for text in report["warnings"]
    )

    small_clips(source, [f"train/{label}/new{i}.avi" for label in ("a", "b") for i in range(2)])
    assert main(source, out, *DRAW, "--seed", 1) == 0
    assert "4 clips prepared, 16 already there" in capsys.readouterr().out
    assert splits_of(out).items() > first.items() and len(splits_of(out)) == 20
    # With splits of its own, what was drawn before is no longer so.
    small_clips(source, [f"{s}/{label}/x.avi" for label in ("a", "b") for s in ("val", "test")])
    assert main(source, out) == 0
    assert "no validation split" not in capsys.readouterr().out
    assert {*loaded(out)} >= {f"train/{x}/{i}.avi.mp4" for x in "ab" for i in range(8)}
    assert sum(split == "validation" for split, _ in loaded(out).values()) == 2


def test_groups_of_a_table_are_never_torn(tmp_path, inline):
    source, out = tmp_path / "clips", tmp_path / "out"
    names = [f"{i}.mov" for i in range(24)]
    small_clips(source, names)
    rows = [f"{name},{'ab'[i % 2]},person {i // 4},{i}" for i, name in enumerate(names)]
    text = "\n".join(["file_name,label,group,frames", *rows, ""])
    (source / "metadata.csv").write_text(text)
    for _ in range(2):
        assert main(source, out, *DRAW) == 0
        made = table_of(out)
        split_of = defaultdict(set)
        for row in made:
            split_of[row["group"]].add(row["split"])
        assert len(split_of) == 6 and {len(those) for those in split_of.values()} == {1}
        assert {row["split"] for row in made} == {"train", "validation", "test"}
        # Names changed, other columns kept, whatever they are called.
        assert [(r["file_name"], r["frames"]) for r in made] == [
            (f"{i}.mov.mp4", str(i)) for i in range(24)
        ]
        assert loaded(out) == {r["file_name"]: (r["split"], r["label"]) for r in made}


@pytest.mark.parametrize("inner", ["", "train"])
def test_a_table_that_was_copied_gives_way_to_a_drawn_one(tmp_path, inline, inner):
    source, out = tmp_path / "clips", tmp_path / "out"
    small_clips(source / inner, [f"{i}.mp4" for i in range(16)])
    rows = [{"file_name": f"{i}.mp4", "label": "ab"[i % 2]} for i in range(16)]
    write_metadata(source / inner, "jsonl", rows)
    assert main(source, out, "--validation_share", 0, "--test_share", 0) == 0
    assert [name for name in files(out) if "metadata" in name] == [
        (Path(inner) / "metadata.jsonl").as_posix()
    ]
    assert main(source, out, *DRAW) == 0
    assert [name for name in files(out) if "metadata" in name] == ["metadata.csv"]
    assert Counter(split for split, _ in loaded(out).values()) == {
        "train": 8, "validation": 4, "test": 4,
    }  # fmt: skip


def test_too_few_clips_and_no_shares_draw_nothing(tmp_path, inline, capsys):
    small_clips(tmp_path / "few", ["train/a/1.mp4", "train/b/1.mp4"])
    assert main(tmp_path / "few", tmp_path / "out") == 0
    said = capsys.readouterr().out
    for split in ("validation", "test"):
        assert f"no {split} split, and too few clips (2) to draw one" in said
    small_clips(tmp_path / "many", [f"train/{x}/{i}.mp4" for x in "ab" for i in range(8)])
    shares = ("--validation_share", 0, "--test_share", 0)
    assert main(tmp_path / "many", tmp_path / "none", *shares) == 0
    assert "no validation split" not in capsys.readouterr().out
    for out in ("out", "none"):
        assert {Path(name).parts[0] for name in videos(tmp_path / out)} == {"train"}
        assert not (tmp_path / out / "metadata.csv").exists()
    # Drawn once, and then no longer wanted.
    assert main(tmp_path / "many", tmp_path / "none", *DRAW) == 0
    assert {*splits_of(tmp_path / "none").values()} == {"train", "validation", "test"}
    assert main(tmp_path / "many", tmp_path / "none", *shares) == 0
    assert {*splits_of(tmp_path / "none").values()} == {"train"}


def test_one_of_several_machines_draws_nothing(tmp_path, inline):
    small_clips(tmp_path / "clips", [f"train/{x}/{i}.mp4" for x in "ab" for i in range(8)])
    (tmp_path / "config.json").write_text('{"current_host": "one", "hosts": ["one", "two"]}')
    flags = (*DRAW, "--resource_config", tmp_path / "config.json")
    assert main(tmp_path / "clips", tmp_path / "out", *flags) == 0
    assert files(tmp_path / "out") == files(tmp_path / "clips")


def test_the_report_warns_of_leakage_and_single_groups(tmp_path, inline, capsys):
    source = small_clips(tmp_path / "clips", [f"{i}.mp4" for i in range(6)])
    rows = [
        "0.mp4,a,train,ann", "1.mp4,b,train,ann", "2.mp4,a,validation,ann",
        "3.mp4,b,validation,bob", "4.mp4,a,test,ann", "5.mp4,b,test,cid",
    ]  # fmt: skip
    (source / "metadata.csv").write_text("\n".join(["file_name,label,split,group", *rows]))
    assert main(source, tmp_path / "out") == 0
    assert report_of(tmp_path / "out")["warnings"] == [
        "label a has 3 clips: fewer than ten",
        "label a comes from a single group: ann",
        "label b has 3 clips: fewer than ten",
        "group ann is in test and train and validation: leakage",
    ]
    assert loaded(tmp_path / "out")["4.mp4"] == ("test", "a")  # as it was given


def test_a_clip_that_cannot_be_read_takes_no_place_in_the_table(tmp_path, inline):
    source, out = tmp_path / "clips", tmp_path / "out"
    small_clips(source, [f"train/{x}/{i}.mp4" for x in "ab" for i in range(8)])
    (source / "train/a/3.mp4").write_bytes(b"no video")
    assert main(source, out, *DRAW) == 1
    assert list(bad_of(out)) == ["train/a/3.mp4"] and len(table_of(out)) == len(loaded(out)) == 15


# ---- metadata.csv and metadata.jsonl


def write_metadata(folder, kind, rows):
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        keys = [*dict.fromkeys(key for row in rows for key in row)]
        lines = [keys, *([row.get(key, "") for key in keys] for row in rows)]
        text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    (folder / f"metadata.{kind}").write_text(text, "utf-8")


def of_videofolder(folder, cache):
    """{name below the folder: (split, what else its row says)} as `datasets` reads it."""
    import datasets

    found = datasets.load_dataset("videofolder", data_dir=str(folder), cache_dir=str(cache))
    return {
        os.path.relpath(row["video"]["path"], folder): (split, row)
        for split, part in found.cast_column("video", datasets.Video(decode=False)).items()
        for row in part
    }


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_in_each_split_s_folder(tmp_path, inline, kind):
    source, out = tmp_path / "clips", tmp_path / "out"
    expected = {}
    for split in ("train", "validation", "test"):
        rows = []
        for i, label in enumerate(("sit", "sit", "揮手")):
            name = f"deep/{i}.avi" if i else "0.mp4"
            small_clips(source / split, [name])
            rows.append({"file_name": name, "label": label, "camera": f"c{i}"})
            made = f"{split}/{name}" + ".mp4" * bool(i)
            expected[made] = (split, label)
        write_metadata(source / split, kind, rows)
    assert main(source, out) == 0
    assert loaded(out) == expected
    assert {n: (s, r["label"]) for n, (s, r) in of_videofolder(out, tmp_path / "c").items()} == (
        expected
    )
    assert {row["camera"] for _, row in of_videofolder(out, tmp_path / "c").values()} == {
        "c0", "c1", "c2"
    }  # fmt: skip
    assert loaded(source).keys() == {name.replace(".avi.mp4", ".avi") for name in expected}
    (source / "train/0.mp4").write_bytes(b"no video")
    os.utime(source / "train/0.mp4", (time.time() + 9,) * 2)
    assert main(source, out, "--on_bad_clip", "skip") == 0
    del expected["train/0.mp4"]
    assert loaded(out) == expected
    assert of_videofolder(out, tmp_path / "c").keys() == expected.keys()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_with_splits_and_labels_from_folders(tmp_path, inline, kind):
    source, out = tmp_path / "clips", tmp_path / "out"
    plan = {f"all/{i}.mkv": (("train", "val", "test")[i % 3], "ab"[i % 2]) for i in range(12)}
    small_clips(source, plan)
    keys = ("split", "label")
    rows = [{"file_name": n} | dict(zip(keys, where, strict=True)) for n, where in plan.items()]
    write_metadata(source, kind, rows)
    expected = {
        f"{name}.mp4": (split.replace("val", "validation"), label)
        for name, (split, label) in plan.items()
    }
    assert main(source, out) == 0 and loaded(out) == expected
    assert not {"metadata.csv", "metadata.jsonl"} <= {*files(out)}
    # A clip that is bad and skipped leaves the others readable.
    (source / "all/3.mkv").write_bytes(b"no video")
    os.utime(source / "all/3.mkv", (time.time() + 9,) * 2)
    assert main(source, out, "--on_bad_clip", "skip") == 0
    del expected["all/3.mkv.mp4"]
    assert loaded(out) == expected
    assert of_videofolder(out, tmp_path / "c").keys() == expected.keys()
    # Without a column: the folder says it.
    other = small_clips(tmp_path / "other", ["train/a/1.mp4", "train/b/2.mp4", "val/a/3.mp4"])
    names = ("train/a/1.mp4", "train/b/2.mp4", "val/a/3.mp4")
    write_metadata(other, kind, [{"file_name": name, "take": 1} for name in names])
    assert loaded(other)["val/a/3.mp4"] == ("validation", "a")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_all_problems_of_a_table_are_named_at_once(tmp_path, inline, capsys, kind):
    source = small_clips(tmp_path / "clips", [f"{i}.mp4" for i in range(1, 7)])
    rows = [
        ("1.mp4", "a", "train"), ("gone.mp4", "a", "train"), ("1.mp4", "b", "train"),
        ("2.mp4", "", "train"), ("3.mp4", "b", "holdout"), ("4.mp4", "b", "train"),
        ("5.mp4", "a", "val"), ("6.mp4", "b", "val"),
    ]  # fmt: skip
    keys = ("file_name", "label", "split")
    write_metadata(source, kind, [dict(zip(keys, row, strict=True)) for row in rows])
    words = ["no such file", "1.mp4 is there twice", "2.mp4 has no label", "not holdout"]
    with pytest.raises(ValueError) as error:
        loaded(source)
    for word in words:
        assert word in str(error.value)
    for flags, code in (((), 1), (("--on_bad_clip", "skip"), 0)):
        assert main(source, tmp_path / "out", *flags) == code
        said = capsys.readouterr().err
        bad = " ".join(f"{key}: {why}" for key, why in bad_of(tmp_path / "out").items())
        for word in words:
            assert word in said and word in bad
        assert len(bad_of(tmp_path / "out")) == 4 and len(videos(tmp_path / "out")) == 6
        # The good ones can be trained on.
        assert loaded(tmp_path / "out") == {"1.mp4": ("train", "a"), "4.mp4": ("train", "b")} | {
            "5.mp4": ("validation", "a"), "6.mp4": ("validation", "b")
        }  # fmt: skip


def test_a_table_that_is_none_is_one_sentence(tmp_path, inline):
    source = small_clips(tmp_path / "clips", ["1.mp4"])
    for kind, content in (
        ("csv", "file_name,label\n1.mp4,揮手\n".encode("big5")),
        ("csv", b'file_name,label\n1.mp4,"' + b"a" * 200000),
        ("jsonl", b'{"file_name": "1.mp4", \n'),
        ("jsonl", b"[1, 2]\n"),
    ):
        for old in source.glob("metadata.*"):
            old.unlink()
        (source / f"metadata.{kind}").write_bytes(content)
        with pytest.raises(ValueError, match=f"metadata.{kind}"):
            loaded(source)
        message = main(source, tmp_path / "out")
        assert isinstance(message, str) and f"metadata.{kind}: not UTF-8, or no table" in message
        assert not (tmp_path / "out").exists()


# ---- Lists


def test_lists_as_videomae_has_them(tmp_path, inline):
    source, out = tmp_path / "my clips", tmp_path / "out"
    labels = [str(label) for label in (0, 9, 10)]
    plan = {f"videos/{x} take {i}.avi": (("train", "validation")[i % 2], x)
            for x in labels for i in range(4)}  # fmt: skip
    small_clips(source, plan)
    for split, name in (("train", "train.csv"), ("validation", "val.csv")):
        here = [(n, label) for n, (where, label) in plan.items() if where == split]
        lines = [f"{source / n if i % 2 else n} {label}" for i, (n, label) in enumerate(here)]
        (source / name).write_text("\n".join([*lines, ""]))
    assert loaded(source) == plan
    for _ in range(2):
        assert main(source, out, "--test_share", 0) == 0
        assert loaded(out) == {f"{name}.mp4": where for name, where in plan.items()}
        assert [name for name in files(out) if name.endswith(".csv")] == ["metadata.csv"]
        import train

        names = train.load_clips(str(out))["train"].features["label"].names
        assert names == ["0", "9", "10"]


def test_lists_of_clips_elsewhere_or_not_there(tmp_path, inline, capsys, monkeypatch):
    source = small_clips(tmp_path / "clips", [f"{i}.mp4" for i in range(4)])
    far = small_clips(tmp_path / "far", ["5.mp4"]) / "5.mp4"
    lines = ["0.mp4 1", f"{tmp_path}/clips/1.mp4 2", "2.mp4", "gone.mp4 1", f"{far} 1"]
    (source / "train.txt").write_text("\n".join(lines))
    (source / "val.txt").write_text("2.mp4 1\n3.mp4 2\n")
    with pytest.raises(ValueError) as error:
        loaded(source)
    words = ("line 3: not `path label`: 2.mp4", "line 4: no such clip below")
    for word in words:
        assert word in str(error.value)
    monkeypatch.chdir(tmp_path)  # absolute paths in the list, a relative one as input
    assert main("clips", "out", "--test_share", 0) == 1
    bad = " ".join(f"{key}: {why}" for key, why in bad_of(tmp_path / "out").items())
    for word in (*words, "5.mp4"):
        assert word in bad
    assert loaded(tmp_path / "out") == {
        "0.mp4": ("train", "1"), "1.mp4": ("train", "2"),
        "2.mp4": ("validation", "1"), "3.mp4": ("validation", "2"),
    }  # fmt: skip


def write_pictures(folder, clip, form="img_{:05d}.jpg", first=1):
    """A clip as a folder of numbered pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(clip, first):
        codec = "png" if form.endswith("png") else "mjpeg"
        with av.open(str(folder / form.format(i)), "w", format="image2") as file:
            stream = file.add_stream(codec, rate=1)
            stream.height, stream.width = pixels.shape[:2]
            stream.pix_fmt = "rgb24" if codec == "png" else "yuvj420p"
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            file.mux(stream.encode(None))
    return folder


def test_lists_as_mmaction_has_them_for_folders_of_pictures(tmp_path, inline):
    source, out = tmp_path / "ucf", tmp_path / "out"
    plan = {}
    for x in (1, 2, 11):
        for i in range(3):
            name = f"rawframes/g{i} take/v_{x}"
            write_pictures(source / name, np.roll(numbered(12), -x, axis=0))
            plan[name] = ("train" if i < 2 else "validation", str(x))
    for split, name in (("train", "ucf_train_split_1_rawframes.txt"),
                        ("validation", "ucf_val_split_1_rawframes.txt")):  # fmt: skip
        lines = [
            f"{n.removeprefix('rawframes/')} 12 {label}"
            for n, (where, label) in plan.items()
            if where == split
        ]
        (source / name).write_text("\n".join(lines))
    assert main(source, out, "--frame_rate", 10, "--test_share", 0) == 0
    assert loaded(out) == {f"{name}.mp4": where for name, where in plan.items()}
    assert numbers(out / "rawframes/g0 take/v_11.mp4")[0] == 11
    assert not [name for name in files(out) if name.endswith((".jpg", ".txt"))]


# ---- Folders of numbered pictures


@pytest.mark.parametrize("form", ["frame{}.png", "img_{:05d}.jpg"])
def test_pictures_in_their_natural_order_and_rate(tmp_path, inline, form):
    source, out = tmp_path / "clips", tmp_path / "out"
    for split in ("train", "val", "test"):
        for label in "ab":
            write_pictures(source / split / label / "v1.0", numbered(24), form, first=7)
            write_video(source / split / label / "film.avi", numbered(12))
    assert main(source, out, "--frame_rate", 29.97) == 0
    assert len(loaded(out)) == 12
    clip = out / "train/a/v1.0.mp4"
    assert numbers(clip) == list(range(24))
    with av.open(str(clip)) as opened:
        assert float(opened.streams.video[0].average_rate) == pytest.approx(29.97, abs=0.001)
    assert not [name for name in files(out) if name.endswith((".png", ".jpg"))]
    made = clip.stat().st_mtime_ns
    assert main(source, out, "--frame_rate", 29.97) == 0 and clip.stat().st_mtime_ns == made
    assert main(source, out, "--frame_rate", 15) == 0
    with av.open(str(clip)) as opened:
        assert opened.streams.video[0].average_rate == 15


def test_pictures_that_are_lacking_or_odd_are_named(tmp_path, inline):
    source, out = tmp_path / "clips", tmp_path / "out"
    for name in ("train/a/good", "train/b/good", "train/a/gap", "train/a/size", "train/b/torn"):
        write_pictures(source / name, numbered(12))
    (source / "train/a/gap/img_00005.jpg").unlink()
    write_pictures(source / "train/a/size", numbered(1, 32, 50), first=6)
    (source / "train/b/torn/img_00003.jpg").write_bytes(b"no picture")
    assert main(source, out, "--frame_rate", 10) == 1
    bad = bad_of(out)
    assert list(bad) == ["train/a/gap", "train/a/size", "train/b/torn"]
    assert "lacking between img_00004.jpg and img_00006.jpg" in bad["train/a/gap"]
    assert "img_00006.jpg has 50 x 32 pixels" in bad["train/a/size"]
    assert "img_00003.jpg" in bad["train/b/torn"]
    assert videos(out) == ["train/a/good.mp4", "train/b/good.mp4"]


def test_pictures_without_a_rate_and_a_rate_without_pictures(tmp_path, inline, capsys):
    source = tmp_path / "clips"
    write_pictures(source / "train/a/one", numbered(3))
    message = main(source, tmp_path / "out")
    assert isinstance(message, str) and "--frame_rate" in message
    write_video(source / "train/a/film.mp4", numbered(12))
    assert main(source, tmp_path / "out") == 0
    assert "1 folders of pictures are no clips without --frame_rate" in capsys.readouterr().out
    assert videos(tmp_path / "out") == ["train/a/film.mp4"]
    # What is named like a list and is none keeps nobody from preparing clips.
    (source / "unsorted").mkdir()
    shutil.move(source / "train/a/film.mp4", source / "unsorted/film.mp4")
    (source / "train_notes.txt").write_text("read me first\n")
    assert main(source, tmp_path / "notes") == 0
    assert "train.py would refuse this data set" in capsys.readouterr().out
    shutil.rmtree(source / "train/a/one")
    message = main(source, tmp_path / "out", "--frame_rate", 5)
    assert isinstance(message, str) and "no folder of numbered pictures" in message
    assert main(source, tmp_path / "out", "--frame_rate", 0) == 2
    assert main(source, tmp_path / "out", "--frame_rate", "nan") == 2


# ---- Only checking


def state(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_checking_changes_nothing_and_tells_all(tmp_path, inline, capsys, monkeypatch):
    source = tmp_path / "clips"
    small_clips(source, [f"train/{x}/{i}.mp4" for x in "ab" for i in range(2)])
    write_video(source / "train/a/upright.mp4", numbered(24), rate=24)
    turn(source / "train/a/upright.mp4", source / "train/a/turned.mp4")
    write_video(source / "train/b/long.mp4", numbered(120), g="12")
    ms = np.r_[np.arange(12) * 40, 1000 + np.arange(12) * 90]
    write_video(source / "train/b/varies.mkv", numbered(24), rate=1000, ms=ms)
    (source / "test/b").mkdir(parents=True)
    shutil.copy(source / "train/a/1.mp4", source / "test/b/same.mp4")
    shutil.copy(source / "train/b/1.mp4", source / "train/b/twin.mp4")
    write_video(source / "test/b/mixed.mpg", numbered(50), "mpeg2video", rate=25, bf="2")
    (source / "train/b/damaged.mp4").write_bytes(b"no video")
    (source / "notes.txt").write_text("x")
    before = state(source)
    assert main(source, tmp_path / "facts.json", "--check_only") == 1
    assert state(source) == before
    out, err = capsys.readouterr()
    facts = json.loads((tmp_path / "facts.json").read_text("utf-8"))
    clips = {clip["file"]: clip for clip in facts["clips"]}
    assert [*clips] == [name for name in sorted(videos(source), key=clip_files.natural)]
    assert clips["train/a/turned.mp4"] == {
        "file": "train/a/turned.mp4", "split": "train", "label": "a",
        "group": "train/a/turned.mp4", "frames": 24, "rate": 24, "seconds": 1, "width": 100,
        "height": 64, "codec": "h264", "constant_rate": True,
        "rotation": clips["train/a/turned.mp4"]["rotation"], "problem": "",
    }  # fmt: skip
    assert abs(clips["train/a/turned.mp4"]["rotation"]) == 90
    assert not clips["train/b/varies.mkv"]["constant_rate"]
    assert clips["train/b/long.mp4"]["frames"] == 120 and clips["train/b/long.mp4"]["rate"] == 12
    assert clips["test/b/mixed.mpg"]["codec"] == "mpeg2video"
    assert {name for name, clip in clips.items() if clip["problem"]} >= {"train/b/damaged.mp4"}
    assert "train/b/damaged.mp4: not a video" in err
    line = next(line for line in out.splitlines() if line.endswith("train/a/turned.mp4"))
    assert line.split()[:4] == ["24", "24", "1.00", "100x64"] and "h264" in line
    assert sum(line.endswith("varies.mkv") and "~" in line for line in out.splitlines()) == 1
    same = "the same content, in test and train: leakage: test/b/same.mp4, train/a/1.mp4"
    assert same in facts["warnings"]
    assert "the same content: train/b/1.mp4, train/b/twin.mp4" in facts["warnings"]
    long = [text for text in facts["warnings"] if "over five times the median" in text]
    assert len(long) == 1 and long[0].startswith("train/b/long.mp4: 10.0 s")
    assert all(f"warning: {text}" in out for text in facts["warnings"])
    # Without bad clips: 0; where no name is given, the report is in this folder.
    (source / "train/b/damaged.mp4").unlink()
    (source / "test/b/mixed.mpg").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(source, "--check_only") == 0
    assert files(tmp_path / "elsewhere") == ["clips_check.json"]


def test_checking_nothing_is_one_sentence(tmp_path, inline):
    (tmp_path / "empty").mkdir()
    for source in ("empty", "nowhere"):
        message = main(tmp_path / source, "--check_only")
        assert isinstance(message, str) and source in message
    small_clips(tmp_path / "clips", ["train/a/1.mp4"])
    message = main(tmp_path / "clips", tmp_path / "nowhere/facts.json", "--check_only")
    assert isinstance(message, str) and "nowhere" in message


def test_what_a_table_lacks_is_said_when_checking(tmp_path, inline):
    source = small_clips(tmp_path / "clips", ["1.mp4", "2.mp4"])
    write_metadata(source, "csv", [{"file_name": n, "label": "a"} for n in ("1.mp4", "3.mp4")])
    main(source, tmp_path / "facts.json", "--check_only")
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert any("no such file" in text and "3.mp4" in text for text in facts["warnings"])


# ---- Truncated files: what is whole


TRUNCATED = {
    "front.mp4": {"movflags": "+faststart"},
    "plain.mkv": {},
    "b.mkv": {"bf": "3", "g": "250"},
    "b.ts": {"bf": "3", "g": "30"},
    "vp9.webm": {"codec": "libvpx-vp9", "cpu-used": "8"},
    "mpeg4.avi": {"codec": "mpeg4", "g": "12"},
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25, "bf": "2"},
}


def write_truncated(path, share=0.6, **options):
    flags = {key: options.pop(key) for key in ("movflags",) if key in options}
    write_video(path, noisy(120), **options, threads="1")  # x264 else differs more under load
    if flags:  # move the index to the front
        front = path.with_name(f"front_{path.name}")
        with av.open(str(path)) as old, av.open(str(front), "w", options=flags) as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    new.mux(packet)
        os.replace(front, path)
    length = int(path.stat().st_size * share)  # it varies a little: x264 may differ under load
    while not all(length % packet for packet in (188, 192, 204)):
        length -= 1  # a transport stream that ends with a packet looks whole
    path.write_bytes(path.read_bytes()[:length])
    return path


def noisy(frames):
    """Numbered frames that take some bytes each."""
    grain = np.random.default_rng(0).integers(0, 24, (frames, 64, 100, 3), np.uint8)
    return numbered(frames) // 8 * 7 + grain


@pytest.mark.parametrize("name", TRUNCATED)
def test_what_is_whole_of_a_truncated_file_is_kept(tmp_path, inline, capsys, name):
    source, out = tmp_path / "clips", tmp_path / "out"
    write_truncated(source / "train/a" / name, **TRUNCATED[name])
    rate = TRUNCATED[name].get("rate", 12)
    assert main(source, tmp_path / "plain") == 1
    assert list(bad_of(tmp_path / "plain")) == [f"train/a/{name}"]
    for _ in range(2):
        assert main(source, out, "--on_bad_clip", "keep_whole_part") == 0
        made = out / f"train/a/{name}{'.mp4' * (not name.endswith('.mp4'))}"
        shown = numbers(made)
        assert shown == list(range(len(shown))) and 40 <= len(shown) <= 90
        lost = report_of(out)["kept_whole_part"]
        assert list(lost) == [f"train/a/{name}"]
        assert f"{len(shown) / rate:.2f} of " in lost[f"train/a/{name}"]
        assert f"  train/a/{name}: {lost[f'train/a/{name}']}" in capsys.readouterr().out


def test_a_file_with_nothing_whole_is_bad_and_a_sound_one_is_not_named(tmp_path, inline):
    source, out = tmp_path / "clips", tmp_path / "out"
    write_truncated(source / "train/a/head.mkv", 0.02)
    write_truncated(source / "train/a/no_index.mp4")
    (source / "train/a/text.mp4").write_text("no video")
    write_video(source / "train/a/sound.mkv", numbered(30), bf="3")
    write_video(source / "train/a/sound.ts", numbered(30), bf="3")
    write_video(source / "train/a/sound.mp4", numbered(30), bf="3")
    write_video(source / "train/a/sound.mpg", numbered(30), "mpeg2video", rate=25, bf="2")
    write_video(source / "train/a/sound.avi", numbered(30), "mpeg4", bf="2")
    for _ in range(2):
        assert main(source, out, "--on_bad_clip", "keep_whole_part") == 1
        bad = [f"train/a/{name}" for name in ("head.mkv", "no_index.mp4", "text.mp4")]
        assert list(bad_of(out)) == bad
        assert report_of(out)["kept_whole_part"] == {}
        for name in videos(out):
            assert numbers(out / name) == list(range(30))
        assert len(videos(out)) == 5


# ---- Nothing is lost, torn or taken for another without a word


def clip_tree(folder, *names, frames=12):
    """The same small clip under each of the names."""
    content = write_video(folder.parent / "one.mp4", numbered(frames)).read_bytes()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_each_span_of_a_region_is_a_clip(tmp_path, inline):
    """Label Studio: its own count of frames, where it tells how many there are in how long."""
    write_video(tmp_path / "long/a.mp4", numbered(60), rate=30)
    spans = {"ranges": [{"start": 1, "end": 5}, {"start": 11, "end": 20}], "timelinelabels": ["x"]}
    boxes = [{"frame": 26, "enabled": True}, {"frame": 50, "enabled": False}]
    counted = {"sequence": boxes, "labels": ["x"], "framesCount": 50, "duration": 2.0}
    tasks = [
        {
            "id": 1,
            "data": {"video": "a.mp4"},
            "annotations": [{"result": [{"value": spans}, {"value": counted}]}],
        }
    ]
    (tmp_path / "table.json").write_text(json.dumps(tasks))
    assert main(tmp_path / "long", tmp_path / "out", "--cut", tmp_path / "table.json") == 0
    found = sorted(each for each in clip_numbers(tmp_path / "out").values())
    # the boxes: frame 26 of 50 in 2 s is shown from 1.0 s on, and 50 ends at 2.0 s
    assert found == [[*range(5)], [*range(10, 20)], [*range(30, 60)]]
    del tasks[0]["annotations"][0]["result"][1]
    (tmp_path / "table.json").write_text(json.dumps(tasks))
    flags = ("--cut", tmp_path / "table.json", "--label_frame_rate", "15")
    assert main(tmp_path / "long", tmp_path / "two", *flags) == 0
    found = sorted(each for each in clip_numbers(tmp_path / "two").values())
    assert found == [[*range(10)], [*range(20, 40)]]


def test_a_recording_in_another_folder_is_not_taken(tmp_path, inline):
    write_video(tmp_path / "long/day1/a.mp4", numbered(30))
    write_video(tmp_path / "long/é.mp4", numbered(30))  # composed; the table says it otherwise
    assert cut(tmp_path, ["day2/a.mp4,0,1,x", "/recordings/day1/a.mp4,1,2,x", "é.mp4,0,1,x"]) == 1
    assert list(bad_of(tmp_path / "out")) == ["row 2"]
    assert sorted(row["file"] for row in table_of(tmp_path / "out")) == ["day1/a.mp4", "é.mp4"]


def test_rows_without_a_split_go_where_their_recording_was_put(tmp_path, inline):
    for name in "abc":
        write_video(tmp_path / f"long/{name}.mp4", numbered(60))
    rows = ["a.mp4,0,1,x,test", "a.mp4,2,3,x,", "b.mp4,0,1,x,validation", "c.mp4,0,1,x,"]
    assert cut(tmp_path, rows, header="file,start,end,label,split") == 0
    found = {(row["file"], row["split"]) for row in table_of(tmp_path / "out")}
    assert found == {("a.mp4", "test"), ("b.mp4", "validation"), ("c.mp4", "train")}


def test_what_a_data_set_has_in_two_splits_is_not_moved(tmp_path, inline):
    clip_tree(tmp_path / "clips", *(f"{i}.mp4" for i in range(40)))
    rows = [f"{i}.mp4,{'ab'[i % 2]},{'test' if i < 2 else 'train'},{i // 4}" for i in range(40)]
    header = "file_name,label,split,group"
    (tmp_path / "clips/metadata.csv").write_text("\n".join([header, *rows]))
    assert main(tmp_path / "clips", tmp_path / "out") == 0
    count = Counter(split for split, _ in loaded(tmp_path / "out").values())
    assert count["test"] == 2 and count["train"] > 20 and count["validation"]


def test_a_clip_that_was_in_train_is_not_in_test_as_well(tmp_path, inline, capsys):
    clip_tree(tmp_path / "clips", *(f"train/{x}/{i}.mp4" for x in "ab" for i in range(20)))
    none = ("--validation_share", 0, "--test_share", 0)
    assert main(tmp_path / "clips", tmp_path / "out", *none) == 0
    write_video(tmp_path / "out/train/a/mine.mp4", numbered(5))  # of the reader's own
    assert main(tmp_path / "clips", tmp_path / "out") == 0
    names = [Path(*Path(name).parts[1:]).as_posix() for name in videos(tmp_path / "out")]
    assert len(names) == len({*names}) == 41
    assert "1 clips in" in capsys.readouterr().out


def test_a_second_data_set_in_the_same_folder_deletes_nothing(tmp_path, inline):
    clip_tree(tmp_path / "one", "train/a/1.mp4", "train/b/1.mp4")
    clip_tree(tmp_path / "two", "test/a/1.mp4", "test/b/1.mp4")
    for source in ("one", "two"):
        assert main(tmp_path / source, tmp_path / "out") == 0
    assert len(videos(tmp_path / "out")) == 4


def test_a_clip_that_is_bad_once_keeps_its_split(tmp_path, inline):
    names = [f"train/{x}/{i}.mp4" for x in "ab" for i in range(20)]
    clip_tree(tmp_path / "clips", *names)
    assert main(tmp_path / "clips", tmp_path / "out") == 0
    before = {Path(k).name: split for k, (split, label) in loaded(tmp_path / "out").items()
              if label == "a"}  # fmt: skip
    name = next(name for name, split in before.items() if split == "test")
    clip = tmp_path / "clips/train/a" / name
    sound = clip.read_bytes()
    clip.write_bytes(b"")
    assert main(tmp_path / "clips", tmp_path / "out", "--on_bad_clip", "skip") == 0
    clip.write_bytes(sound)
    assert main(tmp_path / "clips", tmp_path / "out") == 0
    found = loaded(tmp_path / "out")
    assert {Path(k).name: split for k, (split, label) in found.items() if label == "a"} == before


def test_the_nearest_of_two_tables_names_a_clip(tmp_path, inline):
    names = [f"{split}/{i}.mp4" for split in ("train", "validation") for i in range(4)]
    clip_tree(tmp_path / "clips", *names)
    rows = [f"{name},{'ab'[i % 2]}" for i, name in enumerate(names)]
    (tmp_path / "clips/metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    inner = [f"{i}.mp4,{'cd'[i % 2]}" for i in range(4)]
    for split in ("train", "validation"):
        table = tmp_path / "clips" / split / "metadata.csv"
        table.write_text("\n".join(["file_name,label", *inner]))
    found = loaded(tmp_path / "clips")
    assert len(found) == 8 and {label for _, label in found.values()} == {"c", "d"}


def test_two_sources_of_one_name_are_told_apart(tmp_path, inline):
    write_video(tmp_path / "clips/train/a/c1.mp4", numbered(5))
    folder = tmp_path / "clips/train/a/c1"
    folder.mkdir()
    for i in range(3):
        write_video(folder / f"{i}.png", numbered(1), codec="png", pix_fmt="rgb24")
    assert main(tmp_path / "clips", tmp_path / "out", "--frame_rate", 5) == 1
    assert "would have the name of" in bad_of(tmp_path / "out")["train/a/c1"]


def test_a_table_keeps_what_it_says_of_other_files(tmp_path, inline):
    clip_tree(tmp_path / "clips/train", "1.mp4", "2.mp4")
    (tmp_path / "clips/train/z.png").write_bytes(b"a picture")
    table = tmp_path / "clips/train/metadata.csv"
    table.write_text("file_name,label\n1.mp4,a\n2.mp4,b\nz.png,c\n")
    assert main(tmp_path / "clips", tmp_path / "out") == 0
    assert (tmp_path / "out/train/metadata.csv").read_text() == table.read_text()


def test_a_damaged_result_is_made_anew(tmp_path, inline):
    clip_tree(tmp_path / "clips", "train/a/1.mp4")
    for content in (b"", b"no video"):
        assert main(tmp_path / "clips", tmp_path / "out") == 0
        (tmp_path / "out/train/a/1.mp4").write_bytes(content)
    assert main(tmp_path / "clips", tmp_path / "out") == 0
    assert numbers(tmp_path / "out/train/a/1.mp4") == [*range(12)]


def test_what_was_kept_of_a_damaged_clip_does_not_pass_for_whole(tmp_path, inline):
    source = write_video(tmp_path / "clips/train/a/1.mkv", numbered(60), **B_FRAMES)
    source.write_bytes(source.read_bytes()[:-400])
    keep = ("--on_bad_clip", "keep_whole_part")
    assert main(tmp_path / "clips", tmp_path / "out", *keep) == 0
    assert main(tmp_path / "clips", tmp_path / "out") == 1
    assert "truncated or damaged" in bad_of(tmp_path / "out")["train/a/1.mkv"]


def test_background_is_not_drawn_over_rows_that_cannot_be_read(tmp_path, inline):
    write_video(tmp_path / "long/a.mp4", numbered(60))
    assert cut(tmp_path, ["a.mp4,0,1,x", "a.mp4,2,3.0s,x"], "--background", 3) == 1
    assert [row["label"] for row in table_of(tmp_path / "out")] == ["x"]
    assert "--background" in bad_of(tmp_path / "out")


def test_several_machines_take_neither_lists_nor_pictures(tmp_path, inline):
    clip_tree(tmp_path / "clips", "videos/1.avi")
    (tmp_path / "clips/train.txt").write_text("videos/1.avi 0\n")
    config = tmp_path / "resourceconfig.json"
    config.write_text('{"current_host": "algo-1", "hosts": ["algo-1", "algo-2"]}')
    said = main(tmp_path / "clips", tmp_path / "out", "--resource_config", config)
    assert "need a single machine" in said


def test_a_report_of_a_check_goes_outside_of_the_data_set(tmp_path, inline):
    clip_tree(tmp_path / "clips", "train/a/1.mp4")
    for target in (tmp_path, tmp_path / "clips/check.json"):
        assert "outside of the data set" in main(tmp_path / "clips", target, "--check_only")


def test_an_archive_beside_a_table_is_not_taken_for_the_clips(tmp_path, inline):
    names = [f"videos/{i}.mp4" for i in range(8)]
    clip_tree(tmp_path / "clips", *names)
    clip_tree(tmp_path / "other", "train/c/1.mp4", "train/d/1.mp4")
    shutil.make_archive(str(tmp_path / "clips/orig"), "zip", tmp_path / "other")
    rows = [f"{name},{'ab'[i % 2]}" for i, name in enumerate(names)]
    (tmp_path / "clips/metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    assert {label for _, label in loaded(tmp_path / "clips").values()} == {"a", "b"}
