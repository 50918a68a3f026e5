"""The request for a prompt switch; `headforcing.stores.scenes` carries it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headforcing.errors import OptionError
from headforcing.types import Tier

Mode = Literal["continue", "smooth", "cut", "recall", "recache"]
"""What a prompt switch does; see `Switch`."""
MODES: tuple[Mode, ...] = ("continue", "smooth", "cut", "recall", "recache")
LASTING: tuple[Tier, ...] = ("sink", "episodic")


@dataclass(frozen=True)
class Switch:
    """A requested prompt switch; it takes effect when the next chunk begins.

    Attributes:
        mode: `continue` keeps everything. `smooth` drops recent frames and keeps sink and episodic frames,
            where they are in time. `cut` drops everything but the tiers in `keep`, and time restarts: the
            next chunk begins a scene as if it began a video. `recall` drops everything, restores what the
            heads stored at a mark, and time restarts after it. `recache` drops the last frames, because the
            base model recomputes them under the new prompt (KV recache).
        keep: tiers that survive a cut.
        mark: name of the mark to recall.
        frames: number of recomputed frames.
    """

    mode: Mode
    keep: tuple[Tier, ...] = ()
    mark: str | None = None
    frames: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise OptionError(f"mode is {self.mode!r}: expected one of {', '.join(MODES)}")
        for what, given, mode in (
            ("keep", self.keep, "cut"),
            ("mark", self.mark is not None, "recall"),
            ("frames", self.frames, "recache"),
        ):
            if given and self.mode != mode:
                raise OptionError(f"{what} goes with mode {mode!r}: got mode {self.mode!r}")
            if not given and self.mode == mode != "cut":
                raise OptionError(f"mode {mode!r} requires {what}: pass {what}=...")
        if wrong := [tier for tier in self.keep if tier not in LASTING]:
            raise OptionError(f"keep has {wrong}: expected some of {', '.join(LASTING)}")
        if type(self.frames) is not int or self.frames < 0:
            raise OptionError(f"frames is {self.frames!r}: expected a number of frames, at least 1")

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Tiers that survive, by the mode or by `keep`."""
        return LASTING if self.mode == "smooth" else self.keep

    @property
    def restarts(self) -> bool:
        """Whether time restarts."""
        return self.mode in ("cut", "recall")
