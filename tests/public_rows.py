"""Holds rows in the columns of the public data sets."""

import json


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# name: (row, prompt, options, answer, golds), written by hand from the public schemas
PUBLIC = {
    "sst2": [
        (
            {"sentence": "a moving film ", "label": 1, "idx": 4},
            "a moving film All in all, it was",
            ("terrible", "great"),
            1,
            ("great",),
        ),
        (
            {"sentence": "dull", "label": 0, "idx": 5},
            "dull All in all, it was",
            ("terrible", "great"),
            0,
            ("terrible",),
        ),
    ],
    "rte": [
        (
            {"premise": "It rained all day.", "hypothesis": "It was wet.", "idx": 0, "label": 0},
            'It rained all day.\nCan one conclude from this that "It was wet." is true? Yes or '
            "No?\n",
            ("Yes", "No"),
            0,
            ("Yes",),
        ),
        (
            {"premise": "A cat sat.", "hypothesis": "A dog sat.", "idx": 1, "label": 1},
            'A cat sat.\nCan one conclude from this that "A dog sat." is true? Yes or No?\n',
            ("Yes", "No"),
            1,
            ("No",),
        ),
    ],
    "cb": [
        (
            {"premise": "I doubt he came.", "hypothesis": "he came", "idx": 0, "label": 2},
            'Given that I doubt he came. May we conclude that "he came"? Yes, No, or Maybe?\n',
            ("Yes", "No", "Maybe"),
            2,
            ("Maybe",),
        ),
    ],
    "boolq": [
        (
            {
                "question": "is ice cold",
                "passage": "Ice -- Ice is frozen water.",
                "idx": 0,
                "label": 1,
            },
            "Ice -- Ice is frozen water. Is ice cold?\n",
            ("No", "Yes"),
            1,
            ("Yes",),
        ),
    ],
    "wsc": [
        (
            {
                "text": "Mark told Pete that he won.",
                "span1_index": 0,
                "span2_index": 4,
                "span1_text": "Mark",
                "span2_text": "he",
                "idx": 0,
                "label": 0,
            },
            'Mark told Pete that he won.\nIn the text above, does the word "he" stand for Mark? '
            "Yes "
            "or No?\n",
            ("No", "Yes"),
            0,
            ("No",),
        ),
    ],
    "wic": [
        (
            {
                "word": "bank",
                "sentence1": "The bank lent it.",
                "sentence2": "A river bank.",
                "start1": 4,
                "start2": 8,
                "end1": 8,
                "end2": 12,
                "idx": 0,
                "label": 0,
            },
            'Is the word "bank" used in the same sense in both of these sentences? Yes or No?\nThe '
            "bank lent it.\n"
            "A river bank.\n",
            ("No", "Yes"),
            0,
            ("No",),
        ),
    ],
    "multirc": [
        (
            {
                "paragraph": "Ann ate two pears.",
                "question": "How many pears?",
                "answer": "Two",
                "label": 1,
                "idx": {"paragraph": 0, "question": 0, "answer": 0},
            },
            'Ann ate two pears.\nQuestion: How many pears?\nSomebody answered "Two". Is this '
            "right? "
            "Yes or No?\n",
            ("No", "Yes"),
            1,
            ("Yes",),
        ),
    ],
    "copa": [
        (
            {
                "premise": "The ice melted.",
                "choice1": "The sun shone.",
                "choice2": "I'm cold.",
                "question": "cause",
                "idx": 0,
                "label": 0,
            },
            "The ice melted because",
            ("the sun shone.", "I'm cold."),
            0,
            ("the sun shone.",),
        ),
        (
            {
                "premise": "It rained.",
                "choice1": "It was dry.",
                "choice2": "I got wet.",
                "question": "effect",
                "idx": 1,
                "label": 1,
            },
            "It rained so",
            ("it was dry.", "I got wet."),
            1,
            ("I got wet.",),
        ),
    ],
    "winogrande": [
        (
            {
                "sentence": "The cup does not fit in the bag because _ is too big.",
                "option1": "the cup",
                "option2": "the bag",
                "answer": "1",
            },
            "The cup does not fit in the bag because",
            ("the cup", "the bag"),
            0,
            ("the cup",),
            "",
            " is too big.",
        ),
        (
            {
                "sentence": "_'s dog likes Ann's dog. ",
                "option1": "Kim",
                "option2": "Eve",
                "answer": "2",
            },
            "",
            ("Kim", "Eve"),
            1,
            ("Eve",),
            "",
            "'s dog likes Ann's dog.",
        ),
    ],
    "record": [
        (
            {
                "passage": "Rome fell.\n@highlight\nThe Goths came",
                "query": "@placeholder was sacked",
                "entities": ["Goths", "Rome", "The Goths"],
                "entity_spans": {"text": ["Rome"], "start": [0], "end": [4]},
                "answers": ["Rome", "Roma"],
                "idx": {"passage": 0, "query": 0},
            },
            "Rome fell.\n- The Goths came\n@placeholder was sacked\nQuestion: Who or what is "
            '"@placeholder"?\nAnswer:',
            ("Goths", "Rome", "The Goths"),
            1,
            ("Rome",),
        ),
        (
            {
                "passage": "Goths, the Goths.",
                "query": "It was @placeholder",
                "entities": ["Rome", "Goths", "The Goths"],
                "entity_spans": {"text": ["Goths"], "start": [0], "end": [5]},
                "answers": ["The Goths", "Goths"],
                "idx": {"passage": 1, "query": 0},
            },
            "Goths, the Goths.\nIt was @placeholder\nQuestion: Who or what is "
            '"@placeholder"?\nAnswer:',
            ("Rome", "Goths", "The Goths"),
            2,
            ("The Goths", "Goths"),
        ),
    ],
    "squad": [
        (
            {
                "id": "5",
                "title": "Nile_River",
                "context": "The Nile is long.",
                "question": "What is long? ",
                "answers": {"text": ["The Nile", "Nile", "Nile"], "answer_start": [0, 4, 4]},
            },
            "Title: Nile River\nPassage: The Nile is long.\nQuestion: What is long?\nAnswer:",
            (),
            None,
            ("The Nile", "Nile"),
        ),
    ],
    "drop": [
        (
            {
                "section_id": "nfl_1",
                "query_id": "q",
                "passage": "They won 21-7.",
                "question": "By how many points?",
                "answers_spans": {"spans": ["14"], "types": ["number"]},
            },
            "Passage: They won 21-7.\nQuestion: By how many points?\nAnswer:",
            (),
            None,
            ("14",),
        ),
    ],
}
