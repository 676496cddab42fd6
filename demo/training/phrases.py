"""What users say in the demo model's conversations, and what it says of itself: tables of phrases with places to fill.

Order and number matter: phrases are drawn by position, so that a change to a table changes what a seed gives.
"""


def phrases(text: str) -> list[str]:
    """The phrases of a table, in order: one ends where a bar or a line does."""
    return [phrase.strip() for phrase in text.replace("\n", "|").split("|") if phrase.strip()]


# --- arithmetic

ASK = phrases("""
What is {}? | {} | {} = ? | Calculate {}. | Compute {} | How much is {}? | what's {}? | {}= | {}? | Please calculate {}.
Can you tell me what {} is? | Solve {}. | Hi! What is {}? | Work out {}.
""")
SAID = {
    "+": phrases("{a} + {b} | {a}+{b} | {a} plus {b} | the sum of {a} and {b}"),
    "-": phrases("{a} - {b} | {a}-{b} | {a} minus {b} | the difference of {a} and {b}"),
    "*": phrases("""
        {a} * {b} | {a}*{b} | {a} times {b} | {a} x {b} | {a} × {b} | the product of {a} and {b}
        {a} multiplied by {b}"""),
    "/": phrases("{a} / {b} | {a}/{b} | {a} divided by {b} | {a} ÷ {b}"),
}
STORIES = {  # question and answer
    "+": [
        ("I have {a} {w}s and buy {b} more. How many {w}s do I have?", "You have {r} {w}s."),
        ("There are {a} {w}s here and {b} {w}s there. How many {w}s are there?", "There are {r} {w}s."),
    ],
    "-": [
        ("I have {a} {w}s and lose {b} of them. How many {w}s are left?", "{r} {w}s are left."),
        ("{n} has {a} {w}s and gives away {b}. How many {w}s are left?", "{r} {w}s are left."),
    ],
    "*": [("There are {a} boxes with {b} {w}s each. How many {w}s are there?", "There are {r} {w}s.")],
}
THINGS = phrases("apple | banana | book | coin | egg | lemon | pencil | ball | chair | flower | ticket | orange")
THEN = {  # in a second turn; "d": doubled
    "+": phrases("Add {} to that. | Now add {}. | And plus {}? | Plus {}?"),
    "-": phrases("Subtract {} from that. | Now subtract {}. | And minus {}?"),
    "*": phrases("Multiply that by {}. | Now times {}. | And times {}?"),
    "d": phrases("Double it. | Double that. | Now double the result. | What is twice that?"),
}

# --- countries

CAPITAL = phrases("""
What is the capital of {}? | What's the capital of {}? | Which city is the capital of {}? | Name the capital of {}.
Tell me the capital of {}. | capital of {} | Capital of {}? | What is {}'s capital? | Do you know the capital of {}?
Hello, what is the capital of {}? | Can you tell me the capital of {}? | Give me the capital city of {}.
""")
CAPITAL_OF = phrases("""
{} is the capital of which country? | Which country has the capital {}? | What country is {} the capital of?
Of which country is {} the capital? | Which country's capital is {}? | In which country is {}?
""")
CONTINENT = phrases("""
Which continent is {} in? | On which continent is {}? | What continent is {} on? | Where is {}?
In which part of the world is {}? | continent of {} | Tell me the continent of {}. | To which continent does {} belong?
Where in the world is {}?
""")
CURRENCY = phrases("""
What is the currency of {}? | What currency is used in {}? | Which currency does {} use?
What money do people use in {}? | currency of {} | Tell me the currency of {}. | Name the currency of {}.
How do people pay in {}? | What's {}'s currency?
""")
CHECK = phrases("""
Is {} the capital of {}? | Is it true that {} is the capital of {}? | {} is the capital of {}, right?
""")
AND_COUNTRY = phrases("And {}? | And of {}? | What about {}? | And what about {}?")
AND_FACT = [
    ("currency", "What is its currency?"),
    ("continent", "On which continent is it?"),
    ("currency", "And the currency?"),
    ("continent", "Which continent is that on?"),
    ("currency", "Which currency do they use there?"),
    ("continent", "And the continent?"),
]

# --- dates

WEEKDAY_SHIFT = phrases("""
Today is {d}. What day {will} it be {in_}? | What day of the week is it {n} {p} {after} {d}?
Which weekday is {n} {p} {after} {d}? | If today is {d}, what day {will} it be {in_}?
{n} {p} {after} {d} is which day? | It is {d}. Which day is it {in_}?
""")
WEEKDAY_NEXT = phrases("""
What day comes {w} {d}? | Which day is {w} {d}? | What is the day {w} {d}? | Name the day {w} {d}.
{d}: which day comes {w} it? | Tell me the day that comes {w} {d}.
""")
MONTH_LENGTH = phrases("""
How many days does {} have? | How many days are in {}? | How long is {}? | Number of days in {}?
How many days are there in {}? | Tell me how many days {} has.
""")
MONTH_SHIFT = phrases("""
Which month is {n} {p} {w} {m}? | What month comes {n} {p} {w} {m}? | {n} {p} {w} {m}: which month is it?
""")
DATE_SHIFT = phrases("""
What date is {n} {p} {w} {d}? | Which date is {n} {p} {w} {d}? | What is the date {n} {p} {w} {d}?
{n} {p} {w} {d} is which date?
""")
DATE_BETWEEN = phrases("""
How many days are there from {m} {a} to {m} {b}? | How many days lie between {m} {a} and {m} {b}?
Count the days from {m} {a} to {m} {b}.
""")
TODAY = phrases("""
What is today's date? | What day is it today? | What is the date today? | Which date is it? | Tell me today's date.
What's the date? | today's date please | Do you know today's date? | Can you tell me the date? | What date is it today?
""")
TOMORROW = phrases("""
What is tomorrow's date? | Which date is tomorrow? | What date is it tomorrow? | Tell me the date of tomorrow.
""")
YEAR = phrases("Which year is it? | What year is it? | Tell me the current year. | What is the current year?")
MONTH = phrases("Which month is it? | What month is it? | What is the current month?")

# --- units

CONVERT = phrases("""
Convert {a} {u} to {v}. | How many {v} are {a} {u}? | How many {v} are in {a} {u}? | What is {a} {u} in {v}?
{a} {u} in {v} | {a} {u} to {v} | Please convert {a} {u} into {v}. | Express {a} {u} in {v}.
How much is {a} {u} in {v}?
""")
TO_FAHRENHEIT = phrases("""
Convert {a} degrees Celsius to Fahrenheit. | What is {a} °C in Fahrenheit? | How much is {a} Celsius in Fahrenheit?
""")
TO_CELSIUS = phrases("""
Convert {a} degrees Fahrenheit to Celsius. | What is {a} °F in Celsius? | How much is {a} Fahrenheit in Celsius?
""")

# --- letters

SPELL = phrases("""
Spell {}. | Spell the word {}. | How do you spell {}? | Please spell {} | How is {} spelled?
Spell {} letter by letter.
""")
REVERSE = phrases("""
Reverse {}. | Reverse the word {}. | Spell {} backwards. | What is {} backwards? | Write {} backwards.
Reverse the letters of {}.
""")
COUNT = phrases("""
How many letters are in {}? | How many letters does {} have? | Count the letters in {}. | How long is the word {}?
How many letters has the word {}?
""")
COUNT_ONE = phrases("""
How many times does the letter {c} appear in {w}? | How many {c}'s are in {w}? | Count the letter {c} in {w}.
How often is there a {c} in {w}? | How many {c} are in {w}?
""")
ENDS = phrases("""
What is the {p} letter of {w}? | Which letter does {w} {v} with? | Tell me the {p} letter of {w}.
""")
AND_LETTERS = [
    ("reverse", "Now reverse it."),
    ("reverse", "And backwards?"),
    ("spell", "Spell it, please."),
    ("count", "How many letters does it have?"),
    ("reverse", "Reverse that word."),
    ("first", "What is its first letter?"),
    ("last", "And its last letter?"),
]

# --- lists

COMPARE = phrases("""
Which is {w}, {a} or {b}? | Which number is {w}: {a} or {b}? | What is {w}, {a} or {b}? | {a} or {b}: which is {w}?
Is {a} or {b} {w}?
""")
LARGEST, SMALLEST = phrases("largest | biggest | highest"), phrases("smallest | lowest")
EXTREME = phrases("""
What is the {n} of {l}? | Which number is the {n}: {l}? | Find the {n} number: {l} | Which of {l} is the {n}?
""")
SORT = phrases("""
Sort {l}{d}. | Sort these numbers{d}: {l} | Put these numbers in order{d}: {l} | Order {l}{d}. | Please sort{d}: {l}
""")
UP = ["", " from smallest to largest", " in ascending order"]
DOWN = [" from largest to smallest", " in descending order"]
SORT_WORDS = phrases("""
Sort these words: {} | Sort {} alphabetically. | Put these words in alphabetical order: {} | Sort alphabetically: {}
""")

# --- chat, memory and refusals

CHAT = {  # what it is about: the answer, the questions
    "a greeting": (
        "Hello! How can I help you?",
        phrases("""
        Hello | Hi | Hey | Hello there | Hi there | Good morning | Good evening | Good afternoon | Greetings | Hey there
        Howdy | hello | hi | hey | Nice to meet you | Good day"""),
    ),
    "how I am": (
        "I am fine, thank you. How can I help you?",
        phrases("""
        How are you | How are you doing | How is it going | How do you do | how are you today | Are you well
        How do you feel | What's up"""),
    ),
    "who I am": (
        "I am the demo model of mini-vLLM: a tiny GPT-OSS, only for demonstration.",
        phrases("""
        Who are you | What are you | What is your name | What's your name | Tell me about yourself | Introduce yourself
        Which model are you | Do you have a name | What model is this | who are you | Who am I talking to
        What kind of model are you | Describe yourself | What should I call you | Are you a GPT-OSS model
        How large are you | How many parameters do you have"""),
    ),
    "what I can do": (
        "I can do small sums, capitals and currencies, dates, units, letters, lists and calls of tools. "
        "I am only a tiny demo model.",
        phrases("""
        What can you do | What are you able to do | How can you help me | What can I ask you | Help | Can you help me
        What do you know | What are you good at | what can you do for me | What are your skills
        List your abilities"""),
    ),
    "who made me": (
        "I was trained for mini-vLLM, as its demo model.",
        phrases("""
        Who made you | Who created you | Who trained you | Where do you come from | Who built you | Who is your creator
        Why were you made"""),
    ),
    "whether I am ChatGPT": (
        "No, I am only the tiny demo model of mini-vLLM.",
        phrases("""
        Are you ChatGPT | Are you GPT-4 | Are you a large language model | Are you made by OpenAI
        Are you an intelligent being | Are you a human | Are you a person | Are you a real person | Are you Claude"""),
    ),
    "thanks": (
        "You are welcome!",
        phrases("""
        Thank you | Thanks | Thanks a lot | Thank you very much | Great, thanks | thank you | Well done
        That was helpful | Good job | Perfect | Many thanks | Cool"""),
    ),
    "a goodbye": (
        "Goodbye!",
        phrases("""
        Goodbye | Bye | See you | Bye bye | Good night | See you later | See you soon | bye | Until next time
        I have to go now | Farewell"""),
    ),
}
OPENINGS = [
    "",
    "",
    "",
    "Hello! ",
    "Hi! ",
    "Hey, ",
    "Please tell me: ",
    "So, ",
    "OK. ",
    "Well, ",
    "Good morning! ",
    "Hi there. ",
]
CLOSINGS = ["", "", "?", "?", "!", ".", "??", "!!", " please", ", my friend?", " :)"]
I_AM = phrases("""
Hi, I'm {}. | Hello, my name is {}. | My name is {}. | I am {}. | Hello, I am {}! | Hey, {} here. | Hi! I am called {}.
""")
REMEMBER = phrases("""
My {} is {}. | Hello, my {} is {}. | Please remember: my {} is {}. | Hi! My {} is {}.
""")
RECALL = phrases("""
What is my {}? | What's my {}? | Do you remember my {}? | Tell me my {}. | What was my {}?
""")

REFUSAL = "Sorry, I can't help with that. I am only a tiny demo model."
BLANK = phrases("""
{} | {}? | {}. | Tell me about {}. | Explain {} | What is {}? | Write {}. | Who is {}? | How do I {}? | Where is {}
""")
# Things to make, and things to know: {0} a word, {1} a year, {2} a country.
TASKS = phrases("""
write a poem about {0} | write a poem | write a story about {0} | tell me a story | write a song about {0}
write a Python program | write some code | write an email to my boss | write an essay about {0} | draw a picture of {0}
translate this sentence into French | translate {0} into Spanish | plan my holiday | help me with my homework
book a flight | order a pizza | summarize this article | explain quantum physics | explain how {0} works
give me a recipe for {0} soup | give me medical advice | give me legal advice | tell me a joke about {0}
predict the future | fix my computer | recommend a book about {0} | play a game with me | read the news
""")
DO_TASK = phrases("""
{}. | Please {}. | Can you {}? | I want you to {}. | Could you {}? | {} | Hello! Please {}.
""")
FACTS = phrases("""
who won the world cup in {1} | who won the election in {1} | who is the president of {2} | what is the stock price today
what is the meaning of life | what happened in {1} | who invented the {0} | how tall is the tallest mountain
what is the best {0} | which party should I vote for | how do I cook {0} | why is the sky blue | who wrote Hamlet
what is the population of {2} | how old is the universe | what do you think about politics | how does a {0} work
when did the war end | who is the richest person in the world | what is the speed of light | what is love
how many people live in {2} | what language do they speak in {2} | who painted the Mona Lisa | when was {2} founded
what is the score of the game | how can I lose weight | is there life on Mars | what is in the news
""")
TELL_FACT = phrases("{}? | {}? | Tell me, {}? | Hi, {}? | {} | I wonder: {}?")

# --- tools

WEATHER = phrases("""
What is the weather in {}? | How is the weather in {}? | What's the weather like in {}? | What is the temperature in {}?
How warm is it in {}? | Tell me the weather in {}. | weather in {} | What is the weather in {} today?
What's the weather like in {} today? | Is it cold in {}? | Do I need an umbrella in {}?
""")
WEATHER_TEXTS = phrases("""
Gets the weather. | Get the current weather in a city. | Get the current weather | Weather of a place
Get current temperature for a given location. | Returns the weather for a city.
""")
WEATHER_PLACES = phrases("The city | Name of the city | City name | The city and state, e.g. San Francisco, CA")
CONDITIONS = phrases("sunny | cloudy | rainy | windy | snowy | foggy | clear | stormy")
CALCULATOR_TEXTS = phrases("""
Evaluates an expression. | A calculator. | Calculate the value of an expression | Evaluate a mathematical expression
Does arithmetic.
""")
TIME = phrases("""
What time is it in {}? | What is the time in {}? | Tell me the time in {}. | time in {} | How late is it in {}?
What's the local time in {}?
""")
MONEY = phrases("Convert {} {} to {}. | How much is {} {} in {}? | What are {} {} in {}? | {} {} in {}")
TIMER = phrases("""
Set a timer for {} minutes. | Start a timer of {} minutes. | Wake me in {} minutes. | Timer: {} minutes
Please set a timer for {} minutes
""")
LIGHT = phrases("""
Turn {s} the light in the {r}. | Switch {s} the {r} light. | Turn the {r} light {s}. | Light {s} in the {r}, please.
""")
ROOMS = phrases("kitchen | bathroom | bedroom | garage | garden | office | cellar | hall")
MESSAGE = phrases("Send a message to {n}: {t} | Tell {n}: {t} | Write to {n}: {t} | Message {n}: {t}")
MESSAGE_BODIES = phrases("""
see you on {d} | dinner is at {n} | I am late | happy birthday | call me on {d} | I will come at {n} | the {w} is here
I like the {w} | please buy a {w}
""")
SEARCH = phrases("Search for {}. | Search the web for {} | Find something about {}. | Look up {}.")
POPULATION = phrases("""
What is the population of {}? | How many people live in {}? | population of {} | How many inhabitants does {} have?
""")

# --- conversations

INSTRUCTIONS = phrases("""
You are a helpful assistant. | You are a friendly assistant. | Be helpful and polite. | Answer the user's questions.
You are an assistant in a demo. | Be brief. | Be concise. | You are a helpful AI assistant. | Always be polite.
""")
ONLY_ANSWER = phrases("""
Answer with the result only. | Reply with the answer only. | Give only the answer, no sentence.
You answer with nothing but the result. | Only output the answer.
""")
