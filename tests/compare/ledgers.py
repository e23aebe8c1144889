"""Ledgers of comparisons that nobody ran: lines as runs would leave them."""

import numpy as np

CODE = {"version": "1.0", "digest": "c0de"}


def trial(method: str, lr: float, eps: float | None, loss: float, task: str = "easy") -> dict:
    figures = {"dev": {"loss": loss}, "forwards": 50, "judge_forwards": 3, "train_seconds": 1.0}
    return _line("trial", task, method, 10_000, lr=lr, eps=eps, **figures)


def final(method: str, seed: int, curve: list, outcomes: list, task: str = "easy", **more) -> dict:
    """curve: the dev metric at equal steps, at each of which ten passes and one second are over."""
    evaluations = [[5 * i, 10 * i, float(i), 1.0, value] for i, value in enumerate(curve)]
    figures = {
        "metric": "accuracy",
        "evaluations": evaluations,
        "dev": {"loss": 1.0, "accuracy": curve[-1]},
        "test": {"loss": 1.0, "accuracy": float(np.mean(outcomes))},
        "outcomes": outcomes,
        "forwards": 10 * (len(curve) - 1),
        "search_forwards": 0,
        "steps": 5 * (len(curve) - 1),
        "train_seconds": float(len(curve) - 1),
        "peak_memory_mib": 100.0,
        "hardware": "an abacus",
        "lr": 0.1,
        "eps": None if method.startswith("fo-") else 1e-3,
    }
    return _line("final", task, method, seed, **figures | more)


def _line(kind: str, task: str, method: str, seed: int, **figures) -> dict:
    names = {"kind": kind, "task": task, "method": method, "seed": seed, "status": "done"}
    key = f"{kind} {task} {method} {seed} {figures.get('lr')} {figures.get('eps')}"
    return names | {"hash": key, "setup": f"setup of {method}", "code": CODE} | figures


def plan(methods: list[str], seeds: int = 3, tasks: tuple[str, ...] = ("easy",)) -> dict:
    cells = [
        {
            "task": task,
            "method": method,
            "setup": f"setup of {method}",
            "forwards": 40,
            "trials": 2,
            "trial_forwards": 50,
            "tuned": ["lr"] if method.startswith("fo-") else ["lr", "eps"],
            "fixed": {},
            "searches_itself": False,
            "data": "rows",
        }
        for task in tasks
        for method in methods
    ]
    references = dict.fromkeys(tasks, "mezo")
    return {"kind": "plan", "hash": "plan", "seeds": seeds, "cells": cells} | {
        "references": references
    }
