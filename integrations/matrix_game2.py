"""Matrix-Game 2 in FastVideo: attention as in FastVideo's causal Wan, with a RoPE table of its own.

Facts (2f3d40740): the table is made at the first call and is Wan's; the grid comes as three numbers. A full
cache is always rolled; without `local_attn_size`, 15 frames are attended to. Mouse and keyboard have
attention and caches of their own, which stay as they are.
"""

from __future__ import annotations

from headforcing.adapters.wan_given import GIVEN, GivenWan


class MatrixGame2(GivenWan):
    """`CausalMatrixGame2SelfAttention`."""

    name = "matrix_game2"
    forward = (
        *(*GIVEN, "freqs_cis", "block_mask", "grid_sizes"),
        *("kv_cache", "current_start", "cache_start"),
    )
    rope, grid, rolls, untold_window = None, "grid_sizes", True, 15
    verified = {"2d03158c65253a91": "absolute"}  # 2f3d40740, with either policy


ADAPTER = MatrixGame2()
