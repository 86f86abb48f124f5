"""Invented people and facts about them: the text of the embedded default.

Everything is a pure function of a seed. Names are put together from pieces, `Zor` + `im` + `ak`, and a name belongs to
one split by its checksum, so that no name or year of the held-out questions occurs in the training questions, and none
of either in the text the base model was made from. A model can answer only by copying out of the passage.

The base model reads passages followed by *notes* ("Zorim, home: Kelan"), copying drills and lists; it never sees a
question, a chat turn or JSON. Those come with the SQuAD v2 shaped set that fine-tuning uses.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from zlib import crc32

SPLITS = {"pretrain": range(60), "train": range(60, 80), "heldout": range(80, 100)}  # checksum modulo 100

STARTS = [c + v + e for c in "bdfghjklmnprstvwz" for v, e in ("an", "er", "il", "ok", "us", "em")]
ENDS = [v + e for v in "aeiou" for e in "nrlskmdt"]

# relation: two ways to say it, two ways to ask for it; {s} is the person, {v} what is told
RELATIONS: dict[str, tuple[str, str, str, str]] = {
    "home": ("{s} lives in {v}.", "The home of {s} is {v}.", "Where does {s} live?", "What is the home of {s}?"),
    "work": (
        "{s} works for {v}.",
        "The employer of {s} is {v}.",
        "Who does {s} work for?",
        "What is the employer of {s}?",
    ),
    "birthplace": (
        "{s} was born in {v}.",
        "The birthplace of {s} is {v}.",
        "Where was {s} born?",
        "What is the birthplace of {s}?",
    ),
    "friend": (
        "{s} often visits {v}.",
        "The best friend of {s} is {v}.",
        "Who does {s} often visit?",
        "Who is the best friend of {s}?",
    ),
    "dog": (
        "{s} walks the dog {v}.",
        "The dog of {s} is called {v}.",
        "Which dog does {s} walk?",
        "What is the dog of {s} called?",
    ),
    "ship": (
        "{s} sails on the {v}.",
        "The ship of {s} is named {v}.",
        "What does {s} sail on?",
        "What is the ship of {s} named?",
    ),
    "book": (
        "{s} wrote the book {v}.",
        "The book by {s} has the title {v}.",
        "Which book did {s} write?",
        "What title has the book by {s}?",
    ),
    "teacher": (
        "{s} was taught by {v}.",
        "The teacher of {s} was {v}.",
        "By whom was {s} taught?",
        "Who was the teacher of {s}?",
    ),
    "language": (
        "{s} speaks {v}.",
        "The language of {s} is {v}.",
        "What does {s} speak?",
        "What is the language of {s}?",
    ),
    "year": (
        "{s} married in {v}.",
        "The wedding of {s} was in {v}.",
        "When did {s} marry?",
        "When was the wedding of {s}?",
    ),
}

NOTES = ("{s}, {r}: {v}", "{r} of {s}: {v}", "{s} ({r}) - {v}", "For {s} the {r} is: {v}", 'As to {r}, {s} has "{v}"')
UNKNOWN = "not said"


@dataclass(frozen=True)
class Fact:
    """What a passage tells of one person; `form` is which of the two ways to say it."""

    subject: str
    relation: str
    value: str
    form: int

    def text(self, form: int) -> str:
        """The fact as a sentence."""
        return RELATIONS[self.relation][form].format(s=self.subject, v=self.value)


@dataclass(frozen=True)
class Passage:
    """Facts as running text, and (person, relation) pairs that it says nothing about."""

    text: str
    facts: list[Fact]
    absent: list[tuple[str, str]]


class Namer:
    """Names and years of one split that are not mixed up within a passage: no two begin with the same piece."""

    def __init__(self, rng: random.Random, split: str):
        self.rng, self.split = rng, split
        self.used: set[str] = set()

    def name(self) -> str:
        """A new name of two or three pieces."""
        while True:
            start = self.rng.choice(STARTS)
            name = (start + "".join(self.rng.choice(ENDS) for _ in range(self.rng.choice((1, 1, 2))))).capitalize()
            if start not in self.used and in_split(name, self.split):
                self.used.add(start)
                return name

    def value(self, relation: str) -> str:
        """A new name, or year where the relation is one of time."""
        if relation != "year":
            return self.name()
        while True:
            year = str(self.rng.randrange(1100, 2000))
            if year not in self.used and in_split(year, self.split):
                self.used.add(year)
                return year


def in_split(name: str, split: str) -> bool:
    """Whether a name or year belongs to a split."""
    return crc32(name.encode()) % 100 in SPLITS[split]


def make_passage(rng: random.Random, split: str, *, num_people: int, num_relations: int, num_facts: int) -> Passage:
    """A passage in which every person and every relation may occur more than once, so that neither alone tells."""
    namer = Namer(rng, split)
    people = [namer.name() for _ in range(num_people)]
    relations = rng.sample(list(RELATIONS), num_relations + 1)
    elsewhere = relations.pop()
    pairs = [(person, relation) for person in people for relation in relations]
    rng.shuffle(pairs)
    facts = [Fact(s, r, namer.value(r), rng.randrange(2)) for s, r in pairs[:num_facts]]
    absent = [*pairs[num_facts:], (namer.name(), rng.choice(relations)), (rng.choice(people), elsewhere)]
    rng.shuffle(absent)
    return Passage(" ".join(fact.text(fact.form) for fact in facts), facts, absent)


def pretraining_rows(num_rows: int, *, seed: int, drills: float) -> Iterator[dict[str, str]]:
    """Rows of `prompt` and `completion` for the base model; a share `drills` of them are plain copying and lists."""
    rng = random.Random(f"pretraining rows, {seed}")
    for _ in range(num_rows):
        prompt, completion = (_drill if rng.random() < drills else _notes)(rng)
        yield {"prompt": prompt, "completion": completion}


def _drill(rng: random.Random) -> tuple[str, str]:
    """Names to repeat in order, or pairs to repeat in another order: what attention must learn first."""
    namer = Namer(rng, "pretrain")
    if rng.random() < 0.5:
        line = rng.choice((", ", " ", " and ", "; ")).join(namer.name() for _ in range(rng.randint(4, 10)))
        return f"{line}.", f" Again: {line}."
    between = rng.choice((": ", " = ", ' "', " has "))
    kinds = [rng.choice(("home", "year")) for _ in range(rng.randint(3, 7))]
    pairs = [f"{namer.name()}{between}{namer.value(kind)}" for kind in kinds]
    return ", ".join(pairs) + ".", f" Sorted: {', '.join(rng.sample(pairs, len(pairs)))}."


def _notes(rng: random.Random) -> tuple[str, str]:
    """A passage and notes on it, or the same facts in other words."""
    passage = make_passage(
        rng, "pretrain", num_people=rng.randint(2, 4), num_relations=rng.randint(2, 3), num_facts=rng.randint(3, 7)
    )
    facts = rng.sample(passage.facts, len(passage.facts))
    if rng.random() < 0.25:
        return passage.text, "\nIn other words: " + " ".join(fact.text(1 - fact.form) for fact in facts)
    lines = [(fact.subject, fact.relation, fact.value) for fact in facts]
    lines += [(s, r, UNKNOWN) for s, r in passage.absent if rng.random() < 0.3]
    note = rng.choice(NOTES)
    notes = "\n".join(note.format(s=s, r=r, v=v) for s, r, v in rng.sample(lines, len(lines)))
    return passage.text, f"\nNotes:\n{notes}"


def squad_set(split: str, *, num_passages: int, num_answerable: int, num_impossible: int, seed: int) -> dict[str, Any]:
    """A question set in SQuAD v2's shape, every passage with so many questions of either kind."""
    rng = random.Random(f"questions, {split}, {seed}")
    paragraphs = []
    for number in range(num_passages):
        passage = make_passage(rng, split, num_people=3, num_relations=3, num_facts=6)
        asked = [(f.subject, f.relation, f.value) for f in rng.sample(passage.facts, num_answerable)]
        asked += [(s, r, "") for s, r in passage.absent[:num_impossible]]
        questions = [
            {
                "id": f"{split}-{number}-{i}",
                "question": RELATIONS[relation][rng.choice((2, 3))].format(s=subject),
                "answers": [{"text": value, "answer_start": passage.text.index(value)}] if value else [],
                "is_impossible": not value,
            }
            for i, (subject, relation, value) in enumerate(rng.sample(asked, len(asked)))
        ]
        paragraphs.append({"context": passage.text, "qas": questions})
    return {"version": "v2.0", "data": [{"title": f"Invented people, {split}", "paragraphs": paragraphs}]}
