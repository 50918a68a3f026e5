"""`Adapter`, the interface to one base model, and `find_adapter`, which finds the one that fits.

An adapter is one file in `integrations/`. It knows its base model's interface and nothing of roles, stores or
backends. It recognises a model by signatures and structure, never by a class name: in this field
22 different classes are called `CausalWanModel`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor, nn

from headforcing.errors import UnsupportedModelError, module_names
from headforcing.roles import HeadRole
from headforcing.roles.positions import PositionScheme
from headforcing.types import AttentionCall, Edit, Phase, TracedCall

Memo = MutableMapping[str, Any]
"""What an adapter notes per layer and timeline, a dict; empty when the timeline begins."""


class Adapter(ABC):
    """How to read, project, rotate and answer one call of a base model's self-attention.

    Attributes:
        verified: digests of attention classes (`adapters.verified.digest`) that were compared with
            `own_memory`, each with the positions of its own memory. Other code is warned about, unless this
            is empty.
    """

    verified: ClassVar[Mapping[str, PositionScheme]] = {}

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name, as `status()` shows it; a class attribute does."""

    @abstractmethod
    def why_not(self, model: nn.Module) -> str | None:
        """Why this adapter does not fit the model, in one sentence; `None` when it fits."""

    @abstractmethod
    def attentions(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Dotted name and module of every causal self-attention, in layer order."""

    @abstractmethod
    def heads(self, module: nn.Module) -> tuple[int, int]:
        """Number of heads and head dim of a self-attention module."""

    @abstractmethod
    def window(self, model: nn.Module) -> int:
        """Frames the model was trained on."""

    @abstractmethod
    def chunk(self, model: nn.Module) -> int:
        """Frames the model denoises together."""

    def own_memory(self, model: nn.Module) -> Sequence[HeadRole]:
        """The role of every layer with which all heads remember what the base model remembers by itself.

        Raises:
            UnsupportedModelError: the model does not say.
        """
        raise UnsupportedModelError(
            f"{self.name} does not say what the base model remembers by itself: define own_memory"
        )

    def step(self, chunk: int) -> int:
        """Frames that a video grows by when `chunk` are denoised together; default: as many."""
        return chunk

    @abstractmethod
    def read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AttentionCall | None:
        """The call in our words; `None` where it has no cache and belongs to the original forward.

        What `rotate` requires of the module, it finds in the call's `arguments`: put it there.
        """

    @abstractmethod
    def begins_video(self, call: AttentionCall, memo: Memo) -> bool:
        """Whether the base model says that a new video begins with this call.

        False will do where a video begins with a chunk at frame 0, which begins one in any case.

        Raises:
            ExternalEditError: the base model's cache was changed in a way this adapter does not know.
        """

    def edits(self, module: nn.Module, call: AttentionCall, memo: Memo) -> Sequence[Edit]:
        """What the base model did to its cache since the last call, no new video begun; default nothing."""
        return ()

    @abstractmethod
    def project(self, module: nn.Module, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values `[B, F, P, H, D]`, normalised, before RoPE.

        Where several heads of queries share keys (GQA), `H` counts the heads of keys, and the queries that
        share them follow each other as tokens: all `P` of the first, then of the next.
        What `output` has to know as well, such as a gate, goes into the call's `arguments`.
        """

    @abstractmethod
    def rotate(self, x: Tensor, call: AttentionCall, positions: Sequence[float], patch: int = 1) -> Tensor:
        """`x [B, n, P, Hr, D]` rotated to `n` temporal positions, as the base model would.

        Args:
            x: queries or keys; queries that share keys have a multiple of `P` tokens, as from `project`.
            call: the call; its `heads` say whose they are, where every head is rotated differently.
            positions: temporal positions.
            patch: side of the squares of patches that were merged into one, which is rotated as its top left
                patch; more than 1 only where roles merge patches.
        """

    @abstractmethod
    def output(self, module: nn.Module, out: Tensor, call: AttentionCall, memo: Memo) -> Any:
        """What the original forward returns for the attended `out [B, L, H, D]`, indices mirrored.

        Keys and values are not written to the base model's cache: they would be stored twice.
        """

    def split(self, module: nn.Module, call: AttentionCall) -> Sequence[AttentionCall]:
        """The chunks of a call, in order, where the base model computes the video so far again in one.

        They are served as if they came one by one, each with `arguments` of its own; observers are shown the
        last one only. Default: a call is one chunk.
        """
        return (call,)

    def join(self, module: nn.Module, outs: Sequence[Any], call: AttentionCall) -> Any:
        """What the forward returns for a call that was split, from what `output` made of its chunks."""
        raise UnsupportedModelError(f"{self.name} splits calls but does not join them: define join")

    def tokens(self, x: Tensor, frames: Sequence[int | None], call: AttentionCall) -> Tensor:
        """Keys or values of a view `[B, n, P, Hr, D]` as they are attended to, `[B, M, Hr, D]`; default all.

        For base models whose frames are not all of one grid; their adapter fills the smaller ones up.
        """
        return x.flatten(1, 2)

    def traced_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> TracedCall | None:
        """What `torch.compile` must know of a call, so that the model stays one graph. Must read no tensor.

        Default `None`, as for a call that has no cache: attention is served between two graphs.
        """
        return None

    def answer(self, y: Tensor, numbers: Tensor, call: TracedCall) -> Any:
        """What a compiled forward returns: `y` as `output` made it, and the whole numbers after it.

        What else the original returns must be among the arguments of the call. Default: `y` alone.
        """
        return y

    def clock(self, model: nn.Module) -> nn.Module | None:
        """The module whose forward receives the noise level of a pass; default `None`: there is none."""
        return None

    def phase(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Phase:
        """Which pass a call of the clock begins. It may read the device: once per pass, if roles ask."""
        raise UnsupportedModelError(f"{self.name} has a clock but does not read it: define phase")

    def cross_attentions(self, model: nn.Module) -> Sequence[nn.Module]:
        """The cross-attention of every layer, in order; empty where none keeps the projected prompt."""
        raise UnsupportedModelError(
            f"{self.name} does not say where the base model keeps the projected prompt, so a prompt switch "
            "could not reset it: define cross_attentions and forget_prompt"
        )

    def forget_prompt(  # noqa: B027 - optional on purpose
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Makes a call of a cross-attention module project the prompt anew, wherever it is cached."""

    def forget(self, memo: Memo) -> None:  # noqa: B027 - optional on purpose
        """Drops what was noted about the base model's counters, because the stream is reset by hand."""

    def release(self, call: AttentionCall, memo: Memo) -> int:
        """Frees the base model's own K/V while we are in; returns the bytes freed. Default: nothing."""
        return 0

    def give_back(self, anchor: object, memo: Memo) -> None:  # noqa: B027 - optional on purpose
        """Undoes `release` and leaves the base model's cache as freshly allocated."""


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the module's `forward`, defaults filled in."""
    cls: Any = type(module)
    simple = _simple(cls)
    if simple is not None and len(args) < len(simple[0]):
        (first, *names), defaults, required = simple
        given = {*names[: len(args)], *kwargs}
        if len(given) == len(args) + len(kwargs) and required <= given <= defaults.keys():
            return {first: module, **defaults, **dict(zip(names, args, strict=False)), **kwargs}
    bound = _signature(cls).bind(module, *args, **kwargs)  # also where it has to say what is wrong
    bound.apply_defaults()
    return bound.arguments


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of the module's `forward`, `self` excluded."""
    cls: Any = type(module)
    return tuple(_signature(cls).parameters)[1:]


@functools.cache
def _simple(cls: Any) -> tuple[tuple[str, ...], dict[str, Any], frozenset[str]] | None:
    """Of a `forward` whose parameters can all be given by place or by name: names, defaults, required names.

    Parameters without a default have `None` in its place, in order. `None`: some are given otherwise.
    """
    every = [*_signature(cls).parameters.values()]
    if any(one.kind is not one.POSITIONAL_OR_KEYWORD for one in every):
        return None
    later = every[1:]
    defaults = {one.name: None if one.default is one.empty else one.default for one in later}
    required = frozenset(one.name for one in later if one.default is one.empty)
    return tuple(one.name for one in every), defaults, required


@functools.cache
def _signature(cls: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(cls.forward)


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter that fits, of those in `headforcing.integrations` and of installed plug-ins.

    Raises:
        UnsupportedModelError: none fits; the message says why, for a model we know to have no such memory
            in one sentence, else adapter by adapter.
    """
    if (refused := refusal(model, "refuse_lookalike")) is not None:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be served: {refused}")
    reasons = []
    for adapter in adapters():
        reason = adapter.why_not(model)
        if reason is None:
            return adapter
        reasons.append(f"  {adapter.name}: {reason}")
    if (refused := refusal(model)) is not None:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be served: {refused}")
    attention_like = sorted(
        {type(m).__name__ for m in model.modules() if "attention" in type(m).__name__.lower()}
    )
    found = ", ".join(attention_like) if attention_like else "no module with 'attention' in its class"
    raise UnsupportedModelError(
        f"no adapter fits {type(model).__name__} (found: {found}):\n"
        + "\n".join(reasons)
        + "\nPass adapter=..., or write one: docs/porting.md"
    )


def refusal(model: nn.Module, by: str = "refuse") -> str | None:
    """Why a model that is known cannot be served by any adapter; `None`: it is not known.

    A module in `headforcing.integrations` says so by a function `refuse(model)`, or `refuse_lookalike(model)`
    where an adapter seems to fit.

    Raises:
        UnsupportedModelError: the folder is not installed.
    """
    for module in _integrations():
        reason: str | None = getattr(module, by, lambda _: None)(model)
        if reason is not None:
            return reason
    return None


def adapters() -> Iterator[Adapter]:
    """Those in `headforcing.integrations`, then those of installed plug-ins.

    Raises:
        UnsupportedModelError: the folder is not installed, or a plug-in brings something else.
    """
    yield from (module.ADAPTER for module in _integrations() if hasattr(module, "ADAPTER"))
    for point in entry_points(group="headforcing.adapters"):
        adapter = point.load()
        if not isinstance(adapter, Adapter):
            raise UnsupportedModelError(
                f"the plug-in {point.name} = {point.value!r} is {adapter!r:.80}: expected an instance of a "
                "subclass of headforcing.Adapter; mend its entry point, or uninstall it"
            )
        yield adapter


def _integrations() -> Iterator[ModuleType]:
    try:
        package = importlib.import_module("headforcing.integrations")
    except ModuleNotFoundError as error:
        raise UnsupportedModelError(
            "headforcing.integrations is not installed: run `pip install -e .` in the repository"
        ) from error
    for name in module_names(package.__name__):
        yield importlib.import_module(f"{package.__name__}.{name}")
