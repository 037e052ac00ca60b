"""The invented world behind the embedded corpus: its names, its things, and what can be said and asked about them.

A relation has statements, which passages are made of, and questions in other words. ``{e}`` is the entity, ``{v}`` the
value that answers the question. The last question of each relation is asked only in validation.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from lib.models import packaged_minilm_dir

ONSETS = "b br c cl d dr f g gr h k l m n p r s st t tr v w".split()
VOWELS = "a e i o u".split()
CODAS = "l m n r s nd rn sk th".split()
PLACE_ENDINGS = "ford mere wick holm stead ham bury dale port haven mouth ridge".split()
TITLE_WORDS = "Winter Loom|Salt Crown|Paper Moon|Quiet Bell|Glass Orchard|Amber Gate|Hollow Drum|Iron Lily".split("|")
COLOURS = "red|blue|green|grey|black|white|silver|golden|brown|yellow".split("|")
TEXTURES = "painted|woven|carved|polished|salted|smoked|embroidered|hammered|varnished|scented".split("|")
GOODS = (
    "glass beads|wool blankets|clay jars|copper kettles|leather saddles|oak barrels|wax candles|silk ribbons|"
    "bone combs|paper lanterns|iron locks|reed baskets|honey cakes|herring|plum brandy|linen sails|cheese|cedar chests"
).split("|")
MAKERS = (
    "glassblower|weaver|potter|coppersmith|saddler|cooper|chandler|lace maker|comb cutter|lantern maker|locksmith|"
    "basket maker|baker|net mender|distiller|sail maker|shepherd|joiner|map maker|bell founder|beekeeper|dyer"
).split("|")
BEASTS = "heron|otter|badger|falcon|hare|stag|lynx|toad|raven|salmon|tortoise|moth|wolf|goose|viper|boar".split("|")
LANDSCAPES = "marshes|pine forests|chalk cliffs|salt lakes|high meadows|sandy islands|caves|peat bogs|dunes".split("|")
FOODS = "beetles|water snails|pine seeds|frogs|wild berries|river crabs|moss|fallen fruit|lizards|mushrooms".split("|")
MATERIALS = "granite|sandstone|cedar wood|brick|marble|limestone|slate|basalt|oak beams|flint|cast iron".split("|")
CAUSES = (
    "a broken dam|a stolen crown|a dry summer|a tax on salt|a quarrel over grazing rights|an earthquake|a bad harvest|"
    "a forged letter|the death of a prince|a fallen bridge|a lost wager|a great fire"
).split("|")
GROUPS = "Guild|Society|League|Brotherhood|College|Circle|Order|Company".split("|")
EVENTS = "Siege|Flood|Fair|Race|Uprising|Council|Tournament|Fire".split("|")
BUILDINGS = "Bridge|Tower|Mill|Lighthouse|Granary|Theatre|Chapel|Observatory".split("|")
DIRECTIONS = "northern southern eastern western".split()
UNITS = "days weeks months".split()
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()


@dataclass(frozen=True)
class Relation:
    """``value`` names the kind of thing that answers; see ``Names.value``."""

    key: str
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of entity; ``noun`` refers back to one that was named in the sentence before."""

    name: str
    noun: str
    relations: tuple[Relation, ...]


def _kind(name: str, noun: str, text: str) -> Kind:
    """Relations from blocks of four lines: key and kind of value, statements, two lines of questions."""
    lines = [line.strip() for line in text.strip().splitlines()]
    relations = []
    for head, statements, *questions in zip(*(lines[start::4] for start in range(4)), strict=True):
        key, value = head.split()
        relations.append(
            Relation(key, value, tuple(statements.split(" | ")), tuple(" | ".join(questions).split(" | ")))
        )
    return Kind(name, noun, tuple(relations))


KINDS = (
    _kind(
        "town",
        "the town",
        """
        founded year
        {e} was founded in {v} | Settlers laid out {e} in {v} | The first houses of {e} went up in {v}
        When did people begin to live in {e}? | How far back does {e} date?
        What is the year of origin of {e}? | In which year did {e} come into being?
        charter year
        {e} received its charter in {v} | {e} was granted city rights in {v} | In {v} the crown made {e} a free city
        When did {e} become a city before the law? | Which year brought {e} its legal standing?
        Since when may {e} govern itself? | At what date was {e} given city status?
        river river
        {e} lies on {v} | {v} runs through {e} | The houses of {e} line the banks of {v}
        Which water flows past {e}? | What would a boat follow to reach {e}?
        Beside what was {e} built? | On which waterway can {e} be found?
        population count
        About {v} people live in {e} | {e} counts {v} inhabitants | The last census found {v} residents in {e}
        How many people are at home in {e}? | How large is the population of {e}?
        What is the number of citizens of {e}? | How many souls dwell in {e}?
        goods goods
        {e} is known for its {v} | Traders come to {e} to buy {v} | The workshops of {e} turn out {v}
        What does {e} produce? | What can merchants get in {e}?
        Which wares made {e} famous? | What is sold at the market of {e}?
        mayor person
        {v} governs {e} | The council of {e} is led by {v} | {v} was elected mayor of {e}
        Who is in charge of {e}? | Who stands at the head of {e}?
        Whose decisions bind the citizens of {e}? | Who rules over {e}?
        walls person
        The walls of {e} were planned by {v} | {v} drew the fortifications of {e} | {e} owes its ramparts to {v}
        Who designed the defences of {e}? | Which architect protected {e}?
        Who made {e} hard to attack? | Who was behind the town wall of {e}?
        """,
    ),
    _kind(
        "person",
        "the master",
        """
        birthplace town
        {e} was born in {v} | {e} came into the world in {v} | The cradle of {e} stood in {v}
        Where is {e} from? | What is the native place of {e}?
        In which town did the life of {e} begin? | Which place is the birthplace of {e}?
        home town
        {e} settled in {v} | Later {e} moved to {v} | {e} bought a workshop in {v}
        Where did {e} go to live as an adult? | What did {e} choose as a new home?
        Which town did {e} work in? | Where was {e} active in later life?
        born year
        {e} was born in {v} | The birth of {e} was recorded in {v} | {e} saw the light of day in {v}
        What is the birth date of {e}? | When did the life of {e} begin?
        In what year was the mother of {e} delivered of the child? | When was {e} born?
        teacher person
        {e} was taught by {v} | {v} trained {e} for years | {e} learned everything from {v}
        Whose pupil was {e}? | Who passed the craft on to {e}?
        Under whom did {e} study? | Who was the instructor of {e}?
        spouse person
        {e} married {v} | {v} became the spouse of {e} | {e} shared a home with {v}
        Who was the partner of {e}? | With whom did {e} found a family?
        To whom was {e} wed? | Whom did {e} take in marriage?
        trade trade
        {e} earned a living as {v} | {e} worked as {v} | By trade {e} was {v}
        What was the profession of {e}? | How did {e} make money?
        What did {e} do for work? | Which occupation did {e} have?
        work title
        {e} left behind {v} | {v} is the masterpiece of {e} | {e} became famous for {v}
        Which creation is {e} remembered for? | What is the best known work of {e}?
        What did {e} make that lasted? | What is the title of the work by {e}?
        """,
    ),
    _kind(
        "society",
        "the society",
        """
        founder person
        {v} founded {e} | {e} was called into life by {v} | {e} goes back to {v}
        Who started {e}? | Whose idea was {e}?
        To whom does {e} owe its existence? | Who was the creator of {e}?
        patron person
        {v} pays for {e} | The money of {e} comes from {v} | {e} is supported by {v}
        Who finances {e}? | Whose purse keeps {e} alive?
        Who is the sponsor of {e}? | Who bears the costs of {e}?
        seat town
        {e} meets in {v} | {e} has its hall in {v} | The archive of {e} is kept in {v}
        Where is {e} based? | Which town hosts {e}?
        Where would one look for {e}? | What is the location of {e}?
        opened year
        {e} opened its doors in {v} | {e} held its first meeting in {v} | In {v} {e} began its work
        How long has {e} existed? | When did {e} come together at first?
        What was the opening year of {e}? | When was the start of {e}?
        members count
        {e} has {v} members | The rolls of {e} list {v} names | {v} men and women belong to {e}
        How big is {e}? | How many people have joined {e}?
        What is the membership of {e}? | How many followers does {e} have?
        symbol emblem
        The banner of {e} shows {v} | {e} carries {v} on its seal | {v} is the badge of {e}
        What is the emblem of {e}? | Which creature stands for {e}?
        By which sign is {e} recognised? | What is pictured in the arms of {e}?
        aim goods
        {e} controls the trade in {v} | Only {e} may sell {v} | {e} inspects all {v}
        What does {e} deal with? | Over which wares does {e} watch?
        What is the business of {e}? | Which product falls under {e}?
        """,
    ),
    _kind(
        "animal",
        "the animal",
        """
        habitat habitat
        {e} lives in {v} | {v} are home to {e} | Hunters meet {e} in {v}
        Where can {e} be found? | What surroundings does {e} prefer?
        What is the natural home of {e}? | In which landscape does {e} occur?
        food food
        {e} feeds on {v} | {e} eats mostly {v} | Nothing attracts {e} like {v}
        What is the diet of {e}? | What does {e} live on?
        With what can one lure {e}? | What is the favourite meal of {e}?
        weight weight
        {e} weighs {v} | A grown specimen of {e} reaches {v} | On the scales {e} brings {v}
        How heavy is {e}? | What is the mass of {e}?
        How much would one have to carry to lift {e}? | What weight does {e} attain?
        young small
        {e} has {v} young a year | {v} cubs are born to {e} every spring | {e} raises {v} young at a time
        How large is a litter of {e}? | How many offspring does {e} have?
        How many babies must {e} look after? | What is the number of descendants of {e} each year?
        finder person
        {v} first described {e} | {e} was discovered by {v} | Science owes the knowledge of {e} to {v}
        Who found {e}? | Which naturalist made {e} known?
        Who was the first to report on {e}? | Who is credited with identifying {e}?
        seen year
        {e} was last seen in {v} | Nobody has met {e} since {v} | The final sighting of {e} dates from {v}
        When did {e} disappear? | What was the last year with news of {e}?
        Until when was {e} observed? | When did {e} die out?
        keeper person
        {v} kept {e} in a garden | {e} was tamed by {v} | {v} owned the only tame specimen of {e}
        Who had {e} as a pet? | Who made {e} used to people?
        Whose household included {e}? | Who held {e} in captivity?
        """,
    ),
    _kind(
        "event",
        "the event",
        """
        year year
        {e} took place in {v} | {e} happened in {v} | Chronicles place {e} in {v}
        When was {e}? | What is the date of {e}?
        In which year did {e} occur? | Which year saw {e}?
        place town
        {e} began in {v} | {e} broke out near {v} | {e} had its centre in {v}
        Where did {e} start? | At which town did {e} occur?
        What was the scene of {e}? | Where should one place {e} on the map?
        duration span
        {e} lasted {v} | {e} went on for {v} | It took {v} until {e} was over
        How long was {e}? | After what time did {e} end?
        How much time did {e} take? | What was the length of {e}?
        cause cause
        {e} was caused by {v} | {v} led to {e} | The reason for {e} was {v}
        Why did {e} happen? | What brought about {e}?
        What was the trigger of {e}? | What lay at the root of {e}?
        leader person
        {v} was the leader of {e} | {v} stood in the centre of {e} | {e} was directed by {v}
        Who played the main part in {e}? | Who was at the head of {e}?
        Under whose command was {e}? | Who organised {e}?
        witness person
        {v} wrote the account of {e} | {e} was described by {v} | What is known of {e} comes from {v}
        Who reported on {e}? | Whose notes tell of {e}?
        Who is the source for {e}? | Which chronicler recorded {e}?
        crowd count
        {v} people took part in {e} | {e} drew {v} people | {v} persons were counted at {e}
        How many were present at {e}? | How large was the crowd at {e}?
        What was the attendance of {e}? | How many were involved in {e}?
        """,
    ),
    _kind(
        "building",
        "the building",
        """
        architect person
        {v} designed {e} | The plans of {e} are by {v} | {e} is the work of {v}
        Who was the architect of {e}? | Who drew {e}?
        Whose design was {e}? | Who thought up {e}?
        owner person
        {v} owns {e} | {e} belongs to {v} | {e} was left to {v}
        Whose property is {e}? | Who has {e} in possession?
        Who is the proprietor of {e}? | Who holds the keys to {e}?
        height height
        {e} is {v} high | {e} rises to {v} | It is {v} to the top of {e}
        How tall is {e}? | What is the elevation of {e}?
        How far is it from the foot of {e} to its tip? | What height does {e} have?
        material material
        {e} was built of {v} | Builders used {v} for {e} | Workers made {e} out of {v}
        What does {e} consist of? | What is {e} made from?
        Which material was chosen for {e}? | What were the walls of {e} put together with?
        finished year
        {e} was finished in {v} | The last stone of {e} was laid in {v} | Work on {e} ended in {v}
        When was {e} complete? | In which year was {e} ready?
        How old is {e}? | When did builders leave {e}?
        repaired year
        {e} was repaired in {v} | {e} got a new roof in {v} | A storm made repairs of {e} necessary in {v}
        When was {e} restored? | What was the year of the renovation of {e}?
        When did {e} need mending? | When were damages to {e} put right?
        store goods
        {e} is used to store {v} | Merchants keep {v} in {e} | {e} is full of {v}
        What is inside {e}? | What would a thief find in {e}?
        What lies in {e}? | Which wares are kept in {e}?
        """,
    ),
)


@cache
def existing_words() -> frozenset[str]:
    """The packaged encoder's vocabulary: real words, places and people that an invented name must not be."""
    vocabulary = (packaged_minilm_dir() / "vocab.txt").read_text(encoding="utf-8").split()
    return frozenset(vocabulary) | {"wuhan"}  # became known after the vocabulary was made


class Names:
    """Draws entities and values from one random stream.

    ``unseen`` is for validation: its invented words have an odd sum of letters, those of training an even one, so that
    the splits share no name; and ``known`` lets it use what training never shows.
    """

    def __init__(self, rng: random.Random, unseen: bool) -> None:
        self.rng = rng
        self.unseen = unseen

    def known(self, texts: Sequence[str], held_out: int = 1) -> Sequence[str]:
        """All texts in validation; in training all but the last ``held_out``."""
        return texts if self.unseen else texts[:-held_out]

    def word(self, syllables: int, ending: str = "") -> str:
        """An invented word, capitalised; never one that exists."""
        while True:
            parts = [self.rng.choice(ONSETS) + self.rng.choice(VOWELS) for _ in range(syllables)]
            word = "".join(parts) + self.rng.choice(CODAS)
            if sum(map(ord, word)) % 2 == self.unseen and not {word, word + ending} & existing_words():
                return (word + ending).capitalize()

    def entity(self, kind: str, like: str | None = None) -> str:
        """A name for an entity of ``kind``; ``like`` another one, it shares that one's invented (last) word."""
        choice = self.rng.choice
        if kind == "person":
            return f"{self.word(1)} {like.split()[-1] if like else self.word(2)}"
        if kind == "town":
            return f"{choice(('Upper', 'Lower', 'New', 'Old'))} {like.split()[-1]}" if like else self.town()
        word = like.split()[1] if like else self.word(choice((1, 2)))
        pool = {"society": GROUPS, "animal": BEASTS, "event": EVENTS, "building": BUILDINGS}[kind]
        return f"the {word} {choice([noun for noun in pool if not like or not like.endswith(noun)])}"

    def town(self) -> str:
        """A town's name of one invented word, half of them with an ending such as "ford"."""
        return self.word(1, self.rng.choice(PLACE_ENDINGS)) if self.rng.random() < 0.5 else self.word(2)

    def value(self, kind: str) -> str:
        """Something that answers a question of this kind: a name, year, number or phrase."""
        rng = self.rng
        choice = rng.choice
        values: dict[str, Callable[[], str]] = {
            "year": lambda: str(rng.randint(1100, 1890)),
            "count": lambda: f"{rng.randint(12, 99) * choice((10, 100, 1000)):,}",
            "small": lambda: choice(NUMBERS),
            "span": lambda: f"{choice(NUMBERS)} {choice(UNITS)}",
            "weight": lambda: f"{rng.randint(3, 90)} pounds",
            "height": lambda: f"{rng.randint(30, 290)} {choice(('feet', 'yards'))}",
            "person": lambda: self.entity("person"),
            "town": self.town,
            "river": lambda: choice(("the River {}", "the {} Canal", "Lake {}")).format(self.word(1)),
            "goods": lambda: f"{choice(TEXTURES + COLOURS)} {choice(GOODS)}" if rng.random() < 0.6 else choice(GOODS),
            "trade": lambda: f"a {choice(MAKERS)}",
            "title": lambda: f"The {choice(TITLE_WORDS).split()[0]} {choice(TITLE_WORDS).split()[1]}",
            "emblem": lambda: f"a {choice(COLOURS)} {choice(BEASTS)}",
            "habitat": lambda: f"the {choice(DIRECTIONS)} {choice(LANDSCAPES)}",
            "food": lambda: " and ".join(rng.sample(FOODS, choice((1, 2)))),
            "cause": lambda: choice(CAUSES),
            "material": lambda: " and ".join(rng.sample(MATERIALS, choice((1, 2)))),
        }
        return values[kind]()
