"""Measures what the heads of a model attend to while it generates."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import nn

from headforcing.adapters.base import Adapter, find_adapter
from headforcing.apply import apply_head_forcing
from headforcing.apply.handles import handles_of
from headforcing.errors import AlreadyAppliedError, OptionError, ProfileError
from headforcing.measure.meter import Meter, Progress
from headforcing.measure.metrics import Metric, find_metric
from headforcing.measure.profile import HeadProfile, ProfileFacts
from headforcing.roles import HeadRole, SlidingWindow
from headforcing.roles.maps.file import encode_role
from headforcing.roles.maps.fingerprint import fingerprint
from headforcing.roles.maps.origin import ModelFacts
from headforcing.roles.maps.strict_json import canonical, digest

METRICS = ("attention_mass", "mass_ratio", "qk_logits", "output_regret")


@dataclass(frozen=True)
class Protocol:
    """How a profile is measured.

    The published protocol of Head Forcing (third party) is 20 prompts of 30 s, 3 random chunks after the
    third, all denoising steps. What heads attend to once the window overflows is our choice.

    Attributes:
        starts: first frames of the chunks to measure; `None`: every chunk that has a history.
        queries: queries to measure per frame, drawn once per pass; `None`: all.
        seed: seed of that draw, which uses a generator of its own.
        history: the role of all heads while measuring; default: the first frame and the last ones, `window`
            frames in all, at positions inside the window. Until the window overflows this equals the model
            bit for bit. After that the first frame is still attended to, so that its mass is known, and the
            video differs from the one the model alone would generate.
            `SlidingWindow(window, sink, positions="absolute")` with the model's own numbers reproduces the
            model's video at any length, `Full()` if the model evicts nothing.
        window: frames the model was trained on; default: what the model says.
        chunk: frames of the longest chunk; default: what the model says.

    Raises:
        OptionError: a number is invalid.
    """

    starts: Collection[int] | None = None
    queries: int | None = None
    seed: int = 0
    history: HeadRole | None = None
    window: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.starts is not None:
            starts = tuple(sorted({operator.index(start) for start in self.starts}))
            if not starts or starts[0] < 0:
                raise OptionError(f"starts is {self.starts!r}: expected first frames of chunks, >= 0")
            object.__setattr__(self, "starts", starts)
        if self.queries is not None and (type(self.queries) is not int or self.queries < 1):
            raise OptionError(f"queries is {self.queries!r}: expected at least one token per frame")


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
    """Measures every head of a model while `run` generates videos with it.

    Measuring does not change a bit of what the model computes with the given history (`Protocol.history`),
    and draws no global random numbers. All metrics are measured in one rollout. The model is restored
    afterwards, also if `run` fails. Base models whose calls carry no cache object cannot be profiled yet.

    Args:
        model: the model, without head forcing.
        run: generates with the model: called once without arguments, or once per prompt. Videos in a batch,
            or one after the other, are counted separately; CFG branches with separate caches count as one
            video; CFG inside the batch looks like two videos.
        metrics: names of metrics, or metrics.
        prompts: passed to `run` one by one; their hash is stored.
        protocol: which passes and queries are measured.
        adapter: the model's adapter; default: the one that fits.
        base_model: public name of the checkpoint, stored in the profile.
        progress: called after every chunk and every prompt.

    Raises:
        AlreadyAppliedError: head forcing is applied to the model.
        OptionError: there is no metric, one is given twice, or there is no prompt.
        ProfileError: `run` made no pass that could be measured, a metric did not return one number or series
            per head, or the window or chunk of the model changed while it ran.
    """
    if handles_of(model):
        raise AlreadyAppliedError("profiling applies a role of its own: remove head forcing first")
    protocol, chosen = protocol or Protocol(), _metrics(metrics)
    texts = _prompts(prompts)
    adapter = find_adapter(model) if adapter is None else adapter
    window, chunk = sizes(model, adapter, protocol)
    history = protocol.history or SlidingWindow(window, sink=1, positions="compact")
    if "query" in history.depends_on or history.compressed() is not None:
        raise OptionError(
            f"history is {history}: expected a role of whole frames, the same for all query frames"
        )
    with apply_head_forcing(model, history, adapter=adapter, window=window, chunk=chunk) as handle:
        for metric in chosen:
            metric.begin(window, chunk)
        facts = ProfileFacts(
            model=model_facts(model, adapter, window=window, chunk=chunk, base_model=base_model),
            metrics={metric.name: metric.settings() for metric in chosen},
            protocol={
                "starts": protocol.starts,
                "queries": protocol.queries,
                "seed": protocol.seed,
                "history": encode_role(handle.roles.layers[0][0]),
            },
            prompts=None if texts is None else digest(canonical(texts)),
            library=version("headforcing"),
            torch=torch.__version__,
        )
        canonical(facts.model_dump(mode="json"))  # fails here, before anything runs, if it cannot be saved
        meter = Meter(
            len(handle.roles.layers),
            chosen,
            starts=protocol.starts,
            queries=protocol.queries,
            seed=protocol.seed,
            window=window,
            progress=progress,
        )
        with handle.observe(meter):
            for number, text in enumerate([None] if texts is None else texts):
                meter.begin_run(None if text is None else number)
                run() if text is None else run(text)
                if progress and texts is not None:
                    progress(number + 1, len(texts), "prompts")
        status = handle.status()
    if sizes(model, adapter, protocol) != (window, chunk):
        raise ProfileError(
            f"window and chunk of the model were {(window, chunk)} and became "
            f"{sizes(model, adapter, protocol)} while it ran: build the pipeline before profiling"
        )
    return meter.profile(facts, calls=status.calls, bypassed=status.bypassed)


def sizes(model: nn.Module, adapter: Adapter, protocol: Protocol) -> tuple[int, int]:
    """Window and chunk, in frames: those of the protocol, or else those of the model."""
    return (
        adapter.window(model) if protocol.window is None else protocol.window,
        adapter.chunk(model) if protocol.chunk is None else protocol.chunk,
    )


def model_facts(
    model: nn.Module, adapter: Adapter, *, window: int, chunk: int, base_model: str | None = None
) -> ModelFacts:
    """The facts about a model that profiles and role maps record."""
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


def _prompts(prompts: Sequence[str] | None) -> list[str] | None:
    if prompts is None:
        return None
    texts = [] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise OptionError(f"prompts is {prompts!r}: expected a list of at least one prompt")
    return texts


def _metrics(metrics: Sequence[str | Metric]) -> list[Metric]:
    if isinstance(metrics, str):
        raise OptionError(f"metrics is {metrics!r}: expected a list, [{metrics!r}]")
    chosen = [find_metric(metric) if isinstance(metric, str) else metric for metric in metrics]
    for metric in chosen:
        if not isinstance(metric, Metric):
            raise OptionError(f"{metric!r} is not a metric: expected a name or an instance of Metric")
    names = [metric.name for metric in chosen]
    if not names or len(set(names)) < len(names):
        raise OptionError(f"metrics are {names}: expected at least one, each once")
    return chosen
