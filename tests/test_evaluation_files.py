"""Names, prompts, manifest lines and hashes of an evaluation, without any model."""

from __future__ import annotations

import json
import os
import random
import re
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples import evaluation as ef
from headforcing.errors import OptionError

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*-[0-9a-f]{12}-[0-9]{5}\.mp4")
ODD = [
    "",
    " ",
    "\n",
    "two\nlines",
    "שלום עולם",
    "\u202egnp.exe",
    "\U0001f600\U0001f1e9\U0001f1ea",
    "../../etc/passwd",
    "/absolute",
    "C:\\Windows",
    "CON",
    "-rf",
    "a\0b",
    "." * 300,
    "x" * 3000,
    "a-Scene-0",
    "cat.mp4",
    "e\u0301",
    "\u00e9",
    "\ud800",
    "~",
    "$(id)",
    "same",
    "same",
    "Same",
]
RUN = {"checkpoint": "sha256:1", "fps": 8}


def fuzzed(count):
    draw = random.Random(0)
    nasty = ["..", "/", "\\", "\0", "\n", "-", ".mp4", "CON", "%2e", "é", "\U0001f600", "\ud83d", "אב", " "]
    for _ in range(count):
        parts = [
            draw.choice(nasty) if draw.random() < 0.5 else chr(draw.randrange(0x110000))
            for _ in range(draw.randrange(12))
        ]
        yield "".join(parts)


def is_safe(name):
    return bool(NAME.fullmatch(name)) and len(name) <= 83 and os.path.basename(name) == name


def write(folder: Path, job, content: bytes, run=RUN, rank=0):
    path = folder / ef.VIDEOS / job.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    ef.append_entry(
        folder / f"manifest.rank-{rank}.jsonl", {**job.facts(), "sha256": ef.file_hash(path), "run": run}
    )


@pytest.fixture
def jobs():
    return ef.make_jobs(["one", "two", "two"], seeds=2)


@pytest.fixture
def done(tmp_path, jobs):
    assert ef.prepare(tmp_path, jobs, RUN) == [0, 1, 2, 3, 4, 5]
    for job in jobs:
        write(tmp_path, job, str(job.index).encode(), rank=job.index % 2)
    return tmp_path


def test_5000_fuzzed_prompts_give_5000_names_that_stay_in_their_folder(tmp_path):
    prompts = [*fuzzed(5000 - len(ODD)), *ODD]
    names = [job.file for job in ef.make_jobs(prompts, 1)]
    assert [name for name in names if not is_safe(name)] == []
    assert len({name.lower() for name in names}) == 5000
    assert {(tmp_path / name).resolve().parent for name in names} == {tmp_path.resolve()}


@given(st.text(st.characters(), max_size=200))
def test_a_slug_is_short_ascii_and_its_own_slug(text):
    name = ef.slug(text)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert len(name) <= 60
    assert ef.slug(name) == name


@pytest.mark.parametrize("prompt", ODD, ids=ascii)
def test_an_odd_prompt_gives_a_file_that_can_be_written(prompt, tmp_path):
    (job,) = ef.make_jobs([prompt], 1)
    write(tmp_path, job, b"video")
    (entry,) = ef.read_entries(tmp_path / "manifest.rank-0.jsonl")
    assert entry["prompt"] == prompt
    assert (tmp_path / ef.MANIFEST).exists() is False
    assert sorted(path.name for path in (tmp_path / ef.VIDEOS).iterdir()) == [job.file]


def test_vbench_long_reads_the_whole_name_as_one_video():
    for job in ef.make_jobs([*ODD, *fuzzed(500)], 2):
        assert job.file.split(".mp4") == [job.file[:-4], ""]  # as its clips are named
        assert "-Scene" not in job.file  # where it ends the name of a video
        assert "_" not in job.file  # where it ends the name in a clip's


def test_noise_depends_on_seed_and_index_alone():
    jobs, other = ef.make_jobs(["a", "b", "c"], 2), ef.make_jobs(["x", "y", "z", "more"], 2)
    assert [job.noise_seed for job in jobs] == [job.noise_seed for job in other[:6]]
    many = {job.noise_seed for job in ef.make_jobs([""] * 500, 4)}
    assert len(many) == 2000
    assert all(0 <= seed < 2**63 for seed in many)
    assert [job.seed for job in ef.make_jobs(["a"], 3, first_seed=7)] == [7, 8, 9]
    assert jobs[0].noise_seed == 5303414058334976765  # videos of one version are those of the next


def test_prompts_are_read_untouched(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_bytes(b"\xef\xbb\xbf  a cat \r\n\n" + "e\u0301\u2028b\n".encode() + b"last")
    assert ef.read_prompts(text) == ["  a cat ", "e\u0301\u2028b", "last"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("\n".join(json.dumps(prompt) for prompt in ODD), "ascii")
    assert ef.read_prompts(lines) == ODD


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "cannot be read"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.txt", b"\n \n", "no prompt"),
        ("a.jsonl", b'"a"\n{"prompt": "b"}', "line 2: expected a JSON string"),
        ("a.jsonl", b"plain text", "line 1: not strict JSON"),
    ],
)
def test_a_wrong_file_of_prompts_is_refused(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OptionError, match=said):
        ef.read_prompts(tmp_path / name)


def test_the_manifests_of_all_processes_become_one_in_order(done, jobs):
    entries = ef.merge(done, jobs, RUN)
    assert [entry["index"] for entry in entries] == list(range(6))
    assert ef.read_entries(done / ef.MANIFEST) == entries
    assert [path.name for path in done.glob("manifest*")] == [ef.MANIFEST]
    assert {entry["file"] for entry in entries} == {f"videos/{job.file}" for job in jobs}


def test_a_folder_in_use_asks_what_to_do(done, jobs):
    with pytest.raises(OptionError, match="--resume or --force"):
        ef.prepare(done, jobs, RUN)
    assert ef.prepare(done, jobs, RUN, resume=True) == []
    assert ef.prepare(done, jobs, RUN, force=True) == list(range(6))


def test_only_verified_videos_are_kept(done, jobs):
    files = [done / ef.VIDEOS / job.file for job in jobs]
    files[1].write_bytes(b"cut off")
    files[3].unlink()
    files[4].unlink()
    files[4].symlink_to(files[5])
    (done / ".part-abc").mkdir()
    (done / ".part-abc" / "video.mp4").write_bytes(b"half")
    assert ef.prepare(done, jobs, RUN, resume=True) == [1, 3, 4]
    assert not (done / ".part-abc").exists()
    with pytest.raises(OptionError, match="3 of 6 videos are missing, the first is number 1"):
        ef.merge(done, jobs, RUN)


def test_a_line_that_was_cut_off_is_none_and_other_damage_is_told(done, jobs):
    part = done / "manifest.rank-1.jsonl"
    whole = part.read_bytes()
    part.write_bytes(whole[:-20])
    assert ef.prepare(done, jobs, RUN, resume=True) == [5]
    write(done, jobs[5], b"again")  # goes on a line of its own
    assert len(ef.merge(done, jobs, RUN)) == 6
    (done / ef.MANIFEST).write_bytes(b"{\n" + whole)
    with pytest.raises(OptionError, match="line 1: not strict JSON"):
        ef.prepare(done, jobs, RUN, resume=True)


def test_another_evaluation_is_not_continued(done, jobs):
    with pytest.raises(OptionError, match=r"another evaluation \(checkpoint changed\)"):
        ef.prepare(done, jobs, {**RUN, "checkpoint": "sha256:2"}, resume=True)
    with pytest.raises(OptionError, match=r"another evaluation \(checkpoint, fps, more changed\)"):
        ef.prepare(done, jobs, {"more": 1}, resume=True)
    with pytest.raises(OptionError, match="does not belong to these prompts"):
        ef.prepare(done, ef.make_jobs(["one", "two", "two"], 2, first_seed=1), RUN, resume=True)
    with pytest.raises(OptionError, match="do not belong"):
        ef.prepare(done, ef.make_jobs(["one", "three"], 2), RUN, force=True)
    more = ef.make_jobs(["one", "two", "two", "three"], 2)
    assert ef.prepare(done, more, RUN, resume=True) == [6, 7]


def test_clips_of_earlier_videos_are_not_mixed_with_new_ones(done, jobs):
    (done / ef.VIDEOS / "split_clip").mkdir()
    assert ef.prepare(done, jobs, RUN, resume=True) == []
    with pytest.raises(OptionError, match="split_clip"):
        ef.prepare(done, jobs, RUN, force=True)


def test_links_out_of_the_folder_are_refused(tmp_path, jobs):
    out, away = tmp_path / "out", tmp_path / "away"
    away.mkdir()
    out.mkdir()
    (out / ef.VIDEOS).symlink_to(away)
    with pytest.raises(OptionError, match="is a link"):
        ef.prepare(out, jobs, RUN)
    (out / ef.VIDEOS).unlink()
    (out / "manifest.rank-0.jsonl").symlink_to(away / "x")
    with pytest.raises(OptionError, match="is a link"):
        ef.prepare(out, jobs, RUN, resume=True)


def test_the_hash_of_weights_sees_every_bit_name_and_dtype():
    def model(**changes):
        torch.manual_seed(0)
        made = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        with torch.no_grad():
            made[0].weight[0, 0] += changes.get("add", 0)
        return made.to(changes.get("dtype", torch.float32))

    plain = ef.weights_hash(model())
    others = [model(add=1e-7), model(dtype=torch.bfloat16), torch.nn.Sequential(*reversed(model()))]
    assert ef.weights_hash(model()) == plain
    assert len({plain, *map(ef.weights_hash, others)}) == 4
    with pytest.raises(OptionError, match="meta"):
        ef.weights_hash(model().to("meta"))


def test_pixels_are_bytes_and_nonsense_is_refused():
    video = torch.tensor([-2.0, -1.0, 0.0, 1.0]).view(1, 1, 1, 1, 4).expand(1, 3, 2, 5, 4)
    assert ef.pixels(video).shape == (2, 5, 4, 3)
    assert ef.pixels(video[0])[0, 0, :, 0].tolist() == [0, 0, 128, 255]
    for wrong in (video[0, 0], video * torch.nan, video.expand(2, -1, -1, -1, -1), video[:, :, :0], None):
        with pytest.raises(OptionError, match="expected"):
            ef.pixels(wrong)


def test_nfc_and_nfd_are_two_prompts():
    composed, decomposed = ef.make_jobs(["\u00e9", "e\u0301"], 1)
    assert unicodedata.normalize("NFC", decomposed.prompt) == composed.prompt
    assert composed.file[:-9] != decomposed.file[:-9]
