"""The experiment on leakage: its plan, its clips, and what it finds where the answer is known."""

import numpy as np
import pandas as pd
import pytest
from conftest import TINY
from local_mode import clips as drawn
from tutorial import leakage
from tutorial.leakage import BOTH, ONE, OTHER, SAME


@pytest.fixture(scope="module")
def clips():
    return leakage.plan(trials=3)


def test_the_collections_differ_only_in_who_shows_which_label(clips):
    table = pd.DataFrame(clips)
    for _, part in table.groupby(["trial", "collection", "part"]):
        assert part["label"].mean() == 0.5
    sizes = table.groupby(["collection", "trial", "part"]).size().unstack("collection")
    assert (sizes[ONE] == sizes[BOTH]).all()
    labels = table.groupby(["collection", "part", "trial", "person"])["label"].nunique()
    assert (labels[ONE] == 1).all() and (labels[BOTH] == 2).all()
    people = table.groupby("part")["person"].agg(set)
    assert people["train"] == people[SAME] and not people["train"] & people[OTHER]


def test_the_clips_of_a_recording_show_one_person_in_one_room():
    clips = leakage.cut(drawn, [0, 1], [1, 0, 1, 0], frames=8, side=48)
    others = leakage.cut(drawn, [0, 2], [1, 0], frames=8, side=48)
    assert clips.shape == (4, 8, 48, 48, 3) and clips.dtype == np.uint8
    still = np.median(clips.astype(float), axis=1)  # of each clip: room and trunk
    far = np.abs(still[0] - np.median(others[0], axis=0)).mean()
    assert all(np.abs(still[0] - one).mean() < 0.5 * far for one in still[1:])
    assert len({clip.tobytes() for clip in clips}) == 4  # none is cut twice
    assert (clips == leakage.cut(drawn, [0, 1], [1, 0, 1, 0], frames=8, side=48)).all()


def test_the_labels_are_those_of_the_actions(monkeypatch):
    scenes = [("idle", 0.0, 2.0), (drawn.POSITIVE, 2.0, 4.0), ("held_up", 4.0, 6.0)]
    monkeypatch.setattr(drawn, "script", lambda *_: scenes)
    seen = []
    monkeypatch.setattr(drawn, "movements", lambda _, t, __: seen.append(t) or [0 * t])
    monkeypatch.setattr(
        drawn, "draw_scene", lambda *given, **_: ((np.zeros((16, 16, 3)), None) for _ in given[4])
    )
    leakage.cut(drawn, [0], [1, 0, 0], frames=4, side=16)
    starts = seen[0].reshape(3, 4)[:, 0].tolist()
    assert starts[0] == 2 and sorted(starts[1:]) == [0, 4]
    with pytest.raises(ValueError, match=r"too few actions for the labels \[1, 1\]"):
        leakage.cut(drawn, [0], [1, 1], frames=4, side=16)


def test_a_model_that_sees_the_person_only_is_right_for_people_that_it_knows(clips):
    numbers = [clip.trial * 100 + clip.person for clip in clips]
    known = np.eye(len(set(numbers)))[np.unique(numbers, return_inverse=True)[1]]
    means = leakage.accuracies(clips, known).groupby("collection").mean()
    assert means.loc[ONE, SAME] == 1 and means.loc[ONE, OTHER] == 0.5
    assert means.loc[BOTH, OTHER] == 0.5


def test_a_model_that_sees_the_action_has_no_gap(clips):
    action = np.array([[clip.label] for clip in clips], float)
    table = leakage.accuracies(clips, action)
    assert (table == 1).all().all()
    gaps = leakage.summary(table).xs("gap", level="tested on")
    assert (gaps == 0).all().all()


def test_the_interval_is_students_over_the_trials():
    index = pd.MultiIndex.from_product([[ONE], range(3)], names=["collection", "trial"])
    table = pd.DataFrame({SAME: [0.9, 1.0, 0.8], OTHER: [0.5, 0.5, 0.5]}, index)
    gap = leakage.summary(table).loc[(ONE, "gap")]
    # t with 2 degrees of freedom is 4.303 at 97.5 %; the deviation of the gaps is 0.1
    half = 4.303 * 0.1 / np.sqrt(3)
    assert gap.to_list() == pytest.approx([0.4, 0.4 - half, 0.4 + half], abs=1e-3)


def test_the_features_are_those_of_all_blocks_and_the_figure_shows_both_collections():
    clips = [clip for clip in leakage.plan(2) if clip.person in (0, 1, 6, 7)]
    found = leakage.features(clips, drawn, str(TINY))
    assert found.shape == (len(clips), 4 * 64)  # the embedding and three blocks, 64 wide
    table = leakage.accuracies(clips, found)
    titles = [axis.get_title() for axis in leakage.figure(table).axes]
    assert titles == [ONE, BOTH]
