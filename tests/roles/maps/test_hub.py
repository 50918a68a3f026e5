"""Role maps on the Hub, offline: the real client, its cache layout, and repositories in folders."""

from __future__ import annotations

import builtins
import json
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, constants

import headforcing as hf
from headforcing.demo import demo_model, demo_roles
from headforcing.errors import OptionError, RoleMapError
from headforcing.roles import Local
from headforcing.roles.maps import hub
from headforcing.roles.maps.file import MAX_BYTES
from headforcing.roles.maps.hub import HubError, from_hub, push_to_hub, write_folder
from headforcing.roles.maps.origin import ModelFacts, Origin

COMMIT, LATER = "0123456789abcdef" * 2 + "01234567", "f" * 40
REPO = "org/name"
TOKEN = "hf_" + "x" * 8


def cached(cache: Path, files: dict[str, str], commit: str = COMMIT) -> None:
    """A cache as the client lays it out, with `main` at the commit."""
    repo = cache / "models--org--name"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(commit)
    for name, text in files.items():
        path = repo / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would ask the network fails the test."""

    def refuse(*_: Any, **__: Any) -> Any:
        pytest.fail("asked the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


class FakeHub:
    """What the tested functions ask of the server; repositories are folders."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.calls, self.token = root, [], None
        for name in ("create_repo", "file_exists", "upload_folder"):
            monkeypatch.setattr(huggingface_hub.HfApi, name, self._method(name))
        monkeypatch.setattr(
            ModelCard, "load", lambda repo, token=None: ModelCard((root / repo / "README.md").read_text())
        )

    def _method(self, name: str) -> Any:
        def method(api: huggingface_hub.HfApi, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            self.token = api.token
            return getattr(self, name)(*args, **kwargs)

        return method

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        assert exist_ok
        self.private = private
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def file_exists(self, repo_id: str, name: str) -> bool:
        return (self.root / repo_id / name).exists()

    def upload_folder(
        self, *, repo_id: str, folder_path: str, commit_message: str, allow_patterns: Any
    ) -> Any:
        self.message = commit_message
        assert sorted(path.name for path in Path(folder_path).iterdir()) == sorted(allow_patterns)
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/{COMMIT}", oid=COMMIT)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(tmp_path / "server", monkeypatch)


# Loading ------------------------------------------------------------------------------------------


def test_a_map_is_loaded_from_the_cache(tmp_path):
    cached(
        tmp_path,
        {"roles.json": demo_roles().to_json(), "maps/other.json": hf.RoleMap(((Local(),),)).to_json()},
    )
    found = from_hub(REPO, revision=COMMIT, cache_dir=tmp_path, local_files_only=True)
    assert found == demo_roles()
    assert found.origin == demo_roles().origin
    other = from_hub(
        REPO, revision=COMMIT, filename="maps/other.json", cache_dir=tmp_path, local_files_only=True
    )
    assert other.shape == (1, 1)


def test_a_pinned_map_in_the_cache_needs_no_network(tmp_path, recwarn):
    cached(tmp_path, {"roles.json": demo_roles().to_json()})
    assert from_hub(REPO, revision=COMMIT, cache_dir=tmp_path) == demo_roles()
    assert not recwarn.list


@pytest.mark.parametrize("revision", ["main", COMMIT[:39], COMMIT.upper(), COMMIT + "0", "v1"])
def test_a_revision_that_can_change_is_a_warning(tmp_path, revision, offline):
    cached(tmp_path, {"roles.json": demo_roles().to_json()})
    (tmp_path / "models--org--name" / "refs" / revision).write_text(COMMIT)
    with pytest.warns(
        UserWarning, match="is not the full hash of a commit, so what it names can change"
    ) as caught:
        assert from_hub(REPO, revision=revision, cache_dir=tmp_path) == demo_roles()
    assert caught[0].filename == __file__


def test_what_is_not_there_is_said(tmp_path, offline):
    cached(tmp_path, {"roles.json": demo_roles().to_json()})
    for repo, options in [
        ("org/other", {}),
        (REPO, {"filename": "missing.json"}),
        (REPO, {"revision": LATER}),
        ("no/such/name", {}),
        (REPO, {"filename": "../roles.json"}),
    ]:
        with pytest.raises(HubError, match="cannot be downloaded"):
            from_hub(repo, **{"revision": COMMIT, "cache_dir": tmp_path, **options})


@pytest.mark.parametrize(
    "error", [OSError("down"), huggingface_hub.errors.HTTPError("down"), ValueError("down")]
)
def test_a_network_that_is_down_is_said(tmp_path, monkeypatch, error):
    def down(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", down)
    with pytest.raises(HubError, match="cannot be downloaded: down"):
        from_hub(REPO, revision=COMMIT, cache_dir=tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", demo_roles().to_json().replace("memory", "anchor", 2)])
def test_what_is_no_role_map_is_refused(tmp_path, text):
    cached(tmp_path, {"roles.json": text})
    with pytest.raises(RoleMapError, match=r"roles\.json"):
        from_hub(REPO, revision=COMMIT, cache_dir=tmp_path)


def served(monkeypatch: pytest.MonkeyPatch, size: int | None, download: Any) -> None:
    metadata = types.SimpleNamespace(size=size)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, token: metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


@pytest.mark.parametrize("size", [MAX_BYTES + 1, 1 << 40, None])
@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_a_large_file_is_not_downloaded(tmp_path, monkeypatch, size, revision):
    served(monkeypatch, size, lambda **_: pytest.fail("downloaded"))
    monkeypatch.setattr("warnings.warn", lambda *_, **__: None)
    with pytest.raises(
        HubError, match=f"roles.json at .* has {size} bytes, no role map has more than 1048576"
    ):
        from_hub(REPO, revision=revision, cache_dir=tmp_path)


def test_exactly_one_file_is_downloaded(tmp_path, monkeypatch):
    path = tmp_path / "roles.json"
    demo_roles().save(path)
    asked = []
    served(monkeypatch, MAX_BYTES, lambda **options: asked.append(options) or str(path))
    assert from_hub(REPO, revision=COMMIT, token=TOKEN, cache_dir=tmp_path) == demo_roles()
    (options,) = asked
    assert (options["repo_id"], options["filename"], options["revision"]) == (REPO, "roles.json", COMMIT)
    assert options["token"] == TOKEN
    assert "trust_remote_code" not in Path(hub.__file__).read_text()


def test_a_file_that_is_larger_than_it_said_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "roles.json"
    path.write_text(" " * (MAX_BYTES + 1))
    served(monkeypatch, 10, lambda **_: str(path))
    with pytest.raises(RoleMapError, match="larger than 1048576 bytes"):
        from_hub(REPO, revision=COMMIT, cache_dir=tmp_path)


def test_without_the_extra_the_error_names_it(monkeypatch):
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (lambda: from_hub(REPO, revision=COMMIT), lambda: push_to_hub(demo_roles(), REPO)):
        with pytest.raises(HubError, match=r"pip install 'headforcing\[hub\]'"):
            call()
    assert "huggingface_hub" in sys.modules


# Writing ------------------------------------------------------------------------------------------


def test_what_is_pushed_is_what_is_loaded(tmp_path, server):
    pushed = push_to_hub(
        demo_roles(), REPO, message="First", private=True, token=TOKEN, report='{"kappa": 0.9}'
    )
    assert pushed == (f"https://hub/{REPO}/commit/{COMMIT}", COMMIT)
    assert (server.message, server.private, server.token) == ("First", True, TOKEN)
    files = {path.name: path.read_text() for path in (server.root / REPO).iterdir()}
    assert sorted(files) == ["README.md", "roles.json", "stability.json"]
    cached(tmp_path / "cache", files, pushed.commit)
    found = from_hub(REPO, revision=pushed.commit, cache_dir=tmp_path / "cache", local_files_only=True)
    assert found.to_json() == demo_roles().to_json()
    hf.apply_head_forcing(demo_model(), found, strict=True)


def test_our_own_card_is_replaced_and_a_foreign_one_is_not(server):
    push_to_hub(demo_roles(), REPO)
    push_to_hub(demo_roles(), REPO, base_model="org/base")
    card = server.root / REPO / "README.md"
    assert "base_model: org/base" in card.read_text()
    for text in ("---\nlibrary_name: diffusers\n---\n\n# My model\n", "# My model\n"):
        card.write_text(text)
        server.calls.clear()
        with pytest.raises(HubError, match=r"has a README.md that is not about role maps"):
            push_to_hub(demo_roles(), REPO)
        assert "upload_folder" not in server.calls
        assert card.read_text() == text


def test_nothing_is_made_on_the_hub_for_a_bad_report_or_base_model(server):
    for options in ({"report": "{"}, {"report": "NaN"}, {"base_model": "a b"}, {"base_model": "name"}):
        with pytest.raises(OptionError, match=next(iter(options))):
            push_to_hub(demo_roles(), REPO, **options)
    assert server.calls == []


def test_a_refusal_of_the_hub_is_ours(server, monkeypatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("403 Forbidden")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(HubError, match="org/name: cannot be written: 403 Forbidden"):
        push_to_hub(demo_roles(), REPO)


def test_the_folder_is_data_and_a_card(tmp_path):
    assert write_folder(tmp_path, demo_roles()) == ("roles.json", "README.md")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "roles.json"]
    assert (tmp_path / "roles.json").read_text() == demo_roles().to_json()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {"library_name": "headforcing", "tags": ["head-forcing", "role-map"]}
    fingerprint = demo_roles().origin.model.fingerprint
    for text in (fingerprint, demo_roles().hash, "DemoModel", "ablation", "strict=True", "from_hub", "24"):
        assert text.replace(":", "\\:") in card.text or text in card.text
    again = tmp_path / "again"
    again.mkdir()
    write_folder(again, demo_roles())
    assert (again / "README.md").read_bytes() == (tmp_path / "README.md").read_bytes()


def test_the_base_model_comes_from_the_map_where_it_is_a_repository(tmp_path):
    facts = ModelFacts(
        layers=1, heads=1, head_dim=8, window=21, chunk=3, model_class="M", base_model="org/base"
    )
    write_folder(tmp_path, hf.RoleMap(((Local(),),), Origin(model=facts)))
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "org/base"


def test_notes_cannot_leave_their_cell_of_the_card(tmp_path):
    evil = "x | y\n---\nlibrary_name: other\n---\n<script>alert(1)</script> ![](http://x) `code`"
    write_folder(tmp_path, hf.RoleMap(((Local(),),), Origin(notes={"note": evil, evil: 1, "empty": None})))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "headforcing"
    for line in card.text.split("## Notes")[1].splitlines():
        assert not line.startswith(("---", "library_name"))
        assert line.replace("\\|", "").count("|") in (0, 3)
        assert not set("<>!`") & set(re.sub(r"\\.", "", line))
    assert json.loads((tmp_path / "roles.json").read_text())["notes"]["note"] == evil
