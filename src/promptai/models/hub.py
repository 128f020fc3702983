"""Fetch files from the Hugging Face hub; the only module that talks to it.

``huggingface_hub`` does the work: it resumes, locks, verifies, caches, and
honours HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and proxies. This module turns its
many exceptions into one line each.
"""

from pathlib import Path

from promptai.errors import PromptAIError


def fetch_dataset_file(repository: str, filename: str) -> Path:
    """
    The local path of one file of a data set, fetched when it is not cached.

    Raises:
        PromptAIError: The hub cannot be reached, or refuses, or has no such file.
    """
    # Imported here: half a second and 30 MB that only those who fetch should pay.
    import httpx2  # noqa: PLC0415
    from huggingface_hub import hf_hub_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(hf_hub_download(repository, filename, repo_type="dataset"))
    except LocalEntryNotFoundError:
        raise PromptAIError(
            f"data set {repository} is not on this machine and the hub cannot be reached",
            hint=f"connect, or fetch {filename} elsewhere and give its path",
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise PromptAIError(
            f"the hub refused {filename} of data set {repository}: HTTP {status}",
            hint="check the name and, for a gated data set, HF_TOKEN",
        ) from None
    except (httpx2.HTTPError, OSError) as error:
        raise PromptAIError(
            f"fetching {filename} of data set {repository} failed: {error}",
            hint="check the connection and the free space, then try again: it resumes",
        ) from None
