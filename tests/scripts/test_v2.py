"""videomae_v2.py: every published checkpoint loads, against an independent ViT (v2_vit.py)."""

import argparse
import json
import os
import shutil
import stat
import tarfile
import tempfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import videomae_v2
from conftest import TINY
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
)
from v2_vit import V2ViT, sine_cosine_table

# width, heads, MLP, patch of the published sizes (arXiv:2303.16727, table of architectures)
SIZES = {
    "S": (384, 6, 1536, 16),
    "B": (768, 12, 3072, 16),
    "L": (1024, 16, 4096, 16),
    "H": (1280, 16, 5120, 16),
    "g": (1408, 16, 6144, 14),
}
ATTENTION = "videomae.encoder.layer.1.attention.attention"


def shaken(model):
    """The model with random biases and norms: zero or one at birth, a lost one would not show."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, float("norm" in name and "weight" in name), 0.1)
    return model.eval()


def random_vit(width, depth, heads, hidden, patch, size, frames=4):
    torch.manual_seed(0)
    return shaken(V2ViT(width, depth, heads, hidden, patch, frames, size, classes=3))


def small_vit(**sizes):
    return random_vit(**{"width": 64, "depth": 2, "heads": 1, "hidden": 96, "patch": 16} | sizes)


def native_model(cls=VideoMAEForVideoClassification, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    clip = {"image_size": 32, "patch_size": 8, "num_frames": 4, "num_attention_heads": 2}
    return shaken(cls(VideoMAEConfig(**sizes, **clip, num_labels=3, **settings)))


def model_of(source, labels=3, **clip):
    """As train.py builds it; `clip`: sizes that are not the checkpoint's."""
    folder, config, weights = videomae_v2.load(str(source))
    config.use_mean_pooling, config.num_labels = True, labels
    for name, value in clip.items():
        setattr(config, name, value)
    model, told = VideoMAEForVideoClassification.from_pretrained(
        folder if weights is None else None,
        config=config,
        state_dict=weights,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    new = ("classifier.", "fc_norm.")
    assert not [name for name in told["missing_keys"] if not name.startswith(new)]
    return model.eval()


def logits(model, frames, size, head=None):
    """Of a random clip; `head`: one from elsewhere, in place of the model's."""
    video = torch.randn(1, frames, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if isinstance(model, V2ViT):
            return model(video.transpose(1, 2))
        if head is not None:
            model.classifier.load_state_dict(head.state_dict())
        return model.eval()(pixel_values=video).logits


def save_pth(state, file):
    torch.save(state, file)
    return file


def save_v2_folder(vit, folder, size, heads):
    """As OpenGVLab/VideoMAEv2-*: prefixed, without a head, with the remote code's config.json."""
    folder.mkdir(exist_ok=True)
    state = {f"model.{k}": v.contiguous() for k, v in vit.state_dict().items() if "head." not in k}
    save_file(state, folder / "model.safetensors")
    sizes = {"img_size": size, "num_frames": 4, "num_heads": heads}
    config = {"model_type": "VideoMAEv2_Base", "model_config": sizes}
    config["auto_map"] = {"AutoModel": "modeling_videomaev2.VideoMAEv2"}  # code that is not there
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def convert(source, folder):
    videomae_v2.main([str(source), str(folder)])
    return folder


# ---- Logits


@pytest.mark.parametrize("name", SIZES)
def test_logits_equal_those_of_an_independent_implementation(name):
    """Real widths, heads, MLPs and patches; two blocks, since all blocks of a size are alike."""
    width, heads, hidden, patch = SIZES[name]
    size = 2 * patch
    vit = random_vit(width, 2, heads, hidden, patch, size)
    expected = logits(vit, 4, size)
    assert expected.abs().max() > 0.1  # not a comparison of zeros
    with tempfile.TemporaryDirectory() as folder:  # the giant's files are large
        folder = Path(folder)
        # As the distilled and fine-tuned ones: wrapped, without a configuration.
        file = save_pth({"module": vit.state_dict()}, folder / "vit.pth")
        model = model_of(file, num_frames=4, image_size=size)
        config = model.config
        assert (config.hidden_size, config.num_attention_heads) == (width, heads)
        assert (config.intermediate_size, config.patch_size) == (hidden, patch)
        direct = logits(model, 4, size, vit.head)
        torch.testing.assert_close(direct, expected, atol=1e-4, rtol=0)

        source = save_v2_folder(vit, folder / "hub", size, heads)
        written = convert(source, folder / "native")
        model = VideoMAEForVideoClassification.from_pretrained(written, num_labels=3)
        assert torch.equal(logits(model, 4, size, vit.head), direct)
        assert torch.equal(logits(model_of(source), 4, size, vit.head), direct)


def test_a_full_size_clip_of_a_pth_without_configuration(tmp_path):
    """As distill/vit_s_k710_dl_from_giant.pth: 16 frames of 224 x 224, as published."""
    vit = random_vit(384, 2, 6, 1536, 16, size=224, frames=16)
    state = vit.state_dict() | {"head.weight": torch.zeros(710, 384), "head.bias": torch.zeros(710)}
    model = model_of(save_pth({"module": state}, tmp_path / "vit_s.pth"))
    assert (model.config.num_frames, model.config.image_size) == (16, 224)
    assert (model.config.tubelet_size, model.config.layer_norm_eps) == (2, 1e-6)
    converted = logits(model, 16, 224, vit.head)
    torch.testing.assert_close(converted, logits(vit, 16, 224), atol=1e-4, rtol=0)


def test_the_giant_in_its_full_depth(tmp_path):
    """40 blocks, patch 14: the names and the number of blocks, at a width that fits a test."""
    vit = random_vit(32, 40, 16, 96, 14, size=28)
    model = model_of(save_v2_folder(vit, tmp_path / "g", size=28, heads=16))
    assert (model.config.num_hidden_layers, model.config.patch_size) == (40, 14)
    converted = logits(model, 4, 28, vit.head)
    torch.testing.assert_close(converted, logits(vit, 4, 28), atol=1e-4, rtol=0)


def test_v2_sizes_are_read_off_and_every_weight_arrives():
    model = model_of(TINY)
    saved = load_file(TINY / "model.safetensors")
    attention = model.videomae.encoder.layer[1].attention.attention
    parts = [attention.query.weight, attention.key.weight, attention.value.weight]
    assert torch.equal(torch.cat(parts), saved["model.blocks.1.attn.qkv.weight"])
    assert torch.equal(attention.value.bias, saved["model.blocks.1.attn.v_bias"])
    assert torch.equal(model.fc_norm.weight, saved["model.fc_norm.weight"])
    assert model.config.num_attention_heads == 4 and model.config.layer_norm_eps == 1e-6
    assert model.config.use_mean_pooling


# ---- The written folder, and names on disk


def test_the_written_folder_is_native(tmp_path, capsys):
    folder = convert(TINY, tmp_path / "new" / "tiny")
    assert capsys.readouterr().out.splitlines() == [
        "not in the checkpoint, drawn anew: classifier.weight, classifier.bias",
        f"{folder} takes 16 frames of 64 x 64 pixels",
    ]
    names = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {file.name for file in folder.iterdir()} == names
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == 0o644
    saved = load_file(folder / "model.safetensors")
    original = load_file(TINY / "model.safetensors")["model.blocks.1.attn.q_bias"]
    assert torch.equal(saved[f"{ATTENTION}.q_bias"], original)  # transformers 4 reads this name
    assert not any("query.bias" in name or "value.bias" in name for name in saved)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "videomae" and "auto_map" not in config
    processor = AutoImageProcessor.from_pretrained(folder)
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406)
    assert processor.crop_size["height"] == processor.size["shortest_edge"] == 64
    where, config, weights = videomae_v2.load(str(folder))
    assert where == folder and weights is None and config.num_hidden_layers == 3


def test_a_model_fine_tuned_from_v2_is_saved_under_the_old_names(tmp_path):
    model = model_of(TINY)
    with torch.no_grad():
        model.videomae.encoder.layer[1].attention.attention.query.bias += 1
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    original = load_file(TINY / "model.safetensors")["model.blocks.1.attn.q_bias"]
    assert torch.equal(saved[f"{ATTENTION}.q_bias"], original + 1)
    assert not any("query.bias" in name or "value.bias" in name for name in saved)


def test_the_processor_of_the_source_gives_the_colours_and_the_model_the_size(tmp_path):
    source = save_v2_folder(small_vit(size=32), tmp_path / "v2", size=32, heads=1)
    mean = {"image_mean": [0.1, 0.2, 0.3], "size": 224, "image_std": [1, 1, 1]}  # an old form
    (source / "preprocessor_config.json").write_text(json.dumps(mean))
    processor = AutoImageProcessor.from_pretrained(convert(source, tmp_path / "native"))
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    assert processor.crop_size["height"] == processor.size["shortest_edge"] == 32


def test_a_folder_that_is_not_empty_is_not_written_into(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match=f"{tmp_path}: not empty; name a new folder") as failure:
        convert(TINY, tmp_path)
    assert isinstance(failure.value.code, str)  # Python prints it and exits with 1
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_bad_input_ends_the_command_with_one_line(tmp_path):
    for arguments in (["/no/such.pth", str(tmp_path / "x")], [str(tmp_path), "--check"]):
        with pytest.raises(SystemExit) as failure:
            videomae_v2.main(arguments)
        assert failure.value.code.startswith(f"{arguments[0]}: ")
        assert "\n" not in failure.value.code
    with pytest.raises(SystemExit) as failure:
        videomae_v2.main([str(TINY)])  # neither a folder nor --check
    assert failure.value.code == 2
    assert list(tmp_path.iterdir()) == []


def test_check_tells_the_fate_of_each_key(tmp_path, capsys):
    state = small_vit(depth=1, size=32).state_dict()
    extra = {"decoder.blocks.0.norm1.bias": torch.zeros(4), "mask_token": torch.zeros(1, 1, 4)}
    state = {f"encoder.{k}": v for k, v in state.items()} | extra
    save_pth({"model": state}, tmp_path / "v.pth")
    videomae_v2.main(["--check", str(tmp_path / "v.pth")])
    lines = capsys.readouterr().out.splitlines()
    fates = dict(line.split(" -> ") for line in lines if " -> " in line)
    assert len(fates) == len(state)
    at = "videomae.encoder.layer.0.attention.attention"
    assert fates["encoder.blocks.0.attn.qkv.weight [192, 64]"] == ", ".join(
        f"{at}.{part}.weight" for part in ("query", "key", "value")
    )
    assert fates["encoder.blocks.0.attn.q_bias [64]"] == f"{at}.q_bias"
    dropped = {key.split()[0] for key, fate in fates.items() if fate.startswith("dropped")}
    assert dropped == {*extra, "encoder.head.weight", "encoder.head.bias"}
    assert lines[-2].endswith("drawn anew: classifier.weight, classifier.bias")
    assert lines[-1] == "every weight has its place"
    assert [file.name for file in tmp_path.iterdir()] == ["v.pth"]


# ---- transformers' own checkpoints


def test_a_native_folder_is_left_to_transformers(native_checkpoint):
    folder, config, weights = videomae_v2.load(str(native_checkpoint))
    assert folder == native_checkpoint and weights is None
    assert config.use_mean_pooling is False  # as on disk
    saved = load_file(native_checkpoint / "model.safetensors")
    attention = model_of(native_checkpoint).videomae.encoder.layer[1].attention.attention
    assert torch.equal(attention.query.bias, saved[f"{ATTENTION}.q_bias"])
    assert attention.query.bias.abs().min() > 0


def test_parts_and_new_names_of_transformers_are_left_to_it(tmp_path):
    model = native_model()
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "new_names", save_original_format=False)
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    names = load_file(tmp_path / "new_names" / "model.safetensors").keys()
    assert f"{ATTENTION}.query.bias" in names
    for folder in tmp_path.iterdir():
        assert videomae_v2.load(str(folder))[2] is None
        assert torch.equal(logits(model_of(folder), 4, 32), logits(model, 4, 32))


def test_what_transformers_would_not_read_is_given_as_weights(tmp_path):
    model = native_model()
    expected = logits(model, 4, 32)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({f"module.{k}": v for k, v in load_file(file).items()}, file)  # names of DDP
    assert torch.equal(logits(model_of(tmp_path), 4, 32), expected)
    assert videomae_v2.load(str(tmp_path))[2] is not None
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    _, config, weights = videomae_v2.load(str(tmp_path))
    assert config.hidden_size == 32 and f"{ATTENTION}.q_bias" in weights


def as_it_is(state):
    return state


def old_names(state):
    state = {k.replace("query.bias", "q_bias"): v for k, v in state.items()}
    return {k.replace("value.bias", "v_bias"): v for k, v in state.items()}


def of_lightning(state):
    hyper = {"lr": 1e-3, "classes": ["a", "b", "c"]}
    state = {f"model.{k}": v for k, v in state.items()}
    return {"state_dict": state, "epoch": 3, "hyper_parameters": hyper, "callbacks": {}}


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("wrap", [as_it_is, old_names, of_lightning])
def test_a_fine_tuned_pytorch_model_bin_keeps_its_head(tmp_path, wrap, pooled):
    model = native_model(use_mean_pooling=pooled)
    source = tmp_path / "source"
    model.config.save_pretrained(source)
    torch.save({"step": 1, "argument": "plain"}, source / "training_args.bin")
    save_pth(wrap(model.state_dict()), source / "pytorch_model.bin")
    expected = logits(model, 4, 32)
    if pooled:
        assert torch.equal(logits(model_of(source), 4, 32), expected)
    weights = videomae_v2.load(str(source))[2]
    assert torch.equal(weights["classifier.bias"], model.classifier.bias)
    assert not any("layernorm." in name for name in weights)  # only the blocks' own
    written = convert(source, tmp_path / "native")
    native = VideoMAEForVideoClassification.from_pretrained(written)
    assert torch.equal(logits(native, 4, 32), expected)


def test_a_pytorch_model_bin_in_parts_and_an_encoder_alone(tmp_path):
    model = native_model()
    state = list(model.state_dict().items())
    model.config.save_pretrained(tmp_path)
    save_pth(dict(state[:9]), tmp_path / "pytorch_model-00001-of-00002.bin")
    save_pth(dict(state[9:]), tmp_path / "pytorch_model-00002-of-00002.bin")
    assert torch.equal(logits(model_of(tmp_path), 4, 32), logits(model, 4, 32))
    encoder = native_model(VideoMAEModel)
    encoder.save_pretrained(tmp_path / "encoder")  # its names lack "videomae."
    built = model_of(tmp_path / "encoder")
    assert torch.equal(
        built.videomae.encoder.layer[1].attention.attention.value.bias,
        encoder.encoder.layer[1].attention.attention.value.bias,
    )


def test_a_native_head_without_config_json_says_how_many_classes(tmp_path):
    file = save_pth(of_lightning(native_model().state_dict()), tmp_path / "last.ckpt")
    _, config, weights = videomae_v2.load(str(file))
    assert config.num_labels == 3 and weights["classifier.weight"].shape == (3, 32)


# ---- Wrappings


def of_mmaction2(state):
    """Names of mmaction2's VisionTransformer (vit_mae.py), its positions are a buffer."""
    names = {"patch_embed.proj.": "patch_embed.projection.", "mlp.fc1.": "mlp.layers.0.0."}
    names |= {"mlp.fc2.": "mlp.layers.1.", "head.": "cls_head.fc_cls."}
    renamed = {"backbone.pos_embed": sine_cosine_table(8 * 28 * 28, 64)}
    for key, tensor in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key if key.startswith("cls_head") else f"backbone.{key}"] = tensor
    return {"meta": {"epoch": 1, "mmaction2_version": "1.0.0"}, "state_dict": renamed}


def of_their_training_loop(state):
    """As utils.save_model of VideoMAE: arguments, and learning rates out of a numpy schedule."""
    rates = np.linspace(0, 1e-3, 5)
    group = {"lr": rates[1] * 0.75, "weight_decay": np.float32(0.05), "params": [0]}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [group]}
    args = argparse.Namespace(lr=1e-3, window_size=(8, 14, 14), output_dir=Path("/x"), aa=None)
    return {"model": state, "optimizer": optimizer, "epoch": 3, "scaler": {}, "args": args}


def within(*wrappers):
    def wrap(state):
        for wrapper in wrappers:
            state = {wrapper: state, "epoch": 3}
        return state

    return wrap


@pytest.mark.parametrize(
    "wrap, name",
    [
        (as_it_is, "vit.pth"),
        (within("module"), "vit.pt"),
        (within("model"), "vit.bin"),
        (within("module", "model"), "vit.pth"),
        (within("state_dict"), "vit.pth"),
        (of_lightning, "last.ckpt"),
        (of_mmaction2, "vit.pth"),
        (of_their_training_loop, "checkpoint-3.pth"),
    ],
)
def test_wrappings(tmp_path, wrap, name):
    saved = load_file(TINY / "model.safetensors")
    state = {key.removeprefix("model."): tensor for key, tensor in saved.items()}
    state |= {"head.weight": torch.zeros(710, 64), "head.bias": torch.zeros(710)}
    save_pth(wrap(state), tmp_path / name)
    _, _, expected = videomae_v2.load(str(TINY))
    for source in (tmp_path / name, tmp_path):
        folder, _, weights = videomae_v2.load(str(source))
        assert folder == tmp_path and weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_in_torchs_format_of_before_1_6(tmp_path):
    state = small_vit(size=32).state_dict()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    weights = videomae_v2.load(str(tmp_path / "old.pth"))[2]
    assert torch.equal(weights["fc_norm.bias"], state["fc_norm.bias"])


@pytest.mark.parametrize(
    "prefix",
    ["module.", "encoder.", "backbone.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.",
     "model.backbone.", "module.encoder."],
)  # fmt: skip
def test_prefixes(tmp_path, prefix):
    saved = load_file(TINY / "model.safetensors")
    state = {prefix + key.removeprefix("model."): tensor for key, tensor in saved.items()}
    save_file(state, tmp_path / "any_name.safetensors")
    weights = videomae_v2.load(str(tmp_path))[2]
    expected = videomae_v2.load(str(TINY))[2]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


# ---- model.tar.gz, ~ and the Hub


def archive(folder, file, below="."):
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w:gz") as tar:
        tar.add(folder, arcname=below)
    return file


@pytest.mark.parametrize("below", [".", "model"])
def test_a_model_tar_gz_and_a_folder_that_holds_one(tmp_path, below, monkeypatch):
    at_exit = []
    monkeypatch.setattr(videomae_v2.atexit, "register", lambda *call, **more: at_exit.append(call))
    model = native_model()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "code").mkdir()
    (tmp_path / "model" / "code" / "inference.py").write_text("raise SystemExit")
    file = archive(tmp_path / "model", tmp_path / "output" / "model.tar.gz", below)
    (tmp_path / "output" / "training_args.bin").write_text("no model")
    for source in (file, tmp_path / "output"):
        folder, config, weights = videomae_v2.load(str(source))
        assert weights is None and config.num_labels == 3
        assert (folder / "code" / "inference.py").exists()
        assert torch.equal(logits(model_of(source), 4, 32), logits(model, 4, 32))
    (tmp_path / "model" / "model.tar.gz").write_text("beside weights nobody opens this")
    assert videomae_v2.load(str(tmp_path / "model"))[0] == tmp_path / "model"
    for remove, where in at_exit:
        assert where.is_dir()
        remove(where)
        assert not where.exists()
    assert len(at_exit) == 4


def test_an_archive_that_leads_out_or_is_cut_off_is_refused(tmp_path):
    (tmp_path / "evil.pth").write_text("evil")
    file = archive(tmp_path / "evil.pth", tmp_path / "out" / "model.tar.gz", "../../evil.pth")
    with pytest.raises(ValueError, match="model.tar.gz: .*cannot be unpacked: .*outside"):
        videomae_v2.load(str(file))
    whole = archive(TINY, tmp_path / "cut" / "model.tar.gz").read_bytes()
    (tmp_path / "cut" / "model.tar.gz").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="cut: model.tar.gz cannot be unpacked"):
        videomae_v2.load(str(tmp_path / "cut"))
    (tmp_path / "evil.pth").rename(tmp_path / "notes.txt")
    file = archive(tmp_path / "notes.txt", tmp_path / "none" / "model.tar.gz", "a/notes.txt")
    with pytest.raises(ValueError, match="model.tar.gz: no weight files .*holds a, a/notes.txt"):
        videomae_v2.load(str(file))


def test_the_home_folder_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(TINY, tmp_path / "tiny")
    assert videomae_v2.find("~/tiny") == tmp_path / "tiny"
    convert("~/tiny", "~/native")
    assert videomae_v2.load("~/native")[2] is None
    with pytest.raises(FileNotFoundError, match="^~/none: no such file or folder$"):
        videomae_v2.find("~/none")


class Hub:
    """A repository that hands out empty files: only their names matter here."""

    def __init__(self, folder, names):
        self.folder, self.names, self.taken = folder, names, []

    def list_repo_files(self, repo):
        return self.names

    def hf_hub_download(self, repo, file):
        return str(self.take(file))

    def snapshot_download(self, repo, allow_patterns, ignore_patterns):
        chosen = huggingface_hub.utils.filter_repo_objects(
            self.names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for file in chosen:
            self.take(file)
        return str(self.folder)

    def take(self, file):
        self.taken.append(file)
        (self.folder / file).parent.mkdir(exist_ok=True)
        (self.folder / file).touch()
        return self.folder / file


CONFIG = "config.json"


@pytest.mark.parametrize(
    "source, names, taken",
    [
        ("o/n", [CONFIG, "model.safetensors", "pytorch_model.bin", "a.py", "x/model.safetensors"],
         {CONFIG, "model.safetensors"}),
        ("o/n", [CONFIG, "pytorch_model.bin", "training_args.bin"], {CONFIG, "pytorch_model.bin"}),
        ("o/n", ["README.md", "distill/vit.pth"], {"distill/vit.pth"}),
        ("o/n/distill/a.pth", ["distill/a.pth", "distill/b.pth", CONFIG], {"distill/a.pth"}),
    ],
)  # fmt: skip
def test_what_is_fetched_from_the_hub(tmp_path, monkeypatch, source, names, taken):
    hub = Hub(tmp_path, names)
    for function in ("list_repo_files", "hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, function, getattr(hub, function))
    path = videomae_v2.find(source)
    assert set(hub.taken) == taken
    assert path == (tmp_path if CONFIG in taken else tmp_path / taken.pop())


def test_several_files_on_the_hub_are_named(tmp_path, monkeypatch):
    hub = Hub(tmp_path, ["README.md", "distill/vit_s.pth", "distill/vit_b.pth"])
    for function in ("list_repo_files", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, function, getattr(hub, function))
    with pytest.raises(ValueError, match="o/n: name one weight file.* distill/vit_s.pth, distill"):
        videomae_v2.load("o/n")
    assert hub.taken == []


@pytest.mark.parametrize("source", ["nobody/gated", "nobody/gated/vit.pth"])
def test_a_hub_that_does_not_answer_is_one_clear_error(source):
    with pytest.raises(RuntimeError, match=f"^{source}: not a local path.*gated and HF_TOKEN set"):
        videomae_v2.load(source)


# ---- Refusals


def changed(change):
    """A maker of TINY's folder with other weights."""

    def make(folder):
        shutil.copytree(TINY, folder, dirs_exist_ok=True)
        weights = load_file(TINY / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")
        return folder

    return make


def lora_adapter(folder):
    key = "base_model.model.videomae.encoder.layer.0.attention.attention.query.lora_A.weight"
    save_file({key: torch.zeros(8, 64)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    return folder


def two_pth(folder):
    for name in ("a.pth", "b.pth"):
        save_pth(small_vit(size=32).state_dict(), folder / name)
    return folder


def without_weights(folder):
    (folder / "notes.txt").write_text("")
    (folder / "checkpoint-1").mkdir()
    torch.save({}, folder / "optimizer.pt")
    return folder


def a_list(folder):
    return save_pth([torch.ones(2)], folder / "list.pth")


def numbered(folder):
    return save_pth({0: torch.ones(2)}, folder / "numbered.pth")


def without_tensors(folder):
    return save_pth({"epoch": 1, "path": "x"}, folder / "log.pth")


def lfs_pointer(folder):
    (folder / "vit.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    return folder / "vit.pth"


def cut_off(name):
    def make(folder):
        if name.endswith(".pth"):
            save_pth(small_vit(size=32).state_dict(), folder / name)
        else:
            shutil.copy(TINY / name, folder)
        os.truncate(folder / name, (folder / name).stat().st_size // 2)
        return folder / name

    return make


def damaged_config(folder):
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text("{")
    return folder


def of_other_model(kind, key):
    def make(folder):
        save_file({key: torch.ones(2)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        return folder

    return make


def an_image_model(folder):
    """Names like VideoMAE's, but patches of images."""
    state = VideoMAEModel(native_model().config).state_dict()
    state["embeddings.patch_embeddings.projection.weight"] = torch.ones(32, 3, 8, 8)
    return save_pth(state, folder / "vit.pth")


def other_width(folder):
    model = native_model()
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def twice(folder):
    state = small_vit(size=32).state_dict()
    both = {f"{prefix}.{k}": v for prefix in ("model", "backbone") for k, v in state.items()}
    return save_pth(both, folder / "both.pth")


@pytest.mark.parametrize(
    "make, message",
    [
        (changed(lambda w: w.pop("model.blocks.1.mlp.fc2.bias")),
         "missing: .*layer.1.output.dense.bias"),
        (changed(lambda w: w.pop("model.blocks.0.attn.q_bias")), "missing: .*layer.0.*q_bias"),
        (changed(lambda w: w.pop("model.blocks.0.mlp.fc1.bias")), "missing: .*intermediate"),
        (changed(lambda w: w.update({"model.blocks.0.ls1": torch.ones(1)})), r"unexpected: .*ls1"),
        (other_width, r"unexpected: .*layer.0.intermediate.dense.bias \[64\]"),
        (twice, "both.pth: two models in one file"),
        (of_other_model("bert", "bert.pooler.weight"), "not a VideoMAE .*begins with bert.pooler"),
        (of_other_model("timesformer", "timesformer.embeddings.cls_token"), "begins with timesf"),
        (of_other_model("vivit", "vivit.embeddings.cls_token"), "begins with vivit"),
        (an_image_model, "vit.pth: not a VideoMAE checkpoint"),
        (lora_adapter, "a LoRA adapter, .*Merge it first.*or name its base model"),
        (two_pth, "2 weight files .*name one file.*holds a.pth, b.pth"),
        (without_weights, "no weight files .*holds checkpoint-1, notes.txt, optimizer.pt"),
        (a_list, "list.pth: not a state dict, but a list"),
        (numbered, "numbered.pth: not a VideoMAE checkpoint .*begins with 0"),
        (without_tensors, "log.pth: not a state dict, but a dict of epoch, path"),
        (lfs_pointer, "vit.pth: damaged, or no .*begins with b'version https://git-lfs.*lfs pull"),
        (cut_off("vit.pth"), "vit.pth: damaged, or no checkpoint"),
        (cut_off("model.safetensors"), "model.safetensors: damaged, or no checkpoint"),
        (damaged_config, "config.json.* is not a valid JSON file"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_was_found(tmp_path, make, message):
    source = make(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as failure:
        videomae_v2.load(str(source))
    assert str(tmp_path) in str(failure.value) and "\n" not in str(failure.value)


class Evil:
    """Its pickle makes a file on loading."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("where", ["model", "args"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, where):
    evil = Evil(tmp_path / "mark")
    args = argparse.Namespace(aa=evil if where == "args" else None)
    model = evil if where == "model" else small_vit(size=32).state_dict()
    save_pth({"model": model, "args": args}, tmp_path / "evil.pth")
    message = r"evil.pth: refused, since it holds more than tensors \(posix.mkdir\)"
    with pytest.raises(ValueError, match=message):
        videomae_v2.load(str(tmp_path / "evil.pth"))
    with pytest.raises(ValueError, match=message):
        videomae_v2.load(str(tmp_path))
    assert not (tmp_path / "mark").exists()


def test_learned_positions_are_refused_and_the_fixed_table_is_known(tmp_path):
    vit = small_vit(size=224, frames=16, depth=1)
    file = tmp_path / "v.pth"
    save_pth(vit.state_dict() | {"pos_embed": vit.positions}, file)
    assert not any("position" in name for name in videomae_v2.load(str(file))[2])
    for positions in (torch.randn_like(vit.positions), vit.positions[:, :8]):
        save_pth(vit.state_dict() | {"pos_embed": positions}, file)
        with pytest.raises(ValueError, match="unexpected: pos_embed .learned"):
            videomae_v2.load(str(file))


def test_self_supervised_checkpoints_lose_their_decoder_only(tmp_path):
    model = native_model(VideoMAEForPreTraining, use_mean_pooling=False, decoder_hidden_size=12,
                         decoder_num_hidden_layers=1, decoder_num_attention_heads=2)  # fmt: skip
    model.config.save_pretrained(tmp_path)
    save_pth(model.state_dict(), tmp_path / "pytorch_model.bin")
    weights = videomae_v2.load(str(tmp_path))[2]
    assert not [name for name in weights if not name.startswith("videomae.")]
    attention = model_of(tmp_path).videomae.encoder.layer[1].attention.attention
    assert torch.equal(attention.query.bias, model.state_dict()[f"{ATTENTION}.query.bias"])
