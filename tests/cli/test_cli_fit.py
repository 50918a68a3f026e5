"""`headforcing roles fit`: from a profile file and a budget to a map."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from headforcing import RoleMap
from headforcing.cli import app
from headforcing.cli.amounts import parse_bytes
from headforcing.errors import OptionError
from headforcing.measure.budget import COLUMNS, fit_budget
from tests.profiles import random_profile

RUN = CliRunner()


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "profile.safetensors"
    random_profile(3).save(path)
    return path


def run(profile, *options):
    return RUN.invoke(app, ["roles", "fit", str(profile), *map(str, options)])


def test_a_map_and_its_trade_off(profile, tmp_path):
    out = tmp_path / "new" / "roles.json"
    answer = run(profile, "--frames", 80, "--out", out)
    assert answer.exit_code == 0, answer.output
    for word in ("this budget", "per head", "heads per role", "memory3+12+3", str(out), "next: headforcing"):
        assert word in answer.stdout
    expected = fit_budget(random_profile(3), frames=80)
    assert RoleMap.load(out) == expected.role_map()
    assert RoleMap.load(out).origin.measurement.method == "fit_budget"


def test_the_same_as_json(profile):
    answer = run(profile, "--frames", 80, "--by", "output_regret.mean", "--json")
    assert (answer.exit_code, answer.stderr) == (0, "")
    found, told = fit_budget(random_profile(3), frames=80, by="output_regret.mean"), json.loads(answer.stdout)
    assert (told["frames"], told["left"], told["error"]) == (found.frames, found.left, found.error)
    assert [(point["frames"], point["error"]) for point in told["curve"]] == list(found.curve)
    assert told["labels"] == [list(row) for row in found.labels]
    assert told["hash"] == found.role_map().hash
    assert told["settings"] == {"by": "output_regret.mean", "frames": 80}
    assert told["files"] == []


def test_bytes_of_a_type(profile):
    amount = "200kB"  # 12 heads of 8 channels
    options = ["--bytes", amount, "--tokens-per-frame", 10, "--json"]
    told = json.loads(run(profile, *options).stdout)
    assert told["frames"] + told["left"] == 200_000 // (10 * 8 * 2 * 2) - 36
    wide = json.loads(run(profile, *options, "--dtype", "fp32").stdout)
    assert wide["frames"] + wide["left"] == 200_000 // (10 * 8 * 2 * 4) - 36
    held = json.loads(run(profile, *options, "--held").stdout)
    assert held["frames"] + held["left"] == 200_000 // (10 * 8 * 3 * 2 + 8) - 36


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("2GB", 2 * 10**9),
        ("2 GB", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("4096", 4096),
        ("7B", 7),
        ("3kB", 3000),
        ("3KiB", 3072),
        ("0.1MB", 100_000),
        ("1TB", 10**12),
    ],
)
def test_amounts(text, count):
    assert parse_bytes(text, "--bytes") == count


@pytest.mark.parametrize("text", ["", "GB", "2G", "2gb", "-1GB", "1e9", "1.GB", "2GB2", "2iB", "two"])
def test_what_is_no_amount(text):
    with pytest.raises(OptionError, match="such as 2GB"):
        parse_bytes(text, "--bytes")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([], "either --frames or --bytes"),
        (["--frames", "9", "--bytes", "2GB"], "either --frames or --bytes"),
        (["--bytes", "2GB"], "--tokens-per-frame"),
        (["--frames", "80", "--dtype", "bf16"], "--dtype works with --bytes"),
        (["--frames", "80", "--held"], "--held works with --bytes"),
        (["--frames", "80", "--tokens-per-frame", "4"], "--tokens-per-frame works with --bytes"),
        (["--bytes", "2GB", "--tokens-per-frame", "4", "--dtype", "int3"], "bf16, fp16, fp32"),
        (["--bytes", "lots", "--tokens-per-frame", "4"], "such as 2GB"),
        (["--frames", "1"], "give at least frames=12"),
        (["--frames", "80", "--by", "luck"], "output_regret.p95"),
        (["--frames", "80", "--by", "ablation.increase"], "ablate_heads"),
    ],
)
def test_a_mistake_gives_one_message(profile, options, word):
    answer = run(profile, *options)
    assert answer.exit_code == 2
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1
    assert word in answer.stderr


def test_the_profile_is_not_written_over(profile):
    before = profile.read_bytes()
    for name in (profile, profile.with_suffix(".profile.json")):
        answer = run(profile, "--frames", 80, "--out", name)
        assert answer.exit_code == 2
        assert "a file of the profile" in answer.stderr
    assert profile.read_bytes() == before


def test_the_help_names_every_error():
    said = RUN.invoke(app, ["roles", "fit", "--help"]).stdout
    assert all(column in said for column in COLUMNS)
