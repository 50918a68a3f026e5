"""Fuzzed safetensors files: our error, with the file's name, or what the file says; never another error."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from headforcing.demo.model.model import DemoModel
from headforcing.demo.show import show
from headforcing.errors import HeadForcingError, OptionError
from headforcing.measure import profile as profile_module
from headforcing.measure.profile import HeadProfile
from tests.examples import examples
from tests.profiles import random_profile

DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3", "F8_E5M2", "E8M0", "F16", "BF16", "F32", "F64")
DTYPES += ("BOOL", "U8", "I8", "U16", "I64", "U64", "C64", "X", "")
NUMBERS = st.sampled_from([0, 1, -1, 2, 8, 1 << 31, 1 << 63, 10**20, 0.5, True, None, "1"])
TEXTS = st.text(max_size=4) | st.sampled_from(["__metadata__", "video", "config", "\x1b[31m"])
JSON = st.recursive(
    NUMBERS | TEXTS, lambda one: st.lists(one, max_size=3) | st.dictionaries(TEXTS, one, max_size=2)
)


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def spoiled(draw: Any, content: bytes) -> bytes:
    """A safetensors file with something changed in its header, or any of its bytes."""
    header, data = parts(content)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(header)))
        entry = header[name]
        what = draw(st.sampled_from(["dtype", "shape", "data_offsets", "metadata", "name", "gone", "any"]))
        if what == "dtype":
            retyped(entry, draw(st.sampled_from(DTYPES)))
        elif what in ("shape", "data_offsets") and isinstance(entry, dict):
            entry[what] = draw(st.lists(NUMBERS, max_size=4) | JSON)
        elif what == "metadata":
            header["__metadata__"] = draw(st.dictionaries(TEXTS, TEXTS, max_size=2) | JSON)
        elif what == "name":
            header[draw(TEXTS)] = entry
        elif what == "gone":
            del header[name]
        else:
            header[name] = draw(JSON)
    changed = bytearray(joined(header, data))
    if draw(st.integers(0, 4)) == 0:
        changed[draw(st.integers(0, 600)) % len(changed)] ^= draw(st.integers(0, 255))
    if draw(st.integers(0, 9)) == 0:
        del changed[draw(st.integers(0, len(changed))) :]
    return bytes(changed)


def retyped(entry: Any, dtype: str) -> None:
    """Another dtype, and a shape that fills the same bytes, so that only the dtype may be wrong."""
    if not isinstance(entry, dict) or not isinstance(entry.get("data_offsets"), list):
        return
    first, last = (entry["data_offsets"] + [0, 0])[:2]
    bits = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32}
    bits |= {"F16": 16, "BF16": 16, "U16": 16}
    entry["dtype"] = dtype
    if type(first) is type(last) is int:
        entry["shape"] = [8 * (last - first) // bits.get(dtype, 8)]


PROFILE = random_profile(1, layers=1, heads=2, prompts=2)
TENSORS, FACTS = save(PROFILE._tensors()), {**PROFILE.facts.model_dump(mode="json"), "hash": PROFILE.hash}


def load_profile(folder: Path, content: bytes) -> None:
    """As `HeadProfile.load`."""
    file = folder / "profile.safetensors"
    file.write_bytes(content)
    file.with_suffix(".profile.json").write_text(json.dumps(FACTS), "utf-8")
    assert HeadProfile.load(file).hash == PROFILE.hash


def load_weights(folder: Path, content: bytes) -> None:
    """As `headforcing demo --weights`."""
    file = folder / "weights.safetensors"
    file.write_bytes(content)
    show.load_model(file)


def check(load: Callable[[Path, bytes], None], folder: Path, content: bytes) -> None:
    try:
        load(folder, content)
    except HeadForcingError as error:
        said = str(error)
    else:
        said = "safetensors"
    assert "safetensors" in said


@settings(max_examples=examples(300, 20_000), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spoiled(TENSORS))
def test_a_fuzzed_profile_is_our_error(tmp_path: Path, content: bytes) -> None:
    check(load_profile, tmp_path, content)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("weights") / "good.safetensors"
    DemoModel().save_weights(file)
    return file.read_bytes()


@settings(max_examples=examples(30, 2_000), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_fuzzed_weights_are_our_error(tmp_path: Path, weights: bytes, data: st.DataObject) -> None:
    check(load_weights, tmp_path, data.draw(spoiled(weights)))


def test_every_other_dtype_is_our_error(tmp_path: Path, weights: bytes) -> None:
    for load, content in ((load_profile, TENSORS), (load_weights, weights)):
        for dtype in DTYPES:
            header, data = parts(content)
            retyped(header[sorted(set(header) - {"__metadata__"})[0]], dtype)
            check(load, tmp_path, joined(header, data))


def test_what_cannot_be_read_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nofile: cannot be read"):
        show.load_model(tmp_path / "nofile")
    with pytest.raises(OptionError, match="cannot be read"):
        show.load_model(tmp_path)


def test_the_test_catches_an_error_that_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: a profile is read without a look at what torch does not know."""

    class Other(Exception):
        """Stands for `KeyError`, which is caught no more."""

    def load(content: bytes) -> dict[str, torch.Tensor]:
        try:
            return safetensors.torch.load(content)
        except KeyError as error:
            raise Other from error

    monkeypatch.setattr(profile_module, "load", load)
    header, data = parts(TENSORS)
    retyped(header["video"], "F4")
    with pytest.raises(Other):
        check(load_profile, tmp_path, joined(header, data))
