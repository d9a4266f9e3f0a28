#!/usr/bin/env python3
"""Write the rules of the service level objectives; with --check, only say whether they are up to date.

For each objective and window the share of bad events, and an alert for each pair of windows in which the error budget burns too quickly.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

TARGET = Path(__file__).resolve().parent.parent / "roles/prometheus/files/rules/slo.yml"
# objective -> share of good events, what they are, and the share of bad ones over a window
TTFT = "qwen_time_to_first_token_seconds"
ITL = "vllm[:_](inter_token_latency|time_per_output_token)_seconds"
SLOS = {
    "availability": (
        0.995,
        "answers of the gateway that are no 5xx",
        'sum(rate(haproxy_frontend_http_responses_total{{proxy="kin",code="5xx"}}[{window}]))'
        ' / (sum(rate(haproxy_frontend_http_responses_total{{proxy="kin"}}[{window}])) > 0)',
    ),
    "ttft": (
        0.95,
        "first tokens within 2 s",
        f'1 - sum(rate({TTFT}_bucket{{{{le=~"2|2.0"}}}}[{{window}}])) / (sum(rate({TTFT}_count[{{window}}])) > 0)',
    ),
    "itl": (
        0.95,
        "tokens within 0.1 s of the one before",
        f'1 - sum(rate({{{{__name__=~"{ITL}_bucket",le="0.1"}}}}[{{window}}]))'
        f' / (sum(rate({{{{__name__=~"{ITL}_count"}}}}[{{window}}])) > 0)',
    ),
}
# name of the alert -> how many times too quickly, over a long window and a short one (which lets it clear), severity
BURNS = {
    "QwenErrorBudgetBurnFast": (14.4, "1h", "5m", "critical"),
    "QwenErrorBudgetBurnSlow": (6, "6h", "30m", "warning"),
    "QwenErrorBudgetBurnLong": (1, "3d", "6h", "info"),
}
RATIO = "qwen:slo_errors:ratio_rate"


def rules() -> dict[str, Any]:
    """The file's content."""
    windows = sorted({window for burn in BURNS.values() for window in burn[1:3]}, key=lambda w: (w[-1] == "d", w[-1] == "h", w))
    recording: list[dict[str, Any]] = [
        {"record": "qwen:slo_objective", "expr": f"vector({objective})", "labels": {"slo": slo}} for slo, (objective, _, _) in SLOS.items()
    ]
    recording += [
        {"record": f"{RATIO}{window}", "expr": bad.format(window=window), "labels": {"slo": slo}}
        for window in windows
        for slo, (_, _, bad) in SLOS.items()
    ]
    alerts = [
        {
            "alert": name,
            "expr": " and ".join(f"{RATIO}{window} > on (slo) {factor} * (1 - qwen:slo_objective)" for window in (long, short)),
            "for": "2m",
            "labels": {"severity": severity},
            "annotations": {
                "summary": f"{{{{ $labels.slo }}}}: over {long}, {{{{ $value | humanizePercentage }}}} were bad, "
                f"{factor} times what the objective allows.",
                "runbook": f"docs/runbooks.md#{name.lower()}",
            },
        }
        for name, (factor, long, short, severity) in BURNS.items()
    ]
    return {"groups": [{"name": "qwen-slo", "rules": recording}, {"name": "qwen-burn", "rules": alerts}]}


def text() -> str:
    """The whole file."""
    meanings = "".join(f"# {slo}: {objective:.1%} {good}\n" for slo, (objective, good, _) in SLOS.items())
    return f"# Made by scripts/slo_rules.py.\n{meanings}# yamllint disable\n" + yaml.safe_dump(
        rules(), sort_keys=False, width=130, default_flow_style=False
    )


def main() -> None:
    """Write it, or compare."""
    if "--check" in sys.argv[1:]:
        if not TARGET.exists() or TARGET.read_text() != text():
            sys.exit(f"{TARGET.name} is not what scripts/slo_rules.py makes: run make docs")
        return
    TARGET.write_text(text())


if __name__ == "__main__":
    main()
