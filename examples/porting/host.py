"""A tiny Brook and the calls its pipeline makes, for the conformance kit."""

import torch

from headforcing.roles import SlidingWindow
from headforcing.testing import Host
from porting.adapter import ADAPTER
from porting.model import CLEAN, Brook

FRAME = (4, 6)  # not square, so that a mix-up of height and width shows


class BrookHost(Host):
    adapter = ADAPTER
    layers, chunk, frames = 2, 2, 12  # two layers, chunks of two frames, a video of twelve
    dense, window = 6, 6  # the window overflows after six frames; trained on six
    memory = SlidingWindow(6, positions="absolute")  # the last six frames, at their true positions
    single = True  # chunks of one frame are possible
    unconcerned = frozenset(
        {"edited_cache_refused", "release_frees", "cache_comes_back", "compiled_is_one_operator"}
    )

    def model(self, dtype=torch.float32):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Brook(depth=2)
            for weight in model.parameters():
                if weight.dim() == 1:  # norms start as ones, and a mix-up of two would not show
                    torch.nn.init.normal_(weight, 1, 0.3)
        return model.eval().requires_grad_(False).to(dtype)

    def caches(self, model, batch=1):
        return {"memories": model.new_memory(), "prompt": random(7, batch, 5, 32)}

    def new_video(self, model, caches):
        for memory in caches["memories"]:
            memory.clear()

    def call(self, model, caches, start, frames, draw):
        clean, prompt, dtype = draw % 10 == 0, caches["prompt"], model.embed.weight.dtype
        noise = random(100 * draw + start, len(prompt), frames, 4, *FRAME).to(dtype)
        level = torch.full((len(prompt),), CLEAN if clean else 0.1 * (draw % 10), dtype=dtype)
        return model(noise, level, prompt.to(dtype), caches["memories"], start, remember=clean)

    # The methods below are optional and help to tell one mistake from another.

    def cached(self, model, caches, layer):
        memory = caches["memories"][layer]
        return tuple(torch.cat(each, dim=2).transpose(1, 2) for each in (memory.keys, memory.values))

    def uncached(self, model):
        return model(random(1, 1, 4, 4, *FRAME), torch.ones(1), random(7, 1, 5, 32))

    def switch_prompt(self, model, caches):
        caches["prompt"] = caches["prompt"] + 1
        return True


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
