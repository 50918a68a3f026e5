"""What the library makes of a model: the adapter that fits, its layers, and why the others do not.

>>> from headforcing.demo import demo_model
>>> explain(demo_model()).adapter
'self_forcing'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from headforcing.adapters.base import Adapter, adapters, refusal
from headforcing.adapters.looks import Seen, check_module, misses, seen, told
from headforcing.apply.handles import handles_of
from headforcing.apply.unverified import unverified
from headforcing.attention.module import HeadForcingMixin, original_class
from headforcing.errors import HeadForcingError, OptionError
from headforcing.roles import HeadRole

FEW = 6
"""So many layers are listed one by one."""


@dataclass(frozen=True)
class Layer:
    """One causal self-attention layer.

    Attributes:
        path: dotted name.
        kind: class.
        heads: number of heads.
        head_dim: channels per head.
    """

    path: str
    kind: str
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Explanation:
    """What the library makes of a model; print it.

    Attributes:
        model: class of the model.
        adapter: name of the adapter that `apply_head_forcing` would take; `None`: none fits.
        also: names of others that fit as well.
        why_not: for every other adapter, why it does not fit.
        refused: why none can, where the model is known; `None`: it is not, or one fits.
        layers: the layers it serves, in order.
        window: frames the model was trained on; `None`: the model does not say.
        chunk: frames it denoises together; `None`: the model does not say.
        own: the role of every layer that is the model's own memory; empty: the model does not say.
        unknown: what cannot be told or served, by what it is, with the reason.
        seen: what looks like attention in the model.
        applied: what is applied already; empty: nothing.
    """

    model: str
    adapter: str | None
    also: tuple[str, ...]
    why_not: Mapping[str, str]
    refused: str | None
    layers: tuple[Layer, ...]
    window: int | None
    chunk: int | None
    own: tuple[HeadRole, ...]
    unknown: Mapping[str, str]
    seen: tuple[Seen, ...]
    applied: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.model}: {f'adapter {self.adapter}' if self.adapter else 'no adapter fits'}"]
        lines += self._serves() if self.adapter else []
        lines += [f"  cannot be served: {self.refused}"] if self.refused else []
        lines += [f"  {what}: {reason}" for what, reason in self.unknown.items()]
        lines += [f"  fits as well: {name}" for name in self.also]
        lines += [f"  applied: {part}" for part in self.applied] or ["  nothing is applied"]
        lines += told(self.seen)
        if self.why_not and not self.refused:
            lines += ["why not", *(f"  {name}: {reason}" for name, reason in self.why_not.items())]
        if self.adapter is None and not self.refused:
            lines.append("pass adapter=..., or write one: docs/porting.md")
        return "\n".join(lines)

    def _serves(self) -> list[str]:
        shapes = sorted({f"{layer.heads} heads of {layer.head_dim} channels" for layer in self.layers})
        many = len(self.layers) > FEW
        shown = [self.layers[0], self.layers[-1]] if many else self.layers
        paths = [f"  {layer.path}  {layer.kind}" for layer in shown]
        if many:
            paths.insert(1, f"  ... {len(self.layers) - 2} more")
        return [
            f"  {len(self.layers)} layers, {' or '.join(shapes)}",
            f"  window {_frames(self.window)}, chunks of {_frames(self.chunk)}",
            *(f"  own memory of {self.own.count(role)} layers: {role}" for role in dict.fromkeys(self.own)),
            *paths,
        ]


def explain(model: nn.Module) -> Explanation:
    """Says what `apply_head_forcing` would find in a model; changes nothing.

    Args:
        model: any module.

    Raises:
        UnsupportedModelError: it is no module.
    """
    check_module(model)
    found = seen(model, _class)
    fitting, reasons = list[Adapter](), dict[str, tuple[tuple[str, ...], str]]()
    for adapter in adapters():
        reason = adapter.why_not(model)
        if reason is None:
            fitting.append(adapter)
        else:
            reasons[adapter.name] = (adapter.forward, reason)
    first = fitting[0] if fitting else None
    unknown: dict[str, str] = {}
    window = chunk = own = None
    layers: tuple[Layer, ...] = ()
    if first is not None:
        layers = tuple(
            Layer(path, _kind(module), *first.heads(module)) for path, module in first.attentions(model)
        )
        window = _asked(unknown, "window", lambda: first.window(model))
        chunk = _asked(unknown, "chunk", lambda: first.chunk(model))
        own = _asked(unknown, "own memory", lambda: first.own_memory(model))
        _asked(unknown, "prompt switches", lambda: first.cross_attentions(model))
        for code, name in unverified(model, first).items():
            unknown["code"] = f"{name} has code that was never compared ({code}): run `headforcing verify`"
        if first.clock(model) is None:
            unknown["phases"] = "nobody knows which pass is the clean one: roles that ask are refused"
    return Explanation(
        model=_kind(model),
        adapter=None if first is None else first.name,
        also=tuple(adapter.name for adapter in fitting[1:]),
        why_not=misses(found, reasons)[0],
        refused=refusal(model) if first is None else None,
        layers=layers,
        window=window,
        chunk=chunk,
        own=tuple(own or ()),
        unknown=unknown,
        seen=found,
        applied=tuple(str(handle.status()).splitlines()[0] for handle in handles_of(model)),
    )


def _asked(unknown: dict[str, str], what: str, ask: Callable[[], Any]) -> Any:
    """An answer of the adapter; where it refuses, the reason is noted."""
    try:
        return ask()
    except (HeadForcingError, OptionError) as error:
        unknown[what] = str(error)
        return None


def _class(module: nn.Module) -> type:
    return original_class(module) if isinstance(module, HeadForcingMixin) else type(module)


def _kind(module: nn.Module) -> str:
    return _class(module).__name__


def _frames(count: int | None) -> str:
    return "unknown" if count is None else f"{count} frame{'s' * (count != 1)}"
