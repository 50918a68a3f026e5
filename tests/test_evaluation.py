"""examples/eval_lora.py: the same videos on any number of processes, also when one of them dies."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.evaluation import MANIFEST, VIDEOS, make_jobs, read_entries
from headforcing import RoleMap
from headforcing.demo import demo_model, demo_roles
from headforcing.errors import HeadForcingError, RoleMapMismatchError
from headforcing.roles import Local

pytest.importorskip("accelerate", reason="the example requires accelerate")
pytest.importorskip("imageio_ffmpeg", reason="the example writes mp4, which requires the extra demo")

pytestmark = pytest.mark.xdist_group("eval")  # makes its videos once
FOLDER = Path(__file__).resolve().parents[1] / "examples"
SCRIPT = FOLDER / "eval_lora.py"
PROMPTS = ["", "\u05e9\u05dc\u05d5\u05dd \U0001f600\n../../etc/passwd", "." * 300, "twice", "twice"]
TARGET = """
import hashlib, os, signal, time

from headforcing.demo import DemoPipeline, demo_model, parse_prompt
from headforcing.demo.world.words import TIMES


def make():
    model = demo_model()
    pipeline = DemoPipeline(model)
    mine = os.environ.get("RANK") == os.environ.get("TROUBLE_RANK", "nobody")

    def run(prompt, generator):
        if mine and os.environ["TROUBLE"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if mine and os.environ["TROUBLE"] == "sleep":
            time.sleep(600)
        time = TIMES[hashlib.sha256(prompt.encode()).digest()[0] % len(TIMES)]
        words = parse_prompt(f"{time} summer balloon red car blue").expand(1, 2, -1)
        return pipeline.generate(words, generator=generator)

    return model, run


def elsewhere():
    return demo_model(), make()[1]  # runs another model than it returns


def silent():
    return demo_model(), lambda prompt, generator: None
"""

ANYFLOW = """
import hashlib

import torch
from diffusers import AnyFlowFARPipeline, AnyFlowFARTransformer3DModel, AutoencoderKLWan
from diffusers import FlowMapEulerDiscreteScheduler


def make():
    torch.manual_seed(0)
    small = dict(num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=32, ffn_dim=32)
    small |= dict(num_layers=1, rope_max_seq_len=32, chunk_partition=(1, 1))
    transformer = AnyFlowFARTransformer3DModel(**small).eval()
    steps = [False, True, True]
    vae = AutoencoderKLWan(base_dim=3, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=steps).eval()
    pipe = AnyFlowFARPipeline(None, None, transformer, vae, FlowMapEulerDiscreteScheduler())

    def run(prompt, generator):
        text = torch.Generator().manual_seed(hashlib.sha256(prompt.encode()).digest()[0])
        said = dict(prompt_embeds=torch.randn(1, 8, 16, generator=text), generator=generator)
        size = dict(height=64, width=64, num_frames=5, num_inference_steps=1)
        frames = pipe(**said, **size, output_type="pt").frames
        return frames[0].transpose(0, 1) * 2 - 1

    return transformer, run
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    (folder / "eval_target.py").write_text(TARGET)
    (folder / "anyflow_target.py").write_text(ANYFLOW)
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    demo_roles().save(folder / "roles.json")
    return folder


def command(place, out, *more, make="eval_target:make", roles=("--roles", "roles.json")):
    files = ["--prompts", str(place / "prompts.jsonl"), "--out", str(out)]
    return ["--make", make, *files, *roles, "--fps", "8", *more]


def load_script(patch):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("eval_lora", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    patch.syspath_prepend(SCRIPT.parent)
    spec.loader.exec_module(script)
    return script


def here(place, out, *more, **target):
    """The script in this process, alone."""
    from accelerate import PartialState

    with pytest.MonkeyPatch.context() as patch:
        script = load_script(patch)
        patch.chdir(place)
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(sys, "argv", [str(SCRIPT), *command(place, out, *more, **target)])
        try:
            script.evaluate(script.arguments(), script.Team(cpu=True, timeout=60))
        finally:
            PartialState._reset_state()


def environment(place, **more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return {**kept, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def ranks_of(size):
    """What a launcher tells each of as many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    world = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), **where}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **world} for rank in range(size)]


def here_as(ranks, place, out):
    """The script in this process, as one of several."""
    os.environ.update(environment(place, **ranks))
    here(place, out)


def team(size, place, out, *more, folders=None, target=None, **trouble):
    """The script on as many processes, without a launcher that would end the others; codes and errors."""
    processes = []
    for rank, ranks in enumerate(ranks_of(size)):
        env = environment(place, **ranks, **trouble)
        line = [sys.executable, str(SCRIPT), *command(place, out, *more, **(target or {}))]
        folder = place if folders is None else folders[rank]
        processes.append(subprocess.Popen(line, cwd=folder, env=env, stderr=subprocess.PIPE, text=True))
    try:
        patient = [process for rank, process in enumerate(processes) if trouble.get("TROUBLE") != "sleep"]
        patient = patient or processes[:1]
        errors = [process.communicate()[1] for process in patient]
        return [process.returncode for process in patient], errors
    finally:
        for process in processes:
            process.kill()
            process.wait()


def content(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def serial(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("serial") / "out"
    here(place, out)
    return content(out)


def test_one_process_makes_every_video_and_says_how(serial, place):
    jobs = make_jobs(PROMPTS, 1)
    assert set(serial) == {f"{VIDEOS}/{job.file}" for job in jobs} | {MANIFEST, "prompts.json", "roles.json"}
    entries = [json.loads(line) for line in serial[MANIFEST].splitlines()]
    assert [entry["prompt"] for entry in entries] == PROMPTS
    assert len({entry["sha256"] for entry in entries}) == 5  # the same prompt twice, too: other noise
    facts = entries[0]["run"]
    assert facts["role_map"] == facts["roles"] == demo_roles().hash
    assert facts["attention"] == demo_roles().origin.model.fingerprint
    assert facts["measured_on_other_weights"] is None
    assert facts["versions"]["torch"] == torch.__version__
    assert json.loads(serial["prompts.json"]) == {job.file: job.prompt for job in jobs}


def test_two_processes_make_the_same(serial, place, tmp_path):
    """Children of this one, which need not import anything."""
    out, fork = tmp_path / "out", multiprocessing.get_context("fork")
    processes = [fork.Process(target=here_as, args=(ranks, place, out)) for ranks in ranks_of(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    assert content(out) == serial


@pytest.mark.slow
def test_accelerate_launch_on_two_processes_makes_the_same(serial, place, tmp_path):
    out = tmp_path / "out"
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    launch += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        str(SCRIPT),
        *command(place, out, "--cpu"),
    ]
    line = [sys.executable, "-m", "accelerate.commands.launch", *launch]
    told = subprocess.run(line, cwd=place, env=environment(place), capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "on 2 processes" in told.stdout
    assert content(out) == serial


@pytest.mark.slow
def test_five_prompts_on_four_processes_make_the_same(serial, place, tmp_path):
    codes, errors = team(4, place, tmp_path / "out")
    assert codes == [0] * 4, errors
    assert content(tmp_path / "out") == serial


@pytest.mark.slow
def test_a_pipeline_of_diffusers_is_evaluated_with_roles_and_without(place, tmp_path):
    pytest.importorskip("diffusers", minversion="0.42", reason="AnyFlow FAR came with diffusers 0.42")
    target = {"make": "anyflow_target:make", "roles": ()}
    here(place, tmp_path / "serial", **target)
    codes, errors = team(2, place, tmp_path / "out", target=target)
    assert codes == [0, 0], errors
    assert content(tmp_path / "out") == content(tmp_path / "serial")
    facts = read_entries(tmp_path / "out" / MANIFEST)[0]["run"]
    assert facts["policy"] == "the model's own cache"
    RoleMap.uniform(Local(recent=0), 1, 2).save(place / "forgetful.json")
    target["roles"] = ("--roles", "forgetful.json")
    here(place, tmp_path / "roles", **target)
    facts = read_entries(tmp_path / "roles" / MANIFEST)[0]["run"]
    assert facts["policy"] == "role map"
    ours, theirs = (content(tmp_path / folder) for folder in ("roles", "serial"))
    videos = [name for name in theirs if name.endswith(".mp4")]
    assert videos
    assert [name for name in videos if ours[name] == theirs[name]] == []


@pytest.mark.slow
def test_after_a_process_died_resume_makes_the_rest(serial, place, tmp_path):
    out = tmp_path / "out"
    codes, errors = team(2, place, out, TROUBLE="die", TROUBLE_RANK="1")
    assert codes == [2, -signal.SIGKILL]
    assert "another process is gone" in errors[0]
    assert "silent" not in errors[0]
    assert "--resume" in errors[0]
    made = {path: path.stat().st_mtime_ns for path in (out / VIDEOS).iterdir()}
    assert len(made) == 3  # rank 0's share, whole
    with pytest.raises(HeadForcingError, match="--resume or --force"):
        here(place, out)
    here(place, out, "--resume")
    assert content(out) == serial
    assert {path: path.stat().st_mtime_ns for path in made} == made


@pytest.mark.slow
def test_a_silent_process_is_not_waited_for(place, tmp_path):
    codes, errors = team(2, place, tmp_path / "out", "--timeout", "12", TROUBLE="sleep", TROUBLE_RANK="1")
    assert codes == [2]
    assert "silent for 12 s" in errors[0]
    assert "gone" not in errors[0]


SAID = {  # by gloo, of torch 2.13
    "Connection closed by peer [127.0.0.1]:53414": "is gone",
    "Read error [127.0.0.1]:1: Connection reset by peer": "is gone",
    "Timed out waiting 12000ms for recv operation to complete": "is silent for 12 s",
    "wait timeout after 12000ms, keys: /default_pg/0": "is silent for 12 s",
}


def told(script, said):
    """What the script makes of an error of gloo."""

    class Team(script.Team):
        def __init__(self):
            self.rank, self.size, self.groups, self.limits = 0, 2, {"late": None}, {"late": 12}

    def fails(*_, **__):
        raise RuntimeError(f"[../gloo/pair.cc:534] {said}\nmore")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.dist, "all_gather_object", fails)
        with pytest.raises(HeadForcingError) as caught:
            Team().gather(None)
    return str(caught.value)


def test_a_process_that_is_gone_is_not_said_to_be_silent(monkeypatch):
    script = load_script(monkeypatch)
    for said, meant in SAID.items():
        assert f"another process {meant}" in told(script, said)
    monkeypatch.setattr(script.re, "search", lambda *_: True)  # planted bug: whatever is said is silence
    assert "gone" not in told(script, next(iter(SAID)))


LOSS = """
import os, signal, sys, time
sys.argv[0] = "eval"
import eval_lora
team = eval_lora.Team(cpu=True, timeout=20)
team.gather(1)
if team.rank == int(os.environ["TROUBLE_RANK"]):
    os.kill(os.getpid(), signal.SIGKILL)
team.gather(None)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("size", "lost"), [(2, 0), (3, 0), (3, 1), (4, 3)])
def test_whichever_process_is_killed_is_said_to_be_gone(monkeypatch, tmp_path, size, lost):
    loss = tmp_path / "loss.py"
    loss.write_text(LOSS)
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", loss)
    _, errors = team(size, FOLDER, tmp_path, TROUBLE="die", TROUBLE_RANK=str(lost))
    for rank, error in enumerate(errors):
        assert ("is gone" in error and "silent" not in error) == (rank != lost), error


def test_roles_that_are_neither_a_preset_nor_a_file_are_said_to_be_so(place, tmp_path):
    for name in ("memrop", "roles.jsn", str(tmp_path)):
        with pytest.raises(HeadForcingError, match=r"neither a preset .*memrope.* nor a role-map file"):
            here(place, tmp_path / "out", roles=("--roles", name))


@pytest.mark.slow
def test_processes_with_different_role_maps_stop_at_once(place, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    RoleMap(demo_roles().layers[::-1], demo_roles().origin).save(other / "roles.json")
    codes, errors = team(2, place, tmp_path / "out", folders=[place, other])
    assert codes == [2, 2]
    for error in errors:
        assert "do not have the same role map" in error
        assert f"rank 0: {demo_roles().hash}" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_damaged_video_is_made_again(serial, place, tmp_path):
    out = tmp_path / "out"
    for name, kept in serial.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(kept)
    victim = out / read_entries(out / MANIFEST)[2]["file"]
    victim.write_bytes(victim.read_bytes()[:-1])
    here(place, out, "--resume")
    assert content(out) == serial
    with pytest.raises(HeadForcingError, match=r"another evaluation \(fps"):
        here(place, out, "--resume", "--fps", "9")
    here(place, out, "--force", "--fps", "9")
    assert content(out).keys() == serial.keys()


def test_a_target_that_cannot_be_evaluated_is_told(place, tmp_path):
    with pytest.raises(HeadForcingError, match="does not use the model"):
        here(place, tmp_path / "a", make="eval_target:elsewhere")
    with pytest.raises(HeadForcingError):
        here(place, tmp_path / "b", make="eval_target:silent")
    assert list((tmp_path / "b" / VIDEOS).iterdir()) == []


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    peft = pytest.importorskip("peft", reason="LoRA folders are read with peft")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("loras")
    for name, layers in {"fits": ["q", "v"], "other": ["patch_embedding"]}.items():
        config = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
        peft.get_peft_model(demo_model(), config).save_pretrained(folder / name)
    return folder


def test_a_lora_changes_videos_and_hashes_and_the_map_is_foreign(serial, place, loras, tmp_path, capsys):
    out = tmp_path / "out"
    here(place, out, "--lora", str(loras / "fits"))
    assert "warning: the roles were measured on headforcing demo" in capsys.readouterr().err
    made = content(out)
    assert made.keys() == serial.keys()
    assert [name for name in made if name.startswith(VIDEOS) and made[name] == serial[name]] == []
    facts, base = (json.loads(files[MANIFEST].splitlines()[0])["run"] for files in (made, serial))
    assert {name for name in facts if facts[name] != base[name]} == {
        *("checkpoint", "attention", "lora", "measured_on_other_weights", "versions")
    }
    with pytest.raises(HeadForcingError, match="another evaluation"):
        here(place, out, "--resume")
    with pytest.raises(RoleMapMismatchError):
        here(place, tmp_path / "strict", "--lora", str(loras / "fits"), "--strict")


def test_a_lora_that_does_not_fit_is_refused(place, loras, tmp_path):
    config = json.loads((loras / "fits" / "adapter_config.json").read_text())
    (loras / "other" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(HeadForcingError, match="does not fit the model"):
        here(place, tmp_path / "out", "--lora", str(loras / "other"))
    with pytest.raises(HeadForcingError, match=r"adapter_model\.safetensors is missing"):
        here(place, tmp_path / "out", "--lora", str(tmp_path))
