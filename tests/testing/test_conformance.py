"""The conformance kit: every adapter of the repository sits it, and it finds the bugs that adapters have."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

from headforcing.adapters.base import Adapter, adapters, bind
from headforcing.adapters.wan import WanAdapter
from headforcing.errors import ExternalEditError, OptionError
from headforcing.integrations.causvid import CausVid
from headforcing.integrations.longlive import LongLive
from headforcing.integrations.self_forcing import SelfForcing
from headforcing.roles import HeadRole, SlidingWindow
from headforcing.testing import Host, check_adapter, check_names
from headforcing.testing.conformance import _CHECKS, Report
from tests.hosts import find_host, host_names
from tests.hosts.causvid import CausVidHost
from tests.hosts.longlive import LongLiveHost
from tests.hosts.self_forcing import SelfForcingHost


def test_every_adapter_in_the_folder_has_a_host() -> None:
    assert set(host_names()) == {adapter.name for adapter in adapters()}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "self_forcing" else pytest.mark.slow) for n in host_names()]
)
def test_every_adapter_in_the_folder_passes(name: str) -> None:
    host = find_host(name)
    if (missing := host.missing()) is not None:
        pytest.skip(missing)
    report = check_adapter(None, host)
    report.raise_if_failed()
    assert report.adapter == name
    assert {r.name for r in report.results if r.outcome == "skipped"} == host.unconcerned


@pytest.mark.slow
def test_self_forcing_passes_without_a_sink_and_with_the_adapter_given() -> None:
    check_adapter(SelfForcing(), SelfForcingHost(sink=0)).raise_if_failed()


def test_every_check_says_what_it_proves() -> None:
    assert len(check_names()) == len(set(check_names())) >= 25
    assert [check.__name__ for check in _CHECKS if not inspect.getdoc(check)] == []


# Adapters with a bug --------------------------------------------------------------------------------


class LayersBackwards(SelfForcing):
    def attentions(self, model: nn.Module) -> Any:
        yield from reversed(list(super().attentions(model)))


class LayerMissing(SelfForcing):
    def attentions(self, model: nn.Module) -> Any:
        yield from list(super().attentions(model))[:-1]


class WrongPaths(SelfForcing):
    def attentions(self, model: nn.Module) -> Any:
        for name, module in super().attentions(model):
            yield name.removesuffix(".self_attn"), module


class ByClassName(SelfForcing):
    def why_not(self, model: nn.Module) -> str | None:
        known = any(type(m).__name__ == "DemoCausalSelfAttention" for m in model.modules())
        return None if known else "no DemoCausalSelfAttention"


class Greedy(SelfForcing):
    def why_not(self, model: nn.Module) -> str | None:
        return None


class AnySignature(SelfForcing):
    def why_not(self, model: nn.Module) -> str | None:
        return None if any(hasattr(m, "norm_q") and hasattr(m, "o") for m in model.modules()) else "no norm_q"


class ReadsTokens(SelfForcing):
    def read(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = super().read(module, args, kwargs)
        return call and dataclasses.replace(call, start=int(call.arguments["current_start"]))


class ReadsNothing(SelfForcing):
    def read(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return None


class ReadsUncached(SelfForcing):
    def read(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if bind(module, args, kwargs)["kv_cache"] is None:
            kwargs = {**kwargs, "kv_cache": {"k": torch.zeros(1)}}
            args = args[:5]
        return super().read(module, args, kwargs)


class SharesArguments(SelfForcing):
    shared: dict[str, Any] = {}  # noqa: RUF012 - the bug

    def read(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = super().read(module, args, kwargs)
        self.shared.update(call.arguments if call else {})
        return call and dataclasses.replace(call, arguments=self.shared)


class SplitsSharing(SelfForcing):
    def split(self, module: nn.Module, call: Any) -> Any:
        return dataclasses.replace(call), dataclasses.replace(call)


class FrozenArguments(SelfForcing):
    def read(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = super().read(module, args, kwargs)
        return call and dataclasses.replace(call, arguments=MappingProxyType(call.arguments))  # type: ignore[arg-type]


class AnchorIsAView(SelfForcing):
    def read(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = super().read(module, args, kwargs)
        return call and dataclasses.replace(call, anchor=call.anchor[:])


class AnchorIsTheDict(SelfForcing):
    def read(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = super().read(module, args, kwargs)
        return call and dataclasses.replace(call, anchor=call.arguments["kv_cache"])


class AnchorIsTheModule(SelfForcing):
    def read(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = super().read(module, args, kwargs)
        return call and dataclasses.replace(call, anchor=module.q)


class WindowInTokens(SelfForcing):
    def window(self, model: nn.Module) -> int:
        return super().window(model) * 16


class OneSinkMore(SelfForcing):
    def own_role(self, module: nn.Module) -> HeadRole:
        return dataclasses.replace(super().own_role(module), sink=2)


class ChunkOfOne(SelfForcing):
    def chunk(self, model: nn.Module) -> int:
        return 1


class SwapsQueriesAndKeys(SelfForcing):
    def project(self, module: nn.Module, call: Any) -> Any:
        q, k, v = super().project(module, call)
        return k, q, v


class ForgetsTheKeyNorm(SelfForcing):
    def project(self, module: Any, call: Any) -> Any:
        q, k, v = super().project(module, call)
        return q, module.k(call.x).view(k.shape), v


class ForgetsTheQueryNorm(SelfForcing):
    def project(self, module: Any, call: Any) -> Any:
        q, k, v = super().project(module, call)
        return module.q(call.x).view(q.shape), k, v


class NormsTheValues(SelfForcing):
    def project(self, module: Any, call: Any) -> Any:
        q, k, v = super().project(module, call)
        return q, k, module.norm_k(v.flatten(3)).view(v.shape)


class OneSampleOnly(SelfForcing):
    def project(self, module: Any, call: Any) -> Any:
        return tuple(part[:1] for part in super().project(module, call))


class HeadsAndDimSwapped(SelfForcing):
    def heads(self, module: nn.Module) -> tuple[int, int]:
        return super().heads(module)[::-1]


class RotatesOneTooFar(SelfForcing):
    def rotate(self, x: Any, call: Any, positions: Any, patch: int = 1) -> Any:
        return super().rotate(x, call, [place + 1 for place in positions], patch)


class RotatesByTheFirst(SelfForcing):
    def rotate(self, x: Any, call: Any, positions: Any, patch: int = 1) -> Any:
        first = positions[0]
        return super().rotate(x, call, range(first, first + len(positions)), patch)


class RotatesInFloat32(SelfForcing):
    def rotate(self, x: Any, call: Any, positions: Any, patch: int = 1) -> Any:
        low = dict(call.arguments, freqs=call.arguments["freqs"].to(torch.complex64))
        return super().rotate(x, dataclasses.replace(call, arguments=low), positions, patch)


class RotatesToFloat32(SelfForcing):
    def rotate(self, x: Any, call: Any, positions: Any, patch: int = 1) -> Any:
        return super().rotate(x, call, positions, patch).float()


class RotatesWithinTheTable(SelfForcing):
    def rotate(self, x: Any, call: Any, positions: Any, patch: int = 1) -> Any:
        last = len(call.arguments["freqs"]) - 1
        return super().rotate(x, call, [min(place, last) for place in positions], patch)


class RotatesMergedPatchesAsPlain(SelfForcing):
    def rotate(self, x: Any, call: Any, positions: Any, patch: int = 1) -> Any:
        if patch > 1:
            small = (call.grid[0], call.grid[1] // patch, call.grid[2] // patch)
            call = dataclasses.replace(call, grid=small)
        return super().rotate(x, call, positions)


class WidthForHeight(CausVid):
    def rotate(self, x: Any, call: Any, positions: Any, patch: int = 1) -> Any:
        frames, height, width = call.grid
        return super().rotate(x, dataclasses.replace(call, grid=(frames, width, height)), positions, patch)


class AlwaysNoisy(SelfForcing):
    def phase(self, args: Any, kwargs: Any) -> Any:
        return "denoise"


class ClockOfABlock(SelfForcing):
    def clock(self, model: nn.Module) -> nn.Module:
        return model.blocks[0].cross_attn  # type: ignore[union-attr, index, return-value]

    def phase(self, args: Any, kwargs: Any) -> Any:
        return "clean"


class CountsNothing(SelfForcing):
    def output(self, module: Any, out: Any, call: Any, memo: Any) -> Any:
        return module.o(out.flatten(2))


class ForgetsToProject(SelfForcing):
    def output(self, module: Any, out: Any, call: Any, memo: Any) -> Any:
        super().output(module, out, call, memo)
        return out.flatten(2)


class NeverANewVideo(SelfForcing):
    def begins_video(self, call: Any, memo: Any) -> bool:
        return False


class AlwaysANewVideo(SelfForcing):
    def begins_video(self, call: Any, memo: Any) -> bool:
        return True


class ForgetsNothing(SelfForcing):
    def forget(self, memo: Any) -> None:
        pass


class NotesOnItself(SelfForcing):
    def __init__(self) -> None:
        super().__init__()
        self.memo: dict[str, Any] = {}

    def begins_video(self, call: Any, memo: Any) -> bool:
        return super().begins_video(call, self.memo)

    def output(self, module: Any, out: Any, call: Any, memo: Any) -> Any:
        return super().output(module, out, call, self.memo)


class RemembersTheKeys(SelfForcing):
    def release(self, call: Any, memo: Any) -> int:
        memo["cache"] = call.arguments["kv_cache"]
        return super().release(call, memo)


class NeverGivesBack(SelfForcing):
    def give_back(self, anchor: object, memo: Any) -> None:
        pass


class GivesBackUncounted(SelfForcing):
    def give_back(self, anchor: object, memo: Any) -> None:
        WanAdapter.give_back(self, anchor, memo)


class ReleasesNothing(SelfForcing):
    def release(self, call: Any, memo: Any) -> int:
        return 10**6


class CannotBePickled(SelfForcing):
    def __init__(self) -> None:
        super().__init__()
        self.scale = lambda x: x


class ReadsTheWeights(SelfForcing):
    def project(self, module: Any, call: Any) -> Any:
        q, k, v = super().project(module, call)
        inner = getattr(module.v, "inner", module.v)
        return q, k, nn.functional.linear(call.x, inner.weight, inner.bias).view(v.shape)


class KeepsTheOutputLayer(SelfForcing):
    """As one that stored sub-modules when it was applied."""

    def output(self, module: Any, out: Any, call: Any, memo: Any) -> Any:
        y = super().output(module, out, call, memo)
        return y if isinstance(module.o, nn.Linear) else module.o.inner(out.flatten(2))


class GivesBackAnywhere(SelfForcing):
    def give_back(self, anchor: Any, memo: Any) -> None:
        super().give_back(anchor, memo)
        anchor.zero_()


class KeepsThePrompt(SelfForcing):
    def forget_prompt(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        pass


class OneCrossAttention(SelfForcing):
    def cross_attentions(self, model: nn.Module) -> Any:
        return super().cross_attentions(model)[:1]


class Raises(SelfForcing):
    def project(self, module: nn.Module, call: Any) -> Any:
        raise KeyError("norm_q")


class ReturnsTheOutputOnly(LongLive):
    def output(self, module: Any, out: Any, call: Any, memo: Any) -> Any:
        return super().output(module, out, call, memo)[0]


class LetsTheModelWrite(LongLive):
    def output(self, module: Any, out: Any, call: Any, memo: Any) -> Any:
        y, (end, _, nothing) = super().output(module, out, call, memo)
        return y, (end, end, nothing)


BUGS: list[tuple[type[Adapter], str]] = [
    (LayersBackwards, "layers_in_order"),
    (LayerMissing, "layers_found"),
    (WrongPaths, "layers_found"),
    (ByClassName, "known_by_structure"),
    (Greedy, "refuses_foreign_models"),
    (AnySignature, "other_signature_refused"),
    (ReadsTokens, "read_counts_frames"),
    (ReadsNothing, "layers_in_order"),
    (ReadsUncached, "uncached_calls_pass_through"),
    (SharesArguments, "arguments_belong_to_the_call"),
    (SplitsSharing, "arguments_belong_to_the_call"),
    (FrozenArguments, "arguments_belong_to_the_call"),
    (AnchorIsAView, "anchor_is_the_timeline"),
    (AnchorIsTheDict, "anchor_is_the_timeline"),
    (AnchorIsTheModule, "anchor_is_the_timeline"),
    (WindowInTokens, "heads_and_sizes"),
    (ChunkOfOne, "heads_and_sizes"),
    (OneSinkMore, "own_memory_is_the_hosts"),
    (SwapsQueriesAndKeys, "keys_are_the_hosts"),
    (ForgetsTheKeyNorm, "keys_are_the_hosts"),
    (ForgetsTheQueryNorm, "first_chunk"),
    (NormsTheValues, "values_are_the_hosts"),
    (OneSampleOnly, "project_shapes"),
    (HeadsAndDimSwapped, "values_are_the_hosts"),
    (RotatesOneTooFar, "rotation_is_the_hosts"),
    (RotatesByTheFirst, "rotation_is_per_frame"),
    (RotatesInFloat32, "rotation_is_the_hosts"),
    (RotatesToFloat32, "rotation_keeps_the_dtype"),
    (RotatesWithinTheTable, "rotation_reaches_far"),
    (RotatesMergedPatchesAsPlain, "rotation_of_merged_patches"),
    (WidthForHeight, "rotation_is_the_hosts"),
    (AlwaysNoisy, "clock_tells_the_clean_pass"),
    (ClockOfABlock, "clock_tells_the_clean_pass"),
    (CountsNothing, "counters_move"),
    (ForgetsToProject, "first_chunk"),
    (NeverANewVideo, "edited_cache_refused"),
    (AlwaysANewVideo, "rewritten_chunk"),
    (ForgetsNothing, "edited_cache_refused"),
    (NotesOnItself, "rewritten_chunk"),
    (RemembersTheKeys, "dropped_cache_is_freed"),
    (NeverGivesBack, "cache_comes_back"),
    (GivesBackUncounted, "cache_comes_back"),
    (ReleasesNothing, "release_frees"),
    (CannotBePickled, "can_be_saved"),
    (ReadsTheWeights, "wrapped_layers_are_called"),
    (KeepsTheOutputLayer, "wrapped_layers_are_called"),
    (GivesBackAnywhere, "inference_mode"),
    (KeepsThePrompt, "prompt_switch_takes_effect"),
    (OneCrossAttention, "prompt_switch_takes_effect"),
    (Raises, "project_shapes"),
    (ReturnsTheOutputOnly, "serves_every_layer"),
    (LetsTheModelWrite, "counters_move"),
]


def sit(bug: type[Adapter], only: Sequence[str] | None = None) -> Report:
    hosts: dict[Any, type[Host]] = {CausVid: CausVidHost, LongLive: LongLiveHost}
    host = next((host for kind, host in hosts.items() if issubclass(bug, kind)), SelfForcingHost)
    return check_adapter(bug(), host(), only=only, stop=True)


@pytest.mark.parametrize(("bug", "named"), BUGS, ids=lambda value: getattr(value, "__name__", value))
def test_a_bug_is_found_by_its_check(bug: type[Adapter], named: str) -> None:
    (result,) = sit(bug, only=[named]).results
    assert result.outcome == "failed"
    assert len(result.reason) > 20


@pytest.mark.slow
@pytest.mark.parametrize(("bug", "named"), BUGS, ids=lambda value: getattr(value, "__name__", value))
def test_the_kit_names_the_check_that_finds_a_bug(bug: type[Adapter], named: str) -> None:
    report = sit(bug)
    assert report.failed, "the kit passes an adapter with a bug"
    assert report.failed[0].name == named, str(report)
    assert len(report.failed[0].reason) > 20


def test_a_failure_says_what_was_raised_and_where() -> None:
    report = check_adapter(Raises(), SelfForcingHost(), only=["project_shapes"])
    assert not report.ok
    assert "KeyError: 'norm_q' (in project, " in report.failed[0].reason
    assert "failed project_shapes: KeyError" in str(report)
    with pytest.raises(AssertionError, match="0 passed, 1 failed, 0 skipped"):
        report.raise_if_failed()


def test_nothing_is_asked_of_layers_that_were_not_found() -> None:
    report = check_adapter(LayerMissing(), SelfForcingHost())
    assert [result.name for result in report.failed] == ["layers_found"]
    assert report.results[-1].reason == "requires layers_found"


class Unanchored(LongLive):
    """A host whose calls carry no cache object, so that its timelines must be named."""

    release = Adapter.release

    def read(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = super().read(module, args, kwargs)
        return call and dataclasses.replace(call, anchor=None)


@pytest.mark.slow
def test_timelines_that_have_no_object_are_named_by_the_kit() -> None:
    report = check_adapter(Unanchored(), LongLiveHost())
    report.raise_if_failed()
    skipped = {result.name for result in report.results if result.outcome == "skipped"}
    unanchored = {"anchor_is_the_timeline", "dropped_cache_is_freed"}
    assert skipped == unanchored | {"release_frees", "cache_comes_back"}


class Spare(CausVidHost):
    """A host that can do no more than it must."""

    single = False
    cached, uncached, switch_prompt = Host.cached, Host.uncached, Host.switch_prompt  # type: ignore[assignment]


@pytest.mark.slow
def test_what_a_host_cannot_do_is_skipped_with_a_reason() -> None:
    report = check_adapter(None, Spare())
    report.raise_if_failed()
    skipped = {result.name: result.reason for result in report.results if result.outcome == "skipped"}
    assert {"keys_are_the_hosts", "single_frames", "uncached_calls_pass_through"} <= set(skipped)
    assert all(skipped.values())


def test_the_untouched_model_is_not_mistaken_for_a_dense_one() -> None:
    """A host that says that it remembers everything is found out where it evicts."""
    host = SelfForcingHost()
    host.memory = SlidingWindow(6, 1, positions="absolute")
    report = check_adapter(None, host, only=["dense_parity", "parity_through_eviction"])
    assert [result.name for result in report.failed] == ["parity_through_eviction"]


def test_what_is_no_host_adapter_or_check_is_refused() -> None:
    with pytest.raises(
        OptionError, match=r"expected an instance of a subclass of headforcing\.testing\.Host"
    ):
        check_adapter(None, nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"expected an instance of a subclass of headforcing\.Adapter"):
        check_adapter(SelfForcing, SelfForcingHost())  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no check is called 'all': expected one of host_repeats_itself, "):
        check_adapter(None, SelfForcingHost(), only=["all"])


class Forgetful(SelfForcingHost):
    def new_video(self, model: nn.Module, caches: Any) -> None:
        pass


class Deaf(SelfForcingHost):
    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Any:
        return super().call(model, caches, start, frames, 0)


class Random(SelfForcingHost):
    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Any:
        return super().call(model, caches, start, frames, draw) + torch.rand(())


class OneSample(SelfForcingHost):
    def caches(self, model: nn.Module, batch: int = 1) -> Any:
        assert batch == 1, "one video at a time"
        return super().caches(model, batch)


class Broken(SelfForcingHost):
    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Any:
        raise RuntimeError("sizes of tensors must match")


class LayersMissing(SelfForcingHost):
    def __init__(self) -> None:
        super().__init__()
        self.memory = [self.memory]  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("host", "named"),
    [
        (Forgetful, "host_starts_again"),
        (Deaf, "host_depends_on_its_input"),
        (Random, "host_repeats_itself"),
        (Broken, "host_repeats_itself"),
        (LayersMissing, "host_repeats_itself"),
    ],
)
def test_a_broken_host_is_not_blamed_on_the_adapter(host: type[Host], named: str) -> None:
    report = check_adapter(SelfForcing(), host())
    assert [result.name for result in report.failed] == [named]
    assert report.count("passed") < 3


# Every check can fail -----------------------------------------------------------------------------


class NeverFits(SelfForcing):
    def why_not(self, model: nn.Module) -> str | None:
        return "not today"


class RotatesBySquares(SelfForcing):
    def rotate(self, x: Any, call: Any, positions: Any, patch: int = 1) -> Any:
        return super().rotate(x, call, [place**2 for place in positions], patch)


class RotatesToWholeFrames(SelfForcing):
    def rotate(self, x: Any, call: Any, positions: Any, patch: int = 1) -> Any:
        return super().rotate(x, call, [int(place) for place in positions], patch)


class RotatesToTheNearestFrame(SelfForcing):
    def rotate(self, x: Any, call: Any, positions: Any, patch: int = 1) -> Any:
        return super().rotate(x, call, [round(place) for place in positions], patch)


class RotatesWithinSix(SelfForcing):
    def rotate(self, x: Any, call: Any, positions: Any, patch: int = 1) -> Any:
        return super().rotate(x, call, [min(place, 5) for place in positions], patch)


class ReadsThreeFrames(SelfForcing):
    def read(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = super().read(module, args, kwargs)
        return call and dataclasses.replace(call, grid=(3, *call.grid[1:]))


class OneVideoOnly(SelfForcing):
    def begins_video(self, call: Any, memo: Any) -> bool:
        if super().begins_video(call, memo):
            raise ExternalEditError("the indices became zero")
        return False


class BreaksWhenReset(SelfForcing):
    def forget(self, memo: Any) -> None:
        memo["reset"] = True

    def output(self, module: Any, out: Any, call: Any, memo: Any) -> Any:
        return super().output(module, 2 * out if "reset" in memo else out, call, memo)


class ProjectsWithoutAutocast(SelfForcing):
    def project(self, module: nn.Module, call: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return super().project(module, dataclasses.replace(call, x=call.x.to(module.q.weight.dtype)))  # type: ignore[arg-type, union-attr]


class WindowOfOne(SelfForcing):
    def window(self, model: nn.Module) -> int:
        return 1


class LeavesABuffer(SelfForcing):
    def attentions(self, model: nn.Module) -> Any:
        for path, module in list(super().attentions(model)):
            module.register_buffer("seen", torch.zeros(1))
            yield path, module


class LeavesAnAttribute(SelfForcing):
    def project(self, module: Any, call: Any) -> Any:
        module.last = super().project(module, call)
        return module.last


class HoldsAModule(SelfForcing):
    held: dict[int, Any] = {}  # noqa: RUF012 - the bug

    def project(self, module: Any, call: Any) -> Any:
        q, k, v = super().project(module, call)
        return q, k, self.held.setdefault(0, module).v(call.x).view(v.shape)


class SwitchesTrainingOff(SelfForcing):
    def read(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return super().read(module.eval(), args, kwargs)


class SwitchesGradientsOff(SelfForcing):
    def read(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return super().read(module.requires_grad_(False), args, kwargs)


class StartsWhereTheCacheEnds(SelfForcing):
    def read(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = super().read(module, args, kwargs)
        if call is None:
            return None
        end = int(call.arguments["kv_cache"]["global_end_index"]) // call.tokens_per_frame
        return dataclasses.replace(call, start=min(call.start, end))


class ProjectsToFloat32(SelfForcing):
    def project(self, module: nn.Module, call: Any) -> Any:
        return tuple(part.float() for part in super().project(module, call))

    def output(self, module: Any, out: Any, call: Any, memo: Any) -> Any:
        return super().output(module, out.to(module.o.weight.dtype), call, memo)


class TracesByReading(SelfForcing):
    def traced_call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        traced = super().traced_call(module, args, kwargs)
        return traced if args[2].tolist()[0][0] < 9 else None


class NormsOfOnes(SelfForcingHost):
    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        model = super().model(dtype)
        for block in model.blocks:
            nn.init.ones_(block.self_attn.norm_k.weight)
        return model


class OneChunk(SelfForcingHost):
    dense = 3


CAN_FAIL: dict[str, type[Adapter] | type[Host]] = {
    "host_repeats_itself": Random,
    "host_depends_on_its_input": Deaf,
    "host_starts_again": Forgetful,
    "host_takes_batches": OneSample,
    "weights_are_random": NormsOfOnes,
    "fits": NeverFits,
    "rotation_is_relative": RotatesBySquares,
    "dense_parity": RotatesWithinSix,
    "dense_parity_bf16": RotatesWithinSix,
    "parity_through_eviction": RotatesWithinSix,
    "parity_through_eviction_bf16": RotatesWithinSix,
    "another_role_shows": OneChunk,
    "single_frames": ReadsThreeFrames,
    "batch_of_two": OneSampleOnly,
    "two_caches_in_turn": AnchorIsTheModule,
    "second_video": OneVideoOnly,
    "video_after_reset": BreaksWhenReset,
    "autocast": ProjectsWithoutAutocast,
    "budget_is_kept": AnchorIsAView,
    "positions_in_range": WindowOfOne,
    "state_dict_unchanged": LeavesABuffer,
    "failed_apply_leaves_no_trace": LeavesABuffer,
    "copy_is_independent": HoldsAModule,
    "training_passes_through": SwitchesTrainingOff,
    "gradients_pass_through": SwitchesGradientsOff,
    "threads_are_independent": NotesOnItself,
    "compiled_is_one_operator": TracesByReading,
    "skipped_chunk_refused": StartsWhereTheCacheEnds,
    "other_dtype_refused": ProjectsToFloat32,
    "remove_leaves_no_trace": LeavesAnAttribute,
    "host_works_after_remove": NeverGivesBack,
}


@pytest.mark.parametrize("bug", [RotatesToWholeFrames, RotatesToTheNearestFrame])
def test_fractions_of_frames_are_rotated(bug: type[Adapter]) -> None:
    (result,) = sit(bug, only=["rotation_is_relative"]).results
    assert result.outcome == "failed"
    assert "are fractions cut off" in result.reason


def test_no_check_is_without_a_bug_that_it_finds() -> None:
    assert {named for _, named in BUGS} | set(CAN_FAIL) == set(check_names())


@pytest.mark.parametrize("name", CAN_FAIL)
def test_a_check_can_fail(name: str) -> None:
    bug = CAN_FAIL[name]
    adapter, host = (bug(), SelfForcingHost()) if issubclass(bug, Adapter) else (SelfForcing(), bug())
    report = check_adapter(adapter, host, only=[name])
    assert [result.name for result in report.failed] == [name], str(report)
