"""The labeller: pieces of recordings, buttons, and a table that prepare_clips.py can cut by."""

import csv
import subprocess
import sys

import av
import pytest
from conftest import ROOT
from tutorial import labelling
from videos import numbered, write_video

LABELS = ["up", "down"]


@pytest.fixture
def folder(tmp_path):
    """One recording of 10 s, and one short clip, one folder down."""
    write_video(tmp_path / "videos" / "a.mp4", numbered(120), rate=12)
    write_video(tmp_path / "videos" / "day 2" / "b.mp4", numbered(18), rate=12)
    return tmp_path / "videos"


def rows(table):
    return [*csv.reader(table.read_text().splitlines())]


def parts(widget):
    """(progress, video, {description: button}) of a labeller."""
    progress, video, row = widget.children
    return progress, video, {button.description: button for button in row.children}


def test_a_press_writes_the_row_at_once_and_shows_the_next_piece(folder, tmp_path):
    table = tmp_path / "labels.csv"
    progress, video, buttons = parts(labelling.labeller(folder, table, LABELS, seconds=5))
    first = video.value
    assert not table.exists() and progress.value.startswith("1 of 3: a.mp4 from 0.0 to 5.0 s")
    assert buttons["undo"].disabled
    buttons["down"].click()
    assert rows(table) == [["file", "start", "end", "label"], ["a.mp4", "0.000", "5.000", "down"]]
    assert progress.value.startswith("2 of 3: a.mp4 from 5.0 to 10.0 s")
    assert video.value != first


def test_the_player_shows_the_frames_of_the_piece(folder, tmp_path):
    from videos import number

    (tmp_path / "piece.mp4").write_bytes(labelling.mp4(folder, labelling.Piece("a.mp4", 5, 10)))
    with av.open(str(tmp_path / "piece.mp4")) as container:
        seen = [number(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    assert seen == [*range(60, 120)]


def test_work_goes_on_where_the_table_ends(folder, tmp_path):
    table = tmp_path / "labels.csv"
    parts(labelling.labeller(folder, table, LABELS, seconds=5))[2]["up"].click()
    progress, _, buttons = parts(labelling.labeller(folder, table, LABELS, seconds=5))
    assert progress.value.startswith("2 of 3")
    # pieces of another length begin after what has a label: no two rows overlap
    assert labelling.Labels(folder, table, LABELS, seconds=2).piece.start == pytest.approx(6)
    buttons["up"].click()
    assert labelling.Labels(folder, table, LABELS, seconds=5).piece.file == "day 2/b.mp4"
    buttons["down"].click()
    for button in (buttons, parts(labelling.labeller(folder, table, LABELS, seconds=5))[2]):
        assert button["up"].disabled and button["skip"].disabled and not button["undo"].disabled
    buttons["up"].click()  # of a browser that is late: nothing happens
    assert len(rows(table)) == 4


def test_undo_takes_the_last_label_back_and_skip_gives_none(folder, tmp_path):
    table = tmp_path / "labels.csv"
    progress, _, buttons = parts(labelling.labeller(folder, table, LABELS, seconds=5))
    buttons["up"].click()
    buttons["skip"].click()
    buttons["down"].click()
    assert [row[0] for row in rows(table)] == ["file", "a.mp4", "day 2/b.mp4"]
    buttons["undo"].click()
    assert rows(table)[1:] == [["a.mp4", "0.000", "5.000", "up"]]
    assert progress.value.startswith("2 of 3")  # the skipped piece can have a label after all
    buttons["undo"].click()
    assert rows(table)[1:] == [] and buttons["undo"].disabled
    assert progress.value.startswith("1 of 3")


def test_prepare_clips_cuts_by_the_table(folder, tmp_path):
    table = tmp_path / "labels.csv"
    buttons = parts(labelling.labeller(folder, table, LABELS, seconds=5))[2]
    for name in ("up", "down", "up"):
        buttons[name].click()
    command = [sys.executable, str(ROOT / "scripts" / "prepare_clips.py"), str(folder)]
    command += [str(tmp_path / "cut"), "--cut", str(table), "--workers", "1"]
    subprocess.run(command, check=True, capture_output=True)
    files = {p.relative_to(tmp_path / "cut").as_posix() for p in tmp_path.glob("cut/**/*.mp4")}
    assert files == {
        "train/up/a.mp4_0.000-5.000.mp4",
        "train/down/a.mp4_5.000-10.000.mp4",
        "train/up/day 2/b.mp4_0.000-1.500.mp4",
    }


@pytest.mark.parametrize(
    "table, labels, seconds, why",
    [
        ("", ["up"], 5, "two or more different names"),
        ("", ["up", "up"], 5, "two or more different names"),
        ("", ["up", "a/b"], 5, "'a/b' contains '/'"),
        ("", LABELS, 0, "seconds 0: must be above 0"),
        ("file,label\na.mp4,up\n", LABELS, 5, "labels.csv: each line needs the columns file,start"),
        ("file,start,end,label\nc.mp4,0,5,up\n", LABELS, 5, "last row names c.mp4"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_press(folder, table, labels, seconds, why):
    file = folder.parent / "labels.csv"
    if table:
        file.write_text(table)
    with pytest.raises(ValueError, match=why):
        labelling.Labels(folder, file, labels, seconds)
    assert not table or file.read_text() == table


def test_a_folder_without_videos_and_a_damaged_video_are_named(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no videos"):
        labelling.Labels(tmp_path / "empty", tmp_path / "labels.csv", LABELS)
    (folder / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="bad.mp4: cannot be read"):
        labelling.Labels(folder, tmp_path / "labels.csv", LABELS)


def test_a_table_is_shown_as_prepare_clips_reads_it(tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text("file;start;end;label\na.mp4;1:02,5;70;up\na.mp4;61:70;90;up\n")
    shown = labelling.read(table)
    assert shown.to_dict("records") == [
        {"file": "a.mp4", "start": 62.5, "end": 70.0, "label": "up", "row": "row 2"}
    ]
    said = capsys.readouterr().out
    assert "1 rows" in said and "row 3: '61:70' is not a time" in said
    with pytest.raises(FileNotFoundError, match="none.csv: no such table. Set `table`, or label"):
        labelling.read(tmp_path / "none.csv")
