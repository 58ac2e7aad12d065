"""Publish a student on the Hugging Face hub."""

from pathlib import Path

from edgekd.errors import MissingExtraError, OutputError


def push(folder: Path, name: str) -> str:
    """Upload ``folder`` to the model ``name``, made private if it is new; return its address.

    Raises:
        OutputError: the hub cannot be reached, or refuses.
        MissingExtraError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "distill") from error
    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload from edgekd")
    except Exception as error:  # the library's network errors share no base class
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise OutputError(
            f"cannot push {folder} to {name}: {reason}; log in with: hf auth login"
        ) from error
    return f"{api.endpoint}/{name}"
