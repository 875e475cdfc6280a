"""A generative grammar that produces parliamentary English sentences together with their Italian translations.

`sentences` and `split` return distinct sentence pairs in the style of EuroParl: with case, punctuation and numbers in
words. Slots are filled almost freely. The next word is therefore hard to predict from the text, and a model has to use
the audio.

Italian phrases contain markers that are resolved once the following word is known. `@il:fs`, `@un:ms`, `@questo:ms`,
`@quello:mp`, `@buono` and `@lo:fs` become the correct form of the article, determiner or clitic; a preposition before
`@il` contracts with it. `@both X @e Y` is a coordination. English has one marker, `@a`.
"""

import random
import re
from dataclasses import dataclass, replace

from recipes import lexicon
from recipes.lexicon import FORMS, IRREGULAR, VOWELS, Noun, Verb, agreeing

SHORTEST, LONGEST = 4, 20  # English words
ESSERE, AVERE, STARE, VENIRE = (IRREGULAR[verb] for verb in ("essere", "avere", "stare", "venire"))

# For each name: the English auxiliary, the words between it and the base form, the Italian verb and its tense.
MODALS = {
    "must": ("must", "", "dovere", "present"),
    "can": ("can", "", "potere", "present"),
    "should": ("should", "", "dovere", "conditional"),
    "could": ("could", "", "potere", "conditional"),
    "would": ("would", "like to", "volere", "conditional"),
    "will have to": ("will", "have to", "dovere", "future"),
    "will be able to": ("will", "be able to", "potere", "future"),
}
# The present is drawn often because its third person is a separate word for each verb.
PLAIN_TENSES = (*["present"] * 9, *["past"] * 3, *["perfect"] * 3, *["future"] * 2, *["progressive"] * 2)
TENSES = (*PLAIN_TENSES, *MODALS)
# The lexicon has subjunctive forms only of auxiliary and modal verbs; a clause in the subjunctive uses these tenses.
DOUBTED_TENSES = ("past", "perfect", "progressive", "must", "can", "should")
CLAUSES = {
    "clause": TENSES,
    "doubt": DOUBTED_TENSES,
    "hoped": (*DOUBTED_TENSES, "future", "future"),
    **{tense: (tense,) for tense in ("present", "past", "perfect", "future", "unreal", "hypothetical")},
}

SUBJECT_PRONOUNS = (("I", 0, "m"), ("we", 2, "m"), ("we", 2, "m"), ("they", 3, "m"), ("he", 1, "m"), ("she", 1, "f"))
DIRECT_PRONOUNS = (("me", "mi"), ("us", "ci"), ("him", "@lo:ms"), ("her", "@lo:fs"), ("them", "@lo:mp"))
INDIRECT_PRONOUNS = (("me", "mi"), ("us", "ci"), ("him", "gli"), ("her", "le"))

CONTRACTING = {"di": "de", "a": "a", "da": "da", "in": "ne", "su": "su"}
CONTRACTED_ARTICLES = {"il": "l", "lo": "llo", "l'": "ll'", "la": "lla", "i": "i", "gli": "gli", "le": "lle"}
# A preposition is repeated before the second of two coordinated phrases.
REPEATED_PREPOSITION = re.compile(r"(?<!\S)(di|a|da|in|su|con|per) @both (.*?) @e ")
SLOT = re.compile(r"<([a-z]+)(\d?)(?::([^>]+))?>")

PASSIVES = tuple(verb for verb in lexicon.TRANSITIVES if not verb.english_preposition)
PATTERNS = tuple(
    (english.strip(), italian.strip())
    for weight, english, italian in (line.split("|") for line in lexicon.PATTERNS.strip().splitlines())
    for _ in range(int(weight))
)


@dataclass(frozen=True)
class Sentence:
    english: str
    italian: str


@dataclass(frozen=True)
class Phrase:
    """A phrase in both languages.

    italian: empty for a subject pronoun, which Italian drops; agreement: see `recipes.lexicon`; gender: "m" or "f".
    """

    english: str
    italian: str
    agreement: int = 1
    gender: str = "m"

    @property
    def plural(self) -> bool:
        return self.agreement >= 2

    @property
    def form(self) -> str:
        return self.gender + "sp"[self.plural]


@dataclass(frozen=True)
class Predicate:
    """A verb with its objects.

    infinitive: the Italian infinitive that the verb governs; clitic: its Italian object pronoun. Both may be empty.
    """

    verb: Verb
    english_tail: str = ""
    italian_tail: str = ""
    infinitive: str = ""
    clitic: str = ""


@dataclass(frozen=True)
class Complement:
    """An adjective or passive participle after "be" and "essere"; `italian` holds its four forms."""

    english: str
    italian: dict[str, str]
    english_tail: str
    italian_tail: str
    passive: bool


@dataclass(frozen=True)
class Clause:
    """The parts of a clause.

    english, italian: auxiliary or finite verb, rest of the verb group, objects; adverb: English and Italian.
    """

    subject: Phrase
    english: tuple[str, str, str]
    italian: tuple[str, str, str]
    negative: bool
    adverb: tuple[str, str]

    def statement(self) -> Phrase:
        auxiliary, rest, tail = self.english
        english = join(self.subject.english, auxiliary, "not" * self.negative, self.adverb[0], rest, tail)
        return Phrase(english.replace("can not", "cannot"), self.question().italian)

    def question(self, subject_at: str = "start") -> Phrase:
        """Return the question, with the Italian subject at the "start", after the "finite" verb or at the "end"."""
        auxiliary, rest, tail = self.english
        english = join(auxiliary, self.subject.english, "not" * self.negative, self.adverb[0], rest, tail)
        finite, rest, tail = self.italian
        subject, verb, adverb = self.subject.italian, join("non" * self.negative, finite), self.adverb[1]
        orders = {
            "start": (subject, verb, adverb, rest, tail),
            "finite": (verb, subject, rest, adverb, tail),
            "end": (verb, adverb, rest, tail, subject),
        }
        return Phrase(english, join(*orders[subject_at]))


def join(*words: str) -> str:
    return " ".join(word for word in words if word)


def needs_lo(word: str) -> bool:
    """Whether "il" becomes "lo", and "un" becomes "uno", before this masculine word."""
    word = word.lower()
    return word.startswith(("z", "x", "gn", "ps", "pn")) or (word[0] == "s" and word[1] not in VOWELS)


def resolve(marker: str, following: str) -> str:
    """Return the form of an Italian marker before the word `following`; an elided form ends in an apostrophe."""
    name, _, form = marker[1:].partition(":")
    vowel, lo = following[0].lower() in VOWELS + "h", needs_lo(following)
    if name == "il":
        masculine = ("l'", "gli") if vowel else ("lo", "gli") if lo else ("il", "i")
        return {"ms": masculine[0], "mp": masculine[1], "fs": "l'" if vowel else "la", "fp": "le"}[form]
    if name == "un":
        return {"ms": "uno" if lo else "un", "fs": "un'" if vowel else "una"}[form]
    if name == "questo":
        return (
            "quest'"
            if vowel and form[1] == "s"
            else {"ms": "questo", "fs": "questa", "mp": "questi", "fp": "queste"}[form]
        )
    if name == "quello":
        return "que" + CONTRACTED_ARTICLES[resolve("@il:" + form, following)]
    if name == "lo":
        return "l'" if vowel and form[1] == "s" else {"ms": "lo", "fs": "la", "mp": "li", "fp": "le"}[form]
    return "buon" if name == "buono" and not lo else name


def surface_italian(text: str) -> str:
    """Resolve markers, contractions, elisions and the euphonic d, from the last word to the first; capitalise."""
    text = REPEATED_PREPOSITION.sub(r"\1 \2 e \1 ", text).replace("@both ", "").replace("@e ", "e ")
    words = [""]
    before_article = False
    for token in reversed(text.split()):
        following = words[-1]
        if before_article and token in CONTRACTING:
            words[-1] = CONTRACTING[token] + CONTRACTED_ARTICLES[following]
            before_article = False
            continue
        before_article = token.startswith("@il")
        if token.startswith("@"):
            token = resolve(token, following)
        elif token in ("a", "e") and following.lower().startswith(token):
            token += "d"
        elif token == "ci" and following.startswith(("è", "e")):
            token = "c'"
        words.append(token)
    return capitalised(" ".join(reversed(words)).strip().replace("' ", "'"))


def surface_english(text: str) -> str:
    words = [""]
    for token in reversed(text.split()):
        if token == "@a":
            following = words[-1].lower()
            vowel = following.startswith((*"aeiou", "honest")) and not following.startswith(("eu", "uni", "use"))
            token = "an" if vowel else "a"
        words.append(token)
    return capitalised(" ".join(reversed(words)).strip().replace("an other", "another"))


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def english_verb_group(verb: Verb, tense: str, agreement: int, support: bool) -> tuple[str, str]:
    """Return the auxiliary (or "") and the rest of an English verb group; `support` adds "do" if there is none."""
    base, third, past, participle, gerund = verb.english
    if tense in MODALS:
        return MODALS[tense][0], join(MODALS[tense][1], base)
    if support and tense in ("present", "past"):
        return "did" if tense == "past" else "does" if agreement == 1 else "do", base
    return {
        "present": ("", third if agreement == 1 else base),
        "past": ("", past),
        "perfect": ("has" if agreement == 1 else "have", participle),
        "future": ("will", base),
        "progressive": (("am", "is", "are", "are")[agreement], gerund),
        "unreal": ("had", participle),
        "hypothetical": ("would", "have " + participle),
    }[tense]


def english_copula(complement: str, tense: str, agreement: int) -> tuple[str, str]:
    if tense in MODALS:
        return MODALS[tense][0], join(MODALS[tense][1], "be", complement)
    return {
        "present": (("am", "is", "are", "are")[agreement], complement),
        "past": (("was", "was", "were", "were")[agreement], complement),
        "perfect": ("has" if agreement == 1 else "have", "been " + complement),
        "future": ("will", "be " + complement),
        "unreal": ("had", "been " + complement),
        "hypothetical": ("would", "have been " + complement),
    }[tense]


def italian_verb_group(predicate: Predicate, subject: Phrase, tense: str, doubted: bool) -> tuple[str, str]:
    """Return the Italian finite verb, with its clitic, and the participle, gerund or infinitive that follows."""
    verb, agreement, clitic = predicate.verb.italian, subject.agreement, predicate.clitic
    auxiliary = ESSERE if predicate.verb.takes_essere else AVERE
    participle = verb.participle
    if predicate.verb.takes_essere:
        participle = agreeing(participle, subject.form)
    elif clitic.startswith("@lo"):
        participle = agreeing(participle, clitic[-2:])
    if tense in MODALS:
        *_, helper, mood = MODALS[tense]
        finite, rest = getattr(IRREGULAR[helper], "subjunctive" if doubted else mood), verb.infinitive
    elif tense == "progressive":
        finite, rest = STARE.subjunctive if doubted else STARE.present, verb.gerund
    elif tense in ("present", "future"):
        finite, rest = getattr(verb, tense), ""
    else:
        finite = {"unreal": auxiliary.past_subjunctive, "hypothetical": auxiliary.conditional}.get(
            tense, auxiliary.subjunctive if doubted else auxiliary.present
        )
        rest = participle
    return join(clitic, finite[agreement]), join(rest, predicate.infinitive)


def italian_copula(complement: Complement, subject: Phrase, tense: str, doubted: bool) -> tuple[str, str]:
    word, agreement = complement.italian[subject.form], subject.agreement
    if tense in MODALS:
        *_, helper, mood = MODALS[tense]
        return getattr(IRREGULAR[helper], "subjunctive" if doubted else mood)[agreement], join("essere", word)
    if tense == "past" and not complement.passive:
        return (ESSERE.past_subjunctive if doubted else ESSERE.imperfect)[agreement], word
    if tense == "present":
        return (VENIRE if complement.passive else ESSERE).present[agreement], word
    if tense == "future":
        return ESSERE.future[agreement], word
    finite = {"unreal": ESSERE.past_subjunctive, "hypothetical": ESSERE.conditional}.get(
        tense, ESSERE.subjunctive if doubted else ESSERE.present
    )
    return finite[agreement], join(agreeing("stato", subject.form), word)


class Debate:
    """Draws random phrases. Tables are dealt like packs of cards, so all entries occur equally often."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.packs: dict[int, list] = {}
        self.filled: dict[str, Phrase] = {}

    def deal(self, table: tuple):
        """Return the next entry of a table.

        The table must live as long as the module, because its `id` identifies its pack.
        """
        pack = self.packs.setdefault(id(table), [])
        if not pack:
            pack.extend(self.random.sample(table, len(table)))
        return pack.pop()

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def one_of(self, weights: dict[str, float]) -> str:
        return self.random.choices(list(weights), list(weights.values()))[0]

    def sentence(self) -> Sentence:
        english, italian = self.deal(PATTERNS)
        self.filled = {}
        english = SLOT.sub(lambda match: self.fill(match, "english"), english)
        italian = SLOT.sub(lambda match: self.fill(match, "italian"), italian)
        return Sentence(surface_english(english), surface_italian(italian))

    def fill(self, slot: re.Match, side: str) -> str:
        kind, digit, choices = slot.groups()
        if kind + digit not in self.filled:
            self.filled[kind + digit] = self.phrase(kind)
        phrase = self.filled[kind + digit]
        if not choices:
            return getattr(phrase, side)
        options = choices.split("/")
        return options[phrase.plural] if len(options) == 2 else options[FORMS.index(phrase.form)]

    def phrase(self, kind: str) -> Phrase:
        depth = int(self.chance(0.5))
        if kind in CLAUSES:
            return self.clause(self.deal(CLAUSES[kind]), depth, doubted=kind in ("doubt", "hoped")).statement()
        if kind in lexicon.WORD_LISTS:
            return Phrase(*self.deal(lexicon.WORD_LISTS[kind]))
        if kind in NOUNS:
            return self.common(NOUNS[kind], 0)
        return getattr(self, kind)(depth)

    # Noun phrases

    def common(self, table: tuple[Noun, ...], depth: int) -> Phrase:
        """Return a noun phrase with a determiner; complements nest up to `depth` levels."""
        noun, mass = self.deal(table), table is lexicon.MASS
        bare = self.bare_noun(noun, plural=not mass and self.chance(0.34), plain=mass and self.chance(0.65))
        if mass:
            phrase = replace(bare, italian=f"@il:{bare.form} {bare.italian}")
        elif depth and self.chance(0.13):
            owner = self.owner()
            genitive = owner.english + ("'" if owner.english.endswith("s") else "'s")
            return replace(
                bare, english=f"{genitive} {bare.english}", italian=f"@il:{bare.form} {bare.italian} di {owner.italian}"
            )
        else:
            english, italian = self.determiner(bare.form)
            phrase = replace(bare, english=f"{english} {bare.english}", italian=f"{italian} {bare.italian}")
        return self.extended(phrase, table) if depth and self.chance(0.42) else phrase

    def bare_noun(self, noun: Noun, plural: bool, plain: bool = False) -> Phrase:
        """Return a noun without determiner; unless `plain`, with adjectives or an attributive noun."""
        english, italian = noun.english[plural], noun.italian[plural]
        form = noun.gender + "sp"[plural]
        kind = (
            "none" if plain else self.one_of({"none": 8, "one": 6, "attributive": 2, "before and after": 1.5, "two": 1})
        )
        if kind == "attributive":
            word, forms = self.deal(lexicon.MODIFIERS)
            english, italian = f"{word} {english}", f"{italian} {forms[form]}"
        elif kind != "none":
            adjectives = [self.deal(lexicon.ADJECTIVES)]
            if kind != "one":
                tables = (
                    lexicon.POSTNOMINAL,
                    lexicon.PRENOMINAL if kind == "before and after" else lexicon.POSTNOMINAL,
                )
                adjectives = [self.deal(table) for table in tables]
            for adjective in adjectives:
                english, word = f"{adjective.english} {english}", adjective.italian[form]
                italian = f"{word} {italian}" if adjective.before else f"{italian} {word}"
        return Phrase(english, italian, 3 if plural else 1, noun.gender)

    def determiner(self, form: str) -> tuple[str, str]:
        english, italian = self.deal(lexicon.DETERMINERS[form[1]])
        if english == "NUMBER":
            return self.deal(lexicon.CARDINALS)
        for word, forms in lexicon.AGREEING_DETERMINERS.items():
            italian = italian.replace(word + ":K", forms[form])
        return english, italian.replace(":K", ":" + form)

    def extended(self, head: Phrase, table: tuple[Noun, ...]) -> Phrase:
        """Return the head with a complement: a prepositional phrase, a participle or a relative clause."""
        kind = self.one_of(
            {"of": 5, "link": 4, "place": 1, "participle": 2, "relative object": 3, "relative subject": 3}
        )
        if kind == "of":
            other = self.object(0)
            english, italian = "of " + other.english, "di " + other.italian
        elif kind == "link":
            english, italian = self.deal(lexicon.LINKS)
            other = self.coordinated(lexicon.THINGS) if english == "between" else self.object(0)
            english, italian = f"{english} {other.english}", f"{italian} {other.italian}"
        elif kind == "place":
            place = self.place()
            english, italian = "in " + place.english, place.italian
        elif kind == "participle":
            other, verb = self.actor(0), self.deal(PASSIVES)
            participle = agreeing(verb.italian.participle, head.form)
            english, italian = f"{verb.english[3]} by {other.english}", f"{participle} da {other.italian}"
        elif kind == "relative object":
            subject = self.pronoun() if self.chance(0.4) else self.actor(0)
            clause = self.build(subject, Predicate(self.deal(PASSIVES)), self.deal(PLAIN_TENSES)).statement()
            pronoun = "whom" if table is lexicon.PERSONS else "which"
            english, italian = f"{pronoun} {clause.english}", f"che {clause.italian}"
        else:
            pronoun = "who" if table is lexicon.PERSONS else "that"
            clause = self.clause(self.deal(TENSES), 0, replace(head, english=pronoun, italian="che")).statement()
            english, italian = clause.english, clause.italian
        return replace(head, english=f"{head.english} {english}", italian=f"{head.italian} {italian}")

    def coordinated(self, table: tuple[Noun, ...]) -> Phrase:
        first, second = self.common(table, 0), self.common(table, 0)
        gender = "f" if first.gender == second.gender == "f" else "m"
        italian = f"@both {first.italian} @e {second.italian}"
        return Phrase(f"{first.english} and {second.english}", italian, 3, gender)

    def proper(self, table: tuple[tuple[str, str], ...]) -> Phrase:
        """Return an entry whose Italian starts with an article marker, which gives gender and number."""
        english, italian = self.deal(table)
        gender, number = italian.split(" ", 1)[0][-2:]
        return Phrase(english, italian, 3 if number == "p" else 1, gender)

    def institution(self, depth: int = 0) -> Phrase:
        return self.proper(lexicon.INSTITUTIONS)

    def country(self, depth: int = 0) -> Phrase:
        return self.proper(lexicon.COUNTRIES)

    def name(self, depth: int = 0) -> Phrase:
        title, surname = self.proper(lexicon.TITLES), self.deal(lexicon.SURNAMES)
        return replace(title, english=f"{title.english} {surname}", italian=f"{title.italian} {surname}")

    def vocative(self, depth: int) -> Phrase:
        name = self.name()
        return replace(name, italian=name.italian.split(" ", 1)[1])

    def owner(self) -> Phrase:
        """Return a possessor for the English genitive."""
        kind = self.one_of({"institution": 3, "country": 3, "name": 3, "person": 2, "body": 2})
        if kind not in NOUNS:
            return getattr(self, kind)()
        noun = self.deal(NOUNS[kind])
        return Phrase("the " + noun.english[0], f"@il:{noun.gender}s {noun.italian[0]}", 1, noun.gender)

    def actor(self, depth: int = 1) -> Phrase:
        kind = self.one_of({"institution": 3, "country": 2, "name": 3, "person": 5, "body": 5, "two": 0.7})
        if kind == "two":
            return self.coordinated(lexicon.PERSONS)
        return self.common(NOUNS[kind], depth) if kind in NOUNS else getattr(self, kind)()

    def object(self, depth: int = 1) -> Phrase:
        kind = self.one_of(
            {"thing": 11, "mass": 4, "body": 1.5, "person": 1, "country": 0.6, "institution": 0.4, "two": 1}
        )
        if kind == "two":
            return self.coordinated(lexicon.THINGS)
        return self.common(NOUNS[kind], depth) if kind in NOUNS else getattr(self, kind)()

    def item(self, depth: int = 1) -> Phrase:
        """Return an object that "it" or "them" can refer to."""
        kind = self.one_of({"thing": 10, "mass": 3, "body": 2, "two": 1})
        return self.coordinated(lexicon.THINGS) if kind == "two" else self.common(NOUNS[kind], depth)

    def pronoun(self) -> Phrase:
        english, agreement, gender = self.random.choice(SUBJECT_PRONOUNS)
        return Phrase(english, "", agreement, gender)

    def indefinite(self, depth: int) -> Phrase:
        plural = self.chance(0.4)
        bare = self.bare_noun(self.deal(lexicon.THINGS), plural)
        english, italian = self.deal(lexicon.CARDINALS) if plural else ("@a", f"@un:{bare.form}")
        return replace(bare, english=f"{english} {bare.english}", italian=f"{italian} {bare.italian}")

    def bare(self, depth: int) -> Phrase:
        return self.bare_noun(self.deal(lexicon.THINGS if self.chance(0.7) else lexicon.PERSONS), plural=True)

    def people(self, depth: int) -> Phrase:
        noun = self.deal(lexicon.PERSONS)
        return Phrase("the " + noun.english[1], f"@il:{noun.gender}p {noun.italian[1]}", 3, noun.gender)

    # Predicates

    def transitive(self, depth: int) -> Predicate:
        verb = self.deal(lexicon.OBLIQUES if self.chance(0.14) else lexicon.TRANSITIVES)
        other = self.object(depth)
        english, italian = join(verb.english_preposition, other.english), join(verb.italian_preposition, other.italian)
        return Predicate(verb, english, italian)

    def pronominal(self, depth: int) -> Predicate:
        """Return a verb with a personal pronoun as its object."""
        verb, (english, italian) = self.deal(lexicon.TRANSITIVES), self.random.choice(DIRECT_PRONOUNS)
        return Predicate(verb, join(verb.english_preposition, english), clitic=italian)

    def governing(self, depth: int) -> Predicate:
        """Return a verb that governs an infinitive, as in "wants to adopt the report"."""
        control, inner = self.deal(lexicon.CONTROLS), self.transitive(depth)
        english = tuple(f"{word} to {inner.verb.english[0]}" for word in control.english)
        infinitive = join(control.italian_preposition, inner.verb.italian.infinitive)
        return Predicate(replace(control, english=english), inner.english_tail, inner.italian_tail, infinitive)

    def persuading(self, depth: int) -> Predicate:
        """Return a verb that governs a person and an infinitive, as in "urges the Council to adopt the report"."""
        verb, person, action = self.deal(lexicon.PERSUADERS), self.actor(0), self.infinitive(0)
        link = "di" if verb.italian_preposition else "a"
        italian = join(verb.italian_preposition, person.italian, link, action.italian)
        return Predicate(verb, f"{person.english} to {action.english}", italian)

    def giving(self, depth: int) -> Predicate:
        verb, other = self.deal(lexicon.DITRANSITIVES), self.object(0)
        if self.chance(0.4):
            english, italian = self.random.choice(INDIRECT_PRONOUNS)
            return Predicate(verb, f"{other.english} to {english}", other.italian, clitic=italian)
        person = self.actor(0)
        return Predicate(verb, f"{other.english} to {person.english}", f"{other.italian} a {person.italian}")

    def intransitive(self, depth: int) -> Predicate:
        adjunct = self.adjunct()
        return Predicate(self.deal(lexicon.INTRANSITIVES), adjunct.english, adjunct.italian)

    def complement(self) -> Complement:
        if self.chance(0.6):
            verb, agent = self.deal(PASSIVES), self.actor(0)
            forms = {form: agreeing(verb.italian.participle, form) for form in FORMS}
            tails = ("by " + agent.english, "da " + agent.italian) if self.chance(0.6) else ("", "")
            return Complement(verb.english[3], forms, *tails, passive=True)
        adjective, other = self.deal(lexicon.PREDICATES), self.object(0)
        tails = ("for " + other.english, "per " + other.italian) if self.chance(0.5) else ("", "")
        return Complement(adjective.english, adjective.italian, *tails, passive=False)

    # Clauses

    def clause(self, tense: str, depth: int, subject: Phrase | None = None, **options: bool) -> Clause:
        animate = self.chance(0.75)
        if subject is None:
            subject = self.actor(depth) if animate else self.object(depth)
            if animate and self.chance(0.35):
                # Singular subjunctives are equal in all persons, so only "we" can be dropped before a subjunctive.
                subject = Phrase("we", "", 2) if options.get("doubted") else self.pronoun()
        if tense != "progressive" and self.chance(0.12 if animate else 0.5):
            return self.build(subject, self.complement(), tense, self.chance(0.15), **options)
        kinds = {"transitive": 9, "pronominal": 0.7, "giving": 1.5}
        if tense != "progressive":
            kinds |= {"governing": 2, "persuading": 1.2, "intransitive": 1.2}
        predicate = getattr(self, self.one_of(kinds))(depth if self.chance(0.6) else 0)
        return self.build(subject, predicate, tense, self.chance(0.15), **options)

    def build(
        self,
        subject: Phrase,
        predicate: Predicate | Complement,
        tense: str,
        negative: bool = False,
        support: bool = False,
        doubted: bool = False,
    ) -> Clause:
        """Conjugate a clause; `support` requires an English auxiliary, `doubted` the Italian subjunctive."""
        if isinstance(predicate, Complement):
            english = english_copula(predicate.english, tense, subject.agreement)
            italian = italian_copula(predicate, subject, tense, doubted)
        else:
            english = english_verb_group(predicate.verb, tense, subject.agreement, support or negative)
            italian = italian_verb_group(predicate, subject, tense, doubted)
        adverb = self.deal(lexicon.ADVERBS) if not negative and self.chance(0.2) else ("", "")
        english, italian = (*english, predicate.english_tail), (*italian, predicate.italian_tail)
        return Clause(subject, english, italian, negative, adverb)

    def main(self, depth: int) -> Phrase:
        tense = self.deal(TENSES)
        clause = self.clause(tense, 2 if self.chance(0.3) else 1).statement()
        kind = self.one_of({"none": 5, "time": 3, "adjunct": 2})
        if kind == "time" and tense in ("past", "future"):
            english, italian = self.deal(lexicon.PAST_TIMES if tense == "past" else lexicon.FUTURE_TIMES)
            return Phrase(f"{clause.english} {english}", f"{italian} {clause.italian}")
        if kind == "adjunct":
            adjunct = self.adjunct()
            return Phrase(f"{clause.english} {adjunct.english}", f"{clause.italian} {adjunct.italian}")
        return clause

    def question(self, depth: int) -> Phrase:
        return self.clause(self.deal(TENSES), depth, support=True).question()

    def asked(self) -> Phrase:
        return self.pronoun() if self.chance(0.3) else self.actor(0)

    def modalquestion(self, depth: int) -> Phrase:
        modal = self.random.choice(tuple(MODALS))
        return self.build(self.asked(), self.transitive(depth), modal).question("finite")

    def futurequestion(self, depth: int) -> Phrase:
        return self.build(self.asked(), self.transitive(depth), "future").question()

    def gapquestion(self, depth: int) -> Phrase:
        """Return a question whose object the pattern puts in front: "what has the Council adopted?"."""
        return self.build(self.asked(), Predicate(self.deal(PASSIVES)), self.deal(TENSES), support=True).question("end")

    def echo(self, depth: int) -> Phrase:
        """Return a clause whose object is the pronoun for the pattern's <item>."""
        antecedent, verb = self.filled["item"], self.deal(lexicon.TRANSITIVES)
        english = join(verb.english_preposition, "them" if antecedent.plural else "it")
        predicate = Predicate(verb, english, clitic=f"@lo:{antecedent.form}")
        return self.build(self.asked(), predicate, self.deal(TENSES), self.chance(0.25)).statement()

    def report(self, depth: int) -> Phrase:
        return self.reporting(lexicon.INDICATIVES)

    def belief(self, depth: int) -> Phrase:
        return self.reporting(lexicon.SUBJUNCTIVES)

    def reporting(self, table: tuple[Verb, ...]) -> Phrase:
        return self.build(
            self.asked(), Predicate(self.deal(table)), self.random.choice(("present", "past"))
        ).statement()

    # Phrases without a finite verb

    def infinitive(self, depth: int) -> Phrase:
        predicate = self.transitive(depth) if self.chance(0.8) else self.giving(depth)
        italian = predicate.verb.italian.infinitive
        if predicate.clitic:
            italian = italian.removesuffix("re" if italian.endswith("rre") else "e") + predicate.clitic
        english = predicate.verb.english[0]
        return Phrase(f"{english} {predicate.english_tail}", f"{italian} {predicate.italian_tail}")

    def verbal(self, depth: int, english_form: int, italian_form: str) -> Phrase:
        predicate = self.transitive(depth)
        verb = predicate.verb
        italian = verb.italian.present[2] if italian_form == "present" else getattr(verb.italian, italian_form)
        return Phrase(f"{verb.english[english_form]} {predicate.english_tail}", f"{italian} {predicate.italian_tail}")

    def gerund(self, depth: int) -> Phrase:
        return self.verbal(depth, 4, "infinitive")

    def means(self, depth: int) -> Phrase:
        return self.verbal(depth, 4, "gerund")

    def exhortation(self, depth: int) -> Phrase:
        return self.verbal(depth, 0, "present")

    def adjunct(self) -> Phrase:
        if self.chance(0.3):
            place = self.place()
            return replace(place, english="in " + place.english)
        (english, italian), other = self.deal(lexicon.ADJUNCTS), self.object(0)
        return Phrase(f"{english} {other.english}", f"{italian} {other.italian}")

    def place(self, depth: int = 0) -> Phrase:
        """Return a city or a country; the Italian includes its preposition."""
        if self.chance(0.5):
            english, italian = self.deal(lexicon.CITIES)
            return Phrase(english, "a " + italian)
        country = self.country()
        return Phrase(country.english, "in " + country.italian.split(" ", 1)[1])

    def date(self, depth: int) -> Phrase:
        day, giorno = self.deal(lexicon.DAYS)
        month, mese = self.deal(
            lexicon.LONG_MONTHS if giorno in ("ventinove", "trenta", "trentuno") else lexicon.MONTHS
        )
        year, anno = self.deal(lexicon.YEARS) if self.chance(0.4) else ("", "")
        return Phrase(join("the", day, "of", month, year), join(giorno, mese, anno))

    def amount(self, depth: int) -> Phrase:
        (hundreds, centinaia), (scale, scala) = self.deal(lexicon.HUNDREDS), self.deal(lexicon.SCALES)
        return Phrase(f"{hundreds} {scale} euros", f"{centinaia}{scala} euro", 3)

    def percent(self, depth: int) -> Phrase:
        english, italian = self.deal(lexicon.CARDINALS)
        return Phrase(f"{english} per cent", f"@il:ms {italian} per cento")


NOUNS = {"person": lexicon.PERSONS, "body": lexicon.BODIES, "thing": lexicon.THINGS, "mass": lexicon.MASS}


def sentences(count: int, seed: int) -> list[Sentence]:
    """Return `count` sentence pairs, distinct in each language; a longer list starts with the shorter one."""
    debate = Debate(seed)
    seen: set[tuple[str, str]] = set()
    found: list[Sentence] = []
    while len(found) < count:
        sentence = debate.sentence()
        keys = {("en", sentence.english), ("it", sentence.italian)}
        if SHORTEST <= len(sentence.english.split()) <= LONGEST and not keys & seen:
            seen |= keys
            found.append(sentence)
    return found


def split(train: int, dev: int, test: int, seed: int) -> dict[str, list[Sentence]]:
    """Return disjoint train, dev and test lists. Dev and test do not change when train grows."""
    found = sentences(test + dev + train, seed)
    return {"test": found[:test], "dev": found[test : test + dev], "train": found[test + dev :]}
