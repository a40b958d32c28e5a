"""Synthetic rows to try things out with: tasks whose answers follow from the question, all different.

Names, medicines, companies and figures are invented. Each answer occurs once, and so do the figures that a question
asks to reckon with, whoever they are about: no split can hold the answer to a question of another, and what is learnt
from one split is the way to the answer.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from random import Random

from calibration_data.text import Turn
from loops.finetune.faults import DatasetRefused
from loops.finetune.records import Row

MAX_ROWS = 20_000

_FIRST = ("Amara", "Bruno", "Chiara", "Dilek", "Emil", "Farida", "Goran", "Hana", "Ivo", "Jasmin", "Kenji", "Leila",
          "Mateo", "Nadia", "Otis", "Priya", "Quentin", "Rosa", "Samir", "Tove", "Uma", "Viktor", "Wanda", "Yusuf")
_LAST = ("Abe", "Brandt", "Costa", "Duarte", "Eriksen", "Fontaine", "Gruber", "Haddad", "Ito", "Jansen", "Kowalski",
         "Lindqvist", "Marino", "Novak", "Okafor", "Petrov", "Quist", "Rahman", "Schuster", "Tanaka", "Vogel",
         "Zanetti")
_FIRMS = ("Alder", "Birchwood", "Cobalt", "Dunmore", "Elmstead", "Fairhaven", "Granite", "Hollin", "Ivory", "Juniper",
          "Kestrel", "Larkfield", "Meridian", "Northgate", "Orchard", "Pinecrest", "Quarry", "Redwater", "Silverton")
_TRADES = ("Bakery", "Bearings", "Cycles", "Freight", "Glass", "Instruments", "Joinery", "Lighting", "Logistics",
           "Optics", "Paper", "Pumps", "Software", "Textiles", "Tools")
_TOWNS = ("Ashbourne", "Brackley", "Caldwell", "Dorning", "Eastmere", "Fallowfield", "Greyport", "Hartwell",
          "Inverley", "Kingsford", "Lowestone", "Marlow Bay")
_MEDICINES = ("Avelorin", "Brimetol", "Cardivex", "Domexil", "Elvaprin", "Fenotrix", "Glucarel", "Hepravin", "Isolamet",
              "Juvacor", "Kelzanol", "Lumidrine", "Mervotal", "Nolvadrex", "Oxirelin", "Pravitone")

#: what an answer is reckoned from
_FIGURES = re.compile(r"\d[\d,.:]*\d|\d|January|February|March|April|May|June|July|August|September|October|November"
                      r"|December")
#: what a task makes: its question, what the question is about, and the answer
Made = tuple[str, str, str]


def generate(domain: str, count: int, seed: int = 0) -> list[Row]:
    """Return rows of a domain, the same for the same seed, from all its tasks in turn; the label names the task.

    A domain that has no tasks of its own gets those of GENERAL, which show the way and teach nothing of the field.

    Raises:
        DatasetRefused: more rows are asked for than MAX_ROWS.
    """
    if count > MAX_ROWS:
        raise DatasetRefused(f"--sample makes at most {MAX_ROWS:,} rows.")
    chance = Random(f"{domain} {seed}")
    tasks = list(TASKS.get(domain, GENERAL).items())
    rows: list[Row] = []
    seen: set[str | tuple[str, ...]] = set()
    while len(rows) < count:
        label, task = tasks[len(rows) % len(tasks)]
        question, context, answer = task(chance)
        facts = (answer,) if context else sorted(_FIGURES.findall(question))
        made: set[str | tuple[str, ...]] = {answer, (label, *facts)}
        if seen & made:
            continue
        seen |= made
        rows.append(Row(f"sample-{domain}:{len(rows) + 1:05}", (Turn("user", question), Turn("assistant", answer)),
                        context, label))
    return rows


def _person(chance: Random) -> str:
    return f"{chance.choice(_FIRST)} {chance.choice(_LAST)}"


def _firm(chance: Random) -> str:
    return f"{chance.choice(_FIRMS)} {chance.choice(_TRADES)}"


def _date(chance: Random) -> datetime.date:
    return datetime.date(2021, 1, 1) + datetime.timedelta(days=chance.randrange(2500))


def _on(date: datetime.date) -> str:
    return f"{date.day} {date:%B %Y}"


def _money(amount: float) -> str:
    return f"{amount:,.2f} euros"


def _dose(chance: Random) -> Made:
    name, medicine = _person(chance), chance.choice(_MEDICINES)
    weight, per_kg, times = chance.randint(12, 110), chance.randint(2, 25), chance.randint(2, 4)
    day = weight * per_kg
    question = chance.choice((
        f"{name} weighs {weight} kg. {medicine} is given at {per_kg} mg/kg a day in {times} doses. How much is each?",
        f"Work out a single dose of {medicine}: {per_kg} mg/kg a day, divided by {times}, for {name} with {weight} kg.",
        f"How many mg of {medicine} does {name} ({weight} kg) get a time, at {per_kg} mg/kg/day in {times} doses?"))
    return question, "", (f"{per_kg} mg times {weight} kg is {day:,} mg a day; in {times} doses {name} gets "
                          f"{day / times:,.1f} mg of {medicine} each time.")


def _bmi(chance: Random) -> Made:
    name, weight, height = _person(chance), chance.randint(42, 135), chance.randint(148, 202)
    bmi = weight / (height / 100) ** 2
    kind = next(told for bound, told in (
        (18.5, "underweight"), (25, "normal weight"), (30, "overweight"), (999, "obesity")) if bmi < bound)
    question = chance.choice((f"What is the body mass index of {name}, {height} cm and {weight} kg?",
                              f"{name} is {height} cm tall and weighs {weight} kg. Compute the BMI and its class.",
                              f"Patient {name}: height {height} cm, weight {weight} kg. BMI?"))
    return question, "", f"The BMI of {name} is {bmi:.1f} kg/m², which the WHO classes as {kind}."


def _infusion(chance: Random) -> Made:
    name, volume = _person(chance), chance.choice(range(250, 3001, 10))
    hours = chance.randint(2, 24)
    question = chance.choice((f"{volume} mL are to run in over {hours} hours for {name}. What rate do I set?",
                              f"Set the pump for {name}: {volume} mL in {hours} h.",
                              f"How many mL per hour for {name}'s infusion of {volume} mL to end after {hours} h?"))
    return question, "", (f"Divide {volume} mL by {hours} hours: {name}'s pump runs at {volume / hours:.1f} mL/h, "
                          f"which is {volume * 20 / hours / 60:.0f} drops a minute at 20 drops per mL.")


def _glucose(chance: Random) -> Made:
    name, before, value = _person(chance), chance.randint(45, 380), chance.randint(45, 380)
    told = "low" if value < 70 else "in range" if value < 100 else "raised" if value < 126 else "high"
    question = chance.choice((
        f"{name}'s fasting glucose was {before} mg/dL, and is {value} mg/dL now. Convert both and interpret the last.",
        f"Fasting sugar of {name}: first {before} mg/dL, then {value} mg/dL. In mmol/L, and is the latter in range?"))
    return question, "", (f"{before} mg/dL are {before / 18.016:.1f} mmol/L, and {value} mg/dL "
                          f"{value / 18.016:.1f} mmol/L; for a fasting value {name}'s last result is {told} "
                          "(70 to 99 mg/dL is in range).")


def _balance_of_fluids(chance: Random) -> Made:
    name, drunk, infused = _person(chance), chance.choice(range(300, 2600, 10)), chance.choice(range(0, 2100, 50))
    out = chance.choice(range(500, 3900, 10))
    total = drunk + infused - out
    question = chance.choice((
        f"{name} drank {drunk} mL, got {infused} mL by vein and passed {out} mL. Fluid balance?",
        f"Intake {drunk} mL by mouth and {infused} mL by vein, output {out} mL: what is {name}'s balance for the day?"))
    return question, "", f"{drunk} plus {infused} minus {out} gives {name} a balance of {total:+,} mL for the day."


def _appointment(chance: Random) -> Made:
    name, doctor, town, date = _person(chance), chance.choice(_LAST), chance.choice(_TOWNS), _on(_date(chance))
    what = chance.choice(("a control of the blood pressure", "removal of stitches", "a vaccination",
                          "an ultrasound scan", "a hearing test", "a talk about blood results", "a check of the wound"))
    time = f"{chance.randint(8, 17)}:{chance.choice(('00', '10', '20', '30', '40', '50'))}"
    note = chance.choice((
        f"Dr. {doctor}'s surgery in {town} called: {name} is to come on {date} at {time} for {what}. Bring the card.",
        f"Note for the file. {name}, seen today by Dr. {doctor}, {town}. Next visit {date}, {time}: {what}.",
        f"Please tell {name} that {what} is now on {date}, {time}, with Dr. {doctor} at the {town} practice."))
    question = chance.choice(("When and for what is the appointment?", "Sum up this note in one sentence.",
                              "Who has to come, when, where and why?"))
    return question, note, f"{name} has an appointment for {what} on {date} at {time} with Dr. {doctor} in {town}."


def _compound(chance: Random) -> Made:
    name, start, rate, years = _person(chance), chance.choice(range(500, 60000, 250)), chance.randint(5, 75) / 10, \
        chance.randint(2, 25)
    end = start * (1 + rate / 100) ** years
    question = chance.choice((
        f"{name} invests {start:,} euros at {rate} % a year. What is it worth after {years} years?",
        f"How does {start:,} euros grow in {years} years at {rate} % compound interest for {name}?",
        f"A deposit of {name}: {start:,} euros, {rate} % yearly, {years} years, interest added. The final amount?"))
    return question, "", (f"With compound interest {name} has {_money(end)} after {years} years, {_money(end - start)} "
                          "of it interest.")


def _loan(chance: Random) -> Made:
    name, lent, rate, years = _person(chance), chance.choice(range(2000, 300000, 500)), chance.randint(10, 95) / 10, \
        chance.randint(2, 30)
    month = rate / 1200
    due = lent * month / (1 - (1 + month) ** (-12 * years))
    question = chance.choice((
        f"{name} borrows {lent:,} euros at {rate} % over {years} years. What is the monthly payment?",
        f"Monthly rate for a loan of {lent:,} euros, {years} years, {rate} % nominal, borrower {name}?"))
    return question, "", (f"An annuity loan costs {name} {_money(due)} a month, {_money(due * 12 * years)} over "
                          f"{12 * years} months.")


def _margin(chance: Random) -> Made:
    firm, revenue = _firm(chance), chance.choice(range(40, 9000)) * 1000
    cost = round(revenue * chance.uniform(0.55, 1.15), -3)
    question = chance.choice((
        f"{firm} had revenue of {revenue:,} euros and costs of {cost:,.0f} euros. What is the operating margin?",
        f"Revenue {revenue:,}, operating costs {cost:,.0f}: how profitable was {firm}?"))
    return question, "", (f"{firm} made {revenue - cost:,.0f} euros, an operating margin of "
                          f"{(revenue - cost) / revenue:.1%} of its revenue.")


def _break_even(chance: Random) -> Made:
    firm, fixed, unit = _firm(chance), chance.choice(range(5, 900)) * 1000, chance.randint(4, 300)
    price = unit + chance.randint(2, 260)
    units = -(-fixed // (price - unit))
    question = chance.choice((
        f"{firm} sells a part for {price} euros that costs {unit} to make; fixed costs: {fixed:,}. Break-even point?",
        f"How many pieces must {firm} sell at {price} euros (variable cost {unit}) to cover {fixed:,} euros?"))
    return question, "", (f"Each piece contributes {price - unit} euros, so {firm} breaks even at {units:,} pieces, "
                          f"which is revenue of {units * price:,} euros.")


def _budget(chance: Random) -> Made:
    name, income = _person(chance), chance.choice(range(1600, 7800, 20))
    rent, food, other = (int(income * chance.uniform(*share)) for share in ((0.2, 0.42), (0.08, 0.2), (0.05, 0.28)))
    left = income - rent - food - other
    question = chance.choice((
        f"{name} earns {income:,} and pays {rent:,} rent, {food:,} for food, {other:,} for the rest. What is saved?",
        f"Monthly budget: income {income:,}, rent {rent:,}, food {food:,}, other {other:,}. What is left to {name}?"))
    return question, "", (f"{name} has {left:,} euros left each month, {left / income:.1%} of the income; rent takes "
                          f"{rent / income:.1%}.")


def _booking(chance: Random) -> Made:
    kind, shops = chance.choice((("groceries", ("Corner Grocer", "Green Market", "Fresh Barn")),
                                 ("transport", ("City Tram", "Northern Rail", "Bike Share")),
                                 ("insurance", ("Harbour Mutual", "Shield Life", "Anchor Cover")),
                                 ("rent", ("Oakfield Homes", "Town Housing", "Riverside Lets")),
                                 ("leisure", ("Old Cinema", "Swim Hall", "Book Cellar"))))
    shop, town, date = chance.choice(shops), chance.choice(_TOWNS), _date(chance)
    amount = chance.randint(350, 98000) / 100
    line = f"{date} {shop.upper()} {town.upper()} REF {chance.randrange(10**6):06} -{amount:.2f} EUR"
    question = chance.choice(("Which kind of spending is this booking?", "Classify this line of a bank statement.",
                              "What was paid here, and for what?"))
    return question, line, f"{_money(amount)} went to {shop} in {town} on {_on(date)}; this is {kind}."


def _notice(chance: Random) -> Made:
    name, firm, end, weeks = _person(chance), _firm(chance), _date(chance), chance.randint(2, 26)
    last = end - datetime.timedelta(weeks=weeks)
    question = chance.choice((
        f"{name}'s contract with {firm} can be ended to {_on(end)} with {weeks} weeks' notice. What is the last day?",
        f"By when must {firm} get {name}'s notice, given {weeks} weeks before {_on(end)}?"))
    return question, "", (f"{weeks} weeks before {_on(end)} is {_on(last)}, a {last:%A}; the notice of {name} must "
                          f"reach {firm} by then.")


def _clause(chance: Random) -> Made:
    one, other, town, days = _firm(chance), _firm(chance), chance.choice(_TOWNS), chance.randint(5, 120)
    amount = chance.choice(range(5, 900)) * 1000
    kind, text, told = chance.choice((
        ("termination", f"{one} may end this agreement with {other} by {days} days' notice in writing.",
         f"{one} can leave after {days} days' notice"),
        ("confidentiality", f"{other} shall keep what it learns of {one} secret for {days} months after the end.",
         f"{other} stays silent about {one} for {days} months"),
        ("payment", f"{other} shall pay {one} {amount:,} euros within {days} days of the invoice.",
         f"{other} owes {one} {amount:,} euros {days} days after the invoice"),
        ("liability", f"The liability of {one} towards {other} is limited to {amount:,} euros a year.",
         f"{one} answers to {other} for {amount:,} euros a year at most"),
        ("jurisdiction", f"Disputes between {one} and {other} are for the courts of {town} after {days} days of talks.",
         f"{one} and {other} go to court in {town}, after {days} days of talks")))
    question = chance.choice(("What kind of clause is this, and what does it say?",
                              "Explain this clause in plain words.",
                              "Name the kind of clause and sum it up."))
    return question, text, f"It is a {kind} clause: {told}."


def _late_interest(chance: Random) -> Made:
    firm, due = _firm(chance), chance.choice(range(300, 90000, 10))
    rate, days = chance.randint(4, 12), chance.randint(8, 400)
    question = chance.choice((
        f"An invoice of {firm} over {due:,} euros is {days} days late. What is the interest at {rate} % a year?",
        f"{firm} claims {rate} % default interest on {due:,} euros for {days} days. How much is that?"))
    return question, "", (f"{firm} may claim {_money(due * rate / 100 * days / 365)} of interest: {due:,} euros times "
                          f"{rate} % times {days} of 365 days.")


def _parties(chance: Random) -> Made:
    seller, buyer, town, date = _person(chance), _firm(chance), chance.choice(_TOWNS), _on(_date(chance))
    thing = chance.choice(("a delivery van", "a printing press", "the shop fittings", "a plot of land", "a used lathe"))
    price = chance.choice(range(3, 700)) * 500
    text = chance.choice((
        f"On {date} in {town}, {seller} sold {thing} to {buyer} for {price:,} euros, payable on delivery.",
        f"Between {seller} (seller) and {buyer} (buyer), {town}, {date}: {thing}, price {price:,} euros."))
    question = chance.choice(("Who sells what to whom, and for how much?",
                              "List the parties, the object and the price.",
                              "Sum up this contract in a sentence."))
    return question, text, f"{seller} sells {thing} to {buyer} for {price:,} euros; signed in {town} on {date}."


def _limitation(chance: Random) -> Made:
    name, arose, years = _person(chance), _date(chance), chance.randint(2, 10)
    question = chance.choice((
        f"A claim of {name} arose on {_on(arose)}; it lapses {years} years after the end of that year. When?",
        f"Limitation of {years} years from the end of the year, claim of {_on(arose)} by {name}: last day?"))
    return question, "", (f"The time runs from the end of {arose.year}, so the claim of {name} from {_on(arose)} "
                          f"lapses at the end of 31 December {arose.year + years}.")


def _shares(chance: Random) -> Made:
    name, estate, children = _person(chance), chance.choice(range(20, 2000)) * 1000, chance.randint(2, 6)
    question = chance.choice((
        f"{name} leaves {estate:,} euros, half to the spouse, the rest to {children} children. Each part?",
        f"Estate of {name}: {estate:,} euros. Spouse one half, children ({children}) in equal parts. Work it out."))
    return question, "", (f"The spouse of {name} gets {_money(estate / 2)}, and each of the {children} "
                          f"children {_money(estate / 2 / children)}.")


def _stock(chance: Random) -> Made:
    firm, there, sold, came = _firm(chance), chance.randint(120, 2400), chance.randint(5, 119), chance.randint(3, 900)
    question = chance.choice((
        f"{firm} has {there:,} boxes in store, sells {sold} and gets {came} more. How many are there then?",
        f"Stock of {firm}: {there:,} boxes, minus {sold} sold, plus {came} delivered. What is left?"))
    return question, "", f"{there:,} minus {sold} plus {came} leaves {firm} with {there - sold + came:,} boxes."


def _end(chance: Random) -> Made:
    name, start, minutes = _person(chance), chance.randrange(360, 1080, 5), chance.randint(11, 340)
    begun, done = (f"{time // 60}:{time % 60:02}" for time in (start, start + minutes))
    question = chance.choice((f"{name} begins at {begun} and needs {minutes} minutes. When is the work done?",
                              f"A job of {minutes} minutes that {name} starts at {begun} ends at what time?"))
    return question, "", f"{minutes} minutes after {begun} it is {done}; then {name} is done."


def _price(chance: Random) -> Made:
    firm, count, cents = _firm(chance), chance.randint(3, 240), chance.randint(45, 9900)
    off = chance.choice((3, 5, 8, 12))
    question = chance.choice((
        f"{firm} orders {count} pieces at {cents / 100:.2f} euros with {off} % off. What is to be paid?",
        f"{count} pieces, {cents / 100:.2f} euros each, discount {off} %: the amount that {firm} owes?"))
    return question, "", (f"{count} pieces cost {_money(count * cents / 100)}; less {off} % {firm} pays "
                          f"{_money(count * cents * (100 - off) / 10000)}.")


def _mean(chance: Random) -> Made:
    name, values = _person(chance), [chance.randint(10, 990) for _ in range(4)]
    listed = ", ".join(map(str, values))
    question = chance.choice((f"{name} measured {listed}. What is the mean, and how far apart are the extremes?",
                              f"Mean and range of the four readings of {name}: {listed}?"))
    return question, "", (f"The readings of {name} have the mean {sum(values) / 4:.2f} and a range of "
                          f"{max(values) - min(values)}.")


def _request(chance: Random) -> Made:
    name, firm, town, date = _person(chance), _firm(chance), chance.choice(_TOWNS), _on(_date(chance))
    kind, wish = chance.choice((("complaint", "says that what came was broken and wants it replaced"),
                                ("order", "wants the same delivery as last time"),
                                ("question", "would like to know when somebody is there"),
                                ("praise", "thanks for the quick help"), ("cancellation", "no longer wants the visit")))
    note = chance.choice((f"{name} of {firm} wrote from {town} on {date} and {wish}.",
                          f"Message of {date}, {town}: {name} ({firm}) {wish}."))
    question = chance.choice(("What kind of message is this, and from whom?", "Sum up this message, with its kind.",
                              "Who writes, from where, when, and what for?"))
    return question, note, f"It is a {kind}: {name} of {firm}, {town}, {wish} ({date})."


#: by domain and name
TASKS: dict[str, dict[str, Callable[[Random], Made]]] = {
    "healthcare": {"dose": _dose, "body mass index": _bmi, "infusion rate": _infusion, "glucose": _glucose,
                   "fluid balance": _balance_of_fluids, "appointment": _appointment},
    "legal": {"notice": _notice, "clause": _clause, "late interest": _late_interest, "parties": _parties,
              "limitation": _limitation, "inheritance": _shares},
    "finance": {"compound interest": _compound, "loan": _loan, "margin": _margin, "break-even": _break_even,
                "budget": _budget, "booking": _booking},
}
#: for every other domain
GENERAL: dict[str, Callable[[Random], Made]] = {
    "stock": _stock, "end of work": _end, "price": _price, "mean": _mean, "request": _request,
}
