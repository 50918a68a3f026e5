"""Brook: a small autoregressive video model, as another group might write it."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLEAN = 0.02
"""The noise level of the pass that remembers a finished chunk."""


@dataclass
class LayerMemory:
    """What a layer remembers of the past: one entry per frame, the oldest dropped."""

    max_frames: int = 4
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def remember(self, k: Tensor, v: Tensor, frames: int) -> None:
        """Appends the frames of a chunk `[B, H, L, D]`."""
        self.keys = [*self.keys, *k.chunk(frames, dim=2)][-self.max_frames :]
        self.values = [*self.values, *v.chunk(frames, dim=2)][-self.max_frames :]

    def clear(self) -> None:
        self.keys, self.values = [], []


class AxialRotary(nn.Module):
    """Rotates channel `i` with channel `i + dim / 2`; half of the pairs turn with time."""

    def __init__(self, dim: int, theta: float = 1000.0):
        super().__init__()
        self.split, self.theta = (dim // 4, dim // 8, dim // 8), theta

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x [B, H, L, D]` at `positions [L, 3]` of time, height and width."""
        rates = [self.theta ** (-torch.arange(n, dtype=torch.float64) / n) for n in self.split]
        angles = torch.cat([positions[:, i : i + 1].double() * r for i, r in enumerate(rates)], dim=-1)
        cos, sin = (torch.cat([table, table], dim=-1).to(x) for table in (angles.cos(), angles.sin()))
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-high, low], dim=-1) * sin


def grid_positions(frame_index: int, frames: int, frame_shape: tuple[int, int]) -> Tensor:
    ranges = (frame_index, frame_index + frames), (0, frame_shape[0]), (0, frame_shape[1])
    return torch.cartesian_prod(*(torch.arange(*ends) for ends in ranges))


class MemoryAttention(nn.Module):
    """Self-attention over the remembered frames and the current chunk."""

    def __init__(self, width: int, num_heads: int, chunk_frames: int):
        super().__init__()
        self.num_heads, self.chunk_frames = num_heads, chunk_frames
        self.to_qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = nn.RMSNorm(width // num_heads), nn.RMSNorm(width // num_heads)
        self.rotary = AxialRotary(width // num_heads)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden, positions=None, memory=None, frame_index=0, frame_shape=(1, 1), remember=False):
        frames = hidden.shape[1] // math.prod(frame_shape)
        positions = grid_positions(frame_index, frames, frame_shape) if positions is None else positions
        qkv = self.to_qkv(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = (self.rotary(norm(x), positions) for norm, x in ((self.norm_q, q), (self.norm_k, k)))
        mask, keys, values = None, k, v
        if memory is None:
            chunks = (positions[:, 0] - positions[0, 0]) // self.chunk_frames
            mask = chunks[:, None] >= chunks[None, :]
        else:
            keys, values = torch.cat([*memory.keys, k], 2), torch.cat([*memory.values, v], 2)
            if remember:
                memory.remember(k, v, frames)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class PromptAttention(nn.Module):
    """Cross-attention that projects the prompt once and keeps it."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads, self.kept = num_heads, None  # forgotten where a video begins
        self.to_q, self.to_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden, prompt, keep=True):
        kv = self.kept if keep and self.kept is not None else self.heads(self.to_kv(prompt)).chunk(2, dim=-1)
        if keep:
            self.kept = kv
        out = F.scaled_dot_product_attention(self.heads(self.to_q(hidden)), *kv)
        return self.proj(out.transpose(1, 2).flatten(2))

    def heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class BrookLayer(nn.Module):
    def __init__(self, width: int, num_heads: int, chunk_frames: int):
        super().__init__()
        self.mixer = MemoryAttention(width, num_heads, chunk_frames)
        self.prompt_mixer = PromptAttention(width, num_heads)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, hidden, noise, prompt, memory, frame_index, frame_shape, remember):
        x = self.norms[0](hidden) + noise
        hidden = hidden + self.mixer(x, None, memory, frame_index, frame_shape, remember=remember)
        hidden = hidden + self.prompt_mixer(self.norms[1](hidden), prompt, keep=memory is not None)
        return hidden + self.feed(self.norms[2](hidden) + noise)


class Brook(nn.Module):
    """Denoises `video [B, F, C, h, w]`, two frames at a time, trained on six."""

    def __init__(self, width=32, num_heads=2, depth=2, channels=4, chunk_frames=2, train_frames=6):
        super().__init__()
        self.chunk_frames, self.train_frames = chunk_frames, train_frames
        self.embed, self.unembed = nn.Linear(channels, width), nn.Linear(width, channels)
        self.noise_embed = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(BrookLayer(width, num_heads, chunk_frames) for _ in range(depth))

    def new_memory(self):
        for layer in self.layers:
            layer.prompt_mixer.kept = None
        return [LayerMemory(self.train_frames - self.chunk_frames) for _ in self.layers]

    def forward(self, video, noise_level, prompt, memories=None, frame_index=0, remember=False):
        frames, (h, w) = video.shape[1], video.shape[-2:]
        hidden = self.embed(video.permute(0, 1, 3, 4, 2).flatten(1, 3))
        noise = self.noise_embed(noise_level[:, None])[:, None]
        for layer, memory in zip(self.layers, memories or [None] * len(self.layers), strict=True):
            hidden = layer(hidden, noise, prompt, memory, frame_index, (h, w), remember)
        return self.unembed(hidden).unflatten(1, (frames, h, w)).permute(0, 1, 4, 2, 3)


@torch.no_grad()
def generate(model: Brook, noise: Tensor, prompt: Tensor, levels=(1.0, 0.5)) -> Tensor:
    """A video from `noise [B, F, C, h, w]`: for every chunk two noisy passes, and one that remembers."""
    memories, video = model.new_memory(), []
    for start in range(0, noise.shape[1], model.chunk_frames):
        x = noise[:, start : start + model.chunk_frames]
        for level in levels:
            x = x - level * model(x, x.new_full((len(x),), level), prompt, memories, start)
        model(x, x.new_full((len(x),), CLEAN), prompt, memories, start, remember=True)
        video.append(x)
    return torch.cat(video, dim=1)
