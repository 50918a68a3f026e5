"""`headforcing roles ...`: from a profile file to maps, reports and pictures, all through files."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from typer.testing import CliRunner

from headforcing import Anchor, Local, Memory, RoleMap
from headforcing.cli import app
from headforcing.cli.settings import known_settings, parse_settings, parse_value
from headforcing.cli.tables import _letters
from headforcing.errors import OptionError, module_names
from headforcing.measure.classifiers import find_classifier
from headforcing.measure.profile import HeadProfile, ProfileFacts
from headforcing.roles.maps import hub
from headforcing.roles.maps.origin import Measurement, ModelFacts, Origin
from headforcing.roles.maps.presets import pyramid_forcing

RUN = CliRunner()
LAYERS, HEADS, WINDOW, CHUNK = 3, 4, 21, 3
MODEL = ModelFacts(
    layers=LAYERS,
    heads=HEADS,
    head_dim=16,
    window=WINDOW,
    chunk=CHUNK,
    model_class="Tiny",
    base_model="nobody/tiny",
    fingerprint="sha256:" + "5" * 64,
)
KINDS = torch.tensor([[0, 1, 2, 2], [0, 2, 1, 2], [2, 0, 2, 2]])  # anchor, local, memory
MASS = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.1, 0.6, 0.3]])  # first, middle, own


def tiny_profile(prompts=6, noise=0.01):
    """Heads that plainly look at the first frame, at the current chunk, or in between."""
    generator = torch.Generator().manual_seed(0)
    index = torch.cartesian_prod(torch.arange(prompts), torch.tensor([9, 12, 15]), torch.arange(3))
    prompt, start, step = index.unbind(1)
    mass = MASS[KINDS].expand(len(index), -1, -1, -1)
    mass = (mass + noise * torch.rand(mass.shape, generator=generator)).softmax(-1)
    first, middle, own = mass.unbind(-1)
    by_age = (middle / (WINDOW - CHUNK))[..., None].repeat(1, 1, 1, WINDOW - 1)
    by_age[..., WINDOW - CHUNK :] = torch.nan
    values = {"first": first, "middle": middle, "own": own, "by_age": by_age.contiguous()}
    return HeadProfile(
        facts=ProfileFacts(model=MODEL, metrics={"attention_mass": {}}, protocol={"seed": 11}),
        video=2 * prompt.contiguous(),
        prompt=prompt.contiguous(),
        start=start.contiguous(),
        step=step.contiguous(),
        clean=step == 2,
        values={f"attention_mass.{name}": value.contiguous() for name, value in values.items()},
    )


def run(*arguments):
    return RUN.invoke(app, ["roles", *map(str, arguments)])


def parsed(answer):
    """The JSON on stdout, which holds nothing else."""
    assert answer.exit_code == 0, answer.output
    assert answer.stderr == ""
    return json.loads(answer.stdout)


def refused(answer, *words, code=2):
    assert answer.exit_code == code, answer.output
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1
    assert all(word in answer.stderr for word in words), answer.stderr
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A profile, and the map and the report made from it."""
    folder = tmp_path_factory.mktemp("roles")
    tiny_profile().save(folder / "profile.safetensors")
    answer = run(
        "classify",
        folder / "profile.safetensors",
        *("--out", folder / "roles.json", "--report", folder / "stability.json", "--draws", 20),
    )
    assert answer.exit_code == 0, answer.output
    (folder / "said.txt").write_text(answer.stdout)
    return folder


def test_classify_says_what_it_found_and_how_far_it_can_be_trusted(folder):
    said = (folder / "said.txt").read_text()
    for word in ("anchor", "local", "memory", "heads per role", "stable map", "head_forcing", "0.25"):
        assert word in said
    assert "no stable map" not in said
    assert str(folder / "roles.json") in said
    assert "next: headforcing roles plot" in said


def test_the_map_says_where_it_comes_from(folder):
    role_map = RoleMap.load(folder / "roles.json")
    assert role_map.origin.model == MODEL
    assert role_map.origin.measurement.method == "head_forcing"
    assert role_map.origin.measurement.profile == HeadProfile.load(folder / "profile.safetensors").hash
    assert role_map.origin.measurement.videos == 6
    assert role_map.origin.measurement.seeds == (11,)
    assert role_map.origin.stability["stable"] is True
    kinds = [[type(role).__name__.lower() for role in row] for row in role_map.layers]
    assert kinds == [[("anchor", "local", "memory")[kind] for kind in row] for row in KINDS.tolist()]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["local", "anchor", "memory"], ["L", "A", "M"]),
        (["local1", "local2", "anchor"], ["1", "2", "A"]),
        (["memory3+3+3", "local0", "memory3+12+3"], ["1", "L", "2"]),
        ([f"m{number}" for number in range(50)], None),
    ],
)
def test_letters_tell_roles_apart(names, short):
    found = _letters(names)
    assert list(found) == names
    assert len(set(found.values())) == len(names)
    assert short is None or list(found.values()) == short


@pytest.mark.parametrize("heads", [9, 12, 40])
def test_a_wide_map_fits_a_terminal(tmp_path, heads):
    row = [Local(), *[Memory()] * (heads - 2), Anchor()]
    said = run("show", hand_made(tmp_path, "map.json", [row] * 2)).stdout.splitlines()
    assert max(map(len, said)) <= 80
    letters = "".join(next(line for line in said if "│     0 │" in line).split("│")[2].split())
    assert letters == "L" + "M" * (heads - 2) + "A"
    assert any("5" in line and "layer" in line for line in said)


def test_show_tells_the_origin(folder):
    said = run("show", folder / "roles.json").stdout
    for word in ("fingerprint", "nobody/tiny", "head_forcing", "stability: stable", "hash", "anchor"):
        assert word in said
    told = parsed(run("show", folder / "roles.json", "--json"))
    assert told["hash"] == RoleMap.load(folder / "roles.json").hash
    assert told["origin"]["model"]["fingerprint"] == MODEL.fingerprint
    assert told["origin"]["measurement"]["settings"]["anchor"] == 0.25


def test_validate_prints_the_hash_and_notices_a_change(folder, tmp_path):
    told = run("validate", folder / "roles.json")
    assert told.exit_code == 0
    assert told.stdout.splitlines()[-1] == RoleMap.load(folder / "roles.json").hash
    assert parsed(run("validate", folder / "roles.json", "--json"))["valid"] is True
    changed = (folder / "roles.json").read_text().replace("nobody/tiny", "somebody/tiny")
    (tmp_path / "changed.json").write_text(changed)
    assert refused(run("validate", tmp_path / "changed.json"), "hash", code=1)


def test_classify_as_json(folder):
    told = parsed(run("classify", folder / "profile.safetensors", "--draws", 10, "--json"))
    assert told["method"] == "head_forcing"
    assert sum(told["counts"].values()) == LAYERS * HEADS
    assert told["labels"][0] == ["anchor", "local", "memory", "memory"]
    assert told["stability"]["stable"] is True
    assert told["files"] == []


def test_settings_reach_the_classifier(folder):
    options = ["--set", "anchor=0", "--set", "local=1", "--set", "rule=quantile", "--no-stability", "--json"]
    told = parsed(run("classify", folder / "profile.safetensors", *options))
    assert told["counts"] == {"anchor": 0, "local": 12, "memory": 0}
    assert told["settings"] == {"anchor": 0.0, "local": 1.0, "rule": "quantile"}
    assert told["stability"] is None


def test_no_stable_map_is_said_clearly(tmp_path):
    tiny_profile(prompts=1).save(tmp_path / "one.safetensors")
    answer = run("classify", tmp_path / "one.safetensors", "--draws", 5, "--out", tmp_path / "roles.json")
    assert answer.exit_code == 0, answer.output
    assert "no stable map" in answer.stdout
    assert RoleMap.load(tmp_path / "roles.json").origin.stability["stable"] is False


@pytest.mark.parametrize("control", ["random", "shuffled_within_layer", "inverted", "all_one:local"])
def test_controls(folder, tmp_path, control):
    out = tmp_path / "control.json"
    options = ["--control", control, "--seed", 3, "--out", out, "--json"]
    told = parsed(run("classify", folder / "profile.safetensors", *options))
    assert told["method"].endswith("of head_forcing")
    assert told["stability"] is None
    assert told["margin"][0][0] is None
    if control == "all_one:local":
        assert told["counts"] == {"anchor": 0, "local": 12, "memory": 0}
    else:
        assert told["counts"] == {"anchor": 3, "local": 2, "memory": 7}
        assert RoleMap.load(out) != RoleMap.load(folder / "roles.json")
    assert RoleMap.load(out).origin.measurement.method == told["method"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "anchors=0.3"], ["anchors", "anchor=0.25", "local=0.2", "rule=quantile"]),
        (["--set", "anchor"], ["NAME=VALUE"]),
        (["--set", "anchor=many"], ["a number"]),
        (["--set", "anchor=true"], ["a number"]),
        (["--set", "rule=3"], ["a word"]),
        (["--set", "anchor=0.1", "--set", "anchor=0.2"], ["twice"]),
        (["--set", "anchor=2"], ["[0, 1]"]),
        (["--method", "tarot"], ["tarot", "head_forcing", "output_regret"]),
        (["--method", "mass_ratio"], ["mass_ratio", "profile again"]),
        (["--control", "upside_down"], ["inverted", "all_one:LABEL"]),
        (["--control", "all_one"], ["all_one:LABEL"]),
        (["--control", "all_one:wave"], ["wave", "anchor"]),
        (["--control", "random", "--report", "report.json"], ["--report"]),
        (["--no-stability", "--report", "report.json"], ["--report"]),
    ],
)
def test_a_mistake_gives_one_message(folder, options, words):
    assert refused(run("classify", folder / "profile.safetensors", *options), *words)


def test_missing_folders_are_made_before_the_work(folder, tmp_path):
    out, report = tmp_path / "a" / "b" / "roles.json", tmp_path / "c" / "stability.json"
    told = parsed(
        run(
            "classify",
            folder / "profile.safetensors",
            "--out",
            out,
            "--report",
            report,
            "--draws",
            2,
            "--json",
        )
    )
    assert told["files"] == [str(out), str(report)]
    assert out.exists()
    assert report.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "x.json", "--report", "x.json"], ["--report", "--out"]),
        (["--out", "x.json", "--report", "sub/../x.json"], ["--report", "--out"]),
        (["--out", "profile.safetensors"], ["--out", "a file of the profile"]),
        (["--out", "profile.profile.json"], ["--out", "a file of the profile"]),
        (["--report", "profile.safetensors"], ["--report", "a file of the profile"]),
        (["--out", "sub"], ["--out", "a folder"]),
        (["--out", "a-file/roles.json"], ["a-file"]),
    ],
)
def test_no_file_is_written_over_another(tmp_path, monkeypatch, options, words):
    tiny_profile().save(tmp_path / "profile.safetensors")
    (tmp_path / "sub").mkdir()
    (tmp_path / "a-file").write_text("")
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "headforcing.measure.stability.stability", lambda *_, **__: pytest.fail("work was done")
    )
    assert refused(run("classify", "profile.safetensors", *options), *words)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_a_map_may_be_named_like_its_profile(tmp_path):
    tiny_profile().save(tmp_path / "profile.safetensors")
    out = tmp_path / "profile.json"
    parsed(run("classify", tmp_path / "profile.safetensors", "--no-stability", "--out", out, "--json"))
    assert (
        HeadProfile.load(tmp_path / "profile.safetensors").hash
        == RoleMap.load(out).origin.measurement.profile
    )


def test_a_control_promises_nothing():
    assert "must do worse" not in run("classify", "--help").stdout


def test_files_that_are_no_profiles(folder, tmp_path):
    assert refused(run("classify", tmp_path / "absent.safetensors"), "absent")
    assert refused(run("classify", folder / "roles.json"), "NAME.safetensors")


def test_a_broken_profile_gives_one_line(folder, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes((folder / "profile.safetensors").read_bytes())
    facts = json.loads((folder / "profile.profile.json").read_text())
    facts["model"] |= {"layers": "three", "surprise": 1}
    (tmp_path / "broken.profile.json").write_text(json.dumps(facts))
    assert refused(run("classify", tmp_path / "broken.safetensors"), "broken", "not a profile")


def test_methods_are_listed_in_the_help():
    said = run("classify", "--help").stdout
    assert all(name in said for name in module_names("headforcing.measure.classifiers"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("0.5", 0.5),
        (".5", 0.5),
        ("1e-3", 0.001),
        ("1e999", "1e999"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("True", True),
        ("none", None),
        ("quantile", "quantile"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
    ],
)
def test_values_are_read_strictly(text, value):
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


def test_settings_are_of_the_kind_of_their_default():
    def function(profile, *, share=0.5, count=2, word="a", flag=False, anything=None, roles=()): ...

    assert list(known_settings(function)) == ["share", "count", "word", "flag", "anything"]
    assert parse_settings(["share=1", "count=3", "flag=true"], function) == {
        "share": 1.0,
        "count": 3,
        "flag": True,
    }
    for wrong in ("count=2.5", "count=true", "flag=1", "share=false", "word=none", "roles=x", "share="):
        with pytest.raises(OptionError):
            parse_settings([wrong], function)


@pytest.mark.parametrize("name", module_names("headforcing.measure.classifiers"))
def test_every_classifier_has_settings_that_can_be_given(name):
    classify = find_classifier(name)
    known = known_settings(classify)
    assert known
    assert parse_settings([f"{key}={value}" for key, value in known.items()], classify) == known


def hand_made(tmp_path, name, rows, **origin):
    RoleMap(tuple(map(tuple, rows)), Origin(**origin)).save(tmp_path / name)
    return tmp_path / name


def test_two_maps_are_compared(tmp_path):
    a = hand_made(tmp_path, "a.json", [[Local(), Local(), Anchor(), Memory()]])
    b = hand_made(tmp_path, "b.json", [[Local(), Anchor(), Anchor(), Memory()]])
    said = run("compare", a, b)
    assert said.exit_code == 0, said.output
    for word in ("kappa", "NMI", "ARI", "Jaccard", "agreement", "0.750"):
        assert word in said.stdout
    told = parsed(run("compare", a, b, "--json"))
    assert told["agreement"] == 0.75
    assert sum(map(sum, told["table"])) == 4
    assert parsed(run("compare", a, a, "--json"))["kappa"] == 1


def test_maps_without_a_label_in_common(tmp_path):
    a = hand_made(tmp_path, "a.json", [[Local(), Local(), Anchor()]])
    b = hand_made(tmp_path, "b.json", [[Local(2), Local(2), Anchor(3)]])
    assert "no common label" in run("compare", a, b).stdout
    assert parsed(run("compare", a, b, "--json"))["kappa"] is None


def test_maps_of_other_models_cannot_be_compared(tmp_path):
    a = hand_made(tmp_path, "a.json", [[Local(), Local()]])
    b = hand_made(tmp_path, "b.json", [[Local()]])
    assert refused(run("compare", a, b), "1 layers x 2 heads")
    assert refused(run("compare", a, tmp_path / "absent.json"), "absent.json")


@pytest.mark.parametrize("kind", ["svg", pytest.param("png", marks=pytest.mark.slow)])
def test_pictures_of_a_map_and_its_profile(folder, tmp_path, kind):
    pytest.importorskip("matplotlib")
    out = tmp_path / "pictures"
    told = parsed(
        run(
            *("plot", folder / "roles.json", "--profile", folder / "profile.safetensors"),
            *("--out", out, "--format", kind, "--json"),
        )
    )
    names = ["head-map", "roles-per-layer", "frames-kept", "mass-by-age", "mass-scatter"]
    expected = [f"roles-{name}" for name in names]
    assert told["files"] == [str(out / f"{name}.{kind}") for name in expected]
    for name in expected:
        content = (out / f"{name}.{kind}").read_bytes()
        if kind == "svg":
            assert content.rstrip().endswith(b"</svg>")
        else:
            assert content.startswith(b"\x89PNG")


def test_pictures_of_several_files(folder, tmp_path):
    pytest.importorskip("matplotlib")
    other = hand_made(tmp_path, "other.json", [[Local()] * HEADS] * LAYERS)
    answer = run("plot", folder / "profile.safetensors", other, "--out", tmp_path / "pictures")
    assert answer.exit_code == 0, answer.output
    made = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert made == {
        "profile-mass-by-age.svg",
        "profile-mass-scatter.svg",
        "other-head-map.svg",
        "other-roles-per-layer.svg",
    }
    assert "stored frames: not plotted" in answer.stderr
    assert re.findall(r"other-\S+\.svg", answer.stdout)


def test_a_map_of_another_model_is_not_drawn_over_a_profile(folder, tmp_path):
    pytest.importorskip("matplotlib")
    other = hand_made(tmp_path, "other.json", [[Local()]])
    out = tmp_path / "never"
    options = ["--profile", folder / "profile.safetensors", "--out", out]
    assert refused(run("plot", other, *options), "1 layers x 1 heads")
    assert not out.exists()
    assert refused(run("plot", other, other, "--out", out), "the same name")


def test_a_missing_drawing_library_is_named(folder, monkeypatch):
    monkeypatch.setattr("headforcing.cli.plot.DRAWING", ("no_such_library",))
    assert refused(run("plot", folder / "roles.json"), "pip install 'headforcing[plot]'")


def test_labels_of_another_project_are_imported(tmp_path):
    (tmp_path / "labels.csv").write_text("-1,1,2\n2,2,-1\n")
    out = tmp_path / "roles.json"
    options = ["--format", "pyramid_forcing", "--base-model", "nobody/tiny", "--out", out]
    told = parsed(run("import", tmp_path / "labels.csv", *options, "--json"))
    assert (told["layers"], told["heads"], told["files"]) == (2, 3, [str(out)])
    notes = RoleMap.load(out).origin.notes
    assert notes["base_model"] == "nobody/tiny"
    assert {name for row in RoleMap.load(out).labels for name in row} <= {"anchor", "wave", "veil"}
    assert notes["imported"] == "pyramid_forcing"
    assert told["hash"] == RoleMap.load(out).hash
    assert RoleMap.load(out) == pyramid_forcing(RoleMap.load(out).labels)
    parsed(run("import", tmp_path / "labels.csv", *options, "--window", 12, "--json"))
    assert RoleMap.load(out) == pyramid_forcing(RoleMap.load(out).labels, 12)
    assert refused(run("import", tmp_path / "labels.csv", *options, "--window", 12, "--chunk", 9), "12", "9")
    said = run("import", tmp_path / "labels.csv", *options)
    assert said.exit_code == 0
    assert "the role of its preset" in " ".join(said.stdout.split())


def test_what_cannot_be_imported(tmp_path):
    (tmp_path / "labels.csv").write_text("-1,7\n")
    out = tmp_path / "roles.json"
    options = ["--out", out, "--format"]
    assert refused(run("import", tmp_path / "labels.csv", *options, "pyramid_forcing"), "head 1", "7")
    assert refused(run("import", tmp_path / "labels.csv", *options, "tarot"), "forcing_kv", "pyramid_forcing")
    assert refused(run("import", tmp_path / "absent.csv", *options, "pyramid_forcing"), "absent.csv")
    assert not out.exists()
    said = run("import", "--help").stdout
    assert all(name in said for name in module_names("headforcing.roles.maps.importers"))


def test_a_map_is_pulled_from_the_hub(folder, tmp_path, monkeypatch):
    asked = []

    def from_hub(repository, *, revision):
        asked.append((repository, revision))
        if revision == "main":
            warnings.warn("what main names can change", stacklevel=2)
        return RoleMap.load(folder / "roles.json")

    monkeypatch.setattr("headforcing.roles.maps.hub.from_hub", from_hub)
    out = tmp_path / "pulled.json"
    told = parsed(run("pull", "org/name", "--revision", "0" * 40, "--out", out, "--json"))
    assert told == {"hash": RoleMap.load(out).hash, "files": [str(out)]}
    assert asked == [("org/name", "0" * 40)]
    said = run("pull", "org/name", "--revision", "main", "--out", out)
    assert said.exit_code == 0
    assert said.stderr == "warning: what main names can change\n"
    assert f"next: headforcing roles show {out}" in said.stdout


def test_a_map_is_pushed_to_the_hub_with_its_report(folder, monkeypatch):
    pushed = []

    def push_to_hub(*given, **options):
        pushed.append((given, options))
        return hub.Pushed("https://hub.test/org/name/commit/1", "1" * 40)

    monkeypatch.setattr("headforcing.roles.maps.hub.push_to_hub", push_to_hub)
    options = ["--report", folder / "stability.json", "--private", "--base-model", "org/base"]
    told = parsed(run("push", folder / "roles.json", "org/name", *options, "--json"))
    assert told == {"url": "https://hub.test/org/name/commit/1", "commit": "1" * 40}
    [((role_map, repository), given)] = pushed
    assert role_map == RoleMap.load(folder / "roles.json")
    assert (repository, given["private"], given["base_model"]) == ("org/name", True, "org/base")
    assert json.loads(given["report"])["stable"] is True
    said = run("push", folder / "roles.json", "org/name").stdout
    assert f"next: headforcing roles pull org/name --revision {'1' * 40}" in said


def test_what_the_hub_refuses(folder, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise hub.HubError("org/name: not there")

    monkeypatch.setattr("headforcing.roles.maps.hub.from_hub", refuse)
    monkeypatch.setattr("headforcing.roles.maps.hub.push_to_hub", refuse)
    out = tmp_path / "never.json"
    assert refused(run("pull", "org/name", "--revision", "0" * 40, "--out", out), "not there")
    assert not out.exists()
    assert refused(run("push", folder / "roles.json", "org/name"), "not there")
    assert refused(run("push", folder / "roles.json", "org/name", "--report", folder / "roles.json"), "/")


def test_an_origin_is_shown_as_it_is(tmp_path):
    measured = Measurement(method="by hand [of course]", settings={"eye": "left"})
    path = hand_made(tmp_path, "map.json", [[Local()]], measurement=measured, notes={"mood": "[red]good"})
    said = run("show", path).stdout
    assert "by hand [of course]" in said
    assert "[red]good" in said
