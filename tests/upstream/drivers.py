"""Drives a repository's own classes through a scenario, with our library in or out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import headforcing as hf
from headforcing.errors import HeadForcingError

from . import tiny
from .bench import Bench, Caches, Outcome
from .hosts import HOSTS
from .scenarios import Case

PROMPT = "a red cube rolls down the stairs"
OTHER_PROMPT = "two blue spheres in the rain"
SAMPLING_SEED = 0
OVERLAPPING_STARTS = (0, 2, 5, 8, 11)


def run(case: Case) -> Outcome:
    """Run one case on a fresh model."""
    return DRIVERS[case.scenario.driver](HOSTS.get(case.repository, Bench)(case))


def _video(pipeline: Any, noise: Tensor, **given: Tensor) -> Tensor:
    torch.manual_seed(SAMPLING_SEED)
    prompts = [f"{PROMPT} {index}" for index in range(noise.shape[0])]
    with torch.no_grad():
        result: tuple[Tensor, Tensor] = pipeline.inference(noise, prompts, return_latents=True, **given)
    return result[1]


def _few_step(bench: Bench) -> Outcome:
    pipeline = bench.few_step()
    given = {"initial_latent": bench.noise(seed=8, frames=1)} if bench.scenario.image else {}
    return bench.outcome(video=_video(pipeline, bench.noise(), **given))


def _second_video(bench: Bench) -> Outcome:
    pipeline = bench.few_step()
    first = _video(pipeline, bench.noise())
    return bench.outcome(first=first, second=_video(pipeline, bench.noise(seed=9)))


def _rollouts(bench: Bench) -> Outcome:
    """Make a video and another that begins with its last chunk, on the same cache dicts."""
    pipeline = bench.few_step()
    first = _video(pipeline, bench.noise())
    second = _video(pipeline, bench.noise(seed=9), start_latents=first[:, -bench.scenario.chunk :])
    return bench.outcome(video=torch.cat([first, second], dim=1))


def _interactive(bench: Any, global_sink: bool = True) -> Outcome:
    """Switch the prompt; upstream runs its last frames again in one call."""
    pipeline, noise = bench.interactive(global_sink), bench.noise()
    prompts = [[text] * noise.shape[0] for text in (PROMPT, OTHER_PROMPT)]
    switch = bench.scenario.switch
    torch.manual_seed(SAMPLING_SEED)
    with torch.no_grad():
        _, video = pipeline.inference(
            noise, text_prompts_list=prompts, switch_frame_indices=[switch], return_latents=True
        )
    return bench.outcome(video=video)


def _one_switch(bench: Any, global_sink: bool = True) -> Outcome:
    """Switch the prompt in the pipeline that knows two; it does not say that the first frames run again."""
    pipeline, noise = bench.one_switch(global_sink), bench.noise()
    first, second = ([text] * noise.shape[0] for text in (PROMPT, OTHER_PROMPT))
    torch.manual_seed(SAMPLING_SEED)
    with torch.no_grad():
        _, video = pipeline.inference(
            noise,
            text_prompts_first=first,
            text_prompts_second=second,
            switch_frame_index=bench.scenario.switch,
            return_latents=True,
        )
    return bench.outcome(video=video)


def _emptied(bench: Any) -> Outcome:
    """Switch the prompt where upstream empties its cache and takes other first frames."""
    drive = _one_switch if bench.scenario.driver == "emptied unsaid" else _interactive
    try:
        outcome = drive(bench, global_sink=False)
    except HeadForcingError as error:
        bench.facts["refused"] = str(error)
        return bench.outcome()
    outcome.facts["refused"] = ""
    return outcome


def _refused(bench: Bench) -> Outcome:
    """Make a video that our library may refuse."""
    pipeline = bench.few_step()
    try:
        video = _video(pipeline, bench.noise())
    except HeadForcingError as error:
        bench.facts["refused"] = str(error)
        return bench.outcome()
    bench.facts["refused"] = ""
    return bench.outcome(video=video)


def _past_the_end(bench: Bench) -> Outcome:
    """Make a video that is longer than the cache."""
    pipeline = bench.few_step()
    try:
        video = _video(pipeline, bench.noise())
    except (RuntimeError, ValueError):
        bench.facts["ended"] = True
        return bench.outcome()
    bench.facts["ended"] = False
    return bench.outcome(video=video)


def _cfg(bench: Bench) -> Outcome:
    return bench.outcome(video=_video(bench.cfg(), bench.noise()))


def _overlap(bench: Bench) -> Outcome:
    """Send chunks of which the second repeats the last frame of the first."""
    wrapper, noise = bench.wrapper(), bench.noise()
    caches = bench.allocate()
    results = []
    with torch.no_grad():
        for start in OVERLAPPING_STARTS:
            chunk = noise[:, start : start + bench.scenario.chunk]
            for timestep in (1000, 0):
                chunk = _denoise(wrapper, chunk, timestep, start, caches)[1]
                results.append(chunk)
    return bench.outcome(video=torch.cat(results, dim=1))


def _new_prompt(bench: Bench) -> Outcome:
    """Change the prompt behind six frames; upstream is made to hear it by hand, as LongLive does."""

    def switch(caches: Caches) -> None:
        if bench.handle is not None:
            bench.handle.switch_prompt("continue")
            return
        for layer in caches[1]:
            layer["is_init"] = False

    wrapper, caches, noise = bench.wrapper(), bench.allocate(), bench.noise()
    before = _chunks(wrapper, noise[:, :6], 0, caches)
    switch(caches)
    after = _chunks(wrapper, noise[:, 6:], 6, caches, OTHER_PROMPT)
    return bench.outcome(video=torch.cat([before, after], dim=1))


def _cut(bench: Bench) -> Outcome:
    """Cut behind six frames; upstream begins another video instead."""
    wrapper, caches, noise = bench.wrapper(), bench.allocate(), bench.noise()
    start = 6
    before = _chunks(wrapper, noise[:, :6], 0, caches)
    if bench.handle is not None:
        bench.handle.switch_prompt("cut")
    else:
        start, caches = 0, bench.allocate()
    after = _chunks(wrapper, noise[:, 6:], start, caches, OTHER_PROMPT)
    outcome = bench.outcome(video=torch.cat([before, after], dim=1))
    del outcome.tensors["indices"]  # of one cache here, of two there
    return outcome


def _chunks(wrapper: Any, noise: Tensor, start: int, caches: Caches, prompt: str = PROMPT) -> Tensor:
    """Make chunks of three frames, a noisy and a clean pass each."""
    results = []
    with torch.no_grad():
        for offset in range(0, noise.shape[1], 3):
            chunk = noise[:, offset : offset + 3]
            for timestep in (1000, 0):
                chunk = _denoise(wrapper, chunk, timestep, start + offset, caches, prompt)[1]
            results.append(chunk)
    return torch.cat(results, dim=1)


def _in_chunks(bench: Bench) -> Outcome:
    """Make a video chunk by chunk, without a pipeline."""
    return bench.outcome(video=_chunks(bench.wrapper(), bench.noise(), 0, bench.allocate()))


def _flushed(bench: Bench) -> Outcome:
    """Flush the cache as Infinity-RoPE does for a new prompt: the first frame and the last two are left."""
    wrapper, caches, noise = bench.wrapper(), bench.allocate(), bench.noise()
    first = _chunks(wrapper, noise[:, :15], 0, caches)
    frame = tiny.TOKENS_PER_FRAME
    for cache, text in zip(*caches, strict=True):
        text["is_init"] = False
        for name in ("k", "v"):
            cache[name][:, frame : 3 * frame] = cache[name][:, -2 * frame :]
        cache["local_end_index"] = torch.tensor([3 * frame], dtype=torch.long)
        cache["scene_cut"] = False
    second = _chunks(wrapper, noise[:, 15:], 15, caches, OTHER_PROMPT)
    return bench.outcome(video=torch.cat([first, second], dim=1))


def _no_cache(bench: Bench) -> Outcome:
    """Take the path that training takes, where there is no cache."""
    wrapper = bench.wrapper()
    with torch.no_grad():
        flow, clean = _denoise(wrapper, bench.noise(), 500)
    return bench.outcome(flow=flow, clean=clean)


def _gradients(bench: Bench) -> Outcome:
    """Differentiate through one cached pass."""
    wrapper = bench.wrapper()
    _, clean = _denoise(wrapper, bench.noise(), 500, 0, bench.allocate())
    return bench.outcome(clean=clean.detach(), **_attention_gradients(wrapper, clean))


def _gradients_midway(bench: Bench) -> Outcome:
    """Begin a video without gradients, then differentiate through a chunk on the same caches."""
    wrapper, caches, noise = bench.wrapper(), bench.allocate(), bench.noise()
    chunk = bench.scenario.chunk
    with torch.no_grad():
        _, first = _denoise(wrapper, noise[:, :chunk], 1000, 0, caches)
        _denoise(wrapper, first, 0, 0, caches)
    try:
        _, clean = _denoise(wrapper, noise[:, chunk:], 500, chunk, caches)
    except HeadForcingError:
        bench.facts["refused"] = True
        return bench.outcome()
    bench.facts["refused"] = False
    return bench.outcome(clean=clean.detach(), **_attention_gradients(wrapper, clean))


def _attention_gradients(wrapper: Any, clean: Tensor) -> dict[str, Tensor]:
    """Return the gradients of every self-attention weight."""
    torch.autograd.backward(clean.float().square().mean())
    return {
        name: parameter.grad
        for name, parameter in wrapper.named_parameters()
        if ("self_attn" in name or ".to_" in name) and parameter.grad is not None
    }


def _removal(bench: Bench) -> Outcome:
    """Make a video, take the library out, and make it again with the same cache dicts."""
    pipeline = bench.few_step()
    facts = _facts(bench, pipeline)
    _video(pipeline, bench.noise())
    facts["attributes"] = _facts(bench, pipeline)["attributes"]  # pipelines set some, too
    outcome = bench.outcome()
    if bench.handle is not None:
        bench.handle.remove()
        facts = _facts(bench, pipeline)
    outcome.facts = facts
    outcome.tensors["video"] = _video(pipeline, bench.noise())
    outcome.tensors["indices"] = bench.indices()[-1:]  # what came before was given back empty
    outcome.passes = bench.passes
    return outcome


def _denoise(
    wrapper: Any,
    noisy: Tensor,
    timestep: int,
    start: int = 0,
    caches: Caches | None = None,
    prompt: str = PROMPT,
) -> tuple[Tensor, Tensor]:
    """Make one pass; return the flow and the clean prediction."""
    condition = tiny.TextEncoder().to(noisy.dtype)([prompt] * noisy.shape[0])
    kv_cache, text_cache = caches or (None, None)
    flow, clean = wrapper(
        noisy_image_or_video=noisy,
        conditional_dict=condition,
        timestep=torch.full(noisy.shape[:2], timestep),
        kv_cache=kv_cache,
        crossattn_cache=text_cache,
        current_start=start * tiny.TOKENS_PER_FRAME,
    )
    return flow, clean


def _sessions(bench: Any) -> Outcome:
    """Make two videos in sessions of a server, on the same cache dicts."""
    pipeline = bench.few_step()
    first = bench.session(pipeline)
    return bench.outcome(first=first, second=bench.session(pipeline, seed=1))


def _left_session(bench: Any) -> Outcome:
    """Take the library out between two videos on the same cache dicts."""
    pipeline = bench.few_step()
    bench.session(pipeline)
    if bench.handle is not None:
        bench.handle.remove()
    return bench.outcome(second=bench.session(pipeline, seed=1))


def _verified(bench: Any) -> Outcome:
    """Let the library judge by itself."""
    pipeline = bench.few_step()
    found = hf.verify(pipeline.generator.model, lambda: bench.session(pipeline))
    bench.facts |= {"result": found.result, "difference": found.difference, "said": str(found)}
    return bench.outcome()


def _facts(bench: Bench, pipeline: Any) -> dict[str, Any]:
    """Describe the model and its caches as far as a library could leave traces in them."""
    model = pipeline.generator.model
    modules = dict(model.named_modules())
    return {
        "modules": [[name, type(module).__qualname__] for name, module in modules.items()],
        "same objects": all(bench.modules.get(name) is item for name, item in modules.items()),
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "state": _digest(model.state_dict()),
        "caches": [[_layout(layer) for layer in stream] for stream in bench.caches],
    }


def _digest(state: dict[str, Tensor]) -> list[list[str]]:
    return [
        [name, hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()]
        for name, value in state.items()
    ]


def _layout(cache: dict[str, Any]) -> dict[str, list[Any]]:
    """Describe a cache dict; the indices are compared with the results."""
    layout: dict[str, list[Any]] = {
        name: [list(value.shape), str(value.dtype)] if isinstance(value, Tensor) else [value]
        for name, value in cache.items()
    }
    for name in ("k", "v"):
        layout[name] += [bool((cache[name] == 0).all()), cache[name].untyped_storage().nbytes()]
    return layout


DRIVERS: dict[str, Callable[[Bench], Outcome]] = {
    "few_step": _few_step,
    "second_video": _second_video,
    "same_caches": _second_video,
    "two_transformers": _few_step,
    "many_step": _few_step,
    "rollouts": _rollouts,
    "interactive": _interactive,
    "one_switch": _one_switch,
    "emptied": _emptied,
    "emptied unsaid": _emptied,
    "past_the_end": _past_the_end,
    "refused": _refused,
    "cfg": _cfg,
    "overlap": _overlap,
    "no_cache": _no_cache,
    "gradients": _gradients,
    "gradients_midway": _gradients_midway,
    "removal": _removal,
    "new_prompt": _new_prompt,
    "cut": _cut,
    "in_chunks": _in_chunks,
    "flushed": _flushed,
    "sessions": _sessions,
    "left_session": _left_session,
    "verified": _verified,
}
