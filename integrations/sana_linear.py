"""SANA-Video, and stage 1 of SANA-WM: linear attention over the whole video at once.

Facts: attention sums all frames into one state per head (in SANA-WM by a gated recurrence in both directions,
with some softmax layers in between); a call has all frames and no cache.
"""

from __future__ import annotations

from torch import nn

from headforcing.adapters.base import parameter_names

VIDEO = (
    *("hidden_states", "encoder_hidden_states", "timestep", "guidance", "encoder_attention_mask"),
    *("attention_mask", "attention_kwargs", "controlnet_block_samples", "return_dict"),
)
WORLD = {"chunk_plucker", "cam_pos_embeds", "raymats", "frame_valid_mask"}


def refuse(model: nn.Module) -> str | None:
    """Why a transformer with linear attention is not supported."""
    for module in model.modules():
        if _is_video(module) or _is_world(module):
            return (
                "its attention is linear: all frames are summed into one state per head, so there are no "
                "keys and values of single frames that a head could store or evict, and all frames are in "
                "every call. Stage 2 of SANA-WM has a KV cache: apply to the refiner's transformer"
            )
    return None


def _is_video(module: nn.Module) -> bool:
    if not module._modules.keys() >= {"patch_embedding", "rope", "transformer_blocks"}:
        return False
    feeds = [getattr(block, "ff", None) for block in module.get_submodule("transformer_blocks").children()]
    temporal = bool(feeds) and all(isinstance(getattr(ff, "conv_temp", None), nn.Conv2d) for ff in feeds)
    return temporal and parameter_names(module) == VIDEO


def _is_world(module: nn.Module) -> bool:
    parts = {"x_embedder", "raymap_embedder", "blocks"}
    return module._modules.keys() >= parts and {*parameter_names(module)} >= WORLD
