"""Files of an evaluation: safe names, one manifest line per video, and their verification.

    >>> [job.file for job in make_jobs(["A cat, running!", "../../etc"], seeds=1)]
    ['a-cat-running-3cfe2f1ab5cc-00000.mp4', 'etc-74ccf3c5b4c1-00001.mp4']

A job is one video: one prompt with one seed, and a global index that does not depend on the number of
processes. `examples/eval_lora.py` is the script that uses this module.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headforcing.errors import OptionError
from headforcing.roles.maps.strict_json import digest, parse

MANIFEST = "manifest.jsonl"
VIDEOS = "videos"
_PARTS = "manifest*.jsonl"
_SLUG = 60
_MAX_BYTES = 1 << 26


@dataclass(frozen=True)
class Job:
    """One video.

    Attributes:
        index: number of the video, prompt by prompt, then seed by seed.
        prompt_index: number of the prompt.
        prompt: exactly as it was read.
        seed: number of the seed, as on the command line.
    """

    index: int
    prompt_index: int
    prompt: str
    seed: int

    @property
    def noise_seed(self) -> int:
        """Seed of the noise of this video; depends only on seed and index, 63 bits."""
        return int.from_bytes(hashlib.sha256(f"{self.seed} {self.index}".encode()).digest()[:8], "big") >> 1

    @property
    def file(self) -> str:
        """Unique file name of the video: ASCII, at most 83 characters."""
        exact = hashlib.sha256(self.prompt.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        return f"{slug(self.prompt)}-{exact}-{self.index:05d}.mp4"

    def facts(self) -> dict[str, Any]:
        """Its entries in the manifest."""
        return {
            "index": self.index,
            "prompt_index": self.prompt_index,
            "prompt": self.prompt,
            "seed": self.seed,
            "noise_seed": self.noise_seed,
            "file": f"{VIDEOS}/{self.file}",
        }


def make_jobs(prompts: Sequence[str], seeds: int, first_seed: int = 0) -> list[Job]:
    """Every prompt with every seed; adding prompts at the end does not change earlier jobs."""
    return [
        Job(place * seeds + offset, place, prompt, first_seed + offset)
        for place, prompt in enumerate(prompts)
        for offset in range(seeds)
    ]


def slug(text: str) -> str:
    """A file name part made from a text: `a-z0-9` and single dashes, at most 60 characters.

    >>> slug("Ünïcode / ../CON"), slug("你好")
    ('unicode-con', 'video')
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:_SLUG].rstrip("-") or "video"


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, unchanged: no strip, no normalisation.

    A `.jsonl` file has one JSON string per line, which may be empty or contain line breaks or lone
    surrogates. Every other file has one prompt per line; blank lines are ignored.

    Raises:
        OptionError: there is no such file, it is not UTF-8, a line is not a JSON string, or it has no prompt.
    """
    try:
        lines = [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} cannot be read as UTF-8 text: {error}") from error
    found = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [_string(line, f"{path}, line {number}") for number, line in found]
    else:
        prompts = [line for _, line in found]
    if not prompts:
        raise OptionError(f"{path} contains no prompt: expected one per line")
    return prompts


def weights_hash(model: nn.Module) -> str:
    """`sha256:...` of all weights of a model, bit by bit: names, dtypes, shapes and values.

    Raises:
        OptionError: some weights are meta tensors.
    """
    parts = []
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            raise OptionError(f"{name} is a meta tensor, so the checkpoint cannot be hashed: load it first")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        inner = hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()
        parts += [f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), inner]
    return digest(*parts)


def file_hash(path: Path) -> str:
    """`sha256:...` of a file's bytes, as `sha256sum` computes it."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return f"sha256:{found.hexdigest()}"


def pixels(video: Tensor) -> Tensor:
    """Bytes `[T, H, W, 3]` on the CPU of a video `[3, T, H, W]` or `[1, 3, T, H, W]` in [-1, 1].

    Raises:
        OptionError: it has another shape, or contains NaN or infinity.
    """
    if not isinstance(video, Tensor):
        raise OptionError(f"run returned a {type(video).__name__}: expected a tensor [3, T, H, W]")
    plain = video.detach().float().cpu()
    plain = plain[0] if plain.ndim == 5 and len(plain) == 1 else plain
    if plain.ndim != 4 or plain.shape[0] != 3 or not plain.numel() or not bool(plain.isfinite().all()):
        raise OptionError(f"run returned {list(video.shape)}: expected finite numbers [3, T, H, W]")
    return ((plain.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).contiguous()


def append_entry(path: Path, entry: Mapping[str, Any]) -> None:
    """Adds a line to a manifest; it is on disk when this returns."""
    with path.open("a", encoding="ascii") as file:
        file.write(_line(entry))
        file.flush()
        os.fsync(file.fileno())


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The lines of a manifest, without an incomplete last line.

    Raises:
        OptionError: another line is not a JSON object.
    """
    lines, found = path.read_bytes().split(b"\n"), []
    for number, line in enumerate(lines[:-1], 1):
        try:
            entry = parse(line, _MAX_BYTES)
        except ValueError as error:
            raise OptionError(f"{path}, line {number}: {error}") from error
        if not isinstance(entry, dict):
            raise OptionError(f"{path}, line {number}: expected a JSON object")
        found.append(entry)
    return found


def prepare(
    out: Path, jobs: Sequence[Job], run: Mapping[str, Any], resume: bool = False, force: bool = False
) -> list[int]:
    """Prepares the folder and returns the jobs that are left; one process calls it before any other writes.

    Args:
        out: the folder.
        jobs: all of them.
        run: facts common to all videos: weights, roles, versions.
        resume: keep videos whose facts and bytes are as recorded.
        force: make all videos again, overwriting files.

    Raises:
        OptionError: the folder contains an evaluation and neither `resume` nor `force` is given, or it
            contains another evaluation, which would be mixed with this one.
    """
    videos = out / VIDEOS
    videos.mkdir(parents=True, exist_ok=True)
    for path in (videos, *out.glob(_PARTS)):
        if path.is_symlink():
            raise OptionError(f"{path} is a link: expected a folder or file of its own in {out}")
    strangers = {path.name for path in videos.glob("*.mp4")} - {job.file for job in jobs}
    if strangers:
        raise OptionError(
            f"{videos} contains {len(strangers)} videos that do not belong to these prompts and seeds, such "
            f"as {min(strangers)}: choose another --out"
        )
    manifests = sorted(out.glob(_PARTS))
    if (manifests or any(videos.glob("*.mp4"))) and not (resume or force):
        raise OptionError(f"{out} contains an evaluation: pass --resume or --force, or choose another --out")
    done = {} if force else _verified(out, manifests, jobs, run)
    left = [job.index for job in jobs if job.index not in done]
    if left and (videos / "split_clip").exists():
        raise OptionError(f"{videos}/split_clip contains VBench's clips of earlier videos: remove it first")
    for unfinished in out.glob(".part-*"):  # of a process that was killed
        if unfinished.is_dir() and not unfinished.is_symlink():
            shutil.rmtree(unfinished)
    _replace_manifests(out, done)
    return left


def merge(out: Path, jobs: Sequence[Job], run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Joins the manifests of all processes into one, in order of the index.

    Raises:
        OptionError: a video is missing, or its bytes differ from the recorded ones.
    """
    done = _verified(out, sorted(out.glob(_PARTS)), jobs, run)
    missing = [job.index for job in jobs if job.index not in done]
    if missing:
        raise OptionError(
            f"{len(missing)} of {len(jobs)} videos are missing, the first is number {missing[0]}: run again "
            "with --resume"
        )
    _replace_manifests(out, done)
    return [done[job.index] for job in jobs]


def _verified(
    out: Path, manifests: Iterable[Path], jobs: Sequence[Job], run: Mapping[str, Any]
) -> dict[int, dict[str, Any]]:
    """Recorded videos by index whose files exist with the recorded bytes."""
    expected = {job.index: job.facts() for job in jobs}
    known, found = json.loads(json.dumps(run)), {}
    for manifest in manifests:
        for entry in read_entries(manifest):
            was = entry.get("run")
            if was != known:
                had = was if isinstance(was, dict) else {}
                names = sorted(name for name in known | had if had.get(name) != known.get(name))
                raise OptionError(
                    f"{manifest} belongs to another evaluation ({', '.join(names)} changed): "
                    "choose another --out, or pass --force to make all videos again"
                )
            index = entry.get("index")
            facts = expected.get(index) if isinstance(index, int) else None
            if facts is None or any(entry.get(key) != value for key, value in facts.items()):
                raise OptionError(
                    f"{manifest}: video {index!r} does not belong to these prompts and seeds: choose "
                    "another --out"
                )
            path = out / facts["file"]
            if path.is_file() and not path.is_symlink() and file_hash(path) == entry.get("sha256"):
                found[facts["index"]] = entry
    return found


def _replace_manifests(out: Path, done: Mapping[int, Mapping[str, Any]]) -> None:
    """Writes one manifest in place of those of single processes."""
    part = out / f".part-{MANIFEST}"
    part.unlink(missing_ok=True)
    part.write_text("".join(_line(done[index]) for index in sorted(done)), "ascii")
    os.replace(part, out / MANIFEST)
    for path in out.glob(_PARTS):
        if path.name != MANIFEST:
            path.unlink()


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"  # ASCII: surrogates and line breaks are escaped


def _string(line: str, where: str) -> str:
    try:
        value = parse(line, _MAX_BYTES)
    except ValueError as error:
        raise OptionError(f"{where}: {error}") from error
    if not isinstance(value, str):
        raise OptionError(f"{where}: expected a JSON string, got {type(value).__name__}")
    return value
