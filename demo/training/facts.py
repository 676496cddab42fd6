"""Public facts and closed word lists that the demo model's conversations are made of. Knows no conversation.

Currencies come from babel (CLDR), the rest is tables.
"""

from functools import cache
from typing import NamedTuple

from babel.numbers import get_currency_name, get_territory_currencies

words = str.split


class Country(NamedTuple):
    name: str
    capital: str
    continent: str
    currency: str


# ISO 3166 code, name, capital.
_COUNTRIES = {
    "Africa": """
DZ Algeria|Algiers; AO Angola|Luanda; BJ Benin|Porto-Novo; BW Botswana|Gaborone; BF Burkina Faso|Ouagadougou;
BI Burundi|Gitega; CM Cameroon|Yaoundé; CV Cape Verde|Praia; CF the Central African Republic|Bangui; TD Chad|N'Djamena;
KM the Comoros|Moroni; CG the Republic of the Congo|Brazzaville; CD the Democratic Republic of the Congo|Kinshasa;
DJ Djibouti|Djibouti; EG Egypt|Cairo; ER Eritrea|Asmara; SZ Eswatini|Mbabane; ET Ethiopia|Addis Ababa;
GA Gabon|Libreville; GM the Gambia|Banjul; GH Ghana|Accra; GN Guinea|Conakry; GW Guinea-Bissau|Bissau;
CI Ivory Coast|Yamoussoukro; KE Kenya|Nairobi; LS Lesotho|Maseru; LR Liberia|Monrovia; LY Libya|Tripoli;
MG Madagascar|Antananarivo; MW Malawi|Lilongwe; ML Mali|Bamako; MR Mauritania|Nouakchott; MU Mauritius|Port Louis;
MA Morocco|Rabat; MZ Mozambique|Maputo; NA Namibia|Windhoek; NE Niger|Niamey; NG Nigeria|Abuja; RW Rwanda|Kigali;
ST São Tomé and Príncipe|São Tomé; SN Senegal|Dakar; SC Seychelles|Victoria; SL Sierra Leone|Freetown;
SO Somalia|Mogadishu; ZA South Africa|Pretoria; SS South Sudan|Juba; SD Sudan|Khartoum; TZ Tanzania|Dodoma;
TG Togo|Lomé; TN Tunisia|Tunis; UG Uganda|Kampala; ZM Zambia|Lusaka; ZW Zimbabwe|Harare""",
    "Asia": """
AF Afghanistan|Kabul; AM Armenia|Yerevan; AZ Azerbaijan|Baku; BH Bahrain|Manama; BD Bangladesh|Dhaka; BT Bhutan|Thimphu;
BN Brunei|Bandar Seri Begawan; KH Cambodia|Phnom Penh; CN China|Beijing; GE Georgia|Tbilisi; IN India|New Delhi;
ID Indonesia|Jakarta; IR Iran|Tehran; IQ Iraq|Baghdad; JP Japan|Tokyo; JO Jordan|Amman; KZ Kazakhstan|Astana;
KW Kuwait|Kuwait City; KG Kyrgyzstan|Bishkek; LA Laos|Vientiane; LB Lebanon|Beirut; MY Malaysia|Kuala Lumpur;
MV the Maldives|Malé; MN Mongolia|Ulaanbaatar; MM Myanmar|Naypyidaw; NP Nepal|Kathmandu; KP North Korea|Pyongyang;
OM Oman|Muscat; PK Pakistan|Islamabad; PH the Philippines|Manila; QA Qatar|Doha; SA Saudi Arabia|Riyadh;
SG Singapore|Singapore; KR South Korea|Seoul; LK Sri Lanka|Colombo; SY Syria|Damascus; TJ Tajikistan|Dushanbe;
TH Thailand|Bangkok; TL East Timor|Dili; TR Turkey|Ankara; TM Turkmenistan|Ashgabat;
AE the United Arab Emirates|Abu Dhabi; UZ Uzbekistan|Tashkent; VN Vietnam|Hanoi; YE Yemen|Sanaa""",
    "Europe": """
AL Albania|Tirana; AD Andorra|Andorra la Vella; AT Austria|Vienna; BY Belarus|Minsk; BE Belgium|Brussels;
BA Bosnia and Herzegovina|Sarajevo; BG Bulgaria|Sofia; HR Croatia|Zagreb; CY Cyprus|Nicosia;
CZ the Czech Republic|Prague; DK Denmark|Copenhagen; EE Estonia|Tallinn; FI Finland|Helsinki; FR France|Paris;
DE Germany|Berlin; GR Greece|Athens; HU Hungary|Budapest; IS Iceland|Reykjavik; IE Ireland|Dublin; IT Italy|Rome;
LV Latvia|Riga; LI Liechtenstein|Vaduz; LT Lithuania|Vilnius; LU Luxembourg|Luxembourg; MT Malta|Valletta;
MD Moldova|Chisinau; MC Monaco|Monaco; ME Montenegro|Podgorica; NL the Netherlands|Amsterdam; MK North Macedonia|Skopje;
NO Norway|Oslo; PL Poland|Warsaw; PT Portugal|Lisbon; RO Romania|Bucharest; RU Russia|Moscow; SM San Marino|San Marino;
RS Serbia|Belgrade; SK Slovakia|Bratislava; SI Slovenia|Ljubljana; ES Spain|Madrid; SE Sweden|Stockholm;
CH Switzerland|Bern; UA Ukraine|Kyiv; GB the United Kingdom|London; VA Vatican City|Vatican City""",
    "North America": """
AG Antigua and Barbuda|Saint John's; BS the Bahamas|Nassau; BB Barbados|Bridgetown; BZ Belize|Belmopan;
CA Canada|Ottawa; CR Costa Rica|San José; CU Cuba|Havana; DM Dominica|Roseau; DO the Dominican Republic|Santo Domingo;
SV El Salvador|San Salvador; GD Grenada|Saint George's; GT Guatemala|Guatemala City; HT Haiti|Port-au-Prince;
HN Honduras|Tegucigalpa; JM Jamaica|Kingston; MX Mexico|Mexico City; NI Nicaragua|Managua; PA Panama|Panama City;
KN Saint Kitts and Nevis|Basseterre; LC Saint Lucia|Castries; VC Saint Vincent and the Grenadines|Kingstown;
TT Trinidad and Tobago|Port of Spain; US the United States|Washington, D.C.""",
    "South America": """
AR Argentina|Buenos Aires; BO Bolivia|Sucre; BR Brazil|Brasília; CL Chile|Santiago; CO Colombia|Bogotá;
EC Ecuador|Quito; GY Guyana|Georgetown; PY Paraguay|Asunción; PE Peru|Lima; SR Suriname|Paramaribo;
UY Uruguay|Montevideo; VE Venezuela|Caracas""",
    "Oceania": """
AU Australia|Canberra; FJ Fiji|Suva; KI Kiribati|Tarawa; MH the Marshall Islands|Majuro; FM Micronesia|Palikir;
NR Nauru|Yaren; NZ New Zealand|Wellington; PW Palau|Ngerulmud; PG Papua New Guinea|Port Moresby; WS Samoa|Apia;
SB the Solomon Islands|Honiara; TO Tonga|Nuku'alofa; TV Tuvalu|Funafuti; VU Vanuatu|Port Vila""",
}


@cache
def countries() -> list[Country]:
    listed: list[Country] = []
    for continent, table in _COUNTRIES.items():
        for entry in table.split(";"):
            code, rest = entry.strip().split(" ", 1)
            name, capital = rest.split("|")
            *words, last = get_currency_name(get_territory_currencies(code)[0], locale="en").split()
            listed.append(Country(name, capital, continent, " ".join([*words, last.lower()])))
    return listed


WORDS = sorted(
    {
        *words("""
able about above across action actor adult afternoon again agree airport album almost alone along always amber animal
answer apple april apron arctic area arm army arrow artist autumn avenue award baby bacon badge bag ball balloon
bamboo banana band bank bar barn basket bath beach beacon bean bear beauty bed bee bell below belt bench berry bicycle
bird birthday biscuit blanket block blood blue board boat body bone book boot border bottle bottom bowl box boy brain
branch brave bread breakfast brick bridge bright broccoli brother brown brush bucket budget building bus business
butter butterfly button cabin cabbage cable cake calendar camel camera camp canal candle candy captain car card carpet
carrot castle cat cattle cave ceiling cell center cereal chain chair chalk change chapter cheese cherry chess chest
chicken child chocolate church cinema circle city class clean clever climate clock cloud coach coast coat coconut
coffee coin cold college color comet comfort common computer concert cook copper corn corner cotton couch country
cousin cover cow crab cream credit cricket crown cube culture cup cupboard curtain customer dance danger dark daughter
day deer desert desk dessert detail diamond dinner direction dish doctor dog doll dollar dolphin donkey door dragon
drawer dream dress drink driver drum duck dust eagle ear early earth east echo edge egg eight elbow electric elephant
eleven empty engine evening event exam example exercise eye face factory fair family famous farm farmer fashion father
feather fence festival field film finger fire fish flag flower flute fog folder food foot forest fork fortune fountain
fox frame free freedom fresh friend frog fruit funny future galaxy game garage garden garlic gate gentle ghost giant
gift giraffe girl glass globe glove goat gold good goose grain grape grass gravity great green ground group guest
guide guitar hair hall hammer hand happy harbor hat health heart heavy hedgehog helmet hero hill history hobby holiday
home honey hope horse hospital hotel hour house human hundred hungry hunter husband ice idea image insect iron island
ivory jacket jar jaw jelly jewel job joke journey judge juice jump jungle kangaroo kettle key kind king kingdom
kitchen kite kitten knee knife ladder lady lake lamb lamp language laptop large laugh leader leaf learn leather lemon
lesson letter level library light lion lip lobster local lock long lucky lunch machine magic magnet mango map marble
market marriage match math meadow meal measure meat medal melon memory message metal middle milk million mind mineral
minute mirror moment monkey month moon morning mother motor mountain mouse mouth movie museum mushroom music nail name
napkin nature neck needle nest network never night nine noise north nose notebook number nurse ocean office olive
onion open orange orchestra ostrich oven owl oyster page paint palace panda paper parade parent park parrot party path
peace peach peanut pear pencil penguin pepper person phone photo piano picnic picture pig pillow pilot pine pink
pirate pizza planet plant plastic plate player pocket poem point polar police pond pony popcorn potato powder power
present price prince princess prize problem promise pudding pumpkin puppy purple puzzle pyramid quality quarter queen
question quick quiet rabbit radio railway rain rainbow reason recipe red rhythm ribbon rice rich ring river road robot
rock rocket roof room root rope rose round ruler salad salmon salt sand sandwich saturn school science scissors screen
sea season seed seven shadow shark sheep shell shelf ship shirt shoe shop short shoulder silver simple singer sister
six skate skin skirt sky sleep slow small smart smile smoke snail snake snow soap soccer sock sofa soldier song sound
soup south space spider spinach spoon spring square squirrel stable stage stair star station statue steam stone storm
story strange strawberry street strong student sugar suitcase summer sun sunflower sunset surprise swan sweet swim
table tail talent taxi tea teacher team teapot television temple ten tennis tent theater thousand thunder ticket tiger
time tiny title toast today tomato tongue tooth tower town toy tractor traffic train travel treasure tree triangle
trip truck trumpet tulip tunnel turkey turtle uncle under uniform universe useful valley vanilla vase vegetable velvet
village violin visitor voice volcano wagon wall walnut warm water wave weather wedding week west whale wheat wheel
whisper white wife wild window winner winter wise wolf woman wonder wood wool word world worm yacht year yellow yogurt
young zebra zero
""")
    }
)

NAMES = words("""
Alice Anna Ben Bob Carla Carlos Clara Daniel David Diana Elena Emma Erik Eva Felix Frank George Grace Hannah Henry Ines
Ivan Jack James Jane John Julia Karl Kate Laura Leo Lena Lisa Lucas Lucy Maria Mark Martin Mary Max Mia Mike Nina Nora
Oliver Olivia Oscar Paul Peter Robert Rosa Sam Sarah Simon Sofia Susan Thomas Tim Tom Victor Zoe
""")
COLORS = words("red blue green yellow orange purple pink black white brown gray silver")
ANIMALS = words("cat dog horse rabbit parrot turtle hamster lion tiger elephant penguin dolphin owl fox bear wolf")
CITIES = [
    *words("""
Paris London Berlin Madrid Rome Tokyo Oslo Vienna Lisbon Athens Cairo Lima Prague Dublin Warsaw Moscow Beijing Seoul
Bangkok Nairobi Ottawa Havana Helsinki Stockholm Copenhagen Amsterdam Brussels Bern Budapest Boston Chicago Sydney
Toronto Munich Milan Barcelona Mumbai Shanghai Istanbul Dubai
"""),
    "New York",
    "San Francisco",
    "Los Angeles",
    "Hong Kong",
    "Buenos Aires",
    "New Delhi",
    "Mexico City",
    "Tel Aviv",
    "Cape Town",
    "Rio de Janeiro",
]
MONEY = {"dollars": "USD", "euros": "EUR", "pounds": "GBP", "yen": "JPY", "francs": "CHF"}

DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
MONTH_DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]

# One of the first is so many of the second.
UNITS = [
    ("kilometers", "meters", 1000),
    ("meters", "centimeters", 100),
    ("centimeters", "millimeters", 10),
    ("kilograms", "grams", 1000),
    ("liters", "milliliters", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("years", "months", 12),
    ("feet", "inches", 12),
    ("yards", "feet", 3),
    ("tons", "kilograms", 1000),
    ("meters", "millimeters", 1000),
    ("dozens", "pieces", 12),
    ("decades", "years", 10),
    ("centuries", "years", 100),
    ("pounds", "ounces", 16),
]
SYMBOLS = {
    "kilometers": "km",
    "meters": "m",
    "centimeters": "cm",
    "millimeters": "mm",
    "kilograms": "kg",
    "grams": "g",
    "liters": "l",
    "milliliters": "ml",
    "hours": "h",
    "minutes": "min",
}
SINGULAR = {"centuries": "century", "feet": "foot", "inches": "inch"}  # the others lose an s
