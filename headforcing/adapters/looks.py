"""What looks like attention in a model, and whether anything in it takes a KV cache: by names alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from headforcing.adapters.signatures import parameter_names
from headforcing.errors import UnsupportedModelError

ATTENTION = ("attention", "attn")
PARTS = ("cache", "past", "memory", "history", "inference_params")
"""Parts of the name of an argument that may hold the past."""
WORDS = {"kv", "kvs", "state", "states"}
NOT_WITH = {"hidden", "dict"}
FLAGS = {"return", "use", "enable", "is", "has"}
OTHERWISE = {
    "teacache",
    "rope",
    "rotary",
    "freqs",
    "mask",
    "dim",
    "heads",
    "len",
    "lens",
    "seqlen",
    "seqlens",
}
"""Words that say that a name is about something else."""
PROJECTION = re.compile(r"(?:^|_)(q|k|v|qkv)(?:_proj|_linear)?$")
FAR = 1000
"""In so many arguments a signature never differs."""
ANY = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)

NOTHING = (
    "nothing in it takes a KV cache: no argument is named like one (cache, past, memory, ...). Every call "
    "computes the keys and values of all frames it is given, so no head has a memory that could be changed; "
    "how many past frames there are, its pipeline decides. Take an autoregressive model with a KV cache: "
    "docs/how-to/models.md"
)


@dataclass(frozen=True)
class Seen:
    """A class of modules that looks like attention.

    Attributes:
        kind: its name.
        count: modules of it.
        path: dotted name of the first.
        forward: what its forward takes.
        processor: what its processor takes; empty: it has none.
    """

    kind: str
    count: int
    path: str
    forward: tuple[str, ...]
    processor: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"{self.count} x {self.kind}, first at {self.path or 'the top'}"
        processor = f", processor({', '.join(self.processor)})" if self.processor else ""
        return f"{where}: forward({', '.join(self.forward)}){processor}"


def check_module(model: object) -> None:
    """Checks that a model is a torch module.

    Raises:
        UnsupportedModelError: it is none; the message says what to pass, or that there is nothing to pass.
    """
    if isinstance(model, nn.Module):
        return
    parts = getattr(model, "__dict__", {})
    inside = [name for name, part in parts.items() if isinstance(part, nn.Module)]
    holders = {type(model).__name__: model, **parts}
    weights = [name for name, part in holders.items() if isinstance(getattr(part, "_modules", None), dict)]
    said = f"{type(model).__name__} is not a torch.nn.Module"
    if weights and not inside:
        raise UnsupportedModelError(
            f"{said}, and its weights ({', '.join(weights)}) are none either: such an engine (LightX2V) "
            "computes attention in functions, so there is no attention module to replace. Load the weights "
            "into the model of the repository they were published for"
        )
    hint = f"pass one of its modules: {', '.join(inside)}" if inside else "pass the model itself"
    raise UnsupportedModelError(f"{said}: {hint}")


def seen(model: nn.Module, kind: Callable[[nn.Module], type] = type) -> tuple[Seen, ...]:
    """The classes of modules that look like attention; `kind` says which class a module counts as."""
    found: dict[type, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        if is_attention(module, kind(module)):
            found.setdefault(kind(module), []).append((path, module))
    return tuple(
        Seen(cls.__name__, len(places), path, parameter_names(first), processor_names(first))
        for cls, places in found.items()
        for path, first in places[:1]
    )


def is_attention(module: nn.Module, cls: type) -> bool:
    """Whether a module is named like attention, or has its projections and is not a whole block."""
    named = any(part in cls.__name__.lower() for part in ATTENTION)
    return named or (_projects(module) and not _is_block(module))


def told(found: Sequence[Seen]) -> list[str]:
    """What looks like attention, in lines."""
    if found:
        return ["looks like attention", *(f"  {one}" for one in found)]
    return ["nothing looks like attention: no class has it in its name, and none has its projections"]


def misses(
    found: Sequence[Seen], reasons: Mapping[str, tuple[tuple[str, ...], str]]
) -> tuple[dict[str, str], int]:
    """What adapters miss, the nearest first, and how many are near.

    An adapter is near if at least half of its arguments are there; then what differs is said, not the reason.

    Args:
        found: what looks like attention in a model.
        reasons: of every adapter, by name, its `forward` and why it does not fit.
    """
    said = []
    for name, (expected, reason) in reasons.items():
        near = [one for one in found if 2 * len({*one.forward} & {*expected}) >= len(expected) > 0]
        off = {len({*one.forward} ^ {*expected}): one for one in reversed(near)}
        distance = min(off, default=FAR)
        said.append((distance, name, _difference(off[distance], expected) if 0 < distance < FAR else reason))
    said.sort(key=lambda entry: entry[0])
    return {name: text for _, name, text in said}, sum(distance < FAR for distance, _, _ in said)


def processor_names(module: Any) -> tuple[str, ...]:
    """The parameters of an attention's processor; empty: it has none."""
    processor = getattr(module, "processor", None)
    return tuple(one.name for one in _parameters(processor)) if callable(processor) else ()


def _difference(one: Seen, expected: tuple[str, ...]) -> str:
    lacks = [name for name in expected if name not in one.forward]
    more = [name for name in one.forward if name not in expected]
    parts = {"lacks": lacks, "also takes": more}
    said = [f"{what} {', '.join(names)}" for what, names in parts.items() if names]
    return f"forward of {one.kind} {' and '.join(said)}"


def without_cache(model: nn.Module) -> str | None:
    """Why no adapter could serve a model, where nothing that could be replaced takes a KV cache.

    `None`: an attention module takes one, or may; or nothing is like attention at all.
    """
    modules = [*model.modules()]
    attention = [module for module in modules if is_attention(module, type(module))]
    if any(_may_take(module) for module in attention):
        return None
    for cls in {type(module): None for module in attention}:
        for name, takes in _beside(cls):
            return (
                f"its attention, {cls.__name__}, takes a KV cache in {name}({', '.join(takes)}), not in "
                "forward, which is what head forcing replaces: calls with a cache would go past it. Let the "
                "repository call forward for both, then write an adapter: docs/porting.md"
            )
    others = {type(module): None for module in modules}
    takers = {type(module) for module in modules if _takes(module)}
    takers |= {cls for cls in others if any(True for _ in _beside(cls))}
    blocks = [type(module) for module in modules if _projects(module) and _is_block(module)]
    for cls in blocks:
        if cls in takers:
            return (
                f"its attention is no module: {cls.__name__} takes a KV cache and computes attention in "
                "functions, so there is no attention module to replace. Give its attention a module whose "
                "forward takes queries, keys, values and the cache, then write an adapter: docs/porting.md"
            )
    return NOTHING if (attention or blocks) and not takers else None


def _projects(module: nn.Module) -> bool:
    """Whether queries, keys and values are projected by layers of its own."""
    names = [name for name, child in module.named_children()]
    ends = {match[1] for name in names if (match := PROJECTION.search(name))}
    return ends >= {"q", "k", "v"} or "qkv" in ends


def _is_block(module: nn.Module) -> bool:
    """Whether a module also holds what an attention does not: parts with linear layers in them."""
    inside = (part for child in module.children() for part in [*child.modules()][1:])
    return any(isinstance(part, nn.Linear) for part in inside)


def _may_take(module: nn.Module) -> bool:
    """Whether an attention takes a cache in its forward, holds one, or takes anything."""
    processor = getattr(module, "processor", None)
    anything = any(one.kind in ANY for one in _parameters(type(module).forward))
    holds = vars(module).keys() | module._buffers.keys() | module._modules.keys()
    return (
        (anything and not callable(processor))
        or any(_takes(module))
        or any("cache" in name and not _words(name) & OTHERWISE for name in holds)
    )


def _takes(module: nn.Module) -> list[str]:
    """Arguments of a module's forward, and of its processor's, that are named like a cache."""
    forwards = [type(module).forward, module.forward]  # an instance may have another one
    processor = getattr(module, "processor", None)
    forwards += [processor] if callable(processor) else []
    return [one.name for forward in forwards for one in _parameters(forward) if _is_cache(one.name)]


def _beside(cls: type) -> Iterator[tuple[str, list[str]]]:
    """Methods beside forward that take a cache, with what they take."""
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        if not hasattr(nn.Module, name) and any(_is_cache(one.name) for one in _parameters(method)):
            yield name, [one.name for one in _parameters(method) if one.name != "self"]


def _parameters(function: Any) -> list[inspect.Parameter]:
    return [*inspect.signature(function).parameters.values()]


def _is_cache(name: str) -> bool:
    words = _words(name)
    named = any(part in name.lower() for part in PARTS) or bool(words & WORDS and not words & NOT_WITH)
    return named and not words & OTHERWISE and name.split("_")[0] not in FLAGS


def _words(name: str) -> set[str]:
    return {*name.lower().split("_")}
