"""Label recordings or clips in a notebook: see a piece, press a label, and the table grows.

The table has the columns file, start, end, label: `prepare_clips.py --cut` reads it.
"""

import csv
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import av
import clip_files
import clip_tables
import ipywidgets
import numpy as np
import pandas as pd
import prepare_clips

COLUMNS = ["file", "start", "end", "label"]


class Piece(NamedTuple):
    """A part of a video: the path below the folder, and seconds from the first frame."""

    file: str
    start: float
    end: float


class Labels:
    """The pieces of all videos in a folder, in order, and the labels that they have in a table.

    folder: holds videos, at any depth. table: the CSV file; it is made by the first label, and
    written again, whole, by each further one. labels: names of at least two classes. seconds: about
    the length of a piece; a video is divided into equal pieces, and a short video is one piece.

    `position` is the number of the piece to label next: after the last row of the table, so that
    work goes on where it ended. Raises ValueError, with the file, for a folder without videos, a
    video that cannot be read, a label that cannot name a folder, or a table of another form.
    """

    def __init__(self, folder, table, labels, seconds: float = 4.0):
        self.folder, self.table, self.names = Path(folder), Path(table), list(labels)
        problems = [why for name in self.names for why in clip_tables.label_problems(name)]
        if len(set(self.names)) < 2 or len(set(self.names)) < len(self.names):
            problems += [f"labels {self.names}: give two or more different names"]
        if problems or not seconds > 0:
            raise ValueError("; ".join(problems) or f"seconds {seconds}: must be above 0")
        self.pieces = pieces_of(self.folder, seconds)
        self.rows = self._read()
        self.position = self._after_last_row()

    def _read(self) -> list[list[str]]:
        """The rows of the table, without the header; none if there is no table yet."""
        if not self.table.exists():
            return []
        header, *rows = [*csv.reader(self.table.read_text("utf-8-sig").splitlines())] or [[]]
        rows = [row for row in rows if any(row)]
        if header != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
            raise ValueError(
                f"{self.table}: each line needs the columns {','.join(COLUMNS)}, as the labeller "
                "writes them. Name another file for the labels."
            )
        return rows

    def _after_last_row(self) -> int:
        """The number of the first piece that begins where the last row ends, or later."""
        if not self.rows:
            return 0
        file, start, end, _ = self.rows[-1]
        files = [piece.file for piece in self.pieces]
        if file not in files:
            raise ValueError(f"{self.table}: its last row names {file}, which is not in the folder")
        after = clip_tables.seconds_of(end) - clip_tables.ROUNDING
        later = [
            number
            for number, piece in enumerate(self.pieces)
            if piece.file == file and piece.start >= after
        ]
        return later[0] if later else len(files) - files[::-1].index(file)

    def _write(self) -> None:
        part = self.table.with_name(f"{self.table.name}.part")
        with open(part, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *self.rows])
        os.replace(part, self.table)  # whole, or not at all

    @property
    def piece(self) -> Piece | None:
        """The piece to label; None if all are done."""
        return self.pieces[self.position] if self.position < len(self.pieces) else None

    def label(self, name: str) -> None:
        """Gives the piece this label, in the table at once, and goes to the next piece."""
        if name not in self.names:
            raise ValueError(f"the label {name!r} is none of {self.names}")
        if self.piece:
            file, start, end = self.piece
            self.rows.append([file, f"{start:.3f}", f"{end:.3f}", name])
            self._write()
            self.position += 1

    def skip(self) -> None:
        """Goes to the next piece; this one gets no row."""
        self.position = min(self.position + 1, len(self.pieces))

    def undo(self) -> None:
        """Takes the last row off the table, and goes back to its piece."""
        if self.rows:
            self.rows.pop()
            self._write()
            self.position = self._after_last_row()


def pieces_of(folder: Path, seconds: float) -> list[Piece]:
    """The pieces of all videos below a folder, each about `seconds` long. ValueError if none."""
    pieces = []
    for path in prepare_clips.videos_of(prepare_clips.files_below(folder)[0]):
        try:
            length = clip_files.clip_times(path).seconds()
        except (ValueError, av.FFmpegError) as error:
            raise ValueError(f"{path}: cannot be read ({error}). Move the file away.") from error
        edges = np.linspace(0, length, max(1, round(length / seconds)) + 1).tolist()
        name = path.relative_to(folder).as_posix()
        pieces += [Piece(name, *span) for span in zip(edges[:-1], edges[1:], strict=True)]
    if not pieces:
        raise ValueError(f"{folder}: no videos in this folder")
    return pieces


def mp4(folder, piece: Piece, short_side: int = 240) -> bytes:
    """A piece as an MP4 file that browsers play: the frames that prepare_clips.py --cut takes."""
    path = Path(folder, piece.file)
    timing = clip_files.clip_times(path)
    part = timing.part(*clip_files.frames_of(timing, piece.start, piece.end))
    with tempfile.TemporaryDirectory() as place:
        clip_files.transcode(path, Path(place, "piece.mp4"), short_side, 12, part)
        return Path(place, "piece.mp4").read_bytes()


def read(table, encoding: str | None = None) -> pd.DataFrame:
    """The rows of any table that prepare_clips.py --cut reads; prints what is wrong with others.

    Raises FileNotFoundError if there is no table, ValueError if none of it can be used.
    """
    if not Path(table).is_file():
        raise FileNotFoundError(
            f"{table}: no such table. Set `table`, or label some pieces with the labeller first."
        )
    rows, problems = clip_tables.read_table(Path(table), encoding)
    print("\n".join([f"{len(rows)} rows in {table}", *problems]))
    return pd.DataFrame(rows).replace("", np.nan).dropna(axis="columns", how="all")


def labeller(folder, table, labels, seconds: float = 4.0) -> ipywidgets.VBox:
    """A player with a button for each label, and buttons to skip a piece and to undo.

    For the arguments and errors see Labels. Each press writes the table at once.
    """
    work = Labels(folder, table, labels, seconds)
    progress = ipywidgets.Label()
    video = ipywidgets.Video(format="mp4", autoplay=True, loop=True, width=320)
    buttons = [ipywidgets.Button(description=name, button_style="primary") for name in work.names]
    skip = ipywidgets.Button(description="skip", tooltip="this piece gets no label")
    undo = ipywidgets.Button(description="undo", tooltip="take the last label back")

    def show():
        done = work.piece is None
        name = "all pieces are done" if done else "{} from {:.1f} to {:.1f} s".format(*work.piece)
        here = min(work.position + 1, len(work.pieces))
        progress.value = (
            f"{here} of {len(work.pieces)}: {name}. {len(work.rows)} labels in {Path(table).name}"
        )
        for button in [*buttons, skip]:
            button.disabled = done
        undo.disabled = not work.rows
        video.layout.visibility = "hidden" if done else "visible"
        if not done:
            video.value = mp4(folder, work.piece)

    def on_press(button):
        if button is undo:
            work.undo()
        elif button is skip:
            work.skip()
        else:
            work.label(button.description)
        show()

    for button in [*buttons, skip, undo]:
        button.on_click(on_press)
    show()
    return ipywidgets.VBox([progress, video, ipywidgets.HBox([*buttons, skip, undo])])
