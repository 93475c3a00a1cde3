"""Rows in the published shapes of the benchmarks, written for tests: files() gives {path under the data folder: text}.

They are made to reach what prompts and metrics can trip over: white space at both ends, brackets and doubled spaces, labels in digits,
letters outside ASCII, quoted commas and newlines in CSV, choices of very different length, a row of `train` that stands in `dev` too, a
question longer than the model, leaves of different sizes.
"""
import csv
import io
import json

ARC = [
    ("Which of these gives light of its own?", ["the Moon", "a candle flame", "a mirror", "snow"], "B"),
    ("A boat floats because water", ["is cold", "is wet", "pushes up on it", "has no colour"], "C"),
    ("  What do roots take up?  ", ["water", "light", "sound"], "A"),
    ("Was fließt im Kreis durch den Körper? (naïve)", ["Öl", "Blut", "Sand", "Luft, die man atmet und wieder ausatmet"], "B"),
    ("Ice melts at 0 degrees. At 20 degrees it", ["stays hard", "turns to water", "turns to stone", "burns"], "2"),
    ("Read this: " + "the oars go in, the oars go out, and the ship moves on. " * 80 + "What moves on?",
     ["ship", "sea", "sun", "stone"], "A"),
]
ARC_TRAIN = [
    ("What falls from clouds?", ["rain", "rocks", "leaves", "dust"], "A"),
    ("Bees make", ["milk", "honey", "bread", "silk"], "B"),
    ("A magnet pulls", ["wood", "glass", "iron", "paper"], "C"),
    ("The Sun rises in the", ["west", "north", "south", "east"], "D"),
    ("Fish breathe with", ["lungs", "gills", "skin", "fins"], "B"),
    ("Sound needs", ["a vacuum", "light", "matter", "heat"], "C"),
]
WINOGRANDE = [
    ("The jug did not fit in the box because the _ was too wide.", "jug", "box", "1"),
    ("Ana gave Eva the rope because _ had to tie the sail.", "Ana", "Eva", "2"),
    ("The rower beat the runner at sea since the _  was used to waves .", "rower", "runner", "1"),
    ("Milk lasts longer than bread, so we ate the _ first.", "milk", "bread", "2"),
    ("_ was paid by Tom, and so Jim had money.", "Tom", "Jim", "1"),
]
WINOGRANDE_TRAIN = [
    ("The lamp was brighter than the candle, so we read by the _ .", "lamp", "candle", "1"),
    ("Milk lasts longer than bread, so we ate the _ first.", "milk", "bread", "2"),
    ("Ida asked Bea for help as _ was tired.", "Ida", "Bea", "1"),
    ("The cat ran from the dog because the _ was afraid.", "cat", "dog", "1"),
]
HELLASWAG = [
    ("Rowing", "A crew sits in a boat. They dip the oars", "and the cox",
     ["shouts the stroke.", "bakes a cake.", "is a door.", "reads [step] the  wall."], 0),
    ("Baking", "[header] How to bake bread [title] Mix flour and water. [step] Knead it.", "",
     ["Let it rise.", "Throw it away in the sea at once.", "Paint it.", "Sing."], 0),
    ("Painting", "A man dips a brush.", "ÜBER the wall he",
     ["draws a blue line.", "sleeps.", "eats the  brush [substeps] twice.", "swims far away."], 0),
    ("Sailing", "The wind turns.", "the crew", ["falls up.", "sets the sail.", "boils.", "is a stone."], 1),
]
HELLASWAG_TRAIN = [
    ("Running", "She ties her shoes.", "then she", ["runs.", "flies.", "melts.", "rings."], 0),
    ("Cooking", "He cuts an onion.", "his eyes", ["water.", "sing.", "grow.", "walk."], 0),
    ("Fishing", "The line moves.", "he", ["sleeps on.", "pulls it in.", "sells it.", "paints it."], 1),
]
SUBJECTS = """abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics econometrics
electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology high_school_chemistry
high_school_computer_science high_school_european_history high_school_geography high_school_government_and_politics
high_school_macroeconomics high_school_mathematics high_school_microeconomics high_school_physics high_school_psychology
high_school_statistics high_school_us_history high_school_world_history human_aging human_sexuality international_law jurisprudence
logical_fallacies machine_learning management marketing medical_genetics miscellaneous moral_disputes moral_scenarios nutrition
philosophy prehistory professional_accounting professional_law professional_medicine professional_psychology public_relations
security_studies sociology us_foreign_policy virology world_religions""".split()
SUBTASKS = """boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies
geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects logical_deduction_three_objects
movie_recommendation multistep_arithmetic_two navigate object_counting penguins_in_a_table reasoning_about_colored_objects ruin_names
salient_translation_error_detection snarks sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting""".split()


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def arc_ai2(i, stem, texts, key):
    labels = "1234" if key.isdigit() else "ABCD"
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels)]
    return {"id": f"Test_{i}", "question": {"stem": stem, "choices": choices}, "answerKey": key}


def arc_columns(i, stem, texts, key):
    return {"id": f"Train_{i}", "question": stem, "choices": {"text": texts, "label": list("ABCD"[:len(texts)])}, "answerKey": key}


def winogrande(i, sentence, option1, option2, answer):
    return {"qID": f"q{i}", "sentence": sentence, "option1": option1, "option2": option2, "answer": answer}


def hellaswag(i, label, a, b, endings, gold, split):
    return {"ind": i, "activity_label": label, "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}", "split": split, "endings": endings, "label": gold}


def mmlu_rows(subject, n, offset):
    """Sums and comparisons; the right letter wanders with the row."""
    rows = []
    for i in range(n):
        x, y = len(subject) + 3 * i + offset, 2 + i
        right = (i + offset + len(subject)) % 4
        choices = [str(x + y + j - right) for j in range(4)]
        question = f"In {subject[:6]}, what is {x} + {y}?"
        if i == 1:
            question, choices = f'  Say "{x}", then\n{y}: ', [f"{c}, so" if j == right else c for j, c in enumerate(choices)]
        rows.append([question, *choices, "ABCD"[right]])
    return rows


def csv_text(rows):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def gsm8k_rows(n, offset):
    names, things = ["Mia", "Leo", "Zoe", "Kai", "Ida", "Tom"], ["pears", "oars", "ropes", "books"]
    rows = []
    for i in range(n):
        a, b, name, thing = 3 + i + offset, 2 + (i * i + offset) % 7, names[(i + offset) % 6], things[i % 4]
        answer = f"{name} has {a} and gets {b}, so {a} + {b} = <<{a}+{b}={a + b}>>{a + b} {thing}.\n#### {a + b}"
        rows.append({"question": f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?", "answer": answer})
    if offset:
        # What the tiny model says, right or wrong, so that both filters find the target at least once.
        rows[2]["answer"], rows[3]["answer"] = "That is $1,000 less 974.\n#### 26", "That is all.\n#### 18."
    return rows


def bbh_rows(subtask, n, offset):
    """Pairs of (input, reasoning, target)."""
    rows = []
    for i in range(n):
        x, y = len(subtask) % 9 + i + offset, 1 + i
        is_even = (x + y) % 2 == 0
        target = ("(A)" if is_even else "(B)") if len(subtask) % 2 else ("yes" if is_even else "no")
        # One question is longer than what its answer leaves of the model.
        words = "Mind " + "oar sail mast " * 150 if (subtask, i, offset) == ("word_sorting", 1, 11) else ""
        rows.append((f"{words}{subtask.replace('_', ' ')}: is {x} + {y} even?\nOptions:\n(A) yes\n(B) no",
                     f"{x} + {y} is {x + y}. So the answer is {target}.", target))
    return rows


def bbh_description(subtask):
    return f"Answer questions of {subtask.replace('_', ' ')}."


def cot_prompt(subtask):
    shots = "\n\n".join(f"Q: {question}\nA: Let's think step by step.\n{answer}" for question, answer, _ in bbh_rows(subtask, 3, 5))
    return f"A line that is no part of the prompt.\n-----\n{bbh_description(subtask)}\n\n{shots}"


def files():
    found = {
        "arc_challenge/ARC-Challenge-Test.jsonl": lines(arc_ai2(i, *row) for i, row in enumerate(ARC)),
        "arc_challenge/ARC-Challenge-Train.jsonl": lines(arc_columns(i, *row) for i, row in enumerate(ARC_TRAIN)),
        "winogrande/dev.jsonl": lines(winogrande(i, *row) for i, row in enumerate(WINOGRANDE)),
        "winogrande/train_xl.jsonl": lines(winogrande(100 + i, *row) for i, row in enumerate(WINOGRANDE_TRAIN)),
        "hellaswag/hellaswag_val.jsonl": lines(hellaswag(i, *row, "val") for i, row in enumerate(HELLASWAG)),
        "hellaswag/hellaswag_train.jsonl": lines(hellaswag(i, *row, "train") for i, row in enumerate(HELLASWAG_TRAIN)),
        "gsm8k/test.jsonl": lines(gsm8k_rows(4, 20)),
        "gsm8k/train.jsonl": lines(gsm8k_rows(24, 0)),
    }
    for i, subject in enumerate(SUBJECTS):
        found[f"mmlu/dev/{subject}_dev.csv"] = csv_text(mmlu_rows(subject, 6, 40))
        found[f"mmlu/test/{subject}_test.csv"] = csv_text(mmlu_rows(subject, 2 + i % 2, 7))
    for subtask in SUBTASKS:
        examples = [{"input": question, "target": target} for question, _, target in bbh_rows(subtask, 2, 11)]
        found[f"bbh/bbh/{subtask}.json"] = json.dumps({"canary": "none", "examples": examples})
        found[f"bbh/cot-prompts/{subtask}.txt"] = cot_prompt(subtask)
    return found
