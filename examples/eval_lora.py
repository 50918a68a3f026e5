"""Make the videos of an evaluation on any number of processes: the same files, whatever that number.

    accelerate launch --num_processes 4 examples/eval_lora.py --make my_model:make --lora runs/lora \
        --prompts prompts.txt --roles roles.json --out runs/eval --seeds 2 --resume

`make` takes nothing and returns `(model, run)`; `run(prompt, generator)` returns a video `[3, T, H, W]` or
`[1, 3, T, H, W]` in [-1, 1]. See docs/evaluation.md.
"""

# ruff: noqa: T201 -- a script speaks
from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import evaluation as eval_files
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

import headforcing as hf
from headforcing.adapters.base import find_adapter
from headforcing.cli.profile import load_target
from headforcing.errors import ForeignRolesWarning, HeadForcingError, OptionError
from headforcing.roles.maps.fingerprint import fingerprint
from headforcing.roles.maps.presets import PRESETS
from headforcing.roles.maps.strict_json import canonical, digest, pretty

AGREE_SECONDS = 30  # for what is compared before any model is loaded


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--make", required=True, metavar="MODULE:FUNCTION", help="returns (model, run), see above")
    add("--prompts", required=True, type=Path, help="one per line, or .jsonl with one JSON string per line")
    add(
        "--out", required=True, type=Path, help="folder for videos/, manifest.jsonl, prompts.json, roles.json"
    )
    add("--lora", type=Path, help="a folder that PEFT saved, with adapter_model.safetensors")
    add("--roles", help="a role-map file or a preset [default: the model's own cache]")
    add("--strict", action="store_true", help="refuse a role map that was measured on other weights")
    add("--seeds", type=int, default=1, help="videos per prompt [default: 1]")
    add("--first-seed", type=int, default=0, help="the first of them [default: 0]")
    add("--fps", type=int, default=16, help="frames per second of the videos [default: 16]")
    add("--resume", action="store_true", help="keep videos whose bytes are the recorded ones")
    add("--force", action="store_true", help="make everything anew, over the same files")
    add("--timeout", type=int, default=3600, help="longest wait for another process, seconds [default: 3600]")
    add("--cpu", action="store_true", help="use no accelerator")
    options = parser.parse_args()
    if min(options.seeds, options.fps, options.timeout) < 1:
        parser.error("--seeds, --fps and --timeout are at least 1")
    if options.resume and options.force:
        parser.error("--resume keeps videos and --force does not: choose one")
    return options


class Team:
    """All processes; what they say to each other goes over gloo on the CPU, with a time limit."""

    def __init__(self, cpu: bool, timeout: int) -> None:
        from accelerate import PartialState

        cpu = cpu or not torch.cuda.is_available()
        self.state = PartialState(cpu=cpu, timeout=timedelta(seconds=timeout))
        self.rank, self.size = self.state.process_index, self.state.num_processes
        self.limits = {"soon": min(AGREE_SECONDS, timeout), "late": timeout}
        self.groups = {}
        for name, limit in self.limits.items() if self.size > 1 else ():
            self.groups[name] = dist.new_group(backend="gloo", timeout=timedelta(seconds=limit))

    def gather(self, mine: Any, when: str = "late") -> list[Any]:
        """What every process says, by rank; ends where one is gone or stays silent for too long."""
        if self.size == 1:
            return [mine]
        everybody = [None] * self.size
        try:
            dist.all_gather_object(everybody, mine, group=self.groups[when])
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            silent = re.search("time[d]? ?out", said, re.IGNORECASE) is not None
            raise OptionError(
                f"rank {self.rank}: another process is "
                f"{f'silent for {self.limits[when]} s' if silent else 'gone, it was killed or has failed'}. "
                f"What is made and recorded stays: run again with --resume ({said:.200})"
            ) from error
        return everybody

    def agree(self, facts: dict[str, Any], when: str = "late") -> None:
        """Ends all processes where their facts are not the same."""
        everybody = self.gather(facts, when)
        for name in facts:
            values = [one[name] for one in everybody]
            if any(value != values[0] for value in values):
                told = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
                raise OptionError(f"the processes do not have the same {name}: {told}")

    def ask_first(self, question: Callable[[], Any]) -> Any:
        """The answer of rank 0 for everybody, or its error for everybody."""
        answer = error = None
        if self.rank == 0:
            try:
                answer = question()
            except (HeadForcingError, OSError) as caught:
                error = str(caught)
        answer, error = self.gather((answer, error))[0]
        if error is not None:
            raise OptionError(error)
        return answer


def load_lora(model: nn.Module, folder: Path) -> str:
    """Puts LoRA layers into the model, in place; the hash of what was loaded."""
    from peft import PeftConfig, PeftModel

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise OptionError(f"{weights} is missing: expected a folder that PEFT saved with safetensors")
    wrapped = PeftModel(model, PeftConfig.from_pretrained(str(folder)))
    try:
        found = wrapped.load_adapter(str(folder), "default", is_trainable=False)
    except SafetensorError as error:
        raise OptionError(f"{weights} is no file of safetensors: {error}") from error
    missing = [name for name in found.missing_keys if "lora_" in name]
    if missing or found.unexpected_keys:  # PEFT would go on with zeros, which is the base model
        raise OptionError(
            f"{folder} does not fit the model: {len(missing)} weights are missing ({missing[:1]}), "
            f"{len(found.unexpected_keys)} have no place ({found.unexpected_keys[:1]})"
        )
    return digest(weights.read_bytes(), (folder / "adapter_config.json").read_bytes())


def apply_roles(model: nn.Module, roles: hf.RoleMap | str, strict: bool) -> tuple[hf.HeadForcing, str | None]:
    """The handle, and what tells against the roles having been measured on these weights."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore")
        warnings.simplefilter("always", ForeignRolesWarning)
        handle = hf.apply_head_forcing(model, roles, strict=strict)
    return handle, str(caught[0].message) if caught else None


def write_video(path: Path, video: Tensor, fps: int) -> None:
    """An mp4 in place, whole or not at all; no file of that name, nor a link, is written through."""
    from imageio_ffmpeg import write_frames

    frames = eval_files.pixels(video).numpy()
    coding = ["-crf", "12", "-threads", "2", "-movflags", "+faststart"]
    with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parents[1]) as folder:
        part = Path(folder) / "video.mp4"
        size = {"size": frames.shape[2:0:-1], "macro_block_size": 2}
        writer = write_frames(str(part), fps=fps, quality=None, output_params=coding, **size)
        writer.send(None)
        for frame in frames:
            writer.send(frame)
        writer.close()
        os.replace(part, path)


@torch.no_grad()
def evaluate(options: argparse.Namespace, team: Team) -> None:
    """The whole evaluation, as one of the processes."""
    chosen = options.roles is None or options.roles in PRESETS
    if not chosen and not Path(options.roles).is_file():
        raise OptionError(
            f"--roles is {options.roles!r}: neither a preset ({', '.join(PRESETS)}) nor a role-map file"
        )
    roles = options.roles if chosen else hf.RoleMap.load(options.roles)
    measured = None if chosen else roles.hash
    prompts = eval_files.read_prompts(options.prompts)
    libraries = ("headforcing", "torch", "accelerate", *(["peft"] if options.lora else []))
    versions = {"python": platform.python_version(), **{name: version(name) for name in libraries}}
    listed = digest(canonical(prompts))
    team.agree(
        {"role map": measured, "prompts": listed, "versions": versions, "options": str(options)}, "soon"
    )

    sys.path.insert(0, os.getcwd())
    model, run = load_target(options.make)
    lora = None if options.lora is None else load_lora(model, options.lora)
    model.eval()
    checkpoint = eval_files.weights_hash(model)
    attention = handle = foreign = None
    if roles is not None:  # the model's own cache requires no adapter
        attention = fingerprint(model, find_adapter(model))
        handle, foreign = apply_roles(model, roles, options.strict)
    applied = None if handle is None else handle.roles.hash
    team.agree({"weights": checkpoint, "roles": applied})
    if foreign and team.rank == 0:
        print(f"warning: {foreign}", file=sys.stderr)
    facts = {
        "make": options.make,
        "checkpoint": checkpoint,
        "attention": attention,
        "lora": lora,
        "policy": (roles or "the model's own cache") if chosen else "role map",
        "role_map": measured,
        "roles": applied,
        "measured_on_other_weights": foreign,
        "fps": options.fps,
        "versions": versions,
    }
    jobs = eval_files.make_jobs(prompts, options.seeds, options.first_seed)
    left = team.ask_first(lambda: eval_files.prepare(options.out, jobs, facts, options.resume, options.force))
    mine = [jobs[index] for index in left[team.rank :: team.size]]
    if team.rank == 0:
        print(f"{len(jobs)} videos, {len(left)} of them to make, on {team.size} processes", flush=True)

    for job in mine:  # every video from its own noise, alone: neither order nor company matters
        torch.manual_seed(job.noise_seed)  # for models that draw from the global generator
        video = run(job.prompt, torch.Generator().manual_seed(job.noise_seed))
        if handle is not None and not handle.status().active:
            raise OptionError("run does not use the model that make returned: no attention call came")
        path = options.out / eval_files.VIDEOS / job.file
        write_video(path, video, options.fps)
        entry = {**job.facts(), "sha256": eval_files.file_hash(path), "run": facts}
        eval_files.append_entry(options.out / f"manifest.rank-{team.rank}.jsonl", entry)
        print(f"rank {team.rank}: {job.file}", flush=True)
    team.gather(None)

    def finish() -> None:
        eval_files.merge(options.out, jobs, facts)
        (options.out / "prompts.json").write_text(pretty({job.file: job.prompt for job in jobs}), "ascii")
        if handle is not None:
            handle.roles.save(options.out / "roles.json")

    team.ask_first(finish)
    if team.rank == 0:
        print(f"{len(jobs)} videos in {options.out}", flush=True)


def main() -> None:
    """One message and exit code 2 for what a user can put right; a model's own keep their traceback."""
    options = arguments()
    team = Team(options.cpu, options.timeout)
    try:
        evaluate(options, team)
    except (HeadForcingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        team.state.destroy_process_group()


if __name__ == "__main__":
    main()
