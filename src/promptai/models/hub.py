"""Fetch files from the Hugging Face hub; the only module that talks to it.

``huggingface_hub`` does the work: it resumes, locks, verifies, caches, and
honours HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and proxies. This module turns its
many exceptions into one line each.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from promptai.errors import PromptAIError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


def fetch_dataset_file(repository: str, filename: str) -> Path:
    """
    The local path of one file of a data set, fetched when it is not cached.

    Raises:
        PromptAIError: The hub cannot be reached, or refuses, or has no such file.
    """
    # Imported here: half a second and 30 MB that only those who fetch should pay.
    from huggingface_hub import hf_hub_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    what = f"{filename} of data set {repository}"
    try:
        return Path(hf_hub_download(repository, filename, repo_type="dataset"))
    except LocalEntryNotFoundError as error:
        # What the library calls "not found locally" may be a hub that answered, but not with the file.
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _refused(what, cause) from None
        if type(cause).__name__ == "FileMetadataError":
            raise PromptAIError(
                f"fetching {what} failed: {one_line(cause)}", hint="check HF_ENDPOINT and the network's sign-in page"
            ) from None
        raise PromptAIError(
            f"data set {repository} is not on this machine and the hub cannot be reached",
            hint=f"connect, or fetch {filename} elsewhere and give its path",
        ) from None
    except HfHubHTTPError as error:
        raise _refused(what, error) from None
    except OSError as error:
        raise PromptAIError(
            f"fetching {what} failed: {one_line(error)}",
            hint="check the connection and the free space, then try again: it resumes",
        ) from None


def one_line(error: BaseException | None) -> str:
    """What an exception says, without its line breaks."""
    return " ".join(str(error).split())


def _refused(what: str, error: "HfHubHTTPError") -> PromptAIError:
    status = error.response.status_code if error.response is not None else "no answer"
    return PromptAIError(
        f"the hub refused {what}: HTTP {status}", hint="check the name and, for a gated data set, HF_TOKEN"
    )
