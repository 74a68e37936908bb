"""Which names mean a place elsewhere."""

from pathlib import Path

from qvla_jax.remote import hub
from qvla_jax.remote.buckets import BucketFolder
from qvla_jax.remote.folder import RemoteFolder, opened


def elsewhere(source: str | Path, kind: hub.Kind) -> RemoteFolder | None:
    """The folder that a name means, if it is not on this machine.

    Args:
        source: what the user names. A path that exists, or a `Path`, is here.
        kind: what a name of the Hub is the name of.

    Returns:
        The folder, of which nothing may be fetched yet; None if the name means no other place.

    Raises:
        RemoteError: there is no such place, or it cannot be reached.
    """
    if isinstance(source, Path) or Path(source).exists():
        return None
    if "://" in source:
        return opened(kind, source, lambda: BucketFolder(source))
    if hub.looks_like_one(source, kind):
        return opened(kind, source, lambda: hub.HubFolder(source, kind))
    return None
