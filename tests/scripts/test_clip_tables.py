"""scripts/clip_tables.py: tables of labelled times are read as written, and splits leak nothing."""

import json
import random
from collections import Counter, defaultdict

import pytest
from clip_tables import background_rows, check_rows, draw_splits, read_table, seconds_of


def read(tmp_path, content, name="table.csv", encoding=None):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path, encoding)


def spans(rows):
    """(label, start, end) of each row, in seconds or else in frames."""
    ends = [(r.get("start", r.get("start_frame")), r.get("end", r.get("end_frame"))) for r in rows]
    return [(row["label"], *end) for row, end in zip(rows, ends, strict=True)]


def row(start, end, label="wave", file="a.mp4", split="", group="", name=None):
    where = name or f"row {start}"
    times = {"start": float(start), "end": float(end)}
    return {"row": where, "file": file, "label": label, "split": split, "group": group} | times


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("12", 12),
        (" 12.5 ", 12.5),
        ("12,5", 12.5),
        ("1:02.5", 62.5),
        ("90:00", 5400),
        ("01:02:03.250", 3723.25),
        ("01:02:03,250", 3723.25),
    ],
)
def test_times_as_people_write_them(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "-1", "nan", "inf", "1e3", "1:61", "1:61:00", "1:2:3:4", "1.2.3", "٣", "1:-2"]
)
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="not a time"):
        seconds_of(text)


# ---- CSV ----------------------------------------------------------------------------------------

EXCEL = (
    "\ufeffFile; Start ;END;Label;Group\r\n"
    "王 1.mp4;1,5;2,75;舉手;王\r\n"
    "\r\n"
    "王 1.mp4;1:02,5;63;坐;王\r\n"
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "big5"])
def test_a_spreadsheet_s_table(tmp_path, encoding):
    text = EXCEL if encoding == "utf-8" else EXCEL.lstrip("\ufeff")
    given = "big5" if encoding == "big5" else None
    rows, problems = read(tmp_path, text.encode(encoding), encoding=given)
    assert not problems
    assert spans(rows) == [("舉手", 1.5, 2.75), ("坐", 62.5, 63)]
    assert [r["row"] for r in rows] == ["row 2", "row 4"]  # the empty line counts
    assert {(r["file"], r["group"], r["split"]) for r in rows} == {("王 1.mp4", "王", "")}


def test_other_bytes_name_the_line_and_the_remedy(tmp_path):
    content = "file,start,end,label\na.mp4,0,1,sit\na.mp4,1,2,舉手\n".encode("big5")
    with pytest.raises(ValueError, match="line 3 .*--encoding big5"):
        read(tmp_path, content)


def test_columns_of_one_s_own_and_names_of_splits(tmp_path):
    table = 'label\tEnd\tstart\tfile\tsplit\tCamera\nsit\t2\t1\ta.mp4\tVal\tleft "A"\n'
    rows, problems = read(tmp_path, table, "table.txt")
    assert rows[0]["split"] == "validation" and rows[0]["Camera"] == 'left "A"' and not problems


def test_every_bad_row_is_named_and_the_good_ones_stay(tmp_path):
    table = (
        "file,start,end,label,split\n"
        "a.mp4,1,5,3,sit,train\n"
        'a.mp4,"1,5",3,sit,train,,\n'
        "a.mp4,1\n"
        "a.mp4,1,x,sit,train\n"
        "a.mp4,1,2,sit,dev\n"
    )
    rows, problems = read(tmp_path, table)
    assert spans(rows) == [("sit", 1.5, 3)]
    starts = ["row 2: 6 cells", "row 4: 2 cells", "row 5: 'x'", "row 6: the split 'dev'"]
    assert len(problems) == 4
    for problem, start in zip(problems, starts, strict=True):
        assert problem.startswith(start)
    assert "quotes" in problems[0] and "quotes" not in problems[1]


def test_a_missing_column_names_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="no column start, end. .*file, begin, label"):
        read(tmp_path, "file,begin,label\na.mp4,1,sit\n")
    with pytest.raises(ValueError, match="empty"):
        read(tmp_path, "\n\n")


# ---- Annotation tools ---------------------------------------------------------------------------

BOTH = "00:00:01.200\t1.2\t00:00:03.000\t3.0"
ELAN = {
    "all times": f"S1\tWang\t{BOTH}\t00:00:01.800\t1.8\t舉手\n",
    "no participant": f"S1\t\t{BOTH}\t舉手\n",
    "milliseconds": "S1\t\t1200\t3000\t1800\t舉手\n",
    "no tier": "1.2\t3.0\t舉手\n",
    "commas": '"S1","",1.2,3.0,1.8,"舉手"\n',
    "frames, too": "S1\t1.2\t00:00:01:05\t3.0\t00:00:03:00\t舉手\n",
}


@pytest.mark.parametrize("table", ELAN.values(), ids=ELAN)
def test_elan_without_header(tmp_path, table):
    rows, problems = read(tmp_path, table, "elan.txt")
    assert spans(rows) == [("舉手", 1.2, 3.0)] and not problems and rows[0]["file"] == ""


def test_elan_whose_labels_are_numbers(tmp_path):
    table = "S1\t\t1200\t3000\t7\nS1\t\t1.0\t2.0\t1.0\t2\n"
    rows, problems = read(tmp_path, table, "elan.txt")
    assert spans(rows) == [("7", 1.2, 3.0), ("2", 1.0, 2.0)] and not problems


def test_elan_with_a_column_for_each_tier(tmp_path):
    table = (
        '"#file:///C:/video/day%201.mp4 -- offset: 0"\n\n'
        "Begin Time - hh:mm:ss.ms\tBegin Time - msec\tEnd Time - hh:mm:ss.ms\tEnd Time - msec\t"
        "Duration - hh:mm:ss.ms\tDuration - msec\tlabel\tright\n"
        "00:00:01.200\t1200\t00:00:03.000\t3000\t00:00:01.800\t1800\twave\tpoint\n"
        "00:01:01.000\t61000\t00:01:02.000\t62000\t00:00:01.000\t1000\t\tsit\n"
    )
    rows, _ = read(tmp_path, table, "elan.txt")
    assert spans(rows) == [("wave", 1.2, 3.0), ("point", 1.2, 3.0), ("sit", 61.0, 62.0)]
    assert rows[2]["row"] == "row 5" and rows[0]["file"] == "day 1.mp4"


def test_elan_s_recordings(tmp_path):
    media = '"#file:///v/{0}.mp4 -- offset: {1}"\n"#file:///v/{0}.wav -- offset: 0"\n'
    block = media + "S\t\t1.0\t2.0\tsit\n"
    rows, problems = read(tmp_path, block.format("a", 0) + "\n" + block.format("b", 40), "e.txt")
    assert [r["file"] for r in rows] == ["a.mp4", "b.mp4"]
    assert len(problems) == 1 and "row 5" in problems[0] and "40 ms" in problems[0]
    rows, _ = read(tmp_path, "S\t\t1.0\t2.0\tsit\tday1.eaf\t/v/day1.eaf\n", "e.txt")
    assert rows[0]["eaf"] == "day1.eaf" and rows[0]["label"] == "sit"


def shapes(*outside, tag="box"):
    return "".join(f'<{tag} frame="{f}" outside="{o}"></{tag}>' for f, o in outside)


def cvat(body, task="<id>7</id><name>my task</name><source>a.mp4</source>"):
    meta = f"<meta><task>{task}</task><dumped>2024</dumped></meta>"
    return f"<annotations><version>1.1</version>{meta}{body}</annotations>"


def test_cvat_s_tracks(tmp_path):
    every = shapes((0, 0), (1, 0), (2, 1), (5, 0), (6, 0))
    sparse = shapes((10, 0), (40, 1), tag="polygon")
    parts = '<points label="p" outside="{}"/>'
    bones = "".join(
        f'<skeleton frame="{f}">{parts.format(o)}</skeleton>' for f, o in ((3, 0), (9, 1))
    )
    tracks = [("舉手", every), ("sit", sparse), ("run", bones)]
    body = "".join(f'<track id="1" label="{name}">{content}</track>' for name, content in tracks)
    rows, problems = read(tmp_path, cvat(body), "annotations.xml")
    assert not problems and {r["file"] for r in rows} == {"a.mp4"}
    expected = [("舉手", 0, 2), ("舉手", 5, 7), ("sit", 10, 40), ("run", 3, 9)]
    assert spans(rows) == expected
    assert rows[1]["row"] == "track 1, shape 2"


def test_cvat_s_tags_and_steps(tmp_path):
    tags = "".join(f'<image id="{i}"><tag label="sit"/></image>' for i in (0, 5, 10, 20))
    task = "<name>b.mp4</name><frame_filter>step=5</frame_filter>"
    rows, _ = read(tmp_path, cvat(tags, task), "annotations.xml")
    assert spans(rows) == [("sit", 0, 15), ("sit", 20, 25)] and rows[0]["file"] == "b.mp4"


def test_cvat_s_project_has_several_recordings(tmp_path):
    tasks = "".join(f"<task><id>{i}</id><source>{i}.mp4</source></task>" for i in (3, 4))
    track = '<track label="sit" task_id="4">' + shapes((0, 0), (2, 1)) + "</track>"
    meta = f"<meta><project><id>1</id><tasks>{tasks}</tasks></project></meta>"
    rows, _ = read(tmp_path, f"<annotations>{meta}{track}</annotations>", "annotations.xml")
    assert rows[0]["file"] == "4.mp4"


def label_studio(*results, video="/data/upload/1/ab12cd34-day%201.mp4", task=5):
    done = [{"id": i, "was_cancelled": False, "result": result} for i, result in enumerate(results)]
    cancelled = {"id": 99, "was_cancelled": True, "result": [timeline(1, 2)]}
    return {"id": task, "data": {"video": video}, "annotations": [cancelled, *done]}


def timeline(start, end, label="舉手"):
    value = {"ranges": [{"start": start, "end": end}], "timelinelabels": [label]}
    return {"type": "timelinelabels", "value": value}


def boxes(*frames):
    sequence = [{"frame": frame, "enabled": enabled, "x": 1} for frame, enabled in frames]
    value = {"framesCount": 90, "sequence": sequence, "labels": ["run"]}
    return {"type": "videorectangle", "value": value}


def test_label_studio(tmp_path):
    seconds = {"type": "labels", "value": {"start": 1.5, "end": 3, "labels": ["sit"]}}
    choice = {"type": "choices", "value": {"choices": ["good"]}}
    tracked = boxes((1, True), (10, False), (21, True))
    task = label_studio([timeline(1, 30), choice, seconds, tracked])
    rows, problems = read(tmp_path, json.dumps([task]), "export.json")
    assert not problems
    assert spans(rows) == [("舉手", 0, 30), ("sit", 1.5, 3), ("run", 0, 10), ("run", 20, 90)]
    assert {r["file"] for r in rows} == {"ab12cd34-day 1.mp4"}
    assert {r["file_alternative"] for r in rows} == {"day 1.mp4"}
    assert rows[1]["row"] == "task 5, region 3" and "start_frame" not in rows[1]


def test_label_studio_s_short_export_and_local_files(tmp_path):
    video = "/data/local-files/?d=day1%2Fa.mp4"
    task = {"id": 2, "video": video, "actions": [timeline(4, 9)["value"]], "annotator": 1}
    rows, _ = read(tmp_path, json.dumps([task]), "export.json")
    assert spans(rows) == [("舉手", 3, 9)] and rows[0]["file"] == "a.mp4"


def test_label_studio_s_task_of_two_people_is_a_problem(tmp_path):
    tasks = [label_studio([timeline(1, 2)], [timeline(1, 3)]), label_studio([], task=6)]
    rows, problems = read(tmp_path, json.dumps(tasks), "export.json")
    assert rows == [] and len(problems) == 1 and problems[0].startswith("task 5: 2 annotations")


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.xml", "<annotation><object/></annotation>"),
        ("a.xml", "<annotations><meta>"),
        ("a.xml", cvat("")),
        ("a.json", "[1, 2]"),
        ("a.json", "{"),
        ("a.json", '[{"id": 1, "data": {}, "annotations": [{"result": [{"value": 3}]}]}]'),
    ],
)
def test_other_xml_and_json_is_refused_in_one_sentence(tmp_path, name, content):
    with pytest.raises(ValueError, match=f"^{name}: ") as refused:
        read(tmp_path, content, name)
    assert "\n" not in str(refused.value)


# ---- Checking -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad, words",
    [
        (row(3, 2), "3 to 2 s"),
        (row(3, 3), "before the end"),
        (row(8, 10.06), "only 10 s"),
        (row(11, 12), "only 10 s"),
        (row(10, 10.04), "only 10 s"),
        (row(1, 2, file="A.MP4"), "there is a.mp4"),
        (row(1, 2, file="a"), "there is a.mp4"),
        (row(1, 2, file="b.mp4"), "no recording 'b.mp4'"),
        *[(row(1, 2, label), "label") for label in ("", " ", ".", "..", ".x", "a/b", "a\tb", "a?")],
    ],
)
def test_a_bad_row_is_named_and_left_out(bad, words):
    good, problems = check_rows([row(4, 6), bad], {"a.mp4": 10.0})
    assert [r["row"] for r in good] == ["row 4"]
    assert len(problems) == 1 and problems[0].startswith(bad["row"] + ": ") and words in problems[0]


def test_rounding_blanks_and_composed_letters_are_put_right():
    rows = [row(0, 4, " sale\u0301 "), row(4, 10.04, "sal\u00e9")]
    good, problems = check_rows(rows, {"a.mp4": 10.0})
    assert not problems
    assert spans(good) == [("sal\u00e9", 0, 4), ("sal\u00e9", 4, 10.0)]
    assert rows[1]["end"] == 10.04  # the caller's rows are not changed


def test_labels_that_look_the_same():
    rows = [row(0, 1, "Wave"), row(1, 2, "wave"), row(2, 3, "wave"), row(3, 4, "ｗａｖｅ")]
    good, problems = check_rows(rows, {"a.mp4": 10.0})
    assert [r["row"] for r in good] == ["row 1", "row 2"]
    assert [problem[:6] for problem in problems] == ["row 0:", "row 3:"]


def test_overlaps_name_both_rows_and_neither_is_good():
    rows = [row(0, 9), row(2, 3), row(4, 5), row(9, 10), row(2, 3, file="b.mp4", name="row b")]
    good, problems = check_rows(rows, {"a.mp4": 10.0, "b.mp4": 10.0})
    assert [r["row"] for r in good] == ["row 9", "row b"]
    assert len(problems) == 2
    assert all("row 0 (0 to 9 s)" in problem for problem in problems)
    assert problems[0].startswith("row 2: ") and problems[1].startswith("row 4: ")


def test_a_group_in_two_splits_is_one_problem():
    rows = [row(0, 1, split="train", group="g"), row(1, 2, split="test", group="g")]
    rows += [row(2, 3, group="g"), row(3, 4, group="h"), row(4, 5, split="test", group="h")]
    rows += [row(5, 6, split="train"), row(6, 7, split="test")]  # no group
    good, problems = check_rows(rows, {"a.mp4": 10.0})
    assert [r["row"] for r in good] == ["row 3", "row 4", "row 5", "row 6"]
    assert len(problems) == 1 and "test and train" in problems[0]


# ---- Background ---------------------------------------------------------------------------------


def test_background_overlaps_nothing():
    chance = random.Random(0)
    drawn = 0
    for seed in range(150):
        ends = sorted(chance.uniform(0, 60) for _ in range(2 * chance.randint(1, 6)))
        rows = [row(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True)]
        found = background_rows(rows, {"a.mp4": 61.0}, 4, "none", seed)
        drawn += len(found)
        assert len(found) <= 4 and found == sorted(found, key=lambda r: r["start"])
        every = sorted([(r["start"], r["end"]) for r in rows + found])
        assert every[0][0] >= 0 and every[-1][1] <= 61
        assert all(a[1] <= b[0] for a, b in zip(every, every[1:], strict=False))
        lengths = sorted(r["end"] - r["start"] for r in rows)
        middle = (lengths[len(rows) // 2] + lengths[(len(rows) - 1) // 2]) / 2
        assert all(r["end"] - r["start"] == pytest.approx(middle) for r in found)
    assert drawn > 300


def test_background_is_the_same_whatever_other_recordings_there_are():
    rows = [row(5, 7, group="g", split="test"), row(9, 11, group="g", split="test")]
    others = [row(0, 1, file="0.mp4", group="x"), row(2, 3, file="0.mp4", group="y")]
    seconds = {"a.mp4": 60.0, "0.mp4": 60.0, "unused.mp4": 60.0}
    alone = background_rows(rows, seconds, 3, "none", 0)
    found = background_rows(rows + others, seconds, 3, "none", 0)
    assert len(alone) == 3 and len(found) == 6
    assert [r for r in found if r["file"] == "a.mp4"] == alone
    assert alone[0]["row"] == "background 1 of a.mp4"
    assert {(r["label"], r["group"], r["split"]) for r in alone} == {("none", "g", "test")}
    assert {r["group"] for r in found if r["file"] == "0.mp4"} == {""}
    assert alone != background_rows(rows, seconds, 3, "none", 1)


def test_no_room_no_background():
    assert background_rows([row(1, 9)], {"a.mp4": 10.0}, 3, "none", 0) == []
    assert len(background_rows([row(0, 5)], {"a.mp4": 10.0}, 3, "none", 0)) == 1


# ---- Splits -------------------------------------------------------------------------------------

SHARES = {"validation": 0.15, "test": 0.15}


def random_rows(seed, groups=None):
    """Rows of random groups: people with a few to many clips of some labels."""
    chance = random.Random(seed)
    rows = []
    for group in range(groups or chance.randint(1, 30)):
        for _ in range(chance.randint(1, 12)):
            label = chance.choice(["舉手", "sit", "run", "wave"])
            rows.append({"label": label, "group": f"person {group}", "split": ""})
    return rows


def by_group(rows, splits):
    found = defaultdict(set)
    for each, split in zip(rows, splits, strict=True):
        found[each["group"]].add(split)
    assert all(len(names) == 1 for names in found.values()), "a group is in two splits"
    return {group: names.pop() for group, names in found.items()}


@pytest.mark.parametrize("seed", range(30))
def test_groups_stay_whole_and_train_has_every_label(seed):
    rows = random_rows(seed)
    splits = draw_splits(rows, SHARES, seed)
    drawn = by_group(rows, splits)
    pairs = list(zip(rows, splits, strict=True))
    assert {r["label"] for r, split in pairs if split == "train"} == {r["label"] for r in rows}

    shuffled = random.Random(seed).sample(rows, len(rows))
    assert by_group(shuffled, draw_splits(shuffled, SHARES, seed)) == drawn
    # validation is the same, whether test is drawn after it or not
    alone = by_group(rows, draw_splits(rows, {"validation": 0.15}, seed))
    assert [g for g in alone if alone[g] == "validation"] == [
        g for g in drawn if drawn[g] == "validation"
    ]

    added = [dict(r, group=f"new {r['group']}") for r in random_rows(seed + 1)]
    later = by_group(rows + added, draw_splits(rows + added, SHARES, seed, known=drawn))
    assert {group: later[group] for group in drawn} == drawn


@pytest.mark.parametrize("seed", range(8))
def test_shares_are_about_right_where_groups_are_many(seed):
    rows = random_rows(seed, groups=80)
    splits = draw_splits(rows, SHARES, seed)
    labels = Counter(r["label"] for r in rows)
    for name in SHARES:
        assert 0.11 < splits.count(name) / len(rows) < 0.19
        found = Counter(r["label"] for r, s in zip(rows, splits, strict=True) if s == name)
        assert all(0.06 < found[label] / labels[label] < 0.26 for label in labels)


def test_another_seed_draws_other_groups():
    rows = random_rows(0, groups=40)
    assert draw_splits(rows, SHARES, 0) != draw_splits(rows, SHARES, 1)


def test_given_splits_stay_and_are_not_drawn():
    rows = random_rows(3, groups=20)
    rows[0]["split"] = "test"  # the other clips of this person follow
    drawn = by_group(rows, draw_splits(rows, SHARES, 0))
    assert [group for group, split in drawn.items() if split == "test"] == [rows[0]["group"]]
    assert "validation" in drawn.values()
    # what is known does not count as given, and what is given counts more than what is known
    known = {rows[0]["group"]: "train", rows[-1]["group"]: "validation"}
    later = by_group(rows, draw_splits(rows, SHARES, 0, known))
    assert later[rows[0]["group"]] == "test" and later[rows[-1]["group"]] == "validation"
    assert list(later.values()).count("validation") > 1


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "c"], ["a", "a"]])
def test_with_too_few_groups_train_keeps_all_its_labels(labels):
    rows = [{"label": x, "group": f"g{i}", "split": ""} for i, x in enumerate(labels)]
    splits = draw_splits(rows, SHARES, 0)
    kept = {r["label"] for r, split in zip(rows, splits, strict=True) if split == "train"}
    assert kept == set(labels)


def test_a_group_with_two_given_splits_is_refused():
    rows = [{"label": "a", "group": "g", "split": split} for split in ("train", "test")]
    with pytest.raises(ValueError, match="group 'g'"):
        draw_splits(rows, SHARES, 0)
