"""The figures of the issue's list beside what they must reach.

    python -m embedded.report --scale small --folder WORK

Writes WORK/reports/report.json and prints a table; what has not been measured yet is left open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from embedded.stage import Work, parse
from finetuning.disk import read_json, write_json
from finetuning.errors import run_main

STAGES = ("speech", "codec", "encoder", "start", "talker", "pack", "demo")


@dataclass(frozen=True)
class Goal:
    """A figure of a stage's report and where it must lie (both ends count)."""

    meaning: str
    stage: str
    figure: str
    at_least: float | None = None
    at_most: float | None = None

    def is_met(self, value: float) -> bool:
        """NaN is not."""
        low = self.at_least is None or value >= self.at_least
        high = self.at_most is None or value <= self.at_most
        return value == value and low and high

    @property
    def bounds(self) -> str:
        ends = ((">=", self.at_least), ("<=", self.at_most))
        return " and ".join(f"{sign} {end}" for sign, end in ends if end is not None)


GOALS = (
    Goal("hours of speech", "speech", "hours", at_least=5),
    Goal("codec: STOI, held-out sentences", "codec", "held_out_sentences_stoi", at_least=0.88),
    Goal("codec: STOI, held-out voices", "codec", "held_out_voices_stoi", at_least=0.88),
    Goal("codec: voicing kept, held-out sentences", "codec", "held_out_sentences_voicing_kept", at_least=0.7),
    Goal("codec: voicing kept, held-out voices", "codec", "held_out_voices_voicing_kept", at_least=0.7),
    Goal("codec: error of the median f0, held-out sentences", "codec", "held_out_sentences_f0_error", at_most=0.05),
    Goal("codec: error of the median f0, held-out voices", "codec", "held_out_voices_f0_error", at_most=0.05),
    Goal("encoder: equal-error rate, held-out voices", "encoder", "held_out_voices_equal_error_rate", at_most=0.1),
    Goal("base: megabytes", "pack", "megabytes", at_most=40),
    Goal("base: seconds to load", "pack", "load_seconds", at_most=2),
    Goal("demo: sentences that stop by themselves", "demo", "after_stopped", at_least=0.95),
    Goal("demo: speech rate ratio", "demo", "after_rate_ratio", at_least=0.9, at_most=1.1),
    Goal("demo: sentences picked out of 30, time alignment", "demo", "after_aligned_right", at_least=0.8),
    Goal("demo: sentences picked out of 30, pocketsphinx", "demo", "after_picked", at_least=0.8),
    Goal("demo: similarity above the base's, to the recording", "demo", "similarity_gain", at_least=0.05),
    Goal("demo: the same, to the recording as coded", "demo", "similarity_to_coded_gain", at_least=0.05),
    Goal("demo: distance of timbre, share of the base's", "demo", "timbre_share", at_most=0.8),
    Goal("demo: the same, to the recording as coded", "demo", "timbre_to_coded_share", at_most=0.8),
    Goal("demo: error of the median f0", "demo", "after_f0_error", at_most=0.05),
)


def collect(work: Work) -> dict[str, Any]:
    """Every goal with its value, None where it is not measured, and each stage's figures and seconds."""
    reports = {stage: read_json(work.report(stage)) or {} for stage in STAGES}
    figures = {stage: dict(report.get("figures") or {}) for stage, report in reports.items()}
    if "after_similarity" in (demo := figures["demo"]):
        for name in ("similarity", "similarity_to_coded"):
            demo[f"{name}_gain"] = round(demo[f"after_{name}"] - demo[f"before_{name}"], 3)
        for figure, name in (("timbre_distance_db", "timbre"), ("timbre_distance_to_coded_db", "timbre_to_coded")):
            demo[f"{name}_share"] = round(demo[f"after_{figure}"] / demo[f"before_{figure}"], 3)
    goals = []
    for goal in GOALS:
        value = figures[goal.stage].get(goal.figure)
        is_met = None if value is None else goal.is_met(value)
        goals.append({"goal": goal.meaning, "must": goal.bounds, "value": value, "met": is_met})
    seconds = {stage: report.get("seconds") for stage, report in reports.items()}
    return {"scale": work.scale_name, "goals": goals, "seconds": seconds, "figures": figures}


def table_of(report: dict[str, Any]) -> str:
    """Markdown."""
    words = {True: "yes", False: "**no**", None: "not measured"}
    lines = ["| figure | must reach | reached | met |", "|---|---|---|---|"]
    for goal in report["goals"]:
        value = "–" if goal["value"] is None else goal["value"]
        lines.append(f"| {goal['goal']} | {goal['must']} | {value} | {words[goal['met']]} |")
    lines += ["", "| stage | seconds |", "|---|---|"]
    lines += [f"| {stage} | {seconds} |" for stage, seconds in report["seconds"].items() if seconds is not None]
    return "\n".join(lines)


def write_report(work: Work) -> dict[str, Any]:
    """Collects, writes WORK/reports/report.json and prints the table."""
    report = collect(work)
    work.report("report").parent.mkdir(parents=True, exist_ok=True)
    write_json(work.report("report"), report)
    print(table_of(report))
    return report


if __name__ == "__main__":
    run_main(lambda: write_report(parse(__doc__)) and None)
