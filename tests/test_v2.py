"""Published VideoMAE-v2 checkpoints: conversion, against an independent ViT (v2_vit.py)."""

import json

import pytest
import torch
import train
from safetensors.torch import save_file
from v2_vit import V2ViT, sine_cosine_table

# width, depth, heads, MLP, patch of the published sizes (arXiv:2303.16727, table of architectures)
SIZES = {
    "S": (384, 12, 6, 1536, 16),
    "B": (768, 12, 12, 3072, 16),
    "L": (1024, 24, 16, 4096, 16),
    "H": (1280, 32, 16, 5120, 16),
    "g": (1408, 40, 16, 6144, 14),
}


def random_vit(width, depth, heads, hidden, patch, size, frames=4):
    torch.manual_seed(0)
    vit = V2ViT(width, depth, heads, hidden, patch, frames, size, classes=3)
    for name, parameter in vit.named_parameters():
        if parameter.ndim == 1:  # zero or one at birth: a lost one would go unnoticed
            torch.nn.init.normal_(parameter, float("norm" in name and "weight" in name), 0.1)
    return vit.eval()


def logits_of(model, vit, video):
    """Of the converted backbone under the original's head."""
    model.classifier.load_state_dict(vit.head.state_dict())
    with torch.no_grad():
        return model.eval()(pixel_values=video.transpose(1, 2)).logits, vit(video)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_logits_equal_those_of_an_independent_implementation(name, form, tmp_path):
    """Real widths, heads, MLPs and patches; two blocks, since all blocks of a size are alike."""
    width, _, heads, hidden, patch = SIZES[name]
    vit = random_vit(width, 2, heads, hidden, patch, size=2 * patch)
    if form == "pth":  # as the distilled and fine-tuned ones: wrapped, without a configuration
        file = tmp_path / "vit.pth"
        torch.save({"module": vit.state_dict()}, file)
        image = 224
    else:  # as OpenGVLab/VideoMAEv2-*: prefixed, with the remote code's configuration
        state = {f"model.{k}": v.contiguous() for k, v in vit.state_dict().items()}
        save_file({k: v for k, v in state.items() if ".head." not in k}, tmp_path / "m.safetensors")
        sizes = {"img_size": 2 * patch, "num_frames": 4, "num_heads": heads}
        config = {"model_type": "VideoMAEv2_Base", "model_config": sizes}
        (tmp_path / "config.json").write_text(json.dumps(config))
        file, image = tmp_path, 2 * patch
    model, _ = train.load_model(str(file), ["a", "b", "c"])
    config = model.config
    assert (config.hidden_size, config.num_attention_heads) == (width, heads)
    assert (config.intermediate_size, config.patch_size, config.image_size) == (
        hidden,
        patch,
        image,
    )
    frames = config.num_frames
    if form == "pth":  # 16 x 224 x 224, as published: a full-size clip
        vit.positions = sine_cosine_table(frames // 2 * (image // patch) ** 2, width)
    video = torch.randn(1, 3, frames, image, image, generator=torch.Generator().manual_seed(1))
    converted, original = logits_of(model, vit, video)
    torch.testing.assert_close(converted, original, atol=1e-4, rtol=0)
    assert original.abs().max() > 0.1  # not a comparison of zeros


def test_the_giant_in_its_full_depth():
    """40 blocks, patch 14: the names and the number of blocks, at a width that fits a test."""
    vit = random_vit(32, 40, 16, 96, 14, size=28)
    weights = train.videomae_weights(vit.state_dict())
    config = train.v2_config(weights, {"num_heads": 16, "img_size": 28, "num_frames": 4})
    assert (config.num_hidden_layers, config.patch_size) == (40, 14)
    config.num_labels, config.use_mean_pooling = 3, True
    model = train.VideoMAEForVideoClassification(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert sorted(missing) == ["classifier.bias", "classifier.weight"] and not unexpected
    video = torch.randn(2, 3, 4, 28, 28, generator=torch.Generator().manual_seed(1))
    converted, original = logits_of(model, vit, video)
    torch.testing.assert_close(converted, original, atol=1e-4, rtol=0)


def test_check_tells_the_fate_of_each_key(tmp_path, capsys):
    state = random_vit(64, 1, 1, 64, 8, size=16).state_dict()
    extra = {"decoder.blocks.0.norm1.bias": torch.zeros(4), "mask_token": torch.zeros(1, 1, 4)}
    torch.save({"model": {f"encoder.{k}": v for k, v in state.items()} | extra}, tmp_path / "v.pth")
    train.main(["--check", "--model_name", str(tmp_path / "v.pth")])
    lines = capsys.readouterr().out.splitlines()
    fates = dict(line.split(" -> ") for line in lines if " -> " in line)
    assert len(fates) == len(state) + 2
    at = "videomae.encoder.layer.0.attention.attention"
    assert fates["encoder.blocks.0.attn.qkv.weight [192, 64]"] == ", ".join(
        f"{at}.{part}.weight" for part in ("query", "key", "value")
    )
    dropped = {key.split()[0] for key, fate in fates.items() if fate.startswith("dropped")}
    assert dropped == {"decoder.blocks.0.norm1.bias", "mask_token", "encoder.head.weight",
                       "encoder.head.bias"}  # fmt: skip
    assert "drawn anew: classifier.weight, classifier.bias" in lines[-2]


def test_learned_positions_are_refused_and_the_fixed_table_is_known(tmp_path):
    vit = random_vit(64, 1, 1, 64, 16, size=224, frames=16)
    for positions, good in ((vit.positions, True), (torch.randn_like(vit.positions), False)):
        torch.save(vit.state_dict() | {"pos_embed": positions}, tmp_path / "v.pth")
        if good:
            train.load_model(str(tmp_path / "v.pth"), ["a", "b"])
        else:
            with pytest.raises(ValueError, match="pos_embed .learned"):
                train.load_model(str(tmp_path / "v.pth"), ["a", "b"])
