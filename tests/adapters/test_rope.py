"""RoPE: the host's rotation inside its table, the same rotation past its end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headforcing.adapters.rope import rotate, rotate_real, temporal_rows

ROWS, HEIGHT, WIDTH = 64, 3, 5


def table(pairs: int = 16, rows: int = ROWS) -> torch.Tensor:
    space = pairs // 3
    parts = []
    for count in (pairs - 2 * space, space, space):
        rate = 1e4 ** (-torch.arange(count, dtype=torch.float64) / count)
        angle = torch.arange(rows, dtype=torch.float64)[:, None] * rate
        parts.append(torch.polar(torch.ones_like(angle), angle))
    return torch.cat(parts, dim=1)


def slowly(x: torch.Tensor, freqs: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """Token by token, pair by pair, with sine and cosine."""
    out = x.double().clone()
    pairs, space = freqs.shape[1], freqs.shape[1] // 3
    time = pairs - 2 * space
    for n, position in enumerate(positions):
        for p in range(HEIGHT * WIDTH):
            for pair in range(pairs):
                where = (position, p // WIDTH, p % WIDTH)[(pair >= time) + (pair >= time + space)]
                count = time if pair < time else space
                exponent = (pair if pair < time else (pair - time) % space) / count
                angle = torch.tensor(where * 1e4**-exponent, dtype=torch.float64)
                a, b = x[:, n, p, :, 2 * pair].double(), x[:, n, p, :, 2 * pair + 1].double()
                out[:, n, p, :, 2 * pair] = a * angle.cos() - b * angle.sin()
                out[:, n, p, :, 2 * pair + 1] = a * angle.sin() + b * angle.cos()
    return out


@pytest.mark.parametrize("pairs", [16, 7, 64])
def test_rotation_is_the_textbook_one_also_past_the_table(pairs):
    x = torch.randn(2, 4, HEIGHT * WIDTH, 2, 2 * pairs, dtype=torch.float64)
    positions = [0, 7, ROWS - 1, 10 * ROWS]
    assert torch.allclose(
        rotate(x, table(pairs), positions, HEIGHT, WIDTH), slowly(x, table(pairs), positions)
    )


@given(
    st.lists(st.integers(0, 3 * ROWS), min_size=1, max_size=6),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rows_past_the_table_equal_those_of_a_longer_table(positions, dtype):
    x = torch.randn(1, len(positions), HEIGHT * WIDTH, 2, 32, generator=torch.Generator().manual_seed(0)).to(
        dtype
    )
    short = rotate(x, table(), positions, HEIGHT, WIDTH)
    long = rotate(x, table(rows=4 * ROWS), positions, HEIGHT, WIDTH)
    assert short.dtype == dtype
    assert torch.allclose(short.float(), long.float(), atol=1e-6)


def test_there_is_no_frame_number_at_which_it_ends():
    rows = temporal_rows(table()[:, :6], [10**6, 10**6 + 1])
    assert torch.allclose(rows.abs(), torch.ones_like(rows.abs()))
    step = table()[1, :6]
    assert torch.allclose(rows[0] * step, rows[1], atol=1e-8)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 20))
def test_scores_depend_on_differences_only(query, key, shift):
    generator = torch.Generator().manual_seed(query * 41 + key)
    q, k = torch.randn(2, 1, 1, HEIGHT * WIDTH, 1, 32, dtype=torch.float64, generator=generator)

    def score(by: int) -> torch.Tensor:
        a = rotate(q, table(rows=128), [query + by], HEIGHT, WIDTH)
        return a.flatten() @ rotate(k, table(rows=128), [key + by], HEIGHT, WIDTH).flatten()

    assert torch.allclose(score(0), score(shift))


def test_history_rotated_in_parts_is_history_rotated_at_once():
    x = torch.randn(1, 9, HEIGHT * WIDTH, 4, 32)
    at_once = rotate(x, table(), range(9), HEIGHT, WIDTH)
    parts = [rotate(x[:, a:b], table(), range(a, b), HEIGHT, WIDTH) for a, b in ((0, 2), (2, 3), (3, 9))]
    assert torch.equal(torch.cat(parts, 1), at_once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_tables_turn_as_complex_ones_at_any_position(dtype):
    freqs = table(rows=HEIGHT * WIDTH)
    space = freqs.shape[1] // 3
    down, across = freqs[:, -2 * space : -space], freqs[:, -space:]
    frame = torch.cat(
        [
            torch.ones(HEIGHT * WIDTH, freqs.shape[1] - 2 * space, dtype=freqs.dtype),
            down[:HEIGHT].repeat_interleave(WIDTH, 0),
            across[:WIDTH].repeat(HEIGHT, 1),
        ],
        dim=1,
    )
    x = torch.randn(2, 4, HEIGHT * WIDTH, 2, 32).to(dtype)
    for positions in ([0, 7, 3, 1], [0, 7, ROWS, 10 * ROWS]):
        expected = rotate(x, table(), positions, HEIGHT, WIDTH)
        found = rotate_real(x, (frame.real, frame.imag), positions, HEIGHT, WIDTH)
        assert found.dtype == dtype
        assert torch.allclose(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_real_tables_turn_merged_patches_as_their_top_left_ones():
    frame = torch.randn(4 * 6, 16, dtype=torch.float64), torch.randn(4 * 6, 16, dtype=torch.float64)
    x = torch.randn(1, 2, 4 * 6, 2, 32)
    corners = torch.arange(24).view(4, 6)[::2, ::2].flatten()
    expected = rotate_real(x, frame, [3, 9], 4, 6)[:, :, corners]
    assert torch.equal(rotate_real(x[:, :, corners], frame, [3, 9], 4, 6, patch=2), expected)


places = st.lists(st.one_of(st.integers(0, 2 * ROWS), st.integers(0, 9).map(float)), min_size=1, max_size=4)


@given(st.lists(st.tuples(places, st.sampled_from([1, 2])), min_size=2, max_size=6), st.booleans())
def test_rotations_that_share_what_they_make_of_a_table_are_those_that_do_not(asked, real):
    """Queries and keys of all roles of one call."""
    turns, (height, width) = {}, (4, 6)
    tables = (table().real.float(), table().imag.float()) if real else table()
    turned = rotate_real if real else rotate
    for positions, patch in asked:
        x = torch.randn(1, len(positions), height * width // patch**2, 1, 32)
        expected = turned(x, tables, positions, height, width, patch)
        assert torch.equal(turned(x, tables, positions, height, width, patch, turns), expected)


def test_a_whole_position_is_a_row_of_the_table_and_a_float_is_computed():
    """So what is made of them is told apart."""
    x, odd = torch.randn(1, 1, HEIGHT * WIDTH, 1, 32), table().clone()
    odd[3] = odd[5]
    turns = {}
    row, computed = (rotate(x, odd, [place], HEIGHT, WIDTH, 1, turns) for place in (3, 3.0))
    assert not torch.equal(row, computed)
