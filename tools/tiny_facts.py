"""Invented people and facts about them: the text of the embedded default.

Everything is a pure function of a seed. A name is put together from two pieces, `Zor` + `im`, and belongs to one split
by its checksum, so that no name of the held-out questions occurs in the training questions, and none of either in the
text the base model was made from. A model can answer only by copying out of the passage.

The base model reads passages followed by *notes* (`home of Zorim then. Says "Kelan"`) and lists of pairs; it never
sees a question, a chat turn or JSON. Those come with the SQuAD v2 shaped set that fine-tuning uses.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from zlib import crc32

SPLITS = {"pretrain": range(60), "train": range(60, 80), "heldout": range(80, 100)}  # checksum modulo 100

STARTS = [c + v + e for c in "bdfghjklmnprstvwz" for v, e in ("an", "er", "il", "ok", "us", "em")]
ENDS = [v + e for v in "aeiou" for e in "nrlskmdt"]

# relation: how it is said and two ways to ask for it; {s} is the person, {v} what is told
RELATIONS: dict[str, tuple[str, str, str]] = {
    "home": ("{s} lives in {v}.", "Where does {s} live?", "What is the home of {s}?"),
    "work": ("{s} works for {v}.", "Who does {s} work for?", "What is the employer of {s}?"),
    "birthplace": ("{s} was born in {v}.", "Where was {s} born?", "What is the birthplace of {s}?"),
    "friend": ("{s} often visits {v}.", "Who does {s} often visit?", "Who is a good friend of {s}?"),
    "dog": ("{s} walks the dog {v}.", "Which dog does {s} walk?", "What is the dog of {s} called?"),
    "ship": ("{s} sails on the {v}.", "What does {s} sail on?", "What is the ship of {s} named?"),
    "book": ("{s} wrote the book {v}.", "Which book did {s} write?", "What title has the book by {s}?"),
    "teacher": ("{s} was taught by {v}.", "By whom was {s} taught?", "Who was the teacher of {s}?"),
    "language": ("{s} speaks {v}.", "What does {s} speak?", "What is the language of {s}?"),
    "garden": ("{s} grows {v} plums.", "Which plums does {s} grow?", "What plums are in the garden of {s}?"),
}

# A note: what is looked up, a word, and what is put around the value. In the plain ones, which are learned first, the
# value follows at once; in the others the person stands as far from it as in a question from its answer, so that
# fine-tuning has to teach new words but not a new place to look for them.
PLAIN_NOTES = ("{r} of {s}", "{s}, {r}")
NOTES = (
    "{r} of {s} then. ",
    "the {r} of {s} here. ",
    "for {r} of {s} now. ",
    "about {s} and {r}. ",
    "as to {s} with {r}. ",
    "on {s} for {r}. ",
)
WORDS_BEFORE = ("Says", "Notes", "Reads", "Found")
BRACKETS = ((' "', '"\n'), (" <", ">\n"), (" (", ")\n"), (" [", "]\n"))
UNKNOWN = "not said"


@dataclass(frozen=True)
class Fact:
    """What a passage tells of one person."""

    subject: str
    relation: str
    value: str

    @property
    def text(self) -> str:
        """The fact as a sentence."""
        return RELATIONS[self.relation][0].format(s=self.subject, v=self.value)


@dataclass(frozen=True)
class Passage:
    """Facts as running text, and (person, relation) pairs that it says nothing about."""

    text: str
    facts: list[Fact]
    absent: list[tuple[str, str]]


class Namer:
    """Names of one split that are not mixed up within a passage: no two begin with the same piece.

    Half the names of the pre-training text are a first piece alone.
    """

    def __init__(self, rng: random.Random, split: str):
        self.rng, self.split = rng, split
        self.used: set[str] = set()

    def name(self) -> str:
        """A new name."""
        while True:
            start = self.rng.choice(STARTS)
            is_short = self.split == "pretrain" and self.rng.random() < 0.5
            name = (start + ("" if is_short else self.rng.choice(ENDS))).capitalize()
            if start not in self.used and in_split(name, self.split):
                self.used.add(start)
                return name


def in_split(name: str, split: str) -> bool:
    """Whether a name belongs to a split."""
    return crc32(name.encode()) % 100 in SPLITS[split]


def make_passage(rng: random.Random, split: str, *, num_people: int, num_relations: int, num_facts: int) -> Passage:
    """A passage in which every person and every relation may occur more than once, so that neither alone tells."""
    namer = Namer(rng, split)
    people = [namer.name() for _ in range(num_people)]
    relations = rng.sample(list(RELATIONS), num_relations + 1)
    elsewhere = relations.pop()
    pairs = [(person, relation) for person in people for relation in relations]
    rng.shuffle(pairs)
    facts = [Fact(subject, relation, namer.name()) for subject, relation in pairs[:num_facts]]
    absent = [*pairs[num_facts:], (namer.name(), rng.choice(relations)), (rng.choice(people), elsewhere)]
    rng.shuffle(absent)
    return Passage(" ".join(fact.text for fact in facts), facts, absent)


def pretraining_rows(num_rows: int, *, seed: int, lists: float, is_plain: bool) -> Iterator[dict[str, str]]:
    """Rows of `prompt` and `completion` for the base model: a share `lists` of lists of pairs, else of notes."""
    rng = random.Random(f"pretraining rows, {seed}")
    for _ in range(num_rows):
        prompt, completion = _list(rng) if rng.random() < lists else _notes(rng, is_plain=is_plain)
        yield {"prompt": prompt, "completion": completion}


def _list(rng: random.Random) -> tuple[str, str]:
    """Pairs of names, to be repeated in another order; some pair may not be there."""
    namer = Namer(rng, "pretrain")
    between = rng.choice((": ", " = ", " has "))
    pairs = [(namer.name(), namer.name()) for _ in range(rng.randint(3, 8))]
    told = ", ".join(f"{key}{between}{value}" for key, value in pairs)
    asked = rng.sample(pairs, len(pairs))
    if rng.random() < 0.3:
        asked.insert(rng.randrange(len(asked)), (namer.name(), UNKNOWN))
    return f"{told}.\n", "".join(f"{key}{between}{value}\n" for key, value in asked)


def _notes(rng: random.Random, *, is_plain: bool) -> tuple[str, str]:
    """A passage and notes on it, all written in one way."""
    num_relations = rng.randint(1, 3)
    num_people = rng.randint(2, 6 if num_relations == 1 else 3)
    num_facts = min(num_people * num_relations, rng.randint(3, 7))
    passage = make_passage(rng, "pretrain", num_people=num_people, num_relations=num_relations, num_facts=num_facts)
    entries = [(fact.subject, fact.relation, fact.value) for fact in passage.facts]
    entries += [(subject, relation, UNKNOWN) for subject, relation in passage.absent if rng.random() < 0.3]
    if is_plain:
        note, word, opening, closing = rng.choice(PLAIN_NOTES), "", ": ", "\n"
    else:
        note, word, (opening, closing) = rng.choice(NOTES), rng.choice(WORDS_BEFORE), rng.choice(BRACKETS)
    lines = [
        note.format(s=subject, r=relation) + word + opening + value + closing
        for subject, relation, value in rng.sample(entries, len(entries))
    ]
    return f"{passage.text}\n", "".join(lines)


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
                "question": RELATIONS[relation][rng.choice((1, 2))].format(s=subject),
                "answers": [{"text": value, "answer_start": passage.text.index(value)}] if value else [],
                "is_impossible": not value,
            }
            for i, (subject, relation, value) in enumerate(rng.sample(asked, len(asked)))
        ]
        paragraphs.append({"context": passage.text, "qas": questions})
    return {"version": "v2.0", "data": [{"title": f"Invented people, {split}", "paragraphs": paragraphs}]}
