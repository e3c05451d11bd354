"""scripts/train.py: data, checkpoints, flags, and a job from start to artefact."""

import argparse
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train
from conftest import ROOT, TINY
from forked import AS_A_SCRIPT, Run
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForVideoClassification, pipeline, set_seed
from tutorial import account, launch
from videos import noise, write_video

LABELS = ["not_raising_hand", "raising_hand"]


# ---- Data set


def clip_tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(root / name, noise(20, 32, 32))
    return root


def test_labels_are_the_folder_names_and_nothing_is_decoded(clips_folder):
    clips = train.load_clips(str(clips_folder))
    assert {split: len(part) for split, part in clips.items()} == {
        "train": 16, "validation": 8, "test": 12,
    }  # fmt: skip
    for row in clips["test"]:
        assert f"/test/{LABELS[row['label']]}/" in row["video"]["path"]


def test_without_validation_a_share_of_the_training_clips_becomes_one(tmp_path, capsys):
    names = [f"train/{label}/{i}.mp4" for label in "ab" for i in range(7)]
    clips = train.load_clips(str(clip_tree(tmp_path, *names)))
    paths = {s: {video["path"] for video in part["video"]} for s, part in clips.items()}
    assert len(paths["train"]) == 12 and sorted(clips["validation"]["label"]) == [0, 1]
    assert not paths["train"] & paths["validation"]
    assert "no validation split: 2 training clips become one\n" in capsys.readouterr().out
    clip_tree(tmp_path, "valid/a/1.mp4")
    train.load_clips(str(tmp_path))
    assert "folders that are no split are left out: ['valid']" in capsys.readouterr().out


@pytest.mark.parametrize(
    "names, message",
    [
        (["train/a.mp4", "train/b.mp4"], "train/b.mp4: a clip without a label; it goes into"),
        (["train/only/a.mp4", "train/only/b.mp4"], r"two classes or more, found \['only'\]"),
        (
            [f"{split}/{label}/1.mp4" for split in ("train", "test") for label in "ab"]
            + ["test/c/1.mp4"],
            "test/c/1.mp4: split test has a label that train has not: 'c'",
        ),
        (["train/a/1.mp4", "train/a/2.mp4", "train/b/1.mp4"], r"too few .* validation .*\['b'\]"),
        (
            [f"train/{label}/1.mp4" for label in "ab"] + ["validation/1.mp4"],
            "validation/1.mp4: a clip without a label",
        ),
        (
            [
                f"{split}/{label}/1.mp4"
                for split in ("train", "val", "validation")
                for label in "ab"
            ],
            "val and validation are the same split",
        ),
    ],
)
def test_missing_classes_are_named(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        train.load_clips(str(clip_tree(tmp_path, *names)))


def test_a_label_named_like_a_split_stays_in_its_split(tmp_path):
    names = [f"{split}/{label}/{i}.mp4" for split in ("train", "val", "test")
             for label in ("driving_test", "train") for i in range(2)]  # fmt: skip
    for split, part in train.load_clips(str(clip_tree(tmp_path, *names))).items():
        folder = {"validation": "val"}.get(split, split)
        paths = [video["path"] for video in part["video"]]
        assert len(paths) == 4 and all(f"/{folder}/" in p.replace(str(tmp_path), "") for p in paths)
        assert [p.split("/")[-2] for p in paths] == ["driving_test"] * 2 + ["train"] * 2


def test_an_empty_class_folder_is_named(tmp_path):
    clip_tree(tmp_path, "train/a/1.mp4", "train/b/1.mp4")
    (tmp_path / "train" / "forgotten").mkdir()
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"no clips .*\['forgotten'\]"):
        train.load_clips(str(tmp_path))


def test_a_folder_without_videos_or_no_folder_is_one_clear_error(tmp_path):
    for label in "ab":
        (tmp_path / "train" / label).mkdir(parents=True)
        (tmp_path / "train" / label / ".DS_Store").write_text("no video")
    with pytest.raises(ValueError, match=r"no clips of \['a', 'b'\]"):
        train.load_clips(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        train.load_clips(str(tmp_path / "typo"))
    with pytest.raises(RuntimeError, match="--dataset nobody/nothing: .*Hub did not give it"):
        train.load_clips("nobody/nothing")


def names_of(clips, label):
    """The files of a label's training clips."""
    rows, number = clips["train"], clips["train"].features["label"].names.index(label)
    found = zip(rows["video"], rows["label"], strict=True)
    return [Path(video["path"]).name for video, its in found if its == number]


def test_links_are_followed_and_hidden_folders_are_not(tmp_path, capsys):
    """Reported: clips behind a link to a folder were missing, those of a waste bin were not."""
    root = clip_tree(tmp_path / "clips", "train/a/10.mp4", "train/a/9.mp4", "train/b/1.mp4",
                     "validation/a/1.mp4", "validation/b/1.mp4", "train/a/deep/down/2.mp4",
                     "train/a/.ipynb_checkpoints/1-checkpoint.mp4",
                     "train/b/.Trash-1000/files/2.mp4", "train/b/._1.mp4",
                     "train/b/__MACOSX/3.mp4")  # fmt: skip
    session = clip_tree(tmp_path / "elsewhere", "s1.mp4", "s2.mp4")
    (root / "train" / "a" / "session").symlink_to(session)
    (root / "train" / "third").symlink_to(session)
    (root / "validation" / "third").symlink_to(session)
    (root / "train" / "a" / "up").symlink_to(root / "train")
    clips = train.load_clips(str(root))
    assert clips["train"].features["label"].names == ["a", "b", "third"]
    assert names_of(clips, "a") == ["9.mp4", "10.mp4", "2.mp4", "s1.mp4", "s2.mp4"]
    assert names_of(clips, "b") == ["1.mp4"] and names_of(clips, "third") == ["s1.mp4", "s2.mp4"]
    assert "ignored, as hidden, no video" in capsys.readouterr().out


def test_what_is_uploaded_is_what_is_trained_on(tmp_path):
    """Reported: the SDK's upload follows no links, so that the job trained without a class."""
    root = clip_tree(tmp_path / "clips", *(f"{split}/{label}/1.mp4" for label in "ab"
                     for split in ("train", "validation")), "train/a/.hidden/2.mp4")  # fmt: skip
    session = clip_tree(tmp_path / "elsewhere", "s1.mp4")
    for split in ("train", "validation"):
        (root / split / "third").symlink_to(session)
    sent = []
    client = SimpleNamespace(upload_file=lambda file, bucket, key, ExtraArgs: sent.append(key))
    session = SimpleNamespace(client=lambda name: client)
    run = {"dataset": str(root), "bucket": "b", "prefix": "p", "homes": []}
    (train_channel,), _ = launch.upload(account.Account(tmp_path, run, session))
    home = train_channel.data_source.s3_uri.removeprefix("s3://b/")
    rows = train.load_clips(str(root))
    paths = [video["path"] for part in rows.values() for video in part["video"]]
    assert sorted(sent) == sorted(f"{home}{Path(p).relative_to(root)}" for p in paths)
    assert f"{home}train/third/s1.mp4" in sent


def test_labels_are_compared_in_one_unicode_form(tmp_path):
    """Reported: composed in train/, decomposed in validation/, as copies from macOS are."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    names = [f"train/{composed}/1.mp4", "train/b/1.mp4"]
    names += [f"validation/{decomposed} /1.mp4", "validation/b/1.mp4"]
    clips = train.load_clips(str(clip_tree(tmp_path, *names)))
    assert clips["train"].features["label"].names == ["b", composed]
    assert sorted(clips["validation"]["label"]) == [0, 1]


@pytest.mark.parametrize("alike", [("caf\u00e9", "cafe\u0301"), ("x", "X"), ("x", "x ")])
def test_labels_that_look_the_same_are_an_error_that_shows_the_difference(tmp_path, alike):
    names = [f"train/{label}/{i}.mp4" for label in (*alike, "other") for i in range(3)]
    with pytest.raises(ValueError, match="/train: these look the same:") as error:
        train.load_clips(str(clip_tree(tmp_path, *names)))
    assert all(ascii(label) in str(error.value) for label in alike)


def test_a_split_without_one_of_the_classes_is_a_warning(tmp_path, capsys):
    """Reported: no training at all, for a test split without one class."""
    names = [f"{split}/{label}/1.mp4" for split in ("train", "validation") for label in "ab"]
    clips = train.load_clips(str(clip_tree(tmp_path, *names, "test/a/1.mp4")))
    assert len(clips["test"]) == 1
    assert "warning: " in (said := capsys.readouterr().out)
    assert "split test has no clips" in said and said.rstrip().endswith("of ['b']")


@pytest.mark.parametrize("where", ["~/clips", "data/train", "clips.tar.gz"])
def test_data_sets_as_people_have_them(tmp_path, monkeypatch, where):
    names = [f"{split}/{label}/1.mp4" for split in ("train", "validation") for label in "ab"]
    root = clip_tree(tmp_path / "clips", *names)
    dataset = str(root)
    if where.startswith("~"):
        monkeypatch.setenv("HOME", str(tmp_path))
        dataset = where
    elif where == "data/train":
        (tmp_path / "hub").mkdir()
        root.rename(tmp_path / "hub" / "data")
        dataset = str(tmp_path / "hub")
    else:
        dataset = str(tmp_path / where)
        subprocess.run(["tar", "-czf", dataset, "-C", tmp_path, "clips"], check=True)
    assert {split: len(rows) for split, rows in train.load_clips(dataset).items()} == {
        "train": 2, "validation": 2,
    }  # fmt: skip


def reading(**changed):
    """What read_train_clip and Clips need to know of the flags."""
    defaults = {"num_frames": 4, "image_size": 32, "rate": 0, "zoom": 0.15}
    defaults |= {"horizontal_flip": False, "seed": 0, "eval_views": 1, "eval_crops": 1}
    return SimpleNamespace(**defaults | changed)


def test_batches_reach_workers_that_are_spawned(clips_folder):
    rows = train.load_clips(str(clips_folder))
    for training, position in ((False, 1), (True, 17)):
        batches = train.Clips(rows["train"], reading(), training)
        received = pickle.loads(pickle.dumps(batches))[position]["pixel_values"]
        assert torch.equal(received, batches[position]["pixel_values"])


@pytest.mark.parametrize(
    "names, message",
    [
        (["train/a/1.mp4", "train/b/1.mp4"], "clips in train/ and validation/, of each label"),
        (["train/1.mp4", "validation/1.mp4"], "clips in train/ and validation/, of each label"),
    ],
)
def test_alone_it_takes_the_plain_layout_only(tmp_path, monkeypatch, names, message):
    monkeypatch.setattr(train, "sibling", lambda name: None)
    with pytest.raises(ValueError, match=message):
        train.load_clips(str(clip_tree(tmp_path, *names)))


def test_alone_it_finds_the_same_clips(clips_folder, monkeypatch):
    beside = train.load_clips(str(clips_folder))
    monkeypatch.setattr(train, "sibling", lambda name: None)
    alone = train.load_clips(str(clips_folder))
    assert beside.keys() == alone.keys()
    for split in beside:
        assert beside[split]["label"] == alone[split]["label"]
        paths = [[video["path"] for video in rows[split]["video"]] for rows in (beside, alone)]
        assert paths[0] == paths[1]


def test_a_bad_clip_is_named_with_the_remedy(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(ValueError, match="bad.mp4: damaged.* python prepare_clips.py IN OUT"):
        train.read_clip(str(tmp_path / "bad.mp4"), 16, 32)


# ---- Checkpoints


def backbone(model):
    return {k: v for k, v in model.state_dict().items() if k.startswith("videomae.")}


def assert_same_backbone(left, right):
    left, right = backbone(left), backbone(right)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_native_checkpoint_keeps_its_biases_and_is_mean_pooled(native_checkpoint):
    model, _ = train.load_model(str(native_checkpoint), LABELS)
    saved = load_file(native_checkpoint / "model.safetensors")
    bias = next(v for k, v in saved.items() if "layer.1" in k and k.endswith("q_bias"))
    attention = model.videomae.encoder.layer[1].attention.attention
    assert torch.equal(attention.query.bias, bias) and bias.abs().min() > 0
    assert model.config.use_mean_pooling and model.fc_norm is not None
    assert model.config.id2label == dict(enumerate(LABELS))


def test_the_head_is_new_and_drawn_by_the_seed(native_checkpoint):
    heads = []
    for seed in (0, 0, 1):
        set_seed(seed)
        heads.append(train.load_model(str(native_checkpoint), LABELS)[0].classifier.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@pytest.mark.long
def test_a_head_with_the_same_labels_goes_on_and_another_is_new(job, capsys):
    """The reported value: one's own finished model, trained on, fell to 0.25 at once."""
    finished = str(job[0] / "model")
    saved = load_file(f"{finished}/model.safetensors")
    model, _ = train.load_model(finished, LABELS)
    assert torch.equal(model.classifier.weight, saved["classifier.weight"])
    assert torch.equal(model.classifier.bias, saved["classifier.bias"])
    assert torch.equal(model.fc_norm.weight, saved["fc_norm.weight"])
    assert "the head has the same labels and is kept" in capsys.readouterr().out
    for labels in (["up", "down"], ["a", "b", "c"], LABELS[::-1]):  # as many, more, another order
        model, _ = train.load_model(finished, labels)
        assert model.classifier.weight.shape == (len(labels), 32)
        assert not torch.equal(model.classifier.weight[:2], saved["classifier.weight"])
        assert not model.classifier.bias.any()
        assert "the head is new" in capsys.readouterr().out


def test_going_on_from_ones_own_classifier_begins_where_it_was(job, clips_folder, tmp_path):
    root, _ = job
    before = json.loads((root / "output" / "data" / "metrics.json").read_text())
    flags = f"--dataset {{}} --model_name {{}} --output_dir {tmp_path}/c --model_dir {tmp_path}/m"
    flags += f" --output_data_dir {tmp_path}/d --epochs 1 --learning_rate 1e-9 --zoom 0"
    flags = [*flags.split(), "--dataloader_num_workers", "0"]
    flags[1], flags[3] = str(clips_folder), str(root / "model")
    metrics = train.train(train.parse_arguments(flags))
    assert metrics["test_loss"] == pytest.approx(before["test_loss"], abs=1e-4)


@pytest.mark.parametrize("beside", [True, False], ids=["beside videomae_v2.py", "alone"])
def test_a_weight_missing_or_left_over_fails_by_name(
    tmp_path, native_checkpoint, beside, monkeypatch
):
    if not beside:
        monkeypatch.setattr(train, "sibling", lambda name: None)
    weights = load_file(native_checkpoint / "model.safetensors")
    (tmp_path / "config.json").write_text((native_checkpoint / "config.json").read_text())
    name = next(k for k in weights if k.endswith("layer.1.attention.attention.q_bias"))
    for change, message in (
        ({k: v for k, v in weights.items() if k != name}, "layer.1.attention.attention"),
        (weights | {"videomae.encoder.layer.0.ls1": torch.ones(1)}, "layer.0.ls1"),
    ):
        save_file(change, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            train.load_model(str(tmp_path), LABELS)


def test_alone_it_points_to_the_file_that_knows_other_forms(monkeypatch):
    monkeypatch.setattr(train, "sibling", lambda name: None)
    with pytest.raises(ValueError, match="missing or unexpected.*videomae_v2.py"):
        train.load_model(str(TINY), LABELS)


def test_a_checkpoint_in_half_precision_trains_in_full(native_checkpoint, tmp_path):
    weights = load_file(native_checkpoint / "model.safetensors")
    (tmp_path / "config.json").write_text((native_checkpoint / "config.json").read_text())
    halves = {name: tensor.half() for name, tensor in weights.items()}
    save_file(halves, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, _ = train.load_model(str(tmp_path), LABELS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("checkpoint", ["native", "v2"])
@pytest.mark.parametrize("frames, size", [(2, 32), (8, 48), (32, 16)])
def test_other_frames_and_sizes(checkpoint, frames, size, native_checkpoint, tmp_path):
    """Reported for 8 and 32 frames; the saved processor must say the same size as the model."""
    name = str(native_checkpoint if checkpoint == "native" else TINY)
    model, processor = train.load_model(name, LABELS, frames, size)
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    clips = torch.randint(0, 256, (2, frames, 3, size, size), dtype=torch.uint8)
    again = AutoModelForVideoClassification.from_pretrained(tmp_path).eval()
    assert (again.config.num_frames, again.config.image_size) == (frames, size)
    saved = AutoImageProcessor.from_pretrained(tmp_path)
    assert saved.size["shortest_edge"] == saved.crop_size["height"] == size
    with torch.no_grad():
        logits = [m(train.normalised(clips, processor)).logits for m in (model, again)]
    assert torch.equal(*logits) and logits[0].shape == (2, 2)


def test_frames_and_sizes_that_do_not_divide_are_named(native_checkpoint):
    for frames, size in ((3, 32), (4, 30)):
        with pytest.raises(ValueError, match="--num_frames and --image_size: multiples of 2 and 8"):
            train.load_model(str(native_checkpoint), LABELS, frames, size)


def test_old_transformers_are_refused(tmp_path):
    code = "import transformers; transformers.__version__ = '5.13.0'; "
    code += "import importlib.metadata as m; v = m.version; "
    code += "m.version = lambda n: '5.13.0' if n == 'transformers' else v(n); "
    result = Run(tmp_path, [], code + AS_A_SCRIPT).wait()
    assert result.returncode and "transformers>=5.18" in result.stderr


def test_uint8_clips_are_normalised_as_the_processor_does(tmp_path):
    processor = train.clip_processor(tmp_path, 32)
    frames = noise(4, 32, 32)
    expected = processor(list(frames), return_tensors="pt")["pixel_values"]
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2)[None]
    torch.testing.assert_close(train.normalised(clip, processor), expected, atol=1e-5, rtol=1e-5)
    blended = clip.float()  # what is float already, by mixup, is copied too
    torch.testing.assert_close(train.normalised(blended, processor), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(blended, clip.float())


# ---- Metric and flags


def test_metric_is_right_on_a_case_by_hand():
    logits = np.array([[2.0, 1], [2, 1], [0, 3], [4, 0]])
    metrics = train.compute_metrics((logits, np.array([0, 0, 1, 1])))
    # Class 0: precision 2/3, recall 1, F1 0.8; class 1: precision 1, recall 1/2, F1 2/3.
    loss = np.log(1 + np.exp([-1, -1, -3, 4])).mean()
    expected = {"accuracy": 0.75, "f1": (0.8 + 2 / 3) / 2, "loss": loss}
    assert metrics == pytest.approx(expected)


def test_the_flags_of_the_well_known_recipe_and_all_of_training_arguments(tmp_path):
    recipe = """--model_name m --epochs 3 --train_batch_size 5 --eval_batch_size 6
        --learning_rate 1e-3 --output_dir o --model_dir d --gradient_accumulation_steps 2"""
    args = train.parse_arguments(recipe.split())
    assert (args.model_name, args.model_dir, args.output_dir) == ("m", "d", "o")
    assert (args.num_train_epochs, args.learning_rate) == (3, 1e-3)
    assert (args.per_device_train_batch_size, args.per_device_eval_batch_size) == (5, 6)
    assert args.gradient_accumulation_steps == 2


@pytest.mark.parametrize("spelling", ["true", "True", "1", "false", "False", "0"])
def test_booleans_in_all_the_spellings_of_sagemaker(spelling):
    args = train.parse_arguments(["--load_best_model_at_end", spelling, "--use_cpu", "true"])
    assert args.load_best_model_at_end is (spelling.lower() in ("true", "1"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--learning_rte", "1"], "--learning_rte"),
        (["--epoch", "1"], "--epoch"),
        (["--epochs", "many"], "epochs.*'many'"),
        (["--use_cpu", "perhaps"], "use_cpu.*perhaps"),
    ],
)
def test_wrong_flags_are_errors(flags, message):
    with pytest.raises((ValueError, argparse.ArgumentError), match=message):
        train.parse_arguments(flags)


# ---- Training


@pytest.fixture(scope="module")
def job(clips_folder, native_checkpoint, tmp_path_factory):
    """A run of the script as SageMaker starts it: SM_* folders, flags, another process."""
    root = tmp_path_factory.mktemp("job")
    environment = os.environ | {
        "SM_CHANNEL_TRAIN": str(clips_folder),
        "SM_CHANNEL_MODEL": str(native_checkpoint),
        "SM_MODEL_DIR": str(root / "model"),
        "SM_OUTPUT_DATA_DIR": str(root / "output" / "data"),
        "SM_OUTPUT_DIR": str(root / "output"),
    }
    flags = "--epochs 2 --train_batch_size 4 --learning_rate 1e-3 --dataloader_num_workers 1"
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *flags.split()],
        env=environment, cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return root, result


def test_the_artefact_is_what_transformers_loads(job, clips_folder):
    root, _ = job
    names = {path.name for path in (root / "model").iterdir()}
    assert {"model.safetensors", "config.json", "preprocessor_config.json"} <= names
    video = str(next(clips_folder.glob("test/*/*.mp4")))
    answer = pipeline("video-classification", str(root / "model"))(video)
    assert {entry["label"] for entry in answer} == set(LABELS)


def test_the_saved_model_is_the_best_checkpoint_bias_for_bias(job):
    root, _ = job
    state = json.loads((root / "model" / "trainer_state.json").read_text())
    best = root / "checkpoints" / state["best_model_checkpoint"].split("/")[-1]
    saved = load_file(best / "model.safetensors")
    model = AutoModelForVideoClassification.from_pretrained(root / "model")
    assert model.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert saved["videomae.encoder.layer.0.attention.attention.query.bias"].abs().min() > 0


def test_test_metrics_come_from_the_test_clips(job, clips_folder):
    root, _ = job
    metrics = json.loads((root / "output" / "data" / "metrics.json").read_text())
    model = AutoModelForVideoClassification.from_pretrained(root / "model").eval()
    processor = AutoImageProcessor.from_pretrained(root / "model")
    for split, key in (("validation", "eval_loss"), ("test", "test_loss")):
        rows = train.load_clips(str(clips_folder))[split]
        clips = [train.read_clip(video["path"], 4, 32) for video in rows["video"]]
        with torch.no_grad():
            clips = train.normalised(torch.stack(clips), processor)
            loss = model(pixel_values=clips, labels=torch.tensor(rows["label"])).loss
        assert metrics[key] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["eval_loss"] != metrics["test_loss"]


def test_the_log_is_lines_without_bars_or_warnings(job):
    _, result = job
    assert "\r" not in result.stdout and result.stderr == ""
    assert "'eval_accuracy': " in result.stdout and "'test_accuracy': " in result.stdout


def test_a_failed_job_says_why(tmp_path):
    (tmp_path / "output").mkdir()
    environment = {
        "SM_OUTPUT_DIR": str(tmp_path / "output"), "SM_MODEL_DIR": str(tmp_path / "model"),
    }  # fmt: skip
    result = Run(tmp_path, ["--epoch", "3"], AS_A_SCRIPT, **environment).wait()
    assert result.returncode == 1
    failure = (tmp_path / "output" / "failure").read_text()
    assert failure.startswith("ValueError: ") and "'--epoch'" in failure and len(failure) <= 1024


def trainer_for(clips_folder, model_name, output_dir, *flags):
    fixed = f"--epochs 2 --train_batch_size 4 --learning_rate 1e-3 --dataloader_num_workers 0 \
        --output_dir {output_dir}".split()
    args = train.parse_arguments([*fixed, "--model_name", str(model_name), *flags])
    set_seed(args.seed)
    model, processor = train.load_model(str(model_name), LABELS)
    model = train.trainable(model, args.freeze, args.lora_rank)
    return train.make_trainer(args, train.load_clips(str(clips_folder)), model, processor)


def test_resuming_restores_every_weight_biases_too(clips_folder, native_checkpoint, tmp_path):
    trainer_for(clips_folder, native_checkpoint, tmp_path).train()
    last = str(tmp_path / "checkpoint-8")
    saved = load_file(os.path.join(last, "model.safetensors"))
    flags = ["--load_best_model_at_end", "false"]
    resumed = trainer_for(clips_folder, native_checkpoint, tmp_path, *flags)
    bias = "videomae.encoder.layer.1.attention.attention.query.bias"
    assert not torch.equal(resumed.model.state_dict()[bias], saved[bias])  # it was trained
    resumed.train(resume_from_checkpoint=last)  # all steps are done: this loads and stops
    assert all(torch.equal(w, saved[name]) for name, w in resumed.model.state_dict().items())


@pytest.mark.long
def test_it_overfits_one_batch(clips_folder):
    set_seed(0)
    model, processor = train.load_model(str(TINY), LABELS)
    rows = train.load_clips(str(clips_folder))["train"]
    frames, size = model.config.num_frames, model.config.image_size
    clips = torch.stack([train.read_clip(v["path"], frames, size) for v in rows["video"]])
    clips = train.normalised(clips, processor)
    labels = torch.tensor(rows["label"])
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(60):
        optimiser.zero_grad()
        loss = model(pixel_values=clips, labels=labels).loss
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1


def test_resume_auto_goes_on_with_the_newest_checkpoint(
    clips_folder, native_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = f"""--model_name {native_checkpoint} --train_batch_size 4 --resume_from_checkpoint auto
        --dataloader_num_workers 0 --epochs""".split()
    flags = ["--dataset", str(clips_folder), *flags]
    train.train(train.parse_arguments([*flags, "1"]))
    capsys.readouterr()
    train.train(train.parse_arguments([*flags, "2"]))
    epochs = [line for line in capsys.readouterr().out.splitlines() if "'eval_loss'" in line]
    assert len([line for line in epochs if "'epoch': '2'" in line]) == 1
    assert not any("'epoch': '1'" in line for line in epochs)


def test_checkpoints_of_another_run_are_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-5").mkdir()
    monkeypatch.setattr(train, "check_checkpoint", lambda folder: None)  # complete
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint auto"):
        train.checkpoint_to_resume(train.parse_arguments(["--output_dir", str(tmp_path)]), {})


# ---- Before the first step


def run_once(clips_folder, native_checkpoint, tmp_path, *flags):
    where = {"dataset": clips_folder, "model_name": native_checkpoint, "model_dir": "model"}
    where |= {"output_data_dir": "data", "output_dir": "checkpoints"}
    given = [f"--{name}={tmp_path / folder}" for name, folder in where.items()]
    return train.train(train.parse_arguments([*given, "--epochs", "1", *flags]))


def no_step(monkeypatch):
    def step(*args, **kwargs):
        raise AssertionError("a step was trained")

    monkeypatch.setattr(train.ClipTrainer, "training_step", step)


@pytest.mark.parametrize("metric", ["macro_f1", "eval_auc"])
def test_a_metric_that_is_not_there_is_named(
    metric, clips_folder, native_checkpoint, tmp_path, monkeypatch
):
    """Reported: after the first epoch, with nothing saved."""
    no_step(monkeypatch)
    with pytest.raises(ValueError, match=r"_model \w+: one of \['accuracy', 'f1', 'loss'\]"):
        flags = ["--metric_for_best_model", metric]
        run_once(clips_folder, native_checkpoint, tmp_path, *flags)


@pytest.mark.parametrize("name", ["model_dir", "output_data_dir", "output_dir"])
def test_a_place_that_cannot_be_written_is_named(
    name, clips_folder, native_checkpoint, tmp_path, monkeypatch
):
    no_step(monkeypatch)
    with pytest.raises(OSError, match="/proc/here"):
        run_once(clips_folder, native_checkpoint, tmp_path, f"--{name}=/proc/here")


@pytest.mark.long
def test_a_home_that_cannot_be_written_is_no_hindrance(clips_folder, native_checkpoint, tmp_path):
    """Reported: the metric's cache, after an epoch."""
    environment = os.environ | {"HOME": "/proc/home", "HF_HOME": "/proc/hf"}
    flags = ["--dataset", str(clips_folder), "--model_name", str(native_checkpoint)]
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *flags, "--epochs", "1"],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "outputs" / "model" / "model.safetensors").is_file()


def test_a_gpu_that_torch_does_not_see_ends_the_job(
    clips_folder, native_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("SM_NUM_GPUS", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="this machine has GPUs, but torch sees none"):
        run_once(clips_folder, native_checkpoint, tmp_path)
    monkeypatch.setenv("SM_NUM_GPUS", "0")
    run_once(clips_folder, native_checkpoint, tmp_path)
