"""The adapter for Brook that docs/porting.md writes step by step."""

import torch

from headforcing import Adapter, SlidingWindow
from headforcing.adapters.base import bind, parameter_names
from headforcing.errors import ExternalEditError, StreamError, UnsupportedModelError
from headforcing.types import AttentionCall

PARTS = ("to_qkv", "norm_q", "norm_k", "rotary", "proj")
FORWARD = ("hidden", "positions", "memory", "frame_index", "frame_shape", "remember")
REMEMBER = 5  # index of `remember` among the arguments of the model's forward


class BrookAdapter(Adapter):
    name = "brook"

    def why_not(self, model):
        if any(self.attentions(model)):
            return None
        return f"no module has {', '.join(PARTS)} and forward({', '.join(FORWARD)})"

    def attentions(self, model):
        for path, module in model.named_modules():
            if all(hasattr(module, part) for part in PARTS) and parameter_names(module) == FORWARD:
                yield path, module

    def heads(self, module):
        return module.num_heads, module.norm_q.normalized_shape[0]

    def window(self, model):
        return self._number(model, "train_frames", "window")

    def chunk(self, model):
        return self._number(model, "chunk_frames", "chunk")

    def own_memory(self, model):
        return [SlidingWindow(self.window(model), positions="absolute") for _ in self.attentions(model)]

    def _number(self, model, name, option):
        for module in model.modules():  # the model may be inside a wrapper
            if isinstance(number := getattr(module, name, None), int):
                return number
        raise UnsupportedModelError(f"{type(model).__name__} has no {name}: pass {option}=...")

    def read(self, module, args, kwargs):
        given = bind(module, args, kwargs)
        if given["memory"] is None:
            return None
        if given["positions"] is not None:
            raise StreamError("positions are given together with a memory: pass frame_index alone")
        x, (height, width) = given["hidden"], given["frame_shape"]
        grid = (x.shape[1] // (height * width), height, width)
        arguments = {**given, "rotary": module.rotary}
        return AttentionCall(x, given["frame_index"], grid, given["memory"], arguments)

    def project(self, module, call):
        qkv = module.to_qkv(call.x).unflatten(-1, (module.num_heads, -1))
        q, k, v = qkv.unflatten(1, (call.grid[0], -1)).chunk(3, dim=-1)
        return module.norm_q(q), module.norm_k(k), v

    def rotate(self, x, call, positions, patch=1):
        _, height, width = call.grid
        axes = positions, range(0, height, patch), range(0, width, patch)
        points = torch.cartesian_prod(*(torch.tensor(list(axis), dtype=torch.float64) for axis in axes))
        rotated = call.arguments["rotary"](x.flatten(1, 2).transpose(1, 2), points)
        return rotated.transpose(1, 2).unflatten(1, x.shape[1:3])

    def output(self, module, out, call, memo):
        memo["not_kept"] = None if call.arguments["remember"] else call.start
        return module.proj(out.flatten(2))

    def begins_video(self, call, memo):
        if call.anchor.keys:
            raise ExternalEditError(
                f"the memory holds {len(call.anchor.keys)} frames that head forcing did not write, expected "
                "none: clear() it and start the video again"
            )
        not_kept = memo.get("not_kept")
        if not_kept is not None and call.start > not_kept:
            raise StreamError(
                f"no pass over frame {not_kept} had remember=True, so the model would not keep it: expected "
                "one before the next chunk"
            )
        return False

    def clock(self, model):
        names = {"noise_level", "remember"}
        return next((module for module in model.modules() if names <= {*parameter_names(module)}), None)

    def phase(self, args, kwargs):
        remember = kwargs["remember"] if "remember" in kwargs else args[REMEMBER:] == (True,)
        return "clean" if remember else "denoise"

    def cross_attentions(self, model):
        parents = [model.get_submodule(path.rpartition(".")[0]) for path, _ in self.attentions(model)]
        return [parent.prompt_mixer for parent in parents]

    def forget_prompt(self, module, args, kwargs):
        module.kept = None


ADAPTER = BrookAdapter()
