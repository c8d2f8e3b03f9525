"""What the parents' licenses allow: inherited when equal, listed when mixed, left out when unknown; never guessed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from yaml import YAMLError

from hf_merge.errors import PublishError
from hf_merge.model_ref import ModelRef
from hf_merge.publishing.markdown import one_line

Declared = str | Sequence[str] | None
"""What a model declares: an identifier of the Hub, `other: name` for terms of its own, several of them, or nothing."""

OTHER = "other"
_RESTRICTED = re.compile(r"(^|[^a-z])(nc|nd)([^a-z]|$)|non-?commercial|(^|[^a-z])research([^a-z]|$)")
_DUTIES = {
    "llama": "Llama terms: pass the agreement on, show “Built with Llama”, and from Llama 3 on begin the name with “Llama”.",
    "gemma": "Gemma terms: pass them and the prohibited use policy on, and say that the files were changed.",
}


@dataclass(frozen=True, kw_only=True)
class License:
    """What a merge declares.

    `identifier` is None when it is left out, and `other` when the parents differ or have terms of their own, which `name` then
    names. `members` are the parents with what each declares; `duties` what some licenses ask of a derived model.
    """

    identifier: str | None
    name: str | None
    note: str
    members: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    duties: tuple[str, ...] = ()


def resolve(licenses: Mapping[str, Declared], *, consent: bool = False) -> License:
    """The license of a merge of models with these licenses.

    Raises `PublishError` if a parent forbids commercial use or derived works, or allows research only, without `consent`.
    """
    members = {parent: _identifiers(declared) for parent, declared in licenses.items()}
    _check_restricted(members, consent)
    distinct = sorted({identifier for found in members.values() for identifier in found})
    duties = tuple(text for family, text in _DUTIES.items() if any(family in i.removeprefix("other: ") for i in distinct))
    if not members or not all(members.values()):
        note = "Not every parent declares a license, so none is declared here. Ask their authors before you use or share this."
        return License(identifier=None, name=None, note=note, members=members, duties=duties)
    if len(distinct) == 1:
        identifier, _, name = distinct[0].partition(": ")
        note = (
            "All parents declare terms of their own: read them." if identifier == OTHER else "All parents declare this license."
        )
        return License(identifier=identifier, name=name or None, note=note, members=members, duties=duties)
    name = " and ".join(d.removeprefix("other: ") for d in distinct)
    note = "The parents declare different licenses, and the terms of each apply to its share."
    return License(identifier=OTHER, name=name, note=note, members=members, duties=duties)


def _identifiers(declared: Declared) -> tuple[str, ...]:
    given = [declared] if isinstance(declared, str) else list(declared or ())
    found = [one_line(d).lower() for d in given]
    # A list that holds an unknown is unknown as a whole: its other entries would understate the terms.
    return tuple(sorted(set(found))) if all(f not in ("", "unknown", "none") for f in found) else ()


def _check_restricted(members: Mapping[str, tuple[str, ...]], consent: bool) -> None:
    restricted = {parent: found for parent, found in members.items() if any(_RESTRICTED.search(f) for f in found)}
    if restricted and not consent:
        listed = ", ".join(f"{one_line(parent)!r} ({', '.join(found)})" for parent, found in restricted.items())
        raise PublishError(
            f"Some parents' licenses forbid commercial use or derived works, or allow research only: {listed}. "
            "Leave these models out, or read their terms and give your explicit consent to publish under them."
        )


def licenses_of(refs: Sequence[ModelRef], api: HfApi) -> dict[str, str | list[str] | None]:
    """What each model declares, by id: from its card on the Hub at its revision, or from the README of a local folder.

    None where nothing is declared, or where a Hub that cannot be reached leaves it unknown.
    Raises `PublishError` for a gated, private or missing repository.
    """
    return {ref.id: _declared(_local_data(ref) if ref.is_local else _hub_data(ref, api)) for ref in refs}


def _declared(data: Mapping[str, object]) -> str | list[str] | None:
    license, name = data.get("license"), data.get("license_name")
    if isinstance(license, list):
        return [str(entry) for entry in license]
    if license == OTHER and name:
        return f"other: {name}"
    return str(license) if license else None


def _local_data(ref: ModelRef) -> Mapping[str, object]:
    readme = ref.path / "README.md"
    return _read(readme) if readme.is_file() else {}


def _read(path: Path | str) -> Mapping[str, object]:
    try:
        data: Mapping[str, object] = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (YAMLError, ValueError, UnicodeDecodeError):
        return {}
    return data


def _hub_data(ref: ModelRef, api: HfApi) -> Mapping[str, object]:
    page, login = f"{api.endpoint}/{ref.id}", "log in with `hf auth login`"
    try:
        info = api.model_info(ref.id, revision=ref.revision, expand=["cardData"])
    except GatedRepoError as error:
        raise PublishError(f"{ref} is gated: accept its terms at {page}, then {login}.") from error
    except RevisionNotFoundError as error:
        raise PublishError(f"{ref.id} has no revision {ref.revision!r}. See {page}/commits/main.") from error
    except RepositoryNotFoundError as error:
        raise PublishError(f"{ref} is not at {page}, or is private: check the id, or {login}.") from error
    except HfHubHTTPError as error:
        raise PublishError(f"The Hub did not tell the license of {ref}: {error.response.status_code}.") from error
    except (OfflineModeIsEnabled, HTTPError):
        return _cached_data(ref, api)
    return info.card_data.to_dict() if info.card_data else {}


def _cached_data(ref: ModelRef, api: HfApi) -> Mapping[str, object]:
    try:
        return _read(api.hf_hub_download(ref.id, "README.md", revision=ref.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return {}
