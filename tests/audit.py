"""Installed versions against known vulnerabilities: ``pip-audit`` over this environment (``make audit``).

The advisories come from a service of the package index, so this needs a network. What the service did not
answer for is counted, and where that is everything the check ends with 2: nothing was checked. 1 means
that a vulnerable version is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys

OPTIONS = ["--format", "json", "--progress-spinner", "off", "--skip-editable"]


def explain(stdout: str, stderr: str) -> tuple[int, str]:
    """(exit code, what to say) from what pip-audit wrote."""
    if "No module named pip_audit" in stderr:
        return 2, "pip-audit is not installed: pip install 'flawsmith[audit]'; nothing was checked"
    try:
        packages = json.loads(stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (stderr.strip().splitlines() or ["no message"])[-1]
        return (
            2,
            f"the advisory service gave no answer ({last:.200}); nothing was checked: try with a network",
        )
    answered = [package for package in packages if "vulns" in package]
    if not answered:
        return 2, (
            f"the service knows none of {len(packages)} packages from here; nothing was checked: run "
            "it with a network that reaches the package index itself"
        )
    counts = f"{len(answered)} of {len(packages)} installed versions were checked"
    lines = [
        f"{package['name']} {package['version']}: {found['id']}, mended in {', '.join(found['fix_versions'])}"
        for package in answered
        for found in package["vulns"]
    ]
    if lines:
        return 1, "\n".join([*lines, f"{counts}; upgrade these and raise their bounds in pyproject.toml"])
    return 0, f"{counts}; none has a known vulnerability"


def main() -> int:
    done = subprocess.run([sys.executable, "-m", "pip_audit", *OPTIONS], capture_output=True, text=True)
    code, text = explain(done.stdout, done.stderr)
    print(text, file=sys.stderr if code else sys.stdout)
    return code


if __name__ == "__main__":
    sys.exit(main())
