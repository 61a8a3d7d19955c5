"""One run from start to end: the roles are started as processes, or as threads for tests, and watched."""

from veiltune.session.run import Outcome, PartyDied, PartyFailure, Session, run_session

__all__ = ["Outcome", "PartyDied", "PartyFailure", "Session", "run_session"]
