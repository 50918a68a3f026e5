"""Every mistake has its own error: what was found, what was expected, what to do; and nothing is harmed."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headforcing as hf
from headforcing import errors
from headforcing.demo.model.pipeline import DemoPipeline
from headforcing.demo.world.words import PROMPT_WORDS
from headforcing.errors import (
    ChunkOrderError,
    ExternalEditError,
    HeadForcingError,
    NonFiniteKVError,
    OptionError,
    PatchedModuleError,
    RoleError,
    RoleMapError,
    RoleMapMismatchError,
    StreamActiveError,
    StreamError,
    StreamShapeError,
    UnsupportedModelError,
    WindowError,
)
from headforcing.integrations.self_forcing import SelfForcing
from headforcing.roles import Anchor, Full, Local, Memory, Rolling, SlidingWindow
from headforcing.testing import snapshot
from tests.hosts.rig import Caches, Rig

ROLES = [[Local(), Anchor(), Memory(), SlidingWindow(6)]] * 2


@pytest.fixture
def rig() -> Rig:
    return Rig(window=6)


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def refused(error: type[HeadForcingError], message: str, call: Callable[[], Any]) -> HeadForcingError:
    """The call raises exactly this error, and its message has all `...`-separated parts in this order."""
    parts = ".*".join(re.escape(part) for part in message.split(" ... "))
    with pytest.raises(error, match=f"(?s){parts}") as caught:
        call()
    assert type(caught.value) is error
    return caught.value


# The errors themselves ----------------------------------------------------------------------------


def test_every_error_is_ours_and_also_a_builtin_kind() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
    found = [c for c in classes if not issubclass(c, Warning)]
    kinds = [c for c in found if c is not HeadForcingError]
    assert len(kinds) > 10
    for kind in kinds:
        assert issubclass(kind, HeadForcingError)
        assert issubclass(kind, TypeError | ValueError | RuntimeError | ArithmeticError)


# A model without such attention -------------------------------------------------------------------

MODELS: dict[str, Callable[[], Any]] = {
    "linear": lambda: nn.Linear(2, 2),
    "empty": nn.Module,
    "list of layers": lambda: nn.ModuleList(nn.Linear(2, 2) for _ in range(3)),
    "cross-attention only": lambda: Rig().model.blocks[0].cross_attn,
}
NOT_MODELS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "state dict": lambda: Rig().model.state_dict(),
    "pipeline": lambda: DemoPipeline(Rig().model),
    "class": lambda: nn.Linear,
    "path": lambda: "model.safetensors",
    "list of models": lambda: [Rig().model],
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_a_model_without_such_attention_is_unsupported(make: Callable[[], Any]) -> None:
    model = make()
    before = snapshot(model)
    refused(
        UnsupportedModelError,
        f"no adapter fits {type(model).__name__} ... looks like attention ... Pass adapter= ... "
        "adapters do not fit, headforcing.explain(model) says why",
        lambda: hf.apply_head_forcing(model, Local()),
    )
    assert before.diff(snapshot(model)) == []


def test_an_unsupported_model_is_told_which_attention_was_found_and_which_adapters_are_near() -> None:
    model = Rig().model
    for block in model.blocks:
        del block.self_attn.norm_k
    error = refused(
        UnsupportedModelError,
        "looks like attention ... first at blocks.0.self_attn: forward(x, seq_lens, ... Pass adapter= ... "
        "the nearest: ... self_forcing: no module has q, k, v, norm_q, norm_k, o",
        lambda: hf.apply_head_forcing(model, Local()),
    )
    assert str(error).partition("the nearest:\n")[2].count("\n") == 2  # three adapters, no more


def test_a_model_without_a_cache_is_unsupported_in_one_sentence() -> None:
    refused(
        UnsupportedModelError,
        "TransformerEncoderLayer cannot be served: nothing in it takes a KV cache",
        lambda: hf.apply_head_forcing(nn.TransformerEncoderLayer(16, 2), Local()),
    )


def test_the_attention_module_itself_is_no_model_that_holds_one(rig: Rig) -> None:
    attention = rig.model.blocks[0].self_attn
    before = snapshot(attention)
    with pytest.raises(HeadForcingError):
        hf.apply_head_forcing(attention, Local(), chunk=3)
    assert before.diff(snapshot(attention)) == []


@pytest.mark.parametrize("make", NOT_MODELS.values(), ids=NOT_MODELS.keys())
def test_what_is_no_module_at_all_is_unsupported(make: Callable[[], Any]) -> None:
    thing = make()
    kind = type(thing).__name__
    refused(UnsupportedModelError, f"{kind} ... ", lambda: hf.apply_head_forcing(thing, Local()))
    refused(UnsupportedModelError, f"{kind} ... ", lambda: hf.remove_head_forcing(thing))


@pytest.mark.parametrize("missing", ["norm_q", "sink_size", "head_dim"])
def test_an_attention_that_lacks_one_part_is_not_taken_for_ours(rig: Rig, missing: str) -> None:
    for block in rig.model.blocks:
        delattr(block.self_attn, missing)
    refused(
        UnsupportedModelError,
        f"no module has ... {missing}",
        lambda: hf.apply_head_forcing(rig.model, Local()),
    )


def test_an_attention_with_another_signature_is_not_taken_for_ours(rig: Rig) -> None:
    class Later(type(rig.model.blocks[0].self_attn)):  # type: ignore[misc]
        def forward(self, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
            return x

    for block in rig.model.blocks:
        block.self_attn.__class__ = Later
    refused(UnsupportedModelError, "forward(x, seq_lens", lambda: hf.apply_head_forcing(rig.model, Local()))


# Roles that do not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "heads"), [(1, 4), (3, 4), (2, 3), (2, 5), (4, 2), (2, 1)])
def test_a_map_of_another_shape_names_both_shapes(rig: Rig, layers: int, heads: int) -> None:
    before = snapshot(rig.model)
    refused(
        RoleMapMismatchError,
        f"{layers} layers x {heads} heads ... the model has 2 x 4 ... use a map",
        lambda: hf.apply_head_forcing(rig.model, hf.RoleMap.uniform(Local(), layers, heads)),
    )
    assert before.diff(snapshot(rig.model)) == []


NOT_ROLES: dict[str, tuple[Any, str]] = {
    "None": (None, "NoneType ... expected a RoleMap"),
    "number": (3, "int ... expected a RoleMap"),
    "class": (Local, "expected a RoleMap"),
    "dict": ({0: Local()}, "dict ... expected a RoleMap"),
    "nothing": ([], "no heads ... expected"),
    "no heads": ([[], []], "heads ... expected ... at least 1"),
    "ragged": ([[Local()] * 4, [Local()] * 3], "[3, 4] heads ... expected the same number"),
    "a class inside": ([[Local(), Local(), Local(), Anchor]] * 2, "layer 0, head 3 ... is not a HeadRole"),
    "a name inside": ([[Local()] * 4, ["local"] * 4], "layer 1, head 0 ... 'local' is not a HeadRole"),
    "unknown preset": ("head_forcin", "'head_forcin' ... preset (deep_forcing, ... streaming_llm"),
    "no such file": ("roles.json", "roles.json ... cannot be read"),
}


@pytest.mark.parametrize("case", NOT_ROLES, ids=str)
def test_what_are_no_roles_is_a_role_map_error(rig: Rig, case: str) -> None:
    roles, message = NOT_ROLES[case]
    before = snapshot(rig.model)
    refused(RoleMapError, message, lambda: hf.apply_head_forcing(rig.model, roles))
    assert before.diff(snapshot(rig.model)) == []


@pytest.mark.parametrize("roles", [[Local(), Full()], b"full"], ids=["one role per layer", "bytes"])
def test_a_table_with_a_missing_dimension_is_a_role_map_error(rig: Rig, roles: Any) -> None:
    refused(RoleMapError, "expected", lambda: hf.apply_head_forcing(rig.model, roles))


@pytest.mark.parametrize(
    "role",
    [
        Local(recent=4),
        Anchor(sink=2, recent=2),
        Memory(sink=1, episodic=2, recent=1),
        SlidingWindow(7),
        Full(positions="compact"),
    ],
    ids=repr,
)
def test_a_role_that_asks_for_more_than_the_window_is_told_how_much_there_is(rig: Rig, role: Any) -> None:
    before = snapshot(rig.model)
    text = str(refused(WindowError, "", lambda: hf.apply_head_forcing(rig.model, role)))
    assert re.search(r"trained on 6|window of 6|keep at most 3", text)
    assert type(role).__name__ in text
    assert before.diff(snapshot(rig.model)) == []


def test_a_sliding_window_without_room_for_sink_and_chunk_says_what_it_needs(rig: Rig) -> None:
    refused(
        WindowError,
        "has no room ... chunk of 3 frames ... at least 4",
        lambda: hf.apply_head_forcing(rig.model, SlidingWindow(3, sink=1)),
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Local(recent=-1), "Local.recent is -1 ... expected a number of frames >= 0"),
        (lambda: Anchor(sink=1.5), "Anchor.sink is 1.5 ... expected"),
        (lambda: Local(recent=True), "Local.recent is True ... expected"),
        (lambda: Local(positions="relative"), "'relative' ... expected one of absolute, adjoining, compact"),
        (lambda: SlidingWindow(3, sink=3), "sink must be smaller than window"),
        (lambda: Rolling(3, sink=3), "sink must be smaller than window"),
        (lambda: Memory(update="maxmin"), "Memory.update is 'maxmin' ... expected an EpisodicUpdate"),
        (lambda: Memory(positions="clamped"), "use positions='compact' or update=Uniform()"),
    ],
)
def test_an_impossible_number_in_a_role_is_refused_when_the_role_is_made(
    make: Callable[[], Any], message: str
) -> None:
    refused(RoleError, message, make)


# Options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": "disk"}, "unknown store 'disk' ... expected one of ... lean ... reference ... ring"),
        ({"backend": "triton"}, "unknown backend 'triton' ... expected one of ... sdpa"),
    ],
    ids=["store", "backend"],
)
def test_an_unknown_name_lists_the_known_ones(rig: Rig, options: dict[str, Any], message: str) -> None:
    before = snapshot(rig.model)
    refused(OptionError, message, lambda: hf.apply_head_forcing(rig.model, Local(), **options))
    assert before.diff(snapshot(rig.model)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0},
        {"window": -1},
        {"window": "6"},
        {"window": 2.5},
        {"chunk": 0},
        {"chunk": -3},
        {"store": 3},
        {"store": dict},
        {"backend": 3},
        {"adapter": "self_forcing"},
    ],
    ids=repr,
)
def test_an_option_of_a_wrong_kind_is_refused_at_apply(rig: Rig, options: dict[str, Any]) -> None:
    before = snapshot(rig.model)
    (name,) = options
    with pytest.raises(HeadForcingError, match=f"{name}.*expected"):
        hf.apply_head_forcing(rig.model, Full(), **options)
    assert before.diff(snapshot(rig.model)) == []


# In the middle of a video -------------------------------------------------------------------------


@pytest.fixture
def playing(rig: Rig) -> tuple[Rig, hf.HeadForcing, Caches]:
    """A video of which two chunks are finished and a third is pending."""
    handle = hf.apply_head_forcing(rig.model, ROLES)
    caches = rig.caches()
    rig.video(caches, 3)
    return rig, handle, caches


@functools.cache
def undisturbed() -> list[Tensor]:
    rig = Rig(window=6)
    hf.apply_head_forcing(rig.model, ROLES)
    return rig.video(rig.caches(), 5)


def goes_on(rig: Rig, caches: Caches) -> bool:
    """The video continues with the bits it would have had without the incident."""
    return equal(rig.video(caches, 2, first=3), undisturbed()[6:])


def starts_again(rig: Rig, caches: Caches) -> bool:
    """A new video on the same caches has the bits of a fresh one."""
    caches.new_video()
    return equal(rig.video(caches, 3), undisturbed()[:6])


Playing = tuple[Rig, hf.HeadForcing, Caches]


@pytest.mark.parametrize("start", [10, 12, 300])
def test_a_skipped_chunk_says_which_one_was_expected(playing: Playing, start: int) -> None:
    rig, handle, caches = playing
    indices = caches.indices()
    refused(
        ChunkOrderError,
        f"starts at frame {start}, expected 9 ... 6 again ... in order",
        lambda: rig.call(caches, start, 3),
    )
    assert caches.indices() == indices
    assert [(s.committed, s.pending) for s in handle.status().streams] == [(6, (6, 9))]
    assert goes_on(rig, caches)


@pytest.mark.parametrize("start", [1, 3, 5])
def test_a_chunk_of_the_past_is_refused(playing: Playing, start: int) -> None:
    rig, _, caches = playing
    refused(
        ChunkOrderError,
        f"starts at frame {start}, expected 9 ... a new video starts at frame 0",
        lambda: rig.call(caches, start, 3),
    )
    assert goes_on(rig, caches)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_a_chunk_rewritten_with_another_length_is_refused(playing: Playing, frames: int) -> None:
    rig, _, caches = playing
    refused(ChunkOrderError, f"{frames} frames, expected 3", lambda: rig.call(caches, 6, frames))
    assert goes_on(rig, caches)


def test_a_chunk_rewritten_with_another_length_is_told_that_the_length_is_wrong(playing: Playing) -> None:
    rig, _, caches = playing
    refused(ChunkOrderError, "2 frames ... 3", lambda: rig.call(caches, 6, 2))


def test_a_cache_that_is_new_in_the_middle_of_a_video_is_refused(playing: Playing) -> None:
    rig, _, caches = playing
    refused(ChunkOrderError, "starts at frame 9, expected 0", lambda: rig.call(rig.caches(), 9, 3))
    assert goes_on(rig, caches)


def test_a_chunk_longer_than_the_roles_have_room_for_is_refused(playing: Playing) -> None:
    rig, _, caches = playing
    refused(
        WindowError,
        "beside a chunk of 6 ... trained on 6 frames",
        lambda: rig.call(caches, 9, 6),
    )
    assert goes_on(rig, caches)


def _poison(value: float, head: int) -> Callable[..., Tensor]:
    def spoil(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        spoilt = output.clone()
        spoilt[..., 16 * head + 5] = value
        return spoilt

    return spoil


SPOILT = [
    (*place, name, value)
    for place in ((0, 0), (0, 3), (1, 2))
    for name in ("norm_k", "v")
    for value in (torch.nan, torch.inf, -torch.inf)
]
FAST_SPOILT = [(0, 0, "norm_k", torch.inf), (0, 3, "v", -torch.inf), (1, 2, "norm_k", torch.nan)]


@pytest.mark.parametrize(
    ("layer", "head", "name", "value"),
    [pytest.param(*one, marks=() if one in FAST_SPOILT else pytest.mark.slow) for one in SPOILT],
)
def test_keys_that_are_not_finite_name_layer_and_head_and_writing_the_chunk_again_heals(
    playing: Playing, layer: int, head: int, name: str, value: float
) -> None:
    rig, _, caches = playing
    part = getattr(rig.model.blocks[layer].self_attn, name)
    hook = part.register_forward_hook(_poison(value, head))
    rig.call(caches, 9, 3)  # a pass of a chunk that is not finished may be anything
    hook.remove()
    message = f"layer {layer}, heads {head}: ... frames 9..11 ... NaN or infin"
    for _ in range(2):  # asked twice, refused twice
        error = refused(NonFiniteKVError, message, lambda: rig.call(caches, 12, 3))
        assert "write" in str(error)
        assert "reset" in str(error)
    assert goes_on(rig, caches)


def test_a_noisy_pass_that_is_not_finite_does_no_harm(playing: Playing) -> None:
    rig, _, caches = playing
    hook = rig.model.blocks[0].self_attn.norm_k.register_forward_hook(_poison(torch.nan, 1))
    rig.call(caches, 9, 3)
    hook.remove()
    assert goes_on(rig, caches)


def test_a_stream_with_keys_that_are_not_finite_can_be_reset(playing: Playing) -> None:
    rig, handle, caches = playing
    hook = rig.model.blocks[1].self_attn.norm_k.register_forward_hook(_poison(torch.nan, 1))
    rig.call(caches, 9, 3)
    hook.remove()
    with pytest.raises(NonFiniteKVError):
        rig.call(caches, 12, 3)
    handle.reset()
    assert starts_again(rig, caches)


def _with_batch(rig: Rig, caches: Caches, batch: int, start: int) -> Tensor:
    wide = Caches([dict(c) for c in caches.kv], [{"is_init": False} for _ in caches.cross])
    words = torch.zeros(batch, PROMPT_WORDS, dtype=torch.long)
    with torch.no_grad():
        out: Tensor = rig.model(
            rig.noise(start, 3, batch=batch), torch.zeros(batch), words, wide.kv, wide.cross, start * 16
        )
    return out


@pytest.mark.parametrize("start", [6, 9])
def test_a_batch_that_changes_within_a_video_is_refused(playing: Playing, start: int) -> None:
    rig, _, caches = playing
    refused(
        StreamShapeError,
        "were [1, F, 16, 4, 16] ... now they are [2, F, 16, 4, 16] ... start a new video",
        lambda: _with_batch(rig, caches, 2, start),
    )
    assert goes_on(rig, caches)


def test_a_dtype_that_changes_within_a_video_is_refused_and_changing_back_goes_on(playing: Playing) -> None:
    rig, _, caches = playing
    before = [p.clone() for p in rig.model.parameters()]
    rig.model.to(torch.bfloat16)
    rig.dtype = torch.bfloat16
    caches.cross[:] = [{"is_init": False} for _ in caches.cross]
    refused(
        StreamShapeError,
        "float32 ... now they are ... bfloat16 ... start a new video",
        lambda: rig.call(caches, 9, 3),
    )
    rig.model.to(torch.float32)
    rig.dtype = torch.float32
    for parameter, value in zip(rig.model.parameters(), before, strict=True):
        parameter.copy_(value)
    for cross in caches.cross:
        cross["is_init"] = False
    assert goes_on(rig, caches)


def test_a_new_video_may_have_another_dtype(playing: Playing) -> None:
    rig, _, _ = playing
    low = Rig(window=6, dtype=torch.bfloat16)
    hf.apply_head_forcing(low.model, ROLES)
    rig.model.to(torch.bfloat16)
    rig.dtype = torch.bfloat16
    assert equal(rig.video(rig.caches(), 3), low.video(low.caches(), 3))


EDITS = [*itertools.product(("global_end_index", "local_end_index"), (0, 1), (True, False))]
FAST_EDITS = [("global_end_index", 0, False), ("local_end_index", 1, True)]


@pytest.mark.parametrize(
    ("name", "layer", "in_place"),
    [pytest.param(*edit, marks=() if edit in FAST_EDITS else pytest.mark.slow) for edit in EDITS],
)
def test_an_index_edited_from_outside_says_what_was_found_and_expected(
    playing: Playing, name: str, layer: int, in_place: bool
) -> None:
    rig, handle, caches = playing
    expected = caches.indices()[layer]
    if in_place:
        caches.kv[layer][name].fill_(7)
    else:
        caches.kv[layer][name] = torch.tensor([7])
    refused(
        ExternalEditError,
        f"became {caches.indices()[layer]}, expected {expected} or zeros ... outside ... handle.reset()",
        lambda: rig.call(caches, 9, 3),
    )
    assert [(s.committed) for s in handle.status().streams] in ([6], [9])
    caches.kv[layer][name].fill_(expected[name == "local_end_index"])
    assert goes_on(rig, caches)


def test_an_index_written_with_the_value_it_had_is_no_edit(playing: Playing) -> None:
    rig, _, caches = playing
    for cache in caches.kv:
        cache["global_end_index"] = cache["global_end_index"].clone()
        cache["local_end_index"].add_(0)
    assert goes_on(rig, caches)


def test_after_an_edit_the_advice_of_the_message_helps(playing: Playing) -> None:
    rig, handle, caches = playing
    caches.kv[0]["global_end_index"].fill_(7)
    with pytest.raises(ExternalEditError, match=r"handle\.reset\(\)"):
        rig.call(caches, 9, 3)
    handle.reset()
    rig.call(caches, 0, 3)


def test_training_with_a_cache_that_holds_a_video_is_refused_and_the_video_goes_on(playing: Playing) -> None:
    rig, handle, caches = playing
    rig.model.train()
    refused(
        StreamActiveError,
        "layer 0 ... this cache holds a head-forced video ... model.eval() ... another cache",
        lambda: rig.call(caches, 9, 3),
    )
    assert handle.status().bypassed == 0
    rig.model.eval()
    assert goes_on(rig, caches)


def test_gradients_with_a_cache_that_holds_a_video_are_refused(playing: Playing) -> None:
    rig, _, caches = playing
    rig.model.requires_grad_(True)
    words = torch.zeros(1, PROMPT_WORDS, dtype=torch.long)
    refused(
        StreamActiveError,
        "this cache holds a head-forced video ... torch.no_grad()",
        lambda: rig.model(rig.noise(9, 3), torch.zeros(1), words, caches.kv, caches.cross, 9 * 16),
    )
    assert goes_on(rig, caches)


@pytest.mark.filterwarnings("ignore:head forcing is inactive")
def test_training_with_another_cache_is_the_models_own(playing: Playing) -> None:
    rig, handle, caches = playing
    plain = Rig(window=6)
    plain.model.train()
    rig.model.train()
    assert equal(rig.video(rig.caches(), 3), plain.video(plain.caches(), 3))
    assert handle.status().bypassed > 0
    rig.model.eval()
    assert goes_on(rig, caches)


def test_a_start_that_is_no_whole_frame_is_refused(playing: Playing) -> None:
    rig, _, caches = playing
    words = torch.zeros(1, PROMPT_WORDS, dtype=torch.long)
    with torch.no_grad():
        refused(
            StreamShapeError,
            "current_start 9 is no multiple of 16 tokens per frame (4x4) ... expected tokens",
            lambda: rig.model(rig.noise(9, 3), torch.zeros(1), words, caches.kv, caches.cross, 9),
        )
    assert goes_on(rig, caches)


# Remove at the wrong moment -----------------------------------------------------------------------

MODULES = ["self_attn.q", "self_attn.norm_k", "self_attn.o"]
HOOKS = ["register_forward_hook", "register_forward_pre_hook"]


def _remove_in_hook(playing: Playing, path: str, kind: str) -> None:
    rig, handle, caches = playing
    while_applied = snapshot(rig.model)
    calls = []

    def interfere(*_: Any) -> None:
        calls.append(1)
        refused(StreamActiveError, "remove() ... wait until the model returns", handle.remove)
        refused(
            StreamActiveError,
            "remove() ... wait until the model returns",
            lambda: hf.remove_head_forcing(rig.model),
        )

    hook = getattr(rig.model.blocks[0].get_submodule(path), kind)(interfere)
    rig.call(caches, 9, 3)
    hook.remove()
    assert calls
    assert while_applied.diff(snapshot(rig.model)) == []
    assert goes_on(rig, caches)
    handle.remove()


@pytest.mark.parametrize("kind", [HOOKS[0], pytest.param(HOOKS[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", MODULES)
def test_remove_inside_a_hook_below_the_attention_is_refused(playing: Playing, path: str, kind: str) -> None:
    _remove_in_hook(playing, path, kind)


@pytest.mark.parametrize("kind", HOOKS)
def test_remove_inside_a_hook_of_the_attention_is_refused(playing: Playing, kind: str) -> None:
    _remove_in_hook(playing, "self_attn", kind)


def test_remove_from_another_thread_in_the_middle_of_a_call_is_refused(playing: Playing) -> None:
    rig, handle, caches = playing
    found: list[BaseException] = []

    def interfere(*_: Any) -> None:
        def work() -> None:
            try:
                handle.remove()
            except StreamActiveError as error:
                found.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    hook = rig.model.blocks[0].self_attn.q.register_forward_hook(interfere)
    rig.call(caches, 9, 3)
    hook.remove()
    assert len(found) == 1
    assert goes_on(rig, caches)


def test_a_call_that_failed_is_not_running_any_more(playing: Playing) -> None:
    rig, handle, caches = playing
    for _ in range(3):
        with pytest.raises(ChunkOrderError):
            rig.call(caches, 30, 3)
    handle.remove()


def test_the_handle_of_a_removed_application_can_still_be_asked(playing: Playing) -> None:
    _, handle, _ = playing
    handle.remove()
    for again in (handle.reset, handle.commit, handle.remove):
        again()
    assert handle.status().streams == ()
    assert handle.status().stored_bytes == 0


def test_status_says_that_the_application_was_removed(playing: Playing) -> None:
    _, handle, _ = playing
    handle.remove()
    assert not handle.status().active


def test_a_stream_of_a_removed_handle_cannot_be_opened(playing: Playing) -> None:
    _, handle, _ = playing
    handle.remove()
    with pytest.raises(HeadForcingError), handle.stream("video"):
        pass


def test_errors_are_documented_where_they_are_raised() -> None:
    text = inspect.getdoc(hf.apply_head_forcing) or ""
    for error in (UnsupportedModelError, RoleMapError, WindowError, PatchedModuleError):
        assert error.__name__ in text
    assert StreamError.__doc__


@pytest.mark.parametrize("layer", [0, 1])
def test_a_refused_commit_names_the_layer_and_the_head_where_the_trouble_began(
    playing: Playing, layer: int
) -> None:
    rig, _, caches = playing
    hook = rig.model.blocks[layer].self_attn.norm_k.register_forward_hook(_poison(torch.nan, 2))
    rig.call(caches, 9, 3)
    hook.remove()
    refused(NonFiniteKVError, f"layer {layer}, heads 2: ... 9..11 ... reset", lambda: rig.call(caches, 12, 3))


@pytest.mark.parametrize("kind", [dict, list])
def test_an_anchor_that_nothing_can_refer_to_weakly_is_named(kind: type) -> None:
    class Anchored(SelfForcing):
        def read(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
            return dataclasses.replace(super().read(module, args, kwargs), anchor=kind())

    rig = Rig()
    hf.apply_head_forcing(rig.model, Local(), adapter=Anchored())
    refused(
        StreamError,
        f"layer 0: self_forcing anchors the timeline at a {kind.__name__} ... a tensor of the cache",
        lambda: rig.call(rig.caches(), 0, 3),
    )
