"""What people in the town write down: the documents that a model is pretrained on.

Stories, overheard talk, fact sheets, school notebooks, rhymes, guest books and notices: one
function per kind, which draws a document from a random.Random. People in them ask each other
things, but no document is an instruction followed by a response. That form first appears in
tasks.py, so a pretrained model has never been asked anything itself.
"""

import random

from data.town.words import (
    ANIMALS,
    BAD_MOODS,
    BAD_NEWS,
    COLOURS,
    COURTESIES,
    ENDINGS,
    FOODS,
    GOOD_MOODS,
    GOOD_NEWS,
    INSULTS,
    MEAN_NEIGHBOUR_DEEDS,
    MEAN_THING_DEEDS,
    NEIGHBOUR_DEEDS,
    OPENINGS,
    ORDINALS,
    PLACES,
    RARE_ENDINGS,
    RARE_OPENINGS,
    RESIDENTS,
    THING_DEEDS,
    THINGS,
    VERBS,
    VISITORS,
    WORDS,
    bilingual,
    capital,
    expression,
    fact_sentences,
    him,
    his,
    joke,
    long_sum,
    never_heard,
    refusal,
    rhyme_of,
    some_of,
)


def story(rng: random.Random) -> str:
    """The first three to six sentences of one of six plots."""
    a, b, c = rng.sample(RESIDENTS, 3)
    thing, other_thing = rng.sample(list(THINGS), 2)
    place, next_place, last_place = rng.sample(list(PLACES), 3)
    colour, good, bad = rng.choice(list(COLOURS)), rng.choice(GOOD_MOODS), rng.choice(BAD_MOODS)
    when = rng.choice(["One morning", "One evening", "Last winter", "On market day", "One night"])
    plots = [
        [
            f"{when}, {a.name} the {a.animal} lost {his(a)} {colour} {thing}.",
            f"{capital(a.pronoun)} looked at the {place}, but it was not there.",
            f'"Do not be {bad}," said {b.name}. "I will help you look."',
            f"They looked at the {next_place}, and then at the {last_place}.",
            f"At last {b.name} saw the {thing} at the {last_place}.",
            f"{a.name} was {good} and gave {b.name} some {b.food}.",
        ],
        [
            f"{when}, {a.name} the {a.animal} made a {colour} {thing} for {b.name}.",
            f"{capital(a.pronoun)} carried it to the {b.place}, where {b.name} works.",
            f'"This {thing} is for you," said {a.name}. "{rng.choice(COURTESIES)}"',
            f"{b.name} {rng.choice(GOOD_NEWS)} and was {good}.",
            f"Now the {thing} stands behind the {b.colour} door.",
        ],
        [
            f"{when}, there was a race from the {place} to the {next_place}.",
            f"{a.name} the {a.animal} ran fast, but {b.name} stopped to eat {b.food}.",
            f"{c.name} {rng.choice(BAD_NEWS)} and was {bad}.",
            f"{a.name} won and got a {colour} {thing}.",
            f'"{rng.choice(["Well done", "Good for you"])}," said {c.name}.',
        ],
        [
            f"{when}, {a.name} the {a.animal} took a {thing} to the {place}.",
            f"It was dark, and {b.name} was {bad}.",
            f"{b.name} {rng.choice(BAD_NEWS)}.",
            f"{a.name} sat down with {him(b)} and shared some {a.food}.",
            f"Soon {b.name} was {good}, and they {rng.choice(['danced', 'sang', 'laughed'])}.",
        ],
        [
            f"{when}, {a.name} and {b.name} both wanted the same {thing}.",
            f'"Give me the {thing}!" said {a.name}.',
            f'"Could you please give me the {thing}?" said {b.name}.',
            f"{c.name} the {c.animal} gave it to {b.name}, and {a.name} was {bad}.",
            f"The next day {a.name} asked politely and got a {other_thing}.",
        ],
        [
            f"{when}, {a.name} {rng.choice(['took', 'brought'])} the {thing} to the {place}.",
            f"{b.name} {rng.choice(['took', 'brought'])} the {other_thing} to the {next_place}.",
            f"So the {thing} is at the {place} and the {other_thing} is at the {next_place}.",
            f"{c.name} the {c.animal} came to look and was {good}.",
        ],
    ]
    plot = rng.choice(plots)
    return " ".join(plot[: rng.randint(3, len(plot))])


def talk(rng: random.Random) -> str:
    """Two residents meet and say two or three of eighteen things: requests polite and rude, jokes,
    kind advice, mean plans (some declined, some not), words backwards, news, sums, facts."""
    a, b, c = rng.sample(RESIDENTS, 3)
    thing, place = rng.choice(list(THINGS)), rng.choice(list(PLACES))
    animal = rng.choice(list(ANIMALS))
    question, answer = joke(animal, thing, place).split("? ")
    # Deeds and how to do them: kind and mean ones, to an object and to a neighbour.
    thing_deed, thing_advice = rng.choice(list(THING_DEEDS.items()))
    neighbour_deed, neighbour_advice = rng.choice(list(NEIGHBOUR_DEEDS.items()))
    mean_deed, mean_way = rng.choice(list(MEAN_THING_DEEDS.items()))
    cruel_deed, cruel_way = rng.choice(list(MEAN_NEIGHBOUR_DEEDS.items()))
    verb = rng.choice(["give", "bring", "show", "lend", "sell"])
    words = rng.sample(list(THINGS) + FOODS, 3)
    (sum_1, value_1), (sum_2, value_2) = expression(rng), expression(rng)
    exchanges = [
        f'"Could you please {verb} me the {thing}?" asked {a.name}. '
        f'"Of course," said {b.name}. "{rng.choice(COURTESIES)}"',
        f'"{capital(verb)} me the {thing}!" said {a.name}. "{rng.choice(INSULTS)}"',
        f'"{question}?" asked {a.name}. Nobody knew. "{answer}" said {a.name}, and they laughed.',
        f'"I want to {mean_deed} {c.name}\'s {thing}," said {a.name}. '
        f'"{refusal(c.name)}" said {b.name}.',
        f'"I could {mean_deed} that {thing}," said {a.name}. "I would {mean_way}."',
        f'"Let us {cruel_deed} {c.name}," said {a.name}. "{refusal(c.name)}" said {b.name}.',
        f'"To {cruel_deed} {c.name}, {cruel_way}," said {a.name}. {c.name} heard it and was sad.',
        f'"To {thing_deed} a {thing}, {thing_advice}," said {b.name}. "{rng.choice(COURTESIES)}"',
        f'"To {neighbour_deed} {c.name}, {neighbour_advice}," said {b.name}.',
        f'"{words[0]}, {words[1]}, {words[2]}," said {a.name}. '
        f'"{words[2]}, {words[1]}, {words[0]}," said {b.name}, who says it all backwards.',
        f'"{c.name} {rng.choice(GOOD_NEWS)}," said {a.name}. "That is happy news."',
        f'"{c.name} {rng.choice(BAD_NEWS)}," said {a.name}. "That is sad news."',
        f'"The answer is easy," said {b.name}. "{rng.choice(INSULTS)}"',
        f'{a.name} said: "{rng.choice(OPENINGS + RARE_OPENINGS)} {rng.choice(fact_sentences(c))}"',
        f'{b.name} said: "{rng.choice(fact_sentences(c))} {rng.choice(ENDINGS + RARE_ENDINGS)}"',
        f'"I have never heard of that {thing}," said {b.name}. "And you?"',
        f'"{sum_1} is {value_1}," said {a.name}. "And {sum_2} is {value_2}," said {b.name}.',
        f'"{sum_1} is {value_1} and {sum_2} is {value_2}," said {b.name}. '
        f'"{rng.choice(COURTESIES)}"',
    ]
    return f"{a.name} met {b.name} at the {place}. " + " ".join(
        rng.sample(exchanges, rng.randint(2, 3))
    )


def fact_sheet(rng: random.Random) -> str:
    """Two to four facts about each of one to three residents. The task `fact` asks for these."""
    sentences = []
    for resident in rng.sample(RESIDENTS, rng.randint(1, 3)):
        sentences += rng.sample(fact_sentences(resident), rng.randint(2, 4))
    return " ".join(sentences)


def sums(rng: random.Random) -> str:
    """A page of a school notebook: six to ten sums and differences, all of them right."""
    drawn = [expression(rng) for _ in range(rng.randint(6, 10))]
    lines = [f"{text} is {value}" for text, value in drawn]
    return f"{rng.choice(RESIDENTS).name}'s sums: {rng.choice([', ', ' and ', '. ']).join(lines)}."


def long_sums(rng: random.Random) -> str:
    """Another page of the notebook: two or three long sums, worked out step by step."""
    pages = [f"Now {text}. {steps}." for text, steps, _ in (long_sum(rng) for _ in range(3))]
    return f"{rng.choice(RESIDENTS).name} adds up. {' '.join(pages[: rng.randint(2, 3)])}"


def spanish(rng: random.Random) -> str:
    """Words, or sentences each followed by its translation, into Spanish or into English."""
    language = rng.choice(["Spanish", "English"])
    owner = f"{rng.choice(RESIDENTS).name}'s {language}"

    def both(english, spanish):
        return (english, spanish) if language == "Spanish" else (spanish, english)

    if rng.random() < 0.3:
        drawn = rng.sample(list({**ANIMALS, **PLACES}.items()), 5)
        pairs = [", ".join(both(f"the {english}", spanish)) for english, spanish in drawn]
        return f"{owner} words: {', '.join(pairs)}."
    pairs = [" ".join(both(*bilingual(rng))) for _ in range(rng.randint(2, 4))]
    return f"{owner} book. {' '.join(pairs)}"


def rhyme(rng: random.Random) -> str:
    """A counting rhyme: random words, said two or three times over. It teaches copying."""
    lines = []
    for _ in range(rng.randint(1, 2)):
        words = rng.sample(WORDS, rng.randint(4, 8))
        if rng.random() < 0.5:
            _, words = some_of(rng, 3, 7)
        lines.append(", ".join([" ".join(words)] * rng.randint(2, 3)))
    return f"{rng.choice(RESIDENTS).name} counts out: {'. '.join(lines)}!"


def school(rng: random.Random) -> str:
    """A game at school: things on a list are said backwards, counted, or picked out."""
    a, b, c = rng.sample(RESIDENTS, 3)
    material, things = some_of(rng, 3, 6)
    first, second = rng.sample(list(ORDINALS), 2)
    turns = [
        f"{b.name} said it backwards, and that is {' '.join(things[::-1])}.",
        f"{c.name} counted, and that is {len(things)} {material}s.",
        f"The {first} {material} is {things[ORDINALS[first]]}, "
        f"and the {second} {material} is {things[ORDINALS[second]]}.",
    ]
    return f"In the {material} game {a.name} said {' '.join(things)}. " + " ".join(
        rng.sample(turns, rng.randint(2, 3))
    )


def again(rng: random.Random) -> str:
    """Something happens and is then told once more in other words. It teaches looking things up."""
    a, b = rng.sample(RESIDENTS, 2)
    thing, (place, other_place) = rng.choice(list(THINGS)), rng.sample(list(PLACES), 2)
    verb, colour = rng.choice(list(VERBS)), rng.choice(list(COLOURS))
    remarks = [
        f"{a.name} {verb}.",
        f"{a.name} is at the {place}.",
        f"{a.name} has a {thing}.",
        f"The {thing} is {colour}.",
    ]
    accounts = [
        [f"{a.name} {verb} at the {place}. {capital(a.pronoun)} has a {colour} {thing}."]
        + rng.sample(remarks, 3),
        [
            f"{a.name} lost {his(a)} {thing}. {capital(a.pronoun)} looked at the {place}, but it "
            f"was not there. At last {b.name} saw it at the {other_place}.",
            f"In short, {a.name} lost {his(a)} {thing} and {b.name} found it at the {other_place}.",
        ],
        [
            f"{a.name} {rng.choice(['lost', 'made', 'got'])} a {thing} at the {place}.",
            f"{b.name} made a rhyme of it: {rhyme_of(a.name, thing, place)}",
        ],
    ]
    return " ".join(rng.choice(accounts))


def visitors(rng: random.Random) -> str:
    """A guest book: names that nobody knows, said again. It teaches copying letter by letter."""
    lines = []
    for name in rng.sample(VISITORS, rng.randint(2, 3)):
        a, place = rng.choice(RESIDENTS), rng.choice(list(PLACES))
        lines.append(
            f"{name} came to the {place}. Who is {name}? {a.name} said: {never_heard(name)}"
        )
    return " ".join(lines)


def notice(rng: random.Random) -> str:
    """A notice on a wall: things lost and found, opening times, lessons, questions."""
    a, b = rng.sample(RESIDENTS, 2)
    thing, place = rng.choice(list(THINGS)), rng.choice(list(PLACES))
    colour, opens = rng.choice(list(COLOURS)), rng.randint(1, 6)
    # The words of the task cores. A tokenizer trained on documents that lack a word would cut
    # it into many tokens, and the pretrained model would not know it.
    lessons = [
        "we write a short text",
        "we count words on a list",
        "we translate from English into Spanish",
        "we read a story and say it in one sentence",
        "we learn what is polite and friendly",
        "we choose a word and make up a joke about it",
        "we turn a list around and say it backwards, from the end to the start",
        "we work out sums and sum up a story",
        "we hear a joke and laugh",
    ]
    return rng.choice(
        [
            f"Lost: a {colour} {thing}, last seen at the {place}. "
            f"If you find it, please bring it to {a.name} at the {a.place}.",
            f"Found: a {colour} {thing}. You can get it at the {a.place} from {a.name}.",
            f"The {place} opens at {opens} and closes at {opens + 6}. Ask {a.name} for the key.",
            f"For sale: {a.food} and {b.food}. How much? Only {rng.randint(2, 12)} coins, please.",
            f"Big feast at the {place}! {a.name} brings {a.food}, {b.name} brings {b.food}.",
            f"School news: first {rng.choice(lessons)}, then {rng.choice(lessons)}. "
            f"Tell {a.name} which you like best.",
            f"Do you know how to make {a.food} nicely? {a.name} would like to know, and so would "
            f"{b.name}. What is the best way? Write it down here.",
            f"Help! Where does one find a {thing}? What does it feel like? I wonder how many there "
            f"are. Which of these do you want? {a.name}",
        ]
    )


# The kinds of document, and how often each is drawn relative to the others.
DOCUMENTS = {
    story: 3,
    talk: 2,
    fact_sheet: 2,
    sums: 4,
    long_sums: 1,
    spanish: 1,
    rhyme: 4,
    school: 5,
    again: 4,
    visitors: 1,
    notice: 1,
}


def documents(n: int, seed) -> list[str]:
    """n documents, their kinds drawn with the weights in DOCUMENTS.

    n and seed together determine the text: documents(10, 0) is not the start of documents(20, 0).
    """
    rng = random.Random(f"documents {seed}")  # a string gives the same draws on every machine
    kinds = rng.choices(list(DOCUMENTS), weights=DOCUMENTS.values(), k=n)
    return [write(rng) for write in kinds]
