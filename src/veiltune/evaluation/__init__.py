"""What is checked before sessions and made of them: inputs, the record of a run, the proof of a design's exactness."""

from veiltune.evaluation.inputs import check_inputs
from veiltune.evaluation.record import RESULT, is_simulated, result_of
from veiltune.evaluation.verification import Verification, verify

__all__ = ["RESULT", "Verification", "check_inputs", "is_simulated", "result_of", "verify"]
