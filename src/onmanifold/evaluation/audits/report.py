"""What an audit finds: named findings, and the tables they are shown in."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.files import write_atomically
from onmanifold.foundation.registry import nearest

if TYPE_CHECKING:
    from rich.table import Table

Verdict = Literal["alarm", "ok", "not applicable"]

_STYLES = {"alarm": "bold red", "ok": "green", "not applicable": "dim"}


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: The check's name, such as "zero gradients".
        verdict: "alarm": the robust accuracy is not to be trusted before the cause is known; "ok": the check
            ran and found nothing; "not applicable": it could not say anything here.
        numbers: What was measured; shares and accuracies in [0, 1].
        sentence: What was measured and why it matters, in one sentence.
        threat: The threat model it was measured in; "" where the check is about the model alone.
    """

    name: str
    verdict: Verdict
    numbers: Mapping[str, float]
    sentence: str
    threat: str = ""


@dataclass(frozen=True)
class Audit:
    """What all checks found.

    Attributes:
        findings: In the order of the checks.
        facts: JSON-able facts about what was audited: dataset, samples, clean accuracy, seed, budget.
    """

    findings: tuple[Finding, ...]
    facts: Mapping[str, Any]

    def __repr__(self) -> str:
        raised = ", ".join(dict.fromkeys(finding.name for finding in self.alarms)) or "none"
        return f"Audit({len(self.findings)} findings on {self.facts.get('samples')} samples; alarms: {raised})"

    @property
    def alarms(self) -> tuple[Finding, ...]:
        """The findings that raise the alarm."""
        return tuple(finding for finding in self.findings if finding.verdict == "alarm")

    def __getitem__(self, name: str) -> Finding:
        """The finding of that name; of several threat models, the first that raises the alarm, else the first.

        Raises:
            InputError: Unknown name; the message shows the nearest.
        """
        found = [finding for finding in self.findings if finding.name == name]
        if not found:
            names = {finding.name for finding in self.findings}
            raise InputError(f"name: unknown check {name!r}.{nearest(str(name), names)}")
        return next((finding for finding in found if finding.verdict == "alarm"), found[0])

    def to_pandas(self) -> pd.DataFrame:
        """A row per finding: threat, check, verdict, sentence, and numbers (a dict)."""
        rows = [
            (part.threat, part.name, part.verdict, part.sentence, dict(part.numbers))
            for part in self.findings
        ]
        return pd.DataFrame(rows, columns=["threat", "check", "verdict", "sentence", "numbers"])

    def to_markdown(self) -> str:
        """A summary line and a table in Markdown, alarms first."""
        lines = [self._summary(), "", "| Verdict | Check | Finding |", "|---|---|---|"]
        for finding in self._ordered():
            cells = (finding.verdict, self._label(finding), finding.sentence)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join(lines) + "\n"

    def to_rich(self, width: int | None = None) -> Table:
        """The same as a table for the terminal.

        Args:
            width: In characters; None: as wide as the terminal.
        """
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(self._summary()), title_justify="left", width=width)
        table.add_column("verdict", no_wrap=True)
        table.add_column("check")
        table.add_column("finding", ratio=1)
        for finding in self._ordered():
            style = _STYLES[finding.verdict]
            table.add_row(
                f"[{style}]{finding.verdict}[/{style}]",
                escape(self._label(finding)),
                escape(finding.sentence),
            )
        return table

    def to_json(self, path: str | Path | None = None) -> str:
        """All findings and facts as JSON; with a path also written there, atomically.

        Numbers that are not finite are null.
        """
        findings = [
            {
                "threat": part.threat,
                "check": part.name,
                "verdict": part.verdict,
                "numbers": {
                    name: value if math.isfinite(value) else None
                    for name, value in part.numbers.items()
                },
                "sentence": part.sentence,
            }
            for part in self.findings
        ]
        text = json.dumps({"facts": dict(self.facts), "findings": findings}, indent=2) + "\n"
        if path is not None:
            write_atomically(path, text.encode())
        return text

    def _ordered(self) -> list[Finding]:
        order = {"alarm": 0, "ok": 1, "not applicable": 2}
        return sorted(self.findings, key=lambda finding: order[finding.verdict])

    def _label(self, finding: Finding) -> str:
        """The check's name, with its threat model where there are several."""
        several = len({part.threat for part in self.findings if part.threat}) > 1
        return f"{finding.name} ({finding.threat})" if several and finding.threat else finding.name

    def _summary(self) -> str:
        counts = Counter(finding.verdict for finding in self.findings)
        alarms = "1 alarm" if counts["alarm"] == 1 else f"{counts['alarm']} alarms"
        threats = ", ".join(dict.fromkeys(part.threat for part in self.findings if part.threat))
        about = f"{self.facts.get('samples', 0)} samples{'; ' + threats if threats else ''}"
        return f"{alarms}, {counts['ok']} ok, {counts['not applicable']} not applicable ({about})"
