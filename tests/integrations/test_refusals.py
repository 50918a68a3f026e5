"""Models that are known and have no memory to divide: refused with their own reason. The real ones, tiny."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import headforcing as hf
from headforcing.adapters import base as adapter
from headforcing.adapters.base import adapters, find_adapter, refusal
from headforcing.adapters.looks import NOTHING
from headforcing.cli import app
from headforcing.errors import UnsupportedModelError, module_names
from headforcing.integrations.self_forcing import SelfForcing
from headforcing.roles import Local
from headforcing.testing import snapshot
from tests.hosts import find_host, host_names
from tests.hosts.rig import Rig

SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}
HELIOS = {**SMALL, "text_dim": 8, "freq_dim": 8, "ffn_dim": 8, "num_layers": 1, "rope_dim": (4, 4, 4)}
WAN = {**SMALL, "text_dim": 8, "freq_dim": 8, "ffn_dim": 8, "num_layers": 2, "rope_max_seq_len": 32}
VIDEO = {
    **SMALL, "num_layers": 1, "num_cross_attention_heads": 2, "cross_attention_head_dim": 12,
    "cross_attention_dim": 24, "caption_channels": 8, "rope_max_seq_len": 32,
}  # fmt: skip
WORLD = {
    "in_channels": 4, "num_layers": 2, "softmax_every_n": 2, "hidden_size": 24, "num_attention_heads": 2,
    "linear_head_dim": 12, "chunk_plucker_channels": 4, "caption_channels": 8,
}  # fmt: skip
COSMOS = {
    **SMALL, "num_layers": 1, "mlp_ratio": 1.0, "text_embed_dim": 8, "adaln_lora_dim": 8,
    "max_size": (4, 4, 4),
}  # fmt: skip
FRAMEPACK = {
    **SMALL, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "mlp_ratio": 1.0,
    "text_embed_dim": 8, "pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 4), "image_proj_dim": 8,
    "has_image_proj": True, "has_clean_x_embedder": True,
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "HeliosTransformer3DModel": (HELIOS, "no KV cache: each step receives the past as latents"),
    "HunyuanVideoFramepackTransformer3DModel": (
        FRAMEPACK,
        "each step receives the past as latents (latents_h",
    ),
    "CosmosTransformer3DModel": (COSMOS, "nothing in it takes a KV cache: no argument is named like one"),
    "SkyReelsV2Transformer3DModel": (
        {**WAN, "num_layers": 1},
        "nothing in it takes a KV cache: no argument is named like one",
    ),
    "WanTransformer3DModel": (WAN, "it is bidirectional: all frames are in every call"),
    "SanaVideoTransformer3DModel": (VIDEO, "its attention is linear: all frames are summed into one state"),
    "SanaWMTransformer3DModel": (WORLD, "its attention is linear: all frames are summed into one state"),
}
INSTEAD = {
    "HeliosTransformer3DModel": "history_sizes of its pipeline",
    "HunyuanVideoFramepackTransformer3DModel": "history_sizes of its pipeline",
    "CosmosTransformer3DModel": "Take an autoregressive model with a KV cache: docs/how-to/models.md",
    "SkyReelsV2Transformer3DModel": "Take an autoregressive model with a KV cache: docs/how-to/models.md",
    "WanTransformer3DModel": "Load an autoregressive model distilled from it",
    "SanaVideoTransformer3DModel": "apply to the refiner's transformer",
    "SanaWMTransformer3DModel": "apply to the refiner's transformer",
}


def made(kind: str, **changes: Any) -> Any:
    diffusers = pytest.importorskip("diffusers", minversion="0.42", reason="SANA-WM came with diffusers 0.42")
    torch.manual_seed(0)
    return getattr(diffusers, kind)(**{**REFUSED[kind][0], **changes}).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", REFUSED)
def test_apply_refuses_with_the_reason_and_the_way_out_and_touches_nothing(kind: str) -> None:
    model = made(kind)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=f"^{kind} cannot be served: ") as refused:
        hf.apply_head_forcing(model, "memrope")
    assert before.diff(snapshot(model)) == []
    said = str(refused.value)
    assert REFUSED[kind][1] in said
    assert INSTEAD[kind] in said
    assert "\n" not in said  # not the list of all adapters
    assert "no module has" not in said


@pytest.mark.parametrize("kind", REFUSED)
def test_explain_says_it_too(kind: str) -> None:
    model = made(kind)
    found = hf.explain(model)
    assert found.refused is not None
    assert REFUSED[kind][1] in found.refused
    assert (found.adapter, set(found.why_not)) == (None, {adapter.name for adapter in adapters()})
    said = str(found).splitlines()
    assert said[:2] == [f"{kind}: no adapter fits", f"  cannot be served: {found.refused}"]
    assert "why not" not in said
    assert "porting" not in said[-1]


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_is_known_by_its_structure(kind: str) -> None:
    """Under another name, and inside another module."""
    model = made(kind)
    model.__class__ = type("Renamed", (type(model),), {})
    for _, module in list(model.named_modules())[1:]:
        cls: Any = type(module)
        if "ttention" in cls.__name__:
            module.__class__ = type("Renamed", (cls,), {})
    reason = refusal(nn.ModuleDict({"inner": model}))
    assert reason is not None
    assert REFUSED[kind][1] in reason


@pytest.mark.parametrize("kind", REFUSED)
def test_one_that_takes_other_arguments_is_not_known(kind: str) -> None:
    """It may have a cache."""
    model = made(kind)
    model.__class__ = type("Changed", (type(model),), {"forward": lambda self, x, kv_cache=None: x})
    assert refusal(model) is None
    with pytest.raises(UnsupportedModelError, match="no adapter fits Changed"):
        find_adapter(model)


def test_wan_with_a_processor_that_is_told_more_is_not_known() -> None:
    """One that brings a cache would make it autoregressive."""

    class Caching:
        def __call__(
            self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None,
            attention_mask: Any = None, rotary_emb: Any = None, kv_cache: Any = None,
        ) -> Any: ...  # fmt: skip

    model = made("WanTransformer3DModel")
    assert refusal(model) is not None
    model.blocks[1].attn1.set_processor(Caching())
    assert refusal(model) is None


def test_wan_without_blocks_and_sana_without_its_temporal_convolution_are_not_known() -> None:
    model = made("WanTransformer3DModel")
    del model.blocks[:]
    assert refusal(model) is None
    model = made("SanaVideoTransformer3DModel")
    del model.transformer_blocks[0].ff.conv_temp
    assert refusal(model) == NOTHING


def test_what_an_adapter_serves_is_not_refused() -> None:
    for name in ("self_forcing", "causvid", "longlive", "infinity_rope"):
        model = find_host(name).model()
        assert refusal(model) is None
        assert hf.explain(model).refused is None


def test_every_model_of_diffusers_that_takes_a_cache_is_left_to_those_who_write_adapters() -> None:
    """These have one, for images or animation; what is said of models without would be wrong of them."""
    diffusers = pytest.importorskip("diffusers", minversion="0.42")
    with torch.device("meta"):
        for kind in ("GlmImageTransformer2DModel", "WanAnimate2Transformer3DModel"):
            model = getattr(diffusers, kind)(num_layers=1)
            assert refusal(model) is None
            with pytest.raises(UnsupportedModelError, match=f"^no adapter fits {kind}\nlooks like attention"):
                find_adapter(model)
        for kind in (
            "HunyuanVideoTransformer3DModel",
            "LTXVideoTransformer3DModel",
            "MochiTransformer3DModel",
        ):
            assert refusal(getattr(diffusers, kind)(num_layers=1)) == NOTHING


def test_an_adapter_that_is_given_or_fits_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in may serve what we refuse, by its own means."""

    class Daring(SelfForcing):
        name = "daring"

        def why_not(self, model: nn.Module) -> str | None:
            return None

        def attentions(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
            yield "blocks.0.attn1", model.get_submodule("blocks.0.attn1")

        def heads(self, module: nn.Module) -> tuple[int, int]:
            return 2, 12

        def chunk(self, model: nn.Module) -> int:
            return 3

    class Point:
        def load(self) -> Any:
            return Daring()

    monkeypatch.setattr(adapter, "entry_points", lambda group: [Point()])
    model = made("HeliosTransformer3DModel")
    assert find_adapter(model).name == "daring"
    assert (hf.explain(model).adapter, hf.explain(model).refused) == ("daring", None)
    assert "cannot be served" not in str(hf.explain(model))


def test_the_command_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers", minversion="0.42")
    (tmp_path / "own_helios.py").write_text(
        f"import diffusers\ndef make():\n    return diffusers.HeliosTransformer3DModel(**{HELIOS})\n"
    )
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(app, ["explain", "own_helios:make"])
    assert told.exit_code == 1
    assert "cannot be served: it has no KV cache" in told.output
    told = CliRunner().invoke(app, ["explain", "own_helios:make", "--json"])
    assert "it has no KV cache" in json.loads(told.stdout)["refused"]


def test_the_folder_holds_adapters_with_a_host_and_refusals() -> None:
    names = {adapter.name for adapter in adapters()}
    assert set(host_names()) == names
    assert set(module_names("headforcing.integrations")) - names == {
        *("helios", "sana_linear", "wan_diffusers"),
    }


def test_a_refused_model_is_no_obstacle_to_others() -> None:
    rig = Rig(9)
    both = nn.ModuleDict({"teacher": made("WanTransformer3DModel"), "student": rig.model})
    assert find_adapter(both).name == "self_forcing"
    hf.apply_head_forcing(both, Local()).remove()


def test_one_signature_and_two_base_models() -> None:
    """Reward Forcing is told from Self Forcing by an attribute, whatever the order of adapters."""
    for name, other in (("self_forcing", "reward_forcing"), ("reward_forcing", "self_forcing")):
        model = find_host(name).model()
        found = hf.explain(model)
        assert (found.adapter, found.also) == (name, ())
        assert "incremental_update" in found.why_not[other]
        wrong = next(adapter for adapter in adapters() if adapter.name == other)
        with pytest.raises(UnsupportedModelError, match="incremental_update"):
            hf.apply_head_forcing(model, Local(), adapter=wrong)


@pytest.mark.parametrize("sink", [0, 4])
def test_a_sink_of_reward_forcing_that_its_code_does_not_serve_has_no_role(sink: int) -> None:
    model: Any = find_host("reward_forcing").model()
    model.blocks[1].self_attn.sink_size = sink
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=f"1.self_attn has a sink_size of {sink}, and"):
        hf.apply_head_forcing(model, "own")
    assert f"sink_size of {sink}" in hf.explain(model).unknown["own memory"]
    assert snapshot(model) == before
    hf.apply_head_forcing(model, Local()).remove()
