"""Whether the hub answers, asked once for each base.

Without a network, transformers and huggingface_hub would ask for half a minute for each file of a
base, and then take it from the cache of earlier downloads.
"""

import logging
from functools import cache

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0


@cache
def is_hub_reachable(name: str, revision: str | None) -> bool:
    """Return whether the hub answers when asked for a model; if not, say so once.

    An answer such as "there is no such model" is one too. In the hub's offline mode
    (HF_HUB_OFFLINE) nothing is asked.

    Args:
        name: id of the model.
        revision: branch, tag or commit. None: the newest.
    """
    try:
        url = hf_hub_url(name, "config.json", revision=revision)
        get_hf_file_metadata(url, timeout=TIMEOUT_S)
    except OfflineModeIsEnabled:
        return False
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            return True
        reason = f"status {error.response.status_code}"
    except ValueError:  # no name that a hub can have, which is said when it is fetched
        return True
    except Exception as error:  # whatever the network has, nothing came back
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
    else:
        return True
    logger.info(
        f"base {name}: the hub cannot be reached ({reason}); looking into the cache of earlier "
        "downloads"
    )
    return False
