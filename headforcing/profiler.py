"""Measuring what the heads of a model do while it generates."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Collection, MutableMapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

import torch
from torch import Tensor, nn

from headforcing.adapter import Adapter, find_adapter
from headforcing.apply import apply_head_forcing
from headforcing.errors import AlreadyAppliedError, OptionError, ProfileError
from headforcing.fingerprint import fingerprint
from headforcing.handle import HeadForcing, handles_of
from headforcing.metrics import Look, Metric, find_metric
from headforcing.observation import Observation
from headforcing.origin import ModelFacts
from headforcing.profile import HeadProfile, ProfileFacts
from headforcing.role_json import encode_role
from headforcing.roles import HeadRole, SlidingWindow
from headforcing.strict_json import canonical, digest

METRICS = ("attention_mass", "mass_ratio", "qk_logits", "output_regret")

Progress = Callable[[int, int | None, str], None]
"""Called with what is done, how much there is (`None`: not known), and what it is."""


@dataclass(frozen=True)
class Protocol:
    """How a profile is measured.

    The published protocol of Head Forcing (third party) is 20 prompts of 30 s, 3 random chunks after the
    third, all denoising steps. Which history the heads see past the window is our choice.

    Attributes:
        starts: first frames of the chunks to measure; `None`: every chunk that has a history.
        queries: tokens per query frame to follow, drawn once per pass; `None`: all, exactly.
        seed: of that drawing, which has a generator of its own.
        history: the role of all heads meanwhile; default: the first frame and the last ones, `window`
            frames in all, at positions inside the window. Until the window is full that is what the
            model does anyway; after that the first frame stays in view, so that the mass on it is known.
            `SlidingWindow(window, positions="absolute")` is the model's own cache, bit for bit.
        window: frames the model was trained on; default: what the model says.
        chunk: frames of the longest chunk; default: what the model says.
    """

    starts: Collection[int] | None = None
    queries: int | None = None
    seed: int = 0
    history: HeadRole | None = None
    window: int | None = None
    chunk: int | None = None


def profile_heads(
    model: nn.Module,
    run: Callable[..., object],
    metrics: Sequence[str | Metric] = METRICS,
    *,
    prompts: Sequence[str] | None = None,
    protocol: Protocol | None = None,
    adapter: Adapter | None = None,
    base_model: str | None = None,
    progress: Progress | None = None,
) -> HeadProfile:
    """Measures every head of a model while it generates whatever `run` generates.

    Measuring changes no bit of what the model computes and draws no global random numbers. All metrics
    are taken in one rollout. The model is left as it was found, also where `run` fails.

    Args:
        model: the model, head forcing not applied.
        run: generates with the model: called once without arguments, or once with every prompt. Several
            videos, batches and CFG branches are told apart.
        metrics: names of metrics, or metrics.
        prompts: given to `run` one by one; their hash is kept.
        protocol: what is measured, and how exactly.
        adapter: the model's adapter; default: the one that fits.
        base_model: public name of the checkpoint, to be kept with the profile.
        progress: called after every chunk and every prompt.

    Raises:
        AlreadyAppliedError: head forcing is applied to the model.
        OptionError: no metric, one of them twice, or no prompt.
        ProfileError: `run` made no pass that could be measured.
    """
    if handles_of(model):
        raise AlreadyAppliedError("profiling applies a role of its own: remove head forcing first")
    protocol, chosen = protocol or Protocol(), _metrics(metrics)
    if prompts is not None and not prompts:
        raise OptionError("prompts is empty: give at least one, or leave it out and let run() choose")
    adapter = find_adapter(model) if adapter is None else adapter
    window = adapter.window(model) if protocol.window is None else protocol.window
    history = protocol.history or SlidingWindow(window, sink=1, positions="compact")
    chunk = adapter.chunk(model) if protocol.chunk is None else protocol.chunk
    with apply_head_forcing(model, history, adapter=adapter, window=window, chunk=chunk) as handle:
        meter = _Meter(handle, chosen, protocol, progress)
        with handle.observe(meter):
            for number, prompt in enumerate(prompts or [None]):
                run() if prompt is None else run(prompt)
                meter.end_run()
                if progress and prompts is not None:
                    progress(number + 1, len(prompts), "prompts")
        history = handle.roles.layers[0][0]
    facts = model_facts(model, adapter, window=window, chunk=chunk, base_model=base_model)
    settings = {
        "starts": None if protocol.starts is None else sorted(protocol.starts),
        "queries": protocol.queries,
        "seed": protocol.seed,
        "history": encode_role(history),
    }
    return meter.profile(
        ProfileFacts(
            model=facts,
            metrics={metric.name: metric.settings() for metric in chosen},
            protocol=settings,
            prompts=None if prompts is None else digest(canonical(list(prompts))),
            library=version("headforcing"),
            torch=torch.__version__,
        )
    )


def model_facts(
    model: nn.Module, adapter: Adapter, *, window: int, chunk: int, base_model: str | None = None
) -> ModelFacts:
    """What a profile and a role map say about the model they were measured on."""
    shapes = [adapter.heads(module) for _, module in adapter.attentions(model)]
    return ModelFacts(
        layers=len(shapes),
        heads=shapes[0][0],
        head_dim=shapes[0][1],
        window=window,
        chunk=chunk,
        model_class=type(model).__name__,
        base_model=base_model,
        fingerprint=fingerprint(model, adapter),
    )


def _metrics(metrics: Sequence[str | Metric]) -> list[Metric]:
    chosen = [find_metric(metric) if isinstance(metric, str) else metric for metric in metrics]
    names = [metric.name for metric in chosen]
    if not names or len(set(names)) < len(names):
        raise OptionError(f"metrics are {names}: expected at least one, each once")
    return chosen


@dataclass(eq=False)
class _Pass:
    """One pass of the model over one chunk of a batch of videos.

    Attributes:
        branch: number of the timeline, `prompts`: number of the prompt of every sample of the batch.
        found: per layer, what the metrics said.
    """

    branch: int
    prompts: range
    start: int
    step: int
    clean: bool
    rows: Tensor | None
    found: list[dict[str, Tensor]] = field(default_factory=list)


class _Meter:
    """An observer that follows every pass and keeps what the metrics say."""

    def __init__(
        self, handle: HeadForcing, metrics: Sequence[Metric], protocol: Protocol, progress: Progress | None
    ) -> None:
        self.layers, self.window = handle.roles.shape[0], handle.options.window
        self.metrics, self.protocol, self.progress = metrics, protocol, progress
        self.generator = torch.Generator().manual_seed(protocol.seed)
        self.done: list[_Pass] = []
        self._now: _Pass | None = None
        self._last: MutableMapping[object, _Pass] = weakref.WeakKeyDictionary()  # by timeline
        self._branches = itertools.count()
        self._prompts = range(0)
        self._moved = True  # whether a video of these prompts went past its first chunk

    def __call__(self, seen: Observation) -> None:
        """Layers are told by their number, passes by the first layer: calls are never counted."""
        if seen.layer == 0:
            self._now = self._last[seen.timeline] = self._begin(seen)
        for metric in self.metrics:
            metric.watch(seen, self.window)
        now = self._now
        if now is None or now.start != seen.call.start or len(now.found) != seen.layer:
            return  # a layer that is called alone is no pass of the model
        if not self._wanted(seen):
            return
        look, found = Look(seen, self.window, now.rows), {}
        for metric in self.metrics:
            for name, value in metric.measure(look).items():
                found[f"{metric.name}.{name}"] = value
        now.found.append(found)
        if len(now.found) == self.layers:
            self.done.append(now)

    def end_run(self) -> None:
        """Whatever comes next belongs to another prompt."""
        self._last.clear()
        self._now, self._moved = None, True

    def profile(self, facts: ProfileFacts) -> HeadProfile:
        """Everything that was kept, as a table.

        Raises:
            ProfileError: nothing was kept.
        """
        done = self.done
        if not done:
            wanted = self.protocol.starts
            where = "" if wanted is None else f" that starts at one of the frames {sorted(wanted)}"
            raise ProfileError(
                f"run() made no pass over a chunk with a history{where}: generate at least two chunks"
            )
        final = {(made.branch, made.prompts, made.start): made for made in done}  # the last one stays
        clean = [made.clean or final[made.branch, made.prompts, made.start] is made for made in done]
        rows = [(prompt, made.start, made.step) for made in done for prompt in made.prompts]
        prompt, start, step = torch.tensor(rows).unbind(1)
        counts = torch.tensor([len(made.prompts) for made in done])
        values = {
            name: torch.cat([torch.stack([layer[name] for layer in made.found], 1) for made in done])
            for name in done[0].found[0]
        }
        return HeadProfile(
            facts,
            prompt.contiguous(),
            start.contiguous(),
            step.contiguous(),
            torch.tensor(clean).repeat_interleave(counts),
            {name: value.to("cpu", torch.float32) for name, value in values.items()},
        )

    def _begin(self, seen: Observation) -> _Pass:
        """One more pass over the same chunk, over the next one, or over the first one of another video."""
        start, before = seen.call.start, self._last.get(seen.timeline)
        again = before is not None and before.start == start
        if start == 0 and not again and self._moved:
            self._prompts = range(self._prompts.stop, self._prompts.stop + seen.q.shape[0])
            self._moved = False
        self._moved = self._moved or start > 0
        if self.progress and not again:
            self.progress(start + seen.call.grid[0], None, "frames")
        return _Pass(
            next(self._branches) if before is None else before.branch,
            self._prompts if before is None or (start == 0 and not again) else before.prompts,
            start,
            before.step + 1 if before is not None and again else 0,
            seen.call.phase == "commit",
            self._rows(seen),
        )

    def _wanted(self, seen: Observation) -> bool:
        starts = self.protocol.starts
        return len(seen.frames[0]) > seen.call.grid[0] and (starts is None or seen.call.start in starts)

    def _rows(self, seen: Observation) -> Tensor | None:
        """As many queries of every frame, the same for all layers and metrics."""
        count, tokens = self.protocol.queries, seen.call.tokens_per_frame
        if count is None or count >= tokens:
            return None
        drawn = [
            frame * tokens + torch.randperm(tokens, generator=self.generator)[:count].sort().values
            for frame in range(seen.call.grid[0])
        ]
        return torch.cat(drawn).to(seen.q.device)
