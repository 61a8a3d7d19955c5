"""Comparisons: a study's file becomes cells (runs, and attacks on them), each measured once and recorded."""

from veiltune.evaluation.studies.engine import Tally, run_study
from veiltune.evaluation.studies.grammar import StudyFile, read_study_file, shipped_studies
from veiltune.evaluation.studies.output import RECORDS, open_output
from veiltune.evaluation.studies.plan import AttackPlan, RunPlan, Study, plan_study

__all__ = [
    "RECORDS",
    "AttackPlan",
    "RunPlan",
    "Study",
    "StudyFile",
    "Tally",
    "open_output",
    "plan_study",
    "read_study_file",
    "run_study",
    "shipped_studies",
]
