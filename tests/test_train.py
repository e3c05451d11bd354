"""scripts/train.py: frames, data, checkpoints, flags, and a job from start to artefact."""

import json
import os
import pickle
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
import train
from conftest import ROOT, TINY
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForVideoClassification, pipeline
from videos import noise, write_sound, write_video

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
        (["train/a.mp4", "train/b.mp4"], r"two classes or more, found \[\]"),  # no class folders
        (["train/only/a.mp4", "train/only/b.mp4"], r"two classes or more, found \['only'\]"),
        (["train/a/1.mp4", "train/b/1.mp4", "test/a/1.mp4"], r"split test has no clips.*\['b'\]"),
        (
            [f"{split}/{label}/1.mp4" for split in ("train", "test") for label in "ab"]
            + ["test/c/1.mp4"],
            r"split test has labels that train has not: \['c'\]",
        ),
        (["train/a/1.mp4", "train/b/1.mp4"], "too few clips for a validation split"),
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
    with pytest.raises(ValueError, match=r"no clips \(.mp4 .*\['a', 'b'\]"):
        train.load_clips(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        train.load_clips(str(tmp_path / "typo"))
    with pytest.raises(RuntimeError, match="--dataset nobody/nothing: .*Hub did not give it"):
        train.load_clips("nobody/nothing")


def test_batches_reach_workers_that_are_spawned(clips_folder):
    rows = train.load_clips(str(clips_folder))
    reading = {"num_frames": 4, "size": 32}
    evaluated = rows["test"].with_transform(train.partial(train.eval_batch, **reading))
    trained = train.TrainClips(rows["train"], 0, sampling_rate=0, **reading)
    for batches, position in ((evaluated, 1), (trained, 17)):
        received = pickle.loads(pickle.dumps(batches))[position]["pixel_values"]
        assert torch.equal(received, batches[position]["pixel_values"])


def test_an_archive_from_the_hub_is_unpacked(tmp_path, monkeypatch):
    clip_tree(tmp_path / "UCF", "train/a/1.mp4", "train/b/1.mp4")
    hub = tmp_path / "hub"
    hub.mkdir()
    subprocess.run(["tar", "-czf", hub / "UCF.tar.gz", "-C", tmp_path, "UCF"], check=True)
    monkeypatch.setattr(train.huggingface_hub, "snapshot_download", lambda *a, **k: str(hub))
    assert train.dataset_folder("owner/name") == hub / "unpacked" / "UCF"


def test_every_unreadable_clip_is_in_one_report(tmp_path):
    clip_tree(tmp_path, *(f"train/{label}/{i}.mp4" for label in "ab" for i in range(4)))
    a, b = tmp_path / "train" / "a", tmp_path / "train" / "b"
    (a / "0.mp4").write_bytes(b"")
    (a / "1.mp4").write_bytes(os.urandom(5000))
    (a / "2.mp4").write_bytes((a / "2.mp4").read_bytes()[:1000])
    write_video(b / "0.mp4", noise(20), codec="libsvtav1")
    write_sound(b / "1.mp4")
    with pytest.raises(ValueError) as error:
        train.check_clips(train.load_clips(str(tmp_path)), num_frames=16)
    report = str(error.value)
    assert report.startswith("5 of 8 clips cannot be read")
    for name, why in {
        "a/0.mp4": "empty file", "a/1.mp4": "damaged", "a/2.mp4": "damaged",
        "b/0.mp4": "(av1); try: prepare_clips.py, or ffmpeg", "b/1.mp4": "no video stream",
    }.items():  # fmt: skip
        assert [why in line for line in report.splitlines() if name in line] == [True], report
    assert "/b/2.mp4" not in report
    with pytest.raises(ValueError, match="a/1.mp4: damaged"):
        train.read_clip(str(a / "1.mp4"), 16, 32)


def test_damage_in_the_middle_is_found(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, noise(120), g="12")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle - 20_000 : middle + 20_000] = bytes(40_000)
    path.write_bytes(data)
    assert train.clip_problem(str(path), 16)[1]


def test_short_clips_repeat_frames_and_are_mentioned_once(tmp_path, capsys):
    clip_tree(tmp_path, "train/a/long.mp4", "train/b/long.mp4")
    write_video(tmp_path / "train" / "a" / "short.mp4", noise(5, 32, 32))
    write_video(tmp_path / "train" / "b" / "short.mp4", noise(1, 32, 32))
    clips = train.load_clips(str(tmp_path))
    train.check_clips(clips, num_frames=16)
    assert capsys.readouterr().out.count("2 clips have fewer than 16 frames") == 1
    clip = train.read_clip(str(tmp_path / "train" / "b" / "short.mp4"), 16, 32)
    assert (clip == clip[0]).all() and len(clip) == 16


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
        train.set_seed(seed)
        heads.append(train.load_model(str(native_checkpoint), LABELS)[0].classifier.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_v2_sizes_are_read_off_and_every_weight_arrives():
    model, processor = train.load_model(str(TINY), LABELS)
    saved = load_file(TINY / "model.safetensors")
    qkv = saved["model.blocks.1.attn.qkv.weight"]
    attention = model.videomae.encoder.layer[1].attention.attention
    parts = [attention.query.weight, attention.key.weight, attention.value.weight]
    assert torch.equal(torch.cat(parts), qkv)
    assert torch.equal(attention.value.bias, saved["model.blocks.1.attn.v_bias"])
    assert torch.equal(model.fc_norm.weight, saved["model.fc_norm.weight"])
    assert model.config.layer_norm_eps == 1e-6
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("wrapper", [None, "module", "model"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "encoder.", "backbone.", "_orig_mod.", "module._orig_mod."]
)
def test_pth_wrappers_and_prefixes(tmp_path, wrapper, prefix):
    saved = load_file(TINY / "model.safetensors")
    state = {prefix + name.removeprefix("model."): tensor for name, tensor in saved.items()}
    state |= {"head.weight": torch.zeros(710, 64), "head.bias": torch.zeros(710)}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "distilled.pth")
    checkpoint = train.videomae_checkpoint([tmp_path / "distilled.pth"])
    weights = train.videomae_weights(checkpoint)
    expected = backbone(train.load_model(str(TINY), LABELS)[0])
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert not any("head" in name for name in weights)


def test_a_distilled_pth_without_configuration_has_the_published_sizes(tmp_path):
    """As distill/vit_s_k710_dl_from_giant.pth: ViT-S, here with one block."""
    torch.manual_seed(0)
    block = {
        "norm1.weight": (384,), "norm1.bias": (384,), "attn.q_bias": (384,), "attn.v_bias": (384,),
        "attn.qkv.weight": (1152, 384), "attn.proj.weight": (384, 384), "attn.proj.bias": (384,),
        "norm2.weight": (384,), "norm2.bias": (384,), "mlp.fc1.weight": (1536, 384),
        "mlp.fc1.bias": (1536,), "mlp.fc2.weight": (384, 1536), "mlp.fc2.bias": (384,),
    }  # fmt: skip
    shapes = {f"blocks.0.{name}": shape for name, shape in block.items()} | {
        "patch_embed.proj.weight": (384, 3, 2, 16, 16), "patch_embed.proj.bias": (384,),
        "fc_norm.weight": (384,), "fc_norm.bias": (384,), "head.weight": (710, 384),
        "head.bias": (710,),
    }  # fmt: skip
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    torch.save({"module": state}, tmp_path / "vit_s.pth")
    model, processor = train.load_model(str(tmp_path / "vit_s.pth"), ["a", "b", "c"])
    config = model.config
    assert (config.num_attention_heads, config.num_frames, config.image_size) == (6, 16, 224)
    assert (config.patch_size, config.tubelet_size, config.intermediate_size) == (16, 2, 1536)
    assert model.classifier.weight.shape == (3, 384) and processor.crop_size["height"] == 224
    assert torch.equal(model.fc_norm.bias, state["fc_norm.bias"])


def test_a_pickle_with_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth: refused"):
        train.load_model(str(tmp_path / "evil.pth"), LABELS)


def changed_checkpoint(folder, change):
    weights = load_file(TINY / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text((TINY / "config.json").read_text())
    return str(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("model.blocks.1.mlp.fc2.bias"), "missing.*layer.1.output.dense.bias"),
        (lambda w: w.pop("model.blocks.0.attn.q_bias"), "missing.*query.bias"),
        (lambda w: w.update({"model.blocks.0.ls1": torch.ones(1)}), "unexpected.*ls1"),
    ],
)
def test_a_weight_missing_or_left_over_fails_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train.load_model(changed_checkpoint(tmp_path, change), LABELS)


def test_what_is_not_a_videomae_is_refused(tmp_path):
    save_file({"bert.pooler.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="not a VideoMAE checkpoint"):
        train.load_model(str(tmp_path), LABELS)
    with pytest.raises(ValueError, match="no .safetensors file"):
        empty = tmp_path / "empty"
        empty.mkdir()
        train.load_model(str(empty), LABELS)
    with pytest.raises(FileNotFoundError, match="/no/such.pth: no such file"):
        train.load_model("/no/such.pth", LABELS)
    with pytest.raises(RuntimeError, match="--model_name nobody/gated: .*HF_TOKEN"):
        train.load_model("nobody/gated", LABELS)


def test_old_transformers_are_refused():
    code = "import transformers; transformers.__version__ = '5.13.0'; import train"
    code = f"import importlib.metadata as m; v = m.version; m.version = lambda n: '5.13.0' if n == 'transformers' else v(n); {code}"  # noqa: E501
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True
    )
    assert result.returncode and "transformers>=5.18" in result.stderr


def test_uint8_clips_are_normalised_as_the_processor_does(tmp_path):
    processor = train.clip_processor(tmp_path, 32)
    frames = noise(4, 32, 32)
    expected = processor(list(frames), return_tensors="pt")["pixel_values"]
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2)[None]
    torch.testing.assert_close(train.normalised(clip, processor), expected, atol=1e-5, rtol=1e-5)


# ---- Metric and flags


def test_metric_is_right_on_a_case_by_hand():
    logits = np.array([[2, 1], [2, 1], [0, 3], [4, 0]])
    metrics = train.compute_metrics((logits, np.array([0, 0, 1, 1])))
    # Class 0: precision 2/3, recall 1, F1 0.8; class 1: precision 1, recall 1/2, F1 2/3.
    assert metrics == {"accuracy": 0.75, "f1": pytest.approx((0.8 + 2 / 3) / 2)}


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
        (["--learning_rte", "1"], "unknown flag --learning_rte; did you mean --learning_rate"),
        (["--epoch", "1"], "unknown flag --epoch; did you mean --epochs"),
        (["--epochs", "many"], "epochs.*'many'"),
        (["--use_cpu", "perhaps"], "use_cpu.*perhaps"),
    ],
)
def test_wrong_flags_are_errors(flags, message):
    with pytest.raises(ValueError, match=message):
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
    environment = os.environ | {
        "SM_OUTPUT_DIR": str(tmp_path / "output"), "SM_MODEL_DIR": str(tmp_path / "model"),
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), "--epoch", "3"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 1
    failure = (tmp_path / "output" / "failure").read_text()
    assert failure.startswith("ValueError: unknown flag --epoch") and len(failure) <= 1024


def trainer_for(clips_folder, model_name, output_dir, *flags):
    fixed = f"--epochs 2 --train_batch_size 4 --learning_rate 1e-3 --dataloader_num_workers 0 \
        --output_dir {output_dir}".split()
    args = train.parse_arguments([*fixed, "--model_name", str(model_name), *flags])
    train.set_seed(args.seed)
    model, processor = train.load_model(str(model_name), LABELS)
    model = train.trainable(model, args.freeze, args.lora_rank)
    return train.make_trainer(args, train.load_clips(str(clips_folder)), model, processor)


def test_resuming_restores_every_weight_biases_too(clips_folder, native_checkpoint, tmp_path):
    trainer_for(clips_folder, native_checkpoint, tmp_path).train()
    last = train.newest_checkpoint(tmp_path)
    saved = load_file(os.path.join(last, "model.safetensors"))
    flags = ["--load_best_model_at_end", "false"]
    resumed = trainer_for(clips_folder, native_checkpoint, tmp_path, *flags)
    bias = "videomae.encoder.layer.1.attention.attention.query.bias"
    assert not torch.equal(resumed.model.state_dict()[bias], saved[bias])  # it was trained
    resumed.train(resume_from_checkpoint=last)  # all steps are done: this loads and stops
    assert all(torch.equal(w, saved[name]) for name, w in resumed.model.state_dict().items())


def test_it_overfits_one_batch(clips_folder):
    train.set_seed(0)
    model, processor = train.load_model(str(TINY), LABELS)
    rows = datasets.concatenate_datasets([train.load_clips(str(clips_folder))["train"]])
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
        train.train(train.parse_arguments(["--output_dir", str(tmp_path)]))
