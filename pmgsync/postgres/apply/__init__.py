"""Apply: an origin's frames into rows of the local database."""

from pmgsync.postgres.apply.applier import Applier
from pmgsync.postgres.apply.plan import ApplyStats

__all__ = ["Applier", "ApplyStats"]
