"""What is made of finished sessions: the record of a run, and the proof of a design's exactness."""

from veiltune.evaluation.record import RESULT, result_of
from veiltune.evaluation.verification import Verification, verify

__all__ = ["RESULT", "Verification", "result_of", "verify"]
