"""Comparisons of methods that are fair by construction, made from a ledger.

`tuning` searches lr and eps for every method in the same way; `comparison` says which runs there
are, and makes those that are missing; `ledger` keeps one line per run; `statistics`, `report` and
`plots` read it. What a run is, and in which process it is made, is the caller's (pseuzo.cli).
"""
