"""What looks like attention, and like a KV cache; models written from words, one fact changed at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from headforcing.adapters.looks import NOTHING, check_module, misses, seen, told, without_cache
from headforcing.errors import UnsupportedModelError

CACHES = ["kv_cache", "cache", "past_key_values", "layer_past", "memory", "history", "conv_state", "prev_kv"]
CACHES += ["kv_cache_meta", "inference_params", "KVCache", "cached_keys", "kv_cache_dict"]
OTHERS = ["hidden_states", "encoder_hidden_states", "return_kv", "use_cache", "rope_kv", "kv_seqlen"]
OTHERS += ["context_lens", "teacache_thresh", "state_dict", "inner_kv_dim", "cache_mask", "freqs_cache"]


def takes(*names: str) -> Callable[..., Any]:
    """A function with these arguments after `self`; none of it is called."""
    forward: Any = lambda self: None  # noqa: E731
    every = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(every)
    return forward  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x


def attention(*names: str, kind: str = "Attention", parts: tuple[str, ...] = ("qkv",)) -> nn.Module:
    module = type(kind, (nn.Module,), {"forward": takes("x", *names)})()
    for part in parts:
        setattr(module, part, nn.Linear(8, 8))
    return module


def model(part: nn.Module, *names: str) -> nn.Module:
    block = type("Block", (nn.Module,), {"forward": takes("x", *names)})()
    block.attn, block.mlp = part, Mlp()
    return nn.Sequential(block)


class Processor:
    __call__ = takes("attn", "hidden_states", "kv_cache")


def processed(part: nn.Module) -> None:
    part.processor = Processor()


def patched(part: nn.Module) -> None:
    part.forward = MethodType(takes("x", "kv_cache"), part)


def holding(part: nn.Module) -> None:
    part.k_cache = None


def buffered(part: nn.Module) -> None:
    part.register_buffer("k_cache", torch.zeros(1))


def with_part(part: nn.Module) -> None:
    part.kv_cache = nn.Module()


def taking_anything(part: nn.Module) -> None:
    part.__class__ = type("Attention", (type(part),), {"forward": lambda self, x, **kwargs: x})


@given(st.lists(st.sampled_from(OTHERS), unique=True, max_size=4), st.sampled_from(CACHES), st.booleans())
def test_nothing_is_said_of_a_cache_where_an_argument_is_named_like_one(
    others: list[str], cache: str, in_attention: bool
) -> None:
    assert without_cache(model(attention(*others), *others)) == NOTHING
    more = [*others, cache]
    changed = model(attention(*more)) if in_attention else model(attention(*others), *more)
    assert without_cache(changed) is None


@pytest.mark.parametrize(
    "change", [processed, patched, holding, buffered, with_part, taking_anything], ids=lambda f: f.__name__
)
def test_one_attention_of_many_that_may_have_a_cache_is_enough(change: Callable[[nn.Module], None]) -> None:
    cls = type(attention())
    parts = [cls() for _ in range(3)]
    whole = nn.ModuleList(map(model, parts))
    assert without_cache(whole) == NOTHING
    change(parts[1])
    assert without_cache(whole) is None


@pytest.mark.parametrize("parts", [("q", "k", "v"), ("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj")])
def test_attention_is_known_by_its_projections_too(parts: tuple[str, ...]) -> None:
    part = attention(kind="Mixer", parts=parts)
    (found,) = seen(model(part))
    assert (found.kind, found.count, found.path) == ("Mixer", 1, "0.attn")
    assert without_cache(model(part)) == NOTHING
    assert seen(model(attention(kind="Mixer", parts=parts[:2]))) == ()


def test_a_cache_beside_forward_would_be_passed_by() -> None:
    """LongCat-Video: a block calls one method of its attention with a cache, and forward without."""
    part = attention("return_kv")
    type(part).forward_with_kv_cache = takes("x", "shape", "kv_cache")
    said = without_cache(model(part, "kv_cache"))
    assert said is not None
    assert "takes a KV cache in forward_with_kv_cache(x, shape, kv_cache), not in forward" in said
    type(part).forward = takes("x", "kv_cache")  # now there is something to replace
    assert without_cache(model(part, "kv_cache")) is None


def block(*names: str) -> nn.Module:
    """HY-WorldPlay: projections are layers of the block, attention is a function it calls."""
    made = type("DoubleBlock", (nn.Module,), {"forward": takes("img", *names)})()
    for name in ("img_attn_q", "img_attn_k", "img_attn_v", "img_attn_proj"):
        setattr(made, name, nn.Linear(8, 8))
    made.img_mlp = Mlp()
    return made


def test_attention_in_functions_of_a_block_cannot_be_replaced() -> None:
    made = block()
    type(made).forward_vision = takes("img", "kv_cache")
    said = without_cache(nn.Sequential(made))
    assert said is not None
    assert "its attention is no module: DoubleBlock takes a KV cache" in said
    assert said == without_cache(nn.Sequential(block("kv_cache")))
    assert without_cache(nn.Sequential(block())) == NOTHING


def test_a_model_without_attention_is_not_judged() -> None:
    for plain in (nn.Module(), nn.Linear(2, 2), nn.Sequential(Mlp())):
        assert without_cache(plain) is None
        assert told(seen(plain)) == [
            "nothing looks like attention: no class has it in its name, and none has its projections"
        ]


def test_the_nearest_signature_comes_first_with_what_differs() -> None:
    found = seen(model(attention("a", "b", "c", "d", "e")))
    reasons = {
        "far": (("p", "q", "r"), "no far"),
        "half": (("x", "a", "y", "z"), "no half"),
        "less": (("x", "w", "y", "z"), "no less"),
        "other": ((), "no other"),
        "three": (("x", "a", "b", "y", "z"), "no three"),
        "one": (("x", "a", "b", "c", "d"), "no one"),
        "same": (("x", "a", "b", "c", "d", "e"), "no norm_q"),
        "two": (("x", "a", "b", "c", "d", "y"), "no two"),
    }
    said, near = misses(found, reasons)
    assert list(said) == ["same", "one", "two", "three", "half", "far", "less", "other"]
    assert near == 5
    assert said["same"] == "no norm_q"  # the arguments are all there: something else is missing
    assert said["one"] == "forward of Attention also takes e"
    assert said["two"] == "forward of Attention lacks y and also takes e"
    assert (said["far"], said["other"]) == ("no far", "no other")
    assert misses((), reasons) == ({name: reason for name, (_, reason) in reasons.items()}, 0)


class WeightModule:
    """LightX2V: like a module, and none."""

    def __init__(self) -> None:
        self._modules: dict[str, Any] = {}


class Engine:
    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.transformer_weights, self.post_weight = WeightModule(), WeightModule()


@pytest.mark.parametrize(
    ("engine", "named"),
    [(Engine(), "transformer_weights, post_weight"), (WeightModule(), "WeightModule")],
    ids=["engine", "weights"],
)
def test_an_engine_that_is_no_module_has_nothing_to_pass(engine: Any, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match="there is no attention module to replace") as refused:
        check_module(engine)
    assert f"is not a torch.nn.Module, and its weights ({named}) are none either" in str(refused.value)


def test_a_pipeline_is_asked_for_its_module() -> None:
    engine = Engine()
    engine.model = nn.Linear(2, 2)  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedModelError, match=r"pass one of its modules: model$"):
        check_module(engine)
    with pytest.raises(UnsupportedModelError, match=r"NoneType is not a torch\.nn\.Module: pass the model"):
        check_module(None)
    check_module(nn.Linear(2, 2))
