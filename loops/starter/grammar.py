"""The words and sentence frames of the starter model's world.

Tables only: `corpus.py` draws from them. Their order is part of the recipe, because a
seeded draw depends on it: a changed, moved or added entry changes every dialogue that
follows, and with it the model that a training run gives.
"""

from __future__ import annotations

# ---------------------------------------------------------------------------- empathy

#: emotion -> (valence, adjectives from mild to strong)
EMOTIONS: dict[str, tuple[str, tuple[str, str, str]]] = {
    "joy": ("positive", ("happy", "delighted", "overjoyed")),
    "gratitude": ("positive", ("thankful", "grateful", "deeply grateful")),
    "pride": ("positive", ("pleased with myself", "proud", "incredibly proud")),
    "relief": ("positive", ("relieved", "so relieved", "enormously relieved")),
    "hope": ("positive", ("hopeful", "optimistic", "full of hope")),
    "trust": ("positive", ("reassured", "safe", "completely at ease")),
    "anticipation": ("positive", ("curious", "excited", "thrilled")),
    "surprise": ("neutral", ("surprised", "stunned", "completely shocked")),
    "sadness": ("negative", ("sad", "really down", "heartbroken")),
    "grief": ("negative", ("empty", "grief-stricken", "devastated")),
    "loneliness": ("negative", ("lonely", "isolated", "utterly alone")),
    "fear": ("negative", ("nervous", "scared", "terrified")),
    "anxiety": ("negative", ("uneasy", "anxious", "overwhelmed with worry")),
    "anger": ("negative", ("annoyed", "angry", "furious")),
    "frustration": ("negative", ("impatient", "frustrated", "at the end of my rope")),
    "disgust": ("negative", ("put off", "disgusted", "sickened")),
    "guilt": ("negative", ("regretful", "guilty", "consumed by guilt")),
    "shame": ("negative", ("embarrassed", "ashamed", "humiliated")),
    "disappointment": ("negative", ("let down", "disappointed", "crushed")),
    "jealousy": ("negative", ("envious", "jealous", "eaten up with jealousy")),
}

PEOPLE = ("mother", "father", "sister", "brother", "best friend", "partner", "neighbor",
          "coworker", "manager", "teacher", "daughter", "son", "roommate", "grandmother",
          "uncle", "cousin", "teammate", "coach")
PETS = ("dog", "cat", "rabbit", "parrot", "horse", "hamster")
TIMES = ("today", "yesterday", "this morning", "last night", "last week", "this weekend",
         "a few days ago", "on Monday", "on Friday")
PLACES = ("at work", "at school", "at home", "at the party", "in front of everyone",
          "on the train", "at dinner", "at the meeting")
JOBS = ("nurse", "engineer", "teacher", "designer", "driver", "writer", "cook", "manager")
SUBJECTS = ("math", "history", "biology", "chemistry", "driving", "piano", "language")
PROJECTS = ("garden", "novel", "website", "painting", "business", "podcast", "thesis", "song")
CITIES = ("Lisbon", "Oslo", "Nairobi", "Kyoto", "Toronto", "Lima", "Prague", "Cairo",
          "Dublin", "Hanoi", "Boston", "Madrid")

#: emotion -> (what the user tells, what a listener says back about the same thing)
SITUATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "joy": (
        ("my {person} surprised me with a visit {time}", "a surprise visit from your {person}"),
        ("we adopted a {pet} {time}", "welcoming a {pet} into your home"),
        ("I laughed all evening with my {person}", "an evening full of laughter with your {person}"),
        ("my {person} and I danced in the kitchen {time}", "dancing in the kitchen with your {person}"),
        ("the whole family sat together at dinner for the first time in years",
         "having the whole family together"),
        ("I saw the sea for the first time {time}", "seeing the sea for the first time"),
    ),
    "gratitude": (
        ("my {person} drove for hours just to help me move", "how your {person} showed up for you"),
        ("my {person} stayed with me at the hospital {time}", "having your {person} by your side"),
        ("a stranger returned my lost wallet {time}", "that small act of kindness from a stranger"),
        ("my {person} cooked for me every day while I was sick", "how your {person} took care of you"),
        ("my {person} lent me money when I could not pay the rent", "your {person} helping you out"),
        ("a nurse held my hand all night", "that nurse staying with you"),
    ),
    "pride": (
        ("I finally passed my {subject} exam {time}", "passing your {subject} exam"),
        ("I finished my {project} after two years of work", "finishing your {project}"),
        ("I got promoted to lead {job} {time}", "your promotion to lead {job}"),
        ("I ran ten miles {time} without stopping", "running ten miles"),
        ("I stood up for my {person} {place}", "standing up for your {person}"),
        ("I have not had a drink for a year", "a whole year without a drink"),
    ),
    "relief": (
        ("the doctor said my {person} is going to be fine", "the good news about your {person}"),
        ("my {pet} came home after being lost for days", "having your {pet} safe at home"),
        ("my {subject} exam is over and it went well", "getting through your {subject} exam"),
        ("the test results came back and I am healthy", "those test results"),
        ("I finally paid off all my debt", "being free of debt"),
        ("my {person} and I talked it out {time}", "clearing the air with your {person}"),
    ),
    "hope": (
        ("I have a new treatment plan and it seems to be working", "the new treatment plan"),
        ("my {person} called and wants to make peace", "that call from your {person}"),
        ("I am starting a {project} of my own {time}", "starting your own {project}"),
        ("the new medicine lets my {person} sleep at night", "your {person} finally sleeping"),
        ("they invited me to a second interview as a {job}", "that second interview"),
        ("my {pet} is eating again after weeks", "your {pet} eating again"),
    ),
    "trust": (
        ("my {person} kept my secret when it mattered", "how your {person} kept your secret"),
        ("my {person} listened to me without judging", "being heard by your {person}"),
        ("my new {job} mentor really looks out for me", "having a mentor who looks out for you"),
        ("my {person} told me the truth even though it was hard", "your {person} being honest with you"),
        ("my {person} never made fun of my fears", "how your {person} treats your fears"),
        ("I let my {person} read my diary", "sharing your diary with your {person}"),
    ),
    "anticipation": (
        ("I am moving to {city} next month", "your move to {city}"),
        ("my {person} and I are planning a trip to {city}", "the trip to {city} with your {person}"),
        ("I start my first job as a {job} on Monday", "your first job as a {job}"),
        ("I will meet my {person} at the airport tomorrow", "meeting your {person} at the airport"),
        ("my {project} will be shown in {city} next month", "showing your {project} in {city}"),
        ("we are getting a {pet} next week", "the {pet} that is coming next week"),
    ),
    "surprise": (
        ("my {person} told me they are moving to {city}", "hearing that your {person} is moving to {city}"),
        ("I won a prize for my {project} {time}", "winning a prize for your {project}"),
        ("my {person} quit their job as a {job} {time}", "your {person} suddenly quitting"),
        ("I found an old letter from my {person} {time}", "finding that old letter from your {person}"),
        ("my {person} is getting married in {city}", "your {person} getting married"),
        ("they called to say I was adopted", "finding out that you were adopted"),
    ),
    "sadness": (
        ("my {person} and I stopped talking {time}", "losing touch with your {person}"),
        ("I had to sell the house I grew up in", "saying goodbye to your childhood home"),
        ("my {person} moved away to {city}", "your {person} moving so far away"),
        ("I cry every night since my {person} left", "your {person} leaving"),
        ("my {person} is in hospital and nobody tells me anything", "your {person} being in hospital"),
        ("my parents are getting a divorce", "your parents' divorce"),
    ),
    "grief": (
        ("my {pet} died {time}", "losing your {pet}"),
        ("my {person} passed away {time}", "losing your {person}"),
        ("it is one year since my {person} died", "this first year without your {person}"),
        ("I still set the table for my {person} who died", "missing your {person} at the table"),
        ("we buried my {person} {time}", "burying your {person}"),
        ("I lost the baby {time}", "losing your baby"),
    ),
    "loneliness": (
        ("I moved to {city} and I know nobody here", "starting over in {city} without anyone you know"),
        ("I ate alone again {place}", "eating alone again"),
        ("my {person} never calls me anymore", "not hearing from your {person}"),
        ("everyone at my new school ignores me", "being ignored at your new school"),
        ("I spent my birthday by myself", "spending your birthday by yourself"),
        ("I have nobody to talk to in {city}", "having nobody to talk to"),
    ),
    "fear": (
        ("I have surgery {time_next} and I cannot stop thinking about it", "the surgery ahead of you"),
        ("someone followed me home {time}", "being followed home"),
        ("my {person} is very sick", "your {person} being so sick"),
        ("the doctor found a lump {time}", "waiting to know what the lump is"),
        ("I hear someone at my door every night", "those sounds at your door"),
        ("my {person} threatens me {place}", "being threatened by your {person}"),
    ),
    "anxiety": (
        ("I have my {subject} exam tomorrow and I cannot sleep", "your {subject} exam tomorrow"),
        ("I might lose my job as a {job}", "not knowing whether your job is safe"),
        ("I have to give a speech {place}", "giving that speech"),
        ("I cannot pay the rent this month", "not being able to pay the rent"),
        ("I have nightmares about my {subject} exam", "those nightmares about your {subject} exam"),
        ("my heart races whenever I am {place}", "your heart racing like that"),
    ),
    "anger": (
        ("my {person} lied to me {time}", "being lied to by your {person}"),
        ("my {person} took credit for my {project}", "your {person} taking credit for your {project}"),
        ("my {person} yelled at me {place}", "being yelled at by your {person}"),
        ("my {person} read my messages without asking", "your {person} reading your messages"),
        ("they fired me {time} without a reason", "being fired without a reason"),
        ("my {person} broke my {project} on purpose", "your {person} breaking your {project}"),
    ),
    "frustration": (
        ("my {project} keeps failing no matter what I try",
         "working so hard on your {project} without results"),
        ("my {person} never listens to me", "not being heard by your {person}"),
        ("I have been waiting for an answer about my job for weeks", "weeks of waiting for an answer"),
        ("I explained it five times and my {person} still does it wrong", "explaining it again and again"),
        ("my computer deleted my {project} {time}", "losing your {project} like that"),
        ("the doctor sends me from one office to the next", "being sent from office to office"),
    ),
    "disgust": (
        ("my {person} made cruel jokes about a sick man {place}", "those cruel jokes from your {person}"),
        ("someone dumped trash all over our street {time}", "seeing your street treated like that"),
        ("my {person} was proud of cheating {place}", "your {person} bragging about cheating"),
        ("my {person} kicks the {pet} for fun", "your {person} hurting the {pet}"),
        ("I found out how they treat old people there", "how they treat old people there"),
        ("a man spat at a woman {place}", "what that man did"),
    ),
    "guilt": (
        ("I forgot my {person}'s birthday", "forgetting your {person}'s birthday"),
        ("I shouted at my {person} {time}", "shouting at your {person}"),
        ("I broke a promise to my {person}", "breaking that promise to your {person}"),
        ("I was not there when my {person} died", "not being there when your {person} died"),
        ("I blamed my {person} for something I did", "letting your {person} take the blame"),
        ("I have not visited my {person} for months", "not visiting your {person}"),
    ),
    "shame": (
        ("I failed my {subject} exam again", "failing your {subject} exam"),
        ("I cried {place}", "crying where others could see"),
        ("I made a big mistake {place} and everyone noticed", "making a mistake that everyone saw"),
        ("my {person} found out that I lied", "your {person} finding out that you lied"),
        ("they laughed at my {project} {place}", "being laughed at for your {project}"),
        ("I had to ask my {person} for food", "asking your {person} for food"),
    ),
    "disappointment": (
        ("I did not get the {job} job I wanted", "not getting the {job} job"),
        ("my {person} forgot about our plans {time}", "your {person} forgetting your plans"),
        ("nobody came to see my {project}", "nobody showing up for your {project}"),
        ("my {person} did not come to my graduation", "your {person} missing your graduation"),
        ("the trip to {city} was cancelled", "the trip to {city} being cancelled"),
        ("I trained for months and came last", "coming last after months of training"),
    ),
    "jealousy": (
        ("my {person} got the {job} job that I wanted", "watching your {person} get the job you wanted"),
        ("my {person} spends all their time with someone else", "feeling replaced in your {person}'s life"),
        ("everyone loves my {person}'s {project} and ignores mine",
         "seeing your {person}'s {project} get all the praise"),
        ("my {person} got engaged and I am still single", "watching your {person} get engaged"),
        ("my parents always praise my {person} and never me", "your parents praising only your {person}"),
        ("my {person} moved into a big house in {city}", "seeing your {person} move into that house"),
    ),
}

TELLING = (
    "{Situation}. I feel {adj}.",
    "I feel {adj} because {situation}.",
    "{Situation}, and I am {adj}.",
    "I don't know what to say. {Situation}. I am {adj}.",
    "Can I tell you something? {Situation}, and it makes me feel {adj}.",
    "{Situation}. I'm {adj} and I wanted to tell someone.",
    "Honestly, I'm {adj}. {Situation}.",
)

#: the feeling is left for the listener to find
TELLING_PLAIN = (
    "{Situation}.",
    "{Situation}. I don't know what to say.",
    "Can I tell you something? {Situation}.",
    "{Situation}. I wanted to tell someone.",
    "I keep thinking about it: {situation}.",
)

#: per valence: opening, naming the feeling, holding it, picture (a figure of speech), next step
REPLIES: dict[str, dict[str, tuple[str, ...]]] = {
    "negative": {
        "open": (
            "I'm so sorry you are going through this.",
            "Thank you for telling me. That sounds really hard.",
            "I'm really sorry. That must hurt.",
            "Oh, I'm sorry to hear that.",
            "That is a lot to carry.",
        ),
        "name": (
            "It makes sense that {topic} leaves you feeling {adj}.",
            "Anyone in your place could feel {adj} after {topic}.",
            "{Topic} would shake most people, and feeling {adj} is a natural response.",
            "I can hear how {adj} you are about {topic}.",
        ),
        "hold": (
            "Your feelings are valid, and you don't have to face them alone.",
            "Please be gentle with yourself today.",
            "You are allowed to take all the time you need.",
            "There is nothing wrong with you for feeling this way.",
        ),
        "picture": (
            "Feelings like this come in waves, and even the biggest wave passes.",
            "Right now it may feel like walking through fog, but fog does lift.",
            "It can sit on your chest like a heavy stone.",
            "Healing is like a slow sunrise, and it does not need to be rushed.",
        ),
        "next": (
            "What part of it feels heaviest right now?",
            "Would you like to tell me more about what happened?",
            "Is there someone close to you who could be with you today?",
            "What would help you feel a little safer tonight?",
            "I'm here, and I'm listening.",
        ),
    },
    "positive": {
        "open": (
            "That is wonderful news!",
            "I'm so happy for you!",
            "Thank you for sharing this with me, it made me smile.",
            "What a lovely thing to hear!",
            "That sounds amazing!",
        ),
        "name": (
            "It makes sense that you feel {adj} about {topic}.",
            "I can hear how {adj} you are, and {topic} is worth celebrating.",
            "{Topic} is a good reason to feel {adj}.",
            "You have every right to feel {adj} about {topic}.",
        ),
        "hold": (
            "Moments like this deserve to be enjoyed slowly.",
            "You earned this feeling, so let it stay a while.",
            "I hope you let yourself enjoy every bit of it.",
            "It says something good about you and the people around you.",
        ),
        "picture": (
            "It is like opening a window and letting the sun in.",
            "A moment like this is a small lantern you can carry for a long time.",
            "Joy like this grows like a garden when you share it.",
            "It sounds like a weight turned into wings.",
        ),
        "next": (
            "What was the best part of it?",
            "How are you going to celebrate?",
            "Who would you like to share it with?",
            "What does it mean to you?",
            "I would love to hear more.",
        ),
    },
    "neutral": {
        "open": (
            "Wow, I did not see that coming!",
            "That is a lot to take in.",
            "Oh, what a turn of events!",
            "That must have caught you off guard.",
            "Thank you for telling me, that is big news.",
        ),
        "name": (
            "It makes sense that {topic} left you feeling {adj}.",
            "Anyone would feel {adj} after {topic}.",
            "{Topic} is a lot to process, so feeling {adj} is natural.",
            "I can hear how {adj} you are about {topic}.",
        ),
        "hold": (
            "You don't have to know right away what it means for you.",
            "It is fine to need some time with it.",
            "Mixed feelings are welcome here.",
            "You can take it one step at a time.",
        ),
        "picture": (
            "It can feel like the ground moved under your feet.",
            "News like this lands like a stone in still water.",
            "It is like turning a page and finding a different story.",
            "Sometimes life changes direction like the wind.",
        ),
        "next": (
            "How do you feel about it now?",
            "What was your first thought?",
            "Do you see it as good news or bad news?",
            "Would you like to talk it through?",
            "What do you think happens next?",
        ),
    },
}

FOLLOW_UPS = (
    ("Thank you. I think I just needed someone to listen.",
     "I'm glad you reached out. You can come back to this whenever you need to, and I will listen."),
    ("I don't know how to talk to them about it.",
     ("You could start small, with one honest sentence about how you feel. "
      "You do not have to solve everything at once.")),
    ("Do you think it will get better?",
     ("I do. Feelings change, even when they seem stuck, "
      "and you have already taken a step by talking about it.")),
    ("What should I do now?",
     ("Maybe begin with something simple: rest, drink some water, and write down what you need most. "
      "Then we can look at the next step together.")),
)

# ------------------------------------------------------------------------- other tasks

TOOLS = (
    ("get_weather", "What is the weather in {city} {day}?", ("city", "day")),
    ("search_web", "Search the web for news about {topic}.", ("topic",)),
    ("set_reminder", "Remind me to {task} {day} at {hour}.", ("task", "day", "hour")),
    ("send_email", "Send an email to {name} about {topic}.", ("name", "topic")),
    ("book_flight", "Book a flight from {city} to {city_to} {day}.", ("city", "city_to", "day")),
    ("convert_currency", "How much is {amount} {currency} in {currency_to}?",
     ("amount", "currency", "currency_to")),
)
DAYS = ("today", "tomorrow", "on Monday", "on Tuesday", "on Wednesday", "on Thursday", "on Friday")
TOPICS = ("solar power", "space travel", "ocean cleanup", "electric cars", "city parks",
          "public libraries", "heart health", "wild bees", "chess", "robotics")
TASKS = ("call the dentist", "water the plants", "pay the rent", "buy milk", "send the report",
         "feed the cat", "book a table")
NAMES = ("Amara", "Bruno", "Chloe", "Dmitri", "Elena", "Farid", "Grace", "Hiro", "Ines", "Jonas")
CURRENCIES = ("euros", "dollars", "yen", "pounds", "pesos", "rupees")
COLORS = ("red", "blue", "green", "white", "black", "yellow")
ROOMS = ("library", "museum", "clinic", "bakery", "harbor", "school", "garden", "station")
