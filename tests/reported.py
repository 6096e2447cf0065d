"""Results as `report.html` shows them, every part there."""

from __future__ import annotations

from typing import Any


def row(rule: str, speedup: float, **changes: Any) -> dict[str, Any]:
    """A results row of 1,000 tokens, at 20 tokens/s without speed-up."""
    drafted = rule not in ("autoregressive", "engine")
    lossless = rule != "mars"
    values: dict[str, Any] = {
        "task": "chat",
        "rule": rule,
        "temperature": 0.0,
        "lossless": lossless,
        "prompts": 8,
        "tokens": 1000,
        "tokens_per_second": 20 * speedup,
        "speedup": speedup,
        "speedup_ci95": [speedup - 0.07, speedup + 0.08],
        "speedup_engine": speedup / 1.1,
        "acceptance_length": 2.3 if drafted else 1.0,
        "acceptance_by_position": [0.7, 0.45, 0.3, 0.2] if drafted else [],
        "relaxed_share": 0.0 if lossless else 0.07,
        "mean_regret_nats": 0.0 if lossless else 0.031,
        "mean_output_tokens": 125.0,
        "identical_to_target": lossless,
        "time_split": {"target": 30 / speedup, "draft": 10 / speedup if drafted else 0.0, "rest": 10 / speedup},
    }
    return values | fidelity(lossless) | changes


def fidelity(lossless: bool) -> dict[str, Any]:
    """What a row says of how faithful its output is."""
    share = 1.0 if lossless else 0.61
    same: dict[str, Any] = {}
    for name in ("exact_match", "common_prefix", "equal_tokens"):
        same |= {name: share, f"{name}_ci95": [share - 0.1, share]}
    score = {"ci95": [0.31, 0.52], "difference": 0.0, "difference_ci95": None, "prompts": 8}
    points = [{"tokens": n, "answers": 9 - n // 25, "mean": 0.01 * n, "q90": 0.02 * n} for n in (1, 50, 100, 150)]
    return {
        "compared_with": "autoregressive" if lossless else "exact",
        "agreement": same,
        "log_likelihood": -0.51,
        "log_likelihood_ci95": [-0.6, -0.42],
        "regret_quantiles": None if lossless else {"0.5": 0.2, "0.9": 0.7, "0.99": 0.95, "max": 1.4},
        "relaxed_margins": None if lossless else {"edges": [0.0, 0.25, 0.5, 0.75, 1.0], "counts": [31, 20, 0, 19]},
        "regret_by_length": None if lossless else points,
        "scores": {"pass@1": score | {"mean": 0.41, "mean_output_tokens": 125.0}},
    }


def full_results() -> dict[str, Any]:
    """Every part; two answers to one prompt."""
    rows = [row("autoregressive", 1.0, speedup_ci95=None), row("engine", 1.1), row("exact", 1.62), row("mars", 1.8)]
    samples = [
        {"id": 1, "text": "Hello", "tag": "exact", "margin": 4.2, "regret": 0.0},
        {"id": 2, "text": "<script>", "tag": "relaxed", "margin": 0.3, "regret": 0.31},
        {"id": 3, "text": " & all\n", "tag": "bonus", "margin": None, "regret": None},
    ]
    strict = [samples[0], samples[2] | {"id": 4, "text": "there"}, samples[0] | {"id": 3, "text": " & all\n"}]
    point = {"step": 10, "tokens": 4096, "seconds": 2.5, "loss": 6.1, "simulated_acceptance_length": 1.4}
    curve = [point | {"accuracy": [0.3, 0.2]}, point | {"step": 20, "loss": 4.0, "accuracy": [0.5, 0.35]}]
    labels = {"label": "depth 4 <b>", "tokens_per_second": 32.4, "acceptance_length": 2.3}
    return {
        "target": "a/target",
        "draft": "out/<draft>",
        "device": "cpu",
        "dtype": "float32",
        "versions": {"torch": "2.9", "transformers": "5.0"},
        "seed": 7,
        "rows": rows,
        "policy": {"tree": {"depth": 4, "top_k": 3}, "verify": {"rule": "mars", "threshold": 0.9}},
        "frontier": [
            labels | {"mean_regret_nats": 0.0, "chosen": False, "lossless": True, "confirmed": False},
            labels
            | {
                "mean_regret_nats": 0.03,
                "tokens_per_second": 36.0,
                "chosen": True,
                "lossless": False,
                "confirmed": True,
            },
        ],
        "training": {"curve": curve, "measured_chain_acceptance_length": 1.9, "minutes": 4.0, "tokens": 8192},
        "distributions": {"ratio": [0.8, 0.95, 0.99], "margin": [0.1, 2.0, float("inf")], "odds": [0.1, 0.2, 0.9]},
        "samples": [
            {"prompt": "Say <hello>", "rule": "exact", "tokens": strict},
            {"prompt": "Say <hello>", "rule": "mars", "tokens": samples},
        ],
        "limits": "Memory bandwidth limits it.",
    }


def several_tasks() -> dict[str, Any]:
    """The same with two categories beside all prompts, at two temperatures, and rules with long names."""
    results = full_results()
    long = row("mars:margin=0.7,regret=5", 1.7, lossless=False, draft="heads/one", batch_size=4, **fidelity(False))
    rows = [*results["rows"], long]
    heated = [entry | {"temperature": 1.0, "identical_to_target": None, "agreement": None} for entry in rows]
    tasks = ("all", "mt_bench/writing", "code")
    return results | {"rows": [entry | {"task": task} for task in tasks for entry in (*rows, *heated)]}
