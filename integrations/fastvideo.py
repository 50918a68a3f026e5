"""FastVideo's causal Wan: attention that receives queries, keys and values, and rotates with real tables.

Facts: cosines and sines cover the frames of the call, or, with the policy `relativistic`, the slots of the
cache from 0 on. A video begins with new cache dicts, or with zeros in the counters.
"""

from __future__ import annotations

from headforcing.adapters.wan_given import GIVEN, GivenWan


class FastVideo(GivenWan):
    """`CausalWanSelfAttention` that receives projected queries, keys and values."""

    name = "fastvideo"
    forward = (*GIVEN, "freqs_cis", "block_mask", "kv_cache", "current_start", "cache_start", "frame_seqlen")
    frame_tokens = "frame_seqlen"
    verified = {"d00afb4996557fee": "absolute"}  # 2f3d40740, with either policy


ADAPTER = FastVideo()
