"""What stands in a file never reaches a terminal as it is: neither escapes, nor text that runs backwards."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

import headforcing as hf
from headforcing import errors
from headforcing.cli import app, console
from headforcing.measure.classifiers.head_forcing import classify
from headforcing.measure.profile import HeadProfile
from headforcing.measure.stability import stability
from headforcing.measure.stability_report import StabilityReport
from headforcing.roles import Anchor, HeadRole, Local
from headforcing.roles.maps.hub import _card
from headforcing.roles.maps.origin import Measurement, ModelFacts, Origin
from headforcing.roles.maps.role_map import RoleMap
from tests.examples import examples
from tests.hosts.rig import Rig
from tests.profiles import random_profile

RUN = CliRunner()
FOLDER = Path(__file__).parents[2] / "headforcing" / "cli"
DRIVES = {
    *map(chr, (*range(0x20), 0x7F, *range(0x80, 0xA0))),  # C0, DEL, C1
    *map(chr, (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))),  # bidi
}
MARK = "\N{SNOWMAN}"
TEXTS = st.lists(st.sampled_from(sorted(DRIVES)), min_size=1, max_size=4).map(
    lambda found: MARK + "".join(found) + "[31m"
)


def check_plain(said: str, lines: bool = True) -> None:
    """Nothing in it drives a terminal; a line break is ours, so no foreign text begins a line."""
    assert not DRIVES & set(said) - ({"\n"} if lines else set()), ascii(said)
    assert not any(line.startswith("[31m") for line in said.split("\n")), ascii(said)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every text in a document, keys included: the last step is `None` for a key."""
    if isinstance(value, dict):
        for key in value:
            yield (*path, key, None)
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from places(one, (*path, index))
    elif isinstance(value, str):
        yield path


def spoiled(document: Any, path: tuple[Any, ...], text: str) -> Any:
    """The document with one text, or key, replaced; a role name wherever it stands."""
    changed = copy.deepcopy(document)
    *way, last = path
    if last is None:
        *way, last = way
    inside = changed
    for step in way:
        inside = inside[step]
    if path[-1] is not None:
        inside[last] = text
        return changed
    inside[text] = inside.pop(last)
    if way == ["roles"]:
        changed["layers"] = [[text if name == last else name for name in row] for row in changed["layers"]]
    return changed


def broken(document: Any, path: tuple[Any, ...], name: str) -> None:
    """Puts what no entry may hold under a name that was spoiled, so that an error speaks of it."""
    for step in path[:-2]:
        document = document[step]
    document[name] = {"type": []} if path[:-2] == ("roles",) else []


def _document() -> Any:
    facts = ModelFacts(
        layers=1, heads=2, head_dim=16, window=9, chunk=3, model_class="Model", base_model="a/b"
    )
    how = Measurement(method="method", settings={"rule": "word"}, metric=("metric",), library="1")
    origin = Origin(model=facts, measurement=how, stability={"stable": "yes"}, notes={"note": "text"})
    roles: dict[str, HeadRole] = {"near": Local(), "far": Anchor()}
    return json.loads(RoleMap.from_labels([["near", "far"]], roles, origin).to_json())


DOCUMENT = _document()
PLACES = list(places(DOCUMENT))


def run(*arguments: Any) -> str:
    """What a command says, on both streams, as a terminal would get it."""
    done = RUN.invoke(app, [str(one) for one in arguments], color=True)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output


def told(work: Callable[[], Any]) -> str:
    """The traceback of a call that fails, or nothing."""
    try:
        work()
    except errors.HeadForcingError as error:
        check_plain(str(error), lines=isinstance(error, errors.UnsupportedModelError))
        return "".join(traceback.format_exception(error)) + repr(error)
    return ""


def check_role_map(folder: Path, document: Any) -> None:
    """Every command and every message that shows a role map."""
    file = folder / "roles.json"
    file.write_text(json.dumps(document), encoding="ascii")
    for command in ("show", "validate"):
        check_plain(run("roles", command, file))
        check_plain(said := run("roles", command, file, "--json"))
        assert said.startswith(("{", "error: "))
        if said.startswith("{"):
            json.loads(said)
    check_plain(run("roles", "compare", file, file))
    check_plain(told(lambda: RoleMap.load(file)))
    try:
        found = RoleMap.load(file)
    except errors.HeadForcingError:
        return
    check_plain(repr(found), lines=False)
    check_plain(_card(found, False, None))
    model = _model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle = hf.apply_head_forcing(model, found)
    for one in caught:
        check_plain(warnings.formatwarning(one.message, one.category, "file.py", 1))
    assert caught
    check_plain(f"{handle!r} {handle.status()}")
    handle.remove()


@functools.cache
def _model() -> Any:
    return Rig(window=6, layers=1, heads=2).model


@settings(max_examples=examples(10, nightly=250), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PLACES), TEXTS, st.booleans(), st.booleans())
def test_no_command_shows_a_control_character_of_a_role_map(
    tmp_path: Path, path: tuple[Any, ...], text: str, keeps_hash: bool, breaks: bool
) -> None:
    document = spoiled(DOCUMENT, path, text)
    if not keeps_hash:
        document.pop("hash", None)
    if breaks and path[-1] is None:
        broken(document, path, text)
    check_role_map(tmp_path, document)


@pytest.mark.slow
@pytest.mark.parametrize("path", PLACES, ids=str)
def test_no_place_of_a_role_map_is_shown_as_it_is(tmp_path: Path, path: tuple[Any, ...]) -> None:
    document = spoiled(DOCUMENT, path, f"{MARK}\x1b]0;\x07\x9b\u202e\n[31m")
    document.pop("hash", None)
    check_role_map(tmp_path, document)


PROFILE = random_profile(1)
PROFILE_DOCUMENT = {**PROFILE.facts.model_dump(mode="json"), "hash": PROFILE.hash}


@settings(max_examples=examples(10, nightly=150), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([*places(PROFILE_DOCUMENT), *([name] for name in PROFILE._tensors())]), TEXTS)
def test_no_command_shows_a_control_character_of_a_profile(tmp_path: Path, path: Any, text: str) -> None:
    tensors, document = PROFILE._tensors(), PROFILE_DOCUMENT
    if isinstance(path, list):
        tensors = {text if name == path[0] else name: tensor for name, tensor in tensors.items()}
    else:
        document = spoiled(document, path, text)
    file = tmp_path / "profile.safetensors"
    save_file(tensors, file)
    file.with_suffix(".profile.json").write_text(json.dumps(document), encoding="ascii")
    check_plain(told(lambda: HeadProfile.load(file)))
    with contextlib.suppress(errors.ProfileError):  # the hash is wrong now: say the right one
        right = str(told(lambda: HeadProfile.load(file))).rpartition("content hash ")[2][:71]
        file.with_suffix(".profile.json").write_text(json.dumps({**document, "hash": right}), "ascii")
        check_plain(repr(HeadProfile.load(file).facts), lines=False)
    check_plain(run("roles", "classify", file, "--no-stability"))
    check_plain(run("roles", "classify", file, "--no-stability", "--json"))
    check_plain(run("roles", "fit", file, "--frames", 9))


def test_no_report_shows_a_control_character() -> None:
    document = stability(PROFILE, classify, draws=2).to_dict()
    for path in places(document):
        text = json.dumps(spoiled(document, path, f"{MARK}\x1b]0;\x07\x9b\u202e[31m"))
        check_plain(told(lambda text=text: StabilityReport.from_json(text)))
        with contextlib.suppress(errors.ProfileError):
            check_plain(str(StabilityReport.from_json(text)))


@pytest.mark.parametrize("form", ["forcing_kv", "pyramid_forcing"])
def test_no_import_shows_a_control_character(tmp_path: Path, form: str) -> None:
    bad = f"{MARK}\x1b]0;\x07\x9b\u202e[31m"
    for text in (
        bad,
        json.dumps({bad: 1}),
        json.dumps({"layers": {bad: {}}}),
        json.dumps({"layers": [{bad: [0]}], "note": bad}),
        f"1,{bad}\n",
    ):
        file = tmp_path / "labels"
        file.write_text(text, encoding="utf-8")
        check_plain(run("roles", "import", file, "--format", form, "--out", tmp_path / "out.json"))


@pytest.mark.parametrize("where", ["say", "message", "table"])
def test_the_test_catches_text_that_is_shown_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Planted bugs: what prints, errors and tables do not escape."""
    path, text = ("roles", "near", None), f"{MARK}\x1b]0;\x07"
    document = spoiled(DOCUMENT, path, text)
    document.pop("hash", None)
    if where != "table":
        broken(document, path, text)
    if where == "message":
        monkeypatch.setattr(errors, "escaped", lambda text: text)
    else:
        monkeypatch.setattr(console, "escaped_lines", lambda text: text)
        monkeypatch.setattr(errors.HeadForcingError, "__str__", Exception.__str__)
    with pytest.raises(AssertionError):
        check_role_map(tmp_path, document)


def test_one_place_prints() -> None:
    """A command that prints in its own way would have to escape in its own way."""
    for file in FOLDER.glob("*.py"):
        if file.name != "console.py":
            text = file.read_text("utf-8")
            assert not [way for way in ("typer.echo", "Console(", "print(", "sys.std") if f" {way}" in text]


def test_text_of_many_languages_is_shown_as_it_is() -> None:
    for text in ("Ünïcode", "你好", "שלום", "می‌خواهم", "\N{FAMILY}\u200d", "a b"):
        assert errors.escaped(text) == text
    assert errors.escaped("a\nb\x1b") == r"a\u000ab\u001b"
