"""The figures and pictures of notebook 4 and of its guides, on data whose right answer is known."""

import json
import math
from types import SimpleNamespace

import inference
import numpy as np
import pytest
import torch
import train
from botocore.exceptions import ClientError
from conftest import TINY
from sklearn.metrics import f1_score
from tutorial import account, pictures, results


def scores(true, pred, labels="ab"):
    return results.scores(torch.tensor(true), torch.tensor(pred), list(labels))


def test_wilson_by_hand():
    """Wilson (1927): centre (p + z^2/2n) / (1 + z^2/n), for 8 of 10."""
    z, n, p = 1.959964, 10, 0.8
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert results.share(8, 10) == pytest.approx((0.8, centre - half, centre + half), abs=1e-6)
    assert results.share(10, 10)[1:] == pytest.approx((0.722467, 1), abs=1e-6)
    assert all(map(math.isnan, results.share(0, 0)))


def test_bootstrap_of_a_mean_is_the_binomial_one():
    """The mean of 400 clips, half of them right: 0.5 -+ 1.96 x 0.025."""
    right = np.arange(400) % 2.0
    value, low, high = results.bootstrap(lambda x, axis: x.mean(axis), right)
    assert (value, low, high) == pytest.approx((0.5, 0.451, 0.549), abs=0.005)


def test_scores_by_hand():
    """Class a: 3 clips, 2 found, 1 wrongly called so; class b: 4 clips, 3 found."""
    table = scores([0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1, 1])
    assert table.value["accuracy"] == pytest.approx(5 / 7)
    assert table.value["a: recall"] == table.value["a: precision"] == pytest.approx(2 / 3)
    assert table.value["b: recall"] == table.value["b: precision"] == pytest.approx(3 / 4)
    assert table.value["macro F1"] == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert list(table.clips) == [7, 7, 3, 3, 4, 4]
    assert (table.low <= table.value).all() and (table.value <= table.high).all()


@pytest.mark.parametrize("labels", ["ab", "abcd"])
def test_macro_f1_is_scikit_learn_s(labels):
    dice = np.random.default_rng(0)
    true, pred = dice.integers(0, len(labels), (2, 60))
    expected = f1_score(true, pred, average="macro")
    assert results.scores(true, pred, list(labels)).value["macro F1"] == pytest.approx(expected)
    classes = np.union1d(true, pred)
    both = results.macro_f1(np.stack([true, pred]), np.stack([pred, pred]), classes)
    assert both == pytest.approx([f1_score(true, pred, average="macro"), 1])


def test_perfect_constant_absent_and_alone():
    perfect = scores([0, 1, 0, 1], [0, 1, 0, 1])
    assert (perfect.value == 1).all() and perfect.low["accuracy"] < 0.6 < perfect.high["accuracy"]
    constant = scores([0, 1, 0, 1], [0, 0, 0, 0])
    assert (constant.value["b: recall"], constant.clips["b: precision"]) == (0, 0)
    assert math.isnan(constant.value["b: precision"])
    assert constant.value["macro F1"] == pytest.approx(1 / 3)
    absent = scores([0, 0, 1], [0, 0, 1], "abc")
    assert math.isnan(absent.value["c: recall"]) and absent.value["macro F1"] == 1
    alone = scores([0], [0])
    assert alone.value["macro F1"] == 1 and math.isnan(alone.low["macro F1"])


def test_the_file_has_what_the_series_reads_and_no_nan(tmp_path):
    here, labels = SimpleNamespace(output=tmp_path), ["a", "b", "c"]
    stills = {0: np.array([True, False, False]), 8: np.array([True, True, False])}
    truth, predicted = torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1])
    beside = results.beside_baselines(truth, predicted, stills, labels, "b")
    assert results.saved(here) == {}
    results.save(here, truth, predicted, labels, beside, threshold=0.7)
    text = (tmp_path / "results.json").read_text()
    figures = json.loads(text)
    assert (figures["accuracy"], figures["clips"], figures["threshold"]) == (1, 3, 0.7)
    assert figures["best_single_frame"] == pytest.approx(2 / 3)
    assert figures["scores"]["c: recall"]["value"] is None and "NaN" not in text
    assert results.saved(here) == figures


def test_the_table_of_three_rows():
    """Four clips of a, six of b, nine right; of the stills, frame 8 is the best."""
    truth = np.array([0] * 4 + [1] * 6)
    predicted = np.array([0] * 4 + [1] * 5 + [0])
    stills = {0: np.array([1, 0, 0, 0], bool), 8: np.array([1, 1, 1, 0], bool)}
    table = results.beside_baselines(truth, predicted, stills, ["a", "b"], "a")
    assert list(table.index) == ["all frames", "one frame only, number 8", "always a"]
    assert list(table.accuracy) == [0.9, 0.75, 0.4] and list(table.clips) == [10, 4, 10]
    for row, (hits, total) in zip(table.itertuples(), ((9, 10), (3, 4), (4, 10)), strict=True):
        assert (row.accuracy, row.low, row.high) == results.share(hits, total)  # Wilson's


class Motion(torch.nn.Module):
    """Says label 1 if the last frame is brighter than the first one: one frame says nothing."""

    device = torch.device("cpu")

    def forward(self, pixel_values):
        rise = pixel_values[:, -1].mean((1, 2, 3)) - pixel_values[:, 0].mean((1, 2, 3))
        return SimpleNamespace(logits=torch.stack([0 * rise, rise - 0.1], 1))


def test_one_frame_repeated_hides_the_motion():
    """A model of motion is right with all frames; with one frame it knows one label only."""
    processor = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    classifier = SimpleNamespace(
        model=Motion(), processor=processor, num_frames=4, image_size=8, sampling_rate=0
    )
    pixels, truth = torch.zeros(6, 4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1] * 3)
    pixels[1::2, 2:] = 255
    assert (results.predict(pixels, classifier).argmax(-1) == truth).all()
    stills = results.one_frame(pixels, truth, classifier, most=24)
    assert list(stills) == [0, 2, 3]  # the first, the middle, the last
    for hits in stills.values():
        assert hits.sum() == 3 and len(hits) == 6
    assert len(results.one_frame(pixels, truth, classifier, most=2)[0]) == 2


def test_a_sample_has_of_each_label_its_share():
    truth = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    some = results.sample(truth, 20)
    assert torch.bincount(truth[some]).tolist() == [10, 6, 4] and len({*some.tolist()}) == 20
    assert torch.bincount(truth[some][:10]).max() < 10  # not label after label
    assert (some == results.sample(truth, 20)).all()
    assert sorted(results.sample(truth, 500).tolist()) == list(range(100))


def test_the_threshold_lets_two_percent_of_the_other_clips_pass():
    others, own = torch.linspace(0, 0.99, 100), torch.ones(50)
    column = torch.cat([others, own])
    probabilities = torch.stack([1 - column, column], 1)
    truth = torch.tensor([0] * 100 + [1] * 50)
    threshold = results.choose_threshold(probabilities, truth, label=1)
    assert (others > threshold).sum() <= 2 and threshold == pytest.approx(0.98, abs=0.011)
    assert results.choose_threshold(probabilities * 0.2, truth, label=1) == 0.5  # not below
    assert results.choose_threshold(probabilities[100:], truth[100:], label=1) == 0.5


def order_of(truth, predicted):
    """(wrong, right) of a hand-made split, in which later clips are surer."""
    sure = torch.linspace(0.6, 0.9, len(truth))[:, None]
    said = torch.arange(2).expand(len(truth), 2) == torch.tensor(predicted)[:, None]
    return results.ranked(torch.where(said, sure, 1 - sure), torch.tensor(truth))


def test_the_surest_error_comes_first_and_the_least_sure_right_one():
    wrong, right = order_of([0, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 1])
    assert wrong == [3, 0] and right == [1, 2, 4, 5]


@pytest.mark.parametrize(
    "truth, predicted, expected", [([0], [0], ([], [0])), ([0], [1], ([0], []))]
)
def test_the_order_of_one_clip(truth, predicted, expected):
    assert order_of(truth, predicted) == expected


# ---- Pictures: what they show is what the arrays say


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_the_confusion_matrix_counts_by_hand():
    """True a: two found, one called b; true b: one found; c has no clip, and keeps its place."""
    figure = pictures.confusion([0, 0, 0, 1], torch.tensor([0, 0, 1, 1]), ["a", "b", "c"])
    (axis,) = figure.axes
    assert texts(axis) == ["2", "1", "0", "0", "1", "0", "0", "0", "0"]
    assert axis.get_title() == "75.0% of 4 clips are right"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b", "c"]


@pytest.mark.parametrize("true", [[], [(0.5, 1.5)]])
def test_the_timeline_shows_the_curve_and_the_bars(clips_folder, true):
    video = next(clips_folder.glob("test/*/*.mp4"))
    result = {
        "labels": ["a", "b"], "duration": 2.0, "times": [0.5, 1.0, 1.5],
        "smoothed": [[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]],
        "intervals": [{"label": "b", "start": 0.75, "end": 2.0, "score": 0.8},
                      {"label": "a", "start": 0.0, "end": 0.75, "score": 0.9}],
    }  # fmt: skip
    top, axis = pictures.timeline(video, result, "b", 0.5, true).axes
    curve = axis.lines[0]
    assert [*curve.get_xdata()] == [0.5, 1.0, 1.5] and [*curve.get_ydata()] == [0.1, 0.8, 0.6]
    spans = [bar.get_paths()[0].get_extents() for bar in axis.collections]
    assert [(box.x0, box.x1) for box in spans] == [(0.75, 2.0), *true]  # of label b only
    assert [name for name in texts(axis) if "threshold" not in name] == ["found", "true"][
        : len(spans)
    ]
    assert top.images[0].get_array().shape[1] > 5 * top.images[0].get_array().shape[0]


def test_a_large_video_is_not_put_into_the_notebook(tmp_path):
    small, large = tmp_path / "small.mp4", tmp_path / "large.mp4"
    small.write_bytes(b"x")
    large.write_bytes(bytes(3_100_000))
    assert type(pictures.player(small)).__name__ == "Video"
    assert "large.mp4" in pictures.player(large).data


# ---- The model and its clips: of a job, or of a folder on this machine


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """What train.py leaves: an untrained tiny model."""
    folder = tmp_path_factory.mktemp("model")
    for part in train.load_model(str(TINY), ["not_raising_hand", "raising_hand"]):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def no_aws(monkeypatch):
    """Any client of AWS is an error."""
    import boto3
    import botocore.session

    def refuse(*_, **__):
        raise AssertionError("AWS was asked")

    monkeypatch.setattr(botocore.session.Session, "create_client", refuse)
    monkeypatch.setattr(boto3, "Session", refuse)
    monkeypatch.setattr("local_mode.aws.connect", refuse)


@pytest.mark.parametrize("record", [True, False], ids=["of train.py", "of run.json"])
def test_a_local_model_is_judged_without_aws(no_aws, model_folder, clips_folder, tmp_path, record):
    if not record:  # run.json names the data set
        (tmp_path / "run.json").write_text(json.dumps({"dataset": str(clips_folder)}))
    arguments = {"dataset": str(clips_folder), "sampling": "uniform"} if record else {}
    (model_folder / "run_record.json").write_text(json.dumps({"arguments": arguments}))
    here = account.read_run(tmp_path)
    trained = results.fetch(here, model_dir=model_folder)
    classifier = inference.load_classifier(trained.folder)
    clips = results.test_clips(here, trained, classifier.labels)
    assert len(clips) == 12 and all(clip.file.is_file() for clip in clips)
    assert all(classifier.labels[clip.label] == clip.file.parent.name for clip in clips)
    assert len(results.test_clips(here, trained, classifier.labels, most=5)) == 5
    pixels = results.read(clips[:2], classifier)
    assert results.predict(pixels, classifier).sum(-1) == pytest.approx(torch.ones(2).numpy())
    assert results.majority(here, trained) in classifier.labels
    assert 1.5 <= results.clip_seconds(clips) <= 4
    with pytest.raises(ValueError, match=r"test/ has clips of \['raising_hand'\]; the model knows"):
        results.test_clips(here, trained, ["not_raising_hand", "waving"])
    (model_folder / "run_record.json").unlink()
    with pytest.raises(RuntimeError, match=r"No clips in .*split=.validation"):
        results.test_clips(account.read_run(tmp_path / "new"), trained, classifier.labels)


def test_a_folder_without_a_trained_model_is_refused(no_aws, tmp_path):
    here = account.read_run(tmp_path)
    for folder in (tmp_path / "nothing", tmp_path, TINY):  # TINY: a backbone, without a classifier
        with pytest.raises(ValueError, match=r"no trained classifier there.*outputs/model"):
            results.fetch(here, model_dir=folder)


def test_the_label_of_the_timeline():
    assert results.choose_label(None, ["raising_hand", "waving"]) == "raising_hand"
    assert results.choose_label(None, ["a", "b"]) == "b"
    with pytest.raises(ValueError, match=r"the model has no 'c', it has \['a', 'b'\]"):
        results.choose_label("c", ["a", "b"])


def client_of(answer):
    """An Account whose SageMaker gives this answer, or raises it."""

    def describe(TrainingJobName):  # noqa: N803
        if isinstance(answer, Exception):
            raise answer
        return answer

    session = SimpleNamespace(client=lambda _: SimpleNamespace(describe_training_job=describe))
    return SimpleNamespace(session=session, run={"region": "us-east-1"})


def test_no_finished_job_says_why_and_where_to_go():
    with pytest.raises(
        RuntimeError, match=r"no training_job_name: run 03_remote.*or set model_dir"
    ):
        results.describe(client_of({}), None)
    failed = {"TrainingJobStatus": "Failed", "FailureReason": "AlgorithmError: no clips"}
    with pytest.raises(RuntimeError, match=r"AlgorithmError: no clips\n.*is Failed.*03_remote"):
        results.describe(client_of(failed), "job")
    with pytest.raises(RuntimeError, match=r"no finished model.*\n.*is InProgress"):
        results.describe(client_of({"TrainingJobStatus": "InProgress"}), "job")
    error = {"Code": "ValidationException", "Message": "Requested resource not found."}
    missing = ClientError({"Error": error}, "DescribeTrainingJob")
    with pytest.raises(RuntimeError, match=r"no job j-1 in us-east-1.*03_remote_launch"):
        results.describe(client_of(missing), "j-1")


def job_of(uri):
    source = {"S3DataSource": {"S3Uri": uri}}
    return {"InputDataConfig": [{"ChannelName": "train", "DataSource": source}]}


def test_the_clips_of_a_job_come_from_its_own_data(tmp_path, clips_folder):
    """By their folders in S3; where S3 has another layout, from the folder that was uploaded."""
    keys = ["data/test/a/1.mp4", "data/test/b/deep/2.MP4", "data/test/b/notes.txt"]
    pages = SimpleNamespace(
        paginate=lambda Bucket, Prefix: [  # noqa: N803
            {"Contents": [{"Key": key} for key in keys if key.startswith(Prefix)]},
            {},
        ]
    )
    got = []

    def download(bucket, key, path):
        got.append((bucket, key, path))

    s3 = SimpleNamespace(get_paginator=lambda _: pages, download_file=download)
    here = SimpleNamespace(output=tmp_path, run={}, session=SimpleNamespace(client=lambda _: s3))
    trained = results.Trained(tmp_path, job_of("s3://bucket/data"))
    clips = results.test_clips(here, trained, ["a", "b"])
    assert [clip.label for clip in clips] == [0, 1]
    assert [clip.file for clip in clips] == [
        tmp_path / "judged/a/1.mp4", tmp_path / "judged/b/deep/2.MP4"
    ]  # fmt: skip
    assert got[1] == ("bucket", keys[1], str(tmp_path / "judged/b/deep/2.MP4"))
    with pytest.raises(RuntimeError, match=r"No clips in s3://bucket/data/validation/<label>/"):
        results.test_clips(here, trained, ["a", "b"], split="validation")
    keys[:] = ["data/test/1.mp4", "data/metadata.csv"]
    with pytest.raises(RuntimeError, match=r"No clips in s3://bucket/data/test/<label>/"):
        results.test_clips(here, trained, ["a", "b"])
    here.run["uploads"] = {str(clips_folder): {"fingerprint": "x", "uri": "s3://bucket/data"}}
    local = results.test_clips(here, trained, ["not_raising_hand", "raising_hand"])
    assert len(local) == 12 and len(got) == 2


# ---- Intervals in a long video


@pytest.mark.parametrize(
    "other, expected",
    [
        ((2, 6), 1), ((2, 4), 0.5), ((0, 8), 0.5), ((4, 8), 1 / 3),
        ((6, 9), 0), ((8, 9), 0), ((0, 2), 0),
    ],
)  # fmt: skip
def test_overlap_by_hand(other, expected):
    there, back = results.overlap((2, 6), other), results.overlap(other, (2, 6))
    assert there == back == pytest.approx(expected)


ONE, TWO = (2.0, 6.0), (10.0, 14.0)


@pytest.mark.parametrize(
    "found, true, hits",
    [
        ([(*TWO, 0.6), (*ONE, 0.9)], [ONE, TWO], 2),  # exact, in any order
        ([(2, 4, 0.9)], [ONE], 1),  # an IoU of 0.5 is enough
        ([(2, 3.99, 0.9)], [ONE], 0),
        ([(0, 8.01, 0.9)], [ONE], 0),  # too long is as wrong as too short
        ([(2, 5, 0.7), (2, 6, 0.9)], [ONE], 1),  # a true one counts once
        ([], [ONE], 0),
        ([(*ONE, 0.9)], [], 0),
        ([], [], 0),
        # The better score takes the one that fits it best, and leaves the other no partner.
        ([(2, 6, 0.7), (3, 7, 0.9)], [(2, 6), (4.5, 9)], 1),
        ([(2, 6, 0.9), (3, 7, 0.7)], [(2, 6), (4, 9)], 2),
    ],
)  # fmt: skip
def test_right_intervals_by_hand(found, true, hits):
    before = list(true)
    found = [{"start": start, "end": end, "score": score} for start, end, score in found]
    assert results.right_intervals(found, true) == hits
    assert true == before  # the next cell reads it again
