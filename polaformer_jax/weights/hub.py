"""Files on the Hugging Face Hub, such as `hf://ZachMeng/PolaFormer/pola_swin_t.pth@main`, to fetch and to upload.

Transfers, the cache, tokens and the offline mode are those of `huggingface_hub`: its environment variables (`HF_TOKEN`,
`HF_HUB_OFFLINE`, `HF_HOME`, `HF_ENDPOINT`) and `hf auth login` apply. What it hands out is checked here against the
checksum by which the Hub names the content: a file that was damaged in the cache, or on the way, is refused.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

from polaformer_jax.errors import WeightsError

WEIGHTS = "model.safetensors"  # the file of weights in a repository that holds one model
_SCHEME = "hf://"
_ADDRESS = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+?))?(?:@(?P<revision>[^@]+))?")
_REPO = re.compile(r"(?:hf://)?([\w-][\w.-]*/[\w-][\w.-]*)")
_SHA1, _SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")
_CHUNK = 1 << 20


class Address(NamedTuple):
    """A file of a repository on the Hub.

    Attributes:
        repo: `OWNER/NAME`.
        file: its path in the repository.
        revision: a branch, tag or commit; None: the main branch.
    """

    repo: str
    file: str
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> "Address":
        """The address `hf://OWNER/REPOSITORY[/FILE][@REVISION]`; without FILE it is `model.safetensors`.

        Raises:
            WeightsError: it is not of this form.
        """
        match = _ADDRESS.fullmatch(text)
        if match is None or ".." in text.split("/"):
            raise WeightsError(
                f"{text}: expected hf://OWNER/REPOSITORY/FILE[@REVISION], or hf://OWNER/REPOSITORY for its {WEIGHTS}"
            )
        return cls(match["repo"], match["file"] or WEIGHTS, match["revision"])

    def __str__(self) -> str:
        return f"{_SCHEME}{self.repo}/{self.file}" + (f"@{self.revision}" if self.revision else "")


def is_address(path: str | os.PathLike) -> bool:
    return os.fspath(path).startswith(_SCHEME)


def fetch(text: str) -> Path:
    """The local file of an address, downloaded if the cache does not have it.

    Raises:
        WeightsError: `huggingface_hub` is not installed; there is no such repository, revision or file, it is gated, or
            it is neither in the cache nor can it be downloaded; or its content is not what the Hub has.
    """
    address = Address.parse(text)
    hub = library()
    try:
        path = hub.hf_hub_download(address.repo, address.file, revision=address.revision, library_name="polaformer_jax")
    except Exception as error:  # of the library, and of what it is built on
        raise WeightsError(f"{address}: {_explained(error, address)}") from error
    _verify(Path(path), address)
    return Path(path)


def checked_repo(text: str) -> str:
    """The repository `OWNER/NAME`, which may be written as an address, `hf://OWNER/NAME`.

    Raises:
        WeightsError: it is not of this form.
    """
    match = _REPO.fullmatch(text)
    if match is None:
        raise WeightsError(f"{text!r}: expected OWNER/NAME, a repository on the Hub", argument="repo")
    return match[1]


def upload(folder: str, repo: str, *, private: bool, revision: str | None, message: str) -> str:
    """Uploads the files of a folder, a `README.md` among them, in one commit.

    The repository is created if there is none, unless a `revision` is named: a new repository has no branches.

    Returns:
        The address of the commit.

    Raises:
        WeightsError: the Hub cannot be reached, or refuses it.
    """
    hub = library()
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise WeightsError(f"{_SCHEME}{repo}: nothing can be uploaded while HF_HUB_OFFLINE is set")
    try:
        card = Path(folder, "README.md")
        hub.ModelCard(card.read_text()).validate()  # before anything is created
        if revision is None:
            hub.create_repo(repo, private=private, exist_ok=True)
        commit = hub.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message=message)
    except Exception as error:  # of the library, and of what it is built on
        raise WeightsError(f"{_SCHEME}{repo}: {_explained(error, Address(repo, '', revision))}") from error
    return commit.commit_url


def library():
    """The package `huggingface_hub`.

    Raises:
        WeightsError: it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise WeightsError(
            f'addresses on the Hub ({_SCHEME}...) need huggingface_hub ({error}): pip install "polaformer_jax[hub]"'
        ) from error
    return huggingface_hub


def _explained(error: Exception, address: Address) -> str:
    """What an error of huggingface_hub means, and the way out. The more special kinds come first."""
    from huggingface_hub import errors

    login = "log in (`hf auth login`) or set HF_TOKEN"
    kinds = (
        (errors.GatedRepoError, f"the repository is gated: accept its terms on its page, then {login}"),
        (errors.RepositoryNotFoundError, f"there is no such repository, or it is private: check the name, or {login}"),
        (errors.RevisionNotFoundError, f"the repository has no revision {address.revision!r}"),
        (
            errors.LocalEntryNotFoundError,
            "it is not in the cache, and the Hub cannot be reached (or HF_HUB_OFFLINE is set)",
        ),
        (errors.EntryNotFoundError, f"the repository has no file {address.file!r}"),
        (errors.OfflineModeIsEnabled, "it is not in the cache, and HF_HUB_OFFLINE is set"),
        (errors.HFValidationError, "that is no name of a repository"),
        (errors.LocalTokenNotFoundError, f"it needs a token: {login}"),
    )
    meant = next((text for kind, text in kinds if isinstance(error, kind)), None)
    if meant is None and getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        meant = f"the Hub refuses it: {login}, with a token that may do this"
    caused = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ is not None else ""
    said = " ".join(f"{type(error).__name__}: {error}{caused}".split())
    return said if meant is None else f"{meant} ({type(error).__name__})"


def _verify(path: Path, address: Address) -> None:
    """Compares a file of the cache with the checksum that its blob is named by: SHA-256, or git's SHA-1 if it is small.

    Without links, as on some file systems, the cache does not keep the checksum: then nothing is compared here.
    """
    name = path.resolve().name
    if _SHA256.fullmatch(name):
        digest = hashlib.sha256()
    elif _SHA1.fullmatch(name):
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        return
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != name:
        raise WeightsError(
            f"{address} is damaged in the cache: its checksum is {digest.hexdigest()[:12]}..., and should be"
            f" {name[:12]}...; remove {path.resolve()} and fetch it again"
        )
