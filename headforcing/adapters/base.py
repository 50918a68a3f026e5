"""`Adapter`, the interface to one base model, and `find_adapter`, which finds the one that fits.

An adapter is one file in `integrations/`. It knows its base model's interface and nothing of roles, stores or
backends. It recognises a model by signatures and structure, never by a class name: in this field
22 different classes are called `CausalWanModel`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor, nn

from headforcing.adapters.looks import misses, seen, told, without_cache
from headforcing.adapters.signatures import bind as bind
from headforcing.adapters.signatures import parameter_names as parameter_names
from headforcing.errors import UnsupportedModelError, module_names
from headforcing.roles import HeadRole
from headforcing.roles.positions import PositionScheme
from headforcing.types import AttentionCall, Edit, Phase, TracedCall

Memo = MutableMapping[str, Any]
"""What an adapter notes per layer and timeline, a dict; empty when the timeline begins."""
NEAREST = 3
"""So many adapters are named in the error that none fits."""


class Adapter(ABC):
    """How to read, project, rotate and answer one call of a base model's self-attention.

    Attributes:
        verified: digests of attention classes (`adapters.verified.digest`) that were compared with
            `own_memory`, each with the positions of its own memory. Other code is warned about, unless this
            is empty.
        forward: names of the arguments of the attention's `forward`, where the base model is recognised by
            them; errors then say in what another one differs. Default: by something else.
    """

    verified: ClassVar[Mapping[str, PositionScheme]] = {}
    forward: ClassVar[tuple[str, ...]] = ()

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

        What `output` has to know as well, such as a gate, goes into the call's `arguments`.
        Where several heads of queries share keys (GQA), `H` counts the heads of keys, and the queries that
        share them follow each other as tokens: all `P` of the first, then of the next.
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


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter that fits, of those in `headforcing.integrations` and of installed plug-ins.

    Raises:
        UnsupportedModelError: none fits; the message says why, for a model that has no such memory in one
            sentence, else what looks like attention in it, and what the nearest adapters miss.
    """
    reasons = {}
    for adapter in adapters():
        reason = adapter.why_not(model)
        if reason is None:
            return adapter
        reasons[adapter.name] = (adapter.forward, reason)
    if (refused := refusal(model)) is not None:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be served: {refused}")
    found = seen(model)
    said, near = misses(found, reasons)
    named = [f"  {name}: {reason}" for name, reason in [*said.items()][: min(near, NEAREST)]]
    why = f"{len(said)} adapters do not fit, headforcing.explain(model) says why"
    lines = [*told(found), "Pass adapter=..., or write one: docs/porting.md"]
    lines += [f"{why}; the nearest:", *named] if named else [why]
    raise UnsupportedModelError("\n".join([f"no adapter fits {type(model).__name__}", *lines]))


def refusal(model: nn.Module) -> str | None:
    """Why a model cannot be served by any adapter; `None`: nothing is known against it.

    A module in `headforcing.integrations` says so by a function `refuse(model)`. A model that no module knows
    is looked at for what takes a KV cache.

    Raises:
        UnsupportedModelError: the folder is not installed.
    """
    for module in _integrations():
        reason: str | None = getattr(module, "refuse", lambda _: None)(model)
        if reason is not None:
            return reason
    return without_cache(model)


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
