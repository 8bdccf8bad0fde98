"""The teachers' logits of a run's clips: aligned with its manifest, and kept in its cache."""

import logging

import numpy as np

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.views import ViewsStamp
from pipeline.logits.alignment import AlignedLogits
from pipeline.logits.store import open_store
from pipeline.storage.cache import CacheFolder

_log = logging.getLogger(__name__)


def open_logits(
    location: str, manifest: Manifest, cache: CacheFolder, *, consistent_views: bool
) -> tuple[AlignedLogits, ViewsStamp | None]:
    """Returns the logits of a store in the order of a manifest, and which views of the clips they are of.

    Args:
        location: of the store.
        manifest: the clips to learn from.
        cache: keeps the aligned logits, and does not remove them while this process lives.
        consistent_views: take the logits of all views that the store has; or else those of the clips as they are.

    Raises:
        LogitStoreError: the store is damaged, or its classes are not the manifest's.
    """
    store = open_store(location)
    views = store.stamp.views if consistent_views else None
    all_views = views is not None
    cache.make_room(2 * len(manifest) * len(manifest.vocabulary) * (store.stamp.view_count if all_views else 1))
    logits = store.align(manifest, cache.folder, all_views=all_views)
    while not cache.hold(logits.path):  # another run made room just now
        logits = store.align(manifest, cache.folder, all_views=all_views)
    if views is not None:
        _log.info("%s: one of %d views of a clip is shown at a time", location, views.count)
    if missing := int(np.count_nonzero(~logits.has_logits & ~manifest.unlabelled)):
        _log.warning(
            "%d of %d clips have no logits in %s: they learn from labels alone", missing, len(manifest), location
        )
    return logits, views
