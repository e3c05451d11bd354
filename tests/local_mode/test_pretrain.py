"""The tiny checkpoint of local mode, and the script that made it."""

import json

import pytest
import torch
from local_mode import clips, pretrain
from safetensors.torch import load_file
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

CONFIG = json.loads((pretrain.FOLDER / "config.json").read_text())
SMALL = {"count": 4, "held_out": 2, "epochs": 1, "batch": 2, "width": 8, "depth": 1, "heads": 2}


def version_1(weights):
    """transformers' names for VideoMAE-v2's weights; written anew, so that it checks the other."""
    state = {}
    for name, value in weights.items():
        name = name.removeprefix("model.")
        if name.startswith("patch_embed.proj."):
            name = "videomae.embeddings.patch_embeddings.projection." + name.rsplit(".", 1)[1]
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            name = f"videomae.encoder.layer.{number}." + {
                "norm1": "layernorm_before", "norm2": "layernorm_after",
                "attn.proj": "attention.output.dense", "attn.qkv": "qkv",
                "attn": "attention.attention", "mlp.fc1": "intermediate.dense",
                "mlp.fc2": "output.dense",
            }[rest.rsplit(".", 1)[0]] + "." + rest.rsplit(".", 1)[1]  # fmt: skip
        name = name.replace(".q_bias", ".query.bias").replace(".v_bias", ".value.bias")
        if name.endswith(".qkv.weight"):
            width = value.shape[1]
            block = name.replace("qkv.weight", "attention.attention.")
            for i, part in enumerate(("query", "key", "value")):
                state[f"{block}{part}.weight"] = value[i * width : (i + 1) * width]
        else:
            state[name] = value
    return state


def test_raising_hand_is_not_among_the_actions():
    assert clips.POSITIVE not in pretrain.ACTIONS
    assert set(clips.NEGATIVE_ACTIONS) < set(pretrain.ACTIONS) < set(clips.ACTIONS)


def test_no_person_is_in_the_clips_to_fine_tune_on(monkeypatch):
    seen, drawn = set(), clips.draw_clip

    def spy(*args):
        seen.add(args[-1])
        return drawn(*args)

    monkeypatch.setattr(clips, "draw_clip", spy)
    pretrain.draw(8, 0, "pretraining")
    pretrain.draw(8, 0, "pretraining-held-out")
    assert len(seen) == 4
    rows = clips.plan({"train": 320, "validation": 80, "test": 120}, 96, seed=0)
    assert not seen & {clips.appearance(*row["person"]) for row in rows}


def test_the_checkpoint_is_small_and_has_the_names_of_the_hub():
    assert (pretrain.FOLDER / "model.safetensors").stat().st_size < 2_000_000
    weights, sizes = load_file(pretrain.FOLDER / "model.safetensors"), CONFIG["model_config"]
    width, depth = sizes["embed_dim"], sizes["depth"]
    block = {
        "norm1.weight": (width,), "norm1.bias": (width,),
        "norm2.weight": (width,), "norm2.bias": (width,),
        "attn.qkv.weight": (3 * width, width), "attn.q_bias": (width,), "attn.v_bias": (width,),
        "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
        "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,),
    }  # fmt: skip
    expected = {f"model.blocks.{i}.{n}": s for i in range(depth) for n, s in block.items()}
    patch, tubelet = sizes["patch_size"], sizes["tubelet_size"]
    expected |= {
        "model.patch_embed.proj.weight": (width, 3, tubelet, patch, patch),
        "model.patch_embed.proj.bias": (width,),
        "model.fc_norm.weight": (width,), "model.fc_norm.bias": (width,),
    }  # fmt: skip
    assert {name: tuple(value.shape) for name, value in weights.items()} == expected
    assert all(value.isfinite().all() and value.std() > 0 for value in weights.values())


def test_the_conversion_loses_nothing(tmp_path):
    torch.manual_seed(0)
    model = pretrain.Pretrainer(16, 2, 4).model.eval()
    for parameter in model.parameters():  # biases begin at 0, where a lost one would not show
        torch.nn.init.normal_(parameter, std=0.2)
    pretrain.save(model, tmp_path)
    sizes = json.loads((tmp_path / "config.json").read_text())["model_config"]
    again = VideoMAEForVideoClassification(VideoMAEConfig(
        image_size=sizes["img_size"], patch_size=sizes["patch_size"],
        num_frames=sizes["num_frames"], tubelet_size=sizes["tubelet_size"],
        hidden_size=sizes["embed_dim"], num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["num_heads"], layer_norm_eps=sizes["layer_norm_eps"],
        intermediate_size=sizes["embed_dim"] * sizes["mlp_ratio"], num_labels=len(pretrain.ACTIONS),
        use_mean_pooling=sizes["use_mean_pooling"], qkv_bias=sizes["qkv_bias"],
    )).eval()  # fmt: skip
    again.fc_norm.eps = sizes["layer_norm_eps"]
    report = again.load_state_dict(version_1(load_file(tmp_path / "model.safetensors")), False)
    assert report.missing_keys == ["classifier.weight", "classifier.bias"]
    assert report.unexpected_keys == []
    again.classifier = model.classifier
    clip = torch.randn(2, pretrain.FRAMES, 3, pretrain.SIZE, pretrain.SIZE)
    with torch.no_grad():
        assert torch.allclose(model(clip).logits, again(clip).logits, atol=1e-5)


def test_two_steps_run_end_to_end_and_are_reproducible(tmp_path, capsys):
    for name in ("a", "b"):
        accuracy = pretrain.pretrain(tmp_path / name, **SMALL)
        assert 0 <= accuracy <= 1
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    assert capsys.readouterr().out.count("epoch  1  loss ") == 2
    pretrain.pretrain(tmp_path / "c", **SMALL, seed=1)
    assert (tmp_path / "c" / "model.safetensors").read_bytes() != files[0]


def test_a_second_round_starts_from_the_weights_of_the_first(tmp_path):
    torch.manual_seed(0)
    first, second = (pretrain.Pretrainer(16, 2, 4).model for _ in range(2))
    for parameter in first.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pretrain.save(first, tmp_path)
    pretrain.load(second, tmp_path)
    for name, value in first.videomae.state_dict().items():
        assert torch.equal(value, second.videomae.state_dict()[name]), name
    assert torch.equal(first.fc_norm.weight, second.fc_norm.weight)


def test_masks_become_shares_of_the_right_tokens():
    side, tokens = pretrain.SIZE + pretrain.BORDER, (8, 8, 8, 2)
    videos = torch.zeros(1, pretrain.FRAMES, 3, side, side, dtype=torch.uint8)
    masks = torch.zeros(1, pretrain.FRAMES, side, side, dtype=torch.uint8)
    edge = pretrain.BORDER // 2
    masks[:, 4:6, edge + 8 : edge + 16, edge + 24 : edge + 32] = 1  # time 2, row 1, column 3
    masks[:, 4:5, edge + 8 : edge + 16, edge + 24 : edge + 32] = 2
    clip, shares = pretrain.crop(videos, masks, train=False)
    assert clip.shape == (1, pretrain.FRAMES, 3, pretrain.SIZE, pretrain.SIZE)
    shares = shares.view(1, *tokens)
    assert shares[0, 2, 1, 3].tolist() == [0.5, 1.0]
    assert shares.sum() == pytest.approx(1.5)
