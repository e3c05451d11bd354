"""Made the checkpoint in tiny_videomae_v2: a VideoMAE-v2 small enough for a laptop's processor.

    python notebooks/local_mode/pretrain.py

It learns to tell drawn actions apart; `raising_hand` is not among them, and its persons appear
in no clip of `write_clips`. A label alone teaches so small a network nothing for a long time, so
each token also says how much of its patch is body and how much is a raised arm (from the masks).
As in VideoMAE's own pre-training, a step sees a random part of the tokens, which is also faster.

Four rounds, each with new clips and new heads: about 40 minutes of one processor core, 1.5 GB of
memory. One thread: a second run on the same machine and versions gives the same file.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

try:
    from . import clips
except ImportError:  # run as a script
    import clips

ACTIONS = (*clips.NEGATIVE_ACTIONS, *clips.OTHER_ACTIONS)  # all but raising_hand
FOLDER = Path(__file__).parent / "tiny_videomae_v2"
ROUNDS = [(2600, 28), (1600, 16), (3000, 26), (3000, 22)]  # clips, epochs
SIZE, FRAMES, PATCH, TUBELET, BORDER = 64, 16, 8, 2, 4
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 1, 3, 1, 1)
VERSION_2_NAMES = {
    "videomae.embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "videomae.encoder.layer.": "blocks.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "attention.output.dense.": "attn.proj.",
    "attention.attention.": "attn.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}


def draw(count, seed, split):
    """Draw `count` clips, the actions in turn.

    Returns uint8 [count, FRAMES, 3, side, side] with side = SIZE + BORDER, the masks
    uint8 [count, FRAMES, side, side], and the number of each action, int64 [count].
    """
    side, rng = SIZE + BORDER, np.random.default_rng([seed, count])
    videos = torch.empty(count, FRAMES, 3, side, side, dtype=torch.uint8)
    masks = torch.empty(count, FRAMES, side, side, dtype=torch.uint8)
    labels = torch.arange(count) % len(ACTIONS)
    for i in tqdm(range(count), desc=f"drawing {split}", unit="clip"):
        person = clips.appearance(seed, split, i // clips.CLIPS_PER_PERSON)
        length, drawn = int(rng.integers(18, 61)), int(rng.integers(side, 97))
        video, mask = clips.draw_clip(ACTIONS[labels[i]], [seed, len(split), i], drawn, drawn,
                                      length, person)  # fmt: skip
        # One frame out of each of FRAMES equal parts of the clip, as in fine-tuning.
        picks = (np.arange(FRAMES) + rng.random(FRAMES)) * length / FRAMES
        video, mask = (torch.from_numpy(a[picks.astype(int)]) for a in (video, mask))
        small = F.interpolate(video.permute(0, 3, 1, 2), (side, side), mode="bilinear",
                              antialias=True)  # fmt: skip
        videos[i] = small
        masks[i] = F.interpolate(mask[:, None], (side, side), mode="nearest")[:, 0]
    return videos, masks, labels


def crop(videos, masks, train, generator=None):
    """Normalised clips, float32, and the share of raised arm and of body in each patch.

    Shares: [batch, tokens, 2]. In training the place of the crop, its side and its light vary.
    """
    half, size = BORDER // 2, len(videos)
    if train:
        pieces = []
        for video, mask in zip(videos, masks, strict=True):
            y, x, flip = torch.randint(0, BORDER + 1, (3,), generator=generator).tolist()
            piece = video[..., y : y + SIZE, x : x + SIZE], mask[:, y : y + SIZE, x : x + SIZE]
            pieces.append([p.flip(-1) for p in piece] if flip % 2 else piece)
        videos, masks = (torch.stack(p) for p in zip(*pieces, strict=True))
    else:
        videos = videos[..., half : half + SIZE, half : half + SIZE]
        masks = masks[..., half : half + SIZE, half : half + SIZE]
    light = videos.float() / 255
    if train:
        gain = 0.8 + 0.4 * torch.rand(size, 1, 3, 1, 1, generator=generator)
        light = light * gain + 0.2 * torch.rand(size, 1, 1, 1, 1, generator=generator) - 0.1
    shares = torch.stack([masks == 2, masks > 0], 1).float()
    shares = F.avg_pool3d(shares, (TUBELET, PATCH, PATCH)).flatten(2).transpose(1, 2)
    return (light - MEAN) / STD, shares


class Pretrainer(nn.Module):
    """VideoMAE with a head for the actions and one for what each token shows."""

    def __init__(self, width, depth, heads):
        super().__init__()
        config = VideoMAEConfig(
            image_size=SIZE, patch_size=PATCH, num_frames=FRAMES, tubelet_size=TUBELET,
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
            intermediate_size=4 * width, num_labels=len(ACTIONS), layer_norm_eps=1e-6,
            use_mean_pooling=True, attn_implementation="sdpa",
        )  # fmt: skip
        self.model = VideoMAEForVideoClassification(config)
        self.model.fc_norm.eps = 1e-6  # transformers leaves it at 1e-5
        self.shares = nn.Linear(width, 2)

    def forward(self, clip, hidden=None):
        tokens = self.model.videomae(clip, bool_masked_pos=hidden).last_hidden_state
        return self.model.classifier(self.model.fc_norm(tokens.mean(1))), self.shares(tokens)


def version_2(state):
    """The backbone's weights under the names of VideoMAE-v2's own code, as on the Hub."""
    weights = {}
    for name, value in state.items():
        for ours, theirs in VERSION_2_NAMES.items():
            name = name.replace(ours, theirs)
        weights[name] = value
    renamed = {name: value for name, value in weights.items() if "classifier" not in name}
    for name in [n for n in renamed if n.endswith("attn.query.weight")]:
        block = name.removesuffix("query.weight")
        parts = [renamed.pop(f"{block}{part}.weight") for part in ("query", "key", "value")]
        renamed[f"{block}qkv.weight"] = torch.cat(parts)
        renamed[f"{block}q_bias"] = renamed.pop(f"{block}query.bias")
        renamed[f"{block}v_bias"] = renamed.pop(f"{block}value.bias")
    return {f"model.{name}": value.contiguous() for name, value in renamed.items()}


def load(model, folder):
    """Fill `model` with the backbone in `folder`; the head stays as it is."""
    saved, state = load_file(Path(folder) / "model.safetensors"), model.state_dict()
    for name in state:  # each weight is found under its name of version 2
        theirs = f"model.{name}"
        for ours, other in VERSION_2_NAMES.items():
            theirs = theirs.replace(ours, other)
        block, _, part = theirs.rpartition("attn.")
        if part in ("query.weight", "key.weight", "value.weight"):
            i = ("query.weight", "key.weight", "value.weight").index(part)
            state[name] = saved[f"{block}attn.qkv.weight"].chunk(3)[i]
        elif part in ("query.bias", "value.bias"):
            state[name] = saved[f"{block}attn.{part[0]}_bias"]
        elif not name.startswith("classifier."):
            state[name] = saved[theirs]
    model.load_state_dict(state)


def save(model, folder):
    """Write model.safetensors and config.json as a VideoMAE-v2 repository on the Hub has them."""
    folder, config = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    save_file(version_2(model.state_dict()), folder / "model.safetensors")
    name = "VideoMAEv2_Tiny"
    model_config = {
        "img_size": SIZE, "patch_size": PATCH, "in_chans": 3, "num_classes": 0,
        "embed_dim": config.hidden_size, "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads, "mlp_ratio": 4, "qkv_bias": True,
        "qk_scale": None, "drop_rate": 0.0, "attn_drop_rate": 0.0, "drop_path_rate": 0.0,
        "norm_layer": "nn.LayerNorm", "layer_norm_eps": 1e-6, "init_values": 0.0,
        "use_learnable_pos_emb": False, "tubelet_size": TUBELET, "use_mean_pooling": True,
        "with_cp": False, "num_frames": FRAMES, "cos_attn": False,
    }  # fmt: skip
    content = {"model_type": name, "architectures": [name], "model_config": model_config}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


@torch.no_grad()
def evaluate(trainer, videos, masks, labels):
    """The share of clips whose action is named correctly."""
    trainer.eval()
    hits = 0
    for rows in torch.arange(len(labels)).split(32):
        clip, _ = crop(videos[rows], masks[rows], train=False)
        hits += int((trainer(clip)[0].argmax(1) == labels[rows]).sum())
    return hits / len(labels)


def pretrain(folder=FOLDER, count=2600, held_out=260, epochs=28, batch=16, rate=2e-3, keep=0.5,
             share_weight=5.0, width=64, depth=3, heads=4, seed=0,
             start=None):  # fmt: skip
    """Pre-train on `count` drawn clips and write the backbone. Returns the held-out accuracy.

    rate: the peak of the one-cycle schedule. keep: the share of the tokens that a training step
    sees. share_weight: of the loss per token. start: a folder with a backbone to go on with.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    dice = torch.Generator().manual_seed(seed)
    videos, masks, labels = draw(count, seed, "pretraining")
    test = draw(held_out, seed, "pretraining-held-out")
    trainer = Pretrainer(width, depth, heads)
    if start is not None:
        load(trainer.model, start)
    optimizer = torch.optim.AdamW(trainer.parameters(), rate, weight_decay=0.05)
    steps = epochs * -(-count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    tokens, started = FRAMES // TUBELET * (SIZE // PATCH) ** 2, time.process_time()
    for epoch in range(1, epochs + 1):
        trainer.train()
        total = hits = 0
        for rows in torch.randperm(count, generator=dice).split(batch):
            clip, shares = crop(videos[rows], masks[rows], True, dice)
            order = torch.rand(len(rows), tokens, generator=dice).argsort(1)
            hidden = order >= keep * tokens
            scores, seen = trainer(clip, hidden)
            loss = F.cross_entropy(scores, labels[rows])
            wanted = shares[~hidden].view_as(seen)
            loss = loss + share_weight * 2 * F.binary_cross_entropy_with_logits(seen, wanted)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
            hits += int((scores.argmax(1) == labels[rows]).sum())
        accuracy = evaluate(trainer, *test)
        spent = time.process_time() - started
        print(f"epoch {epoch:2d}  loss {total / count:.3f}  accuracy {hits / count:.3f}  "
              f"held out {accuracy:.3f}  {spent:.0f} CPU s", flush=True)  # fmt: skip
        save(trainer.model, folder)
    return accuracy


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=str(FOLDER), help="where the checkpoint goes")
    folder = parser.parse_args().folder
    for seed, (count, epochs) in enumerate(ROUNDS):
        pretrain(folder, count, epochs=epochs, seed=seed, start=folder if seed else None)


if __name__ == "__main__":
    main()
