"""Tasks and rows that the tests of the command line share."""

OWN = """
name: own
kind: classification
data: rows.jsonl
prompt: "{{ text }} It is"
label: label
labels: {0: bad, 1: good}
"""


ROWS = [{"text": f"line {i}", "label": i % 2} for i in range(60)]


QUESTIONS = [
    (f"line {i} has the number", str(i % 3), [str(i % 3), f"not {i % 3}"]) for i in range(40)
]


PLAIN = {
    "classification": [
        {"prompt": q, "options": ["0", "1", "2"], "answer": int(a)} for q, a, _ in QUESTIONS
    ],
    "choice": [{"prompt": q, "options": options, "answer": a} for q, a, options in QUESTIONS],
    "generation": [{"prompt": q, "answers": [a]} for q, a, _ in QUESTIONS],
}
