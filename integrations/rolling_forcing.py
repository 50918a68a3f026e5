"""Rolling Forcing (arXiv:2509.25161): the attention interface of Wan, called with several chunks at once.

Facts: a call has up to five chunks, each at its own noise level, and the next call begins one chunk later.
The first chunk gets a clean pass of its own, with `updating_cache`; only this pass writes the cache, and a
full cache is rolled, keeping its first chunk. Sizes in tokens are attributes of the attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from headforcing.adapters.wan import CALL
from headforcing.adapters.wan_counted import CountingWan
from headforcing.errors import OptionError
from headforcing.roles import HeadRole
from headforcing.roles.rolling_forcing import Rolling
from headforcing.types import AttentionCall, Phase


class RollingForcing(CountingWan):
    """`CausalWanSelfAttention` with an argument that says when to write the cache.

    Args:
        chunks: number of chunks denoised at once, which equals the number of denoising steps.
    """

    name = "rolling_forcing"
    forward = (*CALL, "cache_start", "updating_cache")
    numbers = ("num_heads", "head_dim", "frame_length", "block_length", "max_attention_size")
    rolls = True
    verified = {"9a6bb82e34bffb1a": "adjoining"}  # a1477d0, and long_video of Causal Forcing 1fc7bbc

    def __init__(self, chunks: int = 5) -> None:
        super().__init__()
        self.chunks = chunks

    def window(self, model: nn.Module) -> int:
        """The largest number of frames that the attention attends to."""
        _, module = next(self.attentions(model))
        return int(module.max_attention_size) // int(module.frame_length)  # type: ignore[arg-type]

    def own_role(self, module: nn.Module) -> HeadRole:
        """The last frames that are attended to, and the first chunk."""
        frame = int(module.frame_length)  # type: ignore[arg-type]
        sizes = (module.max_attention_size, module.block_length)
        return Rolling(*(int(size) // frame for size in sizes))  # type: ignore[arg-type]

    def chunk(self, model: nn.Module) -> int:
        """Frames that are denoised at once."""
        return self.chunks * super().chunk(model)

    def step(self, chunk: int) -> int:
        """Frames of one chunk.

        Raises:
            OptionError: `chunk` is not a multiple of the number of chunks.
        """
        if chunk % self.chunks:
            raise OptionError(
                f"chunk is {chunk}: expected the frames of all {self.chunks} chunks denoised at once; for "
                "another number of them pass adapter=RollingForcing(chunks=...)"
            )
        return chunk // self.chunks

    def read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AttentionCall | None:
        """See `Adapter.read`; later chunks of the call come again."""
        call = super().read(module, args, kwargs)
        return None if call is None else dataclasses.replace(call, rolling=True)

    def phase(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Phase:
        """From `updating_cache`, the fifth argument of the model or by name."""
        return "clean" if kwargs.get("updating_cache", len(args) > 4 and args[4]) else "denoise"

    def written(self, module: nn.Module, call: AttentionCall) -> int:
        """The tokens of the first chunk."""
        frames = int(module.block_length) // int(module.frame_length)  # type: ignore[arg-type]
        return frames * call.tokens_per_frame


ADAPTER = RollingForcing()
