"""Role maps on the Hugging Face Hub: `pip install 'headforcing[hub]'`.

Data only: `roles.json`, `stability.json` where there is a report, and a model card. Loading downloads one
file and parses it strictly; nothing that a repository holds is ever run.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from headforcing.errors import HeadForcingError, OptionError, escaped
from headforcing.roles.maps import strict_json
from headforcing.roles.maps.file import MAX_BYTES
from headforcing.roles.maps.role_map import RoleMap

ROLES, REPORT, CARD = "roles.json", "stability.json", "README.md"
MAX_REPORT = 1 << 22
LIBRARY = "headforcing"

_USE = """```python
import headforcing as hf
from headforcing.roles.maps.hub import from_hub

roles = from_hub("<this repository>", revision="<the full hash of a commit>")
hf.apply_head_forcing(model, roles, strict=True)  # strict: only these weights
```"""


class HubError(HeadForcingError, RuntimeError):
    """The Hub cannot be used: the extra is not installed, or the repository cannot be read or written."""


class Pushed(NamedTuple):
    """Where a role map went.

    Attributes:
        url: of the commit.
        commit: its full hash, the `revision` for `from_hub`.
    """

    url: str
    commit: str


def from_hub(
    repo_id: str,
    *,
    revision: str,
    filename: str = ROLES,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> RoleMap:
    """The role map of a repository on the Hub. Downloads one file, of at most 1 MiB.

    Args:
        repo_id: `organisation/name`.
        revision: full hash of a commit; a branch or a tag can change, so it works with a warning.
        filename: path of the role map in the repository.
        token: for private repositories; default: that of the machine.
        cache_dir: default: the Hub's cache.
        local_files_only: read the cache and nothing else.

    Raises:
        HubError: the file cannot be downloaded, or is too large.
        RoleMapError: it is not a role map.
    """
    hub = _hub()
    pinned = re.fullmatch("[0-9a-f]{40}", revision) is not None
    if not pinned:
        warnings.warn(
            f"{repo_id}: revision {revision!r} is not the full hash of a commit, so what it names can "
            "change: take the hash from the commits page of the repository",
            stacklevel=2,
        )
    where: dict[str, Any] = {"repo_id": repo_id, "filename": filename, "revision": revision}
    problem = f"{repo_id}: {filename} at {revision!r} cannot be downloaded"
    local = local_files_only or hub.constants.HF_HUB_OFFLINE
    try:
        path = hub.try_to_load_from_cache(**where, cache_dir=cache_dir)
        if not (isinstance(path, str) and (pinned or local)):
            if local:
                raise HubError(f"{problem}: it is not in the cache, and only the cache is to be used")
            size = hub.get_hf_file_metadata(hub.hf_hub_url(**where), token=token).size
            if size is None or size > MAX_BYTES:
                raise HubError(f"{problem}: it has {size} bytes, no role map has more than {MAX_BYTES}")
            path = hub.hf_hub_download(**where, token=token, cache_dir=cache_dir)
    except _failures(hub) as error:
        raise HubError(f"{problem}: {_in_one_line(error)}") from error
    return RoleMap.load(path)


def push_to_hub(
    role_map: RoleMap,
    repo_id: str,
    *,
    message: str = "Add a role map",
    private: bool | None = None,
    token: str | bool | None = None,
    report: str | None = None,
    base_model: str | None = None,
) -> Pushed:
    """Uploads a role map with a card, in one commit, to a repository that is made where there is none.

    Args:
        role_map: the roles.
        repo_id: `organisation/name`.
        message: of the commit.
        private: for a repository that is made; default: as your account says.
        token: default: that of the machine.
        report: a stability report as JSON text.
        base_model: the checkpoint on the Hub, `organisation/name`; default: what the map says.

    Raises:
        HubError: the Hub refuses, or the repository has a card that this library did not write.
        OptionError: `report` is not strict JSON, or `base_model` not the name of a repository.
    """
    hub = _hub()
    with tempfile.TemporaryDirectory() as folder:
        names = write_folder(Path(folder), role_map, report, base_model)
        try:
            api = hub.HfApi(token=token, library_name=LIBRARY)
            api.create_repo(repo_id, private=private, exist_ok=True)
            if api.file_exists(repo_id, CARD):
                card = hub.ModelCard.load(repo_id, token=token)
                if card.data.get("library_name") != LIBRARY:
                    raise HubError(
                        f"{repo_id} has a {CARD} that is not about role maps and would be lost: push to a "
                        "repository of its own"
                    )
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=message, allow_patterns=list(names)
            )
        except _failures(hub) as error:
            raise HubError(f"{repo_id}: cannot be written: {_in_one_line(error)}") from error
    return Pushed(str(done.commit_url), str(done.oid))


def write_folder(
    folder: Path, role_map: RoleMap, report_json: str | None = None, base_model: str | None = None
) -> tuple[str, ...]:
    """Writes what `push_to_hub` uploads into an existing folder, and returns the names of the files.

    Raises:
        OptionError: see `push_to_hub`.
    """
    files = {ROLES: role_map.to_json(), CARD: _card(role_map, report_json is not None, base_model)}
    if report_json is not None:
        try:
            strict_json.parse(report_json, MAX_REPORT)
        except ValueError as error:
            raise OptionError(f"report: {error}") from error
        files[REPORT] = report_json
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return tuple(files)


def _card(role_map: RoleMap, has_report: bool, base_model: str | None) -> str:
    """The model card: metadata for the Hub, and the origin of the map for people."""
    origin, (layers, heads) = role_map.origin, role_map.shape
    known = origin.model.base_model if origin.model else None
    if base_model is not None and not _is_repository(base_model):
        raise OptionError(f"base_model is {base_model!r}: expected organisation/name, as on the Hub")
    base = base_model or (known if known and _is_repository(known) else None)
    data = _hub().ModelCardData(library_name=LIBRARY, base_model=base, tags=["head-forcing", "role-map"])
    parts = [
        f"---\n{data.to_yaml()}\n---",
        "# Head roles",
        f"A role map for {layers} layers x {heads} heads, made with headforcing. Which head has which role "
        f"is in `{ROLES}`{f', how stable that is in `{REPORT}`' if has_report else ''}. Data only, no code.",
        _USE,
        _table("Roles", {str(role): f"{count} heads" for role, count in role_map.counts().items()}),
        _table("Measured on", origin.model.model_dump(mode="json") if origin.model else {}),
        _table("Measured how", origin.measurement.model_dump(mode="json") if origin.measurement else {}),
        _table("Stability", origin.stability),
        _table("Notes", {**origin.notes, "content hash": role_map.hash}),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(title: str, facts: Mapping[str, Any]) -> str:
    """Facts under a heading; nothing where there are none."""
    rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in facts.items() if value not in (None, "")]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *rows]) if rows else ""


def _cell(value: Any) -> str:
    """Text that markdown shows as it stands and that cannot leave its cell."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&$@:-])", r"\\\1", escaped(_in_one_line(value)))


def _in_one_line(value: Any) -> str:
    return " ".join(str(value).split())


def _is_repository(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII) is not None


def _failures(hub: Any) -> tuple[type[Exception], ...]:
    """What the client raises: its own errors, and those of whichever HTTP library it was built on."""
    return (OSError, ValueError, hub.errors.EntryNotFoundError, getattr(hub.errors, "HTTPError", OSError))


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise HubError("the Hub requires huggingface_hub: pip install 'headforcing[hub]'") from error
    return huggingface_hub
