"""The Hub's errors in our words, without a token."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RevisionNotFoundError

from hf_merge.errors import PublishError
from hf_merge.publishing.markdown import one_line


@contextmanager
def said(what: str, api: HfApi) -> Iterator[None]:
    """Turn the Hub's errors into `PublishError`, without the token."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise PublishError(f"{what}: offline mode is on. Unset HF_HUB_OFFLINE and try again.") from error
    except RevisionNotFoundError as error:
        raise PublishError(f"{what}: there is no such revision. {_reason(error, api)}") from None
    # huggingface_hub raises a bare RuntimeError for an upload that the storage refuses.
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise PublishError(f"{what}: {_reason(error, api)}") from None


def _reason(error: Exception, api: HfApi) -> str:
    text = one_line(error)
    for token in (api.token if isinstance(api.token, str) else "", get_token() or ""):
        # A client that trips over a stray newline in a token quotes it.
        text = text.replace(token.strip(), "<token>") if token.strip() else text
    return text or type(error).__name__
