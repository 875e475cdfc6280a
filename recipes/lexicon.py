"""English and Italian words of the synthetic debates, in small tables, and functions that inflect them.

Tables have one entry on each line: English, a bar, Italian. Regular forms are derived; irregular forms are written out.
Agreement is an index everywhere: 0 = I, 1 = third person singular, 2 = we, 3 = third person plural.
"""

from dataclasses import dataclass

VOWELS = "aeiouàèéìòù"
FORMS = ("ms", "fs", "mp", "fp")


@dataclass(frozen=True)
class Noun:
    english: tuple[str, str]
    italian: tuple[str, str]
    gender: str


@dataclass(frozen=True)
class Adjective:
    """An adjective.

    italian: its forms ms, fs, mp and fp; before: whether the Italian adjective precedes its noun.
    """

    english: str
    italian: dict[str, str]
    before: bool = False


@dataclass(frozen=True)
class Conjugation:
    """The Italian forms of a verb that clauses use; each tuple is indexed by agreement."""

    infinitive: str
    present: tuple[str, ...]
    future: tuple[str, ...]
    conditional: tuple[str, ...]
    participle: str
    gerund: str
    subjunctive: tuple[str, ...] = ()
    past_subjunctive: tuple[str, ...] = ()
    imperfect: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verb:
    """A verb.

    english: base, third person singular, past, participle and gerund.
    english_preposition, italian_preposition: introduce the object; empty if it has none.
    """

    english: tuple[str, str, str, str, str]
    italian: Conjugation
    english_preposition: str = ""
    italian_preposition: str = ""
    takes_essere: bool = False


def pairs(table: str) -> tuple[tuple[str, str], ...]:
    """Return the entries of a table as pairs (English, Italian)."""
    return tuple(tuple(side.strip() for side in line.split("|")) for line in table.strip().splitlines())


def rows(table: str) -> list[tuple[list[str], list[str]]]:
    """Return the entries of a table as pairs (English words, Italian words)."""
    return [(english.split(), italian.split()) for english, italian in pairs(table)]


def english_plural(word: str) -> str:
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def english_verb(base: str, past: str = "", participle: str = "", gerund: str = "") -> tuple[str, str, str, str, str]:
    if not past:
        past = base[:-1] + "ied" if base.endswith("y") and base[-2] not in "aeiou" else base.removesuffix("e") + "ed"
    if not gerund:
        gerund = (base if base.endswith("ee") else base.removesuffix("e")) + "ing"
    return base, english_plural(base), past, participle or past, gerund


def italian_plural(word: str, gender: str) -> str:
    if word[-1] in "àèéìòù" or word[-1] not in "aeio":
        return word
    if word.endswith(("ca", "ga")):
        return word[:-1] + ("he" if gender == "f" else "hi")
    if word.endswith("a"):
        return word[:-1] + ("e" if gender == "f" else "i")
    if word.endswith("io"):
        return word[:-1]
    if word.endswith(("co", "go")) and not word.endswith("ico"):
        return word[:-1] + "hi"
    return word[:-1] + "i"


def italian_adjective(base: str, masculine_plural: str = "") -> dict[str, str]:
    if base.endswith("o"):
        feminine = base[:-1] + "a"
        forms = base, feminine, masculine_plural or italian_plural(base, "m"), italian_plural(feminine, "f")
        if base.endswith("io"):
            forms = base, feminine, base[:-1], base[:-1] + "e"
    elif base.endswith("e"):
        forms = base, base, base[:-1] + "i", base[:-1] + "i"
    elif base.endswith("ista"):
        forms = base, base, base[:-1] + "i", base[:-1] + "e"
    else:
        forms = (base,) * 4
    return dict(zip(FORMS, forms, strict=True))


def agreeing(participle: str, form: str) -> str:
    """Return a form ("ms", "fs", "mp" or "fp") of an Italian participle, given in the masculine singular."""
    return participle[:-1] + "oaie"[FORMS.index(form)]


FAMILIES = {
    "porre": ("pongo pone poniamo pongono", "porr", "posto", "ponendo"),
    "durre": ("duco duce duciamo ducono", "durr", "dotto", "ducendo"),
    "tenere": ("tengo tiene teniamo tengono", "terr", "tenuto", "tenendo"),
    "gliere": ("lgo glie gliamo lgono", "glier", "lto", "gliendo"),
    "vedere": ("vedo vede vediamo vedono", "vedr", "visto", "vedendo"),
}


def conjugate(infinitive: str, participle: str = "") -> Conjugation:
    """Conjugate a regular Italian verb.

    infinitive: a final + marks verbs in -ire that insert -isc-, such as "finire+".
    participle: if it is irregular.
    """
    long, infinitive = infinitive.endswith("+"), infinitive.removesuffix("+")
    family = next((ending for ending in FAMILIES if infinitive.endswith(ending)), None)
    stem, ending = infinitive[:-3], infinitive[-3:]
    if family:
        forms, future, derived, gerund = FAMILIES[family]
        stem = infinitive.removesuffix(family)
        present = [stem + form for form in forms.split()]
        future, derived, gerund = stem + future, stem + derived, stem + gerund
    elif ending == "are":
        soft = stem + "h" if stem[-1] in "cg" else stem.removesuffix("i")
        present = [stem + "o", stem + "a", soft + "iamo", stem + "ano"]
        future = (soft if stem[-1] in "cg" or stem.endswith(("ci", "gi")) else stem) + "er"
        derived, gerund = stem + "ato", stem + "ando"
    elif ending == "ere":
        present = [stem + "o", stem + "e", stem + "iamo", stem + "ono"]
        future, derived, gerund = stem + "er", stem + "uto", stem + "endo"
    else:
        middle = "isc" if long else ""
        present = [stem + middle + "o", stem + middle + "e", stem + "iamo", stem + middle + "ono"]
        future, derived, gerund = stem + "ir", stem + "ito", stem + "endo"
    return Conjugation(
        infinitive,
        tuple(present),
        tuple(future + end for end in ("ò", "à", "emo", "anno")),
        tuple(future + end for end in ("ei", "ebbe", "emmo", "ebbero")),
        participle or derived,
        gerund,
    )


def irregular(infinitive, present, future, participle, gerund, subjunctive="", past="", imperfect="") -> Conjugation:
    return Conjugation(
        infinitive,
        tuple(present.split()),
        tuple(future + end for end in ("ò", "à", "emo", "anno")),
        tuple(future + end for end in ("ei", "ebbe", "emmo", "ebbero")),
        participle,
        gerund,
        tuple(subjunctive.split()),
        tuple(past.split()),
        tuple(imperfect.split()),
    )


IRREGULAR = {
    verb.infinitive: verb
    for verb in (
        irregular(
            "essere",
            "sono è siamo sono",
            "sar",
            "stato",
            "essendo",
            "sia sia siamo siano",
            "fossi fosse fossimo fossero",
            "ero era eravamo erano",
        ),
        irregular(
            "avere",
            "ho ha abbiamo hanno",
            "avr",
            "avuto",
            "avendo",
            "abbia abbia abbiamo abbiano",
            "avessi avesse avessimo avessero",
        ),
        irregular("dovere", "devo deve dobbiamo devono", "dovr", "dovuto", "dovendo", "debba debba dobbiamo debbano"),
        irregular("potere", "posso può possiamo possono", "potr", "potuto", "potendo", "possa possa possiamo possano"),
        irregular(
            "volere", "voglio vuole vogliamo vogliono", "vorr", "voluto", "volendo", "voglia voglia vogliamo vogliano"
        ),
        irregular("stare", "sto sta stiamo stanno", "star", "stato", "stando", "stia stia stiamo stiano"),
        irregular("venire", "vengo viene veniamo vengono", "verr", "venuto", "venendo", "venga venga veniamo vengano"),
        irregular("dare", "do dà diamo danno", "dar", "dato", "dando"),
        irregular("dire", "dico dice diciamo dicono", "dir", "detto", "dicendo"),
        irregular("fare", "faccio fa facciamo fanno", "far", "fatto", "facendo"),
        irregular("sapere", "so sa sappiamo sanno", "sapr", "saputo", "sapendo"),
        irregular("riuscire", "riesco riesce riusciamo riescono", "riuscir", "riuscito", "riuscendo"),
    )
}


def nouns(table: str) -> tuple[Noun, ...]:
    """Parse lines of `singular [plural] | singular gender [plural]`."""
    entries = []
    for english, (italian, gender, *plural) in rows(table):
        english = (english[0], english[1] if len(english) > 1 else english_plural(english[0]))
        entries.append(Noun(english, (italian, plural[0] if plural else italian_plural(italian, gender)), gender))
    return tuple(entries)


def adjectives(table: str) -> tuple[Adjective, ...]:
    """Parse lines of `adjective | masculine_singular [masculine_plural] [<]`; < means that it precedes the noun."""
    return tuple(
        Adjective(english[0], italian_adjective(*[form for form in italian if form != "<"]), "<" in italian)
        for english, italian in rows(table)
    )


def verbs(table: str) -> tuple[Verb, ...]:
    """Parse `base [past participle gerund] [>preposition] | infinitive[+] [participle] [>preposition] [=essere]`."""
    entries = []
    for sides in rows(table):
        (english, english_preposition), (italian, italian_preposition) = [
            ([word for word in side if word[0] not in ">="], next((word[1:] for word in side if word[0] == ">"), ""))
            for side in sides
        ]
        conjugation = IRREGULAR.get(italian[0]) or conjugate(*italian)
        essere = "=essere" in sides[1]
        entries.append(Verb(english_verb(*english), conjugation, english_preposition, italian_preposition, essere))
    return tuple(entries)


PERSONS = nouns("""
minister | ministro m
rapporteur | relatore m
citizen | cittadino m
farmer | agricoltore m
worker | lavoratore m
consumer | consumatore m
student | studente m
teacher | insegnante m
journalist | giornalista m
doctor | medico m
patient | paziente m
fisherman fishermen | pescatore m
producer | produttore m
expert | esperto m
judge | giudice m
lawyer | avvocato m
soldier | soldato m
woman women | donna f
child children | bambino m
mother | madre f
engineer | ingegnere m
scientist | scienziato m
taxpayer | contribuente m
refugee | rifugiato m
victim | vittima f
witness | testimone m
colleague | collega m
voter | elettore m
mayor | sindaco m sindaci
ambassador | ambasciatore m
speaker | oratore m
driver | conducente m
passenger | passeggero m
tourist | turista m
friend | amico m
official | funzionario m
""")

BODIES = nouns("""
committee | commissione f
government | governo m
company | impresa f
agency | agenzia f agenzie
authority | autorità f
court | tribunale m
bank | banca f
university | università f
school | scuola f
hospital | ospedale m
region | regione f
city | città f
village | villaggio m
country | paese m
nation | nazione f
party | partito m
group | gruppo m
assembly | assemblea f
association | associazione f
institution | istituzione f
army | esercito m
factory | fabbrica f
industry | industria f
office | ufficio m
port | porto m
airport | aeroporto m
family | famiglia f
newspaper | giornale m
laboratory | laboratorio m
presidency | presidenza f
majority | maggioranza f
community | comunità f
island | isola f
""")

THINGS = nouns("""
report | relazione f
amendment | emendamento m
directive | direttiva f
regulation | regolamento m
proposal | proposta f
agreement | accordo m
treaty | trattato m
law | legge f
resolution | risoluzione f
decision | decisione f
vote | voto m
debate | dibattito m
question | domanda f
answer | risposta f
problem | problema m
solution | soluzione f
crisis crises | crisi f crisi
conflict | conflitto m
war | guerra f
reform | riforma f
policy | politica f
strategy | strategia f strategie
programme | programma m
project | progetto m
plan | piano m
budget | bilancio m
tax | tassa f
price | prezzo m
cost | costo m
market | mercato m
product | prodotto m
service | servizio m
right | diritto m
rule | norma f
principle | principio m
value | valore m
objective | obiettivo m
measure | misura f
step | passo m
sanction | sanzione f
risk | rischio m
danger | pericolo m
threat | minaccia f minacce
change | cambiamento m
procedure | procedura f
system | sistema m
model | modello m
instrument | strumento m
fund | fondo m
investment | investimento m
loan | prestito m
debt | debito m
contribution | contributo m
effort | sforzo m
result | risultato m
effect | effetto m
cause | causa f
reason | motivo m
idea | idea f
opinion | parere m
position | posizione f
document | documento m
letter | lettera f
text | testo m
article | articolo m
word | parola f
speech | discorso m
request | richiesta f
petition | petizione f
promise | promessa f
commitment | impegno m
meeting | riunione f
negotiation | negoziato m
election | elezione f
mission | missione f
attack | attacco m
accident | incidente m
disaster | disastro m
disease | malattia f
vaccine | vaccino m
animal | animale m
river | fiume m
sea | mare m
ship | nave f
road | strada f
bridge | ponte m
train | treno m
car | automobile f
border | frontiera f
wall | muro m
house | casa f
machine | macchina f
technology | tecnologia f tecnologie
study | studio m
figure | cifra f
list | elenco m
map | mappa f
limit | limite m
obstacle | ostacolo m
mistake | errore m
success | successo m
delay | ritardo m
wage | salario m
prize | premio m
condition | condizione f
message | messaggio m
story | storia f
rise | aumento m
harvest | raccolto m
notion | nozione f
zone | zona f
sector | settore m
resource | risorsa f
source | fonte f
weapon | arma f armi
motion | mozione f
course | corso m
sheet | foglio m
scandal | scandalo m
scheme | schema m
""")

MASS = nouns("""
security | sicurezza f
transparency | trasparenza f
democracy | democrazia f
peace | pace f
freedom | libertà f
justice | giustizia f
solidarity | solidarietà f
unemployment | disoccupazione f
employment | occupazione f
growth | crescita f
trade | commercio m
tourism | turismo m
fishing | pesca f
agriculture | agricoltura f
education | istruzione f
research | ricerca f
health | salute f
energy | energia f
water | acqua f
oil | petrolio m
gas | gas m
coal | carbone m
steel | acciaio m
rice | riso m
wheat | grano m
milk | latte m
meat | carne f
food | cibo m
money | denaro m
poverty | povertà f
hunger | fame f
violence | violenza f
terrorism | terrorismo m
corruption | corruzione f
crime | criminalità f
discrimination | discriminazione f
immigration | immigrazione f
cooperation | cooperazione f
competition | concorrenza f
pollution | inquinamento m
culture | cultura f
trust | fiducia f
progress | progresso m
stability | stabilità f
tobacco | tabacco m
wine | vino m
sugar | zucchero m
cotton | cotone m
development | sviluppo m
sport | sport m
""")

# English nouns used as adjectives. The Italian is an adjective, or a phrase with "di", which is invariable.
MODIFIERS = tuple(
    (english, {form: italian for form in FORMS} if italian.startswith("d") else italian_adjective(italian))
    for english, italian in pairs("""
energy | energetico
climate | climatico
trade | commerciale
budget | di bilancio
labour | del lavoro
transport | dei trasporti
consumer | dei consumatori
health | sanitario
road | stradale
border | di frontiera
tax | fiscale
peace | di pace
food | alimentare
water | idrico
steel | dell'acciaio
oil | petrolifero
defence | di difesa
security | di sicurezza
quality | di qualità
waste | dei rifiuti
research | di ricerca
emergency | di emergenza
data | dei dati
forest | forestale
sea | marittimo
""")
)

ADJECTIVES = adjectives("""
European | europeo
national | nazionale
international | internazionale
social | sociale
economic | economico
political | politico
financial | finanziario
legal | giuridico
military | militare
civil | civile
public | pubblico
private | privato
industrial | industriale
agricultural | agricolo
regional | regionale
local | locale
global | globale
rural | rurale
urban | urbano
digital | digitale
nuclear | nucleare
medical | medico
technical | tecnico
scientific | scientifico
cultural | culturale
democratic | democratico
independent | indipendente
free | libero
open | aperto
strong | forte
weak | debole
safe | sicuro
dangerous | pericoloso
clear | chiaro
effective | efficace
useful | utile
necessary | necessario
fundamental | fondamentale
urgent | urgente
permanent | permanente
annual | annuale
current | attuale
future | futuro
modern | moderno
important | importante
main | principale
common | comune
ambitious | ambizioso
balanced | equilibrato
complex | complesso
difficult | difficile
illegal | illegale
sustainable | sostenibile
external | esterno
internal | interno
foreign | straniero
rich | ricco
poor | povero
historic | storico
famous | famoso
moral | morale
religious | religioso
honest | onesto
generous | generoso
expensive | costoso
heavy | pesante
slow | lento
positive | positivo
negative | negativo
general | generale
special | speciale
absurd | assurdo
wrong | sbagliato
green | verde
black | nero
white | bianco
red | rosso
cold | freddo
clean | pulito
strict | severo
strange | strano
Italian | italiano
French | francese
German | tedesco
Spanish | spagnolo
Greek | greco greci
Polish | polacco
Turkish | turco
Russian | russo
British | britannico
Irish | irlandese
Austrian | austriaco austriaci
Dutch | olandese
new | nuovo <
great | grande <
small | piccolo <
old | vecchio <
good | @buono <
long | lungo <
short | breve <
serious | grave <
first | primo <
real | vero <
other | altro <
enormous | enorme <
excellent | ottimo <
terrible | terribile <
""")

PRENOMINAL = tuple(adjective for adjective in ADJECTIVES if adjective.before)
POSTNOMINAL = tuple(adjective for adjective in ADJECTIVES if not adjective.before)

# Adjectives that can follow a copula or qualify an infinitive ("it is ... to").
PREDICATES = adjectives("""
necessary | necessario
important | importante
possible | possibile
difficult | difficile
useful | utile
absurd | assurdo
acceptable | accettabile
unacceptable | inaccettabile
reasonable | ragionevole
dangerous | pericoloso
legitimate | legittimo
strange | strano
sad | triste
""")

TRANSITIVES = verbs("""
adopt | adottare
adapt | adattare
approve | approvare
reject | respingere respinto
support | sostenere
accept | accettare
defend | difendere difeso
protect | proteggere protetto
improve | migliorare
reduce | ridurre
increase | aumentare
strengthen | rafforzare
change | cambiare
amend | modificare
propose | proporre
publish | pubblicare
examine | esaminare
discuss | discutere discusso
study | studiare
introduce | introdurre
apply | applicare
promote | promuovere promosso
avoid | evitare
stop stopped stopped stopping | fermare
block | bloccare
postpone | rinviare
withdraw withdrew withdrawn | ritirare
respect | rispettare
violate | violare
ignore | ignorare
forget forgot forgotten forgetting | dimenticare
remember | ricordare
understand understood | comprendere compreso
welcome | accogliere
criticise | criticare
condemn | condannare
control controlled controlled controlling | controllare
manage | gestire+
define | definire+
extend | estendere esteso
complete | completare
create | creare
build built | costruire+
damage | danneggiare
threaten | minacciare
affect | colpire+
solve | risolvere risolto
face | affrontare
fight fought | combattere
win won won winning | vincere vinto
lose lost | perdere perso
save | salvare
buy bought | comprare
sell sold | vendere
produce | produrre
use | usare
waste | sprecare
choose chose chosen | scegliere
replace | sostituire+
lead led | guidare
follow | seguire
write wrote written | scrivere scritto
find found | trovare
see saw seen | vedere
abolish | abolire+
tolerate | tollerare
review | riesaminare
deserve | meritare
receive | ricevere
raise | sollevare
listen >to | ascoltare
wait >for | attendere atteso
pay paid >for | pagare
deal dealt >with | affrontare
""")

OBLIQUES = verbs("""
depend >on | dipendere dipeso >da =essere
contribute >to | contribuire+ >a
insist >on | insistere insistito >su
react >to | reagire+ >a
respond >to | rispondere risposto >a
participate >in | partecipare >a
talk >about | parlare >di
doubt | dubitare >di
benefit >from | beneficiare >di
rely >on | confidare >in
vote >on | votare >su
""")

DITRANSITIVES = verbs("""
give gave given | dare
offer | offrire offerto
send sent | inviare
present | presentare
explain | spiegare
submit submitted submitted submitting | sottoporre
guarantee | garantire+
""")

INTRANSITIVES = verbs("""
arrive | arrivare =essere
disappear | sparire+ =essere
emerge | emergere emerso =essere
return | tornare =essere
fail | fallire+ =essere
begin began begun beginning | cominciare =essere
grow grew grown | crescere cresciuto =essere
work | funzionare
suffer | soffrire sofferto
""")

# Verbs that govern an infinitive, which the Italian preposition introduces.
CONTROLS = verbs("""
want | volere
try | cercare >di
refuse | rifiutare >di
decide | decidere deciso >di
promise | promettere promesso >di
continue | continuare >a
manage | riuscire >a =essere
begin began begun beginning | cominciare >a
hope | sperare >di
""")

# Verbs that govern a person and an infinitive; the Italian preposition introduces the person.
PERSUADERS = verbs("""
ask | chiedere chiesto >a
urge | esortare
invite | invitare
allow | permettere permesso >a
force | costringere costretto
help | aiutare
encourage | incoraggiare
""")

INDICATIVES = verbs("""
say said | dire
note | osservare
know knew known | sapere
argue | sostenere
announce | annunciare
add | aggiungere aggiunto
confirm | confermare
show showed shown | dimostrare
forget forgot forgotten forgetting | dimenticare
""")

SUBJUNCTIVES = verbs("""
believe | credere
hope | sperare
doubt | dubitare
fear | temere
think thought | pensare
""")

INSTITUTIONS = pairs("""
the Commission | @il:fs Commissione
the Council | @il:ms Consiglio
Parliament | @il:ms Parlamento
the European Union | @il:fs Unione europea
the Court of Justice | @il:fs Corte di giustizia
the European Central Bank | @il:fs Banca centrale europea
the United Nations | @il:fp Nazioni Unite
the Member States | @il:mp Stati membri
the Socialists | @il:mp socialisti
the Liberals | @il:mp liberali
the Greens | @il:mp Verdi
the Conservatives | @il:mp conservatori
the Court of Auditors | @il:fs Corte dei conti
the Ombudsman | @il:ms Mediatore
the Presidency | @il:fs Presidenza
the Constitution | @il:fs Costituzione
""")

TITLES = pairs("""
Mr | @il:ms signor
Mrs | @il:fs signora
Commissioner | @il:ms commissario
Minister | @il:ms ministro
President | @il:ms presidente
""")

SURNAMES = tuple(
    name
    for (name,) in pairs("""
Berger
Novak
Silva
Costa
Martin
Fischer
Jensen
Larsen
Kowalski
Horvat
Moretti
Garcia
Lopez
Lambert
Weber
Keller
Virtanen
Popescu
Murphy
Evans
Clark
Baker
Schmidt
Peeters
Rossi
Bianchi
Nilsson
Walker
Dimitrov
Petrov
""")
)

COUNTRIES = pairs("""
Italy | @il:fs Italia
France | @il:fs Francia
Germany | @il:fs Germania
Spain | @il:fs Spagna
Greece | @il:fs Grecia
Poland | @il:fs Polonia
Portugal | @il:ms Portogallo
Austria | @il:fs Austria
Belgium | @il:ms Belgio
Denmark | @il:fs Danimarca
Sweden | @il:fs Svezia
Finland | @il:fs Finlandia
Ireland | @il:fs Irlanda
Hungary | @il:fs Ungheria
Romania | @il:fs Romania
Turkey | @il:fs Turchia
Russia | @il:fs Russia
China | @il:fs Cina
Africa | @il:fs Africa
Europe | @il:fs Europa
""")

CITIES = pairs("""
Brussels | Bruxelles
Strasbourg | Strasburgo
Rome | Roma
Paris | Parigi
London | Londra
Lisbon | Lisbona
Vienna | Vienna
Athens | Atene
Copenhagen | Copenaghen
Warsaw | Varsavia
Prague | Praga
Geneva | Ginevra
Berlin | Berlino
Dublin | Dublino
""")

MONTHS = pairs("""
January | gennaio
February | febbraio
March | marzo
April | aprile
May | maggio
June | giugno
July | luglio
August | agosto
September | settembre
October | ottobre
November | novembre
December | dicembre
""")
LONG_MONTHS = MONTHS[0:7:2] + MONTHS[7::2]  # with 31 days

WEEKDAYS = pairs("""
Monday | lunedì
Tuesday | martedì
Wednesday | mercoledì
Thursday | giovedì
Friday | venerdì
Saturday | sabato
""")

DAYS = pairs("""
first | primo
second | due
third | tre
fourth | quattro
fifth | cinque
sixth | sei
seventh | sette
eighth | otto
ninth | nove
tenth | dieci
eleventh | undici
twelfth | dodici
thirteenth | tredici
fourteenth | quattordici
fifteenth | quindici
sixteenth | sedici
seventeenth | diciassette
eighteenth | diciotto
nineteenth | diciannove
twentieth | venti
twenty-first | ventuno
twenty-second | ventidue
twenty-third | ventitré
twenty-fourth | ventiquattro
twenty-fifth | venticinque
twenty-sixth | ventisei
twenty-seventh | ventisette
twenty-eighth | ventotto
twenty-ninth | ventinove
thirtieth | trenta
thirty-first | trentuno
""")

CARDINALS = pairs("""
two | due
three | tre
four | quattro
five | cinque
six | sei
seven | sette
eight | otto
nine | nove
ten | dieci
eleven | undici
twelve | dodici
thirteen | tredici
fourteen | quattordici
fifteen | quindici
sixteen | sedici
seventeen | diciassette
eighteen | diciotto
nineteen | diciannove
twenty | venti
twenty-five | venticinque
thirty | trenta
thirty-six | trentasei
forty | quaranta
forty-eight | quarantotto
fifty | cinquanta
sixty | sessanta
seventy | settanta
eighty | ottanta
ninety | novanta
""")

HUNDREDS = pairs("""
one hundred | cento
two hundred | duecento
three hundred | trecento
five hundred | cinquecento
six hundred | seicento
nine hundred | novecento
""")

SCALES = (("thousand", "mila"), ("million", " milioni di"), ("billion", " miliardi di"))

YEARS = pairs("""
nineteen ninety-two | millenovecentonovantadue
nineteen ninety-nine | millenovecentonovantanove
two thousand | duemila
two thousand and one | duemilauno
two thousand and three | duemilatré
two thousand and four | duemilaquattro
two thousand and six | duemilasei
two thousand and eight | duemilaotto
two thousand and nine | duemilanove
two thousand and eleven | duemilaundici
two thousand and twelve | duemiladodici
""")

# Adverbs that precede the English main verb and follow the Italian finite verb.
ADVERBS = pairs("""
always | sempre
often | spesso
still | ancora
finally | finalmente
also | anche
simply | semplicemente
clearly | chiaramente
rightly | giustamente
strongly | fortemente
rarely | raramente
quickly | rapidamente
slowly | lentamente
gradually | gradualmente
immediately | immediatamente
firmly | fermamente
""")

CONNECTIVES = pairs("""
However | tuttavia
Therefore | pertanto
Moreover | inoltre
In fact | infatti
Unfortunately | purtroppo
Naturally | naturalmente
In my opinion | a mio parere
First of all | innanzitutto
On the other hand | d'altra parte
For this reason | per questo motivo
At last | finalmente
In conclusion | in conclusione
""")

ADDRESSES = pairs("""
Mr President | signor Presidente
Madam President | signora Presidente
Ladies and gentlemen | onorevoli colleghi
Commissioner | signor commissario
Minister | signor ministro
""")

PAST_TIMES = pairs("""
yesterday | ieri
last week | la settimana scorsa
last year | l'anno scorso
last month | il mese scorso
this morning | questa mattina
last night | ieri sera
ten years ago | dieci anni fa
two months ago | due mesi fa
""")

FUTURE_TIMES = pairs("""
tomorrow | domani
next week | la settimana prossima
next year | l'anno prossimo
next month | il mese prossimo
this evening | questa sera
in a few days | tra qualche giorno
tonight | stasera
soon | presto
""")

# Prepositions of adjuncts; the Italian one contracts with a following article.
ADJUNCTS = pairs("""
with | con
without | senza
for | per
despite | nonostante
because of | a causa di
thanks to | grazie a
before | prima di
after | dopo
during | durante
according to | secondo
instead of | invece di
against | contro
in the name of | in nome di
under | sotto
through | attraverso
in favour of | a favore di
""")

LINKS = pairs("""
on | su
about | su
for | per
against | contro
between | tra
with | con
without | senza
""")

# Determiners by number; K stands for the form of the noun.
DETERMINERS = {
    "s": pairs("""
the | @il:K
the | @il:K
the | @il:K
the | @il:K
the | @il:K
@a | @un:K
@a | @un:K
@a | @un:K
this | @questo:K
that | @quello:K
our | @il:K nostro:K
their | @il:K loro
my | @il:K mio:K
every | ogni
"""),
    "p": pairs("""
the | @il:K
the | @il:K
the | @il:K
the | @il:K
these | @questo:K
those | @quello:K
our | @il:K nostro:K
their | @il:K loro
my | @il:K mio:K
many | molto:K
some | alcuno:K
several | diverso:K
all the | tutto:K @il:K
few | poco:K
more | più
too many | troppo:K
NUMBER | NUMBER
NUMBER | NUMBER
"""),
}
AGREEING_DETERMINERS = {
    forms.split()[0]: dict(zip(FORMS, forms.split(), strict=True))
    for forms in (
        "nostro nostra nostri nostre",
        "mio mia miei mie",
        "molto molta molti molte",
        "alcuno alcuna alcuni alcune",
        "diverso diversa diversi diverse",
        "tutto tutta tutti tutte",
        "poco poca pochi poche",
        "troppo troppa troppi troppe",
    )
}

# Further word lists, which patterns use by name.
WORD_LISTS = {
    "connective": CONNECTIVES,
    "address": ADDRESSES,
    "pasttime": PAST_TIMES,
    "futuretime": FUTURE_TIMES,
    "weekday": WEEKDAYS,
    "month": MONTHS,
    "year": YEARS,
    "cardinal": CARDINALS,
    "evaluation": tuple((adjective.english, adjective.italian["ms"]) for adjective in PREDICATES)
    + pairs("right | giusto\nwrong | sbagliato\nfair | equo\nwise | saggio\nurgent | urgente"),
    "recipient": pairs("me | mi\nus | ci\nhim | gli\nher | le"),
    "who": pairs("can | può\nmust | deve\nwants to | vuole\nshould | dovrebbe\ncould | potrebbe"),
    "one": pairs("nobody can | nessuno può\nnobody wants to | nessuno vuole\neveryone must | tutti devono"),
    "emotion": pairs(
        "glad | lieto\nsorry | dispiaciuto\nproud | orgoglioso\nsurprised | sorpreso\nconvinced | convinto"
    ),
}

# One sentence pattern on each line: weight, English, Italian. A slot <kind> is filled with the same phrase in both
# languages; a digit distinguishes two slots of a kind. <kind:a/b> selects by the number of that phrase, <kind:a/b/c/d>
# by its form ms, fs, mp or fp.
PATTERNS = """
18 | <main>. | <main>.
5 | <present>. | <present>.
3 | <connective>, <main>. | <connective>, <main>.
2 | <address>, <main>. | <address>, <main>.
5 | <question>? | <question>?
2 | Why <question>? | perché <question>?
2 | How <modalquestion>? | come <modalquestion>?
1 | When <futurequestion>? | quando <futurequestion>?
1 | Where <modalquestion>? | dove <modalquestion>?
1 | What <gapquestion>? | che cosa <gapquestion>?
1 | How many <bare> <gapquestion>? | <bare:-/-/Quanti/Quante> <bare> <gapquestion>?
1 | Who <who> <infinitive>? | chi <who> <infinitive>?
1 | <one> <infinitive>. | <one> <infinitive>.
2 | <belief> that <hoped>. | <belief> che <hoped>.
3 | <report> that <clause>. | <report> che <clause>.
1 | <actor> <actor:has/have> told <recipient> that <clause>. | <actor> <recipient> <actor:ha/hanno> detto che <clause>.
1 | If <present>, <future>. | se <present>, <future>.
1 | <future> if <present>. | <future> se <present>.
2 | If <unreal>, <hypothetical>. | se <unreal>, <hypothetical>.
1 | When <past>, <past2>. | quando <past>, <past2>.
1 | Although <perfect>, <clause>. | anche se <perfect>, <clause>.
1 | <clause>, because <clause2>. | <clause>, perché <clause2>.
1 | <clause>, while <clause2>. | <clause>, mentre <clause2>.
2 | <item> <item:is/are> on the table, and <echo>. | <item> <item:è/sono> sul tavolo, e <echo>.
2 | As for <item>, <echo>. | quanto a <item>, <echo>.
1 | As for <item>, we talked about <item:it/them> yesterday. | quanto a <item>, ne abbiamo parlato ieri.
1 | As for <item>, I do not believe in <item:it/them>. | quanto a <item>, non ci credo.
2 | It is <evaluation> to <infinitive>. | è <evaluation> <infinitive>.
1 | It would be <evaluation> to <infinitive>. | sarebbe <evaluation> <infinitive>.
1 | Is it really <evaluation> to <infinitive>? | è davvero <evaluation> <infinitive>?
2 | It is <evaluation> that <doubt>. | è <evaluation> che <doubt>.
1 | The fact that <doubt> is <evaluation>. | il fatto che <doubt> è <evaluation>.
1 | It is clear that <clause>. | è chiaro che <clause>.
1 | It is not true that <doubt>. | non è vero che <doubt>.
1 | There is no doubt that <clause>. | non c'è dubbio che <clause>.
1 | I regret that <doubt>. | mi rammarico che <doubt>.
1 | I am <emotion> that <doubt>. | sono <emotion> che <doubt>.
1 | I wonder whether <doubt>. | mi chiedo se <doubt>.
1 | We do not know whether <doubt>. | non sappiamo se <doubt>.
1 | Can you tell us whether <doubt>? | può dirci se <doubt>?
1 | I would like to thank <person> for <object>. | vorrei ringraziare <person> per <object>.
1 | Thank you for <object>, <vocative>. | grazie per <object>, <vocative>.
2 | Let us <exhortation>. | <exhortation>.
1 | We need <object>. | abbiamo bisogno di <object>.
1 | What we need is <object>. | ciò di cui abbiamo bisogno <object:è/sono> <object>.
1 | There <indefinite:is/are> <indefinite> in <place>. | <place> <indefinite:c'è/ci sono> <indefinite>.
1 | There <indefinite:was/were> <indefinite> <pasttime>. | <pasttime> <indefinite:c'era/c'erano> <indefinite>.
1 | We lack <object>. | ci <object:manca/mancano> <object>.
1 | I like <object>. | mi <object:piace/piacciono> <object>.
1 | He does not like <object>. | non gli <object:piace/piacciono> <object>.
1 | She is interested in <object>. | le <object:interessa/interessano> <object>.
1 | <object> <object:is/are> missing from <thing>. | in <thing> <object:manca/mancano> <object>.
1 | <object> <object:is/are> needed in order to <infinitive>. | per <infinitive> <object:occorre/occorrono> <object>.
1 | Only <object> <object:remains/remain>. | <object:Rimane/Rimangono> solo <object>.
1 | The vote on <object> will take place <futuretime>. | <futuretime> si terrà la votazione su <object>.
1 | The debate on <object> took place <pasttime>. | <pasttime> si è svolta la discussione su <object>.
1 | On <weekday> we will vote on <object>. | <weekday> voteremo su <object>.
1 | The debate on <object> is closed. | è chiusa la discussione su <object>.
1 | The next item is the debate on <object>. | l'ordine del giorno reca la discussione su <object>.
1 | <name> now has the floor. | la parola passa ora a <name>.
1 | I voted against <object>, because <clause>. | ho votato contro <object>, perché <clause>.
1 | My group will vote in favour of <object>. | il mio gruppo voterà a favore di <object>.
1 | The price of <mass> rose by <percent> in <year>. | in @il:ms <year> il prezzo di <mass> è salito di <percent>.
1 | <amount> were spent on <object>. | sono stati spesi <amount> per <object>.
1 | <percent> of <people> want to <infinitive>. | <percent> di <people> vuole <infinitive>.
1 | <percent> of <mass> comes from <country>. | da <country> proviene <percent> di <mass>.
1 | It took <cardinal> years to <infinitive>. | ci sono voluti <cardinal> anni per <infinitive>.
1 | <cardinal> months ago <past>. | <cardinal> mesi fa <past>.
3 | On <date>, <past>. | @il:ms <date> <past>.
1 | In <year>, <past>. | in @il:ms <year> <past>.
1 | In <month>, <future>. | a <month> <future>.
1 | In <place>, <clause>. | <place> <clause>.
1 | It is <actor> that must <infinitive>. | <actor:È/Sono> <actor> che <actor:deve/devono> <infinitive>.
1 | Before <gerund>, we should <infinitive>. | prima di <gerund>, dovremmo <infinitive>.
1 | Without <gerund>, we cannot <infinitive>. | senza <gerund>, non possiamo <infinitive>.
1 | Instead of <gerund>, they want to <infinitive>. | invece di <gerund>, vogliono <infinitive>.
1 | By <means>, we could <infinitive>. | <means>, potremmo <infinitive>.
1 | I call on <actor> to <infinitive>. | invito <actor> a <infinitive>.
1 | I ask <actor> to <infinitive>. | chiedo a <actor> di <infinitive>.
1 | I propose <gerund>. | propongo di <gerund>.
1 | That is why <clause>. | ecco perché <clause>.
1 | Under the Rules of Procedure, <clause>. | a norma del regolamento, <clause>.
1 | <actor> <actor:is/are> right, but <clause>. | <actor> <actor:ha/hanno> ragione, ma <clause>.
1 | Neither <institution> nor <country> can <infinitive>. | né <institution> né <country> possono <infinitive>.
1 | We will vote on <object> on <date>. | @il:ms <date> voteremo su <object>.
2 | On <date> we must <infinitive>. | @il:ms <date> dobbiamo <infinitive>.
1 | By <cardinal> votes to <cardinal2>, <past>. | con <cardinal> voti contro <cardinal2>, <past>.
1 | Do you believe that <hoped>? | crede che <hoped>?
1 | Can you <infinitive>? | può <infinitive>?
1 | What do you think about <object>? | che cosa pensa di <object>?
1 | You should not <infinitive>. | lei non dovrebbe <infinitive>.
1 | <thing> <thing:is/are> one of the reasons why <clause>. | <thing> <thing:è/sono> uno dei motivi per cui <clause>.
1 | I have received a letter from <actor> about <object>. | ho ricevuto da <actor> una lettera su <object>.
1 | At the request of <actor>, <past>. | su richiesta di <actor>, <past>.
1 | I oppose <object>. | mi oppongo a <object>.
1 | We are waiting for <object>, not for <object2>. | attendiamo <object>, non <object2>.
"""
