"""`cmtool doctor`: what works on this machine, and what to do about what does not."""

from __future__ import annotations

from dataclasses import asdict

from cmtool.cli import console, options
from cmtool.errors import DependencyError


def doctor(device: options.Device = "auto", as_json: options.Json = False) -> None:
    """Say what works here, what does not, and what to do about it.

    Versions, the device and the precision that --device auto and --precision auto choose, the compiled code, optional
    packages, the cache; and a model in the box computes images and gradients, once as every command does and once by
    torch's own operations in double precision. Needs no network. Exit code 1 where something is broken.
    """
    from cmtool import doctor as examination

    findings = []
    for finding in examination.examine(device):
        findings.append(finding)
        if not as_json:
            console.emit_rows([(f"{finding.name:<{_WIDTH}}", finding.says)])
            if finding.hint:
                console.emit_rows([(" " * _WIDTH, f"hint: {finding.hint}")])
    broken = [finding.name for finding in findings if finding.broken]
    if as_json:
        console.emit_json({"broken": broken, "findings": [asdict(finding) for finding in findings]})
    if broken:
        raise DependencyError(f"broken here: {', '.join(broken)}", "see the hints beside them")


_WIDTH = len("weights lpips-alex")
