"""VideoMAE-v2's fine-tuning ViT in plain torch: an independent measure for `videomae_v2.load`.

Written from the papers (arXiv:2303.16727, arXiv:2203.12602, arXiv:2010.11929) with the names that
the published checkpoints use. It shares no code with transformers.
"""

import torch
from torch import nn


def sine_cosine_table(positions: int, width: int) -> torch.Tensor:
    """Fixed position embeddings [1, positions, width] (arXiv:1706.03762), computed in float64."""
    channel = torch.arange(width, dtype=torch.float64)
    rate = 10_000 ** (-2 * torch.div(channel, 2, rounding_mode="floor") / width)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * rate
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())[None].float()


class PatchEmbed(nn.Module):
    """A tubelet of 2 frames and patch x patch pixels becomes one token, time first."""

    def __init__(self, width, patch, tubelet):
        super().__init__()
        self.proj = nn.Conv3d(3, width, (tubelet, patch, patch), (tubelet, patch, patch))

    def forward(self, video):  # [batch, 3, frames, height, width]
        return self.proj(video).flatten(2).mT


class Attention(nn.Module):
    """Softmax attention, written out; keys have no bias."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = (
            nn.Parameter(torch.zeros(width)),
            nn.Parameter(torch.zeros(width)),
        )
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(3, -1)
        query, value = query + self.q_bias, value + self.v_bias
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)
        )
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width, hidden)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class V2ViT(nn.Module):
    """Logits [batch, classes] of normalised videos [batch, 3, frames, height, width]."""

    def __init__(self, width, depth, heads, hidden, patch, frames, size, classes, tubelet=2):
        super().__init__()
        self.patch_embed = PatchEmbed(width, patch, tubelet)
        self.positions = sine_cosine_table(frames // tubelet * (size // patch) ** 2, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, video):
        x = self.patch_embed(video) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.fc_norm(x.mean(1)))
