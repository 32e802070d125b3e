"""The kinds of problem that `synthetic.py` draws from: each a function of a random stream.

A kind returns the question, the lines of a worked solution and the answer, which is always a non-negative integer. Questions stay
under about 40 tokens and solutions under 50, numbers stay small enough for a
135M model to learn their sums and products, and every line of a solution states one computation with its result. Reading is part
of the task: kinds share words (more, left, each, altogether) and differ in what is done with the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

Problem = tuple[str, list[str], int]

PEOPLE = (
    ("Ana", "she"), ("Ben", "he"), ("Carla", "she"), ("David", "he"), ("Emma", "she"), ("Felix", "he"), ("Grace", "she"),
    ("Hugo", "he"), ("Iris", "she"), ("Jack", "he"), ("Kate", "she"), ("Leo", "he"), ("Mia", "she"), ("Noah", "he"),
    ("Olivia", "she"), ("Paul", "he"), ("Rosa", "she"), ("Sam", "he"), ("Tina", "she"), ("Victor", "he"),
)  # fmt: skip
THINGS = ("apples", "books", "cards", "coins", "cookies", "eggs", "marbles", "pencils", "shells", "stamps", "stickers", "toys")
GOODS = ("cap", "cup", "game", "kite", "lamp", "notebook", "plant", "puzzle", "scarf", "toy")
CONTAINERS = ("bags", "boxes", "jars", "baskets")


def _two_people(rng: Random) -> tuple[str, str, str]:
    (first, pronoun), (second, _) = rng.sample(PEOPLE, 2)
    return first, pronoun, second


def buy_and_give(rng: Random) -> Problem:
    """Addition, then subtraction."""
    name, pronoun, friend = _two_people(rng)
    thing, have, buy = rng.choice(THINGS), rng.randint(3, 10), rng.randint(2, 9)
    give = rng.randint(2, min(9, have + buy - 1))
    question = f"{name} has {have} {thing}. {pronoun.capitalize()} buys {buy} more and gives {give} to {friend}. "
    total = have + buy
    left = total - give
    steps = [f"{name} has {have} + {buy} = {total} {thing}.", f"After giving {give} away, {total} - {give} = {left} are left."]
    return question + f"How many {thing} does {name} have left?", steps, left


def times_as_many(rng: Random) -> Problem:
    """Multiplication, then a sum with what was multiplied."""
    name, _, friend = _two_people(rng)
    thing, have, times = rng.choice(THINGS), rng.randint(2, 6), rng.randint(2, 4)
    more = have * times
    question = f"{name} has {have} {thing}. {friend} has {times} times as many. How many {thing} do they have altogether?"
    steps = [f"{friend} has {have} * {times} = {more} {thing}.", f"Together they have {have} + {more} = {have + more}."]
    return question, steps, have + more


def half_then_more(rng: Random) -> Problem:
    """Halving, then addition: the first day's number is the larger."""
    name, pronoun = rng.choice(PEOPLE)
    thing, half = rng.choice(THINGS), rng.randint(2, 9)
    first = 2 * half
    question = f"{name} sold {first} {thing} on Monday and half as many on Tuesday. How many {thing} did {pronoun} sell in all?"
    steps = [f"On Tuesday {name} sold {first} / 2 = {half} {thing}.", f"In all {pronoun} sold {first} + {half} = {first + half}."]
    return question, steps, first + half


def equal_containers(rng: Random) -> Problem:
    """Multiplication, then subtraction."""
    name, pronoun = rng.choice(PEOPLE)
    thing, box, number, each = rng.choice(THINGS), rng.choice(CONTAINERS), rng.randint(2, 5), rng.randint(2, 5)
    lost = rng.randint(1, min(9, number * each - 1))
    total = number * each
    question = (
        f"{name} fills {number} {box} with {each} {thing} each. Then {pronoun} takes out {lost}. How many are still inside?"
    )
    steps = [f"There were {number} * {each} = {total} {thing}.", f"Still inside are {total} - {lost} = {total - lost}."]
    return question, steps, total - lost


def share_equally(rng: Random) -> Problem:
    """Addition, then division without remainder."""
    name, pronoun = rng.choice(PEOPLE)
    thing, friends, each = rng.choice(THINGS), rng.randint(2, 5), rng.randint(2, 6)
    total = friends * each
    first = rng.randint(1, total - 1)
    question = f"{name} has {first} {thing} and finds {total - first} more. "
    question += f"{pronoun.capitalize()} shares them equally among {friends} friends. "
    steps = [f"{name} has {first} + {total - first} = {total} {thing}.", f"Each friend gets {total} / {friends} = {each}."]
    return question + f"How many {thing} does each friend get?", steps, each


def change_from_note(rng: Random) -> Problem:
    """Multiplication, then subtraction from the money paid."""
    name, pronoun = rng.choice(PEOPLE)
    good, number, price = rng.choice(GOODS), rng.randint(2, 5), rng.randint(2, 5)
    cost = number * price
    paid = rng.choice([note for note in (20, 50, 100, 200) if note > cost])
    question = f"A {good} costs ${price}. {name} buys {number} of them and pays with ${paid}. How much change does {pronoun} get?"
    steps = [f"The cost is {number} * {price} = ${cost}.", f"The change is {paid} - {cost} = ${paid - cost}."]
    return question, steps, paid - cost


def two_prices(rng: Random) -> Problem:
    """Two products and their sum: three steps."""
    name, pronoun = rng.choice(PEOPLE)
    (first, second), a, b = rng.sample(GOODS, 2), rng.randint(2, 4), rng.randint(2, 4)
    p, q = rng.randint(2, 5), rng.randint(2, 5)
    question = f"{name} buys {a} {first}s at ${p} each and {b} {second}s at ${q} each. How much does {pronoun} pay?"
    one, two = a * p, b * q
    steps = [f"The {first}s cost {a} * {p} = ${one}.", f"The {second}s cost {b} * {q} = ${two}."]
    return question, [*steps, f"Total: {one} + {two} = ${one + two}."], one + two


def weekly_saving(rng: Random) -> Problem:
    """Subtraction, then division: how long until a price is reached."""
    name, pronoun = rng.choice(PEOPLE)
    good, weeks, saving, have = rng.choice(GOODS), rng.randint(2, 5), rng.randint(2, 6), rng.randint(2, 9)
    price = have + weeks * saving
    question = f"{name} wants a {good} for ${price}. {pronoun.capitalize()} has ${have} and saves ${saving} a week. "
    question += "How many weeks does it take?"
    need = price - have
    steps = [f"{name} needs {price} - {have} = ${need} more.", f"It takes {need} / {saving} = {weeks} weeks."]
    return question, steps, weeks


def older_than(rng: Random) -> Problem:
    """Addition, then addition of years to come."""
    name, _, friend = _two_people(rng)
    age, older, years = rng.randint(3, 12), rng.randint(2, 8), rng.randint(2, 6)
    now = age + older
    question = f"{name} is {age} years old. {friend} is {older} years older. How old will {friend} be in {years} years?"
    then = now + years
    steps = [f"{friend} is {age} + {older} = {now} years old.", f"In {years} years {friend} will be {now} + {years} = {then}."]
    return question, steps, then


def fewer_than(rng: Random) -> Problem:
    """Subtraction, then a sum with the first number."""
    name, _, friend = _two_people(rng)
    thing, have = rng.choice(THINGS), rng.randint(6, 20)
    fewer = rng.randint(2, min(9, have - 2))
    less = have - fewer
    question = f"{name} has {have} {thing}. {friend} has {fewer} fewer. How many {thing} do they have altogether?"
    steps = [f"{friend} has {have} - {fewer} = {less} {thing}.", f"Together they have {have} + {less} = {have + less}."]
    return question, steps, have + less


def pages_left(rng: Random) -> Problem:
    """Multiplication, then subtraction from the length of a book."""
    name, pronoun = rng.choice(PEOPLE)
    days, pages, left = rng.randint(2, 5), rng.randint(2, 6), rng.randint(2, 9)
    read = days * pages
    total = read + left
    question = f"{name} reads {pages} pages a day of a book with {total} pages. How many pages are left after {days} days?"
    steps = [f"In {days} days {pronoun} reads {pages} * {days} = {read} pages.", f"Left are {total} - {read} = {left} pages."]
    return question, steps, left


def bus_stops(rng: Random) -> Problem:
    """Subtraction, then addition."""
    on, up = rng.randint(6, 20), rng.randint(2, 9)
    off = rng.randint(2, min(9, on - 2))
    stay = on - off
    question = f"A bus carries {on} people. At a stop {off} get off and {up} get on. How many people are on the bus now?"
    steps = [f"After {off} get off, {on} - {off} = {stay} stay.", f"Now there are {stay} + {up} = {stay + up} people."]
    return question, steps, stay + up


def hourly_pay(rng: Random) -> Problem:
    """Addition of hours, then multiplication by the pay."""
    name, pronoun = rng.choice(PEOPLE)
    first, second, pay = rng.randint(2, 5), rng.randint(2, 5), rng.randint(2, 6)
    hours = first + second
    question = f"{name} earns ${pay} an hour. {pronoun.capitalize()} works {first} hours on Friday and {second} hours on Sunday. "
    total = hours * pay
    steps = [f"{name} works {first} + {second} = {hours} hours.", f"{pronoun.capitalize()} earns {hours} * {pay} = ${total}."]
    return question + f"How much does {pronoun} earn?", steps, total


def rows_of_seats(rng: Random) -> Problem:
    """A product and a difference, asked for what is empty."""
    rows, seats = rng.randint(2, 6), rng.randint(2, 6)
    total = rows * seats
    taken = rng.randint(1, min(9, total - 1))
    question = f"A room has {rows} rows of {seats} seats. {taken} seats are taken. How many seats are empty?"
    steps = [f"The room has {rows} * {seats} = {total} seats.", f"Empty are {total} - {taken} = {total - taken}."]
    return question, steps, total - taken


def double_and_share(rng: Random) -> Problem:
    """Three steps: multiplication, addition, division."""
    name, _, friend = _two_people(rng)
    thing, have = rng.choice(THINGS), 2 * rng.randint(2, 8)
    more = 2 * have
    total, each = have + more, (have + more) // 2
    question = f"{name} has {have} {thing} and {friend} has twice as many. They put them together and share equally. "
    question += "How many does each get?"
    steps = [f"{friend} has {have} * 2 = {more}.", f"Together they have {have} + {more} = {total}."]
    return question, [*steps, f"Each gets {total} / 2 = {each}."], each


def one_step(rng: Random) -> Problem:
    """A single sum or difference."""
    name, pronoun = rng.choice(PEOPLE)
    thing, have, change = rng.choice(THINGS), rng.randint(10, 30), rng.randint(2, 9)
    if rng.random() < 0.5:
        question = f"{name} has {have} {thing} and loses {change}. How many {thing} does {pronoun} have now?"
        return question, [f"{name} has {have} - {change} = {have - change} {thing}."], have - change
    question = f"{name} has {have} {thing} and finds {change}. How many {thing} does {pronoun} have now?"
    return question, [f"{name} has {have} + {change} = {have + change} {thing}."], have + change


KINDS: tuple[Callable[[Random], Problem], ...] = (
    buy_and_give,
    times_as_many,
    half_then_more,
    equal_containers,
    share_equally,
    change_from_note,
    two_prices,
    weekly_saving,
    older_than,
    fewer_than,
    pages_left,
    bus_stops,
    hourly_pay,
    rows_of_seats,
    double_and_share,
    one_step,
)
